"""Where a search begins: images near the boundaries of a network, and the directions in which its score falls."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.soundness.search import Ball
from otnn.certify import certify
from otnn.models import Classifier, predict

GRID, ROUNDS = 33, 6


def base_images(model: Classifier, rng: np.random.Generator, count: int) -> Tensor:
    """Images (count, ...) of [0, 1] in float32: noise, half of it on black, with blobs of any contrast."""
    shape = (count, *model.input_shape)
    images = rng.random(shape)
    lit = rng.random(shape) < rng.choice([0.3, 1.0], size=(count, 1, 1, 1))
    contrast = rng.choice([0.1, 1.0], size=(count, 1, 1, 1))
    level = rng.random((count, model.input_shape[0], 1, 1))
    return torch.from_numpy(np.clip((level * (1 - contrast) + contrast * images) * lit, 0, 1)).float()


def near_the_boundary(model: Classifier, images: Tensor, arithmetic: str, targets: Tensor) -> Tensor:
    """Move images towards images of another class until their certified radii are just above the targets.

    Args:
        model: certifies them.
        images: (batch, ...).
        arithmetic: of the certificates.
        targets: (batch,) radii; an image whose radius is smaller stays.
    """
    others = _of_another_class(model, images)
    low, high = torch.zeros(len(images)), torch.ones(len(images))
    own = certify(model, images, arithmetic=arithmetic).prediction
    for _ in range(ROUNDS):
        shares = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, GRID)
        points = _between(images, others, shares)
        certificate = certify(model, points.flatten(0, 1), arithmetic=arithmetic)
        kept = (certificate.prediction == own.repeat_interleave(GRID)) & (
            certificate.radius >= targets.repeat_interleave(GRID)
        )
        last = kept.view(-1, GRID).long().cumprod(dim=1).sum(dim=1).sub(1).clamp(0, GRID - 2)
        low, high = (shares.gather(1, index[:, None])[:, 0] for index in (last, last + 1))
    return _between(images, others, low[:, None])[:, 0]


def _between(images: Tensor, others: Tensor, shares: Tensor) -> Tensor:
    """(batch, shares, ...) in float32 and [0, 1]."""
    weights = shares.view(*shares.shape, *[1] * (images.ndim - 1))
    return (images[:, None] * (1 - weights) + others[:, None] * weights).clamp(0, 1)


def _of_another_class(model: Classifier, images: Tensor) -> Tensor:
    """Images of another class on the way along the gradient, one for each; where there is none, the farthest."""
    own = predict(model(images)).tolist()
    found = images.clone()
    for index, (image, label) in enumerate(zip(images, own, strict=True)):
        direction = torch.from_numpy(_gradients(model, image, label)[0]).float().view_as(image)
        for length in (0.5, 1, 2, 4, 8, 16, 32):
            found[index] = (image - length * direction).clamp(0, 1)
            with torch.no_grad():
                if predict(model(found[index][None])).item() != label:
                    break
    return found


def falling_directions(wide: Classifier, ball: Ball, own: int) -> Sequence[NDArray[np.float64]]:
    """Unit vectors along which z_own - z_j falls, for the two nearest rivals j.

    Each is the gradient at the centre, or at the point of the sphere to which that leads.
    """
    centre = torch.from_numpy(ball.centre.astype(np.float64)).view(wide.input_shape)
    directions = _gradients(wide, centre, own)[:2]
    ends = [centre - ball.radius * torch.from_numpy(direction).view_as(centre) for direction in directions]
    return [*directions, *(_gradients(wide, end, own)[0] for end in ends)]


def _gradients(model: Classifier, image: Tensor, own: int) -> list[NDArray[np.float64]]:
    """The unit gradients (pixels,) of z_own - z_j, or of the sign of one output, the nearest rival first."""
    leaf = image[None].clone().requires_grad_()
    with torch.enable_grad():
        scores = model(leaf)[0]
        rivals = [j for j in range(len(scores)) if j != own]
        gaps = [scores[0] if own else -scores[0]] if len(scores) == 1 else [scores[own] - scores[j] for j in rivals]
        vectors = [torch.autograd.grad(gap, leaf, retain_graph=True)[0].flatten().double() for gap in gaps]
    ranked = sorted(
        (float(gap.detach()) / max(float(vector.norm()), 1e-300), vector)
        for gap, vector in zip(gaps, vectors, strict=True)
    )
    return [(vector / vector.norm().clamp(min=1e-300)).numpy() for _, vector in ranked]
