"""Norms by the Lanczos iteration, against matrices written out and against bounds that are proven."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv2d

from benchmarks.accuracy.norms import TOLERANCE, norms, operator_norm
from otnn.lipschitz import convolution_bound
from otnn.nn import MaxMin


@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sides=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_the_norm_is_the_largest_singular_value_of_the_matrix(
    channels: tuple[int, int],
    taps: tuple[int, int],
    sides: tuple[int, int],
    stride: int,
    padding: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*channels, *taps, generator=generator, dtype=torch.float64)
    shape = (channels[1], *sides)
    units = torch.eye(channels[1] * sides[0] * sides[1], dtype=torch.float64).view(-1, *shape)
    matrix = conv2d(units, weight, stride=stride, padding=padding).flatten(1)
    expected = float(torch.linalg.matrix_norm(matrix, 2))
    found = operator_norm(weight, shape, stride, padding)
    # the root is too large by less than the tolerance; where the norm is 0, what is left is the rounding of squares
    assert expected * (1 - 1e-7) <= found <= expected * (1 + TOLERANCE)


@pytest.mark.parametrize("side", [1, 2, 3, 40])
def test_scalings_of_few_and_many_pixels(side: int) -> None:
    assert operator_norm(torch.tensor([[[[2.0]]]]), (1, 1, side)) == pytest.approx(2, rel=TOLERANCE)
    assert operator_norm(torch.zeros(1, 1, 1, 1), (1, side, side)) == 0


def test_layers_of_a_network_at_their_sizes() -> None:
    torch.manual_seed(0)
    first, second, dense = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Linear(64, 8)
    body = nn.Sequential(first, MaxMin(), second, MaxMin(), nn.Flatten(), dense, MaxMin())
    found = list(norms(body, (1, 8, 8)))
    assert found[0] == operator_norm(first.weight, (1, 8, 8), 1, 1)
    assert found[1] == operator_norm(second.weight, (4, 8, 8), 2, 1)
    assert found[2] == pytest.approx(float(torch.linalg.svdvals(dense.weight.detach().double())[0]))
    proven = convolution_bound(second.weight.detach(), stride=(2, 2), size=(8, 8))
    assert 0.8 * proven < found[1] <= proven
