"""What the guarantees speak of, found by other means: exact pieces of a path, exact regions, smoothed gradients.

Everything is computed from the plain network in float64, without the code under test.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from otnn.models import Classifier
from otnn.nn import MaxMin

# Breaks of a path are located to this share of its length
_WIDTH = 1e-11


class Plain:
    """A network in float64 whose kinks can be seen.

    Args:
        model: of layers without a kink, MaxMin and ReLU.
    """

    def __init__(self, model: Classifier) -> None:
        self.model = model.double()
        self.kinks: list[Tensor] = []
        self.handles = [
            layer.register_forward_hook(self._see)
            for layer in self.model.modules()
            if isinstance(layer, MaxMin | nn.ReLU)
        ]

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        values = inputs[0]
        if isinstance(layer, MaxMin):
            first, second = values.chunk(2, layer.dim)
            values = first - second
        self.kinks.append(values.flatten(1))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def scores(self, points: Tensor) -> Tensor:
        """As classes: one output z counts as -z/2 and z/2."""
        self.kinks = []
        scores = self.model(points)
        return torch.cat([-scores / 2, scores / 2], dim=1) if scores.shape[1] == 1 else scores

    def lead(self, points: Tensor, own: Tensor, rival: Tensor | None = None) -> Tensor:
        """z_own - z_rival, the best of the others without a rival."""
        scores = self.scores(points)
        mine = scores.gather(1, own.unsqueeze(1)).squeeze(1)
        if rival is not None:
            return mine - scores.gather(1, rival.unsqueeze(1)).squeeze(1)
        return mine - scores.scatter(1, own.unsqueeze(1), -torch.inf).amax(dim=1)

    def gradient(self, points: Tensor, own: Tensor, rival: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The lead (m,) and its gradient (m, ...)."""
        leaf = points.detach().requires_grad_()
        lead = self.lead(leaf, own, rival)
        return lead.detach(), torch.autograd.grad(lead.sum(), leaf)[0]

    def sides(self, points: Tensor) -> Tensor:
        """On which side of every kink the points are: (m, kinks) bool."""
        with torch.no_grad():
            self.scores(points)
        kinks = [values > 0 for values in self.kinks]
        return torch.cat(kinks, dim=1) if kinks else torch.zeros(len(points), 0, dtype=torch.bool)

    def region_radius(self, point: Tensor) -> float:
        """The exact distance from a point (1, ...) to the nearest kink: inside, every kink is an affine function."""

        def values(inputs: Tensor) -> Tensor:
            self.scores(inputs)
            return torch.cat(self.kinks, dim=1)[0]

        with torch.no_grad():
            self.scores(point)
        if not self.kinks:
            return math.inf
        jacobian = torch.autograd.functional.jacobian(values, point).flatten(1)
        size, slope = values(point).detach().abs(), torch.linalg.vector_norm(jacobian, dim=1)
        moves = slope > 1e-12
        return float((size[moves] / slope[moves]).min()) if bool(moves.any()) else math.inf


@dataclass(frozen=True)
class Pieces:
    """The affine pieces of a function along the segment from a point: their shares (p,) and their middles (p, ...)."""

    shares: Tensor
    middles: Tensor


def pieces(plain: Plain, start: Tensor, end: Tensor) -> Pieces:
    """Cut the segment between two points (1, ...) at every kink.

    If the sides of all kinks are the same at both ends of an interval, there is none inside: the first layer's kinks
    are affine along the segment, so theirs hold in between; then the second layer's are affine, and so on.
    """
    ends = torch.linspace(0, 1, 17, dtype=torch.float64)
    low, high = ends[:-1], ends[1:]
    done: list[Tensor] = []

    def at(share: Tensor) -> Tensor:
        return start + share.view(-1, *[1] * (start.ndim - 1)) * (end - start)

    while len(low):
        cut = (plain.sides(at(low)) != plain.sides(at(high))).any(dim=1) & (high - low > _WIDTH)
        done.append(torch.stack([low[~cut], high[~cut]]))
        middle = (low[cut] + high[cut]) / 2
        low, high = torch.cat([low[cut], middle]), torch.cat([middle, high[cut]])
    low, high = torch.cat(done, dim=1)
    return Pieces(high - low, at((low + high) / 2))


def exact_smoothing(model: Classifier, sigma: float, coefficients: Tensor) -> Callable[[Tensor], Tensor]:
    """The gradient of <coefficients, z * N(0, sigma^2)> of a network [Centering,] Flatten, affine, MaxMin, head.

    max(p, q) and min(p, q) are (p + q) / 2 +- |p - q| / 2, and smoothing turns the sign of p - q into
    erf((p - q) / (sigma ||w_p - w_q|| sqrt(2))).
    """
    layers = [layer.double() for layer in model.body]
    affine, head = layers[-2], model.head.double()
    row = (coefficients.double() @ head.weight.detach()).squeeze(0)
    weight, bias = affine.weight.detach(), affine.bias.detach()
    up, down = row.chunk(2)
    first, second = weight.chunk(2)
    length = torch.linalg.vector_norm(first - second, dim=1)

    def gradient(points: Tensor) -> Tensor:
        values = points
        for layer in layers[:-2]:
            values = layer(values)
        before = values @ weight.T + bias
        p, q = before.chunk(2, dim=1)
        signs = torch.erf((p - q) / (sigma * length * math.sqrt(2)))
        flat = ((up + down) / 2) @ (first + second) + (signs * (up - down) / 2) @ (first - second)
        return flat.view(points.shape)

    return gradient
