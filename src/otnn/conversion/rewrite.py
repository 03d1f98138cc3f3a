"""Rewriting the traced graph of a network into that of its 1-Lipschitz counterpart.

Every operation that is let through is one whose constant `otnn.lipschitz.bound` knows; all others raise.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from otnn.conversion.counterparts import FUNCTIONS, PROBABILITIES, Place, counterpart
from otnn.conversion.notes import Change, check_hooks, holders, no_counterpart, not_kept
from otnn.errors import InputError
from otnn.lipschitz.layers import Shape, computes_like, known_kind
from otnn.lipschitz.operations import (
    MEANS,
    NEARER,
    QUOTIENTS,
    SAME,
    SCALES,
    SUMS,
    check_batch,
    check_nearer,
    function_of,
    is_size,
)
from otnn.models import HEADS
from otnn.nn.kernel import OrthoKernel
from otnn.nn.residual import ConvexMix

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
_WITH_WEIGHTS = (*WEIGHTED, OrthoKernel)
_ADDITIONS: set[Any] = {operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_}
_NEGATIONS: set[Any] = {operator.neg, torch.neg, Tensor.neg}
# What may follow the scores: it gives them another shape only.
_RESHAPES: set[Any] = {*(SAME - _NEGATIONS), torch.squeeze, Tensor.squeeze, nn.Flatten}
_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd)
_CONSTANTS = ("shape", "ndim", "dtype", "device")


class Rewriter:
    """Builds the counterpart's graph node by node; what became of each is in `changes`, the head in `head`.

    Args:
        traced: the network.
        shapes: of one sample at each node that is a tensor.
        activation: a name in `otnn.models.ACTIVATIONS`.
        head: a name in `otnn.models.HEADS`.
        share: of the branch in each convex mix.
    """

    def __init__(
        self, traced: fx.GraphModule, shapes: dict[fx.Node, Shape], *, activation: str, head: str, share: float
    ) -> None:
        self.changes: list[Change] = []
        self.head: nn.Linear | None = None
        self._traced, self._shapes = traced, shapes
        self._activation, self._head, self._share = activation, head, share
        like = next((p for p in traced.parameters() if p.is_floating_point()), torch.empty(0))
        self._device, self._dtype = like.device, like.dtype
        self._graph = fx.Graph()
        self._parts: dict[str, Any] = {}
        self._new: dict[fx.Node, fx.Node] = {}  # the result that takes the place of a node's
        self._depth: dict[fx.Node, int] = {}  # layers with weights on the longest way to a node
        self._placed: dict[tuple[str, str], str] = {}
        self._holders = holders(traced)
        self._settled: set[fx.Node] = set()  # products that are a scale of the network already

    def run(self) -> fx.GraphModule:
        """Rewrite every node; return the network without its head.

        Raises:
            InputError: what has no counterpart, or one of another shape.
        """
        nodes = list(self._traced.graph.nodes)
        result = nodes[-1].args[0]
        single = isinstance(result, fx.Node) and result in self._shapes
        endings, last = self._endings(result) if single else ({}, None)
        for node in nodes[:-1]:
            try:
                if node.op == "call_module":
                    check_hooks(self._layer(node))
                if node in endings:
                    self._remove(node, endings[node])
                elif last is not None and node is last and self._is_head(node):
                    self._take_head(node)
                else:
                    self._rewrite(node)
            except InputError as error:
                raise InputError(f"{self._name(node)}: {error}") from None
            weighs = node.op == "call_module" and isinstance(self._layer(node), _WITH_WEIGHTS)
            self._depth[node] = weighs + max((self._depth[each] for each in node.all_input_nodes), default=0)
        if not single:
            raise InputError("expected one tensor as the output of the network; return the scores alone")
        self._graph.output(self._new[result])
        network = fx.GraphModule(self._parts, self._graph).eval()
        network.graph.eliminate_dead_code()
        network.recompile()
        return network

    def _rewrite(self, node: fx.Node) -> None:
        sources = [each for each in node.all_input_nodes if each in self._shapes]
        if node.op in ("placeholder", "get_attr") or not sources or _is_constant(node):
            if node.target is not torch._assert:  # of sizes, which are what they are
                self._copy(node)
            return
        target = function_of(node)
        if node.op == "call_module":
            self._replace(node, self._layer(node), sources[0])
        elif target in FUNCTIONS:
            self._replace(node, self._as_layer(node), sources[0])
        elif node not in self._shapes:
            raise InputError(f"no 1-Lipschitz counterpart of {self._was(node)} is known; expected one tensor of it")
        elif target in _ADDITIONS and len(sources) == 2:
            self._mix(node, sources)
        elif target in SUMS and len(sources) == 1:
            self._refuse_copies(node, sources)
            self._add(_of_two(node), sources[0])
        elif target in SCALES and len(sources) == 1:
            self._refuse_copies(node, sources)
            self._rescale(_of_two(node), sources[0])
        elif target in MEANS:
            if len(node.args) < 2 and "dim" not in node.kwargs:
                raise InputError("expected a mean over given dimensions >= 1")
            if set(node.kwargs) - {"input", "dim", "keepdim"}:
                raise InputError("expected a mean without arguments other than dim and keepdim; leave them out")
            self._copy(node)
            count = math.prod(self._shapes[sources[0]]) / math.prod(self._shapes[node])
            self._scale(node, math.sqrt(count), "a mean of n numbers has norm 1 / sqrt(n)")
        elif target in (torch.cat, torch.concat):
            parts: Any = node.args[0] if node.args else ()
            whole = bool(parts) and all(part in self._shapes for part in parts) and not set(node.kwargs) - {"dim"}
            if not whole or not self._keeps_batch(node):
                raise InputError("expected torch.cat([...], dim) of results of layers, with dim >= 1")
            self._copy(node)
            self._scale(node, 1 / math.sqrt(len(parts)), "n branches of one input together have norm sqrt(n)")
        elif target in SAME - _NEGATIONS and len(self._shapes[node]) == 1:
            self._place(node, nn.Flatten(), sources[0])
        elif target in SAME | NEARER:
            if target in SAME and set(node.kwargs) - {"start_dim", "end_dim"}:
                raise InputError("expected no arguments by name")
            if target in NEARER:
                check_nearer(node)
            check_batch(node, self._shapes)
            self._copy(node)
        else:
            raise no_counterpart(self._was(node), len(sources) > 1)

    def _keeps_batch(self, node: fx.Node) -> bool:
        """Whether a concatenation is along another dimension than that of the samples."""
        dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return isinstance(dim, int) and dim % (len(self._shapes[node]) + 1) > 0

    def _as_layer(self, node: fx.Node) -> nn.Module:
        """The layer that computes what a function does."""
        settings = [*node.args[1:], *[value for name, value in node.kwargs.items() if name != "input"]]
        if any(isinstance(each, fx.Node) and each.op != "get_attr" for each in settings):
            raise InputError("expected numbers as its settings, not sizes or results; write them out")
        named = {name: value for name, value in node.kwargs.items() if name != "input"}
        shape = self._shapes[node.all_input_nodes[0]]
        layer: nn.Module = FUNCTIONS[function_of(node)](shape, *node.args[1:], **named)
        return layer

    def _replace(self, node: fx.Node, layer: nn.Module, source: fx.Node) -> None:
        """Put the counterpart of a layer in its place."""
        was = self._was(node)
        if node not in self._shapes:
            raise InputError(f"no 1-Lipschitz counterpart of {was} is known; expected layers that return one tensor")
        if isinstance(layer, (nn.Softmax, nn.LogSoftmax)):
            raise no_counterpart("softmax", False)
        several = sum(each in self._shapes for each in node.all_input_nodes) > 1
        place = Place(
            *(self._shapes[source], self._shapes[node], self._channels(node, source)),
            *(self._activation, self._device, self._dtype),
        )
        found = counterpart(layer, place)
        if found.layer is None:
            self._remove(node, found.why)
            return
        kept = found.layer is layer
        if several and not kept:
            raise InputError(f"no 1-Lipschitz counterpart of {was} of several results is known; expected one")
        if not kept:
            _check_shape(found.layer, place)
        if kept and node.op == "call_module":
            self._copy(node)
        else:
            self._place(node, found.layer, source)
        if found.scale != 1:
            self._scale(node, found.scale, found.why)
        elif not kept or node.op == "call_module":
            lost = () if kept else self._not_kept(node, found.layer)
            self._note(node, type(found.layer).__name__, "; ".join(filter(None, (found.why, *lost))))

    def _not_kept(self, node: fx.Node, new: nn.Module) -> Sequence[str]:
        """What the weights of a new layer, placed already or the head, do not keep of the old ones."""
        if node.op != "call_module":
            return ()
        name = str(node.target)
        alone = any(other == name and (new is self.head or key != repr(new)) for other, key in self._placed)
        return not_kept(name, self._layer(node), new, self._holders, alone)

    def _add(self, node: fx.Node, source: fx.Node) -> None:
        """Keep a sum with a constant, and leave out that of a result with itself."""
        first, second = node.args
        if first is not second:
            self._constant(node, source)
            self._copy(node)
        elif function_of(node) in _ADDITIONS:
            self._remove(node, "a sum of a result with itself doubles distances")
        else:
            raise InputError("subtracts a result from itself, which leaves zero; leave it out")

    def _mix(self, node: fx.Node, sources: list[fx.Node]) -> None:
        self._refuse_copies(node, sources)
        if self._depth[sources[0]] > self._depth[sources[1]]:
            sources = sources[::-1]
        self._place(node, ConvexMix(self._share, device=self._device, dtype=self._dtype), *sources)
        factor = node.kwargs.get("alpha", 1)
        lost = "" if factor == 1 else f"; its factor alpha={factor} is left out"
        self._note(node, "ConvexMix", f"(1 - alpha) x + alpha f(x), alpha learned in [0, 1]{lost}")

    def _refuse_copies(self, node: fx.Node, sources: Sequence[fx.Node]) -> None:
        if any(self._shapes[source] != self._shapes[node] for source in sources):
            found = " and ".join(str(self._shapes[source]) for source in sources)
            raise InputError(
                f"copies numbers of {found} to {self._shapes[node]}, which multiplies distances; expected equal shapes"
            )

    def _rescale(self, node: fx.Node, source: fx.Node) -> None:
        """Keep a product with a constant of at most 1, and leave out others."""
        divides = function_of(node) in QUOTIENTS
        other = self._constant(node, source)
        if divides and node.args[0] is not source:
            raise InputError("expected a product with a number or a stored tensor, or a quotient by one; leave it out")
        size = torch.as_tensor(other).detach().double().abs()
        if isinstance(other, nn.Parameter):
            self._remove(node, "a learned scale has no bound")
        elif node not in self._settled and float((1 / size if divides else size).max()) > 1:
            self._remove(node, "it multiplies distances")
        else:
            self._copy(node)
            if node not in self._settled:
                self._note(node, self._was(node), "kept: distances, and with them the bound, may shrink by it")

    def _constant(self, node: fx.Node, source: fx.Node) -> int | float | Tensor:
        """The other term or factor."""
        other = next((each for each in node.args if each is not source), None)
        if isinstance(other, fx.Node) and is_size(other):
            raise InputError(f"expected a number or a stored tensor beside {source.name}, got a size; write it out")
        if isinstance(other, fx.Node) and other.op == "get_attr":
            other = attribute(self._traced, str(other.target))
        if not isinstance(other, (int, float, Tensor)):
            raise InputError(
                f"expected a number or a stored tensor beside {source.name}; store it as it is used, or leave it out"
            )
        return other

    def _scale(self, node: fx.Node, factor: float, why: str) -> None:
        """Multiply a result, unless the only one that reads it does so already."""
        if math.isclose(factor, 1, rel_tol=1e-9):
            return
        users = list(node.users)
        if len(users) == 1 and function_of(users[0]) in SCALES - QUOTIENTS:
            numbers = [each for each in users[0].args if isinstance(each, (int, float))]
            if numbers and math.isclose(numbers[0], factor, rel_tol=1e-6):
                self._settled.add(users[0])
                return
        self._new[node] = self._graph.call_function(operator.mul, (self._new[node], factor))
        self._note(node, f"{self._was(node)} * {factor:.4g}", why)

    def _endings(self, result: fx.Node) -> tuple[dict[fx.Node, str], fx.Node]:
        """What follows the scores at the end, with the reason to leave it out; and the node of the scores."""
        endings: dict[fx.Node, str] = {}
        reshapes: list[fx.Node] = []
        node = result
        while node.op != "placeholder" and node.all_input_nodes:
            layer = self._layer(node) if node.op == "call_module" else None
            kind = function_of(node) if layer is None else type(layer)
            if kind in PROBABILITIES:
                endings[node] = "certificates are of scores, not of probabilities"
            elif self._reshapes(node, kind):
                reshapes.append(node)
            elif isinstance(layer, _IDLE) and computes_like(layer, known_kind(layer) or type(layer)):
                endings[node] = "does nothing in eval mode"
            else:
                break
            node = node.all_input_nodes[0]
        if not reshapes or self._is_head(node):
            return endings | dict.fromkeys(reshapes, "scores are of shape (batch, classes)"), node
        return endings, node

    def _reshapes(self, node: fx.Node, kind: Any) -> bool:
        """Whether a step takes scores as they are, or one score as a number for each sample."""
        before, after = (self._shapes.get(each) for each in (node.all_input_nodes[0], node))
        if before == (1,) and after == ():
            return kind in _RESHAPES or kind is operator.getitem
        return before == after and before is not None and len(before) == 1 and kind in _RESHAPES

    def _is_head(self, node: fx.Node) -> bool:
        layer = self._layer(node) if node.op == "call_module" else None
        single = len(node.all_input_nodes) == 1 and len(self._shapes[node.all_input_nodes[0]]) == 1
        return isinstance(layer, nn.Linear) and single and self._shapes[node] == (layer.out_features,)

    def _take_head(self, node: fx.Node) -> None:
        layer: Any = self._layer(node)
        kept = type(layer) in HEADS.values()
        self.head = layer if kept else HEADS[self._head](layer.in_features, layer.out_features)
        self.head.to(self._device, self._dtype)
        self._new[node] = self._new[node.all_input_nodes[0]]
        why = () if kept else ("head", *self._not_kept(node, self.head))
        self._note(node, type(self.head).__name__, "; ".join(why))

    def _remove(self, node: fx.Node, why: str) -> None:
        self._new[node] = self._new[next(each for each in node.all_input_nodes if each in self._shapes)]
        self._note(node, "removed", why)

    def _copy(self, node: fx.Node) -> None:
        self._new[node] = self._graph.node_copy(node, lambda each: self._new[each])
        if node.op in ("call_module", "get_attr"):
            self._parts[str(node.target)] = attribute(self._traced, str(node.target))

    def _place(self, node: fx.Node, layer: nn.Module, *sources: fx.Node) -> None:
        """Call a new layer. Calls of one layer go on sharing it, where their counterparts are the same."""
        name = self._name(node)
        key = (name, repr(layer))
        if key not in self._placed:
            taken = {*self._parts, *(name for name, _ in self._traced.named_modules() if node.op != "call_module")}
            free = name
            while free in taken:
                free += "_"
            self._placed[key], self._parts[free] = free, layer
        self._new[node] = self._graph.call_module(self._placed[key], tuple(self._new[each] for each in sources))

    def _note(self, node: fx.Node, now: str, why: str) -> None:
        self.changes.append(Change(self._name(node), self._was(node), now, why))

    def _was(self, node: fx.Node) -> str:
        """The type of a layer, or the name of a function or method."""
        if node.op == "call_module":
            return type(self._layer(node)).__name__
        return str(getattr(node.target, "__name__", node.target))

    def _name(self, node: fx.Node) -> str:
        """The name of a layer, or of a function within the module that calls it."""
        if node.op == "call_module":
            return str(node.target)
        around = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
        return f"{around[-1]}.{node.name}" if around and around[-1] else node.name

    def _channels(self, node: fx.Node, source: fx.Node) -> int:
        """The dimension that holds the channels: after a dense layer the last one, otherwise dimension 1."""
        while source.op != "placeholder" and source.all_input_nodes:
            layer = self._layer(source) if source.op == "call_module" else None
            if isinstance(layer, nn.Linear):
                return len(self._shapes[node])
            if isinstance(layer, _WITH_WEIGHTS):
                break
            source = source.all_input_nodes[0]
        return 1

    def _layer(self, node: fx.Node) -> nn.Module:
        return self._traced.get_submodule(str(node.target))


def attribute(module: nn.Module, path: str) -> Any:
    """A module, parameter or tensor by its dotted name."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _of_two(node: fx.Node) -> fx.Node:
    """Refuse a sum or product with further arguments, such as the alpha of `torch.add`."""
    if len(node.args) != 2 or node.kwargs:
        raise InputError("expected two terms or factors without further arguments")
    return node


@torch.no_grad()
def _check_shape(layer: nn.Module, place: Place) -> None:
    """Refuse a counterpart whose result has another shape, such as that of a layer that computes in its own way."""
    found = tuple(layer.eval()(torch.zeros(2, *place.shape, device=place.device, dtype=place.dtype)).shape[1:])
    if found != place.output:
        raise InputError(f"{type(layer).__name__} gives {found} instead of {place.output}; use a layer of torch.nn")


def _is_constant(node: fx.Node) -> bool:
    """Whether a node tells something that is the same for all inputs of one shape."""
    return is_size(node) or (node.target is getattr and node.args[1] in _CONSTANTS) or node.target == "dim"
