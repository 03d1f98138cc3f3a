import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from otnn.metrics import block_mnist, box_regions, human_alignment, null_block_share, pointing_game, top_share
from tests.metrics import slow
from tests.metrics.networks import images, seeded


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0]))
def test_shares_equal_the_slow_ones(seed: int, share: float) -> None:
    maps, regions = images(3, 2, 6, 7, seed=seed) - 0.5, images(3, 6, 7, seed=seed + 1) > 0.6
    for metric in (top_share, null_block_share):
        expected = [slow.share_inside(m, r, share) for m, r in zip(maps, regions, strict=True)]
        assert metric(maps, regions, share=share).per_sample.tolist() == pytest.approx(expected)
    hits = [slow.share_inside(m, r, 1e-9) for m, r in zip(maps, regions, strict=True)]
    assert pointing_game(maps, regions).per_sample.tolist() == hits


def test_directions() -> None:
    maps, regions = images(2, 1, 4, 4), images(2, 4, 4) > 0.5
    assert top_share(maps, regions).direction == pointing_game(maps, regions).direction == "up"
    assert null_block_share(maps, regions).direction == "down"
    assert not pointing_game(maps, regions).signed


def test_a_negative_extreme_points_as_well() -> None:
    maps = torch.zeros(1, 1, 3, 3)
    maps[0, 0, 2, 1] = -5
    region = torch.zeros(1, 3, 3, dtype=torch.bool)
    region[0, 2, 1] = True
    assert pointing_game(maps, region).mean == 1


def test_constant_maps_point_at_random() -> None:
    flat, regions = torch.ones(1, 1, 10, 10), torch.zeros(1, 10, 10, dtype=torch.bool)
    regions[:, :5] = True
    hits = [pointing_game(flat, regions, generator=seeded(k)).mean for k in range(100)]
    assert 0.35 < sum(hits) / 100 < 0.65
    shares = [top_share(flat, regions, share=0.2, generator=seeded(k)).mean for k in range(100)]
    assert sum(shares) / 100 == pytest.approx(0.5, abs=0.05)
    assert shares[0] == top_share(flat, regions, share=0.2, generator=seeded(0)).mean
    assert top_share(flat, regions).undefined == 1
    broken = top_share(flat * torch.nan, regions)
    assert broken.per_sample.isnan().all()
    assert broken.undefined == 1


def test_boxes() -> None:
    regions = box_regions(torch.tensor([[1, 2, 4, 3], [-2, 0, 1, 9], [0.5, 0.0, 2.0, 1.0]]), (4, 5))
    assert regions[0].nonzero().tolist() == [[2, 1], [2, 2], [2, 3]]
    assert regions[1].nonzero().tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert regions[2].nonzero().tolist() == [[0, 1]]
    assert not box_regions(torch.zeros(1, 4), (4, 5)).any()  # no box


def test_a_sample_without_a_region_is_left_out() -> None:
    maps, regions = images(3, 1, 4, 4), images(3, 4, 4) > 0.5
    whole = top_share(maps, regions, share=0.3), pointing_game(maps, regions)
    regions[1] = False
    for result, all_of_them in zip(
        (top_share(maps, regions, share=0.3), pointing_game(maps, regions)), whole, strict=True
    ):
        kept = all_of_them.per_sample[::2]
        assert torch.equal(result.per_sample[::2], kept)
        assert result.per_sample[1].isnan()
        assert (result.mean, result.undefined) == (pytest.approx(float(kept.mean())), 1)
        assert "a sample without a region" in result.counted_as


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([(1, 28, 28), (3, 7, 5), (1, 2, 1)]))
def test_block_mnist_has_the_picture_in_one_half_and_the_same_block_in_the_other(
    seed: int, shape: tuple[int, ...]
) -> None:
    x, labels = images(12, *shape, seed=seed), torch.arange(12)
    blocks = block_mnist(x, labels, seeded(seed))
    height = shape[1]
    assert blocks.images.shape == (12, shape[0], 2 * height, shape[2])
    assert torch.equal(blocks.labels, labels)
    null_blocks = []
    for k in range(12):
        halves = blocks.images[k].split(height, dim=1)
        above = bool(blocks.null[k, 0, 0])
        assert torch.equal(blocks.null[k, :height], torch.full(shape[1:], above))
        assert torch.equal(blocks.null[k, height:], torch.full(shape[1:], not above))
        assert torch.equal(halves[above], x[k])
        null_blocks.append(halves[not above])
    assert all(torch.equal(block, null_blocks[0]) for block in null_blocks)
    assert set(null_blocks[0].flatten().tolist()) <= {0.0, 1.0}


def test_block_mnist_draws_the_places_by_the_seed() -> None:
    x, labels = images(400, 1, 8, 8), torch.zeros(400, dtype=torch.long)
    first, again, other = (block_mnist(x, labels, seeded(k)) for k in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.null, other.null)
    assert 0.4 < first.null[:, 0, 0].double().mean() < 0.6


def test_human_alignment_is_spearman_over_the_ceiling() -> None:
    maps, human = images(4, 3, 5, 6) - 0.5, images(4, 5, 6, seed=1)
    maps[2], human[3] = 0.25, 7
    result = human_alignment(maps, human)
    for k in range(2):
        rho = spearmanr(slow.flat(maps[k], signed=False), human[k].flatten()).statistic
        assert float(result.per_sample[k]) == pytest.approx(rho / 0.65753)
    assert result.per_sample[2:].tolist() == [0, 0]
    assert (result.undefined, result.counted_as) == (2, "0")
    human[0, 0, 0] = torch.nan
    assert human_alignment(maps, human).undefined == 3
