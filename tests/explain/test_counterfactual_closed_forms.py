"""Counterfactuals that have a closed form: hyperplanes, a corner, the walls of the pixel box, one of several labels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from otnn.certify import certify
from otnn.explain import counterfactual
from otnn.models import Classifier, predict
from otnn.nn import MaxMin
from tests.explain.counterfactuals import CLOSE, ONE, assert_alike, images, three_classes
from tests.explain.nets import classifier, rows


def corner() -> Classifier:
    """g = max(x_0 - 1/2, x_1 - 1/2), by a sorting layer: gradient norm 1 everywhere, the boundary is a corner."""
    shift = nn.Linear(2, 2).double()
    shift.weight.data, shift.bias.data = torch.eye(2).double(), torch.full((2,), -0.5).double()
    return classifier(torch.tensor([[1.0, 0.0]]), torch.zeros(1), nn.Sequential(shift, MaxMin()))


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
