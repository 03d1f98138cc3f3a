"""One network of a run under attack: its right predictions, their certified radii, and what each attack finds."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from otnn.attacks.objective import Objective
from otnn.attacks.outcome import evaluate
from otnn.attacks.table import Attack
from otnn.batches import spread
from otnn.certify import certify
from otnn.explain.rays import refine
from otnn.models import Classifier, predict
from otnn.run.fit import scores_of

# An attack within a radius gets so much less, so that rounding leaves none of its points outside
SLACK = 1e-6
# To which share of the length points are drawn back to the boundary
_RESOLUTION = 2.0**-16
# Samples that an attack within a radius is run on at radius 0
AT_ZERO = 32


@dataclass
class Found:
    """What one attack found on the right predictions of a network, over all its runs.

    Attributes:
        distance: (n,) float64, of the nearest adversarial point; 0 where the prediction is wrong at the outset,
            infinity where none was found.
        points: (n, ...) that point, the input where there is none.
        at_largest: (n,) whether the run at the largest radius alone turned the sample.
        not_finite: points with a value or a score that is not finite, which count as failures.
        below: points nearer than the certified radius that float64 confirms.
        rounding: points nearer than it that float64 does not confirm: the rounding of float32; they do not count.
        seconds: of the attack, without its evaluation.
    """

    distance: Tensor
    points: Tensor
    at_largest: Tensor
    not_finite: int = 0
    below: int = 0
    rounding: int = 0
    seconds: float = 0.0

    def accuracy(self, radii: Sequence[float]) -> list[float]:
        """The share of all samples that are right and not turned within each radius."""
        return [float((self.distance > radius).double().mean()) for radius in radii]

    def turned(self) -> Tensor:
        """(n,) whether a right prediction was turned."""
        return (self.distance > 0) & (self.distance < torch.inf)


@dataclass
class Victim:
    """A network under attack.

    Args:
        name: of the network.
        model: in `eval()` mode, in float32.
        images: (n, ...) in [0, 1].
        labels: (n,).
        settings: `norm`, `loss` and `box` of all attacks.

    Attributes:
        scores: (n, classes) as executed.
        accuracy: by the predictions of the package, which know nothing of an attack.
        right: (n,) whether the prediction is right, as an attack sees it.
        radius: (n,) float64, certified in the norm of the attacks; 0 where the prediction is wrong.
        direction: (n, ...) the gradient of the loss at the images, along which the gradient step goes.
    """

    name: str
    model: Classifier
    images: Tensor
    labels: Tensor
    settings: Mapping[str, Any]
    scores: Tensor = field(init=False)
    accuracy: float = field(init=False)
    right: Tensor = field(init=False)
    radius: Tensor = field(init=False)
    direction: Tensor = field(init=False)

    def __post_init__(self) -> None:
        objective = self._objective()
        self.scores = objective.scores(self.images)
        index = torch.arange(len(self.images), device=self.images.device)
        finite = torch.isfinite(self.scores).all(dim=1)
        with torch.no_grad():
            said = predict(scores_of(self.model, self.images))
        self.accuracy = float((said == self.labels.cpu()).double().mean())
        self.right = finite & (self.scores.argmax(dim=1) == self.labels)
        self.direction = objective.slopes(self.images, index)[1]
        self._exact = copy.deepcopy(self.model).double()
        self.radius = torch.where(self.right, self._certified(), 0.0)

    def run(
        self, attack: Attack, radii: Sequence[float], seed: int, extra: Mapping[str, Any], begin: Callable[[str], None]
    ) -> Found:
        """Run an attack on the right predictions.

        One within a radius is run at each: at 0 on a few samples, at those between on what no smaller one turned, and
        at the largest on all again, so that the accuracy there does not rest on the smaller ones.

        Args:
            attack: of `otnn.attacks.ATTACKS`.
            radii: ascending, from 0.
            seed: of what it draws, anew for each run.
            extra: its own settings.
            begin: called with a text before each run.
        """
        found = Found(
            distance=torch.where(self.right, torch.inf, 0.0).double(),
            points=self.images.clone(),
            at_largest=torch.zeros_like(self.right),
        )
        for radius, index in self._runs(attack, radii, found):
            begin("" if radius is None else f"radius {radius:.4g}")
            if not len(index):
                continue
            how: dict[str, Any] = {**self.settings, **extra}
            if attack.draws:
                how["generator"] = torch.Generator().manual_seed(seed)
            limit = () if radius is None else (radius * (1 - SLACK),)
            start = time.perf_counter()
            points = attack.function(self.model, self.images[index], self.labels[index], *limit, **how)
            found.seconds += time.perf_counter() - start
            success = self.judge(found, index, points)
            if radius == radii[-1] or radius is None:
                found.at_largest[index] = success & (found.distance[index] <= radii[-1])
        return found

    def shortened(self, found: Found) -> Found:
        """The found points drawn towards their inputs along the segment as far as they stay adversarial."""
        index = found.turned().nonzero().squeeze(1)
        near = Found(found.distance.clone(), found.points.clone(), found.at_largest.clone())
        if not len(index):
            return near
        objective = self._objective(index)
        start, change = self.images[index], found.points[index] - self.images[index]

        def potential_at(length: Tensor, rows: Tensor) -> Tensor:
            points = start[rows] + spread(length, change).to(change.dtype) * change[rows]
            return -objective.margin(objective.scores(points), rows).to(length.dtype)

        none = torch.zeros_like(found.distance[index])
        length = refine(potential_at, none, none + 1, resolution=_RESOLUTION)
        self.judge(near, index, start + spread(length, change).to(change.dtype) * change)
        return near

    def judge(self, found: Found, index: Tensor, points: Tensor) -> Tensor:
        """Evaluate the points of samples (m,), keep the nearest, and return which count as successes (m,)."""
        images, labels = self.images[index], self.labels[index]
        norm, box = self.settings["norm"], self.settings["box"]
        outcome = evaluate(self.model, images, labels, points, norm=norm, box=box)
        success, distance = outcome.success.clone(), outcome.distance
        # the exact map may be turned where float32 is not: its radius would be as wrong
        moved = outcome.finite & (distance > 0) & (distance < self.radius[index])
        if box:
            moved &= ((points >= 0) & (points <= 1)).flatten(1).all(dim=1)
        near = moved.nonzero().squeeze(1)
        if len(near):
            exact = evaluate(self._exact, images[near].double(), labels[near], points[near].double(), norm=norm)
            found.below += int(exact.success.sum())
            found.rounding += int((success[near] & ~exact.success).sum())
            success[near] = exact.success
        found.not_finite += int((~outcome.finite).sum())
        better = success & (distance < found.distance[index])
        found.distance[index[better]] = distance[better]
        found.points[index[better]] = points[better]
        return success

    def deterministic(self) -> bool:
        """Whether a second pass gives the same scores, bit by bit."""
        return bool(torch.equal(self._objective().scores(self.images), self.scores))

    def gradients(self) -> dict[str, int]:
        """How many right predictions have a gradient of the loss that is zero, or not finite."""
        flat = self.direction[self.right].flatten(1)
        finite = torch.isfinite(flat).all(dim=1)
        return {"zero": int((finite & (flat == 0).all(dim=1)).sum()), "not_finite": int((~finite).sum())}

    def _runs(self, attack: Attack, radii: Sequence[float], found: Found) -> Iterator[tuple[float | None, Tensor]]:
        """The radius and the samples of each run."""
        right = self.right.nonzero().squeeze(1)
        if attack.minimal:
            yield None, right
            return
        for radius in radii:
            if radius == 0:
                yield radius, right[:AT_ZERO]
            elif radius == radii[-1]:
                yield radius, right
            else:
                yield radius, right[found.distance[right] > radius]

    def _objective(self, index: Tensor | None = None) -> Objective:
        images, labels = (self.images, self.labels) if index is None else (self.images[index], self.labels[index])
        return Objective(self.model, images, labels, loss=self.settings["loss"], box=self.settings["box"])

    def _certified(self) -> Tensor:
        """Certified radii of the map of the stored weights; in the largest norm, that in L2 over sqrt(values)."""
        certificate = certify(self.model, self.images)
        # float32 may see another class than the exact map that is certified, within its rounding
        radius = torch.where(certificate.prediction == self.labels.cpu(), certificate.radius, 0.0)
        radius = radius.to(self.images.device)
        if self.settings["norm"] == "linf":
            radius = radius / self.images[0].numel() ** 0.5 * (1 - 2.0**-50)
        return radius


def runs(attack: Attack, radii: Sequence[float]) -> int:
    """How many runs `Victim.run` makes."""
    return 1 if attack.minimal else len(radii)
