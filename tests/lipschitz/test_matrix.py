import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.lipschitz import matrix, matrix_bound
from otnn.lipschitz.matrix import eigenvalue_bound
from otnn.manifold import Stiefel
from tests.lipschitz.rational import is_eigenvalue_bound, is_norm_bound
from tests.operators import norm

# The SVD in float64 is itself off by p(n) 2^-53 relative to the norm, p(n) of some tens at these sizes. What must hold
# without any tolerance is proven in rational arithmetic, on small matrices
ROUNDING = 1 + 3e-14
TIGHT = 1.0001

Kind = Callable[[torch.Generator, int, int], Tensor]


def gaussian(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def orthogonal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    left, _, right = torch.linalg.svd(gaussian(generator, rows, columns), full_matrices=False)
    return left @ right


def near_orthogonal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """Both sides of the border between the two branches."""
    left, values, right = torch.linalg.svd(gaussian(generator, rows, columns), full_matrices=False)
    excess = 10 ** float(-15 + 14 * torch.rand((), generator=generator))
    return left * (1 + excess * (values - values.mean())) @ right


def rank_one(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return gaussian(generator, rows, 1) @ gaussian(generator, 1, columns)


def near_rank_one(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return rank_one(generator, rows, columns) + 1e-9 * gaussian(generator, rows, columns)


def mixed_rows(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return gaussian(generator, rows, columns) * 10 ** (10 * gaussian(generator, rows, 1)).clamp(-40, 30)


def mixed_entries(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return gaussian(generator, rows, columns) * 10 ** (8 * gaussian(generator, rows, columns)).clamp(-40, 30)


def constant(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.rand((), generator=generator, dtype=torch.float64).expand(rows, columns)


def integers(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randint(-3, 4, (rows, columns), generator=generator).double()


def scaled_by(scale: float) -> Kind:
    def make(generator: torch.Generator, rows: int, columns: int) -> Tensor:
        return gaussian(generator, rows, columns).clamp(-3, 3) * scale

    make.__name__ = f"scale_{scale}"
    return make


KINDS: list[Kind] = [
    gaussian,
    orthogonal,
    near_orthogonal,
    rank_one,
    near_rank_one,
    mixed_rows,
    mixed_entries,
    constant,
    integers,
]
# of float32: 1e38 is next to its largest number, 1e-40 and 1e-45 are denormal
KINDS += [scaled_by(scale) for scale in (1e38, 1e20, 1e-20, 1e-38, 1e-40, 1e-45)]
SHAPES = [(1, 1), (1, 6), (6, 1), (2, 2), (2, 5), (4, 3), (1, 90), (2, 90)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_below_the_norm_in_rational_arithmetic(kind: Kind, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for _ in range(5):
            weight = kind(generator, *shape).to(dtype)
            assert is_norm_bound(matrix_bound(weight), weight), weight


def test_control_the_rational_proof_refuses_the_number_below() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert is_norm_bound(4.0, weight)
    assert not is_norm_bound(math.nextafter(4.0, 0.0), weight)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (17, 33), (64, 64), (100, 10)])
def test_never_below_the_svd_and_tight(kind: Kind, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64):
        weight = kind(generator, *shape).to(dtype)
        true = norm(weight.double())
        assert true <= matrix_bound(weight) * ROUNDING
        assert matrix_bound(weight) <= true * TIGHT
        assert matrix_bound(weight.T) == pytest.approx(matrix_bound(weight), rel=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (10, 256), (256, 10), (1, 300), (512, 256)])
def test_orthogonal_float32_weights(shape: tuple[int, int]) -> None:
    weight = Stiefel().sample(*shape, generator=torch.Generator().manual_seed(2))
    assert norm(weight.double()) <= matrix_bound(weight) * ROUNDING
    assert matrix_bound(weight) <= 1 + 1e-6


@pytest.mark.parametrize("weight", [0.53, 0.58, 0.61, 0.67])
@pytest.mark.parametrize("rows", [1, 2])
def test_long_rows_sum_up_with_all_their_rounding(weight: float, rows: int) -> None:
    # equal squares may all be rounded down as they are summed: a Gram matrix taken for exact would be too small
    matrix = torch.zeros(rows, 200_000)
    matrix[0, : 200_000 // rows] = weight
    matrix[-1, -200_000 // rows :] = weight
    square = 200_000 // rows * Fraction(float(matrix[0, 0])) ** 2
    assert square <= Fraction(matrix_bound(matrix)) ** 2 <= square * (1 + Fraction(1, 10**6))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 1e-15, 1e-8])
def test_near_rank_deficiency_is_tight_to_ten_digits(rank: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        weight = gaussian(generator, 7, rank) @ gaussian(generator, rank, 5) + noise * gaussian(generator, 7, 5)
        assert norm(weight) <= matrix_bound(weight) * ROUNDING
        assert matrix_bound(weight) <= norm(weight) * (1 + 1e-10)


@pytest.mark.parametrize("scale", [5e-324, 1e-320, 1e-308, 1e-200, 1e200, 1e307])
def test_the_ends_of_float64(scale: float) -> None:
    weight = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64) * scale
    assert is_norm_bound(matrix_bound(weight), weight)
    if scale > 1e-300:
        assert matrix_bound(weight) == pytest.approx(5 * scale, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 3), (3, 0), (0, 0)])
def test_nothing_has_norm_0(shape: tuple[int, int]) -> None:
    assert matrix_bound(torch.zeros(shape)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_have_no_bound(bad: float) -> None:
    weight = torch.eye(3)
    weight[1, 2] = bad
    with pytest.raises(InputError) as caught:
        matrix_bound(weight)
    assert str(caught.value) == "the weight holds NaN or infinite values; train again with a lower learning rate"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_nothing_is_proven_of_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(InputError) as caught:
        matrix_bound(torch.eye(2).to(dtype))
    assert str(caught.value) == (
        f"the weight is {dtype}: bounds are proven of float32 and float64 weights; convert it with .float()"
    )


def test_views_and_weights_with_gradients() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    assert matrix_bound(weight[::2, 1::3]) == matrix_bound(weight.detach()[::2, 1::3].clone())


# --- eigenvalues -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", [-5.0, 0.0, 0.5, 1 - 1e-9, 1 - 1e-15])
def test_an_estimate_from_below_is_raised(estimate: float) -> None:
    # as power iteration gives it: a bound that trusted it would be wrong
    generator = torch.Generator().manual_seed(5)
    for size in (1, 2, 9):
        turn = orthogonal(generator, size, size)
        symmetric = turn * torch.linspace(-1, 1, size, dtype=torch.float64).abs() @ turn.T
        true = float(torch.linalg.eigvalsh(symmetric)[-1])
        found = eigenvalue_bound(symmetric, estimate * true, 1e-6)
        assert true <= found + 1e-15
        assert found <= true + max(1e-5, 2 * (1 - estimate) * true)


def test_a_factorisation_that_rounding_let_pass_proves_no_more_than_it_can() -> None:
    # the factorisation of a matrix that is indefinite by a few units of 2^-53 runs to its end
    generator = torch.Generator().manual_seed(8)
    for _ in range(100):
        factor = gaussian(generator, 6, 6)
        symmetric = (factor @ factor.T).tril()
        symmetric = symmetric + symmetric.tril(-1).T
        for units in range(-4, 5):
            estimate = float(torch.linalg.eigvalsh(symmetric)[-1]) * (1 + units * 2.0**-52)
            found = eigenvalue_bound(symmetric, estimate, 1e-16)
            assert is_eigenvalue_bound(found, symmetric)
            assert found <= estimate * (1 + 1e-13)


def test_the_largest_of_a_batch_and_only_lower_triangles_count() -> None:
    generator = torch.Generator().manual_seed(6)
    factors = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
    factors[2, 1] *= 7
    batch = factors @ factors.mT
    true = float(torch.linalg.eigvalsh(batch).max())
    spoiled = batch + torch.ones(5, 5, dtype=torch.float64).triu(1)
    for symmetric in (batch, spoiled):
        assert true <= eigenvalue_bound(symmetric, true / 2, 1e-3) <= 1.6 * true


@pytest.mark.parametrize("estimate", [0.0, 0.3, 0.999])
def test_a_bad_estimate_costs_time_and_not_truth(estimate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = matrix._estimate
    monkeypatch.setattr(matrix, "_estimate", lambda gram: (estimate * kept(gram)[0], 1e-12))
    generator = torch.Generator().manual_seed(7)
    for _ in range(10):
        weight = gaussian(generator, 5, 8)
        assert norm(weight) <= matrix_bound(weight) * ROUNDING
