import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otnn.explain.scores import Scorer
from otnn.metrics import average_stability, cost_of, explanation_distance
from tests.metrics import slow
from tests.metrics.networks import conv, gradient_of, images, linear, seeded


@pytest.mark.parametrize("noise", [(-0.1, 0.1), (0.0, 0.1)])
def test_stability_equals_the_slow_one(noise: tuple[float, float]) -> None:
    x = images(3, 2, 5, 6)
    explain = gradient_of(Scorer(conv(), x, torch.tensor([0, 1, 2])))
    result = average_stability(explain, x, neighbours=5, noise=noise, forwards_per_map=3, generator=seeded())
    low, high = noise
    bank = low + (high - low) * torch.rand(5, 2, 5, 6, generator=seeded(), dtype=torch.float64)
    for k in range(3):
        l2, ranked = slow.stability(lambda one, k=k: explain(one[None], torch.tensor([k]))[0], x[k], bank)
        assert float(result.l2.per_sample[k]) == pytest.approx(l2)
        assert float(result.spearman.per_sample[k]) == pytest.approx(ranked)
    assert result.l2.maps == cost_of("average_stability", 3, neighbours=5).maps == 18
    assert result.l2.forwards == cost_of("average_stability", 3, neighbours=5, forwards_per_map=3).forwards
    assert result.l2.direction == result.spearman.direction == "down"


def test_the_gradient_of_a_linear_score_is_stable_and_noise_is_not() -> None:
    x = images(3, 1, 6, 6)
    scorer = Scorer(linear(torch.randn(2, 36)), x, 0)
    still = average_stability(gradient_of(scorer), x)
    assert still.l2.mean == pytest.approx(0, abs=1e-12)
    assert still.spearman.mean == pytest.approx(0, abs=1e-12)
    noise = average_stability(lambda inputs, index: torch.randn_like(inputs), x)
    assert noise.spearman.mean == pytest.approx(1, abs=0.15)
    assert noise.l2.mean == pytest.approx(math.sqrt(2), abs=0.15)


def test_explanations_are_asked_for_in_small_calls() -> None:
    x, sizes = images(300, 3), []

    def explain(inputs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        sizes.append(len(inputs))
        assert ((inputs - x[index]).abs() <= 0.1).all()
        return inputs

    average_stability(explain, x, neighbours=3)
    assert max(sizes) == 256
    assert sum(sizes) == 1200
    sizes.clear()
    average_stability(explain, x, neighbours=3, memory_budget=10 * 3 * 3 * 8)
    assert max(sizes) == 10


def test_constant_maps_of_samples_and_of_neighbours_are_counted() -> None:
    x = images(3, 1, 3, 3)
    fixed = images(3, 1, 3, 3, seed=1)
    fixed[1] = 0.5

    def explain(inputs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        perturbed = (inputs != x[index]).flatten(1).any(dim=1)
        maps = fixed[index].clone()
        maps[perturbed & (index == 2)] = 0
        return maps

    result = average_stability(explain, x, neighbours=4)
    assert result.l2.undefined == result.spearman.undefined == 1
    assert result.l2.per_sample[[0, 2]].tolist() == pytest.approx([0, 1])
    assert result.spearman.per_sample[[0, 2]].tolist() == pytest.approx([0, 1])
    assert result.l2.per_sample[1].isnan()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.booleans())
def test_the_distance_of_two_methods_equals_the_slow_one(seed: int, signed: bool) -> None:
    first, second = images(2, 3, 3, 4, seed=seed) - 0.5, images(2, 1, 3, 4, seed=seed + 1) - 0.5
    result = explanation_distance(first, second, signed=signed)
    for k in range(2):
        l2, ranked = slow.distances(slow.flat(first[k], signed), slow.flat(second[k], signed))
        assert float(result.l2.per_sample[k]) == pytest.approx(l2)
        assert float(result.spearman.per_sample[k]) == pytest.approx(ranked)
    swapped = explanation_distance(second, 5 * first, signed=signed)
    assert torch.allclose(swapped.l2.per_sample, result.l2.per_sample)
    assert result.l2.signed == signed


def test_methods_without_a_map_leave_their_sample_out() -> None:
    first, second = images(4, 1, 3, 3), images(4, 1, 3, 3, seed=1)
    first[0], second[1] = 2, 0
    second[2, 0, 1, 1] = torch.nan
    result = explanation_distance(first, second)
    assert result.l2.per_sample.isnan().tolist() == [True, True, True, False]
    assert result.spearman.undefined == 3
    assert result.spearman.mean == pytest.approx(float(result.spearman.per_sample[3]))
