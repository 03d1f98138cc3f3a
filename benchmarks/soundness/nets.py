"""The networks of the campaign on rounding: all chains of layers that only sum, move and compare numbers."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from benchmarks.soundness.draws import Draw
from otnn.lipschitz import export
from otnn.models import Classifier, build
from otnn.nn import Centering, MaxMin, OrthoConv2d, UnitNormLinear

PIXELS = (1, 28, 28)


def one_output(draw: Draw) -> Classifier:
    """A linear model of 784 pixels with one output."""
    return export(_linear(1))


def ten_classes(draw: Draw) -> Classifier:
    """A linear model of 784 pixels with ten outputs."""
    return export(_linear(10))


def cancellation(draw: Draw) -> Classifier:
    """Weights of very different sizes, in falling order, whose products nearly cancel: sums in float32 lose most."""
    model = _linear(draw.one_of(1, 3))
    rows, terms = model.head.weight.shape
    sizes = np.sort(10.0 ** draw.rng.normal(0, draw.one_of(0.2, 1.0, 3.0), size=(rows, terms)))[:, ::-1]
    signs = np.tile([1.0, -1.0], terms // 2)
    weight = torch.from_numpy(sizes * signs * draw.one_of(1.0, 1e-3, 1e3)).float()
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(-weight.sum(dim=1) / 2)  # the score of a grey image is near 0
    return model.eval()


def dense(draw: Draw) -> Classifier:
    """An OTNN of dense layers, exported."""
    pixels = draw.integer(8, 28)
    widths = draw.one_of((64,), (64, 32), (32, 32, 32))
    return export(build("dense", (1, pixels, pixels), draw.one_of(2, 10), widths=widths, mean=torch.rand(1)))


def deep(draw: Draw) -> Classifier:
    """The same with ten hidden layers."""
    return export(build("dense", (1, 8, 8), draw.one_of(2, 5), widths=(24,) * 10))


def convolutional(draw: Draw) -> Classifier:
    """An OTNN of strided convolutions, exported."""
    pixels, channels = draw.integer(8, 14), draw.one_of(1, 3)
    widths = draw.one_of((4, 8), (4, 8, 16))
    return export(
        build("conv", (channels, pixels, pixels), draw.one_of(2, 10), widths=widths, mean=torch.rand(channels))
    )


def wrapped(draw: Draw) -> Classifier:
    """An OTNN of convolutions on a torus that keep every norm, so that its certificates are nearly exact; exported."""
    layers: list[nn.Module] = [Centering(torch.rand(1))]
    channels, pixels = 1, 8
    for _ in range(draw.integer(1, 3)):
        layers += [OrthoConv2d(channels, 4 * channels, 2, stride=2, padding_mode="circular"), MaxMin()]
        channels, pixels = 4 * channels, pixels // 2
        if pixels >= 3:
            layers += [OrthoConv2d(channels, channels, 3, padding=1, padding_mode="circular"), MaxMin()]
    body = nn.Sequential(*layers, nn.Flatten())
    return export(Classifier(body, UnitNormLinear(64, draw.one_of(1, 10)), (1, 8, 8)))


def ordinary(draw: Draw) -> Classifier:
    """Ordinary layers with norms far from 1, and ReLU."""
    channels = draw.one_of(2, 4)
    pixels = draw.integer(6, 10)
    convolution = nn.Conv2d(1, channels, draw.one_of(2, 3), stride=draw.one_of(1, 2), padding=1)
    features = convolution(torch.zeros(1, 1, pixels, pixels)).numel()
    hidden = nn.Linear(features, 16)
    nn.init.normal_(hidden.weight)
    body = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), hidden, nn.ReLU())
    return Classifier(body, nn.Linear(16, draw.one_of(1, 4)), (1, pixels, pixels)).eval()


def _linear(outputs: int) -> Classifier:
    head = UnitNormLinear(784, outputs)
    nn.init.normal_(head.bias, std=0.1)
    return Classifier(nn.Sequential(nn.Flatten()), head, PIXELS)


# Block i takes the network at i modulo the number of these.
NETS: tuple[tuple[str, Callable[[Draw], Classifier]], ...] = (
    ("linear, one output", one_output),
    ("dense", dense),
    ("linear, ten classes", ten_classes),
    ("convolutional", convolutional),
    ("linear, cancellation", cancellation),
    ("deep", deep),
    ("convolutional, circular", wrapped),
    ("linear, one output", one_output),
    ("linear, ten classes", ten_classes),
    ("ordinary", ordinary),
)
