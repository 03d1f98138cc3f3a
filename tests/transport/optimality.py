"""What makes a solution optimal, checked one condition after the other."""

import numpy as np
import pytest

from otnn.transport import TransportSolution
from tests.transport.slow import cost_matrix


def size(solution: TransportSolution) -> float:
    """What errors are relative to: the value alone may be 0."""
    return max(solution.transport_cost, abs(solution.value))


def assert_optimal(solution: TransportSolution) -> None:
    """Both sides are feasible, and each inequality that is not tight has no multiplier."""
    problem, plan = solution.problem, solution.plan.toarray()
    assert plan.shape == (len(problem.x), len(problem.z))
    assert (solution.plan.data > 0).all()
    assert len(set(zip(solution.rows.tolist(), solution.columns.tolist(), strict=True))) == len(solution.mass)
    assert 0 <= solution.gap <= 1e-9
    assert solution.margin >= 0

    # the plan: ranges of the marginals, and of the mass
    extra = problem.hinge_weight * np.array([problem.prior, 1 - problem.prior])
    carried = (plan.sum(axis=1), plan.sum(axis=0))
    least = (problem.sample_weight_x.numpy(), problem.sample_weight_z.numpy())
    rounding = 1e-12 * (1 + extra.sum())
    for mass, weight, more in zip(carried, least, extra, strict=True):
        assert (mass >= weight * (1 - 1e-9) - rounding).all()
        assert (mass <= weight * (1 + more) * (1 + 1e-9) + rounding).all()
    if problem.alpha is not None:
        assert plan.sum() >= 1 + problem.hinge_weight * problem.alpha / 2 - 1e-9
        if solution.margin > 1e-9 * size(solution):
            assert plan.sum() == pytest.approx(1 + problem.hinge_weight * problem.alpha / 2, rel=1e-9)

    # the potential: 1-Lipschitz on all pairs
    points = np.concatenate([problem.x.numpy(), problem.z.numpy()])
    f_x, f_z = solution.potential_x.numpy(), solution.potential_z.numpy()
    f, apart = np.concatenate([f_x, f_z]), cost_matrix(points, points, problem.norm)
    reach = apart.max()
    assert (np.abs(f[:, None] - f) <= apart * (1 + 1e-9) + 1e-12 * (reach + np.abs(f).max())).all()

    # slackness: pairs of the plan are told apart by their distance, and samples that are carried again lie inside
    costs = apart[: len(f_x), len(f_x) :]
    assert solution.transport_cost == pytest.approx((plan * costs).sum(), rel=1e-9, abs=1e-12 * reach)
    i, j = solution.rows.numpy(), solution.columns.numpy()
    slack = np.abs(f_x[i] - f_z[j] - costs[i, j])
    # the gap is what pairs miss, weighted by what they carry
    missed = solution.gap * size(solution) / plan[i, j]
    assert (slack <= 1e-9 * costs[i, j] + 1e-11 * (reach + np.abs(f).max()) + 1.01 * missed).all()
    if problem.hinge_weight > 0:
        near = 1e-9 * (reach + solution.margin)
        for signed, mass, weight, more in zip((f_x, -f_z), carried, least, extra, strict=True):
            again, not_fully = mass > weight + 2 * rounding, mass < weight * (1 + more) - 2 * rounding
            assert (signed[again] <= solution.margin + near).all()
            assert (signed[not_fully] >= solution.margin - near).all()

    # both values
    kept = 0.0 if problem.learns_margin else 2 * solution.margin * (plan.sum() - 1)
    close = {"rel": 1e-9, "abs": 1e-9 * size(solution) + 1e-12 * reach}
    assert solution.value == pytest.approx(kept - (plan * costs).sum(), **close)
    assert solution.value == pytest.approx(slow_loss(solution), **close)


def slow_loss(solution: TransportSolution) -> float:
    """-KR(f) + lambda (E[(m - Y f)_+] - alpha m), one sample after the other."""
    problem, m = solution.problem, solution.margin
    total = -problem.hinge_weight * (problem.alpha or 0.0) * m
    for weight, f in zip(problem.sample_weight_x.tolist(), solution.potential_x.tolist(), strict=True):
        total += weight * (-f + problem.hinge_weight * problem.prior * max(0.0, m - f))
    for weight, f in zip(problem.sample_weight_z.tolist(), solution.potential_z.tolist(), strict=True):
        total += weight * (f + problem.hinge_weight * (1 - problem.prior) * max(0.0, m + f))
    return total
