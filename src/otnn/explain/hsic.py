"""HSIC: how much the score depends on whether a cell is shown, by the Hilbert-Schmidt independence criterion."""

import math

import numpy as np
import torch
from torch import Tensor

from otnn.explain.bridge import check_count
from otnn.explain.masking import cell_grid, cell_map, cell_scores, uniform
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET

# Kernel entries at a time on a CPU: more do not fit its cache
_ENTRIES = 2**18


@torch.no_grad()
def hsic(
    scorer: Scorer,
    inputs: Tensor,
    *,
    samples: int = 500,
    grid: int = 8,
    baseline: Tensor | float = 0.0,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Dependence of the score on each cell of random binary masks (Novello, Fel and Vigouroux 2022).

    Cells are kept with probability 1/2. The index of a cell is tr(K H L H) / (N - 1)^2 over N masks (Gretton et al.
    2005): H = I - 1/N centres; K, the kernel of the cell, is 1/2 - (m - m')^2; L, that of the score, is
    exp(-(y - y')^2 / (2 s^2)), s the median of the distances |y - y'| of all pairs (the lower one of two; their mean
    if the median is 0). Indices are >= 0: they tell that a cell matters, not in which direction. A score that no mask
    changes has the map 0. A cell that does not matter keeps, from chance, an index of order 1 / N.

    Args:
        scorer: what is explained; built on the same samples.
        inputs: (n, channels, height, width) images, (n, channels, length) signals, or (n, features) rows with one cell
            a feature.
        samples: masks N >= 2, the forwards for each sample.
        grid: cells a side; rows ignore it.
        baseline: what hidden values become: a number, one sample, or one per sample.
        generator: of the masks; the global one by default.
        memory_budget: bytes for masks, copies and activations of one forward.

    Returns:
        (n, 1, height, width), (n, 1, length) or (n, features): without unit, interpolated linearly between the centres
        of the cells.

    Raises:
        InputError: settings or inputs that cannot be used, or a budget that does not hold one masked sample.

    Example:
        >>> row = torch.nn.Linear(3, 2).eval()
        >>> _ = row.weight.data.copy_(torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]]))
        >>> x = torch.ones(1, 3)
        >>> hsic(Scorer(row, x, 0), x, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
        tensor([[1, 0, 2]])
    """
    shape = cell_grid(inputs, grid)
    check_count("samples", samples, 2)
    cells = (uniform((samples, math.prod(shape)), generator, inputs) < 0.5).to(inputs.dtype)
    scores = cell_scores(scorer, inputs, cells.view(-1, *shape), baseline, memory_budget=memory_budget)
    entries = memory_budget / (4 * scores.element_size())
    rows = max(1, int(min(entries, _ENTRIES if scores.is_cpu else 2**28) // samples**2))
    return cell_map(torch.cat([dependence(part, cells) for part in scores.split(rows)]), inputs, shape)


def dependence(scores: Tensor, cells: Tensor) -> Tensor:
    """tr(K H L H) / (N - 1)^2 of scores (n, N) with each binary cell of (N, d): (n, d).

    With signs e = 2 m - 1 the kernel 1/2 - (m - m')^2 is e e^T / 2, of rank one: the trace is a quadratic form of H e.
    """
    kernel = (scores.unsqueeze(1) - scores.unsqueeze(2)).abs_()
    scale = -0.5 / _bandwidth(kernel).square()
    kernel.square_().mul_(scale.view(-1, 1, 1)).exp_()
    signs = 2 * cells - 1
    signs = signs - signs.mean(dim=0)
    return ((kernel @ signs) * signs).sum(dim=1) / (2 * (len(cells) - 1) ** 2)


def _bandwidth(distances: Tensor) -> Tensor:
    """The median over pairs i < j of (n, N, N) distances; their mean where it is 0, and 1 where that is 0 too."""
    count = distances.shape[1]
    pairs = count * (count - 1) // 2
    # Sorted, the matrix is its diagonal of zeros and then every pair twice
    rank = count + 2 * ((pairs - 1) // 2)
    flat = distances.flatten(1)
    if flat.is_cpu:  # eight times as fast as torch's selection
        middle = torch.from_numpy(np.partition(flat.numpy(), rank, axis=1)[:, rank])
    else:
        middle = flat.kthvalue(rank + 1, dim=1).values
    if bool((middle > 0).all()):
        return middle
    width = torch.where(middle > 0, middle, flat.sum(dim=1) / (2 * pairs))
    return torch.where(width > 0, width, 1.0)
