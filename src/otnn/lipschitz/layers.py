"""The bound of each layer by its type: a rule for every layer of `otnn.nn` and for plain torch layers.

A rule tells the Lipschitz constant of the layer in exact arithmetic, and what executing it in floating point may add.
A layer without a rule raises: it never counts as 1.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz.convolution import convolution_bound
from otnn.lipschitz.matrix import gram_bound, matrix_bound, scaled
from otnn.lipschitz.rounding import UNDERFLOW, add_up, gamma, mul_up, norm_up, sqrt_up
from otnn.nn import Centering, MaxMin, OrthoConv2d

Shape = tuple[int, ...]
# What a subclass may override without computing something else.
_HARMLESS = {"__init__", "__doc__", "__module__", "__annotations__", "__repr__", "extra_repr", "reset_parameters"}
_HARMLESS |= {
    "__firstlineno__",
    "__static_attributes__",
    "manifold",
    "T_destination",
    "call_super_init",
    "dump_patches",
}
# A convolution between so few numbers is bounded as the dense matrix that it is, where that is tighter.
_DENSE = 2048


@dataclass(frozen=True)
class Rounding:
    """What executing a layer in floating point may add to its output.

    On an input h as executed the error has norm <= gamma(operations) (weight ||h|| + offset), and a term of underflow.

    Attributes:
        operations: roundings in sequence on the way to one output; 0 for layers that only move or compare numbers.
        weight: bounds || |W| ||, the norm of the layer with every weight replaced by its absolute value.
        offset: bounds the norm of what is added to the output, the bias.
        outputs: numbers of the output.
    """

    operations: int = 0
    weight: float = 0.0
    offset: float = 0.0
    outputs: int = 0

    def local(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return (a, b) such that the error has norm <= a ||h|| + b."""
        if self.operations == 0:
            return 0.0, 0.0
        relative = gamma(self.operations, dtype)
        # a product, a sum, a weight or an input below the smallest normal number may be flushed to zero
        lost = mul_up(2.0, sqrt_up(float(self.outputs)), float(self.operations), UNDERFLOW[dtype])
        slope = add_up(mul_up(relative, self.weight), lost)
        return slope, add_up(mul_up(relative, self.offset), mul_up(lost, add_up(1.0, self.weight)))


EXACT = Rounding()


@dataclass(frozen=True)
class LayerBound:
    """An upper bound of one layer's Lipschitz constant, and its rounding where that is known."""

    constant: float
    rounding: Rounding | None


@singledispatch
def layer_bound(layer: nn.Module, shape: Shape | None, output: Shape | None) -> LayerBound:
    """Bound one layer in `eval()` mode.

    Args:
        layer: any module; a rule of its type, or of a type that it extends without computing otherwise, must exist.
        shape: of one sample at its input, where it is known.
        output: of one sample at its output, likewise.

    Raises:
        InputError: no rule is known, or none without the shape.
    """
    raise InputError(f"no Lipschitz bound is known for {type(layer).__name__}; use a layer of otnn.nn or of torch.nn")


def known_kind(layer: nn.Module) -> type[nn.Module] | None:
    """The type whose rule applies to a layer, or None."""
    kinds = (kind for kind in type(layer).__mro__ if kind is not nn.Module and issubclass(kind, nn.Module))
    return next((kind for kind in kinds if kind in layer_bound.registry), None)


def computes_like(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what `kind`, its type or a parent, computes: nothing overridden, no hooks."""
    between = type(module).__mro__[: type(module).__mro__.index(kind)]
    overridden = {name for cls in between for name in vars(cls) if hasattr(kind, name)} - _HARMLESS
    replaced = {"forward", "_conv_forward"} & vars(module).keys()
    return not (overridden or replaced or has_hooks(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook may change what a module takes or returns."""
    everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or everywhere)


def needs_shape(layer: nn.Module) -> InputError:
    """The error of a rule that depends on the size of the images."""
    return InputError(
        f"the bound of {type(layer).__name__} depends on the input's size: expected input_shape, got none"
    )


def refuse_batch(layer: nn.Module, dim: int, shape: Shape | None) -> None:
    """Refuse a layer along the dimension of the batch, or along one that may be it."""
    name = type(layer).__name__
    if dim == 0 or (shape is not None and dim < -len(shape)):
        raise InputError(f"{name} along dimension {dim} mixes the samples of a batch; expected dim >= 1")
    if shape is None and dim < -1:
        raise InputError(f"{name} along dimension {dim} depends on the input's shape: expected dim >= 1 or input_shape")


@layer_bound.register
def _(layer: nn.Linear, shape: Shape | None, output: Shape | None) -> LayerBound:
    rounding = None
    if output is not None:
        rows = math.prod(output[:-1])
        weight, offset = norm_up(layer.weight.detach().double()), mul_up(sqrt_up(rows), _norm(layer.bias))
        rounding = Rounding(layer.in_features + 1, weight, offset, rows * layer.out_features)
    return LayerBound(matrix_bound(layer.weight), rounding)


@layer_bound.register
def _(layer: OrthoConv2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    pair = (layer.stride, layer.stride)
    # the kernel as composed in the dtype of its factors, and in float64: they differ by rounding;
    # the layer itself refuses circular padding under which it would not be orthogonal
    kernels = {layer.weight.dtype: layer.weight, torch.float64: copy.deepcopy(layer).double().weight}
    constant = max(convolution_bound(kernel, stride=pair) for kernel in kernels.values())
    return LayerBound(constant, _convolution_rounding(layer.weight, layer.bias, pair, (1, 1), output))


@layer_bound.register(nn.Conv1d)
@layer_bound.register(nn.Conv2d)
def _(layer: nn.Conv1d | nn.Conv2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    if shape is not None and len(shape) != layer.weight.ndim - 1:
        raise InputError(f"expected images of {layer.weight.ndim - 1} dimensions, channels first, got shape {shape}")
    kernel = _two_dimensional(layer.weight)
    stride, dilation = _pair(layer.stride, 1), _pair(layer.dilation, 1)
    size = None if shape is None else _pair(shape[1:], 1)
    taps, copies = kernel.shape[2:], 1.0
    if layer.padding_mode == "zeros":
        constant = convolution_bound(kernel, stride=stride, dilation=dilation, groups=layer.groups, size=size)
        constant = min(constant, _dense_bound(layer, shape, output, constant))
    else:
        copies, stride = _padding_norm(layer, size, taps, stride, dilation), _safe_stride(layer, size, stride)
        constant = mul_up(copies, convolution_bound(kernel, stride=stride, dilation=dilation, groups=layer.groups))
    return LayerBound(constant, _convolution_rounding(kernel, layer.bias, stride, dilation, output, copies))


@layer_bound.register
def _(layer: Centering, shape: Shape | None, output: Shape | None) -> LayerBound:
    pixels = None if output is None else math.prod(output[1:])
    if pixels is None:
        return LayerBound(1.0, None)
    offset = mul_up(sqrt_up(pixels), norm_up(layer.mean.detach().double()))
    return LayerBound(1.0, Rounding(1, 1.0, offset, pixels * len(layer.mean)))


@layer_bound.register(MaxMin)
@layer_bound.register(nn.Unflatten)
def _(layer: MaxMin | nn.Unflatten, shape: Shape | None, output: Shape | None) -> LayerBound:
    refuse_batch(layer, layer.dim, shape)
    return LayerBound(1.0, EXACT)


@layer_bound.register
def _(layer: nn.Flatten, shape: Shape | None, output: Shape | None) -> LayerBound:
    refuse_batch(layer, layer.start_dim, shape)
    return LayerBound(1.0, EXACT)


@layer_bound.register(nn.Identity)
@layer_bound.register(nn.ReLU)
def _(layer: nn.Module, shape: Shape | None, output: Shape | None) -> LayerBound:
    return LayerBound(1.0, EXACT)


def _norm(bias: Tensor | None) -> float:
    return 0.0 if bias is None else norm_up(bias.detach().double())


def _pair(values: Sequence[int], fill: int) -> tuple[int, int]:
    """Two numbers, height first: those of a one-dimensional layer belong to the width."""
    return (fill, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))


def _two_dimensional(kernel: Tensor) -> Tensor:
    return kernel.unsqueeze(2) if kernel.ndim == 3 else kernel


def hits(taps: int, stride: int, dilation: int) -> int:
    """How many windows hold one pixel at most, along one dimension."""
    return -(-taps // (stride // math.gcd(stride, dilation)))


def _convolution_rounding(
    kernel: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    output: Shape | None,
    copies: float = 1.0,
) -> Rounding | None:
    """Each output is a sum over a window, each pixel is in so many windows, and padding may have copied it."""
    if output is None:
        return None
    windows = math.prod(hits(t, s, d) for t, s, d in zip(kernel.shape[2:], stride, dilation, strict=True))
    weight = mul_up(copies, sqrt_up(windows), norm_up(kernel.detach().double()))
    offset = mul_up(sqrt_up(math.prod(output[1:])), _norm(bias))
    return Rounding(kernel[0].numel() + 1, weight, offset, math.prod(output))


@torch.inference_mode(False)
def _dense_bound(layer: nn.Conv1d | nn.Conv2d, shape: Shape | None, output: Shape | None, constant: float) -> float:
    """The bound of a convolution on small images as the matrix that it is, borders and all; infinite where too large.

    The Gram matrix of the smaller side is found by applying the layer and its adjoint to a basis.
    """
    if shape is None or output is None or min(math.prod(shape), math.prod(output)) > _DENSE or abs(constant - 1) < 1e-4:
        return math.inf
    kernel, scale = scaled(layer.weight)
    if scale == 0:
        return 0.0
    function = nn.functional.conv1d if len(shape) == 2 else nn.functional.conv2d

    def convolve(images: Tensor) -> Tensor:
        return function(images, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    def adjoint(outputs: Tensor, images: Tensor) -> Tensor:
        with torch.enable_grad():
            images = images.requires_grad_()
            return torch.autograd.grad(convolve(images), images, outputs)[0]

    inputs = torch.zeros(min(math.prod(shape), math.prod(output)), *shape, dtype=torch.float64)
    basis = torch.eye(len(inputs), dtype=torch.float64)
    if math.prod(shape) <= math.prod(output):
        gram = adjoint(convolve(basis.view_as(inputs)), inputs).flatten(1)
    else:
        gram = convolve(adjoint(basis.view(-1, *output), inputs)).flatten(1)
    # applied to a basis, the first map only picks weights; the second sums products, of each weight at most once
    weights = norm_up(kernel)
    error = mul_up(gamma(kernel.numel() + 2), float(math.prod(output[1:])), weights, weights)
    return mul_up(scale, gram_bound(gram, error))


def _padding_norm(
    layer: nn.Conv1d | nn.Conv2d, size: tuple[int, int] | None, taps: Sequence[int], stride: Shape, dilation: Shape
) -> float:
    """The norm of a padding that repeats pixels: the square root of how often one is repeated.

    Circular padding is left out of the count as far as no output sees the torus twice: there the convolution is the one
    on the torus, whose norm the frequencies bound.
    """
    before_after = layer._reversed_padding_repeated_twice[::-1]  # (..., after, before), height first
    pads = [tuple(before_after[2 * dim : 2 * dim + 2]) for dim in range(len(before_after) // 2)]
    if len(pads) == 1:
        pads = [(0, 0), *pads]
    norm = 1.0
    for dim, (after, before) in enumerate(pads):
        if before == after == 0:
            continue
        count = None if size is None else size[dim]
        if layer.padding_mode == "circular":
            reach = dilation[dim] * (taps[dim] - 1)
            if before + after <= reach:
                continue  # no more outputs than pixels, at any size
            if count is None:
                raise needs_shape(layer)
            outputs = (count + before + after - reach - 1) // stride[dim] + 1
            norm = mul_up(norm, sqrt_up(-(-outputs * stride[dim] // count)))
            continue
        if count is None:
            raise needs_shape(layer)
        line = torch.arange(count, dtype=torch.float64).view(1, 1, -1)
        copies = nn.functional.pad(line, (before, after), mode=layer.padding_mode).flatten().long().bincount()
        norm = mul_up(norm, sqrt_up(float(copies.max())))
    return norm


def _safe_stride(layer: nn.Conv1d | nn.Conv2d, size: tuple[int, int] | None, stride: Shape) -> tuple[int, int]:
    """The stride that the bound may count on: on a torus whose size it does not divide, outputs come closer."""
    if layer.padding_mode != "circular":
        return (stride[0], stride[1])
    if size is None:
        return (1, 1)
    return (stride[0] if size[0] % stride[0] == 0 else 1, stride[1] if size[1] % stride[1] == 0 else 1)
