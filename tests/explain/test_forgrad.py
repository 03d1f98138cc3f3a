import math

import pytest
import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.explain.forgrad import disc, forgrad
from tests.explain import slow
from tests.explain.masks import samples


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (5, 8), (9, 4), (1, 6)])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 1.9, 2.5, 100.0])
def test_it_is_the_fourier_sum_of_the_kept_frequencies(size: tuple[int, int], sigma: float) -> None:
    maps = samples(2, 3, *size) - 0.5
    filtered = forgrad(maps, sigma=sigma)
    assert filtered.shape == (2, 1, *size)
    for k in range(2):
        assert torch.allclose(filtered[k, 0], slow.forgrad(maps[k], sigma), atol=1e-12)


def wave(cycles_down: int, cycles_across: int, height: int = 28, width: int = 28) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.cos(2 * math.pi * (cycles_down * y / height + cycles_across * x / width)).view(1, 1, height, width)


@pytest.mark.parametrize(("down", "across"), [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 1), (3, 3), (0, 14)])
def test_low_frequencies_stay_and_high_ones_go(down: int, across: int) -> None:
    """At 28 pixels sigma is 15 / 224 * 28 = 1.875 cycles: (1, 1) stays, (0, 2) goes."""
    filtered = forgrad(2 + wave(down, across))
    expected = 2 + wave(down, across) if math.hypot(down, across) <= 1.875 else torch.full((1, 1, 28, 28), 2.0).double()
    assert torch.allclose(filtered, expected, atol=1e-12)


def test_the_radius_grows_with_the_size_and_is_the_papers_at_224() -> None:
    for size, radius in ((224, 15), (448, 30), (28, 1), (64, 4)):
        assert torch.equal(disc((size, size), 15 / 224 * size)[0].nonzero().flatten(), torch.arange(radius + 1))
    row = disc((224, 224), 15.0)
    assert bool(row[9, 12])
    assert not bool(row[9, 13])


def test_the_disc_is_round_in_cycles_a_pixel_on_long_pictures() -> None:
    """48 x 24 with 4 cycles over the longer side: 4 of 48 down, 2 of 24 across."""
    kept = disc((48, 24), 4.0)
    assert kept[:, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 44, 45, 46, 47]
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert torch.allclose(forgrad(2 + wave(0, 2, 48, 24), sigma=4), 2 + wave(0, 2, 48, 24))
    assert torch.allclose(forgrad(2 + wave(0, 3, 48, 24), sigma=4), torch.full((1, 1, 48, 24), 2.0).double())


def test_signals_are_filtered_along_their_length() -> None:
    maps = samples(3, 2, 15)
    assert torch.allclose(forgrad(maps, sigma=3).unsqueeze(2), forgrad(maps.unsqueeze(2), sigma=3))


def test_channels_are_averaged_before_the_absolute_value() -> None:
    map_ = samples(1, 1, 6, 6)
    opposite = torch.cat([map_, -map_], dim=1)
    assert float(forgrad(opposite, sigma=9).abs().max()) == pytest.approx(0, abs=1e-15)
    assert torch.allclose(forgrad(-map_, sigma=9), map_)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-6), (torch.float64, 0)]
)
def test_the_dtype_is_that_of_the_maps(dtype: torch.dtype, tolerance: float) -> None:
    maps = samples(2, 3, 7, 5).to(dtype)
    filtered = forgrad(maps, sigma=2)
    assert filtered.dtype == dtype
    assert torch.allclose(filtered.double(), forgrad(maps.double(), sigma=2), atol=tolerance)


def test_no_gradient_is_kept() -> None:
    assert not forgrad(samples(1, 1, 4, 4).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("maps", "sigma", "text"),
    [
        (torch.ones(2, 5), None, r"order of the features of a row is arbitrary, so ForGrad does not apply"),
        (torch.ones(2, 1, 4, 4, 4), None, r"maps: expected \(n, channels, height, width\)"),
        (torch.ones(2, 1, 4, 4), -1.0, "sigma: expected a radius >= 0 in cycles over the longer side, got -1.0"),
        (torch.ones(2, 1, 4, 4), torch.nan, "sigma: expected a radius >= 0"),
        (torch.full((2, 1, 4, 4), torch.nan), None, "maps: sample 0 holds NaN"),
    ],
)
def test_bad_input_says_what_was_expected(maps: Tensor, sigma: float | None, text: str) -> None:
    with pytest.raises(InputError, match=text):
        forgrad(maps, sigma=sigma)
