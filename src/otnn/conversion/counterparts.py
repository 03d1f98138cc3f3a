"""What each kind of layer becomes in a 1-Lipschitz network: a rule for every type, used by `otnn.convert`.

A layer of `otnn.nn` stays as it is. One of torch without parameters stays where its bound is at most 1, and is divided
by it elsewhere. All others need a rule, or raise. Adding a layer is adding its rule.
"""

from dataclasses import dataclass
from functools import singledispatch
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from otnn.errors import InputError
from otnn.lipschitz.layers import Shape, computes_like, known_kind, layer_bound
from otnn.lipschitz.rounding import div_up
from otnn.models import ACTIVATIONS
from otnn.nn import (
    Abs,
    AdaptiveL2NormPool2d,
    BatchCentering,
    L2NormPool2d,
    LayerCentering,
    OrthoConv1d,
    OrthoConv2d,
    OrthoConvTranspose2d,
    OrthoLinear,
    ScaledAdaptiveAvgPool2d,
    ScaledAvgPool2d,
    UnitNormLinear,
)

# A bound up to this is that of a layer of norm 1: the rest is the rounding of the bound.
_ONE = 1 + 1e-6


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        shape: of one sample at its input.
        output: of one sample at its output.
        dim: the dimension of a batch that holds the channels.
        activation: a name in `otnn.models.ACTIVATIONS`.
        device: of the weights.
        dtype: of the weights.
    """

    shape: Shape
    output: Shape
    dim: int = 1
    activation: str = "maxmin"
    device: torch.device | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Counterpart:
    """What a layer becomes.

    Attributes:
        layer: the new layer; the old one where it stays; None where nothing is left of it.
        why: of the change, empty where the types say it.
        scale: a number that its result is multiplied by.
    """

    layer: nn.Module | None
    why: str = ""
    scale: float = 1.0


def counterpart(layer: nn.Module, place: Place) -> Counterpart:
    """The 1-Lipschitz counterpart of a layer, with fresh weights. A subclass counts as what it extends.

    Raises:
        InputError: none is known, or none has its settings.

    Example:
        >>> counterpart(nn.Linear(4, 2), Place((4,), (2,))).layer
        OrthoLinear(in_features=4, out_features=2, bias=True)
        >>> counterpart(nn.ReLU(), Place((3, 8, 8), (3, 8, 8))).layer
        Abs()
    """
    if any(kind.__module__.startswith("otnn.nn.") for kind in type(layer).__mro__):
        if nn.utils.parametrize.is_parametrized(layer):
            raise InputError(
                f"{type(layer).__name__} has a parametrization beside its own constraint: expected none; remove it "
                "with torch.nn.utils.parametrize.remove_parametrizations"
            )
        if not isinstance(layer, UnitNormLinear) or layer.out_features == 1:
            return Counterpart(layer)
        new = OrthoLinear(layer.in_features, layer.out_features, layer.bias is not None)
        return Counterpart(
            new.to(place.device, place.dtype), "unit rows alone do not bound the norm of what is no head"
        )
    found = _rule(layer, place)
    kind = known_kind(layer)
    if found.layer is layer and kind is not None and not computes_like(layer, kind):
        raise InputError(
            f"{type(layer).__name__} computes something else than {kind.__name__}: remove its hook, or its own forward"
        )
    if found.layer is not None and found.layer is not layer:
        found.layer.to(place.device, place.dtype)
    return found


def has_rule(layer: nn.Module) -> bool:
    """Whether a layer's own type, or one that it extends, has a rule of its own."""
    return any(kind in _rule.registry for kind in type(layer).__mro__ if kind is not object)


@singledispatch
def _rule(layer: nn.Module, place: Place) -> Counterpart:
    name = type(layer).__name__
    if known_kind(layer) is None or any(True for _ in layer.parameters()):
        raise InputError(
            f"no 1-Lipschitz counterpart of {name} is known; replace it by layers of otnn.nn, or leave it out"
        )
    constant = layer_bound(layer, place.shape, place.output).constant
    if constant <= _ONE:
        return Counterpart(layer)
    return Counterpart(layer, f"its norm is up to {constant:.4g}: divided by it", 1 / constant)


@_rule.register
def _(layer: nn.Linear, place: Place) -> Counterpart:
    return Counterpart(OrthoLinear(layer.in_features, layer.out_features, layer.bias is not None))


@_rule.register(nn.Conv1d)
@_rule.register(nn.Conv2d)
def _(layer: nn.Conv1d | nn.Conv2d, place: Place) -> Counterpart:
    dims = len(place.shape) - 1
    if dims != (1 if isinstance(layer, nn.Conv1d) else 2):
        raise InputError(f"expected (channels, pixels ...) at each sample, got {place.shape}")
    mode = "circular" if layer.padding_mode == "circular" else "zeros"
    taps, stride, dilation = (
        _one(name, getattr(layer, name)) for name in ("kernel_size", "stride", "dilation")
    )  # every number is the same in all directions
    padding = _padding(layer, taps, dilation)
    kernel, padding, why = _fitting_window(place, taps, stride, padding, dilation)
    reasons = [why] if why else []
    if layer.padding_mode != mode:
        reasons.append(f"{layer.padding_mode} padding counts border pixels twice: zeros")
    if layer.groups > 1 and layer.groups in (layer.in_channels, layer.out_channels) and stride == 1:
        reasons.append("orthogonal on single channels: shifts only")
    kind = OrthoConv1d if isinstance(layer, nn.Conv1d) else OrthoConv2d
    new = kind(
        *(layer.in_channels, layer.out_channels, kernel, stride, padding, dilation, layer.groups),
        bias=layer.bias is not None,
        padding_mode=mode,
    )
    return Counterpart(new, "; ".join(reasons))


@_rule.register
def _(layer: nn.ConvTranspose2d, place: Place) -> Counterpart:
    return Counterpart(
        OrthoConvTranspose2d(
            *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding),  # type: ignore[arg-type]
            *(layer.output_padding, layer.groups, layer.bias is not None, layer.dilation),
        )
    )


def _activation(layer: nn.Module, place: Place) -> Counterpart:
    width = place.shape[place.dim - 1]
    group, make = ACTIVATIONS[place.activation]
    if width % group:
        return Counterpart(Abs(), f"{width} channels are no multiple of {group}")
    new: Any = make(width)
    if hasattr(new, "dim"):
        new.dim = place.dim
    return Counterpart(new)


for _kind in (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink),
    *(nn.Softshrink, nn.Hardshrink, nn.Threshold),
):
    _rule.register(_kind)(_activation)


@_rule.register(nn.modules.batchnorm._BatchNorm)
@_rule.register(nn.modules.instancenorm._InstanceNorm)
def _(layer: nn.Module, place: Place) -> Counterpart:
    momentum = layer.momentum if isinstance(layer, nn.modules.batchnorm._BatchNorm) else 0.1
    # torch's momentum 0 never learns the mean; that of BatchCentering is then the mean of all batches
    return Counterpart(BatchCentering(place.shape[0], momentum or None, bias=bool(layer.affine)))


@_rule.register
def _(layer: nn.GroupNorm, place: Place) -> Counterpart:
    why = "" if layer.num_groups == 1 else "one mean for all groups"
    return Counterpart(LayerCentering(layer.num_channels, over="sample", bias=layer.affine), why)


@_rule.register
def _(layer: nn.LayerNorm, place: Place) -> Counterpart:
    over, bias = tuple(layer.normalized_shape), layer.bias is not None
    if over == place.shape and len(over) > 1:
        return Counterpart(LayerCentering(over[0], over="sample", bias=bias))
    # a subclass may normalise the channels of images
    if over == place.shape or (type(layer) is not nn.LayerNorm and over == place.shape[:1]):
        return Counterpart(LayerCentering(over[0], bias=bias))
    raise InputError(
        f"LayerNorm over the last dimensions {over} of {place.shape} has no counterpart: LayerCentering subtracts the "
        "mean of the channels, dimension 1, or of the whole sample"
    )


@_rule.register(nn.RMSNorm)
@_rule.register(nn.LocalResponseNorm)
def _(layer: nn.Module, place: Place) -> Counterpart:
    return Counterpart(None, "it only divides by the norm of its input, which has no bound")


@_rule.register(nn.modules.dropout._DropoutNd)
def _(layer: nn.Module, place: Place) -> Counterpart:
    return Counterpart(None, "the constraint regularises already")


@_rule.register
def _(layer: nn.MaxPool2d, place: Place) -> Counterpart:
    if (constant := layer_bound(layer, place.shape, place.output).constant) <= _ONE:
        return Counterpart(layer)
    window = _pair(layer.stride)
    if window == (1, 1):
        return _scaled(layer, constant)
    why = "disjoint windows: overlapping ones count a pixel several times"
    if _floors(place, window):
        return Counterpart(L2NormPool2d(window), why)
    return Counterpart(AdaptiveL2NormPool2d(place.output[1:]), why)


@_rule.register
def _(layer: nn.AdaptiveMaxPool2d, place: Place) -> Counterpart:
    if (constant := layer_bound(layer, place.shape, place.output).constant) <= _ONE:
        return Counterpart(layer)
    if _shrinks(place):
        return Counterpart(AdaptiveL2NormPool2d(place.output[1:]), "disjoint windows")
    return _scaled(layer, constant)


@_rule.register
def _(layer: nn.AvgPool2d, place: Place) -> Counterpart:
    window, stride = _pair(layer.kernel_size), _pair(layer.stride)
    if window == stride and _pair(layer.padding) == (0, 0):
        if _floors(place, window):
            return Counterpart(ScaledAvgPool2d(window))
        return Counterpart(ScaledAdaptiveAvgPool2d(place.output[1:]))
    return _scaled(layer, layer_bound(layer, place.shape, place.output).constant)


@_rule.register
def _(layer: nn.AdaptiveAvgPool2d, place: Place) -> Counterpart:
    if _shrinks(place):
        return Counterpart(ScaledAdaptiveAvgPool2d(cast(Any, layer.output_size)))
    return _scaled(layer, layer_bound(layer, place.shape, place.output).constant)


@_rule.register
def _(layer: nn.MaxPool1d, place: Place) -> Counterpart:
    if (constant := layer_bound(layer, place.shape, place.output).constant) <= _ONE:
        return Counterpart(layer)
    stride = _one("stride", layer.stride)
    if stride > 1 and place.shape[-1] // stride == place.output[-1]:
        return Counterpart(nn.MaxPool1d(stride), "disjoint windows: overlapping ones count a number several times")
    return _scaled(layer, constant)


@_rule.register(nn.AvgPool1d)
@_rule.register(nn.AdaptiveAvgPool1d)
def _(layer: nn.Module, place: Place) -> Counterpart:
    return _scaled(layer, layer_bound(layer, place.shape, place.output).constant)


def _scaled(layer: nn.Module, constant: float) -> Counterpart:
    """The same layer, with its result divided by its norm; an average has less than 1."""
    if 1 / _ONE <= constant <= _ONE:
        return Counterpart(layer)
    return Counterpart(layer, f"its norm is {constant:.4g}: divided by it", div_up(1.0, constant))


def _fitting_window(place: Place, taps: int, stride: int, padding: int, dilation: int) -> tuple[int, int, str]:
    """Kernel size and padding of an orthogonal convolution that gives the size of the output, and why others."""

    def fits(kernel: int, padding: int) -> bool:
        reach = dilation * (kernel - 1) + 1
        return all(
            (side + 2 * padding - reach) // stride + 1 == wanted
            for side, wanted in zip(place.shape[1:], place.output[1:], strict=True)
        )

    if taps >= stride and fits(taps, padding):
        return taps, padding, ""
    # one tap more on each side with one pixel more of padding changes no size, so that a larger kernel always fits
    least, most = max(taps, stride), max(taps, stride) + stride
    for kernel, pixels in product(range(least, most + 1), range(padding + dilation * most + 1)):
        if fits(kernel, pixels):
            why = f"kernel {kernel} instead of {taps}: a kernel smaller than the stride skips pixels"
            return kernel, pixels, why if taps < stride else f"kernel {kernel} with padding {pixels}"
    raise InputError(
        f"no orthogonal convolution of stride {stride} takes {place.shape} to {place.output}; choose another padding"
    )


def _padding(layer: nn.Conv1d | nn.Conv2d, taps: int, dilation: int) -> int:
    if isinstance(layer.padding, str):
        return dilation * (taps - 1) // 2 if layer.padding == "same" else 0
    return _one("padding", layer.padding)


def _one(name: str, sizes: Any) -> int:
    """One number for all directions."""
    numbers = {sizes} if isinstance(sizes, int) else set(sizes)
    if len(numbers) != 1:
        raise InputError(f"{name}: orthogonal kernels are square: expected one size for both directions, got {sizes}")
    return int(numbers.pop())


def _pair(sizes: Any) -> tuple[int, int]:
    return (sizes, sizes) if isinstance(sizes, int) else (sizes[0], sizes[1])


def _floors(place: Place, window: tuple[int, int]) -> bool:
    """Whether disjoint windows give the size of the output."""
    return all(
        side // size == wanted for side, size, wanted in zip(place.shape[-2:], window, place.output[-2:], strict=True)
    )


def _shrinks(place: Place) -> bool:
    return all(wanted <= side for side, wanted in zip(place.shape[-2:], place.output[-2:], strict=True))


def _any_activation(shape: Shape, *settings: Any, **named: Any) -> nn.Module:
    return nn.ReLU()


def _pool(kind: Any) -> Any:
    def make(shape: Shape, *settings: Any, **named: Any) -> nn.Module:
        # the functions have ceil_mode and return_indices in another order, so that they are set by name
        flags = {name: named.pop(name) for name in ("ceil_mode", "return_indices") if name in named}
        if len(settings) > 4:
            raise InputError("expected ceil_mode and return_indices by name")
        pool: nn.Module = kind(*settings, **named)
        for name, value in flags.items():
            setattr(pool, name, value)
        return pool

    return make


# Functions and methods that are layers without a name: from the shape of one sample and their settings.
FUNCTIONS: dict[Any, Any] = {
    **dict.fromkeys(
        (
            *(F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, F.relu6, F.leaky_relu),
            *(F.elu, F.celu, F.selu, torch.selu, F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh, F.hardsigmoid),
            *(F.tanh, torch.tanh, torch.Tensor.tanh, F.sigmoid, torch.sigmoid, torch.Tensor.sigmoid, F.logsigmoid),
            *(F.softplus, F.softsign, F.prelu, F.rrelu),
        ),
        _any_activation,
    ),
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout),
        lambda shape, *settings, **named: nn.Dropout(),
    ),
    F.max_pool1d: _pool(nn.MaxPool1d),
    F.max_pool2d: _pool(nn.MaxPool2d),
    F.adaptive_max_pool2d: _pool(nn.AdaptiveMaxPool2d),
    F.avg_pool1d: lambda shape, *settings, **named: nn.AvgPool1d(*settings, **named),
    F.avg_pool2d: lambda shape, *settings, **named: nn.AvgPool2d(*settings, **named),
    F.adaptive_avg_pool1d: _pool(nn.AdaptiveAvgPool1d),
    F.adaptive_avg_pool2d: _pool(nn.AdaptiveAvgPool2d),
    F.pixel_shuffle: lambda shape, *settings, **named: nn.PixelShuffle(*settings, **named),
    F.pixel_unshuffle: lambda shape, *settings, **named: nn.PixelUnshuffle(*settings, **named),
    F.batch_norm: lambda shape, *settings, **named: nn.BatchNorm2d(shape[0]),
    F.instance_norm: lambda shape, *settings, **named: nn.InstanceNorm2d(shape[0], affine=True),
    F.layer_norm: lambda shape, normalized_shape, *settings, **named: nn.LayerNorm(normalized_shape),
    F.group_norm: lambda shape, num_groups, *settings, **named: nn.GroupNorm(num_groups, shape[0]),
    F.local_response_norm: lambda shape, size, *settings, **named: nn.LocalResponseNorm(size),
}
# Layers, functions and methods that turn scores into probabilities.
PROBABILITIES: set[Any] = {nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid}
PROBABILITIES |= {F.softmax, F.log_softmax, F.sigmoid, F.logsigmoid, torch.softmax, torch.log_softmax, torch.sigmoid}
PROBABILITIES |= {torch.Tensor.softmax, torch.Tensor.log_softmax, torch.Tensor.sigmoid}
