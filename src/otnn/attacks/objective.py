"""What an attack raises, and when it has won: margin or cross-entropy of any classifier, sample by sample."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from otnn.batches import sample_norm
from otnn.checks import check_images, check_labels
from otnn.errors import InputError
from otnn.memory import MEMORY_BUDGET, chunk_size
from otnn.models import Classifier, check_model, check_precision
from otnn.potential import class_scores

Norm = Literal["l2", "linf"]
NORMS: tuple[Norm, ...] = ("l2", "linf")
Loss = Literal["margin", "cross_entropy"]
LOSSES: tuple[Loss, ...] = ("margin", "cross_entropy")


class Objective:
    """A batch under attack: its loss, to be raised, and whether the attack has won.

    With y the label of a sample and z its class scores (one output z counts as the two scores -z/2 and z/2, so that
    both losses are defined for it):

    * "margin": max over j != y of z_j - z_y, positive where the prediction is another class;
    * "cross_entropy": -log softmax(z)_y, which flattens out where y leads by far.

    A targeted attack takes the target for y and raises the negative of either.

    Args:
        model: any module, all of it in `eval()` mode, that maps (batch, ...) to scores (batch, outputs) and leaves its
            input as it is; a `Classifier` with several labels is refused, as its labels do not exclude each other.
        inputs: (n, ...) finite; within [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        targeted: whether the labels are targets.
        loss: "margin" or "cross_entropy".
        box: whether the attack stays in [0, 1].
        memory_budget: bytes that the activations of one pass may take.

    Attributes:
        classes: how many the model decides between, at least 2.
        batch: how many samples one backward takes.

    Raises:
        InputError: what cannot be attacked.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = nn.init.constant_(model.weight, 1.0)
        >>> objective = Objective(model, torch.tensor([[0.25, 0.5]]), torch.tensor([1]))
        >>> value, gradient = objective.slopes(torch.tensor([[0.25, 0.5]]), torch.tensor([0]))
        >>> value, gradient
        (tensor([-0.7500]), tensor([[-1., -1.]]))
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        targeted: bool = False,
        loss: str = "margin",
        box: bool = False,
        memory_budget: float = MEMORY_BUDGET,
    ) -> None:
        if loss not in LOSSES:
            raise InputError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
        check_attacked(model, inputs, labels, box=box)
        self.model, self.targeted, self.loss, self.box = model, targeted, loss, box
        self.classes = self._first(inputs[:1]).shape[1]
        check_labels(labels, len(inputs), self.classes, what="targets" if targeted else "labels")
        self.labels = labels.to(inputs.device).long()
        self._forward, self.batch = (
            chunk_size(inputs[:1], memory_budget, model, gradient=each) for each in (False, True)
        )

    def value(self, scores: Tensor, index: Tensor) -> Tensor:
        """The loss (m,) of class scores (m, classes) of the samples `index` (m,)."""
        if self.loss == "margin":
            return self.margin(scores, index)
        entropy = nn.functional.cross_entropy(scores, self.labels[index], reduction="none")
        return -entropy if self.targeted else entropy

    def margin(self, scores: Tensor, index: Tensor) -> Tensor:
        """By how much the attack leads (m,): positive where it has won, whatever the loss."""
        label = self.labels[index].unsqueeze(1)
        own = scores.gather(1, label).squeeze(1)
        lead = scores.scatter(1, label, -torch.inf).amax(dim=1) - own
        return -lead if self.targeted else lead

    def won(self, scores: Tensor, index: Tensor) -> Tensor:
        """Whether another class, or the target, is predicted (m,): False where a score is not finite."""
        is_label = scores.argmax(dim=1) == self.labels[index]
        return (is_label if self.targeted else ~is_label) & torch.isfinite(scores).all(dim=1)

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Class scores (m, classes) of images (m, ...), by chunks within the memory budget."""
        with parametrize.cached():
            return torch.cat([self.logits(part) for part in images.split(self._forward)])

    def slopes(self, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (m,) and their gradients (m, ...) at images (m, ...) of the samples `index` (m,)."""
        return self.gradients(images, index, self.value)

    def gradients(
        self, images: Tensor, index: Tensor, function: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Values (m,) of any function of class scores and samples, and their gradients (m, ...) at the images.

        Raises:
            InputError: no gradient reaches the images.
        """
        values, gradients = [], []
        with torch.enable_grad(), parametrize.cached():
            for part, rows in zip(images.split(self.batch), index.split(self.batch), strict=True):
                leaf = part.detach().requires_grad_()
                value = function(self.logits(leaf), rows)
                gradients.append(slope_of(value.sum(), leaf))
                values.append(value.detach())
        return torch.cat(values), torch.cat(gradients)

    def inside(self, images: Tensor) -> Tensor:
        """The images, clamped to [0, 1] if the attack stays in the box."""
        return images.clamp(0, 1) if self.box else images

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (m, classes) of one chunk of images (m, ...), with their graph; one output becomes two."""
        outputs = self.model(images)
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"model: expected a tensor of scores (batch, outputs), got {type(outputs).__name__}; "
                "wrap the model so that it returns its scores alone"
            )
        if outputs.ndim == 1:
            outputs = outputs.unsqueeze(1)
        if outputs.ndim != 2 or len(outputs) != len(images) or outputs.shape[1] == 0:
            raise InputError(f"model: expected scores ({len(images)}, outputs), got shape {tuple(outputs.shape)}")
        return class_scores(outputs)

    def _first(self, sample: Tensor) -> Tensor:
        """Class scores (1, classes) of a copy of one sample, which the model must leave as it is."""
        with torch.inference_mode(False):  # an inference tensor counts no writes
            copy = sample.detach().clone()
        before = copy._version
        try:
            with torch.no_grad():
                scores = self.logits(copy)
        except RuntimeError as error:
            kinds = {each.dtype for each in self.model.parameters() if each.is_floating_point()}
            if isinstance(error, torch.OutOfMemoryError) or not kinds or sample.dtype in kinds:
                raise
            known = " or ".join(sorted(map(str, kinds)))
            raise InputError(
                f"inputs: expected {known} as the weights of the model, which fails on {sample.dtype} ({error}); "
                "convert one of them, such as model.double() and inputs.double()"
            ) from error
        if copy._version != before or not torch.equal(copy, sample):
            raise InputError(
                "model: expected a forward that leaves its input as it is, got one that writes into it; replace "
                "operations in place, such as x.sub_() by x - ..., or wrap the model so that it gets a clone"
            )
        return scores


def check_attacked(model: nn.Module, inputs: Tensor, labels: Tensor, *, box: bool = False) -> None:
    """Refuse a model, images or labels that cannot be attacked, as far as no forward tells.

    Raises:
        InputError: no module, one that is in training mode or has a part that is, several labels; images that the
            model does not take, or outside [0, 1] if `box`; labels that are no tensor.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise InputError(f"{training[0]} is in training mode; call model.eval() before attacking")
    if isinstance(model, Classifier) and model.multilabel:
        raise InputError("model: expected classes that exclude each other, got several labels; attack one label")
    check_images(inputs, box=box)
    if isinstance(model, Classifier):
        check_model(model, inputs)
        check_precision(model, inputs)
    if not isinstance(labels, Tensor):
        raise InputError(f"labels: expected a tensor, got {type(labels).__name__}; convert it with torch.as_tensor()")


def slope_of(value: Tensor, leaf: Tensor, gradient: Tensor | None = None) -> Tensor:
    """The gradient of a value at images, which must lead to it by a graph; the graph is kept if `gradient` is given.

    Args:
        value: a number, or of any shape if `gradient` is given.
        leaf: the images.
        gradient: that which comes from behind, in the shape of the value.

    Raises:
        InputError: no graph leads from the images to the scores, so that no attack along gradients means anything.
    """
    found = None
    if value.requires_grad:
        keep = gradient is not None
        found = torch.autograd.grad(value, leaf, gradient, retain_graph=keep, allow_unused=True)[0]
    if found is None:
        raise InputError(
            "model: no gradient of its scores reaches the inputs, under torch.inference_mode(), or because the model "
            "detaches them; remove that, or search without gradients (otnn.attacks.ATTACKS['square'])"
        )
    return found


def check_norm(norm: str) -> None:
    """Refuse a norm that no attack knows.

    Raises:
        InputError: which are known.
    """
    if norm not in NORMS:
        raise InputError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")


def radii_of(radius: float | Tensor, inputs: Tensor) -> Tensor:
    """One radius for all, or one for each sample, as (n,) float64, as they were given.

    Raises:
        InputError: a radius that is negative, not finite, too large for the dtype of the inputs, or of another shape.

    Example:
        >>> radii_of(0.5, torch.zeros(2, 3))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    try:
        given = torch.as_tensor(radius)
        if given.dtype == torch.bool or given.is_complex():
            raise TypeError
        radii = torch.as_tensor(radius, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"radius: expected a number, or one for each sample, got {radius!r}") from None
    if radii.ndim == 0:
        radii = radii.expand(len(inputs))
    if radii.shape != (len(inputs),):
        raise InputError(
            f"radius: expected one number, or one for each sample ({len(inputs)},), got {tuple(radii.shape)}"
        )
    if not bool(((radii >= 0) & (radii < math.inf)).all()):
        raise InputError("radius: expected finite numbers >= 0, got a negative one, NaN or infinity")
    most = torch.finfo(inputs.dtype).max / 4  # so that the width of a ball is finite
    if bool((radii > most).any()):
        raise InputError(
            f"radius: expected at most {most:.4g}, a quarter of the largest {inputs.dtype}, got "
            f"{float(radii.max()):.4g}; lower it, or pass inputs of a wider type"
        )
    return radii.to(inputs.device)


def distances(inputs: Tensor, adversarial: Tensor, norm: str = "l2") -> Tensor:
    """The distance of each pair of images in float64: (n,) of two (n, ...).

    Example:
        >>> x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        >>> float(distances(x, y)), float(distances(x, y, "linf"))
        (5.0, 4.0)
    """
    check_norm(norm)
    change = adversarial.double() - inputs.double()
    return sample_norm(change) if norm == "l2" else change.flatten(1).abs().amax(dim=1)
