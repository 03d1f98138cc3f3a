"""How many samples one pass of a model may hold, within a budget of bytes, and whether freed memory is kept."""

import ctypes
import os
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from otnn.errors import InputError

MEMORY_BUDGET = 2**30
# A CPU is fastest while a chunk stays near its cache, though not on a few copies: on convolutions, chunks of 100 MiB
# take twice the time of chunks of 14 MiB
_CACHE, _FEW = 2**24, 32
_MOST = 2**16


def chunk_size(sample: Tensor, memory_budget: float, model: nn.Module | None = None, *, gradient: bool = False) -> int:
    """How many perturbed copies of a sample one forward may hold.

    A copy costs itself, its mask and its filling, and the most that the activations of the model take at any moment:
    this is measured once, on batches of one and of two, so that weights, which do not grow with the batch, are not
    counted. Scratch space inside an operation is not seen. On a CPU the number is also kept to what is fastest: 16 MiB
    a thread, or 32 copies where that is more.

    Args:
        sample: (1, ...) one sample.
        memory_budget: bytes.
        model: whose activations count; without it, only the copies do.
        gradient: also count what a backward to the input keeps.

    Returns:
        At least 1.

    Raises:
        InputError: the budget does not hold one copy; the text says what it would need.

    Example:
        >>> chunk_size(torch.rand(1, 1, 8, 8), 7680)
        10
    """
    copies = 3 * sample[:1].numel() * sample.element_size()
    each = copies + (0 if model is None else _activation_bytes(model, sample[:1], gradient))
    if not memory_budget >= each:
        raise InputError(
            f"memory_budget: expected at least {each} bytes, which one perturbed sample needs, got {memory_budget:g}; "
            "raise it"
        )
    most = int(min(memory_budget / each, _MOST))
    if sample.device.type != "cpu":
        return most
    return min(most, max(_FEW, _CACHE * torch.get_num_threads() // each))


# Numbers of glibc's malloc.h: from what size on an allocation is a mapping of its own, and how many free bytes at the
# end of the heap are given back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next pass.

    By default glibc gives large tensors back to the system as soon as they are freed, and every training step on a CPU
    faults in all of its activations anew: a step of 152 ms takes 128 without that (docs/performance.md). Up to 2 GiB
    are kept, and allocations above 1 GiB (32 MiB before glibc 2.35) are given back as before. Numbers do not change.

    Returns:
        Whether it was done: not with another C library than glibc, nor where the environment sets how memory is
        allocated (`MALLOC_...`, `GLIBC_TUNABLES`, `LD_PRELOAD`).

    Example:
        >>> kept = keep_freed_memory()
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")]
    if sys.platform != "linux" or chosen:
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    # before version 2.35 glibc takes at most 32 MiB, above which every tensor stays a mapping of its own
    large = any(set_option(_M_MMAP_THRESHOLD, size) for size in (2**30, 2**25))
    return large and bool(set_option(_M_TRIM_THRESHOLD, 2**31 - 1))


class _Live(TorchFunctionMode):
    """Follows the bytes of the tensors that the operations of a forward have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.known: set[int] = set()
        self.curve: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(output, Tensor):
                storage = output.untyped_storage()
                if id(storage) not in self.known:
                    self.known.add(id(storage))
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._release, id(storage), storage.nbytes())
        self.curve.append(self.bytes)
        return outputs

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


# Bytes of one pass of a model, by the shape, dtype and device of a sample, and by whether gradients are kept
_MEASURED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], int]] = weakref.WeakKeyDictionary()


def _activation_bytes(model: nn.Module, sample: Tensor, gradient: bool) -> int:
    """The most bytes alive at one moment of a pass, per sample; measured once for a model and a kind of sample."""
    known = _MEASURED.setdefault(model, {})
    key = (tuple(sample.shape), sample.dtype, sample.device, gradient)
    if key not in known:
        one, two = (_curve(model, sample, count, gradient) for count in (1, 2))
        if len(one) != len(two):  # the operations depend on the size of the batch: leave nothing out
            one = [0] * len(two)
        growth = [b - a for a, b in zip(one, two, strict=True)]
        known[key] = max(growth, default=0)
        if gradient:  # a backward holds the gradients on both sides of a layer, at most as large as all it keeps
            known[key] *= 2
    return known[key]


def _curve(model: nn.Module, sample: Tensor, count: int, gradient: bool) -> list[int]:
    inputs = sample.detach().repeat(count, *[1] * (sample.ndim - 1)).requires_grad_(gradient)
    with torch.set_grad_enabled(gradient), _Live() as live:
        model(inputs)
        curve: list[int] = live.curve
    return curve
