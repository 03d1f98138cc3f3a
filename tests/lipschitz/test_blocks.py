"""Rounding of pooling, centring and residual blocks: executions and exact arithmetic against the error bound."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from otnn.certify import certify
from otnn.lipschitz.bounds import bound
from otnn.lipschitz.layers import layer_bound
from otnn.lipschitz.residual import mix_constant, mix_weights
from otnn.models import Classifier
from otnn.nn import (
    AdaptiveL2NormPool2d,
    BatchCentering,
    ConcatResidual,
    ConvexResidual,
    L2NormPool2d,
    LayerCentering,
    MaxMin,
    OrthoConv2d,
    OrthoLinear,
    ScaledAdaptiveAvgPool2d,
    ScaledAvgPool2d,
)
from tests.exact import Shape, covers, distance, exactly, fractions
from tests.lipschitz.test_forward_error import inputs, run
from tests.operators import layer_matrix, norm


def centred(channels: int) -> nn.Module:
    """A batch centring with a running mean and a bias that hardly cancel."""
    layer = BatchCentering(channels)
    layer(torch.rand(8, channels))
    nn.init.normal_(layer.bias)
    return layer.eval()


def biased(layer: LayerCentering) -> nn.Module:
    nn.init.normal_(layer.bias)
    return layer


def branch() -> nn.Sequential:
    return nn.Sequential(OrthoConv2d(4, 4, 3, padding=1), MaxMin(), OrthoConv2d(4, 4, 3, padding=1))


NETS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "scaled average": (lambda: ScaledAvgPool2d((3, 2)), (2, 6, 4)),
    "adaptive average": (lambda: ScaledAdaptiveAvgPool2d((2, 3)), (2, 5, 7)),
    "norms": (lambda: L2NormPool2d(3), (2, 6, 6)),
    "adaptive norms": (lambda: AdaptiveL2NormPool2d((2, 3)), (2, 5, 7)),
    "batch centring": (lambda: centred(3), (3, 2, 2)),
    "layer centring": (lambda: biased(LayerCentering(3)), (3, 2, 4)),
    "centring of samples": (lambda: biased(LayerCentering(3, over="sample")), (3, 5, 4)),
    "mix": (lambda: ConvexResidual(nn.Linear(6, 6), 0.3), (6,)),
    "mix of mixes": (lambda: ConvexResidual(nn.Sequential(ConvexResidual(branch(), 0.7), MaxMin()), 0.4), (4, 5, 5)),
    "off the interval": (lambda: off(ConvexResidual(nn.Linear(6, 6)), -0.6), (6,)),
    "beside": (lambda: ConcatResidual(nn.Linear(6, 4), kept=2), (8,)),
    "beside images": (lambda: ConcatResidual(branch(), kept=1), (5, 5, 4)),
}


def off(block: ConvexResidual, alpha: float) -> nn.Module:
    with torch.no_grad():
        block.mix.alpha.fill_(alpha)
    return block


@pytest.mark.parametrize("name", NETS)
def test_float32_stays_within_the_bound(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    x, most = inputs(shape), 0.0
    for _ in range(3):
        net = make()
        found, reference = run(net, x), run(net, x.double())
        gap = (found.scores.double() - reference.scores).flatten(1).norm(dim=1)
        assert bool((gap <= found.error + reference.error).all())
        assert bool((reference.error < 1e-7 * found.error).all())
        most = max(most, float((gap / found.error).max()))
    assert most > 1e-3  # the bound is not far from what happens


@pytest.mark.parametrize("radius", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", NETS)
def test_around_and_growth_bound_the_error_within_the_radius(name: str, radius: float) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    net, x = make(), inputs(shape, 3)
    found = run(net, x)
    for trial in range(4):
        way = x if trial == 0 else torch.randn(x.shape)
        way = nn.functional.normalize(way.double().flatten(1)).view_as(x)
        moved = (x + radius * way).float()
        there, reference = run(net, moved), run(net, moved.double())
        gap = (there.scores.double() - reference.scores).flatten(1).norm(dim=1)
        far = (moved.double() - x.double()).flatten(1).norm(dim=1)
        assert bool((gap <= found.around + found.growth * far + reference.error).all())
        assert bool((there.error <= (found.around + found.growth * far) * (1 + 1e-12)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 1e-30, 0.3, 0.5, 0.8, 1.0, -0.6])
def test_blocks_against_exact_arithmetic(alpha: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 6), MaxMin())
    x = inputs((8,), 1).to(dtype)
    net = ConcatResidual(off(ConvexResidual(dense), alpha), kept=2).to(dtype)
    found = run(net, x)
    share = Fraction(float(net.branch.mix.alpha.detach()))
    for sample, scores, error in zip(x, found.scores, found.error.tolist(), strict=True):
        values = fractions(sample)
        changed, _ = exactly(dense, values[2:], (6,))
        mixed = [(1 - share) * a + share * b for a, b in zip(values[2:], changed, strict=True)]
        assert covers(error, distance(fractions(scores), values[:2] + mixed))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ScaledAvgPool2d(2), (1, 4, 4)),
        (ScaledAdaptiveAvgPool2d((2, 3)), (1, 5, 7)),
        (LayerCentering(6), (6,)),
        (LayerCentering(2, over="sample"), (2, 2, 3)),
    ],
)
def test_weights_bound_the_absolute_values(layer: nn.Module, shape: Shape) -> None:
    rounding = layer_bound(layer, shape, tuple(layer(torch.zeros(1, *shape)).shape[1:])).rounding
    assert rounding is not None
    true = norm(layer_matrix(layer, shape).abs())
    assert true <= rounding.weight * (1 + 1e-12)
    assert rounding.weight <= 1.25 * true


def test_an_error_of_separate_channels_does_not_add_up() -> None:
    """Twelve blocks in which channels pass by: the error grows with the root of their number, not by 2 each."""
    torch.manual_seed(0)
    net = nn.Sequential(*[ConcatResidual(OrthoLinear(4, 4, bias=False), kept=4) for _ in range(12)])
    x = torch.rand(5, 8)
    assert bound(net).constant < 1.0001
    once, all_of_them = run(net[:1], x).error, run(net, x).error
    assert bool((all_of_them < 2 ** (12 / 2) * 6 * once).all())


def test_sums_of_mixes() -> None:
    for alpha in (0.0, 0.1, 1 / 3, 0.9, 1.0):
        assert mix_constant(alpha, 1.0, 1.0) == 1.0  # no rounding outward beyond what a convex mix can reach
        assert mix_constant(alpha, 1.0, 3.0) == pytest.approx(1 + 2 * alpha)
        assert Fraction(mix_constant(alpha, 0.3, 0.7)) >= (1 - Fraction(alpha)) * Fraction(0.3) + Fraction(
            alpha
        ) * Fraction(0.7)
        first, second = mix_weights(alpha)
        assert Fraction(first) >= 1 - Fraction(alpha)
        assert Fraction(second) == Fraction(alpha)
    assert mix_constant(-1.0, 1.0, 1.0) == pytest.approx(3)


def test_certificates_of_all_of_them_hold_against_a_search() -> None:
    torch.manual_seed(3)
    body = nn.Sequential(
        nn.PixelUnshuffle(2),
        OrthoConv2d(4, 8, 3, padding=1),
        centred(8),
        ConvexResidual(nn.Sequential(OrthoConv2d(8, 8, 3, padding=1), MaxMin(), OrthoConv2d(8, 8, 3, padding=1)), 0.3),
        MaxMin(),
        ConcatResidual(OrthoConv2d(4, 4, 3, padding=1), kept=4),
        LayerCentering(8),
        AdaptiveL2NormPool2d(2),
        nn.Flatten(),
    )
    model = Classifier(body, nn.Linear(32, 3), (1, 8, 8)).eval()
    x = torch.rand(8, 1, 8, 8)
    real, executed = certify(model, x), certify(model, x, arithmetic="float32")
    assert bool((executed.radius > 0).all())
    assert bool((executed.radius < real.radius).all())
    assert bool((executed.radius > 0.7 * real.radius).all())
    for step in (0.1, 0.3):  # ascent of the strongest rival within the radius; far beyond it, it succeeds
        for factor, flips in ((1.0, False), (50.0, True)):
            moved = ascent(model, x, real.prediction, factor * real.radius.float(), step)
            changed = model(moved).argmax(dim=1) != real.prediction
            assert bool(changed.any()) == flips


def ascent(model: nn.Module, x: Tensor, label: Tensor, radius: Tensor, step: float) -> Tensor:
    """Twenty gradient steps of the margin, each brought back into the ball of the radius, a little less."""
    size = radius.view(-1, 1, 1, 1) * (1 - 1e-6)
    delta = torch.zeros_like(x)
    for _ in range(20):
        delta.requires_grad_()
        scores = model(x + delta)
        own = scores.gather(1, label.unsqueeze(1)).squeeze(1)
        rival = scores.scatter(1, label.unsqueeze(1), -torch.inf).amax(dim=1)
        (gradient,) = torch.autograd.grad((rival - own).sum(), delta)
        delta = delta.detach() + step * size * nn.functional.normalize(gradient.flatten(1)).view_as(x)
        delta = delta * (size / delta.flatten(1).norm(dim=1).view_as(size).clamp(min=1e-30)).clamp(max=1)
    return x + delta
