import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from otnn.certify import Certificate, certified_accuracy, certify, certify_scores
from otnn.errors import InputError
from otnn.lipschitz import LipschitzBound, bound
from otnn.losses import SoftHKRLoss
from otnn.manifold import keep_on_manifold, retract_parameters
from otnn.models import Classifier, build, predict
from otnn.nn import Centering, OrthoLinear, UnitNormLinear

SHAPE = (1, 3, 4)


def linear_classifier(outputs: int, *, body: float = 1.0, seed: int = 0) -> Classifier:
    """scores = W (x - mean) in float64, the body optionally scaled; rows of any length and direction."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(12, outputs).double()
    scale = nn.Linear(12, 12, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(outputs, 12, generator=generator, dtype=torch.float64))
        head.bias.copy_(0.2 * torch.randn(outputs, generator=generator, dtype=torch.float64))
        scale.weight.copy_(body * torch.eye(12, dtype=torch.float64))
    return Classifier(nn.Sequential(Centering(torch.full((1,), 0.5)), nn.Flatten(), scale), head, SHAPE).double().eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [1.0, 0.1, 30.0])
def test_radius_of_a_linear_classifier_is_the_distance_to_the_boundary(body: float) -> None:
    model, x = linear_classifier(4, body=body), images(40)
    certificate = certify(model, x, bound(model.body))
    scores = model(x).detach()
    for i in range(40):
        top = int(scores[i].argmax())
        distances = [
            float(
                (scores[i, top] - scores[i, j])
                / (body * (model.head.weight[top] - model.head.weight[j]).detach().norm())
            )
            for j in range(4)
            if j != top
        ]
        assert int(certificate.prediction[i]) == top
        assert float(certificate.radius[i]) == pytest.approx(min(distances), rel=1e-9)
    gap = scores.sort(dim=1, descending=True).values
    assert torch.allclose(certificate.logit_gap, gap[:, 0] - gap[:, 1], rtol=1e-13)


def test_radius_of_one_output_is_its_size_over_the_norm() -> None:
    model, x = linear_classifier(1), images(40)
    certificate = certify(model, x, bound(model.body))
    scores = model(x).detach().squeeze(1)
    assert torch.equal(certificate.prediction, (scores > 0).long())
    assert torch.allclose(certificate.radius, scores.abs() / model.head.weight.detach().norm(), rtol=1e-9)
    assert torch.allclose(certificate.logit_gap, scores.abs(), rtol=1e-13)
    assert set(certificate.prediction.tolist()) == {0, 1}


@pytest.mark.parametrize("outputs", [1, 4])
def test_just_within_the_radius_nothing_changes_and_just_beyond_it_does(outputs: int) -> None:
    model, x = linear_classifier(outputs), images(40)
    certificate = certify(model, x, bound(model.body))
    scores, weight = model(x).detach(), model.head.weight.detach()
    if outputs == 1:
        way = -scores.sign() * weight / weight.norm()
    else:
        own = certificate.prediction
        rows = weight[own].unsqueeze(1) - weight  # (batch, rivals, features)
        potentials = (scores.gather(1, own.unsqueeze(1)) - scores) / rows.norm(dim=2)
        nearest = potentials.nan_to_num(nan=torch.inf).argmin(dim=1)
        chosen = rows[torch.arange(40), nearest]
        way = -chosen / chosen.norm(dim=1, keepdim=True)
    for factor, same in ((1 - 1e-6, True), (1 + 1e-6, False)):
        moved = x + factor * (certificate.radius.unsqueeze(1) * way).view_as(x)
        assert bool(((predict(model(moved)) == certificate.prediction) == same).all())


def test_units_of_the_scores_do_not_matter() -> None:
    model, x = linear_classifier(4), images(20)
    before = certify(model, x, bound(model.body))
    with torch.no_grad():
        model.head.weight.mul_(1e6)
        model.head.bias.mul_(1e6)
    after = certify(model, x, bound(model.body))
    assert torch.allclose(before.radius, after.radius, rtol=1e-9)
    assert torch.allclose(1e6 * before.logit_gap, after.logit_gap, rtol=1e-9)


def test_the_nearest_boundary_need_not_be_that_of_the_runner_up() -> None:
    # class 1 is second, but its row is far from that of class 0; class 2 lies close by
    distances = torch.tensor([[0.0, 10.0, 1.0], [10.0, 0.0, 9.0], [1.0, 9.0, 0.0]], dtype=torch.float64)
    certificate = certify_scores(torch.tensor([[5.0, 4.0, 3.5]]), distances)
    assert float(certificate.logit_gap) == 1.0
    assert float(certificate.radius) == pytest.approx(0.1)
    certificate = certify_scores(torch.tensor([[5.0, 4.0, 4.95]], dtype=torch.float64), distances)
    assert float(certificate.radius) == pytest.approx(0.05)


def test_control_the_root_of_2_is_too_short_a_distance_of_unit_rows() -> None:
    # opposite unit rows are 2 apart: a radius of gap / sqrt(2) would be broken by a step of gap / 2
    head = UnitNormLinear(12, 2).double()
    with torch.no_grad():
        head.weight[1] = -head.weight[0]
    model = Classifier(nn.Sequential(nn.Flatten()), head, SHAPE).eval()
    x = images(1)
    certificate = certify(model, x, bound(model.body))
    gap = float(certificate.logit_gap)
    assert float(certificate.radius) == pytest.approx(gap / 2, rel=1e-7)
    own = int(certificate.prediction)
    step = (-head.weight[own] * gap * 0.6).view_as(x)  # within gap / sqrt(2) = .707 gap
    assert int(predict(model(x + step))) != own


# --- ties, non-finite scores, constant networks --------------------------------------------------------------------

UNIT = torch.ones(3, 3, dtype=torch.float64) - torch.eye(3, dtype=torch.float64)


def test_a_tie_has_radius_0() -> None:
    certificate = certify_scores(
        torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.5]]), UNIT
    )
    assert certificate.radius.tolist() == [0.0, 0.0, 0.0, 0.5]
    assert certificate.logit_gap.tolist() == [0.0, 0.0, 0.0, 0.5]
    assert certify_scores(torch.tensor([[0.0], [-0.0]]), UNIT[:2, :2]).radius.tolist() == [0.0, 0.0]


def test_a_tie_of_equal_rows_has_radius_0() -> None:
    same = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    assert certify_scores(torch.tensor([[2.0, 2.0, 0.0]]), same).radius.tolist() == [0.0]
    # different biases on equal rows: the order of the two never changes, the third class decides
    assert certify_scores(torch.tensor([[2.0, 1.0, 0.0]]), same).radius.tolist() == [2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_score_that_is_not_finite_has_radius_0(bad: float, outputs: int) -> None:
    scores = torch.ones(outputs, outputs) + torch.arange(outputs)
    scores.fill_diagonal_(bad)
    certificate = certify_scores(scores, UNIT[: max(2, outputs), : max(2, outputs)])
    assert certificate.radius.tolist() == [0.0] * outputs
    assert certificate.logit_gap.tolist() == [0.0] * outputs
    fine = certify_scores(torch.tensor([[0.0, bad, 1.0], [3.0, 1.0, 0.0]]), UNIT)
    assert fine.radius.tolist() == [0.0, 2.0]


def test_scores_that_overflow_have_radius_0() -> None:
    model = build("dense", SHAPE, 3, widths=(4,)).eval()
    with torch.no_grad():
        model.head.bias[0] = math.inf
    assert certify(model, images(3).float(), bound(model.body)).radius.tolist() == [0.0] * 3


def test_a_network_that_never_changes_has_an_infinite_radius() -> None:
    model = linear_classifier(3, body=0.0)
    certificate = certify(model, images(3), bound(model.body))
    assert certificate.radius.tolist() == [math.inf] * 3


# --- properties --------------------------------------------------------------------------------------------------


def test_the_radius_divides_by_the_constant_that_was_given() -> None:
    model, x = linear_classifier(3), images(10)
    one, four = (certify(model, x, LipschitzBound(constant, ())) for constant in (1.0, 4.0))
    assert torch.allclose(one.radius, 4 * four.radius, rtol=1e-14)
    assert torch.equal(one.logit_gap, four.logit_gap)


def test_batches_do_not_matter() -> None:
    model = build("dense", SHAPE, 3, widths=(8,)).double().eval()
    x = images(11)
    whole, parts = (certify(model, x, bound(model.body), batch_size=size) for size in (1024, 4))
    assert torch.equal(whole.prediction, parts.prediction)
    assert torch.allclose(whole.radius, parts.radius, rtol=1e-12)
    assert whole.radius.dtype == whole.logit_gap.dtype == torch.float64
    assert whole.prediction.dtype == torch.int64
    assert not whole.radius.requires_grad


def test_certifying_leaves_the_model_alone() -> None:
    model = build("dense", SHAPE, 3, widths=(8,)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certify(model, images(3).float(), bound(model.body))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training


# --- what is refused ---------------------------------------------------------------------------------------------

BAD_INPUTS: dict[str, tuple[Tensor, str]] = {
    "no batch": (torch.rand(12), "inputs: expected a batch (batch, ...), got shape (12,); add a batch dimension"),
    "empty": (torch.rand(0, *SHAPE), "inputs: expected at least one sample, got an empty batch"),
    "bytes": (
        torch.zeros(2, *SHAPE, dtype=torch.uint8),
        "inputs: expected floating-point values in [0, 1], got torch.uint8; divide 8-bit images by 255 first",
    ),
    "nan": (
        torch.tensor([0.5, math.nan]).view(2, 1).expand(2, 12).reshape(2, *SHAPE),
        "inputs: sample 1 holds NaN or infinite values; remove or repair it",
    ),
    "infinite": (torch.full((1, *SHAPE), math.inf), "inputs: sample 0 holds NaN or infinite values"),
    "0 to 255": (
        255 * torch.ones(1, *SHAPE),
        "inputs: expected values in [0, 1], got [255, 255]; rescale the images (8-bit images are divided by 255)",
    ),
    "negative": (torch.full((1, *SHAPE), -0.25), "inputs: expected values in [0, 1], got [-0.25, -0.25]"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_cannot_be_certified_are_refused(name: str) -> None:
    inputs, words = BAD_INPUTS[name]
    model = build("dense", SHAPE, 3, widths=(8,)).eval()
    with pytest.raises(InputError) as caught:
        certify(model, inputs, bound(model.body))
    assert str(caught.value).startswith(words)


def test_a_model_in_training_mode_is_refused() -> None:
    model = build("dense", SHAPE, 3, widths=(8,))
    with pytest.raises(InputError) as caught:
        certify(model, images(2).float(), bound(model.body))
    assert str(caught.value) == "the model is in training mode; call model.eval() before certifying or explaining"


def test_grey_images_for_a_network_of_colours_are_refused() -> None:
    model = build("dense", (3, 2, 2), 3, widths=(8,)).eval()
    with pytest.raises(InputError):
        certify(model, torch.rand(4, 1, 2, 2), bound(model.body))


# --- certified accuracy --------------------------------------------------------------------------------------------


def certificate(radii: Sequence[float], predictions: Sequence[int]) -> Certificate:
    radius = torch.tensor(radii, dtype=torch.float64)
    return Certificate(torch.tensor(predictions), radius, radius)


def test_certified_accuracy_by_hand() -> None:
    found = certified_accuracy(
        certificate([0.0, 0.25, 0.5, 2.0], [1, 0, 1, 2]),
        torch.tensor([1, 0, 0, 2]),
        [0, 0.25, 0.250001, 36 / 255, 2, 3.0],
    )
    assert found == {"0": 0.75, "0.25": 0.5, "0.250001": 0.25, "0.141176": 0.5, "2": 0.25, "3": 0.0}


def test_certified_accuracy_falls_from_the_accuracy_to_0() -> None:
    model, x = linear_classifier(3), images(200)
    labels = torch.randint(0, 3, (200,), generator=torch.Generator().manual_seed(2))
    found = certify(model, x, bound(model.body))
    radii = [0.0, *torch.linspace(0.001, 3, 50).tolist(), 1e6]
    shares = list(certified_accuracy(found, labels, radii).values())
    assert shares[0] == float((predict(model(x)) == labels).double().mean())
    assert all(first >= second for first, second in itertools.pairwise(shares))
    assert 0 < shares[10] < shares[0]
    assert shares[-1] == 0.0


# --- search for what would refute the certificates -----------------------------------------------------------------


def trained(*, steps: int = 60) -> tuple[Classifier, Tensor, Tensor]:
    """A small network trained on three noisy patterns, in float64 with its weights retracted to float64 accuracy."""
    generator = torch.Generator().manual_seed(3)
    patterns = torch.rand(3, *SHAPE, generator=generator)
    y = torch.arange(60) % 3
    x = (patterns[y] + 0.15 * torch.randn(60, *SHAPE, generator=generator)).clamp(0, 1)
    model, loss = (
        build("dense", SHAPE, 3, widths=(16, 16)),
        SoftHKRLoss(torch.full((3,), 1 / 3), margin=0.3, hinge_weight=10.0),
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    keep_on_manifold(optimizer, model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    model = model.double().eval()
    retract_parameters(model)
    return model, x.double(), y


@pytest.fixture(scope="module")
def net() -> tuple[Classifier, Tensor, Tensor]:
    torch.manual_seed(0)
    return trained()


def attack(model: nn.Module, x: Tensor, own: Tensor, radius: Tensor, *, steps: int = 40, starts: int = 3) -> Tensor:
    """Ascent on the largest rival's margin within `radius` of each sample; returns the worst margin, > 0 if broken."""
    worst = torch.full((len(x),), -math.inf, dtype=torch.float64)
    size = radius.view(-1, 1, 1, 1)
    generator = torch.Generator().manual_seed(4)
    for start in range(starts):
        delta = torch.zeros_like(x)
        if start:
            delta = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            delta = delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * size
        for step in range(steps):
            delta.requires_grad_()
            scores = model(x + delta)
            rival = scores.masked_fill(nn.functional.one_hot(own, scores.shape[1]).bool(), -math.inf).amax(dim=1)
            margin = rival - scores.gather(1, own.unsqueeze(1)).squeeze(1)
            worst = torch.maximum(worst, margin.detach())
            (gradient,) = torch.autograd.grad(margin.sum(), delta)
            gradient = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            delta = (delta + size * 2 / (step + 2) * gradient).detach()
            length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = delta * (size / length.clamp(min=1e-300)).clamp(max=1)
    return worst


def test_no_adversarial_point_lies_within_the_radius(net: tuple[Classifier, Tensor, Tensor]) -> None:
    model, x, y = net
    found = certify(model, x, bound(model.body))
    assert float((found.prediction == y).double().mean()) > 0.9
    assert float(found.radius.mean()) > 0.1
    assert attack(model, x, found.prediction, found.radius).max() < 0  # no tolerance
    # the search is able: a few times the radius is enough for nearly every sample
    beyond = attack(model, x, found.prediction, 2.5 * found.radius)
    assert float((beyond > 0).double().mean()) > 0.8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("widths", [(6,), (20, 10), (8, 8, 8)])
def test_no_adversarial_point_of_random_networks(seed: int, widths: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    model = build("dense", SHAPE, 4, widths=widths).double().eval()
    x = images(20, seed)
    found = certify(model, x, bound(model.body))
    assert attack(model, x, found.prediction, found.radius, steps=20, starts=2).max() < 0


def test_the_attack_breaks_a_linear_classifier_just_beyond_its_radius() -> None:
    model, x = linear_classifier(4), images(20)
    found = certify(model, x, bound(model.body))
    assert attack(model, x, found.prediction, found.radius).max() < 1e-7  # the boundary itself
    assert attack(model, x, found.prediction, 1.05 * found.radius).min() > 0


def test_no_two_points_violate_the_lipschitz_constant(net: tuple[Classifier, Tensor, Tensor]) -> None:
    model, data, _ = net
    constant = bound(model.body).constant
    generator = torch.Generator().manual_seed(5)
    spread = torch.logspace(-6, 1, 60, dtype=torch.float64).view(-1, 1, 1, 1)
    x = torch.cat([data, torch.randn(60, *SHAPE, generator=generator, dtype=torch.float64) * spread])
    y = x + torch.randn(x.shape, generator=generator, dtype=torch.float64) * torch.cat([spread, spread.flip(0)])

    def ratio(function: nn.Module) -> Tensor:
        return (function(x) - function(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)

    best = torch.zeros(120, dtype=torch.float64)
    for _ in range(60):
        x.requires_grad_()
        y.requires_grad_()
        value = ratio(model.body)
        best = torch.maximum(best, value.detach())
        gradients = torch.autograd.grad(value.sum(), (x, y))
        gap = (x - y).detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x, y = (
            (p + 0.2 * gap * g / g.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)).detach()
            for p, g in zip((x, y), gradients, strict=True)
        )
    # differences of 1e-6 between numbers of size 1 to 10 carry rounding of 1e-9
    assert best.max() <= constant * (1 + 1e-8)
    assert best.max() > 0.9 * constant  # the search comes close, so it could fail
    # and pair potentials, the functions behind the certificates
    weight = model.head.weight.detach()
    scores = (model(x) - model(y)).detach()
    for i in range(3):
        for j in range(i):
            potential = (scores[:, i] - scores[:, j]).abs() / (constant * (weight[i] - weight[j]).norm())
            assert (potential / (x - y).flatten(1).norm(dim=1)).max() <= 1 + 1e-8


def test_the_search_would_find_a_constant_that_is_too_small() -> None:
    layer = OrthoLinear(12, 12)
    with torch.no_grad():
        layer.weight.mul_(1.01)
    x, y = torch.randn(2, 50, 12)
    assert ((layer(x) - layer(y)).norm(dim=1) / (x - y).norm(dim=1)).max() > 1.009
    assert bound(layer).constant > 1.009


def test_a_head_or_a_model_that_computes_something_else_is_refused() -> None:
    """The radius is read off the head's weight: a hook on it would make it a lie."""
    model = build("dense", (1, 4, 4), 3, widths=(8,)).eval()
    x = torch.rand(2, 1, 4, 4)
    body = bound(model.body)
    assert certify(model, x, body).radius.shape == (2,)
    handle = model.head.register_forward_hook(lambda module, inputs, output: 100 * output)
    with pytest.raises(InputError, match="both without a forward of their own or hooks"):
        certify(model, x, body)
    handle.remove()
    model.forward = lambda inputs: 2 * model.head(model.body(inputs))  # type: ignore[method-assign]
    with pytest.raises(InputError, match="both without a forward of their own or hooks"):
        certify(model, x, body)
