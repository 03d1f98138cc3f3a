import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otnn.metrics import entropy, gini, jpeg_bytes
from tests.metrics import slow
from tests.metrics.networks import images


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([1, 3]))
def test_complexity_equals_the_slow_one(seed: int, channels: int) -> None:
    maps = images(3, channels, 6, 7, seed=seed) - 0.5
    for metric in (jpeg_bytes, entropy, gini):
        expected = [getattr(slow, metric.__name__)(one) for one in maps]
        assert metric(maps).per_sample.tolist() == pytest.approx(expected), metric.__name__


@pytest.mark.parametrize("pixels", [2, 9, 100])
def test_closed_forms(pixels: int) -> None:
    spike = torch.zeros(1, pixels)
    spike[0, 0] = -3
    assert gini(spike).mean == pytest.approx(1 - 1 / pixels)
    assert entropy(spike).mean == 0
    flat = torch.full((1, pixels), 0.7)
    assert gini(flat).mean == pytest.approx(0, abs=1e-7)
    assert entropy(flat).mean == pytest.approx(math.log(pixels))
    ramp = torch.arange(1.0, pixels + 1).unsqueeze(0)
    assert gini(ramp).mean == pytest.approx((pixels - 1) / (3 * pixels))


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(1e-30, 1e30))
def test_the_scale_of_a_map_does_not_count(seed: int, scale: float) -> None:
    maps = images(2, 2, 5, 5, seed=seed)
    for metric in (jpeg_bytes, entropy, gini):
        assert torch.allclose(metric(maps).per_sample, metric(scale * maps).per_sample)


def test_noise_is_more_complex_than_a_shape() -> None:
    noise, shape = images(2, 1, 28, 28), torch.zeros(2, 1, 28, 28)
    shape[..., 8:20, 8:20] = 1
    assert jpeg_bytes(noise).mean > 1.5 * jpeg_bytes(shape).mean
    assert entropy(noise).mean > entropy(shape).mean
    assert gini(noise).mean < gini(shape).mean
    assert (jpeg_bytes(noise).arrow, gini(noise).arrow) == ("↓", "↑")


def test_constant_and_broken_maps_are_counted() -> None:
    maps = images(4, 1, 8, 8)
    maps[0], maps[1], maps[2, 0, 0, 0] = 0, 0.3, torch.nan
    sizes = jpeg_bytes(maps)
    assert sizes.undefined == 3
    assert sizes.per_sample.isnan().tolist() == [False, False, True, False]
    assert sizes.per_sample[0] == sizes.per_sample[1] < sizes.per_sample[3]
    for metric in (entropy, gini):
        result = metric(maps)
        assert result.per_sample.isnan().tolist() == [True, False, True, False]
        assert result.undefined == 2
        assert result.mean == pytest.approx(float(result.per_sample[[1, 3]].mean()))
        assert not result.signed
        assert result.forwards == 0
