"""The gradient of a score: on an OTNN at once the saliency map and the direction of transport."""

from torch import Tensor

from otnn.checks import check_images, check_labels
from otnn.explain.attribute import attribute
from otnn.models import Classifier


def saliency(model: Classifier, inputs: Tensor, target: Tensor) -> Tensor:
    """Signed gradient of the target's score at each input: `attribute` for images in [0, 1].

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
        >>> import torch
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 10, widths=(32,)).eval()
        >>> saliency(model, torch.rand(2, 1, 8, 8), torch.tensor([3, 4])).flatten(1).norm(dim=1) <= 1.0001
        tensor([True, True])
    """
    check_images(inputs, box=True)
    check_labels(target, len(inputs), model.classes)
    return attribute(model, inputs, target, "saliency")
