"""The operations of a traced network: layers, functions, sums, products with constants, concatenations, reshapes."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from otnn.errors import InputError
from otnn.lipschitz.layers import EXACT, LayerBound, Rounding, Shape, computes_like, known_kind, layer_bound
from otnn.lipschitz.residual import check_join
from otnn.lipschitz.rounding import div_up, mul_up, sqrt_up
from otnn.nn.residual import ChannelsJoin, ConvexMix

_UNCHANGED = LayerBound(1.0, EXACT)


@dataclass(frozen=True)
class Step:
    """One operation of a traced network.

    Attributes:
        name: of the layer, or of the operation.
        kind: "input", "layer", "sum", "mix" ((1 - alpha) x + alpha y), "concatenate", "join" (parts that depend on
            different coordinates of one tensor) or "same" (numbers that are only moved or negated).
        sources: the steps whose results it takes.
        bound: of a "layer".
        alpha: of a "mix".
    """

    name: str
    kind: str
    sources: tuple[int, ...]
    bound: LayerBound = _UNCHANGED
    alpha: float = 0.0


def step_of(
    graph: fx.GraphModule, node: fx.Node, index: dict[fx.Node, int], shapes: dict[fx.Node, Shape]
) -> Step | None:
    """What a node of the graph is; None for constants and sizes."""
    if node.op == "placeholder":
        return Step(node.name, "input", ())
    sources = tuple(index[argument] for argument in node.all_input_nodes if argument in index)
    if not sources:
        return None  # a stored constant
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        if isinstance(layer, (ConvexMix, ChannelsJoin)) and len(sources) == len(node.args) == 2:
            return _meeting_step(graph, layer, node, index)
        return Step(str(node.target), "layer", sources, _bound_layer(layer, node, shapes))
    target = function_of(node)
    if is_size(node):
        return None
    if target in SAME:
        if set(node.kwargs) - {"start_dim", "end_dim"}:
            raise InputError("expected no further arguments")
        check_batch(node, shapes)
        return Step(node.name, "same", sources)
    if target in SUMS:
        return _sum_step(graph, node, index, shapes)
    if target in SCALES:
        return _scale_step(graph, node, index, shapes)
    if target in NEARER:
        check_nearer(node)
        return Step(node.name, "layer", sources, _UNCHANGED)
    if target in MEANS:
        return Step(node.name, "layer", sources, _mean_bound(node, shapes))
    if target in (torch.cat, torch.concat):
        return _concatenate_step(node, index, shapes)
    if target in _LAYERS:
        if any(isinstance(argument, fx.Node) for argument in (*node.args[1:], *node.kwargs.values())):
            raise InputError(f"{node.name}: expected numbers as its settings")
        return Step(
            node.name,
            "layer",
            sources,
            _bound_layer(_LAYERS[target](*node.args[1:], **node.kwargs).eval(), node, shapes),
        )
    raise InputError(f"no Lipschitz bound is known for {getattr(target, '__name__', target)}; use a layer of torch.nn")


def _bound_layer(layer: nn.Module, node: fx.Node, shapes: dict[fx.Node, Shape]) -> LayerBound:
    _check_kind(layer)
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    return layer_bound(layer, shapes.get(source), shapes.get(node))  # type: ignore[arg-type]


def _meeting_step(
    graph: fx.GraphModule, layer: ConvexMix | ChannelsJoin, node: fx.Node, index: dict[fx.Node, int]
) -> Step:
    """The end of a residual block."""
    _check_kind(layer)
    sources = tuple(index[source] for source in node.args)  # type: ignore[index]
    if isinstance(layer, ConvexMix):
        return Step(str(node.target), "mix", sources, alpha=float(layer.alpha.detach()))
    check_join(graph, node)
    return Step(str(node.target), "join", sources)


def _check_kind(layer: nn.Module) -> None:
    """Refuse a layer that computes something else than the type whose rule applies to it."""
    kind = known_kind(layer)
    if kind is not None and (not computes_like(layer, kind) or nn.utils.parametrize.is_parametrized(layer)):
        raise InputError(
            f"no Lipschitz bound is known: its own forward, a hook or a parametrization makes {type(layer).__name__} "
            f"another map than {kind.__name__}; export it to plain torch layers first"
        )


def _sum_step(graph: fx.GraphModule, node: fx.Node, index: dict[fx.Node, int], shapes: dict[fx.Node, Shape]) -> Step:
    """A sum or difference of two results, or of a result and a constant."""
    if len(node.args) != 2 or node.kwargs:
        raise InputError("expected a sum of two terms without further arguments")
    terms = [term for term in node.args if isinstance(term, fx.Node) and term in index]
    if len(terms) == 2:
        _check_same_shape(node, terms, shapes)
        return Step(node.name, "sum", tuple(index[term] for term in terms))
    constant = _constant(graph, *[term for term in node.args if term not in terms])
    if constant.ndim > 0:
        _check_same_shape(node, terms, shapes)
    rounding = None
    if node in shapes:
        outputs = math.prod(shapes[node])
        # a number is rounded to the dtype before it is added
        rounding = Rounding(2, 1.0, mul_up(sqrt_up(outputs), float(constant.abs().max())), outputs)
    return Step(node.name, "layer", (index[terms[0]],), LayerBound(1.0, rounding))


def _scale_step(graph: fx.GraphModule, node: fx.Node, index: dict[fx.Node, int], shapes: dict[fx.Node, Shape]) -> Step:
    """A product with a constant, or a quotient by one."""
    if len(node.args) != 2 or node.kwargs:
        raise InputError("expected a product of two factors without further arguments")
    first, second = node.args
    divides = function_of(node) in QUOTIENTS
    if second in index and not divides:
        first, second = second, first
    if not isinstance(first, fx.Node) or first not in index or second in index:
        raise InputError("a product of two results, or a quotient by one, has no Lipschitz bound")
    size = _constant(graph, second).abs()
    if divides and float(size.min()) == 0:
        raise InputError("divides by zero; expected a divisor without zeros")
    constant = div_up(1.0, float(size.min())) if divides else float(size.max())
    if size.ndim > 0:
        _check_same_shape(node, [first], shapes)
    rounding = Rounding(2, constant, 0.0, math.prod(shapes[node])) if node in shapes else None
    return Step(node.name, "layer", (index[first],), LayerBound(constant, rounding))


def _concatenate_step(node: fx.Node, index: dict[fx.Node, int], shapes: dict[fx.Node, Shape]) -> Step:
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if len(node.args) < 1 or set(node.kwargs) - {"dim"} or not isinstance(dim, int):
        raise InputError("expected torch.cat([...], dim)")
    if dim == 0:
        raise InputError("concatenation along dimension 0 mixes samples; expected dim >= 1")
    if dim < 0 and node not in shapes:
        raise InputError(
            f"whether dimension {dim} is that of the samples depends on the input's size: expected dim >= 1"
        )
    parts = node.args[0]
    nodes = [part for part in parts if isinstance(part, fx.Node)] if isinstance(parts, (list, tuple)) else []
    if not nodes or len(nodes) != len(parts) or not all(part in index for part in nodes):  # type: ignore[arg-type]
        raise InputError("expected a concatenation of results of layers")
    return Step(node.name, "concatenate", tuple(index[part] for part in nodes))


def _mean_bound(node: fx.Node, shapes: dict[fx.Node, Shape]) -> LayerBound:
    """The mean over n numbers: 1 / sqrt(n)."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if others := set(node.kwargs) - {"input", "dim", "keepdim"}:
        raise InputError(f"mean: expected no {', '.join(sorted(others))}")
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(source, fx.Node) or source not in shapes or not isinstance(dims, (tuple, list)):
        raise InputError("expected a mean over given dimensions, and input_shape")
    shape = shapes[source]
    if not all(isinstance(dim, int) and (1 <= dim <= len(shape) or -len(shape) <= dim < 0) for dim in dims):
        raise InputError(f"mean over dimensions {tuple(dims)} mixes the samples of a batch; expected dimensions >= 1")
    count = math.prod(shape[dim - 1 if dim > 0 else dim] for dim in dims)
    constant = sqrt_up(div_up(1.0, float(count)))
    return LayerBound(constant, Rounding(count + 2, constant, 0.0, math.prod(shapes.get(node, ()))))


def _check_same_shape(node: fx.Node, terms: Sequence[fx.Node], shapes: dict[fx.Node, Shape]) -> None:
    """Refuse broadcasting, which copies numbers and so multiplies distances."""
    if node not in shapes:
        raise InputError("whether this copies numbers (broadcasting) depends on the input's size: expected input_shape")
    if any(shapes[term] != shapes[node] for term in terms):
        found = " and ".join(str(shapes[term]) for term in terms)
        raise InputError(f"copies numbers by broadcasting: shapes {found} become {shapes[node]}; expected equal shapes")


def _constant(graph: fx.GraphModule, value: Any) -> Tensor:
    """A number, or a tensor stored in the module, in float64."""
    if isinstance(value, (int, float)):
        constant = torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, fx.Node) and value.op == "get_attr":
        found: Any = graph
        for part in str(value.target).split("."):
            found = getattr(found, part)
        constant = found.detach().cpu().double()
    else:
        raise InputError("expected a number or a stored tensor")
    if constant.numel() == 0 or not bool(torch.isfinite(constant).all()):
        raise InputError("expected finite numbers as the constant")
    return constant


def function_of(node: fx.Node) -> Any:
    """What a node calls: a function, or the method of a tensor."""
    return getattr(torch.Tensor, str(node.target), node.target) if node.op == "call_method" else node.target


def is_size(node: fx.Node) -> bool:
    """Whether a node tells the sizes of a tensor, not its values."""
    if node.op == "call_method":
        return node.target == "size"
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and is_size(node.args[0])


def is_shape(node: Any) -> bool:
    """Whether a node is the whole shape of a tensor: x.shape or x.size()."""
    return isinstance(node, fx.Node) and is_size(node) and (node.target is getattr or node.args[1:] == ())


def _is_batch_size(value: Any) -> bool:
    """Whether a value is the size of dimension 0: x.shape[0], x.size(0) or x.size()[0]."""
    if not isinstance(value, fx.Node) or not is_size(value):
        return False
    whole = value.op == "call_method" or is_shape(value.args[0])
    return whole and value.args[1:] == (0,)


def check_nearer(node: fx.Node) -> None:
    """Refuse what a function of `NEARER` takes beside its input, unless it is a number: a limit may move by itself.

    Raises:
        InputError: expected numbers as limits, and no `out`.
    """
    others = [*node.args[1:], *(value for name, value in node.kwargs.items() if name != "input")]
    if "out" in node.kwargs or not all(value is None or isinstance(value, int | float) for value in others):
        raise InputError(
            "a limit that is a tensor, or a result written into another, has no Lipschitz bound; expected numbers, as "
            "in x.clamp(min=0.0, max=1.0), and no out"
        )


def check_batch(node: fx.Node, shapes: dict[fx.Node, Shape]) -> None:
    """Refuse a rearrangement that may mix samples.

    Raises:
        InputError: expected a first size that is that of the batch.
    """
    name = getattr(node.target, "__name__", str(node.target))
    if name == "flatten":
        start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
        if not isinstance(start, int) or start == 0 or (start < 0 and node not in shapes):
            raise InputError("flatten from dimension 0 mixes the samples of a batch; expected start_dim=1")
    elif name in ("view", "reshape"):
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        sizes = list(sizes)
        whole = bool(sizes) and sizes[0] == -1 and node in shapes and all(isinstance(size, int) for size in sizes)
        if not sizes or node.kwargs or not (_is_batch_size(sizes[0]) or whole):
            raise InputError("expected a reshape whose first size is that of the batch, as x.reshape(x.shape[0], -1)")


# Functions that only move or negate numbers.
SAME: set[Any] = {torch.flatten, torch.Tensor.flatten, torch.Tensor.view, torch.Tensor.reshape, torch.reshape}
SAME |= {operator.neg, torch.neg, torch.Tensor.neg, torch.Tensor.contiguous}
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
SUMS: set[Any] = {
    operator.add,
    torch.add,
    torch.Tensor.add,
    operator.sub,
    torch.sub,
    torch.Tensor.sub,
    operator.iadd,
    operator.isub,
}
QUOTIENTS: set[Any] = {operator.truediv, torch.div, torch.Tensor.div, operator.itruediv}
SCALES: set[Any] = {operator.mul, torch.mul, torch.Tensor.mul, operator.imul} | QUOTIENTS
# Functions of one input that bring no two numbers further apart.
NEARER: set[Any] = {torch.abs, torch.Tensor.abs, operator.abs, torch.clamp, torch.Tensor.clamp}
MEANS: set[Any] = {torch.mean, torch.Tensor.mean}


def _max_pool(*arguments: Any, ceil_mode: bool = False, return_indices: bool = False, **settings: Any) -> nn.Module:
    """`MaxPool2d` from the arguments of the function, whose last two stand in another order."""
    if len(arguments) > 4:
        raise InputError("expected ceil_mode and return_indices of max_pool2d by name")
    pool = nn.MaxPool2d(*arguments, **settings)
    pool.ceil_mode, pool.return_indices = ceil_mode, return_indices
    return pool


# Functions that are layers without a name.
_LAYERS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.Tensor.relu: nn.ReLU,
    F.leaky_relu: nn.LeakyReLU,
    F.elu: nn.ELU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.softplus: nn.Softplus,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    torch.Tensor.tanh: nn.Tanh,
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    torch.Tensor.sigmoid: nn.Sigmoid,
    F.max_pool2d: _max_pool,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.pixel_shuffle: nn.PixelShuffle,
    F.pixel_unshuffle: nn.PixelUnshuffle,
}
