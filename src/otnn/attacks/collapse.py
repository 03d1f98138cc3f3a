"""Whether attacks collapse onto the gradient: where they went and how far, against the gradient and the radius."""

from dataclasses import dataclass

import torch
from torch import Tensor

from otnn.batches import sample_norm
from otnn.checks import check_images
from otnn.errors import InputError


@dataclass(frozen=True)
class Collapse:
    """The perturbations of one attack against the gradient step, sample by sample.

    Attributes:
        cosine: (n,) float64 in [-1, 1], between the perturbation and the direction of the gradient step; NaN where the
            attack failed or one of the two is zero or not finite.
        ratio: (n,) float64, L2 distance over certified radius; NaN where the attack failed or the radius is 0.
        samples: n.
        successes: how many of the attacks won.
        no_cosine: how many of those have no cosine.
        no_ratio: how many of those have no ratio.
    """

    cosine: Tensor
    ratio: Tensor
    samples: int
    successes: int
    no_cosine: int
    no_ratio: int


def collapse(
    inputs: Tensor, adversarial: Tensor, direction: Tensor, radius: Tensor, success: Tensor | None = None
) -> Collapse:
    """Compare the perturbations of an attack with the direction of the gradient step and with certified radii.

    Of a 1-Lipschitz network whose gradient has norm 1 everywhere, the nearest adversarial point lies along the
    gradient at the certified distance: every minimal-norm attack then has cosine 1 and ratio 1 (arXiv 2206.06854,
    section 4). Any distance of a success below the radius (ratio < 1) breaks the certificate.

    Args:
        inputs: (n, ...) finite.
        adversarial: (n, ...) the points of the attack.
        direction: (n, ...) where the gradient step goes, of any length: its point minus the input, or the gradient of
            the loss that it raises.
        radius: (n,) certified L2 radii >= 0.
        success: (n,) bool, where the attack won (`otnn.attacks.evaluate`); everywhere by default.

    Raises:
        InputError: shapes that differ, radii that are negative or not finite.

    Example:
        >>> points, gradient = torch.tensor([[3.0, 4.0], [2.0, 0.0]]), torch.tensor([[0.3, 0.4], [0.0, 1.0]])
        >>> found = collapse(torch.zeros(2, 2), points, gradient, torch.tensor([2.5, 0.0]))
        >>> found.cosine.tolist(), found.ratio.tolist(), found.no_ratio
        ([1.0, 0.0], [2.0, nan], 1)
    """
    check_images(inputs)
    count = len(inputs)
    for name, points in (("adversarial", adversarial), ("direction", direction)):
        if points.shape != inputs.shape:
            raise InputError(
                f"{name}: expected the shape of the inputs {tuple(inputs.shape)}, got {tuple(points.shape)}"
            )
    won = torch.ones(count, dtype=torch.bool, device=inputs.device) if success is None else success
    for name, values in (("radius", radius), ("success", won)):
        if values.shape != (count,):
            raise InputError(f"{name}: expected one for each sample ({count},), got {tuple(values.shape)}")
    if won.dtype != torch.bool:
        raise InputError(f"success: expected booleans, got {won.dtype}")
    radii = radius.to(inputs.device, torch.float64)
    if not bool((torch.isfinite(radii) & (radii >= 0)).all()):
        raise InputError("radius: expected finite radii >= 0, got a negative one, NaN or infinity")
    change = adversarial.double() - inputs.double()
    distance = sample_norm(change)
    # unit vectors first: the product of two small norms may be zero where neither is
    cosine = (_unit(change) * _unit(direction.double())).flatten(1).sum(dim=1).clamp(-1, 1)
    cosine = torch.where(won, cosine, torch.nan)
    ratio = torch.where(won & (radii > 0) & torch.isfinite(distance), distance / radii, torch.nan)
    return Collapse(
        cosine=cosine,
        ratio=ratio,
        samples=count,
        successes=int(won.sum()),
        no_cosine=int((won & cosine.isnan()).sum()),
        no_ratio=int((won & ratio.isnan()).sum()),
    )


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (n, ...) over their norms; NaN where that is zero or not finite."""
    flat = vectors.flatten(1)
    flat = flat / flat.abs().amax(dim=1, keepdim=True)
    unit: Tensor = (flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)).view_as(vectors)
    return unit
