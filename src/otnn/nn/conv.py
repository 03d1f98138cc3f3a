"""Orthogonal convolutions of any odd or even kernel size and stride."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.manifold import Manifold, Stiefel


class OrthoConv2d(nn.Module):
    """Drop-in for `torch.nn.Conv2d` that is orthogonal as an operator on images, not as a reshaped matrix.

    The kernel of size k and stride s is composed from three exactly orthogonal maps whose factors live on the Stiefel
    manifold (BCOP, Li et al. 2019; with stride, AOC, Boissin et al. 2025):

    1. `expand`, a 1x1 isometry from in_channels to c = max(in_channels, out_channels // s^2), absent
       if c = in_channels;
    2. 2 (k - s) two-tap filters [P, I - P], alternately along width and height, with orthogonal projectors
       P = U U^T of rank c // 2 from `projectors` (absent if k = s or c = 1): each is orthogonal at every frequency;
    3. `mix`, a semi-orthogonal matrix from c s^2 channels of an s x s block to out_channels, absent if s = 1 and
       `expand` is there (one would absorb the other).

    On the circular operator every singular value is 1. With zero padding the layer is a compression of the circular
    one: the norm stays at most 1, and the singular values that fall below 1 belong to the border.

    Shapes: (batch, in_channels, height, width) to (batch, out_channels, height', width') as in torch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: k >= stride; a pair must be square.
        stride: s >= 1; likewise.
        padding: pixels on each side; likewise.
        bias: learn a bias.
        padding_mode: "zeros", or "circular" where no output pixel may see a wrapped pixel twice.

    Raises:
        InputError: a shape that admits no such operator, or a padding that amplifies.

    Example:
        >>> layer = OrthoConv2d(4, 8, 3, padding=1, padding_mode="circular")
        >>> x = torch.randn(2, 4, 6, 6)
        >>> bool(torch.allclose(layer(x).norm(), x.norm(), rtol=1e-5))  # 4 -> 8 channels: an isometry
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel_size = _square("kernel_size", kernel_size)
        stride = _square("stride", stride)
        padding = _square("padding", padding)
        if min(in_channels, out_channels, kernel_size, stride) < 1 or padding < 0:
            raise InputError(
                "expected in_channels, out_channels, kernel_size, stride >= 1 and padding >= 0, got "
                f"{in_channels}, {out_channels}, {kernel_size}, {stride} and {padding}"
            )
        if kernel_size < stride:
            raise InputError(
                f"expected kernel_size >= stride, got {kernel_size} < {stride}: a smaller kernel skips pixels and "
                "cannot be orthogonal"
            )
        if padding_mode not in ("zeros", "circular"):
            raise InputError(
                f'padding_mode: expected "zeros" or "circular", got {padding_mode!r}: reflect and replicate padding '
                "count border pixels twice, so their norm exceeds 1"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.padding_mode = padding_mode
        inner = max(in_channels, out_channels // stride**2)

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        taps = 2 * (kernel_size - stride)
        self.projectors = matrix(taps, inner, inner // 2) if taps and inner > 1 else None
        self.expand = matrix(inner, in_channels) if inner > in_channels else None
        absorbed = stride == 1 and inner > in_channels
        self.mix = None if absorbed else matrix(out_channels, inner * stride**2)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.manifolds: dict[str, Manifold] = {
            name: Stiefel() for name in ("projectors", "expand", "mix") if getattr(self, name) is not None
        }
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every factor from the uniform law and set the bias to 0."""
        for name, manifold in self.manifolds.items():
            parameter = self.get_parameter(name)
            parameter.copy_(manifold.sample(*parameter.shape, dtype=parameter.dtype))
        if self.bias is not None:
            self.bias.zero_()

    @property
    def weight(self) -> Tensor:
        """The kernel (out_channels, in_channels, kernel_size, kernel_size), composed from its factors."""
        s = self.stride
        if self.mix is not None:
            kernel = self.mix.view(self.out_channels, -1, s, s).permute(2, 3, 0, 1)
            kernel = _filtered(kernel, self._projections(kernel), range(2 * (self.kernel_size - s)))
            if self.expand is not None:
                kernel = kernel @ self.expand
            return kernel.permute(2, 3, 0, 1)
        # from the side of the input, which has fewer channels; projections are symmetric, so filters are not transposed
        kernel = self.get_parameter("expand").mT[None, None]
        kernel = _filtered(kernel, self._projections(kernel), reversed(range(2 * (self.kernel_size - s))))
        return kernel.permute(3, 2, 0, 1)

    def _projections(self, kernel: Tensor) -> Tensor:
        """The projector (inner, inner) of each two-tap filter, of rank 0 (a mere shift) where there is one channel."""
        if self.projectors is None:
            return kernel.new_zeros(2 * (self.kernel_size - self.stride), kernel.shape[3], kernel.shape[3])
        return self.projectors @ self.projectors.mT

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the convolution of a batch of images.

        Raises:
            InputError: circular padding whose outputs would see a wrapped pixel twice.
        """
        weight = self.weight
        if self.padding_mode == "circular":
            self._check_circular(inputs)
            if self.padding:
                inputs = F.pad(inputs, (self.padding,) * 4, mode="circular")
            return F.conv2d(inputs, weight, self.bias, self.stride)
        return F.conv2d(inputs, weight, self.bias, self.stride, self.padding)

    def _check_circular(self, inputs: Tensor) -> None:
        for size in inputs.shape[-2:]:
            outputs = (size + 2 * self.padding - self.kernel_size) // self.stride + 1
            if outputs * self.stride > size or (self.stride > 1 and size % self.stride):
                raise InputError(
                    f"circular padding {self.padding} with kernel {self.kernel_size} and stride {self.stride} on "
                    f"{size} pixels would count wrapped pixels twice; expected a size divisible by the stride and "
                    f"padding <= {(self.kernel_size - 1) // 2}"
                )
            if self.kernel_size > size:
                raise InputError(f"circular padding expects images of at least {self.kernel_size} pixels, got {size}")

    def extra_repr(self) -> str:
        """Tell the sizes in torch's order."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, padding_mode={self.padding_mode}, bias={self.bias is not None}"
        )


def _filtered(kernel: Tensor, projections: Tensor, order: Iterable[int]) -> Tensor:
    """Multiply a kernel (height, width, ..., inner) from the right by one two-tap filter [P, I - P] after another.

    They lie alternately along the width and the height, and ranks alternate between floor and ceil, so that the kernel
    stays centred.
    """
    taps = projections.unbind()
    for index in order:
        dim = 1 - index % 2
        there = kernel @ taps[index]
        here = kernel - there
        if index // 2 % 2:
            here, there = there, here
        if kernel.shape[dim] == 1:
            kernel = torch.cat([here, there], dim)
        else:
            edge = kernel.new_zeros(()).expand(here.narrow(dim, 0, 1).shape)
            kernel = torch.cat([here, edge], dim) + torch.cat([edge, there], dim)
    return kernel


def _square(name: str, size: int | tuple[int, int]) -> int:
    """One number for both directions, as torch's pairs may give it."""
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) != 2 or sizes[0] != sizes[1]:
        raise InputError(f"{name}: expected one size for both directions, got {size}")
    return sizes[0]
