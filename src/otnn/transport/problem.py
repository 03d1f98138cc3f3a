"""What is to be solved: the hKR problem on two finite samples (theory, section 2; arXiv 2206.06854, appendix).

Primal:  inf over 1-Lipschitz f of  -KR(f) + lambda E[(m - Y f)_+]
Dual:    - min over plans pi >= 0 of  sum c pi - 2 m (|pi| - 1)

under the ranges a_i <= sum_j pi_ij <= a_i (1 + lambda p) and b_j <= sum_i pi_ij <= b_j (1 + lambda (1 - p)). A learned
margin adds -lambda alpha m to the primal, which is minimised over m >= 0 as well; its dual is - min sum c pi under
|pi| >= 1 + lambda alpha / 2 and the same ranges.
"""

import math

import torch
from torch import Tensor

from otnn.checks import check_images
from otnn.errors import InputError
from otnn.losses.functional import check_alpha, resolve_hinge_weight

# How often a sample may be carried, at most: beyond that the masses of the dual are too unlike for rounding.
_OFTEN = 1e5
_RANGE = 1e100
# The smallest weight of a sample, as a share of equal ones: a smaller one is lost beside the others.
_LIGHT = 1e-9
_SUM = 1e-6  # weights of float32 sum to 1 up to that


class TransportProblem:
    """The hKR problem between a sample of the positive class and one of the negative class.

    Args:
        x: (n, ...) positives, whose potential is high, as a tensor or an array; each sample is flattened.
        z: (m, ...) negatives.
        hinge_weight: lambda >= 0; 0 is the plain Wasserstein-1 problem. 1/alpha if only `alpha` is given.
        margin: m >= 0 per side, fixed; needed where hinge_weight > 0 and `alpha` is not given.
        alpha: the margin is learned, with this share of the data inside it, in (0, 2 min(p, 1 - p)].
        sample_weight_x: (n,) weights a > 0 that sum to 1; equal by default.
        sample_weight_z: (m,) weights b > 0 that sum to 1; equal by default.
        prior: p = P(positive), in (0, 1); by default n / (n + m), the share of the two samples.
        norm: of the ground cost ||x - z||: 2 (Euclidean), 1, infinity, or any p >= 1.

    Raises:
        InputError: samples, weights or parameters that make no such problem.

    Example:
        >>> problem = TransportProblem(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]), hinge_weight=0.0)
        >>> problem.prior, problem.sample_weight_x
        (0.6666666666666666, tensor([0.5000, 0.5000], dtype=torch.float64))
    """

    def __init__(
        self,
        x: Tensor,
        z: Tensor,
        *,
        hinge_weight: float | None = None,
        margin: float | None = None,
        alpha: float | None = None,
        sample_weight_x: Tensor | None = None,
        sample_weight_z: Tensor | None = None,
        prior: float | None = None,
        norm: float = 2.0,
    ) -> None:
        x, z = torch.as_tensor(x), torch.as_tensor(z)
        for name, sample in (("x", x), ("z", z)):
            check_images(sample, what=name)
        if x.shape[1:] != z.shape[1:]:
            raise InputError(
                f"x and z: expected samples of one shape, got {tuple(x.shape[1:])} and {tuple(z.shape[1:])}; "
                "reshape one of them"
            )
        if not norm >= 1:
            raise InputError(f"norm: expected 1, 2, inf or any p >= 1, got {norm}")
        self.shape = tuple(x.shape[1:])
        for name, sample in (("x", x), ("z", z)):
            _check_range(name, sample)
        self._x, self._z = (sample.detach().flatten(1).cpu() for sample in (x, z))
        self.norm = float(norm)
        self.prior = len(x) / (len(x) + len(z)) if prior is None else float(prior)
        if not 0 < self.prior < 1:
            raise InputError(f"prior: expected the share of the positives, in (0, 1), got {prior}")
        alpha = None if alpha is None else float(alpha)
        self.hinge_weight = resolve_hinge_weight(None if hinge_weight is None else float(hinge_weight), alpha)
        self.alpha = alpha
        self.margin = _checked_margin(margin, alpha, self.hinge_weight)
        if alpha is not None:
            check_alpha(alpha, self.prior)
        slacks = (self.slack_x, self.slack_z)
        if self.hinge_weight > 0 and not 1 / _OFTEN <= min(slacks) <= max(slacks) <= _OFTEN:
            raise InputError(
                f"hinge_weight = {self.hinge_weight:g} with prior = {self.prior:g}: expected hinge_weight times prior "
                f"and times 1 - prior in [{1 / _OFTEN:g}, {_OFTEN:g}], where rounding lets the dual be solved; "
                "take a smaller hinge_weight, or 0 for the plain problem"
            )
        self.sample_weight_x = _weights("sample_weight_x", sample_weight_x, len(x))
        self.sample_weight_z = _weights("sample_weight_z", sample_weight_z, len(z))

    @property
    def x(self) -> Tensor:
        """The positives, flat and in float64: (n, dimensions), made anew at each call."""
        return self._x.double()

    @property
    def z(self) -> Tensor:
        """The negatives likewise: (m, dimensions)."""
        return self._z.double()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of positives, negatives and dimensions."""
        return len(self._x), len(self._z), self._x.shape[1]

    @property
    def learns_margin(self) -> bool:
        """Whether the margin is part of the solution."""
        return self.alpha is not None and self.hinge_weight > 0

    @property
    def slack_x(self) -> float:
        """How many times more than once a positive may be carried: lambda p."""
        return self.hinge_weight * self.prior

    @property
    def slack_z(self) -> float:
        """How many times more than once a negative may be carried: lambda (1 - p)."""
        return self.hinge_weight * (1 - self.prior)

    def subset(self, rows: Tensor, columns: Tensor) -> "TransportProblem":
        """The same problem on some of the samples, with their weights scaled to sum to 1 again.

        Args:
            rows: indices of the positives to keep.
            columns: indices of the negatives to keep.
        """
        a, b = self.sample_weight_x[rows], self.sample_weight_z[columns]
        return TransportProblem(
            self._x[rows],
            self._z[columns],
            hinge_weight=self.hinge_weight,
            margin=self.margin,
            alpha=self.alpha,
            sample_weight_x=a / a.sum(),
            sample_weight_z=b / b.sum(),
            prior=self.prior,
            norm=self.norm,
        )

    def loss(self, potential_x: Tensor, potential_z: Tensor, margin: float | None = None) -> float:
        """The loss that is minimised, of any f given by its values on both samples.

        Args:
            potential_x: (n,) f on the positives.
            potential_z: (m,) f on the negatives.
            margin: m >= 0 in place of the fixed one; needed where it is learned.
        """
        margin = self.margin if margin is None else margin
        f_x, f_z = potential_x.double(), potential_z.double()
        a, b = self.sample_weight_x, self.sample_weight_z
        value = float(b @ f_z - a @ f_x)
        if self.hinge_weight == 0:
            return value
        if margin is None:
            raise InputError("margin: expected the margin that was learned with the potential, got none")
        value += float(self.slack_x * (a @ (margin - f_x).clamp(min=0)))
        value += float(self.slack_z * (b @ (margin + f_z).clamp(min=0)))
        return value - (self.hinge_weight * self.alpha * margin if self.alpha is not None else 0.0)

    def __repr__(self) -> str:
        margin = f"alpha={self.alpha:g}" if self.alpha is not None else f"margin={self.margin}"
        return f"TransportProblem({len(self._x)} x {len(self._z)}, hinge_weight={self.hinge_weight:g}, {margin})"


def _check_range(name: str, sample: Tensor) -> None:
    """Refuse numbers whose squares leave the range of float64."""
    largest = float(sample.detach().abs().max())
    if not (largest == 0 or 1 / _RANGE <= largest <= _RANGE):
        raise InputError(
            f"{name}: expected values of a size between {1 / _RANGE:g} and {_RANGE:g}, got up to {largest:g}; "
            "rescale all samples"
        )


def _checked_margin(margin: float | None, alpha: float | None, hinge_weight: float) -> float | None:
    if margin is not None and alpha is not None:
        raise InputError("expected margin= for a fixed margin or alpha= for a learned one, got both")
    if margin is not None and not 0 <= margin < math.inf:
        raise InputError(f"margin: expected a finite number >= 0, got {margin}")
    if margin is None and alpha is None and hinge_weight > 0:
        raise InputError(f"hinge_weight = {hinge_weight:g} needs margin=, or alpha= for a learned margin; got neither")
    return None if margin is None else float(margin)


def _weights(name: str, weights: Tensor | None, count: int) -> Tensor:
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    weights = torch.as_tensor(weights).detach().double().cpu()
    if weights.shape != (count,):
        raise InputError(f"{name}: expected one weight per sample, shape ({count},), got {tuple(weights.shape)}")
    if not bool((torch.isfinite(weights) & (weights > 0)).all()):
        bad = int((~(torch.isfinite(weights) & (weights > 0))).nonzero()[0])
        raise InputError(f"{name}: expected weights > 0, got {float(weights[bad]):g} at {bad}; leave such samples out")
    if bool((weights < _LIGHT / count).any()):
        bad = int((weights < _LIGHT / count).nonzero()[0])
        raise InputError(
            f"{name}: expected weights of at least {_LIGHT:g} / {count}, got {float(weights[bad]):g} at {bad}; "
            "leave such samples out"
        )
    total = float(weights.sum())
    if abs(total - 1) > _SUM:
        raise InputError(f"{name}: expected weights that sum to 1, got a sum of {total:.10g}; divide them by it")
    return weights / total
