"""Attacks as a stage: figures, checks that can fail, settings, refusals, pictures, and the command line."""

import copy
import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from otnn.attacks.outcome import evaluate
from otnn.attacks.step import gradient_step
from otnn.attacks.table import ATTACKS
from otnn.certify import Certificate, certified_accuracy, certify
from otnn.cli import main
from otnn.cli.tables import attack_tables
from otnn.data import Dataset, Split
from otnn.errors import InputError
from otnn.models import Classifier, predict
from otnn.report import words
from otnn.report.attack import attack_section
from otnn.report.load import load_run
from otnn.report.page import render
from otnn.run import attack as stage
from otnn.run import attacked, config
from otnn.run.attack import attack_run
from otnn.run.attack_checks import CHECKS, check_all
from otnn.run.attack_words import verdict
from otnn.run.attacked import Found, Victim
from otnn.run.black_box import search_left
from otnn.run.corruptions import CORRUPTIONS
from otnn.run.folder import Run, open_run
from otnn.run.train import dataset_of, train

Told = tuple[Run, dict[str, Any]]
OWN = ("step", "pgd")
BOTH = ("otnn", "unconstrained")
HOW: dict[str, Any] = {"norm": "l2", "loss": "margin", "box": False}


@pytest.fixture(scope="module")
def told(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A run that was attacked, with all settings of the collapse."""
    path = tmp_path_factory.mktemp("attacked") / "run"
    shutil.copytree(trained, path)
    content = attack_run(open_run(path), samples=40, seed=3, attacks=OWN, steps=5, settings=True)
    return open_run(path), content


def chosen(data: Dataset, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    index = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))[:samples]
    return data.test.images[index], data.test.labels[index]


# --- figures -----------------------------------------------------------------------------------------------------


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


def linear(score: Tensor, device: str = "cpu") -> tuple[Victim, Tensor]:
    """A linear network on 2x2 images, whose certificate is the distance to its boundary."""
    head = nn.Linear(4, 1, bias=False)
    head.weight.data = torch.tensor([[3.0, -4.0, 12.0, 0.0]])  # of norm 13
    model = Classifier(nn.Sequential(nn.Flatten()), head, (1, 2, 2)).eval()
    images = torch.zeros(len(score), 1, 2, 2)
    images[:, 0, 1, 0] = score.float() / 12
    return Victim("linear", model, images, (score > 0).long(), HOW), score / 13


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


# --- checks that can fail ----------------------------------------------------------------------------------------


def failed(content: dict[str, Any]) -> set[str]:
    return {row["check"] for row in content["checks"] if row["passed"] is False}


def test_every_check_passes_on_trained_networks(told: Told) -> None:
    _, content = told
    assert len(content["checks"]) == 2 * len(CHECKS)
    assert content["failed"] == 0
    undecided = [row["check"] for row in content["checks"] if row["passed"] is None]
    assert undecided == ([] if find_spec("pyautoattack") else ["Square never best"] * 2)


class Planted(Classifier):
    """A trained network with something wrong in it."""

    def __init__(self, model: Classifier, what: str) -> None:
        super().__init__(model.body, model.head, model.input_shape)
        self.what = what
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.what == "masked":  # the gradient is that of a tiny bump, and zero in float32
            inputs = inputs.detach() + 0 * inputs
        scores: Tensor = super().forward(inputs)
        if self.what == "random":
            return scores + 1e-3 * torch.randn_like(scores)
        if self.what == "NaN":  # away from the images
            far = (inputs.flatten(1) < -0.05).any(dim=1, keepdim=True)
            return torch.where(far, torch.nan, scores)
        return scores


def uncertified(model: Classifier, images: Tensor) -> Certificate:
    """What holds of every network: nothing."""
    with torch.no_grad():
        prediction = predict(model.double()(images.double()))
    model.float()
    zeros = torch.zeros(len(images), dtype=torch.float64)
    return Certificate(prediction, zeros, zeros, "real", ("",) * len(images))


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("masked", {"no zero gradients", "0 at a large radius", "Square never best"}),
        ("random", {"no randomness"}),
        ("NaN", {"finite scores", "0 at a large radius"}),
    ],
)
def test_a_planted_fault_fails_its_check(
    run: Run, monkeypatch: pytest.MonkeyPatch, what: str, expected: set[str]
) -> None:
    original = Run.network
    monkeypatch.setattr(Run, "network", lambda self, name, device="cpu": Planted(original(self, name, device), what))
    monkeypatch.setattr(attacked, "certify", uncertified)
    content = attack_run(run, samples=20, attacks=OWN, steps=3)
    # noise may move a prediction that an attack does not touch
    assert expected <= failed(content) <= expected | ({"clean accuracy at radius 0"} if what == "random" else set())
    assert content["verdict"][0].startswith("FAILED: ")
    if what == "NaN":
        rows = [row for row in content["checks"] if row["check"] == "finite scores"]
        assert "step" in rows[0]["detail"]


def test_the_gap_of_the_audit_stands_beside_the_collapse(told: Told) -> None:
    assert told[1]["audit"] is None
    content = copy.deepcopy(told[1]) | {
        "audit": {"train": {"gap": 0.1, "potentials": 1}, "test": {"gap": 0.25, "potentials": 1}}
    }
    sentence = "The audit found it short of that optimum by 10.0% on the training images and 25.0% on the test images"
    after = [sentence in each for each in verdict(content)].index(True)
    assert verdict(content)[after - 1].startswith("Attacks on the OTNN")
    assert not any("audit" in each for each in told[1]["verdict"])


def test_the_search_is_tried_on_what_is_left_and_on_nothing_else(told: Told) -> None:
    """Neither on what an attack turned within the radius, nor on what is certified at it."""
    pytest.importorskip("pyautoattack")
    run, content = told
    images, labels = chosen(dataset_of(run), 40, 3)
    for name, figures in content["networks"].items():
        rows = zip(content["radii"], figures["best"]["accuracy"], figures["certified"], strict=True)
        expected = [min(16, round(40 * (left - held))) for _, left, held in rows]
        assert figures["left"]["tried"] == expected, name
        assert not any(figures["left"]["turned"])
    # nothing attacked: the search alone turns what gradients would
    victim = Victim("otnn", run.network("unconstrained"), images, labels, HOW)
    idle = Found(torch.where(victim.right, torch.inf, 0.0).double(), images.clone(), torch.zeros(40).bool())
    found = search_left(victim, {"none": idle}, content["radii"], 0, lambda text: None)
    assert found is not None
    assert found["tried"][-1] == found["turned"][-1] == 16


def test_a_part_in_training_mode_is_no_fixed_network(run: Run) -> None:
    images, labels = chosen(dataset_of(run), 5, 0)
    model = run.network("otnn")
    victim = Victim("otnn", model, images, labels, HOW)
    assert victim.deterministic()
    model.body[0].train()  # as a layer that overrides eval() would be
    assert not victim.deterministic()


def test_a_wrong_certificate_fails_loudly(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: Classifier, images: Tensor) -> Certificate:
        found = certify(model, images)
        return replace(found, radius=2 * found.radius)

    monkeypatch.setattr(attacked, "certify", wrong)
    arguments = ["attack", str(run.path), "--samples", "30", "--attacks", "step,pgd", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["otnn", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "FAILED: certified <= attacked (OTNN): adversarial points below the certified radius:" in out
    content = json.loads((run.path / "attacks.json").read_text())
    assert content["failed"] >= 1
    assert failed(content) == {"certified <= attacked"}
    assert content["networks"]["otnn"]["attacks"]["pgd"]["below"] > 0
    monkeypatch.setattr(sys, "argv", ["otnn", *arguments, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["failed"] == content["failed"]


def test_a_point_that_float64_alone_sees_breaks_the_certificate() -> None:
    victim, _ = linear(torch.tensor([1.3, 2.6], dtype=torch.float64))
    victim.radius = torch.full((2,), 10.0, dtype=torch.float64)
    victim._exact = copy.deepcopy(victim.model).double()
    victim._exact.head.bias = nn.Parameter(torch.full((1,), -50.0, dtype=torch.float64))  # turned everywhere
    nearby = victim.images + 0.01  # which float32 leaves as it is
    found = Found(torch.full((2,), torch.inf, dtype=torch.float64), victim.images.clone(), torch.zeros(2).bool())
    assert victim.judge(found, torch.arange(2), nearby).tolist() == [True, True]
    assert (found.below, found.rounding) == (2, 0)


def test_a_halved_bound_of_the_network_is_caught() -> None:
    """Scores twice as large as the bound allows, as a bound that is half the true one would have them."""
    victim, _ = linear(torch.tensor([1.3, 2.6, 5.2, 7.8], dtype=torch.float64))
    victim.radius = 2 * victim.radius  # gap over half the bound
    grid = [0.0, 0.15, 0.3, 0.5, 1.0, 2.0]
    for name in ("step", "pgd", "minimal"):
        found = victim.run(ATTACKS[name], grid, 0, {}, lambda text: None)
        figures = stage.network_figures(victim, {name: found}, grid)
        content = {"radii": grid, "networks": {"linear": figures}}
        passed, detail = CHECKS["certified <= attacked"](figures, content)
        assert not passed
        assert f"of {name}" in detail


def test_rounding_of_float32_breaks_no_certificate_of_the_exact_map() -> None:
    victim, _ = linear(torch.tensor([1.3, 2.6], dtype=torch.float64))
    beyond = victim.images.clone()
    beyond[:, 0, 1, 0] = -0.1
    victim.radius = torch.full((2,), 10.0, dtype=torch.float64)
    every = torch.arange(2)

    def fresh() -> Found:
        return Found(torch.full((2,), torch.inf, dtype=torch.float64), victim.images.clone(), torch.zeros(2).bool())

    found = fresh()
    assert victim.judge(found, every, beyond).tolist() == [True, True]
    assert (found.below, found.rounding) == (2, 0)
    # an exact map that decides otherwise than float32 does
    victim._exact = copy.deepcopy(victim.model).double()
    victim._exact.head.bias = nn.Parameter(torch.full((1,), 50.0, dtype=torch.float64))
    found = fresh()
    assert victim.judge(found, every, beyond).tolist() == [False, False]
    assert (found.below, found.rounding) == (0, 2)
    assert found.distance.tolist() == [math.inf] * 2


def with_square(content: dict[str, Any]) -> None:
    for network in content["networks"].values():
        network["attacks"]["square"] = copy.deepcopy(network["attacks"]["step"])


def rise(content: dict[str, Any]) -> None:
    content["networks"]["otnn"]["attacks"]["pgd"]["accuracy"][3] = 1.0


def not_clean(content: dict[str, Any]) -> None:
    content["networks"]["unconstrained"]["attacks"]["pgd"]["accuracy"][0] -= 1 / 40


def below(content: dict[str, Any]) -> None:
    content["networks"]["otnn"]["attacks"]["step"]["accuracy"][2] = 0.0


def weak(content: dict[str, Any]) -> None:
    network = content["networks"]["unconstrained"]["attacks"]
    network["pgd"]["accuracy"][3] = network["step"]["accuracy"][3] + 1 / 40


def strong_square(content: dict[str, Any]) -> None:
    network = content["networks"]["unconstrained"]["attacks"]
    network["square"]["accuracy"][3] = network["pgd"]["accuracy"][3] - 1 / 40  # the best of the others


def found_more(content: dict[str, Any]) -> None:
    content["networks"]["otnn"]["left"] |= {"tried": [2] * len(content["radii"]), "turned": [0, 0, 1] + [0] * 8}


def below_by_search(content: dict[str, Any]) -> None:
    content["networks"]["otnn"]["left"]["below"] = 1


def left_over(content: dict[str, Any]) -> None:
    content["networks"]["otnn"]["at_largest"] = 1 / 40


@pytest.mark.parametrize(
    ("change", "network", "expected"),
    [
        (lambda content: None, "otnn", set()),
        (rise, "otnn", {"monotone in the radius", "PGD >= one step"}),
        (not_clean, "unconstrained", {"clean accuracy at radius 0", "certified <= attacked", "monotone in the radius"}),
        (below, "otnn", {"certified <= attacked", "monotone in the radius", "PGD >= one step"}),
        (weak, "unconstrained", {"PGD >= one step"}),
        (strong_square, "unconstrained", {"Square never best"}),
        (found_more, "otnn", {"Square never best"}),
        (below_by_search, "otnn", {"certified <= attacked"}),
        (left_over, "otnn", {"0 at a large radius"}),
    ],
)
def test_a_figure_that_cannot_be_fails_its_check(
    told: Told, change: Callable[[dict[str, Any]], None], network: str, expected: set[str]
) -> None:
    content = copy.deepcopy(told[1])
    with_square(content)
    change(content)
    rows = check_all(content)
    assert {row["network"] for row in rows if row["passed"] is False} <= {network}
    assert {row["check"] for row in rows if row["passed"] is False} >= expected - {"monotone in the radius"}
    assert {row["check"] for row in rows if row["passed"] is False} <= expected


# --- settings and refusals ---------------------------------------------------------------------------------------


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


# --- the command line --------------------------------------------------------------------------------------------


def test_on_the_command_line(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["otnn", "attack", str(run.path), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()  # type: ignore[return-value]

    how = ("--samples", "12", "--attacks", "step, pgd", "--radii", "0.25,0.5", "--device", "cpu")
    code, out, _ = command(*how, "--box", "--seed", "5", "--json")
    content = json.loads(out)
    assert code == (1 if content["failed"] else 0)
    assert content == json.loads((run.path / "attacks.json").read_text())
    assert (content["box"], content["seed"], content["radii"]) == (True, 5, [0, 0.25, 0.5, 8])
    code, out, _ = command(*how, "--settings", "--steps", "3")
    assert code == 0
    told = json.loads((run.path / "attacks.json").read_text())
    for text in ("best attack", "certified <= attacked", "gaussian blur", *told["verdict"][0].split()[:6]):
        assert text in out
    assert out.count("% right within a radius") == 2
    code, _, err = command("--radii", "a")
    assert (code, err) == (2, "otnn: --radii: expected numbers with commas, such as 0.25,0.5, got 'a'\n")
    code, _, err = command("--attacks", "x")
    assert code == 2
    assert err.startswith("otnn: attacks: expected some of step, pgd")


def test_tables_over_the_usual_radii_fit_80_columns(told: Told) -> None:
    content = copy.deepcopy(told[1])
    for figures in content["networks"].values():  # the widest figures, and the longest name
        figures["attacks"] = {name: {"accuracy": [0.885] * 11, "collapse": None} for name in ATTACKS}
    screen = io.StringIO()
    for table in attack_tables(content)[:2]:
        Console(file=screen, width=80).print(table)
    rows = screen.getvalue().splitlines()
    assert not any("\N{HORIZONTAL ELLIPSIS}" in row for row in rows)
    assert sum(row.count("88.5") for row in rows) >= 2 * len(ATTACKS) * 11


def test_the_picture_draws_what_it_is_given(told: Told) -> None:
    content = copy.deepcopy(told[1])
    del content["networks"]["unconstrained"]
    for figures in content["networks"]["otnn"]["attacks"].values():
        figures["collapse"] = None
    with (
        Image.open(io.BytesIO(stage.attack_picture(content))) as alone,
        Image.open(io.BytesIO(stage.attack_picture(told[1]))) as whole,
    ):
        assert alone.size[0] < whole.size[0]
        assert alone.size[1] < whole.size[1]


def test_the_report_shows_attacks_and_shouts_where_a_check_failed(whole: Path) -> None:
    files = load_run(whole)
    content = files.attacks
    assert content is not None
    page = render(files)
    assert 'href="#attack"' in page
    assert "FAILED" not in page
    radii = attack_section(files)
    assert radii is not None
    otnn = content["networks"]["otnn"]
    assert radii.radii[1][1][:2] == [words.percent(otnn["certified"][1]), words.percent(otnn["best"]["accuracy"][1])]
    assert f"Share of the pictures that are right within a radius ({radii.norm})" in page
    row = content["corruptions"]["rows"][0]
    name, size, cells = radii.corruptions[0]
    assert (name, size) == ("gaussian noise, deviation 0.05", f"{row['mean_size']:.2f}")
    assert cells == [words.percent(row["accuracy"][network]) for network in content["networks"]]
    assert f'<th scope="row">{name}</th><td class="number">{size}</td><td class="number">{cells[0]}</td>' in page
    content["networks"]["otnn"]["at_largest"] = 0.5
    content["checks"] = check_all(content)
    content["failed"] = sum(row["passed"] is False for row in content["checks"])
    shouted = render(files)
    assert "1 check FAILED: the figures below are not to be trusted." in shouted
    assert "<strong>FAILED</strong>" in shouted
    assert 'href="#attack"' not in render(replace(files, attacks=None))
    (whole / "attacks.png").unlink()
    with pytest.raises(InputError, match=r"attacks\.png: no such file; make it with `otnn attack"):
        load_run(whole)
