import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otnn.explain.rays import GROWTH, first_crossing, refine


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=6), st.floats(1e-5, 2.0), st.floats(0.5, 2e3))
def test_the_crossing_of_a_monotone_function_is_found_exactly_where_it_is_in_reach(
    roots: list[float], start: float, reach: float
) -> None:
    goal = tensor(*roots)
    lengths = first_crossing(
        lambda t, k: (goal[k] - t) * (1 + t), torch.full_like(goal, start), torch.full_like(goal, reach)
    )
    for found, root in zip(lengths.tolist(), roots, strict=True):
        if root < reach:
            assert root <= found <= root * (1 + 2e-12) + 1e-12 * start
        else:
            assert math.isnan(found)


def test_nothing_before_the_start_and_everything_beyond_it_within_the_growth_is_seen() -> None:
    # positive but in (2, 2 * 1.25): no step of growth 1.25 that begins at or before 2 can jump over it
    for start in (0.1, 0.7, 1.99):
        gap = first_crossing(
            lambda t, k: torch.where((t > 2) & (t < 2 * GROWTH + 1e-9), -1.0, 1.0).double(), tensor(start), tensor(50.0)
        )
        assert float(gap) == pytest.approx(2.0)
    # a start beyond the reach is cut to it
    assert float(first_crossing(lambda t, k: 1 - t, tensor(5.0), tensor(2.0))) == pytest.approx(1.0)


def test_reach_itself_is_tried_and_left_out_samples_stay_so() -> None:
    start, reach = tensor(1.0, 1.0, math.nan, 1.0), tensor(3.0, 2.9, 3.0, -1.0)
    lengths = first_crossing(lambda t, k: 2.95 - t, start, reach)
    assert lengths[1:].isnan().all()
    assert float(lengths[0]) == pytest.approx(2.95)


def test_only_open_samples_are_evaluated_and_nan_is_no_crossing() -> None:
    goal, asked = tensor(0.5, 4.0, math.inf), torch.zeros(3)

    def potential(length: Tensor, index: Tensor) -> Tensor:
        asked.index_add_(0, index, torch.ones(len(index)))
        value = goal[index] - length
        return torch.where(length > 100, torch.nan, value)

    lengths = first_crossing(potential, tensor(1.0, 1.0, 1.0), tensor(1e3, 1e3, 1e3))
    assert lengths[:2].tolist() == pytest.approx([0.5, 4.0])
    assert lengths[2].isnan()
    # 1 try or 8 of them, and a few of a linear function; 32 tries
    assert asked[0] <= 1 + 5
    assert asked[1] <= 8 + 5
    assert asked[2] == 1 + math.ceil(math.log(1e3) / math.log(GROWTH))


def test_the_refinement_ends_at_the_resolution_of_the_dtype() -> None:
    for dtype, resolution in ((torch.float64, 1e-12), (torch.float32, 3e-7)):
        high = refine(lambda t, k: 2 - t * t, torch.zeros(1, dtype=dtype), torch.full((1,), 2.0, dtype=dtype))
        assert high.dtype == dtype
        assert float(high) == pytest.approx(math.sqrt(2), rel=resolution)
    unknown = refine(lambda t, k: 1 - t, torch.zeros(1), torch.full((1,), math.nan))
    assert unknown.isnan().all()


@pytest.mark.parametrize(
    ("potential", "root"),
    [
        (lambda t: torch.where(t < 0.7, 1.0, -1e-9), 0.7),  # a jump: secants lag behind
        (lambda t: torch.where(t < 0.3, 1e-9, -1.0), 0.3),
        (lambda t: (0.6 - t) ** 9, 0.6),
        (lambda t: torch.where(t < 0.2, torch.nan, 0.9 - t), 0.9),
        (lambda t: torch.minimum(1 - 5 * t, 0.21 - t).clamp(max=0.1), 0.2),
    ],
)
def test_every_bracket_closes_in_few_steps(potential: Callable[[Tensor], Tensor], root: float) -> None:
    """At least every second step halves the bracket: 42 halvings, to 2^-40 of 0.3, take 84, the ends two more."""
    calls = 0

    def counted(length: Tensor, _: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return potential(length).double()

    assert float(refine(counted, tensor(0.0), tensor(1.0))) == pytest.approx(root, rel=2e-12)
    assert calls <= 2 + 2 * 42


def test_known_ends_are_not_evaluated_again() -> None:
    tried: list[float] = []

    def potential(length: Tensor, _: Tensor) -> Tensor:
        tried.extend(length.tolist())
        return 2 - length * length

    low, high = tensor(0.0, 1.0), tensor(2.0, 3.0)
    plain = refine(potential, low, high)
    ends = {0.0, 1.0, 2.0, 3.0}
    assert ends <= set(tried)
    calls = len(tried)
    tried.clear()
    known = torch.stack([2 - low * low, 2 - high * high])
    assert torch.equal(refine(potential, low, high, values=known), plain)
    assert not ends & set(tried)
    assert len(tried) == calls - 4
    tried.clear()
    known[1, 0] = torch.nan
    assert torch.equal(refine(potential, low, high, values=known), plain)
    assert ends & set(tried) == {2.0}
    assert bool(known[1, 0].isnan())  # what is given is not written to


@pytest.mark.parametrize("resolution", [1e-2, 1e-4, 1e-6])
def test_a_coarse_crossing_is_cheaper_and_on_the_negative_side(resolution: float) -> None:
    calls = {}
    for share in (resolution, 2.0**-40):
        asked = []
        high = refine(lambda t, k, asked=asked: asked.append(t) or 2 - t**3, tensor(0.0), tensor(2.0), resolution=share)
        root = 2 ** (1 / 3)
        assert root <= float(high) <= root * (1 + 1.01 * share)
        calls[share] = len(asked)
    assert calls[resolution] < calls[2.0**-40]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_search_ends_after_the_steps_given_where_it_is_still_negative(steps: int) -> None:
    asked = []
    high = refine(lambda t, k: asked.append(t) or 1e-9 - (t - 0.7) ** 3, tensor(0.0), tensor(2.0), steps=steps)
    assert len(asked) == 2 + steps
    assert 0.7 < float(high) <= 2.0


def test_the_ends_of_a_bracket_are_not_evaluated_by_the_search_for_it() -> None:
    """Tries 1, 1.25, ..., 1.25^3 = 1.95; the crossing of a linear potential takes two lengths from there."""
    tried: list[float] = []
    first_crossing(lambda t, k: tried.extend(t.tolist()) or 1.7 - t, tensor(1.0), tensor(9.0))
    assert tried[:4] == pytest.approx([1.25**k for k in range(4)])
    assert len(tried) == len(set(tried)) == 4 + 2
