"""The gradient of a score: on an OTNN at once the saliency map and the direction of transport."""

import torch
from torch import Tensor

from otnn.checks import check_images, check_labels
from otnn.models import Classifier, check_model
from otnn.potential import class_scores


def saliency(model: Classifier, inputs: Tensor, target: Tensor) -> Tensor:
    """Signed gradient of the target's score at each input.

    With one output z, the score of class 1 is z and that of class 0 is -z.

    Args:
        model: in `eval()` mode; an OTNN or its unconstrained twin.
        inputs: (batch, channels, height, width), floats in [0, 1].
        target: (batch,) the class whose score is explained.

    Returns:
        (batch, channels, height, width): score change per unit of each value.

    Raises:
        InputError: inputs or targets that cannot be used; a model in training mode.

    Example:
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 10, widths=(32,)).eval()
        >>> saliency(model, torch.rand(2, 1, 8, 8), torch.tensor([3, 4])).flatten(1).norm(dim=1) <= 1.0001
        tensor([True, True])
    """
    check_images(inputs, box=True)
    check_labels(target, len(inputs), model.classes)
    check_model(model, inputs)
    inputs = inputs.detach().requires_grad_()
    scores = model(inputs)
    factor = 2 if scores.shape[1] == 1 else 1  # class_scores halves z
    chosen = factor * class_scores(scores).gather(1, target.unsqueeze(1))
    (gradient,) = torch.autograd.grad(chosen.sum(), inputs)
    return gradient
