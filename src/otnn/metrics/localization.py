"""Localisation: does the map point to where the evidence is known to be? All take the absolute map."""

from dataclasses import dataclass

import torch
from torch import Tensor

from otnn.checks import check_images, check_labels
from otnn.errors import InputError
from otnn.metrics.maps import check_floats, is_constant, pixel_ranks, pixel_values, top_count
from otnn.metrics.result import Direction, MetricResult, summarise
from otnn.metrics.statistics import spearman

# Spearman correlation between the maps of two halves of the human subjects; Fel et al. (2022)
HUMAN_CEILING = 0.65753
_LEFT_OUT = "a map that is not finite and a sample without a region are left out"


def box_regions(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes as regions of pixels.

    Args:
        boxes: (n, 4) left, top, right, bottom in pixels; right and bottom are outside. Four zeros are no box, whose
            region is empty, as in `otnn.data.Split`.
        size: (height, width).

    Returns:
        (n, height, width) bool.

    Raises:
        InputError: another shape, or a box that holds no pixel of the picture.

    Example:
        >>> box_regions(torch.tensor([[1, 0, 3, 1]]), (2, 3)).long()
        tensor([[[0, 1, 1],
                 [0, 0, 0]]])
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(f"boxes: expected (n, 4) left, top, right, bottom, got {tuple(boxes.shape)}")
    left, top, right, bottom = (side.view(-1, 1, 1) for side in boxes.unbind(dim=1))
    row = torch.arange(size[0], device=boxes.device).view(1, -1, 1)
    column = torch.arange(size[1], device=boxes.device).view(1, 1, -1)
    regions: Tensor = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    empty = ~regions.flatten(1).any(dim=1) & (boxes != 0).any(dim=1)
    if bool(empty.any()):
        bad = int(empty.nonzero()[0])
        raise InputError(f"boxes: box {bad}, {boxes[bad].tolist()}, holds no pixel of a picture of {size}")
    return regions


def top_share(
    attribution: Tensor, regions: Tensor, *, share: float = 0.1, generator: torch.Generator | None = None
) -> MetricResult:
    """Share of the top pixels that lie in the region. In [0, 1], higher is better.

    A constant map has a random order; it counts as that and is told in `undefined`. A map that is not finite, and a
    sample whose region is empty, are left out.

    Args:
        attribution: (n, channels, height, width).
        regions: (n, height, width) bool, such as `box_regions`.
        share: of the pixels that are looked at, in (0, 1].
        generator: orders ties.

    Raises:
        InputError: shapes or a share that do not fit.

    Example:
        >>> top_share(torch.eye(4).view(1, 1, 4, 4), torch.eye(4).bool().view(1, 4, 4), share=0.25).mean
        1.0
    """
    return _share("top_share", "up", attribution, regions, share, generator)


def null_block_share(
    attribution: Tensor, null: Tensor, *, share: float = 0.1, generator: torch.Generator | None = None
) -> MetricResult:
    """Share of the top pixels that lie in the null block of BlockMNIST. In [0, 1], lower is better.

    As `top_share`. Shah, Jain and Netrapalli (2021).

    Args:
        attribution: (n, channels, height, width).
        null: (n, height, width) bool, `BlockImages.null`.
        share: of the pixels that are looked at, in (0, 1].
        generator: orders ties.

    Raises:
        InputError: shapes or a share that do not fit.

    Example:
        >>> blocks = block_mnist(torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.long))
        >>> null_block_share(blocks.null.unsqueeze(1).float(), blocks.null, share=0.5).mean
        1.0
    """
    return _share("null_block_share", "down", attribution, null, share, generator)


def _share(
    name: str,
    direction: Direction,
    attribution: Tensor,
    regions: Tensor,
    share: float,
    generator: torch.Generator | None,
) -> MetricResult:
    inside = _regions(attribution, regions)
    values, finite = pixel_values(attribution, signed=False)
    count = top_count(values.shape[1], share)
    top = pixel_ranks(values, generator) < count
    found = (top & inside).sum(dim=1).double() / count
    return summarise(
        name,
        torch.where(finite & inside.any(dim=1), found, torch.nan),
        direction,
        signed=False,
        undefined=is_constant(values) | ~inside.any(dim=1),
        counted_as=f"a random order of the pixels; {_LEFT_OUT}",
        settings={"share": share},
    )


def pointing_game(attribution: Tensor, regions: Tensor, *, generator: torch.Generator | None = None) -> MetricResult:
    """Whether the highest pixel lies in the region: 1 or 0, higher is better.

    A constant map points at random; it counts as that and is told in `undefined`. A map that is not finite, and a
    sample whose region is empty, are left out. Zhang et al. (2018).

    Args:
        attribution: (n, channels, height, width).
        regions: (n, height, width) bool, such as `box_regions`.
        generator: chooses among equal highest pixels.

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> pointing_game(torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[False, True]]])).mean
        1.0
    """
    inside = _regions(attribution, regions)
    values, finite = pixel_values(attribution, signed=False)
    hit = ((pixel_ranks(values, generator) == 0) & inside).any(dim=1).double()
    return summarise(
        "pointing_game",
        torch.where(finite & inside.any(dim=1), hit, torch.nan),
        "up",
        signed=False,
        undefined=is_constant(values) | ~inside.any(dim=1),
        counted_as=f"a random pixel; {_LEFT_OUT}",
    )


def human_alignment(attribution: Tensor, human: Tensor) -> MetricResult:
    """Spearman correlation with human maps, over the human ceiling .65753. Higher is better; 1 is human.

    A sample where one of the maps is constant or not finite counts as 0 and is told in `undefined`. Fel et al. (2022).

    Args:
        attribution: (n, channels, height, width).
        human: (n, height, width), what humans looked at, such as ClickMe maps, at the size of the attribution.

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> maps = torch.rand(3, 1, 5, 5)
        >>> round(human_alignment(maps, maps.squeeze(1)).mean, 4)
        1.5208
    """
    _check_pictures(attribution)
    _check_shape("human", human, attribution)
    check_floats(human, "human")
    values, finite = pixel_values(attribution, signed=False)
    rho = spearman(values, torch.where(human.isfinite(), human, torch.nan).flatten(1))
    undefined = rho.isnan() | ~finite
    return summarise(
        "human_alignment",
        torch.where(undefined, 0.0, rho / HUMAN_CEILING),
        "up",
        signed=False,
        undefined=undefined,
        counted_as="0",
        settings={"ceiling": HUMAN_CEILING},
    )


@dataclass(frozen=True)
class BlockImages:
    """BlockMNIST: pictures of two blocks, of which one is empty of evidence.

    Attributes:
        images: (n, channels, 2 height, width).
        labels: (n,) of the digits.
        null: (n, 2 height, width) bool, where the null block is.
    """

    images: Tensor
    labels: Tensor
    null: Tensor


def block_mnist(images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> BlockImages:
    """Put above or below each picture, at random, a null block: the outline of a square, the same in all.

    Shah, Jain and Netrapalli (2021), who place the blocks so; the outline, half as wide as the block, is ours.

    Args:
        images: (n, channels, height, width), floats in [0, 1].
        labels: (n,) integers.
        generator: draws the places.

    Raises:
        InputError: images or labels that cannot be used.

    Example:
        >>> blocks = block_mnist(torch.rand(4, 1, 28, 28), torch.tensor([3, 1, 4, 1]))
        >>> blocks.images.shape, blocks.null.flatten(1).float().mean(dim=1)
        (torch.Size([4, 1, 56, 28]), tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    """
    check_images(images, box=True, what="images")
    _check_pictures(images, "images")
    n, channels, height, width = images.shape
    check_labels(labels, n, int(labels.max()) + 1 if labels.numel() else 0)
    null = images.new_zeros(height, width)
    rows, columns = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
    null[rows, columns] = 1
    inner = null[rows, columns][1:-1, 1:-1]
    inner.zero_()
    device = torch.device("cpu") if generator is None else generator.device
    above = (torch.rand(n, generator=generator, device=device) < 0.5).to(images.device)  # the null block is above
    block = null.expand(n, channels, height, width)
    place = above.view(-1, 1, 1, 1)
    stacked = torch.cat([torch.where(place, block, images), torch.where(place, images, block)], dim=2)
    top = torch.arange(2 * height, device=images.device).view(1, -1, 1) < height
    return BlockImages(stacked, labels, (top == above.view(-1, 1, 1)).expand(n, 2 * height, width))


def _regions(attribution: Tensor, regions: Tensor) -> Tensor:
    """Regions as (n, pixels) bool."""
    _check_pictures(attribution)
    _check_shape("regions", regions, attribution)
    if regions.dtype != torch.bool:
        raise InputError(f"regions: expected bool, got {regions.dtype}; compare with a threshold first")
    return regions.to(attribution.device).flatten(1)


def _check_pictures(maps: Tensor, what: str = "attribution") -> None:
    check_floats(maps, what)
    if maps.ndim != 4:
        raise InputError(f"{what}: expected (n, channels, height, width), got {tuple(maps.shape)}")


def _check_shape(what: str, given: Tensor, attribution: Tensor) -> None:
    expected = (len(attribution), *attribution.shape[2:])
    if tuple(given.shape) != expected:
        raise InputError(f"{what}: expected one per sample, shape {expected}, got {tuple(given.shape)}")
