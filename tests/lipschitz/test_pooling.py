import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import pooling
from otnn.lipschitz.layers import EXACT, LayerBound, layer_bound
from tests.operators import layer_matrix, norm

Shape = tuple[int, ...]
# A bound and an SVD are each rounded, by a few units of 2^-53 relative to the norm
ROUNDING = 1 + 1e-12
TIGHT = 1.0001
SHAPES = {1: [(1, 7), (1, 8)], 2: [(1, 5, 6)]}


def rule(layer: nn.Module, shape: Shape) -> LayerBound:
    return layer_bound(layer, shape, tuple(layer(torch.zeros(2, *shape)).shape[1:]))


def assert_norm(layer: nn.Module, shape: Shape) -> None:
    found, true = rule(layer, shape).constant, norm(layer_matrix(layer, shape))
    assert true <= found * ROUNDING, f"{layer} on {shape}: {found} is below the norm {true}"
    assert found <= true * TIGHT, f"{layer} on {shape}: {found} is far above the norm {true}"


def assert_refused(layer: nn.Module, shape: Shape | None, output: Shape | None, text: str) -> None:
    with pytest.raises(InputError) as caught:
        layer_bound(layer, shape, output)
    assert str(caught.value) == text


def windows() -> Iterator[dict[str, int]]:
    for taps, stride in itertools.product(range(1, 5), range(1, 5)):
        for padding in range(taps // 2 + 1):
            yield {"kernel_size": taps, "stride": stride, "padding": padding}


# --- averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_average_pooling_of_signals_has_the_norm_of_its_matrix(ceil_mode: bool, count_include_pad: bool) -> None:
    for window, side in itertools.product(windows(), (4, 7, 8)):
        assert_norm(nn.AvgPool1d(**window, ceil_mode=ceil_mode, count_include_pad=count_include_pad), (1, side))


@pytest.mark.parametrize("divisor", [None, 5, -2])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_average_pooling_of_images_has_the_norm_of_its_matrix(
    ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> None:
    for taps, stride, padding in [(2, 2, 0), (3, 2, 1), ((3, 2), (1, 3), (1, 1)), ((1, 4), 2, (0, 2)), (3, None, 1)]:
        layer = nn.AvgPool2d(taps, stride, padding, ceil_mode, count_include_pad, divisor)  # type: ignore[arg-type]
        assert_norm(layer, (1, 6, 7))
        assert_norm(layer, (2, 5, 4))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(9, 20), st.booleans(), st.booleans(), st.data())
def test_average_pooling_of_any_window(
    taps: int, stride: int, side: int, ceil_mode: bool, include: bool, data: st.DataObject
) -> None:
    padding = data.draw(st.integers(0, taps // 2))
    assert_norm(nn.AvgPool1d(taps, stride, padding, ceil_mode, include), (1, side))


def test_average_pooling_without_the_shape_bounds_every_size() -> None:
    for window in windows():
        layer = nn.AvgPool1d(**window)
        anywhere = layer_bound(layer, None, None)
        assert anywhere.rounding is None
        sizes = [rule(layer, (1, side)).constant for side in (4, 5, 6, 7, 8, 120)]
        assert max(sizes) <= anywhere.constant <= 1.002 * sizes[-1]
        image = layer_bound(nn.AvgPool2d(**window), None, None).constant
        assert image == pytest.approx(anywhere.constant**2, rel=1e-12)
    summed = layer_bound(nn.AvgPool2d(3, 1, 1, ceil_mode=True, count_include_pad=False, divisor_override=3), None, None)
    assert summed.constant == pytest.approx(3)
    assert layer_bound(nn.AvgPool2d(2), None, None).constant == pytest.approx(0.5)
    assert layer_bound(nn.AvgPool2d(2, count_include_pad=False), None, None).constant == pytest.approx(0.5)
    assert layer_bound(nn.AvgPool1d(4), None, None).constant == pytest.approx(0.5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool1d(3, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool1d(1),
        nn.AdaptiveAvgPool2d((None, 2)),
        nn.AdaptiveMaxPool1d(2),
        nn.AdaptiveMaxPool2d(1),
        nn.Upsample(scale_factor=2),  # for how many dimensions?
        nn.Upsample(scale_factor=(2.0, 1.5)),
        nn.Upsample(scale_factor=(2.0, 0.5)),
        nn.Upsample(scale_factor=(2.0, -2.0)),
        nn.Upsample(scale_factor=(41.0,)),  # 41 (1 / 41) < 1 in float32
        nn.Upsample(size=8),
        nn.UpsamplingNearest2d(size=(4, 4)),
        nn.UpsamplingBilinear2d(scale_factor=2),
        nn.ReflectionPad1d(1),
        nn.ReplicationPad2d(1),
        nn.CircularPad2d(1),
    ],
    ids=str,
)
def test_bounds_that_depend_on_the_size_ask_for_the_shape(layer: nn.Module) -> None:
    name = type(layer).__name__
    assert_refused(
        layer, None, None, f"the bound of {name} depends on the input's size: expected input_shape, got none"
    )


def test_averages_on_long_signals() -> None:
    assert layer_bound(nn.AvgPool1d(4, 2, 1), (1, 10**6), (1, 500000)).constant == pytest.approx(math.sqrt(0.5))
    for layer, outputs in ((nn.AvgPool1d(4, 2, 1, count_include_pad=False), 10**6), (nn.AdaptiveAvgPool1d(5), 5)):
        assert_refused(
            layer,
            (1, 10**6),
            (1, 5),
            f"{type(layer).__name__} on a side of 1000000 pixels is too large to bound: expected at most 4194304 = "
            f"inputs x outputs along one dimension, got 1000000 x {outputs}; reduce the images before",
        )
    with pytest.raises(InputError, match="Upsample on a side of 3000 pixels is too large to bound"):
        layer_bound(nn.Upsample(size=5, mode="linear"), (1, 3000), (1, 5))


def test_adaptive_averages_have_the_norm_of_their_matrix() -> None:
    for side, outputs in itertools.product(range(1, 10), range(1, 10)):
        assert_norm(nn.AdaptiveAvgPool1d(outputs), (1, side))
    for size in (1, 3, (2, 5), (None, 2), (4, None)):
        assert_norm(nn.AdaptiveAvgPool2d(size), (1, 5, 6))  # type: ignore[arg-type]
    assert rule(nn.AdaptiveAvgPool2d(1), (3, 7, 7)).constant == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AvgPool1d(3, 1, 1), (2, 40)),
        (nn.AvgPool2d(5, 2, 2, count_include_pad=False), (2, 12, 13)),
        (nn.AvgPool2d(3, 2, divisor_override=7), (2, 12, 13)),
        (nn.AdaptiveAvgPool1d(7), (2, 40)),
        (nn.AdaptiveAvgPool2d((2, 1)), (2, 30, 31)),
    ],
    ids=str,
)
def test_the_rounding_of_averages_is_bounded(layer: nn.Module, shape: Shape) -> None:
    found = rule(layer, shape)
    assert found.rounding is not None
    slope, offset = found.rounding.local(torch.float32)
    images = torch.rand(64, *shape) + torch.tensor([0.0, 100.0]).repeat(32).view(-1, *[1] * len(shape))
    wide = images.double()
    error = (layer(images).double() - layer(wide)).flatten(1).norm(dim=1)
    assert float(error.max()) > 0
    assert bool((error <= slope * wide.flatten(1).norm(dim=1) + offset).all())
    outputs = math.prod(layer(images).shape[1:])
    assert (found.rounding.weight, found.rounding.outputs) == (found.constant, outputs)


def test_the_operations_of_averages_are_those_of_a_window() -> None:
    for layer, shape, window in [
        (nn.AvgPool1d(5), (1, 10), 5),
        (nn.AvgPool2d((2, 3)), (1, 6, 6), 6),
        (nn.AdaptiveAvgPool1d(3), (1, 7), 3),
        (nn.AdaptiveAvgPool2d((2, 3)), (1, 5, 7), 9),
    ]:
        rounding = rule(layer, shape).rounding
        assert rounding is not None
        assert rounding.operations == window + 2


# --- maxima and norms --------------------------------------------------------------------------------------------


def assert_attained(layer: nn.Module, shape: Shape, constant: float) -> None:
    """No pair exceeds the constant, and one that differs in a single pixel reaches it."""
    layer = layer.double()
    first, second = torch.randn(2, 200, *shape, dtype=torch.float64).unbind(0)
    moved = (layer(first) - layer(second)).flatten(1).norm(dim=1) / (first - second).flatten(1).norm(dim=1)
    assert float(moved.max()) <= constant * ROUNDING
    peaks = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    reached = (layer(4 * peaks) - layer(3 * peaks)).flatten(1).norm(dim=1).max()
    assert constant == pytest.approx(float(reached), rel=1e-12)


def maxima() -> Iterator[tuple[nn.Module, Shape]]:
    for window, dilation, ceil in itertools.product(windows(), (1, 2, 3), (False, True)):
        if dilation == 1 or window["padding"] == 0:
            yield nn.MaxPool1d(**window, dilation=dilation, ceil_mode=ceil), (1, 11)
    for taps, stride, padding in [(2, 2, 0), (3, 2, 1), ((3, 2), (1, 3), (1, 1)), ((1, 4), 2, (0, 2)), (3, None, 1)]:
        yield nn.MaxPool2d(taps, stride, padding), (2, 6, 5)  # type: ignore[arg-type]
    yield nn.MaxPool2d(3, 2, 1, dilation=(2, 1), ceil_mode=True), (1, 7, 8)


def test_max_pooling_is_bounded_by_the_windows_that_share_a_pixel() -> None:
    for layer, shape in maxima():
        found = rule(layer, shape)
        assert found.rounding is EXACT
        assert_attained(layer, shape, found.constant)
        assert found.constant <= layer_bound(layer, None, None).constant
    assert layer_bound(nn.MaxPool2d(2), None, None).constant == pytest.approx(1)
    assert layer_bound(nn.MaxPool2d(3, 2, 1), None, None).constant == pytest.approx(2)
    assert layer_bound(nn.MaxPool1d(3, 2, dilation=2), None, None).constant == pytest.approx(math.sqrt(3))
    # on a small image fewer windows share a pixel than anywhere
    assert rule(nn.MaxPool1d(3, 1), (1, 3)).constant == pytest.approx(1)
    assert layer_bound(nn.MaxPool1d(3, 1), None, None).constant == pytest.approx(math.sqrt(3))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.data())
def test_max_pooling_of_any_window(taps: int, stride: int, dilation: int, ceil: bool, data: st.DataObject) -> None:
    padding = data.draw(st.integers(0, taps // 2))
    side = data.draw(st.integers(dilation * (taps - 1) + 1, 40))
    layer = nn.MaxPool1d(taps, stride, padding, dilation, ceil_mode=ceil)
    assert_attained(layer, (1, side), rule(layer, (1, side)).constant)
    assert rule(layer, (1, side)).constant <= layer_bound(layer, None, None).constant


def test_max_pooling_without_the_shape_is_attained_on_a_large_image() -> None:
    for taps, stride, dilation in itertools.product(range(1, 6), range(1, 6), range(1, 4)):
        layer = nn.MaxPool1d(taps, stride, dilation=dilation)
        assert_attained(layer, (1, 60), layer_bound(layer, None, None).constant)


def test_adaptive_max_pooling_is_bounded_by_the_bins_that_share_a_pixel() -> None:
    for side, outputs in itertools.product(range(1, 9), range(1, 9)):
        layer = nn.AdaptiveMaxPool1d(outputs)
        assert rule(layer, (2, side)).rounding is EXACT
        assert_attained(layer, (2, side), rule(layer, (2, side)).constant)
    for size in (1, 3, (2, 4), (None, 2)):
        layer = nn.AdaptiveMaxPool2d(size)  # type: ignore[arg-type]
        assert_attained(layer, (1, 5, 6), rule(layer, (1, 5, 6)).constant)


def test_norm_pooling_is_bounded_by_the_windows_that_share_a_pixel() -> None:
    for taps, stride, side in itertools.product(range(1, 5), (None, 1, 2, 3), (5, 9)):
        layer = nn.LPPool1d(2, taps, stride)
        assert rule(layer, (1, side)).rounding is None
        assert_attained(layer, (1, side), rule(layer, (1, side)).constant)
        assert rule(layer, (1, side)).constant <= layer_bound(layer, None, None).constant
    for taps, stride in ((2, None), (3, 2), ((3, 2), (1, 2))):
        layer = nn.LPPool2d(2.0, taps, stride)  # type: ignore[arg-type]
        assert_attained(layer, (2, 5, 6), rule(layer, (2, 5, 6)).constant)


def test_norm_pooling_with_partial_windows_would_exceed_the_bound() -> None:
    # the reason of the refusal: a window of one pixel is scaled by the root of its size
    layer = nn.LPPool1d(2, 4, 4, ceil_mode=True).double()
    line = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 1.0]]], dtype=torch.float64)
    assert float(layer(2 * line).sum() - layer(line).sum()) == pytest.approx(2)
    assert_refused(layer, (1, 5), (1, 2), "LPPool1d scales partial windows up with ceil_mode=True; set ceil_mode=False")


@pytest.mark.parametrize("power", [1, 3, math.inf])
def test_other_powers_are_refused(power: float) -> None:
    text = f"LPPool2d has a known bound with norm_type=2 only, got {power}; set norm_type=2"
    assert_refused(nn.LPPool2d(power, 2), (1, 4, 4), (1, 2, 2), text)


@pytest.mark.parametrize("kind", [nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d])
def test_indices_are_refused(kind: type[nn.Module]) -> None:
    text = f"{kind.__name__} returns indices too; set return_indices=False"
    assert_refused(kind(2, return_indices=True), (1, 4, 4), (1, 2, 2), text)


# --- upsampling --------------------------------------------------------------------------------------------------


def resamplings(mode: str) -> Iterator[dict[str, object]]:
    aligned = (None,) if mode.startswith("nearest") else (False, True)
    for corners, recompute in itertools.product(aligned, (None, True)):
        for scale in (2.0, 3.0, 1.7, 0.6, 1.0):
            yield {
                "scale_factor": scale, "mode": mode, "align_corners": corners, "recompute_scale_factor": recompute
            }  # fmt: skip
    for corners, size in itertools.product(aligned, (1, 4, 5, 9)):
        yield {"size": size, "mode": mode, "align_corners": corners}


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear"])
def test_upsampling_of_signals_has_the_norm_of_its_matrix(mode: str) -> None:
    for setting, side in itertools.product(resamplings(mode), (2, 5, 6)):
        layer = nn.Upsample(**setting)  # type: ignore[arg-type]
        assert_norm(layer, (1, side))
        assert (rule(layer, (1, side)).rounding is EXACT) == (mode != "linear")


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
def test_upsampling_of_images_has_the_norm_of_its_matrix(mode: str) -> None:
    for setting in resamplings(mode):
        assert_norm(nn.Upsample(**setting), (1, 3, 5))  # type: ignore[arg-type]
    aligned = None if mode.startswith("nearest") else True
    assert_norm(nn.Upsample(scale_factor=(1.3, 2), mode=mode, align_corners=aligned), (2, 4, 3))
    assert_norm(nn.Upsample(size=(3, 7), mode=mode, align_corners=aligned), (2, 4, 3))


def test_upsampling_by_two_has_the_known_norms() -> None:
    assert rule(nn.UpsamplingNearest2d(scale_factor=2), (1, 8, 8)).constant == pytest.approx(2)
    assert rule(nn.Upsample(scale_factor=2, mode="bilinear"), (1, 8, 8)).constant == pytest.approx(2)
    assert rule(nn.UpsamplingBilinear2d(scale_factor=2), (1, 4, 4)).constant == pytest.approx(2.098, abs=1e-3)
    assert rule(nn.Upsample(scale_factor=2, mode="bicubic"), (1, 8, 8)).constant == pytest.approx(2.048, abs=1e-3)


def test_nearest_upsampling_by_whole_factors_needs_no_shape() -> None:
    for mode in ("nearest", "nearest-exact"):
        found = layer_bound(nn.Upsample(scale_factor=(3, 5), mode=mode), None, None)
        assert found.rounding is EXACT
        assert found.constant == pytest.approx(math.sqrt(15))
        for side in (1, 2, 9):
            assert rule(nn.Upsample(scale_factor=(3, 5), mode=mode), (1, side, side)).constant == found.constant
    exact = layer_bound(nn.Upsample(scale_factor=(41,), mode="nearest-exact"), None, None)
    assert exact.constant == pytest.approx(math.sqrt(41))


def test_nearest_pixels_that_differ_between_dtypes_have_no_known_rounding() -> None:
    # 41 times the float32 number nearest to 1 / 41 is below 1, so output 41 still shows pixel 0
    layer = nn.Upsample(scale_factor=41.0)
    images = torch.tensor([[[1.0, 0.0, 0.0]]])
    assert float(layer(images).sum()) == 42
    found = rule(layer, (1, 3))
    assert found.rounding is None
    assert found.constant == pytest.approx(math.sqrt(42))
    assert found.constant >= norm(layer_matrix(layer, (1, 3)))


@pytest.mark.parametrize("mode", ["area", "trilinear"])
def test_other_modes_of_upsampling_are_refused(mode: str) -> None:
    text = (
        f"Upsample has no known bound with mode='{mode}'; expected nearest, nearest-exact, linear, bilinear or bicubic"
    )
    assert_refused(nn.Upsample(scale_factor=2, mode=mode), (1, 4, 4), (1, 8, 8), text)


# --- padding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pads"),
    [
        (nn.ReflectionPad1d, [1, (3, 2), (0, 1), (-1, 2), (-2, -1)]),
        (nn.ReplicationPad1d, [1, (3, 2), (0, 9), (-4, 1), (-1, 0)]),
        (nn.CircularPad1d, [1, (3, 2), (5, 5), (5, 6), (-1, 2)]),
        (nn.ZeroPad1d, [1, (3, 2), (-1, 2), (-2, -1)]),
        (nn.ReflectionPad2d, [1, (3, 2, 0, 1), (2, 0, -1, 2)]),
        (nn.ReplicationPad2d, [1, (3, 2, 0, 1), (2, 0, -1, 7)]),
        (nn.CircularPad2d, [1, (3, 2, 0, 1), (4, 4, -1, 2)]),
        (nn.ZeroPad2d, [1, (3, 2, 0, 1), (2, 0, -1, 7)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_padding_has_the_norm_of_its_matrix(kind: type[nn.Module], pads: list[int | Shape]) -> None:
    for pad in pads:
        for shape in ((1, 6), (2, 7)) if kind.__name__.endswith("1d") else ((1, 6, 5), (2, 5, 7), (6, 5)):
            assert_norm(kind(pad), shape)
            assert rule(kind(pad), shape).rounding is EXACT


def test_constant_padding_rounds_its_value() -> None:
    layer = nn.ConstantPad2d(1, 0.1)
    assert layer_bound(layer, None, None).constant == 1
    assert layer_bound(layer, None, None).rounding is None
    rounding = rule(layer, (1, 3, 3)).rounding
    assert rounding is not None
    slope, offset = rounding.local(torch.float32)
    error = float((layer(torch.zeros(1, 1, 3, 3)).double() - layer(torch.zeros(1, 1, 3, 3).double())).norm())
    assert 0 < error <= offset < 20 * error
    assert slope < 1e-30
    assert layer_bound(nn.ConstantPad1d(1, 0.5), None, None) == LayerBound(1.0, EXACT)
    assert layer_bound(nn.ConstantPad1d(1, -math.inf), None, None) == LayerBound(1.0, EXACT)
    for value in (math.nan, 1e300):
        text = f"expected settings that float32 can hold, got {value}"
        assert_refused(nn.ConstantPad1d(1, value), None, None, text)


def test_padding_of_the_batch_is_refused() -> None:
    text = "ConstantPad2d mixes the samples of a batch of shape (4,); expected (channels, ..., pixels)"
    assert_refused(nn.ConstantPad2d((0, 0, 1, -1), 0.0), (4,), (4,), text)


def test_every_layer_of_pooling_keeps_samples_apart() -> None:
    # the rules read the last dimensions: of images without channels too
    images: Tensor = torch.randn(2, 6, 6)
    for layer in (nn.AvgPool2d(3, 2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.ReflectionPad2d(1)):
        together = layer(images)
        assert torch.equal(together[:1], layer(images[:1]))
        assert rule(layer, (6, 6)).constant == rule(layer, (1, 6, 6)).constant


def test_the_module_registers_its_rules() -> None:
    for kind in (nn.AvgPool2d, nn.MaxPool1d, nn.Upsample, *pooling._PADDINGS):
        assert kind in layer_bound.registry
