from typing import Any

import pytest
import torch
from torch import Tensor, nn

from otnn.attacks import evaluate, gradient_step, pgd
from otnn.attacks.objective import Objective, distances
from otnn.attacks.pgd import _uniform
from otnn.certify import certify
from otnn.errors import InputError
from otnn.models import build
from tests.attacks.nets import Batches, Plain, linear, predicted, relu_net, rows

NORMS = ("l2", "linf")


def margins(model: nn.Module, x: Tensor, labels: Tensor, points: Tensor, targeted: bool = False) -> Tensor:
    objective = Objective(model, x, labels, targeted=targeted)
    return objective.margin(objective.scores(points), torch.arange(len(x)))


@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_on_linear_models_of_two_classes_it_is_the_gradient_step(outputs: int, norm: str, loss: str) -> None:
    model, x = linear(outputs), rows(40)
    labels = predicted(model, x)
    step = gradient_step(model, x, labels, 0.2, norm=norm, loss=loss)
    assert torch.allclose(pgd(model, x, labels, 0.2, norm=norm, loss=loss), step, rtol=0, atol=1e-9)
    wanted = pgd(model, x, 1 - labels, 0.2, norm=norm, loss=loss, targeted=True)
    assert torch.allclose(wanted, step, rtol=0, atol=1e-9)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
@pytest.mark.parametrize("norm", NORMS)
def test_it_is_at_least_as_strong_as_one_step_for_every_sample(norm: str, loss: str, box: bool, targeted: bool) -> None:
    model, x = relu_net(), rows(100)
    labels = (predicted(model, x) + targeted) % 4
    radii = torch.logspace(-3, 0, 100, dtype=torch.float64)
    settings = {"norm": norm, "loss": loss, "box": box, "targeted": targeted}
    step = gradient_step(model, x, labels, radii, **settings)
    found = pgd(model, x, labels, radii, steps=8, restarts=2, **settings)
    ends = [margins(model, x, labels, points, targeted) for points in (x, step, found)]
    assert (ends[2] >= torch.maximum(ends[0], ends[1]) - 1e-12).all()
    assert (ends[2] > ends[1] + 1e-6).any()
    assert (distances(x, found, norm) <= radii).all()
    if box:
        assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_points_stay_in_ball_and_box_whatever_the_radius(norm: str, dtype: torch.dtype) -> None:
    model, x = relu_net().to(dtype), rows(200, dtype=dtype).round(decimals=1)  # many values at the walls
    radii = torch.logspace(-8, 1, 200, dtype=torch.float64)
    found = pgd(model, x, predicted(model, x), radii, norm=norm, box=True, steps=5, restarts=2)
    assert (distances(x, found, norm) <= radii).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_in_the_box_it_finds_the_best_corner() -> None:
    """A linear function on ball and box is raised most at clamp(x + s w); the clamped step is shorter."""
    model = linear(1, 3)
    model.weight.data, model.bias.data = torch.tensor([[-3.0, -2.0, -1.0]]).double(), torch.tensor([9.0]).double()
    x, label = torch.tensor([[0.9, 0.5, 0.5]], dtype=torch.float64), torch.tensor([1])
    found = pgd(model, x, label, 0.5, box=True)
    # 0.1 of the first value, and the rest of the ball along (2, 1): s = sqrt(0.24 / 5)
    s = (0.24 / 5) ** 0.5
    assert torch.allclose(found, torch.tensor([[1.0, 0.5 + 2 * s, 0.5 + s]], dtype=torch.float64), atol=1e-3)
    assert distances(x, gradient_step(model, x, label, 0.5, box=True)) < 0.4
    assert distances(x, found) <= 0.5


def test_small_steps_find_what_one_step_jumps_over() -> None:
    """The other class leads between 0.4 and 0.6 only; from 0 the gradient points there, but a step of 1 is too far."""
    model = Plain(lambda rows: 0.1 - (rows[:, :1] - 0.5).abs())
    x, label = torch.zeros(1, 1).double(), torch.tensor([0])
    step, found = gradient_step(model, x, label, 1.0), pgd(model, x, label, 1.0)
    assert not evaluate(model, x, label, step).success.any()
    assert evaluate(model, x, label, found).success.all()


def test_random_starts_leave_a_flat_input() -> None:
    """At the input the gradient is 0; beyond 0.5 it is not. The first start stays, the others go on."""
    model = Plain(lambda rows: nn.functional.relu(rows.abs().amax(dim=1, keepdim=True) - 0.5) - 0.2)
    x, labels = torch.zeros(8, 2).double(), torch.zeros(8).long()
    assert torch.equal(pgd(model, x, labels, 1.0), x)
    found = pgd(model, x, labels, 1.0, restarts=8)
    assert evaluate(model, x, labels, found).success.all()


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_uniform_in_the_ball(norm: str) -> None:
    """A share t^d lies within t radii, and no direction is preferred; 20,000 draws, errors of four deviations."""
    inputs, radii = torch.full((20_000, 3), 0.5, dtype=torch.float64), torch.full((20_000,), 2.0, dtype=torch.float64)
    drawn = _uniform(inputs, radii, norm, torch.Generator().manual_seed(0))
    away = distances(inputs, drawn, norm)
    assert away.max() <= 2 + 1e-12
    for share in (0.3, 0.5, 0.8, 0.95):
        p = share**3
        assert float((away <= 2 * share).double().mean()) == pytest.approx(p, abs=4 * (p * (1 - p) / 20_000) ** 0.5)
    assert (drawn - inputs).mean(dim=0).abs().max() < 4 * 2 / 20_000**0.5


def test_momentum_and_step_size_are_followed() -> None:
    """In one dimension all steps are of the step size, and momentum carries over a dip of the gradient."""
    model = Plain(lambda rows: -1 + rows[:, :1] * (1 - (rows[:, :1] - 0.4).abs().lt(0.05).double() * 2))
    x, label = torch.zeros(1, 1).double(), torch.tensor([0])
    plain = pgd(model, x, label, 0.9, steps=20, step_size=0.1)
    carried = pgd(model, x, label, 0.9, steps=20, step_size=0.1, momentum=1.0)
    assert margins(model, x, label, carried) >= margins(model, x, label, plain)
    short = pgd(linear(1), rows(20), predicted(linear(1), rows(20)), 1e-3, steps=3, step_size=0.1)
    assert torch.allclose(distances(rows(20), short), torch.full((20,), 1e-3, dtype=torch.float64))  # the plain step


def test_draws_come_from_the_generator() -> None:
    model, x = relu_net(), rows(30)
    labels = predicted(model, x)

    def run(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return pgd(model, x, labels, 0.05, steps=3, restarts=3, generator=generator)

    assert torch.equal(run(None), run(0))
    assert torch.equal(run(7), run(7))
    assert not torch.equal(run(7), run(8))


@pytest.mark.parametrize("norm", NORMS)
def test_a_small_budget_and_other_company_change_nothing(norm: str) -> None:
    model, x = relu_net(), rows(40)
    labels = predicted(model, x)
    whole = pgd(model, x, labels, 0.3, norm=norm, box=True, steps=10)
    assert torch.allclose(pgd(model, x, labels, 0.3, norm=norm, box=True, steps=10, memory_budget=5000), whole)
    alone = [pgd(model, x[k : k + 1], labels[k : k + 1], 0.3, norm=norm, box=True, steps=10) for k in range(40)]
    assert torch.allclose(torch.cat(alone), whole)


def test_what_is_won_is_not_evaluated_again() -> None:
    """All but one sample fall to the first step; only that one goes on."""
    model, x = linear(1), rows(40)
    labels = predicted(model, x)
    radii = 2 * (model(x).detach().abs() / model.weight.detach().norm()).squeeze(1)
    radii[3] /= 4
    counted = Batches(model)
    found = pgd(counted, x, labels, radii, steps=10)
    assert evaluate(model, x, labels, found).success.sum() == 39
    assert counted.sizes.count(1) >= 10
    assert sum(size > 1 for size in counted.sizes) <= 5
    assert torch.equal(pgd(model, x, 1 - labels, 0.5), x)
    assert torch.equal(pgd(model, x, labels, 0.5, targeted=True), x)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_nothing_is_found_below_the_certified_radius(classes: int, norm: str) -> None:
    """In Linf the certificate counts as r / sqrt(d)."""
    model = build("dense", (1, 8, 8), classes, widths=(16, 16)).eval()
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = predicted(model, x)
    radius = certify(model, x, arithmetic="float32").radius / (8 if norm == "linf" else 1)
    assert (radius > 0).sum() > 50
    for loss in ("margin", "cross_entropy"):
        found = pgd(model, x, labels, radius, norm=norm, loss=loss, restarts=2)
        assert not evaluate(model, x, labels, found).success.any()
        step = gradient_step(model, x, labels, radius, norm=norm, loss=loss)
        assert not evaluate(model, x, labels, step).success.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"steps": 2.5}, "steps: expected an integer >= 1, got 2.5"),
        ({"restarts": 0}, "restarts: expected an integer >= 1, got 0"),
        ({"step_size": 0.0}, "step_size: expected a number > 0 and < 1000, got 0.0"),
        ({"step_size": torch.nan}, "step_size: expected a number > 0 and < 1000, got nan"),
        ({"step_size": 1e300}, "step_size: expected a number > 0 and < 1000, got 1e"),
        ({"step_size": "a"}, "step_size: expected a number > 0 and < 1000, got 'a'"),
        ({"momentum": None}, r"momentum: expected a number in \[0, 1\], got None"),
        ({"momentum": -0.1}, r"momentum: expected a number in \[0, 1\], got -0.1"),
        ({"momentum": 1.5}, r"momentum: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    model, x = linear(3), rows(4)
    with pytest.raises(InputError, match=message):
        pgd(model, x, predicted(model, x), 0.5, **settings)
