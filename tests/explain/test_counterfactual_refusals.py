"""What cannot be used is refused, and what goes wrong with one sample of a batch is told for that sample."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.explain import counterfactual
from otnn.models import Classifier
from otnn.potential import label_distances
from tests.explain.counterfactuals import ONE, assert_alike, images, three_classes
from tests.explain.nets import classifier, rows


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
