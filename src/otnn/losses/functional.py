"""Optimal-transport losses as functions of scores and labels; every one of them is minimised.

Conventions (docs/conventions.md): margins are per side; `hinge_weight` is lambda; labels are integers 0..classes-1, and
in a binary problem 1 is the positive class whose score is positive.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from otnn.checks import check_labels
from otnn.errors import InputError
from otnn.precision import at_least_float32

Margin = float | Tensor
KR_FORMS = ("soft", "one_vs_all")
HINGE_FORMS = ("joint", "separate")


def kr(scores: Tensor, labels: Tensor, *, prior: float | None = None, center: Margin = 0.0) -> Tensor:
    """Kantorovich-Rubinstein loss -(E[f | positive] - E[f | negative]): minus a lower bound of W1 if f is 1-Lipschitz.

    On a batch it is -mean_i s_i (f(x_i) - c) with s_i = 1/p on positives and -1/(1-p) on negatives. With `prior` it is
    unbiased whatever the batch holds, and the mean over equal batches is the loss of their union.

    Args:
        scores: (batch,) or (batch, 1).
        labels: (batch,) integers, 0 or 1.
        prior: p = P(label = 1) under the sampler, in (0, 1); by default the share in this batch, which must then hold
            both classes.
        center: c, any number that does not depend on the batch, such as a running mean: it changes the variance only.

    Returns:
        A scalar.

    Raises:
        InputError: wrong shapes or labels, a prior outside (0, 1), a batch of one class without a prior.

    Example:
        >>> kr(torch.tensor([3.0, 1.0]), torch.tensor([1, 0]))
        tensor(-2.)
    """
    scores, positive, prior = _binary(scores, labels, prior)
    weight = torch.full_like(scores, 1 / prior).where(positive, -1 / (1 - prior))
    return -(weight * (scores - center)).mean()


def hinge(scores: Tensor, labels: Tensor, *, margin: Margin = 1.0, sample_weight: Tensor | None = None) -> Tensor:
    """Hinge loss E[(m - Y f(x))_+] with Y = +1 on label 1 and -1 on label 0.

    Args:
        scores: (batch,) or (batch, 1).
        labels: (batch,) integers, 0 or 1.
        margin: m >= 0, per side.
        sample_weight: (batch,) weights of mean 1 under the sampler.

    Returns:
        A scalar >= 0.

    Raises:
        InputError: wrong shapes or labels, a negative margin.

    Example:
        >>> hinge(torch.tensor([3.0, 1.0]), torch.tensor([1, 0]), margin=1.0)
        tensor(1.)
    """
    scores, positive, _ = _binary(scores, labels, 0.5)
    _check_margin(margin)
    signed = torch.where(positive, scores, -scores)
    if sample_weight is not None and sample_weight.shape != signed.shape:
        raise InputError(
            f"sample_weight: expected one per sample, shape {tuple(signed.shape)}, got {tuple(sample_weight.shape)}"
        )
    return _weighted_mean((margin - signed).clamp(min=0), sample_weight)


def hkr(
    scores: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    hinge_weight: float | None = None,
    alpha: float | None = None,
    prior: float | None = None,
    center: Margin = 0.0,
    balanced: bool = False,
) -> Tensor:
    """Binary hKR loss -KR(f) + lambda E[(m - Y f)_+], with the penalty -lambda alpha m where `alpha` is given.

    With `alpha` the margin is meant to be learned jointly with f: at the optimum the share of the data with
    Y f < m is alpha (theory, section 1; arXiv 2206.06854).

    Args:
        scores: (batch,) or (batch, 1).
        labels: (batch,) integers, 0 or 1.
        margin: m >= 0, per side; a tensor that requires a gradient is learned.
        hinge_weight: lambda >= 0; 1/alpha if only alpha is given.
        alpha: target share of the data inside the margin.
        prior: see `kr`.
        center: see `kr`.
        balanced: weigh the hinge so that both classes count the same; the law behind alpha then has p = 1/2.

    Returns:
        A scalar.

    Raises:
        InputError: wrong shapes, labels or parameters, alpha without a finite optimal margin.

    Example:
        >>> hkr(torch.tensor([3.0, 1.0]), torch.tensor([1, 0]), margin=1.0, hinge_weight=10.0)
        tensor(8.)
    """
    scores, positive, prior = _binary(scores, labels, prior)
    if alpha is not None:
        check_alpha(alpha, 0.5 if balanced else prior)
    sample_weight = torch.where(positive, 0.5 / prior, 0.5 / (1 - prior)).to(scores.dtype) if balanced else None
    weight = resolve_hinge_weight(hinge_weight, alpha)
    loss = kr(scores, labels, prior=prior, center=center)
    loss = loss + weight * hinge(scores, labels, margin=margin, sample_weight=sample_weight)
    return loss if alpha is None else loss - weight * alpha * margin


def one_vs_all_hkr(
    scores: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    hinge_weight: float | None = None,
    alpha: float | None = None,
    priors: Tensor | None = None,
    center: Margin = 0.0,
) -> Tensor:
    """Sum over the classes k of the binary hKR loss of f_k, class k against all the others.

    Args:
        scores: (batch, classes).
        labels: (batch,) integers in 0..classes-1.
        margin: m >= 0, or (classes,) margins.
        hinge_weight: lambda >= 0; 1/alpha if only alpha is given.
        alpha: target share of the data inside each margin; see `hkr`.
        priors: (classes,) shares of the classes under the sampler; by default those of this batch.
        center: a number or (classes,) running means of the scores; see `kr`.

    Returns:
        A scalar.

    Raises:
        InputError: wrong shapes, labels or parameters, a class without share.

    Example:
        >>> one_vs_all_hkr(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([0, 1]), margin=1.0, hinge_weight=5.0)
        tensor(-4.)
    """
    scores, one_hot = at_least_float32(scores), _one_hot(scores, labels)
    _check_margin(margin)
    priors = _priors(one_hot, priors)
    if alpha is not None:
        check_alpha(alpha, float(torch.minimum(priors, 1 - priors).min()))
    weight = resolve_hinge_weight(hinge_weight, alpha)
    signed = torch.where(one_hot, scores, -scores)
    loss = _kr_one_vs_all(scores, one_hot, priors, center)
    loss = loss + weight * (margin - signed).clamp(min=0).mean(dim=0).sum()
    if alpha is None:
        return loss
    margins = torch.as_tensor(margin, device=scores.device, dtype=scores.dtype).expand(scores.shape[1])
    return loss - weight * alpha * margins.sum()


def soft_hkr(
    scores: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    hinge_weight: float | None = None,
    alpha: float | None = None,
    temperature: Margin = 10.0,
    priors: Tensor | None = None,
    center: Margin = 0.0,
    kr_form: str = "soft",
    hinge_form: str = "joint",
    detach_weights: bool = True,
) -> Tensor:
    """Soft multi-class hKR loss of arXiv 2206.06854 (theory, section 1).

    With w = softmax over the rivals k != y of `temperature` times f_k, the soft margin is
    M_y = (f_y - sum_k w_k f_k) / 2 and the loss E_v[-2 M_y + lambda ((m_y - M_y)_+ - alpha m_y)], v the class-balanced
    sample weights 1 / (classes * share of y); the last term only where `alpha` is given.

    Args:
        scores: (batch, classes).
        labels: (batch,) integers in 0..classes-1.
        margin: m >= 0, or (classes,) margins m_y.
        hinge_weight: lambda >= 0; 1/alpha if only alpha is given.
        alpha: target share of each class inside its margin, in (0, 1); with `hinge_form="separate"`, of the sum of both
            hinges' shares.
        temperature: tau > 0: how much the largest rival dominates.
        priors: (classes,) shares of the classes under the sampler; by default those of this batch.
        center: (classes,) running means for `kr_form="one_vs_all"`; see `kr`.
        kr_form: "soft" for -2 M_y, "one_vs_all" for sum_k {E_{not k} f_k - E_k f_k}.
        hinge_form: "joint" for (m - M_y)_+, "separate" for (m - f_y)_+ + sum_k w_k (m + f_k)_+ as in the code that the
            authors released.
        detach_weights: no gradient through w, which could push weak rivals up.

    Returns:
        A scalar.

    Raises:
        InputError: wrong shapes, labels or parameters, a class without share.

    Example:
        >>> soft_hkr(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([0, 1]), margin=1.0, hinge_weight=5.0)
        tensor(-2.)
    """
    scores, one_hot = at_least_float32(scores), _one_hot(scores, labels)
    _check_margin(margin)
    check_soft(alpha, temperature, kr_form, hinge_form)
    weight = resolve_hinge_weight(hinge_weight, alpha)
    priors = _priors(one_hot, priors)
    rivals = rival_weights(scores, one_hot, temperature, detach=detach_weights)
    own = scores[one_hot]
    soft_margin = (own - (rivals * scores).sum(dim=1)) / 2
    margins = torch.as_tensor(margin, device=scores.device, dtype=scores.dtype).expand(scores.shape[1])[labels.long()]
    if hinge_form == "joint":
        violation = (margins - soft_margin).clamp(min=0)
    else:
        rival_violation = (margins.unsqueeze(1) + scores).clamp(min=0)
        violation = (margins - own).clamp(min=0) + (rivals * rival_violation).sum(dim=1)
    penalty = violation if alpha is None else violation - alpha * margins
    balanced = 1 / (scores.shape[1] * priors[labels.long()])
    if kr_form == "one_vs_all":
        return _kr_one_vs_all(scores, one_hot, priors, center) + weight * _weighted_mean(penalty, balanced)
    return _weighted_mean(weight * penalty - 2 * soft_margin, balanced)


def temperature_cross_entropy(scores: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of `temperature` times the scores, divided by it: the usual rival of hKR on 1-Lipschitz networks.

    Args:
        scores: (batch, classes), or one score each, (batch,) or (batch, 1), positive for label 1.
        labels: (batch,) integers in 0..classes-1.
        temperature: > 0; large values approach a margin loss.

    Returns:
        A scalar >= 0.

    Raises:
        InputError: wrong shapes or labels, a temperature that is not positive.

    Example:
        >>> temperature_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), temperature=2.0)
        tensor(0.3466)
    """
    check_temperature(temperature)
    if scores.ndim == 1 or (scores.ndim == 2 and scores.shape[1] == 1):
        scores, positive, _ = _binary(scores, labels, 0.5)
        return F.binary_cross_entropy_with_logits(temperature * scores, positive.to(scores.dtype)) / temperature
    _one_hot(scores, labels)
    scores = at_least_float32(scores)
    return F.cross_entropy(temperature * scores, labels.long()) / temperature


def rival_weights(scores: Tensor, one_hot: Tensor, temperature: Margin, *, detach: bool) -> Tensor:
    """Softmax of temperature * f_k over the rivals k != y: (batch, classes), 0 at y, rows summing to 1."""
    logits = (scores.detach() if detach else scores) * temperature
    return torch.softmax(logits.masked_fill(one_hot, -torch.inf), dim=1)


def resolve_hinge_weight(hinge_weight: float | None, alpha: float | None) -> float:
    """Return lambda: as given, or 1/alpha.

    Raises:
        InputError: neither is given, alpha is not positive, or lambda is negative or not finite.
    """
    if alpha is not None and not alpha > 0:
        raise InputError(f"alpha: expected a share > 0 of the data inside the margin, got {alpha}")
    if hinge_weight is None:
        if alpha is None:
            raise InputError("expected hinge_weight, or alpha (the hinge weight then is 1/alpha), got neither")
        return 1 / alpha
    if not 0 <= hinge_weight < float("inf"):
        raise InputError(f"hinge_weight: expected a finite number >= 0, got {hinge_weight}")
    return hinge_weight


def check_temperature(temperature: Margin) -> None:
    """Refuse a temperature that is not a finite number > 0.

    Raises:
        InputError: see above.
    """
    if not 0 < float(temperature) < float("inf"):
        raise InputError(f"temperature: expected a finite number > 0, got {float(temperature)}")


def check_soft(alpha: float | None, temperature: Margin, kr_form: str, hinge_form: str) -> None:
    """Refuse settings of `soft_hkr` that it does not have.

    Raises:
        InputError: the setting that does not fit.
    """
    if kr_form not in KR_FORMS:
        raise InputError(f'kr_form: expected "soft" or "one_vs_all", got {kr_form!r}')
    if hinge_form not in HINGE_FORMS:
        raise InputError(f'hinge_form: expected "joint" or "separate", got {hinge_form!r}')
    if alpha is not None and not 0 < alpha < 1:
        raise InputError(f"alpha: expected the share of each class inside its margin, in (0, 1), got {alpha}")
    check_temperature(temperature)


def check_alpha(alpha: float, prior: float) -> None:
    """Refuse an alpha for which the hKR loss with a learnable margin has no finite minimum.

    Raises:
        InputError: alpha outside (0, 2 min(p, 1-p)].
    """
    ceiling = 2 * min(prior, 1 - prior)
    if not 0 < alpha <= ceiling + 1e-12:
        raise InputError(
            f"alpha must be in (0, 2 * min(p, 1 - p)] = (0, {ceiling:.4g}], got {alpha}: "
            "beyond it no finite margin is optimal; lower alpha or balance the classes"
        )


def _binary(scores: Tensor, labels: Tensor, prior: float | None) -> tuple[Tensor, Tensor, float]:
    """Scores as (batch,), the mask of positives, and the prior."""
    if scores.ndim == 2 and scores.shape[1] == 1:
        scores = scores.squeeze(1)
    scores = at_least_float32(scores)
    if scores.ndim != 1 or len(scores) == 0:
        raise InputError(
            f"scores: expected a batch of one score each, (batch,) or (batch, 1), got {tuple(scores.shape)}"
        )
    check_labels(labels, len(scores), 2)
    positive = labels == 1
    if prior is None:
        prior = float(positive.double().mean())
        if not 0 < prior < 1:
            raise InputError("a batch of one class says nothing of a distance; give prior=, the share of label 1")
    if not 0 < prior < 1:
        raise InputError(f"prior: expected the share of label 1, in (0, 1), got {prior}")
    return scores, positive, prior


def _one_hot(scores: Tensor, labels: Tensor) -> Tensor:
    if scores.ndim != 2 or scores.shape[1] < 2 or len(scores) == 0:
        raise InputError(
            f"scores: expected (batch, classes) with at least 2 classes, got {tuple(scores.shape)}; "
            "a single output takes the binary losses"
        )
    check_labels(labels, len(scores), scores.shape[1])
    return F.one_hot(labels.long(), scores.shape[1]).bool()


def _priors(one_hot: Tensor, priors: Tensor | None) -> Tensor:
    if priors is None:
        priors = one_hot.double().mean(dim=0)
        if bool((priors == 0).any()):
            raise InputError("a class is missing from the batch; give priors=, the shares of the classes")
    if priors.shape != one_hot.shape[1:] or not bool(((priors > 0) & (priors < 1)).all()):
        given = [round(p, 4) for p in priors.flatten().tolist()]
        raise InputError(f"priors: expected {one_hot.shape[1]} shares in (0, 1), got {given}")
    return priors


def _kr_one_vs_all(scores: Tensor, one_hot: Tensor, priors: Tensor, center: Margin) -> Tensor:
    weight = torch.where(one_hot, 1 / priors, -1 / (1 - priors)).to(scores.dtype)
    return -(weight * (scores - center)).mean(dim=0).sum()


def _weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (weight.to(values.dtype) * values).mean()


def _check_margin(margin: Margin) -> None:
    values = torch.as_tensor(margin).detach()
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise InputError(f"margin: expected finite numbers >= 0 (per side), got {values.tolist()}")
