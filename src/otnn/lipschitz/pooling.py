"""The bounds of layers that pool, resample or pad images.

Each acts on the rows and on the columns of every channel alone. A linear one is the Kronecker product of one matrix for
each dimension, so their norms multiply; where numbers are copied or compared, so do the counts of copies.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz.activations import settings_rounding
from otnn.lipschitz.layers import EXACT, LayerBound, Rounding, Shape, hits, layer_bound, needs_shape
from otnn.lipschitz.matrix import matrix_bound
from otnn.lipschitz.rounding import add_up, div_up, gamma, mul_up, sqrt_up, up
from otnn.nn import AdaptiveL2NormPool2d, L2NormPool2d, ScaledAdaptiveAvgPool2d, ScaledAvgPool2d

# The entries of the largest matrix of one dimension: its eigenvalues take about two seconds.
_ENTRIES = 2048**2

_PADDINGS = {
    nn.ReflectionPad1d: "reflect",
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad1d: "replicate",
    nn.ReplicationPad2d: "replicate",
    nn.CircularPad1d: "circular",
    nn.CircularPad2d: "circular",
}


@layer_bound.register(nn.AvgPool1d)
@layer_bound.register(nn.AvgPool2d)
def _(layer: nn.AvgPool1d | nn.AvgPool2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    dims = 1 if isinstance(layer, nn.AvgPool1d) else 2
    taps = _each(layer.kernel_size, dims)
    sides = [None] * dims if shape is None else _sides(layer, shape, dims)
    norms = map(_window_norm, [layer] * dims, taps, _each(layer.stride, dims), _each(layer.padding, dims), sides)
    constant = mul_up(*norms)
    divisor = getattr(layer, "divisor_override", None)
    if divisor is not None:
        constant = div_up(constant, float(abs(divisor)))
    return LayerBound(constant, _average_rounding(math.prod(taps), constant, output))


@layer_bound.register(nn.AdaptiveAvgPool1d)
@layer_bound.register(nn.AdaptiveAvgPool2d)
def _(layer: nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    constant, window = 1.0, 1
    for bins in _all_bins(layer, shape, 1 if isinstance(layer, nn.AdaptiveAvgPool1d) else 2):
        sizes = bins.sum(dim=1, keepdim=True)
        constant = mul_up(constant, _nonnegative_norm(bins / sizes.double()))
        window *= int(sizes.max())
    return LayerBound(constant, _average_rounding(window, constant, output))


@layer_bound.register(ScaledAvgPool2d)
@layer_bound.register(L2NormPool2d)
def _(layer: ScaledAvgPool2d | L2NormPool2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    return LayerBound(1.0, _disjoint_rounding(math.prod(layer.kernel_size), output))


@layer_bound.register(ScaledAdaptiveAvgPool2d)
@layer_bound.register(AdaptiveL2NormPool2d)
def _(layer: ScaledAdaptiveAvgPool2d | AdaptiveL2NormPool2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    if shape is None or output is None:
        return LayerBound(1.0, None)
    window = math.prod(-(-side // count) for side, count in zip(shape[-2:], output[-2:], strict=True))
    return LayerBound(1.0, _disjoint_rounding(window, output))


@layer_bound.register(nn.MaxPool1d)
@layer_bound.register(nn.MaxPool2d)
def _(layer: nn.MaxPool1d | nn.MaxPool2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    _refuse_indices(layer)
    dims = 1 if isinstance(layer, nn.MaxPool1d) else 2
    windows = _windows_per_pixel(
        _each(layer.kernel_size, dims),
        _each(layer.stride, dims),
        _each(layer.padding, dims),
        _each(layer.dilation, dims),
        output,
    )
    return LayerBound(sqrt_up(windows), EXACT)


@layer_bound.register(nn.AdaptiveMaxPool1d)
@layer_bound.register(nn.AdaptiveMaxPool2d)
def _(layer: nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    _refuse_indices(layer)
    dims = 1 if isinstance(layer, nn.AdaptiveMaxPool1d) else 2
    return LayerBound(sqrt_up(math.prod(int(bins.sum(0).max()) for bins in _all_bins(layer, shape, dims))), EXACT)


@layer_bound.register(nn.LPPool1d)
@layer_bound.register(nn.LPPool2d)
def _(layer: nn.LPPool1d | nn.LPPool2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    name = type(layer).__name__
    if layer.norm_type != 2:
        raise InputError(f"{name} has a known bound with norm_type=2 only, got {layer.norm_type}; set norm_type=2")
    if layer.ceil_mode:
        raise InputError(f"{name} scales partial windows up with ceil_mode=True; set ceil_mode=False")
    dims = 1 if isinstance(layer, nn.LPPool1d) else 2
    windows = _windows_per_pixel(
        _each(layer.kernel_size, dims),
        _each(layer.kernel_size if layer.stride is None else layer.stride, dims),
        (0,) * dims,
        (1,) * dims,
        output,
    )
    return LayerBound(sqrt_up(windows), None)


@layer_bound.register
def _(layer: nn.Upsample, shape: Shape | None, output: Shape | None) -> LayerBound:
    if layer.mode in ("nearest", "nearest-exact"):
        return _nearest_bound(layer, shape)
    if layer.mode not in ("linear", "bilinear", "bicubic"):
        raise InputError(
            f"Upsample has no known bound with mode={layer.mode!r}; "
            "expected nearest, nearest-exact, linear, bilinear or bicubic"
        )
    if shape is None:
        raise needs_shape(layer)
    dims = 1 if layer.mode == "linear" else 2
    constant = 1.0
    for dim, side in enumerate(_sides(layer, shape, dims)):
        # one line of zeros tells the length before the whole matrix is made
        _check_cost(layer, side, max(side, _resample(layer, torch.zeros(1, side), dim, dims).shape[1]))
        columns = _resample(layer, torch.eye(side, dtype=torch.float64), dim, dims)
        # A source coordinate is off by a few units of the last place of a number up to side + 1. Coefficients are
        # continuous in it, with slopes below 2, and sums of a few products; at most 5 of a row are affected.
        error = mul_up(128 * 2.0**-53 * (side + 8), sqrt_up(5 * columns.shape[1]))
        constant = mul_up(constant, add_up(matrix_bound(columns), error))
    return LayerBound(constant, None)


@layer_bound.register(nn.ConstantPad1d)
@layer_bound.register(nn.ConstantPad2d)
def _(layer: nn.ConstantPad1d | nn.ConstantPad2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    if shape is not None:
        _sides(layer, shape, 1 if isinstance(layer, nn.ConstantPad1d) else 2)
    return LayerBound(1.0, settings_rounding(output, layer.value))


def _padding_bound(layer: nn.Module, shape: Shape | None, output: Shape | None) -> LayerBound:
    """A padding that copies pixels: a pixel that stands c times moves c numbers, so the norm is the root of c."""
    if shape is None:
        raise needs_shape(layer)
    mode = next(mode for kind, mode in _PADDINGS.items() if isinstance(layer, kind))
    pads: tuple[int, ...] = layer.padding  # type: ignore[assignment]
    sides = _sides(layer, shape, len(pads) // 2)
    # the last dimension is first in the padding
    copies = [
        _most_copies(F.pad(_line(side), pads[2 * dim : 2 * dim + 2], mode)) for dim, side in enumerate(reversed(sides))
    ]
    return LayerBound(sqrt_up(math.prod(copies)), EXACT)


for _kind in _PADDINGS:
    layer_bound.register(_kind)(_padding_bound)


def _nearest_bound(layer: nn.Upsample, shape: Shape | None) -> LayerBound:
    """Which pixel is nearest is computed in the dtype of the images: both counts are taken, where they differ."""
    if shape is None:
        if not isinstance(layer.scale_factor, tuple):
            raise needs_shape(layer)  # of one factor it is not known for how many dimensions it stands
        if not all(_is_whole(factor, layer.mode) for factor in layer.scale_factor):
            raise needs_shape(layer)
        return LayerBound(sqrt_up(math.prod(layer.scale_factor)), EXACT)
    dims = len(shape) - 1
    found = []
    for dtype in (torch.float32, torch.float64):
        lines = [_line(side, dtype).squeeze(1) for side in _sides(layer, shape, dims)]
        found.append([_resample(layer, line, dim, dims).double() for dim, line in enumerate(lines)])
    same = all(map(torch.equal, *found))
    copies = max(math.prod(map(_most_copies, lines)) for lines in found)
    return LayerBound(sqrt_up(copies), EXACT if same else None)


def _is_whole(factor: float, mode: str) -> bool:
    """Whether every pixel is copied `factor` times by nearest upsampling, at any size up to a million pixels.

    The source of output j factor is j times the rounded 1 / factor, rounded down to an integer: that is j if it is so
    for j = 1, as the gap below a power of two is the smallest. "nearest-exact" looks half a pixel further.
    """
    if factor < 1 or factor != int(factor):
        return False
    dtypes = (torch.float32, torch.float64)
    return mode == "nearest-exact" or all(bool(torch.tensor(1 / factor, dtype=t) * factor >= 1) for t in dtypes)


def _resample(layer: nn.Upsample, lines: Tensor, dim: int, dims: int) -> Tensor:
    """Apply the layer along one of its dimensions: lines (batch, side) to (batch, outputs)."""
    size = None if layer.size is None else [_each(layer.size, dims)[dim]]
    scale = layer.scale_factor
    factor = None if scale is None else [scale[dim] if isinstance(scale, tuple) else scale]
    images = lines.unsqueeze(1)
    mode = "linear" if layer.mode == "bilinear" else layer.mode
    if mode == "bicubic":  # on images of one row, which it leaves as they are
        images = images.unsqueeze(2)
        size, factor = size and [1, *size], factor and [1.0, *factor]
    result = F.interpolate(
        images,
        size,
        factor,
        mode,
        align_corners=layer.align_corners,
        recompute_scale_factor=layer.recompute_scale_factor,
    )
    return result.flatten(1)


def _window_norm(layer: nn.AvgPool1d | nn.AvgPool2d, taps: int, stride: int, padding: int, side: int | None) -> float:
    """Bound the norm of averages of windows along one dimension; of their sums, where the divisor is overridden."""
    sums = getattr(layer, "divisor_override", None) is not None
    norm = math.inf
    if sums or (not layer.ceil_mode and (layer.count_include_pad or padding == 0)):
        # Windows on the infinite line. Of the `stride` phases of pixels, `rest` are in whole + 1 taps of each window,
        # the others in `whole`. Weights are positive: the norm is that at frequency 0, of the row of these numbers.
        whole, rest = divmod(taps, stride)
        norm = div_up(sqrt_up(rest * (whole + 1) ** 2 + (stride - rest) * whole**2), 1.0 if sums else float(taps))
    elif side is None:
        raise needs_shape(layer)
    if side is None or (math.isfinite(norm) and side**2 > _ENTRIES):
        return norm
    _check_cost(layer, side, side)
    basis = torch.eye(side, dtype=torch.float64).unsqueeze(1)
    columns = F.avg_pool1d(basis, taps, stride, padding, layer.ceil_mode, layer.count_include_pad).squeeze(1)
    return min(norm, _nonnegative_norm((columns != 0).double() if sums else columns))


def _nonnegative_norm(matrix: Tensor) -> float:
    """Bound the norm of a matrix whose entries are positive quotients, each rounded, or zeros."""
    return mul_up(matrix_bound(matrix), up(1 + gamma(2)))


def _average_rounding(window: int, constant: float, output: Shape | None) -> Rounding | None:
    """A sum over a window and a division; weights are positive, so their norm is the constant."""
    return None if output is None else Rounding(window + 2, constant, 0.0, math.prod(output))


def _disjoint_rounding(window: int, output: Shape | None) -> Rounding | None:
    """A sum of `window` numbers or squares, and at most eight operations on its terms and on it.

    All terms count with their absolute values: the outputs then have at most the norm of the inputs.
    """
    return None if output is None else Rounding(window + 8, 1.0, 0.0, math.prod(output))


def _windows_per_pixel(taps: Shape, strides: Shape, paddings: Shape, dilations: Shape, output: Shape | None) -> int:
    """How many windows hold one pixel at most; at any size, where the output's shape is not known."""
    if output is None:
        return math.prod(map(hits, taps, strides, dilations))
    most = 1
    counts = output[-len(taps) :]
    for tap, stride, padding, dilation, count in zip(taps, strides, paddings, dilations, counts, strict=True):
        pixels = (torch.arange(count) * stride - padding).unsqueeze(1) + torch.arange(tap) * dilation
        most *= _most_copies(pixels[pixels >= 0])
    return most


def _all_bins(layer: nn.Module, shape: Shape | None, dims: int) -> list[Tensor]:
    """For each dimension which pixels (columns) an adaptive pooling puts into which bin (rows)."""
    if shape is None:
        raise needs_shape(layer)
    found = []
    for side, wanted in zip(_sides(layer, shape, dims), _each(layer.output_size, dims), strict=True):  # type: ignore[arg-type]
        count = side if wanted is None else wanted
        _check_cost(layer, side, count)
        index, pixels = torch.arange(count).unsqueeze(1), torch.arange(side)
        found.append((pixels >= index * side // count) & (pixels < -((-(index + 1) * side) // count)))
    return found


def _each(values: int | Sequence[int], dims: int) -> Shape:
    """One number for each dimension."""
    numbers = (values,) if isinstance(values, int) else tuple(values)
    return numbers * dims if len(numbers) == 1 else numbers


def _sides(layer: nn.Module, shape: Shape, dims: int) -> Shape:
    """The sizes of the dimensions that a layer works on.

    Raises:
        InputError: where one of them would be the batch.
    """
    if not 0 < dims <= len(shape):
        raise InputError(
            f"{type(layer).__name__} mixes the samples of a batch of shape {shape}; expected (channels, ..., pixels)"
        )
    return shape[-dims:]


def _line(side: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The numbers of the pixels along one dimension, as an image (1, 1, side)."""
    return torch.arange(side, dtype=dtype).view(1, 1, -1)


def _most_copies(pixels: Tensor) -> int:
    """How often the most frequent number of a pixel occurs."""
    return int(pixels.flatten().long().bincount().max()) if pixels.numel() else 0


def _check_cost(layer: nn.Module, side: int, outputs: int) -> None:
    if side * outputs > _ENTRIES:
        raise InputError(
            f"{type(layer).__name__} on a side of {side} pixels is too large to bound: expected at most {_ENTRIES} = "
            f"inputs x outputs along one dimension, got {side} x {outputs}; reduce the images before"
        )


def _refuse_indices(layer: nn.Module) -> None:
    if layer.return_indices:
        raise InputError(f"{type(layer).__name__} returns indices too; set return_indices=False")
