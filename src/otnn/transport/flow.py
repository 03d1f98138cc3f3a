"""The dual of the hKR problem as a balanced transportation problem, and its solution on a sparse set of arcs.

A positive x_i may send between a_i and a_i (1 + s) units, s = lambda p, and a negative z_j take between b_j and
b_j (1 + t), t = lambda (1 - p). As supplies and demands that must all be met:

    sources   x_i: a_i (1 + s)    spare z'_j: b_j t    hubs: K in all, K > min(s, t)
    sinks     z_j: b_j (1 + t)    spare x'_i: a_i s    rest: K

    x_i -> z_j at the distance;  x_i -> x'_i what x_i keeps;  hub -> x'_i what it sends beyond a_i;
    z'_j -> z_j what z_j does without;  z'_j -> rest what it takes beyond b_j;  hub -> rest at 2m.

The extra mass |pi| - 1 is what leaves the hub for the x'_i, so each unit of it saves 2m. For a learned margin one hub,
of lambda alpha / 2 units, has no arc to the rest: that much extra mass is carried at least. This takes one arc for each
pair of samples and five for each sample, where mandatory and optional copies of the samples take four for each pair.

With multipliers U + V <= cost, f(x_i) = U_i - S + m and f(z_j) = R - V_j - m, S and R those of the (first) hub and the
rest, and m = (S + R) / 2.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otnn.errors import InputError
from otnn.transport.problem import TransportProblem

# The network simplex ends by itself; this only keeps it from ending early.
_PIVOTS = 2**31 - 1
# What its multipliers are exact to, as a share of the largest price: they carry the rounding of the dear artificial
# arcs that it starts from.
_FINE = 1e-9

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Flow:
    """An optimal flow on the arcs that were given.

    Attributes:
        rows: index i of each pair of samples that carries mass.
        columns: index j of each such pair.
        mass: pi_ij > 0.
        potential_x: (n,) f(x_i) <= f(z_j) + c_ij on the given arcs.
        potential_z: (m,) f(z_j).
        margin: the margin, fixed or learned; 0 where the hinge weight is 0.
    """

    rows: Indices
    columns: Indices
    mass: Floats
    potential_x: Tensor
    potential_z: Tensor
    margin: float


class FlowNetwork:
    """Supplies, demands and the arcs beside those between samples; `solve` takes the latter."""

    def __init__(self, problem: TransportProblem) -> None:
        self.problem = problem
        a, b = problem.sample_weight_x.numpy(), problem.sample_weight_z.numpy()
        n, m, s, t = len(a), len(b), problem.slack_x, problem.slack_z
        self._doubles = min(s, t) > 0
        if not self._doubles:
            self._supply, self._demand = a, b
            self._arcs = [np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)]
            return
        obliged = problem.hinge_weight * problem.alpha / 2 if problem.alpha is not None else 0.0
        hubs = [min(s, t) * 1.25 - obliged]
        if obliged > 0:
            hubs.insert(0, obliged)
        self._supply = np.concatenate([a * (1 + s), b * t, hubs])
        self._demand = np.concatenate([b * (1 + t), a * s, [sum(hubs)]])
        i, j, rest = np.arange(n), np.arange(m), m + n
        self._hub, last = n + m, n + m + len(hubs) - 1
        arcs: list[tuple[Any, Any, float]] = [(i, m + i, 0.0), (n + j, j, 0.0), (n + j, np.full(m, rest), 0.0)]
        arcs += [(np.full(n, hub), m + i, 0.0) for hub in range(self._hub, last + 1)]
        arcs += [(np.array([last]), np.array([rest]), 2 * (problem.margin or 0.0))]
        self._arcs = [
            np.concatenate([arc[0] for arc in arcs]),
            np.concatenate([arc[1] for arc in arcs]),
            np.concatenate([np.full(len(arc[0]), arc[2]) for arc in arcs]),
        ]

    def feasible_arcs(self) -> tuple[Indices, Indices]:
        """Pairs of samples that carry a plan whatever the costs: n + m - 1 of the north-west corner rule."""
        ends = [np.cumsum(w.numpy()) for w in (self.problem.sample_weight_x, self.problem.sample_weight_z)]
        cuts = np.union1d(ends[0][:-1], ends[1][:-1])
        middle = (np.append(0.0, cuts) + np.append(cuts, 1.0)) / 2
        i, j = (np.minimum(np.searchsorted(end, middle), len(end) - 1) for end in ends)
        return i, j

    def solve(self, rows: Indices, columns: Indices, costs: Floats, *, finely: bool = False) -> Flow:
        """Solve on the arcs from x[rows] to z[columns] by POT's network simplex on sparse graphs.

        Args:
            rows: (arcs,) indices of positives.
            columns: (arcs,) indices of negatives; each pair occurs once, and those of `feasible_arcs` are among them.
            costs: (arcs,) distances.
            finely: solve once more for what the multipliers leave of the prices, in finer units.

        Raises:
            RuntimeError: the network simplex gave up.
        """
        n, m, _ = self.problem.sizes
        sources, sinks = np.concatenate([rows, self._arcs[0]]), np.concatenate([columns, self._arcs[1]])
        prices = np.concatenate([costs, self._arcs[2]])
        unit = float(prices.max()) or 1.0
        flow, u, v = self._simplex(sources, sinks, prices / unit)
        u, v = unit * u, unit * v
        if self._doubles:  # one of the multipliers is free: small numbers round least
            u, v = u - u[self._hub], v + u[self._hub]
        if finely:
            fine = _FINE * unit
            # by how far an arc misses being tight does not matter
            left = np.minimum(prices - u[sources] - v[sinks], fine)
            flow, more_u, more_v = self._simplex(sources, sinks, left / fine)
            u, v = u + fine * more_u, v + fine * more_v
        hub, rest = (float(u[self._hub]), float(v[-1])) if self._doubles else (0.0, 0.0)
        margin = self.problem.margin or 0.0
        if self.problem.learns_margin:
            margin = max(0.0, (hub + rest) / 2)
        carried = (flow.row < n) & (flow.col < m) & (flow.data > 0)
        return Flow(
            rows=flow.row[carried].astype(np.int64),
            columns=flow.col[carried].astype(np.int64),
            mass=flow.data[carried].astype(np.float64),
            potential_x=torch.from_numpy(u[:n] - (hub - rest) / 2),
            potential_z=torch.from_numpy((rest - hub) / 2 - v[:m]),
            margin=margin,
        )

    def _simplex(self, sources: Indices, sinks: Indices, prices: Floats) -> tuple[Any, Floats, Floats]:
        """The optimal flow, and the multipliers of sources and sinks."""
        import ot
        from scipy.sparse import coo_array

        graph = coo_array((prices, (sources, sinks)), shape=(len(self._supply), len(self._demand)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is the error below
            flow, log = ot.emd(self._supply, self._demand, graph, numItermax=_PIVOTS, log=True, center_dual=False)
        if log["warning"] is not None:
            raise RuntimeError(f"the network simplex did not end: {log['warning']}")
        return flow, log["u"], log["v"]


def check_budget(n: int, m: int, dimensions: int, memory_budget: float) -> None:
    """Refuse a problem that does not fit into memory, before anything is computed.

    Raises:
        InputError: what it would take, and the budget.
    """
    needed = required_memory(n, m, dimensions)
    if needed > memory_budget:
        raise InputError(
            f"memory: {n} x {m} samples of {dimensions} values need {needed / 1e9:.3g} GB, the budget is "
            f"{memory_budget / 1e9:.3g} GB; take fewer samples, or raise memory_budget"
        )


def required_memory(n: int, m: int, dimensions: int) -> float:
    """Bytes that a solution takes at most, roughly: distances, a block of reduced costs, arcs, and the samples.

    Example:
        >>> f"{required_memory(10_000, 10_000, 784) / 1e9:.1f} GB"
        '2.3 GB'
    """
    samples = 8.0 * dimensions * (n + m)  # in float64: as they are, centred, and their gradients
    return 8.0 * n * m + 2.0e8 + 40_000.0 * (n + m) + 4 * samples
