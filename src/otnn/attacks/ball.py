"""The ball around each input, cut by the pixel box, that an attack stays in; and the direction that raises most."""

import torch
from torch import Tensor

from otnn.batches import sample_norm, spread

# Covers the rounding of a norm over some millions of values in float64
_TRACE = 1e-12
# Values that are projected at once in float64
_BLOCK = 2**21
# Turns that solve for s: each meets a wall of the box at least, and most meet all; to stop early is to stay inside
_TURNS = 64


def ascent(gradient: Tensor, norm: str) -> Tensor:
    """The direction of length 1 that a linear function grows most along: g / ||g||_2, or sign(g) for "linf".

    Args:
        gradient: (n, ...).
        norm: "l2" or "linf".

    Returns:
        (n, ...); 0 where the gradient is 0 or not finite.

    Example:
        >>> ascent(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), "l2"), ascent(torch.tensor([[3.0, -4.0]]), "linf")
        (tensor([[ 0.6000, -0.8000],
                [ 0.0000,  0.0000]]), tensor([[ 1., -1.]]))
    """
    largest = gradient.flatten(1).abs().amax(dim=1)
    usable = (largest > 0) & torch.isfinite(largest)
    if norm == "linf":
        return torch.where(spread(usable, gradient), gradient.sign(), 0.0)
    scaled = torch.where(spread(usable, gradient), gradient / spread(largest, gradient), 0.0)  # no square vanishes
    return scaled / spread(torch.where(usable, sample_norm(scaled), 1.0), scaled)


def project(inputs: Tensor, points: Tensor, radii: Tensor, norm: str = "l2", *, box: bool = False) -> Tensor:
    """The nearest points (L2) of balls around the inputs, cut by the box [0, 1], rounded towards the inputs.

    In L2 and the box that point is clamp(x + s (y - x)) with the s in [0, 1] that puts it on the sphere. As the change
    of every value is rounded towards 0, the distance in float64 is at most the radius, without a tolerance. What is
    inside already is not changed.

    Args:
        inputs: (n, ...) the centres; in the box if `box`.
        points: (n, ...) finite.
        radii: (n,) float64, >= 0.
        norm: "l2" or "linf".
        box: whether to stay in [0, 1].

    Example:
        >>> x, y = torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 1.4]])
        >>> project(x, y, torch.tensor([0.5]).double())
        tensor([[0.8536, 1.2536]])
        >>> project(x, y, torch.tensor([0.5]).double(), box=True)
        tensor([[0.9899, 1.0000]])
    """
    size = max(1, _BLOCK // max(1, inputs[0].numel()))
    parts = zip(inputs.split(size), points.split(size), radii.split(size), strict=True)
    return torch.cat([_project(*part, norm, box) for part in parts])


def _project(inputs: Tensor, points: Tensor, radii: Tensor, norm: str, box: bool) -> Tensor:
    origin, nearest = inputs.double(), points.clamp(0, 1) if box else points
    change, kept = points.double() - origin, nearest.double() - origin
    if norm == "linf":
        outside = kept.flatten(1).abs().amax(dim=1) > radii
        limit = spread(radii, kept)
        moved = torch.minimum(torch.maximum(kept, -limit), limit)
    else:
        outside = sample_norm(kept) > radii
        room = torch.where(change > 0, 1 - origin, origin) if box else torch.full_like(change, torch.inf)
        length = torch.minimum(spread(_share(change.abs(), room, radii), change) * change.abs(), room)
        moved = torch.where(change > 0, length, -length)
    rounded = (origin + moved).to(inputs.dtype)
    too_far = (rounded.double() - origin).abs() > moved.abs()
    rounded = torch.where(too_far, torch.nextafter(rounded, inputs), rounded)
    return torch.where(spread(outside, points), rounded.clamp(0, 1) if box else rounded, nearest)


def _share(size: Tensor, room: Tensor, radii: Tensor) -> Tensor:
    """The s (n,) at which min(s size, room) has the norm of the radius, from below; past 1 it means nothing."""
    held = torch.zeros_like(size, dtype=torch.bool)
    radii = radii * (1 - _TRACE)
    for _ in range(_TURNS):
        rest = (radii.square() - sample_norm(room.masked_fill(~held, 0)).square()).clamp(min=0).sqrt()
        share = rest / sample_norm(size.masked_fill(held, 0)).clamp(min=torch.finfo(size.dtype).tiny)
        share = share.clamp(max=torch.finfo(size.dtype).max)
        met = spread(share, size) * size >= room
        if not bool((met & ~held).any()):
            break
        held |= met
    return share
