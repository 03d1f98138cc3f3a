"""Certificates: a prediction with the radius in which no perturbation can change it.

With L the proven bound of the body, w_t the rows of the head and E a bound of the rounding error of the scores, the
radius is, rounded down,

* several classes: min over rivals j of (z_t - z_j - sqrt(2) E) / (L ||w_t - w_j||);
* one output, and each label of a multi-label head: (|z| - E) / (L ||w||).

Proof: z_t - z_j is an affine function of the features, which move by at most L d when the input moves by d; so it stays
positive while d < r. Tsuzuku, Sato and Sugiyama (2018); with the rounding, `otnn.lipschitz.forward_error`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from otnn.checks import check_images
from otnn.errors import InputError
from otnn.lipschitz import LipschitzBound
from otnn.lipschitz.bounds import step_constants
from otnn.lipschitz.export import composed
from otnn.lipschitz.forward_error import BoundedExecution
from otnn.lipschitz.graph import trace
from otnn.lipschitz.rounding import mul_up, sqrt_up
from otnn.models import Classifier, check_model, predict
from otnn.nn.kernel import OrthoKernel
from otnn.potential import label_distances, pair_distances

ARITHMETICS = ("real", "float32")
REASONS = ("", "input not finite", "scores not finite", "tie", "gap below the rounding error")


@dataclass(frozen=True)
class Certificate:
    """What is certain of each sample.

    Attributes:
        prediction: (batch,) the predicted class, -1 where input or scores are not finite; (batch, labels) of 0 and 1
            with a multi-label head.
        logit_gap: float64 in the shape of the prediction, z_top - z_second, or |z| for one output or a label.
        radius: float64 in the shape of the prediction, the L2 norm over the whole image, in [0, 1] pixel units, below
            which no change of the input alters the prediction. For all labels at once it is the smallest of a row.
        arithmetic: what the radius holds for, see `certify`.
        reason: of each sample, why its radius (one of its radii) is 0; empty where it is not.
    """

    prediction: Tensor
    logit_gap: Tensor
    radius: Tensor
    arithmetic: str
    reason: tuple[str, ...]


@torch.no_grad()
def certify(model: Classifier, inputs: Tensor, *, arithmetic: str = "real", batch_size: int = 64) -> Certificate:
    """Certify the predictions of a network in `eval()` mode.

    The bounds are computed from the weights as they are now. The arithmetic tells which network the radius speaks of:

    * "real": the map that the stored weights define in exact arithmetic. The scores are computed in float64.
    * "float32": the network as executed in float32, by direct sums in any order. The radius allows for the rounding at
      the input and at every point around it, so it is smaller.

    Args:
        model: a classifier that names its body and its head.
        inputs: (batch, channels, height, width), floats in [0, 1]; a sample that is not finite gets radius 0.
        arithmetic: "real" or "float32".
        batch_size: samples per forward pass.

    Raises:
        InputError: inputs that are empty, of another shape or outside [0, 1]; a model in training mode, of half
            precision, or with a layer whose bound or rounding is not known; reduced precision switched on in torch.

    Example:
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 10, widths=(32,)).eval()
        >>> images = torch.rand(5, 1, 8, 8)
        >>> certificate = certify(model, images)
        >>> certificate.radius.shape, bool((certificate.radius > 0).all())
        (torch.Size([5]), True)
        >>> executed = certify(model, images, arithmetic="float32")
        >>> bool((executed.radius < certificate.radius).all())
        True
    """
    if arithmetic not in ARITHMETICS:
        raise InputError(f'arithmetic: expected "real" or "float32", got {arithmetic!r}')
    finite = _check(model, inputs, arithmetic, batch_size)
    traced = trace(composed(model))
    constants = step_constants(traced.steps)
    head = traced.steps[traced.steps[-1].sources[0]]
    device = model.head.weight.device
    body = LipschitzBound(constants[head.sources[0]], ())
    distances = (label_distances if model.multilabel else pair_distances)(model, body).to(device)
    execute = BoundedExecution(traced, torch.float64 if arithmetic == "real" else torch.float32)
    parts = []
    for batch, usable in zip(inputs.split(batch_size), finite.split(batch_size), strict=True):
        images = torch.where(usable.view(-1, *[1] * (batch.ndim - 1)), batch, 0.0).to(device, execute.dtype)
        with torch.backends.cudnn.flags(enabled=False):  # it may choose Fourier algorithms
            run = execute(images)
        if run.scores.ndim != 2:
            shape = ", ".join(map(str, run.scores.shape[1:]))
            raise InputError(
                f"expected scores of shape (batch, {model.head.out_features}), got (batch, {shape}); "
                "end the body with torch.nn.Flatten()"
            )
        error = run.error if arithmetic == "real" else run.error + run.around
        growth, reach = (0.0, None) if arithmetic == "real" else (run.growth, run.reach)
        parts.append([part.cpu() for part in _radii(run.scores, error, growth, reach, distances, model.multilabel)])
    prediction, gap, radius, state = (torch.cat(column) for column in zip(*parts, strict=True))
    state = torch.where(finite.cpu(), state, 1)
    bad = ((state == 1) | (state == 2)).view(-1, *[1] * (prediction.ndim - 1))
    return Certificate(
        prediction=prediction.masked_fill(bad, -1),
        logit_gap=gap.masked_fill(bad, 0.0),
        radius=radius.masked_fill(bad, 0.0),
        arithmetic=arithmetic,
        reason=tuple(REASONS[index] for index in state.tolist()),
    )


def _radii(
    scores: Tensor, error: Tensor, growth: float, reach: Tensor | None, distances: Tensor, multilabel: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction, gap, radius and the number of the reason (batch,) from scores (batch, outputs) and their error.

    The error of two scores together is sqrt(2) times that of the vector of scores at most.
    """
    exact = scores.double()
    prediction = predict(scores, multilabel)
    if multilabel or scores.shape[1] == 1:
        width, gaps = 1.0, exact.abs()
        lengths = distances if multilabel else distances[:1, 1]
    else:
        width, lengths = sqrt_up(2.0), distances[prediction]
        own = nn.functional.one_hot(prediction, scores.shape[1]).bool()
        gaps = (exact.gather(1, prediction.unsqueeze(1)) - exact).masked_fill(own, torch.inf)
    # gaps, products and the quotient are rounded: together a few units of 2^-53
    certain = gaps * (1 - 2.0**-50) - (error * width * (1 + 2.0**-50)).unsqueeze(1)
    radii = certain / ((lengths + mul_up(width, growth)) * (1 + 2.0**-50)) * (1 - 2.0**-50)
    # also 0 / 0, a tie of classes with equal rows; far below 2^-900 results are rounded otherwise
    radii = torch.where(certain > 2.0**-900, radii, 0.0)
    if reach is not None:
        radii = torch.minimum(radii, reach.nan_to_num(nan=0.0, posinf=torch.inf).clamp(min=0).unsqueeze(1))
    if not multilabel:
        radii, gaps = radii.amin(dim=1, keepdim=True), gaps.amin(dim=1, keepdim=True)
    state = torch.where((gaps == 0).any(dim=1), 3, torch.where((radii == 0).any(dim=1), 4, 0))
    state = torch.where(torch.isfinite(exact).all(dim=1), state, 2)
    shape = prediction.shape
    return prediction, gaps.view(shape), radii.view(shape), state


def _check(model: Classifier, inputs: Tensor, arithmetic: str, batch_size: int) -> Tensor:
    """Refuse what cannot be certified; return which samples (batch,) are finite."""
    if not isinstance(model, Classifier):
        raise InputError(
            f"expected an otnn Classifier, which names its body and its head, got {type(model).__name__}; "
            "wrap it: Classifier(body, head, input_shape)"
        )
    if not isinstance(model.head, nn.Linear):
        raise InputError(f"expected a Classifier with a linear head, got {type(model.head).__name__}")
    if not isinstance(inputs, Tensor):
        raise InputError(f"inputs: expected a tensor, got {type(inputs).__name__}; convert it with torch.as_tensor")
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, got {batch_size}")
    if not inputs.is_floating_point():
        check_images(inputs)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    allowed = {torch.float32, torch.float64} if arithmetic == "real" else {torch.float32}
    wrong = (dtypes | {inputs.dtype}) - allowed
    if wrong:
        expected = " or ".join(sorted(str(dtype) for dtype in allowed))
        raise InputError(
            f'arithmetic "{arithmetic}" expects weights and inputs of {expected}, got {wrong.pop()}; '
            "train and evaluate in float32, without .half() or autocast"
        )
    finite = torch.isfinite(inputs).flatten(1).all(dim=1) if inputs.ndim > 1 else torch.ones(0, dtype=torch.bool)
    kept = torch.where(finite.view(-1, *[1] * (inputs.ndim - 1)), inputs, 0.0) if inputs.ndim > 1 else inputs
    check_images(kept, box=True)
    check_model(model, inputs)
    _check_arithmetic(model, arithmetic)
    return finite


def _check_arithmetic(model: Classifier, arithmetic: str) -> None:
    """Refuse settings under which torch computes otherwise than the error bound assumes."""
    device = model.head.weight.device.type
    if device not in ("cpu", "cuda"):
        raise InputError(f"nothing is proven of the arithmetic of {device}; certify on the CPU: model.cpu()")
    if torch.is_autocast_enabled(device):
        raise InputError("autocast computes in half precision; certify outside of it")
    if arithmetic == "real":
        return
    try:
        reduced = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to tell where the precision was set for one kind of operation
        reduced = True
    for part in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):  # type: ignore[attr-defined]
        reduced = reduced or part.fp32_precision in ("bf16", "tf32")
    if reduced:
        raise InputError(
            "torch is set to multiply float32 in reduced precision; "
            'expected torch.set_float32_matmul_precision("highest") and fp32_precision "ieee"'
        )
    convolves = any(isinstance(layer, (nn.modules.conv._ConvNd, OrthoKernel)) for layer in model.modules())
    one_dnn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if convolves and (device == "cuda" or not one_dnn):
        raise InputError(
            "without oneDNN on a CPU, torch may choose Winograd or TF32 convolutions, whose error is not bounded; "
            'certify on a CPU with oneDNN, or with arithmetic "real"'
        )


def certified_accuracy(certificate: Certificate, labels: Tensor, radii: Sequence[float]) -> dict[str, float]:
    """The share of samples that are right with radius >= r, for each r as decimal text.

    With a multi-label head every label must be.

    Raises:
        InputError: labels of another shape than the predictions.

    Example:
        >>> prediction, radius = torch.tensor([1, 0]), torch.tensor([0.5, 0.1])
        >>> one = Certificate(prediction, radius, radius, "real", ("", ""))
        >>> certified_accuracy(one, torch.tensor([1, 0]), [0.0, 0.25])
        {'0': 1.0, '0.25': 0.5}
    """
    if labels.shape != certificate.prediction.shape:
        raise InputError(
            f"labels: expected the shape of the predictions, {tuple(certificate.prediction.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    right = certificate.prediction == labels
    held = {f"{r:.6g}": right & (certificate.radius >= r) for r in radii}
    return {text: float(each.view(len(labels), -1).all(dim=1).double().mean()) for text, each in held.items()}
