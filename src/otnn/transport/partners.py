"""What the exact transport plan gives a training sample: the global counterfactual, beside the local one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.transport.costs import pair_distances
from otnn.transport.solution import TransportSolution

STATUSES = ("ok", "not in the plan")


@dataclass(frozen=True)
class Partners:
    """The samples of the other class to which an optimal plan carries each sample, most mass first.

    Attributes:
        partner: (n, k) indices into the data; -1 where there are fewer.
        share: (n, k) of all that the sample carries; 0 likewise.
        distance: (n, k) ||x - z||, in the norm of the problem; NaN likewise.
        status: per sample "ok" or "not in the plan": the plan knows the samples that it was solved on, and no others.
    """

    partner: Tensor
    share: Tensor
    distance: Tensor
    status: tuple[str, ...]


def plan_partner(
    solution: TransportSolution, samples: Tensor, indices: tuple[Tensor, Tensor] | None = None, *, k: int = 1
) -> Partners:
    """Look up the partners of samples of either class.

    Args:
        solution: the optimum on training samples, such as `otnn.transport.PotentialAudit.solution`.
        samples: (n,) indices into the data.
        indices: where the positives and the negatives of the problem stand in the data, as `PotentialAudit.indices`;
            by default the data are the positives followed by the negatives.
        k: partners per sample, at most.

    Raises:
        InputError: indices that are none or do not belong to the solution, or fewer than one partner.

    Example:
        >>> from otnn.transport import TransportProblem, solve
        >>> line = TransportProblem(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [9.0]]), hinge_weight=0.0)
        >>> plan_partner(solve(line), torch.tensor([2, 7])).status
        ('ok', 'not in the plan')
    """
    if samples.ndim != 1 or samples.is_floating_point() or samples.dtype == torch.bool:
        raise InputError(f"samples: expected indices (n,), got {samples.dtype} of shape {tuple(samples.shape)}")
    if k < 1:
        raise InputError(f"k: expected at least 1 partner, got {k}")
    count_x, count_z, _ = solution.problem.sizes
    sides = indices or (torch.arange(count_x), count_x + torch.arange(count_z))
    if [len(side) for side in sides] != [count_x, count_z]:
        raise InputError(
            f"indices: expected those of the {count_x} positives and {count_z} negatives of the solution, "
            f"got {len(sides[0])} and {len(sides[1])}"
        )
    samples = samples.cpu()
    shape = (len(samples), k)
    partner, share = torch.full(shape, -1), torch.zeros(shape, dtype=torch.float64)
    distance = torch.full(shape, torch.nan, dtype=torch.float64)
    known = torch.zeros(len(samples), dtype=torch.bool)
    x, z = solution.problem.x, solution.problem.z
    for positive in (True, False):
        own, other = (side.cpu() for side in (sides if positive else sides[::-1]))
        own_points, other_points = (x, z) if positive else (z, x)
        order = own.argsort()
        place = torch.searchsorted(own[order], samples).clamp(max=len(own) - 1)
        found = own[order][place] == samples
        rows = order[place[found]]
        ends, part = _largest(solution, positive, k)
        ends, part = ends[rows], part[rows]
        filled = ends >= 0
        lengths = torch.full(ends.shape, torch.nan, dtype=torch.float64)
        lengths[filled] = pair_distances(
            own_points[rows].repeat_interleave(filled.sum(dim=1), dim=0),
            other_points[ends[filled]],
            solution.problem.norm,
        )
        partner[found] = torch.where(filled, other[ends], -1)
        share[found], distance[found] = part, lengths
        known |= found
    return Partners(partner, share, distance, tuple(STATUSES[int(not one)] for one in known))


def _largest(solution: TransportSolution, positive: bool, k: int) -> tuple[Tensor, Tensor]:
    """The k partners of every sample of one side, and their shares: (n, k), -1 and 0 where there are fewer."""
    ends = (solution.rows, solution.columns)
    own, other = ends if positive else ends[::-1]
    count = solution.problem.sizes[0 if positive else 1]
    order = solution.mass.argsort(descending=True, stable=True)
    order = order[own[order].argsort(stable=True)]
    own, other, mass = own[order], other[order], solution.mass[order]
    rank = torch.arange(len(own)) - torch.searchsorted(own, own)  # among the pairs of its sample
    carried = torch.zeros(count, dtype=torch.float64).index_add(0, own, mass)
    kept = rank < k
    partner, share = torch.full((count, k), -1), torch.zeros(count, k, dtype=torch.float64)
    partner[own[kept], rank[kept]] = other[kept]
    share[own[kept], rank[kept]] = mass[kept] / carried[own[kept]]
    return partner, share
