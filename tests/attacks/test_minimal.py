import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.attacks import evaluate, minimal_norm
from otnn.attacks.objective import distances
from otnn.certify import certify
from otnn.errors import InputError
from otnn.models import build
from tests.attacks.nets import (
    Plain,
    ellipse_distance,
    linear,
    nearest_rival_distance,
    predicted,
    region_distance,
    relu_net,
    rows,
)
from tests.explain.nets import Counting

NORMS = ("l2", "linf")


@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 3, 4, 6, 10]),
    st.integers(1, 12),
    st.sampled_from(NORMS),
    st.sampled_from([1.0, 1e-3, 1e4]),
)
@settings(max_examples=40, deadline=None)
def test_on_linear_models_the_distance_is_the_closed_form(
    seed: int, outputs: int, features: int, norm: str, scale: float
) -> None:
    """Rows of any length, boundaries far outside the box, scores of any scale: within 1.001, and never below."""
    model, x = linear(outputs, features, seed), rows(6, features, seed + 1)
    model.weight.data *= scale
    model.bias.data *= scale
    labels = predicted(model, x)
    found = evaluate(model, x, labels, minimal_norm(model, x, labels, norm=norm), norm=norm)
    exact = torch.tensor(
        [nearest_rival_distance(model, x[k], int(labels[k]), norm, False) for k in range(6)], dtype=torch.float64
    )
    assert found.success.all()
    assert (found.distance <= 1.001 * exact + 1e-12).all()
    assert (found.distance >= exact * (1 - 1e-9) - 1e-12).all()


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4]), st.integers(2, 12), st.sampled_from(NORMS))
@settings(max_examples=30, deadline=None)
def test_in_the_box_the_distance_is_that_of_the_clamped_change(
    seed: int, outputs: int, features: int, norm: str
) -> None:
    """Up to four classes, so that every rival is a start. A half-space that the box does not meet has no point."""
    model, x = linear(outputs, features, seed), rows(6, features, seed + 1)
    labels = predicted(model, x)
    found = evaluate(model, x, labels, minimal_norm(model, x, labels, norm=norm, box=True), norm=norm, box=True)
    exact = torch.tensor(
        [nearest_rival_distance(model, x[k], int(labels[k]), norm, True) for k in range(6)], dtype=torch.float64
    )
    assert torch.equal(found.success, torch.isfinite(exact))
    reached = found.success
    assert (found.distance[reached] <= 1.001 * exact[reached] + 1e-12).all()
    assert (found.distance[reached] >= exact[reached] * (1 - 1e-9) - 1e-12).all()
    assert (found.distance[~reached] == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_in_float32_too(norm: str) -> None:
    """Up to the lead that rounding could take away: 32 roundings of the scores, or of terms that cancel in them."""
    model, x = linear(5, 20, dtype=torch.float32), rows(200, 20, dtype=torch.float32)
    labels = predicted(model, x)
    found = evaluate(model, x, labels, minimal_norm(model, x, labels, norm=norm), norm=norm)
    exact = torch.tensor(
        [nearest_rival_distance(model, x[k], int(labels[k]), norm, False) for k in range(200)], dtype=torch.float64
    )
    assert found.success.all()
    terms = 2 * x @ model.weight.detach().abs().amax(dim=0) + model(x).detach().abs().amax(dim=1)
    slack = 64 * torch.finfo(torch.float32).eps * terms
    assert (found.distance <= 1.001 * exact + slack).all()
    assert (found.distance >= exact * (1 - 1e-5) - slack).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_cross_entropy_of_two_classes_finds_the_same_points(outputs: int, norm: str) -> None:
    model, x = linear(outputs), rows(30)
    labels = predicted(model, x)
    margin = minimal_norm(model, x, labels, norm=norm)
    assert torch.allclose(minimal_norm(model, x, labels, norm=norm, loss="cross_entropy"), margin, atol=1e-4)
    assert torch.allclose(minimal_norm(model, x, 1 - labels, norm=norm, targeted=True), margin, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_a_target_is_reached_where_it_leads_all_others(norm: str) -> None:
    """The nearest point of a polyhedron, often where three classes tie: at such kinks Linf may stop a little early."""
    model, x = linear(4, 5), rows(40, 5)
    targets = (predicted(model, x) + 1) % 4
    found = evaluate(
        model, x, targets, minimal_norm(model, x, targets, norm=norm, targeted=True), norm=norm, targeted=True
    )
    exact = torch.tensor([region_distance(model, x[k], int(targets[k]), norm) for k in range(40)], dtype=torch.float64)
    ratio = found.distance / exact
    assert found.success.all()
    assert (ratio >= 1 - 1e-9).all()
    assert ratio.median() <= 1.001
    assert ratio.max() <= (1.01 if norm == "l2" else 1.1)


def test_the_nearest_point_of_a_curved_boundary() -> None:
    """From outside an ellipse the nearest point is unique; the gradient at the input points elsewhere."""
    axes = torch.tensor([1.0, 0.4], dtype=torch.float64)
    model = Plain(lambda rows: 1 - (rows / axes).square().sum(dim=1, keepdim=True))
    x = 3 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).double()
    x = x[(x / axes).square().sum(dim=1) > 1.2]
    labels = torch.zeros(len(x)).long()
    found = evaluate(model, x, labels, minimal_norm(model, x, labels))
    exact = torch.tensor([ellipse_distance(axes.numpy(), point) for point in x.numpy()], dtype=torch.float64)
    assert found.success.all()
    assert (found.distance <= 1.001 * exact).all()
    assert (found.distance >= exact * (1 - 1e-7)).all()
    assert exact.median() > 1


def test_it_is_nearly_a_local_minimum_on_a_network() -> None:
    """Of 3,000 points around, 0.5 % nearer to the input, none is adversarial but for other basins: 3 of 30 at most."""
    model, x = relu_net(), rows(30)
    labels = predicted(model, x)
    points = minimal_norm(model, x, labels)
    away = distances(x, points)
    generator, beaten = torch.Generator().manual_seed(0), torch.zeros(30, dtype=torch.bool)
    for scale in (0.01, 0.03, 0.1):
        noise = torch.randn(1000, 30, 6, generator=generator, dtype=torch.float64) * scale * away.view(1, 30, 1)
        change = points - x + noise
        change *= 0.995 * away.view(1, 30, 1) / change.norm(dim=2, keepdim=True)
        beaten |= (model((x + change).view(-1, 6)).view(1000, 30, 4).argmax(dim=2) != labels).any(dim=0)
    assert beaten.sum() <= 3


@pytest.mark.parametrize("classes", [2, 4])
def test_no_distance_is_below_the_certified_radius(classes: int) -> None:
    model = build("dense", (1, 8, 8), classes, widths=(16, 16)).eval()
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = predicted(model, x)
    radius = certify(model, x, arithmetic="float32").radius
    assert (radius > 0).sum() > 50
    for box in (False, True):
        found = evaluate(model, x, labels, minimal_norm(model, x, labels, box=box), box=box)
        assert found.success.any()
        assert (found.distance[found.success] >= radius[found.success]).all()


def test_on_a_network_that_is_the_distance_itself_it_meets_the_certificate() -> None:
    """z = w . x with |w| = 1 is the exact optimum of its problem: the certificate is the distance."""
    model = build("dense", (1, 8, 8), 2, widths=(8,)).eval()
    model.body = nn.Sequential(nn.Flatten())
    model.head = nn.Linear(64, 1)
    model.head.weight.data = nn.functional.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    model.head.bias.data = -model.head.weight.data.sum(dim=1) / 2
    model.eval()
    x = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = predicted(model, x)
    points = minimal_norm(model, x, labels)
    found = evaluate(model, x, labels, points)
    radius = certify(model, x).radius
    slack = (
        64 * torch.finfo(torch.float32).eps * (x * model.head.weight.detach().view(1, 8, 8)).flatten(1).abs().sum(dim=1)
    )
    assert found.success.all()
    assert (found.distance >= radius).all()
    assert (found.distance <= 1.001 * radius + slack).all()


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_small_budget_and_other_company_change_nothing(norm: str, box: bool) -> None:
    model, x = relu_net(), rows(16)
    labels = predicted(model, x)
    labels[4] = (labels[4] + 1) % 4  # one that is misclassified already
    whole = minimal_norm(model, x, labels, norm=norm, box=box)
    assert torch.equal(minimal_norm(model, x, labels, norm=norm, box=box), whole)
    assert torch.equal(whole[4], x[4])
    small = minimal_norm(model, x, labels, norm=norm, box=box, memory_budget=5000)
    assert torch.allclose(small, whole, rtol=0, atol=1e-9)
    alone = [minimal_norm(model, x[k : k + 1], labels[k : k + 1], norm=norm, box=box) for k in range(8)]
    assert torch.allclose(torch.cat(alone), whole[:8], rtol=0, atol=1e-9)
    if box:
        assert ((whole >= 0) & (whole <= 1)).all()


def test_in_single_precision_a_success_is_one_in_every_batch() -> None:
    """Scores round differently in a batch of another size; the points lead by more than that."""
    model = relu_net().float()
    x = rows(150, dtype=torch.float32)
    labels = predicted(model, x)
    points = minimal_norm(model, x, labels)
    whole = evaluate(model, x, labels, points).success
    alone = [evaluate(model, x[k : k + 1], labels[k : k + 1], points[k : k + 1]).success for k in range(150)]
    assert whole.all()
    assert torch.cat(alone).all()


@pytest.mark.parametrize("norm", NORMS)
def test_more_starts_are_never_worse(norm: str) -> None:
    model, x = relu_net(), rows(40)
    labels = predicted(model, x)
    away = [distances(x, minimal_norm(model, x, labels, norm=norm, starts=k), norm) for k in (1, 2, 3)]
    # a batch of another size is summed in another order
    assert (away[0] * (1 + 1e-12) >= away[1]).all()
    assert (away[1] * (1 + 1e-12) >= away[2]).all()
    assert (away[0] > 1.01 * away[2]).any()


def test_where_nothing_is_found_the_input_is_returned() -> None:
    x, labels = rows(10), torch.zeros(10).long()
    flat = Plain(lambda rows: torch.cat([rows[:, :1] * 0 + 1, rows[:, :1] * 0], dim=1))
    away_from_it = Plain(lambda rows: torch.cat([1 + rows[:, :1].square(), torch.zeros_like(rows[:, :1])], dim=1))
    broken = Plain(
        lambda rows: torch.where(rows[:, :1] == x[:, :1].max(), 1.0, rows.new_tensor(torch.nan)) * rows[:, :2]
    )
    for model in (flat, away_from_it, broken):
        for norm in NORMS:
            for box in (False, True):
                points = minimal_norm(model, x, labels, norm=norm, box=box)
                kept = ~evaluate(model, x, labels, points, norm=norm).success
                assert torch.equal(points[kept], x[kept])
                assert kept.sum() >= 9
    model = linear(3)
    right = predicted(model, x)
    assert torch.equal(minimal_norm(model, x, (right + 1) % 3), x)
    assert torch.equal(minimal_norm(model, x, right, targeted=True), x)


def test_the_passes_are_those_of_the_text() -> None:
    """One backward for each rival compared, and at most three for each iteration of each start."""
    for model in (linear(4), relu_net()):
        for iterations in (1, 5):
            x, counted = rows(30), Counting(model).eval()
            minimal_norm(counted, x, predicted(model, x), iterations=iterations)
            assert 30 * (4 + 3) <= counted.backwards <= 30 * (4 + 3 * 3 * iterations)


@pytest.mark.parametrize("norm", NORMS)
def test_all_starts_go_through_the_same_calls(norm: str) -> None:
    """Nine starts, one after another, would take nine times the calls of one; in one batch, those of the slowest."""
    model, x = linear(10), rows(30)
    labels = predicted(model, x)
    calls = []
    for starts in (1, 3, 9):
        counted = Calls(model).eval()
        minimal_norm(counted, x, labels, norm=norm, starts=starts)
        calls.append(counted.calls)
    assert calls[1] <= 2 * calls[0]
    assert calls[2] <= 2 * calls[0]


class Calls(nn.Module):
    """Counts the batches that pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scores: Tensor = self.model(x)
        return scores


@pytest.mark.parametrize("name", ["iterations", "starts"])
@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_settings_out_of_range_are_refused(name: str, number: float) -> None:
    model, x = linear(3), rows(4)
    with pytest.raises(InputError, match=f"{name}: expected an integer >= 1, got {number}"):
        minimal_norm(model, x, predicted(model, x), **{name: number})
