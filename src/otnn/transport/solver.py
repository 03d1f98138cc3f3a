"""`solve`: the exact optimum, on candidate arcs that grow until no pair of samples would improve it.

Each round solves the problem on some of the pairs, and prices all of them: f(x_i) - f(z_j) > ||x_i - z_j|| is a pair
that belongs in. The potentials are made 1-Lipschitz on all pairs by two c-transforms, which bounds the optimum from the
other side; the rounds end when both bounds agree.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from torch import Tensor

from otnn.errors import InputError
from otnn.transport.costs import distances
from otnn.transport.flow import Flow, FlowNetwork, check_budget
from otnn.transport.problem import TransportProblem
from otnn.transport.solution import TransportSolution

MEMORY_BUDGET = 12e9
# Pairs that each sample brings in, at the start and in each round: more of them mean fewer, slower rounds.
_FIRST, _MORE = 16, 8
# A relative gap that is exact enough to end on, and the one that is promised.
_GAP, EXACT = 1e-11, 1e-9
# The gap from which on the multipliers are made exact to their rounding.
_NEAR = 1e-8
# The largest margin, in units of the largest distance.
_WIDE = 1e5
# Problems of more samples begin with the solution of a part of them, up to that gap.
_COARSE, _ROUGH = 500, 1e-3
_BLOCK = 1 << 23  # numbers


class Round(NamedTuple):
    """What a round ended with: its number, the candidate arcs, and the relative gap between both bounds."""

    number: int
    arcs: int
    gap: float


def solve(
    problem: TransportProblem,
    *,
    memory_budget: float = MEMORY_BUDGET,
    on_round: Callable[[Round], None] = lambda _: None,
) -> TransportSolution:
    """Solve the hKR problem on two finite samples exactly.

    Args:
        problem: what is to be solved.
        memory_budget: bytes; the matrix of distances takes 8 n m of them.
        on_round: called after each round.

    Returns:
        The optimum; its relative gap is at most 1e-9, and usually some 1e-12.

    Raises:
        InputError: the problem needs more memory than the budget, and the message says how much; or a margin beside
            which the distances vanish.
        RuntimeError: the gap did not close, which no input should cause.

    Example:
        >>> x, z = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
        >>> plain = solve(TransportProblem(x, z, hinge_weight=0.0))
        >>> plain.transport_cost, plain.value
        (3.5, -3.5)
        >>> solve(TransportProblem(x, z, hinge_weight=4.0, margin=1.0)).potential_z.round(decimals=9)
        tensor([-1., -3.], dtype=torch.float64)
    """
    check_budget(*problem.sizes, memory_budget)
    costs = distances(problem.x, problem.z, problem.norm)
    farthest = float(costs.max())
    if problem.margin is not None and problem.hinge_weight > 0 and problem.margin > _WIDE * farthest > 0:
        raise InputError(
            f"margin = {problem.margin:g}: expected at most {_WIDE:g} times the largest distance, {farthest:g}: beside "
            "it the distances are lost in rounding; lower the margin"
        )
    return _optimum(problem, costs, _GAP, on_round)


def _optimum(
    problem: TransportProblem, costs: Tensor, enough: float, on_round: Callable[[Round], None]
) -> TransportSolution:
    """Rounds until the gap is at most `enough`, or no pair is left to bring in."""
    network = FlowNetwork(problem)
    m = costs.shape[1]
    i, j = network.feasible_arcs()
    arcs = np.union1d(i * m + j, _smallest(costs, *_guess(problem, costs), _FIRST, limit=np.inf))
    class_distance = float(costs.min())
    number, finely = 0, False
    while True:
        number += 1
        rows, columns = arcs // m, arcs % m
        flow = network.solve(rows, columns, costs.view(-1)[torch.from_numpy(arcs)].numpy(), finely=finely)
        solution = _solution(problem, costs, class_distance, flow)
        on_round(Round(number, len(arcs), solution.gap))
        if solution.gap <= enough:
            return solution
        grown = np.union1d(arcs, _violated(costs, flow))
        if finely and len(grown) == len(arcs):
            if solution.gap > EXACT:
                raise RuntimeError(f"the gap of {problem} stays at {solution.gap:.1e}; expected at most {EXACT:g}")
            return solution
        # near the optimum what is left is the rounding of the multipliers, which would bring in pairs without end
        finely = finely or len(grown) == len(arcs) or solution.gap <= _NEAR
        arcs = grown


def _guess(problem: TransportProblem, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers u_i + v_j near the optimal ones, to begin with: those of a quarter of the samples, extended to all.

    Small problems begin with the means of their distances.
    """
    n, m = costs.shape
    if min(n, m) < _COARSE:
        of_rows = costs.mean(dim=1)
        return of_rows, costs.mean(dim=0) - of_rows.mean()
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator)[: size // 4].sort().values for size in (n, m))
    part = costs[rows][:, columns]
    coarse = _optimum(problem.subset(rows, columns), part, _ROUGH, lambda _: None)
    u = -_c_transform(costs[:, columns], -coarse.potential_z, dim=1)
    return u, -_c_transform(costs, u, dim=0)


def _violated(costs: Tensor, flow: Flow) -> np.ndarray:
    """Pairs where f(x) - f(z) exceeds the distance."""
    return _smallest(costs, flow.potential_x, -flow.potential_z, _MORE, limit=0.0)


def _smallest(costs: Tensor, u: Tensor, v: Tensor, count: int, limit: float) -> np.ndarray:
    """The pairs i m + j of the smallest c_ij - u_i - v_j below a limit, `count` of each sample, by blocks."""
    n, m = costs.shape
    found = []
    for start in range(0, n, max(1, _BLOCK // m)):
        block = costs[start : start + max(1, _BLOCK // m)]
        reduced = block - v
        reduced -= u[start : start + len(block)].unsqueeze(1)
        values, index = torch.topk(reduced, min(count, m), dim=1, largest=False)
        pairs = (torch.arange(start, start + len(block)).unsqueeze(1)) * m + index
        found.append(pairs[values < limit])
    for start in range(0, m, max(1, _BLOCK // n)):
        block = costs[:, start : start + max(1, _BLOCK // n)].mT.clone(memory_format=torch.contiguous_format)
        block -= u
        block -= v[start : start + len(block)].unsqueeze(1)
        values, index = torch.topk(block, min(count, n), dim=1, largest=False)
        pairs = index * m + torch.arange(start, start + len(block)).unsqueeze(1)
        found.append(pairs[values < limit])
    return torch.cat(found).numpy()


def _solution(problem: TransportProblem, costs: Tensor, class_distance: float, flow: Flow) -> TransportSolution:
    """The plan of a flow, and its potentials made 1-Lipschitz on all samples.

    f(z) = max_i f(x_i) - ||x_i - z||, then f(x) = min_j f(z_j) + ||x - z_j||, are 1-Lipschitz as they stand, and no
    worse than what they replace: f falls at negatives and rises at positives.
    """
    potential_z = _c_transform(costs, flow.potential_x, dim=0)
    potential_x = -_c_transform(costs, -potential_z, dim=1)
    pair = torch.from_numpy(flow.rows * costs.shape[1] + flow.columns)
    mass = torch.from_numpy(flow.mass)
    transport_cost = float(mass @ costs.view(-1)[pair])
    extra = 0.0 if problem.learns_margin else 2 * flow.margin * (float(mass.sum()) - 1)
    value = problem.loss(potential_x, potential_z, flow.margin)
    bound = extra - transport_cost
    scale = max(transport_cost, abs(value)) or 1.0
    return TransportSolution(
        problem=problem,
        value=value,
        gap=max(0.0, value - bound) / scale,
        margin=flow.margin,
        plan=coo_array((flow.mass, (flow.rows, flow.columns)), shape=costs.shape),
        transport_cost=transport_cost,
        potential_x=potential_x,
        potential_z=potential_z,
        class_distance=class_distance,
    )


def _c_transform(costs: Tensor, potential: Tensor, dim: int) -> Tensor:
    """Return the maximum over the samples along `dim` of potential - c, by blocks."""
    m = costs.shape[1]
    if dim == 1:
        parts = [(potential - block).amax(dim=1) for block in costs.split(max(1, _BLOCK // m))]
        return torch.cat(parts)
    size = max(1, _BLOCK // m)
    result = torch.full((m,), -torch.inf, dtype=costs.dtype)
    for block, values in zip(costs.split(size), potential.split(size), strict=True):
        torch.maximum(result, (values.unsqueeze(1) - block).amax(dim=0), out=result)
    return result
