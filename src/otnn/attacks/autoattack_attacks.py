"""Attacks of AutoAttack, from pyautoattack, behind the signature of ours: APGD, FAB and Square.

The library knows the box [0, 1] alone, and float32. Without a box each sample is moved and scaled so that the ball it
is attacked in touches that box at most (APGD, Square), or that the walls lie 20 units of the sample away (FAB, see
`otnn.attacks.adapter.scales`): clamping changes nothing then. All three follow steps that are shares of the radius or
of distances, and so do not see the scale.
"""

from typing import Any

import torch
from torch import Tensor, nn

from otnn.attacks.adapter import View, as_they_are, missing, run, scales, settle
from otnn.attacks.ball import project
from otnn.attacks.objective import Objective, check_norm, radii_of
from otnn.attacks.step import check_count
from otnn.batches import spread
from otnn.errors import InputError
from otnn.memory import MEMORY_BUDGET

_NORMS = {"l2": "L2", "linf": "Linf"}
# Half of the box of FAB without one, in units of the sample
_WIDE = 20.0
# Square cuts L2 noise into five tiles a side, each as high as wide
TILES = 5


def apgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: float | Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    steps: int = 100,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """PGD with momentum from random starts, whose step is halved where the loss has stopped to grow.

    The library raises the cross-entropy or DLR, the margin over the spread of the largest scores, which takes three
    classes, or four with a target. Here the loss is the margin itself (or the cross-entropy), for any number of
    classes, and of scores in units of each sample's lead at the start, so that their scale does not matter.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        radius: of the balls, one for all or (n,), in input units.
        norm: "l2" or "linf".
        targeted: whether the labels are targets.
        loss: "margin" or "cross_entropy".
        box: stay in [0, 1].
        steps: of each start.
        restarts: starts; samples that are won are not attacked again.
        generator: of the starts, which depend on the other samples of a chunk, and so on the batch and on
            `memory_budget`; seeded with 0 by default.
        memory_budget: bytes.

    Returns:
        (n, ...) the points with the largest loss, at most the radius away in float64 and in the box; the input where it
        is won from the start.

    Raises:
        InputError: what cannot be attacked; pyautoattack is not installed.

    Source: Croce and Hein 2020, algorithm 1.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> point = apgd(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]), 0.71)  # the distance is 0.7
        >>> bool(model(point) < 0)
        True
    """
    check_norm(norm)
    check_count("steps", steps)
    check_count("restarts", restarts)
    kind = _apgd()
    objective = Objective(model, inputs, labels, targeted=targeted, loss=loss, box=box, memory_budget=memory_budget)
    radii, inputs = radii_of(radius, inputs), _plain(inputs)

    def chunk(index: Tensor) -> Tensor:
        images = inputs[index]
        objective.slopes(images[:1], index[:1])  # refuses what has no gradient before the library meets it
        # the library squares gradients and compares losses in float32
        size = objective.margin(objective.scores(images), index).abs()
        factor = torch.where(torch.isfinite(size) & (size > torch.finfo(size.dtype).tiny), 1 / size, 1.0)
        if box:
            view = View(objective, index, *as_they_are(images), factor, duel=False)
            start, eps = images.float(), spread(radii[index].float(), images)
        else:
            view, start = _ball(objective, images, index, radii[index], factor)
            eps = torch.full_like(start[:1], 0.5)
        attack = kind(view, n_iter=steps, norm=_NORMS[norm], eps=eps, loss="ce-targeted", device=inputs.device)
        attack.init_hyperparam(start)
        best, best_lead = images, torch.full_like(radii[index], -torch.inf)
        for _ in range(restarts):
            # the points of the largest loss, and the last ones that won
            found = attack.attack_single_run(start, torch.zeros_like(index))
            for points in (found[0], found[3]):
                best, best_lead = _better(
                    objective, images, index, radii[index], norm, view.images(points), best, best_lead
                )
            if bool((best_lead > 0).all()):
                break
        return best

    return run(objective, inputs, chunk, generator=generator, memory_budget=memory_budget)


def square(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: float | Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    queries: int = 1000,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Random search by squares of noise, from scores alone.

    In the box every proposal is clamped where it is scored; in L2 the library would spend the length that this saves
    elsewhere, with one radius for all samples. The squares of pyautoattack 0.2 never reach the last row and column,
    which keep the noise of the start.

    Args:
        model: see `Objective`.
        inputs: (n, channels, height, width) finite; in [0, 1] if `box`; in "l2" as high as wide, and of at least 5 x 5
            pixels.
        labels: (n,) the true classes, or the targets.
        radius: of the balls, one for all or (n,), in input units.
        norm: "l2" or "linf".
        targeted: whether the labels are targets.
        loss: "margin" or "cross_entropy", by which a proposal is kept.
        box: stay in [0, 1].
        queries: forwards at most; AutoAttack takes 5,000.
        generator: of the search, which depends on the other samples of a chunk, and so on the batch and on
            `memory_budget`; seeded with 0 by default.
        memory_budget: bytes.

    Returns:
        (n, ...) the points with the largest loss, at most the radius away in float64 and in the box; the input where it
        is won from the start.

    Raises:
        InputError: what cannot be attacked; pyautoattack is not installed.

    Source: Andriushchenko et al. 2020, algorithms 2 and 3.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1, bias=False)).eval()
        >>> _ = nn.init.ones_(model[1].weight)
        >>> point = square(model, torch.full((1, 1, 6, 6), 0.5), torch.tensor([1]), 1.0, norm="linf")
        >>> bool(model(point) < 0)
        True
    """
    check_norm(norm)
    check_count("queries", queries)
    kind = _square()
    objective = Objective(model, inputs, labels, targeted=targeted, loss=loss, box=box, memory_budget=memory_budget)
    if not searchable(inputs, norm):
        which = f", as high as wide and of at least {TILES} x {TILES} pixels" if norm == "l2" else ""
        raise InputError(
            f"inputs: square in {norm} takes images (n, channels, height, width){which}, got shape "
            f"{tuple(inputs.shape)}; attack others with pgd"
        )
    radii, inputs = radii_of(radius, inputs), _plain(inputs)

    def chunk(index: Tensor) -> Tensor:
        images = inputs[index]
        view, start = _ball(objective, images, index, radii[index], images.new_ones(len(index)))
        attack = kind(view, norm=_NORMS[norm], n_queries=queries, eps=0.5, device=inputs.device)
        attack.init_hyperparam(start)
        # samples by their place in the chunk, which the library hands back beside the points of those still open
        _, points = attack.attack_single_run(start, torch.arange(len(index), device=inputs.device))
        return project(images, view.images(points), radii[index], norm, box=box)

    return run(objective, inputs, chunk, generator=generator, memory_budget=memory_budget)


def searchable(inputs: Tensor, norm: str) -> bool:
    """Whether Square takes inputs: images (n, channels, height, width), in L2 square ones of at least 5 x 5 pixels.

    Example:
        >>> images = torch.zeros(1, 1, 12, 6)
        >>> searchable(images, "l2"), searchable(images, "linf")
        (False, True)
    """
    if inputs.ndim != 4 or 0 in inputs.shape:
        return False
    height, width = inputs.shape[2:]
    return norm != "l2" or height == width >= TILES


def fab(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    steps: int = 100,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Projections onto the linearised boundary, drawn towards the input, with steps back once the class has changed.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        norm: "l2" or "linf".
        targeted: whether the labels are targets; each step then goes to the boundary of the target.
        loss: "margin": the attack follows differences of scores.
        box: stay in [0, 1].
        steps: of the one start; each takes one backward for each class.
        generator: not needed: the first start is the input.
        memory_budget: bytes.

    Returns:
        (n, ...) points; the input where the attack fails, or where it is won from the start.

    Raises:
        InputError: what cannot be attacked; pyautoattack is not installed.

    Source: Croce and Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack".

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> point = fab(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]))  # the distance is 0.7
        >>> 0.7 <= float((point - 0.5).norm()) < 0.71
        True
    """
    check_norm(norm)
    check_count("steps", steps)
    if loss != "margin":
        raise InputError(f"loss: fab takes margin, got {loss!r}")
    kind = _fab()
    objective = Objective(model, inputs, labels, targeted=targeted, loss=loss, box=box, memory_budget=memory_budget)
    inputs = _plain(inputs)

    def chunk(index: Tensor) -> Tensor:
        images = inputs[index]
        length, size = scales(objective, images, index)
        if box:
            view = View(objective, index, *as_they_are(images), 1 / size, duel=targeted)
            start = images.float()
        else:
            unit = spread(2 * _WIDE * length, images)
            view = View(objective, index, images - unit / 2, unit, 1 / size, duel=targeted)
            start = torch.full_like(images, 0.5, dtype=torch.float32)
        attack = kind(view, norm=_NORMS[norm], n_iter=steps, device=inputs.device)
        points: Tensor = attack.attack_single_run(start, view.labels)
        return view.images(points)

    return settle(objective, inputs, run(objective, inputs, chunk, generator=generator, memory_budget=memory_budget))


def _plain(inputs: Tensor) -> Tensor:
    """The inputs without a graph and in the usual layout, as the library flattens what it is given by `view`."""
    return inputs.detach().contiguous()


def _ball(objective: Objective, images: Tensor, index: Tensor, radii: Tensor, factor: Tensor) -> tuple[View, Tensor]:
    """Samples whose balls become those of radius 1/2 around the centre of [0, 1], and where they start."""
    radius = spread(radii.to(images), images)
    view = View(objective, index, images - radius, 2 * radius, factor, duel=False)
    return view, torch.full_like(images, 0.5, dtype=torch.float32)


def _better(
    objective: Objective,
    images: Tensor,
    index: Tensor,
    radii: Tensor,
    norm: str,
    points: Tensor,
    best: Tensor,
    best_lead: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of each sample the point with the larger lead, after the projection onto the ball."""
    points = project(images, points.to(images), radii, norm, box=objective.box)
    scores = objective.scores(points)
    found = torch.where(torch.isfinite(scores).all(dim=1), objective.margin(scores, index), -torch.inf)
    better = found > best_lead
    return torch.where(spread(better, images), points, best), torch.where(better, found.to(best_lead), best_lead)


def _apgd() -> Any:
    base = _library("autopgd_base").APGDAttack

    class Attack(base):  # type: ignore[misc,valid-type]
        """APGD on the loss of the objective; its "scores" are a duel, in which class 0 is what the attack leaves."""

        def __init__(self, view: View, **settings: Any) -> None:
            super().__init__(self._look, **settings)
            self.view = view
            self.value: Tensor | None = None

        def _look(self, points: Tensor) -> Tensor:
            scores = self.view(points)
            self.value = self.view.objective.value(scores, self.view.index)
            margin = self.view.objective.margin(scores, self.view.index)
            return torch.stack([torch.zeros_like(margin), margin], dim=1)

        def ce_loss_targeted(self, scores: Tensor, labels: Tensor) -> Tensor | None:
            return self.value

    return Attack


def _square() -> Any:
    base = _library("square").SquareAttack

    class Attack(base):  # type: ignore[misc,valid-type]
        """Square on the loss of the objective, with the places of samples where the library has their labels."""

        def margin_and_loss(self, points: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
            view: View = self.predict
            index = view.index[places]
            images = view.objective.inside(view.origin[places] + view.unit[places] * points.to(view.origin))
            scores = view.objective.scores(images)
            margin = view.objective.margin(scores, index)
            value = view.objective.value(scores, index)
            # what is not finite is open, and worse than all that is
            finite = torch.isfinite(scores).all(dim=1)
            most = torch.finfo(margin.dtype).max
            margin, value = (torch.where(finite, each, -most) for each in (margin, value))
            # a lead of 0 counts as neither open nor won, and breaks the library's loop
            tiny = torch.finfo(margin.dtype).tiny
            left = torch.where(view.objective.won(scores, index), (-margin).clamp(max=-tiny), (-margin).clamp(min=tiny))
            return left.to(points), -value.to(points)

    return Attack


def _fab() -> Any:
    base = _library("fab_pt").FABAttack_PT

    class Attack(base):  # type: ignore[misc,valid-type]
        """FAB that holds every sample of the chunk for open at its start, so that it drops none by rounding."""

        def attack_single_run(self, x: Tensor, y: Tensor) -> Tensor:
            self.first: Tensor | None = y
            points: Tensor = super().attack_single_run(x, y)
            return points

        def _get_predicted_label(self, x: Tensor) -> Tensor:
            if self.first is not None:
                first, self.first = self.first, None
                return first
            predicted: Tensor = super()._get_predicted_label(x)
            return predicted

    return Attack


def _library(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"pyautoattack.{module}")
    except ImportError as error:
        raise missing("pyautoattack", error) from None
