"""Counterfactuals in pictures, sentences, the report and on the command line."""

import base64
import html
import io
import json
import re
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from otnn.cli import main
from otnn.data import Split
from otnn.explain import Counterfactual, counterfactual, nearest
from otnn.lipschitz import bound
from otnn.models import predict
from otnn.report.counterfactual_pictures import Block, Panel, grid_picture
from otnn.run.counterfactual_grid import blocks, pictured
from otnn.run.counterfactual_words import mark_best, verdict
from otnn.run.fit import scores_of
from otnn.run.folder import Run, open_run
from otnn.run.train import dataset_of


def test_the_pictured_images_are_right_and_of_many_classes(run: Run) -> None:
    data = dataset_of(run).test
    model = run.network("otnn")
    chosen = pictured(model, data.images, data.labels)
    assert (predict(scores_of(model, data.images[chosen])) == data.labels[chosen]).all()
    assert data.labels[chosen].tolist() == [0, 3, 6, 9]
    one = (data.labels == 5).nonzero().squeeze(1)
    assert len(pictured(model, data.images[one], data.labels[one])) == 4
    # where nothing is right, something is shown nevertheless
    wrong = (predict(scores_of(model, data.images)) + 1) % 10
    assert len(pictured(model, data.images, wrong, count=2)) == 2


@pytest.mark.parametrize(("box", "iterations"), [(False, 1), (True, 1), (False, 3)])
def test_the_rows_show_the_way_and_the_nearest_real_image(run: Run, box: bool, iterations: int) -> None:
    data = dataset_of(run)
    model, judge = run.network("otnn"), run.network("unconstrained")
    index = torch.arange(50)
    columns, found, note = blocks(run, data, index, None, None, judge, box=box, iterations=iterations, device="cpu")
    assert [block.title for block in found] == ["OTNN: test images", "unconstrained: test images"]
    assert ("kept in [0, 1]" in note) == box
    places = pictured(model, data.test.images[index], data.test.labels[index])
    images = data.test.images[index[places]]
    exact = run.network("otnn").double()
    way: Counterfactual = counterfactual(
        exact, images.double(), bound(exact.body, exact.input_shape), steps=41, box=box, iterations=iterations
    )
    # at the change of sign itself the rounding decides, which depends on the batch
    said = predict(exact(way.inputs + (1 + 1e-9) * (way.boundary - way.inputs)))
    assert iterations > 1 or torch.equal(said, way.target)  # a bent path may meet a third class
    near = nearest(data.train.images, way.reflected.float().clamp(0, 1), data.train.labels, way.target)
    titles = ("t = 0.5 t*", "t = 1 t*\n(even with target)", "t = 2 t*\n(reflected)")
    half, whole, end = map(columns.index, titles)
    for k, row in enumerate(found[0].rows):
        values = [torch.from_numpy(panel.values) for panel in row if panel is not None and panel.values is not None]
        assert len(values) == len(columns)
        assert torch.equal(values[0], images[k])
        # the map of the potential and the change are of opposite signs
        assert float((values[1] * (way.boundary[k] - images[k])).sum()) < 0
        assert torch.allclose(values[whole], way.boundary[k].float(), atol=1e-6)
        assert torch.equal(values[-1], data.train.images[int(near.index[k, 0])])
        if iterations == 1:
            assert torch.allclose(values[end], way.reflected[k].float(), atol=1e-6)
            free = images[k] + (values[end] - images[k]) / 4
            assert box or torch.allclose(values[half], free, atol=1e-6)
        told = float(re.search(r"moved (\S+)", row[whole].caption)[1])  # type: ignore[index, union-attr]
        assert told == pytest.approx(float(way.boundary_distance[k]), abs=0.006)
        assert f"says {int(said[k])}\n" in row[whole].caption  # type: ignore[union-attr]
        # small below each image: the training image that is nearest to it, of whatever class
        for panel in (row[0], *row[2:-1]):
            assert panel is not None
            assert panel.below is not None
            far = (data.train.images - torch.from_numpy(panel.values).clamp(0, 1)).flatten(1).norm(dim=1)
            assert torch.equal(torch.from_numpy(panel.below.values), data.train.images[int(far.argmin())])
            assert panel.below.caption == f"{int(data.train.labels[far.argmin()])}\n{float(far.min()):.1f} away"
        # what is printed of the pair is a bound: rounded down, and of the target alone
        printed = re.fullmatch(r"to (\d)\nnot \1\nbelow (\S+)", row[1].caption)  # type: ignore[union-attr]
        assert printed is not None
        assert int(printed[1]) == way.target[k]
        assert 0 <= float(way.pair_radius[k]) - float(printed[2]) < 1e-3


def test_an_image_that_cannot_be_read_spoils_no_row(run: Run) -> None:
    data = dataset_of(run)
    judge = run.network("unconstrained")
    index = pictured(run.network("otnn"), data.test.images[:50], data.test.labels[:50])
    # where the network gets one right only those are shown
    data = replace(data, test=Split(data.test.images, (data.test.labels + 1) % 10))
    broken = replace(data, test=Split(data.test.images.clone(), data.test.labels))
    broken.test.images[index[1]] = torch.nan
    _, found, _ = blocks(run, broken, index, None, None, judge, box=False, iterations=1, device="cpu")
    _, alone, _ = blocks(run, data, index, None, None, judge, box=False, iterations=1, device="cpu")
    for block, whole_block in zip(found, alone, strict=True):
        words = [panel.caption for row in block.rows for panel in row if panel is not None and panel.values is None]
        assert [" ".join(each.split()) for each in words] == ["to no class: the input holds NaN or infinite values"]
        # what is said exactly at the boundary hangs on the rounding, which another batch may change
        told, wanted = (
            [[row[k].caption if row[k] else "" for k in (0, 1, -1)] for row in each.rows]  # type: ignore[union-attr]
            for each in (block, whole_block)
        )
        assert sum(one == other for one, other in zip(told, wanted, strict=True)) == 3


def test_the_plan_partner_stands_beside_training_images(whole: Path) -> None:
    run = open_run(whole)
    data = dataset_of(run)
    judge = run.network("unconstrained")
    columns, found, _ = blocks(run, data, torch.arange(20), None, None, judge, box=False, iterations=1, device="cpu")
    assert columns[-1] == "partner under\nthe exact plan"
    assert found[-1].title == "OTNN: training images of the audit"
    assert all(row[-1] is None for block in found[:-1] for row in block.rows)
    panels = [row[-1] for row in found[-1].rows]
    assert len(panels) == 4
    for row, panel in zip(found[-1].rows, panels, strict=True):
        assert panel is not None
        assert panel.values is not None
        partner, image = torch.from_numpy(panel.values), torch.from_numpy(row[0].values)  # type: ignore[union-attr]
        distance = float(re.search(r"(\S+) from the image", panel.caption)[1])  # type: ignore[index]
        assert float((partner - image).norm()) == pytest.approx(distance, abs=0.06)
        place = (data.train.images == partner).flatten(1).all(dim=1).nonzero()
        assert f"{int(data.train.labels[place[0, 0]])}\n" in panel.caption
    _, without, _ = blocks(run, data, torch.arange(20), 0, 0, judge, box=False, iterations=1, device="cpu")
    assert len(without) == 2


def test_the_report_of_a_run_shows_them(whole: Path) -> None:
    content = json.loads((whole / "counterfactuals.json").read_text())
    page = (whole / "report.html").read_text()
    section = page[page.index('id="counterfactuals"') : page.index('id="compare"')]
    assert all(html.escape(sentence, quote=False).replace("'", "&#39;") in section for sentence in content["verdict"])
    assert base64.b64encode((whole / "counterfactuals.png").read_bytes()).decode() in section


def cell(mean: float | None, interval: list[float | None], direction: str = "up") -> dict[str, Any]:
    return {"mean": mean, "interval": interval, "direction": direction, "samples": 9, "undefined": 0}


def test_sentences_and_bold_follow_the_figures() -> None:
    def network(score: float, near: float) -> dict[str, Any]:
        measures = {
            "validity": cell(1.0, [1.0, 1.0]),
            "distance": cell(2.0, [1.0, 3.0]),
            "independent_score": cell(score, [score - 0.05, score + 0.05]),
            "independent_score_start": cell(0.1, [0.0, 0.2]),
            "data_distance": cell(near, [near, near], "down"),
            "data_distance_start": cell(1.5, [1.4, 1.6], "down"),
        }
        return {"measures": measures, "along": {"nearest_is_target": {"mean": [0.02, 0.3, score / 2]}}}

    names = ("validity", "distance", "independent_score", "data_distance")
    content: dict[str, Any] = {
        "columns": [{"name": name, "compared": name != "distance"} for name in names],
        "networks": {"otnn": network(0.7, 1.2), "unconstrained": network(0.2, 1.5), "adversarial": network(0.68, 1.7)},
    }
    mark_best(content)
    best = {key: [n for n in names if one["measures"][n]["best"]] for key, one in content["networks"].items()}
    assert best == {
        "otnn": ["validity", "independent_score", "data_distance"],
        "unconstrained": ["validity"],
        "adversarial": ["validity"],
    }
    own, near, other, _, third, _, first, second = verdict(content)
    assert near == (
        "OTNN: the nearest training image is of the target for 2.0% of the images before they are moved, and for "
        "35.0% of the reflected ones."
    )
    assert own == (
        "OTNN: 100.0% of 9 images flip, after a mean L2 distance of 2.00; the judge sees the target in 70.0% of the "
        "reflected images (10.0% of the originals). They are nearer to the data of the target than the originals: "
        "1.20 against 1.50 (real images: 1)."
    )
    assert "mostly the decision changes and not what an independent network sees" in other
    assert "They are neither nearer to the data of the target nor farther, by the intervals," in other
    assert "mostly" not in third
    assert "They are farther from the data of the target than the originals: 1.70 against 1.50" in third
    assert first.startswith("The judge follows the OTNN's images more often than those of the unconstrained network")
    assert second.startswith("The intervals do not tell the judge's opinion of the OTNN and the adversarial")
    content["networks"]["otnn"] = network(0.05, 1.2)
    assert "less often than those of the unconstrained" in verdict(content)[6]
    content["networks"]["otnn"]["measures"]["validity"]["mean"] = None
    content["networks"]["otnn"]["measures"]["independent_score"] = cell(None, [None, None])
    content["networks"]["otnn"]["along"]["nearest_is_target"]["mean"] = [None, None, None]
    assert verdict(content)[0] == "OTNN: no image could be asked for a counterfactual."
    assert len(verdict(content)) == 5


def test_the_grid_draws_what_it_is_given() -> None:
    image, ramp = torch.full((1, 4, 4), 0.5).numpy(), torch.linspace(-1, 1, 16).view(1, 4, 4).numpy()
    rows = [[Panel(image, "$5 and $6"), Panel(ramp, "map", signed=True), None, Panel(None, "a tie")]]
    png = grid_picture(["one", "two", "three", "four"], [Block("first", rows), Block("second", rows * 2)], "note")
    with Image.open(io.BytesIO(png)) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20) or []}
    assert {(11, 79, 138), (168, 67, 0)} <= colours  # both ends of the map
    below = [[replace(rows[0][0], below=Panel(ramp, "small", signed=True)), None, None, None]]  # type: ignore[type-var]
    taller = grid_picture(["one", "two", "three", "four"], [Block("first", rows), Block("second", below * 2)], "note")
    sizes = [Image.open(io.BytesIO(each)).size for each in (png, taller)]
    assert sizes[1][0] == sizes[0][0]
    assert sizes[1][1] > sizes[0][1] + 100
    with_none = grid_picture(["one"], [Block("empty", [])], "note")
    assert with_none.startswith(b"\x89PNG")


def test_on_the_command_line(judged: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = judged

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["otnn", "counterfactual", str(run.path), *arguments])
        with suppress(SystemExit):  # what went wrong is no answer, which is read
            main()
        return capsys.readouterr().out

    content = json.loads(command("--from", "0", "--to", "6", "--samples", "6", "--box", "--json", "--device", "cpu"))
    assert content == json.loads((run.path / "counterfactuals.json").read_text())
    assert (content["from"], content["to"], content["box"], content["samples"]) == ("0", "6", True, 6)
    text = command("--samples", "0", "--iterations", "2", "--device", "cpu")
    told = json.loads((run.path / "counterfactuals.json").read_text())
    assert told["samples"] == 360
    for words in ("validity ↑", "distance over", "data distance,", *told["verdict"][0].split()[:6]):
        assert words in text
    assert "judge: of seed 1, 5 epochs, right on" in text
    assert text.count(" .. ") >= 2 * 8
    monkeypatch.setattr(sys, "argv", ["otnn", "counterfactual", str(run.path), "--from", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "reading digits\notnn: --from x: no such class; expected one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"
    )
