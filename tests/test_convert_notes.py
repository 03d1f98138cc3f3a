"""What `otnn.convert` tells of a change, and what it must not lose without a word."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from otnn.conversion import Change, convert
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.models import Classifier
from otnn.nn import MaxMin, OrthoConv2d, OrthoLinear, UnitNormLinear


class _Net(nn.Module):
    """A network whose forward is a function of its layers and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize("inside", [16, 12])
def test_names_that_differ_in_a_dot_stay_two_layers(inside: int) -> None:
    network = _Net(
        lambda net, x: net.h(net.layer_1(net.layer_0(net.layer(x)))),
        layer=nn.Sequential(nn.Linear(8, 16), nn.ReLU()),
        layer_0=nn.Linear(16, inside),
        layer_1=nn.ReLU(),
        h=nn.Linear(inside, 2),
    )
    model = convert(network, (8,)).model.eval()
    widths = {layer.out_features for layer in model.modules() if isinstance(layer, OrthoLinear)}
    assert widths == {16, inside}
    assert sum(isinstance(layer, MaxMin) for layer in model.modules()) == 2
    assert model(torch.rand(3, 8)).shape == (3, 2)
    assert bound(model.body, (8,)).constant <= 1.0001


def test_names_of_methods_of_a_sequential() -> None:
    network = _Net(lambda net, x: net.h(net.pop(x)), pop=nn.Linear(4, 4), h=nn.Linear(4, 2))
    assert convert(network, (4,)).model(torch.rand(3, 4)).shape == (3, 2)


def _in_place(y: Tensor) -> Tensor:
    y += y
    return y


@pytest.mark.parametrize("double", [lambda y: y + y, lambda y: y.add(y), lambda y: torch.add(y, y), _in_place])
def test_a_sum_with_itself_is_left_out(double: Callable[[Tensor], Tensor]) -> None:
    network = _Net(lambda net, x: double(net.a(x)), a=nn.Conv1d(4, 4, 3))
    conversion = convert(network, (4, 6))
    change = conversion.changes[1]
    assert (change.now, change.why) == ("removed", "a sum of a result with itself doubles distances")
    assert bound(conversion.model.eval(), (4, 6)).constant <= 1.0001


def test_limits_that_are_numbers_stay() -> None:
    network = _Net(lambda net, x: torch.clamp(input=net.a(x), min=0, max=None).abs(), a=nn.Linear(4, 4))
    conversion = convert(network, (4,))
    assert bound(conversion.model.eval(), (4,)).constant <= 1.0001
    assert (conversion.model(torch.randn(8, 4)) >= 0).all()


def test_a_mean_by_name() -> None:
    network = _Net(lambda net, x: torch.mean(input=net.a(x), dim=2), a=nn.Conv1d(2, 2, 1))
    assert bound(convert(network, (2, 4)).model.eval(), (2, 4)).constant <= 1.0001


ENDS = [
    lambda y: y.squeeze(-1),
    lambda y: torch.squeeze(y, 1),
    lambda y: y.squeeze(1).sigmoid(),
    lambda y: y.sigmoid().squeeze(),
    lambda y: y[:, 0],
    lambda y: y.flatten(),
    lambda y: y.view(-1),
    lambda y: y.reshape(y.size(0)),
    lambda y: y.view(y.shape[0], -1),
]


@pytest.mark.parametrize("end", ENDS)
def test_one_score_keeps_its_dimension(end: Callable[[Tensor], Tensor]) -> None:
    network = _Net(lambda net, x: end(net.h(net.relu(net.a(x)))), a=nn.Linear(4, 4), relu=nn.ReLU(), h=nn.Linear(4, 1))
    conversion = convert(network, (4,))
    assert isinstance(conversion.model, Classifier)
    assert conversion.model(torch.rand(3, 4)).shape == (3, 1)
    removed = [change.why for change in conversion.changes if change.now == "removed"]
    assert "scores are of shape (batch, classes)" in removed


def test_scores_keep_their_shape_before_layers() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0), nn.Sigmoid())
    assert convert(network, (4,)).model(torch.rand(3, 4)).shape == (3, 1)


def test_the_order_of_classes_is_not_taken_for_a_shape() -> None:
    network = _Net(lambda net, x: -net.h(x), h=nn.Linear(4, 3))
    assert not isinstance(convert(network, (4,)).model, Classifier)


@pytest.mark.parametrize("head", ["unit_rows", "orthogonal"])
def test_a_last_layer_that_is_used_twice(head: str) -> None:
    twice = nn.Linear(4, 4)
    conversion = convert(nn.Sequential(twice, nn.ReLU(), twice), (4,), head=head)
    name = UnitNormLinear.__name__ if head == "unit_rows" else OrthoLinear.__name__
    assert conversion.changes[0] == Change("0", "Linear", "OrthoLinear")
    assert conversion.changes[2] == Change("0", "Linear", name, "head; its other calls have weights of their own")


def test_shared_and_frozen_weights_are_noted() -> None:
    first, second, last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = last.weight = first.weight
    reasons = [change.why for change in convert(nn.Sequential(first, second, last), (4,)).changes]
    assert reasons == [
        "its weight was shared with 1, 2; no longer",
        "its weight was shared with 0, 2; no longer",
        "head; its weight was shared with 0, 1; no longer",
    ]
    frozen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    frozen[:2].requires_grad_(False)
    conversion = convert(frozen, (4,))
    why = "not all of its weights were trained; the fresh ones are"
    assert [change.why for change in conversion.changes] == [why, why, "", "head"]
    assert all(parameter.requires_grad for parameter in conversion.model.parameters())


@pytest.mark.parametrize(
    ("constrained", "why"), [(True, "the constraint of the new layer replaces it"), (False, "the new layer is free")]
)
def test_parametrizations_are_gone(constrained: bool, why: str) -> None:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    conversion = convert(nn.Sequential(spectral, nn.ReLU(), nn.Linear(4, 2)), (4,), constrained=constrained)
    assert conversion.changes[-1] == Change("0.parametrizations.weight.0", "_SpectralNorm", "removed", why)


def test_unit_rows_bound_a_head_only() -> None:
    torch.manual_seed(0)
    found = convert(
        nn.Sequential(UnitNormLinear(8, 8), nn.ReLU(), UnitNormLinear(8, 1), nn.ReLU(), nn.Linear(1, 2)), (8,)
    )
    kinds = [type(layer).__name__ for layer in found.model.body]  # type: ignore[union-attr,operator]
    assert kinds == ["OrthoLinear", "MaxMin", "UnitNormLinear", "Abs"]
    assert bound(found.model.eval().body, (8,)).constant < 1.00001  # type: ignore[arg-type]
    assert "unit rows alone do not bound the norm" in str(found)


@pytest.mark.parametrize("order", [lambda net, x: x + net.a(x), lambda net, x: net.a(x) + x])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, padding=1), OrthoConv2d(4, 4, 3, padding=1)])
def test_the_branch_is_the_path_with_layers(order: Callable[[Any, Tensor], Tensor], layer: nn.Module) -> None:
    model = convert(_Net(order, a=layer), (4, 5, 5), share=0.0).model
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(model(x), x)


def test_scales_beside_a_mix_are_told() -> None:
    def why(function: Callable[[Any, Tensor], Tensor], name: str) -> str:
        (change,) = [c for c in convert(_Net(function, a=nn.Linear(4, 4)), (4,)).changes if c.name == name]
        return change.why

    assert why(lambda net, x: x + 0.1 * net.a(x), "mul") == "kept: distances, and with them the bound, may shrink by it"
    assert why(lambda net, x: torch.add(x, net.a(x), alpha=2), "add").endswith("; its factor alpha=2 is left out")
    assert why(lambda net, x: x + net.a(x), "add").endswith("alpha learned in [0, 1]")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of weight_norm, which torch would have us replace
def test_networks_that_cannot_be_copied_say_what_to_remove() -> None:
    def keep(net: Any, x: Tensor) -> Tensor:
        last: Tensor = net.a(x)
        net.last = last
        return last

    keeps = _Net(keep, a=nn.Linear(4, 4))
    keeps(torch.rand(1, 4))
    with pytest.raises(InputError, match=r"^_Net: its last is computed from other tensors, .*; set it to None"):
        convert(keeps, (4,))
    pruned = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(InputError, match=r"^0: its weight is computed from other tensors, .*, call .* prune.remove"):
        convert(pruned, (4,))
    with torch.no_grad():
        normed = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
        normed(torch.rand(1, 4))
    with pytest.raises(InputError, match=r"an old weight_norm by torch\.nn\.utils\.remove_weight_norm"):
        convert(normed, (4,))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by torch.compile itself
def test_wrapped_networks_name_what_to_pass() -> None:
    with pytest.raises(InputError, match=r"got OptimizedModule, a compiled network; pass its \._orig_mod"):
        convert(torch.compile(nn.Linear(4, 4)), (4,))
    with pytest.raises(InputError, match=r"got AveragedModel, a wrapper of one; pass its \.module"):
        convert(AveragedModel(nn.Linear(4, 4)), (4,))


def test_a_softmax_inside_is_refused_as_its_function_is() -> None:
    with pytest.raises(InputError, match=r"^1: .*softmax is known; probabilities belong to the end"):
        convert(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)), (4,))
