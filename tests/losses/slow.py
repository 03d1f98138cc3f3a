"""The formulas of the losses, one sample and one class at a time, as the theory writes them."""

import math
from collections.abc import Sequence

from torch import Tensor


def positive_part(value: Tensor) -> Tensor:
    return value if value > 0 else 0 * value


def kr(f: Tensor, y: Sequence[int], p: float, c: float = 0.0) -> Tensor:
    """-(1/n) sum_i s_i (f_i - c), s = 1/p or -1/(1-p)."""
    total = 0 * f.sum()
    for score, label in zip(f, y, strict=True):
        total = total + (score - c) * (1 / p if label == 1 else -1 / (1 - p))
    return -total / len(y)


def hinge(f: Tensor, y: Sequence[int], m: float | Tensor, v: Sequence[float] | None = None) -> Tensor:
    """E_v[(m - Y f)_+]."""
    total = 0 * f.sum()
    for i, (score, label) in enumerate(zip(f, y, strict=True)):
        total = total + positive_part(m - (score if label == 1 else -score)) * (1 if v is None else v[i])
    return total / len(y)


def hkr(f: Tensor, y: Sequence[int], m: float | Tensor, weight: float, p: float, alpha: float = 0.0) -> Tensor:
    """-KR + lambda (E[(m - Y f)_+] - alpha m)."""
    return kr(f, y, p) + weight * (hinge(f, y, m) - alpha * m)


def one_vs_all(
    f: Tensor, y: Sequence[int], m: Sequence[float] | Tensor, weight: float, priors: Sequence[float], alpha: float = 0.0
) -> Tensor:
    """The sum over the classes of the binary loss of each."""
    return sum(
        hkr(f[:, k], [int(label == k) for label in y], m[k], weight, priors[k], alpha) for k in range(f.shape[1])
    )


def soft(
    f: Tensor,
    y: Sequence[int],
    m: Sequence[float] | Tensor,
    weight: float,
    priors: Sequence[float],
    *,
    tau: float = 10.0,
    alpha: float = 0.0,
    kr_form: str = "soft",
    hinge_form: str = "joint",
    detach: bool = True,
) -> Tensor:
    """E_v[-2 M_y + lambda ((m_y - M_y)_+ - alpha m_y)] and its variants."""
    count, classes = f.shape
    total = 0 * f.sum()
    for i, label in enumerate(y):
        rivals = [k for k in range(classes) if k != label]
        scores = [f[i, k].detach() if detach else f[i, k] for k in rivals]
        largest = max(float(score.detach()) for score in scores)
        exponentials = [(tau * (score - largest)).exp() for score in scores]
        w = dict(zip(rivals, [e / sum(exponentials) for e in exponentials], strict=True))
        margin = (f[i, label] - sum(w[k] * f[i, k] for k in rivals)) / 2
        if hinge_form == "joint":
            violation = positive_part(m[label] - margin)
        else:
            violation = positive_part(m[label] - f[i, label])
            violation = violation + sum(w[k] * positive_part(m[label] + f[i, k]) for k in rivals)
        term = weight * (violation - alpha * m[label])
        if kr_form == "soft":
            term = term - 2 * margin
        total = total + term / (classes * priors[label])
    total = total / count
    if kr_form == "one_vs_all":
        for k in range(classes):
            total = total + kr(f[:, k], [int(label == k) for label in y], priors[k])
    return total


def cross_entropy(f: Tensor, y: Sequence[int], tau: float) -> Tensor:
    """-(1/n) sum_i log softmax(tau f_i)_y / tau."""
    total = 0 * f.sum()
    for row, label in zip(tau * f, y, strict=True):
        total = total + math.log(sum(math.exp(float(z)) for z in row)) - row[label]
    return total / len(y) / tau
