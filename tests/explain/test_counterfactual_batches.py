"""What one sample of a batch does to the others, and what is told of it: targets, ties, dips, real images."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.explain import counterfactual, nearest
from otnn.lipschitz import LipschitzBound
from otnn.metrics import validity
from otnn.models import Classifier
from tests.explain.counterfactuals import ONE, assert_alike, images, three_classes
from tests.explain.nets import classifier, rows

UNKNOWN = "no target is known: -1 was given"


def test_a_sample_without_a_target_spoils_no_other() -> None:
    model, x = three_classes(), images(6)
    every = counterfactual(model, x, ONE)
    way = counterfactual(model, x, ONE, every.target.index_fill(0, torch.tensor([1, 4]), -1))
    assert [k for k in range(6) if way.status[k] == UNKNOWN] == [1, 4]
    assert way.target[[1, 4]].tolist() == [-1, -1]
    assert torch.equal(way.prediction, every.prediction)
    for name in ("pair_radius", "path", "potential", "boundary", "distance", "one_step", "tightness"):
        assert getattr(way, name)[[1, 4]].isnan().all(), name
    assert not way.flipped[[1, 4]].any()
    assert validity(way).undefined == 2
    rest = [0, 2, 3, 5]
    assert [way.status[k] for k in rest] == [every.status[k] for k in rest]
    for name in ("boundary", "distance", "path", "potential", "tightness"):
        assert torch.equal(getattr(way, name)[rest], getattr(every, name)[rest]), name


def test_targets_go_from_one_network_to_another_with_an_unreadable_sample() -> None:
    x = images(4)
    x[2] = torch.nan
    first = counterfactual(three_classes(), x, ONE)
    assert first.target[2] == -1
    again = counterfactual(three_classes(), x, ONE, first.target)
    assert_alike(first, again)
    assert again.status[2] == "the input holds NaN or infinite values"


def test_a_label_without_a_wanted_state_stands_still() -> None:
    model = classifier(torch.eye(3), torch.full((3,), -0.5), multilabel=True)
    way = counterfactual(model, rows([0.9, 0.1, 0.8], [0.7, 0.4, 0.1]), ONE, torch.tensor([-1, 0]), label=0)
    assert way.status == (UNKNOWN, "ok")
    assert way.target.tolist() == [-1, 0]
    assert float(way.boundary_distance[1]) == pytest.approx(0.2)


def test_one_target_for_all_is_one_for_each() -> None:
    x = images(10)
    assert_alike(
        counterfactual(three_classes(), x, ONE, 2), counterfactual(three_classes(), x, ONE, torch.full((10,), 2))
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m, x: counterfactual(m, x.numpy(), ONE), "inputs: expected a tensor, got ndarray"),
        (lambda m, x: counterfactual(m, x, ONE, np.array([0, 1])), "target: expected an integer.*got ndarray"),
        (lambda m, x: counterfactual(m, x, ONE, 3), r"expected integers in 0\.\.2"),
        (lambda m, x: counterfactual(m, x, ONE, -1), r"expected integers in 0\.\.2"),
        (lambda m, x: counterfactual(m, x, ONE, torch.tensor([0, -2])), r"expected integers in 0\.\.2"),
        (lambda m, x: counterfactual(m, x, ONE, torch.tensor([True, False])), "expected integers, got"),
    ],
)
def test_bad_input_says_what_was_expected(change: Callable[[Classifier, Tensor], object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        change(three_classes(), images(2))


@pytest.mark.parametrize("body", [ONE, LipschitzBound(3.0, ())])
def test_a_tie_that_no_input_changes_has_radius_zero(body: LipschitzBound) -> None:
    """Equal rows: the pair is even everywhere where the biases are equal too, and nowhere where they are not."""
    x = rows([0.1, 0.2, 0.3])
    for bias, radius in ((0.5, 0.0), (0.25, math.inf)):
        pair = classifier(torch.ones(2, 3), torch.tensor([0.5, bias]))
        assert counterfactual(pair, x, body, 1).pair_radius.tolist() == [radius]
        label = classifier(torch.zeros(1, 3), torch.tensor([0.5 - bias]), multilabel=True)
        assert counterfactual(label, x, body).pair_radius.tolist() == [math.inf if 0.5 - bias else 0.0]
        one = classifier(torch.zeros(1, 3), torch.tensor([0.5 - bias]))
        assert counterfactual(one, x, body).pair_radius.tolist() == [math.inf if 0.5 - bias else 0.0]


def test_real_images_near_a_path_where_one_sample_is_not_read() -> None:
    x, real = images(4), images(30, seed=1)
    labels = torch.arange(30) % 3
    whole = counterfactual(three_classes(), x, ONE)
    x[1] = torch.nan
    way = counterfactual(three_classes(), x, ONE)
    kept = torch.tensor([0, 2, 3])

    def found(each: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        near = nearest(real, each.flatten(0, 1), labels, target.repeat_interleave(21), k=3)
        return near.index.view(-1, 21, 3), near.distance.view(-1, 21, 3)

    index, distance = found(way.path, way.target)
    assert (index[1] == -1).all()
    assert distance[1].isnan().all()
    alone = found(whole.path[kept], whole.target[kept])
    assert torch.equal(index[kept], alone[0])
    assert torch.allclose(distance[kept], alone[1])
    # also where the query could be read and only the target is not known
    near = nearest(real, real[:2], labels, torch.tensor([-1, 1]))
    assert near.index.flatten().tolist() == [-1, 1]
    assert near.distance.flatten().isnan().tolist() == [True, False]
    assert nearest(real, real[:2], labels, torch.tensor([-1, -1])).index.tolist() == [[-1], [-1]]


class Dip(nn.Module):
    """|x_0| + 0.01, and a dip below 0 of half-width 1/400 around x_0 = -0.41."""

    def forward(self, inputs: Tensor) -> Tensor:
        first = inputs.flatten(1)[:, :1]
        return torch.minimum(first.abs() + 0.01, 20 * (first + 0.41).abs() - 0.05)


def test_an_image_in_a_dip_between_the_lengths_tried_is_a_flip_without_a_boundary() -> None:
    """From 0.49 the images stand 0.1 apart up to 1, twice the estimate 0.5: the one at 0.9 is in the dip."""
    model = classifier(torch.ones(1, 1), torch.zeros(1), Dip())
    way = counterfactual(model, rows([0.49]), None, steps=11)
    assert way.status == ("no change of sign at the lengths tried, up to the diameter of the pixel box",)
    assert way.boundary_distance.isnan().all()
    assert way.flipped.all()
    assert float(way.distance) == pytest.approx(0.9 - 0.05 / 20)
    assert not counterfactual(model, rows([0.49]), None, steps=6).flipped.any()
