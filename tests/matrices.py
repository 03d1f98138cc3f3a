"""Random matrices, their polar factors, and how near to the Stiefel manifold a dtype can lie."""

import torch
from torch import Tensor

from otnn.manifold import Manifold

# ||G - I||_F of an orthogonal matrix rounded to its dtype: a few units in the last place times the root of its rows
ON_MANIFOLD = {torch.float32: 5e-6, torch.float64: 1e-14}


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that a seed repeats."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def polar(point: Tensor) -> Tensor:
    """The polar factor in float64, by singular values."""
    u, _, vh = torch.linalg.svd(point.double(), full_matrices=False)
    return u @ vh


def tangent(manifold: Manifold, point: Tensor, gradient: Tensor) -> Tensor:
    """A projected gradient, beside the one that it was made of."""
    result = gradient.clone()
    manifold.project_(point, result)
    return result
