"""What cannot be used is refused with what was expected, what came and the mend."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.explain.scores import Scorer
from otnn.metrics import (
    average_stability,
    block_mnist,
    box_regions,
    cost_of,
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
    pointing_game,
    robustness_sr,
    top_share,
)
from tests.metrics.networks import conv, images

X = images(3, 2, 6, 6)
MODEL = conv()
S = Scorer(MODEL, X, 1)
MASK = torch.zeros(3, 6, 6, dtype=torch.bool)


def same(inputs: Tensor, index: Tensor) -> Tensor:
    return inputs


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: deletion(S, X, X[:2]), r"shape \(3, 2, 6, 6\) or \(3, 1, 6, 6\), got \(2, 2, 6, 6\)"),
        (lambda: insertion(S, X, X[:, 0]), r"got \(3, 6, 6\); resize or unsqueeze"),
        (lambda: mu_fidelity(S, X, {"lime": X[..., :5]}), r"attribution lime: expected one map per sample"),
        (lambda: mu_fidelity(S, X, {}), "at least one method, got none"),
        (lambda: robustness_sr(S, X, X.long()), "floating-point values, got torch.int64"),
        (lambda: deletion(S, X[:2], X[:2]), "the 3 samples that the Scorer was built on, got 2"),
        (lambda: deletion(S, X * torch.nan, X), "sample 0 holds NaN"),
        (lambda: deletion(S, X, X, steps=0), "steps: expected at least 1, got 0"),
        (lambda: deletion(S, X, X, baseline=X[:2]), "baseline: expected a number"),
        (lambda: deletion(S, X, X, memory_budget=10), "memory_budget: expected at least"),
        (lambda: mu_fidelity(S, X, X, memory_budget=10), "memory_budget: expected at least"),
        (lambda: robustness_sr(S, X, X, memory_budget=10), "memory_budget: expected at least"),
        (lambda: average_stability(same, X, memory_budget=10), "memory_budget: expected at least"),
        (lambda: e_robustness(same, X, memory_budget=10), "memory_budget: expected at least"),
        (lambda: mprt(MODEL, same, X, memory_budget=10), "memory_budget: expected at least"),
        (lambda: mu_fidelity(S, X, X, subset=1.0), r"subset: expected a probability in \(0, 1\), got 1.0"),
        (lambda: mu_fidelity(S, X, X, samples=1), "samples: expected at least 2 masks, got 1"),
        (lambda: mu_fidelity(S, X, X, grid=0), "grid: expected 1 to 6"),
        (lambda: mu_fidelity(S, X, X, baseline="blur"), "a number, a tensor or \"uniform\", got 'blur'"),
        (lambda: deletion(Scorer(MODEL, X, 3), X, X), r"integers in 0..2, got 3..3"),
        (lambda: robustness_sr(S, X, X, shares=()), "at least one share of the pixels, got none"),
        (lambda: robustness_sr(S, X, X, shares=(0.0,)), r"share of the pixels in \(0, 1\], got 0.0"),
        (lambda: robustness_sr(S, X, X, largest=0), "largest: expected a finite radius > 0"),
        (lambda: robustness_sr(S, X, X, tolerance=0), "tolerance: expected a length > 0"),
        (lambda: robustness_sr(S, X, X, attack_steps=0), "at least 1 each, got 25 and 0"),
        (lambda: e_robustness(same, X, largest=float("inf")), "largest: expected a finite radius > 0"),
        (lambda: e_robustness(same, X, directions=0), "at least 1 each, got 0 and 10"),
        (lambda: e_robustness(same, X, threshold=0), "threshold: expected a number > 0"),
        (lambda: average_stability(lambda x, i: x[..., :3], X), "explain: expected one map per sample"),
        (lambda: average_stability(lambda x, i: (x, x), X), "explain: expected a tensor of maps, got tuple"),  # type: ignore[arg-type,return-value]
        (lambda: average_stability(same, X, noise=(0.1, -0.1)), "a range low < high"),
        (lambda: average_stability(same, X, neighbours=0), "neighbours: expected at least 1"),
        (lambda: explanation_distance(X, X[..., :3]), "maps of the same samples and pixels"),
        (lambda: explanation_distance(X.flatten(1), X.flatten(1)[:, :4]), "maps of the same samples and pixels"),
        (lambda: entropy(X.long()), "floating-point values"),
        (lambda: gini(X[:0]), "expected a batch of maps"),
        (lambda: jpeg_bytes(X.flatten(1)), r"pictures \(n, channels, height, width\), got \(3, 72\)"),
        (lambda: jpeg_bytes(X, quality=100), "quality: expected 1 to 95, got 100"),
        (lambda: mprt(conv().train(), same, X), "training mode"),
        (lambda: mprt(torch.nn.Flatten().eval(), same, X), "layers with parameters, got none"),
        (lambda: top_share(X, MASK[:2]), r"regions: expected one per sample, shape \(3, 6, 6\), got \(2, 6, 6\)"),
        (lambda: top_share(X, MASK.long()), "regions: expected bool, got torch.int64"),
        (lambda: top_share(X, MASK, share=1.5), r"share of the pixels in \(0, 1\], got 1.5"),
        (lambda: pointing_game(X.flatten(1), MASK), r"attribution: expected \(n, channels, height, width\)"),
        (lambda: human_alignment(X, X), r"human: expected one per sample, shape \(3, 6, 6\), got \(3, 2, 6, 6\)"),
        (lambda: human_alignment(X, MASK), "human: expected floating-point values, got torch.bool"),
        (lambda: box_regions(torch.zeros(3, 2), (4, 4)), r"boxes: expected \(n, 4\)"),
        (lambda: box_regions(torch.tensor([[0, 0, 1, 1], [5, 5, 9, 9]]), (4, 4)), "box 1, .* holds no pixel"),
        (lambda: block_mnist(X * 255, torch.arange(3)), r"images: expected values in \[0, 1\]"),
        (lambda: block_mnist(X, torch.arange(2)), r"one per sample, shape \(3,\)"),
        (lambda: cost_of("rise", 3), "metric: expected one of deletion, .* got 'rise'"),
        (lambda: cost_of("mprt", 3), "mprt: expected a count and settings of at least 1"),
        (lambda: cost_of("deletion", 3, samples=4), "deletion: expected settings among steps, pixels, got samples"),
        (lambda: cost_of("gini", 3, samples=4), "gini: expected settings among none, got samples"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        call()
