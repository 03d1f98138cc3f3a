"""Dense twins of linear layers, for comparison with their true singular values. All in float64."""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.nn.kernel import OrthoKernel


def layer_matrix(layer: nn.Module, shape: Sequence[int]) -> Tensor:
    """The matrix (outputs, inputs) of an affine layer on inputs of one shape, by applying it to a basis."""
    layer = copy.deepcopy(layer).double()
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T


def convolution_matrix(kernel: Tensor, size: tuple[int, int], stride: int = 1, padding: int = 0) -> Tensor:
    """The matrix of a convolution with zero padding on images of one size."""
    kernel = kernel.detach().double()
    basis = torch.eye(kernel.shape[1] * size[0] * size[1], dtype=torch.float64)
    return F.conv2d(basis.view(-1, kernel.shape[1], *size), kernel, None, stride, padding).flatten(1).T


def circular_matrix(kernel: Tensor, size: int, stride: int = 1) -> Tensor:
    """The matrix of a convolution on a torus of size x size pixels, size a multiple of the stride."""
    kernel = kernel.detach().double()
    taps = kernel.shape[-1]
    basis = torch.eye(kernel.shape[1] * size**2, dtype=torch.float64).view(-1, kernel.shape[1], size, size)
    if taps > 1:
        basis = F.pad(basis, (0, taps - 1, 0, taps - 1), mode="circular")
    return F.conv2d(basis, kernel, None, stride).flatten(1).T


def norm(matrix: Tensor) -> float:
    """The largest singular value."""
    return float(torch.linalg.svdvals(matrix.detach())[0])


def on_the_torus(layer: OrthoKernel, images: Tensor) -> Tensor:
    """Apply an orthogonal convolution, or a transposed one, to images without borders, whatever its padding is."""
    if layer.transposed:
        sizes = [size * layer.stride for size in images.shape[2:]]
        outputs = images.new_zeros(len(images), layer.out_channels, *sizes, requires_grad=True)
        return torch.autograd.grad(_circular(layer, outputs), outputs, images, create_graph=True)[0]
    return _circular(layer, images)


def torus_shape(layer: OrthoKernel) -> tuple[int, ...]:
    """Of one input of `on_the_torus`: a multiple of the stride, and no smaller than the kernel."""
    size = -(-max(4, layer.dilation * (layer.kernel_size - 1) + 1) // layer.stride)
    return layer.in_channels, *[size if layer.transposed else size * layer.stride] * layer.dims


def _circular(layer: OrthoKernel, images: Tensor) -> Tensor:
    wrapped = F.pad(images, (0, layer.dilation * (layer.kernel_size - 1)) * layer.dims, mode="circular")
    convolve = F.conv1d if layer.dims == 1 else F.conv2d
    return convolve(wrapped, layer.weight, None, layer.stride, 0, layer.dilation, layer.groups)
