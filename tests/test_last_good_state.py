"""A step that would leave NaN or infinite weights stops with the layer's name, and the last good state stays."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from otnn.losses import SoftHKRLoss
from otnn.manifold import ManifoldHooks, UnitRows, constrained_parameters, keep_on_manifold
from otnn.nn import MaxMin, OrthoConv2d, OrthoLinear, UnitNormLinear

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": lambda p: SGD(p, 1e-3, momentum=0.9),
    "adam": lambda p: Adam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
}
GRADIENT = "got a NaN or infinite gradient, so the step was not taken; check the batch, or lower the learning rate"
WEIGHT = "became NaN or infinite in the step, which was undone; lower the learning rate"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrthoConv2d(1, 4, 3, stride=2, padding=1), nn.Flatten(), OrthoLinear(16, 8), MaxMin(), UnitNormLinear(8, 3)
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(12) % 3
    noise = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return 0.2 * noise + 0.4 * labels.view(-1, 1, 1, 1), labels


def values(*modules: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def same(one: Any, other: Any) -> bool:
    """Whether two nested structures are equal bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


class Training:
    """A network with a learned margin, its optimizer, and the guard."""

    def __init__(self, name: str) -> None:
        self.model = network()
        self.loss = SoftHKRLoss(torch.full((3,), 1 / 3), alpha=0.1)
        self.optimizer = OPTIMIZERS[name]([*self.model.parameters(), *self.loss.parameters()])
        self.hooks = keep_on_manifold(self.optimizer, self.model, self.loss)

    def backward(self, seed: int) -> None:
        self.optimizer.zero_grad()
        inputs, labels = batch(seed)
        self.loss(self.model(inputs), labels).backward()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.optimizer.step()


# --- before the step: gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_gradient_is_named_and_training_goes_on_as_if_it_had_not_been(name: str, bad: float) -> None:
    struck, spared = Training(name), Training(name)
    for training in (struck, spared):
        training.step(seed=1)
        training.step(seed=2)
    before, state = values(struck.model, struck.loss), deepcopy(struck.optimizer.state_dict())
    for parameter in [*struck.model.parameters(), *struck.loss.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    struck.model.get_parameter("2.weight").grad[1, 2] = bad
    with pytest.raises(FloatingPointError) as caught:
        struck.optimizer.step()
    assert str(caught.value) == f"2.weight {GRADIENT}"
    assert same(values(struck.model, struck.loss), before)
    assert same(struck.optimizer.state_dict(), state)
    for training in (struck, spared):
        training.step(seed=3)
    assert same(values(struck.model, struck.loss), values(spared.model, spared.loss))
    assert same(struck.optimizer.state_dict(), spared.optimizer.state_dict())
    assert not same(values(struck.model, struck.loss), before)


def test_a_nan_in_the_batch_names_the_first_layers_and_counts_the_others() -> None:
    training = Training("adam")
    inputs, labels = batch(1)
    inputs[0, 0, 0, 0] = math.nan
    training.loss(training.model(inputs), labels).backward()
    with pytest.raises(FloatingPointError) as caught:
        training.optimizer.step()
    assert str(caught.value) == f"0.mix, 0.bias, 2.weight and 3 more {GRADIENT}"


def test_names_of_several_modules_tell_them_apart() -> None:
    first, second, loss = nn.Sequential(OrthoLinear(2, 2)), nn.Sequential(OrthoLinear(2, 2)), Training("adam").loss
    optimizer = SGD([*first.parameters(), *second.parameters(), *loss.parameters()], 0.1)
    keep_on_manifold(optimizer, first, second, loss)
    second[0].weight.grad = torch.full((2, 2), math.nan)
    loss.margin.grad = torch.full_like(loss.margin, math.inf)
    with pytest.raises(FloatingPointError, match=r"^modules\[1\]\.0\.weight, margin got"):
        optimizer.step()


def test_a_norm_that_overflows_is_no_error() -> None:
    layer = OrthoLinear(4, 4)
    optimizer = SGD(layer.parameters(), 1e-30)
    keep_on_manifold(optimizer, layer)
    with torch.no_grad():
        layer.bias.fill_(1e30)
    layer.bias.grad = torch.full((4,), 1e30)
    assert torch.linalg.vector_norm(layer.bias.grad).isinf()
    optimizer.step()
    assert torch.equal(layer.bias, torch.full((4,), 1e30))
    layer.bias.grad.fill_(1e38)
    optimizer.param_groups[0]["lr"] = 1e-8
    optimizer.step()
    assert layer.bias.abs().max() < 1e24


def test_sparse_and_absent_gradients() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), OrthoLinear(4, 2))
    optimizer = SGD(model.parameters(), 0.1)
    keep_on_manifold(optimizer, model)
    before = values(model)
    optimizer.step()  # no gradient at all
    assert (
        torch.cat([v.flatten() for v in values(model)]) - torch.cat([v.flatten() for v in before])
    ).abs().max() < 1e-6
    model(torch.tensor([1, 1, 3])).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight[1], before[0][1])
    model.zero_grad()
    (model(torch.tensor([2])).sum() * math.nan).backward()
    with pytest.raises(FloatingPointError, match=r"^0\.weight, 1\.weight, 1\.bias got"):
        optimizer.step()


def test_only_parameters_of_both_the_optimizer_and_the_modules_are_watched() -> None:
    layer, frozen = OrthoLinear(2, 2), OrthoLinear(2, 2)
    alien = nn.Parameter(torch.ones(2))
    optimizer = SGD([*layer.parameters(), alien], 0.1)
    keep_on_manifold(optimizer, layer, frozen)
    alien.grad = torch.full((2,), math.nan)
    frozen.weight.grad = torch.full((2, 2), math.nan)  # another optimizer's
    layer.bias.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(layer.bias, torch.full((2,), -0.1))
    assert alien.isnan().all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_skips_infinite_gradients_itself(fused: bool) -> None:
    layer = OrthoLinear(4, 4)
    optimizer = Adam(layer.parameters(), 0.1, fused=fused)
    keep_on_manifold(optimizer, layer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    bias = layer.bias.detach().clone()
    for factor, expected in ((math.inf, 0.0), (1.0, 0.1)):
        layer.zero_grad()
        scaler.scale(layer(torch.ones(1, 4)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.allclose(bias - layer.bias, torch.full((4,), expected))
    assert scaler.get_scale() == 2.0


# --- after the step: parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bias_that_overflows_takes_all_parameters_back(name: str) -> None:
    training = Training(name)
    training.step(seed=1)
    training.backward(seed=2)
    bias = training.model[2].bias
    group = training.optimizer.param_groups[0]
    group["params"] = [parameter for parameter in group["params"] if parameter is not bias]
    training.optimizer.add_param_group({"params": [bias], "lr": 3e37})  # torch's Adam itself refuses 1e38
    bias.grad.fill_(1e4)
    before = values(training.model, training.loss)
    with pytest.raises(FloatingPointError) as caught:
        training.optimizer.step()
    assert str(caught.value) == f"2.bias {WEIGHT}"
    assert same(values(training.model, training.loss), before)
    training.optimizer.param_groups[1]["lr"] = 0.01
    training.step(seed=3)
    assert not same(values(training.model, training.loss), before)
    for module in (training.model, training.loss):
        for parameter_name, parameter, manifold in constrained_parameters(module):
            assert not parameter.numel() or manifold.distance(parameter.detach()).max() < 5e-6, parameter_name


def test_the_state_that_stays_is_that_of_the_last_step() -> None:
    layer = OrthoLinear(4, 4)
    optimizer = SGD([layer.bias], 1e38)
    keep_on_manifold(optimizer, layer)
    layer.bias.grad = torch.ones(4)
    for _ in range(3):
        optimizer.step()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=f"^bias {WEIGHT}$"):
            optimizer.step()
        assert torch.allclose(layer.bias, torch.full((4,), -3e38))


def test_a_constrained_weight_that_overflows_is_named() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 1e38)
    keep_on_manifold(optimizer, model)
    before = values(model)
    model[4].weight.grad = torch.full((3, 8), 1e4)
    model[2].bias.grad = torch.full((8,), -1e4)
    with pytest.raises(FloatingPointError) as caught:
        optimizer.step()
    assert str(caught.value) == f"2.bias, 4.weight {WEIGHT}"
    assert same(values(model), before)


def lbfgs(model: nn.Module, rate: float, factor: float = 1.0) -> tuple[Optimizer, Callable[[], Tensor]]:
    optimizer = torch.optim.LBFGS(model.parameters(), rate, max_iter=4)
    inputs, labels = batch(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(inputs), labels) * factor
        value.backward()
        return value

    return optimizer, closure


def test_lbfgs_leaves_the_last_good_parameters_and_a_new_one_goes_on() -> None:
    model = network()
    optimizer, closure = lbfgs(model, 0.1, factor=math.nan)
    hooks = keep_on_manifold(optimizer, model)
    before = values(model)
    with pytest.raises(FloatingPointError, match=f"3 more {WEIGHT}$"):
        optimizer.step(closure)
    assert same(values(model), before)
    hooks.remove()
    optimizer, closure = lbfgs(model, 0.1)
    keep_on_manifold(optimizer, model)
    losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_lbfgs_that_overflows_by_its_rate() -> None:
    model = network()
    optimizer, closure = lbfgs(model, 1e38, factor=100.0)
    keep_on_manifold(optimizer, model)
    before = values(model)
    with pytest.raises(FloatingPointError, match=WEIGHT):
        optimizer.step(closure)
    assert same(values(model), before)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_old_gradients_do_not_stop_a_closure(by_keyword: bool) -> None:
    model = network()
    optimizer, closure = lbfgs(model, 0.1)
    keep_on_manifold(optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    before = values(model)
    if by_keyword:
        optimizer.step(closure=closure)
    else:
        optimizer.step(closure)
    assert not same(values(model), before)


def test_copies_follow_a_change_of_dtype() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    keep_on_manifold(optimizer, model)
    optimizer.step()
    model.double()
    with torch.no_grad():
        model[2].bias.fill_(1 / 3)
    before = values(model)
    model[2].bias.grad = torch.full((8,), 1e308, dtype=torch.float64)
    optimizer.param_groups[0]["lr"] = 100.0
    with pytest.raises(FloatingPointError, match=r"^2\.bias became"):
        optimizer.step()
    assert same(values(model), before)


class Lost(UnitRows):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def retract(self, point: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    ("error", "text"),
    [(FloatingPointError("no way back"), "4.weight: no way back"), (KeyboardInterrupt("stop"), "stop")],
)
def test_a_retraction_that_fails_leaves_no_half(error: BaseException, text: str) -> None:
    model = network()
    model[4].manifolds["weight"] = Lost(error)
    optimizer = SGD(model.parameters(), 0.1)
    keep_on_manifold(optimizer, model)
    before = values(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(type(error)) as caught:
        optimizer.step()
    assert str(caught.value) == text
    assert same(values(model), before)


# --- the hooks ---------------------------------------------------------------------------------------------------


def test_removing_the_hooks_ends_both() -> None:
    layer = OrthoLinear(4, 4)
    optimizer = SGD(layer.parameters(), 0.1)
    hooks = keep_on_manifold(optimizer, layer)
    assert isinstance(hooks, ManifoldHooks)
    layer.bias.grad = torch.full((4,), math.nan)
    with pytest.raises(FloatingPointError, match=r"^bias got"):
        optimizer.step()
    hooks.remove()
    optimizer.step()
    assert layer.bias.isnan().all()
