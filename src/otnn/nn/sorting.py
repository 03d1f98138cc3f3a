"""Sorting the groups of a dimension by a network of comparators, and carrying gradients through it.

A comparator orders two parts of a tensor by their maximum and minimum. Which of its pairs kept their order is one bit
each, and all that the gradient needs: it goes through the same exchanges backwards.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def sorting_network(size: int) -> tuple[tuple[int, int], ...]:
    """The comparators (i, j), i < j, that sort `size` numbers, in order: Batcher's merge exchange.

    Up to 8 numbers no network has fewer comparators (Batcher 1968; Knuth, The Art of Computer Programming, volume 3,
    section 5.2.2, algorithm M).

    Example:
        >>> sorting_network(2), len(sorting_network(8))
        (((0, 1),), 19)
    """
    comparators = []
    top = 1 << max(0, (size - 1).bit_length() - 1)
    p = top
    while p > 0 and size > 1:
        q, r, d = top, 0, p
        while True:
            comparators += [(i, i + d) for i in range(size - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return tuple(comparators)


@cache
def _exchanges(size: int, inverse: bool = False) -> tuple[tuple[int, int, bool, bool], ...]:
    """The comparators of a network, or backwards, each with whether it is the last one of its two parts."""
    comparators = sorting_network(size)[:: -1 if inverse else 1]
    last = {part: step for step, pair in enumerate(comparators) for part in pair}
    return tuple((i, j, last[i] == step, last[j] == step) for step, (i, j) in enumerate(comparators))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_exchanges(size: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """The comparators as a constant of a compiled graph, which does not look into the cache."""
    return _exchanges(size)


def sort_parts(inputs: Tensor, size: int, dim: int) -> Tensor:
    """Sort the groups {j, j + n / size, j + 2 n / size, ...} of a dimension of n, a multiple of `size`.

    The largest numbers of the groups fill the first n / size places, the next ones the following n / size, and so on.
    Differentiable any number of times, forwards and backwards, under `vmap`. Exported as maxima and minima; compiled by
    `torch.compile` as selections, whose gradient at a tie is that of the sort.
    """
    if torch.compiler.is_exporting():  # a graph for other runtimes, in operations that they know
        return torch.cat(_exchanged(inputs.chunk(size, dim), _exchanges(size), _ordered), dim)
    if torch.compiler.is_compiling():  # which knows no function with derivatives of its own, but fuses operations
        return torch.cat(_exchanged(inputs.chunk(size, dim), _constant_exchanges(size), _selected), dim)
    return _sort(inputs, size, dim)[0]


def _ordered(step: int, first: Tensor, second: Tensor, high: Tensor | None, low: Tensor | None) -> tuple[Tensor, ...]:
    return torch.maximum(first, second, out=high), torch.minimum(first, second, out=low)


def _selected(step: int, first: Tensor, second: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    kept = first >= second
    return torch.where(kept, first, second), torch.where(kept, second, first)


def _exchanged(
    parts: Iterable[Tensor],
    exchanges: Sequence[tuple[int, int, bool, bool]],
    exchange: Callable[[int, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, ...]],
    places: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Apply one exchange after another; the last ones of each part write into its place: no concatenation."""
    result = list(parts)
    for step, (i, j, ends, also) in enumerate(exchanges):
        high, low = places[i] if places and ends else None, places[j] if places and also else None
        result[i], result[j] = exchange(step, result[i], result[j], high, low)
    return result


def _shift(dim: int) -> int:
    """Where a dimension goes when a batch dimension is put in front."""
    return dim + 1 if dim >= 0 else dim


class _Sort(torch.autograd.Function):
    """Sorted groups, and for each comparator the mask of the pairs that kept their order."""

    @staticmethod
    def forward(inputs: Tensor, size: int, dim: int) -> tuple[Tensor, ...]:
        output = torch.empty_like(inputs)
        kept: list[Tensor] = []

        def exchange(step: int, first: Tensor, second: Tensor, *places: Tensor | None) -> tuple[Tensor, ...]:
            kept.append(first >= second)
            return _ordered(step, first, second, *places)

        _exchanged(inputs.chunk(size, dim), _exchanges(size), exchange, output.chunk(size, dim))
        return output, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.save_for_forward(*output[1:])
        ctx.size, ctx.dim = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        return _permute(gradient, ctx.size, ctx.dim, True, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return _permute(tangent, ctx.size, ctx.dim, False, *kept), *[None] * len(kept)

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, size: int, dim: int) -> tuple[Any, Any]:
        result = _sort(inputs.movedim(in_dims[0], 0), size, _shift(dim))
        return result, (0,) * len(result)


class _Permute(torch.autograd.Function):
    """The exchanges that a sort made, or their inverse: linear, and each is the adjoint of the other."""

    @staticmethod
    def forward(inputs: Tensor, size: int, dim: int, inverse: bool, *kept: Tensor) -> Tensor:
        output = torch.empty_like(inputs)
        masks = kept[::-1] if inverse else kept

        def exchange(step: int, first: Tensor, second: Tensor, *places: Tensor | None) -> tuple[Tensor, ...]:
            # lerp at the weights 0 and 1 is exact (but for gradients near 3e38), and three times faster than `where` on
            # strided parts; bytes become floating ten times faster than booleans do
            weight = masks[step].view(torch.uint8).to(first.dtype)
            high, low = places
            return torch.lerp(second, first, weight, out=high), torch.lerp(first, second, weight, out=low)

        _exchanged(inputs.chunk(size, dim), _exchanges(size, inverse), exchange, output.chunk(size, dim))
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.size, ctx.dim, ctx.inverse, *kept = inputs
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return _permute(gradient, ctx.size, ctx.dim, not ctx.inverse, *kept), *[None] * (3 + len(kept))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _permute(tangent, ctx.size, ctx.dim, ctx.inverse, *ctx.saved_tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, inputs: Tensor, size: int, dim: int, inverse: bool, *kept: Tensor
    ) -> tuple[Tensor, int]:
        batched, *masks = [
            x.unsqueeze(0).expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip((inputs, *kept), (in_dims[0], *in_dims[4:]), strict=True)
        ]
        return _permute(batched, size, _shift(dim), inverse, *masks), 0


# torch asks for the signature at every call, and making it takes as long as a small layer
for _function in (_Sort, _Permute):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]

_sort: Callable[[Tensor, int, int], tuple[Tensor, ...]] = _Sort.apply
_permute: Callable[..., Tensor] = _Permute.apply
