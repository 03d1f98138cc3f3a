"""The bounds of residual blocks: their branches are traced, so what is left are the modules in which two paths meet.

A convex mix of maps with the constants L1 and L2 has (1 - alpha) L1 + alpha L2, hence at most the larger one. Where a
branch sees only those channels of x that do not pass by, [x1, h(x2)] has the larger of both constants, too:
||x1 - y1||^2 + ||h(x2) - h(y2)||^2 <= max(1, L)^2 ||x - y||^2.
"""

from typing import Any

from torch import fx, nn

from otnn.errors import InputError
from otnn.lipschitz.layers import EXACT, LayerBound, Shape, layer_bound
from otnn.lipschitz.rounding import add_up, mul_up, up
from otnn.nn.residual import ChannelsFrom, ChannelsJoin, ConvexMix


@layer_bound.register
def _(layer: ChannelsFrom, shape: Shape | None, output: Shape | None) -> LayerBound:
    return LayerBound(1.0, EXACT)


@layer_bound.register(ConvexMix)
@layer_bound.register(ChannelsJoin)
def _(layer: nn.Module, shape: Shape | None, output: Shape | None) -> LayerBound:
    raise InputError(f"{type(layer).__name__} takes the results of two layers; expected it within its residual block")


def mix_weights(alpha: float) -> tuple[float, float]:
    """Bound | 1 - alpha | and | alpha |.

    Example:
        >>> first, second = mix_weights(0.25)
        >>> 0.75 <= first < 0.7500001, second
        (True, 0.25)
    """
    return up(abs(1 - alpha)), abs(alpha)


def mix_constant(alpha: float, first: float, second: float) -> float:
    """Bound the Lipschitz constant of (1 - alpha) x + alpha y, x and y maps with the constants `first` and `second`.

    Example:
        >>> mix_constant(0.3, 1.0, 1.0), mix_constant(1.5, 1.0, 1.0) >= 2
        (1.0, True)
    """
    weights = mix_weights(alpha)
    total = add_up(mul_up(weights[0], first), mul_up(weights[1], second))
    return min(total, max(first, second)) if 0 <= alpha <= 1 else total


def check_join(graph: fx.GraphModule, node: fx.Node) -> None:
    """Refuse a `ChannelsJoin` whose second argument depends on anything but the other channels of the first.

    Raises:
        InputError: the two parts may move together, so that their distances add up.
    """
    first = _module(graph, node).first
    source, waiting = node.args[0], [node.args[1]]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, fx.Node) or found.op == "placeholder" or found is source:
            raise InputError("expected a branch of the channels that do not pass by only, as ConcatResidual calls it")
        module = _module(graph, found)
        if isinstance(module, ChannelsFrom) and module.first >= first and found.args[0] is source:
            continue
        waiting += found.all_input_nodes


def _module(graph: fx.GraphModule, node: fx.Node) -> Any:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None
