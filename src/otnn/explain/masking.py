"""The one masked-forward engine: scores of many partly hidden copies of each sample, many in each forward.

RISE, Sobol, HSIC, Deletion, Insertion and muFidelity are all a choice of masks and a sum over these scores.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from otnn.checks import check_images
from otnn.errors import InputError
from otnn.explain.scores import Scorer, check_scored
from otnn.memory import MEMORY_BUDGET, chunk_size


def upsample(cells: Tensor, size: tuple[int, ...], mode: str = "nearest") -> Tensor:
    """Spread a grid of cells over the pixels of a picture, or over the steps of a signal.

    Args:
        cells: (masks, g, g) for pictures, (masks, g) for signals.
        size: (height, width), or (length,).
        mode: "nearest" gives each pixel the value of its cell; "linear" interpolates between the centres of cells.

    Returns:
        (masks, 1, height, width), or (masks, 1, length).

    Raises:
        InputError: another mode or rank, or more cells than pixels.

    Example:
        >>> upsample(torch.tensor([[0.0, 1.0]]), (5,))
        tensor([[[0., 0., 0., 1., 1.]]])
    """
    if len(size) not in (1, 2) or cells.ndim != len(size) + 1:
        raise InputError(
            f"cells: expected (masks, g, g) for pictures or (masks, g) for signals, got {tuple(cells.shape)} for {size}"
        )
    if any(g > pixels for g, pixels in zip(cells.shape[1:], size, strict=True)):
        raise InputError(
            f"cells: expected at most one a pixel, {size}, got {tuple(cells.shape[1:])}; take a coarser grid"
        )
    if mode == "nearest":  # ten times as fast as `interpolate` on a CPU, and by integers, so never one cell beside
        place = torch.zeros((), dtype=torch.long, device=cells.device)
        for g, pixels in zip(cells.shape[1:], size, strict=True):
            place = place.unsqueeze(-1) * g + torch.arange(pixels, device=cells.device) * g // pixels
        return cells.flatten(1).index_select(1, place.flatten()).view(len(cells), 1, *size)
    if mode != "linear":
        raise InputError(f'mode: expected "nearest" or "linear", got {mode!r}')
    torch_mode = "bilinear" if len(size) == 2 else "linear"
    return nn.functional.interpolate(cells.unsqueeze(1), size, mode=torch_mode, align_corners=False)


def masked_scores(
    scorer: Scorer,
    inputs: Tensor,
    masks: Tensor,
    baseline: Tensor | float = 0.0,
    *,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Scores of x m + b (1 - m), for every sample x and mask m.

    Weights of parametrised layers are built once, no gradient is kept, and the copies pass in chunks of `chunk_size`.

    Args:
        scorer: what is scored; built on the same samples.
        inputs: (n, ...) the samples.
        masks: values in [0, 1], 1 keeps and 0 hides. A bank for all samples (k, ...), or a bank for each (n, k, ...);
            what follows is broadcast to a sample: (k, 1, height, width) hides all channels of a pixel together.
        baseline: what hidden values become: a number, one sample (...), one per sample (n, ...), or one per copy
            (n or 1, k or 1, ...).
        memory_budget: bytes that the copies and the activations of one forward may take, beside inputs and masks.

    Returns:
        (n, k) scores, in the dtype and on the device of the inputs.

    Raises:
        InputError: shapes that do not fit, masks outside [0, 1], or a budget that does not hold one copy.

    Example:
        >>> scorer = Scorer(nn.Linear(2, 3).eval(), torch.rand(4, 2), 1)
        >>> masked_scores(scorer, torch.rand(4, 2), torch.eye(2)).shape
        torch.Size([4, 2])
    """
    check_scored(scorer, inputs)
    bank = _bank(inputs, masks)
    filling = None if isinstance(baseline, int | float) and baseline == 0 else _filling(inputs, bank, baseline)
    with torch.no_grad(), parametrize.cached():
        size = chunk_size(inputs[:1], memory_budget, scorer.model)
        return _blocks(scorer, inputs, bank, filling, size)


def cell_scores(
    scorer: Scorer,
    inputs: Tensor,
    cells: Tensor,
    baseline: Tensor | float = 0.0,
    *,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """`masked_scores` of masks that are given by cells and spread to pixels a few at a time: large banks stay small.

    Args:
        scorer: what is scored; built on the same samples.
        inputs: (n, channels, height, width), (n, channels, length) or rows (n, features).
        cells: (k, g, g), (k, g) or (k, features), values in [0, 1].
        baseline: a number, one sample (...), or one per sample (n, ...).
        memory_budget: bytes, as for `masked_scores`; the masks of a forward count too.

    Returns:
        (n, k) scores.

    Raises:
        InputError: as `masked_scores` and `upsample`.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
        >>> x = torch.rand(3, 1, 8, 8)
        >>> cell_scores(Scorer(model, x, 0), x, torch.ones(5, 4, 4)).shape
        torch.Size([3, 5])
    """
    check_images(inputs)
    with parametrize.cached():
        parts = []
        for part in cells.split(chunk_size(inputs[:1], memory_budget, scorer.model)):
            masks = part if inputs.ndim == 2 else upsample(part, tuple(inputs.shape[2:]))
            parts.append(masked_scores(scorer, inputs, masks, baseline, memory_budget=memory_budget))
    return torch.cat(parts, dim=1)


def cell_grid(inputs: Tensor, grid: int) -> tuple[int, ...]:
    """The shape of the cells that hide a sample: (grid, grid), (grid,), or one cell a feature of a row.

    Raises:
        InputError: inputs that are none of these, or a grid that is finer than the pixels.
    """
    check_images(inputs)
    if inputs.ndim == 2:
        return (inputs.shape[1],)
    if inputs.ndim > 4:
        raise InputError(
            "inputs: expected images (n, channels, height, width), signals (n, channels, length) or rows "
            f"(n, features), got shape {tuple(inputs.shape)}"
        )
    finest = min(inputs.shape[2:])
    if not isinstance(grid, int) or not 1 <= grid <= finest:
        raise InputError(f"grid: expected 1 to {finest} cells a side for inputs {tuple(inputs.shape)}, got {grid}")
    return (grid,) * (inputs.ndim - 2)


def cell_map(values: Tensor, inputs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Values of cells (n, cells) as a map over the inputs, linear between the centres of the cells.

    Args:
        values: (n, cells).
        inputs: the samples that the map belongs to.
        shape: `cell_grid`.

    Returns:
        (n, 1, height, width), (n, 1, length) or (n, features).
    """
    if inputs.ndim == 2:
        return values
    return upsample(values.view(-1, *shape), tuple(inputs.shape[2:]), "linear")


def uniform(shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator lives, on the CPU by default: alike on every device.

    Example:
        >>> uniform((2, 3), torch.Generator().manual_seed(0), torch.zeros(1, dtype=torch.float64)).dtype
        torch.float64
    """
    device = "cpu" if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=device).to(like)


def _bank(inputs: Tensor, masks: Tensor) -> Tensor:
    """Masks as (n or 1, k, ...), in the dtype and on the device of the inputs."""
    sample = tuple(inputs.shape[1:])
    bank = masks if masks.ndim == inputs.ndim + 1 else masks.unsqueeze(0)
    fits = bank.ndim == inputs.ndim + 1 and bank.shape[0] in (1, len(inputs)) and bank.shape[1] > 0
    if not fits or any(m not in (1, s) for m, s in zip(bank.shape[2:], sample, strict=True)):
        raise InputError(
            f"masks: expected a bank (k, ...) or one per sample ({len(inputs)}, k, ...), broadcastable to samples "
            f"{sample}, got {tuple(masks.shape)}"
        )
    bank = bank.to(inputs)
    low, high = torch.aminmax(bank)
    if not bool((low >= 0) & (high <= 1)):
        raise InputError(f"masks: expected values in [0, 1], got {float(low):.4g} to {float(high):.4g}")
    return bank


def _filling(inputs: Tensor, bank: Tensor, baseline: Tensor | float) -> Tensor:
    """The baseline as (n or 1, k or 1, ...)."""
    filling = torch.as_tensor(baseline, dtype=inputs.dtype, device=inputs.device)
    if not bool(torch.isfinite(filling).all()):
        raise InputError("baseline: expected finite values, got NaN or infinite ones")
    if filling.ndim == inputs.ndim:
        filling = filling.unsqueeze(1)
    elif filling.ndim < inputs.ndim:
        filling = filling[(None,) * (inputs.ndim + 1 - filling.ndim)]
    full = (len(inputs), bank.shape[1], *inputs.shape[1:])
    if filling.ndim != len(full) or any(b not in (1, f) for b, f in zip(filling.shape, full, strict=True)):
        raise InputError(
            f"baseline: expected a number, one sample {tuple(inputs.shape[1:])}, one per sample {tuple(inputs.shape)} "
            f"or one per copy {full}, got {tuple(torch.as_tensor(baseline).shape)}"
        )
    return filling


def _blocks(scorer: Scorer, inputs: Tensor, bank: Tensor, filling: Tensor | None, size: int) -> Tensor:
    """Scores (n, k), `size` copies a forward: whole samples while their masks fit, parts of one bank otherwise."""
    n, k = len(inputs), bank.shape[1]
    scores = inputs.new_empty(n, k)
    # One place for the copies of all tiles: fresh memory costs a CPU more than the product
    place = inputs.new_empty(min(size, n * k), *inputs.shape[1:])
    for i, j in _tiles(n, k, size):
        rows, columns = i.stop - i.start, j.stop - j.start
        copies = place[: rows * columns]
        tile, x, m = copies.view(rows, columns, *inputs.shape[1:]), inputs[i].unsqueeze(1), _part(bank, i, j)
        if filling is None:
            torch.mul(x, m, out=tile)
        else:
            torch.lerp(_part(filling, i, j), x, m, out=tile)  # exact where a mask is 0 or 1
        index = torch.arange(i.start, i.stop, device=inputs.device).repeat_interleave(columns)
        scores[i, j] = scorer(copies, index).view(rows, columns)
    return scores


def _tiles(n: int, k: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cover n samples x k masks by tiles of at most `size` copies, of nearly equal widths."""
    rows = max(1, size // k)
    columns = math.ceil(k / math.ceil(k / size))
    for i in range(0, n, rows):
        for j in range(0, k, columns):
            yield slice(i, min(i + rows, n)), slice(j, min(j + columns, k))


def _part(values: Tensor, i: slice, j: slice) -> Tensor:
    """A tile of (n or 1, k or 1, ...)."""
    return values[i if values.shape[0] > 1 else slice(None), j if values.shape[1] > 1 else slice(None)]
