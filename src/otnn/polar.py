"""Polar factors of matrices, in place: the nearest matrices with orthonormal rows."""

import math

import torch
from torch import Tensor

from otnn.precision import without_autocast

# The series converges where |Gram - I| < 1 in the spectral norm; above this bound of it the exact factor is taken.
_SERIES_REACH = 0.9
# Coefficients of (1 + e)^(-1/2) = 1 + c_1 e + c_2 e^2 + ...
_SERIES = [math.comb(2 * k, k) / (-4.0) ** k for k in range(7)]
# Columns that are corrected at once: their corrections stay in the cache
_COLUMNS = 1024


@torch.no_grad()
def to_polar_(wide: Tensor) -> None:
    """Replace each matrix by its polar factor, to the accuracy of its dtype.

    Near the polar factor the series G^(-1/2) = I - E/2 + 3/8 E^2 - ..., with E = G - I, works in the small Gram matrix
    G. It goes as far as the distance asks, up to E^6. Where that is not enough, the mean eigenvalue m of G is taken out
    first, G = m (I + E'), because a step off the manifold stretches all rows; then the series is repeated. It diverges
    far from the manifold, so a matrix whose E may exceed 0.9 takes the exact polar factor in float64.

    Args:
        wide: (..., rows, columns), finite, rows <= columns.

    Raises:
        FloatingPointError: a value is NaN or infinite; no matrix is changed then.

    Example:
        >>> rows = torch.tensor([[1.1, 0.0, 0.1], [0.0, 0.9, 0.1]])
        >>> to_polar_(rows)
        >>> bool(torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-6))
        True
    """
    if wide.numel() == 0:
        return
    with without_autocast(wide):
        excess = gram_excess(wide)
        square = excess @ excess
        spread = _spread(square)
        farthest = float(spread.max())
        if not farthest < _SERIES_REACH:  # also true for NaN
            far = ~(spread < _SERIES_REACH)
            wide[far] = _exact(wide[far])
            to_polar_(wide)
            return
        floor = torch.finfo(wide.dtype).eps * math.sqrt(wide.shape[-2])
        while farthest > floor:
            # terms below E^k take the eigenvalues e of E below |e|^k; where 7 are too few, 5 and then a new Gram matrix
            root = None
            if farthest**7 > floor:
                excess, square, farthest, root = _centred(excess, square, farthest)
            order = next((k for k in (3, 5, 7) if farthest**k <= floor), 5)
            correction = series(excess, square, order)
            if root is not None:
                correction = correction * root
                correction.diagonal(dim1=-2, dim2=-1).add_(root.squeeze(-1) - 1)
            for columns in wide.split(_COLUMNS, -1):
                columns.add_(correction @ columns)
            farthest = farthest**order
            if farthest > floor:
                excess = gram_excess(wide)
                square = excess @ excess


def gram_excess(wide: Tensor) -> Tensor:
    """G - I of the rows of (..., rows, columns)."""
    gram = wide @ wide.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def series(excess: Tensor, square: Tensor, order: int) -> Tensor:
    """The terms of (I + E)^(-1/2) - I below E^order, of order 3, 5 or 7; `square` is E^2.

    With few products: c_1 E + c_2 E^2, and for more terms c_1 E + E^2 (c_2 + c_3 E + c_4 E^2), and so on.
    """
    total = torch.add(_SERIES[order - 2] * excess, square, alpha=_SERIES[order - 1])
    for k in range(order - 3, 0, -2):
        total.diagonal(dim1=-2, dim2=-1).add_(_SERIES[k])
        total = torch.add(square @ total, excess, alpha=_SERIES[k - 1])
    return total


def _spread(square: Tensor) -> Tensor:
    """At least the spectral norm of E, from E^2."""
    spread: Tensor = torch.linalg.vector_norm(square, dim=(-2, -1)).sqrt()
    return spread


def _centred(excess: Tensor, square: Tensor, farthest: float) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """E', E'^2, a bound of E' and m^(-1/2), where I + E = m (I + E') with the mean eigenvalue m; if it is smaller."""
    mean = excess.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + 1
    centred = excess / mean.unsqueeze(-1)
    centred.diagonal(dim1=-2, dim2=-1).add_(1 / mean - 1)
    square_of_it = centred @ centred
    nearest = float(_spread(square_of_it).max())
    if not nearest < farthest:
        return excess, square, farthest, None
    return centred, square_of_it, nearest, mean.rsqrt().unsqueeze(-1)


def _exact(wide: Tensor) -> Tensor:
    """Polar factor of finite matrices (batch, rows, columns), whatever their scale or rank, in float64.

    The eigenvectors of the small Gram matrix give it where the matrix is well conditioned (the series polishes it
    afterwards), the singular value decomposition elsewhere.
    """
    if not torch.isfinite(wide).all():
        raise FloatingPointError("a value is NaN or infinite")
    exact = wide.double()
    scale = exact.abs().amax(dim=(-2, -1), keepdim=True)
    exact = exact / torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(exact @ exact.mT)
    if bool((values[..., 0] > 1e-8 * values[..., -1]).all()):
        polar: Tensor = (vectors / values.sqrt().unsqueeze(-2)) @ vectors.mT @ exact
    else:
        u, _, vh = torch.linalg.svd(exact, full_matrices=False)
        polar = u @ vh
    return polar.to(wide.dtype)
