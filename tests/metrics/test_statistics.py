import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from otnn.errors import InputError
from otnn.metrics import bootstrap_interval, compare_paired, holm, paired_test, spearman
from otnn.metrics.statistics import ranks
from tests.metrics.networks import seeded

rows = st.lists(st.integers(-3, 3), min_size=3, max_size=30)


@settings(deadline=None, max_examples=100)
@given(rows)
def test_ranks_are_scipys(row: list[int]) -> None:
    batch = torch.tensor([row, row[::-1]], dtype=torch.float64)
    assert torch.equal(ranks(batch), torch.from_numpy(stats.rankdata(batch.numpy(), axis=1)))


@settings(deadline=None, max_examples=100)
@given(rows, st.integers(0, 1000))
def test_spearman_is_scipys_with_ties(row: list[int], seed: int) -> None:
    first = torch.tensor(row, dtype=torch.float64)
    second = torch.randint(0, 4, (len(row),), generator=seeded(seed)).double()
    ours = float(spearman(first, second))
    if len(set(row)) == 1 or len(set(second.tolist())) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


def test_spearman_broadcasts_and_tells_nan() -> None:
    methods, drops = torch.rand(3, 5, 20), torch.rand(5, 20)
    methods[1, 2, 7] = torch.nan
    together = spearman(methods, drops)
    assert together.shape == (3, 5)
    assert together.isnan().nonzero().tolist() == [[1, 2]]
    assert torch.allclose(together[2], spearman(methods[2], drops))


def test_ranks_of_low_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert ranks(torch.tensor([[2.0, -1.0, 2.0, torch.inf]], dtype=dtype)).tolist() == [[2.5, 1, 2.5, 4]]


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    values = torch.randn(200, 60, generator=seeded(1), dtype=torch.float64)
    intervals = [bootstrap_interval(row, resamples=400) for row in values]
    covered = sum(low <= 0 <= high for low, high in intervals)
    assert 0.88 <= covered / 200 <= 0.99
    # the normal interval of the mean is as wide
    width = np.mean([high - low for low, high in intervals])
    assert width == pytest.approx(2 * 1.96 / math.sqrt(60), rel=0.05)


def test_the_bootstrap_is_seeded_and_leaves_nan_out() -> None:
    values = torch.rand(30)
    assert bootstrap_interval(values) == bootstrap_interval(torch.cat([values, torch.tensor([torch.nan])]))
    assert bootstrap_interval(values) != bootstrap_interval(values, generator=seeded(5))
    assert all(math.isnan(end) for end in bootstrap_interval(values[:1]))


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 14), st.integers(0, 1000))
def test_sign_flips_are_scipys_exact_wilcoxon_without_ties(n: int, seed: int) -> None:
    a, b = torch.randn(2, n, generator=seeded(seed), dtype=torch.float64)
    ours = paired_test(a, b)
    assert ours.test == "sign flips of signed ranks"
    assert ours.p_value == pytest.approx(stats.wilcoxon(a, b, method="exact").pvalue, abs=1e-12)


def test_sign_flips_count_ties_exactly() -> None:
    difference = torch.tensor([1.0, 1.0, -1.0, 2.0])
    exact = stats.permutation_test(
        (difference.numpy(),),
        lambda d: (np.sign(d) * stats.rankdata(abs(d))).sum(),
        permutation_type="samples",
        vectorized=False,
        n_resamples=np.inf,
    )
    assert paired_test(difference, torch.zeros(4)).p_value == pytest.approx(exact.pvalue)


def test_many_pairs_take_scipys_wilcoxon() -> None:
    a, b = torch.randn(2, 40, generator=seeded(), dtype=torch.float64)
    b[3] = a[3]
    a[4] = torch.nan
    result = paired_test(a, b)
    kept = [k for k in range(40) if k not in (3, 4)]
    assert result.p_value == pytest.approx(stats.wilcoxon(a[kept], b[kept]).pvalue)
    assert (result.samples, result.test) == (39, "wilcoxon signed rank")
    assert result.difference == pytest.approx(float((a - b)[[k for k in range(40) if k != 4]].mean()))


def test_equal_series_do_not_differ() -> None:
    assert paired_test(torch.ones(30), torch.ones(30)).p_value == 1
    assert paired_test(torch.full((3,), torch.nan), torch.ones(3)).samples == 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_from_its_definition(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for i, k in enumerate(order):
        expected = max(min(1, (len(order) - j) * p_values[order[j]]) for j in range(i + 1))
        assert adjusted[k] == pytest.approx(expected)
    assert all(adjusted[a] <= adjusted[b] for a, b in pairwise(order))


def test_methods_are_compared_with_the_reference_and_corrected() -> None:
    ours = torch.rand(12, generator=seeded())
    tests = compare_paired({"ours": ours, "worse": ours - 1, "same": ours, "noise": ours.flip(0)}, "ours")
    assert list(tests) == ["worse", "same", "noise"]
    assert tests["worse"].p_value == 2 / 2**12
    assert tests["worse"].adjusted == 3 * tests["worse"].p_value
    assert tests["worse"].difference == pytest.approx(1)
    assert tests["same"].adjusted == 1


def test_bad_series_are_refused() -> None:
    with pytest.raises(InputError, match=r"two series \(n,\) of the same samples"):
        paired_test(torch.rand(3), torch.rand(4))
    with pytest.raises(InputError, match="reference: expected one of a, got 'b'"):
        compare_paired({"a": torch.rand(3)}, "b")
    with pytest.raises(InputError, match=r"level: expected a share in \(0, 1\)"):
        bootstrap_interval(torch.rand(3), level=1.0)
    with pytest.raises(InputError, match="at least 2, got 1"):
        bootstrap_interval(torch.rand(3), resamples=1)


def test_the_direction_of_a_test_is_that_of_its_ranks_not_of_the_mean() -> None:
    difference = torch.cat([-1 - torch.arange(90.0) / 1000, 100 + torch.arange(10.0)])
    test = paired_test(difference, torch.zeros(100))
    assert test.difference > 0
    assert test.p_value < 1e-3
    # ranks 1 to 90 below, 91 to 100 above
    assert test.effect == pytest.approx((sum(range(91, 101)) - sum(range(1, 91))) / sum(range(1, 101)))
    assert paired_test(torch.zeros(5), torch.zeros(5)).effect == 0.0
    assert paired_test(torch.ones(5), torch.zeros(5)).effect == 1.0
