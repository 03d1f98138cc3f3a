"""The counterfactual that `otnn explain` shows: in the pixel box, by iterations, and of images that cannot be used."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from otnn.cli import main
from otnn.errors import InputError
from otnn.explain import counterfactual
from otnn.lipschitz import bound
from otnn.report import write_report
from otnn.report.load import NOT_PER_IMAGE
from otnn.report.pictures import explanation_picture, way_words
from otnn.run.certify import certify_run
from otnn.run.explain import STEPS, explain_files, explain_gallery, explain_images
from otnn.run.folder import Run
from otnn.run.train import dataset_of


@pytest.mark.parametrize(("box", "iterations"), [(False, 1), (True, 1), (True, 3)])
def test_the_way_is_that_of_the_library(run: Run, box: bool, iterations: int) -> None:
    images = dataset_of(run).test.images[:5]
    arrays = explain_images(run, images, box=box, iterations=iterations)
    model = run.network("otnn").double()
    body = bound(model.body, model.input_shape)
    way = counterfactual(model, images.double(), body, steps=STEPS, box=box, iterations=iterations)
    assert (bool(arrays["box"]), int(arrays["iterations"])) == (box, iterations)
    for name in ("boundary_distance", "tightness", "distances", "potential"):
        assert arrays[name] == pytest.approx(getattr(way, name).numpy(), rel=1e-6, abs=1e-9), name
    inside = (arrays["path"] >= 0) & (arrays["path"] <= 1)
    assert inside.all() == box
    # the guarantees are of the straight line, whatever way is shown
    plain = explain_images(run, images)
    assert arrays["guarantee_bound"] == pytest.approx(plain["guarantee_bound"], rel=1e-6, abs=1e-9, nan_ok=True)


def test_the_caption_tells_how_the_way_was_found() -> None:
    told = [way_words({"box": np.array(b), "iterations": np.array(i)}) for b in (False, True) for i in (1, 4)]
    assert told == [
        "clipped to [0, 1] for display",
        "4 gradients to the boundary, clipped to [0, 1] for display",
        "kept in [0, 1]",
        "4 gradients to the boundary, kept in [0, 1]",
    ]


@pytest.mark.parametrize("iterations", [0, -3])
def test_fewer_than_one_gradient_is_refused_before_anything_is_made(run: Run, tmp_path: Path, iterations: int) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "mine.png")
    text = f"iterations: expected at least 1 gradient on the way to the boundary, got {iterations}"
    with pytest.raises(InputError, match=text):
        explain_files(run, [tmp_path / "mine.png"], out=tmp_path / "out", iterations=iterations)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=text):
        explain_gallery(run, iterations=iterations)
    assert not (run.path / "explanations.npz").exists()


def test_on_the_command_line_and_on_the_page(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["otnn", "explain", str(run.path), *arguments, "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return ended.value.code, told.err if ended.value.code else told.out

    Image.new("L", (8, 8), 90).save(tmp_path / "mine.png")
    file = str(tmp_path / "mine.png")
    out = tmp_path / "out"
    content = json.loads(command(file, "--box", "--iterations", "3", "--out", str(out), "--json")[1])
    assert (content["box"], content["iterations"]) == (True, 3)
    with np.load(out / "mine.explained.npz") as arrays:
        assert (bool(arrays["box"]), int(arrays["iterations"])) == (True, 3)
        assert ((arrays["path"] >= 0) & (arrays["path"] <= 1)).all()
    code, text = command(file, "--iterations", "0", "--out", str(tmp_path / "other"))
    assert code == 2
    assert "--iterations" in text
    assert not (tmp_path / "other").exists()
    gallery = json.loads(command("--box", "--iterations", "2", "--json")[1])
    assert (gallery["box"], gallery["iterations"]) == (True, 2)
    certify_run(run)
    write_report(run)
    page = (run.path / "report.html").read_text()
    assert "looked up 2 times before the boundary" in page
    assert "never out of the range from black to white" in page
    assert "the guarantees speak of the straight line in the first direction" in page
    command("--json")
    write_report(run)
    page = (run.path / "report.html").read_text()
    assert "in the one direction that lowers the lead of the answer fastest at the start" in page
    assert "never out of the range" not in page


def test_images_that_cannot_be_used_leave_the_others_as_they_are(run: Run) -> None:
    images = dataset_of(run).test.images[:7].clone()
    first = explain_images(run, images)
    target = torch.from_numpy(first["target"])
    images[1, 0, 0, 0] = torch.nan
    images[2, 0, 3, 3] = 1.5
    target[3] = int(first["prediction"][3])
    target[4] = -1
    for box, iterations in ((False, 1), (True, 2)):
        arrays = explain_images(run, images, target, box=box, iterations=iterations)
        alone = explain_images(run, images[5:], target[5:], box=box, iterations=iterations)
        assert [str(each)[:24] for each in arrays["status"][1:5]] == [
            "the input holds NaN or i",
            "the input holds values o",
            "the target is the predic",
            "no target is known: -1 w",
        ]
        for name in ("radius", "boundary_distance", "tightness", "distances", "saliency", "guarantee_bound"):
            assert arrays[name][5:] == pytest.approx(alone[name], rel=1e-6, abs=1e-9, nan_ok=True), name
        assert arrays["status"][5:].tolist() == alone["status"].tolist()
        assert arrays["prediction"][1:3].tolist() == [-1, -1]
        assert arrays["radius"][1:3].tolist() == [0, 0]
        assert np.isnan(arrays["saliency"][1:3]).all()
        assert (arrays["radius"][3:5] == first["radius"][3:5]).all()  # of the prediction, whatever the target
    one = {name: value if name in NOT_PER_IMAGE else value[1:2] for name, value in arrays.items()}
    assert explanation_picture(one, run.classes).startswith(b"\x89PNG")
