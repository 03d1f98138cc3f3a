import math
import statistics

import pytest
import torch
from torch import nn

from otnn.errors import InputError
from otnn.explain.hsic import _bandwidth, dependence, hsic
from otnn.explain.masking import uniform
from otnn.explain.scores import Scorer
from tests.explain import slow
from tests.explain.masks import budget_for, network, samples


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("shape", "cells"), [((2, 2, 7, 9), (3, 3)), ((2, 1, 4, 4), (4, 4)), ((2, 2, 11), (4,)), ((2, 5), (5,))]
)
def test_it_is_the_trace_of_the_kernels(shape: tuple[int, ...], cells: tuple[int, ...]) -> None:
    x = samples(*shape)
    model, target = network(x), torch.tensor([2, 0])
    maps = hsic(Scorer(model, x, target), x, samples=15, grid=cells[0], baseline=0.1, generator=seeded())
    space = shape[2:] or shape[1:]
    drawn = (uniform((15, torch.Size(cells).numel()), seeded(), x) < 0.5).double()
    for i in range(2):
        score = slow.score_of(model, int(target[i]))
        masks = [row if len(shape) == 2 else slow.nearest(row.view(cells), space) for row in drawn]
        scores = [score(slow.hidden(x[i], mask, 0.1)) for mask in masks]
        indices = torch.tensor(slow.hsic(scores, drawn), dtype=x.dtype).view(cells)
        expected = indices if len(shape) == 2 else slow.linear(indices, space)
        assert torch.allclose(maps[i].view(space), expected)


def test_one_cell_alone_has_the_closed_form() -> None:
    """f = m, half of N masks 1: distances are 0 or 1, the bandwidth is 1, HSIC = N^2 (1 - e^-1/2) / 4 / (N - 1)^2."""
    m = torch.tensor([0.0, 1.0] * 10, dtype=torch.float64)
    value = dependence(m.unsqueeze(0), m.unsqueeze(1))
    assert float(value) == pytest.approx(400 * (1 - math.exp(-0.5)) / 4 / 361)


def test_cells_that_do_not_matter_have_next_to_nothing() -> None:
    x = torch.ones(1, 1, 3, 3).double()
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double().eval()
    weight = torch.tensor([2.0, 0, -1, 0, 0, 0, 1, 0, 0])
    model[1].weight.data[0] = weight
    few, many = (hsic(Scorer(model, x, 0), x, samples=n, grid=3, generator=seeded()).flatten() for n in (200, 2000))
    assert (many >= 0).all()
    assert many[weight == 0].max() < 0.02 * many.max()
    assert many[weight == 0].mean() < 0.3 * few[weight == 0].mean()  # of order 1 / N
    assert many.argmax() == 0
    assert set(many.topk(3).indices.tolist()) == {0, 2, 6}


def test_the_bandwidth_is_the_median_distance_not_the_median_score() -> None:
    for count in (2, 3, 4, 7, 30):
        scores = 100 + samples(2, count)
        distances = (scores.unsqueeze(1) - scores.unsqueeze(2)).abs()
        for k in range(2):
            pairs = [abs(float(scores[k, i] - scores[k, j])) for i in range(count) for j in range(i)]
            assert float(_bandwidth(distances)[k]) == statistics.median_low(pairs)


def test_a_median_of_zero_does_not_divide_by_zero() -> None:
    """One mask in ten changes the score: most pairs are equal, and the mean distance takes over."""
    scores = torch.tensor([1.0] + [0.0] * 9, dtype=torch.float64)
    cells = torch.stack([scores, torch.tensor([0.0, 1] * 5, dtype=torch.float64)], dim=1)
    indices = dependence(scores.unsqueeze(0), cells)[0]
    assert indices.tolist() == pytest.approx(slow.hsic(scores.tolist(), cells))
    assert float(indices[0]) > float(indices[1]) > 0
    constant = dependence(torch.full((1, 10), 3.0, dtype=torch.float64), cells)
    assert float(constant.abs().max()) < 1e-30


def test_scale_and_shift_of_the_score_do_not_matter() -> None:
    x = samples(2, 1, 6, 6)
    model = network(x)
    maps = hsic(Scorer(model, x, 0), x, samples=50, grid=3, generator=seeded())
    model[3].weight.data *= 1e4
    model[3].bias.data = 1e4 * model[3].bias.data - 7
    assert torch.allclose(hsic(Scorer(model, x, 0), x, samples=50, grid=3, generator=seeded()), maps)


@pytest.mark.parametrize("copies", [1, 5, 1000])
def test_the_budget_does_not_change_the_map(copies: int) -> None:
    x = samples(3, 1, 7, 5)
    model = network(x)
    scorer = Scorer(model, x, 0)
    expected = hsic(scorer, x, samples=20, grid=3, generator=seeded())
    maps = hsic(scorer, x, samples=20, grid=3, generator=seeded(), memory_budget=budget_for(x, model, copies))
    assert torch.allclose(maps, expected, atol=1e-12)
    assert not torch.allclose(hsic(scorer, x, samples=20, grid=3, generator=seeded(1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_inputs(dtype: torch.dtype) -> None:
    x = samples(1, 1, 6, 6, dtype=dtype)
    model = network(x.float())
    maps = hsic(Scorer(model.to(dtype), x, 0), x, samples=50, grid=3, generator=seeded())
    assert maps.dtype == dtype
    exact = hsic(Scorer(model.double(), x.double(), 0), x.double(), samples=50, grid=3, generator=seeded())
    assert torch.allclose(maps.double(), exact, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"samples": 1}, "samples: expected an integer >= 2, got 1"),
        ({"grid": 9}, "grid: expected 1 to 5 cells a side"),
        ({"memory_budget": 10}, r"expected at least \d+ bytes"),
    ],
)
def test_bad_settings_say_what_was_expected(settings: dict[str, object], text: str) -> None:
    x = samples(1, 1, 7, 5)
    with pytest.raises(InputError, match=text):
        hsic(Scorer(network(x), x, 0), x, **{"grid": 3, **settings})  # type: ignore[arg-type]
