import pytest
import torch
from torch import nn

from otnn.attacks import evaluate, gradient_step
from otnn.attacks.objective import Objective, distances
from tests.attacks.nets import Plain, linear, predicted, relu_net, rows

NORMS = ("l2", "linf")


@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_of_two_classes_the_step_is_along_the_normal(outputs: int, norm: str, loss: str) -> None:
    """Both losses grow along w_j - w_y, so the step has a closed form."""
    model, x = linear(outputs), rows(30)
    labels = predicted(model, x)
    weight = model.weight.detach()
    normal = weight[0] if outputs == 1 else weight[1] - weight[0]
    unit = normal / normal.norm() if norm == "l2" else normal.sign()
    expected = x + 0.3 * (1 - 2 * labels.double().unsqueeze(1)) * unit
    assert torch.allclose(gradient_step(model, x, labels, 0.3, norm=norm, loss=loss), expected, rtol=0, atol=1e-12)
    # the target is the other class, and raising it is the same
    step = gradient_step(model, x, 1 - labels, 0.3, norm=norm, loss=loss, targeted=True)
    assert torch.allclose(step, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_of_many_classes_the_step_follows_the_runner_up(norm: str) -> None:
    model, x = linear(4), rows(30)
    labels = predicted(model, x)
    step = gradient_step(model, x, labels, 0.2, norm=norm)
    ranked = model(x).argsort(dim=1, descending=True)
    normal = model.weight.detach()[ranked[:, 1]] - model.weight.detach()[ranked[:, 0]]
    unit = normal / normal.norm(dim=1, keepdim=True) if norm == "l2" else normal.sign()
    assert torch.allclose(step, x + 0.2 * unit, rtol=0, atol=1e-12)


def test_the_step_of_the_length_of_the_distance_reaches_the_boundary() -> None:
    model, x = linear(1), rows(40)
    labels = predicted(model, x)
    away = (model(x).detach().abs() / model.weight.detach().norm()).squeeze(1)
    short, long = (evaluate(model, x, labels, gradient_step(model, x, labels, k * away)) for k in (0.999, 1.001))
    assert not short.success.any()
    assert long.success.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_steps_stay_in_ball_and_box(norm: str, box: bool, dtype: torch.dtype) -> None:
    model, x = linear(3, dtype=dtype), rows(200, dtype=dtype)
    labels = predicted(model, x)
    radii = torch.logspace(-8, 0, 200, dtype=torch.float64)
    step = gradient_step(model, x, labels, radii, norm=norm, box=box)
    away = distances(x, step, norm)
    assert (away <= radii).all()
    if box:
        assert ((step >= 0) & (step <= 1)).all()
        assert (away[radii < 0.01] > 0).all() or dtype == torch.float32
    else:  # full length, up to the resolution of the values near 1
        assert (away >= radii * (1 - 1e-5) - 6 * torch.finfo(dtype).eps).all()


def test_what_is_won_or_flat_stays() -> None:
    model, x = linear(3), rows(20)
    labels = predicted(model, x)
    wrong = (labels + 1) % 3
    assert torch.equal(gradient_step(model, x, wrong, 0.5), x)
    assert torch.equal(gradient_step(model, x, labels, 0.5, targeted=True), x)
    assert torch.equal(gradient_step(model, x, labels, 0.0), x)
    flat = Plain(lambda rows: torch.stack([rows.sum(dim=1) * 0 + 1, rows.sum(dim=1) * 0], dim=1))
    for norm in NORMS:
        assert torch.equal(gradient_step(flat, x, torch.zeros(20).long(), 0.5, norm=norm), x)


def test_a_gradient_whose_square_vanishes_is_followed() -> None:
    """Scores of 1e-30 in float32: the squares of the gradient are below the smallest number."""
    model = nn.Linear(2, 1, bias=False).eval()
    model.weight.data = torch.tensor([[3e-30, 4e-30]])
    step = gradient_step(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]), 0.5)
    assert torch.allclose(step, torch.tensor([[0.2, 0.1]]))


def test_cross_entropy_vanishes_where_the_margin_does_not() -> None:
    """A label that leads by far: softmax rounds to 1, its gradient to 0, and that attack does nothing."""
    model, x = linear(3), rows(20)
    model.weight.data *= 1e5
    model.bias.data *= 1e5
    labels = predicted(model, x)
    certain = Objective(model, x, labels).margin(model(x).detach(), torch.arange(20)) < -1000
    assert certain.sum() > 10
    assert torch.equal(gradient_step(model, x, labels, 0.3, loss="cross_entropy")[certain], x[certain])
    assert (distances(x, gradient_step(model, x, labels, 0.3))[certain] > 0.29).all()


def test_a_small_budget_and_other_company_change_nothing() -> None:
    model, x = relu_net(), rows(50)
    labels = predicted(model, x)
    for norm in NORMS:
        whole = gradient_step(model, x, labels, 0.3, norm=norm, box=True)
        assert torch.allclose(gradient_step(model, x, labels, 0.3, norm=norm, box=True, memory_budget=5000), whole)
        alone = [gradient_step(model, x[k : k + 1], labels[k : k + 1], 0.3, norm=norm, box=True) for k in range(50)]
        assert torch.allclose(torch.cat(alone), whole)
