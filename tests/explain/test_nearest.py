import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otnn.errors import InputError
from otnn.explain import Neighbours, nearest


def slow(images: torch.Tensor, query: torch.Tensor, allowed: list[int], k: int) -> list[tuple[float, int]]:
    """One query, by the definition: sorted distances with their places."""
    found = sorted((math.dist(images[i].flatten().tolist(), query.flatten().tolist()), i) for i in allowed)[:k]
    return found + [(math.nan, -1)] * (k - len(found))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 15), st.sampled_from([None, 3]), st.sampled_from([1, 4])
)
def test_it_finds_what_the_definition_does(seed: int, count: int, k: int, classes: int | None, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, channels, 2, 3, generator=generator, dtype=torch.float64)
    queries = torch.rand(5, channels, 2, 3, generator=generator, dtype=torch.float64)
    labels = target = None
    if classes is not None:
        labels, target = (torch.randint(classes, (size,), generator=generator) for size in (count, 5))
    found = nearest(images, queries, labels, target, k=k)
    chunks = nearest(images, queries, labels, target, k=k, memory_budget=1.0)
    for q in range(5):
        every = range(count)
        allowed = [i for i in every if labels is None or target is None or labels[i] == target[q]]
        expected = slow(images, queries[q], allowed, k)
        assert found.index[q].tolist() == chunks.index[q].tolist() == [place for _, place in expected]
        assert found.distance[q].tolist() == pytest.approx([length for length, _ in expected], nan_ok=True)
        assert torch.allclose(found.distance, chunks.distance, equal_nan=True)


def test_an_image_among_the_queries_is_found_at_distance_zero_also_in_float32() -> None:
    images = torch.rand(2000, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = nearest(images, images[::97], k=2)
    assert found.index[:, 0].tolist() == list(range(0, 2000, 97))
    assert (found.distance[:, 0] == 0).all()
    exact = torch.cdist(images[::97].flatten(1).double(), images.flatten(1).double()).topk(2, largest=False)
    assert torch.equal(found.index[:, 1], exact.indices[:, 1])
    assert torch.allclose(found.distance[:, 1].double(), exact.values[:, 1], rtol=1e-6)


def test_a_query_that_is_not_finite_finds_nothing_and_spoils_no_other() -> None:
    images = torch.eye(4)
    queries = torch.cat([torch.full((1, 4), math.nan), images[2:3]])
    found = nearest(images, queries)
    assert isinstance(found, Neighbours)
    assert found.index.tolist() == [[-1], [2]]
    assert found.distance[0].isnan().all()
    assert nearest(images, queries[:0]).index.shape == (0, 1)
    absent = nearest(images, images, torch.zeros(4).long(), torch.tensor([0, 1, 7, 0]))
    assert absent.index.flatten().tolist() == [0, -1, -1, 3]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"queries": torch.rand(2, 3)}, r"expected the shape and dtype of the images, \(4,\)"),
        ({"queries": torch.rand(2, 4).double()}, r"got \(4,\) torch.float64"),
        ({"images": torch.rand(0, 4)}, "empty batch"),
        ({"images": torch.full((2, 4), math.nan)}, "images: sample 0 holds NaN"),
        ({"k": 0}, "at least 1 neighbour"),
        ({"labels": torch.zeros(5).long()}, "expected both"),
        ({"labels": torch.zeros(5).long(), "target": torch.zeros(3).long()}, r"one per sample, shape \(2,\)"),
        ({"labels": torch.zeros(3).long(), "target": torch.zeros(2).long()}, r"one per sample, shape \(5,\)"),
        ({"labels": torch.zeros(5).long(), "target": torch.tensor([0, -2])}, "expected integers in 0"),
    ],
)
def test_bad_input_says_what_was_expected(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        nearest(**{"images": torch.rand(5, 4), "queries": torch.rand(2, 4), **arguments})  # type: ignore[arg-type]
