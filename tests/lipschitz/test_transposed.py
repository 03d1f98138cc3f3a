"""Transposed convolutions, groups and dilations: bounds of the norm on both sides, and of the rounding."""

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from otnn.certify import certify
from otnn.errors import InputError
from otnn.lipschitz import bound, convolution_bound, export, plain_structure
from otnn.lipschitz.layers import layer_bound
from otnn.models import Classifier
from otnn.nn import MaxMin, OrthoConv1d, OrthoConv2d, OrthoConvTranspose2d, UnitNormLinear
from tests.lipschitz.networks import Net
from tests.lipschitz.test_convolution import KINDS, LOOSE, ROUNDING, pick, random_kernel
from tests.operators import layer_matrix, norm

Shape = tuple[int, ...]
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d


def transposed(kernel: Tensor, **settings: Any) -> Transposed:
    """A layer without bias from its kernel (in, out / groups, ...)."""
    kind = nn.ConvTranspose1d if kernel.ndim == 3 else nn.ConvTranspose2d
    channels = (kernel.shape[0], kernel.shape[1] * settings.get("groups", 1))
    layer = nn.utils.skip_init(kind, *channels, kernel.shape[2:], bias=False, dtype=kernel.dtype, **settings)
    with torch.no_grad():
        layer.weight.copy_(kernel)
    return layer


def output_of(layer: nn.Module, shape: Shape) -> Shape:
    return tuple(layer(torch.zeros(1, *shape, dtype=next(layer.parameters()).dtype)).shape[1:])


def random_case(generator: torch.Generator, kind: str, dims: int) -> tuple[Transposed, Shape]:
    while True:
        groups, stride, dilation = pick(generator, 1, 2), pick(generator, 1, 3), pick(generator, 1, 3)
        inputs, outputs = groups * pick(generator, 1, 3), pick(generator, 1, 3)
        taps = [pick(generator, 1, 4) for _ in range(dims)]
        padding, added = pick(generator, 0, 3), pick(generator, 0, max(stride, dilation) - 1)
        kernel = random_kernel(generator, kind, (inputs, outputs, *taps))
        size = [pick(generator, 1, 4) for _ in range(dims)]
        after = [
            (n - 1) * stride - 2 * padding + dilation * (k - 1) + added + 1 for n, k in zip(size, taps, strict=True)
        ]
        if min(after) >= 1:
            settings = {"stride": stride, "dilation": dilation, "padding": padding, "output_padding": added}
            return transposed(kernel, groups=groups, **settings), (inputs, *size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [1, 2])
def test_random_layers_against_their_dense_twins(kind: str, dims: int) -> None:
    generator = torch.Generator().manual_seed(KINDS.index(kind) + 100 * dims)
    for _ in range(25):
        layer, shape = random_case(generator, kind, dims)
        true = norm(layer_matrix(layer, shape))
        found = layer_bound(layer, shape, output_of(layer, shape)).constant
        assert true <= found * ROUNDING, f"{layer} on {shape}"
        assert true <= layer_bound(layer, None, None).constant * ROUNDING, f"{layer} on {shape}"
        assert found <= true * (1 + 1e-6) or found < 1 + 1e-4  # small images count as the matrices that they are


@pytest.mark.parametrize("dims", [1, 2])
def test_far_from_borders_nothing_is_lost(dims: int) -> None:
    generator = torch.Generator().manual_seed(dims)
    for stride, dilation in itertools.product((1, 2, 3), (1, 2, 3) if dims == 1 else (1, 2)):
        layer = transposed(random_kernel(generator, "gaussian", (1, 1, *[3] * dims)), stride=stride, dilation=dilation)
        true = norm(layer_matrix(layer, (1, *[60 if dims == 1 else 24] * dims)))
        assert true <= layer_bound(layer, None, None).constant <= 1.06 * true


@pytest.mark.parametrize(("stride", "dilation"), list(itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4, 6))))
def test_strides_and_dilations_of_every_common_factor(stride: int, dilation: int) -> None:
    generator = torch.Generator().manual_seed(stride + 10 * dilation)
    kernel = random_kernel(generator, "gaussian", (2, 1, 1, 4))
    layer = nn.utils.skip_init(nn.Conv1d, 1, 2, 4, stride=stride, dilation=dilation, padding=3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(kernel[:, :, 0])
    settings = {"stride": (1, stride), "dilation": (1, dilation)}
    largest = 0.0
    for size in (1, 2, 5, 11, 24, 240):
        if size + 6 <= 3 * dilation:
            continue
        true = norm(layer_matrix(layer, (1, size)))
        assert true <= convolution_bound(kernel, size=(1, size), **settings) * ROUNDING
        largest = max(largest, true)
    assert largest <= convolution_bound(kernel, **settings) * ROUNDING
    assert convolution_bound(kernel, **settings) <= 1.06 * largest


@pytest.mark.parametrize(("stride", "dilation", "simpler"), [(1, 2, 1), (1, 5, 1), (2, 3, 2), (4, 6, 2), (3, 3, 1)])
def test_a_dilated_kernel_sees_the_pixels_of_one_interleaved_image(stride: int, dilation: int, simpler: int) -> None:
    kernel = torch.tensor([2 / 3, 2 / 3, -1 / 3], dtype=torch.float64).view(1, 1, 1, 3)
    for size in range(1, 40):
        settings = {"stride": (1, stride), "dilation": (1, dilation)}
        undilated = convolution_bound(kernel, size=(1, math.ceil(size / dilation)), stride=(1, simpler))
        assert convolution_bound(kernel, size=(1, size), **settings) == undilated


def test_groups_count_as_their_maximum() -> None:
    scales = torch.tensor([0.5, 3.0, 0.0]).view(3, 1, 1, 1)
    assert 3 <= bound(transposed(scales, groups=3)).constant < 3 + 1e-6
    shrinking = torch.full((4, 1, 1, 1), 0.5)
    assert 0.5 <= bound(transposed(shrinking, groups=4)).constant < 0.5 + 1e-6  # their product would be 1/16


ORTHOGONAL = [
    (lambda: OrthoConv1d(3, 8, 5, 2, 2), (3, 14)),
    (lambda: OrthoConv1d(6, 4, 3, 1, 2, dilation=2, groups=2), (6, 14)),
    (lambda: OrthoConv1d(6, 4, 4, 1, 1, padding_mode="circular"), (6, 14)),
    (lambda: OrthoConv2d(4, 8, 3, 1, 1, groups=4), (4, 8, 8)),
    (lambda: OrthoConv2d(4, 8, 3, 2, 2, dilation=3, groups=2), (4, 9, 9)),
    (lambda: OrthoConv2d(8, 8, 3, 1, 2, dilation=2), (8, 7, 7)),
    (lambda: OrthoConvTranspose2d(8, 4, 4, 2, 1), (8, 5, 5)),
    (lambda: OrthoConvTranspose2d(8, 2, 3, 2, 1, 1, groups=2), (8, 5, 5)),
    (lambda: OrthoConvTranspose2d(9, 1, 3, 2, 0, 1, dilation=3), (9, 4, 4)),
]


@pytest.mark.parametrize(("make", "shape"), ORTHOGONAL)
def test_orthogonal_layers(make: Any, shape: Shape) -> None:
    layer = make()
    true = norm(layer_matrix(layer, shape))
    for module in (layer, export(layer)):
        constant = bound(module, shape).constant
        assert true <= constant * (1 + 1e-6)
        assert constant <= LOOSE
    plain = export(layer)
    assert type(plain).__name__ == type(layer).__name__.removeprefix("Ortho")
    structure = plain_structure(make())
    structure.load_state_dict(plain.state_dict())
    x = torch.randn(3, *shape)
    assert torch.equal(structure(x), plain(x))
    assert bound(plain, shape).constant <= 1
    assert norm(layer_matrix(plain, shape)) >= true * (1 - 1e-6)
    assert norm(layer_matrix(plain, shape)) <= ROUNDING
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.01)  # stored weights count as they are, on their manifold or not
    assert bound(layer, shape).constant >= norm(layer_matrix(layer, shape)) > 1.005 * true


@pytest.mark.parametrize(("make", "shape"), ORTHOGONAL)
@pytest.mark.parametrize("exported", [False, True])
def test_the_rounding_of_the_forward_pass_is_covered(make: Any, shape: Shape, exported: bool) -> None:
    layer = make()
    with torch.no_grad():
        layer.bias.normal_()
    layer = export(layer) if exported else layer
    rounding = layer_bound(layer, shape, output_of(layer, shape)).rounding
    assert rounding is not None
    slope, offset = rounding.local(torch.float32)
    # the same kernel in both: what is composed in float32 counts in the constant of the layer
    plain = layer if exported else in_torch(layer)
    for scale in (1e-3, 1.0, 1e4):
        x = scale * torch.randn(20, *shape)
        with torch.no_grad():
            error = (layer(x).double() - plain.double()(x.double())).flatten(1).norm(dim=1)
            plain.float()
        allowed = slope * x.double().flatten(1).norm(dim=1) + offset
        assert bool((error <= allowed).all())
        assert bool((error >= 1e-4 * allowed).any())  # the bound is of the size of what it bounds


def in_torch(layer: nn.Module) -> nn.Module:
    """The plain layer with the kernel that is composed in float32."""
    plain = export(layer)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)  # type: ignore[operator, arg-type]
    return plain


@pytest.mark.parametrize("groups", [1, 4])
def test_rounding_that_adds_up_in_a_transposed_layer(groups: int) -> None:
    # equal terms whose partial sums are all rounded the same way: the error grows with their number
    terms = 4096 // groups
    layer = transposed(torch.full((terms * groups, 1, 3, 3), 1.0), groups=groups, padding=1)
    x = torch.full((1, terms * groups, 4, 4), 1 + 2.0**-12)
    rounding = layer_bound(layer, tuple(x.shape[1:]), output_of(layer, tuple(x.shape[1:]))).rounding
    assert rounding is not None
    assert rounding.operations == terms * 9 + 1
    assert rounding.weight == pytest.approx(math.sqrt(9 * terms * 9), rel=1e-10)  # one group's
    # || |W| || is attained far from borders: the weight is no less than the layer's true norm
    assert rounding.weight >= norm(layer_matrix(transposed(torch.full((8, 1, 3, 3), 1.0), padding=1), (8, 9, 9)))
    slope, offset = rounding.local(torch.float32)
    with torch.no_grad():
        error = float((layer(x).double() - layer.double()(x.double())).norm())
    assert error <= slope * float(x.double().norm()) + offset


@pytest.mark.parametrize(("taps", "stride", "windows"), [(3, 1, 9), (4, 2, 4), (3, 2, 4), (2, 2, 1)])
def test_each_output_sums_over_the_windows_that_it_is_in(taps: int, stride: int, windows: int) -> None:
    layer = transposed(torch.ones(5, 2, taps, taps), stride=stride)
    rounding = layer_bound(layer, (5, 6, 6), output_of(layer, (5, 6, 6))).rounding
    assert rounding is not None
    assert rounding.operations == 5 * windows + 1
    # counted: an input of ones gives the number of terms
    assert float(layer(torch.ones(1, 5, 6, 6)).detach().max()) == 5 * windows


@pytest.mark.parametrize("weight", [0.53, 0.58, 0.61, 0.67])
def test_many_outputs_of_one_pixel_sum_up_with_all_their_rounding(weight: float) -> None:
    # equal squares may all be rounded down as they are summed: a sum taken for exact would fall below the norm
    layer = transposed(torch.full((1, 200_000, 1, 1), weight))
    found = bound(layer, (1, 1, 1)).constant
    square = 200_000 * Fraction(float(layer.weight[0, 0].detach())) ** 2
    assert square <= Fraction(found) ** 2 <= square * (1 + Fraction(1, 10**4))


def test_a_network_of_them_is_certified_in_float32() -> None:
    body = nn.Sequential(
        OrthoConv2d(2, 8, 3, 2, 1, groups=2),
        MaxMin(),
        OrthoConvTranspose2d(8, 4, 2, stride=2),
        MaxMin(),
        nn.Flatten(2),
        OrthoConv1d(4, 4, 3, padding=4, dilation=4),
        nn.Flatten(),
    )
    model = Classifier(body, UnitNormLinear(4 * 64, 3), (2, 8, 8)).eval()
    images = torch.rand(6, 2, 8, 8)
    real, single = (certify(model, images, arithmetic=kind).radius for kind in ("real", "float32"))
    assert bool((single > 0).all())
    assert bool((single < real).all())
    assert bool((single > 0.8 * real - 1e-3).all())  # the rounding is a small share
    assert certify(export(model), images).radius.tolist() == pytest.approx(real.tolist(), abs=1e-5)


def test_a_size_that_the_caller_chooses_is_counted() -> None:
    kernel = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    up = transposed(kernel, stride=2, padding=1)
    net = Net(lambda net, x: net.up(x, output_size=[10, 9]), up=up)
    found = bound(net, (2, 5, 5)).constant
    assert norm(layer_matrix(net, (2, 5, 5))) <= found <= 1.05 * bound(up, (2, 5, 5)).constant


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose2d(5, 5, 3), nn.ConvTranspose1d(5, 5, 3), OrthoConv2d(5, 5, 3), OrthoConvTranspose2d(5, 5, 3)],
)
def test_a_batch_is_no_image(layer: nn.Module) -> None:
    # torch would take the samples of the batch for channels
    dims = layer.weight.ndim - 2  # type: ignore[operator, union-attr]
    with pytest.raises(InputError, match=rf"expected images of {dims + 1} dimensions, channels first, got shape \(8"):
        bound(layer, (8,) * dims)
