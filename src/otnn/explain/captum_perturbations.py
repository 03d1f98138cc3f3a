"""The three perturbation methods that captum has: captum's own code, with defaults that make sense.

Every function takes a `Scorer` and the samples that it was built on, and returns signed maps in their shape. LIME and
Kernel SHAP give every sample the same draws, so that its map depends on neither its batch mates nor the memory.
"""

import math

import captum.attr
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from torch import Tensor

from otnn.errors import InputError
from otnn.explain.bridge import Scoring, by_parts, check_count, part_of, whole_baseline
from otnn.explain.guards import draw_seed, seeded
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET

# Windows and superpixels along each side of a picture: 7 divides 28 and 224 pixels
_SIDE = 7


def occlusion_windows(
    inputs: Tensor, window: int | tuple[int, ...] | None, stride: int | tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Window and stride of Occlusion along each dimension of a sample, and how many windows there are.

    Raises:
        InputError: a window larger than the input, or a stride larger than the window, which would leave gaps.
    """
    spatial = tuple(inputs.shape[2:] if inputs.ndim > 2 else inputs.shape[1:])
    whole = tuple(inputs.shape[1:2]) if inputs.ndim > 2 else ()  # a window hides all channels
    side = [1 if inputs.ndim == 2 else math.ceil(s / _SIDE) for s in spatial]
    windows = _sides("window", window, spatial, side)
    strides = _sides("stride", stride, spatial, [math.ceil(w / 2) for w in windows])
    if any(w > s for w, s in zip(windows, spatial, strict=True)):
        raise InputError(f"window: expected at most the input, {spatial}, got {windows}")
    if any(t > w for t, w in zip(strides, windows, strict=True)):
        raise InputError(f"stride: expected at most the window, {windows}, so that nothing is left out, got {strides}")
    count = math.prod(math.ceil((s - w) / t) + 1 for s, w, t in zip(spatial, windows, strides, strict=True))
    return (*whole, *windows), (*whole, *strides), count


def occlusion(
    scorer: Scorer,
    inputs: Tensor,
    *,
    window: int | tuple[int, ...] | None = None,
    stride: int | tuple[int, ...] | None = None,
    baseline: Tensor | float = 0.0,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Mean drop of the score over the windows that hide a value (Zeiler and Fergus 2014); windows are cut at the edges.

    Args:
        scorer: what is explained.
        inputs: (n, channels, height, width), (n, channels, length) or (n, features).
        window: its sides; by default a seventh of the input, rounded up, and one feature of a row.
        stride: at most the window; by default half of it, rounded up.
        baseline: what hidden values become: a number or a tensor that broadcasts to the inputs.
        memory_budget: bytes of one forward.

    Returns:
        the shape of the inputs, equal in all channels.
    """
    windows, strides, count = occlusion_windows(inputs, window, stride)
    filling = whole_baseline(baseline, inputs)
    method = captum.attr.Occlusion(Scoring(scorer, inputs))

    def part(x: Tensor, index: Tensor, size: int) -> Tensor:
        return method.attribute(  # type: ignore[no-any-return]
            x,
            windows,
            strides,
            part_of(filling, index),
            additional_forward_args=(index,),
            perturbations_per_eval=max(1, min(count, size // len(x))),
        )

    return by_parts(part, scorer, inputs, memory_budget, gradient=False).to(inputs.dtype)


def superpixels(inputs: Tensor, grid: int | None = None) -> Tensor:
    """The cell of each value of a sample, numbered from 0: (1, 1, height, width), (1, 1, length) or (1, features).

    Args:
        inputs: (n, channels, height, width), (n, channels, length) or (n, features).
        grid: cells along each side, nearly equal; at most one a pixel. By default 7 for pictures, 49 for signals. Every
            feature of a row is a cell.

    Raises:
        InputError: a grid below 1 or finer than the pixels.

    Example:
        >>> superpixels(torch.rand(2, 3, 2, 4), 2)
        tensor([[[[0, 0, 1, 1],
                  [2, 2, 3, 3]]]])
    """
    if inputs.ndim == 2:
        return torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)
    spatial = tuple(inputs.shape[2:])
    if grid is None:
        sides = [min(_SIDE if len(spatial) == 2 else _SIDE**2, s) for s in spatial]
    else:
        check_count("grid", grid, 1)
        sides = [grid] * len(spatial)
        if grid > min(spatial):
            raise InputError(f"grid: expected at most {min(spatial)} cells a side for {spatial} pixels, got {grid}")
    cells = torch.zeros((), dtype=torch.long, device=inputs.device)
    for side, size in zip(sides, spatial, strict=True):
        cells = cells.unsqueeze(-1) * side + torch.arange(size, device=inputs.device) * side // size
    return cells[None, None]


def lime(
    scorer: Scorer,
    inputs: Tensor,
    *,
    samples: int = 1000,
    grid: int | None = None,
    baseline: Tensor | float = 0.0,
    kernel_width: float = 0.25,
    ridge: float = 1.0,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Coefficients of a linear model of the score in hidden superpixels (Ribeiro, Singh and Guestrin 2016).

    Kernel width and ridge regression are those of the authors' code. captum's own defaults, a flat kernel and a Lasso
    with penalty 0.01, set every coefficient to 0 where scores are of order 1.

    Args:
        scorer: what is explained.
        inputs: (n, channels, height, width), (n, channels, length) or (n, features).
        samples: masks per sample, each keeping a cell with probability 1/2.
        grid: see `superpixels`.
        baseline: what hidden values become: a number or a tensor that broadcasts to the inputs.
        kernel_width: s of the weights exp(-d^2 / (2 s^2)), d the cosine distance of the masked sample to the sample.
        ridge: penalty of the coefficients; unlike a Lasso's it scales with the scores. > 0.
        generator: source of the masks; a fixed seed without it.
        memory_budget: bytes of one forward.
    """
    check_count("samples", samples, 2)
    if not (0 < kernel_width < math.inf and 0 < ridge < math.inf):
        raise InputError(f"kernel_width, ridge: expected positive numbers, got {kernel_width} and {ridge}")
    similarity = get_exp_kernel_similarity_function("cosine", kernel_width)
    method = captum.attr.Lime(Scoring(scorer, inputs), SkLearnRidge(alpha=ridge), similarity)
    cells = superpixels(inputs, grid)
    return _surrogate(method, scorer, inputs, samples, cells, baseline, generator, memory_budget)


def kernel_shap(
    scorer: Scorer,
    inputs: Tensor,
    *,
    samples: int = 1000,
    grid: int | None = None,
    baseline: Tensor | float = 0.0,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Shapley values of superpixels by weighted regression (Lundberg and Lee 2017); arguments as `lime`.

    Raises:
        InputError: fewer samples than unknowns, or a single superpixel.
    """
    cells = superpixels(inputs, grid)
    unknowns = int(cells.max()) + 1
    if unknowns < 2:
        raise InputError("grid: Kernel SHAP shares the score among superpixels; expected at least 2, got 1")
    # both full masks and one more than the unknowns
    check_count("samples", samples, unknowns + 2)
    method = captum.attr.KernelShap(Scoring(scorer, inputs))
    return _surrogate(method, scorer, inputs, samples, cells, baseline, generator, memory_budget)


def _surrogate(
    method: captum.attr.Lime,
    scorer: Scorer,
    inputs: Tensor,
    samples: int,
    cells: Tensor,
    baseline: Tensor | float,
    generator: torch.Generator | None,
    memory_budget: float,
) -> Tensor:
    filling, seed = whole_baseline(baseline, inputs), draw_seed(generator)

    def part(x: Tensor, index: Tensor, size: int) -> Tensor:
        maps = []
        for k in range(len(x)):
            one = index[k : k + 1]
            with seeded(seed, x.device):
                maps.append(
                    method.attribute(
                        x[k : k + 1],
                        part_of(filling, one),
                        additional_forward_args=(one,),
                        feature_mask=cells,
                        n_samples=samples,
                        perturbations_per_eval=min(size, samples),
                    )
                )
        return torch.cat(maps)

    return by_parts(part, scorer, inputs, memory_budget, gradient=False).to(inputs.dtype)


def _sides(
    name: str, given: int | tuple[int, ...] | None, spatial: tuple[int, ...], usual: list[int]
) -> tuple[int, ...]:
    if given is None:
        return tuple(usual)
    sides = (given,) * len(spatial) if isinstance(given, int) else tuple(given)
    if len(sides) != len(spatial) or any(not isinstance(side, int) or side < 1 for side in sides):
        raise InputError(f"{name}: expected an integer >= 1, or one for each of {len(spatial)} dimensions, got {given}")
    return sides
