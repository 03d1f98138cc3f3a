"""Fidelity: does the score follow what the map says when pixels are removed or inserted?"""

from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.explain.masking import cell_grid, cell_scores, masked_scores, upsample
from otnn.explain.scores import Scorer, check_scored
from otnn.memory import MEMORY_BUDGET, chunk_size
from otnn.metrics.maps import check_maps, draw, is_constant, part_of, pixel_ranks, pixel_values
from otnn.metrics.result import Curves, Direction, MetricResult, summarise
from otnn.metrics.statistics import correlation, ranks


def deletion(
    scorer: Scorer,
    inputs: Tensor,
    attribution: Tensor,
    *,
    steps: int = 10,
    baseline: Tensor | float = 0.0,
    signed: bool = True,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> MetricResult:
    """Area under the score while pixels are removed, the highest attributions first. Lower is better.

    All channels of a pixel go together. The area is by trapezoids over the share of removed pixels, from 0 to 1, in the
    unit of the score; `curves.normalised` and `details["normalised"]`, its area, compare across models. A constant map
    has a random order; it counts as that and is told in `undefined`. Petsiuk, Das and Saenko (2018).

    Args:
        scorer: what is scored; built on the inputs.
        inputs: (n, channels, ...) or rows (n, features).
        attribution: (n, channels or 1, ...) or (n, features).
        steps: removals; at most one per pixel.
        baseline: what removed pixels become: a number, one sample (...), or one per sample (n, ...).
        signed: order by the signed channel mean; False orders by the absolute value (norm over channels).
        generator: orders ties.
        memory_budget: bytes of the masked samples and activations of one forward.

    Raises:
        InputError: shapes that do not fit, or a budget that does not hold one sample.

    Example:
        >>> model = torch.nn.Linear(4, 2, bias=False).eval()
        >>> x = torch.rand(3, 4)
        >>> target = torch.tensor([0, 1, 1])
        >>> result = deletion(Scorer(model, x, target), x, model.weight.detach()[target] * x)
        >>> result.curves.raw.shape, result.direction
        (torch.Size([3, 5]), 'down')
    """
    return _area("deletion", "down", scorer, inputs, attribution, steps, baseline, signed, generator, memory_budget)


def insertion(
    scorer: Scorer,
    inputs: Tensor,
    attribution: Tensor,
    *,
    steps: int = 10,
    baseline: Tensor | float = 0.0,
    signed: bool = True,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> MetricResult:
    """Area under the score while pixels are put back on the baseline, the highest attributions first. Higher is better.

    As `deletion`, the other way round. Petsiuk, Das and Saenko (2018).

    Args:
        scorer: what is scored; built on the inputs.
        inputs: (n, channels, ...) or rows (n, features).
        attribution: (n, channels or 1, ...) or (n, features).
        steps: insertions; at most one per pixel.
        baseline: what pixels are before they are inserted: a number, one sample (...), or one per sample (n, ...).
        signed: order by the signed channel mean; False orders by the absolute value (norm over channels).
        generator: orders ties.
        memory_budget: bytes of the masked samples and activations of one forward.

    Raises:
        InputError: shapes that do not fit, or a budget that does not hold one sample.

    Example:
        >>> x = torch.rand(3, 4)
        >>> scorer = Scorer(torch.nn.Linear(4, 2).eval(), x, 1)
        >>> insertion(scorer, x, x).curves.shares
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])
    """
    return _area("insertion", "up", scorer, inputs, attribution, steps, baseline, signed, generator, memory_budget)


def _area(
    name: str,
    direction: Direction,
    scorer: Scorer,
    inputs: Tensor,
    attribution: Tensor,
    steps: int,
    baseline: Tensor | float,
    signed: bool,
    generator: torch.Generator | None,
    memory_budget: float,
) -> MetricResult:
    check_scored(scorer, inputs)
    check_maps(attribution, inputs)
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    values, finite = pixel_values(attribution, signed=signed)
    place = pixel_ranks(values, generator)
    n, pixels = values.shape
    steps = min(steps, pixels)
    counts = torch.tensor([(2 * s * pixels + steps) // (2 * steps) for s in range(steps + 1)], device=inputs.device)
    shares = (counts.double() / pixels).to(inputs.dtype)
    spatial = (1, *inputs.shape[2:]) if inputs.ndim > 2 else tuple(inputs.shape[1:])
    # The masks of a forward are counted in the size of a chunk: no more are made at a time
    rows = max(1, chunk_size(inputs[:1], memory_budget, scorer.model) // (steps + 1))
    raw = []
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        gone = place[part].unsqueeze(1) < counts.view(-1, 1)
        masks = (gone if name == "insertion" else ~gone).to(inputs.dtype).view(-1, steps + 1, *spatial)
        own = isinstance(baseline, Tensor) and baseline.shape == inputs.shape
        filling = baseline[part] if isinstance(baseline, Tensor) and own else baseline
        raw.append(masked_scores(part_of(scorer, part), inputs[part], masks, filling, memory_budget=memory_budget))
    scores = torch.cat(raw)
    curves = _curves(shares, scores, _ceiling(inputs, baseline, place, counts, name), name)
    area = torch.trapezoid(scores.double(), shares.double())
    return summarise(
        name,
        torch.where(finite, area, torch.nan),
        direction,
        signed=signed,
        undefined=is_constant(values),
        counted_as="a random order of the pixels; a map that is not finite is left out",
        forwards=n * (steps + 1),
        curves=curves,
        details={"normalised": torch.trapezoid(curves.normalised.double(), shares.double())},
        settings={"steps": steps, "baseline": _told(baseline)},
    )


def _curves(shares: Tensor, scores: Tensor, ceiling: Tensor, name: str) -> Curves:
    whole, base = (scores[:, :1], scores[:, -1:]) if name == "deletion" else (scores[:, -1:], scores[:, :1])
    span = whole - base
    normalised = torch.where(span > 0, (scores - base) / torch.where(span > 0, span, 1.0), torch.nan)
    return Curves(shares, scores, normalised, ceiling)


def _ceiling(inputs: Tensor, baseline: Tensor | float, place: Tensor, counts: Tensor, name: str) -> Tensor:
    """||x - x_masked|| of each step: (n, steps + 1)."""
    change = (inputs - torch.as_tensor(baseline).to(inputs)).double().square()
    change = change.flatten(2).sum(dim=1) if inputs.ndim > 2 else change
    ordered = torch.zeros_like(change).scatter_(1, place, change)
    if name == "insertion":  # what is still missing
        ordered, counts = ordered.flip(1), place.shape[1] - counts
    removed = torch.nn.functional.pad(ordered.cumsum(dim=1), (1, 0))
    return removed[:, counts].sqrt().to(inputs.dtype)


@overload
def mu_fidelity(
    scorer: Scorer,
    inputs: Tensor,
    attributions: Tensor,
    *,
    grid: int = ...,
    subset: float = ...,
    samples: int = ...,
    baseline: Tensor | float | str = ...,
    signed: bool = ...,
    generator: torch.Generator | None = ...,
    memory_budget: float = ...,
) -> MetricResult: ...


@overload
def mu_fidelity(
    scorer: Scorer,
    inputs: Tensor,
    attributions: Mapping[str, Tensor],
    *,
    grid: int = ...,
    subset: float = ...,
    samples: int = ...,
    baseline: Tensor | float | str = ...,
    signed: bool = ...,
    generator: torch.Generator | None = ...,
    memory_budget: float = ...,
) -> dict[str, MetricResult]: ...


def mu_fidelity(
    scorer: Scorer,
    inputs: Tensor,
    attributions: Mapping[str, Tensor] | Tensor,
    *,
    grid: int = 9,
    subset: float = 0.2,
    samples: int = 200,
    baseline: Tensor | float | str = 0.0,
    signed: bool = True,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> MetricResult | dict[str, MetricResult]:
    """Spearman correlation of the attribution of hidden cells with the drop of the score. In [-1, 1], higher is better.

    Of `samples` masks each hides every cell of a grid with probability `subset`. The masks and their forwards do not
    depend on the attribution: one bank serves all samples and all methods. A constant map, whose sums only count the
    hidden pixels, counts as 0, and so does a correlation that is not defined; `undefined` tells how many.
    Bhatt, Weller and Moura (2020).

    Args:
        scorer: what is scored; built on the inputs.
        inputs: (n, channels, height, width), (n, channels, length) or rows (n, features), whose cells are the features.
        attributions: (n, channels or 1, ...) or (n, features), or such maps of several methods by name.
        grid: cells a side; no finer than the pixels.
        subset: probability that a cell is hidden.
        samples: masks.
        baseline: what hidden pixels become: a number, one sample (...), one per sample (n, ...), or "uniform", one
            picture of uniform noise in [0, 1) for all samples and masks.
        signed: sum the signed channel mean; False sums the absolute values (norm over channels).
        generator: draws the masks, then the noise.
        memory_budget: bytes of the masked samples and activations of one forward.

    Returns:
        One result, or one per name; `forwards` is that of the shared bank in each.

    Raises:
        InputError: shapes or settings that do not fit, or a budget that does not hold one sample.

    Example:
        >>> model = torch.nn.Linear(4, 2, bias=False).eval()
        >>> x = torch.rand(3, 4)
        >>> result = mu_fidelity(Scorer(model, x, 1), x, model.weight[1] * x)
        >>> round(result.mean, 3), result.forwards
        (1.0, 600)
    """
    check_scored(scorer, inputs)
    named = {"": attributions} if isinstance(attributions, Tensor) else dict(attributions)
    if not named:
        raise InputError("attributions: expected at least one method, got none")
    for name, maps in named.items():
        check_maps(maps, inputs, f"attribution {name}".rstrip())
    if not 0 < subset < 1:
        raise InputError(f"subset: expected a probability in (0, 1), got {subset}")
    if samples < 2:
        raise InputError(f"samples: expected at least 2 masks, got {samples}")
    if inputs.ndim > 2:
        grid = min(grid, *inputs.shape[2:])
    shape = cell_grid(inputs, grid)
    hidden = (draw((samples, *shape), inputs, generator) < subset).to(inputs.dtype)
    told = _told(baseline)
    if isinstance(baseline, str):
        if baseline != "uniform":
            raise InputError(f'baseline: expected a number, a tensor or "uniform", got {baseline!r}')
        baseline = draw(tuple(inputs.shape[1:]), inputs, generator)
    scores = cell_scores(scorer, inputs, 1 - hidden, baseline, memory_budget=memory_budget)
    cell_of = _cell_of(inputs, shape)
    sums, telling = [], []
    for maps in named.values():
        values, finite = pixel_values(maps, signed=signed)
        cells = values.new_zeros(len(inputs), hidden[0].numel(), dtype=torch.float64)
        sums.append(cells.index_add_(1, cell_of, values.double()))
        telling.append(finite & ~is_constant(values))
    drops = ranks(-scores)  # f(x) is the same for all masks of a sample: ranks need not know it
    attributed = torch.stack(sums) @ hidden.flatten(1).double().T
    # Equal sums of different cells differ by rounding only: such a map must not be ranked by it
    scale = torch.stack(sums).abs().sum(dim=-1, keepdim=True)
    attributed = torch.where(scale > 0, attributed / torch.where(scale > 0, scale, 1.0), 0.0).mul(2**40).round()
    values = correlation(ranks(attributed), drops)
    results = {}
    for name, value, told_apart in zip(named, values, telling, strict=True):
        undefined = value.isnan() | ~told_apart
        results[name] = summarise(
            "mu_fidelity",
            torch.where(undefined, 0.0, value),
            "up",
            signed=signed,
            undefined=undefined,
            counted_as="0",
            forwards=scores.numel(),
            settings={"grid": grid, "subset": subset, "samples": samples, "baseline": told},
        )
    return results[""] if isinstance(attributions, Tensor) else results


def _cell_of(inputs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The cell of each pixel, (pixels,), as the engine's nearest upsampling spreads cells."""
    count = torch.Size(shape).numel()
    cells = torch.arange(count, device=inputs.device, dtype=torch.float32)
    if inputs.ndim == 2:
        return cells.long()
    return upsample(cells.view(1, *shape), tuple(inputs.shape[2:])).flatten().long()


def _told(baseline: Tensor | float | str) -> float | str:
    return "given" if isinstance(baseline, Tensor) else baseline
