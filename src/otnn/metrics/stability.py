"""Stability: how far does the map turn under small noise, and how far do two methods lie apart on one model?"""

from typing import NamedTuple

import torch
from torch import Tensor

from otnn.checks import check_images
from otnn.errors import InputError
from otnn.memory import MEMORY_BUDGET
from otnn.metrics.maps import Explain, call_size, check_floats, draw, explain_pixels, is_constant, pixel_values
from otnn.metrics.result import MetricResult, summarise
from otnn.metrics.statistics import correlation, ranks


class Distances(NamedTuple):
    """Two distances between maps: L2 of the maps at unit norm, in [0, 2], and 1 - Spearman, in [0, 2]."""

    l2: MetricResult
    spearman: MetricResult


def map_distances(first: Tensor, first_ranks: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """L2 between maps at unit norm, and 1 - Spearman: each (n,) float64 of pixel values (n, pixels), one side ranked.

    A map of zeros stays one, at L2 distance 1 from any other; a constant map has correlation 0 with any map.
    """
    rho = correlation(first_ranks, ranks(second))
    distance = torch.linalg.vector_norm(_unit(first) - _unit(second), dim=1)
    return distance, 1 - torch.where(rho.isnan(), 0.0, rho)


def average_stability(
    explain: Explain,
    inputs: Tensor,
    *,
    neighbours: int = 20,
    noise: tuple[float, float] = (-0.1, 0.1),
    forwards_per_map: int = 1,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Distances:
    """Mean distance of the map of a sample to the maps of its noisy neighbours. Lower is better.

    The signed maps (channel mean) are compared. The noise is uniform per value, the same for all samples, and not
    clipped. A sample whose own map is constant or not finite is left out and told in `undefined`; a neighbour with such
    a map counts as uncorrelated, at L2 distance 1. Bhatt, Weller and Moura (2020).

    Args:
        explain: function of perturbed inputs (m, ...) and of the samples `index` (m,) that they came from, to maps.
        inputs: (n, ...) the samples.
        neighbours: per sample.
        noise: the range of the uniform noise; the paper's library takes (0, 0.1).
        forwards_per_map: what one map costs, to report the forwards.
        generator: draws the noise.
        memory_budget: bytes of the perturbed samples of one call of `explain`, which 256 never exceed.

    Raises:
        InputError: maps or settings that do not fit.

    Example:
        >>> x = torch.rand(2, 1, 4, 4)
        >>> still = average_stability(lambda inputs, index: x[index], x)
        >>> still.l2.mean, round(still.spearman.mean, 9), still.l2.maps
        (0.0, 0.0, 42)
    """
    check_images(inputs)
    if neighbours < 1:
        raise InputError(f"neighbours: expected at least 1, got {neighbours}")
    low, high = noise
    if not low < high:
        raise InputError(f"noise: expected a range low < high, got {noise}")
    n, size = len(inputs), call_size(inputs, memory_budget)
    bank = low + (high - low) * draw((neighbours, *inputs.shape[1:]), inputs, generator)
    every = torch.arange(n, device=inputs.device)
    parts = [explain_pixels(explain, inputs[i], i, "explain") for i in every.split(size)]
    own = torch.cat([values for values, _ in parts])
    undefined = is_constant(own) | ~torch.cat([finite for _, finite in parts])
    own_ranks = ranks(own)
    l2, ranked = [], []
    for row in torch.arange(n * neighbours, device=inputs.device).split(size):
        sample = row // neighbours
        maps, _ = explain_pixels(explain, inputs[sample] + bank[row % neighbours], sample, "explain")
        far, turned = map_distances(own[sample], own_ranks[sample], maps)
        l2.append(far)
        ranked.append(turned)
    maps_made = n * (neighbours + 1)
    settings = {"neighbours": neighbours, "noise": list(noise)}
    scores = (
        ("stability_l2", torch.cat(l2).view(n, neighbours).mean(dim=1)),
        ("stability_spearman", torch.cat(ranked).view(n, neighbours).mean(dim=1)),
    )
    return Distances(
        *(
            summarise(
                name,
                torch.where(undefined, torch.nan, values),
                "down",
                signed=True,
                undefined=undefined,
                counted_as="left out",
                forwards=maps_made * forwards_per_map,
                maps=maps_made,
                settings=settings,
            )
            for name, values in scores
        )
    )


def explanation_distance(first: Tensor, second: Tensor, *, signed: bool = True) -> Distances:
    """Distance between the maps of two methods on one model. Lower means that they agree.

    A sample where one of the maps is constant or not finite is left out and told in `undefined`.
    Serrurier et al. (2022) take it between Saliency and SmoothGrad.

    Args:
        first: (n, channels, ...) or (n, features).
        second: the same pixels; the channels may differ.
        signed: compare channel means; False compares absolute values (norm over channels), for methods without a sign.

    Raises:
        InputError: maps of different pixels.

    Example:
        >>> a = torch.rand(2, 1, 4, 4)
        >>> round(explanation_distance(a, -a).l2.mean, 6), round(explanation_distance(a, 3 * a).spearman.mean, 6)
        (2.0, 0.0)
    """
    check_floats(first, "first")
    check_floats(second, "second")
    alike = first.ndim == second.ndim and len(first) == len(second) and first.shape[2:] == second.shape[2:]
    if not alike or (first.ndim == 2 and first.shape != second.shape):
        raise InputError(
            f"expected maps of the same samples and pixels, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    a, a_finite = pixel_values(first, signed=signed)
    b, b_finite = pixel_values(second, signed=signed)
    undefined = is_constant(a) | is_constant(b) | ~a_finite | ~b_finite
    scores = zip(("distance_l2", "distance_spearman"), map_distances(a, ranks(a), b), strict=True)
    return Distances(
        *(
            summarise(
                name,
                torch.where(undefined, torch.nan, values),
                "down",
                signed=signed,
                undefined=undefined,
                counted_as="left out",
            )
            for name, values in scores
        )
    )


def _unit(values: Tensor) -> Tensor:
    values = values.double()
    norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values / torch.where(norm > 0, norm, 1.0)
