"""What stays in full precision where `torch.autocast` computes in half: kernels, retractions and losses."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Object = TypeVar("Object")


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on the device of a tensor keep the precision of their inputs.

    Example:
        >>> ones = torch.ones(1, 1)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     inside = (ones @ ones).dtype
        ...     with without_autocast(ones):
        ...         print(inside, (ones @ ones).dtype)
        torch.bfloat16 torch.float32
    """
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def in_full_precision(method: Callable[[Object, Tensor], Tensor]) -> Callable[[Object, Tensor], Tensor]:
    """Let a method of one tensor compute without autocast."""

    @wraps(method)
    def computed(self: Object, tensor: Tensor) -> Tensor:
        with without_autocast(tensor):
            return method(self, tensor)

    return computed


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor of half precision in float32, any other as it is.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype, at_least_float32(torch.ones(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
