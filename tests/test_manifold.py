"""Manifolds other than Stiefel's, and the hook that keeps an optimizer on them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.losses import HKRLoss, SoftHKRLoss
from otnn.manifold import (
    Frobenius,
    Interval,
    Stiefel,
    UnitRows,
    constrained_parameters,
    keep_on_manifold,
    retract_parameters,
)
from otnn.nn import MaxMin, OrthoConv2d, OrthoLinear, UnitNormLinear
from tests.matrices import ON_MANIFOLD, gaussian, polar

stiefel = Stiefel()


# --- the other manifolds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_unit_rows_divides_by_the_norm(scale: float) -> None:
    point = gaussian(5, 8)
    expected = point / point.norm(dim=1, keepdim=True)
    assert (UnitRows().retract((scale * point).float()) - expected).abs().max() < 1e-6
    assert UnitRows().distance(UnitRows().retract(scale * point)) < 1e-15


def test_unit_rows_replaces_a_row_of_zeros() -> None:
    point = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -2.0, 0.0, 0.0]])
    expected = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, -1.0, 0.0, 0.0]])
    assert torch.equal(UnitRows().retract(point), expected)
    assert float(UnitRows().distance(point)) == 1.0


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_frobenius_divides_each_matrix_by_its_norm(scale: float) -> None:
    point = gaussian(4, 3, 5)
    expected = point / point.flatten(1).norm(dim=1).view(-1, 1, 1)
    assert (Frobenius().retract((scale * point).float()) - expected).abs().max() < 1e-6
    assert Frobenius().distance(Frobenius().retract(scale * point)).shape == (4,)
    assert Frobenius().distance(Frobenius().retract(scale * point)).max() < 1e-15
    assert Frobenius().distance(3 * expected).tolist() == pytest.approx([2.0] * 4)
    on = Frobenius().retract(point)
    assert (Frobenius().retract(on) - on).abs().max() < 1e-15


def test_frobenius_replaces_a_matrix_of_zeros() -> None:
    assert torch.equal(Frobenius().retract(torch.zeros(2, 2)), torch.full((2, 2), 0.5))
    assert float(Frobenius().distance(torch.zeros(2, 2))) == 1.0


def test_frobenius_samples_the_sphere_uniformly() -> None:
    # of 6 entries: E[x] = 0 and E[x^2] = 1/6 with deviation sqrt(3/48 - 1/36) = .186; 4.5 standard errors
    points = Frobenius().sample(4000, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert points.mean(dim=0).abs().max() < 4.5 * math.sqrt(1 / 6 / 4000)
    assert (points.square().mean(dim=0) - 1 / 6).abs().max() < 4.5 * 0.187 / math.sqrt(4000)


def test_an_interval_without_a_bound_clips_and_measures() -> None:
    point = torch.tensor([-2.0, -0.0, 0.5])
    assert Interval().retract(point).tolist() == [0.0, 0.0, 0.5]
    assert Interval().distance(point).tolist() == [2.0, 0.0, 0.0]


def test_the_unit_interval_clips_and_measures() -> None:
    point = torch.tensor([-2.0, 0.0, 0.5, 1.0, 1.25])
    assert Interval(1).retract(point).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert Interval(1).distance(point).tolist() == [2.0, 0.0, 0.0, 0.0, 0.25]


def test_sample_repeats_with_its_generator() -> None:
    for manifold in (stiefel, UnitRows(), Frobenius(), Interval(), Interval(1)):
        first, second = (manifold.sample(3, 4, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first, second)
        assert manifold.distance(first).max() < ON_MANIFOLD[torch.float32]


# --- the hook ----------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """Tall, wide and square matrices, two of one shape, one of the transposed shape, a convolution without factors."""
    return nn.Sequential(
        OrthoConv2d(1, 1, 3, padding=1),
        OrthoConv2d(1, 4, 3, stride=2, padding=1),
        MaxMin(),
        nn.Flatten(),
        OrthoLinear(16, 8),
        MaxMin(),
        OrthoLinear(8, 16),
        OrthoLinear(16, 8),
        OrthoLinear(8, 8),
        OrthoLinear(8, 8),
        UnitNormLinear(8, 3),
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=1e-3),
    "adam": torch.optim.Adam,
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "lbfgs": lambda p, lr: torch.optim.LBFGS(p, lr, max_iter=4),
}


def train(name: str, rate: float, steps: int) -> tuple[nn.Module, nn.Module, list[float]]:
    model = network()
    priors = torch.full((3,), 1 / 3)
    loss = SoftHKRLoss(priors, alpha=0.1)
    y = torch.arange(12) % 3
    x = 0.2 * torch.rand(12, 1, 4, 4) + 0.4 * y.view(-1, 1, 1, 1)
    optimizer = OPTIMIZERS[name]([*model.parameters(), *loss.parameters()], rate)
    keep_on_manifold(optimizer, model, loss)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        losses.append(float(value.detach()))
        return value

    for _ in range(steps):
        optimizer.step(closure)
        for module in (model, loss):
            for parameter_name, parameter, manifold in constrained_parameters(module):
                if parameter.numel():
                    distance = float(manifold.distance(parameter.detach()).max())
                    assert distance < ON_MANIFOLD[torch.float32], parameter_name
    return model, loss, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_stays_on_the_manifold_and_learns(name: str) -> None:
    rate = {"sgd": 1e-3, "momentum": 1e-4, "lbfgs": 0.1, "adagrad": 0.03}.get(name, 0.01)
    _, _, losses = train(name, rate, steps=15)
    assert min(losses[-3:]) < losses[0] - 0.005


@pytest.mark.parametrize(("name", "rate", "steps"), [("adam", 1e3, 30), ("sgd", 1e8, 10), ("rmsprop", 1e6, 10)])
def test_absurd_learning_rates_stay_on_the_manifold(name: str, rate: float, steps: int) -> None:
    model, _, _ = train(name, rate, steps)
    # biases are free: take them away, and the network still keeps distances
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.zero_()
        x, y = torch.rand(50, 1, 4, 4), torch.rand(50, 1, 4, 4)
        ratio = (model[:-1](x) - model[:-1](y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratio.max() <= 1 + 1e-5


def test_lbfgs_may_step_over_a_margin_of_zero() -> None:
    # it evaluates the loss within a step, before the hook, where a learned margin may be negative
    loss = HKRLoss(alpha=0.25)
    scores, labels = torch.linspace(-1, 1, 21), (torch.arange(21) > 10).long()
    optimizer = torch.optim.LBFGS(loss.parameters(), 10.0, max_iter=4)
    keep_on_manifold(optimizer, loss)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(scores, labels)
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    assert loss.margin >= 0


@pytest.mark.parametrize("position", [0, 2])
def test_an_infinite_factor_or_head_is_named(position: int) -> None:
    model = nn.Sequential(OrthoConv2d(2, 4, 3), nn.Flatten(), UnitNormLinear(4, 2))
    names = {0: "0.projectors", 2: "2.weight"}
    with torch.no_grad():
        model.get_parameter(names[position]).view(-1)[0] = math.inf
    with pytest.raises(FloatingPointError, match=f"^{names[position]}: a value is NaN or infinite"):
        retract_parameters(model)


def test_modules_of_one_shape_get_their_own_points() -> None:
    model = nn.Sequential(OrthoLinear(3, 5), OrthoLinear(5, 3), OrthoLinear(3, 5), OrthoConv2d(3, 5, 1))
    with torch.no_grad():
        for _, parameter, _ in constrained_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = {name: polar(parameter) for name, parameter, _ in constrained_parameters(model) if parameter.numel()}
    retract_parameters(model)
    for name, point in expected.items():
        assert (model.get_parameter(name) - point).abs().max() < 5e-6, name


def test_constrained_parameters_are_named_with_their_manifolds() -> None:
    model = nn.ModuleDict(
        {"body": nn.Sequential(OrthoLinear(2, 2)), "head": UnitNormLinear(2, 1), "free": nn.Linear(2, 2)}
    )
    model["loss"] = HKRLoss(alpha=0.1)
    found = {name: type(manifold) for name, _, manifold in constrained_parameters(model)}
    assert found == {"body.0.weight": Stiefel, "head.weight": UnitRows, "loss.margin": Interval}


def test_a_fixed_margin_is_no_parameter() -> None:
    assert list(constrained_parameters(HKRLoss(margin=0.3, hinge_weight=2.0))) == []


def test_removing_the_handle_ends_it() -> None:
    model = OrthoLinear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 10.0)
    handle = keep_on_manifold(optimizer, model)
    handle.remove()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert stiefel.distance(model.weight) > 1


def test_unconstrained_parameters_are_left_alone() -> None:
    layer = OrthoLinear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    keep_on_manifold(optimizer, layer)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.bias, -torch.ones(4))


def test_a_float64_network_is_retracted_to_float64_accuracy() -> None:
    model = network().double()
    retract_parameters(model)
    for name, parameter, manifold in constrained_parameters(model):
        if parameter.numel():
            assert manifold.distance(parameter).max() < 1e-14, name


def test_frozen_parameters_are_left_alone() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kept = OrthoLinear(4, 4), OrthoLinear(4, 4).requires_grad_(False)
            self.order = nn.Parameter(torch.arange(3), requires_grad=False)
            self.mask = nn.Parameter(torch.tensor([0.0, -torch.inf]), requires_grad=False)

    net = Frozen()
    with torch.no_grad():
        net.kept.weight.mul_(0.5)  # loaded from elsewhere
    before = {name: value.clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.SGD(net.layer.parameters(), lr=0.1)
    keep_on_manifold(optimizer, net)
    net.layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name]) == (not name.startswith("layer")), name
    retract_parameters(net)
    assert stiefel.distance(net.kept.weight) < ON_MANIFOLD[torch.float32]


def test_what_is_no_optimizer_with_its_modules_is_refused() -> None:
    layer = OrthoLinear(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for arguments, words in (
        ((optimizer,), r"keep_on_manifold\(optimizer, model\); got none"),
        ((layer, optimizer), "optimizer: expected a torch.optim.Optimizer, got OrthoLinear"),
        ((optimizer, layer.parameters()), "modules: expected the networks.*got generator"),
    ):
        with pytest.raises(InputError, match=words):
            keep_on_manifold(*arguments)  # type: ignore[arg-type]


def test_a_parametrization_in_the_place_of_a_weight_is_named() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(OrthoLinear(4, 2)))
    with pytest.raises(InputError, match=r"0\.weight: expected a parameter of .*; a parametrization or pruning took"):
        retract_parameters(net)


def test_what_a_gradient_of_before_still_moves_stays_on_its_manifold() -> None:
    net = nn.Sequential(OrthoLinear(4, 4), OrthoLinear(4, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
    keep_on_manifold(optimizer, net)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    net[0].requires_grad_(False)  # its gradient stays, and so the optimizer steps it
    before = net[0].weight.clone()
    for _ in range(3):
        optimizer.step()
    assert not torch.equal(net[0].weight, before)
    assert stiefel.distance(net[0].weight) < ON_MANIFOLD[torch.float32]
    net[0].weight.grad.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match=r"0\.weight"):
        optimizer.step()
