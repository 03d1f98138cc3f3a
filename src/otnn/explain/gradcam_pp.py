"""Grad-CAM++: the channels of a convolutional layer, weighted by where their gradients are positive."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from otnn.checks import check_images
from otnn.errors import InputError
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET, chunk_size
from otnn.nn.kernel import OrthoKernel


def gradcam_pp(
    scorer: Scorer,
    inputs: Tensor,
    *,
    layer: nn.Module | None = None,
    relu: bool = False,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al. 2018, equations 5, 10 and 19) at one layer.

    With A_k the channels of the layer and g_k the gradient of the score S to them, the map is sum_k w_k A_k, where
    w_k = sum_ij a_k ReLU(g_k) and a_k = g_k^2 / (2 g_k^2 + g_k^3 sum_ij A_k), 0 where g_k is. This is the paper's form
    for Y = exp(S) in a piecewise linear network, without the factor exp(S), which is one positive number per sample.

    The paper takes activations after a ReLU. Those of GroupSort have either sign, which breaks it in two places. A
    negative sum of A_k makes the denominator of a_k vanish: the positive parts of A_k are summed, which is the same
    where A_k >= 0. And a final ReLU can leave nothing of the map: by default there is none, which is again the same
    where A_k >= 0, so the maps of a ReLU network are the paper's. Gradients below 0 are dropped, as in the paper.

    Args:
        scorer: what is explained; built on the same samples.
        inputs: (n, channels, height, width) images or (n, channels, length) signals.
        layer: a module of the model that returns (n, k, height', width') or (n, k, length'); by default
            `last_spatial_layer`. If it runs more than once in a forward, its last run counts.
        relu: cut the map at 0 as the paper does, whatever the signs of the activations.
        memory_budget: bytes for inputs and activations of one forward and backward.

    Returns:
        (n, 1, height, width) or (n, 1, length), interpolated linearly from the size of the layer; units of the score.

    Raises:
        InputError: rows, a model without a convolution (name a layer), a layer that does not fit or that the score does
            not depend on, or a budget that does not hold one sample.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
        >>> x = torch.rand(2, 1, 8, 8)
        >>> gradcam_pp(Scorer(model, x, 0), x).shape
        torch.Size([2, 1, 8, 8])
    """
    check_images(inputs)
    if inputs.ndim not in (3, 4):
        raise InputError(
            "inputs: expected images (n, channels, height, width) or signals (n, channels, length), got shape "
            f"{tuple(inputs.shape)}: rows have no layer with a place for each channel"
        )
    chosen = last_spatial_layer(scorer.model, inputs) if layer is None else layer
    size = chunk_size(inputs[:1], memory_budget, scorer.model, gradient=True)
    indices = torch.arange(len(inputs), device=inputs.device).split(size)
    mode = "bilinear" if inputs.ndim == 4 else "linear"
    parts = []
    for index in indices:
        activations, gradient = activations_and_gradient(scorer, inputs[index], index, chosen)
        coarse = weighted(activations, gradient)
        parts.append(
            nn.functional.interpolate(
                coarse.clamp(min=0) if relu else coarse, inputs.shape[2:], mode=mode, align_corners=False
            )
        )
    return torch.cat(parts).to(inputs.dtype)


def weighted(activations: Tensor, gradient: Tensor) -> Tensor:
    """The map (n, 1, ...) from activations and gradients (n, channels, ...)."""
    space = tuple(range(2, activations.ndim))
    total = activations.clamp(min=0).sum(dim=space, keepdim=True)
    positive = gradient.clamp(min=0)
    # a ReLU(g) with g^2 divided out: where g is 0 or less, so is this product
    weights = (positive / (2 + total * positive)).sum(dim=space, keepdim=True)
    return (weights * activations).sum(dim=1, keepdim=True)


def activations_and_gradient(scorer: Scorer, inputs: Tensor, index: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The output of a layer and the gradient of the scores to it, both (n, channels, ...)."""
    found: list[Tensor] = []

    def cut(module: nn.Module, args: object, output: object) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != inputs.ndim or len(output) != len(inputs):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"layer: expected one that returns {inputs.ndim} dimensions (n, channels, ...), got {got}; name another"
            )
        # The graph starts here: what comes before needs no gradient, and a later in-place ReLU changes only the clone
        found.append(output.detach().requires_grad_())
        return found[-1].clone()

    handle = layer.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            total = scorer(inputs.detach(), index).sum()
    finally:
        handle.remove()
    if not found:
        raise InputError("layer: expected one that the model runs, got one that it does not; name another")
    (gradient,) = torch.autograd.grad(total, found[-1], allow_unused=True) if total.requires_grad else (None,)
    if gradient is None:
        raise InputError("layer: expected one that the score depends on, got one that it does not; name another")
    return found[-1].detach(), gradient


def last_spatial_layer(model: nn.Module, inputs: Tensor) -> nn.Module:
    """The last module without children that returns more than one place for each channel, at or after a convolution.

    In `otnn.models.build("conv", ...)` and its twin this is the activation after the last convolution.

    Args:
        model: runs once on the first sample.
        inputs: (n, channels, ...).

    Raises:
        InputError: a model without a convolution.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> last_spatial_layer(model, torch.rand(2, 1, 8, 8))
        ReLU()
    """
    convolved = False
    last: list[nn.Module] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        nonlocal convolved
        convolved = convolved or isinstance(module, _ConvNd | OrthoKernel)
        if convolved and isinstance(output, Tensor) and output.ndim == inputs.ndim and output[0, 0].numel() > 1:
            last[:] = [module]

    handles = [module.register_forward_hook(note) for module in dict.fromkeys(_leaves(model))]
    try:
        with torch.no_grad():
            model(inputs[:1])
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise InputError(
            "model: expected one with a convolution, whose channels Grad-CAM++ weighs, got none; name a layer"
        )
    return last[0]


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules without children; what builds a parametrised weight is none, and no layer either."""
    children = [child for name, child in module.named_children() if name != "parametrizations"]
    if not children:
        yield module
    for child in children:
        yield from _leaves(child)
