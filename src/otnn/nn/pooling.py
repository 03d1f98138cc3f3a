"""Pooling whose Lipschitz constant is exactly 1: disjoint windows, reduced by a map of norm 1 each."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.checks import whole
from otnn.errors import InputError
from otnn.precision import at_least_float32

Sizes = int | Sequence[int]


class _WindowPool2d(nn.Module):
    """Windows of one size side by side; what lies beyond the last whole one is left out, as in torch."""

    def __init__(self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0) -> None:
        super().__init__()
        self.kernel_size = _pair("kernel_size", kernel_size)
        if stride is not None and _pair("stride", stride) != self.kernel_size:
            raise InputError(
                f"stride: expected the kernel size {self.kernel_size}, got {stride}: windows that overlap or skip "
                "pixels are not orthogonal; leave it out, or take the layer of torch, whose bound is counted too"
            )
        if _pair("padding", padding, least=0) != (0, 0):
            raise InputError(f"padding: expected 0, got {padding}; pad by torch.nn.ZeroPad2d before, whose norm is 1")

    def _check(self, inputs: Tensor) -> None:
        _check_images(inputs, self.kernel_size)

    def extra_repr(self) -> str:
        """Tell the window."""
        return f"kernel_size={self.kernel_size}"


class ScaledAvgPool2d(_WindowPool2d):
    """Average over disjoint windows, times the root of their size: a projection onto what is constant in each window.

    The average of k x k numbers has the norm 1 / k, so times k it has norm 1, and every singular value is 1. Pixels
    beyond the last whole window are left out, as in `torch.nn.AvgPool2d`.

    Shapes: (batch, channels, height, width) to (batch, channels, height // k, width // k).

    Args:
        kernel_size: k >= 1, or one for each direction.
        stride: the kernel size; there for the order of torch's arguments.
        padding: 0; likewise.

    Raises:
        InputError: windows that overlap, skip or pad pixels.

    Example:
        >>> ScaledAvgPool2d(2)(torch.ones(1, 1, 4, 4))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scaled averages.

        Raises:
            InputError: no batch of images, or images smaller than one window.
        """
        self._check(inputs)
        return F.avg_pool2d(inputs, self.kernel_size) * math.sqrt(math.prod(self.kernel_size))


class L2NormPool2d(_WindowPool2d):
    """Euclidean norm over disjoint windows: 1-Lipschitz, and the gradient of each output has norm 1.

    At a window of zeros, where the norm has no gradient, all derivatives are 0.

    Shapes: (batch, channels, height, width) to (batch, channels, height // k, width // k).

    Args:
        kernel_size: k >= 1, or one for each direction.
        stride: the kernel size; there for the order of torch's arguments.
        padding: 0; likewise.

    Raises:
        InputError: windows that overlap, skip or pad pixels.

    Example:
        >>> L2NormPool2d((1, 2))(torch.tensor([[[[3.0, -4.0, 0.0, 0.0]]]]))
        tensor([[[[5., 0.]]]])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the norms.

        Raises:
            InputError: no batch of images, or images smaller than one window.
        """
        self._check(inputs)
        (height, width), (rows, columns) = self.kernel_size, inputs.shape[2:]
        whole = inputs[:, :, : rows // height * height, : columns // width * width]
        return _norms(whole.unflatten(3, (-1, width)).unflatten(2, (-1, height)))


class _AdaptivePool2d(nn.Module):
    """Disjoint windows, as equal as can be, that cover the image: so many along each direction."""

    def __init__(self, output_size: int | Sequence[int | None] | None) -> None:
        super().__init__()
        both = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
        sizes = [size if size is None else whole("output_size", size) for size in both]
        if len(sizes) != 2 or any(size is not None and size < 1 for size in sizes):
            raise InputError(f"output_size: expected one or two numbers >= 1, or None to keep, got {output_size}")
        self.output_size = (sizes[0], sizes[1])

    def _windows(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The windows (batch, channels, rows, height, columns, width), padded with zeros, and their sizes."""
        _check_images(inputs, tuple(size or 1 for size in self.output_size))
        windows, widths = _split(inputs, 3, self.output_size[1])
        windows, heights = _split(windows, 2, self.output_size[0])
        return windows, heights.unsqueeze(1) * widths

    def extra_repr(self) -> str:
        """Tell the size of the output."""
        return f"output_size={self.output_size}"


class ScaledAdaptiveAvgPool2d(_AdaptivePool2d):
    """`ScaledAvgPool2d` onto images of a given size, from images of any size that is not smaller.

    Window i of n ends where the next begins, at floor((i + 1) size / n): where n divides the size these are the windows
    of `torch.nn.AdaptiveAvgPool2d`, whose windows overlap elsewhere. So every singular value is 1 at every size.

    Shapes: (batch, channels, height, width) to (batch, channels, *output_size).

    Args:
        output_size: n >= 1, or one for each direction; None keeps the size.

    Raises:
        InputError: a size below 1.

    Example:
        >>> ScaledAdaptiveAvgPool2d(1)(torch.ones(1, 1, 3, 3))
        tensor([[[[3.]]]])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scaled averages.

        Raises:
            InputError: no batch of images, or images smaller than the output.
        """
        windows, sizes = self._windows(inputs)
        windows = at_least_float32(windows)
        return (windows.sum(dim=(3, 5)) / sizes.to(windows.dtype).sqrt()).to(inputs.dtype)


class AdaptiveL2NormPool2d(_AdaptivePool2d):
    """`L2NormPool2d` onto images of a given size, over the windows of `ScaledAdaptiveAvgPool2d`.

    Shapes: (batch, channels, height, width) to (batch, channels, *output_size).

    Args:
        output_size: n >= 1, or one for each direction; None keeps the size.

    Raises:
        InputError: a size below 1.

    Example:
        >>> AdaptiveL2NormPool2d(1)(torch.ones(1, 1, 4, 4))
        tensor([[[[4.]]]])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the norms.

        Raises:
            InputError: no batch of images, or images smaller than the output.
        """
        return _norms(at_least_float32(self._windows(inputs)[0])).to(inputs.dtype)


def _norms(windows: Tensor) -> Tensor:
    """Euclidean norms over the dimensions 3 and 5, scaled by the largest number so that no square over- or underflows.

    The scale may be held constant in all derivatives: the norm does not depend on it.
    """
    scale = windows.detach().abs().amax(dim=(3, 5), keepdim=True)
    zero = scale == 0
    scale = scale.masked_fill(zero, 1.0)
    squares = (windows / scale).square().sum(dim=(3, 5), keepdim=True)
    norms = squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0) * scale
    return norms.squeeze(5).squeeze(3)


def _split(inputs: Tensor, dim: int, count: int | None) -> tuple[Tensor, Tensor]:
    """Cut a dimension into `count` windows: it becomes two, windows and places in them. Also the windows' sizes."""
    side = inputs.shape[dim]
    count = side if count is None else count
    edges = torch.arange(count + 1, device=inputs.device) * side // count
    sizes = edges.diff()
    if side % count == 0:
        return inputs.unflatten(dim, (count, side // count)), sizes
    places = torch.arange(-(-side // count), device=inputs.device)
    index = (edges[:-1].unsqueeze(1) + places).clamp(max=side - 1)
    outside = places >= sizes.unsqueeze(1)
    windows = inputs.index_select(dim, index.flatten()).unflatten(dim, (count, len(places)))
    return windows.masked_fill(outside.view(*outside.shape, *[1] * (inputs.ndim - dim - 1)), 0.0), sizes


def _check_images(inputs: Tensor, least: Sequence[int]) -> None:
    if inputs.ndim != 4 or inputs.shape[2] < least[0] or inputs.shape[3] < least[1]:
        raise InputError(
            f"expected (batch, channels, height, width) images of at least {least[0]}x{least[1]} pixels, "
            f"got {tuple(inputs.shape)}"
        )
    if not inputs.is_floating_point():
        raise InputError(f"expected floating-point numbers, got {inputs.dtype}, which would round; use .float()")


def _pair(name: str, size: Sizes, least: int = 1) -> tuple[int, int]:
    sizes = tuple(whole(name, each) for each in (size if isinstance(size, Sequence) else (size, size)))
    if len(sizes) != 2 or min(sizes) < least:
        raise InputError(f"{name}: expected one or two numbers >= {least}, got {size}")
    return sizes[0], sizes[1]
