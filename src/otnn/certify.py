"""Certificates: a prediction with the radius in which no perturbation can change it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otnn.checks import check_images
from otnn.lipschitz import LipschitzBound
from otnn.models import Classifier, check_model, predict
from otnn.potential import logit_gap, pair_distances, rival_potentials


@dataclass(frozen=True)
class Certificate:
    """What is certain of each sample.

    Attributes:
        prediction: (batch,) the predicted class.
        logit_gap: (batch,) float64, z_top - z_second, or |z| for one output.
        radius: (batch,) float64, the L2 norm over the whole image, in [0, 1] pixel units, below which no change of the
            input alters the prediction. 0 where scores are tied or not finite.
    """

    prediction: Tensor
    logit_gap: Tensor
    radius: Tensor


@torch.no_grad()
def certify(model: Classifier, inputs: Tensor, body: LipschitzBound, *, batch_size: int = 1024) -> Certificate:
    """Certify the predictions of a network in `eval()` mode.

    The radius is min over rivals j of (z_t - z_j) / (L_body ||w_t - w_j||), or |z| / (L_body ||w||) for one output
    (theory, section 4).

    Args:
        model: a classifier that names its body and its head.
        inputs: (batch, channels, height, width), floats in [0, 1].
        body: `otnn.lipschitz.bound(model.body)`.
        batch_size: samples per forward pass.

    Raises:
        InputError: inputs that are empty, not finite or outside [0, 1]; a model in training mode.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 10, widths=(32,)).eval()
        >>> certificate = certify(model, torch.rand(5, 1, 8, 8), bound(model.body))
        >>> certificate.radius.shape, bool((certificate.radius > 0).all())
        (torch.Size([5]), True)
    """
    check_images(inputs, box=True)
    check_model(model, inputs)
    device = model.head.weight.device
    distances = pair_distances(model, body).to(device)
    parts = [certify_scores(model(batch.to(device)), distances) for batch in inputs.split(batch_size)]
    return Certificate(
        prediction=torch.cat([part.prediction for part in parts]).cpu(),
        logit_gap=torch.cat([part.logit_gap for part in parts]).cpu(),
        radius=torch.cat([part.radius for part in parts]).cpu(),
    )


def certify_scores(scores: Tensor, distances: Tensor) -> Certificate:
    """Certificates of scores (batch, outputs), given `otnn.potential.pair_distances`."""
    prediction = predict(scores)
    exact = scores.double()
    usable = torch.isfinite(scores).all(dim=1)
    return Certificate(
        prediction=prediction,
        logit_gap=torch.where(usable, logit_gap(exact, prediction), 0.0),
        radius=torch.where(usable, rival_potentials(exact, prediction, distances).amin(dim=1), 0.0),
    )


def certified_accuracy(certificate: Certificate, labels: Tensor, radii: Sequence[float]) -> dict[str, float]:
    """The share of samples that are right with radius >= r, for each r as decimal text.

    Example:
        >>> one = Certificate(torch.tensor([1, 0]), torch.tensor([0.5, 0.1]), torch.tensor([0.5, 0.1]))
        >>> certified_accuracy(one, torch.tensor([1, 0]), [0.0, 0.25])
        {'0': 1.0, '0.25': 0.5}
    """
    right = certificate.prediction == labels
    return {f"{r:.6g}": float((right & (certificate.radius >= r)).double().mean()) for r in radii}
