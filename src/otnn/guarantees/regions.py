"""Around each image the map is exactly constant within a radius (theory, section 5.5).

In a network of affine and GroupSort layers every output is affine while all numbers that are sorted together keep their
order. A pair z_i - z_j of them is sqrt(2) L Lipschitz, L the bound of the map from the input up to and including its
layer; so no pair changes its order, and the gradient of the potential is one and the same vector, while
||delta|| < min over pairs |z_i - z_j| / (sqrt(2) L).
"""

from typing import cast

import torch
from torch import Tensor, nn

from otnn.guarantees.potential import Potential
from otnn.guarantees.result import GREY, Guarantee, first_reasons
from otnn.lipschitz.bounds import step_constants
from otnn.lipschitz.graph import Trace
from otnn.lipschitz.operations import Step, function_of
from otnn.lipschitz.rounding import mul_up, sqrt_up
from otnn.nn import (
    BatchCentering,
    Centering,
    FullSort,
    GroupSort,
    LayerCentering,
    MaxMin,
    ScaledAdaptiveAvgPool2d,
    ScaledAvgPool2d,
    group_sort,
)
from otnn.nn.kernel import OrthoKernel
from otnn.nn.residual import ChannelsFrom, ChannelsJoin, ConvexMix

DOMAIN = (
    "For every real change of the whole image below the radius, for the pair of classes at hand, in networks of affine "
    "and GroupSort layers only."
)
_AFFINE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, OrthoKernel, Centering),
    *(nn.BatchNorm1d, nn.BatchNorm2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.modules.padding._ConstantPadNd),
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(ScaledAvgPool2d, ScaledAdaptiveAvgPool2d, BatchCentering, LayerCentering, ChannelsFrom, ChannelsJoin, ConvexMix),
)
_AFFINE_FUNCTIONS = {
    *("add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv", "mean"),
    *("avg_pool2d", "adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle"),
}


def constant_saliency(potential: Potential) -> Guarantee:
    """Radius within which the gradient of the potential is exactly constant.

    Deep networks have many pairs and one of them is nearly tied, so radii are tiny there: read the quantiles of
    `summary()`. Vacuous where the radius is below `GREY`: such a ball holds no other 8-bit image. A network without a
    sorted pair is affine, and its radius infinite.

    Returns:
        The radius in the L2 norm of the input. `details`: "layer" (n,), the number of the layer among the GroupSort
        layers whose pair decides, -1 where there is none.

    Example:
        >>> from otnn.lipschitz import bound
        >>> from otnn.models import build
        >>> model = build("dense", (1, 8, 8), 2, widths=(4,)).eval()
        >>> found = constant_saliency(Potential(model, torch.rand(3, 1, 8, 8), bound(model.body)))
        >>> bool((found.bound > 0).all())
        True
    """
    reason = potential.reason
    radius = torch.full_like(potential.value, torch.nan)
    layer = torch.full_like(potential.target, -1)
    if potential.trace is not None:
        sorts, other = _sorted_sources(potential.trace)
        if other:
            everywhere = torch.ones_like(potential.known)
            reason = first_reasons(
                reason, (everywhere, f"{other}: only affine and GroupSort layers have such a radius")
            )
        else:
            radius, layer = _radii(potential, sorts)
            radius = torch.where(potential.known, radius, torch.nan)
    return Guarantee(
        name="constant_saliency",
        bound=radius,
        unit="L2 norm of the change",
        vacuous=~(radius >= GREY),
        reason=first_reasons(reason, (radius < GREY, "the radius is below one grey level of one pixel")),
        domain=DOMAIN,
        details={"layer": layer},
    )


def _sorted_sources(traced: Trace) -> tuple[dict[str, tuple[float, nn.Module]], str]:
    """By the node whose result is sorted: its Lipschitz bound and the layer that sorts. Or the first other layer."""
    constants = step_constants(traced.steps)
    nodes = {node.name: node for node in traced.graph.graph.nodes}
    sorts: dict[str, tuple[float, nn.Module]] = {}
    for name, step in zip(traced.nodes, traced.steps, strict=True):
        node = nodes[name]
        if node.op == "call_module":
            module = traced.graph.get_submodule(str(node.target))
            if isinstance(module, MaxMin | GroupSort | FullSort):
                source = step.sources[0]
                sorts[traced.nodes[source]] = constants[source], module
            elif not isinstance(module, _AFFINE):
                return {}, f"{step.name} is {type(module).__name__}"
        elif _bends(step, getattr(function_of(node), "__name__", "")):
            return {}, f"{step.name} is not affine"
    return sorts, ""


def _bends(step: Step, function: str) -> bool:
    """Whether a step that is no module may be anything else than affine."""
    return step.kind == "layer" and function not in _AFFINE_FUNCTIONS


def _least_gap(layer: nn.Module, values: Tensor) -> Tensor:
    """The least difference (n,) of two numbers of a group: of neighbours, once they are sorted."""
    dim = cast(int, layer.dim) % values.ndim
    size = values.shape[dim] if isinstance(layer, FullSort) else getattr(layer, "group_size", 2)
    if size == 1:
        return values.new_full((len(values),), torch.inf)
    gaps = group_sort(values, size, dim).unflatten(dim, (size, -1)).diff(dim=dim).abs()
    least: Tensor = gaps.flatten(1).amin(dim=1)
    return least


def _radii(potential: Potential, sorts: dict[str, tuple[float, nn.Module]]) -> tuple[Tensor, Tensor]:
    """The least radius (n,) over the pairs of all layers, and the number of the layer (n,)."""
    found: dict[str, list[Tensor]] = {name: [] for name in sorts}

    def watch(name: str, result: Tensor, error: Tensor) -> None:
        if name in sorts:
            constant, layer = sorts[name]
            least = _least_gap(layer, result)
            # both numbers of a pair together err by sqrt(2) times the error of all numbers at most
            certain = least * (1 - 2.0**-50) - sqrt_up(2.0) * error * (1 + 2.0**-50)
            found[name].append(certain.clamp(min=0) / mul_up(sqrt_up(2.0), constant) * (1 - 2.0**-50))

    potential.bounded(potential.inputs, watch=watch)
    if not sorts:
        return torch.full_like(potential.value, torch.inf), torch.full_like(potential.target, -1)
    least, layer = torch.stack([torch.cat(parts) for parts in found.values()]).min(dim=0)
    return least, layer
