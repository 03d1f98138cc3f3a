"""Samples under attack as another library sees them, and what becomes of the points that it returns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from otnn.attacks.ball import ascent
from otnn.attacks.objective import Objective, slope_of
from otnn.attacks.step import clearance, lead, look
from otnn.batches import sample_norm, spread
from otnn.errors import InputError
from otnn.explain.guards import draw_seed, seeded
from otnn.memory import MEMORY_BUDGET, chunk_size
from otnn.potential import class_scores

# Lengths of the gradient step, in first-order distances, of which the shortest that wins is the unit of a sample
_TRIES = tuple(1.05 * 2.0**k for k in range(-10, 4))
# A point that wins by less than the rounding of its scores is moved on by multiples of the share of its distance that
# lifts a linear lead from the slack of a criterion to that rounding, at most a hundredth
SLACK, _MULTIPLES, _MOST = 1e-5, (0.0, 1.1, 2.0, 4.0, 16.0), 0.01


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
    |f| / ||grad f||; 1, the size of a pixel, where none does. The cost is one backward and 15 forwards.
    """
    value, gradient = objective.gradients(images, index, objective.margin)
    size = value.abs().clamp(min=torch.finfo(images.dtype).tiny)
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
    index = torch.arange(len(inputs), device=inputs.device)
    index = index[~objective.won(objective.scores(inputs), index)]
    points = inputs.detach().clone()
    with parametrize.cached(), seeded(draw_seed(generator), inputs.device):
        size = chunk_size(inputs[:1], memory_budget, objective.model, gradient=True)
        for part in index.split(size):
            if len(part):
                points[part] = attack(part).detach().to(inputs.dtype)
    return points


def settle(objective: Objective, inputs: Tensor, points: Tensor) -> Tensor:
    """The points (n, ...) that win, moved on by a hundredth at most where rounding may undo it, else the inputs."""
    index = torch.arange(len(inputs), device=inputs.device)
    inputs = inputs.detach()
    readable = torch.isfinite(points).flatten(1).all(dim=1)
    points = torch.where(spread(readable, inputs), points, inputs)
    scores, gradient = look(objective, inputs, index, objective.margin)
    clear = clearance(scores, gradient, inputs)
    share = SLACK + clear / objective.margin(scores, index).abs()
    settled, open_ = inputs.clone(), ~objective.won(scores, index)
    for multiple in _MULTIPLES:
        if not bool(open_.any()):
            break
        further = points + spread((multiple * share).clamp(max=_MOST), points) * (points - inputs)
        further = objective.inside(further)
        _, won = lead(objective, objective.scores(further), index, clear)
        won &= open_
        settled = torch.where(spread(won, inputs), further, settled)
        open_ &= ~won
    return settled


def missing(package: str, error: ImportError) -> InputError:
    """What to do where an optional library is not installed."""
    return InputError(
        f'this attack needs the package {package}, which cannot be imported ({error}): pip install "otnn[attacks]"'
    )
