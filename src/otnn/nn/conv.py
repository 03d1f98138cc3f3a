"""Orthogonal convolutions of any odd or even kernel size and stride."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from otnn.errors import InputError
from otnn.nn.kernel import OrthoKernel


class _OrthoConv(OrthoKernel):
    """The constructor and the forward pass of both dimensions."""

    _convolve: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: str = "orthogonal",
    ) -> None:
        if padding_mode not in ("zeros", "circular"):
            raise InputError(
                f'padding_mode: expected "zeros" or "circular", got {padding_mode!r}: reflect and replicate padding '
                "count border pixels twice, so their norm exceeds 1"
            )
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            *(device, dtype, init),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the convolution of a batch.

        Raises:
            InputError: circular padding whose outputs would see a wrapped pixel twice.
        """
        weight, padding = self.weight, self.padding
        if self.padding_mode == "circular":
            self._check_circular(inputs)
            if padding:
                inputs = F.pad(inputs, (padding,) * (2 * self.dims), mode="circular")
            padding = 0
        return self._convolve(inputs, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _check_circular(self, inputs: Tensor) -> None:
        reach = self.dilation * (self.kernel_size - 1)
        for size in inputs.shape[-self.dims :]:
            outputs = (size + 2 * self.padding - reach - 1) // self.stride + 1
            if outputs * self.stride > size or (self.stride > 1 and size % self.stride):
                raise InputError(
                    f"circular padding {self.padding} with kernel {self.kernel_size} and stride {self.stride} on "
                    f"{size} pixels would count wrapped pixels twice; expected a size divisible by the stride and "
                    f"padding <= {reach // 2}"
                )
            if reach >= size:
                raise InputError(f"circular padding expects images of at least {reach + 1} pixels, got {size}")


class OrthoConv2d(_OrthoConv):
    """Drop-in for `torch.nn.Conv2d` that is orthogonal as an operator on images, not as a reshaped matrix.

    The kernel is composed from exactly orthogonal factors, separately in each group (see `otnn.nn.kernel.OrthoKernel`).
    On the circular operator every singular value is 1. With zero padding the layer is a compression of the circular
    one: the norm stays at most 1, and the singular values that fall below 1 belong to the border.

    A group of one channel on each side admits only shifts of the image (a filter of one channel with a response of
    modulus 1 at every frequency has a single tap), so a depthwise layer wants several outputs for each input, or a
    stride.

    Shapes: (batch, in_channels, height, width) to (batch, out_channels, height', width') as in torch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: k >= stride; a pair must be square.
        stride: s >= 1; likewise.
        padding: pixels on each side; likewise.
        dilation: distance of the taps, without a common factor with the stride; likewise.
        groups: divides both numbers of channels.
        bias: learn a bias.
        padding_mode: "zeros", or "circular" where no output pixel may see a wrapped pixel twice.
        init: "orthogonal" draws the factors uniformly. "identity" gives each output channel c the input channel c, as
            far as there are as many: with stride 1, odd k and padding d (k - 1) / 2 the layer starts as the identity,
            cut or filled with zeros. With stride s and padding (k - 1) // 2 the outputs are first the pixels (i s, j s)
            of all channels, then their neighbours. Where k - s is odd, the channels 0, 2, ... read one tap further than
            the others.

    Raises:
        InputError: a shape that admits no such operator, or a padding that amplifies.

    Example:
        >>> layer = OrthoConv2d(4, 8, 3, padding=1, padding_mode="circular")
        >>> x = torch.randn(2, 4, 6, 6)
        >>> bool(torch.allclose(layer(x).norm(), x.norm(), rtol=1e-5))  # 4 -> 8 channels: an isometry
        True
        >>> same = OrthoConv2d(4, 4, 3, padding=1, init="identity")
        >>> bool(torch.allclose(same(x), x, atol=1e-5))
        True
    """

    dims = 2
    _convolve = staticmethod(F.conv2d)


class OrthoConv1d(_OrthoConv):
    """Drop-in for `torch.nn.Conv1d` that is orthogonal as an operator on signals; otherwise as `OrthoConv2d`.

    Shapes: (batch, in_channels, length) to (batch, out_channels, length') as in torch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: k >= stride.
        stride: s >= 1.
        padding: numbers on each side.
        dilation: distance of the taps, without a common factor with the stride.
        groups: divides both numbers of channels.
        bias: learn a bias.
        padding_mode: "zeros", or "circular" where no output may see a wrapped number twice.
        init: "orthogonal" or "identity", as of `OrthoConv2d`.

    Raises:
        InputError: a shape that admits no such operator, or a padding that amplifies.

    Example:
        >>> layer = OrthoConv1d(2, 6, 5, stride=3, padding=1, padding_mode="circular")
        >>> x = torch.randn(4, 2, 12)
        >>> bool(torch.allclose(layer(x).norm(), x.norm(), rtol=1e-5))  # 2 x 12 to 6 x 4 numbers
        True
    """

    dims = 1
    _convolve = staticmethod(F.conv1d)
