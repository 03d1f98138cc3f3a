"""How far is the boundary: at least g(x), at most as far as a point beyond it that was found (theory, section 5.1)."""

import math

import torch
from torch import Tensor

from otnn.batches import sample_norm, spread
from otnn.errors import InputError
from otnn.guarantees.potential import Potential
from otnn.guarantees.result import GREY, Guarantee, first_reasons

DOMAIN = (
    "The lower end holds for every real change of the whole image, inside [0, 1] or not, and the upper end for one "
    "change along the gradient, which is an image only where it stays in [0, 1]."
)
# Where a boundary is searched: the length grows by _GROW until the sign has changed; then at most _STEPS evaluations
_GROW, _STEPS = 1.5, 60
# How far beyond a boundary that was found in lower precision its other side is confirmed, relative to its distance
_BEYOND = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)


def bracket(potential: Potential, boundary: Tensor | None = None) -> Guarantee:
    """Bracket the distance to the nearest point where the decision of the potential becomes even.

    g is 1-Lipschitz, so no point nearer than g(x) has g <= 0. At the upper end g < 0 for certain, rounding included, so
    that g has a zero on the segment from x. The quotient of the ends is the tightness of certificate and explanation at
    once: it is 1 only where the gradient leads straight to the boundary at full slope.

    Vacuous where the lower end is below `GREY`: such a ball holds no other 8-bit image.

    Args:
        potential: of the samples.
        boundary: (n, ...) points on the boundary that are known, as of a counterfactual, NaN where there is none; by
            default they are searched along the gradient.

    Returns:
        The bound is the lower end, in the L2 norm of the input. `details`: "upper" (n,), infinite where none was found;
        "tightness" (n,), 0 likewise; "boundary" (n, ...), NaN likewise; "radius" (n,) of the prediction against all
        rivals; "outside" (n,), the share of the values of the boundary point that leave [0, 1].

    Raises:
        InputError: boundary points of another shape.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(32,)).eval()
        >>> found = bracket(Potential(model, torch.rand(3, 1, 8, 8), bound(model.body)))
        >>> bool((found.bound <= found.details["upper"]).all())
        True
    """
    lower = ((potential.value - potential.error) * (1 - 2.0**-50)).clamp(min=0)
    lower = torch.where(potential.known, lower, torch.nan)
    point = _searched(potential) if boundary is None else _confirmed(potential, boundary)
    upper = sample_norm(point - potential.inputs) * (1 + (potential.inputs[0].numel() + 8) * 2.0**-53)
    found = torch.isfinite(upper)
    upper = torch.where(found, upper, torch.inf)
    outside = torch.where(found, potential.share_outside(point.nan_to_num()), torch.nan)
    return Guarantee(
        name="boundary_bracket",
        bound=lower,
        unit="L2 norm of the change",
        vacuous=~(lower >= GREY),
        reason=first_reasons(
            potential.reason,
            (lower < GREY, "the lower end is below one grey level of one pixel"),
            (potential.still & ~found, "the gradient is zero, so that no upper end was searched"),
            (~found, "no boundary was found along the gradient within the diameter of the pixel box"),
        ),
        domain=DOMAIN,
        details={
            "upper": upper,
            "tightness": torch.where(found, lower / upper, 0.0),
            "boundary": torch.where(spread(found, point), point, torch.nan),
            "radius": potential.radius,
            "outside": outside,
        },
    )


def _searched(potential: Potential) -> Tensor:
    """Points (n, ...) along the gradient where g < 0 for certain, as near as rounding allows; NaN where none is found.

    By turns the middle of the interval and the zero of its chord are tried: g is piecewise linear along a ray, so that
    the chord hits the boundary once no kink is left.
    """
    index = (potential.known & ~potential.still).nonzero().squeeze(1)
    point = torch.full_like(potential.inputs, torch.nan)
    high = potential.value[index].clone()
    low, at_low, at_high = torch.zeros_like(high), high.clone(), torch.full_like(high, torch.nan)
    reach = math.sqrt(potential.inputs[0].numel())
    open_ = high <= reach
    while bool(open_.any()):
        value, error = _along(potential, index[open_], high[open_])
        beyond = value + error <= 0
        passed, still = _where(open_, beyond), _where(open_, ~beyond)
        at_high[passed] = value[beyond]
        low[still], at_low[still] = high[still], value[~beyond]
        high[still] *= _GROW
        open_ = still & (high <= reach)
    crossed = at_high <= 0
    index, low, high, at_low, at_high = (x[crossed] for x in (index, low, high, at_low, at_high))
    for step in range(_STEPS if len(index) else 0):
        # the zero of the chord, moved by some errors to the far side so that it can be told
        chord = low + (high - low) * (at_low + 4 * potential.error[index]) / (at_low - at_high)
        inside = (chord > low) & (chord < high)
        middle = torch.where(inside, chord, (low + high) / 2) if step % 2 else (low + high) / 2
        value, error = _along(potential, index, middle)
        beyond = value + error <= 0
        low, at_low = torch.where(beyond, low, middle), torch.where(beyond, at_low, value)
        high, at_high = torch.where(beyond, middle, high), torch.where(beyond, value, at_high)
        if bool(((at_high >= -16 * potential.error[index]) | (high - low <= 1e-13 * high)).all()):
            break
    point[index] = potential.inputs[index] - spread(high, point) * potential.direction[index]
    return point


def _along(potential: Potential, index: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    moved = potential.inputs[index] - spread(length, potential.inputs) * potential.direction[index]
    return potential.bounded(moved, index)


def _where(rows: Tensor, chosen: Tensor) -> Tensor:
    """The rows (m,) that are chosen among those that are set: (m,) bool."""
    result = torch.zeros_like(rows)
    result[rows] = chosen
    return result


def _confirmed(potential: Potential, boundary: Tensor) -> Tensor:
    """The given points, moved on by as little as makes g < 0 certain; NaN where that is not found."""
    if boundary.shape != potential.inputs.shape:
        raise InputError(
            f"boundary: expected one point per sample, shape {tuple(potential.inputs.shape)}, "
            f"got {tuple(boundary.shape)}"
        )
    away = boundary.detach().to(potential.inputs) - potential.inputs
    point = torch.full_like(away, torch.nan)
    left = (torch.isfinite(away).flatten(1).all(dim=1) & potential.known).nonzero().squeeze(1)
    for beyond in _BEYOND:
        moved = potential.inputs[left] + (1 + beyond) * away[left]
        value, error = potential.bounded(moved, left) if len(left) else (potential.value[:0], potential.error[:0])
        sure = value + error <= 0
        point[left[sure]] = moved[sure]
        left = left[~sure]
    return point
