"""The kernel that all orthogonal convolutions share: its shape, its factors on the Stiefel manifold, their product."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from otnn.checks import floating, whole
from otnn.errors import InputError
from otnn.manifold import Manifold, Stiefel
from otnn.nn.init import checked_init
from otnn.precision import without_autocast


class OrthoKernel(nn.Module):
    """Settings and factors of an orthogonal convolution in one or two dimensions, or of its adjoint.

    The kernel of size k and stride s, from m to n channels in each group and in d dimensions, is composed from three
    exactly orthogonal maps whose factors live on the Stiefel manifold (BCOP, Li et al. 2019; with stride, AOC, Boissin
    et al. 2025):

    1. `expand`, a pointwise isometry from m to c = max(m, n // s^d) channels, absent if c = m;
    2. d (k - s) two-tap filters [P, I - P], alternately along width and height, with orthogonal projectors
       P = U U^T of rank c // 2 from `projectors` (absent if k = s or c = 1): each is orthogonal at every frequency;
    3. `mix`, a semi-orthogonal matrix from the c s^d channels of a block of s^d pixels to n channels, absent if s = 1
       and `expand` is there (one would absorb the other).

    Groups have factors of their own, along the first dimension of each parameter: the operator is block-diagonal. A
    dilation spreads the taps; where it shares no factor with the stride, the operator falls into separate copies of the
    undilated one on interleaved pixels, and so keeps its singular values.
    """

    dims = 2
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        padding_mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        init: str,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = whole("in_channels", in_channels), whole("out_channels", out_channels)
        self.groups = whole("groups", groups)
        self.kernel_size = self._one_size("kernel_size", kernel_size)
        self.stride = self._one_size("stride", stride)
        self.padding = self._one_size("padding", padding)
        self.dilation = self._one_size("dilation", dilation)
        self.padding_mode = padding_mode
        self.init = checked_init(init)
        self._check_shape()
        fan_in, fan_out = self.in_channels // self.groups, self.out_channels // self.groups
        if self.transposed:
            fan_in, fan_out = fan_out, fan_in
        block = self.stride**self.dims
        self._inner = inner = max(fan_in, fan_out // block)
        several = () if self.groups == 1 else (self.groups,)
        floating(dtype)

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        taps = self.dims * (self.kernel_size - self.stride)
        # taps and groups share a dimension: torch's channels_last would reorder parameters of four
        self.projectors = matrix(taps * self.groups, inner, inner // 2) if taps and inner > 1 else None
        self.expand = matrix(*several, inner, fan_in) if inner > fan_in else None
        absorbed = block == 1 and inner > fan_in
        self.mix = None if absorbed else matrix(*several, fan_out, inner * block)
        self.bias = nn.Parameter(torch.zeros(self.out_channels, device=device, dtype=dtype)) if bias else None
        self.manifolds: dict[str, Manifold] = {
            name: Stiefel() for name in ("projectors", "expand", "mix") if getattr(self, name) is not None
        }
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every factor from the uniform law, or start as the identity (`init`); set the bias to 0."""
        for name, manifold in self.manifolds.items():
            parameter = self.get_parameter(name)
            parameter.copy_(manifold.sample(*parameter.shape, dtype=parameter.dtype))
        if self.init == "identity":
            self._start_as_identity()
        if self.bias is not None:
            self.bias.zero_()

    @property
    def weight(self) -> Tensor:
        """The kernel, composed from its factors: (n groups, m, k) or (n groups, m, k, k).

        That is torch's layout: for a transposed convolution n counts the channels of the input. Autocast does not reach
        into the composition, whose errors would add up: it rounds its result once.
        """
        with without_autocast(cast(Tensor, self.expand if self.mix is None else self.mix)):
            return self._composed()

    def _composed(self) -> Tensor:
        dims, stride = self.dims, self.stride
        filters = range(dims * (self.kernel_size - stride))
        if self.mix is not None:
            blocks = self.mix.unflatten(-1, (-1, *[stride] * dims))
            kernel = blocks.permute(*range(-dims, 0), *range(blocks.ndim - dims))
            kernel = _filtered(kernel, self._projections(kernel), filters, dims)
            if self.expand is not None:
                kernel = _product(kernel, self.expand)
        else:
            # from the side that has fewer channels; projectors are symmetric, so that no filter is transposed
            kernel = cast(Tensor, self.expand).mT[(None,) * dims]
            kernel = _filtered(kernel, self._projections(kernel), reversed(filters), dims).mT
        weight: Tensor = kernel.permute(*range(dims, kernel.ndim), *range(dims))
        return weight if self.groups == 1 else weight.flatten(0, 1)

    def _projections(self, kernel: Tensor) -> Tensor:
        """The projector ([groups,] c, c) of each two-tap filter: of rank 0, a mere shift, for one channel."""
        if self.projectors is None:
            count = self.dims * (self.kernel_size - self.stride)
            return kernel.new_zeros(count, kernel.shape[-1], kernel.shape[-1])
        projections = self.projectors @ self.projectors.mT
        return projections if self.groups == 1 else projections.unflatten(0, (-1, self.groups))

    def _start_as_identity(self) -> None:
        """Make of the factors, just sampled, some whose product has one tap of 1 for each channel.

        With H(z) = I - P + P z and H'(z) = P + (I - P) z of one projector, H H' = z I: such a pair is a shift by one
        pixel, whatever P is. So P stays random, which breaks symmetry, and every weight has a gradient. Where
        kernel_size - stride is odd, one filter a dimension is left without a partner: it moves the even channels.
        """
        stiefel, dims, stride, inner = Stiefel(), self.dims, self.stride, self._inner
        groups = [self.groups] if self.groups > 1 else []
        dtype = self.get_parameter(next(iter(self.manifolds))).dtype
        basis = torch.eye(inner, dtype=dtype).expand(*groups, inner, inner)
        if self.expand is not None and self.mix is not None:
            # between two factors any basis of the channels does; the usual one would leave weights without a gradient
            basis = stiefel.sample(*groups, inner, inner, dtype=dtype)
        if self.expand is not None:
            self.expand.copy_(basis[..., : self.expand.shape[-1]])
        if self.mix is not None:
            # the middle pixel of the block comes first: of as many outputs as channels each takes its channel there
            pixels = line = torch.eye(stride, dtype=dtype).roll((stride - 1) // 2, 1)
            for _ in range(dims - 1):
                pixels = torch.kron(pixels, line)
            outputs = min(self.mix.shape[-2], len(pixels) * inner)
            rows = torch.einsum("qp,...ce->...qecp", pixels, basis).reshape(*groups, len(pixels) * inner, -1)
            self.mix.zero_()
            self.mix[..., :outputs, :].copy_(rows[..., :outputs, :])
        if self.projectors is not None:
            frames = self.projectors.view(-1, self.groups, *self.projectors.shape[1:])
            paired = len(frames) - len(frames) % (2 * dims)
            pairs = frames[:paired].unflatten(0, (-1, 2 * dims))
            pairs.copy_(pairs[:, :1].clone().expand_as(pairs))
            rank = frames.shape[-1]
            if paired < len(frames):
                # a turned basis of the same plane, so that no column depends on channels that nobody sees
                turn = stiefel.sample(*frames.shape[:-2], rank, rank, dtype=dtype)[paired:]
                frames[paired:] = (basis[..., ::2][..., :rank] @ turn).to(frames)

    def _check_shape(self) -> None:
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.dilation, self.groups)
        if min(sizes) < 1 or self.padding < 0:
            raise InputError(
                "expected in_channels, out_channels, kernel_size, stride >= 1 and padding >= 0, and dilation, groups "
                f">= 1, got {', '.join(map(str, sizes[:4]))} and {self.padding}, and {self.dilation}, {self.groups}"
            )
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise InputError(
                f"expected in_channels and out_channels divisible by groups, got {self.in_channels} and "
                f"{self.out_channels} for {self.groups} groups; "
                f"{math.gcd(self.in_channels, self.out_channels)} groups, or a divisor of that, would do"
            )
        if self.kernel_size < self.stride:
            raise InputError(
                f"expected kernel_size >= stride, got {self.kernel_size} < {self.stride}: a smaller kernel skips "
                "pixels and cannot be orthogonal"
            )
        common = math.gcd(self.stride, self.dilation)
        if common > 1:
            raise InputError(
                f"expected a dilation without a common factor with the stride, got {self.dilation} and {self.stride}: "
                f"every window would read pixels that are multiples of {common} apart and skip the others; "
                f"stride {self.stride} admits dilation 1 or {self.stride + 1}, and stride 1 any dilation"
            )

    def _one_size(self, name: str, size: Any) -> int:
        """One number for all directions, as torch's tuples may give it."""
        if isinstance(size, str):
            raise InputError(
                f"{name}: expected a number of pixels, got {size!r}; at stride 1, dilation * (kernel_size - 1) // 2 "
                "keeps the size"
            )
        sizes = [whole(name, each) for each in (size if isinstance(size, Sequence) else (size,) * self.dims)]
        if len(sizes) != self.dims or len(set(sizes)) > 1:
            expected = "one size for both directions" if self.dims == 2 else "one size"
            raise InputError(f"{name}: expected {expected}, got {size}")
        return sizes[0]

    def extra_repr(self) -> str:
        """Tell the sizes in torch's order; dilation, groups and init where they are not the usual ones."""
        usual = {"dilation": 1, "groups": 1, "init": "orthogonal"}
        others = [f"{name}={getattr(self, name)}" for name in usual if getattr(self, name) != usual[name]]
        return ", ".join(
            [
                f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}",
                f"padding={self.padding}, padding_mode={self.padding_mode}, bias={self.bias is not None}",
                *others,
            ]
        )


def _filtered(kernel: Tensor, projections: Tensor, order: Iterable[int], dims: int) -> Tensor:
    """Multiply a kernel (*pixels, [groups,] n, c) from the right by one two-tap filter [P, I - P] after another.

    They lie along the last dimension of the pixels first, then along the one before, and so on in turn; ranks alternate
    between floor and ceil, so that the kernel stays centred.
    """
    taps = projections.unbind()
    for index in order:
        dim = dims - 1 - index % dims
        there = _product(kernel, taps[index])
        here = kernel - there
        if index // dims % 2:
            here, there = there, here
        if kernel.shape[dim] == 1:
            kernel = torch.cat([here, there], dim)
        else:
            edge = kernel.new_zeros(()).expand(here.narrow(dim, 0, 1).shape)
            kernel = torch.cat([here, edge], dim) + torch.cat([edge, there], dim)
    return kernel


def _product(kernel: Tensor, factor: Tensor) -> Tensor:
    """Kernel @ factor, rounded alike with and without a gradient: torch's own choice of the shapes depends on it."""
    if factor.ndim > 2:
        return kernel @ factor
    return (kernel.reshape(-1, kernel.shape[-1]) @ factor).view(*kernel.shape[:-1], factor.shape[-1])
