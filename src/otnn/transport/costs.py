"""Distances between two samples, in float64 and exact to a few units in the last place."""

import torch
from torch import Tensor

# Up to this many dimensions differences are formed one by one; above it through the inner products.
_DIRECT = 32
# Squared distances below this share of the squared norms lose too many digits in the inner products.
_CANCELLED = 1e-3
_CHUNK = 1 << 24  # numbers


def distances(x: Tensor, z: Tensor, norm: float = 2.0) -> Tensor:
    """The matrix of ||x_i - z_j||.

    For the Euclidean norm in many dimensions it takes one matrix product; pairs that lie so near each other that this
    loses digits are computed again from their differences.

    Args:
        x: (n, dimensions), float64.
        z: (m, dimensions), float64.
        norm: 1, 2, infinity, or any p >= 1.

    Returns:
        (n, m) float64.

    Example:
        >>> distances(torch.zeros(1, 2).double(), torch.tensor([[3.0, 4.0]]).double())
        tensor([[5.]], dtype=torch.float64)
    """
    if norm != 2 or x.shape[1] <= _DIRECT:
        return torch.cdist(x, z, p=norm, compute_mode="donot_use_mm_for_euclid_dist")
    centre = x.mean(dim=0)
    moved_x, moved_z = x - centre, z - centre
    squares_x, squares_z = moved_x.square().sum(dim=1), moved_z.square().sum(dim=1)
    result = moved_x @ moved_z.mT
    result.mul_(-2).add_(squares_x.unsqueeze(1)).add_(squares_z)
    size = _rows(result)
    for rows, part, scale in zip(x.split(size), result.split(size), squares_x.split(size), strict=True):
        near = (part < _CANCELLED * (scale.unsqueeze(1) + squares_z)).nonzero()
        for i, j in zip(*(index.split(_rows(x)) for index in near.unbind(1)), strict=True):
            part[i, j] = (rows[i] - z[j]).square().sum(dim=1)
    return result.sqrt_()


def pair_distances(x: Tensor, z: Tensor, norm: float = 2.0) -> Tensor:
    """||x_k - z_k|| of each pair of rows: (n,)."""
    distance: Tensor = torch.linalg.vector_norm(x - z, ord=norm, dim=1)
    return distance


def _rows(matrix: Tensor) -> int:
    """How many rows of that length make a chunk."""
    return max(1, _CHUNK // matrix.shape[-1])
