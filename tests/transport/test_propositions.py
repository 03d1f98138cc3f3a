"""What the propositions of arXiv 2206.06854 say, when (theory, section 3), and misprints of them that are wrong."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from otnn.transport import TransportProblem, TransportSolution, solve
from tests.transport.problems import FORMS, NAMES, gaussian_problem, tensor
from tests.transport.slow import cost_matrix, dual, primal

EVERY_FORM = pytest.mark.parametrize("form", FORMS, ids=NAMES)


def class_distance(problem: TransportProblem) -> float:
    """eps, the distance between the classes."""
    return float(cost_matrix(problem.x.numpy(), problem.z.numpy()).min())


def hinge(solution: TransportSolution) -> float:
    """The hinge term of the loss: what is left without -KR."""
    problem = solution.problem
    plain = TransportProblem(
        problem.x, problem.z, hinge_weight=0.0,
        sample_weight_x=problem.sample_weight_x, sample_weight_z=problem.sample_weight_z,
    )  # fmt: skip
    potentials = solution.potential_x, solution.potential_z
    return problem.loss(*potentials) - plain.loss(*potentials)


def gradient(solution: TransportSolution, points: Tensor, label: int | None) -> Tensor:
    points = points.clone().requires_grad_()
    labels = None if label is None else torch.full((len(points),), label)
    return torch.autograd.grad(solution.potential(points, labels).sum(), points)[0]


# --- when the hinge vanishes, and when f* separates --------------------------------------------------------------


@cache
def planar(seed: int, margin: float, weight: float) -> TransportProblem:
    """20 + 20 points of two clouds that lie in each other, yet separable, as eps > 0; the margin is in units of eps."""
    problem = gaussian_problem(20, 20, 2, seed=seed, shift=0.0, equal=True, hinge_weight=weight, margin=0.0)
    margin *= class_distance(problem)
    return TransportProblem(problem.x, problem.z, hinge_weight=weight, margin=margin)


@pytest.mark.parametrize("seed", range(4))
def test_the_hinge_can_vanish_only_up_to_half_the_distance_of_the_classes(seed: int) -> None:
    # the weight is so large that the hinge vanishes wherever it can
    assert hinge(solve(planar(seed, 0.5, 1e4))) == pytest.approx(0, abs=1e-9)
    for margin in (0.51, 1.0, 1.9):  # not m < 2 eps
        problem = planar(seed, margin, 1e4)
        # the nearest pair is at least 2m - eps short, each point weighs 1/40
        short = (2 * margin - 1) * class_distance(problem)
        assert hinge(solve(problem)) >= 1e4 / 40 * short * (1 - 1e-9) > 0


SETS = 8


def separable_by_an_optimum(margin: float, weight: float) -> int:
    """For how many sets an optimum has Y f > 0 at all samples. f* is not unique: all of them are looked through."""
    return sum(primal(planar(seed, margin, weight)).optimal().best_separation() > 1e-6 for seed in range(SETS))


def separated(margin: float, weight: float) -> int:
    """For how many sets the optimum that `solve` returns has Y f > 0 at all samples."""
    solutions = [solve(planar(seed, margin, weight)) for seed in range(SETS)]
    return sum(bool((s.potential_x > 0).all() and (s.potential_z < 0).all()) for s in solutions)


@pytest.mark.parametrize("weight", [0.5, 2.0, 10.0, 100.0])
def test_with_a_large_margin_optima_misclassify_separable_data(weight: float) -> None:
    # m = 1.9 eps < 2 eps: whatever the weight, hardly a set has any optimum that separates (of 20 sets 0, 1, 2 and 2)
    assert separable_by_an_optimum(1.9, weight) <= 1
    assert separated(1.9, weight) <= 1


def test_with_a_small_margin_it_takes_a_large_weight() -> None:
    # m = .45 eps: of 20 sets 0 have an optimum that separates at lambda = .5, 7 at 2, and all 20 at 10
    assert separable_by_an_optimum(0.45, 0.5) <= 1
    assert 1 <= separable_by_an_optimum(0.45, 2.0) <= SETS - 2
    assert separable_by_an_optimum(0.45, 10.0) == SETS
    # and when the weight grows on, every optimum does
    assert separated(0.45, 1e3) == SETS
    assert all(primal(planar(seed, 0.45, 1e3)).optimal().worst_separation() > 1e-6 for seed in range(2))


@pytest.mark.parametrize("margin", [0.01, 1.0, 1.5, 2.9])
def test_on_a_line_the_weight_must_exceed_8_over_the_rarer_share(margin: float) -> None:
    def line(weight: float) -> TransportProblem:
        x, z = tensor([[0.0], [6.0]]), tensor([[3.0], [9.0]])
        return TransportProblem(
            x, z, hinge_weight=weight, margin=margin, prior=0.5,
            sample_weight_x=tensor([0.9, 0.1]), sample_weight_z=tensor([0.1, 0.9]),
        )  # fmt: skip

    for weight in (0.1, 5.0, 15.99):
        # KR alone falls from 0 to 9 at full slope: f(3) = f(6) + 3, so that f(6) < 0 or f(3) > 0
        assert primal(line(weight)).optimal().best_separation() == pytest.approx(-1.5, abs=1e-6)
        solution = solve(line(weight))
        assert float(solution.potential_x[1]) < 0 or float(solution.potential_z[0]) > 0
        assert float(solution.potential_z[0] - solution.potential_x[1]) == pytest.approx(3)
    for weight in (16.01, 50.0, 1e4):
        assert primal(line(weight)).optimal().worst_separation() == pytest.approx(min(margin, 3 - margin), abs=1e-6)
        solution = solve(line(weight))
        assert (solution.potential_x > 0).all()
        assert (solution.potential_z < 0).all()


# --- Proposition 1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "equal"), [(1, False), (2, False), (20, False), (2, True), (20, True)])
@EVERY_FORM
def test_proposition_1_inside_every_pair(form: dict[str, Any], dims: int, equal: bool) -> None:
    # whatever the extension and however samples are split: f* falls at full slope from x to z, and is smooth in between
    solution = solve(gaussian_problem(50, 50, dims, equal=equal, **form))
    x, z = solution.problem.x[solution.rows], solution.problem.z[solution.columns]
    length = (x - z).norm(dim=1, keepdim=True)
    for label in (None, 1, 0):
        for position in (0.1, 0.5, 0.9):
            y = x + position * (z - x)
            slope = gradient(solution, y, label)
            torch.testing.assert_close(slope, (x - z) / length, rtol=0, atol=1e-9)
            torch.testing.assert_close(y - (1 - position) * length * slope, z, rtol=0, atol=1e-9)
            torch.testing.assert_close(y + position * length * slope, x, rtol=0, atol=1e-9)


@EVERY_FORM
def test_proposition_1_at_samples(form: dict[str, Any]) -> None:
    # z = x - t grad f*(x), t >= 0, and x = z - t grad f*(z), t <= 0: by the extension without a cone there, where the
    # sample is unsplit, for at a split one f* has a kink
    solution = solve(gaussian_problem(40, 50, 3, **form))
    x, z = solution.problem.x[solution.rows], solution.problem.z[solution.columns]
    length = (x - z).norm(dim=1, keepdim=True)
    alone_x = (torch.bincount(solution.rows) == 1)[solution.rows]
    alone_z = (torch.bincount(solution.columns) == 1)[solution.columns]
    assert min(int(alone_x.sum()), int(alone_z.sum())) > 5
    torch.testing.assert_close((x - length * gradient(solution, x, 1))[alone_x], z[alone_x], rtol=0, atol=1e-9)
    torch.testing.assert_close((z + length * gradient(solution, z, 0))[alone_z], x[alone_z], rtol=0, atol=1e-9)
    # the sign as misprinted, z = x + t grad f*(x), leads away
    away = x + length * gradient(solution, x, 1)
    assert ((away - z).norm(dim=1) > (x - z).norm(dim=1))[alone_x].all()
    # at split samples every pair still falls at full slope
    f_x, f_z = solution.potential(x, torch.ones(len(x)).long()), solution.potential(z, torch.zeros(len(z)).long())
    torch.testing.assert_close(f_x - f_z, length.squeeze(1), rtol=1e-9, atol=1e-9)


def test_the_plan_is_not_that_of_w1() -> None:
    # with a hinge that binds the pairs differ from those of the plain problem, and so does where f* points
    plain, bound = (solve(gaussian_problem(40, 50, 3, **form)) for form in FORMS[:2])
    pairs = [set(zip(s.rows.tolist(), s.columns.tolist(), strict=True)) for s in (plain, bound)]
    assert len(pairs[0] & pairs[1]) < 0.8 * len(pairs[0])
    assert float(bound.mass.sum()) > 1.1
    cosine = (gradient(plain, plain.problem.x, 1) * gradient(bound, plain.problem.x, 1)).sum(dim=1)
    assert cosine.min() < 0.9


@EVERY_FORM
def test_barycentres_are_no_target_in_20_dimensions(form: dict[str, Any]) -> None:
    solution = solve(gaussian_problem(100, 150, 20, shift=2.0, **form))
    x = solution.problem.x
    slope, way = gradient(solution, x, 1), x - solution.transport(x)
    cosine = torch.cosine_similarity(slope, way)
    split = torch.bincount(solution.rows) > 1
    assert split.double().mean() > 0.5
    assert cosine[split].median() < 0.9
    # at the exact optimum: each pair is a target, if not the one that autograd takes at a kink
    assert cosine[~split].min() > 1 - 1e-9
    middle = (x[solution.rows] + solution.problem.z[solution.columns]) / 2
    pair = x[solution.rows] - solution.problem.z[solution.columns]
    assert torch.cosine_similarity(gradient(solution, middle, None), pair).min() > 1 - 1e-9


# --- Proposition 2 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def separating() -> TransportSolution:
    """A margin of .45 eps and a large weight."""
    problem = gaussian_problem(30, 40, 2, shift=2.0, hinge_weight=0.0)
    margin = 0.45 * class_distance(problem)
    return solve(gaussian_problem(30, 40, 2, shift=2.0, hinge_weight=1e3, margin=margin))


@pytest.mark.parametrize("label", [1, 0])
def test_proposition_2_one_step_lands_on_the_boundary(separating: TransportSolution, label: int) -> None:
    points = separating.problem.x if label else separating.problem.z
    f = separating.potential(points, torch.full((len(points),), label))
    assert ((f > 0) == (label == 1)).all()
    slope = gradient(separating, points, label)
    reached = points - f.unsqueeze(1) * slope
    # on the segment to a partner, where all extensions agree
    for labels in (None, torch.zeros(len(points)).long(), torch.ones(len(points)).long()):
        assert separating.potential(reached, labels).abs().max() < 1e-9
    # at distance |f|, and no point that is nearer has another sign
    torch.testing.assert_close((reached - points).norm(dim=1), f.abs(), rtol=1e-9, atol=1e-9)
    generator = torch.Generator().manual_seed(0)
    for radius in (0.5, 0.99, 0.999999):
        way = torch.nn.functional.normalize(torch.randn(200, *points.shape, generator=generator).double(), dim=-1)
        inside = points + radius * f.abs().unsqueeze(1) * way
        around = separating.potential(inside.flatten(0, 1)).view(200, -1)
        assert ((around > 0) == (label == 1)).all()


def test_proposition_2_a_step_beyond_the_boundary_changes_the_sign(separating: TransportSolution) -> None:
    x = separating.problem.x
    f = separating.potential(x, torch.ones(len(x)).long())
    beyond = x - 1.001 * f.unsqueeze(1) * gradient(separating, x, 1)
    assert (separating.potential(beyond) < 0).all()


def test_without_separation_proposition_2_fails() -> None:
    # m = 1.9 eps: at a misclassified sample the step leads away from the other class, to no boundary
    problem = planar(0, 1.9, 10.0)
    solution = solve(problem)
    wrong = problem.x[solution.potential_x < -1e-9]
    assert len(wrong) > 0
    f = solution.potential(wrong, torch.ones(len(wrong)).long())
    reached = wrong - f.unsqueeze(1) * gradient(solution, wrong, 1)
    assert (solution.potential(reached, torch.ones(len(wrong)).long()).abs() > 1e-3 * f.abs()).any()


# --- mistakes in circulation (theory, section 6) -----------------------------------------------------------------


def overlapping() -> TransportProblem:
    """A plan without a mass constraint carries more than 1 + lambda alpha / 2: m* = 0."""
    return gaussian_problem(15, 20, 2, shift=0.2, hinge_weight=10.0, alpha=0.01)


def test_the_mass_may_exceed_its_bound_where_the_margin_is_0() -> None:
    problem = overlapping()
    solution = solve(problem)
    least = 1 + 10 * 0.01 / 2
    assert solution.margin == pytest.approx(0, abs=1e-12)
    assert float(solution.mass.sum()) > least + 0.05
    programme = dual(problem)
    assert solution.value == pytest.approx(programme.value(), rel=1e-9)
    assert solution.value == pytest.approx(primal(problem).minimum(), rel=1e-9)
    # with equality the dual is that of a margin of any sign, which takes a lower loss
    equal = replace(programme, mass=(least, least))
    assert equal.value() < solution.value - 1e-3
    free = primal(problem)
    assert replace(free, bounds=[*free.bounds[:-1], (None, None)]).minimum() == pytest.approx(equal.value(), rel=1e-9)
    # where the margin is positive both are one
    positive = gaussian_problem(15, 20, 2, shift=3.0, hinge_weight=10.0, alpha=0.2)
    assert solve(positive).margin > 0.1
    assert replace(dual(positive), mass=(2.0, 2.0)).value() == pytest.approx(solve(positive).value, rel=1e-9)


def test_other_duals_have_other_values() -> None:
    problem = gaussian_problem(15, 20, 2, hinge_weight=4.0, margin=0.8, prior=0.3)
    programme, value = dual(problem), solve(problem).value
    assert programme.value() == pytest.approx(value, rel=1e-9)
    (low_x, high_x), (low_z, high_z) = programme.range_x, programme.range_z
    wrong = {
        "extra mass costs 2m": replace(programme, reward=-programme.reward),
        "extra mass earns m": replace(programme, reward=programme.reward / 2),
        "marginals are fixed": replace(programme, range_x=(low_x, low_x), range_z=(low_z, low_z)),
        "ranges up to 1 + lambda": replace(programme, range_x=(low_x, 5 * low_x), range_z=(low_z, 5 * low_z)),
        "ranges from 0": replace(programme, range_x=(0 * low_x, high_x), range_z=(0 * low_z, high_z)),
        "priors exchanged": replace(
            programme, range_x=(low_x, low_x * (1 + 4 * 0.7)), range_z=(low_z, low_z * (1 + 4 * 0.3))
        ),
    }
    for name, other in wrong.items():
        assert abs(other.value() - value) > 1e-3, name


def test_a_plus_before_alpha_leaves_no_margin() -> None:
    problem = gaussian_problem(12, 10, 2, shift=3.0, alpha=0.2)
    assert solve(problem).margin > 0.1
    programme = primal(problem)
    plus = np.append(programme.cost[:-1], -programme.cost[-1])
    assert plus[-1] > 0
    assert replace(programme, cost=plus).optimal().margins()[1] == pytest.approx(0, abs=1e-6)


def test_alpha_is_the_share_inside_the_learned_margin() -> None:
    # half of it on each side (theory, section 1): atoms sit at m itself, so both sides of the bracket are tested
    for prior in (0.3, 0.5):
        problem = gaussian_problem(80, 70, 2, shift=3.0, alpha=0.2, prior=prior)
        solution = solve(problem)
        m, near = solution.margin, 1e-9
        assert m > 0.1
        for signed, weight, share in (
            (solution.potential_x, problem.sample_weight_x, prior),
            (-solution.potential_z, problem.sample_weight_z, 1 - prior),
        ):
            inside, up_to = (share * float(weight[signed < m + side].sum()) for side in (-near, near))
            assert inside <= 0.1 + 1e-9 <= up_to + 2e-9
