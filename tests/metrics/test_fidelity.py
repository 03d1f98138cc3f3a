import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otnn.explain.scores import Scorer
from otnn.metrics import MetricResult, deletion, insertion, mu_fidelity
from otnn.models import build
from tests.metrics import slow
from tests.metrics.networks import conv, gradient_of, images, linear, score_of, seeded

TARGET = torch.tensor([0, 2, 1])


@pytest.mark.parametrize("metric", [deletion, insertion])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("map_channels", [1, 2])
def test_the_curves_equal_the_slow_ones(metric: Any, signed: bool, map_channels: int) -> None:
    x, other = images(3, 2, 5, 7), images(3, 2, 5, 7, seed=1)  # 35 pixels: 3.5 a step
    maps = images(3, map_channels, 5, 7, seed=2) - 0.5
    scorer = Scorer(conv(), x, TARGET, "margin")
    result = metric(scorer, x, maps, baseline=other, signed=signed)
    for k in range(3):
        shares, scores = slow.curve(
            score_of(scorer, k), x[k], maps[k], 10, other[k], insert=metric is insertion, signed=signed
        )
        assert torch.allclose(result.curves.shares, torch.tensor(shares).double())
        assert torch.allclose(result.curves.raw[k], torch.tensor(scores).double())
        assert float(result.per_sample[k]) == pytest.approx(slow.area(shares, scores))
        first, last = (scores[-1], scores[0]) if metric is insertion else (scores[0], scores[-1])
        if first > last:
            normal = [(s - last) / (first - last) for s in scores]
            assert torch.allclose(result.curves.normalised[k], torch.tensor(normal).double())
            assert float(result.details["normalised"][k]) == pytest.approx(slow.area(shares, normal))
        else:
            assert result.curves.normalised[k].isnan().all()
            assert result.details["normalised"][k].isnan()
    assert result.mean == pytest.approx(float(result.per_sample.mean()))
    assert (result.forwards, result.signed, result.undefined) == (33, signed, 0)
    assert result.direction == ("up" if metric is insertion else "down")


def test_a_linear_score_falls_by_the_largest_terms() -> None:
    """Positive inputs and weights, zero baseline: the sum of what is left, in order of gradient x input."""
    w, x = images(1, 20, seed=3)[0], images(4, 20)
    scorer = Scorer(linear(torch.stack([w, -w])), x, 0)
    terms = (w * x).sort(dim=1, descending=True).values
    removed = torch.cat([torch.zeros(4, 1).double(), terms.cumsum(dim=1)], dim=1)[:, ::2]
    result = deletion(scorer, x, w * x)
    total = terms.sum(dim=1, keepdim=True)
    assert torch.allclose(result.curves.raw, total - removed)
    assert torch.allclose(result.curves.normalised, 1 - removed / total)
    inserted = insertion(scorer, x, w * x)
    assert torch.allclose(inserted.curves.raw, removed)
    # no order of the pixels does better
    for seed in range(20):
        order = images(4, 20, seed=seed)
        assert (deletion(scorer, x, order).per_sample >= result.per_sample - 1e-12).all()
        assert (insertion(scorer, x, order).per_sample <= inserted.per_sample + 1e-12).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, "one"]))
def test_no_drop_of_a_lipschitz_score_exceeds_the_masking_ceiling(seed: int, baseline: float | str) -> None:
    torch.manual_seed(seed)
    model = build("dense", (1, 4, 4), 3, widths=(16, 16)).double().eval()
    x, filling = images(5, 1, 4, 4, seed=seed), images(1, 1, 4, 4, seed=seed + 1)[0]
    scorer = Scorer(model, x, torch.arange(5) % 3, "margin")
    used = filling if baseline == "one" else baseline
    for metric in (deletion, insertion):
        curves = metric(scorer, x, gradient_of(scorer)(x, torch.arange(5)), baseline=used).curves
        whole = scorer(x).unsqueeze(1)
        assert ((curves.raw - whole).abs() <= curves.ceiling * (1 + 1e-9) + 1e-12).all()
        ends = curves.ceiling[:, [-1, 0] if metric is deletion else [0, -1]]
        base = torch.as_tensor(used, dtype=torch.float64).expand_as(x)
        assert torch.allclose(ends[:, 0], (x - base).flatten(1).norm(dim=1))
        assert not ends[:, 1].any()


def test_the_ceiling_is_the_norm_of_what_is_hidden() -> None:
    x, maps = images(2, 2, 3, 3), images(2, 1, 3, 3, seed=1)
    scorer = Scorer(conv(), x, 1)
    for metric in (deletion, insertion):
        ceiling = metric(scorer, x, maps, steps=9, baseline=0.25).curves.ceiling
        for k in range(2):
            order = maps[k].flatten().argsort(descending=True)
            for step in range(10):
                hidden = order[:step] if metric is deletion else order[step:]
                change = (x[k] - 0.25).flatten(1)[:, hidden]
                assert float(ceiling[k, step]) == pytest.approx(float(change.norm()))


def test_ties_fall_at_random_by_the_seed() -> None:
    x, flat = images(3, 2, 6, 6), torch.ones(3, 2, 6, 6, dtype=torch.float64)
    scorer = Scorer(conv(), x, TARGET)
    first, again, other = (deletion(scorer, x, flat, generator=seeded(k)).curves.raw for k in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first[:, 1:-1], other[:, 1:-1])
    assert torch.allclose(first[:, [0, -1]], other[:, [0, -1]])
    # half of the pixels tied: the others keep their places
    half = flat.clone()
    half[..., :3, :] = images(3, 2, 3, 6, seed=1) + 2
    kept = [deletion(scorer, x, half, steps=4, generator=seeded(k)).curves.raw for k in range(2)]
    assert torch.allclose(kept[0][:, :3], kept[1][:, :3])
    assert not torch.allclose(kept[0][:, 3], kept[1][:, 3])


@pytest.mark.parametrize("baseline", ["zero", "given", "uniform"])
@pytest.mark.parametrize("grid", [3, 9])
def test_mu_fidelity_equals_the_slow_one(baseline: str, grid: int) -> None:
    """Sizes that are no multiple of the grid, and smaller than it on one side."""
    x, maps = images(3, 2, 8, 11), images(3, 2, 8, 11, seed=1) - 0.5
    scorer = Scorer(conv(), x, TARGET)
    given_ = images(1, 2, 8, 11, seed=7)[0]
    used: Any = {"zero": 0.0, "given": given_, "uniform": "uniform"}[baseline]
    result = mu_fidelity(scorer, x, maps, grid=grid, samples=25, baseline=used, generator=seeded(4))
    draws, side = seeded(4), min(grid, 8)
    hidden = torch.rand(25, side, side, generator=draws, dtype=torch.float64) < 0.2
    noise = torch.rand(2, 8, 11, generator=draws, dtype=torch.float64)
    filling = {"zero": torch.zeros_like(given_), "given": given_, "uniform": noise}[baseline]
    for k in range(3):
        expected = slow.mu_fidelity(score_of(scorer, k), x[k], maps[k], hidden, filling)
        assert float(result.per_sample[k]) == pytest.approx(expected, abs=1e-9)
    assert (result.forwards, result.undefined, result.direction) == (75, 0, "up")
    assert result.settings["baseline"] == {"zero": 0.0}.get(baseline, baseline)


def test_mu_fidelity_of_the_terms_of_a_linear_score_is_one() -> None:
    w, x = images(1, 2 * 81, seed=3)[0] - 0.5, images(4, 2, 9, 9)
    scorer = Scorer(linear(torch.stack([w, -w])), x, torch.tensor([0, 1, 0, 1]))
    sign = torch.tensor([1.0, -1, 1, -1]).double().view(-1, 1, 1, 1)
    terms = sign * w.view(2, 9, 9) * x
    result = mu_fidelity(scorer, x, {"right": terms, "wrong": -terms, "summed": terms.sum(dim=1, keepdim=True)})
    assert torch.allclose(result["right"].per_sample, torch.ones(4).double())
    assert torch.allclose(result["wrong"].per_sample, -torch.ones(4).double())
    assert torch.allclose(result["summed"].per_sample, torch.ones(4).double())


def test_sums_that_are_equal_but_for_rounding_tie() -> None:
    """.1 + .2 is not .3 in floating point, and ranks must not see it."""
    x = images(3, 8)
    scorer = Scorer(linear(images(2, 8, seed=1)), x, 0)
    tenths = torch.tensor([1.0, 2, 3, 1, 2, 3, 4, 5]).double().expand(3, 8)
    whole, split = (mu_fidelity(scorer, x, maps, generator=seeded()) for maps in (tenths, tenths * 0.1))
    assert torch.equal(whole.per_sample, split.per_sample)


def test_one_bank_serves_all_methods() -> None:
    x = images(3, 2, 9, 9)
    calls = []

    class Counted(Scorer):
        def __call__(self, inputs: Tensor, index: Tensor | None = None) -> Tensor:
            calls.append(len(inputs))
            return super().__call__(inputs, index)

    scorer = Counted(conv(), x, TARGET)
    methods = {str(seed): images(3, 1, 9, 9, seed=seed) for seed in range(5)}
    together = mu_fidelity(scorer, x, methods, samples=30, generator=seeded())
    assert sum(calls) == 90
    for name, maps in methods.items():
        alone = mu_fidelity(scorer, x, maps, samples=30, generator=seeded())
        assert isinstance(alone, MetricResult)
        assert torch.allclose(alone.per_sample, together[name].per_sample)


def test_rows_and_signals_have_masks_too() -> None:
    rows, w = images(4, 6), torch.tensor([3.0, -1, 2, 5, -4, 1]).double()
    scorer = Scorer(linear(torch.stack([w, 0 * w])), rows, 0)
    assert torch.allclose(mu_fidelity(scorer, rows, w * rows).per_sample, torch.ones(4).double())
    assert deletion(scorer, rows, w * rows).curves.shares.tolist() == pytest.approx([k / 6 for k in range(7)])
    signals, v = images(4, 2, 30), images(1, 60, seed=1)[0]
    scorer = Scorer(linear(torch.stack([v, 0 * v])), signals, 0)
    assert torch.allclose(mu_fidelity(scorer, signals, v.view(2, 30) * signals).per_sample, torch.ones(4).double())
    assert deletion(scorer, signals, v.view(2, 30) * signals).mean < insertion(scorer, signals, signals * 0 + 1).mean


def test_constant_and_broken_maps_are_counted() -> None:
    x, maps = images(4, 2, 9, 9), images(4, 1, 9, 9, seed=1)
    maps[1] = 0
    maps[2] = 3.5
    maps[3, 0, 4, 4] = torch.nan
    scorer = Scorer(conv(), x, 1)
    result = mu_fidelity(scorer, x, maps, samples=20)
    assert (result.undefined, result.counted_as) == (3, "0")
    assert not result.per_sample[1:].any()
    assert result.per_sample[0] != 0
    area = deletion(scorer, x, maps)
    assert area.undefined == 3
    assert area.per_sample.isnan().tolist() == [False, False, False, True]
    assert area.mean == pytest.approx(float(area.per_sample[:3].mean()))
    everywhere = deletion(scorer, x, maps * torch.nan)
    assert math.isnan(everywhere.mean)
    assert everywhere.undefined == 4


def test_a_constant_score_correlates_with_nothing() -> None:
    x = images(3, 2, 9, 9)
    model = linear(torch.zeros(2, 162))
    result = mu_fidelity(Scorer(model, x, 0), x, images(3, 2, 9, 9, seed=1))
    assert (result.mean, result.undefined) == (0, 3)
    assert deletion(Scorer(model, x, 0), x, x).curves.normalised.isnan().all()


def test_the_memory_budget_changes_nothing() -> None:
    x, maps = images(7, 2, 9, 9), images(7, 2, 9, 9, seed=1)
    model = conv()
    for metric in (deletion, insertion, mu_fidelity):
        values = [
            metric(Scorer(model, x, 1), x, maps, generator=seeded(), memory_budget=budget).per_sample
            for budget in (2**30, 60_000)
        ]
        assert torch.allclose(*values)
        each = images(7, 2, 9, 9, seed=2)  # a baseline per sample
        values = [
            metric(Scorer(model, x, 1), x, maps, generator=seeded(), baseline=each, memory_budget=budget).per_sample
            for budget in (2**30, 60_000)
        ]
        assert torch.allclose(*values)
