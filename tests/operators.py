"""Dense twins of linear layers, for comparison with their true singular values. All in float64."""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
