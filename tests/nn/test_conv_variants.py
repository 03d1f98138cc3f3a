"""Groups, dilation, one dimension and transposes of orthogonal convolutions."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.manifold import retract_parameters
from otnn.nn import OrthoConv1d, OrthoConv2d, OrthoConvTranspose2d
from otnn.nn.kernel import OrthoKernel
from tests.operators import layer_matrix, norm, on_the_torus, torus_shape

Layer = OrthoConv1d | OrthoConv2d | OrthoConvTranspose2d
KINDS = [OrthoConv1d, OrthoConv2d, OrthoConvTranspose2d]
# (in, out, kernel, stride, dilation, groups): one channel, isometric and not, coprime strides and dilations, depthwise
GRID = [
    (3, 3, 3, 1, 2, 3),
    (4, 6, 3, 1, 1, 2),
    (6, 4, 2, 1, 3, 2),
    (2, 8, 3, 2, 1, 2),
    (4, 4, 4, 3, 2, 2),
    (2, 3, 3, 2, 3, 1),
    (6, 18, 3, 2, 1, 3),
    (5, 2, 4, 1, 1, 1),
    (1, 7, 5, 3, 1, 1),
    (3, 6, 2, 2, 1, 3),
]


def exact(kind: type[Layer], case: tuple[int, ...], **options: object) -> Layer:
    fan_in, fan_out, taps, stride, dilation, groups = case
    layer = kind(fan_in, fan_out, taps, stride, dilation=dilation, groups=groups, **options).double()  # type: ignore
    retract_parameters(layer)
    return layer


def torus_matrix(layer: OrthoKernel) -> Tensor:
    shape = torus_shape(layer)
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return on_the_torus(layer, basis).detach().flatten(1).T


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("kind", KINDS)
def test_every_singular_value_is_1_on_the_torus(kind: type[Layer], case: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(torus_matrix(exact(kind, case)))
    assert (values - 1).abs().max() < 1e-12


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_padding_and_cropping_compress(kind: type[Layer], case: tuple[int, ...]) -> None:
    for padding in (0, 1, 3):
        layer = exact(kind, case, padding=padding)
        reach = layer.dilation * (layer.kernel_size - 1) + 1
        size = -(-10 // layer.stride) if layer.transposed else max(reach, 6)
        largest = norm(layer_matrix(layer, (layer.in_channels, *[size] * layer.dims)))
        assert 0.8 < largest <= 1 + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_layer_of_torch_with_its_own_weight(kind: type[Layer]) -> None:
    plain_kind = {OrthoConv1d: nn.Conv1d, OrthoConv2d: nn.Conv2d, OrthoConvTranspose2d: nn.ConvTranspose2d}[kind]
    for case, padding in itertools.product(GRID, (0, 2)):
        # all sizes by position, bias last: the order is torch's
        fan_in, fan_out, taps, stride, dilation, groups = case
        if kind is OrthoConvTranspose2d:
            settings = (fan_in, fan_out, taps, stride, padding, stride - 1, groups, True, dilation)
        else:
            settings = (fan_in, fan_out, taps, stride, padding, dilation, groups, True)
        layer, plain = kind(*settings), plain_kind(*settings)
        plain.load_state_dict({"weight": layer.weight.detach(), "bias": torch.nn.init.normal_(layer.bias).detach()})
        x = torch.randn(2, fan_in, *[11] * layer.dims)
        assert torch.allclose(layer(x), plain(x), atol=1e-5)


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("dims", [1, 2])
def test_groups_are_separate_layers(dims: int, case: tuple[int, ...]) -> None:
    layer = exact([OrthoConv1d, OrthoConv2d][dims - 1], case, padding=2, bias=False)
    fan_in, fan_out, taps, stride, dilation, groups = case
    x = torch.randn(2, fan_in, *[8] * dims, dtype=torch.float64)
    parts = []
    for group, part in enumerate(x.chunk(groups, dim=1)):
        alone = exact(
            type(layer), (fan_in // groups, fan_out // groups, taps, stride, dilation, 1), padding=2, bias=False
        )
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                whole = layer.get_parameter(name)
                if name == "projectors":
                    parameter.copy_(whole.view(-1, groups, *whole.shape[1:])[:, group])
                else:
                    parameter.copy_(whole[group] if groups > 1 else whole)
        parts.append(alone(part))
    assert (layer(x) - torch.cat(parts, dim=1)).abs().max() < 1e-13


@pytest.mark.parametrize("dilation", [2, 3])
def test_a_dilated_kernel_is_the_kernel_on_interleaved_images(dilation: int) -> None:
    layer = exact(OrthoConv2d, (2, 3, 3, 1, dilation, 1), bias=False)
    x = torch.randn(1, 2, 4 * dilation, 4 * dilation, dtype=torch.float64)
    found = layer(x)
    for row, column in itertools.product(range(dilation), range(dilation)):
        part = F.conv2d(x[:, :, row::dilation, column::dilation], layer.weight)
        assert (found[:, :, row::dilation, column::dilation] - part).abs().max() < 1e-13


@pytest.mark.parametrize(("stride", "dilation"), [(2, 2), (3, 6), (4, 2), (2, 4)])
def test_control_a_common_factor_of_stride_and_dilation_loses_pixels(stride: int, dilation: int) -> None:
    layer = exact(OrthoConv2d, (1, stride**2, stride, stride, 1, 1))
    layer.dilation = dilation  # what the constructor refuses
    assert torch.linalg.svdvals(torus_matrix(layer))[-1] < 1e-6


@pytest.mark.parametrize("case", GRID)
def test_a_transpose_is_the_adjoint(case: tuple[int, ...]) -> None:
    fan_in, fan_out, *rest = case
    layer = exact(OrthoConvTranspose2d, case, padding=1, bias=False)
    adjoint = exact(OrthoConv2d, (fan_out, fan_in, *rest), padding=1, bias=False)
    adjoint.load_state_dict(layer.state_dict())
    x = torch.randn(2, fan_in, 3, 4, dtype=torch.float64)
    outputs = layer(x).detach()
    images = torch.randn_like(outputs)
    product = float((x * adjoint(images).detach()).sum())
    assert float((outputs * images).sum()) == pytest.approx(product, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 2), (1, 3)])
def test_a_transpose_without_padding_is_an_isometry(stride: int, dilation: int) -> None:
    layer = exact(OrthoConvTranspose2d, (4, 4, 3, stride, dilation, 2), bias=False, output_padding=stride - 1)
    x = torch.randn(5, 4, 6, 3, dtype=torch.float64)
    assert ((layer(x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1) - 1).abs() < 1e-13).all()


def test_depthwise_layers_of_one_channel_each_are_shifts() -> None:
    # a filter of one channel whose response has modulus 1 at every frequency has one tap: nothing else is orthogonal
    weight = exact(OrthoConv2d, (3, 3, 3, 1, 1, 3)).weight
    assert sorted(weight.abs().flatten().tolist()) == [0.0] * 24 + [1.0] * 3
    # two outputs for each input make room for filters
    weight = exact(OrthoConv2d, (3, 6, 3, 1, 1, 3)).weight
    assert (weight.abs() > 1e-3).double().mean() > 0.9


def test_channels_last_leaves_the_factors_of_groups_alone() -> None:
    layer = OrthoConv2d(8, 8, 3, padding=1, groups=2).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    retract_parameters(layer.double())
    assert (torch.linalg.svdvals(torus_matrix(layer)) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_made_on_the_device_and_in_the_dtype_that_are_asked_for(kind: type[Layer]) -> None:
    for init in ("orthogonal", "identity"):
        layer = kind(4, 8, 3, 2, groups=2, device="meta", dtype=torch.float64, init=init)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize("kind", [OrthoConv1d, OrthoConv2d])
def test_circular_padding_counts_the_dilation(kind: type[Layer]) -> None:
    layer = kind(2, 2, 3, padding=3, dilation=3, padding_mode="circular")
    assert layer(torch.zeros(1, 2, *[7] * layer.dims)).shape == (1, 2, *[7] * layer.dims)
    with pytest.raises(InputError, match="expects images of at least 7 pixels, got 6"):
        layer(torch.zeros(1, 2, *[6] * layer.dims))
    layer = kind(2, 2, 3, padding=4, dilation=3, padding_mode="circular")
    with pytest.raises(InputError, match="twice; expected a size divisible by the stride and padding <= 3"):
        layer(torch.zeros(1, 2, *[8] * layer.dims))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups": 2}, "divisible by groups, got 3 and 9 for 2 groups; 3 groups, or a divisor of that, would do"),
        ({"groups": 0}, "dilation, groups >= 1, got 3, 9, 4, 1 and 0, and 1, 0"),
        ({"dilation": 0}, "dilation, groups >= 1"),
        ({"stride": 2, "dilation": 2}, r"got 2 and 2: .* stride 2 admits dilation 1 or 3, and stride 1 any dilation"),
        ({"stride": 4, "dilation": 6}, r"multiples of 2 apart and skip the others; stride 4 admits dilation 1 or 5"),
        ({"stride": 5}, "expected kernel_size >= stride, got 4 < 5"),
        ({"padding": -1}, "padding >= 0"),
        ({"padding": "same"}, r"padding: expected a number of pixels, got 'same'; at stride 1, dilation \* \(kernel"),
        ({"dilation": 1.5}, "dilation: expected a whole number, got 1.5"),
        ({"padding_mode": "reflect"}, 'padding_mode: expected "zeros".*so .* norm exceeds 1'),
        ({"padding_mode": "replicate"}, 'padding_mode: expected "zeros".*so .* norm exceeds 1'),
        ({"init": "zeros"}, 'init: expected "orthogonal" or "identity", got \'zeros\''),
    ],
)
def test_what_admits_no_orthogonal_operator_is_refused(
    kind: type[Layer], arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        kind(3, 9, 4, **arguments)


def test_what_only_a_transpose_refuses() -> None:
    with pytest.raises(
        InputError, match=r"output_padding: expected 0 to 2, less than the stride or the dilation, got 3"
    ):
        OrthoConvTranspose2d(2, 2, 3, stride=3, output_padding=3)
    with pytest.raises(InputError, match="padding_mode: expected \"zeros\", got 'circular': a transposed convolution"):
        OrthoConvTranspose2d(2, 2, 3, padding_mode="circular")


def test_sizes_of_one_dimension_may_come_as_tuples() -> None:
    layer = OrthoConv1d(2, 2, (3,), (2,), (1,))
    assert (layer.kernel_size, layer.stride, layer.padding) == (3, 2, 1)
    with pytest.raises(InputError, match=r"kernel_size: expected one size, got \(3, 3\)"):
        OrthoConv1d(2, 2, (3, 3))


def test_representations_tell_the_sizes() -> None:
    start = "4, 8, kernel_size=3, stride=2, padding=1, padding_mode=zeros, bias=True"
    assert repr(OrthoConv1d(4, 8, 3, 2, 1)) == f"OrthoConv1d({start})"
    assert repr(OrthoConv2d(4, 8, 3, 2, 1, 3, 2)) == f"OrthoConv2d({start}, dilation=3, groups=2)"
    layer = OrthoConvTranspose2d(4, 8, 3, 2, 1, 1, init="identity")
    assert repr(layer) == f"OrthoConvTranspose2d({start}, init=identity, output_padding=1)"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(2, 12), (8, 4), (3, 64)], ids=str)
def test_a_kernel_is_the_same_number_by_number_without_a_gradient(channels: tuple[int, int], stride: int) -> None:
    """A certificate, made without gradients, speaks of the very weights that an explanation differentiates."""
    for kind in (OrthoConv1d, OrthoConv2d, OrthoConvTranspose2d):
        layer = kind(*channels, 3, stride=stride)
        with_gradient = layer.weight.detach()
        with torch.no_grad():
            assert torch.equal(layer.weight, with_gradient)


def test_sizes_may_be_whole_numbers_of_any_type() -> None:
    layer = OrthoConv1d(np.int64(2), 4, np.int64(3), groups=np.int64(2))
    assert (layer.in_channels, layer.kernel_size, layer.groups) == (2, 3, 2)
    assert all(type(size) is int for size in (layer.in_channels, layer.kernel_size, layer.groups))
    for size in (np.array([3, 3]), torch.tensor([3, 3]), (3.0,)):
        with pytest.raises(InputError, match="kernel_size: expected a whole number"):
            OrthoConv1d(2, 2, size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"out_channels: expected a whole number, got 8\.0"):
        OrthoConv1d(2, 8.0, 3)  # type: ignore[arg-type]
