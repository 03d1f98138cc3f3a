"""Each method once more, from its paper's formula, by plain loops over samples, masks, cells and pixels."""

import cmath
import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Score = Callable[[Tensor], float]
"""One sample without batch dimension to its score."""


def score_of(model: nn.Module, target: int) -> Score:
    def score(sample: Tensor) -> float:
        with torch.no_grad():
            return float(model(sample.unsqueeze(0))[0, target])

    return score


def hidden(sample: Tensor, mask: Tensor, baseline: float = 0.0) -> Tensor:
    return sample * mask + baseline * (1 - mask)


def linear_1d(values: Sequence[float], size: int) -> list[float]:
    """Linear interpolation of cells to pixels; the centres of both tile the same interval, the ends are constant."""
    cells = len(values)
    result = []
    for pixel in range(size):
        position = min(max((pixel + 0.5) * cells / size - 0.5, 0.0), cells - 1.0)
        left = math.floor(position)
        right = min(left + 1, cells - 1)
        result.append(values[left] + (position - left) * (values[right] - values[left]))
    return result


def linear(cells: Tensor, size: Sequence[int]) -> Tensor:
    """`linear_1d` along each axis in turn."""
    result = cells
    for axis, pixels in enumerate(size):
        moved = result.movedim(axis, -1)
        rows = [linear_1d(row.tolist(), pixels) for row in moved.reshape(-1, moved.shape[-1])]
        result = torch.tensor(rows, dtype=cells.dtype).view(*moved.shape[:-1], pixels).movedim(-1, axis)
    return result


def nearest(cells: Tensor, size: Sequence[int]) -> Tensor:
    result = torch.empty(*size, dtype=cells.dtype)
    for place in itertools.product(*(range(pixels) for pixels in size)):
        cell = tuple(p * g // pixels for p, g, pixels in zip(place, cells.shape, size, strict=True))
        result[place] = cells[cell]
    return result


def rise_mask(cells: Tensor, offset: Sequence[int], size: Sequence[int]) -> Tensor:
    """A mask of (g + 1) ceil(pixels / g) pixels a side, cropped."""
    large = [(g + 1) * math.ceil(pixels / g) for g, pixels in zip(cells.shape, size, strict=True)]
    mask = linear(cells, large)
    for axis, (start, pixels) in enumerate(zip(offset, size, strict=True)):
        mask = mask.narrow(axis, int(start), pixels)
    return mask


def rise(score: Score, sample: Tensor, masks: Sequence[Tensor], keep: float, baseline: float = 0.0) -> Tensor:
    total = torch.zeros_like(masks[0])
    for mask in masks:
        total += score(hidden(sample, mask, baseline)) * mask
    return total / (len(masks) * keep)


def sobol(score: Callable[[Tensor], float], own: Tensor, other: Tensor) -> list[float]:
    """Jansen's total indices of a function of cells, from the designs A and B."""
    at_own, at_other = [score(row) for row in own], [score(row) for row in other]
    variance = statistics.variance(at_own + at_other)
    indices = []
    for cell in range(own.shape[1]):
        squares = 0.0
        for j in range(len(own)):
            crossed = own[j].clone()
            crossed[cell] = other[j, cell]
            squares += (at_own[j] - score(crossed)) ** 2
        indices.append(squares / (2 * len(own) * variance))
    return indices


def hsic(scores: Sequence[float], cells: Tensor) -> list[float]:
    """tr(K H L H) / (N - 1)^2 of each cell, all matrices written out."""
    count = len(scores)
    distances = [abs(scores[i] - scores[j]) for i in range(count) for j in range(i)]
    width = statistics.median_low(distances) or statistics.fmean(distances) or 1.0
    centre = torch.eye(count, dtype=torch.float64) - 1 / count
    output = torch.empty(count, count, dtype=torch.float64)
    for i, j in itertools.product(range(count), repeat=2):
        output[i, j] = math.exp(-((scores[i] - scores[j]) ** 2) / (2 * width**2))
    indices = []
    for cell in range(cells.shape[1]):
        kernel = torch.empty(count, count, dtype=torch.float64)
        for i, j in itertools.product(range(count), repeat=2):
            kernel[i, j] = 0.5 - float(cells[i, cell] - cells[j, cell]) ** 2
        indices.append(float(torch.trace(kernel @ centre @ output @ centre)) / (count - 1) ** 2)
    return indices


def forgrad(picture: Tensor, sigma: float) -> Tensor:
    """One map (channels, height, width): the discrete Fourier transform and its inverse, frequency by frequency."""
    values = picture.mean(dim=0).abs()
    height, width = values.shape
    kept = torch.zeros(height, width, dtype=torch.complex128)
    for u, v in itertools.product(range(height), range(width)):
        cycles_down, cycles_across = min(u, height - u), min(v, width - v)
        longer = max(height, width)
        if math.hypot(cycles_down * longer / height, cycles_across * longer / width) > sigma + 1e-12:
            continue
        coefficient = sum(
            float(values[y, x]) * cmath.exp(-2j * math.pi * (u * y / height + v * x / width))
            for y, x in itertools.product(range(height), range(width))
        )
        for y, x in itertools.product(range(height), range(width)):
            kept[y, x] += coefficient * cmath.exp(2j * math.pi * (u * y / height + v * x / width)) / (height * width)
    return kept.abs()


def gradcam_pp(features: Tensor, score: Callable[[Tensor], Tensor], *, positive_total: bool = False) -> Tensor:
    """Grad-CAM++ of Y = exp(S) from activations (channels, height, width): derivatives of Y by autograd, three times.

    `positive_total` sums the positive parts of the activations in the denominator.
    """
    channels, height, width = features.shape
    result = torch.zeros(height, width, dtype=features.dtype)
    for k in range(channels):
        total = float((features[k].clamp(min=0) if positive_total else features[k]).sum())
        weight = 0.0
        for i, j in itertools.product(range(height), range(width)):
            at = features.detach().clone()
            value = at[k, i, j].clone().requires_grad_()
            picture = at.clone()
            picture[k, i, j] = value
            derivatives = [score(picture).exp()]
            for _ in range(3):
                (derivative,) = torch.autograd.grad(derivatives[-1], value, create_graph=True)
                derivatives.append(derivative)
            first, second, third = (float(d.detach()) for d in derivatives[1:])
            denominator = 2 * second + total * third
            if denominator != 0:
                weight += second / denominator * max(first, 0.0)
        result += weight * features[k].detach()
    return result
