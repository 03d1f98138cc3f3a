"""The nearest adversarial point: over the boundary, back to it, and along it to where it is nearest."""

import torch
from torch import Tensor, nn

from otnn.attacks.ball import ascent, project
from otnn.attacks.objective import Objective, check_norm, distances
from otnn.attacks.step import check_count, check_generator, clearance, lead, look
from otnn.batches import spread
from otnn.explain.rays import refine
from otnn.memory import MEMORY_BUDGET

# So many leading rivals are compared by their first-order distance
_RIVALS = 9
# A first-order step goes so much further than to the boundary
_BEYOND = 1e-3
# A move along the boundary must bring it nearer by this share; its length is a share of the distance, cut at failure
_NEARER, _LONG, _SHORT, _CUT = 5e-4, 4.0, 5e-3, 3
# From this share on no length seems to do: the direction is turned once, and the share starts again
_TURN, _AGAIN = 0.02, 0.3
# A later start goes on if its first distance is at most so many times the least of the earlier ones
_WORTH = 1.2
# Resolution of a crossing, a share of the distance, and lengths tried for it: of each move, and at the end
_COARSE, _FINE = (1e-3, 3), (1e-6, 40)


def minimal_norm(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    iterations: int = 30,
    starts: int = 3,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """The nearest point that is classified otherwise, found by gradients at the boundary.

    1. Over the boundary: steps x + (c - m(x)) u / <grad m, u>, with m the margin against one rival, u the direction
       that raises m most in the norm, and c the least lead that counts, each with a new gradient (DeepFool).
    2. Back to it: the segment to the input is searched for the crossing.
    3. Along it: at a boundary point b at the distance r, with u(b) the direction that raises the margin there,
       P(b + a r u(b)) is tried, P the projection on the ball of radius r (1 - 5e-4) and on the box. Where that is
       adversarial, the segment is searched again from there; where not, a is cut to a third. For large a, it is the
       projection of the input on the linearised boundary. Where no a will do, b may lie at a kink: u is turned once to
       the mean of the gradients at b and at the last try. What no such move brings nearer meets, to first order, the
       condition of a nearest point: b - x is parallel to the gradient in L2, apart from the values at a wall.

    Several rivals are tried, all in one batch: those with the smallest m / ||grad m|| of the nine that lead. After
    step 2, a rival whose crossing is over 1.2 times as far as that of one before it is dropped; the nearest point is
    kept. The crossings of step 3 are searched to 1e-3 of the length, by three forwards at most, and those kept to 1e-6.
    It is a local minimum, and its distance an upper bound. On a linear model it is the nearest point to
    1e-3, if the nearest class is one of the rivals tried: always, of up to ten classes and without the box.

    The least lead that counts is 32 roundings of the scores, or of the terms of <grad m, x>, so that a point wins in a
    batch of any size. Larger terms that a network cancels inside are not seen by it: their rounding may take the lead.

    Backwards: one, one for each rival compared, then at most 3 iterations for each start; on dense networks of three
    layers and ten classes 25 to 45 in all, with 75 to 140 forwards.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        norm: "l2" or "linf".
        targeted: whether the labels are targets; there is one start then, and so with two classes.
        loss: "margin", or "cross_entropy", whose gradient gives the directions u in place of the margin's; there is one
            start then, and one more backward in each step over the boundary. Several classes make it inexact.
        box: stay in [0, 1].
        iterations: of steps over the boundary, and again of moves along it, for each start, >= 1.
        starts: rivals that are tried, >= 1.
        generator: not needed: nothing is drawn.
        memory_budget: bytes that the activations of one pass may take; the inputs are held once more for each start.

    Returns:
        (n, ...) points. An input that is misclassified already (or predicted as the target) stays where it is, and so
        does one for which nothing was found.

    Raises:
        InputError: what cannot be attacked, or settings out of range.

    Source: step 1 is Moosavi-Dezfooli, Fawzi and Frossard 2016, algorithm 2, with the rivals one by one.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> minimal_norm(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
        tensor([[ 0.0800, -0.0600]])
    """
    check_norm(norm)
    check_count("iterations", iterations)
    check_count("starts", starts)
    check_generator(generator)
    objective = Objective(model, inputs, labels, targeted=targeted, loss=loss, box=box, memory_budget=memory_budget)
    inputs = inputs.detach()
    index = torch.arange(len(inputs), device=inputs.device)
    scores, gradient = look(objective, inputs, index, objective.margin)
    clear = clearance(scores, gradient, inputs)
    index = index[~objective.won(scores, index)]
    best = inputs.clone()
    if not len(index):
        return best
    rivals = _rivals(objective, inputs, scores, index, norm, starts)
    every = index.repeat(len(rivals))
    batch = _Starts(objective, norm, inputs[every], every, rivals, clear, scores[every])
    points, away = _approach(batch, *_cross(batch, iterations), iterations)
    nearest = away.view(rivals.shape).argmin(dim=0) * len(index) + torch.arange(len(index), device=index.device)
    best[index] = points[nearest]
    return best


class _Starts:
    """All starts of all samples as one batch of rows, start by start.

    Args:
        objective: of the attack.
        norm: "l2" or "linf".
        inputs: (m, ...).
        index: (m,) the sample of each row.
        rivals: (starts, m / starts) classes, or -1 for all at once.
        clear: (n,) the lead that counts, of each sample.
        scores: (m, classes) at the inputs.
    """

    def __init__(
        self,
        objective: Objective,
        norm: str,
        inputs: Tensor,
        index: Tensor,
        rivals: Tensor,
        clear: Tensor,
        scores: Tensor,
    ) -> None:
        self.objective, self.norm, self.inputs, self.index = objective, norm, inputs, index
        self.rivals, self.shape, self.clear = rivals.flatten(), rivals.shape, clear
        self.behind = self.short(scores, torch.arange(len(index), device=index.device))

    def short(self, scores: Tensor, rows: Tensor) -> Tensor:
        """What is missing from the lead that counts (k,): negative where the scores (k, classes) win."""
        index = self.index[rows]
        return self.clear[index] - lead(self.objective, scores, index, self.clear)[0]

    def aim(self, scores: Tensor, rows: Tensor) -> Tensor:
        """The margin (k,) that a start raises over the boundary: against its rival, or against all."""
        return _margin(self.objective, scores, self.index[rows], self.rivals[rows])


def _margin(objective: Objective, scores: Tensor, index: Tensor, rivals: Tensor) -> Tensor:
    """z_j - z_y (k,) with one rival j for each of the samples `index` (k,); the margin itself where j = -1."""
    labels = objective.labels[index]
    pair = scores.gather(1, torch.stack([rivals.clamp(min=0), labels], dim=1))
    return torch.where(rivals < 0, objective.margin(scores, index), pair[:, 0] - pair[:, 1])


def _rivals(objective: Objective, inputs: Tensor, scores: Tensor, index: Tensor, norm: str, starts: int) -> Tensor:
    """The classes (starts, m) that are nearest to first order to the samples `index` (m,); -1 for all at once."""
    if objective.targeted or objective.classes == 2 or objective.loss != "margin":
        return torch.full((1, len(index)), -1, device=index.device)
    leaders = scores[index].scatter(1, objective.labels[index].unsqueeze(1), -torch.inf)
    rivals = leaders.topk(min(_RIVALS, objective.classes - 1), dim=1).indices.T
    every, each = index.repeat(len(rivals)), rivals.flatten()
    away = -_margin(objective, scores[every], every, each)
    for rows in torch.arange(len(every), device=index.device).split(objective.batch):  # no more gradients are held

        def margin(scores: Tensor, rows: Tensor) -> Tensor:
            return _margin(objective, scores, every[rows], each[rows])

        _, gradient = look(objective, inputs[every[rows]], rows, margin)
        away[rows] /= _slope(gradient, ascent(gradient, norm))
    order = away.view(rivals.shape).nan_to_num(nan=torch.inf).argsort(dim=0, stable=True)
    return rivals.gather(0, order)[:starts]


def _cross(batch: _Starts, iterations: int) -> tuple[Tensor, Tensor]:
    """First-order steps over the boundary: points (m, ...), and what is short of their lead (m,)."""
    objective, points, short = batch.objective, batch.inputs.clone(), batch.behind.clone()
    open_ = torch.arange(len(points), device=points.device)
    for _ in range(iterations):
        here, rows = points[open_], batch.index[open_]
        scores, gradient = look(objective, here, open_, batch.aim)
        short[open_] = batch.short(scores, open_)
        towards = gradient if objective.loss == "margin" else objective.slopes(here, rows)[1]
        if objective.box:  # what would leave the box does not move
            leaves = ((here <= 0) & (towards < 0)) | ((here >= 1) & (towards > 0))
            towards = towards.masked_fill(leaves, 0)
        unit = ascent(towards, batch.norm)
        length = (1 + _BEYOND) * (2 * batch.clear[rows] - batch.aim(scores, open_)) / _slope(gradient, unit)
        moves = (short[open_] >= 0) & (length > 0) & torch.isfinite(length)
        open_, here, unit, length = open_[moves], here[moves], unit[moves], length[moves]
        if not len(open_):
            return points, short
        points[open_] = objective.inside(here + spread(length, here) * unit)
    short[open_] = batch.short(objective.scores(points[open_]), open_)
    return points, short


def _approach(batch: _Starts, points: Tensor, short: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Adversarial points brought nearer: points (m, ...), and distances (m,), infinite where none was found."""
    objective, norm, inputs = batch.objective, batch.norm, batch.inputs
    best, slope, turned = inputs.clone(), torch.zeros_like(inputs), torch.zeros_like(short, dtype=torch.bool)
    away = torch.full((len(inputs),), torch.inf, dtype=torch.float64, device=inputs.device)
    share, left = torch.full_like(short, _LONG), short.clone()

    def back(points: Tensor, short: Tensor, rows: Tensor, limits: tuple[float, int]) -> None:
        best[rows], left[rows] = _to_boundary(batch, points, short, rows, limits)
        away[rows] = distances(inputs[rows], best[rows], norm)

    new = (short < 0).nonzero().squeeze(1)
    back(points[new], short[new], new, _COARSE)
    goes_on = (short < 0) & (away <= _WORTH * away.view(batch.shape).cummin(dim=0).values.flatten())
    new = goes_on.nonzero().squeeze(1)
    for _ in range(iterations):
        rows = (goes_on & (share > _SHORT)).nonzero().squeeze(1)
        if not len(rows):
            break
        if len(new):
            slope[new], turned[new] = ascent(look(objective, best[new], batch.index[new])[1], "l2"), False
        length = spread((share[rows] * away[rows]).to(inputs.dtype), inputs)
        tried = best[rows] + length * ascent(slope[rows], norm)
        tried = project(inputs[rows], tried, away[rows] * (1 - _NEARER), norm, box=objective.box)
        missing = batch.short(objective.scores(tried), rows)
        won = missing < 0
        share[rows[~won]] /= _CUT
        stuck = ~won & (share[rows] <= _TURN) & ~turned[rows]
        if bool(stuck.any()):
            kinks = rows[stuck]
            slope[kinks] += ascent(look(objective, tried[stuck], batch.index[kinks])[1], "l2")
            turned[kinks], share[kinks] = True, _AGAIN
        new = rows[won]
        back(tried[won], missing[won], new, _COARSE)
    rows = goes_on.nonzero().squeeze(1)
    back(best[rows], left[rows], rows, _FINE)
    return best, away


def _to_boundary(
    batch: _Starts, points: Tensor, short: Tensor, rows: Tensor, limits: tuple[float, int]
) -> tuple[Tensor, Tensor]:
    """The points (k, ...) between inputs and adversarial points where the lead is just what counts, and its `short`.

    Args:
        batch: of all starts.
        points: (k, ...) adversarial.
        short: (k,) what is short of their lead, < 0.
        rows: (k,) whose points they are.
        limits: the resolution, and how many lengths are tried.
    """
    inputs, found, left = batch.inputs[rows], points.clone(), short.clone()

    def potential_at(share: Tensor, k: Tensor) -> Tensor:
        place = batch.objective.inside(inputs[k] + spread(share, inputs) * (points[k] - inputs[k]))
        value = batch.short(batch.objective.scores(place), rows[k])
        won = value < 0
        found[k[won]], left[k[won]] = place[won], value[won]
        return value

    none, (resolution, steps) = torch.zeros_like(short), limits
    known = torch.stack([batch.behind[rows], short])
    refine(potential_at, none, none + 1, values=known, resolution=resolution, steps=steps)
    return found, left


def _slope(gradient: Tensor, unit: Tensor) -> Tensor:
    """How much a function grows along the directions: (m,)."""
    slope: Tensor = (gradient * unit).flatten(1).sum(dim=1)
    return slope
