"""Sobol: the share of the score's variance under random masks in which a cell has a part."""

import math

import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.explain.bridge import check_count
from otnn.explain.masking import cell_grid, cell_map, cell_scores
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET

# Features whose designs are held at once
_PART = 64


@torch.no_grad()
def sobol(
    scorer: Scorer,
    inputs: Tensor,
    *,
    samples: int = 32,
    grid: int = 8,
    baseline: Tensor | float = 0.0,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Total Sobol indices of the cells of a mask (Fel et al. 2021), by the estimator of Jansen (1999).

    Masks are points in [0, 1]^d, d cells, from one scrambled Sobol sequence in 2 d dimensions (quasi-Monte Carlo): its
    halves are the designs A and B, and C_i is A with cell i from B. The total index of cell i is
    sum_j (f(A_j) - f(C_ij))^2 / (2 N V), V the variance of f over A and B. Indices are >= 0; of an additive score they
    sum to 1, and interactions count in every cell that takes part. A score that no mask changes has the map 0.

    Args:
        scorer: what is explained; built on the same samples.
        inputs: (n, channels, height, width) images, (n, channels, length) signals, or (n, features) rows with one cell
            a feature.
        samples: N >= 2, best a power of two; the forwards for each sample are N (d + 2): 2,112 by default.
        grid: cells a side, d = grid^2 for images and grid for signals; rows ignore it.
        baseline: what hidden values become: a number, one sample, or one per sample.
        generator: of the scrambling; the global one by default.
        memory_budget: bytes for masks, copies and activations of one forward.

    Returns:
        (n, 1, height, width), (n, 1, length) or (n, features): shares of variance without unit, interpolated linearly
        between the centres of the cells.

    Raises:
        InputError: settings or inputs that cannot be used, or a budget that does not hold one masked sample.

    Example:
        >>> row = torch.nn.Linear(3, 2).eval()
        >>> _ = row.weight.data.copy_(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
        >>> x = torch.ones(1, 3)
        >>> sobol(Scorer(row, x, 0), x, samples=1024).round(decimals=2)  # 9 / 25, 16 / 25 and 0
        tensor([[0.3600, 0.6400, 0.0000]])
    """
    shape = cell_grid(inputs, grid)
    check_count("samples", samples, 2)
    own, other = designs(inputs, samples, math.prod(shape), generator)

    def scores(cells: Tensor) -> Tensor:
        return cell_scores(scorer, inputs, cells.view(-1, *shape), baseline, memory_budget=memory_budget)

    at_own, at_other = scores(torch.cat([own, other])).split(samples, dim=1)
    indices = [
        jansen(at_own, at_other, scores(swapped(own, other, part)).view(len(inputs), -1, samples))
        for part in torch.arange(math.prod(shape), device=inputs.device).split(_PART)
    ]
    return cell_map(torch.cat(indices, dim=1), inputs, shape)


def designs(inputs: Tensor, samples: int, cells: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The designs A and B, both (samples, cells): the halves of one scrambled Sobol sequence."""
    if 2 * cells > torch.quasirandom.SobolEngine.MAXDIM:
        raise InputError(
            f"inputs: expected at most {torch.quasirandom.SobolEngine.MAXDIM // 2} cells, which the Sobol sequence "
            f"covers, got {cells}; take a coarser grid"
        )
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31, (), generator=generator, device=device))
    points = torch.quasirandom.SobolEngine(2 * cells, scramble=True, seed=seed).draw(samples, dtype=torch.float64)
    own, other = points.to(inputs).chunk(2, dim=1)
    return own, other


def swapped(own: Tensor, other: Tensor, part: Tensor) -> Tensor:
    """The designs C_i of the cells `part`: A with cell i from B. (cells of the part * samples, cells)."""
    crossed = own.repeat(len(part), 1, 1)
    crossed[torch.arange(len(part), device=own.device), :, part] = other[:, part].T
    return crossed.flatten(0, 1)


def jansen(at_own: Tensor, at_other: Tensor, at_swapped: Tensor) -> Tensor:
    """Total indices (n, cells) from the scores of A (n, N), B (n, N) and C (n, cells, N); 0 where f does not vary."""
    both = torch.cat([at_own, at_other], dim=1)
    variance = both.var(dim=1, keepdim=True)
    rounding = (8 * torch.finfo(both.dtype).eps * both.abs().amax(dim=1, keepdim=True)) ** 2
    unexplained = (at_own.unsqueeze(1) - at_swapped).square().mean(dim=2) / 2
    return torch.where(variance > rounding, unexplained / variance.clamp(min=torch.finfo(both.dtype).tiny), 0.0)
