"""`otnn.convert`: trace a network, rewrite it, and tell what became of each of its layers."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from otnn import checks
from otnn.conversion.counterparts import has_rule
from otnn.conversion.notes import Change, check_hooks
from otnn.conversion.rewrite import WEIGHTED, Rewriter, attribute
from otnn.errors import InputError
from otnn.lipschitz.export import plain_kind, plain_structure
from otnn.lipschitz.graph import Tracer, check_in_place, checked_shape, sample_shapes, symbolic
from otnn.models import ACTIVATIONS, HEADS, Classifier


@dataclass(frozen=True)
class Conversion:
    """A converted network; its `str` is a table of the changes.

    Attributes:
        model: a `Classifier` where the network ends in a dense layer; a module of the same outputs otherwise.
        changes: every layer and operation that was replaced, scaled or removed, in the order of execution; then the
            layers that have no effect in `eval()` mode.
    """

    model: nn.Module
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        """One line for each change."""
        rows = [(change.name, change.was, f"-> {change.now}", change.why) for change in self.changes]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in rows]
        return "\n".join(lines) or "nothing to change"


def convert(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    *,
    constrained: bool = True,
    activation: str = "maxmin",
    head: str = "unit_rows",
    share: float = 0.2,
    multilabel: bool = False,
) -> Conversion:
    """Build the 1-Lipschitz counterpart of an ordinary network, with fresh weights.

    Layers, functions and methods become those of `otnn.nn` (`otnn.conversion.counterparts`); a sum of two branches
    becomes a learned convex mix; concatenations and averages are scaled to norm 1; a last dense layer becomes the head
    of a `Classifier`, and what follows it, probabilities or a squeeze, is left out. What has no counterpart raises.

    `otnn.lipschitz.bound` of the result, of its body where it is a `Classifier`, is 1 up to rounding in `eval()` mode,
    or less where the original multiplies by less than 1, which stays and is told. Train it like any network, on inputs
    in [0, 1], with `otnn.manifold.keep_on_manifold`. The original stays as it is; what it does in `eval()` mode is
    converted.

    Args:
        model: a network of torch layers, with a forward that `torch.fx` can trace.
        input_shape: of one sample, such as (3, 224, 224); a `Classifier` knows its own.
        constrained: False builds the same network of ordinary `Linear` and convolutions with torch's initial weights,
            to see what the constraint costs. Activations, pooling, mixes and centring are the same.
        activation: a name in `otnn.models.ACTIVATIONS`; `Abs` where its groups do not divide the channels.
        head: a name in `otnn.models.HEADS`.
        share: in [0, 1], of the branch in each convex mix at the start; the branch is the path with more layers.
        multilabel: every output is a label of its own.

    Raises:
        InputError: a layer or an operation without a counterpart, with its name; a layer with a forward hook; a forward
            that cannot be traced, or of several inputs; weights of half precision; settings that are not known.

    Example:
        >>> from otnn.lipschitz import bound
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
        >>> conversion = convert(network, (1, 8, 8))
        >>> print(conversion)
        1  Linear       -> OrthoLinear
        2  BatchNorm1d  -> BatchCentering
        3  ReLU         -> MaxMin
        4  Linear       -> UnitNormLinear  head
        >>> bound(conversion.model.eval().body).constant < 1.0001
        True
    """
    _check_settings(model, activation, head, share)
    shape = checked_shape(getattr(model, "input_shape", None) if input_shape is None else input_shape)
    if shape is None:
        raise InputError("input_shape: expected the sizes of one sample such as (3, 224, 224), got none")
    original = _copied(model).eval()
    tracer = _Tracer()
    if tracer.is_leaf_module(original, ""):
        original = nn.Sequential(original)
    check_hooks(original)
    traced = symbolic(original, tracer)
    inputs = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise InputError(
            f"expected a network of one input, got {', '.join(inputs) or 'none'}; wrap it in a module of one input"
        )
    check_in_place(traced)
    rewriter = Rewriter(traced, sample_shapes(traced, shape), activation=activation, head=head, share=share)
    body: nn.Module = _module(rewriter.run(), "body." if isinstance(model, Classifier) else "")
    result = body
    if rewriter.head is not None:
        multilabel = multilabel or bool(getattr(model, "multilabel", False))
        result = Classifier(body, rewriter.head, shape, multilabel=multilabel)
    changes = [*rewriter.changes, *_unused(original, traced, tracer, constrained)]
    if not constrained:
        result = plain_structure(result)
        for layer in result.modules():
            if isinstance(layer, WEIGHTED):
                layer.reset_parameters()
        changes = [replace(change, now=plain_kind(change.now)) for change in changes]
    changes = [change for change in changes if change.was != change.now or change.why]
    return Conversion(result.train(model.training), tuple(dict.fromkeys(changes)))


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the network, which torch refuses where it holds a tensor with a gradient function."""
    for path, module in model.named_modules():
        for name, value in (*vars(module).items(), *module.named_buffers(recurse=False)):
            if isinstance(value, Tensor) and not value.is_leaf:
                raise InputError(
                    f"{path or type(module).__name__}: its {name} is computed from other tensors, so that the network "
                    "cannot be copied; set it to None, or, where weight_norm, spectral_norm or pruning made it, call "
                    "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
                )
    return copy.deepcopy(model)


class _Tracer(Tracer):
    """Stops at layers that have a counterpart, too, unless they hold others; notes which modules were called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if has_rule(m) and not type(m).__module__.startswith("torch."):
            return not any(True for _ in m.children())  # such as a normalisation that holds its activation
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.called.add(self.path_of_module(m))
        return super().call_module(m, forward, args, kwargs)


def _module(whole: fx.GraphModule, prefix: str) -> nn.Module:
    """The network without a prefix of its names: a `Sequential` where it is a chain of layers."""
    nodes = list(whole.graph.nodes)
    chain = nodes[1:-1]
    in_turn = all(node.op == "call_module" and node.args == (last,) for last, node in zip(nodes, chain, strict=False))
    names = [str(node.target).removeprefix(prefix).replace(".", "_") for node in chain]
    if in_turn and len(set(names)) == len(names) and not any(hasattr(nn.Sequential, name) for name in names):
        layers = [whole.get_submodule(str(node.target)) for node in chain]
        return nn.Sequential(OrderedDict(zip(names, layers, strict=True)))
    parts = {}
    for node in nodes:
        if node.op in ("call_module", "get_attr"):
            name = str(node.target).removeprefix(prefix)
            parts[name] = attribute(whole, str(node.target))
            node.target = name
    return fx.GraphModule(parts, whole.graph)


def _unused(original: nn.Module, traced: fx.GraphModule, tracer: _Tracer, constrained: bool) -> Iterator[Change]:
    """The layers of which no operation is left in the trace."""
    traces = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    for node in traced.graph.nodes:
        traces |= {name for name, _ in node.meta.get("nn_module_stack", {}).values()}
    for name, layer in original.named_modules():
        container = isinstance(layer, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        if name and name not in traces and not container and not any(True for _ in layer.children()):
            owner, inside, _ = f".{name}".rpartition(".parametrizations.")
            if inside and owner[1:] in traces:
                why = "the constraint of the new layer replaces it" if constrained else "the new layer is free"
            else:
                why = "does nothing in eval mode" if name in tracer.called else "never called in eval mode"
            yield Change(name, type(layer).__name__, "removed", why)


def _check_settings(model: nn.Module, activation: str, head: str, share: float) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for setting, name, known in (("activation", activation, ACTIVATIONS), ("head", head, HEADS)):
        if name not in known:
            raise InputError(f"{setting}: expected one of {', '.join(known)}, got {name!r}")
    checks.share("share", share)
    for inner, kind in (("_orig_mod", "a compiled network"), ("module", "a wrapper of one")):
        if type(model).__module__.startswith("torch.") and isinstance(getattr(model, inner, None), nn.Module):
            raise InputError(f"expected the network itself, got {type(model).__name__}, {kind}; pass its .{inner}")
    for name, value in model.named_parameters():
        if isinstance(value, nn.UninitializedParameter):
            raise InputError(f"{name} has no shape yet; call the network once on a batch")
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name} is {value.dtype}: expected float32 or float64; convert it with model.float()")
