"""Counterfactuals: the image that another class would need, found along the gradient of the pair potential.

At the optimum of the hKR loss the gradient points along the transport plan, so that x - t u, u the unit gradient of the
pair potential g of the predicted class against the target, is the way to the target (theory, sections 3 and 5). The
same walk serves any network, with or without a Lipschitz bound.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otnn.batches import sample_norm, spread
from otnn.checks import check_images
from otnn.errors import InputError
from otnn.explain.pairs import Pairs, choose_pairs
from otnn.explain.rays import refine
from otnn.explain.walk import Descent, Walk, descend, join
from otnn.lipschitz import LipschitzBound
from otnn.memory import MEMORY_BUDGET
from otnn.models import Classifier, check_model, check_precision

NO_BOUND = "no bound"
STATUSES = (
    "ok",
    "the input holds NaN or infinite values",
    "the input holds values outside [0, 1]: rescale it (8-bit images are divided by 255)",
    "a score is not finite",
    "the target is the predicted class already",
    "a tie: the pair potential is 0",
    "the gradient is zero or not finite: no direction",
    "the gradient became zero on the way",
    "the path came to rest at the walls of the pixel box before the sign changed",
    "no change of sign at the lengths tried, up to the diameter of the pixel box",
    "no target is known: -1 was given",
)


@dataclass(frozen=True)
class Counterfactual:
    """The way of each sample towards its target; everything of a sample that cannot walk is NaN or stands still.

    Attributes:
        inputs: (n, ...).
        prediction: (n,) the class at the input, -1 where it is not known; with several labels, 0 or 1 for `label`.
        target: (n,) the class that the path leads to; with several labels, the state of `label`; -1 where not known.
        label: (n,) the label that is flipped; None of a model that decides between classes.
        pair_radius: (n,) g(x) as computed: a lower bound of the distance to where the pair of the exact map is even, up
            to the rounding of the forward pass, which `otnn.certify` and `otnn.guarantees` take off; infinite where no
            input changes the pair; NaN without a bound. A third class may come nearer: the radius of the prediction,
            against all rivals, is `otnn.certify.certify`'s.
        radius_reason: why no pair radius is known, "no bound"; empty otherwise.
        one_step: (n, ...) x - g grad g / ||grad g||^2, where a linear potential would be even: x - g grad g where the
            gradient has norm 1, and so on the boundary at the optimum. Never clamped.
        boundary: (n, ...) the first point found on the path where the target is ahead of the prediction, up to
            1e-12 of the length in float64; with a chosen target, other classes may have come between.
        boundary_distance: (n,) its L2 distance from the input.
        boundary_length: (n,) the length t of the path up to it: the same on a straight path that is not clamped.
        unconstrained_distance: (n,) the `boundary_distance` of the path that may leave [0, 1].
        outside: (n,) share of the values that are outside [0, 1] at the boundary, or would be if not clamped.
        tightness: (n,) g(x) / boundary_distance, at most 1 up to rounding, and 1 where bound and explanation are exact.
        lengths: (n, steps) lengths t along the path, from 0 to its end.
        distances: (n, steps) L2 distances from the input at these lengths.
        path: (n, steps, ...) the images there: x - t u, clamped to [0, 1] on request; the polyline of iterations.
        potential: (n, steps) g along the path, in input units (L2); without a bound the difference of the scores.
        scores: (n, steps, outputs) all scores along the path.
        distance: (n,) L2 distance from the input to the first point found on the path that is predicted as the target;
            NaN if none.
        flipped: (n,) whether there is such a point: the boundary, or one of the images along the path, refined back to
            where the target takes the lead.
        status: per sample "ok" where the search found the boundary, or why not. It speaks of the lengths that the
            search tried: an image between two of them may be predicted as the target all the same, and the sample is
            then `flipped`, with a `distance` and without a boundary.
    """

    inputs: Tensor
    prediction: Tensor
    target: Tensor
    label: Tensor | None
    pair_radius: Tensor
    radius_reason: str
    one_step: Tensor
    boundary: Tensor
    boundary_distance: Tensor
    boundary_length: Tensor
    unconstrained_distance: Tensor
    outside: Tensor
    tightness: Tensor
    lengths: Tensor
    distances: Tensor
    path: Tensor
    potential: Tensor
    scores: Tensor
    distance: Tensor
    flipped: Tensor
    status: tuple[str, ...]

    @property
    def reflected(self) -> Tensor:
        """The end of the path, (n, ...), where g is about -g(x): the target is as far ahead as the prediction was.

        On a straight path it is the mirror image of the input, x - 2 t* u, t* the length up to the boundary (clamped in
        the box); with iterations the point where g is -g(x), or the end of the steps towards it. Without a boundary
        the path ends at twice the first-order estimate of its distance.
        """
        return self.path[:, -1]

    @property
    def price(self) -> Tensor:
        """What staying in the pixel box costs: (n,) boundary_distance / unconstrained_distance, 1 without the box.

        At least 1 for a linear potential; where the potential bends, the clamped path may also be the shorter one.
        """
        return self.boundary_distance / self.unconstrained_distance


def counterfactual(
    model: Classifier,
    inputs: Tensor,
    body: LipschitzBound | None,
    target: Tensor | int | None = None,
    *,
    label: Tensor | int | None = None,
    steps: int = 21,
    box: bool = False,
    iterations: int = 1,
    memory_budget: float = MEMORY_BUDGET,
) -> Counterfactual:
    """Walk each input against the gradient of its pair potential, to the boundary and as far again beyond it.

    The boundary is looked for from the pair radius on, or from an eighth of the first-order estimate of its
    distance, g / ||grad g||, where that is longer; up to the diameter of the pixel box, sqrt(values).

    Args:
        model: a classifier in `eval()` mode; in float64 the boundary is found to about 1e-12 of its distance.
        inputs: (n, ...) in the model's shape and dtype, values in [0, 1].
        body: `otnn.lipschitz.bound(model.body, model.input_shape)`, or None: potentials are then differences of scores.
        target: the class to go to, one for all or (n,); by default the rival with the smallest pair potential. With
            several labels, the state 0 or 1 to bring the label to; by default the other one. A sample whose target is
            -1, as of an input that cannot be read, does not walk.
        label: the label to flip, one for all or (n,), of a model that decides labels one by one; by default the one
            with the smallest potential |z| / (L ||w||).
        steps: images along each path, >= 2.
        box: clamp the path to [0, 1] at every length; `price` tells what that costs. A clamped path is looked at until
            it comes to rest, or to 64 diameters.
        iterations: how often the gradient is evaluated anew: before each of so many steps to the boundary, and of so
            many beyond it. The step is g / ||grad g||, and the last one searches on to the diameter. 1 is a straight
            path.
        memory_budget: bytes that one forward or backward pass may take.

    Raises:
        InputError: a batch of another shape or dtype than the model's, targets, labels or settings that cannot be used,
            a model in training mode. What concerns one sample only is told in its `status`.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(32,)).eval()
        >>> way = counterfactual(model, torch.rand(3, 1, 8, 8), bound(model.body))
        >>> way.path.shape, bool((way.pair_radius <= 1.00001 * way.boundary_distance).all())
        (torch.Size([3, 21, 1, 8, 8]), True)
    """
    usable, inside = _check(model, inputs, steps, iterations)
    inputs = inputs.detach()
    start = torch.where(spread(usable & inside, inputs), inputs, 0.0)
    pairs, scores = choose_pairs(model, start, body, target, label, memory_budget)
    everyone = torch.arange(len(inputs), device=inputs.device)
    value = pairs.potential(scores, everyone)
    state = torch.where(value > 0, 0, 5)
    state = torch.where(pairs.prediction == pairs.target, 4, state)
    state = torch.where(pairs.known, state, 10)
    state = torch.where(torch.isfinite(scores).all(dim=1), state, 3)
    state = torch.where(usable, torch.where(inside, state, 2), 1)
    with torch.no_grad():
        down = _to_boundary(pairs, start, state == 0, iterations, box)
        free = _to_boundary(pairs, start, state == 0, iterations, False) if box else down
        return _gathered(pairs, inputs, value, state, down, free, iterations, steps)


def _to_boundary(pairs: Pairs, start: Tensor, movable: Tensor, iterations: int, box: bool) -> Descent:
    level = start.new_zeros(len(start))
    return descend(pairs, start, movable, level, iterations=iterations, box=box, search=True)


def _gathered(
    pairs: Pairs,
    inputs: Tensor,
    value: Tensor,
    state: Tensor,
    down: Descent,
    free: Descent,
    iterations: int,
    steps: int,
) -> Counterfactual:
    """The result, from the walk to the boundary (down) and the one that may leave the box (free)."""
    everyone = torch.arange(len(inputs), device=inputs.device)
    total, found = down.walk.total, down.found
    boundary = down.end
    walk = _whole(pairs, down, value, iterations)
    way = _along(pairs, walk, steps)
    flip = _first_flip(pairs, walk, way, _known(total, found), boundary, state == 0)
    distance = _known(sample_norm(boundary - inputs), found)
    unconstrained = sample_norm(free.end - inputs)
    read = (state == 0) | (state > 3)  # the network has said something of it
    told = read & pairs.known
    fixed = (pairs.scale == 0) & (value > 0)  # and no tie
    radius = _known(torch.where(fixed, torch.inf, value.clamp(min=0)), told & pairs.bounded)
    newton = value / torch.where(down.slope > 0, down.slope, 1.0).square()
    return Counterfactual(
        inputs=inputs,
        prediction=pairs.prediction.masked_fill(~read, -1),
        target=pairs.target.masked_fill(~pairs.known if pairs.chosen else ~read, -1),
        label=pairs.label,
        pair_radius=radius,
        radius_reason="" if pairs.bounded else NO_BOUND,
        one_step=_known(inputs - spread(newton, inputs) * down.gradient, down.slope > 0),
        boundary=_known(boundary, found),
        boundary_distance=distance,
        boundary_length=_known(total, found),
        unconstrained_distance=_known(unconstrained, free.found),
        outside=_known(_outside(down.walk.point(total, everyone, clamped=False)), found),
        tightness=radius / distance,
        lengths=_known(way.lengths, told),
        distances=_known(way.distances, told),
        path=_known(way.path, told),
        potential=_known(way.potential, told),
        scores=_known(way.scores, told),
        distance=_known(sample_norm(walk.point(flip.nan_to_num(nan=0.0), everyone) - inputs), flip.isfinite()),
        flipped=flip.isfinite(),
        status=tuple(STATUSES[k] for k in torch.where(state == 0, _outcome(down), state).tolist()),
    )


@dataclass(frozen=True)
class _Images:
    """Images along the paths, with what the network says of them."""

    lengths: Tensor
    distances: Tensor
    path: Tensor
    potential: Tensor
    scores: Tensor


def _check(model: Classifier, inputs: Tensor, steps: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Refuse what no sample can be used with; return which samples are finite, and which lie in [0, 1]: (n,) each."""
    if steps < 2:
        raise InputError(f"steps: expected at least 2 images along the path, got {steps}")
    if iterations < 1:
        raise InputError(f"iterations: expected at least 1 evaluation of the gradient, got {iterations}")
    check_images(torch.nan_to_num(inputs, posinf=0.0, neginf=0.0) if isinstance(inputs, Tensor) else inputs)
    check_model(model, inputs)
    check_precision(model, inputs)
    flat = inputs.flatten(1)
    return torch.isfinite(flat).all(dim=1), ((flat >= 0) & (flat <= 1)).all(dim=1)


def _whole(pairs: Pairs, down: Descent, value: Tensor, iterations: int) -> Walk:
    """The walk to the boundary, and the one beyond it."""
    if iterations > 1:
        beyond = descend(pairs, down.end, down.found, -value, iterations=iterations, box=down.walk.box, search=False)
        return join(down.walk, beyond.walk)
    return replace(down.walk, length=torch.where(down.found, 2.0, 1.0) * down.walk.length)


def _along(pairs: Pairs, walk: Walk, steps: int) -> _Images:
    """Evenly spaced images of each path, made and scored by chunks within the memory budget."""
    total, start = walk.total, walk.origin[0]
    lengths = total.unsqueeze(1) * torch.linspace(0, 1, steps, dtype=total.dtype, device=total.device)
    lengths[:, -1] = total  # exactly
    path = start.new_empty(len(start) * steps, *start.shape[1:])
    rows, scores = torch.arange(len(path), device=path.device), []
    for part in rows.split(pairs.forward):
        path[part] = walk.point(lengths.flatten()[part], part // steps)
        scores.append(pairs.scores(path[part]))
    along = torch.cat(scores)
    path = path.view(len(start), steps, *start.shape[1:])
    return _Images(
        lengths,
        torch.linalg.vector_norm((path - start.unsqueeze(1)).flatten(2), dim=2),
        path,
        pairs.potential(along, rows // steps).view(len(start), steps),
        along.view(len(start), steps, -1),
    )


def _first_flip(pairs: Pairs, walk: Walk, way: _Images, crossing: Tensor, boundary: Tensor, walked: Tensor) -> Tensor:
    """The length (n,) at which the target is first predicted, as far as boundary and images tell; NaN where never."""
    count, steps = way.lengths.shape
    everyone = torch.arange(count, device=crossing.device)
    hit = pairs.reached(way.scores.flatten(0, 1), everyone.repeat_interleave(steps)).view(count, steps)
    first = hit.int().argmax(dim=1, keepdim=True)
    low, high = (way.lengths.gather(1, (first - back).clamp(min=0)).squeeze(1) for back in (1, 0))
    met = hit.any(dim=1) & walked
    at_once = walked & pairs.reached(pairs.scores(boundary), everyone) & (~met | (crossing <= high))
    rows = (met & ~at_once).nonzero().squeeze(1)
    result = torch.where(at_once, crossing, torch.nan)
    if len(rows):
        result[rows] = refine(
            lambda length, k: pairs.lead(pairs.scores(walk.point(length, rows[k])), rows[k]), low[rows], high[rows]
        )
    return result


def _outcome(down: Descent) -> Tensor:
    state = torch.where(down.rested, 8, 9)
    state = torch.where(down.stuck, 7, state)
    state = torch.where(torch.isfinite(down.slope) & (down.slope > 0), state, 6)
    return torch.where(down.found, 0, state)


def _outside(images: Tensor) -> Tensor:
    return ((images < 0) | (images > 1)).to(images).flatten(1).mean(dim=1)


def _known(values: Tensor, where: Tensor) -> Tensor:
    """The values (n, ...) of some samples (n,), NaN of the others."""
    return torch.where(spread(where, values), values, torch.nan)
