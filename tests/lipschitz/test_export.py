"""Exported networks: plain layers whose stored numbers have a proven norm of at most 1, and nearly the same outputs."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from otnn.certify import certify
from otnn.errors import InputError
from otnn.lipschitz import bound, convolution_bound, export, matrix_bound, plain_structure
from otnn.manifold import keep_on_manifold
from otnn.models import Classifier, build
from otnn.nn import Centering, FrobeniusLinear, Householder, MaxMin, OrthoConv2d, OrthoLinear, UnitNormLinear
from tests.exact import Residual
from tests.operators import circular_matrix, norm

Shape = tuple[int, ...]
# What the export may cost of the norm and of the outputs, relative to the norm of the input
NEAR = {torch.float32: 1e-6, torch.float64: 3e-8}

LAYERS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "square": (lambda: OrthoLinear(64, 64), (64,)),
    "wide": (lambda: OrthoLinear(100, 7, bias=False), (100,)),
    "tall": (lambda: OrthoLinear(3, 50), (3,)),
    "one number": (lambda: OrthoLinear(1, 1), (1,)),
    "head": (lambda: UnitNormLinear(30, 10), (30,)),
    "head of one": (lambda: UnitNormLinear(5, 1, bias=False), (5,)),
    "frobenius head": (lambda: FrobeniusLinear(30, 10), (30,)),
    "convolution": (lambda: OrthoConv2d(4, 8, 3, padding=1), (4, 9, 7)),
    "fewer channels": (lambda: OrthoConv2d(9, 4, 3), (9, 6, 6)),
    "one channel": (lambda: OrthoConv2d(1, 5, 5, padding=2, bias=False), (1, 8, 8)),
    "strided": (lambda: OrthoConv2d(3, 12, 3, stride=2, padding=1), (3, 11, 8)),
    "strided by its size": (lambda: OrthoConv2d(2, 5, 2, stride=2), (2, 8, 8)),
    "strided by 3": (lambda: OrthoConv2d(2, 4, 5, stride=3, padding=1), (2, 9, 10)),
    "circular": (lambda: OrthoConv2d(4, 4, 3, padding=1, padding_mode="circular"), (4, 6, 6)),
    "circular, strided": (lambda: OrthoConv2d(2, 8, 4, 2, 1, padding_mode="circular"), (2, 8, 8)),
    "even": (lambda: OrthoConv2d(3, 3, 4, padding=1), (3, 7, 7)),
    "pointwise": (lambda: OrthoConv2d(6, 5, 1), (6, 4, 4)),
}


def trained(layer: nn.Module, shape: Shape) -> nn.Module:
    """A few steps of Adam from the start, kept on the manifold as in training; biases move as well."""
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    keep_on_manifold(optimizer, layer)
    x = torch.randn(8, *shape, dtype=next(layer.parameters()).dtype)
    target = torch.randn_like(layer(x))
    for _ in range(4):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    return layer


def norms(layer: nn.Module) -> tuple[float, float]:
    """The proven bound of what is stored, computed anew, and a lower bound of the true norm; of the worst row."""
    weight = layer.weight.detach()  # type: ignore[operator]
    assert isinstance(weight, Tensor)
    if weight.ndim == 4:
        stride = int(layer.stride[0])  # type: ignore[index]
        return convolution_bound(weight, stride=(stride, stride)), norm(circular_matrix(weight, 6 * stride, stride))
    return matrix_bound(weight), norm(weight.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_the_stored_numbers_have_a_norm_of_at_most_1_and_hardly_less(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    layer = trained(make().to(dtype), shape)
    exported = export(layer)
    weight = exported.weight.detach()  # type: ignore[operator]
    assert type(exported) is (nn.Conv2d if len(shape) == 3 else nn.Linear)
    assert weight.dtype == dtype
    if isinstance(layer, UnitNormLinear):
        rows = weight.double().norm(dim=1)
        assert max(matrix_bound(row.unsqueeze(0)) for row in weight) <= 1
        assert float(rows.min()) >= 1 - NEAR[dtype]
        return
    if isinstance(layer, FrobeniusLinear):
        norm_of_all = float(weight.double().norm())
        assert 1 - NEAR[dtype] <= norm_of_all <= 1
        assert matrix_bound(weight.flatten().unsqueeze(0)) <= 1
        assert bound(exported, shape).constant <= 1
        return
    proven, true = norms(exported)
    assert proven <= 1
    assert bound(exported, shape).constant <= 1
    assert true >= 1 - NEAR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_the_outputs_are_nearly_the_same(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    layer = trained(make().to(dtype), shape)
    exported = export(layer).double()
    x = torch.randn(10, *shape, dtype=torch.float64)
    before = copy.deepcopy(layer).double()
    for inputs in (x, 1e3 * x, torch.ones_like(x)):
        gap = (exported(inputs) - before(inputs)).flatten(1).norm(dim=1)
        rows = math.sqrt(10) if name == "head" else 1.0
        assert bool((gap <= NEAR[dtype] * rows * inputs.flatten(1).norm(dim=1)).all())
    if before.bias is not None:  # kept as it is, and told apart from a bias that was lost
        assert torch.equal(exported.bias, before.bias)  # type: ignore[arg-type]
        assert bool((before.bias.abs() > 1e-3).any())  # type: ignore[operator]
    assert (exported.bias is None) == (before.bias is None)


def test_householder_is_copied_as_it_is() -> None:
    layer = Householder(6)
    nn.init.uniform_(layer.angle, -3, 3)
    net = nn.Sequential(OrthoLinear(6, 6), layer)
    exported, empty = export(net), plain_structure(copy.deepcopy(net))
    for found in (exported, empty):
        assert [type(child) for child in found] == [nn.Linear, Householder]
    assert torch.equal(exported[1].angle, layer.angle)
    assert exported[1].angle.data_ptr() != layer.angle.data_ptr()
    assert bound(exported).constant <= 1
    empty.load_state_dict(exported.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(empty(x), exported(x))


def network() -> nn.Sequential:
    """Every kind of layer, nested, with one that is used twice."""
    twice = OrthoLinear(12, 12)
    return nn.Sequential(
        Centering(torch.tensor([0.1, 0.2])),
        nn.Sequential(OrthoConv2d(2, 4, 3, padding=1), MaxMin(), nn.Conv2d(4, 3, 2, bias=False)),
        nn.Flatten(),
        nn.Sequential(nn.Linear(27, 12), twice, MaxMin(), twice),
        Residual(twice, nn.ReLU(), OrthoLinear(12, 12)),
        UnitNormLinear(12, 3),
    )


def test_a_network_keeps_its_structure_and_the_layers_that_are_plain() -> None:
    net = network().train()
    exported = export(net)
    x = torch.rand(4, 2, 4, 4)
    assert torch.allclose(exported(x), net(x), atol=1e-5)
    kinds = [type(layer).__name__ for layer in exported.modules() if not list(layer.children())]
    assert kinds == [
        *("Centering", "Conv2d", "MaxMin", "Conv2d", "Flatten", "Linear", "Linear", "MaxMin", "ReLU", "Linear"),
        "Linear",
    ]
    assert not any(layer.training for layer in exported.modules())
    assert net.training
    for path in ("1.2.weight", "3.0.weight", "3.0.bias", "0.mean"):
        assert torch.equal(exported.state_dict()[path], net.state_dict()[path])
    assert not any(isinstance(layer, (OrthoConv2d, OrthoLinear, UnitNormLinear)) for layer in exported.modules())


def test_a_layer_that_is_used_twice_stays_one() -> None:
    exported = export(network())
    assert exported[3][1] is exported[3][3] is exported[4].inner[0]
    assert type(exported[3][1]) is nn.Linear
    assert bound(exported[3][1]).constant <= 1
    alone = OrthoLinear(4, 4)
    in_a_row = export(nn.Sequential(alone, MaxMin(), alone, alone))
    assert in_a_row[0] is in_a_row[2] is in_a_row[3]


def test_nothing_is_shared_with_the_original_and_that_is_left_bit_for_bit() -> None:
    net = network()
    before, types = copy.deepcopy(net.state_dict()), [type(layer) for layer in net.modules()]
    exported = export(net)
    pointers = {value.data_ptr() for value in net.state_dict().values()}
    assert not pointers & {value.data_ptr() for value in exported.state_dict().values()}
    with torch.no_grad():
        for value in exported.state_dict().values():
            value.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [type(layer) for layer in net.modules()] == types
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


def test_what_is_trained_stays_trained() -> None:
    net = nn.Sequential(OrthoLinear(4, 4), OrthoLinear(4, 4), OrthoConv2d(2, 4, 3), UnitNormLinear(4, 2))
    net[1].requires_grad_(False)
    net[2].requires_grad_(False)
    assert [all(p.requires_grad for p in layer.parameters()) for layer in export(net)] == [True, False, False, True]
    with torch.no_grad():
        assert all(parameter.requires_grad for parameter in export(net)[0].parameters())


def test_an_exported_network_is_exported_to_itself() -> None:
    once = export(network())
    again = export(once)
    assert once is not again
    assert all(torch.equal(once.state_dict()[name], value) for name, value in again.state_dict().items())
    assert list(once.state_dict()) == list(again.state_dict())


@pytest.mark.parametrize(
    ("architecture", "shape", "widths"),
    [("dense", (1, 4, 4), (8, 6)), ("conv", (3, 8, 8), (4, 8, 6)), ("resnet", (3, 8, 8), (4, 8, 6))],
)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("constrained", [True, False])
def test_the_weights_load_into_the_plain_structure(
    architecture: str, shape: Shape, widths: Shape, classes: int, constrained: bool
) -> None:
    def fresh() -> Classifier:
        return build(architecture, shape, classes, widths=widths, constrained=constrained)

    exported = export(fresh())
    structure = plain_structure(fresh())
    assert not structure.training
    structure.load_state_dict(exported.state_dict())
    x = torch.rand(3, *shape)
    assert torch.equal(structure(x), exported(x))
    assert structure.input_shape == exported.input_shape == shape
    assert torch.equal(certify(structure, x).radius, certify(exported, x).radius)
    if constrained:
        assert bound(exported.body).constant <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["body.1.expand", "body.1.projectors", "body.1.bias", "body.3.mix", "body.6.weight", "head.weight"]
)
def test_weights_that_are_not_finite_are_named(name: str, bad: float) -> None:
    model = build("conv", (1, 8, 8), 3, widths=(4, 8))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = bad
    with pytest.raises((FloatingPointError, InputError), match=rf"^{name} holds NaN or infinite values"):
        export(model)


class Renamed(OrthoLinear):
    """Computes what its parent does."""


class Doubled(OrthoLinear):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


def test_a_subclass_that_computes_the_same_is_exported() -> None:
    exported = export(nn.Sequential(Renamed(8, 8)))
    assert type(exported[0]) is nn.Linear
    assert bound(exported).constant <= 1


@pytest.mark.parametrize("kind", ["subclass", "hook", "own forward"])
def test_a_layer_that_computes_something_else_is_refused(kind: str) -> None:
    layer: nn.Module = Doubled(8, 8) if kind == "subclass" else OrthoLinear(8, 8)
    if kind == "hook":
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    if kind == "own forward":
        layer.forward = lambda inputs: 2 * inputs  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"^0: "):
        export(nn.Sequential(layer))


def test_layers_that_share_their_weights_are_exported_one_by_one() -> None:
    torch.manual_seed(0)
    first, second = OrthoLinear(8, 8), OrthoLinear(8, 8)
    second.weight = first.weight
    third, fourth = (OrthoConv2d(2, 2, 3, padding=1) for _ in range(2))
    fourth.mix, fourth.projectors = third.mix, third.projectors
    head = UnitNormLinear(8, 8)
    head.weight = nn.Parameter(first.weight.detach().clone())
    for net, shape in (
        (nn.Sequential(first, MaxMin(), second), (8,)),
        (nn.Sequential(third, MaxMin(), fourth), (2, 5, 5)),
        (Classifier(nn.Sequential(first), head, (8,)), (8,)),
    ):
        before = copy.deepcopy(net.state_dict())
        plain, x = export(net.eval()), torch.rand(3, *shape)
        assert {value.dtype for value in plain.state_dict().values()} == {torch.float32}
        assert torch.allclose(plain(x), net(x), atol=1e-5)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert first.weight is second.weight
