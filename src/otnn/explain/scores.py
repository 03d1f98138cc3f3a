"""What is explained: one number per sample, the score of its target, for any model with outputs (batch, classes)."""

from hashlib import sha256
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from otnn.checks import check_images, check_labels
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.models import Classifier, check_model, check_precision
from otnn.potential import class_scores, nearest_rival, pair_distances

Score = Literal["logit", "margin"]
SCORES: tuple[Score, ...] = ("logit", "margin")


class Scorer:
    """The scores of the targets of a batch: called with inputs, and the sample that each of them came from.

    "logit" is z_t, as in captum. "margin" is z_t - z_j, j the strongest other class at the sample itself; of a
    `Classifier` with proven bounds it is the pair potential (z_t - z_j) / (L ||w_t - w_j||), which is 1-Lipschitz. One
    output z counts as the two scores -z/2 and z/2 for "margin", and as -z and z for "logit".

    Args:
        model: any module in `eval()` mode that maps (batch, ...) to (batch, classes) scores, or to one score each.
        inputs: (batch, ...) the samples to explain.
        target: (batch,) integers, one class for all, or one-hot rows (batch, classes).
        score: "logit" or "margin".

    Attributes:
        target: (batch,) the classes.
        rival: (batch,) the strongest other class of each sample; None for "logit".
        classes: how many there are.

    Raises:
        InputError: inputs, targets or a model that cannot be used, such as one that returns a tuple.

    Example:
        >>> scorer = Scorer(nn.Linear(2, 3).eval(), torch.rand(4, 2), 1, "margin")
        >>> scorer(torch.rand(8, 2), torch.arange(4).repeat_interleave(2)).shape
        torch.Size([8])
    """

    def __init__(self, model: nn.Module, inputs: Tensor, target: Tensor | int, score: str = "logit") -> None:
        check_images(inputs)
        if score not in SCORES:
            raise InputError(f'score: expected "logit" or "margin", got {score!r}')
        if model.training:
            raise InputError("the model is in training mode; call model.eval() before explaining")
        self.model, self.score = model, score
        if score == "margin" and isinstance(model, Classifier) and model.multilabel:
            raise InputError(
                "score: a margin is one of classes that exclude each other; this model decides labels one by one"
            )
        if isinstance(model, Classifier):
            check_model(model, inputs)
            check_precision(model, inputs)
            self.classes = model.classes
        else:
            self.classes = self._count(inputs)
        self.target = _targets(target, len(inputs), self.classes).to(inputs.device)
        self.rival: Tensor | None = None
        self.scale: Tensor | None = None
        if score == "margin":
            self._find_rivals(inputs)

    def _count(self, inputs: Tensor) -> int:
        """How many classes a forward of one sample tells."""
        sample = inputs[:1].clone()
        with torch.no_grad():
            classes = self._class_scores(sample).shape[1]
        if not torch.equal(sample, inputs[:1]):
            raise InputError(
                "model: it writes into its inputs, as an operation in place does on its first line; "
                "let it begin with a copy: lambda x: model(x.clone())"
            )
        return classes

    def _find_rivals(self, inputs: Tensor) -> None:
        """Set the strongest other class of each sample, and the constant of the difference where it is proven."""
        with torch.no_grad():
            scores = torch.cat([self._class_scores(part) for part in inputs.split(64)])
        if isinstance(self.model, Classifier):
            distances = _distances(self.model).to(inputs.device)
            self.rival = nearest_rival(scores, self.target, distances)
            self.scale = distances[self.target, self.rival].to(scores)
        else:
            self.rival = scores.scatter(1, self.target.unsqueeze(1), -torch.inf).argmax(dim=1)

    def __call__(self, inputs: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the scores (n,) of inputs (n, ...) that came from the samples `index` (n,), by default all in turn."""
        target, rival, scale = self.target, self.rival, self.scale
        if index is not None:
            target = target[index]
            rival, scale = (None if values is None else values[index] for values in (rival, scale))
        scores = self._class_scores(inputs)
        own = scores.gather(1, target.unsqueeze(1)).squeeze(1)
        if rival is None:
            return own
        difference: Tensor = own - scores.gather(1, rival.unsqueeze(1)).squeeze(1)
        return difference if scale is None else difference / scale

    def _class_scores(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.model(inputs)
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"model: expected a tensor of scores (batch, classes), got {type(outputs).__name__}; "
                "wrap the model so that it returns its scores alone"
            )
        if outputs.ndim == 1:
            outputs = outputs.unsqueeze(1)
        if outputs.ndim != 2 or len(outputs) != len(inputs) or outputs.shape[1] == 0:
            raise InputError(f"model: expected scores ({len(inputs)}, classes), got shape {tuple(outputs.shape)}")
        if outputs.shape[1] > 1:
            return outputs
        scores: Tensor = class_scores(outputs)  # halves z
        return 2 * scores if self.score == "logit" else scores


def check_scored(scorer: Scorer, inputs: Tensor) -> None:
    """Refuse inputs that are not the samples that the scorer was built on.

    Raises:
        InputError: inputs that cannot be used, or another number of them.
    """
    check_images(inputs)
    if len(scorer.target) != len(inputs):
        raise InputError(
            f"inputs: expected the {len(scorer.target)} samples that the Scorer was built on, got {len(inputs)}"
        )


# Bounds of ordinary networks take a second, and every call for the same weights needs the same ones.
_known: WeakKeyDictionary[Classifier, tuple[bytes, Tensor]] = WeakKeyDictionary()


def _distances(model: Classifier) -> Tensor:
    """`pair_distances` of a model, kept while its weights are what they were, by content: `.data` leaves no trace."""
    digest = sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    state = digest.digest()
    if model not in _known or _known[model][0] != state:
        _known[model] = state, pair_distances(model, bound(model.body, model.input_shape))
    return _known[model][1]


def _targets(target: Tensor | int, count: int, classes: int) -> Tensor:
    """Targets as (count,) integers in 0..classes-1."""
    if isinstance(target, int | np.integer):
        target = torch.full((count,), int(target))
    if not isinstance(target, Tensor):
        raise InputError(
            f"target: expected a tensor of {count} integers or one class for all, got {type(target).__name__}; "
            "convert it with torch.as_tensor()"
        )
    if target.ndim == 0:
        target = target.expand(count)
    if target.ndim == 2 and tuple(target.shape) == (count, classes):
        if not bool(((target == 0) | (target == 1)).all() and (target.sum(dim=1) == 1).all()):
            raise InputError("target: expected one-hot rows, got others; give integers (batch,) instead")
        target = target.argmax(dim=1)
    check_labels(target, count, classes, what="target")
    return target.long()
