"""GroupSort and FullSort against sorts of each group by itself, whatever their shape, their ties or their precision."""

import itertools
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.nn import Abs, FullSort, GroupSort, Householder, MaxMin, group_sort, maxmin
from otnn.nn.sorting import sorting_network


def slow(inputs: Tensor, size: int, dim: int) -> Tensor:
    """Each group by itself: the members j, j + m, j + 2 m, ... of m groups."""
    moved = inputs.movedim(dim, 0)
    output, groups = moved.clone(), len(moved) // size
    for j in range(groups):
        output[j::groups] = torch.sort(moved[j::groups], dim=0, descending=True).values
    return output.movedim(0, dim)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A vector of a few whole numbers, so that ties are frequent, and the size of its groups."""
    size, groups = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    numbers = st.integers(-3, 3) if draw(st.booleans()) else st.floats(-1e6, 1e6)
    values = draw(st.lists(numbers, min_size=size * groups, max_size=size * groups))
    return torch.tensor(values, dtype=torch.float64), size


every = settings(deadline=None, derandomize=True, max_examples=60)


@every
@given(rows())
def test_every_group_is_sorted(row: tuple[Tensor, int]) -> None:
    x, size = row
    result = group_sort(x, size, 0)
    assert torch.equal(result, slow(x, size, 0))
    assert torch.equal(group_sort(result, size, 0), result)
    assert torch.equal(FullSort(0)(x), x.sort(descending=True).values)


@every
@given(rows())
def test_the_jacobian_is_a_permutation_within_groups_also_at_ties(row: tuple[Tensor, int]) -> None:
    x, size = row
    jacobian = torch.func.jacrev(lambda x: group_sort(x, size, 0))(x)
    assert set(jacobian.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(jacobian.sum(0), torch.ones_like(x))
    assert torch.equal(jacobian.sum(1), torch.ones_like(x))
    assert torch.equal(jacobian @ x, group_sort(x, size, 0))
    i, j = jacobian.nonzero().unbind(1)
    assert bool(((i - j) % (len(x) // size) == 0).all())


@every
@given(rows(), st.randoms(use_true_random=False))
def test_it_ignores_the_order_within_groups_and_follows_that_of_the_groups(
    row: tuple[Tensor, int],
    random: Random,
) -> None:
    x, size = row
    groups = x.view(size, -1)
    result = group_sort(x, size, 0).view(size, -1)
    within = torch.stack([column[random.sample(range(size), size)] for column in groups.unbind(1)], dim=1)
    assert torch.equal(group_sort(within.flatten(), size, 0).view(size, -1), result)
    order = random.sample(range(groups.shape[1]), groups.shape[1])
    assert torch.equal(group_sort(groups[:, order].flatten(), size, 0).view(size, -1), result[:, order])


@every
@given(rows(), st.integers(0, 2**20))
def test_norms_are_kept_and_distances_do_not_grow(row: tuple[Tensor, int], seed: int) -> None:
    x, size = row
    x = x.requires_grad_()
    result = group_sort(x, size, 0)
    cotangent = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad(result, x, cotangent)
    assert torch.equal(gradient.sort().values, cotangent.sort().values)
    assert torch.equal(result.sort().values, x.sort().values)
    other = group_sort(x + cotangent, size, 0)
    assert (other - result).norm() <= cotangent.norm() * (1 + 1e-9) + 1e-9  # x + cotangent is rounded


@pytest.mark.parametrize("size", range(1, 12))
def test_the_network_sorts_all_zeros_and_ones_and_so_all_numbers(size: int) -> None:
    """Knuth's zero-one principle; up to 8 numbers with the fewest comparators that are possible."""
    network = sorting_network(size)
    for numbers in itertools.product([0, 1], repeat=size):
        found = list(numbers)
        for i, j in network:
            found[i], found[j] = max(found[i], found[j]), min(found[i], found[j])
        assert found == sorted(numbers, reverse=True)
    if size <= 8:
        assert len(network) == [0, 1, 3, 5, 9, 12, 16, 19][size - 1]


SHAPES = [((3, 8), 4, 1), ((8,), 4, 0), ((2, 6, 3, 5), 3, 1), ((2, 3, 4, 5), 5, -1), ((4, 3, 2), 4, -3), ((2, 0), 4, 1)]
SHAPES += [((2, 36, 3), 12, 1), ((3, 2, 20), 10, -1)]  # beyond the size for which comparators are used


@pytest.mark.parametrize(("shape", "size", "dim"), SHAPES)
def test_any_shape_and_dimension(shape: tuple[int, ...], size: int, dim: int) -> None:
    x = torch.randn(shape)
    assert torch.equal(GroupSort(size, dim)(x), slow(x, size, dim))
    assert torch.equal(FullSort(dim)(x), x.sort(dim=dim, descending=True).values)


def test_groups_of_two_are_maxmin() -> None:
    x = torch.randn(3, 10, 4)
    assert torch.equal(GroupSort(2)(x), maxmin(x))
    assert torch.equal(GroupSort(2, -1)(x), maxmin(x, -1))


@pytest.mark.parametrize("size", [3, 4, 9])
def test_gradients_of_both_orders_and_modes(size: int) -> None:
    x = torch.randn(2, 2 * size, 2, dtype=torch.float64, requires_grad=True)
    # composed with a curved function, so that the second order is not zero
    assert torch.autograd.gradcheck(lambda x: group_sort(x, size).pow(3), x)
    assert torch.autograd.gradgradcheck(lambda x: group_sort(x, size).pow(3), x)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: group_sort(x, size, 0).pow(3).sum()))(x[0, :, 0].detach())
    assert torch.allclose(hessian, torch.diag(6 * x[0, :, 0].detach()))  # the sum does not feel the permutation


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, in its forward mode
@pytest.mark.parametrize("size", [3, 4, 10])
def test_forward_mode(size: int) -> None:
    x = torch.randn(2 * size)
    forward, backward = (mode(lambda x: group_sort(x, size, 0))(x) for mode in (torch.func.jacfwd, torch.func.jacrev))
    assert torch.equal(forward, backward)


@pytest.mark.parametrize("dim", [0, -1])
def test_vmap_of_the_gradient(dim: int) -> None:
    x, weight = torch.randn(5, 4, 8), torch.randn(4, 8)

    def score(sample: Tensor) -> Tensor:
        return (weight * group_sort(sample, 4, dim).square()).sum()

    loop = torch.stack([torch.func.grad(score)(sample) for sample in x])
    assert torch.allclose(torch.func.vmap(torch.func.grad(score))(x), loop, rtol=1e-6)
    assert torch.allclose(torch.func.vmap(torch.func.grad(score), in_dims=1)(x.movedim(0, 1)), loop, rtol=1e-6)
    nested = torch.func.vmap(torch.func.vmap(torch.func.grad(score)))(x.view(5, 1, 4, 8))
    assert torch.allclose(nested[:, 0], loop, rtol=1e-6)


def test_channels_last_stays_channels_last() -> None:
    dense = torch.randn(2, 8, 4, 5)
    last = dense.contiguous(memory_format=torch.channels_last).requires_grad_()
    result = group_sort(last, 4)
    assert result.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(result, last, torch.randn_like(result))
    assert torch.equal(result, slow(dense, 4, 1))
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [4, 12])
def test_other_precisions_are_exact(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(6, 12).to(dtype).requires_grad_()
    result = group_sort(x, size)
    (gradient,) = torch.autograd.grad(result, x, torch.arange(1, 73).view(6, 12).to(dtype))
    assert torch.equal(result, slow(x.detach(), size, 1))
    assert sorted(gradient.flatten().tolist()) == list(range(1, 73))


@pytest.mark.parametrize("size", [3, 6, 12])
def test_infinities_are_sorted_and_nan_is_not_hidden(size: int) -> None:
    x = torch.randn(1, 12)
    x[0, [0, 4, 7]] = torch.tensor([torch.inf, -torch.inf, torch.inf])
    assert torch.equal(group_sort(x, size), slow(x, size, 1))
    x[0, 5] = torch.nan
    assert bool(group_sort(x, size).isnan().any())


MODULES: list[Callable[[], nn.Module]] = [MaxMin, lambda: GroupSort(4), lambda: GroupSort(12), FullSort, Abs]


@pytest.mark.parametrize("make", [*MODULES, lambda: Householder(12)])
def test_torch_exports_plain_operations(make: Callable[[], nn.Module]) -> None:
    layer = make()
    program = torch.export.export(layer, (torch.randn(2, 12),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(7, 12)
    assert torch.equal(program.module()(x), layer(x))
    called = [node for node in program.graph.nodes if node.op == "call_function"]
    assert all(str(node.target).startswith("aten.") or "getitem" in str(node.target) for node in called)


@pytest.mark.parametrize(("shape", "dim"), [((2, 6), 1), ((2, 5, 4, 4), 1), ((2, 4, 3), -1)])
def test_sizes_that_groups_do_not_divide_are_refused(shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(InputError) as caught:
        GroupSort(4, dim)(torch.zeros(shape))
    assert str(caught.value) == (
        f"GroupSort sorts groups of 4: expected a size along dimension {dim} that is a multiple of it, got {shape[dim]}"
    )


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_groups_of_less_than_two_are_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"group_size: expected at least 2 numbers to sort, got {size}"):
        GroupSort(size)


def test_representation_tells_the_size_of_the_groups() -> None:
    assert repr(GroupSort(4)) == "GroupSort(group_size=4)"


def test_one_channel_is_a_result_of_its_own() -> None:
    x = torch.rand(2, 1, 3)
    y = FullSort()(x)
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("layer", [MaxMin(), GroupSort(2), FullSort()])
def test_a_vector_is_no_batch(layer: nn.Module) -> None:
    with pytest.raises(InputError, match=r"along dimension 1 of a batch: got .*\(4,\); inputs.unsqueeze\(0\) makes"):
        layer(torch.rand(4))
