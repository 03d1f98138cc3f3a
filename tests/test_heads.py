"""Networks of every activation and head: certificates divide by the true distances of the rows."""

import itertools

import pytest
import torch
from torch import nn

from otnn.certify import certify
from otnn.errors import InputError
from otnn.lipschitz import bound, export
from otnn.manifold import constrained_parameters
from otnn.models import ACTIVATIONS, HEADS, Classifier, build
from otnn.nn import Abs, Centering, FullSort, GroupSort, Householder, MaxMin, OrthoLinear
from otnn.potential import pair_distances
from tests.test_radius import worst_margin

SHAPE = (1, 3, 4)


@pytest.mark.parametrize("classes", [2, 5, 20])  # 20 classes are more than the features
@pytest.mark.parametrize("head", HEADS)
def test_behind_an_isometry_the_radius_is_the_distance_to_the_boundary(head: str, classes: int) -> None:
    outputs = 1 if classes == 2 else classes
    body = nn.Sequential(Centering(torch.tensor([0.5])), nn.Flatten(), OrthoLinear(12, 12))
    model = Classifier(body, HEADS[head](12, outputs), SHAPE)
    model = model.double().eval().requires_grad_(False)
    x = 0.5 + 0.05 * torch.randn(30, *SHAPE, dtype=torch.float64)  # the ways to the boundary stay in the box
    found, scores, weight = certify(model, x), model(x), model.head.weight
    if outputs == 1:
        expected = scores[:, 0].abs() / weight.norm()
        normal = -scores.sign() * weight / weight.norm()
    else:
        top = scores.argmax(dim=1)
        gaps = (scores.gather(1, top[:, None]) - scores) / torch.cdist(weight[top], weight)
        expected, rival = gaps.scatter(1, top[:, None], torch.inf).min(dim=1)
        normal = nn.functional.normalize(weight[rival] - weight[top], dim=1)
    assert torch.allclose(found.radius, expected, rtol=1e-5, atol=1e-9)
    assert bool((found.radius <= expected).all())
    # the way that is shortest in features is as short in images
    for factor, same in ((0.9999, True), (1.0001, False)):
        moved = x + (factor * found.radius[:, None] * (normal @ model.body[2].weight)).view_as(x)
        assert bool(((certify(model, moved).prediction == found.prediction) == same).all())


@pytest.mark.parametrize(("activation", "head"), list(itertools.product(ACTIVATIONS, HEADS)))
def test_no_adversarial_point_lies_within_the_radius(activation: str, head: str) -> None:
    model = build("dense", SHAPE, 4, widths=(16, 8), activation=activation, head=head).eval()
    for layer in model.modules():
        if isinstance(layer, Householder):
            nn.init.uniform_(layer.angle, -3, 3)
    x = torch.rand(20, *SHAPE)
    for arithmetic in ("real", "float32"):
        found = certify(model, x, arithmetic=arithmetic)
        assert float(found.radius.min()) > 0
        assert worst_margin(model, x, found.prediction, found.radius, 20).max() < 0


def test_orthogonal_rows_are_all_as_far_apart() -> None:
    model = build("dense", SHAPE, 5, widths=(8,), head="orthogonal").eval()
    distances = pair_distances(model, bound(model.body))
    apart = distances[~torch.eye(5, dtype=torch.bool)]
    assert torch.allclose(apart, torch.full_like(apart, 2**0.5), rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ["dense", "conv"])
def test_built_networks_have_the_head_and_export_it(head: str, architecture: str) -> None:
    model = build(architecture, (1, 8, 8), 6, widths=(8, 8), head=head).eval()
    assert type(model.head) is HEADS[head]
    constrained = {name: manifold for name, _, manifold in constrained_parameters(model)}
    assert constrained["head.weight"] is model.head.manifold
    exported, x = export(model), torch.rand(4, 1, 8, 8)
    assert torch.allclose(exported(x), model(x), atol=1e-5)
    if head != "unit_rows":
        assert bound(exported).constant <= 1  # all scores together


KINDS = {
    "maxmin": MaxMin,
    "groupsort4": GroupSort,
    "groupsort8": GroupSort,
    "fullsort": FullSort,
    "abs": Abs,
    "householder": Householder,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_built_networks_have_the_activation(activation: str) -> None:
    for architecture, count in (("dense", 2), ("conv", 3)):
        model = build(architecture, (1, 8, 8), 3, widths=(8, 16), activation=activation)
        found = [layer for layer in model.body if isinstance(layer, KINDS[activation])]
        assert len(found) == count
        assert bound(model.eval().body).constant <= 1 + 1e-5
        twin = build(architecture, (1, 8, 8), 3, widths=(8, 16), activation=activation, constrained=False)
        assert sum(isinstance(layer, nn.ReLU) for layer in twin.body) == count
        assert not any(isinstance(layer, KINDS[activation]) for layer in twin.body)
    if activation.startswith("groupsort"):
        assert [layer.group_size for layer in found] == [int(activation[-1])] * 3


REFUSED = [
    ({"activation": "relu"}, "activation: expected one of maxmin, groupsort4, groupsort8, fullsort, abs, householder"),
    ({"head": "linear"}, "head: expected one of unit_rows, orthogonal, frobenius, got 'linear'"),
    ({"activation": "groupsort8"}, "widths: expected multiples of 8 (for groupsort8), got [12, 7]"),
    ({"activation": "householder"}, "widths: expected multiples of 2 (for householder), got [12, 7]"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_names_and_widths_that_do_not_fit_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        build("dense", SHAPE, 3, widths=(12, 7), **settings)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("activation", ["abs", "fullsort"])
def test_widths_may_be_odd_where_nothing_is_paired(activation: str) -> None:
    model = build("dense", SHAPE, 3, widths=(7, 5), activation=activation)
    assert model(torch.rand(2, *SHAPE)).shape == (2, 3)
