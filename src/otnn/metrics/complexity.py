"""Complexity: how much is there to read in a map? All three take the absolute map (norm over channels)."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from otnn.errors import InputError
from otnn.metrics.maps import check_floats, is_constant, pixel_values
from otnn.metrics.result import MetricResult, summarise


def jpeg_bytes(attribution: Tensor, *, quality: int = 95) -> MetricResult:
    """Bytes of the map as a grey JPEG. Lower is simpler.

    Each map is scaled by itself from its range to 0..255. A constant map is a black picture and counts as that; it is
    told in `undefined`. A map that is not finite is left out. Serrurier et al. (2022).

    Args:
        attribution: (n, channels, height, width).
        quality: of the JPEG, 1 to 95.

    Raises:
        InputError: maps that are no pictures, or another quality.

    Example:
        >>> ramp, noise = torch.linspace(0, 1, 256).view(1, 1, 16, 16), torch.rand(1, 1, 16, 16)
        >>> jpeg_bytes(ramp).mean < jpeg_bytes(noise).mean
        True
    """
    check_floats(attribution)
    if attribution.ndim != 4:
        raise InputError(f"attribution: expected pictures (n, channels, height, width), got {tuple(attribution.shape)}")
    if not 1 <= quality <= 95:
        raise InputError(f"quality: expected 1 to 95, got {quality}")
    values, finite = pixel_values(attribution, signed=False)
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    span = torch.where(high > low, high - low, 1.0)
    pixels = (255 * (values - low) / span).round().to(torch.uint8).view(-1, *attribution.shape[2:]).cpu().numpy()
    # The encoder takes one picture at a time
    sizes = torch.tensor([_jpeg_size(picture, quality) for picture in pixels], device=values.device).double()
    return summarise(
        "jpeg_bytes",
        torch.where(finite, sizes, torch.nan),
        "down",
        signed=False,
        undefined=is_constant(values),
        counted_as="a black picture; a map that is not finite is left out",
        settings={"quality": quality},
    )


def entropy(attribution: Tensor) -> MetricResult:
    """Entropy of the shares |a_i| / sum |a|, in nats, in [0, ln(pixels)]. Lower is simpler.

    A map of zeros, or one that is not finite, has no shares: it is left out and told in `undefined`.
    Bhatt, Weller and Moura (2020).

    Args:
        attribution: (n, channels, ...) or (n, features).

    Raises:
        InputError: no batch of maps.

    Example:
        >>> round(entropy(torch.ones(1, 8)).mean, 6) == round(float(torch.tensor(8.0).log()), 6)
        True
    """
    check_floats(attribution)
    shares, undefined = _shares(attribution)
    return summarise(
        "entropy",
        torch.where(undefined, torch.nan, -torch.special.xlogy(shares, shares).sum(dim=1)),
        "down",
        signed=False,
        undefined=undefined,
        counted_as="left out",
    )


def gini(attribution: Tensor) -> MetricResult:
    """Gini index of the absolute values, in [0, 1 - 1/pixels]: 0 where all are equal. Higher is sparser.

    sum_i (2 i - p - 1) |a|_(i) / (p sum |a|), |a|_(i) in rising order. A map of zeros, or one that is not finite, is
    left out and told in `undefined`. Chalasani et al. (2020).

    Args:
        attribution: (n, channels, ...) or (n, features).

    Raises:
        InputError: no batch of maps.

    Example:
        >>> gini(torch.tensor([[0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])).per_sample
        tensor([0.7500, 0.0000], dtype=torch.float64)
    """
    check_floats(attribution)
    shares, undefined = _shares(attribution)
    pixels = shares.shape[1]
    weights = 2 * torch.arange(1, pixels + 1, device=shares.device) - pixels - 1
    index = (shares.sort(dim=1).values * weights).sum(dim=1) / pixels
    return summarise(
        "gini",
        torch.where(undefined, torch.nan, index),
        "up",
        signed=False,
        undefined=undefined,
        counted_as="left out",
    )


def _shares(attribution: Tensor) -> tuple[Tensor, Tensor]:
    """|a_i| / sum |a| (n, pixels) float64, and which samples have none (n,)."""
    values, _ = pixel_values(attribution, signed=False)
    total = values.double().sum(dim=1, keepdim=True)
    return values.double() / torch.where(total > 0, total, 1.0), total.squeeze(1) == 0


def _jpeg_size(picture: NDArray[np.uint8], quality: int) -> int:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
