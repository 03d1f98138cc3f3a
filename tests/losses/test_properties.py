"""Properties of the losses as functions, on random scores."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otnn.losses import hinge, hkr, kr, one_vs_all_hkr, soft_hkr, temperature_cross_entropy
from tests.losses.batches import MARGINS, PRIORS, several

finite = st.floats(-100, 100, allow_subnormal=False)
samples = st.lists(st.tuples(finite, st.integers(0, 1)), min_size=1, max_size=12)
rows = st.lists(st.tuples(st.tuples(finite, finite, finite), st.integers(0, 2)), min_size=1, max_size=8)
prior_values = st.floats(0.05, 0.95)
quick = settings(deadline=None, derandomize=True, max_examples=40)


def tensors(pairs: list[tuple[object, int]]) -> tuple[Tensor, Tensor]:
    scores, labels = zip(*pairs, strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(labels)


ALL_OF_THREE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one_vs_all": lambda f, y: one_vs_all_hkr(f, y, margin=MARGINS, alpha=0.2, priors=PRIORS),
    "soft": lambda f, y: soft_hkr(f, y, margin=MARGINS, alpha=0.2, priors=PRIORS),
    "released": lambda f, y: soft_hkr(
        f, y, margin=0.5, hinge_weight=49.0, priors=PRIORS, hinge_form="separate", kr_form="one_vs_all"
    ),
    "cross-entropy": lambda f, y: temperature_cross_entropy(f, y, temperature=5.0),
}


@quick
@given(samples, prior_values, st.randoms(use_true_random=False))
def test_order_does_not_matter(pairs: list[tuple[float, int]], prior: float, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = random.sample(pairs, len(pairs))
    first, second = (hkr(*tensors(p), margin=0.5, hinge_weight=2.0, prior=prior, center=0.3) for p in (pairs, shuffled))
    assert float(first) == pytest.approx(float(second), rel=1e-10, abs=1e-9)


@pytest.mark.parametrize("name", ALL_OF_THREE)
def test_order_does_not_matter_with_classes(name: str) -> None:
    scores, labels = several()
    order = torch.randperm(12)
    value = float(ALL_OF_THREE[name](scores, labels))
    assert float(ALL_OF_THREE[name](scores[order], labels[order])) == pytest.approx(value, rel=1e-13)


@quick
@given(samples, samples, prior_values, finite)
def test_halves_average_to_the_whole(first: list, second: list, prior: float, center: float) -> None:  # type: ignore[type-arg]
    # equal halves, whatever they hold, one class alone included: unbiased
    size = min(len(first), len(second))
    halves = [tensors(part[:size]) for part in (first, second)]
    whole = tensors(first[:size] + second[:size])

    def loss(part: tuple[Tensor, Tensor]) -> float:
        return float(hkr(*part, margin=0.5, hinge_weight=2.0, alpha=0.05, prior=prior, center=center))

    assert (loss(halves[0]) + loss(halves[1])) / 2 == pytest.approx(loss(whole), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ALL_OF_THREE)
@quick
@given(rows, rows)
def test_halves_average_to_the_whole_with_classes(name: str, first: list, second: list) -> None:  # type: ignore[type-arg]
    size = min(len(first), len(second))
    halves = [tensors(part[:size]) for part in (first, second)]
    mean = sum(float(ALL_OF_THREE[name](*part)) for part in halves) / 2
    whole = float(ALL_OF_THREE[name](*tensors(first[:size] + second[:size])))
    assert mean == pytest.approx(whole, rel=1e-9, abs=1e-9)


@quick
@given(samples, finite)
def test_kr_of_both_classes_does_not_feel_a_shift(pairs: list[tuple[float, int]], shift: float) -> None:
    scores, labels = tensors([*pairs, (0.5, 0), (0.25, 1)])
    value = float(kr(scores, labels))
    assert float(kr(scores + shift, labels)) == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert float(kr(scores, labels, center=shift)) == pytest.approx(value, rel=1e-9, abs=1e-9)


@quick
@given(samples, prior_values, finite)
def test_a_centre_moves_scores_and_centre_together(pairs: list[tuple[float, int]], prior: float, shift: float) -> None:
    scores, labels = tensors(pairs)
    value = float(kr(scores, labels, prior=prior, center=0.2))
    moved = float(kr(scores + shift, labels, prior=prior, center=0.2 + shift))
    assert moved == pytest.approx(value, rel=1e-9, abs=1e-8)


@quick
@given(samples, prior_values, st.floats(0, 50))
def test_kr_is_positively_homogeneous_and_odd(pairs: list[tuple[float, int]], prior: float, factor: float) -> None:
    scores, labels = tensors(pairs)
    value = float(kr(scores, labels, prior=prior))
    assert float(kr(factor * scores, labels, prior=prior)) == pytest.approx(factor * value, rel=1e-9, abs=1e-9)
    assert float(kr(-scores, labels, prior=prior)) == pytest.approx(-value, rel=1e-9, abs=1e-9)
    swapped = float(kr(scores, 1 - labels, prior=1 - prior))
    assert swapped == pytest.approx(-value, rel=1e-9, abs=1e-9)


@quick
@given(samples, st.floats(0, 10))
def test_hinge_is_zero_exactly_beyond_the_margin(pairs: list[tuple[float, int]], margin: float) -> None:
    scores, labels = tensors(pairs)
    signed = torch.where(labels == 1, scores, -scores)
    assert (float(hinge(scores, labels, margin=margin)) == 0) == bool((signed >= margin).all())


@quick
@given(rows, finite)
def test_soft_does_not_feel_a_common_shift(pairs: list, shift: float) -> None:  # type: ignore[type-arg]
    scores, labels = tensors(pairs)
    value = float(soft_hkr(scores, labels, margin=0.3, hinge_weight=2.0, priors=PRIORS))
    moved = float(soft_hkr(scores + shift, labels, margin=0.3, hinge_weight=2.0, priors=PRIORS))
    # tau * rounding of the shifted scores moves the weights
    assert moved == pytest.approx(value, rel=1e-8, abs=1e-8)


def test_hkr_is_jointly_convex_in_scores_and_margin() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 2
    for _ in range(50):
        f, g = torch.randn(2, 8, generator=generator, dtype=torch.float64)
        m, n, t = torch.rand(3, generator=generator, dtype=torch.float64)

        def loss(scores: Tensor, margin: Tensor) -> Tensor:
            return hkr(scores, labels, margin=margin, hinge_weight=3.0, alpha=0.4)

        assert loss(t * f + (1 - t) * g, t * m + (1 - t) * n) <= t * loss(f, m) + (1 - t) * loss(g, n) + 1e-12
