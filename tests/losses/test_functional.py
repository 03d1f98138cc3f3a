"""The losses as functions: by hand, against slow formulas, and their gradients."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from otnn.losses import hinge, hkr, kr, one_vs_all_hkr, soft_hkr, temperature_cross_entropy
from otnn.losses.functional import rival_weights
from tests.losses import slow
from tests.losses.batches import MARGINS, PRIORS, binary, several

# --- by hand -----------------------------------------------------------------------------------------------------


def test_kr_by_hand() -> None:
    scores, labels = torch.tensor([4.0, 2.0, 1.0, -3.0]), torch.tensor([1, 1, 0, 0])
    assert float(kr(scores, labels)) == -(3.0 - (-1.0))
    assert float(kr(scores.unsqueeze(1), labels)) == -4.0
    # under p = 0.8: -mean(4/.8 + 2/.8 - 1/.2 + 3/.2) = -(5 + 2.5 - 5 + 15)/4
    assert float(kr(scores, labels, prior=0.8)) == pytest.approx(-17.5 / 4)


def test_hinge_by_hand() -> None:
    scores, labels = torch.tensor([0.5, 2.0, -0.25, 1.0]), torch.tensor([1, 1, 0, 0])
    assert float(hinge(scores, labels, margin=1.0)) == (0.5 + 0 + 0.75 + 2.0) / 4
    assert float(hinge(scores, labels, margin=0.0)) == 0.25
    weights = torch.tensor([2.0, 0.0, 0.0, 1.0])
    assert float(hinge(scores, labels, margin=1.0, sample_weight=weights)) == (1.0 + 2.0) / 4


def test_hkr_by_hand() -> None:
    scores, labels = torch.tensor([0.5, -0.25]), torch.tensor([1, 0])
    assert float(hkr(scores, labels, margin=1.0, hinge_weight=4.0)) == -0.75 + 4 * (0.5 + 0.75) / 2
    learned = hkr(scores, labels, margin=torch.tensor(1.0), hinge_weight=4.0, alpha=0.5)
    assert float(learned) == -0.75 + 4 * (0.625 - 0.5)


def test_one_vs_all_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.5, -2.0], [0.0, 2.0, 1.0], [-1.0, 0.0, 3.0]])
    labels = torch.tensor([0, 1, 2])
    distance = (1.0 + 0.5) + (2.0 - 0.25) + (3.0 + 0.5)
    hinges = (0 + 1 + 0 + 1.5 + 0 + 1 + 0 + 2 + 0) / 3  # margin 1, column by column
    assert float(one_vs_all_hkr(scores, labels, margin=1.0, hinge_weight=6.0)) == pytest.approx(-distance + 6 * hinges)


def test_soft_by_hand_with_two_rivals_that_tie() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0]])  # M = (3 - 1)/2 = 1 whatever the temperature
    for tau in (0.01, 1.0, 100.0):
        value = soft_hkr(
            scores, torch.tensor([0]), margin=1.5, hinge_weight=4.0, temperature=tau, priors=torch.full((3,), 1 / 3)
        )
        assert float(value) == pytest.approx(-2 + 4 * 0.5)


def test_soft_temperature_moves_from_the_mean_to_the_largest_rival() -> None:
    scores, priors = torch.tensor([[0.0, 4.0, -2.0, 1.0]], dtype=torch.float64), torch.full((4,), 0.25)
    options = {"margin": 0.0, "hinge_weight": 0.0, "priors": priors}
    cold = soft_hkr(scores, torch.tensor([0]), temperature=1e4, **options)
    warm = soft_hkr(scores, torch.tensor([0]), temperature=1e-9, **options)
    assert float(cold) == pytest.approx(4.0)
    assert float(warm) == pytest.approx(1.0)  # the mean of 4, -2 and 1


def test_two_classes_make_soft_and_binary_agree() -> None:
    # f_1 = -f_0 = f: M_y = Y f, and with p = 1/2 the soft loss is the binary one, with -2 E[Y f] = -KR
    scores, labels = binary()
    both = torch.stack([-scores, scores], dim=1)
    share = torch.tensor([0.5, 0.5], dtype=torch.float64)
    soft = soft_hkr(both, labels, margin=0.4, hinge_weight=7.0, priors=share)
    assert float(soft) == pytest.approx(float(hkr(scores, labels, margin=0.4, hinge_weight=7.0, prior=0.5)), rel=1e-13)
    ova = one_vs_all_hkr(both, labels, margin=0.4, hinge_weight=7.0, priors=share)
    assert float(ova) == pytest.approx(2 * float(soft), rel=1e-13)


def test_cross_entropy_is_that_of_torch() -> None:
    scores, labels = several()
    for tau in (0.1, 1.0, 30.0):
        value = temperature_cross_entropy(scores, labels, temperature=tau)
        assert float(value) == pytest.approx(float(F.cross_entropy(tau * scores, labels)) / tau, rel=1e-14)
    assert float(temperature_cross_entropy(torch.zeros(2, 5), torch.tensor([0, 4]))) == pytest.approx(math.log(5))


# --- against the formulas written slowly -------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.1, 1 / 3, 0.7])
@pytest.mark.parametrize("alpha", [None, 0.15])
def test_binary_losses_equal_the_slow_ones(prior: float, alpha: float | None) -> None:
    scores, labels = binary()
    y = labels.tolist()
    assert float(kr(scores, labels, prior=prior, center=0.4)) == pytest.approx(
        float(slow.kr(scores, y, prior, 0.4)), rel=1e-13
    )
    fast = hkr(scores, labels, margin=0.6, hinge_weight=3.0, alpha=alpha, prior=prior)
    assert float(fast) == pytest.approx(float(slow.hkr(scores, y, 0.6, 3.0, prior, alpha or 0.0)), rel=1e-12)
    weights = torch.rand(len(y), dtype=torch.float64)
    fast = hinge(scores, labels, margin=0.6, sample_weight=weights)
    assert float(fast) == pytest.approx(float(slow.hinge(scores, y, 0.6, weights.tolist())), rel=1e-13)


def test_the_share_in_the_batch_is_the_default_prior() -> None:
    scores, labels = binary()
    y, share = labels.tolist(), 4 / 12
    assert float(kr(scores, labels)) == pytest.approx(float(slow.kr(scores, y, share)), rel=1e-13)
    assert float(-kr(scores, labels)) == pytest.approx(float(scores[labels == 1].mean() - scores[labels == 0].mean()))
    scores, labels = several()
    expected = slow.one_vs_all(scores, labels.tolist(), [0.2] * 3, 2.0, [1 / 3] * 3)
    assert float(one_vs_all_hkr(scores, labels, margin=0.2, hinge_weight=2.0)) == pytest.approx(
        float(expected), rel=1e-13
    )
    expected = slow.soft(scores, labels.tolist(), [0.2] * 3, 2.0, [1 / 3] * 3)
    assert float(soft_hkr(scores, labels, margin=0.2, hinge_weight=2.0)) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize("margin", [0.6, MARGINS])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_one_vs_all_equals_the_slow_one(margin: float | Tensor, alpha: float | None) -> None:
    scores, labels = several()
    fast = one_vs_all_hkr(scores, labels, margin=margin, hinge_weight=3.0, alpha=alpha, priors=PRIORS)
    each = margin if isinstance(margin, Tensor) else [margin] * 3
    expected = slow.one_vs_all(scores, labels.tolist(), each, 3.0, PRIORS.tolist(), alpha or 0.0)
    assert float(fast) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("margin", [0.6, MARGINS])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("kr_form", ["soft", "one_vs_all"])
@pytest.mark.parametrize("hinge_form", ["joint", "separate"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("tau", [0.5, 10.0])
def test_soft_equals_the_slow_one_and_so_does_its_gradient(
    margin: float | Tensor, alpha: float | None, kr_form: str, hinge_form: str, detach: bool, tau: float
) -> None:
    scores, labels = several()
    scores.requires_grad_()
    forms = {"kr_form": kr_form, "hinge_form": hinge_form}
    fast = soft_hkr(
        scores,
        labels,
        margin=margin,
        hinge_weight=3.0,
        alpha=alpha,
        temperature=tau,
        priors=PRIORS,
        detach_weights=detach,
        **forms,
    )
    each = margin if isinstance(margin, Tensor) else [margin] * 3
    expected = slow.soft(
        scores, labels.tolist(), each, 3.0, PRIORS.tolist(), tau=tau, alpha=alpha or 0.0, detach=detach, **forms
    )
    assert float(fast.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(fast, scores)
    (slow_gradient,) = torch.autograd.grad(expected, scores)
    assert (gradient - slow_gradient).abs().max() < 1e-13


def test_cross_entropy_equals_the_slow_one() -> None:
    scores, labels = several()
    for tau in (0.5, 20.0):
        expected = float(slow.cross_entropy(scores, labels.tolist(), tau))
        assert float(temperature_cross_entropy(scores, labels, temperature=tau)) == pytest.approx(expected, rel=1e-12)


# --- gradients ---------------------------------------------------------------------------------------------------

GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hkr": lambda f, m: hkr(f[:, 0], torch.arange(12) % 2, margin=m[0], hinge_weight=3.0, alpha=0.2, prior=0.4),
    "one_vs_all": lambda f, m: one_vs_all_hkr(f, torch.arange(12) % 3, margin=m, alpha=0.2, priors=PRIORS),
    **{
        f"soft {a} {b}": lambda f, m, a=a, b=b: soft_hkr(
            f,
            torch.arange(12) % 3,
            margin=m,
            alpha=0.2,
            priors=PRIORS,
            temperature=2.0,
            kr_form=a,
            hinge_form=b,
            detach_weights=False,
        )
        for a, b in itertools.product(["soft", "one_vs_all"], ["joint", "separate"])
    },
    "cross-entropy": lambda f, m: temperature_cross_entropy(f, torch.arange(12) % 3, temperature=3.0) + m.sum(),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck_of_scores_and_margins(name: str) -> None:
    scores, margins = several()[0].requires_grad_(), MARGINS.clone().requires_grad_()
    assert torch.autograd.gradcheck(GRADIENTS[name], (scores, margins))


def test_gradient_of_the_margin_is_lambda_times_share_minus_alpha() -> None:
    scores, labels = binary(40)
    margin = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    hkr(scores, labels, margin=margin, hinge_weight=5.0, alpha=0.3, prior=0.4).backward()
    signed = torch.where(labels == 1, scores, -scores)
    share = float((signed < 0.8).double().mean())
    assert margin.grad is not None
    assert float(margin.grad) == pytest.approx(5.0 * (share - 0.3), rel=1e-12)


def test_weights_detached_or_not() -> None:
    # two rivals, the hinge inactive: L = -(f_0 - w.f), so dL/df_k = w_k where detached, and
    # w_k (1 + tau (f_k - w.f)) where not: negative for a weak rival, whom descent then pushes *up*
    scores = torch.tensor([[5.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    priors = torch.full((3,), 1 / 3, dtype=torch.float64)
    gradients = {}
    for detach in (True, False):
        value = soft_hkr(
            scores,
            torch.tensor([0]),
            margin=0.0,
            hinge_weight=1.0,
            temperature=2.0,
            priors=priors,
            detach_weights=detach,
        )
        gradients[detach] = torch.autograd.grad(value, scores)[0][0]
    w = torch.softmax(2 * torch.tensor([1.0, -1.0], dtype=torch.float64), 0)
    rivals = scores.detach()[0, 1:]
    assert torch.allclose(gradients[True][1:], w)
    assert torch.allclose(gradients[False][1:], w * (1 + 2 * (rivals - w @ rivals)))
    assert gradients[True][2] > 0 > gradients[False][2]
    assert float(gradients[True][0]) == pytest.approx(-1)


def test_rival_weights_sum_to_1_and_spare_the_own_class() -> None:
    scores, labels = several()
    weights = rival_weights(1e4 * scores, F.one_hot(labels, 3).bool(), 1e3, detach=True)
    assert torch.allclose(weights.sum(dim=1), torch.ones(12).double())
    assert bool((weights.gather(1, labels.unsqueeze(1)) == 0).all())


def test_class_balanced_weights_bound_the_loss_of_a_large_class() -> None:
    # every score the same constant vector a * (1, 0): with v the loss on KR does not reward it, whatever the shares
    labels = torch.tensor([0] * 9 + [1])
    scores = 1000.0 * torch.tensor([[1.0, 0.0]]).expand(10, 2)
    value = soft_hkr(scores, labels, margin=0.0, hinge_weight=0.0)
    assert float(value) == pytest.approx(0, abs=1e-3)
    unbalanced = -(2 * (torch.tensor([500.0] * 9 + [-500.0]))).mean()  # control: v = 1
    assert float(unbalanced) == pytest.approx(-800)


# --- batches and dtypes ------------------------------------------------------------------------------------------


def test_a_one_class_batch_has_a_loss_with_a_prior() -> None:
    scores = torch.tensor([1.0, 3.0])
    assert float(kr(scores, torch.tensor([1, 1]), prior=0.25)) == -8.0
    assert float(kr(scores, torch.tensor([0, 0]), prior=0.2)) == 2.5
    alone = soft_hkr(
        torch.tensor([[1.0, 0.0]]), torch.tensor([0]), margin=1.0, hinge_weight=2.0, priors=torch.tensor([0.5, 0.5])
    )
    assert float(alone) == -1.0 + 2 * 0.5


def test_alpha_alone_sets_the_hinge_weight() -> None:
    scores, labels = binary()
    m = torch.tensor(0.4, dtype=torch.float64)
    assert torch.equal(
        hkr(scores, labels, margin=m, alpha=0.2), hkr(scores, labels, margin=m, alpha=0.2, hinge_weight=5.0)
    )
    scores, labels = several()
    for loss in (one_vs_all_hkr, soft_hkr):
        first = loss(scores, labels, margin=m, alpha=0.2)
        assert torch.equal(first, loss(scores, labels, margin=m, alpha=0.2, hinge_weight=5.0))
        assert not torch.equal(first, loss(scores, labels, margin=m, alpha=0.2, hinge_weight=4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_scores_is_that_of_the_loss(dtype: torch.dtype) -> None:
    f, y = binary()
    g, z = several()
    f, g = f.to(dtype).requires_grad_(), g.to(dtype).requires_grad_()
    values = [kr(f, y), hinge(f, y), hkr(f, y, margin=0.1, hinge_weight=1.0, prior=0.3)]
    values += [one_vs_all_hkr(g, z, margin=0.1, hinge_weight=1.0), soft_hkr(g, z, margin=0.1, hinge_weight=1.0)]
    values += [temperature_cross_entropy(g, z)]
    for value in values:
        assert value.dtype == dtype
        assert value.shape == ()
        value.backward()
