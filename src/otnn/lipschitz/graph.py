"""Tracing: a network as a list of steps, each with its rule, and the torch graph that executes them."""

import copy
import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from otnn.errors import InputError
from otnn.lipschitz.layers import Shape, computes_like, has_hooks, known_kind
from otnn.lipschitz.operations import IN_PLACE, SAME, Step, function_of, is_size, step_of
from otnn.nn.residual import ChannelsFrom

# Samples of the run that finds the shapes; more than one, and unlikely to be another dimension's size.
_BATCH = 5
_TRACING = threading.Lock()
# Layers whose result may share the memory of their input.
_VIEWS = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd, ChannelsFrom)


@dataclass(frozen=True)
class Trace:
    """A traced network: its steps in order of execution, and the torch graph that executes them."""

    steps: tuple[Step, ...]
    nodes: tuple[str, ...]
    graph: fx.GraphModule


class _Proxy(fx.Proxy):
    """Records x += y as what it is: torch would trace it as x = x + y, which leaves other names of x unchanged."""

    def _in_place(self, function: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class Tracer(fx.Tracer):
    """Enter containers and the user's own modules, stop at layers that have a rule or belong to torch."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A symbol that records changes in place."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one step of the network."""
        return known_kind(m) is not None or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, input_shape: Sequence[int] | None = None) -> Trace:
    """Trace a network and bound each of its layers.

    Raises:
        InputError: what `bound` raises.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(module).__name__}")
    shape = checked_shape(getattr(module, "input_shape", None) if input_shape is None else input_shape)
    _check_values(module)
    single = Tracer().is_leaf_module(module, "") or isinstance(module, (nn.ModuleList, nn.ModuleDict))
    root = nn.Sequential(module) if single else module  # a single layer is a chain of one
    _check_entered(root)
    called, graph = root, _chain(root)
    if graph is None:  # a forward of its own may change what is stored: it is called on a copy
        called = copy.deepcopy(root)
        graph = symbolic(called)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(inputs) > 1:
        raise InputError(f"{inputs[1].name}: expected a network of one input")
    check_in_place(graph)
    shapes = sample_shapes(graph, shape)
    steps: list[Step] = []
    nodes: list[fx.Node] = []
    index: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node) or result not in index:
                raise InputError(f"{type(module).__name__}: expected one tensor as its output")
            steps.append(Step("output", "same", (index[result],)))
            nodes.append(node)
            break
        try:
            step = step_of(graph, node, index, shapes)
        except InputError as error:
            name = str(node.target) if node.op == "call_module" else node.name
            around = list(node.meta.get("nn_module_stack", {}).values())
            if node.op != "call_module" and around:
                name = f"{around[-1][0]}: {name}"
            name = type(module).__name__ if single else name
            raise InputError(f"{name}: {error}") from None
        if step is not None:
            index[node] = len(steps)
            steps.append(step)
            nodes.append(node)
    if called is not root:
        _check_faithful(called, graph, shape)
        _check_unchanged(root, called)
    return Trace(tuple(steps), tuple(node.name for node in nodes), graph)


def _chain(root: nn.Module) -> fx.GraphModule | None:
    """The graph of a `Sequential` of layers, nested or not; None for a network with a forward of its own."""
    tracer, graph = Tracer(), fx.Graph()
    last = graph.placeholder("inputs")

    def append(module: nn.Module, path: str) -> bool:
        nonlocal last
        if tracer.is_leaf_module(module, path):
            last = graph.call_module(path, (last,))
            return True
        if not (isinstance(module, nn.Sequential) and computes_like(module, nn.Sequential)):
            return False
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        return all(append(child, f"{path}.{name}" if path else name) for name, child in children)

    if not append(root, ""):
        return None
    graph.output(last)
    return fx.GraphModule(root, graph)


def symbolic(root: nn.Module, tracer: Tracer | None = None) -> fx.GraphModule:
    """Trace a network with a forward of its own. Meanwhile torch patches every module, so one thread at a time.

    Raises:
        InputError: a forward that cannot be traced.
    """
    with _TRACING:
        try:
            return fx.GraphModule(root, (tracer or Tracer()).trace(root))
        except InputError:
            raise
        except Exception as error:  # whatever a foreign forward does with a symbolic input
            raise InputError(
                f"{type(root).__name__}: its forward cannot be traced ({_said(error)}); expected layers applied to one "
                "input without control flow that depends on values"
            ) from None


def _said(error: Exception) -> str:
    """The first line of what torch says."""
    return str(error).strip().split("\n")[0]


def _check_values(module: nn.Module) -> None:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.device.type == "meta" or isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise InputError(f"{name} has no values yet; load the weights first")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} holds NaN or infinite values; train again with a lower learning rate")
    for name, layer in module.named_modules():
        if layer.training and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise InputError(f"{name or type(layer).__name__}: is in training mode; call .eval() first")


def _check_entered(root: nn.Module) -> None:
    """Refuse hooks and replaced calls of modules that are entered: those of layers are found at the layer."""
    for name, child in root.named_modules():
        # a graph module calls what it was generated from, which is traced like any forward
        own_call = type(child).__call__ is not nn.Module.__call__ and not isinstance(child, fx.GraphModule)
        replaced = "forward" in vars(child) or own_call
        if known_kind(child) is None and (has_hooks(child) or replaced):
            raise InputError(
                f"{name or type(child).__name__}: a forward hook or its own call may change what it computes; remove it"
            )


def checked_shape(shape: Any) -> Shape | None:
    """The shape of a sample, where one is given.

    Raises:
        InputError: no sizes of one sample.
    """
    if shape is None:
        return None
    if not isinstance(shape, Sequence) or not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InputError(f"input_shape: expected the sizes of one sample such as (1, 28, 28), got {shape!r}")
    return tuple(shape)


def _check_faithful(root: nn.Module, graph: fx.GraphModule, shape: Shape | None) -> None:
    """Refuse a network that computes something else than its trace, on random inputs."""
    if shape is None:
        return
    parameter = next(graph.parameters(), torch.zeros(()))
    random = torch.randn(_BATCH, *shape, generator=torch.Generator().manual_seed(0), dtype=parameter.dtype)
    try:
        with torch.no_grad():
            expected, found = (run(random.clone().to(parameter.device)).nan_to_num() for run in (root, graph))
    except Exception as error:
        raise InputError(f"{type(root).__name__}: cannot be called with one batch of inputs: {_said(error)}") from None
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    if not torch.allclose(expected, found, rtol=1e-4, atol=1e-5 * scale):
        raise InputError(f"{type(root).__name__}: computes something else than its layers in turn; rewrite its forward")


def check_in_place(graph: fx.GraphModule) -> None:
    """Refuse a step that overwrites numbers which a later step reads by another name: the graph knows their old values.

    Results of layers and functions that may only look at their input's memory count as other names of it.

    Raises:
        InputError: such a step.
    """
    nodes = list(graph.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    memory: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        name = str(node.target) if layer is not None else getattr(node.target, "__name__", str(node.target))
        dashed = node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")
        overwrites = bool(getattr(layer, "inplace", False) or node.kwargs.get("inplace") or node.target in IN_PLACE)
        overwrites = overwrites or dashed
        source = next((argument for argument in node.all_input_nodes if argument.op != "get_attr"), None)
        shares = overwrites or isinstance(layer, _VIEWS) or function_of(node) in SAME
        memory[node] = memory[source] if shares and source is not None else node
        if not overwrites or source is None:
            continue
        earlier = [other for other in nodes[: order[node]] if memory[other] is memory[node]]
        readers = [user for other in earlier for user in other.users if order[user] > order[node] and not is_size(user)]
        if readers:
            mend = "set inplace=False" if node.target not in IN_PLACE else "write x = x + y instead of x += y"
            mend = f"write {name[:-1]} instead of {name}" if dashed else mend
            name = name if layer is not None else node.name
            raise InputError(f"{name}: overwrites a value that {readers[0].name} reads later; {mend}")


def _check_unchanged(module: nn.Module, called: nn.Module) -> None:
    """Refuse a forward that changed what is stored in the copy that was called."""
    after = dict([*called.named_parameters(), *called.named_buffers()])
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not torch.equal(value, after[name]):
            raise InputError(
                f"{type(module).__name__}: its forward changes {name}, so no bound holds for the next call"
            )


def sample_shapes(graph: fx.GraphModule, shape: Shape | None) -> dict[fx.Node, Shape]:
    """The shape of one sample at every node, by running a few samples of zeros.

    Raises:
        InputError: images of this shape cannot be taken, or a result mixes the samples of a batch.
    """
    if shape is None:
        return {}
    parameter = next(graph.parameters(), torch.zeros(()))
    runner = _ShapeRunner(graph)
    try:
        with torch.no_grad():
            runner.run(torch.zeros(_BATCH, *shape, dtype=parameter.dtype, device=parameter.device))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the network does not take images of shape {shape}: {_said(error)}") from None
    return runner.shapes


class _ShapeRunner(fx.Interpreter):
    """Run a graph and note the shapes of its tensors, without the batch dimension."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder" or any(source in self.shapes for source in n.all_input_nodes):
            if not isinstance(result, Tensor):
                return result
            if result.ndim == 0 or result.shape[0] != _BATCH:
                name = str(n.target) if n.op == "call_module" else n.name
                raise InputError(f"{name}: mixes the samples of a batch: its result has shape {tuple(result.shape)}")
            self.shapes[n] = tuple(result.shape[1:])
        return result
