"""Householder activations against the paper's rotation by an angle, and the absolute value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.nn import Abs, Householder, OrthoLinear, householder, maxmin

angles = st.floats(-10, 10)
numbers = st.floats(-100, 100)


def angle_of(angle: float) -> Tensor:
    return torch.tensor([angle], dtype=torch.float64)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(angles, numbers, numbers)
def test_it_is_the_reflection_of_the_paper(angle: float, first: float, second: float) -> None:
    pair, t = torch.tensor([[first, second]], dtype=torch.float64), angle_of(angle)
    found = householder(pair, t)
    cos, sin = math.cos(angle), math.sin(angle)
    mirror = torch.tensor([[cos, sin], [sin, -cos]], dtype=torch.float64)
    side = first * math.sin(angle / 2) - second * math.cos(angle / 2)
    assert torch.allclose(found, pair if side > 0 else pair @ mirror, rtol=1e-14, atol=1e-12)
    assert float(found.norm()) == pytest.approx(float(pair.norm()), rel=1e-14, abs=1e-300)
    # the image lies in front of the line, so nothing happens a second time
    assert torch.allclose(householder(found, t), found, rtol=1e-14, atol=1e-13)
    jacobian = torch.func.jacrev(lambda x: householder(x[None], t)[0])(pair[0])
    assert torch.allclose(jacobian @ jacobian.T, torch.eye(2, dtype=torch.float64), atol=1e-15)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(angles, numbers, st.floats(1e-12, 1e-3))
def test_it_is_continuous_at_the_switch(angle: float, place: float, step: float) -> None:
    t = angle_of(angle)
    u, v = math.sin(angle / 2), -math.cos(angle / 2)
    along, across = (torch.tensor([pair], dtype=torch.float64) for pair in ((-v * place, u * place), (u, v)))
    front, behind = (householder(along + way * step * across, t) for way in (1, -1))
    assert float((front - behind).norm()) <= 2 * step + 1e-12
    assert float((householder(along, t) - along).norm()) < 1e-12


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 2**20))
def test_no_two_points_come_further_apart(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = 6 * torch.rand(4, generator=generator, dtype=torch.float64) - 3
    x, y = torch.randn(2, 200, 8, generator=generator, dtype=torch.float64)
    ratio = (householder(x, t) - householder(y, t)).norm(dim=1) / (x - y).norm(dim=1)
    assert float(ratio.max()) <= 1 + 1e-14


@pytest.mark.parametrize(("shape", "dim"), [((3, 6), 1), ((6,), 0), ((2, 6, 3, 4), 1), ((2, 3, 6), -1), ((0, 6), 1)])
def test_pairs_are_those_of_maxmin_which_it_starts_as(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(Householder(6, dim, dtype=torch.float64)(x), maxmin(x, dim), rtol=1e-14, atol=1e-15)
    t = 6 * torch.rand(3, dtype=torch.float64) - 3
    moved, found = x.movedim(dim, 0), householder(x, t, dim).movedim(dim, 0)
    for k in range(3):
        pair, reflected = (values[[k, k + 3]].reshape(2, -1).T for values in (moved, found))
        assert torch.allclose(reflected, householder(pair, t[k : k + 1]), rtol=1e-14)


def test_the_angle_is_learned() -> None:
    """From MaxMin to the absolute value of the first of a pair, whose angle is pi."""
    layer = Householder(2)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    x = torch.randn(500, 2)
    target = torch.stack([x[:, 0].abs(), x[:, 1]], dim=1)
    for _ in range(200):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    assert float(layer.angle.detach()) == pytest.approx(math.pi, abs=1e-3)


def test_gradient_norms_are_kept_through_a_deep_network() -> None:
    layers: list[nn.Module] = []
    for _ in range(20):
        reflections = Householder(8, dtype=torch.float64)
        nn.init.uniform_(reflections.angle, -3, 3)
        layers += [OrthoLinear(8, 8, dtype=torch.float64), reflections]
    x = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(50, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(nn.Sequential(*layers)(x), x, cotangent)
    assert torch.allclose(gradient.norm(dim=1), cotangent.norm(dim=1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    t, x = torch.linspace(-3, 3, 3).to(dtype), torch.randn(10, 6).to(dtype)
    found, exact = householder(x, t), householder(x.double(), t.double())
    assert found.dtype == dtype
    # sine, cosine, products and sums are rounded, of terms that are at most 3 |z| together
    assert (found - exact).abs().max() <= 12 * torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.parametrize("channels", [-2, 0, 1, 5])
def test_channels_that_make_no_pairs_are_refused(channels: int) -> None:
    with pytest.raises(InputError) as caught:
        Householder(channels)
    assert str(caught.value) == f"Householder reflects pairs: expected an even number of channels >= 2, got {channels}"


def test_other_channels_are_refused() -> None:
    with pytest.raises(InputError, match="Householder reflects pairs: expected size 6 along dimension 1, got 4"):
        Householder(6)(torch.zeros(2, 4))


def test_representation_tells_the_channels() -> None:
    assert repr(Householder(6)) == "Householder(channels=6)"


def test_the_absolute_value_keeps_norms_and_hides_no_nan() -> None:
    x = torch.randn(40, 7, dtype=torch.float64, requires_grad=True)
    result = Abs()(x)
    cotangent = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(result, x, cotangent)
    assert torch.equal(result, torch.where(x < 0, -x, x))
    assert torch.equal(gradient, torch.where(x < 0, -cotangent, cotangent))
    assert Abs()(torch.tensor([-torch.inf, torch.nan])).isnan().tolist() == [False, True]
