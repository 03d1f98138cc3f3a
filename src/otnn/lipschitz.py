"""Upper bounds of the Lipschitz constant, computed in float64 from the stored weights.

Each layer type has its bound, `Sequential` multiplies, and an unknown layer raises: a guarantee is a value, never a
flag. Power iteration bounds from below and is not used.
"""

import math
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.nn import Centering, MaxMin, OrthoConv2d

# Squarings of the Gram kernel of a convolution far from orthogonal: each halves the exponent of the looseness.
_SQUARINGS = 4


@dataclass(frozen=True)
class LipschitzBound:
    """An upper bound of a module's Lipschitz constant for Euclidean norms.

    Attributes:
        constant: the product of the layers' bounds.
        layers: (name, bound) of each layer that is not a mere rearrangement.
    """

    constant: float
    layers: tuple[tuple[str, float], ...]


def bound(module: nn.Module) -> LipschitzBound:
    """Bound the Lipschitz constant of a layer, or of a `Sequential` of layers.

    Raises:
        InputError: a layer whose bound is not known, or weights that are not finite.

    Example:
        >>> from otnn.nn import OrthoLinear
        >>> 0.99999 < bound(nn.Sequential(OrthoLinear(8, 4), MaxMin(), nn.Linear(4, 1))[:2]).constant < 1.00001
        True
    """
    # a layer that is applied twice counts twice
    children = list(module.named_modules(remove_duplicate=False)) if _is_sequential(module) else [("", module)]
    layers = []
    for name, layer in children:
        if _is_sequential(layer):
            continue
        try:
            constant = _checked_bound(layer)
        except InputError as error:
            raise InputError(f"{name or type(layer).__name__}: {error}") from None
        layers.append((name or type(layer).__name__, constant))
    return LipschitzBound(math.prod(constant for _, constant in layers), tuple(layers))


def matrix_bound(matrix: Tensor) -> float:
    """Bound the largest singular value of (rows, columns).

    Near orthogonality 1 + ||G - I||_F bounds the square, G the Gram matrix of the short side; elsewhere its largest
    eigenvalue, in float64.

    Raises:
        InputError: a value that is not finite.
    """
    wide = matrix.detach().double()
    scale = _scale(wide)
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    gram = wide @ wide.T
    excess = float(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    if excess < 1e-4:
        return math.sqrt(1 + excess)
    wide = wide / scale  # no square overflows or vanishes
    return scale * math.sqrt(max(0.0, float(torch.linalg.eigvalsh(wide @ wide.T)[-1])))


def convolution_bound(kernel: Tensor, stride: int = 1) -> float:
    """Bound the norm of a convolution with zero padding on images of any size.

    The kernel is rewritten by pixel-unshuffling as one of stride 1. With T the kernel of its Gram operator, the norm
    squared is at most 1 + ||E|| near orthogonality, E = T - I at the middle tap and ||E||^4 at most the sum over the
    taps of E^4 of their Frobenius norms; elsewhere the iterated bound (Delattre et al. 2023) on T squared `4` times.

    Args:
        kernel: (out_channels, in_channels, height, width).
        stride: of both directions.

    Raises:
        InputError: a value that is not finite.
    """
    kernel = kernel.detach().double()
    scale = _scale(kernel)
    if stride > 1:
        out_channels, in_channels, height, width = kernel.shape
        rows, columns = -(-height // stride), -(-width // stride)
        kernel = nn.functional.pad(kernel, (0, columns * stride - width, 0, rows * stride - height))
        kernel = kernel.view(out_channels, in_channels, rows, stride, columns, stride)
        kernel = kernel.permute(0, 1, 3, 5, 2, 4).reshape(out_channels, in_channels * stride**2, rows, columns)
    if kernel.shape[0] > kernel.shape[1]:  # the adjoint has the same norm and the smaller Gram kernel
        kernel = kernel.transpose(0, 1).flip(2, 3)
    gram = _correlate(kernel, kernel)
    middle = (gram.shape[2] // 2, gram.shape[3] // 2)
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    excess = gram.clone()
    excess[:, :, middle[0], middle[1]] -= identity
    # E is symmetric, ||E||^4 = ||E^4||: in the powers, rounding errors of random sign cancel
    scale_of_excess = float(excess.abs().max()) or 1.0
    fourth = _squared(_squared(excess / scale_of_excess))
    near = scale_of_excess * float(torch.linalg.matrix_norm(fourth, dim=(0, 1)).sum()) ** 0.25
    if near < 1e-4:
        return math.sqrt(1 + near)
    gram = _correlate(kernel / scale, kernel / scale)
    logarithm, power = 0.0, 1.0
    for _ in range(_SQUARINGS):
        largest = float(gram.abs().max()) or 1.0
        gram, power = _squared(gram / largest), power * 2
        logarithm = 2 * (logarithm + math.log(largest))
    rows_sum = float(gram.abs().sum(dim=(1, 2, 3)).max())
    return scale * math.exp((logarithm + math.log(rows_sum)) / (2 * power)) if rows_sum > 0 else 0.0


def _is_sequential(module: nn.Module) -> bool:
    """Whether a module does nothing but call its children in turn."""
    return isinstance(module, nn.Sequential) and computes_like(module, nn.Sequential)


def computes_like(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module of a subclass computes what `kind` computes: the same forward, and no hooks around it."""
    own = type(module).forward is not kind.forward or "forward" in vars(module)
    return not own and not (module._forward_hooks or module._forward_pre_hooks)


def _checked_bound(layer: nn.Module) -> float:
    """The bound of a layer's registered type, refused where a subclass or a hook computes something else."""
    kinds = [kind for kind in type(layer).__mro__ if issubclass(kind, nn.Module) and kind in _layer_bound.registry]
    if kinds and not computes_like(layer, kinds[0]):
        raise InputError(
            f"no Lipschitz bound is known: its own forward, or a hook, makes it another map than {kinds[0].__name__}"
        )
    return _layer_bound(layer)


@singledispatch
def _layer_bound(layer: nn.Module) -> float:
    raise InputError(f"no Lipschitz bound is known for {type(layer).__name__}; use a layer of otnn.nn")


@_layer_bound.register(nn.Linear)
def _(layer: nn.Linear) -> float:
    _require_finite(layer)
    return matrix_bound(layer.weight)


@_layer_bound.register(OrthoConv2d)
def _(layer: OrthoConv2d) -> float:
    _require_finite(layer)
    return convolution_bound(layer.weight, layer.stride)


@_layer_bound.register(MaxMin)
@_layer_bound.register(Centering)
@_layer_bound.register(nn.Flatten)
@_layer_bound.register(nn.Identity)
@_layer_bound.register(nn.ReLU)
def _(layer: nn.Module) -> float:
    return 1.0


def _require_finite(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name} holds NaN or infinite values; train again with a lower learning rate")


def _scale(weight: Tensor) -> float:
    """The largest absolute value, 1 for zeros: dividing by it keeps squares within float64."""
    scale = float(weight.abs().max())
    if not math.isfinite(scale):
        raise InputError("the weight holds NaN or infinite values; train again with a lower learning rate")
    return scale or 1.0


def _correlate(first: Tensor, second: Tensor) -> Tensor:
    """The kernel of A B^T from the kernels of A and B: (out, out, 2 height - 1, 2 width - 1)."""
    height, width = second.shape[2:]
    return nn.functional.conv2d(first, second, padding=(height - 1, width - 1))


def _squared(gram: Tensor) -> Tensor:
    """The kernel of T T from that of a symmetric T, by Fourier transforms: (c, c, n, n) to (c, c, 2 n - 1, 2 n - 1)."""
    size = [2 * n - 1 for n in gram.shape[2:]]
    transformed = torch.fft.rfft2(gram, s=size).permute(2, 3, 0, 1)
    squared: Tensor = torch.fft.irfft2((transformed @ transformed).permute(2, 3, 0, 1), s=size)
    return squared
