"""The comparison in bounding boxes: with them, without them, and with some."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from otnn.cli.tables import compare_tables
from otnn.explain import attribute
from otnn.metrics import box_regions, pointing_game, top_share
from otnn.models import predict
from otnn.report import write_report
from otnn.run import config
from otnn.run.certify import certify_run
from otnn.run.compare import compare_run
from otnn.run.explain import explain_gallery
from otnn.run.folder import Run, open_run
from otnn.run.train import dataset_of, fingerprint, train
from tests.data.image_makers import make_zip, table

BOXES = ("box_share", "pointing_game")
NO_BOX = 5  # every fifth picture


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures of 8 x 8: noise with a bright or a dark square of 3 x 3, which is in the metadata."""
    folder = tmp_path_factory.mktemp("boxed")
    rng = np.random.default_rng(0)
    for split, count in (("train", 160), ("test", 40)):
        images, rows = {}, []
        for k in range(count):
            x, y = (int(place) for place in rng.integers(0, 6, 2))
            pixels = rng.integers(100, 150, (8, 8, 1)).repeat(3, axis=2).astype(np.uint8)
            pixels[y : y + 3, x : x + 3] = 255 * (k % 2)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "png")
            images[f"{k:03}.png"] = stream.getvalue()
            box = ("", "", "", "") if k % NO_BOX == 0 else (x, y, x + 2, y + 2)
            rows.append(
                {"file_name": f"{k:03}.png", "label": k % 2} | dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))
            )
        make_zip(folder / f"s-{split}.zip", images | {"metadata.csv": table(rows)})
    options = (f"data.name={folder}", "data.size=8", "training.epochs=4", "training.batch_size=32")
    shape = ("model.architecture=dense", "model.widths=[16]")
    train(config.load(overrides=(*options, *shape)), folder / "run", quiet=True)
    return folder / "run"


def cells_of(content: dict[str, Any], **names: str) -> list[dict[str, Any]]:
    return [cell for cell in content["cells"] if names.items() <= cell.items()]


def test_figures_are_those_of_the_metrics_called_by_hand(boxed: Path) -> None:
    run = open_run(boxed)
    content = compare_run(run, methods=["saliency", "smoothgrad"], metrics=[*BOXES, "complexity"], samples=30, seed=2)
    test = dataset_of(run).test
    chosen = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:30]
    assert test.boxes is not None
    regions = box_regions(test.boxes[chosen], (8, 8))
    without = [k for k, index in enumerate(chosen.tolist()) if index % NO_BOX == 0]
    assert 2 < len(without) < 30
    assert content["box_area"] == pytest.approx(9 / 64)
    for network in ("otnn", "unconstrained"):
        model, x = run.network(network), test.images[chosen]
        target = predict(model(x).detach())
        maps = attribute(model, x, target, "saliency", score="margin")
        for metric, result in (
            ("box_share", top_share(maps, regions)),
            ("pointing_game", pointing_game(maps, regions)),
        ):
            (cell,) = cells_of(content, network=network, method="saliency", metric=metric)
            assert [k for k, value in enumerate(cell["per_sample"]) if value is None] == without
            assert cell["mean"] == pytest.approx(result.mean)
            assert cell["interval"] == pytest.approx(list(result.interval))
            assert (cell["undefined"], cell["direction"], cell["forwards"]) == (len(without), "up", 0)
    assert {test["metric"] for test in content["tests"]} >= set(BOXES)
    (told,) = (t for t in content["tests"] if (t["metric"], t["method"]) == ("box_share", "saliency"))
    assert told["samples"] == 30 - len(without)
    assert content["verdict"][-1] == (
        "The boxes cover 14.1% of a picture on average: the box share and pointing game of a map at random."
    )


def test_boxes_do_not_enter_the_fingerprint_of_the_data(boxed: Path) -> None:
    """No network depends on them: a box that was corrected asks for another comparison, and for no training."""
    run = open_run(boxed)
    dataset = dataset_of(run)
    test = dataclasses.replace(dataset.test, boxes=None)
    bare = dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, boxes=None), test=test)
    assert fingerprint(dataset) == fingerprint(bare) == run.manifest["data"]
    content = compare_run(run, dataset=bare, methods=["saliency"], metrics=["box_share"], samples=4)
    assert content["box_area"] is None
    assert all(cell["reason"].startswith("the test split has no boxes") for cell in content["cells"])


def test_without_boxes_the_cells_say_why(run: Run) -> None:
    content = compare_run(run, methods=["saliency", "guided_backprop"], metrics=[*BOXES, "deletion"], samples=4)
    for metric in BOXES:
        cells = cells_of(content, metric=metric)
        assert len(cells) == 4
        for cell in cells:
            refused = (cell["network"], cell["method"]) == ("otnn", "guided_backprop")
            start = (
                "guided_backprop changes" if refused else "the test split has no boxes: its metadata have no columns"
            )
            assert cell["reason"].startswith(start)
            assert set(cell) == {"network", "method", "metric", "reason", "best"}
    assert all(cell["mean"] is not None for cell in cells_of(content, metric="deletion", method="saliency"))
    assert content["box_area"] is None
    assert not any("boxes" in sentence for sentence in content["verdict"])
    assert {test["metric"] for test in content["tests"]} == {"deletion", "deletion_normalised"}
    compare_tables(content)
    certify_run(run)
    explain_gallery(run, size=2)
    write_report(run)
    page = (run.path / "report.html").read_text()
    assert 'title="the test split has no boxes: its metadata' in page
