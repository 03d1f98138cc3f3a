"""The walk down a pair potential: straight, or turning with the gradient; free, or kept in the pixel box."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from otnn.batches import sample_norm, spread
from otnn.explain.pairs import Pairs
from otnn.explain.rays import first_crossing, refine

# A search without a certified start begins at this share of the first-order estimate of the distance
_SHORT = 1 / 8
# Against the walls of the box a path may be asked to go so many diameters of it
_PUSH = 64.0


@dataclass(frozen=True)
class Walk:
    """Segments of a path, one after the other: x_k - t u_k, in the box clamped to [0, 1].

    Attributes:
        origin: (segments, n, ...) where each begins.
        direction: (segments, n, ...) the unit gradient that it goes against; 0 where a sample does not take it.
        length: (segments, n) the t at which it ends.
        box: whether it is clamped.
    """

    origin: Tensor
    direction: Tensor
    length: Tensor
    box: bool

    @property
    def total(self) -> Tensor:
        """The length (n,) of all segments together."""
        return self.length.sum(dim=0)

    def point(self, length: Tensor, index: Tensor, *, clamped: bool = True) -> Tensor:
        """The images (m, ...) at the lengths (m,) of the paths of the samples `index` (m,)."""
        ends = self.length[:, index].cumsum(dim=0)
        segment = (length > ends[:-1]).sum(dim=0)
        rest = length - torch.where(segment > 0, ends.gather(0, (segment - 1).clamp(min=0).unsqueeze(0))[0], 0.0)
        origin, direction = self.origin[segment, index], self.direction[segment, index]
        return _move(origin, direction, rest, self.box and clamped)


def join(first: Walk, second: Walk) -> Walk:
    """One walk after the other."""
    return Walk(
        torch.cat([first.origin, second.origin]),
        torch.cat([first.direction, second.direction]),
        torch.cat([first.length, second.length]),
        first.box,
    )


@dataclass(frozen=True)
class Descent:
    """A walk down to a level of the potential.

    Attributes:
        walk: to where the level was passed; elsewhere to twice the first-order estimate, or to where it got stuck.
        end: (n, ...) the images where it ends.
        found: (n,) whether the level was passed.
        stuck: (n,) whether the gradient was zero at some place.
        rested: (n,) whether all values came to rest at the walls of the box.
        slope: (n,) the norm of the gradient at the start.
        gradient: (n, ...) at the start.
    """

    walk: Walk
    end: Tensor
    found: Tensor
    stuck: Tensor
    rested: Tensor
    slope: Tensor
    gradient: Tensor


def descend(
    pairs: Pairs,
    start: Tensor,
    movable: Tensor,
    level: Tensor,
    *,
    iterations: int,
    box: bool,
    search: bool,
) -> Descent:
    """Step down the potential to a level, with a new gradient before each step.

    A step has the length (g - level) / ||grad g|| at which a linear potential would be there; where that goes past the
    level, the crossing is refined. The last step may search further along its ray.

    Args:
        pairs: the potential.
        start: (n, ...) images.
        movable: (n,) which of them walk.
        level: (n,) the value to go below.
        iterations: gradients, at most.
        box: clamp to [0, 1].
        search: whether the last step searches as far as the diameter of the box.
    """
    diameter = math.sqrt(start[0].numel())
    place, open_ = start.clone(), movable.clone()
    none = torch.zeros_like(movable)
    found, stuck, rested = none.clone(), none.clone(), none.clone()
    total, slope, first = torch.zeros_like(level), torch.zeros_like(level), torch.zeros_like(start)
    origins, directions, lengths = [], [], []
    for k in range(iterations):
        index = open_.nonzero().squeeze(1)
        if k and not len(index):
            break
        gradient, value = torch.zeros_like(start), torch.zeros_like(level)
        if len(index):
            value[index], gradient[index] = pairs.slopes(place[index], index)
        norm = sample_norm(gradient)
        usable = open_ & torch.isfinite(norm) & (norm > 0) & torch.isfinite(value)
        stuck |= open_ & ~usable
        if not k:
            slope, first = norm, gradient
        unit = gradient / spread(torch.where(usable, norm, 1.0), gradient)
        unit = torch.where(spread(usable, unit), unit, 0.0)
        estimate = torch.where(usable, (value - level) / torch.where(usable, norm, 1.0), torch.nan)
        reach = (_rest(place, unit).clamp(max=_PUSH * diameter) if box else torch.full_like(level, diameter)) - (
            0.0 if box else total
        )
        here = Walk(place.unsqueeze(0), unit.unsqueeze(0), estimate.unsqueeze(0), box)
        potential_at = pairs.potential_at(here.point, level)
        if search and k == iterations - 1:
            certified = (value - level) if pairs.bounded else torch.zeros_like(level)
            begin = torch.maximum(certified, _SHORT * estimate).clamp(min=torch.finfo(level.dtype).eps * diameter)
            end = first_crossing(potential_at, torch.where(usable, begin, torch.nan), reach)
            crossed = usable & torch.isfinite(end)
            rested = usable & ~crossed & (reach < _PUSH * diameter) & box
            end = torch.where(crossed, end, torch.minimum(2 * estimate, reach))
        else:
            # a trace too long, so that rounding leaves nothing before the level
            end = torch.minimum(estimate * (1 + math.sqrt(torch.finfo(level.dtype).eps)), reach)
            rows = usable.nonzero().squeeze(1)
            crossed = torch.zeros_like(usable)
            if len(rows):
                crossed[rows] = potential_at(end[rows], rows) < 0
            end = refine(potential_at, torch.zeros_like(end), torch.where(crossed, end, torch.nan)).where(crossed, end)
        end = torch.where(usable, end.clamp(min=0), 0.0)
        origins.append(place)
        directions.append(unit)
        lengths.append(end)
        place, total = _move(place, unit, end, box), total + end
        found |= crossed
        open_ = usable & ~crossed
    walk = Walk(torch.stack(origins), torch.stack(directions), torch.stack(lengths), box)
    return Descent(walk, place, found, stuck, rested, slope, first)


def _move(origin: Tensor, direction: Tensor, length: Tensor, box: bool) -> Tensor:
    moved = origin - spread(length, origin) * direction
    return moved.clamp(0, 1) if box else moved


def _rest(place: Tensor, unit: Tensor) -> Tensor:
    """The length (n,) at which all values that move have come to a wall of the box."""
    room = torch.where(unit > 0, place, 1 - place) / unit.abs()
    return torch.where(unit != 0, room, 0.0).flatten(1).amax(dim=1)
