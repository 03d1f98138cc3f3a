"""The nearest adversarial point: over the boundary, back to it, and along it to where it is nearest."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from otnn.attacks.ball import ascent, project
from otnn.attacks.objective import Objective, check_norm, distances
from otnn.attacks.step import check_count, clearance, lead, look
from otnn.batches import spread
from otnn.explain.rays import refine
from otnn.memory import MEMORY_BUDGET

# So many leading rivals are compared by their first-order distance
_RIVALS = 9
# A first-order step goes so much further than to the boundary
_BEYOND = 1e-3
# A move along the boundary must bring it nearer by this share; its length is a share of the distance, halved at failure
_NEARER, _LONG, _SHORT = 1e-4, 4.0, 1e-3
# From this share on no length seems to do: the direction is turned once, and the share starts again
_TURN, _AGAIN = 0.01, 0.3


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
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """The nearest point that is classified otherwise, found by gradients at the boundary.

    1. Over the boundary: steps x + (c - m(x)) u / <grad m, u>, with m the margin against one rival, u the direction
       that raises m most in the norm, and c the least lead that counts, each with a new gradient (DeepFool).
    2. Back to it: the segment to the input is searched for the crossing.
    3. Along it: at a boundary point b at the distance r, with u(b) the direction that raises the margin there,
       P(b + a r u(b)) is tried, P the projection on the ball of radius r (1 - 1e-4) and on the box. Where that is
       adversarial, the segment is searched again from there; where it is not, a is halved. For large a, it is the
       projection of the input on the linearised boundary. Where no a will do, b may lie at a kink: u is turned once to
       the mean of the gradients at b and at the last try. What no such move brings nearer meets, to first order, the
       condition of a nearest point: b - x is parallel to the gradient in L2, apart from the values at a wall.

    Several rivals are tried one by one, those with the smallest m / ||grad m|| of the nine that lead, and the nearest
    point is kept. It is a local minimum, and its distance an upper bound. On a linear model it is the nearest point to
    1e-3, if the nearest class is one of the rivals tried: always, of up to ten classes and without the box.

    Backwards: one, one for each rival compared, then at most 3 iterations for each start; on dense networks of three
    layers and ten classes 45 to 65 in all, with 280 to 500 forwards.

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
        memory_budget: bytes.

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
    objective = Objective(model, inputs, labels, targeted=targeted, loss=loss, box=box, memory_budget=memory_budget)
    index = torch.arange(len(inputs), device=inputs.device)
    scores, gradient = look(objective, inputs, index, objective.margin)
    clear = clearance(scores, gradient, inputs)
    index = index[~objective.won(scores, index)]
    best = inputs.clone()
    if not len(index):
        return best
    distance = torch.full((len(index),), torch.inf, dtype=torch.float64, device=inputs.device)
    for aim in _aims(objective, inputs[index], scores[index], index, norm, starts):
        points, found = _cross(objective, inputs[index], index, clear, norm, aim, iterations)
        points, away = _approach(objective, inputs[index], points, found, index, clear, norm, iterations)
        nearer = away < distance
        best[index[nearer]], distance[nearer] = points[nearer], away[nearer]
    return best


Function = Callable[[Tensor, Tensor], Tensor]


def _aims(
    objective: Objective, inputs: Tensor, scores: Tensor, index: Tensor, norm: str, starts: int
) -> list[Function]:
    """The margins that the starts raise: against the rivals that are nearest to first order, or the margin itself."""
    if objective.targeted or objective.classes == 2 or objective.loss != "margin":
        return [objective.margin]
    leaders = scores.scatter(1, objective.labels[index].unsqueeze(1), -torch.inf)
    rivals = leaders.topk(min(_RIVALS, objective.classes - 1), dim=1).indices
    away = torch.full(rivals.shape, torch.inf, dtype=scores.dtype, device=scores.device)
    for k in range(rivals.shape[1]):
        margin = _against(objective, index, rivals[:, k])
        _, gradient = look(objective, inputs, index, margin)
        away[:, k] = -margin(scores, index) / _slope(gradient, ascent(gradient, norm))
    nearest = rivals.gather(1, away.nan_to_num(nan=torch.inf).argsort(dim=1, stable=True))
    return [_against(objective, index, nearest[:, k]) for k in range(min(starts, nearest.shape[1]))]


def _against(objective: Objective, index: Tensor, rivals: Tensor) -> Function:
    """z_j - z_y with one rival j for each of the samples `index`."""
    rival = torch.zeros_like(objective.labels)
    rival[index] = rivals

    def margin(scores: Tensor, rows: Tensor) -> Tensor:
        pair = scores.gather(1, torch.stack([rival[rows], objective.labels[rows]], dim=1))
        return pair[:, 0] - pair[:, 1]

    return margin


def _cross(
    objective: Objective, inputs: Tensor, index: Tensor, clear: Tensor, norm: str, margin: Function, iterations: int
) -> tuple[Tensor, Tensor]:
    """First-order steps over the boundary: points (m, ...), and which of them are adversarial (m,)."""
    points, found = inputs.clone(), torch.zeros(len(index), dtype=torch.bool, device=inputs.device)
    open_ = torch.arange(len(index), device=inputs.device)
    for _ in range(iterations):
        here, rows = points[open_], index[open_]
        scores, gradient = look(objective, here, rows, margin)
        _, won = lead(objective, scores, rows, clear)
        found[open_[won]] = True
        towards = gradient if objective.loss == "margin" else objective.slopes(here, rows)[1]
        if objective.box:  # what would leave the box does not move
            leaves = ((here <= 0) & (towards < 0)) | ((here >= 1) & (towards > 0))
            towards = towards.masked_fill(leaves, 0)
        unit = ascent(towards, norm)
        length = (1 + _BEYOND) * (2 * clear[rows] - margin(scores, rows)) / _slope(gradient, unit)
        moves = ~won & (length > 0) & torch.isfinite(length)
        open_, here, unit, length = open_[moves], here[moves], unit[moves], length[moves]
        if not len(open_):
            return points, found
        points[open_] = objective.inside(here + spread(length, here) * unit)
    _, won = lead(objective, objective.scores(points[open_]), index[open_], clear)
    found[open_[won]] = True
    return points, found


def _approach(
    objective: Objective,
    inputs: Tensor,
    points: Tensor,
    found: Tensor,
    index: Tensor,
    clear: Tensor,
    norm: str,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Adversarial points brought nearer: points (m, ...), and distances (m,), infinite where none was found."""
    best, slope, turned = inputs.clone(), torch.zeros_like(inputs), torch.zeros_like(found)
    away = torch.full((len(index),), torch.inf, dtype=torch.float64, device=inputs.device)

    def back(points: Tensor, rows: Tensor) -> None:
        nearer = _to_boundary(objective, inputs[rows], points, index[rows], clear[index[rows]])
        length = distances(inputs[rows], nearer, norm)
        better = length < away[rows]
        best[rows[better]], away[rows[better]] = nearer[better], length[better]

    share = torch.full((len(index),), _LONG, dtype=inputs.dtype, device=inputs.device)
    new = found.nonzero().squeeze(1)
    back(points[new], new)
    for _ in range(iterations):
        rows = (found & (share > _SHORT)).nonzero().squeeze(1)
        if not len(rows):
            break
        if len(new):
            slope[new], turned[new] = ascent(look(objective, best[new], index[new])[1], "l2"), False
        length = spread((share[rows] * away[rows]).to(inputs.dtype), inputs)
        tried = best[rows] + length * ascent(slope[rows], norm)
        tried = project(inputs[rows], tried, away[rows] * (1 - _NEARER), norm, box=objective.box)
        _, won = lead(objective, objective.scores(tried), index[rows], clear)
        share[rows[~won]] /= 2
        stuck = ~won & (share[rows] <= _TURN) & ~turned[rows]
        if bool(stuck.any()):
            kinks = rows[stuck]
            slope[kinks] += ascent(look(objective, tried[stuck], index[kinks])[1], "l2")
            turned[kinks], share[kinks] = True, _AGAIN
        new = rows[won]
        back(tried[won], new)
    return best, away


def _to_boundary(objective: Objective, inputs: Tensor, points: Tensor, index: Tensor, clear: Tensor) -> Tensor:
    """The points (m, ...) between inputs and adversarial points where the lead is just what counts."""
    if not len(index):
        return points

    def place(share: Tensor, rows: Tensor) -> Tensor:
        return objective.inside(inputs[rows] + spread(share, inputs) * (points[rows] - inputs[rows]))

    def potential_at(share: Tensor, rows: Tensor) -> Tensor:
        scores = objective.scores(place(share, rows))
        return clear[rows] - objective.margin(scores, index[rows])

    none = torch.zeros(len(index), dtype=inputs.dtype, device=inputs.device)
    share = refine(potential_at, none, none + 1)
    return torch.where(spread(share < 1, points), place(share, torch.arange(len(index), device=index.device)), points)


def _slope(gradient: Tensor, unit: Tensor) -> Tensor:
    """How much a function grows along the directions: (m,)."""
    slope: Tensor = (gradient * unit).flatten(1).sum(dim=1)
    return slope
