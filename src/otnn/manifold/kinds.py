"""The manifolds: four functions of a batch of points each."""

from typing import Protocol

import torch
from torch import Tensor

from otnn.polar import gram_excess, to_polar_
from otnn.precision import in_full_precision, without_autocast


class Manifold(Protocol):
    """A set of parameters with a way back to it."""

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw a random point of the given shape."""
        ...

    def tangent(self, point: Tensor, gradient: Tensor) -> Tensor:
        """Project gradients onto the directions that stay on the manifold to first order, at points of it."""
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

    def tangent(self, point: Tensor, gradient: Tensor) -> Tensor:
        """Return G - S X for wide matrices X, S the symmetric part of G X^T: what turns X, and does not stretch it.

        The Riemannian gradient of the embedded metric (Absil, Mahony and Sepulchre 2008, equation 3.35).

        Args:
            point: (..., rows, columns), on the manifold.
            gradient: of the same shape.
        """
        with without_autocast(point):
            rows, slope = wide(point), wide(gradient)
            product = slope @ rows.mT
            tangent = slope - (product + product.mT) / 2 @ rows
            return tangent if point.shape[-2] <= point.shape[-1] else tangent.mT

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

    def tangent(self, point: Tensor, gradient: Tensor) -> Tensor:
        """Take the part along its row out of the gradient of each row."""
        return gradient - (gradient * point).sum(dim=-1, keepdim=True) * point

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

    def tangent(self, point: Tensor, gradient: Tensor) -> Tensor:
        """Take the part along its matrix out of the gradient of each matrix."""
        return gradient - (gradient * point).sum(dim=(-2, -1), keepdim=True) * point

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


class NonNegative:
    """Numbers >= 0, such as a learned margin."""

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw uniformly from [0, 1)."""
        return torch.rand(*shape, generator=generator, dtype=dtype)

    def tangent(self, point: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient: all directions are allowed, and the way back cuts what leaves."""
        return gradient

    def retract(self, point: Tensor) -> Tensor:
        """Replace negative numbers by 0.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        if not torch.isfinite(point).all():
            raise FloatingPointError("a value is NaN or infinite")
        return point.clamp(min=0)

    def distance(self, point: Tensor) -> Tensor:
        """Return how far below 0 each number is."""
        return (-point).clamp(min=0)


class UnitInterval:
    """Numbers in [0, 1], such as a learned share."""

    def sample(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw uniformly from [0, 1)."""
        return torch.rand(shape, generator=generator, dtype=dtype)

    def tangent(self, point: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient: all directions are allowed, and the way back cuts what leaves."""
        return gradient

    def retract(self, point: Tensor) -> Tensor:
        """Replace numbers outside of [0, 1] by the nearer end.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        if not torch.isfinite(point).all():
            raise FloatingPointError("a value is NaN or infinite")
        return point.clamp(min=0, max=1)

    def distance(self, point: Tensor) -> Tensor:
        """Return how far outside of [0, 1] each number is."""
        return torch.maximum(-point, point - 1).clamp(min=0)


def wide(point: Tensor) -> Tensor:
    """Matrices with their short side first, in the same memory."""
    return point if point.shape[-2] <= point.shape[-1] else point.mT
