"""What is timed: networks of the size of Fashion-MNIST in plain layers, with random weights, and images."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from otnn.data import load
from otnn.lipschitz import export
from otnn.models import Classifier, build, default_widths, predict

SHAPE, CLASSES = (1, 28, 28), 10


@dataclass(frozen=True)
class Subject:
    """A network in `eval()` mode, images (n, 1, 28, 28), and the classes (n,) that it predicts."""

    name: str
    model: Classifier
    images: Tensor
    target: Tensor


def images_of(count: int, data_dir: Path | None, seed: int) -> Tensor:
    """Test images of Fashion-MNIST where they are at hand, noise otherwise."""
    if data_dir is None:
        return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return load("fashion-mnist", data_dir=data_dir).test.images[:count]


def subjects(count: int, data_dir: Path | None, seed: int) -> list[Subject]:
    """The convolutional OTNN of a run folder, its ordinary twin, and a dense OTNN: as `compare` has them."""
    images = images_of(count, data_dir, seed)
    torch.manual_seed(seed)
    conv = default_widths("conv", SHAPE)
    built = {
        "conv, OTNN": build("conv", SHAPE, CLASSES, widths=conv),
        "conv, ordinary": build("conv", SHAPE, CLASSES, widths=conv, constrained=False),
        "dense, OTNN": build("dense", SHAPE, CLASSES, widths=(256, 256, 256)),
    }
    found = []
    for name, network in built.items():
        model = network.eval() if "ordinary" in name else export(network.eval())
        with torch.no_grad():
            found.append(Subject(name, model, images, predict(model(images))))
    return found
