"""Samples under attack as another library sees them, and what becomes of the points that it returns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from otnn.attacks.ball import ascent
from otnn.attacks.objective import Objective, slope_of
from otnn.attacks.step import check_generator, clearance, lead, look
from otnn.batches import sample_norm, spread
from otnn.errors import InputError
from otnn.explain.guards import draw_seed, seeded
from otnn.memory import MEMORY_BUDGET, chunk_size
from otnn.potential import class_scores

# Lengths of the gradient step, in first-order distances, of which the shortest that wins is the unit of a sample
_TRIES = tuple(1.05 * 2.0**k for k in range(-10, 4))
# A point that wins by less than the rounding of its scores is moved on by multiples of the share of its distance that
# lifts a linear lead from the slack of a criterion to that rounding, at most a hundredth or four times what it takes
SLACK, _MULTIPLES, _MOST = 1e-5, (0.0, 1.1, 2.0, 4.0, 16.0), 0.01
# Of that share, so that no multiple of it overflows in half precision
_FARTHEST = 1e3


class View(nn.Module):
    """A chunk of samples as a library sees them: points u stand for the images origin + unit u.

    The scores are those of the classes, times a positive factor for each sample, which moves no boundary; in a duel,
    the two scores (-f / 2, f / 2) of the lead f of the attack, so that class 0 is what the attack leaves: this gives
    every untargeted attack a targeted form, and every cross-entropy the direction of the margin. Gradients are taken of
    the points alone: nothing accumulates in the parameters of the model.

    Args:
        objective: of the whole batch.
        index: (m,) the samples of the chunk.
        origin: (m, ...), in the dtype of the images; zeros where the library works on the images themselves.
        unit: (m, 1, ...); ones there.
        factor: (m,) of the scores.
        duel: see above.

    Attributes:
        labels: (m,) the classes that the library attacks.
    """

    def __init__(
        self,
        objective: Objective,
        index: Tensor,
        origin: Tensor,
        unit: Tensor,
        factor: Tensor,
        *,
        duel: bool,
    ) -> None:
        super().__init__()
        self.objective, self.index, self.origin, self.unit, self.duel = objective, index, origin, unit, duel
        self.factor = factor.unsqueeze(1)
        self.labels = torch.zeros_like(index) if duel else objective.labels[index]
        self.eval()

    def images(self, points: Tensor) -> Tensor:
        """The images (m, ...) of points (m, ...)."""
        return self.objective.inside(self.origin + self.unit * points.to(self.origin))

    def forward(self, points: Tensor) -> Tensor:
        """Scores (m, classes), or (m, 2) in a duel, in the dtype of the points."""
        if points.requires_grad and torch.is_grad_enabled():
            scores: Tensor = _InputGradient.apply(points, self._scores)  # type: ignore[no-untyped-call]
            return scores
        with torch.no_grad():
            return self._scores(points)

    def _scores(self, points: Tensor) -> Tensor:
        # no clamp: a library that knows the box keeps to it, and one that does not would see a zero gradient beyond
        scores = self.objective.logits(self.origin + self.unit * points.to(self.origin))
        if self.duel:
            scores = class_scores(self.objective.margin(scores, self.index).unsqueeze(1))
        return (scores * self.factor).to(points)


class _InputGradient(torch.autograd.Function):
    """A function of points whose backward reaches the points and no parameter, however often it runs."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = points.detach().requires_grad_()
            ctx.result = function(ctx.leaf)
        result: Tensor = ctx.result.detach()
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return slope_of(ctx.result, ctx.leaf, gradient), None


def as_they_are(images: Tensor) -> tuple[Tensor, Tensor]:
    """The origin and the unit of a library that works on the images themselves."""
    return torch.zeros_like(images), spread(images.new_ones(len(images)), images)


def scales(objective: Objective, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """A length for each sample and the size of its lead (m,), by which steps and constants of a library are measured.

    The length is that of the shortest gradient step that wins, among fixed shares of the first-order distance
    |f| / ||grad f||; 1, the size of a pixel, where none does. The size is |f|, and the rounding of f where that is
    more, as on the boundary itself. The cost is one backward and 15 forwards.
    """
    scores, gradient = look(objective, images, index, objective.margin)
    size = torch.maximum(objective.margin(scores, index).abs(), clearance(scores, gradient, images))
    size = size.clamp(min=torch.finfo(size.dtype).tiny)
    distance = size / sample_norm(gradient)
    direction = ascent(gradient, "l2")
    length = torch.ones_like(size)
    found = torch.zeros_like(index, dtype=torch.bool)
    for share in _TRIES:
        step = torch.where(torch.isfinite(share * distance), share * distance, 0.0)
        won = objective.won(objective.scores(objective.inside(images + spread(step, images) * direction)), index)
        length = torch.where(won & ~found & (step > 0), step, length)
        found |= won
    return length, size


def run(
    objective: Objective,
    inputs: Tensor,
    attack: Callable[[Tensor], Tensor],
    *,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """The points (n, ...) of an attack that runs on chunks of the samples not yet won; the others stay.

    Args:
        objective: of the batch.
        inputs: (n, ...).
        attack: from the samples of a chunk (m,) to its images (m, ...).
        generator: seeds the global generators that a library draws from, which are restored; a seed of 0 by default.
        memory_budget: bytes; a chunk is what one forward and backward may hold.
    """
    check_generator(generator)
    index = torch.arange(len(inputs), device=inputs.device)
    index = index[~objective.won(objective.scores(inputs), index)]
    points = inputs.detach().clone()
    with torch.enable_grad(), parametrize.cached(), seeded(draw_seed(generator), inputs.device):
        size = chunk_size(inputs[:1], memory_budget, objective.model, gradient=True)
        for part in index.split(size):
            if len(part):
                points[part] = attack(part).detach().to(inputs.dtype)
    return points


def settle(objective: Objective, inputs: Tensor, points: Tensor) -> Tensor:
    """The points (n, ...) that win, moved on where rounding may undo their lead; the inputs where nothing wins.

    A point on the boundary, or beyond it by less than its clearance, is moved on along the segment from its input until
    it leads by more; an input whose scores tie, which most libraries leave where it is, along its gradient. Where no
    such move does, the nearest of those tried that wins by the scores of the model is kept, though it may not in a
    batch of another size: what wins is never given up for the input.
    """
    index = torch.arange(len(inputs), device=inputs.device)
    inputs = inputs.detach()
    readable = torch.isfinite(points).flatten(1).all(dim=1)
    points = torch.where(spread(readable, inputs), points, inputs)
    scores, gradient = look(objective, inputs, index, objective.margin)
    clear = clearance(scores, gradient, inputs)
    behind = objective.margin(scores, index)
    tied = (behind == 0) & (points == inputs).flatten(1).all(dim=1)
    step = spread((clear / sample_norm(gradient)).nan_to_num(posinf=0.0).to(inputs), inputs) * ascent(gradient, "l2")
    points = torch.where(spread(tied, inputs), inputs + step, points)
    gain = objective.margin(objective.scores(points), index) - behind
    needs = torch.where(gain > 0, clear / gain, 0.0).clamp(max=_FARTHEST)  # of a linear lead
    settled, open_ = inputs.clone(), ~objective.won(scores, index)
    wins = torch.zeros_like(open_)
    for multiple in _MULTIPLES:
        if not bool(open_.any()):
            break
        share = torch.minimum(multiple * (SLACK + needs), (4 * needs).clamp(min=_MOST))
        further = objective.inside(points + spread(share.to(points), points) * (points - inputs))
        scores = objective.scores(further)
        _, sure = lead(objective, scores, index, clear)
        better = open_ & (sure | (objective.won(scores, index) & ~wins))
        settled = torch.where(spread(better, inputs), further, settled)
        wins |= better
        open_ &= ~sure
    return settled


def missing(package: str, error: ImportError) -> InputError:
    """What to do where an optional library is not installed."""
    return InputError(
        f'this attack needs the package {package}, which cannot be imported ({error}): pip install "otnn[attacks]"'
    )
