"""Export: the same network in plain torch layers, every stored weight of proven norm at most 1."""

import copy
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz.convolution_layers import orthogonal_bound
from otnn.lipschitz.layers import computes_like
from otnn.lipschitz.matrix import matrix_bound
from otnn.lipschitz.rounding import norm_up
from otnn.manifold import constrained_parameters, retract_parameters
from otnn.nn import FrobeniusLinear, OrthoConv1d, OrthoConv2d, OrthoConvTranspose2d, OrthoLinear, UnitNormLinear
from otnn.nn.kernel import OrthoKernel

Module = TypeVar("Module", bound=nn.Module)
# Each try scales by the bound that was found; rounding to float32 moves a bound by some 1e-8, so few tries do.
_TRIES = 20
# A weight this far from its manifold, by the manifold's own measure, was not kept on it.
_OFF = 1e-3
_CONVOLUTIONS: dict[type[OrthoKernel], type[nn.Module]] = {
    OrthoConv1d: nn.Conv1d,
    OrthoConv2d: nn.Conv2d,
    OrthoConvTranspose2d: nn.ConvTranspose2d,
}
_DENSE = (OrthoLinear, UnitNormLinear, FrobeniusLinear)
_CONSTRAINED = (*_DENSE, *_CONVOLUTIONS)


def export(module: Module) -> Module:
    """Return a copy in plain torch layers, in `eval()` mode, for evaluation at the speed of an ordinary network.

    `OrthoLinear`, `UnitNormLinear` and `FrobeniusLinear` become `torch.nn.Linear`, orthogonal convolutions become those
    of torch with the composed kernel; layers without such weights (activations, centring, pooling, torch's own) are
    copied, and residual blocks with their branches replaced likewise. The factors are brought to their manifold in
    float64, composed, scaled down by some 1e-7, and stored in the dtype of the original such that the bound of the
    stored numbers is at most 1: of the norm, of each row's norm for `UnitNormLinear`, of the Frobenius norm for
    `FrobeniusLinear`.

    Args:
        module: a layer or a network.

    Returns:
        A module of the same class, except for the layers; nothing is shared with the original.

    Raises:
        FloatingPointError: a weight is NaN or infinite.
        InputError: a weight of half precision or off its manifold, or a constrained layer with hooks or a forward of
            its own.

    Example:
        >>> from otnn.lipschitz import bound
        >>> layer = OrthoConv2d(4, 8, 3, padding=1)
        >>> exported = export(layer)
        >>> type(exported).__name__, bound(exported).constant <= 1
        ('Conv2d', True)
        >>> x = torch.rand(2, 4, 9, 9)
        >>> bool(torch.allclose(exported(x), layer(x), atol=1e-6))
        True
    """
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise FloatingPointError(f"{name} holds NaN or infinite values; lower the learning rate and train again")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name} is {parameter.dtype}: bounds are proven of float32 and float64; use model.float()"
            )
    for name, parameter, manifold in constrained_parameters(module):
        if float(manifold.distance(parameter.detach().double()).max()) > _OFF:
            raise InputError(
                f"{name} is off its manifold, so the exported network would compute something else; "
                "call otnn.manifold.retract_parameters(model) first, and keep_on_manifold in training"
            )
    copied: Module = _replaced(copy.deepcopy(module), _exported)
    retract_parameters(copied)  # what is constrained in layers that stay: the shares of residual blocks
    return copied.eval()


def composed(module: Module) -> Module:
    """Return a copy whose constrained layers are plain ones with the very weights that they compute with now."""

    def plain(layer: nn.Module) -> nn.Module:
        replaced = _plain(layer)
        weights = [("weight", cast(Tensor, layer.weight)), ("bias", cast(Tensor | None, layer.bias))]
        replaced.load_state_dict({name: value.detach() for name, value in weights if value is not None})
        return replaced

    copied: Module = copy.deepcopy(module)
    return _replaced(copied, plain)


def plain_structure(module: Module) -> Module:
    """Replace the layers of a network, in place, by those that `export` would make; their weights are to be loaded."""
    return _replaced(module, _plain).eval()


def plain_kind(name: str) -> str:
    """The name of the plain layer that a constrained layer of a given name becomes; other names stay.

    Example:
        >>> plain_kind("OrthoConv2d"), plain_kind("UnitNormLinear"), plain_kind("MaxMin")
        ('Conv2d', 'Linear', 'MaxMin')
    """
    kinds = {kind.__name__: plain.__name__ for kind, plain in _CONVOLUTIONS.items()}
    return {**kinds, **{kind.__name__: "Linear" for kind in _DENSE}}.get(name, name)


def _replaced(module: Module, replace: Callable[[nn.Module], nn.Module]) -> Module:
    """Replace every constrained layer of a module in place; a layer that is used twice stays one."""
    done: dict[int, nn.Module] = {}

    def visit(layer: nn.Module, path: str) -> nn.Module:
        if id(layer) not in done:
            kind = next((kind for kind in _CONSTRAINED if isinstance(layer, kind)), None)
            if kind is not None and not computes_like(layer, kind):
                name = path or type(layer).__name__
                raise InputError(
                    f"{name}: computes something else than {kind.__name__}; remove its hook or its own forward"
                )
            done[id(layer)] = layer if kind is None else replace(layer)
            if kind is None:
                for name, child in layer._modules.items():
                    if child is not None:
                        layer._modules[name] = visit(child, f"{path}.{name}" if path else name)
        return done[id(layer)]

    return cast(Module, visit(module, ""))


def _plain(layer: nn.Module) -> nn.Module:
    """The plain layer of the same shape as a constrained one, with weights to be filled."""
    if isinstance(layer, _DENSE):
        linear = cast(nn.Linear, layer)
        dense: nn.Module = nn.utils.skip_init(
            nn.Linear,
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        return dense
    layer = cast(OrthoKernel, layer)
    added = {"output_padding": layer.output_padding} if isinstance(layer, OrthoConvTranspose2d) else {}
    kind = next(plain for orthogonal, plain in _CONVOLUTIONS.items() if isinstance(layer, orthogonal))
    convolution: nn.Module = nn.utils.skip_init(
        kind,
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
        **added,
    )
    return convolution


@torch.no_grad()
def _exported(layer: nn.Module) -> nn.Module:
    plain = _plain(layer)
    plain.requires_grad_(all(parameter.requires_grad for parameter in layer.parameters()))
    dtype = cast(Tensor, plain.weight).dtype
    layer = copy.deepcopy(layer).double()  # another layer may hold the same parameters
    retract_parameters(layer)
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, UnitNormLinear):
        stored = torch.stack([_proven(row, norm_up, dtype) for row in weight])
    elif isinstance(layer, FrobeniusLinear):
        stored = _proven(weight, norm_up, dtype)
    elif isinstance(layer, OrthoKernel):
        stored = _proven(weight, partial(orthogonal_bound, layer), dtype)
    else:
        stored = _proven(weight, matrix_bound, dtype)
    filled = {"weight": stored} if layer.bias is None else {"weight": stored, "bias": cast(Tensor, layer.bias)}
    plain.load_state_dict(filled)
    return plain


def _proven(weight: Tensor, bound: Callable[[Tensor], float], dtype: torch.dtype) -> Tensor:
    """Round a weight of norm about 1 to a dtype, scaled so that the bound of what is stored is at most 1."""
    scale = 1.0
    for _ in range(_TRIES):
        stored = (weight * scale).to(dtype)
        found = bound(stored.double())
        if found <= 1:
            return stored
        scale = min(scale / found, scale * (1 - 2.0**-26))
    raise ArithmeticError(f"no scale brings the bound to 1: still {found} after {_TRIES} tries")
