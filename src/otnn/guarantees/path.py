"""How much the map turns along the counterfactual path, and what Integrated Gradients adds to it (theory 5.2, 5.3).

Both are read off the slack s = T - (g(x) - g(x - T u)): what the potential falls short of the full slope over the
length T along the unit gradient u. Two forward passes tell it.

Proof. For almost every x, g is differentiable along almost all of the path, and there the mean of <grad g, u> is
(T - s) / T. As ||grad g|| <= 1, the mean of ||grad g - u||^2 <= 2 - 2 <grad g, u> is at most 2 s / T. Integrated
Gradients on the path is T u * mean(grad g), so that its L1 distance from T u * u is at most
T ||u|| ||mean(grad g) - u|| <= T sqrt(2 s / T) = sqrt(2 s T).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from otnn.batches import sample_norm, spread
from otnn.errors import InputError
from otnn.guarantees.potential import Potential
from otnn.guarantees.result import Guarantee, first_reasons

STABILITY_DOMAIN = (
    "In the mean over the straight path of this length against the gradient, not at each of its points; the path may "
    "leave [0, 1]; for almost every image, as the gradient has kinks."
)
AGREEMENT_DOMAIN = (
    "For the exact integral over the straight path of this length against the gradient, with its end as the baseline; "
    "the path may leave [0, 1]; for almost every image, as the gradient has kinks."
)


@dataclass(frozen=True)
class Walk:
    """A straight way of each sample against its gradient.

    Attributes:
        potential: of the samples.
        length: (n,) T; NaN where there is no way.
        end: (n, ...) x - T u.
        fallen: (n,) float64, g(x) - g(x - T u) as computed.
        slack: (n,) float64, a bound of s, the rounding of both values of g and of the path included.
        reason: per sample, why there is no way; empty where there is one.
    """

    potential: Potential
    length: Tensor
    end: Tensor
    fallen: Tensor
    slack: Tensor
    reason: tuple[str, ...]

    @property
    def usable(self) -> Tensor:
        """(n,) bool, whether there is a way."""
        return torch.isfinite(self.length)


def walk(potential: Potential, length: Tensor) -> Walk:
    """Go the lengths T = `length` (n,) against the gradient and find the slack; there is no way of length NaN or <= 0.

    Raises:
        InputError: another number of lengths.
    """
    if length.shape != potential.value.shape:
        raise InputError(f"length: expected one per sample, ({len(potential.value)},), got {tuple(length.shape)}")
    length = length.detach().to(potential.inputs)
    usable = torch.isfinite(length) & (length > 0) & potential.known & ~potential.still
    index = usable.nonzero().squeeze(1)
    end = torch.full_like(potential.inputs, torch.nan)
    fallen, slack = torch.full_like(length, torch.nan), torch.full_like(length, torch.nan)
    if len(index):
        start, far = potential.inputs[index], length[index]
        end[index] = start - spread(far, start) * potential.direction[index]
        value, error = potential.bounded(end[index], index)
        # the end as stored is off the ray by the rounding of the direction, the product and the difference
        slip = (start[0].numel() + 16) * 2.0**-52 * (sample_norm(start) + far)
        fallen[index] = potential.value[index] - value
        slack[index] = (far - fallen[index]).clamp(min=0) + potential.error[index] + error + slip
    return Walk(
        potential,
        torch.where(usable, length, torch.nan),
        end,
        fallen,
        slack,
        first_reasons(
            potential.reason,
            (potential.still, "the gradient is zero: no path"),
            (length <= 0, "a path has a length above 0"),
            (~usable, "no boundary was found along the gradient: no path"),
        ),
    )


def path_stability(way: Walk) -> Guarantee:
    """Bound the mean over the path of ||grad g - u||^2 by 2 s / T.

    A gradient turned by more than 60 degrees from u, or shorter than half of it in that direction, has
    <grad g, u> < 1/2, and others have at most 1: so over a share of at least 1 - 2 s / T of the path the map has at
    least half the slope and keeps within 60 degrees. Vacuous where 2 s / T >= 1: a map of zeros, or one turned by 60
    degrees everywhere, would meet that.

    Returns:
        2 s / T in [0, 4]. `details`: "steady" (n,), the share of the path within 60 degrees at least; "length",
        "slack" (n,); "outside" (n,), the share of the values of the path's end that leave [0, 1].

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(32,)).eval()
        >>> potential = Potential(model, torch.rand(3, 1, 8, 8), bound(model.body))
        >>> found = path_stability(walk(potential, potential.value))
        >>> bool((found.bound <= 4).all())
        True
    """
    turn = 2 * way.slack / way.length * (1 + 2.0**-50)
    return Guarantee(
        name="path_stability",
        bound=turn,
        unit="mean square of the turn, (L2)^2",
        vacuous=~(turn < 1),
        reason=first_reasons(way.reason, (turn >= 1, "a map of zeros along the path would meet the bound")),
        domain=STABILITY_DOMAIN,
        details={
            "steady": (1 - turn).clamp(min=0),
            "length": way.length,
            "slack": way.slack,
            "outside": _outside(way),
        },
    )


def gradient_agreement(way: Walk, *, steps: int = 16) -> Guarantee:
    """Bound the L1 distance of Integrated Gradients, from the end of the path, and T u * u by sqrt(2 s T).

    T u * u is the gradient map times the way, with sum T. The measured distance is that of a midpoint sum. By
    completeness the exact map has the sum g(x) - g(x - T u); where the midpoint sum is c off that, its distance is at
    most sqrt(2 (s + c) T), by the proof above with the mean over its points. Vacuous where the bound is T or more, that
    is where 2 s / T >= 1: a map of zeros would meet it.

    Args:
        way: of `walk`.
        steps: of the midpoint sum.

    Returns:
        The bound in the L1 norm of attributions, in units of g. `details`: "measured" (n,), the distance of the sum;
        "completeness" (n,), how far the sum is from completeness; "relative" (n,), the bound over T; "length", "slack"
        (n,); "attribution" (n, ...), the map of the sum; "turn" (n,), the mean of ||grad g - u||^2 over its points.

    Raises:
        InputError: no step.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(32,)).eval()
        >>> potential = Potential(model, torch.rand(3, 1, 8, 8), bound(model.body))
        >>> way = walk(potential, potential.value)
        >>> found = gradient_agreement(way)
        >>> limit = (2 * (way.slack + found.details["completeness"]) * way.length).sqrt()
        >>> bool((found.details["measured"] <= limit).all())
        True
    """
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    limit = (2 * way.slack * way.length).sqrt() * (1 + 2.0**-50)
    attribution, turn = _integrated(way, steps)
    direction = way.potential.direction
    map_ = spread(way.length, direction) * direction.square()
    return Guarantee(
        name="gradient_agreement",
        bound=limit,
        unit="L1 norm of the difference of the maps",
        vacuous=~(limit < way.length),
        reason=first_reasons(way.reason, (limit >= way.length, "a map of zeros would meet the bound")),
        domain=AGREEMENT_DOMAIN,
        details={
            "measured": (attribution - map_).flatten(1).abs().sum(dim=1),
            "completeness": (attribution.flatten(1).sum(dim=1) - way.fallen).abs(),
            "relative": limit / way.length,
            "length": way.length,
            "slack": way.slack,
            "attribution": attribution,
            "turn": turn,
        },
    )


def _integrated(way: Walk, steps: int) -> tuple[Tensor, Tensor]:
    """Integrated Gradients (n, ...) from the end of the path to the sample, by the midpoint sum; NaN without a path.

    And the mean (n,) of ||grad g - u||^2 over its points.
    """
    result = torch.full_like(way.potential.inputs, torch.nan)
    turn = torch.full_like(way.length, torch.nan)
    index = way.usable.nonzero().squeeze(1)
    if not len(index):
        return result, turn
    start, step = way.potential.inputs[index], way.end[index] - way.potential.inputs[index]
    total, turned = torch.zeros_like(start), torch.zeros_like(way.length[index])
    for k in range(steps):
        gradient = way.potential.gradient_at(start + step * ((k + 0.5) / steps), index)
        total += gradient
        turned += sample_norm(gradient - way.potential.direction[index]).square()
    result[index], turn[index] = -step * total / steps, turned / steps
    return result, turn


def _outside(way: Walk) -> Tensor:
    outside = way.potential.share_outside(way.end.nan_to_num())
    return torch.where(way.usable, outside, torch.nan)
