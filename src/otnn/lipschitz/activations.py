"""The bounds of activations, normalisations with stored statistics, dropout, shuffles and reshapes.

An elementwise function counts with the largest absolute value of its derivative.
"""

import math

import torch
from torch import nn

from otnn.errors import InputError
from otnn.lipschitz.layers import EXACT, LayerBound, Rounding, Shape, known_kind, layer_bound, refuse_batch
from otnn.lipschitz.rounding import gamma, mul_up, norm_up, sqrt_up, up
from otnn.nn import Abs, FullSort, GroupSort, Householder

# Largest slopes without a short form, rounded up in the eighth digit, and where they are found.
_GELU = 1.1289042  # x Phi(x): at sqrt(2), where the second derivative phi(x) (2 - x^2) is zero
_GELU_TANH = 1.1289931  # at 1.4185040
_SILU = 1.0998394  # x sigmoid(x): at 2.3993573, where x tanh(x / 2) = 2
_MISH = 1.0884982  # x tanh(softplus(x)): at 1.4905712
_SELU = 1.7580994  # scale x alpha, just below 0
# On GPUs torch multiplies by the float32 number nearest to 1 / 6 instead of dividing, in float64 too.
_SIXTH = float(torch.tensor(1 / 6, dtype=torch.float32))

# Functions whose rounding is not known.
_SMOOTH = {
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,  # s (1 - s) at s = 1/2
    nn.LogSigmoid: 1.0,
    nn.Tanhshrink: 1.0,  # tanh^2
    nn.SiLU: _SILU,
    nn.Mish: _MISH,
    nn.SELU: _SELU,
    nn.Hardsigmoid: _SIXTH,
    nn.Hardswish: 9 * _SIXTH,  # x (x + 3) / 6 is steepest at its end, 3
}

# Layers that divide by a statistic of the sample, or multiply two parts of it.
_REFUSED = {
    nn.LayerNorm: "divides by the deviation of the sample, so its bound grows like 1 / sqrt(eps)",
    nn.GroupNorm: "divides by the deviation of the sample, so its bound grows like 1 / sqrt(eps)",
    nn.InstanceNorm1d: "divides by the deviation of the sample, so its bound grows like 1 / sqrt(eps)",
    nn.InstanceNorm2d: "divides by the deviation of the sample, so its bound grows like 1 / sqrt(eps)",
    nn.RMSNorm: "divides by the norm of the sample, so its bound grows like 1 / sqrt(eps)",
    nn.LocalResponseNorm: "divides by a sum of squares of the sample, for which no bound is known",
}


def settings_rounding(output: Shape | None, *values: float) -> Rounding | None:
    """The rounding of a layer that only moves or compares numbers with settings: they are stored in its dtype.

    Raises:
        InputError: a setting that is NaN, or too large for float32.

    Example:
        >>> settings_rounding(None, -1.0, 0.5) == EXACT
        True
        >>> settings_rounding((2, 2), 0.1).offset > 0.2
        True
    """
    stored = [float(torch.tensor(value, dtype=torch.float32)) for value in values]
    inexact = [value for value, kept in zip(values, stored, strict=True) if value != kept]
    if not inexact:
        return EXACT
    if any(map(math.isnan, inexact)) or max(map(abs, inexact)) > torch.finfo(torch.float32).max:
        raise InputError(f"expected settings that float32 can hold, got {', '.join(map(str, values))}")
    if output is None:
        return None
    outputs = math.prod(output)
    return Rounding(1, 0.0, mul_up(sqrt_up(outputs), max(map(abs, inexact))), outputs)


def _smooth_bound(layer: nn.Module, shape: Shape | None, output: Shape | None) -> LayerBound:
    return LayerBound(_SMOOTH[known_kind(layer)], None)  # type: ignore[index]


def _refusal(layer: nn.Module, shape: Shape | None, output: Shape | None) -> LayerBound:
    reason = _REFUSED[known_kind(layer)]  # type: ignore[index]
    raise InputError(f"{type(layer).__name__} {reason}; use BatchNorm in eval mode or otnn.nn.Centering")


for _kind in _SMOOTH:
    layer_bound.register(_kind)(_smooth_bound)
for _refused in _REFUSED:
    layer_bound.register(_refused)(_refusal)


@layer_bound.register(GroupSort)
@layer_bound.register(FullSort)
def _(layer: GroupSort | FullSort, shape: Shape | None, output: Shape | None) -> LayerBound:
    refuse_batch(layer, layer.dim, shape)
    return LayerBound(1.0, EXACT)


@layer_bound.register
def _(layer: Abs, shape: Shape | None, output: Shape | None) -> LayerBound:
    return LayerBound(1.0, EXACT)


@layer_bound.register
def _(layer: Householder, shape: Shape | None, output: Shape | None) -> LayerBound:
    """Bound z - 2 min(<v, z>, 0) v with v = (sin(t/2), -cos(t/2)), of norm 1 in exact arithmetic.

    It is continuous with the Jacobians I and I - 2 v v^T, both orthogonal. As executed, v is within 4 units in the last
    place (the libraries that torch calls state 3.5 at most), that is 8 roundings; a product and a sum make <v, z>, a
    product with v and a difference follow: 20 roundings of terms whose absolute values I + 2 |v| |v|^T bounds.
    """
    refuse_batch(layer, layer.dim, shape)
    return LayerBound(1.0, None if output is None else Rounding(20, 3.0, 0.0, math.prod(output)))


@layer_bound.register
def _(layer: nn.LeakyReLU, shape: Shape | None, output: Shape | None) -> LayerBound:
    return _slope_bound(layer.negative_slope, output, 2)  # the slope is rounded to the dtype, and the product


@layer_bound.register
def _(layer: nn.RReLU, shape: Shape | None, output: Shape | None) -> LayerBound:
    _refuse_training(layer)
    return _slope_bound(up(abs(_finite(layer.lower + layer.upper))) / 2, output, 3)


@layer_bound.register
def _(layer: nn.PReLU, shape: Shape | None, output: Shape | None) -> LayerBound:
    return _slope_bound(float(layer.weight.detach().double().abs().max()), output, 1)


@layer_bound.register
def _(layer: nn.Hardtanh, shape: Shape | None, output: Shape | None) -> LayerBound:
    """Also of `ReLU6`, which extends it."""
    return LayerBound(1.0, settings_rounding(output, layer.min_val, layer.max_val))


@layer_bound.register
def _(layer: nn.ELU, shape: Shape | None, output: Shape | None) -> LayerBound:
    return LayerBound(max(1.0, abs(_finite(layer.alpha))), None)


@layer_bound.register
def _(layer: nn.CELU, shape: Shape | None, output: Shape | None) -> LayerBound:
    if not _finite(layer.alpha) > 0:
        raise InputError(f"CELU has unbounded slopes unless alpha > 0, got {layer.alpha}; set alpha=1.0")
    return LayerBound(1.0, None)


@layer_bound.register
def _(layer: nn.GELU, shape: Shape | None, output: Shape | None) -> LayerBound:
    return LayerBound(_GELU if layer.approximate == "none" else _GELU_TANH, None)


@layer_bound.register
def _(layer: nn.Softplus, shape: Shape | None, output: Shape | None) -> LayerBound:
    if not (_finite(layer.beta) > 0 and layer.threshold >= 20):
        # beyond the threshold it is the identity, which differs by log(1 + exp(-threshold)) / beta: 2e-9 from 20 on
        raise InputError(
            f"Softplus(beta={layer.beta}, threshold={layer.threshold}) jumps at its threshold: "
            "expected beta > 0 and threshold >= 20"
        )
    return LayerBound(1.0, None)


@layer_bound.register
def _(layer: nn.Softsign, shape: Shape | None, output: Shape | None) -> LayerBound:
    return LayerBound(1.0, _elementwise(3, 1.0, 0.0, output))


@layer_bound.register
def _(layer: nn.Softshrink, shape: Shape | None, output: Shape | None) -> LayerBound:
    if not _finite(layer.lambd) >= 0:
        raise InputError(f"Softshrink is not continuous with lambd={layer.lambd}; expected lambd >= 0")
    return LayerBound(1.0, _elementwise(2, 1.0, layer.lambd, output))


@layer_bound.register
def _(layer: nn.Hardshrink, shape: Shape | None, output: Shape | None) -> LayerBound:
    if layer.lambd > 0:
        raise InputError(f"Hardshrink jumps at {layer.lambd}, so it has no Lipschitz bound; use Softshrink")
    return LayerBound(1.0, EXACT)


@layer_bound.register
def _(layer: nn.Threshold, shape: Shape | None, output: Shape | None) -> LayerBound:
    if layer.value != layer.threshold:
        raise InputError(
            f"Threshold({layer.threshold}, {layer.value}) jumps, so it has no Lipschitz bound; "
            "expected value = threshold"
        )
    return LayerBound(1.0, settings_rounding(output, layer.value))


@layer_bound.register
def _(layer: nn.GLU, shape: Shape | None, output: Shape | None) -> LayerBound:
    raise InputError("GLU multiplies two parts of its input, so it has no Lipschitz bound; use another activation")


@layer_bound.register(nn.Softmax)
@layer_bound.register(nn.Softmin)
@layer_bound.register(nn.LogSoftmax)
def _(layer: nn.Softmax | nn.Softmin | nn.LogSoftmax, shape: Shape | None, output: Shape | None) -> LayerBound:
    """Bound the Jacobians.

    That of softmax is diag(p) - p p^T, whose rows have the absolute sums 2 p (1 - p) <= 1/2. That of its logarithm is
    the projection I - 1 p^T, as long as the complementary one: sqrt(n) ||p||.
    """
    if layer.dim is None:
        raise InputError(f"{type(layer).__name__} without dim may mix the samples of a batch; expected dim=1")
    refuse_batch(layer, layer.dim, shape)
    if not isinstance(layer, nn.LogSoftmax):
        return LayerBound(0.5, None)
    if shape is None:
        raise InputError("the bound of LogSoftmax depends on the number of classes: expected input_shape, got none")
    return LayerBound(sqrt_up(shape[layer.dim - 1 if layer.dim > 0 else layer.dim]), None)


@layer_bound.register
def _(layer: nn.Softmax2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    refuse_batch(layer, -3, (1, 1, 1) if shape is None else shape)  # of images, where the shape is not known
    return LayerBound(0.5, None)


@layer_bound.register(nn.Dropout)
@layer_bound.register(nn.Dropout1d)
@layer_bound.register(nn.Dropout2d)
@layer_bound.register(nn.Dropout3d)
@layer_bound.register(nn.AlphaDropout)
@layer_bound.register(nn.FeatureAlphaDropout)
def _(layer: nn.Module, shape: Shape | None, output: Shape | None) -> LayerBound:
    _refuse_training(layer)
    return LayerBound(1.0, EXACT)


@layer_bound.register(nn.BatchNorm1d)
@layer_bound.register(nn.BatchNorm2d)
def _(layer: nn.BatchNorm1d | nn.BatchNorm2d, shape: Shape | None, output: Shape | None) -> LayerBound:
    """Bound (x - mean) weight / sqrt(var + eps) + bias, computed in any order."""
    name = type(layer).__name__
    mean, variance = layer.running_mean, layer.running_var
    if layer.training or mean is None or variance is None:
        raise InputError(f"{name} mixes the samples of a batch; expected eval mode and track_running_stats=True")
    mean, variance = mean.detach().cpu().double(), variance.detach().cpu().double()
    least = float(variance.min())
    if least < 0 or layer.eps < 0 or least + layer.eps < 1e-30:
        raise InputError(f"{name} divides by nearly zero: expected eps = 1e-5, got {layer.eps} + variance {least:g}")
    weight = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().cpu().double()
    # a weight below the smallest normal number may be flushed to zero: one of 2^-100 has a rounding beyond that
    factors = weight.abs().clamp(min=2.0**-100) / (variance + layer.eps).sqrt() * up(1 + gamma(8))
    constant = float(factors.max())
    if output is None:
        return LayerBound(constant, None)
    bias = 0.0 if layer.bias is None else layer.bias.detach().cpu().double().abs()
    offset = norm_up((factors * mean.abs() + bias) * up(1 + gamma(8)))
    pixels = math.prod(output[1:])
    return LayerBound(constant, Rounding(10, constant, mul_up(sqrt_up(pixels), offset), math.prod(output)))


@layer_bound.register(nn.PixelShuffle)
@layer_bound.register(nn.PixelUnshuffle)
def _(layer: nn.Module, shape: Shape | None, output: Shape | None) -> LayerBound:
    refuse_batch(layer, -3, (1, 1, 1) if shape is None else shape)  # of images, where the shape is not known
    return LayerBound(1.0, EXACT)


@layer_bound.register
def _(layer: nn.ChannelShuffle, shape: Shape | None, output: Shape | None) -> LayerBound:
    return LayerBound(1.0, EXACT)


def _slope_bound(slope: float, output: Shape | None, operations: int) -> LayerBound:
    """Bound x above zero and slope times x below."""
    slope = abs(_finite(slope))
    return LayerBound(max(1.0, slope), _elementwise(operations, slope, 0.0, output))


def _elementwise(operations: int, weight: float, offset: float, output: Shape | None) -> Rounding | None:
    """The rounding of a function whose error at x is at most gamma(operations) (weight |x| + offset)."""
    if output is None:
        return None
    outputs = math.prod(output)
    return Rounding(operations, weight, mul_up(sqrt_up(outputs), offset), outputs)


def _finite(setting: float) -> float:
    if not math.isfinite(setting):
        raise InputError(f"expected a finite setting, got {setting}; repair the layer")
    return setting


def _refuse_training(layer: nn.Module) -> None:
    if layer.training:
        raise InputError(f"{type(layer).__name__} is random in training mode; call eval() before")
