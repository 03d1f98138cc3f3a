"""The networks that are timed: one architecture, from the layers of each family."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.layers import peers
from otnn.nn import MaxMin, OrthoConv2d, OrthoLinear, UnitNormLinear


@dataclass(frozen=True)
class Family:
    """The layers of a library: convolutions by channels and stride, dense layers by features."""

    conv: Callable[[int, int, int], nn.Module]
    dense: Callable[[int, int], nn.Module]
    head: Callable[[int, int], nn.Module]
    activation: Callable[[], nn.Module]


@dataclass(frozen=True)
class Plan:
    """Channels and strides of 3x3 convolutions, sizes of dense layers after them, and the pixels of a side."""

    convolutions: tuple[tuple[int, int], ...]
    dense: tuple[int, ...]
    pixels: int
    channels: int = 1
    classes: int = 10


RELU, MAXMIN, OTNN = "unconstrained, ReLU", "unconstrained, MaxMin", "otnn"
TORCHLIP, CIRCULAR, ZEROS = "deel-torchlip", "orthogonium", "orthogonium, zero padding, otnn's MaxMin"

# 1-32, 32-32 with stride 2, 32-64, 64-64 with stride 2, dense 3136-128-10
PLAN = Plan(((32, 1), (32, 2), (64, 1), (64, 2)), (128,), 28)


def _plain_conv(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


FAMILIES = {
    RELU: Family(_plain_conv, nn.Linear, nn.Linear, nn.ReLU),
    MAXMIN: Family(_plain_conv, nn.Linear, nn.Linear, MaxMin),
    OTNN: Family(
        lambda inputs, outputs, stride: OrthoConv2d(inputs, outputs, 3, stride=stride, padding=1),
        OrthoLinear, UnitNormLinear, MaxMin,
    ),
}  # fmt: skip


def families() -> dict[str, Family]:
    """Ours, and those of the peers that can be imported."""
    found = dict(FAMILIES)
    if peers.has_torchlip():
        found[TORCHLIP] = Family(
            peers.torchlip_conv, peers.torchlip_dense, peers.torchlip_head, peers.torchlip_activation
        )
    if peers.has_orthogonium():
        dense, head = peers.orthogonium_dense, peers.orthogonium_head
        found[CIRCULAR] = Family(peers.orthogonium_conv, dense, head, peers.orthogonium_activation)
        found[ZEROS] = Family(peers.orthogonium_zeros, dense, head, MaxMin)
    return found


def build(family: Family, plan: Plan, seed: int = 0) -> nn.Sequential:
    """A network of the plan, in training mode."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels, pixels = plan.channels, plan.pixels
    for outputs, stride in plan.convolutions:
        layers += [family.conv(channels, outputs, stride), family.activation()]
        channels, pixels = outputs, -(-pixels // stride)
    layers.append(nn.Flatten())
    features = channels * pixels**2
    for size in plan.dense:
        layers += [family.dense(features, size), family.activation()]
        features = size
    return nn.Sequential(*layers, family.head(features, plan.classes))


def layers_of(net: nn.Module) -> Iterator[nn.Module]:
    """The convolutions and dense layers, whose `weight` is what they compute with."""
    return (layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear | OrthoConv2d))


def to_format(net: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Convert the weights that are parameters; kernels that are computed have the format that they are computed in."""
    for layer in layers_of(net):
        if "weight" in layer._parameters:
            layer.to(memory_format=memory_format)  # type: ignore[call-overload]
    return net


class Batch:
    """Noise with noisy labels, in both memory formats, drawn anew between rounds."""

    def __init__(self, plan: Plan, samples: int, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._classes = plan.classes
        images = torch.empty(samples, plan.channels, plan.pixels, plan.pixels)
        self.images: dict[torch.memory_format, Tensor] = {
            torch.contiguous_format: images,
            torch.channels_last: torch.empty_like(images).to(memory_format=torch.channels_last),
        }
        self.labels = torch.empty(samples, dtype=torch.long)
        self.draw()

    def draw(self) -> None:
        """Draw new values in place."""
        images = self.images[torch.contiguous_format].uniform_(generator=self._generator)
        self.images[torch.channels_last].copy_(images)
        self.labels.random_(self._classes, generator=self._generator)
