"""What the losses refuse, and what they let through."""

import math
from collections.abc import Callable

import pytest
import torch

from otnn.errors import InputError
from otnn.losses import (
    HingeLoss,
    HKRLoss,
    OneVsAllHKRLoss,
    SoftHKRLoss,
    TemperatureCrossEntropyLoss,
    hinge,
    hkr,
    kr,
    one_vs_all_hkr,
    soft_hkr,
    temperature_cross_entropy,
)
from tests.losses.batches import binary, several

EVEN = torch.tensor([0.25, 0.5, 0.25])
TWO = torch.tensor([0, 1])
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "one class": (
        lambda: kr(torch.ones(2), torch.tensor([1, 1])),
        "a batch of one class says nothing of a distance; give prior=, the share of label 1",
    ),
    "prior 0": (lambda: kr(torch.ones(2), TWO, prior=0.0), "prior: expected the share of label 1, in (0, 1), got 0.0"),
    "prior 1": (lambda: kr(torch.ones(2), TWO, prior=1.0), "prior: expected the share of label 1, in (0, 1), got 1.0"),
    "prior nan": (lambda: kr(torch.ones(2), TWO, prior=math.nan), "prior: expected the share of label 1"),
    "scores": (
        lambda: kr(torch.ones(2, 3), TWO),
        "scores: expected a batch of one score each, (batch,) or (batch, 1), got (2, 3)",
    ),
    "empty": (lambda: kr(torch.ones(0), torch.ones(0).long()), "scores: expected a batch of one score each"),
    "labels -1": (
        lambda: kr(torch.ones(2), torch.tensor([-1, 1])),
        "labels: expected integers in 0..1, got -1..1",
    ),
    "label 2": (lambda: hinge(torch.ones(2), torch.tensor([0, 2])), "labels: expected integers in 0..1, got 0..2"),
    "float labels": (
        lambda: kr(torch.ones(2), torch.tensor([0.0, 1.0])),
        "labels: expected integers, got torch.float32; convert them with .long()",
    ),
    "label count": (
        lambda: kr(torch.ones(3), TWO),
        "labels: expected one per sample, shape (3,), got (2,); one-hot labels become integers with argmax(dim=1)",
    ),
    "margin": (
        lambda: hinge(torch.ones(2), TWO, margin=-0.5),
        "margin: expected finite numbers >= 0 (per side), got -0.5",
    ),
    "margin nan": (lambda: hinge(torch.ones(2), TWO, margin=math.nan), "margin: expected finite numbers >= 0"),
    "no weight": (
        lambda: hkr(torch.ones(2), TWO, margin=1.0),
        "expected hinge_weight, or alpha (the hinge weight then is 1/alpha), got neither",
    ),
    "weight": (
        lambda: hkr(torch.ones(2), TWO, margin=1.0, hinge_weight=-1.0),
        "hinge_weight: expected a finite number >= 0, got -1.0",
    ),
    "weight nan": (
        lambda: hkr(torch.ones(2), TWO, margin=1.0, hinge_weight=math.nan),
        "hinge_weight: expected a finite",
    ),
    "weight inf": (
        lambda: hkr(torch.ones(2), TWO, margin=1.0, hinge_weight=math.inf),
        "hinge_weight: expected a finite",
    ),
    "alpha": (
        lambda: hkr(torch.ones(2), TWO, margin=1.0, alpha=0.5, prior=0.2),
        "alpha must be in (0, 2 * min(p, 1 - p)] = (0, 0.4], got 0.5: "
        "beyond it no finite margin is optimal; lower alpha or balance the classes",
    ),
    "alpha 0": (lambda: hkr(torch.ones(2), TWO, margin=1.0, alpha=0.0), "alpha must be in (0,"),
    "alpha nan": (lambda: hkr(torch.ones(2), TWO, margin=1.0, alpha=math.nan), "alpha must be in (0,"),
    "one-vs-all alpha": (
        lambda: one_vs_all_hkr(torch.ones(3, 3), torch.arange(3), margin=1.0, alpha=0.7),
        "alpha must be in (0, 2 * min(p, 1 - p)] = (0, 0.6667], got 0.7",
    ),
    "soft alpha": (
        lambda: soft_hkr(torch.ones(3, 3), torch.arange(3), margin=1.0, alpha=1.0),
        "alpha: expected the share of each class inside its margin, in (0, 1), got 1.0",
    ),
    "one output": (
        lambda: soft_hkr(torch.ones(2, 1), TWO, margin=1.0, hinge_weight=1.0),
        "scores: expected (batch, classes) with at least 2 classes, got (2, 1); a single output takes the",
    ),
    "missing class": (
        lambda: soft_hkr(torch.ones(2, 3), TWO, margin=1.0, hinge_weight=1.0),
        "a class is missing from the batch; give priors=, the shares of the classes",
    ),
    "priors": (
        lambda: one_vs_all_hkr(torch.ones(2, 2), TWO, margin=1.0, hinge_weight=1.0, priors=torch.tensor([1.0, 0.0])),
        "priors: expected 2 shares in (0, 1), got [1.0, 0.0]",
    ),
    "priors count": (
        lambda: one_vs_all_hkr(torch.ones(2, 2), TWO, margin=1.0, hinge_weight=1.0, priors=torch.full((3,), 1 / 3)),
        "priors: expected 2 shares in (0, 1), got [0.3333, 0.3333, 0.3333]",
    ),
    "kr_form": (
        lambda: soft_hkr(torch.ones(2, 2), TWO, margin=1.0, hinge_weight=1.0, kr_form="hard"),
        'kr_form: expected "soft" or "one_vs_all", got \'hard\'',
    ),
    "hinge_form": (
        lambda: soft_hkr(torch.ones(2, 2), TWO, margin=1.0, hinge_weight=1.0, hinge_form="both"),
        'hinge_form: expected "joint" or "separate", got \'both\'',
    ),
    "temperature": (
        lambda: temperature_cross_entropy(torch.ones(2, 2), TWO, temperature=0.0),
        "temperature: expected a finite number > 0, got 0.0",
    ),
    "module: neither": (lambda: HKRLoss(), "expected margin=, or alpha= for a learned margin, got neither"),
    "module: both": (
        lambda: SoftHKRLoss(EVEN, margin=0.1, alpha=0.1),
        "expected margin= for a fixed margin or alpha= for a learned one, got both",
    ),
    "module: no weight": (lambda: HKRLoss(margin=0.1), "expected hinge_weight, or alpha"),
    "module: margin": (
        lambda: HKRLoss(margin=-1.0, hinge_weight=1.0),
        "margin: expected finite numbers >= 0 (per side), got -1.0",
    ),
    "module: margins": (
        lambda: SoftHKRLoss(EVEN, margin=[0.1, math.inf, 0.1], hinge_weight=1.0),
        "margin: expected finite numbers >= 0 (per side), got",
    ),
    "module: hinge margin": (lambda: HingeLoss(-0.1), "margin: expected finite numbers >= 0"),
    "module: prior": (
        lambda: HKRLoss(margin=0.1, hinge_weight=1.0, prior=1.0),
        "prior: expected the share of label 1, in (0, 1)",
    ),
    "module: alpha": (
        lambda: HKRLoss(alpha=0.5, prior=0.2),
        "alpha must be in (0, 2 * min(p, 1 - p)] = (0, 0.4], got 0.5",
    ),
    "module: alpha 0": (
        lambda: HKRLoss(alpha=0.0),
        "alpha: expected a share > 0 of the data inside the margin, got 0.0",
    ),
    "module: alpha < 0": (lambda: SoftHKRLoss(EVEN, alpha=-0.1), "alpha: expected a share > 0"),
    "module: alpha nan": (lambda: OneVsAllHKRLoss(EVEN, alpha=math.nan), "alpha: expected a share > 0"),
    "module: one-vs-all alpha": (
        lambda: OneVsAllHKRLoss(EVEN, alpha=0.6),
        "alpha must be in (0, 2 * min(p, 1 - p)] = (0, 0.5], got 0.6",
    ),
    "module: temperature": (
        lambda: SoftHKRLoss(EVEN, margin=0.1, hinge_weight=1.0, temperature=-1.0),
        "temperature: expected a finite number > 0, got -1.0",
    ),
    "module: cross-entropy": (
        lambda: TemperatureCrossEntropyLoss(math.nan),
        "temperature: expected a finite number > 0, got nan",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_was_expected(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("alpha", [0.4, 0.4 - 1e-9])
def test_the_largest_alpha_is_let_through(alpha: float) -> None:
    assert math.isfinite(hkr(torch.ones(2), TWO, margin=1.0, alpha=alpha, prior=0.2))


def test_labels_of_any_integer_type() -> None:
    scores, labels = several()
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(
            soft_hkr(scores, labels.to(dtype), margin=0.1, hinge_weight=1.0),
            soft_hkr(scores, labels, margin=0.1, hinge_weight=1.0),
        )


def test_soft_refuses_a_negative_temperature() -> None:
    scores, labels = several()
    with pytest.raises(InputError, match="temperature"):
        soft_hkr(scores, labels, margin=0.1, hinge_weight=1.0, temperature=-1.0)


def test_sample_weights_of_another_shape_are_refused() -> None:
    scores, labels = binary()
    with pytest.raises(InputError, match="sample_weight"):
        hinge(scores, labels, sample_weight=torch.rand(12, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.0},
        {"margin": 0.1, "hinge_weight": 1.0, "kr_form": "hard"},
        {"margin": [0.1, 0.2], "hinge_weight": 1.0},
    ],
)
def test_soft_parameters_are_refused_at_once(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        SoftHKRLoss(EVEN, **options)  # type: ignore[arg-type]
