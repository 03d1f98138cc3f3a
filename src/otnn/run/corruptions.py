"""Accuracy under noise, blur, JPEG and brightness: changes that no certificate of a small L2 radius covers."""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from otnn.attacks.objective import check_attacked
from otnn.attacks.step import is_number
from otnn.batches import sample_norm
from otnn.checks import check_images, check_labels
from otnn.errors import InputError
from otnn.models import Classifier, predict
from otnn.run.fit import scores_of

NOTE = (
    "No certificate covers these corruptions: it speaks of changes whose L2 norm is below the radius of an image. "
    "Accuracy under them is measured on these images, and proven of none."
)
# A blur of this many standard deviations is cut off
_TRUNCATE = 4.0


@dataclass(frozen=True)
class Corruption:
    """A family of changes that are not adversarial.

    Attributes:
        function: of images (n, channels, height, width) in [0, 1], a severity and a generator.
        severities: three, from weak to strong.
        unit: what a severity is.
        least: the least severity.
        most: the largest.
    """

    function: Callable[[Tensor, float, torch.Generator], Tensor]
    severities: tuple[float, float, float]
    unit: str
    least: float = 0.0
    most: float = math.inf


def gaussian_noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Independent noise on every value, clipped to [0, 1]."""
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    return (images + deviation * noise).clamp(0, 1)


def gaussian_blur(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """A Gaussian filter of each channel, the image mirrored at its rim; `generator` is not used."""
    blurred = gaussian_filter(
        images.cpu().double().numpy(), (0, 0, deviation, deviation), mode="reflect", truncate=_TRUNCATE
    )
    return torch.from_numpy(blurred).to(images).clamp(0, 1)


def jpeg(images: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    """Written as JPEG and read again: grey or colour images as such, others channel by channel."""
    levels = (images.cpu().double() * 255).round().to(torch.uint8)
    if images.shape[1] != 3:
        flat = levels.flatten(0, 1).numpy()
        read = np.stack([_coded(one, int(quality)) for one in flat])
        return torch.from_numpy(read).view(images.shape).to(images) / 255
    read = np.stack([_coded(one, int(quality)) for one in levels.permute(0, 2, 3, 1).numpy()])
    return torch.from_numpy(read).permute(0, 3, 1, 2).to(images) / 255


def brightness(images: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """Every value raised by the same, clipped to [0, 1]."""
    return (images + shift).clamp(0, 1)


def _coded(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=quality)
    with Image.open(stream) as picture:
        return np.asarray(picture)


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, (0.05, 0.1, 0.2), "deviation"),
    "gaussian_blur": Corruption(gaussian_blur, (0.5, 1.0, 2.0), "pixels"),
    "jpeg": Corruption(jpeg, (50.0, 20.0, 5.0), "quality", 1.0, 100.0),
    "brightness": Corruption(brightness, (0.1, 0.2, 0.4), "shift"),
}


def corrupt(images: Tensor, name: str, severity: float, *, seed: int = 0) -> Tensor:
    """Corrupt images.

    Args:
        images: (n, channels, height, width), floats in [0, 1].
        name: of `CORRUPTIONS`.
        severity: in the unit of that corruption, finite, from its `least` to its `most`.
        seed: of the noise.

    Returns:
        (n, channels, height, width) in [0, 1], in the dtype and on the device of the images, without a graph.

    Raises:
        InputError: an unknown name, a severity out of range, or images that cannot be used.

    Example:
        >>> corrupt(torch.full((1, 1, 2, 2), 0.5), "brightness", 0.25)
        tensor([[[[0.7500, 0.7500],
                  [0.7500, 0.7500]]]])
    """
    if name not in CORRUPTIONS:
        raise InputError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, got {name!r}")
    told = CORRUPTIONS[name]
    if not is_number(severity) or not told.least <= severity <= told.most or severity == math.inf:
        most = "" if told.most == math.inf else f" and <= {told.most:g}"
        raise InputError(
            f"severity: expected a finite number >= {told.least:g}{most} ({told.unit} of {name}), got {severity!r}"
        )
    check_images(images, box=True)
    if images.ndim != 4:
        raise InputError(f"expected images (n, channels, height, width), got shape {tuple(images.shape)}")
    return told.function(images.detach(), severity, torch.Generator().manual_seed(seed))


def corrupted_accuracy(
    networks: Mapping[str, Classifier],
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    begin: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """The accuracy of networks on the same corrupted images, with the mean L2 norm of each change.

    Args:
        networks: by name, in `eval()` mode.
        images: (n, channels, height, width), floats in [0, 1].
        labels: (n,) integers.
        seed: of the noise.
        begin: called with the name of each corruption.

    Raises:
        InputError: networks, images or labels that cannot be used.

    Returns:
        A row for each corruption and severity: `name`, `severity`, `unit`, `mean_size`, and `accuracy` by network.
    """
    images = images.detach()
    for model in networks.values():
        check_attacked(model, images, labels, box=True)
        check_labels(labels, len(images), model.classes)
    rows = []
    for name, corruption in CORRUPTIONS.items():
        begin(name.replace("_", " "))
        for severity in corruption.severities:
            changed = corrupt(images, name, severity, seed=seed)
            accuracy = {}
            for network, model in networks.items():
                with torch.no_grad():
                    right = predict(scores_of(model, changed)) == labels.cpu()
                accuracy[network] = float(right.double().mean())
            rows.append(
                {
                    "name": name,
                    "severity": severity,
                    "unit": corruption.unit,
                    "mean_size": float(sample_norm(changed.double() - images.double()).mean()),
                    "accuracy": accuracy,
                }
            )
    return rows
