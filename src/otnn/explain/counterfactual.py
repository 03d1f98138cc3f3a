"""Counterfactuals: the image that another class would need, found along the gradient of the pair potential.

At the optimum of the hKR loss the gradient points along the transport plan, so that x - t u, u the unit gradient of the
pair potential g of the predicted class against the target, is the way to the target (theory, sections 3 and 5).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from otnn.batches import sample_norm, spread
from otnn.checks import check_images, check_labels
from otnn.errors import InputError
from otnn.lipschitz import LipschitzBound
from otnn.models import Classifier, check_model, predict
from otnn.potential import nearest_rival, pair_distances, pair_potential

_BISECTIONS = 40
# A boundary is looked for up to this multiple of the certified radius.
_REACH = 64.0


@dataclass(frozen=True)
class Counterfactual:
    """The way of each sample towards its target class.

    Attributes:
        prediction: (batch,) the class at the input.
        target: (batch,) the class that the path leads to.
        pair_radius: (batch,) g(x), a certified lower bound of the distance to where the pair is even; the radius of the
            prediction, against all rivals, is `otnn.certify.certify`'s.
        one_step: (batch, ...) x - g(x) grad g(x), on the boundary at the optimum.
        boundary: (batch, ...) x - t* u, t* the sign-changed end of a bisection; NaN where none was found.
        boundary_distance: (batch,) t*, where the pair is even: a crossing, though not surely the first, and with a
            chosen target other classes may have come between; NaN where none was found.
        tightness: (batch,) g(x) / t*, at most 1 up to rounding if the bound holds, and 1 where bound and explanation
            are exact; NaN likewise.
        distances: (batch, steps) lengths t along the path, from 0 to twice t*.
        path: (batch, steps, ...) images x - t u; they may leave [0, 1].
        potential: (batch, steps) the pair potential along the path.
        scores: (batch, steps, outputs) all scores along the path.
        flipped: (batch,) whether a boundary was found and the end of the path is predicted as the target.
        status: per sample "ok", or why a part is missing.
    """

    prediction: Tensor
    target: Tensor
    pair_radius: Tensor
    one_step: Tensor
    boundary: Tensor
    boundary_distance: Tensor
    tightness: Tensor
    distances: Tensor
    path: Tensor
    potential: Tensor
    scores: Tensor
    flipped: Tensor
    status: tuple[str, ...]


def counterfactual(
    model: Classifier,
    inputs: Tensor,
    body: LipschitzBound,
    target: Tensor | None = None,
    *,
    steps: int = 21,
) -> Counterfactual:
    """Walk each input against the gradient of its pair potential, to the boundary and as far again beyond it.

    Args:
        model: a classifier in `eval()` mode; in float64 the boundary is found to about 1e-9.
        inputs: (batch, channels, height, width), floats in [0, 1], in the dtype of the model.
        body: `otnn.lipschitz.bound(model.body)`.
        target: (batch,) the class to go to; by default the rival with the smallest pair potential.
        steps: images along each path, >= 2.

    Raises:
        InputError: inputs, targets or steps that cannot be used; a model in training mode. What concerns one sample
            only (target equal to the prediction, a tie, no gradient, no boundary in reach) is told in `status`.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(32,)).eval()
        >>> way = counterfactual(model, torch.rand(3, 1, 8, 8), bound(model.body))
        >>> way.path.shape
        torch.Size([3, 21, 1, 8, 8])
    """
    check_images(inputs, box=True)
    check_model(model, inputs)
    if model.multilabel:
        raise InputError("counterfactuals between classes need one decision; this model decides labels one by one")
    if steps < 2:
        raise InputError(f"steps: expected at least 2 images along the path, got {steps}")
    if target is not None:
        check_labels(target, len(inputs), model.classes)
    distances = pair_distances(model, body).to(inputs.device)
    inputs = inputs.detach().requires_grad_()
    scores = model(inputs)
    own = predict(scores)
    rival = nearest_rival(scores.detach(), own, distances) if target is None else target
    potential = pair_potential(scores, own, rival, distances)
    (gradient,) = torch.autograd.grad(potential.sum(), inputs)
    with torch.no_grad():
        inputs, potential = inputs.detach(), potential.detach()
        norm = sample_norm(gradient)
        direction = gradient / spread(torch.where(norm > 0, norm, 1.0), inputs)
        movable = torch.isfinite(potential) & (potential > 0) & (norm > 0)

        def potential_at(length: Tensor, index: Tensor) -> Tensor:
            moved = inputs[index] - spread(length, inputs) * direction[index]
            return pair_potential(model(moved), own[index], rival[index], distances)

        boundary_distance = _bisect(potential_at, potential, movable)
        found = torch.isfinite(boundary_distance)
        reach = torch.where(found, 2 * boundary_distance, 4 * potential.clamp(min=0))
        lengths = reach.unsqueeze(1) * torch.linspace(0, 1, steps, dtype=inputs.dtype, device=inputs.device)
        path = inputs.unsqueeze(1) - lengths.view(*lengths.shape, 1, 1, 1) * direction.unsqueeze(1)
        flat_scores = model(path.flatten(0, 1))
        along = pair_potential(
            flat_scores, own.repeat_interleave(steps), rival.repeat_interleave(steps), distances
        ).view(len(inputs), steps)
        path_scores = flat_scores.view(len(inputs), steps, -1)
        return Counterfactual(
            prediction=own,
            target=rival,
            pair_radius=potential.clamp(min=0),
            one_step=inputs - spread(potential, inputs) * gradient,
            boundary=inputs - spread(boundary_distance, inputs) * direction,
            boundary_distance=boundary_distance,
            tightness=potential / boundary_distance,
            distances=lengths,
            path=path,
            potential=along,
            scores=path_scores,
            flipped=found & (predict(path_scores[:, -1]) == rival),
            status=_status(own, rival, potential, norm, found),
        )


def _bisect(potential_at: Callable[[Tensor, Tensor], Tensor], potential: Tensor, movable: Tensor) -> Tensor:
    """The sign-changed end of a bisection along each ray; NaN where the sign does not change in reach.

    The potential is 1-Lipschitz, so it cannot change sign before a length of g(x): the search starts there.
    """
    index = movable.nonzero().squeeze(1)
    high = potential[index].clone()
    low = torch.zeros_like(high)
    result = torch.full_like(potential, torch.nan)
    open_ = torch.ones(len(index), dtype=torch.bool, device=potential.device)
    while bool(open_.any()):
        values = potential_at(high[open_], index[open_])
        still = torch.zeros_like(open_)
        still[open_] = values > 0
        low = torch.where(still, high, low)
        high = torch.where(still, high * 1.25, high)
        open_ = still & (high <= _REACH * potential[index])
        lost = still & ~open_
        high = torch.where(lost, torch.nan, high)
    keep = torch.isfinite(high)
    index, low, high = index[keep], low[keep], high[keep]
    for _ in range(_BISECTIONS if len(index) else 0):
        middle = (low + high) / 2
        positive = potential_at(middle, index) > 0
        low, high = torch.where(positive, middle, low), torch.where(positive, high, middle)
    result[index] = high
    return result


def _status(own: Tensor, rival: Tensor, potential: Tensor, norm: Tensor, found: Tensor) -> tuple[str, ...]:
    reasons = []
    for k in range(len(own)):
        if own[k] == rival[k]:
            reasons.append("the target is the predicted class already")
        elif not torch.isfinite(potential[k]):
            reasons.append("a score is not finite")
        elif potential[k] <= 0:
            reasons.append("the two classes are tied")
        elif norm[k] == 0:
            reasons.append("the gradient is zero: no direction")
        elif not found[k]:
            reasons.append("no change of sign at the lengths tried, up to 64 certified radii along the gradient")
        else:
            reasons.append("ok")
    return tuple(reasons)
