"""Robustness: how far must the pixels that a map names move to change the class, and the input to change the map?"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from otnn.batches import sample_norm, spread
from otnn.checks import check_images
from otnn.errors import InputError
from otnn.explain.scores import Scorer, check_scored
from otnn.memory import MEMORY_BUDGET, chunk_size
from otnn.metrics.maps import (
    Explain,
    call_size,
    check_maps,
    draw,
    explain_pixels,
    is_constant,
    pixel_ranks,
    pixel_values,
    top_count,
)
from otnn.metrics.result import MetricResult, summarise
from otnn.metrics.statistics import correlation, ranks
from otnn.potential import class_scores

SHARES = tuple(k / 100 for k in range(5, 50, 5))
# Radii tried on the way to the first change of class: the largest, and its halves down to this many
DOUBLINGS = 7
# Copies of a row that an attack holds between passes: sample, support, change, start, gradient, and those being made
_HELD = 12
_MOST = 2**34  # bytes for these, whatever the budget


def robustness_sr(
    scorer: Scorer,
    inputs: Tensor,
    attribution: Tensor,
    *,
    shares: Sequence[float] = SHARES,
    largest: float | None = None,
    bisections: int = 25,
    tolerance: float = 1e-3,
    attack_steps: int = 10,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> MetricResult:
    """Smallest L2 change of the most relevant pixels alone that changes the predicted class. Lower is better.

    The pixels are the top share by absolute attribution (norm over channels), the score is the mean over the shares.
    Each distance is the end of a bisection of PGD, which starts from the best change so far: an upper estimate, never
    below the true distance. Images may leave [0, 1], as in the bracket of theory 5.1 and 5.7. It is the class predicted
    at the sample that must change, whatever the target of the scorer. A share where nothing changes it counts as the
    largest radius tried, and a constant map has a random order; `undefined` counts the samples with either. Hsieh et
    al. (2021).

    Args:
        scorer: whose model is attacked; built on the inputs.
        inputs: (n, channels, ...) or rows (n, features).
        attribution: (n, channels or 1, ...) or (n, features).
        shares: of the pixels, in (0, 1].
        largest: the largest radius tried; by default sqrt(values per sample) / 2, half the diagonal of the pixel box.
        bisections: at most so many.
        tolerance: a bisection ends within this of the sign change.
        attack_steps: evaluations of PGD per radius.
        generator: orders ties, and draws the direction where a gradient is 0.
        memory_budget: bytes of the perturbed samples and activations of one forward and backward.

    Returns:
        Distances in input units (L2); `details`: "radius" (n, shares) and "failed" (n, shares) bool.

    Raises:
        InputError: shapes or settings that do not fit, a budget that does not hold one sample, or a model whose scores
            have no gradient.

    Example:
        >>> model = torch.nn.Linear(10, 2).eval()
        >>> x = torch.rand(3, 10)
        >>> result = robustness_sr(Scorer(model, x, 1), x, model.weight[1].expand(3, 10), shares=(0.1, 0.5))
        >>> bool((result.details["radius"][:, 1] <= result.details["radius"][:, 0]).all())
        True
    """
    check_scored(scorer, inputs)
    check_maps(attribution, inputs)
    if not shares:
        raise InputError("shares: expected at least one share of the pixels, got none")
    if bisections < 1 or attack_steps < 1:
        raise InputError(f"bisections and attack_steps: expected at least 1 each, got {bisections} and {attack_steps}")
    if not tolerance > 0:
        raise InputError(f"tolerance: expected a length > 0, got {tolerance}")
    largest = math.sqrt(inputs[0].numel()) / 2 if largest is None else largest
    if not 0 < largest < math.inf:
        raise InputError(f"largest: expected a finite radius > 0, got {largest}")
    values, finite = pixel_values(attribution, signed=False)
    place = pixel_ranks(values, generator)
    counts = torch.tensor([top_count(values.shape[1], share) for share in shares], device=inputs.device)
    noise = draw(tuple(inputs.shape[1:]), inputs, generator, normal=True)
    # Half of the budget for a pass; half for what is under attack, so that passes stay full while rows are done
    size = max(1, chunk_size(inputs[:1], memory_budget, scorer.model, gradient=True) // 2)
    rows = max(size, int(min(memory_budget, _MOST) / 2 // (_HELD * inputs[0].numel() * inputs.element_size())))
    levels = len(shares)
    parts, passes = [], 0
    with torch.inference_mode(False), parametrize.cached():
        for row in torch.arange(len(inputs) * levels, device=inputs.device).split(rows):
            sample, level = row // levels, row % levels
            support = place[sample] < counts[level].unsqueeze(1)
            support = support.unsqueeze(1) if inputs.ndim > 2 else support
            support = support.view(len(row), -1, *inputs.shape[2:])
            attack = _Attack(scorer, inputs[sample], support, noise, attack_steps, size)
            parts.append(attack.smallest(largest, bisections, tolerance))
            passes += attack.passes
    radius = torch.cat(parts).view(-1, levels)
    # A change of fewer pixels is one of more pixels too
    smaller = counts.unsqueeze(1) <= counts
    radius = torch.where(smaller, radius.unsqueeze(2), torch.inf).amin(dim=1)
    failed = radius.isinf()
    radius = torch.where(failed, largest, radius)
    return summarise(
        "robustness_sr",
        torch.where(finite, radius.mean(dim=1), torch.nan),
        "down",
        signed=False,
        undefined=failed.any(dim=1) | is_constant(values) | ~finite,
        counted_as=f"the largest radius tried, {largest:.4g}, where no change was found; pixels at random of a "
        "constant map; a map that is not finite is left out",
        forwards=passes,
        backwards=passes - len(inputs) * levels,
        details={"radius": radius, "failed": failed},
        settings={
            "shares": list(shares),
            "largest": largest,
            "bisections": bisections,
            "tolerance": tolerance,
            "attack_steps": attack_steps,
        },
    )


class _Attack:
    """PGD in the L2 ball of a radius, on some values of each row, against the class predicted at the row.

    Args:
        scorer: its model is attacked.
        inputs: (rows, ...).
        support: (rows, ...), the values that may change; broadcast to the inputs.
        noise: (...) a direction for rows without a gradient.
        steps: evaluations per radius.
        size: rows of one pass.
    """

    def __init__(self, scorer: Scorer, inputs: Tensor, support: Tensor, noise: Tensor, steps: int, size: int) -> None:
        self.model, self.inputs, self.support, self.noise, self.steps = scorer.model, inputs, support, noise, steps
        self.size = size
        self.passes = len(inputs)
        with torch.no_grad():
            self.own = torch.cat([self._class_scores(part).argmax(dim=1) for part in inputs.split(size)])

    def smallest(self, largest: float, bisections: int, tolerance: float) -> Tensor:
        """Upper estimates (rows,) of the distance to another class; infinite where none was found.

        Every row is at its own radius and step, so that all that are open share each pass.
        """
        row = torch.arange(len(self.inputs), device=self.inputs.device)
        margin, gradient = self._margin(torch.zeros_like(self.inputs), row)
        slope = sample_norm(gradient)
        start = -self._direction(gradient, row)
        # The distance if the margin were linear; what is far less than the largest radius is found on the way there
        radius = (margin / torch.where(slope > 0, slope, 1.0)).clamp(largest / 2 ** (DOUBLINGS - 1), largest)
        low = torch.zeros_like(radius)
        high = torch.where(margin <= 0, 0.0, torch.inf).to(radius)  # a tie needs no change
        taken, halved = torch.zeros_like(row), torch.zeros_like(row)
        change = spread(radius, start) * start
        open_ = row[margin > 0]
        while len(open_):
            margin, gradient = self._margin(change[open_], open_)
            taken[open_] += 1
            hit, spent = margin < 0, taken[open_] == self.steps
            going = ~(hit | spent)
            change[open_[going]] = self._step(change, gradient[going], radius, open_[going])
            found, missed, settled = open_[hit], open_[spent & ~hit], open_[~going]
            norm = sample_norm(change[found])
            high[found] = torch.minimum(high[found], norm)
            start[found] = change[found] / spread(norm, change)
            low[missed] = radius[missed]
            # A change within a radius that had failed before begins a new search below it
            low[settled] = torch.where(low[settled] < high[settled], low[settled], 0.0)
            done = torch.zeros_like(hit)
            known = high[settled].isfinite()
            done[~going] = torch.where(
                known,
                (high[settled] - low[settled] <= tolerance) | (halved[settled] == bisections),
                radius[settled] >= largest,
            )
            halved[settled] += known.to(halved)
            next_radius = torch.where(known, (low[settled] + high[settled]) / 2, 2 * radius[settled])
            radius[settled] = next_radius.clamp(max=largest)
            change[settled] = spread(radius[settled], change) * start[settled]
            taken[settled] = 0
            open_ = open_[~done]
        return high

    def _step(self, change: Tensor, gradient: Tensor, radius: Tensor, row: Tensor) -> Tensor:
        """One step of PGD down the margin, inside the ball."""
        length = radius[row]
        moved = change[row] - spread(2 * length / self.steps, change) * self._direction(gradient, row)
        shrink = (length / sample_norm(moved).clamp(min=torch.finfo(moved.dtype).tiny)).clamp(max=1)
        return moved * spread(shrink, moved)

    def _margin(self, change: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Score of the own class above the best other one (rows,), and its gradient on the support (rows, ...)."""
        self.passes += len(row)
        margins, gradients = [], []
        for part, of in zip(change.split(self.size), row.split(self.size), strict=True):
            with torch.enable_grad():
                moved = (self.inputs[of] + part).detach().requires_grad_()
                scores = self._class_scores(moved)
                own = self.own[of].unsqueeze(1)
                other = scores.scatter(1, own, -torch.inf).amax(dim=1)
                margin = scores.gather(1, own).squeeze(1) - other
                gradient = (
                    torch.autograd.grad(margin.sum(), moved, allow_unused=True)[0] if margin.requires_grad else None
                )
            if gradient is None:
                raise InputError("model: its scores have no gradient with respect to its inputs, which PGD follows")
            gradients.append(gradient * self.support[of])
            margins.append(margin.detach())
        return torch.cat(margins), torch.cat(gradients)

    def _direction(self, gradient: Tensor, row: Tensor) -> Tensor:
        """Unit gradients; where there is none, the noise on the support."""
        norm = sample_norm(gradient)
        lost = ~(norm > 0)
        if bool(lost.any()):
            gradient = torch.where(spread(lost, gradient), self.noise * self.support[row], gradient)
            norm = sample_norm(gradient)
        return gradient / spread(norm, gradient)

    def _class_scores(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.model(inputs)
        return class_scores(outputs.unsqueeze(1) if outputs.ndim == 1 else outputs)


def e_robustness(
    explain: Explain,
    inputs: Tensor,
    *,
    directions: int = 10,
    largest: float = 1.0,
    bisections: int = 10,
    threshold: float = 0.1,
    forwards_per_map: int = 1,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> MetricResult:
    """Radius of the largest L2 ball found in which the map stays the same. Higher is better.

    The map stays where 1 - Spearman of the signed map with that of the sample is below the threshold, in all of some
    random directions, which all samples share; the radius is bisected. No source defines this metric fully: this is our
    reading. Only what is tried is known, so it estimates the ball from above. A constant map has no ranks: the sample
    is left out and told in `undefined`; a neighbour's constant map counts as another one.

    Args:
        explain: function of perturbed inputs (m, ...) and of the samples `index` (m,) that they came from, to maps.
        inputs: (n, ...) the samples.
        directions: how many.
        largest: radius tried first; what stays at it has it, and is told in `details["censored"]`.
        bisections: they end within largest / 2^bisections.
        threshold: of 1 - Spearman.
        forwards_per_map: what one map costs, to report the forwards.
        generator: draws the directions.
        memory_budget: bytes of the perturbed samples of one call of `explain`, which 256 never exceed.

    Returns:
        Radii in input units (L2), in [0, largest].

    Raises:
        InputError: maps or settings that do not fit.

    Example:
        >>> e_robustness(lambda x, index: x, torch.rand(2, 1, 5, 5), directions=3).direction
        'up'
    """
    check_images(inputs)
    if directions < 1 or bisections < 1:
        raise InputError(f"directions and bisections: expected at least 1 each, got {directions} and {bisections}")
    if not 0 < largest < math.inf:
        raise InputError(f"largest: expected a finite radius > 0, got {largest}")
    if not threshold > 0:
        raise InputError(f"threshold: expected a number > 0, got {threshold}")
    n, size = len(inputs), call_size(inputs, memory_budget)
    index = torch.arange(n, device=inputs.device)
    own, finite = _explain_all(explain, inputs, index, size)
    undefined, own_ranks = is_constant(own) | ~finite, ranks(own)
    towards = draw((directions, *inputs.shape[1:]), inputs, generator, normal=True)
    towards = towards / spread(sample_norm(towards), towards)

    def stays(radius: Tensor, rows: Tensor) -> Tensor:
        """Whether the maps of samples `rows` stay at their radii, in all directions."""
        sample = rows.repeat_interleave(directions)
        direction = torch.arange(directions, device=rows.device).repeat(len(rows))
        distance = []
        for s, d in zip(sample.split(size), direction.split(size), strict=True):
            moved = inputs[s] + spread(radius[s], inputs) * towards[d]
            maps, known = explain_pixels(explain, moved, s, "explain")
            distance.append(torch.where(known, 1 - correlation(own_ranks[s], ranks(maps)), torch.nan))
        return (torch.cat(distance).view(-1, directions) < threshold).all(dim=1)

    maps = n
    radius = inputs.new_full((n,), largest)
    open_ = index[~undefined]
    low, high = torch.zeros_like(radius), radius.clone()
    if len(open_):
        kept = stays(radius, open_)
        maps += len(open_) * directions
        low[open_[kept]] = largest
        open_ = open_[~kept]
    for _ in range(bisections if len(open_) else 0):
        radius = (low + high) / 2
        kept = stays(radius, open_)
        maps += len(open_) * directions
        low[open_[kept]] = radius[open_[kept]]
        high[open_[~kept]] = radius[open_[~kept]]
    return summarise(
        "e_robustness",
        torch.where(undefined, torch.nan, low),
        "up",
        signed=True,
        undefined=undefined,
        counted_as="left out",
        forwards=maps * forwards_per_map,
        maps=maps,
        details={"censored": (low == largest) & ~undefined},
        settings={
            "directions": directions,
            "largest": largest,
            "bisections": bisections,
            "threshold": threshold,
        },
    )


def _explain_all(explain: Explain, inputs: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    parts = [explain_pixels(explain, inputs[i], i, "explain") for i in index.split(size)]
    return torch.cat([values for values, _ in parts]), torch.cat([finite for _, finite in parts])
