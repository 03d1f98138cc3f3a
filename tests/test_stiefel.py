"""The Stiefel manifold: the retraction to the polar factor, distances, uniform samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otnn.manifold import (
    Frobenius,
    Interval,
    Stiefel,
    UnitRows,
)
from otnn.polar import gram_excess, series, to_polar_
from tests.matrices import ON_MANIFOLD, gaussian, polar

SHAPES = [(3, 5), (5, 3), (4, 4), (1, 7), (7, 1), (1, 1), (2, 3, 6), (2, 6, 3), (2, 2, 4, 4)]
stiefel = Stiefel()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("noise", "tolerance"), [(1e-6, 1e-12), (1e-2, 1e-12), (0.1, 1e-12), (3.0, 1e-10)])
def test_retract_is_the_polar_factor(shape: tuple[int, ...], noise: float, tolerance: float) -> None:
    # far from the manifold the polar factor itself amplifies rounding by 1 / sigma_min: hence the wider tolerance
    point = polar(gaussian(*shape)) + noise * gaussian(*shape, seed=1)
    assert (stiefel.retract(point) - polar(point)).abs().max() < tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_retract_is_the_polar_factor_in_float32(shape: tuple[int, ...]) -> None:
    point = (polar(gaussian(*shape)) + 0.05 * gaussian(*shape, seed=1)).float()
    retracted = stiefel.retract(point)
    assert retracted.dtype == torch.float32
    assert (retracted - polar(point)).abs().max() < 2e-6  # 16 units in the last place of 1
    assert stiefel.distance(retracted).max() < ON_MANIFOLD[torch.float32]


@pytest.mark.parametrize("excess", [-0.7, -0.64, -0.63, -0.5, 0.5, 0.63, 0.64, 0.9, 1.1])
def test_series_and_exact_factor_agree_where_one_takes_over(excess: float) -> None:
    point = polar(gaussian(4, 6)) * math.sqrt(1 + excess)  # G - I = excess * I
    assert float(stiefel.distance(point)) == pytest.approx(2 * abs(excess), rel=1e-12)
    assert (stiefel.retract(point) - polar(point)).abs().max() < 1e-14
    tilted = point.clone()
    tilted[0] *= 0.9 / math.sqrt(1 + excess)  # unequal singular values
    assert (stiefel.retract(tilted) - polar(tilted)).abs().max() < 1e-13


@pytest.mark.parametrize("order", [3, 5, 7])
@pytest.mark.parametrize("reach", [1e-2, 0.1, 0.3, 0.6, 0.9])
def test_terms_below_a_power_leave_less_than_that_power(order: int, reach: float) -> None:
    # the retraction counts on it: of the Gram matrix I + E, p (I + E) p - I has eigenvalues within reach^order
    basis, excess = polar(gaussian(7, 7)), torch.linspace(-reach, reach, 7, dtype=torch.float64)
    matrix = basis * excess @ basis.mT
    factor = torch.eye(7).double() + series(matrix, matrix @ matrix, order)
    left = factor @ (torch.eye(7).double() + matrix) @ factor - torch.eye(7).double()
    found = float(torch.linalg.matrix_norm(left, 2))
    assert 0.3 * reach**order - 1e-14 < found < reach**order + 1e-14  # a term too few or too many leaves neither


@pytest.mark.parametrize("stretch", [0.7, 0.8, 1.2, 1.25])
def test_what_all_rows_share_costs_no_second_gram_matrix(stretch: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A common factor, which the series of E alone would need several rounds for, is taken out exactly."""
    made = []

    def counted(wide: Tensor) -> Tensor:
        made.append(wide)
        return gram_excess(wide)

    monkeypatch.setattr("otnn.polar.gram_excess", counted)
    start = polar(gaussian(3, 4, 9))
    stretches = stretch * torch.tensor([1.0, 1.01, 0.99]).double().view(3, 1, 1)
    for noise, dtype, tolerance in ((1e-4, torch.float64, 1e-15), (1e-3, torch.float32, 1e-6)):
        point = (stretches * start + noise * gaussian(3, 4, 9, seed=1)).to(dtype)
        expected = polar(point.double())
        made.clear()
        to_polar_(point)
        assert (point - expected).abs().max() < 4 * tolerance
        assert len(made) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_points_on_the_manifold_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    point = polar(gaussian(*shape)).to(dtype)
    assert (stiefel.retract(point) - point).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_points_stay_bit_for_bit(dtype: torch.dtype) -> None:
    signed_permutation = torch.tensor([[0, -1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]], dtype=dtype)
    for point in (torch.eye(5, dtype=dtype), signed_permutation, signed_permutation.mT):
        assert torch.equal(stiefel.retract(point), point)


def test_the_closest_point_of_a_diagonal_matrix_is_its_signs() -> None:
    point = torch.diag(torch.tensor([3.0, -1e-3, 0.2], dtype=torch.float64))
    assert torch.allclose(stiefel.retract(point), torch.diag(torch.tensor([1.0, -1.0, 1.0]).double()), atol=1e-14)


def nuclear_gap(point: Tensor, retracted: Tensor) -> float:
    """(||A||_* - <A, Q>) / ||A||_*: 0 exactly for polar factors, unique or not (rank deficiency)."""
    scaled = point.double() / point.double().abs().max()
    nuclear = torch.linalg.svdvals(scaled).sum()
    return float((nuclear - (scaled * retracted.double()).sum()) / nuclear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [4, 6, 9])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_deficient_matrices_reach_the_manifold(rows: int, rank: int, dtype: torch.dtype) -> None:
    point = (gaussian(rows, rank) @ gaussian(rank, 6, seed=1)).to(dtype)
    retracted = stiefel.retract(point)
    assert stiefel.distance(retracted) < ON_MANIFOLD[dtype]
    assert abs(nuclear_gap(point, retracted)) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_reaches_the_manifold(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert stiefel.distance(stiefel.retract(torch.zeros(shape, dtype=dtype))).max() < ON_MANIFOLD[dtype]


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-5, 0.5, 2.0, 1e5, 1e30, 1e37])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_scale_does_not_matter(shape: tuple[int, int], scale: float) -> None:
    point = gaussian(*shape)
    assert (stiefel.retract(scale * point) - polar(point)).abs().max() < 1e-12
    # the float32 rounding of the point itself moves its factor by eps / sigma_min
    assert (stiefel.retract((scale * point).float()) - polar(point)).abs().max() < 1e-5


def test_float64_extremes() -> None:
    for scale in (1e-300, 1e300):
        assert (stiefel.retract(scale * gaussian(3, 5)) - polar(gaussian(3, 5))).abs().max() < 1e-12


def test_a_batch_of_all_kinds_is_retracted_one_by_one() -> None:
    near = polar(gaussian(3, 5))
    batch = torch.stack([near, near + 0.01, torch.zeros(3, 5).double(), 1e30 * near, 1e-30 * near, gaussian(3, 5)])
    together = stiefel.retract(batch)
    alone = torch.stack([stiefel.retract(point) for point in batch])
    assert (together - alone).abs().max() < 1e-13
    assert stiefel.distance(together).shape == (6,)
    assert stiefel.distance(together).max() < 1e-14
    assert torch.equal(batch[1], near + 0.01)  # the argument is left alone


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (2, 0, 3)])
def test_nothing_to_retract(shape: tuple[int, ...]) -> None:
    assert stiefel.retract(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused(bad: float) -> None:
    point = polar(gaussian(2, 3, 5))
    point[1, 0, 0] = bad
    for manifold in (stiefel, UnitRows(), Frobenius(), Interval(), Interval(1)):
        with pytest.raises(FloatingPointError, match="a value is NaN or infinite"):
            manifold.retract(point)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    exponent=st.integers(-30, 30),
    rank=st.integers(1, 7),
    double=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_finite_matrix_is_retracted(
    rows: int, columns: int, exponent: int, rank: int, double: bool, seed: int
) -> None:
    dtype = torch.float64 if double else torch.float32
    point = (gaussian(rows, rank, seed=seed) @ gaussian(rank, columns, seed=seed + 1) * 10.0**exponent).to(dtype)
    retracted = stiefel.retract(point)
    assert stiefel.distance(retracted) < ON_MANIFOLD[dtype]
    assert abs(nuclear_gap(point, retracted)) < 20 * torch.finfo(dtype).eps
    assert (stiefel.retract(retracted) - retracted).abs().max() < 8 * torch.finfo(dtype).eps


def test_distance_by_hand() -> None:
    point = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]])  # G - I = diag(3, -3/4)
    for lying in (point, point.mT):
        assert float(stiefel.distance(lying)) == pytest.approx(math.hypot(3, 0.75))


def test_sample_is_haar() -> None:
    # the law is invariant: E[q_ij] = 0, E[q_ij^2] = 1/n; without fixed signs the diagonal of Q would be biased
    points = stiefel.sample(4000, 3, 3, generator=torch.Generator().manual_seed(0))
    assert stiefel.distance(points).max() < ON_MANIFOLD[torch.float32]
    # standard errors: sqrt(1/3/4000) = .009 and sqrt(4/45/4000) = .005, times 4.5 for nine entries
    assert points.mean(dim=0).abs().max() < 0.04
    assert (points.square().mean(dim=0) - 1 / 3).abs().max() < 0.022
    determinants = torch.linalg.det(points)
    assert abs(determinants.mean()) < 4 / math.sqrt(4000)  # rotations and reflections alike
