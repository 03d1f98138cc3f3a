import pytest
import torch

from otnn.errors import InputError
from otnn.explain.rise import draw, rise, smooth_masks
from otnn.explain.scores import Scorer
from tests.explain import slow
from tests.explain.masks import budget_for, network, samples


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("shape", "cells"), [((2, 2, 7, 9), (3, 3)), ((2, 1, 6, 6), (3, 3)), ((2, 2, 11), (4,)), ((2, 5), (5,))]
)
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_it_is_the_formula_of_the_paper(shape: tuple[int, ...], cells: tuple[int, ...], keep: float) -> None:
    x = samples(*shape)
    model, target = network(x), torch.tensor([2, 0])
    maps = rise(Scorer(model, x, target), x, samples=20, grid=cells[0], keep=keep, baseline=0.1, generator=seeded())
    assert maps.shape == (2, *([1] if len(shape) > 2 else []), *shape[2:], *(shape[1:] if len(shape) == 2 else ()))
    drawn, offsets = draw(x, 20, cells, keep, seeded())
    space = shape[2:] or shape[1:]
    masks = [slow.rise_mask(c, o.tolist(), space) if len(shape) > 2 else c for c, o in zip(drawn, offsets, strict=True)]
    for i in range(2):
        expected = slow.rise(slow.score_of(model, int(target[i])), x[i], masks, keep, 0.1)
        assert torch.allclose(maps[i].view(space), expected)


def test_cells_are_kept_and_offsets_drawn_as_they_should() -> None:
    """One offset per mask: every pixel of a cell is as likely, and masks do not share it."""
    x = samples(1, 1, 10, 7)  # cells of 4 x 3 pixels
    cells, offsets = draw(x, 6000, (3, 3), 0.3, seeded())
    assert set(cells.unique().tolist()) == {0.0, 1.0}
    assert float(cells.mean()) == pytest.approx(0.3, abs=0.01)
    for axis, pixels in enumerate((4, 3)):
        counts = offsets[:, axis].bincount(minlength=pixels)
        assert len(counts) == pixels
        assert counts / 6000 == pytest.approx(torch.full((pixels,), 1 / pixels), abs=0.03)
    assert float(torch.corrcoef(offsets.double().T)[0, 1]) == pytest.approx(0, abs=0.05)


def test_every_pixel_is_kept_as_often_borders_too() -> None:
    x = samples(1, 1, 9, 9)
    masks = smooth_masks(*draw(x, 20_000, (4, 4), 0.5, seeded()), (9, 9))
    assert masks.mean(dim=0) == pytest.approx(torch.full((1, 9, 9), 0.5).double(), abs=0.02)
    assert float(masks.min()) >= 0
    assert float(masks.max()) <= 1


def test_on_rows_of_a_linear_score_it_converges_to_the_contributions() -> None:
    """E[f(x M) M_i] / p = (1 - p) w_i x_i + p sum_j w_j x_j + b for independent features."""
    x = samples(3, 6)
    model = torch.nn.Linear(6, 2).double().eval()
    p = 0.4
    maps = rise(Scorer(model, x, 1), x, samples=200_000, keep=p, generator=seeded())
    parts = (model.weight[1] * x).detach()
    limit = (1 - p) * parts + p * parts.sum(dim=1, keepdim=True) + model.bias[1].detach()
    assert torch.allclose(maps, limit, atol=0.01)


def test_a_score_of_one_cell_is_found_there_with_its_sign() -> None:
    x = torch.ones(2, 1, 12, 12)
    weight = torch.zeros(2, 144)
    weight[0].view(12, 12)[6:9, 3:6] = 1.0
    weight[1] = -weight[0]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 2, bias=False)).eval()
    model[1].weight.data = weight
    up, down = rise(Scorer(model, x, torch.tensor([0, 1])), x, samples=3000, grid=4, generator=seeded())
    assert divmod(int(up.argmax()), 12) == (7, 4)
    assert torch.allclose(up, -down, atol=1e-4)
    assert float(down.max()) < 0


@pytest.mark.parametrize("copies", [1, 3, 8, 1000])
def test_the_budget_does_not_change_the_map(copies: int) -> None:
    x = samples(3, 1, 7, 5)
    model = network(x)
    scorer = Scorer(model, x, 0)
    expected = rise(scorer, x, samples=20, grid=3, generator=seeded())
    maps = rise(scorer, x, samples=20, grid=3, generator=seeded(), memory_budget=budget_for(x, model, copies))
    assert torch.allclose(maps, expected, atol=1e-12)


def test_a_sample_has_the_same_map_alone_and_in_any_batch() -> None:
    x = samples(3, 1, 7, 5)
    model = network(x)
    whole = rise(Scorer(model, x, 0), x, samples=20, grid=3, generator=seeded())
    alone = rise(Scorer(model, x[1:2], 0), x[1:2], samples=20, grid=3, generator=seeded())
    assert torch.allclose(whole[1:2], alone)
    assert not torch.allclose(rise(Scorer(model, x, 0), x, samples=20, grid=3, generator=seeded(1)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_inputs(dtype: torch.dtype) -> None:
    x = samples(1, 1, 6, 6, dtype=dtype)
    model = network(x.float())
    maps = rise(Scorer(model.to(dtype), x, 0), x, samples=50, grid=3, generator=seeded())
    assert maps.dtype == dtype
    exact = rise(Scorer(model.double(), x.double(), 0), x.double(), samples=50, grid=3, generator=seeded())
    assert torch.allclose(maps.double(), exact, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
        ({"keep": 1.0}, r"keep: expected a probability in \(0, 1\), got 1.0"),
        ({"grid": 6}, "grid: expected 1 to 5 cells a side"),
        ({"memory_budget": 10}, r"expected at least \d+ bytes"),
        ({"baseline": torch.nan}, "baseline: expected finite values"),
    ],
)
def test_bad_settings_say_what_was_expected(settings: dict[str, object], text: str) -> None:
    x = samples(1, 1, 7, 5)
    with pytest.raises(InputError, match=text):
        rise(Scorer(network(x), x, 0), x, **{"grid": 3, **settings})  # type: ignore[arg-type]
