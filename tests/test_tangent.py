"""Gradients on manifolds: orthogonal projections, the derivative of the way back, and what an optimizer then sees."""

import pytest
import torch
from torch import Tensor, nn

from otnn.manifold import (
    Frobenius,
    Interval,
    Manifold,
    Stiefel,
    UnitRows,
    constrained_parameters,
    keep_on_manifold,
    project_gradients,
    retract_parameters,
)
from otnn.nn import OrthoConv2d, OrthoLinear, UnitNormLinear
from tests.matrices import gaussian, tangent

CURVED: tuple[Manifold, ...] = (Stiefel(), UnitRows(), Frobenius())
SHAPES = [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (2, 3, 4), (2, 4, 3)]


def on(manifold: Manifold, *shape: int) -> Tensor:
    return manifold.sample(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("manifold", CURVED, ids=lambda manifold: type(manifold).__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tangent_is_an_orthogonal_projection_and_the_derivative_of_the_way_back(
    manifold: Manifold, shape: tuple[int, ...]
) -> None:
    point, first, second = on(manifold, *shape), gaussian(*shape), gaussian(*shape, seed=1)
    along = tangent(manifold, point, first)
    assert torch.allclose(tangent(manifold, point, along), along, atol=1e-13)
    assert float((along * second).sum()) == pytest.approx(float((first * tangent(manifold, point, second)).sum()))
    # moving by t along it leaves the manifold by t^2 alone: ||T||^2 t^2 in a Gram matrix, half of it in a norm
    step = 1e-4
    assert manifold.distance(point + step * along).max() < 1.001 * step**2 * along.square().sum() + 1e-14
    # (R(X + t G) - X) / t is the projection up to O(t)
    moved = (manifold.retract(point + step * first) - point) / step
    assert (moved - along).abs().max() < 20 * step * first.square().sum()


@pytest.mark.parametrize("manifold", [Interval(), Interval(1)])
def test_numbers_may_go_anywhere(manifold: Manifold) -> None:
    gradient = gaussian(4)
    assert torch.equal(tangent(manifold, torch.tensor([0.0, 0.2, 0.5, 1.0]).double(), gradient), gradient)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_what_stretches_a_matrix_is_no_tangent(shape: tuple[int, int]) -> None:
    """Of ||W A||^2 for orthonormal columns A the gradient 2 W A A^T has a normal part; of ||W||^2 it has no other."""
    point = on(Stiefel(), *shape)
    symmetric = gaussian(min(shape), min(shape))
    symmetric = symmetric + symmetric.mT
    normal = symmetric @ point if shape[0] <= shape[1] else point @ symmetric
    assert tangent(Stiefel(), point, normal).abs().max() < 1e-13


def network() -> nn.Sequential:
    """Wide, tall and square matrices, two of one shape, one transposed, a convolution, a head, a layer of torch's."""
    layers = (OrthoConv2d(2, 4, 3), nn.Flatten(), OrthoLinear(4, 6), OrthoLinear(6, 4), OrthoLinear(4, 6), nn.Tanh())
    model = nn.Sequential(*layers, OrthoLinear(6, 6), nn.Linear(6, 6), UnitNormLinear(6, 3)).double()
    retract_parameters(model)  # to the accuracy of float64
    return model


def with_gradients(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_gradients_of_a_network_are_projected_each_at_its_own_weight() -> None:
    torch.manual_seed(0)
    model = network()
    before = with_gradients(model)
    kinds = {name: manifold for name, _, manifold in constrained_parameters(model)}
    project_gradients(model)
    for name, parameter in model.named_parameters():
        gradient = before[name]
        expected = tangent(kinds[name], parameter.detach(), gradient) if name in kinds else gradient
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected, atol=1e-13), name
        if name in kinds and parameter.numel() > 1:
            assert not torch.equal(parameter.grad, gradient), name


def test_only_the_chosen_gradients_are_projected_and_missing_ones_are_passed() -> None:
    model = nn.Sequential(OrthoLinear(4, 4), OrthoLinear(4, 4), OrthoLinear(4, 4)).double()
    before = with_gradients(model)
    model[2].weight.grad = None
    project_gradients(model, only={model[0].weight})
    assert not torch.equal(model[0].weight.grad, before["0.weight"])
    assert torch.equal(model[1].weight.grad, before["1.weight"])
    assert model[2].weight.grad is None
    model[2].weight.grad = torch.eye(4).double().to_sparse()
    project_gradients(model)
    assert model[2].weight.grad.is_sparse


def test_the_gradient_is_that_along_the_manifold() -> None:
    """d/dt f(R(X - t P G)) = -||P G||^2: the projected gradient is that of the loss on the manifold."""
    torch.manual_seed(0)
    model = network()
    images = torch.rand(5, 2, 3, 3, dtype=torch.float64)

    def loss() -> Tensor:
        value: Tensor = model(images).square().sum()
        return value

    loss().backward()
    project_gradients(model)
    slope = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    start, step = float(loss().detach()), 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=step)
    keep_on_manifold(optimizer, model)  # projects once more, which changes nothing
    optimizer.step()
    assert (start - float(loss().detach())) / step == pytest.approx(slope, rel=1e-3)


def test_an_optimizer_gets_projected_gradients_of_its_own_parameters() -> None:
    model = nn.Sequential(OrthoLinear(4, 4), OrthoLinear(4, 4)).double()
    before = with_gradients(model)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    hooks = keep_on_manifold(optimizer, model)
    optimizer.step()
    expected = tangent(Stiefel(), model[0].weight.detach(), before["0.weight"])
    assert torch.allclose(model[0].weight.grad, expected, atol=1e-14)
    assert torch.equal(model[1].weight.grad, before["1.weight"])
    hooks.remove()
    model[0].weight.grad.copy_(before["0.weight"])
    optimizer.step()
    assert torch.equal(model[0].weight.grad, before["0.weight"])


def test_autocast_does_not_round_the_projection() -> None:
    layer = OrthoLinear(16, 16)
    layer.weight.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    expected = tangent(Stiefel(), layer.weight.detach().double(), layer.weight.grad.double())
    with torch.autocast("cpu", torch.bfloat16):
        project_gradients(layer)
    assert (layer.weight.grad - expected).abs().max() < 1e-5  # bfloat16 would be off by 1e-2
