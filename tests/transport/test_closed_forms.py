"""The optimum against POT, assignments, quantiles on the line, and what can be worked out by hand."""

import math

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from otnn.transport import TransportProblem, solve
from tests.transport.optimality import assert_optimal
from tests.transport.problems import gaussian_problem, tensor
from tests.transport.slow import cost_matrix, distance_on_the_line

# --- peers -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_the_plain_problem_is_that_of_pot(n: int, m: int, dims: int, seed: int) -> None:
    problem = gaussian_problem(n, m, dims, seed=seed, hinge_weight=0.0)
    a, b = problem.sample_weight_x.numpy(), problem.sample_weight_z.numpy()
    peer = ot.emd2(a, b, cost_matrix(problem.x.numpy(), problem.z.numpy()))
    solution = solve(problem)
    assert solution.transport_cost == pytest.approx(peer, rel=1e-9)
    assert solution.value == pytest.approx(-peer, rel=1e-9)


@pytest.mark.parametrize("dims", [1, 2, 10, 100])
def test_equal_samples_are_an_assignment(dims: int) -> None:
    problem = gaussian_problem(120, 120, dims, equal=True, hinge_weight=0.0)
    costs = cost_matrix(problem.x.numpy(), problem.z.numpy())
    solution = solve(problem)
    assert solution.value == pytest.approx(-costs[linear_sum_assignment(costs)].mean(), rel=1e-9)
    assert sorted(solution.rows.tolist()) == sorted(solution.columns.tolist()) == list(range(120))


@pytest.mark.parametrize(("n", "m"), [(200, 200), (200, 137), (7, 150)])
@pytest.mark.parametrize("equal", [True, False])
def test_on_the_line_quantiles_are_matched(n: int, m: int, equal: bool) -> None:
    problem = gaussian_problem(n, m, 1, equal=equal, hinge_weight=0.0)
    x, z = problem.x[:, 0].numpy(), problem.z[:, 0].numpy()
    a, b = problem.sample_weight_x.numpy(), problem.sample_weight_z.numpy()
    w1 = solve(problem).transport_cost
    assert w1 == pytest.approx(distance_on_the_line(x, z, a, b), rel=1e-9)
    if equal and n == m:
        assert w1 == pytest.approx(np.abs(np.sort(x) - np.sort(z)).mean(), rel=1e-9)


# --- closed forms ------------------------------------------------------------------------------------------------


# A sample given twice, with half the weight each, is the same problem
COPIES = pytest.mark.parametrize("copies", [1, 2])


@COPIES
@pytest.mark.parametrize("margin", [0.0, 1.0, 2.5, 3.0, 40.0])
@pytest.mark.parametrize("prior", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("weight", [0.0, 0.3, 7.0])
def test_two_points(weight: float, prior: float, margin: float, copies: int) -> None:
    # at distance d, extra mass costs d - 2m a unit: where that is < 0 as much as the rarer class allows is carried
    d, most = 5.0, weight * min(prior, 1 - prior)
    x, z = tensor([[3.0, 4.0]] * copies), tensor([[0.0, 0.0]] * copies)
    solution = solve(TransportProblem(x, z, hinge_weight=weight, margin=margin, prior=prior))
    assert_optimal(solution)
    assert solution.value == pytest.approx(-d + most * max(0.0, 2 * margin - d), abs=1e-12)
    f_x, f_z = solution.potential_x.tolist(), solution.potential_z.tolist()
    assert [high - low for high, low in zip(f_x, f_z, strict=True)] == pytest.approx([d] * copies)
    if margin > d / 2 and most > 0:
        assert float(solution.mass.sum()) == pytest.approx(1 + most)
        if prior < 0.5:  # the commoner class pays no hinge
            assert f_z == pytest.approx([-margin] * copies)
        if prior > 0.5:
            assert f_x == pytest.approx([margin] * copies)


@COPIES
@pytest.mark.parametrize("prior", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_learned_margin_of_two_points_is_half_their_distance(prior: float, share: float, copies: int) -> None:
    alpha = share * 2 * min(prior, 1 - prior)
    x, z = tensor([[5.0]] * copies), tensor([[2.0]] * copies)
    solution = solve(TransportProblem(x, z, hinge_weight=4.0, alpha=alpha, prior=prior))
    assert solution.margin == pytest.approx(1.5)
    assert solution.value == pytest.approx(-3 - 4 * alpha * 1.5)
    assert solution.potential_x.tolist() == pytest.approx([1.5] * copies)
    assert solution.potential_z.tolist() == pytest.approx([-1.5] * copies)


@COPIES
@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(
    ("alpha", "value", "margin", "f_x", "f_z"),
    [
        (0.1, -4.25 - 0.5 * 2, 1.0, [1.0, 4.0], -1.0),
        (0.19, -4.25 - 0.95 * 2, 1.0, [1.0, 4.0], -1.0),
        (0.21, -4.25 - 2 - 0.05 * 5, 2.5, [-0.5, 2.5], -2.5),
        (0.6, -4.25 - 2 - 2 * 5, 2.5, [-0.5, 2.5], -2.5),
    ],
)
def test_the_learned_margin_of_three_points_on_a_line(
    alpha: float, value: float, margin: float, f_x: list[float], f_z: float, norm: float, copies: int
) -> None:
    # negative at 0, positives at 2 (weight .25) and 5, at a mean distance of 4.25; lambda p = 4, so that the point at 2
    # may be carried 5 times. Extra mass of 10 alpha / 2 comes from it up to .25 * 4, at 2 a unit, then from that at 5
    problem = TransportProblem(
        tensor([[2.0], [5.0]]), tensor([[0.0]] * copies), hinge_weight=10.0, alpha=alpha, prior=0.4,
        sample_weight_x=tensor([0.25, 0.75]), norm=norm,
    )  # fmt: skip
    solution = solve(problem)
    assert solution.value == pytest.approx(value)
    assert solution.margin == pytest.approx(margin)
    assert solution.potential_x.tolist() == pytest.approx(f_x)
    assert solution.potential_z.tolist() == pytest.approx([f_z] * copies)


@COPIES
def test_a_margin_that_binds_carries_near_samples_more(copies: int) -> None:
    # x at 1 and 10, z at 0, p = 1/2, lambda = 2: extra mass at 1 a unit earns 2m = 4, at 10 it costs more than that
    x, z = tensor([[1.0], [10.0]]), tensor([[0.0]] * copies)
    solution = solve(TransportProblem(x, z, hinge_weight=2.0, margin=2.0, prior=0.5))
    assert solution.plan.toarray().sum(axis=1) == pytest.approx([1.0, 0.5])
    assert solution.value == pytest.approx(-(1.0 + 5.0 - 2 * 2 * 0.5))
    # f(0) = -2, f(1) = -1 inside the margin, f(10) = 8: no hinge on the negative
    assert solution.potential_z.tolist() == pytest.approx([-2.0] * copies)
    assert solution.potential_x.tolist() == pytest.approx([-1.0, 8.0])
