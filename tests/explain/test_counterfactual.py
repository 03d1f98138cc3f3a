import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.certify import certify
from otnn.errors import InputError
from otnn.explain import Counterfactual, counterfactual
from otnn.lipschitz import LipschitzBound, bound
from otnn.models import Classifier, build, predict
from otnn.nn import MaxMin
from otnn.potential import label_distances, pair_distances, pair_potential
from tests.explain.nets import Counting, classifier, rows

ONE = LipschitzBound(1.0, ())
SAMPLE_FIELDS = [field.name for field in fields(Counterfactual) if field.name not in ("label", "radius_reason")]
# Where numbers that were refined in float64 agree
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def images(count: int, values: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 1, values, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three_classes() -> Classifier:
    weight = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0.5, 0.5, 1.0, -1.0]])
    return classifier(weight, torch.tensor([0.1, -0.2, 0.0]))


def corner() -> Classifier:
    """g = max(x_0 - 1/2, x_1 - 1/2), by a sorting layer: gradient norm 1 everywhere, the boundary is a corner."""
    shift = nn.Linear(2, 2).double()
    shift.weight.data, shift.bias.data = torch.eye(2).double(), torch.full((2,), -0.5).double()
    return classifier(torch.tensor([[1.0, 0.0]]), torch.zeros(1), nn.Sequential(shift, MaxMin()))


def assert_alike(first: Counterfactual, second: Counterfactual, samples: Any = slice(None)) -> None:
    """Two results, the first on all samples and the second on some, agree in every field."""
    for name in SAMPLE_FIELDS:
        one, other = getattr(first, name), getattr(second, name)
        if name == "status":
            assert [one[k] for k in range(len(one))][samples] == list(other)
        else:
            assert torch.allclose(one[samples].double(), other.double(), equal_nan=True, **CLOSE), name


def test_on_a_linear_classifier_everything_is_exact() -> None:
    """The boundary of two classes is a hyperplane: distance, nearest point and mirror image have closed forms."""
    model, x = three_classes(), images(40)
    way = counterfactual(model, x, ONE)
    scores = model(x).detach()
    w, b = model.head.weight.detach(), model.head.bias.detach()
    for k in range(len(x)):
        t = int(scores[k].argmax())
        candidates = {j: float((scores[k, t] - scores[k, j]) / (w[t] - w[j]).norm()) for j in range(3) if j != t}
        j = min(candidates, key=candidates.__getitem__)
        normal = (w[t] - w[j]) / (w[t] - w[j]).norm()
        nearest = x[k].flatten() - candidates[j] * normal
        assert (int(way.prediction[k]), int(way.target[k])) == (t, j)
        assert float(way.pair_radius[k]) == pytest.approx(candidates[j])
        assert torch.allclose(way.one_step[k].flatten(), nearest)
        assert torch.allclose(way.boundary[k].flatten(), nearest, atol=1e-9)
        assert float((w[t] - w[j]) @ nearest + b[t] - b[j]) == pytest.approx(0, abs=1e-12)
        assert torch.allclose(way.reflected[k].flatten(), x[k].flatten() - 2 * candidates[j] * normal, atol=1e-9)
        assert float(way.potential[k, -1]) == pytest.approx(-candidates[j], rel=1e-6)
    assert torch.allclose(way.tightness, torch.ones(40, dtype=torch.float64), atol=1e-9)
    assert (way.tightness <= 1 + 1e-12).all()
    assert set(way.status) == {"ok"}
    assert torch.allclose(way.distances, way.lengths)
    assert torch.equal(way.lengths[:, -1], 2 * way.boundary_length)
    assert torch.allclose(way.boundary_length, way.boundary_distance)
    assert way.radius_reason == ""
    assert torch.equal(way.price, torch.ones(40, dtype=torch.float64))


def test_one_output_goes_both_ways() -> None:
    model, x = classifier(torch.tensor([[3.0, 0, 4.0, 0]]), torch.tensor([-3.0])), images(20)
    way = counterfactual(model, x, ONE)
    z = model(x).detach().squeeze(1)
    assert set((z > 0).tolist()) == {True, False}
    assert torch.equal(way.prediction, (z > 0).long())
    assert torch.equal(way.target, 1 - way.prediction)
    assert torch.allclose(way.pair_radius, z.abs() / 5)
    assert torch.allclose(way.scores[:, -1, 0], -z)
    assert way.flipped.all()
    assert torch.allclose(way.distance, z.abs() / 5)
    assert torch.allclose(way.pair_radius, certify(model, x).radius)


def test_a_chosen_target_is_reached_where_a_third_class_stands_between() -> None:
    """Every score is linear along the path, so the length at which the target takes the lead has a closed form."""
    model, x, target = three_classes(), images(60, seed=1), torch.full((60,), 2)
    way = counterfactual(model, x, ONE, target, steps=41)
    ok = torch.tensor([status == "ok" for status in way.status])
    assert torch.equal(ok, way.prediction != 2)
    assert {way.status[k] for k in range(60) if not ok[k]} == {"the target is the predicted class already"}
    for name in ("boundary_distance", "distance", "tightness"):
        assert getattr(way, name)[~ok].isnan().all()
    assert not way.flipped[~ok].any()
    w, scores = model.head.weight.detach(), model(x).detach()
    later = 0
    for k in ok.nonzero().squeeze(1).tolist():
        own = int(way.prediction[k])
        unit = (w[own] - w[2]) / (w[own] - w[2]).norm()
        at = model(way.boundary[k : k + 1]).detach()[0]
        assert float(at[own]) == pytest.approx(float(at[2]), abs=1e-9)
        # z_2 - z_j grows by (w_j - w_2) . unit per length
        needed = []
        for j in (0, 1):
            gain = float((w[j] - w[2]) @ unit)
            behind = float(scores[k, j] - scores[k, 2])
            needed.append(behind / gain if gain > 0 else (math.inf if behind > 0 else 0.0))
        first = max(needed)
        if first <= float(way.lengths[k, -1]):
            later += first > float(way.boundary_length[k]) * (1 + 1e-9)
            assert float(way.distance[k]) == pytest.approx(first, rel=1e-9)
            assert way.flipped[k]
        else:
            assert not way.flipped[k]
            assert way.distance[k].isnan()
    assert later >= 3  # another class does come between


def test_a_sorting_network_whose_potential_is_the_distance_is_exact() -> None:
    """Outside the corner's shadow |g| is the distance to the boundary, as at the optimum of the loss."""
    x = rows([0.1, 0.3], [0.3, 0.1], [0.45, 0.2], [0.9, 0.2], [0.3, 0.6])
    way = counterfactual(corner(), x, ONE)
    expected = torch.tensor([0.2, 0.2, 0.05, 0.4, 0.1]).double()
    assert torch.allclose(way.boundary_distance, expected)
    assert torch.allclose(way.tightness, torch.ones(5).double())
    landing = rows([0.1, 0.5], [0.5, 0.1], [0.5, 0.2], [0.5, 0.2], [0.3, 0.5])
    assert torch.allclose(way.one_step, landing)
    assert torch.allclose(way.boundary, landing)
    assert way.flipped.all()


def test_the_corner_is_rounded_by_new_gradients_only() -> None:
    """From (1/2 + a, 1/2 + b), a > b > 0, the straight ray stays positive; two steps take a, then b."""
    x = rows([0.8, 0.6], [0.7, 0.9])
    straight = counterfactual(corner(), x, ONE)
    assert all(status.startswith("no change of sign at the lengths tried") for status in straight.status)
    assert not straight.flipped.any()
    assert straight.boundary.isnan().all()
    way = counterfactual(corner(), x, ONE, iterations=2, steps=101)
    assert way.status == ("ok", "ok")
    assert torch.allclose(way.boundary, rows([0.5, 0.5], [0.5, 0.5]))
    length, distance = torch.tensor([0.4, 0.6]).double(), torch.tensor([0.1, 0.2]).double().sqrt()
    assert torch.allclose(way.boundary_length, length)
    assert torch.allclose(way.boundary_distance, distance)
    # beyond the corner again two steps, each as long as the potential was
    assert torch.allclose(way.reflected, rows([0.2, 0.2], [0.1, 0.1]))
    assert torch.allclose(way.potential[:, -1], -way.potential[:, 0])
    assert torch.allclose(way.lengths[:, -1], torch.tensor([0.4 + 0.6, 0.6 + 0.8]).double())
    # the path is a polyline of that length, and its images turn where it does
    steps = (way.path[:, 1:] - way.path[:, :-1]).flatten(2).norm(dim=2)
    assert (steps <= way.lengths[:, 1:] - way.lengths[:, :-1] + 1e-12).all()
    assert torch.allclose(steps.sum(dim=1), way.lengths[:, -1], atol=0.02)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 5), st.booleans())
def test_iterations_change_nothing_for_a_linear_model(seed: int, iterations: int, bounded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = classifier(torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator) / 4)
    x, body = images(5, seed=seed), ONE if bounded else None
    straight, turning = (counterfactual(model, x, body, iterations=k) for k in (1, iterations))
    assert_alike(straight, turning)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_the_price_of_the_box_for_a_linear_model(seed: int) -> None:
    """The clamped path has a closed form in each value, and on a half-space leaving the box is never longer."""
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(6, generator=generator).double(), images(4, 6, seed=seed)
    bias = -0.5 * w.sum() + 0.5 * w.abs().sum() * torch.rand(1, generator=generator).double()
    model = classifier(w.view(1, -1), bias)
    way = counterfactual(model, x, ONE, box=True)
    assert ((way.path >= 0) & (way.path <= 1)).all()
    unit = w / w.norm()
    for k in range(4):
        sign = 2 * int(way.prediction[k]) - 1
        # the corner of the box that is farthest along the path decides whether the sign can change
        end = torch.where(sign * unit > 0, 0.0, 1.0).double()
        if sign * float(w @ end + bias) >= 0:
            assert way.status[k] == "the path came to rest at the walls of the pixel box before the sign changed"
            assert not way.flipped[k]
            assert way.price[k].isnan()
            continue
        assert way.status[k] == "ok"
        length = float(way.boundary_length[k])
        point = (x[k].flatten() - sign * length * unit).clamp(0, 1)
        assert torch.allclose(way.boundary[k].flatten(), point)
        assert float(w @ point + bias) == pytest.approx(0, abs=1e-9)
        assert float(way.boundary_distance[k]) == pytest.approx(float((point - x[k].flatten()).norm()))
        assert float(way.unconstrained_distance[k]) == pytest.approx(float(way.pair_radius[k]))
        assert float(way.price[k]) >= 1 - 1e-9
        free = x[k].flatten() - sign * length * unit
        assert float(way.outside[k]) == pytest.approx(float(((free < 0) | (free > 1)).double().mean()))
        if float(way.outside[k]) == 0:
            assert float(way.price[k]) == pytest.approx(1)


def test_the_price_of_the_box_near_its_edge() -> None:
    """Down to x_0 + x_1 = 1/4 from (0.1, 0.5): free (-0.075, 0.325); in the box x_0 stops at 0, x_1 goes on to 1/4."""
    model = classifier(torch.tensor([[1.0, 1.0]]), torch.tensor([-0.25]))
    way = counterfactual(model, rows([0.1, 0.5]), ONE, box=True)
    assert torch.allclose(way.boundary, rows([0.0, 0.25]), **CLOSE)
    assert float(way.boundary_distance) == pytest.approx(math.sqrt(0.0725))
    assert float(way.boundary_length) == pytest.approx(0.25 * math.sqrt(2))
    assert float(way.unconstrained_distance) == pytest.approx(0.175 * math.sqrt(2))
    assert float(way.price) == pytest.approx(math.sqrt(0.0725 / 0.06125))
    assert float(way.outside) == 0.5
    assert float(way.tightness) == pytest.approx(math.sqrt(0.06125 / 0.0725))
    free = counterfactual(model, rows([0.1, 0.5]), ONE)
    assert torch.allclose(free.boundary, rows([-0.075, 0.325]), **CLOSE)
    assert (float(free.price), float(free.outside)) == (1.0, 0.5)


def test_one_label_is_flipped_and_its_own_potential_counts() -> None:
    weight = torch.tensor([[3.0, 4.0, 0, 0], [0, 0, 1.0, 0], [1.0, 0, 0, -1.0]])
    model = classifier(weight, torch.tensor([-3.0, -0.6, 0.1]), multilabel=True)
    x = images(30)
    z = model(x).detach()
    radii = z.abs() / weight.double().norm(dim=1)
    way = counterfactual(model, x, ONE)
    assert way.label is not None
    assert torch.equal(way.label, radii.argmin(dim=1))
    assert len(way.label.unique()) == 3
    assert torch.allclose(way.pair_radius, radii.min(dim=1).values)
    assert torch.allclose(way.boundary_distance, way.pair_radius)
    assert torch.allclose(way.pair_radius, certify(model, x).radius.min(dim=1).values)
    before, after = (predict(each, multilabel=True) for each in (z, way.scores[:, -1]))
    assert torch.equal(way.prediction, before.gather(1, way.label.unsqueeze(1)).squeeze(1))
    assert torch.equal(way.target, 1 - way.prediction)
    assert torch.equal(after.gather(1, way.label.unsqueeze(1)).squeeze(1), way.target)
    assert way.flipped.all()
    assert torch.allclose(way.scores, model(way.path.flatten(0, 1)).detach().view(30, 21, 3))
    # a label for all, and the state that it shall have
    chosen = counterfactual(model, x, ONE, torch.ones(30).long(), label=1)
    assert torch.allclose(chosen.pair_radius[z[:, 1] <= 0], radii[z[:, 1] <= 0, 1])
    already = torch.tensor([status == "the target is the predicted class already" for status in chosen.status])
    assert torch.equal(already, z[:, 1] > 0)
    assert torch.equal(chosen.flipped, ~already)


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


class Peculiar(nn.Module):
    """Feature of the first value: flat below 1/4, |x - 1/2| above, not a number at 0."""

    def forward(self, inputs: Tensor) -> Tensor:
        first = inputs.flatten(1)[:, :1]
        bump = torch.where(first < 0.25, torch.full_like(first, 0.25), (first - 0.5).abs())
        return torch.where(first == 0, torch.nan, bump)


def peculiar(bias: float = 0.0) -> Classifier:
    head = nn.Linear(1, 1).double()
    head.weight.data, head.bias.data = torch.ones(1, 1).double(), torch.full((1,), bias).double()
    return Classifier(nn.Sequential(Peculiar()), head, (1, 1, 2)).eval()


def test_every_trouble_is_told_for_its_sample_and_spoils_no_other() -> None:
    x = rows(*([first, 0.5] for first in (math.nan, 1.5, 0.0, 0.5, 0.1, 0.9, 0.3, math.inf)))
    way = counterfactual(peculiar(), x, ONE)
    assert way.status == (
        "the input holds NaN or infinite values",
        "the input holds values outside [0, 1]: rescale it (8-bit images are divided by 255)",
        "a score is not finite",
        "a tie: the pair potential is 0",
        "the gradient is zero or not finite: no direction",
        "no change of sign at the lengths tried, up to the diameter of the pixel box",
        "no change of sign at the lengths tried, up to the diameter of the pixel box",
        "the input holds NaN or infinite values",
    )
    unknown = torch.tensor([True, True, True, False, False, False, False, True])
    assert (way.prediction[unknown] == -1).all()
    for name in ("pair_radius", "path", "scores", "potential", "lengths", "one_step"):
        assert getattr(way, name)[unknown].isnan().flatten(1 - int(name == "pair_radius")).all(), name
    assert torch.isfinite(way.path[~unknown]).all()
    assert (way.lengths[3:5] == 0).all()  # they stand still
    assert torch.allclose(way.pair_radius[3:7], torch.tensor([0.0, 0.25, 0.4, 0.2]).double())
    assert not way.flipped.any()
    # |x - 1/2| - 0.1 changes its sign where it should, whatever the neighbours in the batch are
    way = counterfactual(peculiar(-0.1), x, ONE)
    assert [way.status[k] for k in (5, 6)] == ["ok", "ok"]
    assert torch.allclose(way.boundary_distance[5:7], torch.tensor([0.3, 0.1]).double())
    assert_alike(way, counterfactual(peculiar(-0.1), x[5:7], ONE), slice(5, 7))
    assert_alike(way, counterfactual(peculiar(-0.1), x[:1], ONE), slice(0, 1))


def test_a_gradient_that_vanishes_on_the_way_is_told() -> None:
    """From 0.3 the first step of 0.2 + 0.1 ends below 1/4, where nothing changes any more."""
    model = peculiar()
    model.head.weight.data.neg_()
    model.head.bias.data += 0.55  # g = 0.55 - |x - 1/2|, and 0.3 on the plateau
    way = counterfactual(model, rows([0.3, 0.5]), ONE, iterations=3)
    assert way.status == ("the gradient became zero on the way",)
    assert not way.flipped.any()
    assert torch.isfinite(way.path).all()


def test_equal_rows_of_the_head_have_an_infinite_radius() -> None:
    model = classifier(torch.ones(2, 3), torch.tensor([0.5, 0.0]))
    way = counterfactual(model, rows([0.1, 0.2, 0.3]), ONE, torch.tensor([1]))
    assert way.pair_radius.isinf().all()
    assert way.status == ("the gradient is zero or not finite: no direction",)


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


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m, x: counterfactual(m, x[:0], ONE), "empty batch"),
        (lambda m, x: counterfactual(m, x[0, 0, 0], ONE), "add a batch dimension"),
        (lambda m, x: counterfactual(m, x[..., :3], ONE), r"expected images of shape \(1, 1, 4\)"),
        (lambda m, x: counterfactual(m, (x * 255).byte(), ONE), "divide 8-bit images by 255"),
        (lambda m, x: counterfactual(m, x.float(), ONE), "expected torch.float64 as the weights of the model"),
        (lambda m, x: counterfactual(m, x, ONE, torch.tensor([3, 0])), r"integers in 0..2, got 0..3"),
        (lambda m, x: counterfactual(m, x, ONE, torch.tensor([1])), r"one per sample, shape \(2,\)"),
        (lambda m, x: counterfactual(m, x, ONE, steps=1), "at least 2 images"),
        (lambda m, x: counterfactual(m, x, ONE, iterations=0), "at least 1 evaluation of the gradient"),
        (lambda m, x: counterfactual(m, x, ONE, label=1), "this model decides between classes"),
        (lambda m, x: counterfactual(m.train(), x, ONE), "training mode"),
    ],
)
def test_bad_input_says_what_was_expected(change: Callable[[Classifier, Tensor], object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        change(three_classes(), images(2))


def test_labels_are_checked() -> None:
    model = classifier(torch.eye(3), torch.full((3,), -0.5), multilabel=True)
    for label in (3, torch.tensor([0, 3])):
        with pytest.raises(InputError, match=r"expected integers in 0\.\.2"):
            counterfactual(model, images(2, 3), ONE, label=label)
    with pytest.raises(InputError, match=r"expected integers in 0\.\.1"):
        counterfactual(model, images(2, 3), ONE, torch.tensor([0, 2]))
    assert torch.allclose(label_distances(model, ONE), torch.ones(3).double())
