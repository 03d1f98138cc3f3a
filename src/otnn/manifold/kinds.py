"""The manifolds: four functions of a batch of points each."""

import math
from typing import Protocol

import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.polar import gram_excess, to_polar_
from otnn.precision import in_full_precision, without_autocast


class Manifold(Protocol):
    """A set of parameters with a way back to it."""

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw a random point of the given shape."""
        ...

    def project_(self, point: Tensor, gradient: Tensor) -> None:
        """Take out of gradients, in place, what leaves the manifold to first order, at points of it."""
        ...

    def retract(self, point: Tensor) -> Tensor:
        """Bring a finite tensor (..., rows, columns) back to the manifold; a point on it is left as it is."""
        ...

    def distance(self, point: Tensor) -> Tensor:
        """Tell how far each point is from the manifold: (...,), 0 on it."""
        ...


class Stiefel:
    """Matrices whose short side is orthonormal: {X : X X^T = I} if wide, {X : X^T X = I} if tall.

    Distances are Frobenius norms of the Gram matrix minus the identity.

    Example:
        >>> stiefel = Stiefel()
        >>> weight = stiefel.sample(3, 5, generator=torch.Generator().manual_seed(0))
        >>> bool(stiefel.distance(weight) < 1e-6)
        True
        >>> bool(stiefel.distance(stiefel.retract(weight + 0.3)) < 1e-6)
        True
    """

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw from the uniform (Haar) law: the orthogonal factor of a Gaussian matrix with the signs fixed."""
        *batch, rows, columns = shape
        gaussian = torch.randn(*batch, max(rows, columns), min(rows, columns), generator=generator).double()
        q, r = torch.linalg.qr(gaussian)
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        tall: Tensor = (q * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)).to(dtype or torch.get_default_dtype())
        return tall if rows >= columns else tall.mT.contiguous()

    def project_(self, point: Tensor, gradient: Tensor) -> None:
        """Make of G for wide matrices X the tangent G - S X, S the symmetric part of G X^T: X is turned, not stretched.

        The Riemannian gradient of the embedded metric (Absil, Mahony and Sepulchre 2008, equation 3.35).

        Args:
            point: (..., rows, columns), on the manifold.
            gradient: of the same shape, changed in place.
        """
        with without_autocast(point):
            rows, slope = wide_batch(point), wide_batch(gradient)
            product = slope @ rows.mT
            slope.baddbmm_(product + product.mT, rows, alpha=-0.5)

    def retract(self, point: Tensor) -> Tensor:
        """Return the polar factor of each matrix, to the accuracy of its dtype (see `otnn.polar.to_polar_`).

        Args:
            point: (..., rows, columns), finite.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        point = point.detach().clone()
        to_polar_(wide(point))
        return point

    @in_full_precision
    def distance(self, point: Tensor) -> Tensor:
        """Return ||G - I||_F of each matrix, G the Gram matrix of the short side."""
        distance: Tensor = torch.linalg.matrix_norm(gram_excess(wide(point)))
        return distance


class UnitRows:
    """Matrices whose rows have Euclidean norm 1 (the oblique manifold).

    Example:
        >>> UnitRows().retract(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw each row uniformly on the sphere."""
        return self.retract(torch.randn(*shape, generator=generator, dtype=dtype))

    def project_(self, point: Tensor, gradient: Tensor) -> None:
        """Take the part along its row out of the gradient of each row, in place."""
        gradient.addcmul_((gradient * point).sum(dim=-1, keepdim=True), point, value=-1)

    def retract(self, point: Tensor) -> Tensor:
        """Divide each row by its norm; a row of zeros becomes the constant row.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        scale = point.abs().amax(dim=-1, keepdim=True)
        if not torch.isfinite(scale).all():
            raise FloatingPointError("a value is NaN or infinite")
        scaled = torch.where(scale > 0, point / torch.where(scale > 0, scale, 1.0), 1.0)
        unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        return unit

    def distance(self, point: Tensor) -> Tensor:
        """Return the largest | ||row|| - 1 | of each matrix."""
        distance: Tensor = (torch.linalg.vector_norm(point, dim=-1) - 1).abs().amax(dim=-1)
        return distance


class Frobenius:
    """Matrices of Frobenius norm 1: the sphere of all their entries.

    Example:
        >>> Frobenius().retract(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor([[0.6000, 0.0000],
                [0.0000, 0.8000]])
    """

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw each matrix uniformly on the sphere."""
        return self.retract(torch.randn(*shape, generator=generator, dtype=dtype))

    def project_(self, point: Tensor, gradient: Tensor) -> None:
        """Take the part along its matrix out of the gradient of each matrix, in place."""
        gradient.addcmul_((gradient * point).sum(dim=(-2, -1), keepdim=True), point, value=-1)

    def retract(self, point: Tensor) -> Tensor:
        """Divide each matrix by its norm; a matrix of zeros becomes the constant one.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        return UnitRows().retract(point.flatten(-2)).view_as(point)

    def distance(self, point: Tensor) -> Tensor:
        """Return | ||X||_F - 1 | of each matrix."""
        distance: Tensor = (torch.linalg.matrix_norm(point) - 1).abs()
        return distance


class Interval:
    """Numbers in [0, upper]: a learned share with upper = 1, a learned margin without a bound.

    Args:
        upper: the largest number, > 0.

    Raises:
        InputError: another one.

    Example:
        >>> Interval(1).retract(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, upper: float = math.inf) -> None:
        if not upper > 0:
            raise InputError(f"upper: expected a number > 0, got {upper}")
        self.upper = upper

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw uniformly from [0, upper), of [0, 1) without a bound."""
        numbers = torch.rand(shape, generator=generator, dtype=dtype)
        return numbers * self.upper if math.isfinite(self.upper) else numbers

    def project_(self, point: Tensor, gradient: Tensor) -> None:
        """Leave the gradient as it is: all directions are allowed, and the way back cuts what leaves."""

    def retract(self, point: Tensor) -> Tensor:
        """Replace numbers outside by the nearer end.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        if not torch.isfinite(point).all():
            raise FloatingPointError("a value is NaN or infinite")
        return point.clamp(min=0, max=self.upper)

    def distance(self, point: Tensor) -> Tensor:
        """Return how far outside each number is."""
        return torch.maximum(-point, point - self.upper).clamp(min=0)


def wide(point: Tensor) -> Tensor:
    """Matrices with their short side first, in the same memory."""
    return point if point.shape[-2] <= point.shape[-1] else point.mT


def wide_batch(tensor: Tensor) -> Tensor:
    """Matrices (..., rows, columns) as one batch with their short side first, in the same memory."""
    return wide(tensor.view(tensor.shape[:-2].numel(), *tensor.shape[-2:]))
