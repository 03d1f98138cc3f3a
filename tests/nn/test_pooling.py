"""Closed forms of the pooling layers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.nn import AdaptiveL2NormPool2d, L2NormPool2d, ScaledAdaptiveAvgPool2d, ScaledAvgPool2d
from tests.operators import layer_matrix, norm

EXACT = 1e-12  # sums of a few float64 numbers of size 1


def slow(x: Tensor, rows: list[range], columns: list[range], p: int) -> Tensor:
    """Scaled averages (p = 1) or norms (p = 2) of windows, one by one."""
    result = x.new_zeros(*x.shape[:2], len(rows), len(columns))
    for (i, ys), (j, xs) in itertools.product(enumerate(rows), enumerate(columns)):
        window = x[:, :, ys.start : ys.stop, xs.start : xs.stop].flatten(2)
        pooled = window.mean(dim=2) * math.sqrt(window.shape[2]) if p == 1 else window.square().sum(dim=2).sqrt()
        result[:, :, i, j] = pooled
    return result


def whole(side: int, kernel: int) -> list[range]:
    return [range(i * kernel, (i + 1) * kernel) for i in range(side // kernel)]


def equal_parts(side: int, count: int) -> list[range]:
    return [range(i * side // count, (i + 1) * side // count) for i in range(count)]


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (2, 3), (5, 1)])
@pytest.mark.parametrize("size", [(5, 6), (7, 7)])
def test_windows_one_by_one(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    windows = [whole(side, k) for side, k in zip(size, kernel, strict=True)]
    assert (ScaledAvgPool2d(kernel)(x) - slow(x, *windows, 1)).abs().max() < EXACT
    assert (L2NormPool2d(kernel)(x) - slow(x, *windows, 2)).abs().max() < EXACT


@settings(deadline=None, derandomize=True, max_examples=50)
@given(sides=st.tuples(st.integers(1, 9), st.integers(1, 9)), data=st.data())
def test_equal_parts_one_by_one(sides: tuple[int, int], data: st.DataObject) -> None:
    counts = tuple(data.draw(st.integers(1, side)) for side in sides)
    x = torch.randn(2, 2, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(sides)))
    windows = [equal_parts(side, count) for side, count in zip(sides, counts, strict=True)]
    assert (ScaledAdaptiveAvgPool2d(counts)(x) - slow(x, *windows, 1)).abs().max() < EXACT
    assert (AdaptiveL2NormPool2d(counts)(x) - slow(x, *windows, 2)).abs().max() < EXACT
    # the parts cover every pixel: nothing of the norm is lost
    assert (AdaptiveL2NormPool2d(counts)(x).norm() - x.norm()).abs() < EXACT
    # the parts are disjoint: every singular value is 1, at sizes that divide and at others
    values = torch.linalg.svdvals(layer_matrix(ScaledAdaptiveAvgPool2d(counts), (1, *sides)))
    assert (values - 1).abs().max() < EXACT


def test_parts_are_those_of_torch_where_they_divide() -> None:
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x, (3, 2)) * math.sqrt(2 * 4)
    assert (ScaledAdaptiveAvgPool2d((3, 2))(x) - expected).abs().max() < EXACT
    assert (ScaledAdaptiveAvgPool2d((3, None))(x) - ScaledAvgPool2d((2, 1))(x)).abs().max() < EXACT
    assert torch.equal(ScaledAdaptiveAvgPool2d(None)(x), x)
    assert (L2NormPool2d(2)(x) - F.lp_pool2d(x, 2, 2)).abs().max() < EXACT
    # overlapping windows of torch have a larger norm than any window alone
    overlapping = nn.AdaptiveAvgPool2d(3)
    assert norm(layer_matrix(overlapping, (1, 4, 4))) > 1 / 2 + 0.1


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_every_singular_value_is_one_by_svd(size: tuple[int, int]) -> None:
    for kernel in [(2, 2), (2, 3), (4, 5)]:
        values = torch.linalg.svdvals(layer_matrix(ScaledAvgPool2d(kernel), (2, *size)))
        assert (values - 1).abs().max() < EXACT
        assert bound(ScaledAvgPool2d(kernel), (2, *size)).constant == 1


@pytest.mark.parametrize("layer", [L2NormPool2d((2, 3)), AdaptiveL2NormPool2d(2), AdaptiveL2NormPool2d(1)])
def test_l2_pooling_keeps_the_norm_of_every_gradient(layer: nn.Module) -> None:
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64).requires_grad_()
    output = layer(x)
    assert (output.flatten(1).norm(dim=1) - x.flatten(1).norm(dim=1)).abs().max() < EXACT
    (gradient,) = torch.autograd.grad(output, x, way := torch.randn_like(output))
    assert (gradient.flatten(1).norm(dim=1) - way.flatten(1).norm(dim=1)).abs().max() < EXACT
    jacobian = torch.autograd.functional.jacobian(layer, x[:1].detach()).reshape(output[0].numel(), -1)
    assert (jacobian @ jacobian.T - torch.eye(len(jacobian), dtype=torch.float64)).abs().max() < EXACT


@pytest.mark.parametrize("layer", [L2NormPool2d(2), AdaptiveL2NormPool2d(2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_derivatives_are_zero_in_a_window_of_zeros(layer: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 4, 4, dtype=dtype)
    x[:, :, :2, :2] = 0
    x.requires_grad_()
    output = layer(x)
    assert output[0, 0, 0, 0] == 0
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum() + gradient.sum(), x)
    assert bool((gradient[:, :, :2, :2] == 0).all())
    assert bool((second[:, :, :2, :2] == 0).all())
    assert bool(torch.isfinite(second).all())


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1e20, 1e37])
def test_squares_neither_vanish_nor_overflow(scale: float) -> None:
    x = torch.tensor([[[[3.0, -4.0]]]]) * scale
    x.requires_grad_()
    output = L2NormPool2d((1, 2))(x)
    assert output.item() == pytest.approx(float(x.detach().double().norm()), rel=1e-6)
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    assert gradient.norm().item() == pytest.approx(1, rel=1e-6)
    if scale > 1e-30:  # below, the true curvature is beyond float32
        (second,) = torch.autograd.grad(gradient[0, 0, 0, 0], x)
        expected = torch.tensor([16.0, 12.0]) / 125 / scale  # (I - u u^T) / norm
        assert torch.allclose(second.flatten() / second.norm(), expected / expected.norm(), atol=1e-5)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_shuffles_are_isometries_and_inverse_to_each_other(r: int) -> None:
    unshuffle, shuffle = nn.PixelUnshuffle(r), nn.PixelShuffle(r)
    shape = (2, 2 * r, 3 * r)
    matrix = layer_matrix(unshuffle, shape)
    assert torch.equal(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64))
    assert torch.equal(layer_matrix(shuffle, (2 * r * r, 2, 3)), matrix.T)
    assert bound(unshuffle, shape).constant == bound(shuffle, (2 * r * r, 2, 3)).constant == 1


REFUSED = [
    (lambda: ScaledAvgPool2d(0), "kernel_size: expected one or two numbers >= 1, got 0"),
    (lambda: L2NormPool2d((2, 2, 2)), "kernel_size: expected one or two numbers >= 1, got (2, 2, 2)"),
    (lambda: ScaledAvgPool2d(3, stride=2), "stride: expected the kernel size (3, 3), got 2: windows that overlap"),
    (lambda: L2NormPool2d(2, 3), "stride: expected the kernel size (2, 2), got 3: windows that overlap or skip"),
    (lambda: ScaledAvgPool2d(2, 2, 1), "padding: expected 0, got 1; pad by torch.nn.ZeroPad2d before"),
    (lambda: AdaptiveL2NormPool2d(0), "output_size: expected one or two numbers >= 1, or None to keep, got 0"),
    (lambda: ScaledAvgPool2d(3)(torch.zeros(1, 1, 2, 5)), "expected (batch, channels, height, width) images of at"),
    (lambda: ScaledAvgPool2d(3)(torch.zeros(1, 5, 5)), "expected (batch, channels, height, width) images of at"),
    (lambda: L2NormPool2d(3)(torch.zeros(1, 1, 5, 2)), "expected (batch, channels, height, width) images of at least"),
    (
        lambda: ScaledAdaptiveAvgPool2d(4)(torch.zeros(1, 1, 3, 5)),
        "expected (batch, channels, height, width) images of at least 4x4 pixels, got (1, 1, 3, 5)",
    ),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_what_is_not_orthogonal_is_refused(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).startswith(words)
    assert ScaledAvgPool2d(2, stride=2).kernel_size == ScaledAvgPool2d((2, 2), (2, 2), 0).kernel_size


def test_windows_that_overlap_would_exceed_one() -> None:
    """What the refusal is for: scaled by the root of its size, an overlapping window amplifies."""
    overlapping = nn.AvgPool2d(2, stride=1)
    assert 2 * norm(layer_matrix(overlapping, (1, 6, 6))) > 1.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("side", "value"), [(16, 1000.0), (256, 0.01), (256, 1.0)])
def test_windows_are_summed_in_float32(side: int, value: float, dtype: torch.dtype) -> None:
    image = torch.full((1, 1, side, side), value, dtype=dtype)
    expected = side * float(image[0, 0, 0, 0])  # n pixels of v have the norm, and n / sqrt(n) times the mean, v sqrt(n)
    for layer in (ScaledAdaptiveAvgPool2d(1), AdaptiveL2NormPool2d(1)):
        assert layer(image).dtype == dtype
        assert float(layer(image)) == pytest.approx(expected, rel=torch.finfo(dtype).eps)
