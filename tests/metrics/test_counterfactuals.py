import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from otnn.certify import certify
from otnn.errors import InputError
from otnn.explain import Counterfactual, counterfactual
from otnn.lipschitz import LipschitzBound
from otnn.metrics import (
    concentration,
    data_distance,
    distance_over_radius,
    independent_score,
    tightness,
    validity,
)
from tests.explain.nets import classifier, rows

ONE = LipschitzBound(1.0, ())


def images(count: int, values: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 1, values, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_way(count: int = 12, **settings: object) -> Counterfactual:
    model = classifier(torch.tensor([[3.0, 0, 4.0, 0]]), torch.tensor([-3.0]))
    return counterfactual(model, images(count), ONE, **settings)  # type: ignore[arg-type]


def test_for_a_linear_model_every_figure_is_at_its_optimum() -> None:
    way = linear_way()
    assert validity(way).mean == 1
    assert distance_over_radius(way).per_sample.tolist() == pytest.approx([1.0] * 12)
    assert tightness(way).per_sample.tolist() == pytest.approx([1.0] * 12)
    arrows = [result.arrow for result in (validity(way), distance_over_radius(way), tightness(way))]
    assert arrows == ["↑", "↓", "↑"]
    model = classifier(torch.tensor([[3.0, 0, 4.0, 0]]), torch.tensor([-3.0]))
    radius = certify(model, images(12)).radius
    assert distance_over_radius(way, radius / 2).mean == pytest.approx(2.0)
    with pytest.raises(InputError, match=r"radius: expected shape \(12,\)"):
        distance_over_radius(way, radius[:3])


def test_failures_count_and_questions_that_were_not_asked_do_not() -> None:
    """Of five: flips; walls of the box before the flip; target = prediction; NaN; a tie."""
    model = classifier(torch.tensor([[1.0, 1.0]]), torch.tensor([-0.5]))
    x = rows([0.5, 0.5], [0.2, 0.2], [0.5, 0.5], [math.nan, 0.0], [0.25, 0.25])
    way = counterfactual(model, x, ONE, torch.tensor([0, 1, 1, 1, 1]))
    assert way.flipped.tolist() == [True, True, False, False, False]
    stopped = replace(way, flipped=way.flipped & torch.tensor([True, False, True, True, True]))
    result = validity(stopped)
    assert result.per_sample[:2].tolist() == [1, 0]
    assert result.per_sample[2:].isnan().all()
    assert (result.mean, result.undefined) == (0.5, 3)
    for metric in (distance_over_radius, tightness, concentration):
        assert metric(way).per_sample.isnan().tolist() == [False, False, True, True, True]


def test_without_a_bound_there_is_no_radius_to_compare_with() -> None:
    model = classifier(torch.tensor([[3.0, 0, 4.0, 0]]), torch.tensor([-3.0]))
    way = counterfactual(model, images(6), None)
    for metric in (distance_over_radius, tightness):
        result = metric(way)
        assert math.isnan(result.mean)
        assert (result.undefined, result.counted_as) == (6, "left out; no bound")
    assert validity(way).mean == 1
    assert validity(way).counted_as == "left out"


@pytest.mark.parametrize("point", ["boundary", "reflected"])
def test_data_distance_is_the_mean_over_the_nearest_of_the_target(point: str) -> None:
    way = linear_way()
    real, other = images(40, seed=1), images(30, seed=2)
    labels, classes = (torch.arange(len(each)) % 2 for each in (real, other))
    found = data_distance(way, real, labels, k=3, point=point, reference=(other, classes))  # type: ignore[arg-type]

    def mean_distance(query: Tensor, state: int) -> float:
        lengths = (real[labels == state] - query).flatten(1).norm(dim=1).sort().values
        return float(lengths[:3].mean())

    for k in range(12):
        state = int(way.target[k])
        own = mean_distance(getattr(way, point)[k], state)
        usual = [mean_distance(one, state) for one in other[classes == state]]
        assert float(found.details["distance"][k]) == pytest.approx(own)
        assert float(found.per_sample[k]) == pytest.approx(own / (sum(usual) / len(usual)))
    alone = data_distance(way, real, labels, k=3, point=point)  # type: ignore[arg-type]
    assert torch.allclose(alone.per_sample, found.details["distance"])


def test_data_distance_leaves_out_classes_with_too_few_images() -> None:
    way, real = linear_way(), images(10, seed=1)
    labels = torch.tensor([1] * 8 + [0] * 2)
    found = data_distance(way, real, labels, k=3)
    assert torch.equal(found.per_sample.isnan(), way.target == 0)
    none = data_distance(way, real, labels, k=3, reference=(real[:3] + 0.01, labels[:3] * 0))
    assert none.per_sample.isnan().all()
    with pytest.raises(InputError, match=r"labels: expected shape \(m,\)"):
        data_distance(way, real, labels.unsqueeze(1))


def test_with_several_labels_each_counterfactual_is_held_against_images_of_its_label() -> None:
    model = classifier(torch.eye(3), torch.full((3,), -0.5), multilabel=True)
    way = counterfactual(model, images(20, 3), ONE)
    real = images(50, 3, seed=1)
    labels = (real.flatten(1) > 0.5).long()
    found = data_distance(way, real, labels, k=1)
    assert way.label is not None
    for k in range(20):
        own = real[labels[:, way.label[k]] == way.target[k]]
        lengths = (own - way.reflected[k]).flatten(1).norm(dim=1)
        assert float(found.per_sample[k]) == pytest.approx(float(lengths.min()))
    assert independent_score(way, model).mean == 1
    inverted = classifier(-torch.eye(3), torch.full((3,), 0.5), multilabel=True)
    assert independent_score(way, inverted).mean == 0


def test_an_independent_classifier_judges_the_images_as_they_are_shown() -> None:
    way = linear_way()
    seen: list[Tensor] = []

    def classify(batch: Tensor) -> Tensor:
        seen.append(batch)
        return torch.stack([torch.zeros(len(batch)), torch.full((len(batch),), math.log(3.0))], dim=1)  # always 1

    result = independent_score(way, classify, memory_budget=3 * 4 * 8 * 32)
    assert torch.equal(result.per_sample, (way.target == 1).double())
    expected = torch.where(way.target == 1, 0.75, 0.25).double()
    assert torch.allclose(result.details["probability"].double(), expected)
    assert torch.allclose(torch.cat(seen), way.reflected.clamp(0, 1))
    assert result.forwards == 12
    # in a tie the target is not seen
    assert independent_score(way, lambda batch: torch.zeros(len(batch), 2)).mean == 0
    with pytest.raises(InputError, match=r"classify: expected scores \(\d+, outputs\)"):
        independent_score(way, lambda batch: torch.zeros(len(batch)))
    with pytest.raises(InputError, match='expected "boundary" or "reflected"'):
        independent_score(way, classify, point="middle")  # type: ignore[arg-type]


def test_concentration_has_closed_forms() -> None:
    way = linear_way(4)

    def changed(change: Tensor) -> Counterfactual:
        return replace(way, path=(way.inputs + change).unsqueeze(1), potential=torch.ones(4, 1))

    spike = torch.zeros(4, 1, 1, 4).double()
    spike[..., 2] = -0.3
    assert concentration(changed(spike), share=0.25).per_sample.tolist() == pytest.approx([1.0] * 4)
    flat = torch.full((4, 1, 1, 4), 0.1).double()
    for share in (0.25, 0.5, 1.0):
        assert concentration(changed(flat), share=share).mean == pytest.approx(math.sqrt(share))
    assert concentration(changed(spike * 0)).per_sample.isnan().all()
    ramp = torch.tensor([1.0, -2.0, 3.0, -4.0]).double().expand(4, 1, 1, 4)
    assert concentration(changed(ramp), share=0.5).mean == pytest.approx(math.sqrt(25 / 30))
    # along the weights (3, 0, 4, 0) of the model
    assert concentration(way, share=0.25, point="boundary").mean == pytest.approx(0.8)
    with pytest.raises(InputError, match=r"share of the pixels in \(0, 1\]"):
        concentration(way, share=0.0)


def test_pixels_of_a_colour_image_count_with_all_channels() -> None:
    way = linear_way(2)
    inputs = torch.rand(2, 3, 2, 2).double()
    change = torch.zeros(2, 3, 2, 2).double()
    change[:, :, 0, 0] = torch.tensor([0.1, 0.2, 0.2])  # norm 0.3
    change[:, 1, 1, 1] = 0.4
    coloured = replace(way, inputs=inputs, path=(inputs + change).unsqueeze(1), potential=torch.ones(2, 1))
    assert concentration(coloured, share=0.25).mean == pytest.approx(0.8)
    assert concentration(coloured, share=0.5).mean == pytest.approx(1.0)
