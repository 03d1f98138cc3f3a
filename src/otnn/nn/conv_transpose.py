"""The adjoint of an orthogonal convolution: it brings images back to a finer grid and keeps their norm."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from otnn.errors import InputError
from otnn.nn.kernel import OrthoKernel


class OrthoConvTranspose2d(OrthoKernel):
    """Drop-in for `torch.nn.ConvTranspose2d` that is the adjoint of an orthogonal convolution.

    It is the adjoint of the `OrthoConv2d` from out_channels to in_channels with the same kernel, so on the circular
    operator every singular value is 1. Without padding nothing is lost: for in_channels <= out_channels s^2 (in each
    group) the layer is an isometry on images of any size. Padding crops the output, so the norm stays at most 1.

    Shapes: (batch, in_channels, height, width) to (batch, out_channels, height', width') with
    height' = (height - 1) stride - 2 padding + dilation (kernel_size - 1) + output_padding + 1, as in torch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: k >= stride; a pair must be square.
        stride: s >= 1; likewise.
        padding: pixels that are cropped on each side of the output; likewise.
        output_padding: rows and columns that are added below and on the right, less than the stride or the dilation.
        groups: divides both numbers of channels.
        bias: learn a bias.
        dilation: distance of the taps, without a common factor with the stride.
        padding_mode: "zeros", as in torch.
        init: "orthogonal" or "identity": the adjoint of what `OrthoConv2d` starts as.

    Raises:
        InputError: a shape that admits no such operator, or another padding.

    Example:
        >>> layer = OrthoConvTranspose2d(8, 2, 4, stride=2)
        >>> x = torch.randn(3, 8, 5, 5)
        >>> y = layer(x)
        >>> y.shape, bool(torch.allclose(y.norm(), x.norm(), rtol=1e-5))
        (torch.Size([3, 2, 12, 12]), True)
    """

    dims = 2
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: str = "orthogonal",
    ) -> None:
        if padding_mode != "zeros":
            raise InputError(
                f'padding_mode: expected "zeros", got {padding_mode!r}: a transposed convolution crops its output, and '
                "the adjoint of another padding would add border pixels up, so that its norm exceeds 1"
            )
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            *(device, dtype, init),
        )
        self.output_padding = self._one_size("output_padding", output_padding)
        if not 0 <= self.output_padding < max(self.stride, self.dilation):
            raise InputError(
                f"output_padding: expected 0 to {max(self.stride, self.dilation) - 1}, less than the stride or the "
                f"dilation, got {self.output_padding}"
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the transposed convolution of a batch of images."""
        return F.conv_transpose2d(
            *(
                inputs,
                self.weight,
                self.bias,
                self.stride,
                self.padding,
                self.output_padding,
                self.groups,
                self.dilation,
            )
        )

    def extra_repr(self) -> str:
        """Tell the sizes in torch's order."""
        added = f", output_padding={self.output_padding}" if self.output_padding else ""
        return super().extra_repr() + added
