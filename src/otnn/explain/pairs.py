"""The two outcomes that each sample of a batch stands between, and the potential whose sign tells them apart."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from otnn.checks import check_labels
from otnn.errors import InputError
from otnn.lipschitz import LipschitzBound
from otnn.memory import chunk_size
from otnn.models import Classifier, predict
from otnn.potential import class_scores, label_distances, nearest_rival, pair_distances


@dataclass(frozen=True)
class Pairs:
    """What decides between prediction and target, sample by sample.

    Attributes:
        model: a classifier in `eval()` mode.
        prediction: (n,) the class at the input; with several labels, 0 or 1 for the label that is looked at.
        target: (n,) the class to go to; with several labels, the state of that label; the default where none is known.
        chosen: whether the targets were given.
        known: (n,) whether a target is known: not where -1 was given.
        label: (n,) that label; None of a model that decides between classes.
        scale: (n,) float64, what the difference of the scores is divided by: its Lipschitz constant, or 1 without a
            bound; 0 where the two rows of the head are equal, and then the difference is not divided.
        bounded: whether it is that constant, so that the potential is 1-Lipschitz and its unit that of the input.
        forward: images per forward pass.
        backward: images per forward and backward pass.
    """

    model: Classifier
    prediction: Tensor
    target: Tensor
    chosen: bool
    known: Tensor
    label: Tensor | None
    scale: Tensor
    bounded: bool
    forward: int
    backward: int

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Scores (m, outputs) of images (m, ...), by chunks within the memory budget."""
        with parametrize.cached():
            return torch.cat([self.model(part) for part in images.split(self.forward)])

    def potential(self, scores: Tensor, index: Tensor) -> Tensor:
        """G (m,) from scores (m, outputs) of the samples `index` (m,): positive where the prediction is ahead."""
        logits = class_scores(self._of_label(scores, index))
        ends = [logits.gather(1, side[index].unsqueeze(1)).squeeze(1) for side in (self.prediction, self.target)]
        scale = self.scale[index].to(scores)
        return (ends[0] - ends[1]) / torch.where(scale > 0, scale, 1.0)

    def lead(self, scores: Tensor, index: Tensor) -> Tensor:
        """By how much the strongest other class leads the target: (m,), negative where the target is predicted."""
        logits, target = class_scores(self._of_label(scores, index)), self.target[index].unsqueeze(1)
        return logits.scatter(1, target, -torch.inf).amax(dim=1) - logits.gather(1, target).squeeze(1)

    def reached(self, scores: Tensor, index: Tensor) -> Tensor:
        """Whether the target is predicted, ahead of all others and not in a tie: (m,)."""
        return self.lead(scores, index) < 0

    def potential_at(self, point: Callable[[Tensor, Tensor], Tensor], level: Tensor) -> Callable[..., Tensor]:
        """The function of lengths (m,) and samples (m,) that is g - level at the images that `point` makes of them."""

        def value(length: Tensor, index: Tensor) -> Tensor:
            return self.potential(self.scores(point(length, index)), index) - level[index]

        return value

    def slopes(self, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials (m,) and their gradients (m, ...) at images (m, ...) of the samples `index`."""
        values, gradients = [], []
        with torch.enable_grad():
            for part, rows in zip(images.split(self.backward), index.split(self.backward), strict=True):
                part = part.detach().requires_grad_()
                value = self.potential(self.model(part), rows)
                gradients.append(torch.autograd.grad(value.sum(), part)[0])
                values.append(value.detach())
        return torch.cat(values), torch.cat(gradients)

    def _of_label(self, scores: Tensor, index: Tensor) -> Tensor:
        return scores if self.label is None else scores.gather(1, self.label[index].unsqueeze(1))


@torch.no_grad()
def choose_pairs(
    model: Classifier,
    inputs: Tensor,
    body: LipschitzBound | None,
    target: Tensor | int | None,
    label: Tensor | int | None,
    memory_budget: float,
) -> tuple[Pairs, Tensor]:
    """Predict the inputs, check the targets or choose the nearest ones.

    Returns:
        The pairs, and the scores (n, outputs) of the inputs.

    Raises:
        InputError: targets or labels that fit neither model nor inputs.
    """
    count, device = len(inputs), inputs.device
    forward, backward = (chunk_size(inputs[:1], memory_budget, model, gradient=each) for each in (False, True))
    scores = torch.cat([model(part) for part in inputs.split(forward)])
    bounded = body is not None and math.isfinite(body.constant)
    # the choice of the nearest rival or label depends on no constant of the body
    known = body if body is not None and bounded else LipschitzBound(1.0, ())
    labels = None
    if model.multilabel:
        each = label_distances(model, known).to(device)
        labels = _labels(label, scores, each)
        prediction = predict(scores.gather(1, labels.unsqueeze(1)))
        wanted, classes, scale = 1 - prediction, 2, each[labels]
    else:
        if label is not None:
            raise InputError("label: expected none, as this model decides between classes; choose a target instead")
        distances = pair_distances(model, known).to(device)
        prediction = predict(scores)
        wanted, classes = nearest_rival(scores, prediction, distances), model.classes
    known_target = torch.ones_like(wanted, dtype=torch.bool)
    if target is not None:
        target = _one_each(target, count, classes, "target", unknown=True).to(device)
        known_target = target >= 0
        wanted = torch.where(known_target, target, wanted)
    if not model.multilabel:
        scale = distances[prediction, wanted]
    scale = scale if bounded else torch.ones_like(scale)
    chosen = target is not None
    pairs = Pairs(model, prediction, wanted, chosen, known_target, labels, scale, bounded, forward, backward)
    return pairs, scores


def _labels(label: Tensor | int | None, scores: Tensor, distances: Tensor) -> Tensor:
    """The label to flip of each sample (n,): the given one, or the one that may be nearest to its boundary."""
    if label is None:
        return (scores.abs() / distances.to(scores)).nan_to_num(nan=torch.inf).argmin(dim=1)
    return _one_each(label, len(scores), scores.shape[1], "label").to(scores.device)


def _one_each(given: Tensor | int, count: int, classes: int, what: str, *, unknown: bool = False) -> Tensor:
    """One integer for all, or one for each sample, as (count,) int64; a tensor may hold -1 for what is not known."""
    if isinstance(given, int):
        given, unknown = torch.full((count,), given), False
    if not isinstance(given, Tensor):
        raise InputError(
            f"{what}: expected an integer for all samples or a tensor ({count},), got {type(given).__name__}; "
            "convert it with torch.as_tensor()"
        )
    check_labels(given.masked_fill(given == -1, 0) if unknown else given, count, classes, what=what)
    return given.long()
