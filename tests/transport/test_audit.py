"""The audit of networks: which potentials are measured against which problems, and what is refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import otnn
from otnn.data import Split
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.losses import (
    HingeLoss,
    HKRLoss,
    KRLoss,
    Loss,
    OneVsAllHKRLoss,
    SoftHKRLoss,
    TemperatureCrossEntropyLoss,
    hkr,
    one_vs_all_hkr,
    soft_hkr,
)
from otnn.models import Classifier, build
from otnn.nn import UnitNormLinear
from otnn.run.config import TrainingConfig
from otnn.run.fit import fit
from otnn.transport import Audit, TransportProblem, audit, measure, solve, trained
from otnn.transport.audit import hypotheses
from otnn.transport.verdict import verdict


def points(classes: int = 2, each: int = 30, seed: int = 0, spread: float = 0.05) -> Split:
    """Clouds of 1x8x8 images around random centres in the unit cube."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(classes, 1, 8, 8, generator=generator)
    labels = torch.arange(classes).repeat_interleave(each)
    images = centres[labels] + spread * torch.randn(len(labels), 1, 8, 8, generator=generator)
    return Split(images.clamp(0, 1), labels)


def network(classes: int = 2, widths: Sequence[int] = (16, 16)) -> Classifier:
    return build("dense", (1, 8, 8), classes, widths=widths).eval()


def flat(weights: Tensor, bias: Tensor, outputs: int) -> Classifier:
    """A linear network on flat points of 2 values."""
    head = UnitNormLinear(2, outputs)
    with torch.no_grad():
        head.weight.copy_(weights)
        head.bias.copy_(bias)
    return Classifier(nn.Sequential(nn.Flatten()), head, (2,)).eval()


def audited(data: Split, classes: int, loss: Loss | None) -> tuple[Classifier, Audit]:
    model = network(classes)
    return model, audit(model, data, loss)


def test_otnn_audit_is_the_function() -> None:
    assert otnn.audit is audit


def test_the_loss_of_the_binary_potential_is_the_loss_that_trained_it() -> None:
    data = points()
    model, found = audited(data, 2, HKRLoss(margin=0.3, hinge_weight=7.0))
    (entry,) = found.potentials
    scores = model.double()(data.images.double()).squeeze(1).detach()
    constant = bound(model.body).constant * float(model.head.weight.detach().norm())
    assert entry.lipschitz == pytest.approx(constant, rel=1e-9)
    assert entry.lipschitz >= constant
    expected = hkr(scores / entry.lipschitz, data.labels, margin=0.3 / entry.lipschitz, hinge_weight=7.0)
    assert entry.measures.loss == pytest.approx(float(expected), rel=1e-6)  # the margin is float32
    assert (entry.exact, found.exact, entry.name) == (True, True, "1 against 0")


def test_a_balanced_hinge_is_a_prior_of_one_half() -> None:
    data = points(each=20)
    kept = torch.cat([torch.arange(20), torch.arange(20, 26)])
    data = Split(data.images[kept], data.labels[kept])
    p = 6 / 26
    model, found = audited(data, 2, HKRLoss(margin=0.3, hinge_weight=7.0, prior=p, balanced=True))
    (entry,) = found.potentials
    scores = model.double()(data.images.double()).squeeze(1).detach() / entry.lipschitz
    margin = 0.3 / entry.lipschitz
    expected = hkr(scores, data.labels, margin=margin, hinge_weight=7.0, prior=p, balanced=True)
    assert entry.problem.prior == 0.5
    assert entry.measures.loss == pytest.approx(float(expected), rel=1e-6)  # the margin is float32


def test_a_learned_margin_is_measured_with_its_penalty() -> None:
    data = points()
    loss = HKRLoss(alpha=0.2)
    with torch.no_grad():
        loss.margin.fill_(0.25)
    model, found = audited(data, 2, loss)
    (entry,) = found.potentials
    scores = model.double()(data.images.double()).squeeze(1).detach() / entry.lipschitz
    expected = hkr(scores, data.labels, margin=0.25 / entry.lipschitz, alpha=0.2)
    assert entry.problem.learns_margin
    assert entry.measures.loss == pytest.approx(float(expected), rel=1e-6)  # the margin is float32
    assert entry.solution.margin > 0


def test_one_vs_all_potentials_sum_to_the_loss() -> None:
    data = points(classes=3)
    loss = OneVsAllHKRLoss(torch.full((3,), 1 / 3), margin=[0.2, 0.3, 0.4], hinge_weight=4.0)
    model, found = audited(data, 3, loss)
    scores = model.double()(data.images.double()).detach()
    constants = torch.tensor([entry.lipschitz for entry in found.potentials], dtype=torch.float64)
    margins = loss.margin.double() / constants
    expected = one_vs_all_hkr(scores / constants, data.labels, margin=margins, hinge_weight=4.0)
    assert sum(entry.measures.loss for entry in found.potentials) == pytest.approx(float(expected), rel=1e-6)
    assert [entry.name for entry in found.potentials] == [f"{k} against the others" for k in "012"]
    assert found.exact
    assert all(entry.problem.sizes == (30, 60, 64) for entry in found.potentials)


def test_the_pair_of_a_soft_loss_on_two_classes_is_that_loss() -> None:
    # with two classes the one rival has weight 1, and soft hKR is scale / 2 times binary hKR of the pair potential
    data = points()
    model = Classifier(nn.Sequential(nn.Flatten()), UnitNormLinear(64, 2), (1, 8, 8)).eval()
    loss = SoftHKRLoss(torch.full((2,), 0.5), margin=0.1, hinge_weight=6.0)
    (entry,) = audit(model, data, loss).potentials
    scores = model.double()(data.images.double()).detach()
    expected = soft_hkr(scores, data.labels, margin=loss.margin.double(), hinge_weight=6.0)
    assert entry.lipschitz / 2 * entry.measures.loss == pytest.approx(float(expected), rel=1e-9)
    assert not entry.exact


def test_every_pair_of_several_classes_is_measured() -> None:
    data = points(classes=4, each=5)
    _, found = audited(data, 4, SoftHKRLoss(torch.full((4,), 0.25), margin=0.1, hinge_weight=6.0))
    assert [entry.name for entry in found.potentials] == [f"{t} against {j}" for t in range(4) for j in range(t + 1, 4)]
    for entry in found.potentials:
        own, rival = (int(part) for part in entry.name.split(" against "))
        assert data.labels[entry.indices[0]].unique().tolist() == [own]
        assert data.labels[entry.indices[1]].unique().tolist() == [rival]
        assert entry.problem.prior == 0.5


def test_potentials_share_the_points_that_are_looked_at_inside_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(*given: Any) -> Tensor:
        seen.append(len(given[-1]))
        return pair(*given)

    pair = trained._pair
    monkeypatch.setattr(trained, "_pair", counted)
    data = points(classes=10, each=2)
    for classes, segments in ((2, 500), (4, 6 * 334), (10, 45 * 45)):  # 2000 among all pairs, at most 500 each
        names: set[str] = set()
        seen.clear()
        chosen = data.labels < classes
        audit(
            network(classes),
            Split(data.images[chosen], data.labels[chosen]),
            on_round=lambda name, last, names=names: names.add(name),  # type: ignore[misc]
        )
        pairs = classes * (classes - 1) // 2
        assert len(names) == pairs
        assert ("0 against 1 (1 of 6)" in names) == (classes == 4)
        # 9 places on each; the 2 + 2 samples of a pair are asked for values and gradients besides
        assert 9 * segments < sum(seen) <= 9 * segments + 16 * pairs


def test_cross_entropy_and_no_loss_are_measured_against_plain_transport() -> None:
    data = points()
    for loss in (None, TemperatureCrossEntropyLoss(5.0)):
        _, found = audited(data, 2, loss)
        (entry,) = found.potentials
        assert entry.problem.hinge_weight == 0
        assert not entry.exact
        assert entry.measures.optimum == pytest.approx(-entry.measures.w1)


def test_the_exact_linear_network_has_no_gap_and_its_mirror_has_a_gap_of_2() -> None:
    generator = torch.Generator().manual_seed(0)
    across = torch.rand(20, 1, generator=generator)
    z = torch.cat([torch.zeros(20, 1), across], dim=1)
    data = Split(torch.cat([z, z + torch.tensor([0.5, 0.0])]), torch.arange(2).repeat_interleave(20))
    loss = HKRLoss(margin=0.1, hinge_weight=2.0)
    for sign, gap in ((1.0, 0.0), (-1.0, None)):
        model = flat(torch.tensor([[sign, 0.0]]), torch.tensor([-0.25 * sign]), 1)
        (entry,) = audit(model, data, loss).potentials
        if gap is None:
            # L = .5 + 2 (.1 + .25), L* = -.5, W1 = .5
            gap = (0.5 + 2 * 0.35 + 0.5) / 0.5
        assert entry.measures.gap == pytest.approx(gap, abs=1e-5)
    assert entry.hypotheses.distance == pytest.approx(0.5)
    assert entry.hypotheses.hinge_can_vanish
    assert entry.hypotheses.optimum_separates
    assert entry.measures.right == 0


def test_training_closes_the_gap() -> None:
    data = points(spread=0.1)
    loss = HKRLoss(margin=0.3, hinge_weight=5.0)
    model = network()
    (before,) = audit(model, data, loss).potentials
    config = TrainingConfig(epochs=60, batch_size=60)
    fit(model, loss, data, data, config, learning_rate=2e-2, constrained=True, seed=0)
    (after,) = audit(model, data, loss).potentials
    assert before.measures.gap is not None
    assert after.measures.gap is not None
    # .105 in a trial: clouds in 64 dimensions, far apart, are near a translation, which the network finds; the rest is
    # the noise of the samples, to which the plan is fitted
    assert 0 <= after.measures.gap < 0.15 < before.measures.gap
    assert after.hypotheses.optimum_separates


def test_samples_are_drawn_from_each_side_and_repeat() -> None:
    data = points(each=50)
    model, loss = network(), HKRLoss(margin=0.3, hinge_weight=5.0)
    first, again, other = (audit(model, data, loss, samples=20, seed=seed).potentials[0] for seed in (1, 1, 2))
    assert first.problem.sizes == (20, 20, 64)
    assert len(set(first.indices[0].tolist())) == 20
    assert first.measures == again.measures
    pair = audit(model, (data.images, data.labels), loss, samples=20, seed=1).potentials[0]
    assert first.measures == pair.measures
    assert first.measures != other.measures
    everything = audit(model, data, loss, samples=None).potentials[0]
    assert everything.problem.sizes == (50, 50, 64)


def test_the_bracket_holds_on_laws_whose_distance_is_known() -> None:
    # two uniform laws on the unit interval, .5 apart: W1 = .5, which f = u.x reaches
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(400, 1, generator=generator)
    images = torch.cat([values, torch.zeros(400, 1)], dim=1)
    images[200:, 0] += 0.5
    data = Split(images, torch.arange(2).repeat_interleave(200))
    model = flat(torch.tensor([[1.0, 0.0]]), torch.tensor([-0.75]), 1)
    (entry,) = audit(model, data, HKRLoss(margin=0.1, hinge_weight=2.0)).potentials
    bracket = entry.bracket
    assert bracket is not None
    assert bracket.kr.low < 0.5 < bracket.kr.high
    assert bracket.minibatch_w1.high > 0.5
    assert (bracket.minibatch, bracket.minibatches) == (25, 8)
    # one-sided figures of one draw: the standard error of KR is sqrt(2 / 12 / 200) = .029
    assert bracket.kr.high - bracket.kr.low == pytest.approx(2 * 1.96 * 0.0289, rel=0.1)


def test_the_state_and_the_type_of_the_model_stay() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audit(model, points(), HKRLoss(margin=0.3, hinge_weight=5.0))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m, d: (m.train(), d), "training mode"),
        (lambda m, d: (m, Split(d.images, d.labels.float())), "labels: expected integers"),
        (
            lambda m, d: (m, Split(d.images, torch.zeros_like(d.labels))),
            "1 against 0: found no sample of class 1; give data",
        ),
        (lambda m, d: (m, Split(d.images[:, :, :4], d.labels)), "expected images of shape"),
        (lambda m, d: (m, Split(d.images * torch.nan, d.labels)), "NaN"),
        (lambda m, d: (m, Split(d.images[:0], d.labels[:0])), "empty batch"),
    ],
)
def test_what_cannot_be_audited_is_refused(change: object, text: str) -> None:
    model, data = change(network(), points())  # type: ignore[operator]
    with pytest.raises(InputError, match=text):
        audit(model, data, HKRLoss(margin=0.3, hinge_weight=5.0))


def test_losses_and_settings_that_do_not_fit_are_refused() -> None:
    data, priors = points(), torch.full((3,), 1 / 3)
    with pytest.raises(InputError, match="OneVsAllHKRLoss does not train a network of 1 outputs"):
        audit(network(), data, OneVsAllHKRLoss(priors, margin=0.1, hinge_weight=1.0))
    with pytest.raises(InputError, match="HKRLoss does not train a network of 3 outputs"):
        audit(network(3), points(3), HKRLoss(margin=0.1, hinge_weight=1.0))
    for samples in (0, 2.5):
        with pytest.raises(InputError, match="samples: expected a whole number >= 1"):
            audit(network(), data, samples=samples)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"loss: expected one of HKRLoss, .*, got HingeLoss"):
        audit(network(), data, HingeLoss())
    with pytest.raises(InputError, match="expected priors of 3 classes, got 4"):
        audit(network(3), points(3), SoftHKRLoss(torch.full((4,), 0.25), margin=0.1, hinge_weight=1.0))
    with pytest.raises(InputError, match="expected a Classifier, which names body and head, got Linear"):
        audit(nn.Linear(2, 1).eval(), data)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"expected a split such as dataset\.train, or \(samples, labels\), got str"):
        audit(network(), "digits")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="classes: expected 2 names, got 1"):
        audit(network(), data, classes=("one",))
    with pytest.raises(InputError, match=r"30 x 30 samples of 64 values need 0\.2.* GB, the budget is 0\.001 GB"):
        audit(network(), data, memory_budget=1e6)
    labels = Classifier(nn.Sequential(nn.Flatten()), UnitNormLinear(64, 2), (1, 8, 8), multilabel=True).eval()
    with pytest.raises(InputError, match="decides labels one by one"):
        audit(labels, data)


def test_the_verdict_says_what_the_figures_say() -> None:
    z = torch.cat([torch.zeros(20, 1), torch.linspace(0, 1, 20).unsqueeze(1)], dim=1)
    data = Split(torch.cat([z, z + torch.tensor([0.5, 0.0])]), torch.arange(2).repeat_interleave(20))
    model = flat(torch.tensor([[1.0, 0.0]]), torch.tensor([-0.25]), 1)
    near = audit(model, data, HKRLoss(margin=0.1, hinge_weight=2.0))
    told = " ".join(verdict(near, near))
    assert "0.0% of W1 short of the exact optimum of its own loss." in told
    assert "It follows the transport plan closely: it tells partners apart by 100% of their distance" in told
    assert "points 0 degrees away" in told
    assert "has 100% of the norm" in told
    assert "Proposition 2 holds for it" in told
    assert "cannot vanish" not in told
    assert "constant" not in told
    assert "On the held-out samples" in told
    turned = flat(torch.tensor([[0.6, 0.8]]), torch.tensor([-0.25]), 1)
    far = audit(turned, data, HKRLoss(margin=0.4, hinge_weight=2.0))
    told = " ".join(verdict(far))
    assert "in part only: it tells partners apart by 60% of their distance" in told
    assert "points 53 degrees away" in told
    # the margin leaves samples inside it, and the optimum separates all the same
    assert (
        "the margin of the optimum is 0.4, more than half of that, so that the hinge cannot vanish; the optimum" in told
    )
    assert "held-out" not in told
    mirrored = audit(
        flat(torch.tensor([[-1.0, 0.0]]), torch.tensor([0.25]), 1), data, HKRLoss(margin=0.1, hinge_weight=2.0)
    )
    told = " ".join(verdict(mirrored))
    assert "no less than a constant score would" in told
    assert "hardly at all" in told
    several = audit(network(3), points(3), OneVsAllHKRLoss(torch.full((3,), 1 / 3), margin=0.1, hinge_weight=1.0))
    assert "in the median of 3, and" in verdict(several)[0]
    same = audit(model, Split(torch.cat([z, z]), data.labels), HKRLoss(margin=0.1, hinge_weight=2.0))
    told = " ".join(verdict(same))
    assert "there is nothing to transport" in told
    assert "20 pairs of the plan are the same point in both classes" in told


def test_a_learned_margin_at_half_the_distance_lets_the_hinge_vanish() -> None:
    # m* is half the distance up to rounding, which must not decide
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 2, generator=generator) + torch.tensor([4.0, 0.0])
        z = torch.randn(6, 2, generator=generator)
        solution = solve(TransportProblem(x, z, alpha=0.02, hinge_weight=50.0))
        facts = hypotheses(solution)
        assert facts.margin == pytest.approx(facts.distance / 2, rel=1e-9)
        assert facts.hinge_can_vanish


def test_plain_problems_have_no_zero_level() -> None:
    model = network()
    (entry,) = audit(model, points(), None).potentials
    assert entry.hypotheses is None
    assert entry.margin is None
    found = entry.measures
    assert (found.right, found.reached, found.beyond_x, found.beyond_z) == (None,) * 4
    assert not any("Proposition" in sentence for sentence in verdict(Audit((entry,))))
    (exact,) = audit(model, points(), KRLoss()).potentials
    assert exact.exact
    assert exact.measures.gap == entry.measures.gap


@pytest.mark.parametrize("form", [{"kr_form": "one_vs_all"}, {"hinge_form": "separate"}])
def test_other_forms_of_the_soft_loss_are_measured_against_plain_transport(form: dict[str, str]) -> None:
    loss = SoftHKRLoss(torch.full((3,), 1 / 3), margin=0.1, hinge_weight=6.0, **form)
    _, found = audited(points(3), 3, loss)
    assert all(entry.problem.hinge_weight == 0 for entry in found.potentials)


def test_a_split_sample_is_measured_beside_what_the_optimum_can_do() -> None:
    # few positives serve many negatives: one gradient, several directions
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(10, 5, generator=generator) + 1, torch.randn(80, 5, generator=generator)
    solution = solve(TransportProblem(x, z, hinge_weight=5.0, margin=0.3))
    found = measure(lambda points: points.sum(dim=1) / 5**0.5, solution, 1.0)
    assert found.optimal_cosine_x is not None
    assert found.optimal_cosine_z is not None
    assert found.optimal_cosine_x.median < 0.95 < 1 - 1e-9 < found.optimal_cosine_z.quantiles[3]


def test_samples_of_one_class_are_held_once() -> None:
    loss = SoftHKRLoss(torch.full((4,), 0.25), margin=0.1, hinge_weight=6.0)
    _, found = audited(points(4, each=12), 4, loss)
    held = {entry.problem._x.data_ptr() for entry in found.potentials} | {
        entry.problem._z.data_ptr() for entry in found.potentials
    }
    assert len(held) == 4
