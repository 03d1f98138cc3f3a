"""Proofs in rational arithmetic: no tolerance, no rounding, only for small matrices."""

from fractions import Fraction

from torch import Tensor


def is_norm_bound(bound: float, matrix: Tensor) -> bool:
    """Whether bound^2 I - M M^T is positive semidefinite."""
    wide = matrix.detach().double()
    rows = _fractions(wide.T if wide.shape[0] > wide.shape[1] else wide)
    gram = [[sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0)) for b in rows] for a in rows]
    return _is_above(Fraction(bound) ** 2, gram)


def is_eigenvalue_bound(bound: float, symmetric: Tensor) -> bool:
    """Whether bound I - S is positive semidefinite."""
    return _is_above(Fraction(bound), _fractions(symmetric))


def _fractions(matrix: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in matrix.tolist()]


def _is_above(level: Fraction, symmetric: list[list[Fraction]]) -> bool:
    """Symmetric elimination of level I - S: no pivot may be negative, nor 0 beside anything else."""
    size = len(symmetric)
    rest = [[(level if i == j else 0) - symmetric[i][j] for j in range(size)] for i in range(size)]
    for k in range(size):
        pivot = rest[k][k]
        if pivot < 0 or (pivot == 0 and any(rest[i][k] for i in range(k, size))):
            return False
        for i in range(k + 1, size):
            factor = rest[i][k] / pivot if pivot else Fraction(0)
            rest[i] = [a - factor * b for a, b in zip(rest[i], rest[k], strict=True)]
    return True
