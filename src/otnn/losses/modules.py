"""The losses as modules: they hold priors, running means and learned margins, and call the functions.

State is a buffer, moves only in `train()` mode, and is saved with the module. A learned margin is a parameter on the
manifold of non-negative numbers: give the loss to `keep_on_manifold` beside the network, and its parameters to the
optimizer.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.losses import functional as L
from otnn.manifold import Interval, Manifold
from otnn.precision import at_least_float32

_MOMENTUM = 0.99


class Loss(nn.Module):
    """Base of the losses: minimised, called with scores and integer labels."""

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of a batch."""
        raise NotImplementedError

    def warn_at_zero_margin(self) -> None:
        """Warn where a learned margin has come to rest at 0; call it at the end of training."""
        margin = getattr(self, "margin", None)
        if isinstance(margin, nn.Parameter) and bool((margin == 0).any()):
            warnings.warn(
                "a learned margin is 0: the classes overlap by more than alpha, or the hinge weight is small; "
                "raise alpha or fix the margin",
                stacklevel=2,
            )


class _RunningMean(nn.Module):
    """Exponential mean of batch values, bias-corrected, at rest in `eval()`, equal on all processes."""

    value: Tensor
    steps: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self) -> Tensor:
        """Return the mean of the batches so far, which does not depend on the next one; 0 before the first."""
        return self.value / (1 - _MOMENTUM**self.steps).clamp(min=1e-12)

    @torch.no_grad()
    def update(self, batch_values: Tensor) -> None:
        """Take a batch in, in `train()` mode only; values that are not finite are left out."""
        if not self.training:
            return
        batch_values = batch_values.detach().to(self.value.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(batch_values)
            batch_values = batch_values / dist.get_world_size()
        finite = torch.isfinite(batch_values).all()
        self.value.lerp_(torch.where(finite, batch_values, self.value), 1 - _MOMENTUM)
        self.steps += finite


class _MarginLoss(Loss):
    """A loss with a margin that is fixed (`margin`), or learned where only `alpha` sets it."""

    margin: Tensor

    def __init__(self, margin: float | Sequence[float] | None, alpha: float | None, margins: int) -> None:
        super().__init__()
        self.alpha = alpha
        self.manifolds: dict[str, Manifold] = {}
        if margin is None:
            if alpha is None:
                raise InputError("expected margin=, or alpha= for a learned margin, got neither")
            self.margin = nn.Parameter(torch.full((margins,), 0.1).squeeze())
            self.manifolds["margin"] = Interval()
        else:
            if alpha is not None:
                raise InputError("expected margin= for a fixed margin or alpha= for a learned one, got both")
            fixed = torch.as_tensor(margin, dtype=torch.get_default_dtype())
            L._check_margin(fixed)
            if fixed.ndim and fixed.shape != (margins,):
                raise InputError(f"margin: expected one number or {margins}, got {fixed.numel()}")
            self.register_buffer("margin", fixed)

    def _usable_margin(self) -> Tensor:
        """The margin; inside a step of a line search, before it is retracted, a learned one may be negative."""
        return self.margin.clamp(min=0)


def _check_learned(alpha: float, prior: float) -> None:
    """Refuse an alpha without a finite margin, and warn where most of the rarer class would lie inside it."""
    L.check_alpha(alpha, prior)
    inside = alpha / (2 * min(prior, 1 - prior))
    if inside > 0.25:
        warnings.warn(
            f"alpha = {alpha:g} puts {inside:.0%} of the rarer class inside the margin at the optimum; "
            "lower alpha or balance the classes",
            stacklevel=3,
        )


class KRLoss(Loss):
    """Module of `otnn.losses.kr`, centred by a running mean of the scores.

    Args:
        prior: P(label = 1) under the sampler.
    """

    def __init__(self, prior: float = 0.5) -> None:
        super().__init__()
        self.prior = prior
        self.running_mean = _RunningMean(1)

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of (batch,) or (batch, 1) scores."""
        scores = at_least_float32(scores)
        loss = L.kr(scores, labels, prior=self.prior, center=self.running_mean().to(scores.dtype))
        self.running_mean.update(scores.mean().view(1))
        return loss


class HingeLoss(Loss):
    """Module of `otnn.losses.hinge`.

    Args:
        margin: m >= 0, per side.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        L._check_margin(margin)
        self.margin = margin

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of (batch,) or (batch, 1) scores."""
        return L.hinge(scores, labels, margin=self.margin)


class HKRLoss(_MarginLoss):
    """Module of `otnn.losses.hkr`: fixed margin, or learned where `alpha` is given instead.

    Args:
        margin: m >= 0, per side, or None to learn it.
        hinge_weight: lambda >= 0; 1/alpha by default if the margin is learned.
        alpha: target share of the data inside the learned margin, in (0, 2 min(p, 1-p)].
        prior: p = P(label = 1) under the sampler.
        balanced: weigh the hinge so that both classes count the same; the law behind alpha then has p = 1/2.

    Raises:
        InputError: parameters that do not fit.

    Example:
        >>> loss = HKRLoss(alpha=0.1)
        >>> loss.margin.requires_grad, L.resolve_hinge_weight(None, 0.1)
        (True, 10.0)
    """

    def __init__(
        self,
        margin: float | None = None,
        hinge_weight: float | None = None,
        alpha: float | None = None,
        prior: float = 0.5,
        balanced: bool = False,
    ) -> None:
        super().__init__(margin, alpha, 1)
        self.hinge_weight = L.resolve_hinge_weight(hinge_weight, alpha)
        if not 0 < prior < 1:
            raise InputError(f"prior: expected the share of label 1, in (0, 1), got {prior}")
        self.prior, self.balanced = prior, balanced
        if alpha is not None:
            _check_learned(alpha, 0.5 if balanced else prior)
        self.running_mean = _RunningMean(1)

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of (batch,) or (batch, 1) scores."""
        scores = at_least_float32(scores)
        loss = L.hkr(
            scores,
            labels,
            margin=self._usable_margin(),
            hinge_weight=self.hinge_weight,
            alpha=self.alpha,
            prior=self.prior,
            center=self.running_mean().to(scores.dtype),
            balanced=self.balanced,
        )
        self.running_mean.update(scores.mean().view(1))
        return loss


class OneVsAllHKRLoss(_MarginLoss):
    """Module of `otnn.losses.one_vs_all_hkr`.

    Args:
        priors: (classes,) shares of the classes under the sampler.
        margin: m >= 0 or one per class, or None to learn one per class.
        hinge_weight: lambda >= 0; 1/alpha by default if the margins are learned.
        alpha: target share of the data inside each learned margin, at most twice the smallest share.

    Raises:
        InputError: parameters that do not fit.
    """

    priors: Tensor

    def __init__(
        self,
        priors: Tensor,
        margin: float | Sequence[float] | None = None,
        hinge_weight: float | None = None,
        alpha: float | None = None,
    ) -> None:
        super().__init__(margin, alpha, len(priors))
        self.hinge_weight = L.resolve_hinge_weight(hinge_weight, alpha)
        if alpha is not None:
            _check_learned(alpha, float(torch.minimum(priors, 1 - priors).min()))
        self.register_buffer("priors", priors.double())
        self.running_mean = _RunningMean(len(priors))

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of (batch, classes) scores."""
        scores = at_least_float32(scores)
        loss = L.one_vs_all_hkr(
            scores,
            labels,
            margin=self._usable_margin(),
            hinge_weight=self.hinge_weight,
            alpha=self.alpha,
            priors=self.priors,
            center=self.running_mean().to(scores.dtype),
        )
        self.running_mean.update(scores.mean(dim=0))
        return loss


class SoftHKRLoss(_MarginLoss):
    """Module of `otnn.losses.soft_hkr`.

    Args:
        priors: (classes,) shares of the classes under the sampler.
        margin: m >= 0 or one per class, or None to learn one per class.
        hinge_weight: lambda >= 0; 1/alpha by default if the margins are learned.
        alpha: target share of each class inside its learned margin, in (0, 1).
        temperature: tau > 0.
        adaptive_temperature: divide tau by a running mean of |f|, as the code that the authors released does.
        kr_form: "soft" or "one_vs_all".
        hinge_form: "joint" or "separate".
        detach_weights: no gradient through the softmax weights.

    Raises:
        InputError: parameters that do not fit.

    Example:
        >>> released = SoftHKRLoss(torch.full((10,), 0.1), margin=0.5, hinge_weight=49.0, hinge_form="separate",
        ...                        adaptive_temperature=True, detach_weights=False)
        >>> released(torch.zeros(4, 10), torch.arange(4))
        tensor(49.)
    """

    priors: Tensor

    def __init__(
        self,
        priors: Tensor,
        margin: float | Sequence[float] | None = None,
        hinge_weight: float | None = None,
        alpha: float | None = None,
        temperature: float = 10.0,
        adaptive_temperature: bool = False,
        kr_form: str = "soft",
        hinge_form: str = "joint",
        detach_weights: bool = True,
    ) -> None:
        super().__init__(margin, alpha, len(priors))
        self.hinge_weight = L.resolve_hinge_weight(hinge_weight, alpha)
        L.check_soft(alpha, temperature, kr_form, hinge_form)
        self.temperature, self.kr_form, self.hinge_form = temperature, kr_form, hinge_form
        self.detach_weights = detach_weights
        self.register_buffer("priors", priors.double())
        self.running_mean = _RunningMean(len(priors))
        self.running_scale = _RunningMean(1) if adaptive_temperature else None

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of (batch, classes) scores."""
        scores = at_least_float32(scores)
        temperature: float | Tensor = self.temperature
        if self.running_scale is not None:
            # the first batch has no mean yet: its own scale stands in
            scale = scores.detach().abs().mean().view(1)
            scale = torch.where(self.running_scale.steps > 0, self.running_scale(), scale)
            temperature = temperature / scale.clamp(min=0.005)
        loss = L.soft_hkr(
            scores,
            labels,
            margin=self._usable_margin(),
            hinge_weight=self.hinge_weight,
            alpha=self.alpha,
            temperature=temperature,
            priors=self.priors,
            center=self.running_mean().to(scores.dtype),
            kr_form=self.kr_form,
            hinge_form=self.hinge_form,
            detach_weights=self.detach_weights,
        )
        self.running_mean.update(scores.mean(dim=0))
        if self.running_scale is not None:
            self.running_scale.update(scores.abs().mean().view(1))
        return loss


class TemperatureCrossEntropyLoss(Loss):
    """Module of `otnn.losses.temperature_cross_entropy`.

    Args:
        temperature: > 0.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        L.check_temperature(temperature)
        self.temperature = temperature

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of (batch, classes) scores."""
        return L.temperature_cross_entropy(scores, labels, temperature=self.temperature)
