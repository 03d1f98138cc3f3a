"""RISE: the mean of random masks, each weighted by the score of what it leaves."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from otnn.errors import InputError
from otnn.explain.bridge import check_count
from otnn.explain.masking import cell_grid, masked_scores, uniform
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET, chunk_size


@torch.no_grad()
def rise(
    scorer: Scorer,
    inputs: Tensor,
    *,
    samples: int = 4000,
    grid: int = 7,
    keep: float = 0.5,
    baseline: Tensor | float = 0.0,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """RISE (Petsiuk, Das and Saenko 2018, equation 6): S = sum_i f(x M_i) M_i / (N E[M]), with E[M] = `keep`.

    A mask is a grid of cells, each kept with probability `keep`, interpolated to a picture one cell larger than the
    input and cropped at a random offset of its own. All samples see the same masks. Scores may have either sign, and
    so may the map; as in the paper it holds an offset near the mean score of the masked inputs.

    Args:
        scorer: what is explained; built on the same samples.
        inputs: (n, channels, height, width) images; (n, channels, length) signals, masked alike along their length; or
            (n, features) rows, whose features are kept or hidden one by one, without interpolation.
        samples: masks N, the number of forwards for each sample.
        grid: cells a side; rows ignore it.
        keep: probability in (0, 1) that a cell is kept.
        baseline: what hidden values become: a number, one sample, or one per sample.
        generator: of the masks; the global one by default.
        memory_budget: bytes for masks, copies and activations of one forward.

    Returns:
        (n, 1, height, width), (n, 1, length) or (n, features): units of the score.

    Raises:
        InputError: settings or inputs that cannot be used, or a budget that does not hold one masked sample.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
        >>> x = torch.rand(2, 1, 8, 8)
        >>> rise(Scorer(model, x, 0), x, samples=50, grid=4).shape
        torch.Size([2, 1, 8, 8])
    """
    cell_shape = cell_grid(inputs, grid)
    check_count("samples", samples, 1)
    if not 0 < keep < 1:
        raise InputError(f"keep: expected a probability in (0, 1), got {keep}")
    cells, offsets = draw(inputs, samples, cell_shape, keep, generator)
    total = inputs.new_zeros(len(inputs), math.prod(inputs.shape[2:]) if inputs.ndim > 2 else inputs.shape[1])
    size = chunk_size(inputs[:1], memory_budget, scorer.model)
    with parametrize.cached():
        for part, offset in zip(cells.split(size), offsets.split(size), strict=True):
            masks = part if inputs.ndim == 2 else smooth_masks(part, offset, tuple(inputs.shape[2:]))
            scores = masked_scores(scorer, inputs, masks, baseline, memory_budget=memory_budget)
            total += scores @ masks.flatten(1)
    return (total / (samples * keep)).view(len(inputs), *([1] if inputs.ndim > 2 else []), *_space(inputs))


def draw(
    inputs: Tensor, samples: int, cell_shape: tuple[int, ...], keep: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Cells of 0 and 1, (samples, *cell_shape), and the pixels that each mask is shifted by, (samples, dimensions)."""
    cells = (uniform((samples, *cell_shape), generator, inputs) < keep).to(inputs.dtype)
    steps = torch.tensor(
        [math.ceil(pixels / g) for pixels, g in zip(_space(inputs), cell_shape, strict=True)], device=inputs.device
    )
    return cells, (uniform((samples, len(cell_shape)), generator, inputs) * steps).long().clamp(max=steps - 1)


def smooth_masks(cells: Tensor, offsets: Tensor, size: tuple[int, ...]) -> Tensor:
    """Interpolate cells linearly to one cell more than `size`, and crop each mask at its own offset.

    Interpolation is a matrix along each axis, and a crop takes some of its rows: no mask is made larger than needed.

    Args:
        cells: (masks, g, g) or (masks, g).
        offsets: (masks, dimensions) pixels, from 0 to one less than a cell.
        size: (height, width), or (length,).

    Returns:
        (masks, 1, height, width), or (masks, 1, length).
    """
    masks = cells
    for axis, pixels in enumerate(size):
        g = cells.shape[axis + 1]
        weights = nn.functional.interpolate(
            torch.eye(g, dtype=cells.dtype, device=cells.device).unsqueeze(0),
            (g + 1) * math.ceil(pixels / g),
            mode="linear",
            align_corners=False,
        )[0].T
        rows = weights[offsets[:, axis : axis + 1] + torch.arange(pixels, device=cells.device)]
        masks = rows @ masks if axis == len(size) - 2 else _last_axis(rows, masks)
    return masks.unsqueeze(1).clamp_(0, 1)


def _last_axis(rows: Tensor, masks: Tensor) -> Tensor:
    """Apply (masks, pixels, g) along the last axis of (masks, ..., g)."""
    if masks.ndim == 2:
        return (rows @ masks.unsqueeze(2)).squeeze(2)
    return masks @ rows.mT


def _space(inputs: Tensor) -> tuple[int, ...]:
    """(height, width), (length,) or (features,)."""
    return tuple(inputs.shape[2:]) if inputs.ndim > 2 else tuple(inputs.shape[1:])
