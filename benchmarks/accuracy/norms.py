"""Norms of plain layers on their image sizes: what a certificate would use if it could be proven."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

# Of the residual of the Lanczos iteration, relative to the square of the norm
TOLERANCE = 1e-5
# Numbers of an image up to which the matrix is written out
DENSE = 32


def operator_norm(weight: Tensor, shape: Sequence[int], stride: int = 1, padding: int = 0) -> float:
    """The largest singular value of a convolution with zero padding on images of one size.

    Lanczos iteration on A^T A in float64 from a seeded start, or the whole matrix where it is small. The value is
    sqrt(t + r), t the largest Ritz value and r its residual: some squared singular value lies within r of t. That it
    is the largest is as certain as the iteration's convergence, not proven.

    Args:
        weight: (outputs, inputs, height, width).
        shape: (inputs, height, width) of an image.
        stride: of both dimensions.
        padding: of every side.

    Example:
        >>> round(operator_norm(torch.ones(1, 1, 1, 3), (1, 1, 3)), 6), round(3**0.5, 6)
        (1.732051, 1.732051)
    """
    kernel, size = weight.detach().double().cpu(), tuple(shape)
    output = conv2d(torch.zeros(1, *size, dtype=torch.float64), kernel, stride=stride, padding=padding).shape[2:]
    # rows and columns behind the last position of the kernel
    left = [
        side + 2 * padding - taps - stride * (places - 1)
        for side, taps, places in zip(size[1:], kernel.shape[2:], output, strict=True)
    ]

    @torch.no_grad()
    def gram(vectors: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float64)).view(-1, *size)
        moved = conv2d(images, kernel, stride=stride, padding=padding)
        back = conv_transpose2d(moved, kernel, stride=stride, padding=padding, output_padding=left)
        return np.asarray(back.view(vectors.shape).numpy())

    dimension = int(np.prod(size))
    if dimension <= DENSE or not kernel.any():
        largest = np.linalg.eigvalsh(gram(np.eye(dimension)))[-1] if kernel.any() else 0.0
        return float(max(largest, 0.0) ** 0.5)
    operator = LinearOperator((dimension, dimension), matvec=gram, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(dimension)
    values, vectors = eigsh(operator, k=1, which="LA", tol=TOLERANCE, v0=start)
    residual = np.linalg.norm(gram(vectors[:, 0]) - values[0] * vectors[:, 0])
    return float((values[0] + residual) ** 0.5)


@torch.no_grad()
def norms(body: nn.Sequential, shape: Sequence[int]) -> Iterator[float]:
    """The norm of each layer with weights, in order; the other layers are to be of norm 1.

    Args:
        body: plain convolutions, dense layers, MaxMin and flattening.
        shape: (channels, height, width) of an image.
    """
    images = torch.zeros(1, *shape, dtype=next(body.parameters()).dtype)
    for layer in body:
        if isinstance(layer, nn.Conv2d):
            yield operator_norm(layer.weight, images.shape[1:], layer.stride[0], int(layer.padding[0]))
        elif isinstance(layer, nn.Linear):
            yield float(torch.linalg.matrix_norm(layer.weight.double(), 2))
        images = layer(images)
