"""The bound of each layer by its type: a rule for every layer of `otnn.nn` and for plain torch layers.

A rule tells the Lipschitz constant of the layer in exact arithmetic, and what executing it in floating point may add.
A layer without a rule raises: it never counts as 1.
"""

import math
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz.matrix import matrix_bound
from otnn.lipschitz.rounding import UNDERFLOW, add_up, gamma, mul_up, norm_up, sqrt_up
from otnn.nn import Centering, MaxMin

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
        weight, offset = norm_up(layer.weight.detach().double()), mul_up(sqrt_up(rows), bias_norm(layer.bias))
        rounding = Rounding(layer.in_features + 1, weight, offset, rows * layer.out_features)
    return LayerBound(matrix_bound(layer.weight), rounding)


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


def bias_norm(bias: Tensor | None) -> float:
    """Bound the norm of a bias; 0 without one."""
    return 0.0 if bias is None else norm_up(bias.detach().double())


def hits(taps: int, stride: int, dilation: int) -> int:
    """How many windows hold one pixel at most, along one dimension."""
    return -(-taps // (stride // math.gcd(stride, dilation)))
