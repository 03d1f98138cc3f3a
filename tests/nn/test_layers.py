"""One row per layer: the row inherits every test of this file."""

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from otnn.lipschitz import bound
from otnn.manifold import constrained_parameters, retract_parameters
from otnn.nn import (
    Abs,
    AdaptiveL2NormPool2d,
    BatchCentering,
    Centering,
    ConcatResidual,
    ConvexResidual,
    FrobeniusLinear,
    FullSort,
    GroupSort,
    Householder,
    L2NormPool2d,
    LayerCentering,
    MaxMin,
    OrthoConv1d,
    OrthoConv2d,
    OrthoConvTranspose2d,
    OrthoLinear,
    ScaledAdaptiveAvgPool2d,
    ScaledAvgPool2d,
    UnitNormLinear,
)
from tests.operators import layer_matrix, norm


@dataclass(frozen=True)
class Case:
    """A layer and the shape of one input.

    Attributes:
        smallest: the smallest singular value that it may have (of the short side of its matrix).
        norm: its largest singular value: exactly 1 for orthogonal layers, a range for others.
        mixes: in `train()` mode the samples of a batch mix by design, as batch statistics do, and enter a buffer; such
            a layer is made in `eval()` mode, and both are tested.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    smallest: float = 1.0
    norm: tuple[float, float] = (1.0, 1.0)
    linear: bool = True
    mixes: bool = False


def batch_centering(channels: int) -> nn.Module:
    """One that has seen a batch."""
    layer = BatchCentering(channels)
    layer(torch.linspace(0, 1, 4 * channels).view(4, channels))
    return layer.eval()


def branch(channels: int) -> nn.Module:
    """The branch of a residual block of images."""
    return nn.Sequential(
        OrthoConv2d(channels, channels, 3, padding=1), MaxMin(), OrthoConv2d(channels, channels, 3, padding=1)
    )


def reflections(channels: int, dim: int = 1) -> Householder:
    """With random angles."""
    layer = Householder(channels, dim)
    nn.init.uniform_(layer.angle, -3, 3)
    return layer


# Zero padding compresses the circular operator: its norm stays near 1, singular values of the border fall.
COMPRESSED = (0.9, 1.0)
LAYERS = [
    Case("linear square", lambda: OrthoLinear(6, 6), (6,)),
    Case("linear wide", lambda: OrthoLinear(7, 3), (7,)),
    Case("linear tall, no bias", lambda: OrthoLinear(3, 7, bias=False), (3,)),
    Case("linear 1 to 1", lambda: OrthoLinear(1, 1), (1,)),
    # rows of norm 1 in general position: sigma^2 lies between 1 and the number of rows
    Case("head", lambda: UnitNormLinear(8, 4), (8,), smallest=0.0, norm=(1.0, 2.0)),
    Case("head of one output", lambda: UnitNormLinear(5, 1), (5,)),
    Case("head of one feature", lambda: UnitNormLinear(1, 4), (1,), smallest=2.0, norm=(2.0, 2.0)),
    Case("maxmin rows", MaxMin, (6,), linear=False),
    Case("maxmin images", MaxMin, (4, 3, 5), linear=False),
    Case("maxmin last", lambda: MaxMin(dim=-1), (3, 5, 4), linear=False),
    Case("centering", lambda: Centering(torch.tensor([0.1, 0.7])), (2, 3, 4)),
    Case("centering rows", lambda: Centering(torch.tensor([0.1, 0.7, -0.2])), (3,)),
    Case("conv", lambda: OrthoConv2d(2, 4, 3, padding=1), (2, 5, 5), 0.0, COMPRESSED),
    Case("conv no padding", lambda: OrthoConv2d(4, 2, 3), (4, 5, 6), 0.0, COMPRESSED),
    Case("conv 1x1", lambda: OrthoConv2d(3, 5, 1), (3, 2, 3)),
    Case("conv stride", lambda: OrthoConv2d(2, 6, 3, stride=2, padding=1), (2, 6, 6), 0.0, COMPRESSED),
    Case("conv even", lambda: OrthoConv2d(2, 4, 4, stride=2, padding=1, bias=False), (2, 6, 6), 0.0, COMPRESSED),
    Case("conv patches", lambda: OrthoConv2d(3, 8, 2, stride=2), (3, 4, 6)),
    Case("conv one channel", lambda: OrthoConv2d(1, 1, 3, padding=1), (1, 4, 4)),
    Case("conv circular", lambda: OrthoConv2d(2, 5, 3, padding=1, padding_mode="circular"), (2, 4, 6)),
    Case(
        "conv circular stride",
        lambda: OrthoConv2d(4, 3, 3, stride=2, padding=1, padding_mode="circular"),
        (4, 6, 4),
    ),
    # the squares of the singular values add up to 1
    Case("frobenius head", lambda: FrobeniusLinear(8, 4), (8,), smallest=0.0, norm=(0.5, 1.0)),
    Case("frobenius head of one output", lambda: FrobeniusLinear(5, 1), (5,)),
    Case("groupsort rows", lambda: GroupSort(4), (8,), linear=False),
    Case("groupsort images", lambda: GroupSort(3), (6, 2, 3), linear=False),
    Case("groupsort last", lambda: GroupSort(5, dim=-1), (2, 3, 10), linear=False),
    Case("groupsort, large groups", lambda: GroupSort(12), (24, 2), linear=False),
    Case("fullsort rows", FullSort, (7,), linear=False),
    Case("fullsort images", FullSort, (11, 2, 2), linear=False),
    Case("abs", Abs, (3, 2, 4), linear=False),
    Case("householder images", lambda: reflections(4), (4, 3, 5), linear=False),
    Case("householder last", lambda: reflections(4, -1), (3, 5, 4), linear=False),
    Case("scaled average", lambda: ScaledAvgPool2d(2), (2, 4, 6)),
    Case("scaled average, oblong", lambda: ScaledAvgPool2d((2, 3)), (2, 4, 6)),
    Case("adaptive scaled average", lambda: ScaledAdaptiveAvgPool2d((2, 3)), (2, 5, 7)),
    Case("L2 pooling", lambda: L2NormPool2d(2), (2, 4, 6), linear=False),
    Case("L2 pooling, oblong", lambda: L2NormPool2d((3, 1)), (2, 6, 2), linear=False),
    Case("adaptive L2 pooling", lambda: AdaptiveL2NormPool2d((2, 3)), (2, 5, 7), linear=False),
    Case("pixel unshuffle", lambda: nn.PixelUnshuffle(2), (2, 4, 6)),
    Case("pixel shuffle", lambda: nn.PixelShuffle(2), (8, 2, 3)),
    Case("batch centering", lambda: batch_centering(3), (3, 2, 4), mixes=True),
    Case("batch centering rows", lambda: batch_centering(4), (4,), mixes=True),
    # a projection: one singular value of each place, or of each sample, is 0
    Case("layer centering", lambda: LayerCentering(3), (3, 2, 4), smallest=0.0),
    Case("layer centering rows", lambda: LayerCentering(5, bias=False), (5,), smallest=0.0),
    Case("layer centering of samples", lambda: LayerCentering(2, over="sample"), (2, 3, 4), smallest=0.0),
    # (1 - alpha) I + alpha Q has singular values between | 1 - 2 alpha | and 1
    Case("convex residual", lambda: ConvexResidual(OrthoLinear(6, 6), 0.3), (6,), 0.4, (0.4, 1.0)),
    Case(
        "convex residual, fixed", lambda: ConvexResidual(OrthoLinear(2, 2), 0.1, learned=False), (2,), 0.8, (0.8, 1.0)
    ),
    Case("convex residual images", lambda: ConvexResidual(branch(4), 0.25), (4, 4, 3), 0.0, (0.5, 1.0), linear=False),
    Case("concat residual", lambda: ConcatResidual(OrthoLinear(4, 4), kept=2), (6,)),
    Case("concat residual images", lambda: ConcatResidual(branch(4), kept=1), (5, 4, 3), 0.0, COMPRESSED, linear=False),
    # convolutions: groups, dilation, one dimension, transposes, the start as the identity
    Case("conv groups", lambda: OrthoConv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5), 0.0, COMPRESSED),
    Case("conv depthwise", lambda: OrthoConv2d(3, 6, 3, 1, 1, groups=3, bias=False), (3, 5, 4), 0.0, COMPRESSED),
    Case("conv groups stride", lambda: OrthoConv2d(4, 20, 3, 2, groups=2), (4, 7, 7), 0.0, COMPRESSED),
    Case("conv dilation", lambda: OrthoConv2d(3, 2, 3, padding=2, dilation=2), (3, 7, 6), 0.0, COMPRESSED),
    Case("conv dilation stride", lambda: OrthoConv2d(2, 5, 3, 2, 3, dilation=3), (2, 8, 8), 0.0, COMPRESSED),
    Case("conv circular all", lambda: OrthoConv2d(4, 6, 3, 2, 3, 3, 2, padding_mode="circular"), (4, 8, 10)),
    Case("conv1d", lambda: OrthoConv1d(2, 3, 5, padding=2), (2, 9), 0.0, COMPRESSED),
    Case("conv1d stride", lambda: OrthoConv1d(4, 6, 4, 3, 2, dilation=2, groups=2), (4, 12), 0.0, COMPRESSED),
    Case("conv1d circular", lambda: OrthoConv1d(3, 4, 4, 2, 1, padding_mode="circular"), (3, 8)),
    # a transpose loses nothing where it neither crops nor merges channels
    Case("transpose", lambda: OrthoConvTranspose2d(4, 2, 4, stride=2), (4, 3, 4)),
    Case("transpose all", lambda: OrthoConvTranspose2d(6, 4, 3, 2, 0, 1, groups=2, dilation=3), (6, 3, 3)),
    Case("transpose crop", lambda: OrthoConvTranspose2d(4, 2, 3, 2, 1, 1), (4, 4, 4), 0.0, COMPRESSED),
    Case("transpose merge", lambda: OrthoConvTranspose2d(5, 2, 3, padding=1, bias=False), (5, 4, 4), 0.0, COMPRESSED),
    Case("linear identity", lambda: OrthoLinear(3, 5, init="identity"), (3,)),
    Case("conv identity", lambda: OrthoConv2d(4, 4, 3, padding=1, init="identity"), (4, 4, 5)),
    Case("conv identity wide", lambda: OrthoConv2d(2, 20, 4, 2, 1, init="identity"), (2, 6, 6), 0.0, COMPRESSED),
    Case("conv identity groups", lambda: OrthoConv2d(4, 6, 4, 1, 2, groups=2, init="identity"), (4, 5, 6)),
    Case("conv1d identity", lambda: OrthoConv1d(3, 6, 5, padding=2, init="identity"), (3, 7)),
    Case("transpose identity", lambda: OrthoConvTranspose2d(5, 4, 3, 2, init="identity"), (5, 3, 3)),
    # end of convolutions
]
pytestmark = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)


def exact(layer: nn.Module) -> nn.Module:
    """The layer in float64, its weights orthogonal to float64 accuracy."""
    layer = layer.double()
    retract_parameters(layer)
    return layer


def inputs(case: Case, batch: int = 3) -> Tensor:
    return torch.randn(batch, *case.shape, dtype=torch.float64)


def matrix(case: Case, layer: nn.Module) -> Tensor:
    """The layer's matrix, or its Jacobian at a random point."""
    if case.linear:
        return layer_matrix(layer, case.shape)
    jacobian = torch.autograd.functional.jacobian(layer.double(), inputs(case, 1))
    return jacobian.reshape(-1, math.prod(case.shape))


def test_singular_values(case: Case) -> None:
    values = torch.linalg.svdvals(matrix(case, exact(case.make())))
    assert values[-1] >= case.smallest - 1e-12
    assert case.norm[0] - 1e-12 <= values[0] <= case.norm[1] + 1e-12


def test_bound_on_both_sides(case: Case) -> None:
    layer = case.make()  # in float32, as it is used
    largest = norm(matrix(case, copy.deepcopy(layer)))
    constant = bound(layer).constant
    assert largest <= constant * (1 + 1e-7)  # the kernel of the bound is composed in float32, the matrix in float64
    assert constant <= max(1.0, case.norm[1]) + 1e-5


def test_distances_do_not_grow(case: Case) -> None:
    layer = exact(case.make())
    with torch.no_grad():
        x, y = 3 * inputs(case, 50), 3 * inputs(case, 50)
        ratio = (layer(x) - layer(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratio.max() <= case.norm[1] + 1e-12
    assert ratio.max() >= 0.3 * case.norm[0]


def test_constrained_weights_start_on_their_manifolds(case: Case) -> None:
    for name, parameter, manifold in constrained_parameters(case.make()):
        if parameter.numel():
            assert manifold.distance(parameter.detach()).max() < 5e-6, name


def test_state_dict_restores_the_layer(case: Case) -> None:
    torch.manual_seed(1)
    saved = case.make()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(0.01)  # also what differs from every initialisation
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    torch.manual_seed(2)
    loaded = case.make()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    x = inputs(case).float()
    assert torch.equal(loaded(x), saved(x))
    assert set(saved.state_dict()) == {name for name, _ in [*saved.named_parameters(), *saved.named_buffers()]}


def test_dtype(case: Case) -> None:
    layer, x = case.make(), inputs(case)
    single = layer(x.float())
    double = layer.double()(x)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert (single - double).abs().max() < 1e-5


def test_gradient_reaches_every_weight(case: Case) -> None:
    layer, x = exact(case.make()), inputs(case).requires_grad_()
    (layer(x) * torch.randn_like(layer(x))).sum().backward()
    for name, parameter in [("inputs", x), *layer.named_parameters()]:
        if parameter.numel():
            assert parameter.grad is not None, name
            # no single number is left out, and none explodes
            assert bool((parameter.grad != 0).all()), name
            assert parameter.grad.norm() < 1e3, name


def test_gradcheck(case: Case) -> None:
    layer = exact(case.make())
    x = inputs(case, 2).requires_grad_()
    names = [name for name, parameter in layer.named_parameters() if parameter.numel()]
    weights = [layer.get_parameter(name) for name in names]

    def function(point: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (point,))

    assert torch.autograd.gradcheck(function, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *weights), fast_mode=True)


def test_samples_of_a_batch_do_not_mix(case: Case) -> None:
    layer, x = exact(case.make()), inputs(case, 4)
    together = layer(x)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(4)])
    assert (together - alone).abs().max() < 1e-13
    assert len(layer(x[:0])) == 0
    if case.mixes:
        together, other = layer.train()(x), layer(torch.cat([x[:2], x[2:] + 1]))
        assert (together - other)[:2].abs().min() > 0.1


def test_memory_format_does_not_matter(case: Case) -> None:
    layer, x = exact(case.make()), inputs(case)
    if x.ndim == 4:
        dense = layer(x)
        last = layer.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        assert (dense - last).abs().max() < 1e-13
    strided = torch.stack([x, x], dim=-1)[..., 0]  # not contiguous
    assert (layer(x) - layer(strided)).abs().max() < 1e-13


def test_nothing_changes_in_eval(case: Case) -> None:
    layer, x = exact(case.make()), inputs(case)
    before = copy.deepcopy(layer.state_dict())
    kept = layer(x) if case.mixes else layer.train()(x)
    assert torch.equal(layer.eval()(x), kept)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    if case.mixes:
        assert not torch.equal(layer.train()(x), kept)
        assert {name for name, value in layer.state_dict().items() if not torch.equal(before[name], value)} == {
            name for name, _ in layer.named_buffers()
        }


def test_copies_are_independent(case: Case) -> None:
    layer, x = exact(case.make()), inputs(case)
    expected = layer(x).detach().clone()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)
    retract_parameters(other)
    for name, parameter, manifold in constrained_parameters(other):
        if parameter.numel():
            assert manifold.distance(parameter.detach()).max() < 1e-13, name


def test_gradient_passes_through_vmap(case: Case) -> None:
    if getattr(case.make(), "padding_mode", "") == "circular":
        pytest.skip("circular padding of one image has no batching rule")
    layer, x = exact(case.make()), inputs(case)

    def score(sample: Tensor) -> Tensor:
        return layer(sample.unsqueeze(0)).square().sum()

    each = torch.func.vmap(torch.func.grad(score))(x)
    x.requires_grad_()
    (whole,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert (each - whole).abs().max() < 1e-12


def test_it_is_a_function_of_its_weights(case: Case) -> None:
    """`torch.func` puts plain tensors in the place of parameters."""
    layer, x = exact(case.make()), inputs(case)
    values = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    of_values, of_x = torch.func.grad(loss, argnums=(0, 1))(values, x)
    x.requires_grad_()
    layer(x).square().sum().backward()
    for name, parameter in [("inputs", x), *layer.named_parameters()]:
        found = of_x if name == "inputs" else of_values[name]
        assert parameter.grad is not None
        assert torch.allclose(found, parameter.grad, atol=1e-12), name
