"""The figures of the audit on potentials whose figures are known."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.transport import TransportProblem, TransportSolution, measure, solve
from otnn.transport.measures import summarise

UNIT = torch.tensor([0.6, 0.8], dtype=torch.float64)


def linear(scale: float = 1.0, shift: float = 0.0, direction: Tensor = UNIT) -> Callable[[Tensor], Tensor]:
    return lambda points: scale * (points @ direction) + shift


def clouds(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64) + 1.5 * UNIT
    return x, torch.randn(count + 3, 2, generator=generator, dtype=torch.float64) - 1.5 * UNIT


def translated(length: float = 2.0, count: int = 9) -> tuple[TransportSolution, float]:
    """z_i = x_i - length * u: the plan moves every sample by that, W1 = length, f* = u . x and L* = -W1."""
    across = torch.tensor([0.8, -0.6], dtype=torch.float64)
    x = torch.linspace(-3, 3, count, dtype=torch.float64).unsqueeze(1) * across + length / 2 * UNIT
    return solve(TransportProblem(x, x - length * UNIT, hinge_weight=1.0, margin=0.0)), length


def test_the_optimal_potential_of_a_translation_has_perfect_figures() -> None:
    solution, w1 = translated()
    found = measure(linear(), solution, w1)
    assert found.gap == pytest.approx(0, abs=1e-12)
    assert found.kr == pytest.approx(1)
    for summary in (found.slackness, found.cosine_x, found.cosine_z, found.gradient_norm):
        assert summary is not None
        assert summary.mean == pytest.approx(1)
    assert found.segment_cosine is not None
    assert found.segment_norm is not None
    assert found.segment_cosine.quantiles == pytest.approx((1,) * 5)
    assert found.segment_norm.quantiles == pytest.approx((1,) * 5)
    assert (found.beyond_x, found.beyond_z, found.reached, found.right) == (1, 1, 1, 1)
    assert found.coincident == 0


@pytest.mark.parametrize(("scale", "reached"), [(0.97, 0.0), (0.98, 1.0), (0.5, 0.0), (-1.0, 1.0)])
def test_a_slope_below_1_is_what_every_figure_shows(scale: float, reached: float) -> None:
    # f = s u.x: slackness s, loss -s W1, |f(x - f grad f)| = (1 - s^2) |f|, which is 5 % at s = .9747
    solution, w1 = translated()
    found = measure(linear(scale), solution, w1)
    # the mirrored potential also pays the hinge: E|f| = 1, half of W1
    assert found.gap == pytest.approx(1 - scale if scale > 0 else 2.5)
    assert found.constant_gap == pytest.approx(1)
    assert found.slackness is not None
    assert found.slackness.median == pytest.approx(scale)
    assert found.gradient_norm is not None
    assert found.gradient_norm.mean == pytest.approx(abs(scale))
    assert found.cosine_x is not None
    assert found.cosine_x.mean == pytest.approx(math.copysign(1, scale))
    assert found.reached == reached
    assert found.right == (scale > 0)


@pytest.mark.parametrize("degrees", [10.0, 60.0, 90.0, 120.0])
def test_a_turned_gradient_has_the_cosine_of_its_angle(degrees: float) -> None:
    solution, w1 = translated()
    angle = math.radians(degrees)
    turned = math.cos(angle) * UNIT + math.sin(angle) * torch.tensor([0.8, -0.6], dtype=torch.float64)
    found = measure(linear(direction=turned), solution, w1)
    for summary in (found.cosine_x, found.cosine_z, found.segment_cosine, found.slackness):
        assert summary is not None
        assert summary.mean == pytest.approx(math.cos(angle), abs=1e-12)
    assert found.segment_norm is not None
    assert found.segment_norm.mean == pytest.approx(1)


def problems(x: Tensor, z: Tensor) -> list[tuple[TransportProblem, float | None]]:
    weight_x = torch.rand(len(x), generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    weight_x = weight_x / weight_x.sum()
    return [
        (TransportProblem(x, z, hinge_weight=0.0), None),
        (TransportProblem(x, z, hinge_weight=5.0, margin=0.7), None),
        (TransportProblem(x, z, hinge_weight=5.0, margin=2.0, prior=0.2, sample_weight_x=weight_x), None),
        (TransportProblem(x, z, alpha=0.3), 0.4),
        (TransportProblem(x, z, alpha=0.05, hinge_weight=1.0, prior=0.6), 1.1),
    ]


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.3, 0.5), (-0.8, -2.0), (0.0, 0.1)])
def test_the_parts_are_non_negative_and_add_up_to_the_gap(case: int, scale: float, shift: float) -> None:
    x, z = clouds()
    problem, margin = problems(x, z)[case]
    solution = solve(problem)
    w1 = solve(TransportProblem(x, z, hinge_weight=0.0)).transport_cost
    found = measure(linear(scale, shift), solution, w1, margin=margin)
    assert found.parts is not None
    parts = (found.parts.transport, found.parts.hinge_x, found.parts.hinge_z, found.parts.margin)
    assert min(parts) >= -1e-12
    assert sum(parts) == pytest.approx(found.gap, abs=1e-11)
    assert found.gap is not None
    assert found.gap > 0


def test_the_loss_is_that_of_the_losses() -> None:
    from otnn.losses import hkr

    x, z = clouds()
    problem = TransportProblem(x, z, hinge_weight=5.0, margin=0.7)
    f = linear(0.9, 0.2)
    scores = f(torch.cat([x, z]))
    labels = torch.tensor([1] * len(x) + [0] * len(z))
    found = measure(f, solve(problem), 1.0)
    assert found.loss == pytest.approx(float(hkr(scores, labels, margin=0.7, hinge_weight=5.0)), rel=1e-12)
    learned = TransportProblem(x, z, alpha=0.3)
    assert measure(f, solve(learned), 1.0, margin=0.4).loss == pytest.approx(
        float(hkr(scores, labels, margin=0.4, alpha=0.3)), rel=1e-12
    )


def test_the_best_shift_is_found_among_all() -> None:
    x, z = clouds()
    solution = solve(TransportProblem(x, z, hinge_weight=5.0, margin=0.7))
    found = measure(linear(0.9, 1.3), solution, 1.0)
    losses = [measure(linear(0.9, 1.3 + b), solution, 1.0).gap for b in torch.linspace(-3, 3, 601).tolist()]
    assert found.shifted_gap is not None
    assert found.gap is not None
    assert found.shifted_gap < found.gap
    best = min(loss for loss in losses if loss is not None)
    # the loss is 6-Lipschitz in the shift (1 + 5), up to the grid's step of .01
    assert best - 0.06 <= found.shifted_gap <= best + 1e-12


def test_the_exact_potential_has_no_gap_and_points_along_the_plan() -> None:
    x, z = clouds(40)
    labels = torch.tensor([1] * len(x) + [0] * len(z))
    samples = torch.cat([x, z])

    def smooth(solution: TransportSolution, points: Tensor) -> Tensor:
        return solution.potential(points, labels[torch.cdist(points.detach(), samples).argmin(dim=1)])

    for problem, _ in problems(x, z)[:3]:
        solution = solve(problem)
        found = measure(partial(smooth, solution), solution, 1.0)
        assert found.gap == pytest.approx(0, abs=1e-9)
        assert found.slackness is not None
        assert found.slackness.quantiles == pytest.approx((1,) * 5)
        assert found.gradient_norm is not None
        assert found.gradient_norm.quantiles == pytest.approx((1,) * 5)
        # a split sample has one gradient and several partners, of which it points to one
        assert found.cosine_x is not None
        assert found.cosine_z is not None
        assert min(found.cosine_x.median, found.cosine_z.median) > 0.999
        assert found.cosine_x.quantiles[3:] == pytest.approx((1, 1))


def test_pairs_at_one_place_are_counted_and_have_no_direction() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    z = torch.tensor([[0.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    solution = solve(TransportProblem(x, z, hinge_weight=0.0))
    found = measure(lambda points: points[:, 0], solution, solution.transport_cost)
    assert (found.gap, found.kr) == (pytest.approx(0), pytest.approx(1))
    if found.coincident:  # the optimum may also shift both points by 1: then no pair coincides
        assert found.coincident_mass == pytest.approx(0.5)
    assert found.cosine_x is not None
    assert found.cosine_x.mean == pytest.approx(1)


def test_equal_samples_have_nothing_to_transport() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    solution = solve(TransportProblem(x, x.clone(), hinge_weight=0.0))
    found = measure(lambda points: points[:, 0], solution, solution.transport_cost)
    assert (found.gap, found.kr, found.parts, found.slackness, found.cosine_x) == (None,) * 5
    assert (found.beyond_x, found.segment_norm, found.segment_profile) == (None, None, ())
    assert (found.coincident, found.coincident_mass) == (2, pytest.approx(1))


def test_a_flat_potential_has_no_direction_but_figures() -> None:
    solution, w1 = translated()
    found = measure(lambda points: 0.0 * points.sum(dim=1) + 0.3, solution, w1)
    assert found.cosine_x is not None
    # L = 1/2 * .3, L* = -2, W1 = 2
    assert (found.cosine_x.mean, found.gap, found.reached) == (0, pytest.approx(1.075), 0)


def test_the_draw_of_segments_repeats_and_goes_by_mass() -> None:
    # two pairs, one of which carries nine tenths; the gradient tells them apart
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    z = x - torch.tensor([2.0, 0.0], dtype=torch.float64)
    weight = torch.tensor([0.9, 0.1], dtype=torch.float64)
    problem = TransportProblem(x, z, hinge_weight=0.0, sample_weight_x=weight, sample_weight_z=weight)
    solution = solve(problem)

    def bent(points: Tensor) -> Tensor:
        return torch.where(points[:, 1] > 0, points[:, 0], 0.5 * points[:, 0])

    first = measure(bent, solution, 1.0, segments=2000, seed=1)
    assert first == measure(bent, solution, 1.0, segments=2000, seed=1)
    assert first.segment_norm is not None
    # .9 * 1 + .1 * .5 = .95, with a standard error of .5 * sqrt(.09 / 2000) = .0034
    assert first.segment_norm.mean == pytest.approx(0.95, abs=0.014)
    assert [place for place, _, _ in first.segment_profile] == pytest.approx([(k + 0.5) / 9 for k in range(9)])


def test_quantiles_are_those_of_repeated_values() -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(30, generator=generator, dtype=torch.float64)
    counts = torch.randint(1, 6, (30,), generator=generator)
    repeated = values.repeat_interleave(counts).sort().values
    found = summarise(values, counts.double())
    assert found is not None
    assert found.mean == pytest.approx(float(repeated.mean()))
    for share, value in zip((0.05, 0.25, 0.5, 0.75, 0.95), found.quantiles, strict=True):
        assert value == float(repeated[math.ceil(share * len(repeated)) - 1])
    assert summarise(values[:0], counts[:0].double()) is None


def test_what_does_not_fit_is_refused() -> None:
    x, z = clouds()
    manhattan = solve(TransportProblem(x, z, hinge_weight=0.0, norm=1))
    with pytest.raises(InputError, match="expected norm=2, got 1"):
        measure(linear(), manhattan, 1.0)
    with pytest.raises(InputError, match="margin: expected the margin that was learned"):
        measure(linear(), solve(TransportProblem(x, z, alpha=0.3)), 1.0)
