"""Attacks as a stage: figures, settings, refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from otnn.attacks.outcome import evaluate
from otnn.attacks.step import gradient_step
from otnn.attacks.table import ATTACKS
from otnn.certify import certified_accuracy, certify
from otnn.data import Split
from otnn.errors import InputError
from otnn.models import predict
from otnn.run import attack as stage
from otnn.run import attacked, config
from otnn.run.attack import attack_run
from otnn.run.attacked import Victim
from otnn.run.corruptions import CORRUPTIONS
from otnn.run.folder import Run
from otnn.run.train import dataset_of, train
from tests.run.attacks import BOTH, HOW, OWN, Told, chosen, linear


@pytest.mark.parametrize("network", BOTH)
def test_accuracy_is_that_of_the_library_called_by_hand(told: Told, network: str) -> None:
    run, content = told
    images, labels = chosen(dataset_of(run), 40, 3)
    model = run.network(network)
    figures = content["networks"][network]
    right = predict(model(images)) == labels
    assert figures["accuracy"] == float(right.double().mean())
    certificate = certify(model, images)
    by_hand = certified_accuracy(certificate, labels, content["radii"])
    assert figures["certified"] == pytest.approx(list(by_hand.values()), abs=1e-15)
    left = right.clone()
    for radius, share in zip(content["radii"], figures["attacks"]["step"]["accuracy"], strict=True):
        points = gradient_step(model, images, labels, radius * (1 - attacked.SLACK))
        left &= ~evaluate(model, images, labels, points).success
        assert share == float(left.double().mean()), radius
    # every distance is of a point that lies in the ball of some radius of the grid, and below it in none
    distances = [each for each in figures["attacks"]["pgd"]["distance"] if each is not None]
    assert sum(each == 0 for each in distances) == 40 - int(right.sum())
    assert all(each <= max(content["radii"]) for each in distances)


def test_the_best_attack_is_the_minimum_of_every_sample(told: Told) -> None:
    for figures in told[1]["networks"].values():
        columns = [figures["attacks"][name]["distance"] for name in OWN]
        best = [min(math.inf if each is None else each for each in row) for row in zip(*columns, strict=True)]
        for radius, share in zip(told[1]["radii"], figures["best"]["accuracy"], strict=True):
            assert share == sum(each > radius for each in best) / 40
        assert figures["best"]["distance"] == [None if each == math.inf else each for each in best]
        won = [each for each in best if 0 < each < math.inf]
        # ties count for both
        assert sum(figures["best"]["nearest"].values()) >= len(won) > 0
        assert figures["at_largest"] == 0


def test_files_hold_the_content(told: Told) -> None:
    run, content = told
    assert json.loads((run.path / "attacks.json").read_text()) == json.loads(json.dumps(content))
    assert {"attacks.json", "attacks.png"} <= set(run.manifest["files"])
    assert "attack" in run.results()["seconds"]
    assert str(run.path.parent) not in json.dumps(content)
    assert (content["seed"], content["samples"], content["steps"]) == (3, 40, 5)
    assert content["attacks"]["pgd"] == {"source": "otnn", "minimal": False, "loss": "margin"} | {
        "passes": "5 steps a radius, 1 start"
    }
    assert content["radii"][:3] == [0.0, 36 / 255, 0.25]
    assert content["radii"][-1] == 8.0  # of 64 pixels
    with Image.open(run.path / "attacks.png") as picture:
        assert picture.size[0] > 1000
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20) or []}
    assert {(230, 159, 0), (86, 180, 233)} <= colours  # a line for each attack


def test_the_same_seed_gives_the_same_figures(told: Told, run: Run) -> None:
    def timeless(content: Any) -> Any:
        if isinstance(content, dict):
            return {key: timeless(value) for key, value in content.items() if key != "seconds"}
        return content

    again = attack_run(run, samples=40, seed=3, attacks=OWN, steps=5, settings=True)
    assert timeless(again) == timeless(told[1])
    other = attack_run(run, samples=40, seed=4, attacks=["step"])
    assert other["images"] != again["images"]


def test_the_collapse_is_measured_in_every_setting(told: Told) -> None:
    _, content = told
    assert [(one["loss"], one["box"]) for one in content["settings"]] == [
        ("margin", True),
        ("cross_entropy", False),
        ("cross_entropy", True),
    ]
    step = content["networks"]["otnn"]["attacks"]["step"]["collapse"]
    # without a box the gradient step goes along the gradient, up to the rounding of float32
    assert step["cosine"]["least"] > 1 - 1e-6
    for network in content["networks"].values():
        for figures in network["attacks"].values():
            assert figures["collapse"]["ratio"]["least"] >= 1  # or the certificate is broken
            known = [each for each in figures["collapse"]["per_sample"]["ratio"] if each is not None]
            assert len(known) == figures["successes"] - figures["collapse"]["no_ratio"]
            assert figures["collapse"]["ratio"]["mean"] == pytest.approx(sum(known) / len(known), rel=1e-9)
    boxed = content["settings"][0]["attacks"]["step"]
    assert boxed["cosine"]["quantiles"][1] < 1 - 1e-3  # clamping bends it
    words = next(sentence for sentence in content["verdict"] if sentence.startswith("Attacks on the OTNN"))
    assert f"gradient step 1.000 and {step['ratio']['quantiles'][1]:.3f}" in words


def test_corruptions_stand_beside_the_radius(told: Told) -> None:
    rows = told[1]["corruptions"]["rows"]
    assert len(rows) == 3 * len(CORRUPTIONS)
    assert all(set(row["accuracy"]) == set(BOTH) for row in rows)
    assert "No certificate covers these corruptions" in told[1]["verdict"][-2]
    radius = told[1]["networks"]["otnn"]["mean_radius"]
    larger = sum(row["mean_size"] > radius for row in rows)
    assert told[1]["verdict"][-1] == (
        f"{larger} of 12 corruptions change an image by more, in the mean, than the OTNN's mean certified "
        f"radius, {radius:.3f}."
    )


@pytest.mark.parametrize("name", OWN)
def test_a_linear_network_collapses_to_the_certified_distance(name: str) -> None:
    victim, distance = linear(torch.tensor([1.3, 2.6, 5.2, 7.8], dtype=torch.float64))
    assert torch.allclose(victim.radius, distance, rtol=1e-5)
    assert bool((victim.radius <= distance * (1 + 1e-6)).all())
    grid = [0.0, 0.15, 0.3, 0.5, 1.0, 2.0]
    found = victim.run(ATTACKS[name], grid, 0, {}, lambda text: None)
    # turned at the first radius of the grid beyond the distances .1, .2, .4 and .6
    assert found.accuracy(grid) == [1, 0.75, 0.5, 0.25, 0, 0]
    near = victim.shortened(found)
    # 16 halvings of a segment that is at most 1.7 times as long, and the rounding of float32
    assert torch.allclose(near.distance, distance, rtol=5e-5)
    assert bool((near.distance >= victim.radius).all())
    figures = stage.network_figures(victim, {name: found}, grid)
    collapsed = figures["attacks"][name]["collapse"]
    assert collapsed["cosine"]["least"] == pytest.approx(1, abs=1e-6)
    assert collapsed["ratio"]["mean"] == pytest.approx(1, abs=1e-4)
    assert figures["certified"] == figures["best"]["accuracy"]


def test_in_the_largest_norm_the_radius_is_over_the_root_of_the_pixels(run: Run) -> None:
    content = attack_run(run, samples=20, norm="linf", attacks=OWN, steps=3)
    images, labels = chosen(dataset_of(run), 20, 0)
    certificate = certify(run.network("otnn"), images)
    held = torch.where(certificate.prediction == labels, certificate.radius / 8, 0.0)
    told = content["networks"]["otnn"]
    assert told["certified_radius"] == pytest.approx(held.tolist(), rel=1e-12)
    assert content["radii"][-1] == 1
    assert all(one["collapse"] is None for one in told["attacks"].values())
    assert content["settings"] == []
    assert not content["failed"]
    assert not any(sentence.startswith("Attacks on") for sentence in content["verdict"])


def test_one_output_and_one_network(tmp_path: Path) -> None:
    tiny = ("training.epochs=1", "model.widths=[16]", "twin=false", 'data.classes=["0", "8"]')
    run = train(config.load(overrides=tiny), tmp_path / "run", quiet=True)
    for loss in ("margin", "cross_entropy"):
        content = attack_run(run, samples=10, attacks=OWN, steps=3, loss=loss, box=True, radii=[0.5])
        assert list(content["networks"]) == ["otnn"]
        assert content["radii"] == [0, 0.5, 8]
        assert content["loss"] == loss
        assert not [
            row for row in content["checks"] if row["passed"] is False and row["check"] != "0 at a large radius"
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples: expected at least 1 test image, got 0"),
        ({"norm": "l1"}, "norm: expected one of l2, linf, got 'l1'"),
        ({"loss": "hinge"}, "loss: expected one of margin, cross_entropy, got 'hinge'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"attacks": ["pgd", "fgsm"]}, "attacks: expected some of .*pgd.*, got 'fgsm'"),
        ({"attacks": []}, "attacks: expected some of .*, got none"),
        ({"radii": []}, "radii: expected finite numbers >= 0, got none"),
        ({"radii": [0.5, -1.0]}, "radii: expected finite numbers >= 0, got -1.0"),
        ({"radii": [math.nan]}, "radii: expected finite numbers >= 0, got nan"),
        ({"radii": [math.inf]}, "radii: expected finite numbers >= 0, got inf"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(run: Run, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack_run(run, **settings)
    assert not (run.path / "attacks.json").exists()


def test_attacks_that_cannot_run_here_are_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "own": replace(ATTACKS["pgd"], source="otnn"),
        "rival": replace(ATTACKS["pgd"], source="no_such_library"),
        "round": replace(ATTACKS["pgd"], norms=("l2",)),
        "square": replace(ATTACKS["pgd"], source="otnn"),
    }
    monkeypatch.setattr(stage, "ATTACKS", table)
    names, skipped = stage.choose_attacks(None, "linf")
    assert names == ["own"]
    assert set(skipped) == {"rival", "round", "square"}
    assert "no_such_library, which is not installed: pip install" in skipped["rival"]
    assert skipped["round"] == "knows l2 alone, not linf"
    assert stage.available("l2") == ["own", "round", "square"]
    assert stage.choose_attacks(["square", "own", "own"], "linf") == (["square", "own"], {})
    for name, message in (("rival", "rival needs no_such_library"), ("round", "round knows l2 alone, not linf")):
        with pytest.raises(InputError, match=message):
            stage.choose_attacks(["own", name], "linf")


def test_data_that_cannot_be_attacked_are_refused(run: Run) -> None:
    data = dataset_of(run)
    images, labels = data.test.images, data.test.labels
    broken = images.clone()
    broken[:, 0, 0, 0] = torch.nan
    for split, message in (
        (Split(broken, labels), "NaN or infinite"),
        (Split(images * 16, labels), r"expected values in \[0, 1\]"),
        (Split(images, labels + 10), r"labels: expected integers in 0\.\.9"),
        (Split(images, labels.double()), "labels: expected integers, got torch.float64"),
        (Split(images[:0], labels[:0]), "at least one sample"),
    ):
        with pytest.raises(InputError, match=message):
            attack_run(run, dataset=replace(data, test=split), samples=10, attacks=["step"])
    model = run.network("otnn").train()
    with pytest.raises(InputError, match="training mode"):
        Victim("otnn", model, images[:5], labels[:5], HOW)


def test_a_network_that_gets_nothing_right(run: Run) -> None:
    images, _ = chosen(dataset_of(run), 10, 0)
    model = run.network("otnn")
    wrong = (predict(model(images)) + 1) % 10
    victim = Victim("otnn", model, images, wrong, HOW)
    found = {name: victim.run(ATTACKS[name], [0.0, 1.0], 0, {}, lambda text: None) for name in OWN}
    figures = stage.network_figures(victim, found, [0.0, 1.0])
    assert figures["accuracy"] == figures["right"] == figures["at_largest"] == 0
    assert figures["attacks"]["pgd"]["accuracy"] == [0, 0]
    assert figures["attacks"]["pgd"]["collapse"]["cosine"] is None
    assert figures["attacks"]["pgd"]["median_distance"] is None
