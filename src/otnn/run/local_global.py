"""The local counterfactual, along the gradient, against the global one, under the exact plan, of the same samples."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otnn.explain.rays import first_crossing
from otnn.report.partner_arrows import Panel
from otnn.transport import TransportSolution, plan_partner
from otnn.transport.costs import distances
from otnn.transport.measures import Function, summarise, values_and_gradients, values_of

# As for counterfactuals without a bound: the search begins at this share of the first-order estimate
_SHORT = 1 / 8
# and ends after so many diameters of the data
_REACH = 2.0
_FIGURES = (
    "cosine",
    "best_cosine",
    "landing",
    "landing_nearest",
    "length",
    "miss",
    "start",
    "nearest",
    "partners",
    "share",
)


@dataclass(frozen=True)
class LocalGlobal:
    """Both counterfactuals of every sample, the positives first; d is the distance of a sample to its partner.

    Attributes:
        samples: (n, values) float64.
        partner: (n, values) the sample of the other class to which the plan carries most of it.
        reflected: (n, values) x - 2 t* u, u the unit gradient towards the own class and t* the length at which the
            sign changes; NaN where the sign is wrong to begin with, or does not change.
        cosine: (n,) of the step -u with the direction to that partner; NaN likewise, where the sign is wrong.
        best_cosine: (n,) the same with the partner that suits best.
        landing: (n,) ||x - d u - partner|| / d, of the step that is as long as the way to the partner.
        landing_nearest: (n,) the distance of its end to the nearest sample of the other class, over d.
        length: (n,) 2 t* / d, 1 where the reflected point is as far away as the partner.
        miss: (n,) ||reflected - partner|| / d.
        start: (n,) ||x - nearest sample of the other class|| / d.
        nearest: (n,) ||reflected - nearest sample of the other class|| / d.
        partners: (n,) how many each sample has.
        share: (n,) of what a sample carries that goes to the partner.
    """

    samples: Tensor
    partner: Tensor
    reflected: Tensor
    cosine: Tensor
    best_cosine: Tensor
    landing: Tensor
    landing_nearest: Tensor
    length: Tensor
    miss: Tensor
    start: Tensor
    nearest: Tensor
    partners: Tensor
    share: Tensor

    def figures(self) -> dict[str, Any]:
        """Mean and quantiles (`otnn.transport.measures.QUANTILES`) of each figure over the samples that have it."""
        told: dict[str, Any] = {
            "samples": len(self.samples),
            "right": int(self.cosine.isfinite().sum()),
            "boundary": int(self.length.isfinite().sum()),
        }
        for name in _FIGURES:
            values: Tensor = getattr(self, name).double()
            known = values[values.isfinite()]
            found = summarise(known, torch.ones_like(known))
            told[name] = None if found is None else {"mean": found.mean, "quantiles": list(found.quantiles)}
        return told

    def panel(self, title: str, every: int) -> Panel:
        """What the picture shows of it: every so many samples of the plane that have a reflected point."""
        chosen = torch.arange(0, len(self.samples), every)
        chosen = chosen[self.length[chosen].isfinite()]
        return Panel(title, *(part[chosen].numpy() for part in (self.samples, self.reflected, self.partner)))


def local_global(function: Function, solution: TransportSolution) -> LocalGlobal:
    """Walk every sample of a problem along the gradient of a potential, and look up its partner under the plan.

    Args:
        function: maps (batch, ...) samples, float64, to (batch,) values, positive on the positives.
        solution: the optimum, of Euclidean cost; samples that lie in both classes are not expected.

    Example:
        >>> from otnn.transport import TransportProblem, solve
        >>> z = torch.stack([torch.zeros(5), torch.arange(5.0)], dim=1)
        >>> solution = solve(TransportProblem(z + torch.tensor([2.0, 0.0]), z, hinge_weight=10.0, margin=0.5))
        >>> straight = local_global(lambda points: points[:, 0] - 1, solution)
        >>> float(straight.miss.max()) < 1e-9, round(float(straight.cosine.min()), 9)
        (True, 1.0)
    """
    x, z = solution.problem.x.double(), solution.problem.z.double()
    samples = torch.cat([x, z])
    sign = torch.cat([torch.ones(len(x)), -torch.ones(len(z))]).double()
    most = max(int(torch.bincount(ends).max()) for ends in (solution.rows, solution.columns))
    found = plan_partner(solution, torch.arange(len(samples)), k=most)
    partner, far = samples[found.partner[:, 0]], found.distance[:, 0]

    shape = solution.problem.shape
    value, gradient = values_and_gradients(function, samples.view(-1, *shape))
    value, gradient = sign * value, sign.unsqueeze(1) * gradient.flatten(1)
    norm = gradient.norm(dim=1)
    usable = (value > 0) & (norm > 0)
    unit = torch.where(usable, 1.0, torch.nan).unsqueeze(1) * gradient / norm.clamp(min=1e-300).unsqueeze(1)

    def potential_at(length: Tensor, index: Tensor) -> Tensor:
        points = samples[index] - length.unsqueeze(1) * unit[index]
        return sign[index] * values_of(function, points.view(-1, *shape))

    diameter = float((samples - samples.mean(dim=0)).norm(dim=1).max()) * 2
    estimate = torch.where(usable, value / norm, torch.nan)
    boundary = first_crossing(potential_at, _SHORT * estimate, torch.full_like(estimate, _REACH * diameter))
    reflected = samples - 2 * boundary.unsqueeze(1) * unit
    landed = samples - far.unsqueeze(1) * unit
    ways = samples.unsqueeze(1) - samples[found.partner]  # the gaps of -1 have a distance of NaN
    cosines = (ways * unit.unsqueeze(1)).sum(dim=2) / found.distance
    best = torch.where(cosines.isnan(), -torch.inf, cosines).amax(dim=1)
    return LocalGlobal(
        samples=samples,
        partner=partner,
        reflected=reflected,
        cosine=cosines[:, 0],
        best_cosine=torch.where(usable, best, torch.nan),
        landing=(landed - partner).norm(dim=1) / far,
        landing_nearest=_nearest(landed, x, z) / far,
        length=2 * boundary / far,
        miss=(reflected - partner).norm(dim=1) / far,
        start=_nearest(samples, x, z) / far,
        nearest=_nearest(reflected, x, z) / far,
        partners=(found.partner >= 0).sum(dim=1),
        share=found.share[:, 0],
    )


def _nearest(points: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Distances (n,) of the points, those of the positives first, to the samples of the other class; NaN stays NaN."""
    known = points.isfinite().all(dim=1)
    filled = torch.where(known.unsqueeze(1), points, 0.0)
    found = torch.cat(
        [distances(filled[: len(x)], z).amin(dim=1), distances(filled[len(x) :], x).amin(dim=1)],
    )
    return torch.where(known, found, torch.nan)
