import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otnn.attacks.ball import ascent, project
from otnn.attacks.objective import distances

NORMS = ("l2", "linf")


def draw(seed: int, count: int, values: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Centres in the box, some of them at its walls; points around them; radii from 0 to more than any distance."""
    generator = torch.Generator().manual_seed(seed)
    inputs = (1.4 * torch.rand(count, values, generator=generator, dtype=torch.float64) - 0.2).clamp(0, 1).to(dtype)
    points = inputs + torch.randn(count, values, generator=generator, dtype=torch.float64).to(dtype)
    radii = 2 * torch.rand(count, generator=generator, dtype=torch.float64) ** 3
    return inputs, points, radii


@given(
    st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(NORMS), st.booleans(), st.floats(-9, 0), st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_the_projection_is_inside_without_a_tolerance(
    seed: int, values: int, norm: str, box: bool, exponent: float, single: bool
) -> None:
    inputs, points, radii = draw(seed, 8, values, torch.float32 if single else torch.float64)
    radii = radii * 10**exponent
    found = project(inputs, points, radii, norm, box=box)
    assert (distances(inputs, found, norm) <= radii).all()
    assert found.dtype == inputs.dtype
    if box:
        assert ((found >= 0) & (found <= 1)).all()
    assert torch.equal(project(inputs, found, radii, norm, box=box), found)  # what is inside does not move


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_is_the_nearest_point(norm: str, box: bool) -> None:
    """Of a convex set, p is nearest to y if and only if <y - p, z - p> <= 0 for every z of the set."""
    inputs, points, radii = draw(3, 50, 12, torch.float64)
    found = project(inputs, points, radii, norm, box=box)
    generator = torch.Generator().manual_seed(4)
    for scale in (0.01, 0.1, 1.0, 10.0):
        others = project(
            inputs, found + scale * torch.randn(50, 12, generator=generator).double(), radii, norm, box=box
        )
        assert ((points - found) * (others - found)).sum(dim=1).max() <= 1e-10
    outside = distances(inputs, points.clamp(0, 1) if box else points, norm) > radii
    assert outside.any()
    assert torch.allclose(distances(inputs, found, norm)[outside], radii[outside], rtol=1e-9, atol=0)


def test_the_projection_of_many_values_and_blocks() -> None:
    """Enough values that a norm in float32 rounds, and more than one block."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(60, 50_000, generator=generator)
    radii = torch.full((60,), 0.1, dtype=torch.float64)
    found = project(inputs, torch.rand(60, 50_000, generator=generator), radii, box=True)
    away = distances(inputs, found)
    assert (away <= radii).all()
    assert (away > 0.0999).all()


def test_the_ascent_raises_a_linear_function_most() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    others = torch.randn(1000, 5, generator=generator, dtype=torch.float64)
    for norm, lengths in (("l2", others.norm(dim=1)), ("linf", others.abs().amax(dim=1))):
        unit = ascent(gradient, norm)
        assert torch.allclose(distances(torch.zeros_like(unit), unit, norm), torch.ones(20, dtype=torch.float64))
        grown = (gradient * unit).sum(dim=1)
        assert torch.allclose(grown, gradient.norm(dim=1) if norm == "l2" else gradient.abs().sum(dim=1))
        assert (gradient @ (others / lengths.unsqueeze(1)).T <= grown.unsqueeze(1) + 1e-12).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_ascent_of_gradients_at_the_ends_of_the_numbers(norm: str) -> None:
    gradient = torch.tensor([[0.0, 0.0], [3e-30, 4e-30], [3e30, 4e30], [torch.nan, 1.0], [torch.inf, 1.0]])
    unit = ascent(gradient, norm)
    expected = torch.tensor([0.6, 0.8]) if norm == "l2" else torch.ones(2)
    assert torch.allclose(unit[1:3], expected.expand(2, 2))
    assert torch.equal(unit[[0, 3, 4]], torch.zeros(3, 2))
