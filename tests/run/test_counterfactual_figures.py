"""The figures of counterfactuals as a stage of a run: those of the table, along the whole way, and of which images."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from otnn import metrics
from otnn.data import Dataset, Split
from otnn.errors import InputError
from otnn.explain import Counterfactual, counterfactual
from otnn.lipschitz import bound
from otnn.models import Classifier, predict
from otnn.run import config, counterfactual_data
from otnn.run import counterfactuals as stage
from otnn.run.counterfactual_data import NEIGHBOURS, along, followed, real_images
from otnn.run.counterfactual_grid import blocks
from otnn.run.counterfactuals import choose_images, counterfactual_run
from otnn.run.fit import scores_of
from otnn.run.folder import Run, empty_network
from otnn.run.judge import FILE
from otnn.run.train import dataset_of, train


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


def with_tie(run: Run, images: Tensor) -> tuple[Classifier, int]:
    """The OTNN with the same scores for classes 0 and 1 everywhere, and an image whose two best these are."""
    model = run.network("otnn")
    with torch.no_grad():
        model.head.weight[1] = model.head.weight[0]
        model.head.bias[1] = model.head.bias[0]
        scores = scores_of(model, images)
    top = scores.argsort(dim=1, descending=True)[:, :2].sort(dim=1).values
    return model, int((top == torch.tensor([0, 1])).all(dim=1).nonzero()[0])


def test_a_tie_and_a_broken_image_leave_the_others_as_they_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset_of(run)
    model, tied = with_tie(run, data.test.images)
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


def test_a_network_alone_in_one_image(tmp_path: Path) -> None:
    tiny = ("training.epochs=1", "model.widths=[16]", "twin=false", 'data.classes=["0", "8"]')
    run = train(config.load(overrides=tiny), tmp_path / "run", quiet=True)
    content = counterfactual_run(run, samples=1, target="8")
    assert list(content["networks"]) == ["otnn"]
    assert not any(one["best"] for one in content["networks"]["otnn"]["measures"].values())
    assert content["networks"]["otnn"]["measures"]["validity"]["interval"] == [None, None]
