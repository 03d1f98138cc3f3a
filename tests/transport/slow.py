"""The hKR problem on two samples as the theory writes it: two linear programmes for HiGHS, and plain loops."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist

from otnn.transport import TransportProblem, TransportSolution

Floats = NDArray[np.float64]
# HiGHS counts in absolute terms: what it solves must be of order one
_OPTIONS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def cost_matrix(x: Floats, z: Floats, norm: float = 2.0) -> Floats:
    return cdist(x, z, "chebyshev") if norm == np.inf else cdist(x, z, "minkowski", p=norm)


# --- inf over f of -KR(f) + lambda (E[(m - Y f)_+] - alpha m) ----------------------------------------------------


@dataclass(frozen=True)
class Primal:
    """Over v = (f at positives, f at negatives, their hinges, m): minimise cost @ v where rows @ v <= limits."""

    cost: Floats
    rows: Floats
    limits: Floats
    bounds: Sequence[tuple[float | None, float | None]]
    signs: Floats

    def minimum(self, of: Floats | None = None) -> float:
        """The minimum of the loss, or of another linear function of v; -inf where there is none."""
        cost = self.cost if of is None else of
        result = linprog(cost, csr_array(self.rows), self.limits, bounds=self.bounds, options=_OPTIONS)
        if result.status == 3:
            return -np.inf
        assert result.status == 0, result.message
        return float(result.fun)

    def optimal(self, slack: float = 1e-10) -> "Primal":
        """The same over optimal v only."""
        limits = np.append(self.limits, self.minimum() + slack)
        return replace(self, rows=np.vstack([self.rows, self.cost]), limits=limits)

    def margins(self) -> tuple[float, float]:
        """The least and the largest m."""
        margin = self._unit(len(self.cost) - 1)
        return self.minimum(margin), -self.minimum(-margin)

    def best_separation(self) -> float:
        """The largest t such that some f has Y f >= t on all samples: > 0 where one of them separates."""
        count = len(self.signs)
        separated = np.zeros((count, len(self.cost) + 1))
        separated[np.arange(count), np.arange(count)] = -self.signs
        separated[:, -1] = 1
        programme = replace(
            self,
            cost=np.append(0 * self.cost, -1.0),
            rows=np.vstack([np.pad(self.rows, ((0, 0), (0, 1))), separated]),
            limits=np.append(self.limits, np.zeros(count)),
            bounds=[*self.bounds, (None, None)],
        )
        return -programme.minimum()

    def worst_separation(self) -> float:
        """The smallest Y f that any f has at any sample: > 0 where all of them separate."""
        return min(self.minimum(sign * self._unit(k)) for k, sign in enumerate(self.signs))

    def _unit(self, k: int) -> Floats:
        return np.eye(1, len(self.cost), k)[0]


def primal(problem: TransportProblem) -> Primal:
    """The programme over f that are 1-Lipschitz on all pairs of samples, those of one class too."""
    a, b = problem.sample_weight_x.numpy(), problem.sample_weight_z.numpy()
    n, count = len(a), len(a) + len(b)
    weight, p, alpha = problem.hinge_weight, problem.prior, problem.alpha or 0.0
    cost = np.concatenate([-a, b, weight * p * a, weight * (1 - p) * b, [-weight * alpha]])
    points = np.concatenate([problem.x.numpy(), problem.z.numpy()])
    u, v = (~np.eye(count, dtype=bool)).nonzero()
    lipschitz = np.zeros((len(u), len(cost)))
    lipschitz[np.arange(len(u)), u], lipschitz[np.arange(len(u)), v] = 1, -1
    signs = np.where(np.arange(count) < n, 1.0, -1.0)
    hinges = np.hstack([-np.diag(signs), -np.eye(count), np.ones((count, 1))])  # m - Y f - h <= 0
    learned = problem.alpha is not None and weight > 0
    return Primal(
        cost,
        np.vstack([lipschitz, hinges]),
        np.append(cost_matrix(points, points, problem.norm)[u, v], np.zeros(count)),
        [(None, None)] * count + [(0, None)] * count + [(0, None) if learned else (problem.margin or 0.0,) * 2],
        signs,
    )


# --- - min over plans --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dual:
    """-min over pi of sum (c - reward) pi + reward, the sums of rows and columns and the whole mass in ranges."""

    costs: Floats
    range_x: tuple[Floats, Floats]
    range_z: tuple[Floats, Floats]
    reward: float
    mass: tuple[float, float]

    def value(self) -> float:
        n, m = self.costs.shape
        sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m)), np.ones((1, n * m))])
        low, high = (np.concatenate([self.range_x[k], self.range_z[k], [self.mass[k]]]) for k in (0, 1))
        bounded = np.isfinite(high)
        rows, limits = np.vstack([-sums, sums[bounded]]), np.append(-low, high[bounded])
        result = linprog((self.costs - self.reward).ravel(), csr_array(rows), limits, options=_OPTIONS)
        assert result.status == 0, result.message
        return -float(result.fun) - self.reward


def dual(problem: TransportProblem) -> Dual:
    """sum c pi - 2 m (|pi| - 1); for a learned margin sum c pi where |pi| >= 1 + lambda alpha / 2."""
    a, b = problem.sample_weight_x.numpy(), problem.sample_weight_z.numpy()
    weight, p = problem.hinge_weight, problem.prior
    return Dual(
        cost_matrix(problem.x.numpy(), problem.z.numpy(), problem.norm),
        (a, a * (1 + weight * p)),
        (b, b * (1 + weight * (1 - p))),
        2 * (problem.margin or 0.0),
        (1 + weight * (problem.alpha or 0.0) / 2, np.inf),
    )


# --- loops -------------------------------------------------------------------------------------------------------


def distance_on_the_line(x: Floats, z: Floats, a: Floats, b: Floats) -> float:
    """W1 of two samples (n,) and (m,): the integral of |F - G| over the distribution functions."""
    ends = np.unique(np.concatenate([x, z]))
    total = 0.0
    for left, right in itertools.pairwise(ends):
        total += abs(a[x <= left].sum() - b[z <= left].sum()) * (right - left)
    return total


def image(solution: TransportSolution, point: Floats, label: int) -> Floats:
    """A point moved as the nearest sample of its class, which goes to the mean of its partners."""
    x, z = solution.problem.x.numpy(), solution.problem.z.numpy()
    own, other = (x, z) if label else (z, x)
    plan = solution.plan.toarray() if label else solution.plan.toarray().T
    nearest = min(range(len(own)), key=lambda k: np.linalg.norm(point - own[k], ord=solution.problem.norm))
    target, mass = 0 * point, 0.0
    for k in range(len(other)):
        target = target + plan[nearest, k] * other[k]
        mass += plan[nearest, k]
    return point + target / mass - own[nearest]
