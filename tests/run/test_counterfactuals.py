"""Counterfactuals as a stage of a run: figures, judge, refusals, pictures, and the command line."""

import base64
import html
import io
import json
import math
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from otnn import metrics
from otnn.cli import main
from otnn.data import Dataset, Split
from otnn.errors import InputError
from otnn.explain import Counterfactual, counterfactual, nearest
from otnn.lipschitz import bound
from otnn.models import predict
from otnn.report.counterfactual_pictures import Block, Panel, grid_picture
from otnn.run import config, counterfactual_data
from otnn.run import counterfactuals as stage
from otnn.run.counterfactual_data import NEIGHBOURS, along, followed, real_images
from otnn.run.counterfactual_grid import blocks, pictured
from otnn.run.counterfactual_words import mark_best, verdict
from otnn.run.counterfactuals import choose_images, counterfactual_run
from otnn.run.fit import scores_of
from otnn.run.folder import Run, empty_network, open_run
from otnn.run.judge import FILE
from otnn.run.train import dataset_of, train


@pytest.fixture(scope="module")
def walked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """A run with counterfactuals, measured in more chunks than one."""
    path = tmp_path_factory.mktemp("walked") / "run"
    shutil.copytree(trained, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_BUDGET", 4 * 9 * 64 * 4 * 7)  # seven images a chunk
        content = counterfactual_run(open_run(path), samples=20, seed=3)
    return open_run(path), content


@pytest.fixture
def judged(walked: tuple[Run, dict[str, Any]], tmp_path: Path) -> Run:
    """A run that has its judge."""
    shutil.copytree(walked[0].path, tmp_path / "judged")
    return open_run(tmp_path / "judged")


def judge_in(run: Run) -> torch.nn.Module:
    model = empty_network(run.manifest["model"], constrained=False)
    model.load_state_dict(load_file(run.path / FILE))
    return model.eval()


@pytest.mark.parametrize("network", ["otnn", "unconstrained"])
def test_figures_are_those_of_the_library_called_by_hand(walked: tuple[Run, dict[str, Any]], network: str) -> None:
    run, content = walked
    data = dataset_of(run)
    chosen = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(3))[:20]
    model = run.network(network)
    way = counterfactual(model, data.test.images[chosen], bound(model.body, model.input_shape), steps=9)
    still = replace(way, path=way.inputs.unsqueeze(1))
    judge = judge_in(run)
    real: Any = (data.train.images, data.train.labels)
    reference: Any = {"reference": (data.test.images, data.test.labels)}
    by_hand = {
        "validity": metrics.validity(way),
        "distance_over_radius": metrics.distance_over_radius(way),
        "tightness": metrics.tightness(way),
        "data_distance": metrics.data_distance(way, *real, **reference),
        "data_distance_start": metrics.data_distance(still, *real, **reference),
        "independent_score": metrics.independent_score(way, judge),
        "independent_score_start": metrics.independent_score(still, judge),
        "concentration": metrics.concentration(way),
    }
    told = content["networks"][network]["measures"]
    for name, result in by_hand.items():
        # chunks of another size round differently in float32
        assert told[name]["mean"] == pytest.approx(result.mean, rel=1e-4), name
        assert told[name]["interval"] == pytest.approx(list(result.interval), rel=1e-3), name
        assert (told[name]["direction"], told[name]["undefined"]) == (result.direction, result.undefined), name
    assert told["distance"]["mean"] == pytest.approx(float(way.distance.double().nanmean()), rel=1e-4)
    assert told["outside"]["mean"] == pytest.approx(float(way.outside.double().mean()), rel=1e-4)
    assert told["price"]["mean"] == 1
    assert sum(content["networks"][network]["statuses"].values()) == 20
    right = predict(judge(data.test.images)) == data.test.labels
    assert content["judge"]["accuracy"] == float(right.double().mean())
    # far above the 10 % of a guess, and no copy of the network that it judges
    assert content["judge"]["accuracy"] > 0.6
    assert content["judge"]["seed"] == run.config.seed + 1
    own = run.network("unconstrained").state_dict()
    assert any(not torch.equal(value, own[name]) for name, value in judge.state_dict().items())


def slow_nearness(way: Counterfactual, data: Dataset, k: int, step: int) -> tuple[float, float]:
    """Image k at one length: its distance to the data of the target over the usual one, and whose image is nearest."""
    train, test, goal = data.train, data.test, int(way.target[k])
    own = train.images[train.labels == goal].double()

    def mean_nearest(image: torch.Tensor) -> float:
        return float((own - image.double()).flatten(1).norm(dim=1).sort().values[:NEIGHBOURS].mean())

    usual = torch.tensor([mean_nearest(image) for image in test.images[test.labels == goal]]).mean()
    far = (train.images.double() - way.path[k, step].double()).flatten(1).norm(dim=1)
    return mean_nearest(way.path[k, step]) / float(usual), float(train.labels[far.argmin()] == goal)


@pytest.mark.parametrize(("box", "iterations"), [(False, 1), (True, 1), (False, 3)])
def test_the_way_is_held_against_real_images_at_every_length(run: Run, box: bool, iterations: int) -> None:
    data = dataset_of(run)
    settings = {"steps": 5, "box": box, "iterations": iterations}
    images = data.test.images[:6].clone()
    images[2] = torch.nan
    way = stage.walk(run.network("otnn"), images, None, settings)
    found = along(way, real_images(data, "cpu"))
    assert all(values.shape == (6, 5) for values in found.values())
    assert all(bool(values[2].isnan().all()) for values in found.values())
    for k in (0, 1, 3, 4, 5):
        for step in (0, 2, 4):
            distance, same = slow_nearness(way, data, k, step)
            assert float(found["data_distance"][k, step]) == pytest.approx(distance, rel=1e-5)
            assert float(found["nearest_is_target"][k, step]) == same
        assert found["lengths"][k, 0] == 0
        if iterations == 1:
            assert found["lengths"][k].tolist() == pytest.approx([0, 0.5, 1, 1.5, 2], rel=1e-6)
    # at both ends the distance is that of the table
    told = stage.measured(way, real_images(data, "cpu"), run.network("unconstrained"))
    for name, end in (("data_distance_start", 0), ("data_distance", -1)):
        assert torch.allclose(found["data_distance"][:, end], told[name].per_sample, rtol=1e-5, equal_nan=True)


def test_the_content_tells_of_the_whole_way(walked: tuple[Run, dict[str, Any]]) -> None:
    _, content = walked
    assert content["along"]["samples"] == 20
    assert [column["name"] for column in content["along"]["columns"]] == ["data_distance", "nearest_is_target"]
    for network in content["networks"].values():
        told, measures = network["along"], network["measures"]
        assert told["lengths"] == [k / 4 for k in range(9)]
        for name, end in (("data_distance_start", 0), ("data_distance", -1)):
            assert told["data_distance"]["mean"][end] == pytest.approx(measures[name]["mean"], rel=1e-4)
            assert told["data_distance"]["interval"][end] == pytest.approx(measures[name]["interval"], rel=1e-3)
        shares, intervals = told["nearest_is_target"]["mean"], told["nearest_is_target"]["interval"]
        assert all(low <= share <= high for share, (low, high) in zip(shares, intervals, strict=True))
        # 20 images: a share is a twentieth
        assert all(abs(20 * share - round(20 * share)) < 1e-9 for share in shares)
    # at the end more real images of the target are nearest than where the images are from
    own = content["networks"]["otnn"]["along"]["nearest_is_target"]["mean"]
    assert own[-1] > own[0]


def test_the_cost_of_the_whole_way_is_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset_of(run)
    real = real_images(data, "cpu")
    each = 9 * real.images.numel()
    assert followed(360, real, 9) == 360
    monkeypatch.setattr(counterfactual_data, "_PRODUCTS", 5 * each + 1)
    assert (followed(360, real, 9), followed(3, real, 9), followed(360, real, 90)) == (5, 3, 2)
    content = counterfactual_run(run, samples=12)
    assert (content["samples"], content["along"]["samples"]) == (12, 5)
    chosen = choose_images(data.test.labels, 12, 0, None, None)
    way = stage.walk(run.network("otnn"), data.test.images[chosen[:5]], None, {"steps": 9})
    told = content["networks"]["otnn"]
    mean = along(way, real)["data_distance"].mean(dim=0).tolist()
    assert told["along"]["data_distance"]["mean"] == pytest.approx(mean, rel=1e-4)
    assert told["measures"]["validity"]["samples"] == 12


def test_a_class_without_training_images_leaves_the_distance_open(run: Run) -> None:
    data = dataset_of(run)
    way = stage.walk(run.network("otnn"), data.test.images[:8], None, {"steps": 3})
    kept = data.train.labels != way.target[0]
    lacking = replace(data, train=Split(data.train.images[kept], data.train.labels[kept]))
    found = along(way, real_images(lacking, "cpu"))
    missing = way.target == way.target[0]
    assert bool(found["data_distance"][missing].isnan().all())
    assert bool(found["data_distance"][~missing].isfinite().all())
    assert bool((found["nearest_is_target"][missing] == 0).all())


def test_files_are_of_the_run_and_hold_the_content(walked: tuple[Run, dict[str, Any]]) -> None:
    run, content = walked
    assert json.loads((run.path / "counterfactuals.json").read_text()) == json.loads(json.dumps(content))
    assert content["judge"]["sha256"] == run.manifest["files"][FILE]
    assert {"counterfactuals.json", "counterfactuals.png", FILE} <= set(run.manifest["files"])
    assert str(run.path.parent) not in json.dumps(content)
    with Image.open(run.path / "counterfactuals.png") as picture:
        assert picture.size[0] > 800
        assert picture.size[1] > 1000  # two networks with four images each


def test_the_judge_is_trained_once(
    walked: tuple[Run, dict[str, Any]], judged: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained_again(*_: Any, **__: Any) -> None:
        raise AssertionError("the judge is there already")

    monkeypatch.setattr("otnn.run.judge.fit", trained_again)
    _, first = walked
    before = (judged.path / FILE).read_bytes()
    again = counterfactual_run(judged, samples=20, seed=3)
    assert again["judge"] == first["judge"]
    for name, network in again["networks"].items():
        for measure, told in network["measures"].items():
            assert told["mean"] == pytest.approx(first["networks"][name]["measures"][measure]["mean"], rel=1e-4)
    assert (judged.path / FILE).read_bytes() == before
    damaged = bytearray(before)
    damaged[-1] ^= 1
    (judged.path / FILE).write_bytes(damaged)
    with pytest.raises(InputError, match=r"judge\.safetensors: its SHA-256 differs .* `otnn counterfactual "):
        counterfactual_run(judged, samples=4)


def test_a_run_has_the_same_judge_again(walked: tuple[Run, dict[str, Any]], run: Run) -> None:
    counterfactual_run(run, samples=1)
    first, second = (load_file(one.path / FILE) for one in (walked[0], run))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_another_run_judges(run: Run, tmp_path: Path) -> None:
    tiny = ("training.epochs=1", "model.widths=[16]", "seed=7")
    other = train(config.load(overrides=tiny), tmp_path / "other", quiet=True)
    content = counterfactual_run(run, samples=4, judge=other)
    assert (content["judge"]["from"], content["judge"]["seed"], content["judge"]["epochs"]) == ("other", 7, 1)
    assert not (run.path / FILE).exists()
    data = dataset_of(run)
    right = predict(scores_of(other.network("unconstrained"), data.test.images)) == data.test.labels
    assert content["judge"]["accuracy"] == float(right.double().mean())


def test_judges_that_do_not_fit_are_refused(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "copy")
    with pytest.raises(InputError, match=r"the ordinary network of .*copy is the one that is judged; give a run of an"):
        counterfactual_run(run, samples=2, judge=open_run(tmp_path / "copy"))
    with pytest.raises(InputError, match="is the one that is judged"):
        counterfactual_run(run, samples=2, judge=run)
    tiny = ("training.epochs=1", "model.widths=[16]")
    for name, options, what in (
        ("two", ('data.classes=["0", "8"]',), r"judge: expected the classes of .*run, \['0', '1', .* got \['0', '8'\]"),
        ("alone", ("twin=false",), r"alone has no ordinary network \(--no-twin\)"),
    ):
        other = train(config.load(overrides=(*tiny, *options)), tmp_path / name, quiet=True)
        with pytest.raises(InputError, match=what):
            counterfactual_run(run, samples=2, judge=other)
    (tmp_path / "small").mkdir()
    shaped = open_run(tmp_path / "copy")
    shaped.manifest["model"]["input_shape"] = [1, 9, 9]
    with pytest.raises(InputError, match=r"expected the input shape of .*, \[1, 8, 8\], got \[1, 9, 9\]"):
        counterfactual_run(run, samples=2, judge=shaped)
    assert not (run.path / "counterfactuals.json").exists()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"source": "ten"}, "--from ten: no such class; expected one of 0, 1,"),
        ({"target": "11"}, "--to 11: no such class"),
        ({"source": "3", "target": "3"}, "--from and --to: expected two different classes, got 3 for both"),
        ({"samples": 0}, "samples: expected at least 1 test image, got 0"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"steps": 1}, "steps: expected at least 2, got 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_a_judge_is_trained(
    run: Run, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        counterfactual_run(run, **settings)
    assert not (run.path / FILE).exists()


def test_images_are_of_the_source_or_not_of_the_target() -> None:
    labels = torch.arange(30) % 3
    for samples in (5, None):
        assert set(labels[choose_images(labels, samples, 0, 1, 2)].tolist()) == {1}
        assert set(labels[choose_images(labels, samples, 0, None, 2)].tolist()) == {0, 1}
    every = choose_images(labels, None, 0, None, None)
    assert sorted(every.tolist()) == list(range(30))
    assert torch.equal(choose_images(labels, 7, 0, None, None), every[:7])
    assert not torch.equal(choose_images(labels, None, 1, None, None), every)
    with pytest.raises(InputError, match="--from: expected a class with test images"):
        choose_images(labels, None, 0, 4, None)


@pytest.mark.parametrize(("box", "iterations"), [(True, 1), (True, 3), (False, 3)])
def test_one_class_to_another_in_the_box_and_by_iterations(judged: Run, box: bool, iterations: int) -> None:
    run = judged
    content = counterfactual_run(run, samples=8, source="0", target="5", box=box, iterations=iterations)
    assert (content["from"], content["to"], content["box"], content["iterations"]) == ("0", "5", box, iterations)
    data = dataset_of(run)
    index = choose_images(data.test.labels, 8, 0, 0, 5)
    model = run.network("otnn")
    way = counterfactual(
        model,
        data.test.images[index],
        bound(model.body, model.input_shape),
        torch.full((8,), 5),
        steps=9,
        box=box,
        iterations=iterations,
    )
    told = content["networks"]["otnn"]["measures"]
    assert told["price"]["mean"] == pytest.approx(float(way.price.double().nanmean()), rel=1e-4)
    assert (told["price"]["mean"] != 1) == box
    assert told["validity"]["mean"] == metrics.validity(way).mean


def with_tie(data: Dataset, run: Run) -> tuple[Dataset, int]:
    """The test images, of which one is moved to the boundary of a pair until both scores are equal."""
    model = run.network("otnn")
    with torch.no_grad():
        model.head.weight[1] = model.head.weight[0]
        model.head.bias[1] = model.head.bias[0]
        scores = scores_of(model, data.test.images)
    top = scores.argsort(dim=1, descending=True)[:, :2].sort(dim=1).values
    tied = (top == torch.tensor([0, 1])).all(dim=1).nonzero()
    return data, int(tied[0])


def test_a_tie_and_a_broken_image_leave_the_others_as_they_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    data, tied = with_tie(dataset_of(run), run)
    model = run.network("otnn")
    with torch.no_grad():
        model.head.weight[1] = model.head.weight[0]
        model.head.bias[1] = model.head.bias[0]
    unlike = torch.tensor([k for k in range(40) if k != tied])
    scores = scores_of(model, data.test.images[unlike])
    top = scores.argsort(dim=1, descending=True)[:, :2].sort(dim=1).values
    decided = unlike[(top != torch.tensor([0, 1])).any(dim=1) & (scores.argmax(dim=1) > 1)][:4]
    images = data.test.images[torch.cat([torch.tensor([tied]), decided, torch.tensor([0])])].clone()
    images[-1, 0, 0, 0] = torch.nan
    labels = torch.zeros(len(images), dtype=torch.long)
    real = real_images(data, "cpu")
    judge = run.network("unconstrained")
    way = stage.walk(model, images, None, {"steps": 9})
    assert way.status[0].startswith(("a tie", "the gradient is zero"))
    assert way.status[-1] == "the input holds NaN or infinite values"
    told = stage.measured(way, real, judge)
    alone = stage.measured(stage.walk(model, images[1:-1], None, {"steps": 9}), real, judge)
    for name, result in told.items():
        kept = result.per_sample[1:-1]
        assert torch.allclose(kept, alone[name].per_sample, rtol=1e-4, equal_nan=True), name
        assert result.undefined >= 2, name
        assert math.isfinite(result.mean) or name == "distance_over_radius"
    # and the pictures say so in place of images
    monkeypatch.setattr(Run, "network", lambda self, name, device="cpu": model)
    stained = replace(data, test=Split(images, labels))
    columns, found, _ = blocks(
        run, stained, torch.tensor([0, 1, len(images) - 1]), None, None, judge, box=False, iterations=1, device="cpu"
    )
    told_of = [panel.caption for row in found[0].rows for panel in row if panel is not None and panel.values is None]
    assert any("tie" in caption or "gradient" in caption for caption in told_of)
    assert any("NaN" in caption for caption in told_of)
    assert len(columns) == len(found[0].rows[0])


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
        told = re.fullmatch(r"to (\d)\nnot \1\nbelow (\S+)", row[1].caption)  # type: ignore[union-attr]
        assert told is not None
        assert int(told[1]) == way.target[k]
        assert 0 <= float(way.pair_radius[k]) - float(told[2]) < 1e-3


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


def test_a_network_alone_in_one_image(tmp_path: Path) -> None:
    tiny = ("training.epochs=1", "model.widths=[16]", "twin=false", 'data.classes=["0", "8"]')
    run = train(config.load(overrides=tiny), tmp_path / "run", quiet=True)
    content = counterfactual_run(run, samples=1, target="8")
    assert list(content["networks"]) == ["otnn"]
    assert not any(one["best"] for one in content["networks"]["otnn"]["measures"].values())
    assert content["networks"]["otnn"]["measures"]["validity"]["interval"] == [None, None]


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
