"""ForGrad: an attribution map without its high frequencies."""

import torch
from torch import Tensor

from otnn.checks import check_images
from otnn.errors import InputError

# The radius of the paper, 15 cycles a picture, belongs to pictures of 224 pixels
_CYCLES_PER_PIXEL = 15 / 224


def forgrad(maps: Tensor, *, sigma: float | None = None) -> Tensor:
    """ForGrad (Muzellec et al. 2023): |low-pass of |mean over the channels||, the low-pass a disc of radius sigma.

    In the Fourier plane a frequency is kept if it is at most sigma cycles over the longer side of the picture, in
    whatever direction. Sigma is 15 for 224 pixels in the paper; the default keeps that share of cycles a pixel: 1.9
    for 28 pixels, which leaves the mean and 8 frequencies. The map is >= 0, as the paper defines it.

    Args:
        maps: (n, channels, height, width) or (n, channels, length) attributions, usually of `saliency`; any sizes.
        sigma: radius of the disc, >= 0, in cycles over the longer side; by default 15 / 224 of the side in pixels.

    Returns:
        (n, 1, height, width) or (n, 1, length), in the units of the maps.

    Raises:
        InputError: maps that are not finite, a negative sigma, or rows (n, features): the order of features is
            arbitrary, so they have no frequencies.

    Example:
        >>> wave = torch.cos(torch.arange(32) * torch.pi / 16)  # one cycle over 32 pixels
        >>> noise = torch.cos(torch.arange(32) * torch.pi)  # 16 cycles
        >>> maps = (2 + wave + noise).view(1, 1, 1, 32).expand(1, 1, 32, 32)
        >>> torch.allclose(forgrad(maps)[0, 0, 0], 2 + wave, atol=1e-5)
        True
    """
    check_images(maps, what="maps")
    if maps.ndim not in (3, 4):
        raise InputError(
            "maps: expected (n, channels, height, width) or (n, channels, length), which have frequencies, got shape "
            f"{tuple(maps.shape)}; the order of the features of a row is arbitrary, so ForGrad does not apply"
        )
    if sigma is not None and not sigma >= 0:
        raise InputError(f"sigma: expected a radius >= 0 in cycles over the longer side, got {sigma}")
    size = tuple(maps.shape[2:])
    kept = disc(size, _CYCLES_PER_PIXEL * max(size) if sigma is None else sigma).to(maps.device)
    dims = tuple(range(2, maps.ndim))
    single = maps.detach().mean(dim=1, keepdim=True).abs()
    wide = single if single.element_size() > 2 else single.float()  # half precision has no Fourier transform on a CPU
    spectrum = torch.fft.rfftn(wide, dim=dims)
    low: Tensor = torch.fft.irfftn(spectrum * kept, s=size, dim=dims)
    return low.abs().to(maps.dtype)


def disc(size: tuple[int, ...], sigma: float) -> Tensor:
    """Which frequencies of `torch.fft.rfftn` lie within sigma cycles over the longer side: boolean."""
    radius = torch.zeros((), dtype=torch.float64)
    for axis, pixels in enumerate(size):
        last = axis == len(size) - 1
        cycles = torch.arange(pixels // 2 + 1 if last else pixels, dtype=torch.float64)
        cycles = torch.minimum(cycles, pixels - cycles) * max(size) / pixels
        radius = radius.unsqueeze(-1) + cycles.square()
    kept: Tensor = radius <= sigma**2
    return kept
