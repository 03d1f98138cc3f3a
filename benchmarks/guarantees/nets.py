"""The networks of the campaign: small, of every kind that the guarantees tell apart."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.soundness.draws import Draw
from otnn.lipschitz import export
from otnn.models import Classifier, build
from otnn.nn import Centering, MaxMin, OrthoConv2d, OrthoLinear, UnitNormLinear


def linear(draw: Draw) -> Classifier:
    """An orthogonal map and a head: every bound but the rounding is attained."""
    pixels = draw.integer(2, 5)
    body = nn.Sequential(Centering(torch.rand(1)), nn.Flatten(), OrthoLinear(pixels**2, pixels**2))
    return _with_head(body, pixels**2, (1, pixels, pixels), draw)


def isometric(draw: Draw) -> Classifier:
    """Square orthogonal layers with MaxMin: with one output or two classes the gradient has norm 1 everywhere."""
    pixels = 2 * draw.integer(1, 3)
    width = pixels**2
    layers: list[nn.Module] = [Centering(torch.rand(1)), nn.Flatten()]
    for _ in range(draw.integer(1, 4)):
        layer = OrthoLinear(width, width)
        nn.init.normal_(layer.bias, std=draw.one_of(0.01, 0.3))
        layers += [layer, MaxMin()]
    return _with_head(nn.Sequential(*layers), width, (1, pixels, pixels), draw)


def dense(draw: Draw) -> Classifier:
    """An OTNN of dense layers."""
    shape = (draw.one_of(1, 3), draw.integer(3, 6), draw.integer(3, 6))
    widths = draw.one_of((8,), (12, 8), (16, 16, 16))
    return build("dense", shape, draw.one_of(2, 3, 5), widths=widths, mean=torch.rand(shape[0]))


def convolutional(draw: Draw) -> Classifier:
    """An OTNN of strided convolutions."""
    channels = draw.one_of(1, 3)
    return build("conv", (channels, 8, 8), draw.one_of(2, 4), widths=draw.one_of((4, 8), (2, 4, 8)))


def circular(draw: Draw) -> Classifier:
    """An OTNN of convolutions on a torus that keep every norm."""
    first = OrthoConv2d(1, 4, 2, stride=2, padding_mode="circular")
    second = OrthoConv2d(4, 4, 3, padding=1, padding_mode="circular")
    body = nn.Sequential(Centering(torch.rand(1)), first, MaxMin(), second, MaxMin(), nn.Flatten())
    return _with_head(body, 36, (1, 6, 6), draw)


def ordinary_dense(draw: Draw) -> Classifier:
    """Ordinary dense layers and ReLU: finite bounds, and loose ones."""
    shape = (1, draw.integer(3, 5), draw.integer(3, 5))
    features = shape[1] * shape[2]
    layers: list[nn.Module] = [nn.Flatten()]
    for width in draw.one_of((8,), (16, 16), (24, 24, 24)):
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return Classifier(nn.Sequential(*layers), nn.Linear(features, draw.one_of(1, 4)), shape)


def ordinary(draw: Draw) -> Classifier:
    """Ordinary convolutions with batch normalisation and ReLU."""
    widths = draw.one_of((4, 8), (2, 4, 8))
    model = build("conv", (1, 8, 8), draw.one_of(2, 4), widths=widths, constrained=False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.normal_(layer.running_mean, std=0.2)
    return model


def unproven(draw: Draw) -> Classifier:
    """A layer without a bound: nothing is guaranteed, and that is all that is told."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.LayerNorm(8), nn.ReLU())
    return Classifier(body, nn.Linear(8, 3), (1, 3, 3))


def bent(
    slope: Tensor,
    kink: Tensor,
    offset: float,
    *,
    bias: float = 0.0,
    parallel: float = 0.0,
    shape: tuple[int, ...] | None = None,
) -> Classifier:
    """z = <slope, x> + |<kink, x> - offset| + bias in float64, whose gradients are slope + kink and slope - kink.

    If slope and kink are orthogonal, the proven constant is the norm of these gradients. The part of the slope along
    the kink costs: it goes through a feature of its own with the weight `parallel` in (0, 1).

    Args:
        slope: (pixels,).
        kink: (pixels,), not 0.
        offset: in units of the kink.
        bias: of the score.
        parallel: 0 where they are orthogonal.
        shape: of the images, one row by default.
    """
    size = kink.norm()
    along = kink / size
    aside = slope - (slope @ along) * along
    weight = torch.zeros(6, len(slope), dtype=torch.float64)
    shift = torch.tensor([0.0, 0.0, 0.0, -1e3, -1e3, 0.0], dtype=torch.float64)
    rest = math.sqrt((1 - parallel**2) / 2)
    weight[0] = aside / aside.norm().clamp(min=1e-300)
    weight[1], weight[2], weight[5] = parallel * along, rest * along, -rest * along
    shift[2], shift[5] = -rest * offset / float(size), rest * offset / float(size)
    affine, head = nn.Linear(len(slope), 6, dtype=torch.float64), nn.Linear(6, 1, dtype=torch.float64)
    straight = float(slope @ along) / parallel if parallel else 0.0
    outer = float(size) / (2 * rest)
    head.weight.data = torch.tensor([[float(aside.norm()), straight, outer, 0, 0, -outer]], dtype=torch.float64)
    affine.weight.data, affine.bias.data, head.bias.data = weight, shift, torch.tensor([bias], dtype=torch.float64)
    body = nn.Sequential(nn.Flatten(), affine, MaxMin())
    return Classifier(body, head, shape or (1, 1, len(slope))).eval()


def turning(draw: Draw) -> Classifier:
    """One kink, chosen such that Integrated Gradients is as far from the gradient as the bound allows."""
    signs = torch.tensor([draw.one_of(-1.0, 1.0) for _ in range(3)], dtype=torch.float64)
    before = signs / math.sqrt(3)
    after = before + 2 / (3 * math.sqrt(3)) * signs * torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    kink = (before - after) / 2
    centre = float(kink.sum()) / 2
    return bent((before + after) / 2, kink, centre - 0.1 * draw.rng.random(), bias=0.5 * draw.rng.normal())


def _with_head(body: nn.Sequential, features: int, shape: tuple[int, ...], draw: Draw) -> Classifier:
    head = UnitNormLinear(features, draw.one_of(1, 1, 3))
    nn.init.normal_(head.bias, std=0.2)
    return Classifier(body, head, shape)


FAMILIES: tuple[tuple[str, Callable[[Draw], Classifier]], ...] = (
    ("isometric", isometric),
    ("dense", dense),
    ("convolutional", convolutional),
    ("ordinary, dense", ordinary_dense),
    ("linear", linear),
    ("isometric", isometric),
    ("dense", dense),
    ("circular", circular),
    ("ordinary, convolutional", ordinary),
    ("turning", turning),
)


def network(number: int, draw: Draw) -> tuple[str, Classifier]:
    """The family and the network of a number, in float64 or exported in float32; one in fifty has no bound."""
    if number % 50 == 49:
        return "unproven", unproven(draw).eval()
    family, make = FAMILIES[number % len(FAMILIES)]
    model = make(draw).eval()
    # a convolution composes its kernel in the dtype that it has: exported, it is one and the same in float64
    return family, model.double() if draw.chance(0.5) else export(model)
