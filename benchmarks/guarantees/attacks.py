"""Searches for violations: the lowest lead in a ball, and pixels that climb into the top of a smoothed map."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.guarantees.exact import Plain
from otnn.batches import sample_norm, spread

STARTS, STEPS = 4, 15


def lowest_lead(
    plain: Plain,
    inputs: Tensor,
    radius: Tensor,
    own: Tensor,
    rival: Tensor | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """The lowest lead (n,) found in the ball of each sample, by projected gradient descent from several starts.

    Args:
        plain: the network.
        inputs: (n, ...).
        radius: (n,).
        own: (n,) the class whose lead is attacked.
        rival: (n,) the class it leads over; by default the best of the others.
        support: (n, ...) bool, the values that may change.
    """
    n = len(inputs)
    support = torch.ones_like(inputs, dtype=torch.bool) if support is None else support.expand_as(inputs)
    points, radii = inputs.repeat(STARTS, *[1] * (inputs.ndim - 1)), radius.repeat(STARTS)
    own, support = own.repeat(STARTS), support.repeat(STARTS, *[1] * (inputs.ndim - 1))
    rival = None if rival is None else rival.repeat(STARTS)
    _, first = plain.gradient(points, own, rival)
    noise = torch.randn_like(points)
    noise[:n] = 0  # the first start goes straight down the gradient
    change = spread(radii, points) * _unit(
        (noise - _unit(first) * (sample_norm(noise) == 0).view(-1, 1, 1, 1)) * support
    )
    lowest = torch.full((len(points),), torch.inf, dtype=torch.float64)
    for step in range(STEPS):
        lead, gradient = plain.gradient(points + change, own, rival)
        lowest = torch.minimum(lowest, lead)
        change = change - spread(radii, points) * (2 * 0.7**step) * _unit(gradient * support)
        change = change * spread((radii / sample_norm(change).clamp(min=1e-300)).clamp(max=1), change)
    lead, _ = plain.gradient(points + change, own, rival)
    return torch.minimum(lowest, lead).view(STARTS, n).amin(dim=0)


def climb(
    gradient: Callable[[Tensor], Tensor], point: Tensor, radius: float, candidates: Tensor, k: int, scores: Callable
) -> float:
    """The most, over points in a ball, by which a pixel outside the candidates exceeds the k-th highest inside them.

    Above 0 it is in the top k, a violation. Projected gradient ascent from several starts.

    Args:
        gradient: of points (m, ...) to exact smoothed gradients.
        point: (1, ...).
        radius: of the ball.
        candidates: (pixels,) bool.
        k: of the top.
        scores: of maps to pixel scores.
    """
    points = point.repeat(STARTS, *[1] * (point.ndim - 1))
    change = radius * _unit(torch.randn_like(points))
    change[0] = 0
    best = -torch.inf
    for step in range(STEPS):
        leaf = (points + change).requires_grad_()
        found = scores(gradient(leaf))
        inside = found.masked_fill(~candidates, -torch.inf).topk(k, dim=1).values[:, -1]
        excess = found.masked_fill(candidates, -torch.inf).amax(dim=1) - inside
        best = max(best, float(excess.detach().max()))
        (up,) = torch.autograd.grad(excess.sum(), leaf)
        change = change + radius * 2 * 0.7**step * _unit(up)
        change = change * spread((radius / sample_norm(change).clamp(min=1e-300)).clamp(max=1), change)
    return best


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (m, ...) with norm 1; zeros stay."""
    norm = sample_norm(vectors)
    return vectors / spread(torch.where(norm > 0, norm, 1.0), vectors)
