"""All guarantees of a batch in one call."""

import torch
from torch import Tensor

from otnn.guarantees.bracket import bracket
from otnn.guarantees.masks import (
    cell_masks,
    deletion_masks,
    insertion_masks,
    masking_ceiling,
    occlusion_masks,
    robustness_bracket,
)
from otnn.guarantees.path import gradient_agreement, path_stability, walk
from otnn.guarantees.potential import Potential
from otnn.guarantees.regions import constant_saliency
from otnn.guarantees.result import Guarantee
from otnn.guarantees.smoothing import certified_smoothgrad
from otnn.lipschitz import LipschitzBound
from otnn.memory import MEMORY_BUDGET
from otnn.models import Classifier


def guarantees(
    model: Classifier,
    inputs: Tensor,
    body: LipschitzBound | None,
    target: Tensor | int | None = None,
    *,
    label: Tensor | int | None = None,
    boundary: Tensor | None = None,
    attribution: Tensor | None = None,
    baseline: Tensor | float = 0.0,
    robustness: Tensor | None = None,
    share: float = 0.05,
    sigma: float = 0.25,
    samples: int = 100,
    delta: float = 0.001,
    masks: int = 32,
    steps: int = 8,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> dict[str, Guarantee]:
    """Compute every guarantee that applies, each beside the map of the same samples.

    The counterfactual path goes against the gradient of the potential to the boundary. What cannot be said of one
    sample (not finite, outside [0, 1], no target known or the prediction itself, a constant lead, a tie, no gradient,
    no boundary) is told in its `reason`; of a network without a bound all are vacuous, and of one with a loose bound
    most.

    Args:
        model: a classifier in `eval()` mode.
        inputs: (n, channels, height, width), floats in [0, 1]; a sample may hold other, NaN or infinite values.
        body: `otnn.lipschitz.bound(model.body, model.input_shape)`, or None where none is known.
        target: the class that the path leads to, one for all or (n,), -1 where none is known; the nearest rival by
            default.
        label: of a multi-label model, one for all or (n,); the nearest to its boundary by default.
        boundary: (n, ...) points on the boundary that are known already, NaN where there is none.
        attribution: (n, channels or 1, ...) the map whose pixels Deletion and Insertion take in turn; the gradient of
            the potential by default.
        baseline: what masked values become.
        robustness: (n, sets) distances from a search, see `robustness_bracket`; left out without them.
        share: of the pixels, the top k of the certified SmoothGrad.
        sigma: of its noise.
        samples: of its gradients.
        delta: probability that its statement fails.
        masks: of muFidelity.
        steps: of Integrated Gradients.
        generator: draws the masks, then the noise.
        memory_budget: bytes that the activations of one pass may take.

    Returns:
        By name: "boundary_bracket", "path_stability", "gradient_agreement", "certified_smoothgrad",
        "constant_saliency", "masking_deletion", "masking_insertion", "masking_mu_fidelity", "masking_occlusion" (of
        pictures and signals), and "robustness_sr" if distances are given.

    Raises:
        InputError: inputs or settings that do not fit; a model in training mode or without a linear head.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 3, widths=(32,)).eval()
        >>> images = torch.rand(4, 1, 8, 8)
        >>> images[2] = torch.nan
        >>> found = guarantees(model, images, bound(model.body), samples=20)
        >>> found["boundary_bracket"].share, found["boundary_bracket"].reason[2]
        (0.75, 'the input holds NaN or infinite values')
    """
    potential = Potential(model, inputs, body, target, label=label, memory_budget=memory_budget)
    maps = potential.gradient if attribution is None else attribution.detach().to(potential.inputs)
    size = tuple(inputs.shape[2:]) or tuple(inputs.shape[1:])
    banks = {
        "masking_deletion": deletion_masks(maps),
        "masking_insertion": insertion_masks(maps),
        "masking_mu_fidelity": _cells(size, inputs.ndim, masks, generator),
    }
    if inputs.ndim > 2:
        banks["masking_occlusion"] = occlusion_masks(size, patch=max(1, -(-min(size) // 4)))
    ends = bracket(potential, boundary)
    way = walk(potential, ends.details["upper"])
    found = [
        ends,
        path_stability(way),
        gradient_agreement(way, steps=steps),
        certified_smoothgrad(potential, share=share, sigma=sigma, samples=samples, delta=delta, generator=generator),
        constant_saliency(potential),
        *[masking_ceiling(potential, bank, baseline, name=name) for name, bank in banks.items()],
    ]
    if robustness is not None:
        found.append(robustness_bracket(potential, robustness))
    return {each.name: each for each in found}


def _cells(size: tuple[int, ...], ndim: int, masks: int, generator: torch.Generator | None) -> Tensor:
    """The masks of muFidelity: cells of a picture or a signal, single features of rows."""
    if ndim > 2:
        return cell_masks(size, samples=masks, generator=generator)
    return cell_masks(size, grid=size[0], samples=masks, generator=generator).squeeze(1)
