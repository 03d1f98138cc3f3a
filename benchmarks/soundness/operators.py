"""The true norms: operators by plain loops, apart from torch's, and what decides the closest cases exactly."""

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Matrix = NDArray[np.float64]
Source = Callable[[int, int], int | None]


def _reflected(index: int, size: int) -> int:
    return -index if index < 0 else 2 * (size - 1) - index if index >= size else index


# Which pixel a window finds at an index, by the mode of the padding.
SOURCES: dict[str, Source] = {
    "zeros": lambda index, size: index if 0 <= index < size else None,
    "circular": lambda index, size: index % size,
    "reflect": _reflected,
    "replicate": lambda index, size: min(max(index, 0), size - 1),
}


def convolution_operator(layer: nn.Conv1d | nn.Conv2d, size: tuple[int, int]) -> Matrix:
    """The matrix (outputs, inputs) of a convolution on images of one size, by loops over outputs and taps."""
    kernel = layer.weight.detach().double().numpy()
    kernel = kernel[:, :, None] if kernel.ndim == 3 else kernel
    stride, dilation = _two(layer.stride, 1), _two(layer.dilation, 1)
    taps = kernel.shape[2:]
    reach = [spread * (count - 1) for spread, count in zip(dilation, taps, strict=True)]
    if layer.padding == "same":
        pads = [(total // 2, total - total // 2) for total in reach]
    else:
        pads = [(pad, pad) for pad in _two(layer.padding, 0)]
    rows, columns = ((size[dim] + sum(pads[dim]) - reach[dim] - 1) // stride[dim] + 1 for dim in (0, 1))
    outputs, inputs = len(kernel) // layer.groups, kernel.shape[1]
    matrix = np.zeros((len(kernel), rows, columns, inputs * layer.groups, *size))
    source = SOURCES[layer.padding_mode]
    for row in range(rows):
        for column in range(columns):
            for up in range(taps[0]):
                for right in range(taps[1]):
                    y = source(row * stride[0] + up * dilation[0] - pads[0][0], size[0])
                    x = source(column * stride[1] + right * dilation[1] - pads[1][0], size[1])
                    if y is None or x is None:
                        continue
                    for group in range(layer.groups):
                        to = slice(group * outputs, (group + 1) * outputs)
                        of = slice(group * inputs, (group + 1) * inputs)
                        matrix[to, row, column, of, y, x] += kernel[to, :, up, right]
    return matrix.reshape(len(kernel) * rows * columns, -1)


def _two(values: Sequence[int], fill: int) -> tuple[int, int]:
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


@torch.no_grad()
def layer_operator(module: nn.Module, shape: Sequence[int]) -> Matrix:
    """The matrix (outputs, inputs) of an affine map, by applying it in float64 to a basis."""
    wide = copy.deepcopy(module).double()
    for layer in wide.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and layer.bias is not None:
            layer.bias.zero_()  # so that subtracting the image of 0 rounds less
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return np.ascontiguousarray((wide(basis) - wide(torch.zeros_like(basis))).flatten(1).T.numpy())


@torch.no_grad()
def largest_quotient(module: nn.Module, shape: Sequence[int]) -> float:
    """The largest difference quotient between 0 and one bright pixel: a lower bound for any map."""
    wide = copy.deepcopy(module).double()
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    moved = wide(basis) - wide(torch.zeros_like(basis))
    return float(torch.linalg.vector_norm(moved.flatten(1), dim=1).max())


def largest_singular_value(matrix: Matrix) -> float:
    """By LAPACK in float64, at any scale: the matrix is first divided by a power of two."""
    power = _exponent(matrix)
    if power is None:
        return 0.0
    return math.ldexp(float(np.linalg.svd(np.ldexp(matrix, -power), compute_uv=False)[0]), power)


def is_proven_below(bound: float, matrix: Matrix) -> bool:
    """Whether bound < ||A v|| / ||v|| in exact arithmetic, v the leading singular vector: then bound < ||A||."""
    power = _exponent(matrix)
    if power is None:
        return bound < 0
    vector = np.linalg.svd(np.ldexp(matrix, -power), full_matrices=False)[2][0]
    rows, row_scale = integers(matrix)
    direction, _ = integers(vector)
    image = rows @ direction
    numerator, denominator = bound.as_integer_ratio()
    # (numerator / denominator)^2 ||v||^2 < ||A v||^2, where A = rows / 2^row_scale
    return (numerator**2 * (direction @ direction)) << (2 * row_scale) < denominator**2 * (image @ image)


def integers(values: NDArray[np.floating]) -> tuple[NDArray[np.object_], int]:
    """Numbers as integers over a common power of two, exactly: values = integers / 2^scale."""
    ratios = [float(value).as_integer_ratio() for value in values.flat]
    scale = max((denominator.bit_length() - 1 for _, denominator in ratios), default=0)
    whole = [numerator << (scale - denominator.bit_length() + 1) for numerator, denominator in ratios]
    array = np.empty(len(whole), dtype=object)
    array[:] = whole
    return array.reshape(values.shape), scale


def _exponent(matrix: Matrix) -> int | None:
    largest = float(np.abs(matrix).max()) if matrix.size else 0.0
    return None if largest == 0 else math.frexp(largest)[1]
