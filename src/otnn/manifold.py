"""Manifolds on which weights live, and the hooks that bring them back after each optimizer step.

A manifold is three functions of a batch of points: `sample`, `retract` and `distance`. A module names the manifold
of each constrained parameter in its attribute `manifolds`; `keep_on_manifold(optimizer, module)` does the rest.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from otnn.errors import InputError
from otnn.polar import gram_excess, to_polar_
from otnn.precision import in_full_precision


class Manifold(Protocol):
    """A set of parameters with a way back to it."""

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw a random point of the given shape."""
        ...

    def retract(self, point: Tensor) -> Tensor:
        """Bring a finite tensor (..., rows, columns) back to the manifold; a point on it is left as it is."""
        ...

    def distance(self, point: Tensor) -> Tensor:
        """Tell how far each point is from the manifold: (...,), 0 on it."""
        ...


class Stiefel:
    """Matrices whose short side is orthonormal: {X : X X^T = I} if wide, {X : X^T X = I} if tall.

    Distances are Frobenius norms of the Gram matrix minus the identity.

    Example:
        >>> stiefel = Stiefel()
        >>> weight = stiefel.sample(3, 5, generator=torch.Generator().manual_seed(0))
        >>> bool(stiefel.distance(weight) < 1e-6)
        True
        >>> bool(stiefel.distance(stiefel.retract(weight + 0.3)) < 1e-6)
        True
    """

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw from the uniform (Haar) law: the orthogonal factor of a Gaussian matrix with the signs fixed."""
        *batch, rows, columns = shape
        gaussian = torch.randn(*batch, max(rows, columns), min(rows, columns), generator=generator).double()
        q, r = torch.linalg.qr(gaussian)
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        tall: Tensor = (q * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)).to(dtype or torch.get_default_dtype())
        return tall if rows >= columns else tall.mT.contiguous()

    def retract(self, point: Tensor) -> Tensor:
        """Return the polar factor of each matrix, to the accuracy of its dtype (see `otnn.polar.to_polar_`).

        Args:
            point: (..., rows, columns), finite.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        point = point.detach().clone()
        to_polar_(_wide(point))
        return point

    @in_full_precision
    def distance(self, point: Tensor) -> Tensor:
        """Return ||G - I||_F of each matrix, G the Gram matrix of the short side."""
        distance: Tensor = torch.linalg.matrix_norm(gram_excess(_wide(point)))
        return distance


class UnitRows:
    """Matrices whose rows have Euclidean norm 1 (the oblique manifold).

    Example:
        >>> UnitRows().retract(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw each row uniformly on the sphere."""
        return self.retract(torch.randn(*shape, generator=generator, dtype=dtype))

    def retract(self, point: Tensor) -> Tensor:
        """Divide each row by its norm; a row of zeros becomes the constant row.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        scale = point.abs().amax(dim=-1, keepdim=True)
        if not torch.isfinite(scale).all():
            raise FloatingPointError("a value is NaN or infinite")
        scaled = torch.where(scale > 0, point / torch.where(scale > 0, scale, 1.0), 1.0)
        unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        return unit

    def distance(self, point: Tensor) -> Tensor:
        """Return the largest | ||row|| - 1 | of each matrix."""
        distance: Tensor = (torch.linalg.vector_norm(point, dim=-1) - 1).abs().amax(dim=-1)
        return distance


class Frobenius:
    """Matrices of Frobenius norm 1: the sphere of all their entries.

    Example:
        >>> Frobenius().retract(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor([[0.6000, 0.0000],
                [0.0000, 0.8000]])
    """

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw each matrix uniformly on the sphere."""
        return self.retract(torch.randn(*shape, generator=generator, dtype=dtype))

    def retract(self, point: Tensor) -> Tensor:
        """Divide each matrix by its norm; a matrix of zeros becomes the constant one.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        return UnitRows().retract(point.flatten(-2)).view_as(point)

    def distance(self, point: Tensor) -> Tensor:
        """Return | ||X||_F - 1 | of each matrix."""
        distance: Tensor = (torch.linalg.matrix_norm(point) - 1).abs()
        return distance


class NonNegative:
    """Numbers >= 0, such as a learned margin."""

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw uniformly from [0, 1)."""
        return torch.rand(*shape, generator=generator, dtype=dtype)

    def retract(self, point: Tensor) -> Tensor:
        """Replace negative numbers by 0.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        if not torch.isfinite(point).all():
            raise FloatingPointError("a value is NaN or infinite")
        return point.clamp(min=0)

    def distance(self, point: Tensor) -> Tensor:
        """Return how far below 0 each number is."""
        return (-point).clamp(min=0)


class UnitInterval:
    """Numbers in [0, 1], such as a learned share."""

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw uniformly from [0, 1)."""
        return torch.rand(shape, generator=generator, dtype=dtype)

    def retract(self, point: Tensor) -> Tensor:
        """Replace numbers outside of [0, 1] by the nearer end.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        if not torch.isfinite(point).all():
            raise FloatingPointError("a value is NaN or infinite")
        return point.clamp(min=0, max=1)

    def distance(self, point: Tensor) -> Tensor:
        """Return how far outside of [0, 1] each number is."""
        return torch.maximum(-point, point - 1).clamp(min=0)


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
    groups: dict[Any, list[tuple[str, nn.Parameter, Manifold]]] = defaultdict(list)
    for name, parameter, manifold in constrained_parameters(module):
        if not (frozen or _trained(parameter)):
            continue
        shape = tuple(parameter.shape)
        if isinstance(manifold, Stiefel):
            shape = tuple(sorted(shape[-2:]))
        groups[type(manifold), shape, parameter.dtype, parameter.device].append((name, parameter, manifold))
    for (kind, *_), members in groups.items():
        try:
            if kind is Stiefel:
                flat = [_wide(p.view(p.shape[:-2].numel(), *p.shape[-2:])) for _, p, _ in members]
                if len(flat) == 1:
                    to_polar_(flat[0])
                else:
                    retracted = torch.cat(flat)
                    to_polar_(retracted)
                    for target, result in zip(flat, retracted.split([len(f) for f in flat]), strict=True):
                        target.copy_(result)
            else:
                for _, parameter, manifold in members:
                    parameter.copy_(manifold.retract(parameter))
        except FloatingPointError as error:
            bad = _not_finite({name: parameter for name, parameter, _ in members})
            raise FloatingPointError(f"{_listed(bad or [name for name, _, _ in members])}: {error}") from error


def keep_on_manifold(optimizer: Optimizer, *modules: nn.Module) -> "ManifoldHooks":
    """Retract the constrained parameters of `modules` after every step of `optimizer`, of any kind.

    A step that would leave a NaN or infinite parameter raises FloatingPointError, which names it, and the last good
    state stays. An infinite gradient is found before the step: neither parameters nor the optimizer's state change.
    A parameter that became infinite in the step, or a retraction that fails, takes all parameters of `modules` back to
    where they were; the optimizer's state is then that of the failed step. Gradients that a closure computes, as for
    L-BFGS, are seen by their effect only. Parameters that require no gradient, and
    have none left from before, are left alone.

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
        # A closure computes the gradients within the step, and a fused step of GradScaler skips infinite ones itself.
        if closure is None and not hasattr(optimizer, "found_inf"):
            stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None and p in stepped}
            if bad := _not_finite(gradients):
                raise FloatingPointError(
                    f"{_listed(bad)} got a NaN or infinite gradient, so the step was not taken; "
                    "check the batch, or lower the learning rate"
                )
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


def _wide(point: Tensor) -> Tensor:
    """Matrices with their short side first, in the same memory."""
    return point if point.shape[-2] <= point.shape[-1] else point.mT
