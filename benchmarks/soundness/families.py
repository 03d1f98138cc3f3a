"""The families of cases of the campaign on bounds: layers, and small networks of affine layers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.soundness.draws import KINDS, Draw
from benchmarks.soundness.operators import Matrix, convolution_operator, layer_operator
from otnn.lipschitz import bound, convolution_bound, export
from otnn.nn import Centering, OrthoConv2d, OrthoLinear

# Numbers of the input or the output of a case at most: an SVD of that size takes some 20 ms.
SIDE = 400


@dataclass(frozen=True)
class Case:
    """A layer or network and the size of the images on which its true norm is found.

    Attributes:
        module: the map.
        shape: of one sample.
        told: whether `bound` is told the shape.
        parameters: what was drawn.
        limit: the largest ratio of bound and true norm that is allowed.
        operator: the true matrix; None for a map that is not affine, of which difference quotients are taken.
        exact: every entry of the matrix is one stored weight, so that close cases can be decided exactly.
        bound: what is checked where it is not `otnn.lipschitz.bound`.
    """

    module: nn.Module
    shape: tuple[int, ...]
    told: bool
    parameters: dict[str, Any]
    limit: float | None = None
    operator: Callable[[], Matrix] | None = None
    exact: bool = False
    bound: Callable[[], float] | None = None


def dense(draw: Draw) -> Case:
    """`nn.Linear` of any kind and scale of weights."""
    kind, dtype = draw.one_of(*KINDS), draw.dtype()
    rows, columns = draw.integer(1, 40), draw.integer(1, 40)
    if draw.chance(0.1):
        rows, columns = draw.integer(1, SIDE), draw.integer(1, SIDE)
    layer = nn.Linear(columns, rows, dtype=dtype)
    scale = _fill(layer, kind, draw)
    parameters = {"kind": kind, "scale": scale, "rows": rows, "columns": columns, "dtype": str(dtype)}
    operator = partial(operator_of, layer, (columns,))
    return Case(layer, (columns,), draw.chance(0.5), parameters, operator=operator, exact=True)


def orthogonal_dense(draw: Draw) -> Case:
    """`OrthoLinear`, as it is or exported."""
    rows, columns = draw.integer(1, 100), draw.integer(1, 100)
    layer = OrthoLinear(columns, rows)
    exported = draw.chance(0.5)
    module = export(layer) if exported else layer
    parameters = {"rows": rows, "columns": columns, "exported": exported}
    return Case(module, (columns,), False, parameters, 1.0001, partial(operator_of, module, (columns,)), exact=True)


def convolution(draw: Draw, mode: str = "zeros", told: bool = True) -> Case:
    """`nn.Conv1d` or `nn.Conv2d`: even kernels, larger than the image, strides, dilation, groups, paddings."""
    while True:
        case = _convolution(draw, mode, told, draw.one_of(*KINDS))
        if case is not None:
            return case


def frequencies(draw: Draw) -> Case:
    """The bound over frequencies at one size, which `bound` passes over where the image is small."""
    case = convolution(draw)
    layer = case.module
    kernel = layer.weight.detach()
    size = _size(case.shape)
    settings = {"stride": _two(layer.stride, 1), "dilation": _two(layer.dilation, 1), "groups": layer.groups}
    kernel = kernel.unsqueeze(2) if kernel.ndim == 3 else kernel
    return replace(case, bound=partial(convolution_bound, kernel, size=size, **settings))


def adversarial(draw: Draw) -> Case:
    """Small images and kernels of one channel, for which a torus of the image's size underestimates the norm."""
    kind = draw.one_of("classic", "classic", "normal", "signs", "checkerboard", "smooth")
    channels, taps, pixels = draw.one_of(1, 1, 2), draw.one_of(2, 3, 3, 4), draw.integer(1, 6)
    if draw.chance(0.5):
        layer: nn.Conv1d | nn.Conv2d = nn.Conv1d(channels, channels, taps, padding=taps - 1, bias=False)
        shape: tuple[int, ...] = (channels, pixels)
    else:
        layer = nn.Conv2d(channels, channels, taps, padding=draw.integer(taps // 2, taps - 1), bias=False)
        shape = (channels, pixels, pixels + 1)
    scale = _fill(layer, kind, draw)
    parameters = {"kind": kind, "scale": scale, "layer": repr(layer), "shape": list(shape)}
    return Case(layer, shape, draw.chance(0.7), parameters, operator=partial(operator_of, layer, shape), exact=True)


@torch.no_grad()
def orthogonal_convolution(draw: Draw) -> Case:
    """`OrthoConv2d`, as it is, exported or with noise, on images in which some window touches no border.

    There the norm is 1.
    """
    stride = draw.integer(1, 3)
    taps = draw.integer(stride, stride + 2)
    circular = draw.chance(0.3)
    pixels = stride * -(-(2 * taps + draw.integer(0, 2)) // stride)
    most = max(1, SIDE // pixels**2)
    inputs, outputs = draw.integer(1, most), draw.integer(1, min(3 * most, 12))
    padding = draw.integer(0, (taps - 1) // 2 if circular else taps)
    layer = OrthoConv2d(
        inputs, outputs, taps, stride=stride, padding=padding, padding_mode="circular" if circular else "zeros"
    )
    form = draw.one_of("layer", "composed", "exported", "disturbed")
    module = layer if form == "layer" else export(layer)
    noise = 0.0
    if form == "composed":  # the kernel as it is composed in float32; "layer" composes it in float64
        module.weight.copy_(layer.weight)
    if form == "disturbed":
        noise = 10.0 ** draw.rng.uniform(-9, -1)
        module.weight.add_(noise * torch.randn_like(module.weight))
    shape = (inputs, pixels, pixels)
    parameters = {"layer": repr(layer), "form": form, "noise": noise, "shape": list(shape)}
    told = draw.chance(0.5) or (circular and module is not layer)
    limit = 1.0001 if noise == 0 else None
    asked = (lambda: bound(layer, shape).constant) if form == "composed" else None
    return Case(module, shape, told, parameters, limit, partial(layer_operator, module, shape), bound=asked)


def pooling(draw: Draw) -> Case:
    """Average, maximum and root-mean-square pooling, with overlapping and partial windows."""
    dims = draw.one_of(1, 2)
    taps, stride, padding = draw.integer(1, 4), draw.integer(1, 3), 0
    padding = draw.integer(0, taps // 2)
    ceil = draw.chance(0.3)
    target = draw.integer(1, 6)
    makers: list[Callable[[], nn.Module]] = [
        lambda: (nn.AvgPool1d, nn.AvgPool2d)[dims - 1](taps, stride, padding, ceil, draw.chance(0.5)),
        lambda: nn.AvgPool2d(taps, stride, padding, ceil, divisor_override=draw.one_of(1, 3)),
        lambda: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[dims - 1](target),
        lambda: (nn.MaxPool1d, nn.MaxPool2d)[dims - 1](taps, stride, padding, draw.integer(1, 2), ceil_mode=ceil),
        lambda: (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)[dims - 1](target),
        lambda: (nn.LPPool1d, nn.LPPool2d)[dims - 1](2, taps, stride),
    ]
    layer = draw.one_of(*makers)()
    two = "2d" in type(layer).__name__
    low = 2 * taps  # no window is empty, at a dilation of 2 either
    shape = (draw.integer(1, 2), *(draw.integer(low, low + 5) for _ in range(2 if two else 1)))
    parameters = {"layer": repr(layer), "shape": list(shape)}
    averages = "Avg" in type(layer).__name__
    return Case(layer, shape, True, parameters, operator=partial(layer_operator, layer, shape) if averages else None)


def resampling(draw: Draw) -> Case:
    """Upsampling, downsampling and padding layers."""
    shape = (draw.integer(1, 2), draw.integer(4, 9), draw.integer(4, 9))
    line = shape[:2]
    pads = tuple(draw.integer(0, 3) for _ in range(4))
    factor = draw.one_of(2, 3, 0.5, 1.5, 0.7)
    size = (draw.integer(2, 14), draw.integer(2, 14))
    aligned = draw.chance(0.5)
    smooth = draw.one_of("bilinear", "bicubic")
    copied = draw.one_of("nearest", "nearest-exact")
    layer, shape = draw.one_of(
        (nn.Upsample(scale_factor=factor, mode=smooth, align_corners=aligned), shape),
        (nn.Upsample(size=size, mode=smooth, align_corners=aligned), shape),
        (nn.Upsample(scale_factor=factor, mode=copied), shape),
        (nn.Upsample(size=size, mode=copied), shape),
        (nn.Upsample(size=size[0], mode="linear", align_corners=aligned), line),
        (nn.ReflectionPad2d(pads), shape),
        (nn.ReplicationPad2d(pads), shape),
        (nn.CircularPad2d(pads), shape),
        (nn.ConstantPad2d(pads, 0.3), shape),
        (nn.ReflectionPad1d(pads[:2]), line),
        (nn.ReplicationPad1d(pads[:2]), line),
    )
    return Case(
        layer, shape, True, {"layer": repr(layer), "shape": list(shape)}, operator=partial(layer_operator, layer, shape)
    )


class Residual(nn.Module):
    """scale x + body(x), or their difference."""

    def __init__(self, body: nn.Module, scale: float, sign: int) -> None:
        super().__init__()
        self.body, self.scale, self.sign = body, scale, sign

    def forward(self, inputs: Tensor) -> Tensor:
        kept = inputs * self.scale
        return kept + self.body(inputs) if self.sign > 0 else kept - self.body(inputs)


class Concatenation(nn.Module):
    """Two layers and the input side by side."""

    def __init__(self, first: nn.Module, second: nn.Module, dim: int) -> None:
        super().__init__()
        self.first, self.second, self.dim = first, second, dim

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.first(inputs), inputs, self.second(inputs) / 3], self.dim)


def network(draw: Draw) -> Case:
    """Residuals and concatenations of affine layers, batch normalisation at rest among them."""
    channels, height, width = draw.integer(1, 4), draw.integer(3, 7), draw.integer(3, 7)
    shape = (channels, height, width)

    def same(width: int) -> nn.Module:
        groups = draw.one_of(1, width)
        layer = nn.Conv2d(width, width, 3, padding=1, groups=groups, padding_mode=draw.one_of("zeros", "circular"))
        return draw.one_of(layer, OrthoConv2d(width, width, 3, padding=1), _normalisation(width))

    layers: list[nn.Module] = [Centering(torch.rand(channels))]
    names = ["centre"]
    for _ in range(draw.integer(1, 3)):
        name = draw.one_of("residual", "concatenation", "chain")
        if name == "concatenation" and 3 * channels * height * width <= SIDE:
            dim = draw.integer(1, 3)
            layers.append(Concatenation(same(channels), same(channels), draw.one_of(dim, dim - 4)))
            channels, height, width = (
                size * (3 if dim == k else 1) for k, size in ((1, channels), (2, height), (3, width))
            )
        elif name == "residual":
            body = nn.Sequential(same(channels), same(channels))
            layers.append(Residual(body, draw.one_of(1.0, 0.5, -2.0), draw.one_of(-1, 1)))
        else:
            layers.append(same(channels))
        names.append(name)
    if draw.chance(0.5):
        layers += [nn.Flatten(), nn.Linear(channels * height * width, draw.integer(1, 10))]
    module = nn.Sequential(*layers).eval()
    parameters = {"blocks": names, "shape": list(shape)}
    return Case(module, shape, True, parameters, operator=partial(layer_operator, module, shape))


def _normalisation(width: int) -> nn.Module:
    layer = nn.BatchNorm2d(width)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.running_var, 0.01, 2)
    return layer


def _convolution(draw: Draw, mode: str, told: bool, kind: str) -> Case | None:
    """One draw; None where it is too large, or its windows do not fit."""
    dims = draw.one_of(1, 2, 2)
    groups = draw.one_of(1, 1, 1, 2, 3)
    inputs, outputs = groups * draw.integer(1, 6 // groups), groups * draw.integer(1, 6 // groups)
    size = [draw.integer(1, 12) if dims == 2 else 1, draw.integer(1, 12 if dims == 2 else 60)]
    each = [_window(draw, mode, pixels) for pixels in size[2 - dims :]]
    if any(window is None for window in each):
        return None
    taps, stride, dilation, padding, counts = zip(*each, strict=True)
    if inputs * math.prod(size) > SIDE or outputs * math.prod(counts) > SIDE:
        return None
    same = mode == "zeros" and all(step == 1 for step in stride) and draw.chance(0.2)
    if same and outputs * math.prod(size) > SIDE:
        return None
    layer = (nn.Conv1d, nn.Conv2d)[dims - 1](
        inputs,
        outputs,
        taps,
        stride,
        "same" if same else padding,
        dilation,
        groups,
        bias=draw.chance(0.5),
        padding_mode=mode,
        dtype=draw.dtype(),
    )
    scale = _fill(layer, kind, draw)
    shape = (inputs, *size[2 - dims :])
    parameters = {"kind": kind, "scale": scale, "layer": repr(layer), "shape": list(shape), "told": told}
    return Case(layer, shape, told, parameters, operator=partial(operator_of, layer, shape), exact=mode == "zeros")


def _window(draw: Draw, mode: str, pixels: int) -> tuple[int, int, int, int, int] | None:
    """Taps, stride, dilation, padding and the number of windows along one dimension."""
    taps, stride, dilation = draw.integer(1, 7), draw.integer(1, 3), draw.one_of(1, 1, 1, 2, 3)
    most = {"zeros": taps * dilation, "circular": pixels, "reflect": pixels - 1, "replicate": taps}[mode]
    padding = draw.integer(0, min(most, taps * dilation))
    count = (pixels + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    return (taps, stride, dilation, padding, count) if count >= 1 else None


@torch.no_grad()
def _fill(layer: nn.Linear | nn.Conv1d | nn.Conv2d, kind: str, draw: Draw) -> float:
    """Draw the weights; return their scale."""
    weight, scale = draw.weights(kind, layer.weight.shape, layer.weight.dtype)
    layer.weight.copy_(weight)
    return scale


def operator_of(layer: nn.Module, shape: tuple[int, ...]) -> Matrix:
    """The matrix of a dense layer, or of a convolution by loops."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return convolution_operator(layer, _size(shape))
    matrix: Matrix = layer.weight.detach().double().numpy()
    return matrix


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[1]) if len(shape) == 2 else (shape[1], shape[2])


def _two(values: tuple[int, ...], fill: int) -> tuple[int, int]:
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


# Case i belongs to the family at i modulo the number of these.
FAMILIES: tuple[tuple[str, Callable[[Draw], Case]], ...] = (
    ("dense", dense),
    ("convolution", convolution),
    ("orthogonal dense", orthogonal_dense),
    ("convolution, any size", partial(convolution, told=False)),
    ("adversarial convolution", adversarial),
    ("orthogonal convolution", orthogonal_convolution),
    ("pooling", pooling),
    ("convolution", convolution),
    ("circular convolution", partial(convolution, mode="circular")),
    ("network", network),
    ("dense", dense),
    ("convolution at a size", frequencies),
    ("resampling and padding", resampling),
    ("reflect convolution", partial(convolution, mode="reflect")),
    ("adversarial convolution", adversarial),
    ("orthogonal convolution", orthogonal_convolution),
    ("convolution, any size", partial(convolution, told=False)),
    ("convolution at a size", frequencies),
    ("replicate convolution", partial(convolution, mode="replicate")),
    ("network", network),
)
