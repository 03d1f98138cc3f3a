"""Bounds of the largest singular value of a matrix, true of the stored weights (exact arithmetic, not estimates)."""

import math

import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.lipschitz.rounding import UNDERFLOW, add_up, div_up, down, gamma, mul_up, norm_up, power_of_two, sqrt_up, up

# Where the Gram matrix is this near to a multiple of the identity, the Frobenius norm of the rest is tight enough.
NEAR = 1e-4
# Larger matrices have their largest eigenvalue estimated by power iteration before it is proven.
_EIGENVALUES = 1024


def matrix_bound(matrix: Tensor) -> float:
    """Bound the largest singular value of a matrix (rows, columns).

    With G the Gram matrix of the short side and k the mean of its diagonal, near orthogonality the square is at most
    k + ||G - k I||_F; elsewhere a Cholesky factorisation proves that a I - G is positive semidefinite (Rump 2006).
    Tight to 1e-6 and 1e-10.

    Args:
        matrix: (rows, columns), float32 or float64, its values taken as exact.

    Raises:
        InputError: another dtype, or a value that is not finite.

    Example:
        >>> bound = matrix_bound(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> 4 <= bound < 4 + 1e-12
        True
    """
    wide, scale = scaled(matrix)
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    if scale == 0 or wide.numel() == 0:
        return 0.0
    frobenius = norm_up(wide)
    gram = wide @ wide.T
    error = mul_up(up(gamma(wide.shape[1] + 2) + wide.numel() * UNDERFLOW[torch.float64]), frobenius, frobenius)
    middle = max(0.0, float(gram.diagonal().mean()))
    rest = gram.tril()
    rest.diagonal().sub_(middle)  # its rounding, at most that of one operation on each entry, is below `error`
    off = norm_up(rest)
    if off < NEAR * middle:
        off = mul_up(off, up(math.sqrt(2)))  # the triangle stands for both
        square = add_up(middle, off, error, error)
    else:
        square = add_up(eigenvalue_bound(gram, *_estimate(gram)), error)
    return mul_up(scale, sqrt_up(square))


def eigenvalue_bound(symmetric: Tensor, estimate: float, step: float) -> float:
    """Bound the largest eigenvalue of all of a batch of symmetric matrices.

    If the factorisation of M = a I - S runs to its end, M >= -gamma(n + 1) / (1 - gamma(n + 1)) tr M (Rump 2006), so
    S <= a + that. `a` is raised from the estimate until it does.

    Args:
        symmetric: (..., n, n) float64, of which the lower triangles count.
        estimate: of the largest eigenvalue, from any method.
        step: what `a` is raised by where the estimate is too low, relative to the largest diagonal or estimate; then
            twice as much, and so on.
    """
    size = symmetric.shape[-1]
    rest = symmetric.reshape(-1, size, size)
    diagonal = rest.diagonal(dim1=-2, dim2=-1)
    scale = max(abs(estimate), float(diagonal.abs().max()), UNDERFLOW[torch.float64] * 2.0**100)
    share = div_up(gamma(size + 2), down(1 - gamma(size + 2)))
    identity = torch.eye(size, dtype=rest.dtype)
    largest, level = -math.inf, estimate
    while len(rest):
        shifted = level * identity - rest
        info = torch.linalg.cholesky_ex(shifted)[1]
        trace = float(shifted.diagonal(dim1=-2, dim2=-1).abs().sum(dim=-1).max())
        # the trace's own rounding and that of the subtraction: one operation each on numbers of at most `trace`
        slack = mul_up(add_up(share, gamma(size + 2)), trace)
        slack = add_up(slack, mul_up(2 * UNDERFLOW[torch.float64] ** 0.5, scale), mul_up(gamma(2), abs(level)))
        proven = info == 0
        if bool(proven.any()):
            largest = max(largest, add_up(level, slack))
        rest = rest[~proven]
        level += step * scale
        step *= 2
    return largest


def gram_bound(gram: Tensor, error: float) -> float:
    """Bound the norm of a map from its Gram matrix (n, n), computed with an error of at most this Frobenius norm."""
    return sqrt_up(add_up(eigenvalue_bound(gram, *_estimate(gram)), error))


def _estimate(gram: Tensor) -> tuple[float, float]:
    """The largest eigenvalue and the relative step to raise it by; it proves nothing and only saves factorisations."""
    if len(gram) <= _EIGENVALUES:
        return float(torch.linalg.eigvalsh(gram)[-1]) * (1 + 1e-14 * len(gram)), 1e-12
    vector = torch.randn(len(gram), 1, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
    for _ in range(100):
        vector = gram @ vector
        vector = vector / torch.linalg.vector_norm(vector).clamp(min=1e-300)
    return float((vector.mT @ (gram @ vector)).sum()), 1e-4


def scaled(weight: Tensor) -> tuple[Tensor, float]:
    """The weight in float64 over a power of two that brings its largest entry into [1, 2), and that power.

    No square then overflows or vanishes. The power is 0 for zeros.

    Raises:
        InputError: a dtype of which nothing is proven, or a value that is not finite.
    """
    if weight.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"the weight is {weight.dtype}: bounds are proven of float32 and float64 weights; convert it with .float()"
        )
    exact = weight.detach().cpu().double()
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    if not math.isfinite(largest):
        raise InputError("the weight holds NaN or infinite values; train again with a lower learning rate")
    if largest == 0:
        return exact, 0.0
    scale = power_of_two(largest)
    return exact / scale, scale
