import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.explain.scores import Scorer
from otnn.explain.sobol import designs, jansen, sobol, swapped
from tests.explain import slow
from tests.explain.masks import budget_for, network, samples


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("shape", "cells"), [((2, 2, 7, 9), (3, 3)), ((2, 1, 4, 4), (4, 4)), ((2, 2, 11), (4,)), ((2, 5), (5,))]
)
def test_it_is_jansens_estimator(shape: tuple[int, ...], cells: tuple[int, ...]) -> None:
    x = samples(*shape)
    model, target = network(x), torch.tensor([2, 0])
    maps = sobol(Scorer(model, x, target), x, samples=8, grid=cells[0], baseline=0.1, generator=seeded())
    space = shape[2:] or shape[1:]
    own, other = designs(x, 8, torch.Size(cells).numel(), seeded())
    for i in range(2):
        score = slow.score_of(model, int(target[i]))

        def at_cells(row: Tensor, sample: Tensor = x[i], score: slow.Score = score) -> float:
            mask = row if len(shape) == 2 else slow.nearest(row.view(cells), space)
            return score(slow.hidden(sample, mask, 0.1))

        indices = torch.tensor(slow.sobol(at_cells, own, other), dtype=x.dtype).view(cells)
        expected = indices if len(shape) == 2 else slow.linear(indices, space)
        assert torch.allclose(maps[i].view(space), expected)


def test_the_forwards_are_samples_times_cells_plus_two() -> None:
    x = samples(1, 1, 8, 8)
    model = network(x)
    forwards = 0

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal forwards
        forwards += len(output)

    scorer = Scorer(model, x, 0)
    sobol(scorer, x, samples=2, grid=2)  # the memory of the model is known from here on
    model.register_forward_hook(count)
    sobol(scorer, x)
    assert forwards == 32 * (8**2 + 2) == 2112


def test_total_indices_of_an_additive_score_are_its_shares_of_variance() -> None:
    """f = sum_i w_i x_i m_i with independent uniform m_i: S_i = (w_i x_i)^2 / sum_j (w_j x_j)^2."""
    x = samples(2, 1, 3, 3) + 0.5
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double().eval()
    maps = sobol(Scorer(model, x, 1), x, samples=2048, grid=3, generator=seeded())
    parts = (model[1].weight[1] * x.flatten(1)).detach().square()
    assert torch.allclose(maps.flatten(1), parts / parts.sum(dim=1, keepdim=True), atol=0.01)
    assert maps.flatten(1).sum(dim=1) == pytest.approx(torch.ones(2).double(), abs=0.02)


def test_an_interaction_counts_in_both_cells() -> None:
    """f = m_1 m_2 of uniform m: V = 7/144, and each total index is (V - E-part of the other) / V = 4/7."""

    class Product(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2]], dim=1)

    x = torch.ones(1, 3).double()
    maps = sobol(Scorer(Product().eval(), x, 0), x, samples=4096, generator=seeded())
    assert maps[0] == pytest.approx(torch.tensor([4 / 7, 4 / 7, 0]).double(), abs=0.01)


def test_a_score_that_no_mask_changes_has_the_map_zero() -> None:
    x = samples(2, 1, 4, 4)
    model = network(x)
    assert bool((sobol(Scorer(model, x, 0), x, samples=8, grid=2, baseline=x) == 0).all())
    # as it has where only rounding varies
    scores = 1 + 1e-16 * torch.rand(1, 8, dtype=torch.float64)
    assert float(jansen(scores, scores, scores.unsqueeze(1)).abs().max()) == 0


def test_designs_fill_the_cube_and_exchange_one_cell() -> None:
    x = samples(1, 4)
    own, other = designs(x, 64, 4, seeded())
    assert not torch.equal(own, other)
    both = torch.cat([own, other], dim=1)
    for column in (64 * both).floor().long().T:  # a Sobol sequence has one point in each 64th
        assert sorted(column.tolist()) == list(range(64))
    crossed = swapped(own, other, torch.tensor([2])).view(64, 4)
    assert torch.equal(crossed[:, 2], other[:, 2])
    assert torch.equal(crossed[:, [0, 1, 3]], own[:, [0, 1, 3]])


def test_many_features_pass_in_parts() -> None:
    x = samples(1, 70)
    model = network(x)
    own, other = designs(x, 2, 70, seeded())
    expected = slow.sobol(lambda row: slow.score_of(model, 0)(x[0] * row), own, other)
    maps = sobol(Scorer(model, x, 0), x, samples=2, generator=seeded())
    assert torch.allclose(maps[0], torch.tensor(expected).double())


@pytest.mark.parametrize("copies", [1, 5, 1000])
def test_the_budget_does_not_change_the_map(copies: int) -> None:
    x = samples(3, 1, 7, 5)
    model = network(x)
    scorer = Scorer(model, x, 0)
    expected = sobol(scorer, x, samples=4, grid=3, generator=seeded())
    maps = sobol(scorer, x, samples=4, grid=3, generator=seeded(), memory_budget=budget_for(x, model, copies))
    assert torch.allclose(maps, expected, atol=1e-9)
    assert not torch.allclose(sobol(scorer, x, samples=4, grid=3, generator=seeded(1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_inputs(dtype: torch.dtype) -> None:
    x = samples(1, 1, 6, 6, dtype=dtype)
    model = network(x.float())
    maps = sobol(Scorer(model.to(dtype), x, 0), x, samples=16, grid=3, generator=seeded())
    assert maps.dtype == dtype
    exact = sobol(Scorer(model.double(), x.double(), 0), x.double(), samples=16, grid=3, generator=seeded())
    assert torch.allclose(maps.double(), exact, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"samples": 1}, "samples: expected an integer >= 2, got 1"),
        ({"grid": 0}, "grid: expected 1 to 5 cells a side"),
        ({"memory_budget": 10}, r"expected at least \d+ bytes"),
    ],
)
def test_bad_settings_say_what_was_expected(settings: dict[str, object], text: str) -> None:
    x = samples(1, 1, 7, 5)
    with pytest.raises(InputError, match=text):
        sobol(Scorer(network(x), x, 0), x, **{"grid": 3, **settings})  # type: ignore[arg-type]


def test_more_cells_than_the_sequence_has_dimensions_are_refused() -> None:
    with pytest.raises(InputError, match="expected at most 10600 cells, which the Sobol sequence covers, got 20000"):
        designs(samples(1, 2), 2, 20_000, None)
