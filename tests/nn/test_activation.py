import pytest
import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.nn import MaxMin, maxmin


def slow(inputs: Tensor, dim: int) -> Tensor:
    first, second = inputs.movedim(dim, 0).chunk(2)
    return torch.cat(
        [torch.where(first >= second, first, second), torch.where(first >= second, second, first)]
    ).movedim(0, dim)


SHAPES = [((3, 4), 1), ((3, 4), -1), ((4,), 0), ((2, 6, 3, 5), 1), ((2, 3, 4, 2), -2), ((2, 3, 4), 0), ((2, 0), 1)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("gradient", [False, True])
def test_values_equal_the_slow_form(shape: tuple[int, ...], dim: int, gradient: bool) -> None:
    x = torch.randn(shape).requires_grad_(gradient)
    result = maxmin(x, dim)
    assert torch.equal(result, slow(x, dim))
    assert torch.equal(MaxMin(dim)(x), result)
    assert result.requires_grad == gradient


def test_values_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 7.0, 3.0, -5.0, 7.0]])
    assert maxmin(x).tolist() == [[3.0, -2.0, 7.0, 1.0, -5.0, 7.0]]


def test_a_tie_keeps_its_order_and_its_gradient() -> None:
    x = torch.tensor([[2.0, 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(maxmin(x), x, torch.tensor([[1.0, 10.0]]))
    assert gradient.tolist() == [[1.0, 10.0]]


def test_infinities_are_sorted_and_nan_is_not_hidden() -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0, 2.0, 3.0]])
    result = maxmin(x)[0]
    assert result[[0, 1, 3, 4]].tolist() == [torch.inf, 2.0, 1.0, -torch.inf]
    assert bool(result[[2, 5]].isnan().all())


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 1), ((2, 4, 3, 2), 1), ((2, 3, 4), -1)])
def test_gradients_of_both_orders(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: maxmin(x, dim), x)
    assert torch.autograd.gradgradcheck(lambda x: maxmin(x, dim), x)
    # composed with a curved function, so that the second order is not zero
    assert torch.autograd.gradgradcheck(lambda x: maxmin(x, dim).pow(3), x)


def test_gradient_equals_that_of_the_slow_form() -> None:
    x = torch.randn(5, 8, 3, requires_grad=True)
    cotangent = torch.randn(5, 8, 3)
    (fast,) = torch.autograd.grad(maxmin(x), x, cotangent)
    (expected,) = torch.autograd.grad(slow(x, 1), x, cotangent)
    assert torch.equal(fast, expected)


def test_norms_are_kept() -> None:
    x = torch.randn(100, 10, dtype=torch.float64, requires_grad=True)
    result = maxmin(x)
    cotangent = torch.randn_like(result)
    (gradient,) = torch.autograd.grad(result, x, cotangent)
    assert torch.allclose(gradient.norm(dim=1), cotangent.norm(dim=1), rtol=1e-14)
    assert torch.allclose(result.norm(dim=1), x.norm(dim=1), rtol=1e-14)


def test_the_jacobian_is_a_permutation() -> None:
    jacobian = torch.func.jacrev(lambda x: maxmin(x, 0))(torch.randn(12))
    assert torch.equal(jacobian.abs().sum(0), torch.ones(12))
    assert torch.equal(jacobian @ jacobian.T, torch.eye(12))
    assert set(jacobian.unique().tolist()) == {0.0, 1.0}


def test_twice_is_once() -> None:
    x = torch.randn(7, 6)
    assert torch.equal(maxmin(maxmin(x)), maxmin(x))


def test_channels_last_stays_channels_last() -> None:
    dense = torch.randn(2, 6, 4, 5)
    last = dense.contiguous(memory_format=torch.channels_last).requires_grad_()
    result = maxmin(last)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, maxmin(dense))
    cotangent = torch.randn(2, 6, 4, 5)
    (gradient,) = torch.autograd.grad(result, last, cotangent)
    dense.requires_grad_()
    (expected,) = torch.autograd.grad(maxmin(dense), dense, cotangent)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_of_the_gradient(dim: int) -> None:
    x, weight = torch.randn(5, 4, 6), torch.randn(4, 6)

    def score(sample: Tensor) -> Tensor:
        return (weight * maxmin(sample, dim).square()).sum()

    each = torch.func.vmap(torch.func.grad(score))(x)
    loop = torch.stack([torch.func.grad(score)(sample) for sample in x])
    assert torch.allclose(each, loop, rtol=1e-6)
    # batched along another dimension, and nested
    moved = torch.func.vmap(torch.func.grad(score), in_dims=1)(x.movedim(0, 1))
    assert torch.equal(moved, each)
    nested = torch.func.vmap(torch.func.vmap(torch.func.grad(score)))(x.view(5, 1, 4, 6))
    assert torch.equal(nested[:, 0], each)


def test_jacrev_of_jacrev() -> None:
    x = torch.randn(4, dtype=torch.float64)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: maxmin(x, 0).pow(3).sum()))(x)
    assert torch.allclose(hessian, torch.diag(6 * x))  # the sum does not feel the permutation


def test_vmap_without_gradient() -> None:
    x = torch.randn(5, 4)
    assert torch.equal(torch.func.vmap(lambda row: maxmin(row, 0))(x), maxmin(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, in its forward mode
def test_forward_mode() -> None:
    x = torch.randn(4)
    jacobian = torch.func.jacfwd(lambda x: maxmin(x, 0))(x)
    assert torch.equal(jacobian, torch.func.jacrev(lambda x: maxmin(x, 0))(x))


@pytest.mark.parametrize(("shape", "dim"), [((2, 3), 1), ((2, 5, 4, 4), 1), ((2, 4, 3), -1)])
def test_odd_sizes_are_refused(shape: tuple[int, ...], dim: int) -> None:
    expected = f"expected an even size along dimension {dim}, got {shape[dim]}"
    with pytest.raises(InputError, match=expected):
        maxmin(torch.zeros(shape), dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_exact(dtype: torch.dtype) -> None:
    x = torch.randn(6, 4).to(dtype).requires_grad_()
    result = maxmin(x)
    (gradient,) = torch.autograd.grad(result, x, torch.arange(1, 25).view(6, 4).to(dtype))
    assert torch.equal(result, slow(x, 1))
    assert sorted(gradient.flatten().tolist()) == list(range(1, 25))
