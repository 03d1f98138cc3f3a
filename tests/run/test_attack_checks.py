"""The checks of attacks can fail: planted faults, wrong certificates, figures that cannot be."""

import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from otnn.attacks.table import ATTACKS
from otnn.certify import Certificate, certify
from otnn.cli import main
from otnn.errors import InputError
from otnn.models import Classifier, build, predict
from otnn.run import attack as stage
from otnn.run import attacked
from otnn.run.attack import attack_run
from otnn.run.attack_checks import CHECKS, check_all
from otnn.run.attack_words import verdict
from otnn.run.attacked import Found, Victim
from otnn.run.black_box import search_left
from otnn.run.folder import Run
from otnn.run.train import dataset_of
from tests.run.attacks import HOW, OWN, Told, chosen, linear


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


def test_a_network_that_draws_is_not_fixed_and_one_that_trains_is_refused(run: Run) -> None:
    images, labels = chosen(dataset_of(run), 5, 0)
    model = run.network("otnn")
    victim = Victim("otnn", model, images, labels, HOW)
    assert victim.deterministic()
    victim.model = Planted(model, "random")  # in eval() mode
    assert not victim.deterministic()
    model.body[0].train()  # as a layer that overrides eval() would be
    with pytest.raises(InputError, match=r"body\.0 is in training mode"):
        Victim("otnn", model, images, labels, HOW)


def test_an_attack_that_gave_up_is_named_and_fails_nothing(told: Told) -> None:
    """Nor is one step, which need not turn everything."""
    content = copy.deepcopy(told[1])
    attacks = content["networks"]["otnn"]["attacks"]
    attacks["fmn"] = copy.deepcopy(attacks["pgd"]) | {"at_largest": 1 / 40}
    attacks["step"]["at_largest"] = 0.5
    rows = [row for row in check_all(content) if row["check"] == "0 at a large radius"]
    assert [row["passed"] for row in rows] == [True, True]
    assert [row["detail"] for row in rows] == [
        "accuracy 0.0% at radius 8; of its own fmn leaves 2.5%",
        "accuracy 0.0% at radius 8",
    ]
    content["checks"] = rows
    warnings = [sentence for sentence in verdict(content) if sentence.startswith("WARNING")]
    assert warnings == ["WARNING: attacks gave up (OTNN): at radius 8, where others turn everything, fmn leaves 2.5%."]
    assert not any(sentence.startswith("WARNING") for sentence in told[1]["verdict"])


def test_one_step_alone_need_not_turn_everything(told: Told) -> None:
    content = copy.deepcopy(told[1])
    for network in content["networks"].values():
        network["attacks"] = {"step": network["attacks"]["step"]}
        network["at_largest"] = 0.5
    rows = [row for row in check_all(content) if row["check"] == "0 at a large radius"]
    assert [row["passed"] for row in rows] == [None, None]


def test_no_search_on_pictures_that_square_cannot_take() -> None:
    """In L2 those that are not as high as wide; its squares in Linf take any."""
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model, images = build("dense", (1, 12, 6), 3, widths=(8,)).eval(), torch.rand(4, 1, 12, 6)
    labels = predict(model(images).detach())
    for norm in ("l2", "linf"):
        victim = Victim("otnn", model, images, labels, HOW | {"norm": norm})
        idle = Found(torch.full((4,), torch.inf).double(), images.clone(), torch.zeros(4).bool())
        found = search_left(victim, {"none": idle}, [0.0, 1.0], 0, lambda text: None)
        assert (found is None) == (norm == "l2")


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
    told = capsys.readouterr()
    assert json.loads(told.out)["failed"] == content["failed"]
    assert "FAILED: certified <= attacked (OTNN): adversarial points" in told.err


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
