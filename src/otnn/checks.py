"""Checks of tensors where they enter: each raises `InputError` with what was expected, what came, and the mend."""

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from otnn.errors import InputError


def check_images(images: Tensor, *, box: bool = False, what: str = "inputs") -> None:
    """Refuse a batch that is empty, not floating point or not finite.

    Args:
        images: (batch, ...) floating-point tensor.
        box: also require values in [0, 1] pixels.
        what: the name that the message uses.

    Raises:
        InputError: where a value cannot be used.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"{what}: expected a tensor, got {type(images).__name__}; convert it with torch.as_tensor()")
    if images.ndim < 2:
        raise InputError(
            f"{what}: expected a batch (batch, ...), got shape {tuple(images.shape)}; add a batch dimension"
        )
    if images.shape[0] == 0:
        raise InputError(f"{what}: expected at least one sample, got an empty batch")
    if not images.is_floating_point():
        raise InputError(
            f"{what}: expected floating-point values in [0, 1], got {images.dtype}; divide 8-bit images by 255 first"
        )
    if images.numel() == 0:
        return
    low, high = torch.aminmax(images.detach())  # both NaN where a value is
    if not bool((low > -torch.inf) & (high < torch.inf)):
        bad = int((~torch.isfinite(images).flatten(1).all(dim=1)).nonzero()[0])
        raise InputError(f"{what}: sample {bad} holds NaN or infinite values; remove or repair it")
    if box and not bool((low >= 0) & (high <= 1)):
        raise InputError(
            f"{what}: expected values in [0, 1], got [{low:.4g}, {high:.4g}]; "
            "rescale the images (8-bit images are divided by 255) and leave a normalisation to the model"
        )


def check_labels(labels: Tensor, count: int, classes: int, *, what: str = "labels") -> None:
    """Refuse labels that are not `count` integers in 0..classes-1.

    Args:
        labels: (count,) integer tensor.
        count: the number of samples that the labels belong to.
        classes: the number of classes.
        what: the name that the message uses.

    Raises:
        InputError: where a label cannot be used.
    """
    if labels.shape != (count,):
        raise InputError(
            f"{what}: expected one per sample, shape ({count},), got {tuple(labels.shape)}; "
            "one-hot labels become integers with argmax(dim=1)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{what}: expected integers, got {labels.dtype}; convert them with .long()")
    if count and (labels.min() < 0 or labels.max() >= classes):
        raise InputError(f"{what}: expected integers in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")


def share(name: str, value: Any) -> float:
    """A number in [0, 1].

    Raises:
        InputError: expected a share in [0, 1].

    Example:
        >>> share("alpha", 0.25)
        0.25
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise InputError(f"{name}: expected a share in [0, 1], got {value!r}")
    return float(value)


def floating(dtype: torch.dtype | None) -> torch.dtype | None:
    """A type of parameters: real floating point, or None for torch's default.

    Raises:
        InputError: another type.

    Example:
        >>> floating(torch.int32)
        Traceback (most recent call last):
        otnn.errors.InputError: dtype: expected a floating-point type such as torch.float32, got torch.int32
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype: expected a floating-point type such as torch.float32, got {dtype}")
    return dtype


def whole(name: str, value: Any) -> int:
    """A whole number, of any type that stands for one exactly.

    Raises:
        InputError: expected a whole number.

    Example:
        >>> whole("in_channels", torch.tensor(3))
        3
        >>> whole("in_channels", 8.0)
        Traceback (most recent call last):
        otnn.errors.InputError: in_channels: expected a whole number, got 8.0
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name}: expected a whole number, got {value!r}") from None
