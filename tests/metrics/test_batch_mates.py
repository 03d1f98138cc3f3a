"""The score of a sample is the same alone, in a batch, and at another place of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from otnn.explain.scores import Scorer
from otnn.metrics import (
    average_stability,
    deletion,
    e_robustness,
    entropy,
    explanation_distance,
    gini,
    human_alignment,
    insertion,
    jpeg_bytes,
    mprt,
    mu_fidelity,
    null_block_share,
    pointing_game,
    robustness_sr,
    top_share,
)
from tests.metrics.networks import conv, gradient_of, images, seeded

MODEL = conv()
Metric = Callable[[Scorer, Tensor, Tensor, Tensor], Tensor]
METRICS: dict[str, Metric] = {
    "deletion": lambda s, x, a, r: deletion(s, x, a, generator=seeded()).per_sample,
    "deletion_normalised": lambda s, x, a, r: deletion(s, x, a, generator=seeded()).details["normalised"],
    "insertion": lambda s, x, a, r: insertion(s, x, a, generator=seeded(), signed=False).per_sample,
    "mu_fidelity": lambda s, x, a, r: (
        mu_fidelity(s, x, a, samples=20, baseline="uniform", generator=seeded()).per_sample
    ),
    "robustness_sr": lambda s, x, a, r: robustness_sr(s, x, a, shares=(0.1, 0.4), generator=seeded()).per_sample,
    "e_robustness": lambda s, x, a, r: e_robustness(gradient_of(s), x, largest=20, generator=seeded()).per_sample,
    "stability_l2": lambda s, x, a, r: average_stability(gradient_of(s), x, generator=seeded()).l2.per_sample,
    "stability_spearman": lambda s, x, a, r: (
        average_stability(gradient_of(s), x, generator=seeded()).spearman.per_sample
    ),
    "distance_l2": lambda s, x, a, r: explanation_distance(a, x).l2.per_sample,
    "distance_spearman": lambda s, x, a, r: explanation_distance(a, x).spearman.per_sample,
    "mprt": lambda s, x, a, r: mprt(s.model, gradient_of(s), x, generator=seeded()).per_sample,
    "jpeg_bytes": lambda s, x, a, r: jpeg_bytes(a).per_sample,
    "entropy": lambda s, x, a, r: entropy(a).per_sample,
    "gini": lambda s, x, a, r: gini(a).per_sample,
    "top_share": lambda s, x, a, r: top_share(a, r > 0.5, generator=seeded()).per_sample,
    "null_block_share": lambda s, x, a, r: null_block_share(a, r > 0.5, generator=seeded()).per_sample,
    "pointing_game": lambda s, x, a, r: pointing_game(a, r > 0.5, generator=seeded()).per_sample,
    "human_alignment": lambda s, x, a, r: human_alignment(a, r).per_sample,
}


@pytest.mark.parametrize("name", METRICS)
def test_a_score_does_not_depend_on_the_batch_mates(name: str) -> None:
    x, maps, regions = images(5, 2, 9, 9), images(5, 2, 9, 9, seed=1) - 0.5, images(5, 9, 9, seed=2)
    maps[3] = 1.0  # ties
    maps[1] *= 1000  # another scale
    target = torch.tensor([0, 1, 2, 0, 1])

    def scores(chosen: list[int]) -> Tensor:
        return METRICS[name](Scorer(MODEL, x[chosen], target[chosen]), x[chosen], maps[chosen], regions[chosen])

    together = scores([0, 1, 2, 3, 4])
    assert together.shape == (5,)
    assert together.dtype == torch.float64
    for alone in range(5):
        assert torch.allclose(scores([alone])[0], together[alone], atol=1e-9, equal_nan=True)
    assert torch.allclose(scores([4, 3, 1]), together[[4, 3, 1]], atol=1e-9, equal_nan=True)
    assert len(set(together[~together.isnan()].tolist())) > 1 or name == "pointing_game"


@pytest.mark.parametrize("name", METRICS)
def test_float32_gives_the_same_up_to_rounding(name: str) -> None:
    x, maps, regions = images(3, 2, 9, 9), images(3, 2, 9, 9, seed=1) - 0.5, images(3, 9, 9, seed=2)
    exact = METRICS[name](Scorer(MODEL, x, 1), x, maps, regions)
    model = conv().float().eval()
    single = METRICS[name](Scorer(model, x.float(), 1), x.float(), maps.float(), regions.float())
    assert single.dtype == torch.float64
    assert torch.equal(single.isfinite(), exact.isfinite())
    # numbers of another dtype are other draws
    drawn = name in ("mu_fidelity", "mprt", "e_robustness", "stability_l2", "stability_spearman")
    assert torch.allclose(single, exact, atol=1e-3, equal_nan=True) or drawn
