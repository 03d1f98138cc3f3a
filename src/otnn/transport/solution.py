"""The exact optimum: plan, potentials on the samples, and what follows from them anywhere."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otnn.checks import check_labels
from otnn.errors import InputError
from otnn.transport.costs import distances, pair_distances
from otnn.transport.problem import TransportProblem

_CHUNK = 1 << 23  # numbers


@dataclass(frozen=True)
class TransportSolution:
    """The optimum of a `TransportProblem`.

    Attributes:
        problem: what was solved.
        value: the minimum of the loss; for the plain problem -W1.
        gap: (loss of the potentials - bound by the plan) / max(transport_cost, |value|), >= 0: the value is exact up to
            that.
        margin: m, fixed or learned; 0 where the hinge weight is 0.
        plan: scipy coo_array (n, m), pi_ij; its row sums lie in [a, a (1 + lambda p)], its column sums in
            [b, b (1 + lambda (1 - p))].
        transport_cost: sum of pi_ij ||x_i - z_j||; W1 for the plain problem.
        potential_x: (n,) float64, f* on the positives.
        potential_z: (m,) float64, f* on the negatives; 1-Lipschitz on all samples together.
        class_distance: the smallest ||x_i - z_j||.
    """

    problem: TransportProblem
    value: float
    gap: float
    margin: float
    plan: Any
    transport_cost: float
    potential_x: Tensor
    potential_z: Tensor
    class_distance: float

    @property
    def rows(self) -> Tensor:
        """Index of the positive of each pair that carries mass: (pairs,)."""
        return torch.from_numpy(self.plan.row).long()

    @property
    def columns(self) -> Tensor:
        """Index of the negative of each such pair: (pairs,)."""
        return torch.from_numpy(self.plan.col).long()

    @property
    def mass(self) -> Tensor:
        """What each such pair carries: (pairs,) float64."""
        return torch.from_numpy(self.plan.data)

    def potential(self, points: Tensor, labels: Tensor | None = None) -> Tensor:
        """f* anywhere: a 1-Lipschitz function that has the optimal values on the samples; differentiable.

        Two such functions are min_j f(z_j) + ||x - z_j||, which has a cone at every negative, and max_i f(x_i) -
        ||x - x_i||, which has one at every positive. Without labels the result is their mean, whose gradient at a
        sample has half the norm, as one of the two has a cone there. With labels each point takes the one without a
        cone at its own class, the first at positives and the second at negatives: its gradient there has norm 1 and
        points from a partner at its full distance, under the plan or, where the optimum is not unique (equal weights
        and numbers of samples), under another optimal one. Between partners it is unique (Proposition 1).

        Args:
            points: (batch, ...) in the shape of the samples.
            labels: (batch,) integers, 1 at positives and 0 at negatives.

        Returns:
            (batch,) float64.

        Raises:
            InputError: points of another shape, or labels that are none.

        Example:
            >>> from otnn.transport import solve
            >>> line = TransportProblem(torch.tensor([[0.0]]), torch.tensor([[2.0]]), hinge_weight=0.0)
            >>> at = torch.tensor([[0.0]], requires_grad=True)
            >>> torch.autograd.grad(solve(line).potential(at, torch.tensor([1])).sum(), at)
            (tensor([[-1.]]),)
        """
        flat = self._flat(points)
        if labels is None:
            return (self._from_negatives(flat) + self._from_positives(flat)) / 2
        labels = torch.as_tensor(labels)
        check_labels(labels, len(flat), 2)
        positive = labels == 1
        result = flat.new_zeros(len(flat))
        result = result.index_put((positive.nonzero().squeeze(1),), self._from_negatives(flat[positive]))
        return result.index_put(((~positive).nonzero().squeeze(1),), self._from_positives(flat[~positive]))

    def transport(self, points: Tensor, label: int = 1) -> Tensor:
        """Where the plan carries points of one class: the mean of their partners, weighted by the plan.

        A sample goes to its barycentric image; another point moves like the sample that is nearest to it (Ferradans,
        Papadakis, Peyré and Aujol 2014). A mean of several partners is no target for a gradient: score pairs instead.

        Args:
            points: (batch, ...) in the shape of the samples.
            label: 1 where they are positives, which go to the negatives, and 0 the other way.

        Returns:
            (batch, ...) float64.

        Raises:
            InputError: points of another shape, or another label.
        """
        if label not in (0, 1):
            raise InputError(f"label: expected 1 for positives or 0 for negatives, got {label}")
        flat = self._flat(points)
        own, other = (self.problem.x, self.problem.z) if label else (self.problem.z, self.problem.x)
        plan = (self.plan if label else self.plan.T).tocsr()
        image = torch.from_numpy(plan @ other.numpy() / plan.sum(axis=1)[:, None])
        found = [distances(part, own, self.problem.norm).argmin(dim=1) for part in self._chunks(flat, own)]
        nearest = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
        return (flat + (image - own)[nearest]).view(-1, *self.problem.shape)

    def _from_negatives(self, points: Tensor) -> Tensor:
        """Return min_j f(z_j) + ||x - z_j||, smooth at the positives."""
        return self._nearest(points, self.problem.z, self.potential_z)

    def _from_positives(self, points: Tensor) -> Tensor:
        """Return max_i f(x_i) - ||x - x_i||, smooth at the negatives."""
        return -self._nearest(points, self.problem.x, -self.potential_x)

    def _nearest(self, points: Tensor, samples: Tensor, heights: Tensor) -> Tensor:
        """Return min_k heights_k + ||x - s_k||: the k without a gradient, its distance with one."""
        with torch.no_grad():
            found = [
                (distances(part, samples, self.problem.norm) + heights).argmin(dim=1)
                for part in self._chunks(points, samples)
            ]
            nearest = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
        return heights[nearest] + pair_distances(points, samples[nearest], self.problem.norm)

    def _chunks(self, points: Tensor, samples: Tensor) -> tuple[Tensor, ...]:
        return points.split(max(1, _CHUNK // len(samples))) if len(points) else ()

    def _flat(self, points: Tensor) -> Tensor:
        points = torch.as_tensor(points)
        if tuple(points.shape[1:]) != self.problem.shape or points.ndim != len(self.problem.shape) + 1:
            raise InputError(
                f"points: expected a batch of the samples' shape {self.problem.shape}, got {tuple(points.shape)}"
            )
        return points.flatten(1).double().cpu()
