"""Where a method makes sense: the layer that Grad-CAM reads, and models whose only activation is `nn.ReLU`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from otnn.errors import InputError
from otnn.explain.gradcam_pp import last_spatial_layer

# Activations by the name of their node in the graph of autograd. Sigmoid and softmax are left out: they are gates,
# attention and outputs of ReLU networks, and no rectifiers; so are powers and exponentials, of which normalisations are
# made: an activation that is written out in these alone is not seen.
_ACTIVATIONS = (
    *("LeakyRelu", "Elu", "Celu", "Gelu", "Silu", "Mish", "Softplus", "Hardtanh", "Hardswish", "Hardsigmoid"),
    *("Tanh", "PreluKernel", "RreluWithNoise", "LogSigmoid", "Threshold", "Clamp", "ClampMin", "ClampMax", "Glu"),
    *("Maximum", "Minimum", "Fmax", "Fmin", "Sort", "Abs", "Where", "Sin", "Softshrink", "Hardshrink"),
    *("Min", "Amin", "Topk", "Erf", "Logaddexp"),
)


class NotApplicableError(InputError):
    """A method has no meaning for this model or input; a table prints "not applicable" and the reason."""


def find_layer(model: nn.Module, inputs: Tensor, layer: nn.Module | str | None = None) -> nn.Module:
    """The layer whose channels Grad-CAM and Grad-CAM++ weigh: the given one, or `last_spatial_layer`.

    Args:
        model: any module.
        inputs: (n, channels, ...); the model runs on the first, where no layer is given.
        layer: a module of the model, or its name in `model.named_modules()`.

    Raises:
        NotApplicableError: no layer was given, and the model has no convolution.
        InputError: a layer that the model does not have.

    Example:
        >>> find_layer(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3), nn.Flatten()), torch.rand(2, 1, 8, 8))
        Conv2d(2, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(layer, str):
        if layer not in modules:
            raise InputError(f"layer: expected the name of a module of the model, got {layer!r}; see named_modules()")
        return modules[layer]
    if layer is not None:
        if not any(module is layer for module in modules.values()):
            raise InputError(f"layer: this {type(layer).__name__} is no module of the model")
        return layer
    try:
        return last_spatial_layer(model, inputs)
    except InputError as error:
        raise NotApplicableError(
            "Grad-CAM weighs the channels of a convolution, and the model has none; choose a layer by layer="
        ) from error


def check_only_relu(model: nn.Module, sample: Tensor, method: str) -> None:
    """Refuse a model that is not rectified by `nn.ReLU` modules alone.

    Guided backprop and Deconvolution change the backward pass of `nn.ReLU` modules: beside another activation, or a
    ReLU that is called as a function, their maps would silently be the plain gradient, in whole or in part. The graph
    of one forward tells what the model computes.

    Args:
        model: any module.
        sample: (1, ...) one input.
        method: the name for the message.

    Raises:
        NotApplicableError: with what the model computes instead.

    Example:
        >>> check_only_relu(nn.Sequential(nn.Linear(2, 4), nn.ReLU()), torch.rand(1, 2), "deconvolution")
    """
    calls: list[nn.Module] = []

    def count(module: nn.Module, *_: Any) -> None:
        calls.append(module)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.ReLU)]
    try:
        with torch.enable_grad():
            leaf = sample.detach().clone().requires_grad_()
            names = _operations(model(leaf), leaf)
    finally:
        for hook in hooks:
            hook.remove()
    others = sorted({name for name in names if name.endswith("()") or name in _ACTIVATIONS})
    if names.count("Relu") > len(calls):
        others.append("ReLU outside of nn.ReLU modules")
    if others:
        raise NotApplicableError(
            f"{method} changes the backward pass of nn.ReLU modules alone, and this model also computes "
            f"{', '.join(others)}: the map would in part be the plain gradient; take saliency"
        )
    if not calls:
        raise NotApplicableError(
            f"{method} changes the backward pass of nn.ReLU modules, and this model runs none: the map would silently "
            "be the plain gradient; take saliency"
        )


def _operations(output: Tensor, leaf: Tensor) -> list[str]:
    """Names of the operations between an input and an output, with "()" behind custom autograd functions."""
    parents: dict[Any, list[Any]] = {}
    waiting, source = [output.grad_fn] if output.grad_fn is not None else [], None
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if getattr(node, "variable", None) is leaf:
            source = node
        for child, _ in node.next_functions:
            if child is not None:
                parents.setdefault(child, []).append(node)
                if child not in seen:
                    seen.add(child)
                    waiting.append(child)
    # weights have operations of their own, so only what leads to the input counts
    waiting, between = [source] if source is not None else [], set()
    while waiting:
        for parent in parents.get(waiting.pop(), []):
            if parent not in between:
                between.add(parent)
                waiting.append(parent)
    return [_name(node) for node in between]


def _name(node: Any) -> str:
    name = type(node).__name__
    if isinstance(node, BackwardCFunction):
        return name.removesuffix("Backward").lstrip("_") + "()"
    return name.split("Backward")[0].lstrip("_")
