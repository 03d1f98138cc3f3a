import itertools

import pytest
import torch
from torch import nn

from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.manifold import constrained_parameters
from otnn.models import ARCHITECTURES, Classifier, build, default_widths, parameter_count, predict
from otnn.nn import (
    Centering,
    ConvexResidual,
    MaxMin,
    OrthoConv2d,
    OrthoLinear,
    ScaledAdaptiveAvgPool2d,
    UnitNormLinear,
)

NETWORKS = [
    ("dense", (1, 8, 8), 10, (16, 8)),
    ("dense", (3, 5, 7), 2, (6,)),
    ("dense", (1, 1, 1), 3, (2, 4)),
    ("conv", (1, 8, 8), 10, (4, 8, 6)),
    ("conv", (3, 9, 12), 2, (4, 6)),
    ("conv", (1, 28, 28), 4, (2, 4, 6, 8)),
    ("conv", (2, 8, 128), 3, (4, 4, 4, 4)),
    ("resnet", (1, 8, 8), 10, (4, 6, 8)),
    ("resnet", (3, 17, 34), 2, (4, 4, 6)),
    ("resnet", (1, 64, 64), 3, (2, 4, 4, 4, 6)),
]


@pytest.mark.parametrize(("architecture", "shape", "classes", "widths"), NETWORKS)
@pytest.mark.parametrize("constrained", [True, False])
def test_shapes_of_both_twins(
    architecture: str, shape: tuple[int, int, int], classes: int, widths: tuple[int, ...], constrained: bool
) -> None:
    model = build(architecture, shape, classes, widths=widths, constrained=constrained)
    assert isinstance(model, Classifier)
    assert model(torch.rand(3, *shape)).shape == (3, 1 if classes == 2 else classes)
    assert model.body(torch.rand(3, *shape)).shape == (3, widths[-1])
    assert (model.classes, model.input_shape) == (classes, shape)


@pytest.mark.parametrize(("architecture", "shape", "classes", "widths"), NETWORKS)
def test_every_constrained_network_is_1_lipschitz(
    architecture: str, shape: tuple[int, int, int], classes: int, widths: tuple[int, ...]
) -> None:
    model = build(architecture, shape, classes, widths=widths)
    assert bound(model.body).constant <= 1 + 1e-5
    assert torch.allclose(model.head.weight.norm(dim=1), torch.ones(1 if classes == 2 else classes), atol=1e-6)
    model = model.double()
    x, y = torch.rand(2, 20, *shape, dtype=torch.float64)
    ratio = (model.body(x) - model.body(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratio.max() <= 1 + 1e-5


@pytest.mark.parametrize(("architecture", "shape", "classes", "widths"), NETWORKS)
def test_every_weight_of_both_twins_learns(
    architecture: str, shape: tuple[int, int, int], classes: int, widths: tuple[int, ...]
) -> None:
    for constrained in (True, False):
        model = build(architecture, shape, classes, widths=widths, constrained=constrained)
        model(torch.rand(16, *shape)).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.numel():
                assert parameter.grad is not None, name
                assert parameter.grad.norm() > 0, name


def linear_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """(out, in, ...) of each layer with a weight to learn."""
    kinds = (nn.Linear, nn.Conv2d, OrthoConv2d)
    return [(type(m).__name__[-6:], *m.weight.shape) for m in model.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize(("architecture", "shape", "classes", "widths"), NETWORKS)
def test_twins_have_the_same_widths(
    architecture: str, shape: tuple[int, int, int], classes: int, widths: tuple[int, ...]
) -> None:
    otnn, twin = (build(architecture, shape, classes, widths=widths, constrained=c) for c in (True, False))
    assert linear_shapes(otnn) == linear_shapes(twin)
    assert list(constrained_parameters(twin)) == []
    layers = {type(layer) for layer in twin.body}
    assert layers & {nn.BatchNorm1d, nn.BatchNorm2d}
    assert nn.ReLU in layers
    assert not layers & {MaxMin, OrthoLinear, OrthoConv2d}


def test_the_layers_of_a_conv_network() -> None:
    model = build("conv", (1, 28, 28), 10, widths=(4, 8, 16))
    kinds = [type(layer) for layer in model.body]
    stage = [OrthoConv2d, MaxMin, OrthoConv2d, MaxMin]
    assert kinds == [Centering, *stage, *stage, nn.Flatten, OrthoLinear, MaxMin]
    convolutions = [layer for layer in model.body if isinstance(layer, OrthoConv2d)]
    assert [(c.in_channels, c.out_channels, c.stride) for c in convolutions] == [
        (1, 4, 1),
        (4, 4, 2),
        (4, 8, 1),
        (8, 8, 2),
    ]
    assert model.body[-2].in_features == 8 * 7 * 7
    assert isinstance(model.head, UnitNormLinear)


def test_the_layers_of_a_residual_network() -> None:
    model = build("resnet", (3, 36, 40), 10, widths=(4, 8, 16))
    kinds = [type(layer) for layer in model.body]
    stage = [OrthoConv2d, MaxMin, ConvexResidual, MaxMin, ConvexResidual, MaxMin]
    assert kinds == [Centering, *stage, *stage, ScaledAdaptiveAvgPool2d, nn.Flatten, OrthoLinear, MaxMin]
    halving = [layer for layer in model.body if isinstance(layer, OrthoConv2d)]
    assert [(c.in_channels, c.out_channels, c.stride) for c in halving] == [(3, 4, 2), (4, 8, 2)]
    for block in model.body:
        if isinstance(block, ConvexResidual):
            assert [type(layer) for layer in block.branch] == [OrthoConv2d, MaxMin, OrthoConv2d]
            assert 0 < block.mix.alpha < 1
    assert model.body[-2].in_features == 8 * 8 * 8
    assert isinstance(model.head, UnitNormLinear)
    small = build("resnet", (3, 32, 32), 10, widths=(4, 8, 16))  # nothing to pool
    assert ScaledAdaptiveAvgPool2d not in {type(layer) for layer in small.body}


def test_the_twin_of_a_residual_network_sums() -> None:
    twin = build("resnet", (1, 8, 8), 3, widths=(4, 8), constrained=False).eval()
    block = twin.body[4]
    assert [type(layer) for layer in block.branch] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.Conv2d,
        nn.BatchNorm2d,
    ]
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(block(x), x + block.branch(x))
    assert type(twin.body[5]) is nn.ReLU


def test_the_mean_of_the_training_images_is_subtracted() -> None:
    model = build("dense", (2, 3, 3), 3, widths=(4,), mean=torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert model.body[0].mean.tolist() == [0.25, 0.75]
    assert model.body[0].mean.dtype == torch.float32
    assert build("dense", (2, 3, 3), 3, widths=(4,)).body[0].mean.tolist() == [0.5, 0.5]


def test_networks_repeat_with_their_seed_and_load_their_state() -> None:
    for architecture, constrained in itertools.product(ARCHITECTURES, [True, False]):
        torch.manual_seed(4)
        first = build(architecture, (1, 8, 8), 3, widths=(4, 6), constrained=constrained)
        second = build(architecture, (1, 8, 8), 3, widths=(4, 6), constrained=constrained)
        torch.manual_seed(4)
        again = build(architecture, (1, 8, 8), 3, widths=(4, 6), constrained=constrained)
        x = torch.rand(2, 1, 8, 8)
        assert torch.equal(first.eval()(x), again.eval()(x))
        assert not torch.equal(first(x), second.eval()(x))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(x), second(x))


def test_predict_decides_by_sign_or_by_the_largest() -> None:
    assert predict(torch.tensor([[-1.0], [0.0], [-0.0], [1e-30]])).tolist() == [0, 0, 0, 1]
    assert predict(torch.tensor([[1.0, 2.0, 2.0], [3.0, -1.0, 0.0]])).tolist() == [1, 0]
    assert predict(torch.zeros(0, 3)).shape == (0,)


def test_default_widths() -> None:
    assert default_widths("dense", (3, 64, 64)) == (256, 256, 256)
    assert default_widths("conv", (1, 8, 8)) == (32, 128)
    assert default_widths("conv", (3, 128, 128)) == (32, 64, 128, 128, 128)
    assert default_widths("resnet", (3, 224, 224)) == (32, 64, 128, 128, 128, 128)
    for size in (64, 65, 96, 128, 160, 224):
        widths = [2] * len(default_widths("resnet", (1, size, size)))
        assert build("resnet", (1, size, size), 2, widths=widths)(torch.rand(1, 1, size, size)).shape == (1, 1)
    for size in range(8, 129, 5):
        build("conv", (1, size, size), 2, widths=[2] * len(default_widths("conv", (1, size, size))))


def test_parameter_count_by_hand() -> None:
    model = build("dense", (1, 2, 2), 3, widths=(6,))
    assert parameter_count(model) == (4 * 6 + 6) + (6 * 3 + 3)
    assert parameter_count(build("dense", (1, 2, 2), 3, widths=(6,), constrained=False)) == 24 + 12 + 21


REFUSED = [
    (("mlp", (1, 8, 8), 10, (16,)), "architecture: expected one of dense, conv, resnet, got 'mlp'"),
    (("dense", (1, 8, 8), 1, (16,)), "classes: expected at least 2, got 1"),
    (("dense", (1, 8, 8), 10, ()), "widths: expected even numbers >= 2 (MaxMin sorts pairs), got []"),
    (("dense", (1, 8, 8), 10, (16, 7)), "widths: expected even numbers >= 2 (MaxMin sorts pairs), got [16, 7]"),
    (("dense", (1, 8, 8), 10, (0,)), "widths: expected even numbers >= 2"),
    (("dense", (1, 8, 8), 10, (-2,)), "widths: expected even numbers >= 2"),
    (("conv", (1, 7, 8), 10, (4, 8)), "conv: expected images of 8 to 128 pixels, got 7x8; set --size"),
    (("conv", (1, 8, 129), 10, (4, 8)), "conv: expected images of 8 to 128 pixels, got 8x129; set --size"),
    (("resnet", (1, 8, 225), 10, (4, 8)), "resnet: expected images of 8 to 224 pixels, got 8x225; set --size"),
    (("resnet", (1, 8, 8), 10, (4,)), "resnet: 0 stages do not fit 8x8 pixels: expected 1 to 3 stage widths"),
    (("conv", (1, 8, 8), 10, (4,)), "conv: 0 stages do not fit 8x8 pixels: expected 1 to 3 stage widths"),
    (("conv", (1, 8, 8), 10, (4, 4, 4, 4, 8)), "conv: 4 stages do not fit 8x8 pixels: expected 1 to 3 stage widths"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_sizes_that_do_not_fit_are_refused(arguments: tuple, words: str) -> None:  # type: ignore[type-arg]
    architecture, shape, classes, widths = arguments
    for constrained in (True, False):
        with pytest.raises(InputError) as caught:
            build(architecture, shape, classes, widths=widths, constrained=constrained)
        assert str(caught.value).startswith(words)
