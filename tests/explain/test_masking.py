import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from otnn.errors import InputError
from otnn.explain.masking import cell_grid, cell_map, cell_scores, masked_scores, upsample
from otnn.explain.scores import Scorer
from otnn.memory import chunk_size
from otnn.models import build
from tests.explain import slow
from tests.explain.masks import budget_for, network, samples


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (3, 2, 9), (3, 6)])
@pytest.mark.parametrize("bank", ["shared", "one per sample"])
@pytest.mark.parametrize("baseline", [0.0, 0.3, "sample", "per sample", "per copy"])
def test_scores_are_those_of_one_masked_sample_at_a_time(shape: tuple[int, ...], bank: str, baseline: object) -> None:
    x = samples(*shape)
    model = network(x)
    target = torch.tensor([0, 2, 1])
    masks = samples(*([3] if bank != "shared" else []), 5, *shape[1:]).round(decimals=1)
    fillings = {"sample": shape[1:], "per sample": shape, "per copy": (3, 5, *shape[1:])}
    filling = samples(*fillings[baseline]) if isinstance(baseline, str) else baseline
    scores = masked_scores(Scorer(model, x, target), x, masks, filling)  # type: ignore[arg-type]
    full = torch.as_tensor(filling, dtype=x.dtype)
    full = full.unsqueeze(1) if baseline == "per sample" else full
    full = full.expand(3, 5, *shape[1:])
    for i in range(3):
        for j in range(5):
            mask = masks[j] if bank == "shared" else masks[i, j]
            copy = x[i] * mask + full[i, j] * (1 - mask)
            assert float(scores[i, j]) == pytest.approx(slow.score_of(model, int(target[i]))(copy), abs=1e-12)


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 5, 7, 14, 15, 1000])
def test_the_budget_does_not_change_the_scores(copies: int) -> None:
    x = samples(4, 2, 6, 6)
    model = network(x)
    masks = samples(5, 1, 6, 6)
    scorer = Scorer(model, x, torch.tensor([0, 1, 2, 0]), "margin")
    budget = budget_for(x, model, copies)
    assert chunk_size(x[:1], budget, model) == copies
    longest = 0

    def watch(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal longest
        longest = max(longest, len(output))

    expected = masked_scores(scorer, x, masks)
    handle = model.register_forward_hook(watch)
    scores = masked_scores(scorer, x, masks, memory_budget=budget)
    handle.remove()
    assert torch.allclose(scores, expected, atol=1e-12)
    assert longest == max(part for part in (1, 2, 3, 5, 10, 15, 20) if part <= copies)


def test_masks_of_whole_pixels_and_of_channels_are_broadcast() -> None:
    x = samples(2, 3, 4, 5)
    scorer = Scorer(network(x), x, 1)
    masks = samples(6, 1, 4, 5)
    assert torch.equal(masked_scores(scorer, x, masks), masked_scores(scorer, x, masks.expand(6, 3, 4, 5)))
    ones = torch.ones(1, 1, 1, 1)
    with torch.no_grad():
        assert torch.allclose(masked_scores(scorer, x, ones).squeeze(1), scorer(x))
        assert torch.allclose(masked_scores(scorer, x, 0 * ones, x.flip(0)).squeeze(1), scorer(x.flip(0)))


def test_kept_and_hidden_values_are_exact() -> None:
    """A mask of 0 and 1 leaves no rounding: neither of the sample nor of the baseline."""
    x = samples(1, 50, dtype=torch.float32)

    class Pass(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs

    masks = torch.cat([torch.eye(50), 1 - torch.eye(50)])
    for k in range(50):
        scores = masked_scores(Scorer(Pass().eval(), x, k), x, masks, 0.1)
        expected = torch.where(masks[:, k] == 1, x[0, k], torch.tensor(0.1))
        assert torch.equal(scores[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_left_behind(dtype: torch.dtype) -> None:
    x = samples(2, 1, 8, 8, dtype=dtype)
    model = build("conv", (1, 8, 8), 3, widths=(4, 8)).to(dtype).eval()
    scores = masked_scores(Scorer(model, x, 0), x, torch.ones(3, 1, 8, 8))
    assert scores.dtype == dtype
    assert not scores.requires_grad
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_parametrised_weights_are_built_once_and_do_not_count_as_activations() -> None:
    x = samples(4, 30)
    plain = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 2)).double().eval()
    model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 2)).double().eval()
    built = 0

    class Count(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            nonlocal built
            built += 1
            return weight @ torch.eye(30, dtype=weight.dtype)

    parametrize.register_parametrization(model[0], "weight", Count())
    budget = budget_for(x, plain, 2)
    assert chunk_size(x[:1], budget, model) == 2
    scorer = Scorer(model, x, 0)
    built = 0
    masked_scores(scorer, x, samples(9, 30), memory_budget=budget)
    assert built == 1


def test_an_orthogonal_parametrisation_gives_the_same_scores() -> None:
    x = samples(2, 6)
    layer = parametrizations.orthogonal(nn.Linear(6, 3).double()).eval()
    masks = samples(4, 6)
    scores = masked_scores(Scorer(layer, x, 0), x, masks)
    with torch.no_grad():
        expected = (x.unsqueeze(1) * masks) @ layer.weight[0] + layer.bias[0]
    assert torch.allclose(scores, expected)


@pytest.mark.parametrize(("grid", "size"), [((3, 3), (7, 5)), ((4, 4), (4, 4)), ((2, 2), (5, 9)), ((3,), (8,))])
def test_cells_spread_over_pixels(grid: tuple[int, ...], size: tuple[int, ...]) -> None:
    cells = samples(4, *grid)
    for mode, reference in (("nearest", slow.nearest), ("linear", slow.linear)):
        pixels = upsample(cells, size, mode)
        assert pixels.shape == (4, 1, *size)
        for k in range(4):
            assert torch.allclose(pixels[k, 0], reference(cells[k], size))


@pytest.mark.parametrize("copies", [1, 3, 100])
def test_cell_scores_are_scores_of_spread_masks(copies: int) -> None:
    x = samples(3, 2, 7, 5)
    model = network(x)
    scorer = Scorer(model, x, 0)
    cells = samples(10, 3, 3)
    scores = cell_scores(scorer, x, cells, 0.2, memory_budget=budget_for(x, model, copies))
    assert torch.allclose(scores, masked_scores(scorer, x, upsample(cells, (7, 5)), 0.2))


def test_a_grid_as_fine_as_the_picture_is_the_map() -> None:
    x = samples(2, 1, 4, 4)
    values = samples(2, 16)
    assert torch.allclose(cell_map(values, x, cell_grid(x, 4)), values.view(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s, x, m: masked_scores(s, x, m, memory_budget=100), r"at least \d+ bytes, which one perturbed sample"),
        (lambda s, x, m: masked_scores(s, x, m, memory_budget=torch.nan), "got nan; raise it"),
        (lambda s, x, m: masked_scores(s, x, 2 * m), r"masks: expected values in \[0, 1\], got 2 to 2"),
        (lambda s, x, m: masked_scores(s, x, m * torch.nan), r"masks: expected values in \[0, 1\], got nan"),
        (lambda s, x, m: masked_scores(s, x, m[:, :, :3]), r"broadcastable to samples \(2, 4, 5\), got \(6, 1, 3, 5\)"),
        (lambda s, x, m: masked_scores(s, x, m[:0]), "masks: expected a bank"),
        (lambda s, x, m: masked_scores(s, x, m, torch.inf), "baseline: expected finite values"),
        (lambda s, x, m: masked_scores(s, x, m, torch.zeros(7)), "baseline: expected a number, one sample"),
        (lambda s, x, m: masked_scores(s, x * torch.nan, m), "sample 0 holds NaN"),
        (lambda s, x, m: masked_scores(s, x[:1], m), "expected the 3 samples that the Scorer was built on, got 1"),
        (lambda s, x, m: cell_scores(s, x, torch.ones(2, 6, 6)), "at most one a pixel"),
        (lambda s, x, m: cell_scores(s, x, torch.ones(2, 6)), r"cells: expected \(masks, g, g\)"),
        (lambda s, x, m: upsample(torch.ones(1, 2, 2), (4, 4), "cubic"), "mode: expected"),
        (lambda s, x, m: cell_grid(x, 5), "grid: expected 1 to 4 cells a side"),
        (lambda s, x, m: cell_grid(x.unsqueeze(2), 2), r"signals \(n, channels, length\) or rows"),
    ],
)
def test_bad_input_says_what_was_expected(change: object, text: str) -> None:
    x = samples(3, 2, 4, 5)
    with pytest.raises(InputError, match=text):
        change(Scorer(network(x), x, 0), x, torch.ones(6, 1, 4, 5))  # type: ignore[operator]
