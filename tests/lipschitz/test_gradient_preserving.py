"""The bounds of the activations that keep the norm of the gradient, and of heads, against true norms and executions."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.lipschitz.layers import EXACT, LayerBound, Rounding, layer_bound
from otnn.nn import Abs, FrobeniusLinear, FullSort, GroupSort, Householder, OrthoLinear, UnitNormLinear
from tests.exact import covers, distance, exactly, fractions, sine
from tests.operators import layer_matrix, norm

SORTS = [GroupSort(2), GroupSort(3), GroupSort(12), FullSort()]


@pytest.mark.parametrize("layer", [*SORTS, Abs()], ids=str)
def test_sorts_and_absolute_values_only_move_and_negate(layer: nn.Module) -> None:
    assert layer_bound(layer, (12,), (12,)) == LayerBound(1.0, EXACT)
    assert bound(layer).constant == 1.0


@pytest.mark.parametrize("make", [lambda dim: GroupSort(4, dim), FullSort, lambda dim: Householder(8, dim)])
def test_along_the_batch_they_are_refused(make: type[nn.Module]) -> None:
    name = type(make(0)).__name__
    for dim, shape, words in (
        (0, None, f"{name} along dimension 0 mixes the samples of a batch; expected dim >= 1"),
        (-2, (8,), f"{name} along dimension -2 mixes the samples of a batch; expected dim >= 1"),
        (-2, None, f"{name} along dimension -2 depends on the input's shape: expected dim >= 1 or input_shape"),
    ):
        with pytest.raises(InputError) as caught:
            layer_bound(make(dim), shape, shape)
        assert str(caught.value) == words
    assert layer_bound(make(-1), (2, 8), (2, 8)).constant == 1.0


def reflections(channels: int, *, extreme: bool = False) -> Householder:
    layer = Householder(channels)
    with torch.no_grad():
        layer.angle.uniform_(-3.2, 3.2)
        if extreme:  # sines and cosines near zero, and large angles
            values = [math.pi, 0.0, 1e-30, -math.pi, 2 * math.pi, 1e4, -3e5, 1e-3, 5e-8, math.pi / 2]
            layer.angle[: len(values)] = torch.tensor(values)
    return layer


def test_sine_and_cosine_are_within_the_8_roundings_that_are_counted() -> None:
    """Of 2^16 angles, those around the zeros included, against float64."""
    around = torch.tensor([0.0, math.pi / 2, math.pi, 3 * math.pi / 2])
    angles = torch.cat([torch.linspace(-10, 10, 2**15), (around[:, None] + 1e-3 * torch.randn(4, 2**13)).flatten()])
    for function in (torch.sin, torch.cos):
        exact = function(angles.double())
        error = (function(angles).double() - exact).abs() / exact.abs().clamp(min=2.0**-126)
        assert float(error.max()) <= 8 * 2.0**-24
    # float64 against a series in fractions
    for angle in torch.cat([torch.linspace(-1.6, 1.6, 41), around[1:2]]).double():
        for function, cosine in ((torch.sin, False), (torch.cos, True)):
            true = sine(Fraction(float(angle)), cosine)
            assert abs(Fraction(float(function(angle))) - true) <= Fraction(8, 2**53) * abs(true)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("shape", [(20,), (20, 3, 4)])
def test_householder_in_float32_stays_within_its_rounding(shape: tuple[int, ...], extreme: bool) -> None:
    layer = reflections(20, extreme=extreme).requires_grad_(False)
    found = layer_bound(layer, shape, shape)
    outputs = math.prod(shape)
    assert found == LayerBound(1.0, Rounding(20, 3.0, 0.0, outputs))
    assert found.rounding is not None
    slope, offset = found.rounding.local(torch.float32)
    largest = 0.0
    for scale in (1e-20, 1.0, 1e3, 1e20):
        x = scale * torch.randn(200, *shape)
        x[100:, :10] = x[100:, 10:] * (1 + 1e-6 * torch.randn_like(x[100:, 10:]))  # near the switch of MaxMin
        executed = layer.float()(x).double()
        exact = layer.double()(x.double())
        error = (executed - exact).flatten(1).norm(dim=1)
        allowed = slope * x.double().flatten(1).norm(dim=1) + offset
        assert bool((error <= allowed).all())
        largest = max(largest, float((error / allowed).max()))
    assert largest > 0.005  # not a wild bound, and an error that is not zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_householder_against_exact_arithmetic(dtype: torch.dtype) -> None:
    layer = reflections(8).to(dtype).requires_grad_(False)
    rounding = layer_bound(layer, (8,), (8,)).rounding
    assert rounding is not None
    slope, offset = rounding.local(dtype)
    for x in torch.randn(20, 8, dtype=dtype):
        true, _ = exactly(layer, fractions(x), (8,))
        error = slope * float(x.double().norm()) * (1 + 1e-12) + offset
        assert covers(error, distance(fractions(layer(x[None])), true))


def test_without_the_shape_the_rounding_is_unknown() -> None:
    assert layer_bound(Householder(4), None, None) == LayerBound(1.0, None)


HEADS: list[tuple[type[nn.Linear], float, float]] = [
    (OrthoLinear, 1.0, 1.0),
    (FrobeniusLinear, 1 / math.sqrt(5), 1.0),
    (UnitNormLinear, 1.0, math.sqrt(5)),
]


@pytest.mark.parametrize(("kind", "least", "most"), HEADS)
def test_heads_are_bounded_by_what_their_constraint_allows(kind: type[nn.Linear], least: float, most: float) -> None:
    for _ in range(10):
        head = kind(12, 5)
        true = norm(layer_matrix(head, (12,)))
        assert least * (1 - 1e-6) <= true <= most * (1 + 1e-6)
        assert true <= bound(head).constant <= true * (1 + 1e-4) + 1e-6


def test_equal_rows_attain_the_ends_of_the_frobenius_head() -> None:
    head = FrobeniusLinear(12, 5)
    for weight, expected in ((torch.ones(5, 12), 1.0), (torch.eye(5, 12), 1 / math.sqrt(5))):
        with torch.no_grad():
            head.weight.copy_(head.manifold.retract(weight))
        found: Tensor = layer_matrix(head, (12,))
        assert norm(found) == pytest.approx(expected, rel=1e-6)
        assert bound(head).constant == pytest.approx(expected, rel=1e-6)
