"""What holds for the counterfactuals of every network: the inequalities of the theory, bounds, chunks and precision."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from otnn.errors import InputError
from otnn.explain import counterfactual
from otnn.lipschitz import LipschitzBound, bound
from otnn.models import build, predict
from otnn.potential import pair_distances, pair_potential
from tests.explain.counterfactuals import CLOSE, ONE, assert_alike, images, three_classes
from tests.explain.nets import Counting, classifier


@settings(deadline=None, max_examples=25)
@example(3427, 2, 1, True)  # the seventh image is on the other side, the ones after it are not, and then the boundary
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 5]), st.sampled_from([1, 3]), st.booleans())
def test_what_holds_for_every_lipschitz_network(seed: int, classes: int, iterations: int, box: bool) -> None:
    """Theory, section 5.1: g(x) <= dist(x, boundary) <= t*, on random networks; and what is told can be recomputed."""
    torch.manual_seed(seed)
    model = build("dense", (1, 4, 4), classes, widths=(16, 16)).double().eval()
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    way = counterfactual(model, x, bound(model.body), iterations=iterations, box=box)
    found = torch.tensor([status == "ok" for status in way.status])
    assert torch.equal(torch.isfinite(way.boundary_distance), found)
    assert (way.pair_radius[found] <= way.boundary_distance[found] * (1 + 1e-9)).all()
    assert (way.boundary_distance[found] <= way.boundary_length[found] * (1 + 1e-9)).all()
    distances = pair_distances(model, bound(model.body))
    at = pair_potential(model(way.boundary[found]), way.prediction[found], way.target[found], distances)
    assert (at <= 1e-12).all()
    assert (at >= -1e-9).all()
    # path, scores and potential are those of the network, and the potential is 1-Lipschitz
    again = model(way.path.flatten(0, 1)).detach()
    assert torch.allclose(way.scores, again.view(6, 21, -1), **CLOSE)
    each = [sides.repeat_interleave(21) for sides in (way.prediction, way.target)]
    assert torch.allclose(way.potential, pair_potential(again, each[0], each[1], distances).view(6, 21), **CLOSE)
    moved = (way.path - x.unsqueeze(1)).flatten(2).norm(dim=2)
    assert torch.allclose(way.distances, moved, **CLOSE)
    assert (moved <= way.lengths * (1 + 1e-9) + 1e-12).all()
    drops = (way.potential[:, 1:] - way.potential[:, :-1]).abs()
    assert (drops <= (way.lengths[:, 1:] - way.lengths[:, :-1]) * (1 + 1e-9) + 1e-12).all()
    # a flip is a point of the path that is predicted as the target, and none of the images before it is
    hits = predict(again).view(6, 21) == way.target.unsqueeze(1)
    assert (way.flipped | ~hits.any(dim=1)).all()
    assert (~hits | (way.distances >= way.distance.unsqueeze(1) * (1 - 1e-9)) | (iterations > 1)).all()
    assert (way.distance[way.flipped] >= way.pair_radius[way.flipped] * (1 - 1e-9)).all()
    if box:
        assert ((way.path >= 0) & (way.path <= 1)).all()


@pytest.mark.parametrize("body", [None, LipschitzBound(math.inf, ())])
def test_without_a_bound_all_but_the_radius_is_there(body: LipschitzBound | None) -> None:
    torch.manual_seed(1)
    model = build("dense", (1, 4, 4), 3, widths=(16, 16), constrained=False).double().eval()
    x = torch.rand(30, 1, 4, 4, dtype=torch.float64)
    way, bounded = counterfactual(model, x, body), counterfactual(model, x, bound(model.body, (1, 4, 4)))
    assert way.radius_reason == "no bound"
    assert way.pair_radius.isnan().all()
    assert way.tightness.isnan().all()
    assert torch.equal(way.target, bounded.target)
    assert way.flipped.sum() >= 20
    for name in ("boundary", "one_step", "path", "scores", "distance", "boundary_distance"):
        assert torch.allclose(getattr(way, name), getattr(bounded, name), equal_nan=True, **CLOSE), name
    rows_ = torch.arange(30)
    scores = model(x).detach()
    assert torch.allclose(way.potential[:, 0], scores[rows_, way.prediction] - scores[rows_, way.target])


@pytest.mark.parametrize("looseness", [1.0, 1e4, 1e8])
def test_a_loose_bound_costs_no_boundary_and_few_passes(looseness: float) -> None:
    counting = Counting(nn.Identity())
    model = classifier(torch.tensor([[3.0, 0, 4.0, 0]]), torch.tensor([-3.0]), counting)
    x = images(10)
    counterfactual(model, x, ONE)  # measures the memory of a pass
    counting.forwards = 0
    way = counterfactual(model, x, LipschitzBound(looseness, ()))
    assert torch.allclose(way.boundary_distance, (model(x).detach().squeeze(1) / 5).abs(), **CLOSE)
    assert torch.allclose(way.tightness, torch.full((10,), 1 / looseness).double())
    assert counting.forwards <= 10 * (21 + 20)  # the path; the search


def test_chunks_change_nothing() -> None:
    torch.manual_seed(0)
    model = build("conv", (3, 8, 8), 4, widths=(4, 8, 8)).double().eval()
    x = torch.rand(12, 3, 8, 8, dtype=torch.float64)
    passes: list[int] = []
    handle = model.body.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    for settings_ in ({}, {"box": True, "iterations": 3}):
        whole = counterfactual(model, x, ONE, **settings_)  # type: ignore[arg-type]
        passes.clear()
        parts = counterfactual(model, x, ONE, memory_budget=50_000, **settings_)  # type: ignore[arg-type]
        assert max(passes) <= 5
        assert_alike(whole, parts)
    handle.remove()
    with pytest.raises(InputError, match="memory_budget: expected at least"):
        counterfactual(model, x, ONE, memory_budget=100)


def test_float32_finds_the_boundary_to_its_resolution() -> None:
    model = three_classes().float()
    x = images(20).float()
    way, exact = counterfactual(model, x, ONE), counterfactual(three_classes(), x.double(), ONE)
    assert way.path.dtype == way.boundary_distance.dtype == torch.float32
    assert torch.allclose(way.boundary_distance.double(), exact.boundary_distance, rtol=1e-5, atol=1e-5)
    assert set(way.status) == {"ok"}
