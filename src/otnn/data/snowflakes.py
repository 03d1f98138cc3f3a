"""Two concentric Koch snowflakes: the toy problem in the plane on which optimal transport can be seen."""

import math

import torch
from torch import Tensor

from otnn.data.splits import Split
from otnn.errors import InputError


def koch_snowflake(order: int, radius: float, count: int) -> Tensor:
    """Points on a Koch snowflake around the origin, evenly spaced along its curve.

    Args:
        order: how often every side is broken: 3 * 4^order sides, in 0..8.
        radius: of the circle through the corners of the triangle that it grows from, > 0.
        count: points, >= 1; the first is the corner on top.

    Returns:
        (count, 2) float64.

    Raises:
        InputError: numbers that make no snowflake.

    Example:
        >>> triangle = koch_snowflake(0, 1.0, 3)
        >>> bool(torch.allclose(triangle.norm(dim=1), torch.ones(3).double()))
        True
    """
    if not 0 <= order <= 8:
        raise InputError(f"order: expected 0 to 8, got {order}")
    if not 0 < radius < math.inf:
        raise InputError(f"radius: expected a finite number > 0, got {radius}")
    if count < 1:
        raise InputError(f"count: expected at least one point, got {count}")
    # Corners as complex numbers, clockwise, so that the peaks point outwards.
    top = torch.tensor(math.pi / 2, dtype=torch.float64)
    turns = -2 * math.pi / 3 * torch.arange(3, dtype=torch.float64)
    corners = radius * torch.exp(1j * (top + turns))
    peak = torch.exp(1j * torch.tensor(math.pi / 3, dtype=torch.float64))
    for _ in range(order):
        side = corners.roll(-1) - corners
        third = corners + side / 3
        corners = torch.stack([corners, third, third + peak * side / 3, corners + 2 * side / 3], dim=1).flatten()
    # all sides are equally long: a place on the curve is a side and a share of it
    place = torch.arange(count, dtype=torch.float64) * len(corners) / count
    side = place.floor().long()
    start, end = corners[side], corners[(side + 1) % len(corners)]
    points = start + (place - side) * (end - start)
    return torch.stack([points.real, points.imag], dim=1)


def snowflakes(count: int = 500, *, order: int = 4, inner: float = 1.0, outer: float = 1.6) -> Split:
    """Two concentric snowflakes, the inner one labelled 1 and the outer one 0.

    Args:
        count: points on each.
        order: of both.
        inner: radius of the inner one.
        outer: radius of the outer one.

    Returns:
        A split of (2 count, 2) float32 points. The curves of the defaults are .134 apart, 500 points on each .141.

    Example:
        >>> split = snowflakes()
        >>> f"{torch.cdist(split.images[:500], split.images[500:]).min():.3f}"
        '0.141'
    """
    points = torch.cat([koch_snowflake(order, radius, count) for radius in (inner, outer)])
    return Split(points.float(), torch.arange(2).flip(0).repeat_interleave(count))
