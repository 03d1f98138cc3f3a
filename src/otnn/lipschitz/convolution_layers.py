"""Rules of convolutions and of their transposes: plain torch layers and the orthogonal ones of `otnn.nn`."""

import copy
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz.convolution import convolution_bound
from otnn.lipschitz.layers import LayerBound, Rounding, Shape, bias_norm, hits, layer_bound, needs_shape
from otnn.lipschitz.matrix import gram_bound, scaled
from otnn.lipschitz.rounding import gamma, mul_up, norm_up, sqrt_up
from otnn.nn import OrthoConv1d, OrthoConv2d, OrthoConvTranspose2d
from otnn.nn.kernel import OrthoKernel

# A convolution between so few numbers is bounded as the dense matrix that it is, where that is tighter.
_DENSE = 2048
_Convolution = nn.Conv1d | nn.Conv2d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d


@layer_bound.register(OrthoConv1d)
@layer_bound.register(OrthoConv2d)
@layer_bound.register(OrthoConvTranspose2d)
def _(layer: OrthoKernel, shape: Shape | None, output: Shape | None) -> LayerBound:
    _check_dimensions(layer, shape)
    # the kernel as composed in the dtype of its factors, and in float64: they differ by rounding;
    # the layer itself refuses circular padding under which it would not be orthogonal
    kernels = {layer.weight.dtype: layer.weight, torch.float64: copy.deepcopy(layer).double().weight}
    constant = max(orthogonal_bound(layer, kernel) for kernel in kernels.values())
    stride, dilation = _pair([layer.stride] * layer.dims, 1), _pair([layer.dilation] * layer.dims, 1)
    kernel = _two_dimensional(layer.weight)
    return LayerBound(
        constant,
        _rounding(kernel, layer.bias, stride, dilation, layer.groups, output, transposed=layer.transposed),
    )


def orthogonal_bound(layer: OrthoKernel, kernel: Tensor) -> float:
    """Bound the norm of a kernel with the stride, the dilation and the groups of an orthogonal convolution."""
    stride, dilation = _pair([layer.stride] * layer.dims, 1), _pair([layer.dilation] * layer.dims, 1)
    return convolution_bound(_two_dimensional(kernel), stride=stride, dilation=dilation, groups=layer.groups)


@layer_bound.register(nn.Conv1d)
@layer_bound.register(nn.Conv2d)
def _(layer: _Convolution, shape: Shape | None, output: Shape | None) -> LayerBound:
    _check_dimensions(layer, shape)
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
    return LayerBound(constant, _rounding(kernel, layer.bias, stride, dilation, layer.groups, output, copies))


@layer_bound.register(nn.ConvTranspose1d)
@layer_bound.register(nn.ConvTranspose2d)
def _(layer: _Transposed, shape: Shape | None, output: Shape | None) -> LayerBound:
    _check_dimensions(layer, shape)
    kernel = _two_dimensional(layer.weight)
    stride, dilation = _pair(layer.stride, 1), _pair(layer.dilation, 1)
    # the adjoint of a convolution that takes images of the size of the output; cropping is its zero padding
    size = None if output is None else _pair(output[1:], 1)
    constant = convolution_bound(kernel, stride=stride, dilation=dilation, groups=layer.groups, size=size)
    constant = min(constant, _dense_bound(layer, shape, output, constant))
    return LayerBound(constant, _rounding(kernel, layer.bias, stride, dilation, layer.groups, output, transposed=True))


def _check_dimensions(layer: OrthoKernel | _Convolution | _Transposed, shape: Shape | None) -> None:
    if shape is not None and len(shape) != layer.weight.ndim - 1:
        raise InputError(f"expected images of {layer.weight.ndim - 1} dimensions, channels first, got shape {shape}")


def _pair(values: Sequence[int], fill: int) -> tuple[int, int]:
    """Two numbers, height first: those of a one-dimensional layer belong to the width."""
    return (fill, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))


def _two_dimensional(kernel: Tensor) -> Tensor:
    return kernel.unsqueeze(2) if kernel.ndim == 3 else kernel


def _rounding(
    kernel: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output: Shape | None,
    copies: float = 1.0,
    transposed: bool = False,
) -> Rounding | None:
    """Each output is a sum over a window, each pixel is in so many windows, and padding may have copied it.

    Transposed, each output is a sum over the windows that it is in; the norm is that of the adjoint.
    """
    if output is None:
        return None
    windows = math.prod(hits(t, s, d) for t, s, d in zip(kernel.shape[2:], stride, dilation, strict=True))
    terms = kernel.shape[0] // groups * windows if transposed else kernel[0].numel()
    widest = max(norm_up(part) for part in kernel.detach().double().chunk(groups))
    weight = mul_up(copies, sqrt_up(windows), widest)
    offset = mul_up(sqrt_up(math.prod(output[1:])), bias_norm(bias))
    return Rounding(terms + 1, weight, offset, math.prod(output))


@torch.inference_mode(False)
def _dense_bound(
    layer: _Convolution | _Transposed, shape: Shape | None, output: Shape | None, constant: float
) -> float:
    """The bound of a convolution on small images as the matrix that it is, borders and all; infinite where too large.

    The Gram matrix of the smaller side is found by applying the layer and its adjoint to a basis.
    """
    if shape is None or output is None or min(math.prod(shape), math.prod(output)) > _DENSE or abs(constant - 1) < 1e-4:
        return math.inf
    kernel, scale = scaled(layer.weight)
    if scale == 0:
        return 0.0
    one_dimensional = len(shape) == 2

    def convolve(images: Tensor) -> Tensor:
        if isinstance(layer, _Transposed):
            transpose = F.conv_transpose1d if one_dimensional else F.conv_transpose2d
            padding, added = cast(Shape, layer.padding), layer.output_padding
            return transpose(images, kernel, None, layer.stride, padding, added, layer.groups, layer.dilation)
        function = F.conv1d if one_dimensional else F.conv2d
        return function(images, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    def adjoint(outputs: Tensor, images: Tensor) -> Tensor:
        with torch.enable_grad():
            images = images.requires_grad_()
            return torch.autograd.grad(convolve(images), images, outputs)[0]

    inputs = torch.zeros(min(math.prod(shape), math.prod(output)), *shape, dtype=torch.float64)
    if convolve(inputs[:1]).shape[1:] != output:  # a transposed convolution may be called with a size of its own
        return math.inf
    basis = torch.eye(len(inputs), dtype=torch.float64)
    if math.prod(shape) <= math.prod(output):
        gram = adjoint(convolve(basis.view_as(inputs)), inputs).flatten(1)
    else:
        gram = convolve(adjoint(basis.view(-1, *output), inputs)).flatten(1)
    # applied to a basis, the first map only picks weights; the second sums products, of each weight at most once
    weights = norm_up(kernel)
    windows = math.prod(shape[1:] if isinstance(layer, _Transposed) else output[1:])
    error = mul_up(gamma(kernel.numel() + 2), float(windows), weights, weights)
    return mul_up(scale, gram_bound(gram, error))


def _padding_norm(
    layer: _Convolution, size: tuple[int, int] | None, taps: Sequence[int], stride: Shape, dilation: Shape
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


def _safe_stride(layer: _Convolution, size: tuple[int, int] | None, stride: Shape) -> tuple[int, int]:
    """The stride that the bound may count on: on a torus whose size it does not divide, outputs come closer."""
    if layer.padding_mode != "circular":
        return (stride[0], stride[1])
    if size is None:
        return (1, 1)
    return (stride[0] if size[0] % stride[0] == 0 else 1, stride[1] if size[1] % stride[1] == 0 else 1)
