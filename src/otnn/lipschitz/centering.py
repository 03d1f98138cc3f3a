"""The bounds of layers that subtract a mean."""

import math

from torch import nn

from otnn.errors import InputError
from otnn.lipschitz.layers import LayerBound, Rounding, Shape, layer_bound
from otnn.lipschitz.rounding import add_up, mul_up, norm_up, sqrt_up
from otnn.nn import BatchCentering, LayerCentering


@layer_bound.register
def _(layer: BatchCentering, shape: Shape | None, output: Shape | None) -> LayerBound:
    """Bound x - mean + bias."""
    if layer.training:
        raise InputError("BatchCentering mixes the samples of a batch in training mode; call .eval() first")
    if output is None:
        return LayerBound(1.0, None)
    shift = add_up(norm_up(layer.running_mean.detach().double()), _bias_norm(layer.bias))
    offset = mul_up(sqrt_up(math.prod(output[1:])), shift)
    return LayerBound(1.0, Rounding(2, 1.0, offset, math.prod(output)))


@layer_bound.register
def _(layer: LayerCentering, shape: Shape | None, output: Shape | None) -> LayerBound:
    """Bound x - mean(x) + bias: a sum of n numbers, a division and two sums; | I - 1 1^T / n | has a norm below 2."""
    if output is None:
        return LayerBound(1.0, None)
    count = output[0] if layer.over == "channels" else math.prod(output)
    offset = mul_up(sqrt_up(math.prod(output[1:])), _bias_norm(layer.bias))
    return LayerBound(1.0, Rounding(count + 3, 2.0, offset, math.prod(output)))


def _bias_norm(bias: nn.Parameter | None) -> float:
    return 0.0 if bias is None else norm_up(bias.detach().double())
