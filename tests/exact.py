"""Exact arithmetic: a network of simple layers evaluated in fractions, and functions to compare with."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from otnn.nn import Abs, Centering, GroupSort, Householder, MaxMin, OrthoConv2d
from tests.operators import convolution_matrix

Vector = list[Fraction]
Shape = tuple[int, ...]


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.inner(inputs)


class Beside(nn.Module):
    """The input and inner(x) side by side, along dimension 1."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs, self.inner(inputs)], 1)


class Scaled(nn.Module):
    """A number times x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


def fractions(tensor: Tensor) -> Vector:
    return [Fraction(value) for value in tensor.detach().double().flatten().tolist()]


def product(matrix: Tensor, values: Sequence[Fraction]) -> Vector:
    rows = [fractions(row) for row in matrix]
    return [sum((a * b for a, b in zip(row, values, strict=True) if a), Fraction(0)) for row in rows]


def sine(angle: Fraction, cosine: bool = False) -> Fraction:
    """The series of the sine up to the 60th power: for angles up to 2 the rest is below 1e-60."""
    return sum(((-1) ** (k // 2) * angle**k / math.factorial(k) for k in range(0 if cosine else 1, 61, 2)), Fraction(0))


def exactly(layer: nn.Module, values: Vector, shape: Shape) -> tuple[Vector, Shape]:
    """What a layer gives for one sample (its numbers in a row, and their shape), without any rounding."""
    if isinstance(layer, nn.Sequential):
        for child in layer:
            values, shape = exactly(child, values, shape)
        return values, shape
    if isinstance(layer, (Residual, Beside)):
        inner, after = exactly(layer.inner, values, shape)
        if isinstance(layer, Residual):
            return [a + b for a, b in zip(values, inner, strict=True)], shape
        return values + inner, (shape[0] + after[0], *shape[1:])
    if isinstance(layer, nn.Flatten):
        return values, (len(values),)
    if isinstance(layer, MaxMin):
        pairs = list(zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True))
        return [max(pair) for pair in pairs] + [min(pair) for pair in pairs], shape
    if isinstance(layer, GroupSort):
        step = len(values) // layer.group_size
        groups = [sorted(values[j::step], reverse=True) for j in range(step)]
        return [value for place in zip(*groups, strict=True) for value in place], shape
    if isinstance(layer, Abs):
        return [abs(value) for value in values], shape
    if isinstance(layer, Householder):
        half = len(values) // 2
        directions = [(sine(angle / 2), -sine(angle / 2, cosine=True)) for angle in fractions(layer.angle)]
        triples = list(zip(directions, values[:half], values[half:], strict=True))
        behind = [min(u * a + v * b, Fraction(0)) for (u, v), a, b in triples]
        firsts = [a - 2 * d * u for ((u, _), a, _), d in zip(triples, behind, strict=True)]
        return firsts + [b - 2 * d * v for ((_, v), _, b), d in zip(triples, behind, strict=True)], shape
    if isinstance(layer, nn.ReLU):
        return [max(value, Fraction(0)) for value in values], shape
    if isinstance(layer, Scaled):
        return [Fraction(layer.factor) * value for value in values], shape
    if isinstance(layer, Centering):
        pixels = len(values) // shape[0]
        means = [mean for mean in fractions(layer.mean) for _ in range(pixels)]
        return [value - mean for value, mean in zip(values, means, strict=True)], shape
    if isinstance(layer, nn.Linear):
        return _add(product(layer.weight, values), layer.bias), (layer.out_features,)
    if isinstance(layer, nn.AvgPool2d):
        size = int(layer.kernel_size)
        kernel = torch.eye(shape[0])[:, :, None, None].expand(-1, -1, size, size)
        sums = product(convolution_matrix(kernel, shape[1:], int(layer.stride)), values)
        return [value / size**2 for value in sums], _after(layer, shape)
    assert isinstance(layer, (nn.Conv2d, OrthoConv2d)), layer
    stride, padding = (int(v if isinstance(v, int) else v[0]) for v in (layer.stride, layer.padding))
    out = product(convolution_matrix(layer.weight, shape[1:], stride, padding), values)
    return _add(out, layer.bias), _after(layer, shape)


def distance(first: Sequence[Fraction], second: Sequence[Fraction]) -> Fraction:
    """The square of the Euclidean distance."""
    return sum(((a - b) ** 2 for a, b in zip(first, second, strict=True)), Fraction(0))


def covers(bound: float, square: Fraction) -> bool:
    """Whether a bound is at least the square root of a fraction, without rounding."""
    return bound == math.inf or Fraction(bound) ** 2 >= square


def _add(values: Vector, bias: Tensor | None) -> Vector:
    if bias is None:
        return values
    shifts = fractions(bias)
    repeat = len(values) // len(shifts)
    return [value + shifts[index // repeat] for index, value in enumerate(values)]


def _after(layer: nn.Module, shape: Shape) -> Shape:
    out = layer(torch.zeros(1, *shape, dtype=next((p.dtype for p in layer.parameters()), torch.float32)))
    return tuple(out.shape[1:])
