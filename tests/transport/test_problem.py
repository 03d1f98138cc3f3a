"""What makes a problem, and what is refused with which words."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.losses import functional
from otnn.transport import TransportProblem
from tests.transport.problems import tensor

X, Z = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [4.0, 1.0], [5.0, 2.0]])
NAN = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])

REFUSED: list[tuple[dict[str, Any], str]] = [
    # samples
    ({"x": X[0]}, "x: expected a batch (batch, ...), got shape (2,); add a batch dimension"),
    ({"x": X[:0]}, "x: expected at least one sample, got an empty batch"),
    ({"z": Z[:0]}, "z: expected at least one sample, got an empty batch"),
    ({"x": X.long()}, "x: expected floating-point values in [0, 1], got torch.int64; divide 8-bit images by 255 first"),
    ({"x": NAN}, "x: sample 1 holds NaN or infinite values; remove or repair it"),
    ({"z": torch.full((2, 2), math.inf)}, "z: sample 0 holds NaN or infinite values; remove or repair it"),
    ({"z": torch.zeros(3, 5)}, "x and z: expected samples of one shape, got (2,) and (5,); reshape one of them"),
    ({"z": torch.zeros(3, 2, 1)}, "x and z: expected samples of one shape, got (2,) and (2, 1); reshape one of them"),
    # weights
    (
        {"sample_weight_x": torch.tensor([1.0, 0.0])},
        "sample_weight_x: expected weights > 0, got 0 at 1; leave such samples out",
    ),
    (
        {"sample_weight_z": torch.tensor([0.5, -0.5, 1.0])},
        "sample_weight_z: expected weights > 0, got -0.5 at 1; leave such samples out",
    ),
    (
        {"sample_weight_z": torch.tensor([0.5, 0.5, math.nan])},
        "sample_weight_z: expected weights > 0, got nan at 2; leave such samples out",
    ),
    (
        {"sample_weight_x": torch.tensor([math.inf, 1.0])},
        "sample_weight_x: expected weights > 0, got inf at 0; leave such samples out",
    ),
    (
        {"sample_weight_x": torch.tensor([0.5, 0.75])},
        "sample_weight_x: expected weights that sum to 1, got a sum of 1.25; divide them by it",
    ),
    (
        {"sample_weight_x": torch.tensor([1.0])},
        "sample_weight_x: expected one weight per sample, shape (2,), got (1,)",
    ),
    (
        {"sample_weight_z": torch.ones(3, 1) / 3},
        "sample_weight_z: expected one weight per sample, shape (3,), got (3, 1)",
    ),
    (
        {"sample_weight_x": torch.tensor([1.0, 1e-17], dtype=torch.float64)},
        "sample_weight_x: expected weights of at least 1e-09 / 2, got 1e-17 at 1; leave such samples out",
    ),
    # ranges
    (
        {"x": X.double() * 1e200},
        "x: expected values of a size between 1e-100 and 1e+100, got up to 1e+200; rescale all samples",
    ),
    (
        {"z": Z.double() * 1e-170},
        "z: expected values of a size between 1e-100 and 1e+100, got up to 5e-170; rescale all samples",
    ),
    # parameters
    ({"hinge_weight": None}, "expected hinge_weight, or alpha (the hinge weight then is 1/alpha), got neither"),
    ({"hinge_weight": -1.0}, "hinge_weight: expected a finite number >= 0, got -1.0"),
    ({"hinge_weight": math.nan}, "hinge_weight: expected a finite number >= 0, got nan"),
    ({"hinge_weight": math.inf, "margin": 1.0}, "hinge_weight: expected a finite number >= 0, got inf"),
    (
        {"hinge_weight": 2.0},
        "hinge_weight = 2 needs margin=, or alpha= for a learned margin; got neither",
    ),
    ({"margin": -0.1}, "margin: expected a finite number >= 0, got -0.1"),
    ({"margin": math.inf}, "margin: expected a finite number >= 0, got inf"),
    ({"margin": math.nan}, "margin: expected a finite number >= 0, got nan"),
    ({"margin": 1.0, "alpha": 0.1}, "expected margin= for a fixed margin or alpha= for a learned one, got both"),
    ({"alpha": 0.0}, "alpha: expected a share > 0 of the data inside the margin, got 0.0"),
    ({"alpha": math.nan}, "alpha: expected a share > 0 of the data inside the margin, got nan"),
    (
        {"alpha": 0.81},  # the prior is 2/5
        "alpha must be in (0, 2 * min(p, 1 - p)] = (0, 0.8], got 0.81: beyond it no finite margin is optimal; "
        "lower alpha or balance the classes",
    ),
    (
        {"alpha": 0.3, "prior": 0.9},
        "alpha must be in (0, 2 * min(p, 1 - p)] = (0, 0.2], got 0.3: beyond it no finite margin is optimal; "
        "lower alpha or balance the classes",
    ),
    ({"prior": 0.0}, "prior: expected the share of the positives, in (0, 1), got 0.0"),
    ({"prior": 1.0}, "prior: expected the share of the positives, in (0, 1), got 1.0"),
    ({"prior": math.nan}, "prior: expected the share of the positives, in (0, 1), got nan"),
    (
        {"hinge_weight": 1e9, "margin": 0.1},
        "hinge_weight = 1e+09 with prior = 0.4: expected hinge_weight times prior and times 1 - prior in "
        "[1e-05, 100000], where rounding lets the dual be solved; take a smaller hinge_weight, or 0 for the plain "
        "problem",
    ),
    (
        {"hinge_weight": 1e-6, "margin": 0.1},
        "hinge_weight = 1e-06 with prior = 0.4: expected hinge_weight times prior and times 1 - prior in "
        "[1e-05, 100000], where rounding lets the dual be solved; take a smaller hinge_weight, or 0 for the plain "
        "problem",
    ),
    ({"norm": 0.5}, "norm: expected 1, 2, inf or any p >= 1, got 0.5"),
    ({"norm": math.nan}, "norm: expected 1, 2, inf or any p >= 1, got nan"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED)
def test_refusals(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        TransportProblem(**{"x": X, "z": Z, "hinge_weight": 0.0} | change)


def test_defaults() -> None:
    problem = TransportProblem(X, Z, alpha=0.25)
    assert problem.prior == 2 / 5
    assert problem.hinge_weight == 4
    assert problem.margin is None
    assert problem.learns_margin
    assert problem.norm == 2
    assert problem.sample_weight_x.tolist() == [0.5, 0.5]
    assert problem.sample_weight_z.tolist() == [1 / 3] * 3
    assert problem.slack_x == pytest.approx(4 * 2 / 5)
    assert problem.slack_z == pytest.approx(4 * 3 / 5)
    assert repr(problem) == "TransportProblem(2 x 3, hinge_weight=4, alpha=0.25)"
    assert repr(TransportProblem(X, Z, hinge_weight=2.0, margin=0.5)).endswith("hinge_weight=2, margin=0.5)")


def test_samples_are_flattened_in_float64() -> None:
    images = torch.rand(4, 3, 2, 2, requires_grad=True)
    problem = TransportProblem(images, images[:2], hinge_weight=0.0)
    assert problem.shape == (3, 2, 2)
    assert problem.x.shape == (4, 12)
    assert problem.x.dtype == torch.float64
    assert not problem.x.requires_grad
    assert torch.equal(problem.x.float(), images.detach().flatten(1))


@pytest.mark.parametrize("alpha", [0.8, 1e-3])
def test_alpha_up_to_the_ceiling_is_taken(alpha: float) -> None:
    assert TransportProblem(X, Z, alpha=alpha).learns_margin


def test_without_a_hinge_no_margin_is_learned() -> None:
    assert not TransportProblem(X, Z, hinge_weight=0.0, alpha=0.1).learns_margin


def test_weights_of_float32_are_normalised() -> None:
    weight = torch.full((3,), 1 / 3, dtype=torch.float32)
    problem = TransportProblem(X, Z, hinge_weight=0.0, sample_weight_z=weight)
    assert problem.sample_weight_z.dtype == torch.float64
    assert float(problem.sample_weight_z.sum()) == pytest.approx(1, abs=1e-15)


# --- the loss of any potential -----------------------------------------------------------------------------------


def potentials(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("alpha", [None, 0.2])
@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_loss_is_that_of_training(weight: float, alpha: float | None) -> None:
    x, z = tensor([[0.0]] * 20), tensor([[1.0]] * 30)
    f_x, f_z = potentials(20, 0), potentials(30, 1)
    form: dict[str, Any] = {"margin": 0.7} if alpha is None else {"alpha": alpha}
    problem = TransportProblem(x, z, hinge_weight=weight, **form)
    labels = torch.arange(50).lt(20).long()
    expected = functional.hkr(torch.cat([f_x, f_z]), labels, margin=0.7, hinge_weight=weight, alpha=alpha)
    assert problem.loss(f_x, f_z, None if alpha is None else 0.7) == pytest.approx(float(expected), rel=1e-12)
    # a float32 potential is counted in float64
    assert problem.loss(f_x.float(), f_z.float(), 0.7) == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_counts_weights_and_the_prior() -> None:
    problem = TransportProblem(X, Z[:1], hinge_weight=10.0, margin=1.0, prior=0.2, sample_weight_x=tensor([0.25, 0.75]))
    # f = (2, 0) on positives, 0.5 on the negative: KR = .5 - .5, hinges .75 (1 - 0) and (1 + .5)
    loss = problem.loss(tensor([2.0, 0.0]), tensor([0.5]))
    assert loss == pytest.approx(0.0 + 10 * (0.2 * 0.75 * 1 + 0.8 * 1.5))
    # another margin than the problem's
    assert problem.loss(tensor([2.0, 0.0]), tensor([0.5]), 0.0) == pytest.approx(10 * 0.8 * 0.5)


def test_a_learned_margin_belongs_to_the_loss() -> None:
    problem = TransportProblem(X, Z, alpha=0.2)
    with pytest.raises(InputError, match="margin: expected the margin that was learned with the potential, got none"):
        problem.loss(torch.zeros(2), torch.zeros(3))
