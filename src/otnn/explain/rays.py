"""Where a function of the length moved changes its sign, along one ray per sample, for a whole batch at once."""

from collections.abc import Callable

import torch
from torch import Tensor

# The potential (m,) of the samples `index` (m,) after each has moved by its own length (m,)
PotentialAt = Callable[[Tensor, Tensor], Tensor]
# Each length tried is at most so many times the one before
GROWTH = 1.25
# A search ends at this share of the length, or where the numbers of the dtype end
_RESOLUTION = 2.0**-40
_STEPS = 100


def first_crossing(potential_at: PotentialAt, start: Tensor, reach: Tensor) -> Tensor:
    """The first length tried at which the potential is negative, refined to the crossing before it.

    Lengths are tried from `start` on, each 1.25 times the one before, up to `reach` itself; only samples whose sign has
    not changed are evaluated. A start below which the sign cannot change (for a 1-Lipschitz potential, its own value)
    leaves nothing unseen before it. Between two lengths tried, a crossing and its return may be overlooked, so that
    this is *a* crossing, though not surely the first.

    Args:
        potential_at: maps lengths (m,) and the samples (m,) that move by them to potentials (m,), positive at length 0.
            A value that is NaN counts as no change of sign.
        start: (n,) the first length to try, > 0; NaN leaves a sample out.
        reach: (n,) the longest one.

    Returns:
        (n,) lengths, on the negative side of the crossing by at most 1e-12 of the length, or by the resolution of the
        dtype; NaN where the sign did not change.

    Example:
        >>> goal = torch.tensor([0.5, 3.0, 80.0], dtype=torch.float64)
        >>> first_crossing(lambda t, k: goal[k] - t, torch.full_like(goal, 0.1), torch.full_like(goal, 10.0))
        tensor([0.5000, 3.0000,    nan], dtype=torch.float64)
    """
    low, high = torch.zeros_like(start), torch.minimum(start, reach)
    result, values = torch.full_like(start, torch.nan), start.new_full((2, len(start)), torch.nan)
    open_ = (high > 0).nonzero().squeeze(1)
    while len(open_):
        value = potential_at(high[open_], open_)
        crossed = value < 0
        result[open_[crossed]], values[1, open_[crossed]] = high[open_[crossed]], value[crossed]
        goes_on = ~crossed & (high[open_] < reach[open_])
        open_, value = open_[goes_on], value[goes_on]
        low[open_], values[0, open_] = high[open_], value
        high[open_] = torch.minimum(GROWTH * high[open_], reach[open_])
    return refine(potential_at, low, result, values=values)


def refine(
    potential_at: PotentialAt,
    low: Tensor,
    high: Tensor,
    *,
    values: Tensor | None = None,
    resolution: float = _RESOLUTION,
    steps: int = _STEPS,
) -> Tensor:
    """Shrink brackets of a change of sign until their ends meet, and return the negative ends.

    Secant steps find the crossing of a piecewise linear potential at once; where one does not halve the bracket,
    bisection takes the next.

    Args:
        potential_at: as for `first_crossing`; negative at `high`, not negative at `low`.
        low: (n,) lengths.
        high: (n,) lengths >= low; NaN stays NaN.
        values: (2, n) potentials at `low` and at `high`, which are then not evaluated; NaN where they are not known.
        resolution: share of the length at which a bracket counts as closed; at least that of the dtype.
        steps: lengths that are tried at most in each bracket; it may stay wider then.

    Returns:
        (n,) lengths in (low, high], negative ones as far as they were evaluated.

    Example:
        >>> refine(lambda t, k: 2 - t * t, torch.zeros(1).double(), torch.full((1,), 2.0).double())
        tensor([1.4142], dtype=torch.float64)
    """
    low, high = low.clone(), high.clone()
    resolution = max(resolution, 2 * torch.finfo(high.dtype).eps)
    values = low.new_full((2, len(low)), torch.nan) if values is None else values.clone()
    wide = high - low > resolution * high
    for value, end in zip(values, (low, high), strict=True):
        unknown = (wide & value.isnan()).nonzero().squeeze(1)
        if len(unknown):
            value[unknown] = potential_at(end[unknown], unknown)
    halve = torch.zeros_like(low, dtype=torch.bool)
    for _ in range(steps):
        open_ = (high - low > resolution * high).nonzero().squeeze(1)
        if not len(open_):
            break
        a, b, (above, below) = low[open_], high[open_], values[:, open_]
        # a secant that ends at its bracket steps over the crossing next, and rounding must not decide which end it is
        edge = resolution * b / 2
        secant = torch.clamp(a + (b - a) * above / (above - below) + edge / 2, a + edge, b - edge)
        bisected = halve[open_] | ~torch.isfinite(secant)
        length = torch.where(bisected, (a + b) / 2, secant)
        value = potential_at(length, open_)
        crossed = value < 0
        high[open_[crossed]], values[1, open_[crossed]] = length[crossed], value[crossed]
        low[open_[~crossed]], values[0, open_[~crossed]] = length[~crossed], value[~crossed]
        halve[open_] = ~bisected & (high[open_] - low[open_] > (b - a) / 2)
    return high
