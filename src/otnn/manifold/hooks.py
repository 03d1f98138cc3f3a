"""What an optimizer's step needs beside torch: projected gradients before it, retracted parameters after it."""

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from otnn.errors import InputError
from otnn.manifold.kinds import Manifold, Stiefel, wide_batch
from otnn.polar import to_polar_


def constrained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Manifold]]:
    """Yield (name, parameter, manifold) of each constrained parameter of a module and its children.

    Raises:
        InputError: something else has taken the place of a parameter.
    """
    for prefix, child in module.named_modules():
        manifolds: dict[str, Manifold] = getattr(child, "manifolds", {})
        for name, manifold in manifolds.items():
            path = f"{prefix}.{name}" if prefix else name
            try:
                parameter = child.get_parameter(name)
            except AttributeError:
                raise InputError(
                    f"{path}: expected a parameter of {type(child).__name__}; a parametrization or pruning took its "
                    "place: remove it, the layer keeps its own constraint"
                ) from None
            yield path, parameter, manifold


@torch.no_grad()
def retract_parameters(module: nn.Module, *, frozen: bool = True) -> None:
    """Bring every constrained parameter of a module back to its manifold, in place.

    Matrices of one shape, whichever way they lie, are retracted in one batch.

    Args:
        module: with layers of `otnn.nn`, or losses.
        frozen: also those that require no gradient and have none.

    Raises:
        FloatingPointError: a parameter holds NaN or infinite values; the message names it.
    """
    for kind, members in _alike(each for each in constrained_parameters(module) if frozen or _trained(each[1])):
        try:
            if kind is Stiefel:
                parts = [wide_batch(parameter) for _, parameter, _ in members]
                together = torch.cat(parts) if len(parts) > 1 else parts[0]
                to_polar_(together)
                _copy_parts(together, parts)
            else:
                for _, parameter, manifold in members:
                    parameter.copy_(manifold.retract(parameter))
        except FloatingPointError as error:
            bad = _not_finite({name: parameter for name, parameter, _ in members})
            raise FloatingPointError(f"{_listed(bad or [name for name, _, _ in members])}: {error}") from error


@torch.no_grad()
def project_gradients(module: nn.Module, *, only: Container[nn.Parameter] | None = None) -> None:
    """Take out of the gradients of constrained parameters what points off their manifolds, in place.

    Adam divides every gradient by its running size: a part that the retraction undoes would only make the rest smaller.

    Args:
        module: with layers of `otnn.nn`, or losses, its parameters on their manifolds.
        only: of these parameters; those without a gradient, and with a sparse one, are left alone.

    Example:
        >>> from otnn.nn import OrthoLinear
        >>> layer = OrthoLinear(3, 3)
        >>> (layer.weight**2).sum().backward()  # the same for all orthogonal matrices
        >>> project_gradients(layer)
        >>> bool(layer.weight.grad.abs().max() < 1e-6)
        True
    """
    chosen = (
        (name, parameter, manifold)
        for name, parameter, manifold in constrained_parameters(module)
        if parameter.grad is not None and not parameter.grad.is_sparse and (only is None or parameter in only)
    )
    for kind, members in _alike(chosen):
        if kind is Stiefel and len(members) > 1:
            points = torch.cat([wide_batch(parameter) for _, parameter, _ in members])
            parts = [wide_batch(parameter.grad) for _, parameter, _ in members if parameter.grad is not None]
            gradients = torch.cat(parts)
            Stiefel().project_(points, gradients)
            _copy_parts(gradients, parts)
            continue
        for _, parameter, manifold in members:
            if parameter.grad is not None:
                manifold.project_(parameter, parameter.grad)


def keep_on_manifold(optimizer: Optimizer, *modules: nn.Module) -> "ManifoldHooks":
    """Keep the constrained parameters of `modules` on their manifolds in every step of `optimizer`, of any kind.

    Before the step their gradients are projected onto the manifolds, in place (`project_gradients`); after it the
    parameters are retracted. Momentum and running sizes, as of Adam, are then those of Riemannian gradients (Bécigneul
    and Ganea 2019). Gradients that a closure computes within the step, as for L-BFGS, are not projected.

    A step that would leave a NaN or infinite parameter raises FloatingPointError, which names it, and the last good
    state stays. An infinite gradient is found before the step: neither parameters nor the optimizer's state change.
    A parameter that became infinite in the step, or a retraction that fails, takes all parameters of `modules` back to
    where they were; the optimizer's state is then that of the failed step. Infinite gradients of a closure are seen by
    their effect only. Parameters that require no gradient, and have none left from before, are left alone.

    Args:
        optimizer: any `torch.optim` optimizer.
        modules: networks, and losses with learned margins.

    Returns:
        The hooks, whose `remove()` ends it.

    Raises:
        InputError: no optimizer first, then modules.

    Example:
        >>> from otnn.nn import OrthoLinear
        >>> layer = OrthoLinear(4, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1e6)
        >>> hooks = keep_on_manifold(optimizer, layer)
        >>> layer(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(Stiefel().distance(layer.weight) < 1e-5)
        True
        >>> _ = layer.weight.grad.fill_(torch.nan)
        >>> optimizer.step()
        Traceback (most recent call last):
        FloatingPointError: weight got a NaN or infinite gradient, so the step was not taken; ...
    """
    return ManifoldHooks(optimizer, modules)


class ManifoldHooks:
    """What `keep_on_manifold` does before and after each step, until `remove()`.

    Args:
        optimizer: the optimizer whose steps are watched.
        modules: those whose parameters are kept finite and on their manifolds.
    """

    def __init__(self, optimizer: Optimizer, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(modules)
        if not isinstance(optimizer, Optimizer):
            raise InputError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        wrong = [type(module).__name__ for module in self._modules if not isinstance(module, nn.Module)]
        if wrong or not self._modules:
            raise InputError(
                "modules: expected the networks, and losses with learned margins, that the optimizer trains: "
                f"keep_on_manifold(optimizer, model); got {', '.join(wrong) or 'none'}"
            )
        self._named: dict[str, nn.Parameter] = {}
        self._last_good: dict[nn.Parameter, Tensor] = {}
        self._handles = (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))

    def remove(self) -> None:
        """Leave the optimizer's steps alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._named.clear()
        self._last_good.clear()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._named = parameters = self._parameters()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:  # it computes the gradients within the step
            stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None and p in stepped}
            # a fused step of GradScaler skips infinite ones itself
            if not hasattr(optimizer, "found_inf") and (bad := _not_finite(gradients)):
                raise FloatingPointError(
                    f"{_listed(bad)} got a NaN or infinite gradient, so the step was not taken; "
                    "check the batch, or lower the learning rate"
                )
            for module in self._modules:
                project_gradients(module, only=stepped)
        self._last_good = {p: self._copy(p) for p in parameters.values()}

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        try:
            if bad := _not_finite(self._named):
                raise FloatingPointError(
                    f"{_listed(bad)} became NaN or infinite in the step, which was undone; lower the learning rate"
                )
            for module in self._modules:
                retract_parameters(module, frozen=False)
        except BaseException:  # an interrupt, too, must not leave half of the parameters retracted
            for parameter, good in self._last_good.items():
                parameter.copy_(good)
            raise

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that may be stepped; a name that occurs in several modules tells which one it is from."""
        named = [(k, *each) for k, module in enumerate(self._modules) for each in module.named_parameters()]
        found = [each for each in named if _trained(each[2])]
        times = Counter(name for _, name, _ in found)
        return {name if times[name] == 1 else f"modules[{k}].{name}": parameter for k, name, parameter in found}

    def _copy(self, p: nn.Parameter) -> Tensor:
        """The values of a parameter, in the memory of its last copy if it fits: new memory every step is slower."""
        copy = self._last_good.get(p)
        if copy is None or (copy.shape, copy.dtype, copy.device) != (p.shape, p.dtype, p.device):
            return p.clone()
        return copy.copy_(p)


def _trained(parameter: nn.Parameter) -> bool:
    """Whether an optimizer may step it: a gradient that is left from before counts, whatever is required now."""
    return parameter.requires_grad or parameter.grad is not None


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinite values."""
    values = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors.values()]
    norms = [torch.linalg.vector_norm(value) for value in values]
    # one pass over each, and one answer to wait for; a norm may also overflow where all values are finite
    if not norms or math.isfinite(float(torch.stack([norm.to(norms[0].device) for norm in norms]).sum())):
        return []
    return [name for name, value in zip(tensors, values, strict=True) if not torch.isfinite(value).all()]


def _listed(names: Sequence[str]) -> str:
    """The first names; where one value is NaN, most of them soon are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _alike(
    parameters: Iterable[tuple[str, nn.Parameter, Manifold]],
) -> Iterator[tuple[type[Manifold], list[tuple[str, nn.Parameter, Manifold]]]]:
    """Constrained parameters by kind, shape, dtype and device; of Stiefel's, wide and tall ones together."""
    groups: dict[Any, list[tuple[str, nn.Parameter, Manifold]]] = defaultdict(list)
    for name, parameter, manifold in parameters:
        shape = tuple(parameter.shape)
        if isinstance(manifold, Stiefel):
            shape = tuple(sorted(shape[-2:]))
        groups[type(manifold), shape, parameter.dtype, parameter.device].append((name, parameter, manifold))
    for (kind, *_), members in groups.items():
        yield kind, members


def _copy_parts(together: Tensor, batches: Sequence[Tensor]) -> None:
    """Write a batch that was put together into its parts; where there is one only, it was never copied."""
    if len(batches) > 1:
        for target, result in zip(batches, together.split([len(batch) for batch in batches]), strict=True):
            target.copy_(result)
