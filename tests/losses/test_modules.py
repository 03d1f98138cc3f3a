import copy
import io
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.losses import (
    HingeLoss,
    HKRLoss,
    KRLoss,
    Loss,
    OneVsAllHKRLoss,
    SoftHKRLoss,
    TemperatureCrossEntropyLoss,
    hinge,
    hkr,
    kr,
    one_vs_all_hkr,
    soft_hkr,
    temperature_cross_entropy,
)

PRIORS = torch.tensor([0.25, 0.5, 0.25])
X1, Y1 = torch.linspace(-1, 2, 8), torch.arange(8) % 2
X3, Y3 = torch.linspace(-1, 2, 24).view(8, 3).sin(), torch.arange(8) % 3

# each module with the function of its first batch, when the running mean is still 0
MODULES: dict[str, tuple[Callable[[], Loss], Callable[[Tensor, Tensor], Tensor], int]] = {
    "kr": (lambda: KRLoss(0.3), lambda f, y: kr(f, y, prior=0.3), 1),
    "hinge": (lambda: HingeLoss(0.4), lambda f, y: hinge(f, y, margin=0.4), 1),
    "hkr": (
        lambda: HKRLoss(margin=0.4, hinge_weight=3.0, prior=0.3),
        lambda f, y: hkr(f, y, margin=0.4, hinge_weight=3.0, prior=0.3),
        1,
    ),
    "learned hkr": (
        lambda: HKRLoss(alpha=0.1, prior=0.3),
        lambda f, y: hkr(f, y, margin=0.1, alpha=0.1, hinge_weight=10.0, prior=0.3),
        1,
    ),
    "balanced hkr": (
        lambda: HKRLoss(alpha=0.1, prior=0.3, balanced=True),
        lambda f, y: hkr(f, y, margin=0.1, alpha=0.1, prior=0.3, balanced=True),
        1,
    ),
    "one_vs_all": (
        lambda: OneVsAllHKRLoss(PRIORS, margin=[0.1, 0.2, 0.3], hinge_weight=2.0),
        lambda f, y: one_vs_all_hkr(f, y, margin=torch.tensor([0.1, 0.2, 0.3]), hinge_weight=2.0, priors=PRIORS),
        3,
    ),
    "learned one_vs_all": (
        lambda: OneVsAllHKRLoss(PRIORS, alpha=0.1),
        lambda f, y: one_vs_all_hkr(f, y, margin=0.1, alpha=0.1, priors=PRIORS),
        3,
    ),
    "soft": (
        lambda: SoftHKRLoss(PRIORS, margin=0.3, hinge_weight=2.0, temperature=4.0),
        lambda f, y: soft_hkr(f, y, margin=0.3, hinge_weight=2.0, temperature=4.0, priors=PRIORS),
        3,
    ),
    "learned soft": (
        lambda: SoftHKRLoss(PRIORS, alpha=0.2, kr_form="one_vs_all"),
        lambda f, y: soft_hkr(f, y, margin=0.1, alpha=0.2, priors=PRIORS, kr_form="one_vs_all"),
        3,
    ),
    "released": (
        lambda: SoftHKRLoss(
            PRIORS,
            margin=0.5,
            hinge_weight=49.0,
            hinge_form="separate",
            adaptive_temperature=True,
            detach_weights=False,
        ),
        lambda f, y: soft_hkr(
            f,
            y,
            margin=0.5,
            hinge_weight=49.0,
            hinge_form="separate",
            temperature=10.0 / f.abs().mean(),
            priors=PRIORS,
            detach_weights=False,
        ),
        3,
    ),
    "cross-entropy": (
        lambda: TemperatureCrossEntropyLoss(5.0),
        lambda f, y: temperature_cross_entropy(f, y, temperature=5.0),
        3,
    ),
}


def batch(outputs: int) -> tuple[Tensor, Tensor]:
    return (X1, Y1) if outputs == 1 else (X3, Y3)


@pytest.mark.parametrize("name", MODULES)
class TestEveryModule:
    def test_it_calls_its_function(self, name: str) -> None:
        make, function, outputs = MODULES[name]
        scores, labels = batch(outputs)
        assert float(make()(scores, labels).detach()) == pytest.approx(float(function(scores, labels)), rel=1e-6)
        if outputs == 1:
            column = make()(scores.unsqueeze(1), labels)
            assert float(column.detach()) == pytest.approx(float(function(scores, labels)), rel=1e-6)

    def test_it_rests_in_eval(self, name: str) -> None:
        make, _, outputs = MODULES[name]
        loss = make()
        loss(*batch(outputs))
        loss.eval()
        before = copy.deepcopy(loss.state_dict())
        first = loss(batch(outputs)[0] + 5, batch(outputs)[1])
        second = loss(batch(outputs)[0] + 5, batch(outputs)[1])
        assert torch.equal(first, second)
        assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())

    def test_its_state_can_be_saved(self, name: str) -> None:
        make, _, outputs = MODULES[name]
        loss, (scores, labels) = make(), batch(outputs)
        for step in range(5):
            loss(scores + step, labels)
        file = io.BytesIO()
        torch.save(loss.state_dict(), file)
        file.seek(0)
        restored = make()
        restored.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(restored(scores, labels), loss(scores, labels))  # both in train(): both use the mean so far

    def test_gradients_flow_to_scores_and_parameters(self, name: str) -> None:
        make, _, outputs = MODULES[name]
        loss, (scores, labels) = make(), batch(outputs)
        scores = scores.clone().requires_grad_()
        loss(scores, labels).backward()
        assert scores.grad is not None
        assert scores.grad.norm() > 0
        for parameter in loss.parameters():
            assert parameter.grad is not None
            assert bool((parameter.grad != 0).all())

    def test_it_is_a_loss_in_float64(self, name: str) -> None:
        make, function, outputs = MODULES[name]
        scores, labels = batch(outputs)
        value = make().double()(scores.double(), labels)
        assert value.dtype == torch.float64
        assert float(value.detach()) == pytest.approx(float(function(scores.double(), labels)), rel=1e-6)


# --- the running mean --------------------------------------------------------------------------------------------


def test_the_centre_is_the_mean_before_the_batch() -> None:
    loss = KRLoss(0.5)
    scores, labels = torch.tensor([1.0, 2.0]), torch.tensor([1, 1])
    assert float(loss(scores, labels)) == -3.0  # -mean(2 f): nothing seen yet
    centre = 1.5  # the first mean, without bias towards 0
    assert float(loss(scores, labels)) == pytest.approx(-3.0 + 2 * centre, abs=1e-4)
    later = float(loss(scores + 10, labels))  # the jump of this batch is not yet in the centre
    assert later == pytest.approx(-2 * (11.5 - centre), rel=1e-4)


def test_the_running_mean_is_a_corrected_exponential_mean() -> None:
    loss = KRLoss(0.5)
    values = [3.0, -1.0, 4.0, 1.0, -5.0]
    for value in values:
        loss(torch.tensor([value, value]), torch.tensor([0, 1]))
    weights = [0.99 ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    loss.eval()
    found = float(loss(torch.tensor([0.0]), torch.tensor([1])))  # -2 (0 - c)
    assert found == pytest.approx(2 * expected, rel=1e-4)
    assert int(loss.running_mean.steps) == 5
    assert set(loss.state_dict()) == {"running_mean.value", "running_mean.steps"}


def test_the_centre_carries_no_gradient() -> None:
    loss, scores = KRLoss(0.5), torch.tensor([1.0, 2.0], requires_grad=True)
    loss(scores, Y1[:2])
    (gradient,) = torch.autograd.grad(loss(scores, torch.tensor([1, 0])), scores)
    assert gradient.tolist() == [-1.0, 1.0]


def test_the_centre_lowers_the_variance_of_kr() -> None:
    # theory, section 1: p = .1, batches of 32, f at level 3 with spread .3: sd about 1.1 raw, .2 centred
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(400, 32, generator=generator) < 0.1).long()
    scores = 3 + 0.3 * torch.randn(400, 32, generator=generator)
    raw = torch.stack([kr(f, y, prior=0.1) for f, y in zip(scores, labels, strict=True)])
    loss = KRLoss(0.1)
    centred = torch.stack([loss(f, y) for f, y in zip(scores, labels, strict=True)])[1:]
    assert raw.std() > 1.2
    assert centred.std() < 0.3
    assert abs(centred.mean()) < 4 * 0.3 / 20  # still unbiased: E[KR] = 0 here


def test_temperature_is_divided_by_the_running_scale() -> None:
    loss = SoftHKRLoss(PRIORS, margin=0.5, hinge_weight=2.0, adaptive_temperature=True)
    plain = SoftHKRLoss(PRIORS, margin=0.5, hinge_weight=2.0)
    # the loss is homogeneous in (scores, margin) if the temperature follows the scores: weights do not move
    scaled = SoftHKRLoss(PRIORS, margin=50.0, hinge_weight=2.0, adaptive_temperature=True)
    for _ in range(3):
        first, second = float(loss(X3, Y3)), float(scaled(100 * X3, Y3))
        assert second == pytest.approx(100 * first, rel=1e-5)
    scale = float(X3.abs().mean())
    plain.temperature = 10.0 / scale
    assert first == pytest.approx(float(plain(X3, Y3)), rel=1e-4)
    assert {"running_scale.value", "running_scale.steps"} <= set(loss.state_dict())


def test_adaptive_temperature_survives_scores_of_zero() -> None:
    loss = SoftHKRLoss(PRIORS, margin=0.5, hinge_weight=2.0, adaptive_temperature=True)
    for _ in range(3):
        assert float(loss(torch.zeros(4, 3), torch.tensor([0, 1, 1, 2]))) == pytest.approx(1.0)


def test_the_first_batch_in_eval_has_a_finite_loss() -> None:
    for make, _, outputs in MODULES.values():
        assert math.isfinite(float(make().eval()(*batch(outputs)).detach()))


def test_a_refused_batch_leaves_no_trace() -> None:
    loss = HKRLoss(margin=0.1, hinge_weight=1.0)
    with pytest.raises(InputError):
        loss(torch.full((3,), 7.0), torch.tensor([5, 5, 5]))
    assert int(loss.running_mean.steps) == 0


def test_scores_of_another_width_are_refused_with_a_word() -> None:
    with pytest.raises(InputError):
        SoftHKRLoss(PRIORS, margin=0.1, hinge_weight=1.0)(torch.zeros(4, 5), torch.arange(4))


# --- parameters --------------------------------------------------------------------------------------------------


def test_alpha_alone_sets_the_hinge_weight_and_learns_the_margin() -> None:
    for loss, count in (
        (HKRLoss(alpha=0.1), None),
        (OneVsAllHKRLoss(PRIORS, alpha=0.1), 3),
        (SoftHKRLoss(PRIORS, alpha=0.1), 3),
    ):
        assert loss.hinge_weight == 10.0
        assert isinstance(loss.margin, torch.nn.Parameter)
        assert loss.margin.shape == (() if count is None else (count,))
    assert HKRLoss(alpha=0.1, hinge_weight=3.0).hinge_weight == 3.0


def test_a_fixed_margin_is_saved_and_not_learned() -> None:
    loss = SoftHKRLoss(PRIORS, margin=[0.1, 0.2, 0.3], hinge_weight=2.0)
    assert list(loss.parameters()) == []
    assert torch.equal(loss.state_dict()["margin"], torch.tensor([0.1, 0.2, 0.3]))


def test_balanced_weights_move_the_law_behind_alpha_to_one_half() -> None:
    HKRLoss(alpha=0.25, prior=0.1, balanced=True)  # 0.25 > 2 * 0.1: refused without the weights
    with pytest.raises(InputError, match=r"alpha must be in \(0, 2 \* min\(p, 1 - p\)\] = \(0, 0.2\], got 0.25"):
        HKRLoss(alpha=0.25, prior=0.1)


def test_a_rare_class_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="alpha = 0.05 puts 50% of the rarer class inside the margin at the optimum"):
        HKRLoss(alpha=0.05, prior=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HKRLoss(alpha=0.05, prior=0.1)  # exactly a quarter
        HKRLoss(alpha=0.05, prior=0.05, balanced=True)


def test_a_margin_at_zero_is_warned_about() -> None:
    loss = SoftHKRLoss(PRIORS, alpha=0.1)
    loss.warn_at_zero_margin()  # 0.1: nothing to say
    with torch.no_grad():
        loss.margin[1] = 0.0
    with pytest.warns(UserWarning, match="a learned margin is 0: the classes overlap by more than alpha"):
        loss.warn_at_zero_margin()
    HKRLoss(margin=0.0, hinge_weight=1.0).warn_at_zero_margin()  # fixed at 0 on purpose
    KRLoss().warn_at_zero_margin()
