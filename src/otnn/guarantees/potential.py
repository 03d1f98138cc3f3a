"""The 1-Lipschitz function that all guarantees are about, evaluated in float64 with a bound of its rounding error."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from otnn.batches import sample_norm, spread
from otnn.checks import check_images, check_labels
from otnn.errors import InputError
from otnn.guarantees.result import first_reasons
from otnn.lipschitz import LipschitzBound
from otnn.lipschitz.export import composed
from otnn.lipschitz.forward_error import BoundedExecution, Watch
from otnn.lipschitz.graph import Trace, trace
from otnn.lipschitz.rounding import gamma
from otnn.memory import MEMORY_BUDGET, chunk_size
from otnn.models import Classifier, check_model, predict
from otnn.potential import class_scores, label_distances, nearest_rival, pair_distances

NO_BOUND = "the network has no proven Lipschitz bound"
CONSTANT = "the lead is constant: no change of the image alters it"
# The coefficients are rounded so that the potential of exact arithmetic is not steeper than 1
_DOWN = 1 - 2.0**-50
# Gradients of a norm below this are no direction: squares would vanish
_TINY = 1e-150


class Potential:
    """The potential g of each sample of a batch: g > 0 where the sample is, g = 0 where its decision becomes even.

    With z the scores, g = (z_t - z_j) / (L_body ||w_t - w_j||) of the predicted class t against a target j; for one
    output and for a label of a multi-label model g = |z| / (L_body ||w||) at the sample. It is 1-Lipschitz on the whole
    space of real images, for the map that the stored weights define in exact arithmetic (theory, sections 0 and 5).

    What cannot be answered of one sample is told in its `reason`, and the others are answered.

    Args:
        model: a classifier in `eval()` mode.
        inputs: (n, channels, height, width), floats in [0, 1]; a sample may hold other, NaN or infinite values.
        body: `otnn.lipschitz.bound(model.body, model.input_shape)`; None, or an infinite constant, where none is known.
        target: the class j, or the wanted state 0 or 1 of the label, one for all or (n,), -1 where none is known; by
            default the rival with the smallest potential, or the other state.
        label: of a multi-label model, one for all or (n,); by default the label with the smallest potential.
        memory_budget: bytes that the activations of one pass may take.

    Attributes:
        inputs: (n, ...) float64; a sample that is not finite or leaves [0, 1] is all 0 here.
        prediction: (n,) the class t, or the state of the label; -1 where the input is not finite or leaves [0, 1].
        target: (n,) the class j, or the wanted state; -1 where none is known.
        label: (n,), or None.
        value: (n,) float64, g at the sample as computed.
        error: (n,) float64, how far that may be from exact arithmetic.
        radius: (n,) float64, below which no change alters the prediction: the least g over all rivals, or over all
            labels, less the error; 0 where nothing is certain.
        gradient: (n, ...) float64, of g at the sample.
        direction: (n, ...) float64, the gradient with norm 1; 0 where `still`.
        still: (n,) bool, whether the gradient is zero.
        reason: per sample, why nothing is guaranteed; empty where something is.
        known: (n,) bool, whether there is no such reason.
        trace: of the network, or None where it has none.

    Raises:
        InputError: inputs, targets or labels that do not fit; a model in training mode or without a linear head.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 3, widths=(32,)).eval()
        >>> potential = Potential(model, torch.rand(4, 1, 8, 8), bound(model.body))
        >>> bool((potential.value > 0).all()), bool((potential.gradient.flatten(1).norm(dim=1) <= 1).all())
        (True, True)
    """

    def __init__(
        self,
        model: Classifier,
        inputs: Tensor,
        body: LipschitzBound | None,
        target: Tensor | int | None = None,
        *,
        label: Tensor | int | None = None,
        memory_budget: float = MEMORY_BUDGET,
    ) -> None:
        finite, readable = _readable(model, inputs)
        target, label = _one_each(target, inputs), _one_each(label, inputs)
        unknown = torch.zeros_like(readable) if target is None else target == -1
        if target is not None:
            check_labels(target.masked_fill(unknown, 0), len(inputs), 2 if model.multilabel else model.classes)
        if label is not None:
            check_labels(label, len(inputs), model.head.out_features)
        if label is not None and not model.multilabel:
            raise InputError("label: expected none, as this model decides between classes; give target instead")
        self.memory_budget = memory_budget
        self.inputs = torch.where(spread(readable, inputs), inputs, 0.0).detach().double()
        self.model: Classifier = composed(model).double().eval().requires_grad_(False)
        proven = body is not None and body.constant < torch.inf
        unit = body if body is not None and proven else LipschitzBound(1.0, ())
        scale = (label_distances if model.multilabel else pair_distances)(model, unit).to(inputs.device)
        self.trace, self._execute, missing = _bounded(self.model) if proven else (None, None, NO_BOUND)
        scores, error = self._scores(self.inputs)
        goal = None if target is None else target.masked_fill(unknown, 0)
        asked = _ask_label(scores, scale, goal, label) if model.multilabel else _ask_pair(scores, scale, goal)
        self.target, self.label = asked.target.masked_fill(unknown, -1), asked.label
        self.coefficients = asked.coefficients if proven else torch.zeros_like(asked.coefficients)
        self.value, self.error = self._combine(scores, error, self.coefficients)
        lead, unsure = self._combine(scores, error, asked.signs)
        radius = _least(scores, error, scale, model.multilabel)
        self.gradient = self.gradient_at(self.inputs)
        norm = sample_norm(self.gradient)
        self.still = ~(norm > _TINY)
        self.direction = self.gradient / spread(torch.where(self.still, torch.inf, norm), self.gradient)
        self.reason = first_reasons(
            [missing] * len(inputs),
            (~finite, "the input holds NaN or infinite values"),
            (~readable, "the input leaves [0, 1]"),
            (unknown, "no target is known"),
            (~torch.isfinite(scores).all(dim=1), "a score is not finite"),
            (asked.prediction == asked.target, "the target is what is predicted already"),
            ((asked.width == 0) & (lead > unsure), CONSTANT),
            (~(self.value > self.error), "the decision is a tie: the lead is below the rounding error"),
        )
        self.known = torch.tensor([not reason for reason in self.reason], device=inputs.device)
        certain = readable & torch.isfinite(scores).all(dim=1) & (not missing)
        self.radius = torch.where(certain, radius.clamp(min=0), 0.0)
        self.prediction = asked.prediction.masked_fill(~readable, -1)

    def __call__(self, points: Tensor, index: Tensor | None = None) -> Tensor:
        """Return g (m,) at points (m, ...) that belong to the samples `index` (m,), by default all in turn."""
        coefficients = self.coefficients if index is None else self.coefficients[index]
        values: Tensor = (coefficients * self.model(points)).sum(dim=1)
        return values

    def bounded(self, points: Tensor, index: Tensor | None = None, watch: Watch | None = None) -> tuple[Tensor, Tensor]:
        """Values (m,) of g at points (m, ...), and a bound (m,) of their rounding error: infinite if none is known."""
        coefficients = self.coefficients if index is None else self.coefficients[index]
        return self._combine(*self._scores(points, watch), coefficients)

    def gradient_at(self, points: Tensor, index: Tensor | None = None) -> Tensor:
        """The gradients (m, ...) of g at points (m, ...)."""
        index = torch.arange(len(points), device=points.device) if index is None else index
        rows = max(1, chunk_size(self.inputs[:1], self.memory_budget, self.model, gradient=True))
        parts = []
        for part, of in zip(points.split(rows), index.split(rows), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                parts.append(torch.autograd.grad(self(leaf, of).sum(), leaf)[0])
        return torch.cat(parts)

    def share_outside(self, points: Tensor) -> Tensor:
        """The share (n,) of the values of each point (n, ...) that lie outside [0, 1], beyond rounding."""
        return ((points < -1e-9) | (points > 1 + 1e-9)).flatten(1).double().mean(dim=1)

    def _scores(self, points: Tensor, watch: Watch | None = None) -> tuple[Tensor, Tensor]:
        """Scores (m, outputs) and a bound (m,) of the norm of their error."""
        rows = chunk_size(self.inputs[:1], self.memory_budget, self.model)
        scores, errors = [], []
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):  # it may choose Fourier algorithms
            for part in points.split(rows):
                if self._execute is None:
                    scores.append(self.model(part))
                    errors.append(torch.full((len(part),), torch.inf, dtype=part.dtype, device=part.device))
                else:
                    run = self._execute(part, watch)
                    scores.append(run.scores)
                    errors.append(run.error)
        return torch.cat(scores), torch.cat(errors)

    def _combine(self, scores: Tensor, error: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """<c, z> of each row, and what the scores' error and the rounding of this sum may change in it."""
        terms = coefficients * scores
        rounded = gamma(scores.shape[1] + 4) * terms.abs().sum(dim=1)
        return terms.sum(dim=1), error * torch.linalg.vector_norm(coefficients, dim=1) * (1 + 2.0**-50) + rounded


@dataclass(frozen=True)
class _Asked:
    """Which decision each sample is asked about: the lead <signs, scores>, and g, the lead over its width (n,)."""

    prediction: Tensor
    target: Tensor
    label: Tensor | None
    signs: Tensor
    width: Tensor

    @property
    def coefficients(self) -> Tensor:
        """Of g in the scores, (n, outputs); 0 where the width is 0, and the lead constant."""
        width = self.width.unsqueeze(1)
        return torch.where(width > 0, self.signs / torch.where(width > 0, width, 1.0) * _DOWN, 0.0)


def _ask_pair(scores: Tensor, scale: Tensor, target: Tensor | None) -> _Asked:
    """The predicted class against another one: (z_t - z_j) / scale."""
    own, classes = predict(scores), max(2, scores.shape[1])
    if target is None:
        rival = nearest_rival(scores, own, scale)
        rival = torch.where(rival == own, (own + 1) % classes, rival)  # where all rivals are infinitely far
    else:
        rival = target.to(own)
    signs = nn.functional.one_hot(own, classes).double() - nn.functional.one_hot(rival, classes).double()
    if scores.shape[1] == 1:  # classes -z/2 and z/2
        signs = (signs[:, 1:] - signs[:, :1]) / 2
    return _Asked(own, rival, None, signs, scale[own, rival])


def _ask_label(scores: Tensor, scale: Tensor, target: Tensor | None, label: Tensor | None) -> _Asked:
    """The state of a label against the other: its score, positive at the sample, over its scale."""
    distance = torch.where(scale > 0, scores.abs() / torch.where(scale > 0, scale, 1.0), torch.inf)
    label = distance.argmin(dim=1) if label is None else label.to(scores.device)
    state = (scores.gather(1, label.unsqueeze(1)).squeeze(1) > 0).long()
    signs = nn.functional.one_hot(label, scores.shape[1]).double() * (2 * state - 1).unsqueeze(1)
    return _Asked(state, 1 - state if target is None else target.to(state), label, signs, scale[label])


def _least(scores: Tensor, error: Tensor, scale: Tensor, multilabel: bool) -> Tensor:
    """The least potential (n,) over all rivals or labels, less the error: the certified radius."""
    if multilabel:
        lead, width = scores.abs() - error.unsqueeze(1), scale.expand_as(scores)
    else:
        logits, own = class_scores(scores), predict(scores)
        # the error of two scores together is sqrt(2) times that of the vector of scores at most
        apart = error.unsqueeze(1) * (2**0.5 if scores.shape[1] > 1 else 1.0) * (1 + 2.0**-50)
        mine = nn.functional.one_hot(own, logits.shape[1]).bool()
        lead = (logits.gather(1, own.unsqueeze(1)) - logits - apart).masked_fill(mine, torch.inf)
        width = scale[own]
    # where the width is 0, the lead is constant: it can be lost by no change, or is none
    constant = torch.where(lead > 0, torch.inf, 0.0)
    quotient = torch.where(width > 0, lead / torch.where(width > 0, width, 1.0), constant)
    return (quotient.amin(dim=1) * _DOWN).nan_to_num(nan=0.0, posinf=torch.inf)


def _bounded(model: Classifier) -> tuple[Trace | None, BoundedExecution | None, str]:
    """The trace of a network and its execution with error bounds, or why there is none."""
    try:
        traced = trace(model)
        return traced, BoundedExecution(traced, torch.float64), ""
    except InputError as error:
        return None, None, f"nothing is proven of the network: {error}"


def _one_each(given: Tensor | int | None, inputs: Tensor) -> Tensor | None:
    """A target or a label as one per sample (n,)."""
    if isinstance(given, int):
        return torch.full((len(inputs),), given, device=inputs.device)
    return None if given is None else given.to(inputs.device)


def _readable(model: Classifier, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse what no sample can be answered of; return which samples (n,) are finite, and which lie in [0, 1]."""
    if not isinstance(model, Classifier):
        raise InputError(
            f"expected an otnn Classifier, which names its body and its head, got {type(model).__name__}; "
            "wrap it: Classifier(body, head, input_shape)"
        )
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 2 or len(inputs) == 0:
        check_images(torch.as_tensor(inputs))  # says what is wrong
    check_model(model, inputs)
    finite = torch.isfinite(inputs).flatten(1).all(dim=1)
    return finite, ((inputs >= 0) & (inputs <= 1)).flatten(1).all(dim=1)
