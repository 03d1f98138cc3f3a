"""Activations that keep the norm of the gradient."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from otnn.errors import InputError


def maxmin(inputs: Tensor, dim: int = 1) -> Tensor:
    """Sort the pairs (i, i + n/2) of a dimension: maxima fill its first half, minima its second.

    GroupSort with groups of two (Anil, Lucas and Grosse 2019): it permutes coordinates, so its Jacobian is a
    permutation, the norm of every gradient is kept, and the Lipschitz constant is 1. At a tie the first is the maximum.

    Args:
        inputs: any tensor whose size n along `dim` is even.
        dim: the dimension that is paired.

    Raises:
        InputError: an odd number of channels.

    Example:
        >>> maxmin(torch.tensor([[1.0, 5.0, 3.0, 4.0]]))
        tensor([[3., 5., 1., 4.]])
    """
    if inputs.shape[dim] % 2:
        raise InputError(f"MaxMin sorts pairs: expected an even size along dimension {dim}, got {inputs.shape[dim]}")
    if torch.compiler.is_exporting():  # a graph for other runtimes, in operations that they know
        first, second = inputs.chunk(2, dim)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim)
    return _differentiable_maxmin(inputs, dim)[0]


class MaxMin(nn.Module):
    """`maxmin` as a module.

    Args:
        dim: the dimension that is paired; 1 is the channels of images and the features of rows.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sorted pairs, in the shape of the inputs."""
        return maxmin(inputs, self.dim)


def _sort_pairs(inputs: Tensor, dim: int) -> Tensor:
    """Both halves written straight into one output: no concatenation."""
    first, second = inputs.chunk(2, dim)
    output = torch.empty_like(inputs)
    high, low = output.chunk(2, dim)
    torch.maximum(first, second, out=high)
    torch.minimum(first, second, out=low)
    return output


def _shift(dim: int) -> int:
    """Where a dimension goes when a batch dimension is put in front."""
    return dim + 1 if dim >= 0 else dim


class _MaxMin(torch.autograd.Function):
    """Sorted pairs, and the mask of the pairs that kept their order: all that the gradient needs."""

    @staticmethod
    def forward(inputs: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, second = inputs.chunk(2, dim)
        return _sort_pairs(inputs, dim), first >= second

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _swap(gradient, kept, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _swap(tangent, kept, ctx.dim), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, dim: int) -> tuple[Any, Any]:
        return _differentiable_maxmin(inputs.movedim(in_dims[0], 0), _shift(dim)), (0, 0)


class _Swap(torch.autograd.Function):
    """Exchange the halves where a pair was turned round: linear, its own inverse and its own adjoint."""

    @staticmethod
    def forward(inputs: Tensor, kept: Tensor, dim: int) -> Tensor:
        first, second = inputs.chunk(2, dim)
        output = torch.empty_like(inputs)
        high, low = output.chunk(2, dim)
        # lerp at the weights 0 and 1 is exact, and five times faster than `where` on strided halves
        weight = kept.to(inputs.dtype)
        torch.lerp(second, first, weight, out=high)
        torch.lerp(first, second, weight, out=low)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.dim = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _swap(gradient, kept, ctx.dim), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (kept,) = ctx.saved_tensors
        return _swap(tangent, kept, ctx.dim)

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, kept: Tensor, dim: int) -> tuple[Tensor, int]:
        batched = [
            x.unsqueeze(0).expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip((inputs, kept), in_dims, strict=False)
        ]
        return _swap(*batched, _shift(dim)), 0


# torch asks for the signature at every call, and making it takes as long as a small layer
for _function in (_MaxMin, _Swap):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]

_differentiable_maxmin: Callable[[Tensor, int], tuple[Tensor, Tensor]] = _MaxMin.apply
_swap: Callable[..., Tensor] = _Swap.apply
