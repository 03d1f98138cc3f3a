"""Bounds of the norm of a convolution as an operator on images, true of the stored weights.

With zero padding a convolution is a compression of the convolution on the infinite grid, whose norm is the largest of
||K(omega)|| over all frequencies. Two facts make that a finite computation:

* an image of n pixels fits a torus of N = n + k - 1 without wrapping, so the N frequencies of that torus suffice;
* for any size, N frequencies a dimension suffice up to a factor: a trigonometric polynomial of degree d that attains
  its largest absolute value M at t is at least M cos(d (s - t)) at s near t (M. Riesz 1914), and some grid point is
  within pi / N. For values >= 0, as eigenvalues of a Gram matrix, it is at least M (1 + cos(d (s - t))) / 2.

Strides are first rewritten by pixel-unshuffling (polyphase), which is exact, and dilations by interleaving.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from otnn.lipschitz.matrix import NEAR, eigenvalue_bound, scaled
from otnn.lipschitz.rounding import UNDERFLOW, add_up, div_up, down, gamma, mul_up, sqrt_up, up

# Frequencies per dimension and degree: near orthogonality only the small rest is multiplied by 1 / cos^2(pi / 8).
_NEAR_GRID, _FAR_GRID = 8, 24
# Complex numbers of the matrices that are handled at once.
_CHUNK = 2**23

Pair = tuple[int, int]


def convolution_bound(
    kernel: Tensor, *, stride: Pair = (1, 1), dilation: Pair = (1, 1), groups: int = 1, size: Pair | None = None
) -> float:
    """Bound the norm of a two-dimensional convolution with zero padding, of any width.

    The Gram operator of the polyphase kernel has the taps T. Near orthogonality, with k the mean diagonal of the middle
    tap, the square is at most k + max ||(T - k I)(omega)||_F; elsewhere Cholesky factorisations prove the largest
    eigenvalue of T(omega) on the grid.

    Args:
        kernel: (out_channels, in_channels / groups, height, width), float32 or float64, its values taken as exact.
        stride: vertical and horizontal.
        dilation: vertical and horizontal.
        groups: of channels; the norm is the largest over the groups.
        size: pixels of the image; None bounds the norm for images of any size.

    Raises:
        InputError: another dtype, or a value that is not finite.

    Example:
        >>> shift = torch.tensor([[[[0.0, 0.0, 1.0]]]])
        >>> 1 <= convolution_bound(shift) < 1 + 1e-6
        True
        >>> classic = torch.tensor([[[[2 / 3, 2 / 3, -1 / 3]]]])  # 1.0 on the torus of 3 pixels, 1.085 with zeros
        >>> 1.22 < convolution_bound(classic, size=(1, 3)) < 1.23
        True
    """
    kernel, scale = scaled(kernel)
    if scale == 0 or kernel.numel() == 0:
        return 0.0
    kernel = kernel.unflatten(0, (groups, -1))
    pixels: list[int | None] = []
    steps: list[int] = []
    for dim, (step, spread) in enumerate(zip(stride, dilation, strict=True)):
        # windows read pixels of one class modulo the common factor; in it, a dilation prime to the stride leaves
        # separate undilated convolutions on interleaved pixels
        steps.append(step // math.gcd(step, spread))
        count = None if size is None else -(-size[dim] // spread)
        pixels.append(None if count is None else -(-(count + steps[-1] - 1) // steps[-1]))
    kernel = _polyphase(kernel, (steps[0], steps[1]))
    if kernel.shape[1] > kernel.shape[2]:  # the adjoint has the same norm and the smaller Gram kernel
        kernel = kernel.transpose(1, 2).flip(3, 4)
    degrees = (kernel.shape[3] - 1, kernel.shape[4] - 1)
    gram = _gram(kernel)
    taps = float(torch.linalg.vector_norm(kernel, dim=(1, 2)).sum(dim=(1, 2)).max())
    terms = kernel[0, 0].numel()
    taps = mul_up(taps, up(1 + gamma(kernel[0].numel() + 2)))
    error = mul_up(up(gamma(terms + 2) + kernel[0].numel() * UNDERFLOW[torch.float64]), taps, taps)
    middle = gram[:, :, :, degrees[0], degrees[1]]
    mean = middle.diagonal(dim1=1, dim2=2).mean(dim=1)
    level = float(mean.max())
    rest = gram.clone()
    rest[:, :, :, degrees[0], degrees[1]].diagonal(dim1=1, dim2=2).sub_(level)
    near = _near_bound(rest, degrees)
    if near < NEAR * level:
        square = add_up(level, near, error, error)
    else:
        square = _far_bound(gram, degrees, (pixels[0], pixels[1]), error)
    return mul_up(scale, sqrt_up(square))


def _near_bound(rest: Tensor, degrees: Pair) -> float:
    """Bound ||R(omega)|| for every omega by its Frobenius norm on a grid."""
    grid = (max(1, _NEAR_GRID * degrees[0]), max(1, _NEAR_GRID * degrees[1]))
    largest = max(float(torch.view_as_real(part).square().sum(dim=(2, 3, 4)).max()) for part in _spectra(rest, grid))
    count = 2 * rest.shape[1] ** 2
    largest = mul_up(sqrt_up(largest), up(1 + gamma(count + 2)))
    return div_up(add_up(largest, _transform_error(rest), count * 2.0**-500), _riesz(degrees, grid))


def _far_bound(gram: Tensor, degrees: Pair, pixels: tuple[int | None, int | None], error: float) -> float:
    """Bound the largest eigenvalue of T(omega) over all frequencies, or over those of an image that fits a torus."""
    grid, unsure = [1, 1], [0, 0]
    for dim, (degree, count) in enumerate(zip(degrees, pixels, strict=True)):
        if degree:
            grid[dim], unsure[dim] = _FAR_GRID * degree, degree
        if count is not None and count + degree <= grid[dim]:
            grid[dim], unsure[dim] = count + degree, 0
    largest = 0.0
    for part in _spectra(gram, (grid[0], grid[1])):
        hermitian = part.flatten(0, 1)
        if hermitian.shape[-1] == 1:
            largest = max(largest, float(hermitian.real.max()))
            continue
        # a matrix whose Frobenius norm is no more than what is proven already needs no factorisation
        norms = torch.linalg.vector_norm(torch.view_as_real(hermitian), dim=(1, 2, 3)) * (1 + 1e-9)
        hermitian = hermitian[norms > largest]
        if len(hermitian):
            # as real symmetric matrices of twice the size and the same eigenvalues
            real, imaginary = hermitian.real, hermitian.imag
            embedded = torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)
            estimate = max(largest, _power_iteration(hermitian))
            largest = max(largest, eigenvalue_bound(embedded, estimate, 1e-4))
    # only lower triangles were read: the triangle of the real part stands twice, the imaginary block once
    errors = mul_up(3.0, add_up(error, _transform_error(gram)))
    share = 1.0
    for degree, count in zip(unsure, grid, strict=True):
        # with values in [0, M], the polynomial 2 p - M has the largest absolute value M
        share = down(share * down((1 + _riesz((degree, 0), (count, 1))) / 2))
    return div_up(add_up(largest, errors), share)


def _riesz(degrees: Pair, grid: Pair) -> float:
    """The share of the largest value that a grid sees at least: the product of cos(pi d / N), rounded down."""
    share = 1.0
    for degree, count in zip(degrees, grid, strict=True):
        if degree:
            share = down(share * down(down(math.cos(up(math.pi) * degree / count))))
    return share


def _spectra(taps: Tensor, grid: Pair) -> Iterator[Tensor]:
    """Yield the matrices of taps (groups, c, c, height, width) at half of a grid: (some frequencies, groups, c, c).

    The other half is complex conjugate.
    """
    phases = []
    for along, count in zip(taps.shape[3:], grid, strict=True):
        turns = torch.outer(torch.arange(count), torch.arange(along) - along // 2) % count
        angle = turns.double() * (2 * math.pi / count)
        phases.append(torch.complex(angle.cos(), angle.sin()))
    columns = phases[1][: grid[1] // 2 + 1]
    groups, channels = taps.shape[:2]
    lines = taps.to(torch.complex128).permute(3, 4, 0, 1, 2).reshape(taps.shape[3], taps.shape[4], -1)
    partial = columns @ lines  # (height, frequencies, entries)
    for rows in phases[0].split(max(1, _CHUNK // partial[0].numel())):
        yield (rows @ partial.flatten(1)).view(-1, groups, channels, channels)


def _transform_error(taps: Tensor) -> float:
    """Bound the Frobenius norm of the rounding of each matrix of `_spectra`: gamma times the sum of the taps' norms.

    Complex products count four times, and each phase is right to a few units of 2^-53.
    """
    norms = float(torch.linalg.vector_norm(taps, dim=(1, 2)).sum(dim=(1, 2)).max())
    return mul_up(gamma(4 * sum(taps.shape[3:]) + 64), norms, up(1 + gamma(taps[0].numel() + 2)))


def _power_iteration(hermitian: Tensor) -> float:
    """A lower estimate of the largest eigenvalue of all matrices; it proves nothing and only saves factorisations."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(*hermitian.shape[:2], 1, generator=generator, dtype=torch.float64).to(hermitian.dtype)
    for _ in range(12):
        vectors = hermitian @ vectors
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=1e-300)
    return float((vectors.conj() * (hermitian @ vectors)).real.sum(dim=(1, 2)).max())


def _gram(kernel: Tensor) -> Tensor:
    """The taps of K K^T of each group: (groups, o, i, h, w) to (groups, o, o, 2 h - 1, 2 w - 1)."""
    groups, outputs, _, height, width = kernel.shape
    images = kernel.transpose(0, 1).flatten(1, 2)
    products: Tensor = nn.functional.conv2d(
        images, kernel.flatten(0, 1), padding=(height - 1, width - 1), groups=groups
    )
    taps: Tensor = products.unflatten(1, (groups, outputs)).permute(1, 0, 2, 3, 4)
    return taps.contiguous()


def _polyphase(kernel: Tensor, stride: Pair) -> Tensor:
    """The kernel of stride 1 on pixel-unshuffled images: (g, o, i, h, w) to (g, o, i s_h s_w, h / s_h, w / s_w)."""
    if stride == (1, 1):
        return kernel
    groups, outputs, inputs, height, width = kernel.shape
    rows, columns = -(-height // stride[0]), -(-width // stride[1])
    kernel = nn.functional.pad(kernel, (0, columns * stride[1] - width, 0, rows * stride[0] - height))
    kernel = kernel.view(groups, outputs, inputs, rows, stride[0], columns, stride[1])
    unshuffled: Tensor = kernel.permute(0, 1, 2, 4, 6, 3, 5).reshape(groups, outputs, -1, rows, columns)
    return unshuffled
