"""Attribution maps as the metrics read them: one number per pixel, in an order, and asked for a batch at a time."""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET, chunk_size

# Maps (m, ...) of perturbed inputs (m, ...), which came from the samples `index` (m,)
Explain = Callable[[Tensor, Tensor], Tensor]
# Samples per call of an `Explain`, whose memory is its own affair
CALL = 256


def check_maps(maps: Tensor, inputs: Tensor, what: str = "attribution") -> None:
    """Refuse maps that do not lie on the inputs.

    Args:
        maps: (n, channels or 1, ...) for inputs (n, channels, ...), (n, features) for rows.
        inputs: what was explained.
        what: the name that the message uses.

    Raises:
        InputError: another shape, or integers.
    """
    expected = tuple(inputs.shape)
    fits = maps.shape == inputs.shape or (inputs.ndim > 2 and maps.shape == (len(inputs), 1, *inputs.shape[2:]))
    if not fits:
        one = f" or {(expected[0], 1, *expected[2:])}" if inputs.ndim > 2 else ""
        raise InputError(
            f"{what}: expected one map per sample, shape {expected}{one}, got {tuple(maps.shape)}; "
            "resize or unsqueeze the maps first"
        )
    check_floats(maps, what)


def check_floats(maps: Tensor, what: str = "attribution") -> None:
    """Refuse maps that are no batch of floating-point values; NaN are let through, to be counted.

    Raises:
        InputError: what cannot be a batch of maps.
    """
    if maps.ndim < 2 or maps.numel() == 0:
        raise InputError(f"{what}: expected a batch of maps (batch, ...), got shape {tuple(maps.shape)}")
    if not maps.is_floating_point():
        raise InputError(f"{what}: expected floating-point values, got {maps.dtype}; convert them with .float()")


def pixel_values(maps: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """One number per pixel: the mean over channels (signed), or the Euclidean norm over channels (absolute).

    Args:
        maps: (n, channels, ...) or (n, features).
        signed: keep the sign.

    Returns:
        Values (n, pixels), and whether each map was finite (n,); one that was not is all 0 here.
    """
    finite = torch.isfinite(maps).flatten(1).all(dim=1)
    maps = torch.where(finite.view(-1, *[1] * (maps.ndim - 1)), maps.detach(), 0.0)
    if maps.ndim > 2:
        maps = maps.flatten(2)
        if signed or maps.shape[1] == 1:
            maps = maps.mean(dim=1)
        else:
            scale = maps.abs().amax(dim=(1, 2), keepdim=True)  # so that no square vanishes
            scale = torch.where(scale > 0, scale, 1.0)
            maps = torch.linalg.vector_norm(maps / scale, dim=1) * scale.squeeze(1)
    return maps if signed else maps.abs(), finite


def is_constant(values: Tensor) -> Tensor:
    """Whether all numbers of a row are equal: (n,) of values (n, pixels)."""
    return values.amax(dim=1) == values.amin(dim=1)


def pixel_ranks(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The place of each pixel in falling order, 0 for the highest; ties fall at random.

    One permutation of the pixels decides all ties, so that a sample's order does not depend on its batch mates.

    Args:
        values: (n, pixels).
        generator: of that permutation.

    Returns:
        (n, pixels) integers.

    Example:
        >>> pixel_ranks(torch.tensor([[0.1, 0.9, 0.5]]))
        tensor([[2, 0, 1]])
    """
    pixels = values.shape[1]
    device = torch.device("cpu") if generator is None else generator.device
    shuffle = torch.randperm(pixels, generator=generator, device=device).to(values.device)
    order = shuffle[values[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    return torch.empty_like(order).scatter_(1, order, torch.arange(pixels, device=order.device).expand_as(order))


def top_count(pixels: int, share: float) -> int:
    """How many pixels the top share is: rounded, at least 1.

    Raises:
        InputError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"share: expected a share of the pixels in (0, 1], got {share}")
    return max(1, round(share * pixels))


def draw(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None, *, normal: bool = False) -> Tensor:
    """Uniform numbers in [0, 1), or standard normal ones, drawn where the generator lives (the CPU without one)."""
    device = torch.device("cpu") if generator is None else generator.device
    sample = torch.randn if normal else torch.rand
    return sample(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def part_of(scorer: Scorer, part: slice) -> Scorer:
    """The scorer of some of its samples."""
    smaller = copy(scorer)
    smaller.target = scorer.target[part]
    smaller.rival, smaller.scale = (None if x is None else x[part] for x in (scorer.rival, scorer.scale))
    return smaller


def explain_pixels(explain: Explain, inputs: Tensor, index: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """`pixel_values` of the signed maps of inputs (m, ...), checked: values (m, pixels) and finite (m,)."""
    maps = explain(inputs, index)
    if not isinstance(maps, Tensor):
        raise InputError(f"{what}: expected a tensor of maps, got {type(maps).__name__}")
    check_maps(maps, inputs, what)
    return pixel_values(maps, signed=True)


def call_size(inputs: Tensor, memory_budget: float = MEMORY_BUDGET) -> int:
    """How many perturbed inputs go into one call of an `Explain`.

    Raises:
        InputError: the budget does not hold one perturbed sample.
    """
    return min(CALL, chunk_size(inputs[:1], memory_budget))
