"""What a user is told: the changes, what a new layer does not keep of the old one, and the mend of what is refused."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from otnn.errors import InputError
from otnn.lipschitz.layers import has_hooks

_PRODUCTS = "attention and gates multiply results, which has no bound: use layers of torch.nn, or leave it out"
_PROBABILITIES = "probabilities belong to the end: leave it out"
_AXES = "keep the channels in dimension 1, as the layers of torch.nn do, and leave it out"
_SHAPES = "write torch.flatten(x, 1) before dense layers, nn.Unflatten to get pixels back, or leave it out"
_ADVICE = {
    **dict.fromkeys(("mul", "imul", "matmul", "bmm", "einsum", "scaled_dot_product_attention"), _PRODUCTS),
    **dict.fromkeys(("softmax", "log_softmax"), _PROBABILITIES),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "movedim", "mT"), _AXES),
    **dict.fromkeys(("squeeze", "unsqueeze", "unflatten"), _SHAPES),
    "getitem": "slices have none: take the whole result",
    "interpolate": "use torch.nn.Upsample with numbers as its settings",
    "sub": "write a sum: the layers before it learn the sign",
    "isub": "write a sum: the layers before it learn the sign",
}
# Hooks of torch.nn.utils that their own functions remove
_OLD_NORMS = {"SpectralNorm": "spectral_norm", "WeightNorm": "weight_norm"}


@dataclass(frozen=True)
class Change:
    """What became of one layer or operation.

    Attributes:
        name: in the original network; of a function, the module that calls it, a dot, and a name of its own.
        was: the type of the layer, or the function.
        now: the type of the new layer, or "removed".
        why: where the types do not say it.
    """

    name: str
    was: str
    now: str
    why: str = ""


def no_counterpart(name: str, several: bool) -> InputError:
    """The error of an operation that cannot be converted."""
    of = f"{name} of several results" if several else name
    advice = _ADVICE.get(name, "use layers of torch.nn, or leave it out")
    return InputError(f"no 1-Lipschitz counterpart of {of} is known; {advice}")


def check_hooks(layer: nn.Module) -> None:
    """Refuse a hook: it may change what the layer computes, and a new layer would not have it.

    Raises:
        InputError: there is one.
    """
    if has_hooks(layer):
        kinds = {type(hook).__name__ for hook in layer._forward_pre_hooks.values()}
        old = next((name for kind, name in _OLD_NORMS.items() if kind in kinds), None)
        by = f", an old {old} by torch.nn.utils.remove_{old}" if old else ""
        raise InputError(
            f"a forward hook may change what {type(layer).__name__} computes: expected none; remove it{by}"
        )


def holders(traced: fx.GraphModule) -> dict[int, list[str]]:
    """The names of the layers that hold a parameter, by its id."""
    found: dict[int, list[str]] = {}
    for name, module in traced.named_modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(name)
    return found


def not_kept(name: str, layer: nn.Module, new: nn.Module, found: dict[int, list[str]], alone: bool) -> Sequence[str]:
    """What the weights of a new layer do not keep of those of the old one.

    Args:
        name: of the old layer.
        layer: the old one.
        new: the new one.
        found: what `holders` returns.
        alone: other calls of the old layer have another new one.
    """
    if not any(True for _ in new.parameters()):
        return ()
    lost = ["its other calls have weights of their own"] if alone else []
    for kind, parameter in layer.named_parameters(recurse=False):
        others = [other for other in found[id(parameter)] if other != name]
        if others:
            lost.append(f"its {kind} was shared with {', '.join(others)}; no longer")
    if not all(parameter.requires_grad for parameter in layer.parameters()):
        lost.append("not all of its weights were trained; the fresh ones are")
    return lost
