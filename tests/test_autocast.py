"""Training under bfloat16 autocast: which numbers stay in full precision, and how far the others may be off."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from otnn import losses
from otnn.certify import certify
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.manifold import Stiefel, keep_on_manifold, retract_parameters
from otnn.nn import (
    Abs,
    AdaptiveL2NormPool2d,
    BatchCentering,
    ConcatResidual,
    ConvexResidual,
    FullSort,
    GroupSort,
    Householder,
    L2NormPool2d,
    LayerCentering,
    MaxMin,
    OrthoConv2d,
    OrthoConvTranspose2d,
    OrthoLinear,
    ScaledAdaptiveAvgPool2d,
    ScaledAvgPool2d,
)
from otnn.nn.kernel import OrthoKernel
from tests.test_training import batch, network, off

# the unit roundoff: half the distance of 1 and the next number
UNIT = torch.finfo(torch.bfloat16).eps / 2


def half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("step_inside", [False, True])
def test_training_keeps_float32_weights_on_their_manifolds(step_inside: bool) -> None:
    model, loss = network(dtype=torch.float32), losses.HKRLoss(alpha=0.1)
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], 0.02)
    keep_on_manifold(optimizer, model, loss)
    values = []
    for seed in range(8):
        images, labels = batch(seed, torch.float32)
        optimizer.zero_grad()
        with half():
            scores = model(images)
            value = loss(scores, labels)
        assert (scores.dtype, value.dtype) == (torch.bfloat16, torch.float32)
        value.backward()
        for parameter in [*model.parameters(), *loss.parameters()]:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
        with torch.autocast("cpu", torch.bfloat16, enabled=step_inside):
            optimizer.step()
        assert off(model, loss) < 1e-5
        values.append(float(value.detach()))
    assert values[-1] < 0.5 * values[0]
    assert bound(model.eval().body).constant < 1 + 1e-5
    with half(), pytest.raises(InputError, match="autocast computes in half precision; certify outside of it"):
        certify(model, images)


def rounding(layer: nn.Module) -> float:
    """A bound of the norm by which rounding its weights to bfloat16 changes a layer, in units.

    A matrix changes by its Frobenius norm at most, and the operator of a kernel by as much for each tap: by Cauchy and
    Schwarz, the root of the number of taps times the norm of the whole kernel.
    """
    weights = [part.weight.detach() for part in layer.modules() if isinstance(part, (OrthoKernel, nn.Linear))]
    return sum(math.sqrt(math.prod(weight.shape[2:])) * float(weight.norm()) for weight in weights)


def test_scores_are_those_of_float32_up_to_the_rounding_of_each_layer() -> None:
    """Each layer rounds its input, weight, mean and output, and passes errors on without growth."""
    model = network(dtype=torch.float32).eval()
    torch.nn.init.normal_(model.body[1].running_mean, std=0.1)
    images, _ = batch(0, torch.float32)
    norms: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, _: norms.append((layer, inputs[0].flatten(1).norm(dim=1))))
        for layer in [*model.body, model.head]
    ]
    scores = model(images)
    for hook in hooks:
        hook.remove()
    with half():
        error = (model(images).float() - scores).abs().view(-1)
    units = sum((3 + rounding(layer)) * norm for layer, norm in norms)
    assert (error < 1.1 * UNIT * units).all()  # 1.1: products of two errors
    assert error.max() > 0.01 * UNIT


LAYERS: list[tuple[str, Callable[[], nn.Module]]] = [
    ("maxmin", MaxMin),
    ("groupsort", lambda: GroupSort(4)),
    ("fullsort", FullSort),
    ("abs", Abs),
    ("householder", lambda: Householder(4)),
    ("average", lambda: ScaledAvgPool2d(2)),
    ("norm", lambda: L2NormPool2d(2)),
    ("adaptive average", lambda: ScaledAdaptiveAvgPool2d(4)),
    ("adaptive norm", lambda: AdaptiveL2NormPool2d(4)),
    ("batch centering", lambda: BatchCentering(4)),
    ("layer centering", lambda: LayerCentering(4)),
    ("convolution", lambda: OrthoConv2d(4, 8, 3, padding=1)),
    ("transposed", lambda: OrthoConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)),
    ("convex", lambda: ConvexResidual(OrthoConv2d(4, 4, 3, padding=1))),
    ("convex of float32", lambda: ConvexResidual(nn.Sequential(OrthoConv2d(4, 4, 1), BatchCentering(4)))),
    ("concatenation", lambda: ConcatResidual(OrthoConv2d(2, 2, 3, padding=1), 2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "make"), LAYERS, ids=[name for name, _ in LAYERS])
def test_every_layer_takes_what_autocast_gives(name: str, make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    layer = make()
    inputs = torch.randn(3, 4, 6, 6).bfloat16()
    with torch.no_grad():
        expected = layer(inputs.float())
    given = inputs.to(dtype).requires_grad_()
    with half():
        outputs = layer(given)
    outputs.float().square().sum().backward()
    # eight operations that round, at most, and the weights
    allowed = UNIT * (8 + rounding(layer)) * inputs.float().norm()
    assert (outputs.float() - expected).norm() <= allowed
    assert given.grad.dtype == dtype
    assert torch.isfinite(given.grad).all()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_kernels_and_retractions_are_computed_in_full_precision() -> None:
    layer = OrthoConv2d(4, 8, 3, padding=1)
    stiefel, point = Stiefel(), torch.randn(3, 5)
    dense = OrthoLinear(5, 3)
    with torch.no_grad():
        dense.weight.copy_(point)
    expected = layer.weight, stiefel.retract(point), stiefel.distance(point)
    with half():
        found = layer.weight, stiefel.retract(point), stiefel.distance(point)
        retract_parameters(dense)
    for one, other in zip((*expected, expected[1]), (*found, dense.weight), strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_means_of_half_precision_neither_overflow_nor_round(dtype: torch.dtype) -> None:
    inputs = (100 + torch.rand(1000, 2, 3)).to(dtype)  # the sum of a channel is 3e5, beyond float16
    layer = BatchCentering(2)
    layer(inputs)
    assert (layer.running_mean - inputs.double().mean(dim=(0, 2))).abs().max() < 1e-4  # float32 at 100: 1e-5


SHARES = torch.full((3,), 1 / 3)
LOSSES: list[tuple[Callable[[], losses.Loss], int]] = [
    (losses.KRLoss, 1),
    (losses.HingeLoss, 1),
    (lambda: losses.HKRLoss(margin=0.5, hinge_weight=5.0), 1),
    (lambda: losses.OneVsAllHKRLoss(SHARES, margin=0.5, hinge_weight=5.0), 3),
    (lambda: losses.SoftHKRLoss(SHARES, margin=0.5, hinge_weight=5.0, adaptive_temperature=True), 3),
    (losses.TemperatureCrossEntropyLoss, 1),
    (lambda: losses.TemperatureCrossEntropyLoss(10.0), 3),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("make", "outputs"), LOSSES)
def test_losses_of_half_precision_scores_are_computed_in_float32(
    make: Callable[[], losses.Loss], outputs: int, dtype: torch.dtype
) -> None:
    ours, full = make(), make()
    for _ in range(2):  # the second time with a running mean
        scores = torch.randn(12, outputs).to(dtype).requires_grad_()
        labels = torch.arange(12) % max(2, outputs)
        value, expected = ours(scores, labels), full(scores.detach().float(), labels)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)
    assert all(torch.equal(value, full.state_dict()[name]) for name, value in ours.state_dict().items())
    value.backward()
    assert scores.grad.dtype == dtype
