"""Counterfactuals: do they flip the decision, how far away, how near to real images, and where is the change?

Samples that ask for no counterfactual (an input that is not finite or leaves [0, 1], a tie, a target that is predicted
already or not known) are left out everywhere and told in `undefined`. Measures of an image take the "boundary", the
first point where the target is ahead, or the "reflected" point at the end of the path. A path that does not flip has an
end too, which they count: without a boundary, twice the first-order estimate of its distance away.

Example:
    >>> from otnn.explain import counterfactual
    >>> from otnn.lipschitz import bound
    >>> from otnn.models import build
    >>> _ = torch.manual_seed(0)
    >>> model = build("dense", (1, 4, 4), 2, widths=(8,)).double().eval()
    >>> real = torch.rand(40, 1, 4, 4).double()
    >>> labels = (model(real).squeeze(1) > 0).long()
    >>> way = counterfactual(model, real[:6], bound(model.body))
    >>> validity(way).mean
    1.0
    >>> tightness(way).mean <= 1 <= distance_over_radius(way).mean
    True
    >>> concentration(way, share=0.25).mean >= 0.5
    True
    >>> independent_score(way, model, point="boundary").direction
    'up'
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.explain.counterfactual import Counterfactual
from otnn.explain.nearest import nearest
from otnn.memory import MEMORY_BUDGET, chunk_size
from otnn.metrics.maps import pixel_values, top_count
from otnn.metrics.result import MetricResult, summarise
from otnn.potential import class_scores

Point = Literal["boundary", "reflected"]


def validity(way: Counterfactual) -> MetricResult:
    """Share of the samples whose path reaches a point that is predicted as the target. Higher is better.

    1 or 0 per sample; a path without a direction, or that ends before the decision changes, counts as 0.
    """
    asked = _asked(way)
    return _summary("validity", torch.where(asked, way.flipped.double(), torch.nan), "up", way)


def distance_over_radius(way: Counterfactual, radius: Tensor | None = None) -> MetricResult:
    """L2 distance to the first point predicted as the target, over the radius of the pair: >= 1. Lower is better.

    At the optimum it is 1: the nearest change of the decision lies along the gradient, at the distance of the bound.
    Samples that do not flip, and all of a network without a bound, are left out.

    Args:
        way: the counterfactuals.
        radius: (n,) certified radii of the predictions; by default those of the pairs, which are the same where the
            target was not chosen.

    Raises:
        InputError: radii of another shape.
    """
    radius = way.pair_radius if radius is None else radius.to(way.distance)
    if radius.shape != way.distance.shape:
        raise InputError(f"radius: expected shape {tuple(way.distance.shape)}, got {tuple(radius.shape)}")
    usable = (radius > 0) & torch.isfinite(radius)
    ratio = torch.where(usable, way.distance / torch.where(usable, radius, 1.0), torch.nan)
    return _summary("distance_over_radius", ratio, "down", way)


def tightness(way: Counterfactual) -> MetricResult:
    """Radius of the pair, g(x), over the distance to its boundary along the path: in (0, 1]. Higher is better.

    Samples without a boundary, and all of a network without a bound, are left out.
    """
    return _summary("tightness", way.tightness, "up", way)


def data_distance(
    way: Counterfactual,
    images: Tensor,
    labels: Tensor,
    *,
    k: int = 5,
    point: Point = "reflected",
    reference: tuple[Tensor, Tensor] | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> MetricResult:
    """Mean L2 distance to the k nearest real images of the target class. Lower is nearer to the data.

    Args:
        way: the counterfactuals.
        images: (m, ...) real images, such as those of the training.
        labels: (m,) their classes; (m, labels) of 0 and 1 for a model with several labels.
        k: neighbours; a class with fewer images is left out.
        point: "boundary" or "reflected".
        reference: other real images and their labels, such as those of the test, not among `images`: each distance is
            divided by the mean of the same for the reference images of its target class, so that 1 is as near as real
            images are.
        memory_budget: bytes of one chunk of distances.

    Returns:
        `details`: "distance" (n,), and with a reference "reference" (n,), what it was divided by.

    Raises:
        InputError: images, labels or settings that do not fit.
    """
    queries = _point(way, point).to(images)
    distance = torch.full((len(queries),), torch.nan, dtype=images.dtype, device=images.device)
    usual = torch.full_like(distance, torch.nan)
    for state, label, chosen in _groups(way):
        chosen = chosen.to(images.device)
        own = images[_column(labels, label).to(images.device) == state]
        if len(own):
            found = nearest(own, queries[chosen], k=k, memory_budget=memory_budget)
            distance[chosen] = found.distance.mean(dim=1)
            if reference is not None:
                real, classes = reference
                real = real[_column(classes, label).to(real.device) == state].to(images)
                usual[chosen] = nearest(own, real, k=k, memory_budget=memory_budget).distance.mean()
    values, details = distance, {"distance": distance}
    if reference is not None:
        details["reference"] = usual
        values = torch.where(usual > 0, distance / torch.where(usual > 0, usual, 1.0), torch.nan)
    return _summary("data_distance", values, "down", way, details=details, settings={"k": k, "point": point})


def independent_score(
    way: Counterfactual,
    classify: Callable[[Tensor], Tensor],
    *,
    point: Point = "reflected",
    memory_budget: float = MEMORY_BUDGET,
) -> MetricResult:
    """Share of the counterfactual images that another classifier sees as the target. Higher is better.

    Args:
        way: the counterfactuals.
        classify: maps images (m, ...) in the dtype of `way` to scores (m, outputs), decided as a `Classifier`'s: by the
            sign of one output or of each label, by the largest of several.
        point: "boundary" or "reflected"; images that leave [0, 1] are clamped to it first, as they would be shown.
        memory_budget: bytes of one forward pass, where `classify` is a torch module; of its inputs otherwise.

    Returns:
        `details`: "probability" (n,), the softmax of the scores at the target.

    Raises:
        InputError: another point, or scores that are not one row per image.
    """
    images = _point(way, point)
    asked = _asked(way) & torch.isfinite(images).flatten(1).all(dim=1)
    seen = torch.full_like(way.distance, torch.nan)
    probability = torch.full_like(way.distance, torch.nan)
    model = classify if isinstance(classify, torch.nn.Module) else None
    with torch.no_grad():
        for rows in asked.nonzero().squeeze(1).split(chunk_size(images[:1], memory_budget, model)):
            scores = classify(images[rows].clamp(0, 1))
            if scores.ndim != 2 or len(scores) != len(rows):
                raise InputError(f"classify: expected scores ({len(rows)}, outputs), got shape {tuple(scores.shape)}")
            if way.label is not None:
                scores = scores.gather(1, way.label[rows].unsqueeze(1))
            logits, target = class_scores(scores), way.target[rows].unsqueeze(1)
            decided = logits.gather(1, target) > logits.scatter(1, target, -torch.inf).amax(dim=1, keepdim=True)
            seen[rows] = decided.squeeze(1).to(seen)
            probability[rows] = logits.softmax(dim=1).gather(1, target).squeeze(1).to(seen)
    return _summary(
        "independent_score",
        seen,
        "up",
        way,
        forwards=int(asked.sum()),
        details={"probability": probability},
        settings={"point": point},
    )


def concentration(way: Counterfactual, *, share: float = 0.1, point: Point = "reflected") -> MetricResult:
    """Share of the L2 norm of the change that lies in the pixels that change most. Higher is more concentrated.

    sqrt(sum of the squares over the top pixels / sum over all), of the norms over channels: sqrt(share) for a change
    that is the same everywhere, 1 for one that fits into the top pixels. Samples that do not move are left out.

    Args:
        way: the counterfactuals.
        share: of the pixels, in (0, 1].
        point: "boundary" or "reflected".

    Raises:
        InputError: another share or point.
    """
    change = _point(way, point) - way.inputs
    values, finite = pixel_values(change, signed=False)
    squares = values.double().square()
    top = squares.topk(top_count(values.shape[1], share), dim=1).values.sum(dim=1)
    total = squares.sum(dim=1)
    moved = finite & (total > 0) & _asked(way)
    part = torch.where(moved, (top / torch.where(moved, total, 1.0)).sqrt().clamp(max=1.0), torch.nan)
    return _summary("concentration", part, "up", way, settings={"share": share, "point": point})


def _asked(way: Counterfactual) -> Tensor:
    """Whether a counterfactual was asked for: (n,), the prediction was ahead of another target at the input."""
    return way.potential[:, 0] > 0


def _point(way: Counterfactual, point: str) -> Tensor:
    if point not in get_args(Point):
        raise InputError(f'point: expected "boundary" or "reflected", got {point!r}')
    return way.boundary if point == "boundary" else way.reflected


def _summary(
    name: str,
    values: Tensor,
    direction: Literal["up", "down"],
    way: Counterfactual,
    *,
    forwards: int = 0,
    details: dict[str, Tensor] | None = None,
    settings: dict[str, object] | None = None,
) -> MetricResult:
    """The values of the samples that were asked for a counterfactual."""
    values = torch.where(_asked(way).to(values.device), values.double(), torch.nan)
    reason = f"; {way.radius_reason}" if way.radius_reason and bool(values.isnan().all()) else ""
    return summarise(
        name,
        values,
        direction,
        signed=True,
        undefined=values.isnan(),
        counted_as=f"left out{reason}",
        forwards=forwards,
        details=details,
        settings=settings,
    )


def _groups(way: Counterfactual) -> list[tuple[int, int | None, Tensor]]:
    """The different targets, with the label each belongs to, and the samples (n,) bool that have them."""
    labels = [None] if way.label is None else way.label.unique().tolist()
    groups = []
    for label in labels:
        own = _asked(way) if label is None or way.label is None else _asked(way) & (way.label == label)
        for state in way.target[own].unique().tolist():
            groups.append((int(state), label, own & (way.target == state)))
    return groups


def _column(labels: Tensor, label: int | None) -> Tensor:
    """The classes (m,), or the states of one label among (m, labels)."""
    if labels.ndim != (1 if label is None else 2):
        raise InputError(
            f"labels: expected shape {'(m,)' if label is None else '(m, labels)'}, got {tuple(labels.shape)}"
        )
    return labels if label is None else labels[:, label]
