"""The networks: dense, strided convolutional and residual, each with an unconstrained twin of the same widths."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.nn import (
    Abs,
    Centering,
    ConvexResidual,
    FrobeniusLinear,
    FullSort,
    GroupSort,
    Householder,
    MaxMin,
    OrthoConv2d,
    OrthoLinear,
    ScaledAdaptiveAvgPool2d,
    UnitNormLinear,
)

Architecture = Literal["dense", "conv", "resnet"]
ARCHITECTURES: tuple[Architecture, ...] = ("dense", "conv", "resnet")
# The pixels that an architecture of convolutions takes along each direction.
SIZES = {"conv": (8, 128), "resnet": (8, 224)}
# Residual blocks of each stage of a "resnet", the share of their branches at the start, and the most pixels along each
# direction that its pooling leaves: with 4, a small one on Fashion-MNIST was 4 points less accurate.
_BLOCKS = 2
_SHARE = 0.2
_POOLED = 8
# Activations by name: the size of a group of channels, which divides every width, and the layer for a width.
ACTIVATIONS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "maxmin": (2, lambda width: MaxMin()),
    "groupsort4": (4, lambda width: GroupSort(4)),
    "groupsort8": (8, lambda width: GroupSort(8)),
    "fullsort": (1, lambda width: FullSort()),
    "abs": (1, lambda width: Abs()),
    "householder": (2, Householder),
}
HEADS: dict[str, Callable[[int, int], nn.Linear]] = {
    "unit_rows": UnitNormLinear,
    "orthogonal": OrthoLinear,
    "frobenius": FrobeniusLinear,
}


class Classifier(nn.Sequential):
    """A network that names its two parts: `body`, and the affine `head` that maps features to class scores.

    Shapes: (batch, *input_shape) pixels in [0, 1] to (batch, outputs). One output is a binary network: its sign decides
    and class 1 is positive. Several outputs are decided by the largest, or each by its sign if `multilabel`.

    Args:
        body: maps a batch of images to (batch, features).
        head: affine map from features to scores.
        input_shape: (channels, height, width).
        multilabel: every output is a label of its own, decided by its sign.
    """

    body: nn.Module
    head: nn.Linear

    def __init__(
        self, body: nn.Module, head: nn.Linear, input_shape: Sequence[int], *, multilabel: bool = False
    ) -> None:
        super().__init__(OrderedDict(body=body, head=head))
        self.input_shape = tuple(input_shape)
        self.multilabel = multilabel

    @property
    def classes(self) -> int:
        """The number of classes: 2 for one output."""
        return max(2, self.head.out_features)


def check_model(model: Classifier, inputs: Tensor) -> None:
    """Refuse a model in training mode, and images of another shape than it was built for.

    Raises:
        InputError: what does not fit.
    """
    if model.training:
        raise InputError("the model is in training mode; call model.eval() before certifying or explaining")
    if tuple(inputs.shape[1:]) != model.input_shape:
        raise InputError(f"inputs: expected images of shape {model.input_shape}, got {tuple(inputs.shape[1:])}")


def check_precision(model: Classifier, inputs: Tensor) -> None:
    """Refuse inputs of another precision than the weights.

    Raises:
        InputError: which it should be.
    """
    if inputs.dtype != model.head.weight.dtype:
        raise InputError(
            f"inputs: expected {model.head.weight.dtype} as the weights of the model, got {inputs.dtype}; "
            "convert one of them, such as model.double() and inputs.double()"
        )


def predict(scores: Tensor, multilabel: bool = False) -> Tensor:
    """Decide from scores (batch, outputs): the sign of one output, the largest of several; (batch,) classes.

    With several labels, the sign of each: (batch, outputs) of 0 and 1.

    Example:
        >>> predict(torch.tensor([[-0.5], [0.5]])), predict(torch.tensor([[0.1, 0.3, 0.2]]))
        (tensor([0, 1]), tensor([1]))
        >>> predict(torch.tensor([[0.1, -0.3]]), multilabel=True)
        tensor([[1, 0]])
    """
    if multilabel:
        return (scores > 0).long()
    return (scores[:, 0] > 0).long() if scores.shape[1] == 1 else scores.argmax(dim=1)


def build(
    architecture: str,
    input_shape: Sequence[int],
    classes: int,
    *,
    widths: Sequence[int],
    mean: Tensor | None = None,
    constrained: bool = True,
    activation: str = "maxmin",
    head: str = "unit_rows",
) -> Classifier:
    """Build a 1-Lipschitz classifier, or its unconstrained twin of the same widths (ReLU, batch normalisation).

    `dense`: hidden layers of the given widths. `conv`: widths are (stage, ..., stage, dense); every stage has two 3x3
    convolutions and the second halves the picture; a dense layer and the head follow. `resnet`: the same widths; every
    stage begins with a 3x3 convolution that halves the picture and has two residual blocks of two 3x3 convolutions
    each (a convex mix; in the twin an ordinary sum); pooling to 8x8 pixels where more are left, a dense layer and the
    head follow.

    Args:
        architecture: "dense", "conv" or "resnet".
        input_shape: (channels, height, width); 8 to 128 pixels for "conv", 8 to 224 for "resnet".
        classes: at least 2; two classes get one output.
        widths: numbers of units or channels: even for "maxmin" and "householder", multiples of 4 for "groupsort4" and
            of 8 for "groupsort8".
        mean: (channels,) mean of the training images, subtracted from the input; 0.5 by default.
        constrained: False builds the twin, to which activation and head do not apply.
        activation: a name in `ACTIVATIONS`.
        head: a name in `HEADS`: rows of norm 1; orthonormal rows (columns where there are more classes than features);
            or a weight of Frobenius norm 1.

    Raises:
        InputError: an unknown architecture, activation or head, or sizes that do not fit.

    Example:
        >>> net = build("dense", (1, 8, 8), 10, widths=(32, 32))
        >>> net(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> twin = build("dense", (1, 8, 8), 10, widths=(32, 32), constrained=False)
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    for setting, name, known in (("activation", activation, ACTIVATIONS), ("head", head, HEADS)):
        if name not in known:
            raise InputError(f"{setting}: expected one of {', '.join(known)}, got {name!r}")
    if classes < 2:
        raise InputError(f"classes: expected at least 2, got {classes}")
    group = ACTIVATIONS[activation][0]
    if not widths or any(width < 1 or width % group for width in widths):
        pairs = activation == "maxmin"
        expected = "even numbers >= 2 (MaxMin sorts pairs)" if pairs else f"multiples of {group} (for {activation})"
        raise InputError(f"widths: expected {expected}, got {list(widths)}")
    chosen = activation if constrained else None
    channels, height, width = input_shape
    layers: list[nn.Module] = [Centering(torch.full((channels,), 0.5) if mean is None else mean.float())]
    if architecture == "dense":
        features, dense = math.prod(input_shape), list(widths)
    else:
        *stages, last = widths
        _check_stages(architecture, height, width, widths)
        for stage in stages:
            if architecture == "conv":
                layers += _block(_conv(channels, stage, 1, constrained), chosen)
                layers += _block(_conv(stage, stage, 2, constrained), chosen)
            else:
                layers += _block(_conv(channels, stage, 2, constrained), chosen)
                layers += [layer for _ in range(_BLOCKS) for layer in _residual(stage, chosen)]
            channels, height, width = stage, -(-height // 2), -(-width // 2)
        if architecture == "resnet" and max(height, width) > _POOLED:
            height, width = min(height, _POOLED), min(width, _POOLED)
            layers.append((ScaledAdaptiveAvgPool2d if constrained else nn.AdaptiveAvgPool2d)((height, width)))
        features, dense = channels * height * width, [last]
    layers.append(nn.Flatten())
    for size in dense:
        linear = OrthoLinear(features, size) if constrained else nn.Linear(features, size, bias=False)
        layers += _block(linear, chosen)
        features = size
    outputs = 1 if classes == 2 else classes
    last_layer = HEADS[head](features, outputs) if constrained else nn.Linear(features, outputs)
    return Classifier(nn.Sequential(*layers), last_layer, input_shape)


def default_widths(architecture: str, input_shape: Sequence[int]) -> tuple[int, ...]:
    """Widths that suit a picture size: three dense layers of 256, or stages down to about 7 pixels and a dense 128.

    Example:
        >>> default_widths("conv", (1, 28, 28)), default_widths("conv", (3, 64, 64))
        ((32, 64, 128), (32, 64, 128, 128))
        >>> default_widths("resnet", (3, 224, 224))
        (32, 64, 128, 128, 128, 128)
    """
    if architecture == "dense":
        return (256, 256, 256)
    stages = 1
    while min(input_shape[1:]) / 2**stages > 8:
        stages += 1
    return (*[min(32 * 2**i, 128) for i in range(stages)], 128)


def parameter_count(model: nn.Module) -> int:
    """The number of trained numbers."""
    return sum(parameter.numel() for parameter in model.parameters())


def _check_stages(architecture: str, height: int, width: int, widths: Sequence[int]) -> None:
    """Refuse pictures too small or too large, and stages that would halve them below a pixel."""
    stages, (least, most) = len(widths) - 1, SIZES[architecture]
    if min(height, width) < least or max(height, width) > most:
        raise InputError(
            f"{architecture}: expected images of {least} to {most} pixels, got {height}x{width}; set --size"
        )
    if stages < 1 or min(height, width) < 2**stages:
        raise InputError(
            f"{architecture}: {stages} stages do not fit {height}x{width} pixels: expected 1 to "
            f"{int(math.log2(min(height, width)))} stage widths, then the dense width, got widths {list(widths)}"
        )


def _conv(channels_in: int, channels_out: int, stride: int, constrained: bool) -> nn.Module:
    if constrained:
        return OrthoConv2d(channels_in, channels_out, 3, stride=stride, padding=1)
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class _Sum(nn.Module):
    """The ordinary residual block, x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = inputs + self.branch(inputs)
        return result


def _residual(channels: int, activation: str | None) -> list[nn.Module]:
    """A residual block of two convolutions with its activation; of the twin, without one, an ordinary sum."""
    constrained = activation is not None
    inner = _block(_conv(channels, channels, 1, constrained), activation)
    last = _block(_conv(channels, channels, 1, constrained), activation)
    branch = nn.Sequential(*inner, *last[:-1])
    return [ConvexResidual(branch, _SHARE) if constrained else _Sum(branch), last[-1]]


def _block(layer: nn.Module, activation: str | None) -> list[nn.Module]:
    """A linear layer with its activation; that of the twin, None, is ReLU, and its bias that of batch normalisation."""
    images = isinstance(layer, (OrthoConv2d, nn.Conv2d))
    width = int(layer.out_channels if images else layer.out_features)  # type: ignore[arg-type]
    if activation is not None:
        return [layer, ACTIVATIONS[activation][1](width)]
    return [layer, nn.BatchNorm2d(width) if images else nn.BatchNorm1d(width), nn.ReLU()]
