import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.manifold import Stiefel, retract_parameters
from otnn.nn import OrthoConv2d
from tests.operators import circular_matrix, convolution_matrix, norm

# (in, out, kernel, stride): isometric, co-isometric and square; odd and even kernels; one channel; k = s; k > 2 s
GRID = [
    *itertools.product([1, 2, 3], [1, 2, 5], [1, 2, 3], [1]),
    *itertools.product([1, 3], [1, 4, 6, 13], [2, 3, 4], [2]),
    (4, 4, 5, 1),
    (2, 3, 7, 1),
    (3, 2, 4, 1),
    (2, 7, 5, 2),
    (4, 1, 6, 2),
    (1, 9, 3, 3),
    (2, 5, 4, 3),
    (1, 20, 5, 3),
]


def exact(*arguments: int, **options: object) -> OrthoConv2d:
    layer = OrthoConv2d(*arguments, **options).double()  # type: ignore[arg-type]
    retract_parameters(layer)
    return layer


@pytest.mark.parametrize(("fan_in", "fan_out", "taps", "stride"), GRID)
def test_every_singular_value_is_1_on_the_torus(fan_in: int, fan_out: int, taps: int, stride: int) -> None:
    layer = exact(fan_in, fan_out, taps, stride)
    assert layer.weight.shape == (fan_out, fan_in, taps, taps)
    size = stride * math.ceil(max(taps, 4) / stride)
    values = torch.linalg.svdvals(circular_matrix(layer.weight, size, stride))
    assert (values - 1).abs().max() < 1e-12


@pytest.mark.parametrize(("fan_in", "fan_out", "taps", "stride"), GRID)
def test_zero_padding_compresses(fan_in: int, fan_out: int, taps: int, stride: int) -> None:
    layer = OrthoConv2d(fan_in, fan_out, taps, stride, padding=taps // 2)  # as used: float32
    size = max(6, taps)
    values = torch.linalg.svdvals(convolution_matrix(layer.weight, (size, size), stride, taps // 2))
    assert values[0] <= 1 + 1e-6
    # most of the energy stays: a layer that shrinks would show here. Gaussian inputs keep the mean square of the
    # singular values; the border of 3 of 6 pixels may take a good part
    assert values[0] > 0.85
    assert values.square().mean() > 0.25


@pytest.mark.parametrize("padding", [0, 1, 2, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_conv2d_with_its_own_weight(stride: int, padding: int) -> None:
    layer, x = OrthoConv2d(3, 4, 3, stride, padding), torch.randn(2, 3, 7, 6)
    with torch.no_grad():
        layer.bias.copy_(torch.randn(4))
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, stride, padding))
    plain = nn.Conv2d(3, 4, 3, stride, padding)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    assert torch.allclose(plain(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_circular_padding_is_that_of_torch(stride: int) -> None:
    layer = OrthoConv2d(3, 4, 3, stride, 1, padding_mode="circular")
    plain = nn.Conv2d(3, 4, 3, stride, 1, padding_mode="circular")
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    x = torch.randn(2, 3, 6, 8)
    assert torch.allclose(plain(x), layer(x), atol=1e-6)


def test_circular_padding_keeps_every_norm() -> None:
    layer = exact(3, 12, 3, 2, 1, padding_mode="circular", bias=False)
    x = torch.randn(4, 3, 6, 10, dtype=torch.float64)
    assert torch.allclose(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-13)


# --- the kernel, composed once more and slowly -------------------------------------------------------------------


def naive_kernel(layer: OrthoConv2d) -> Tensor:
    """mix * [P, I - P] * ... * expand, as dictionaries of taps: (row, column) -> matrix."""
    stride, inner = layer.stride, max(layer.in_channels, layer.out_channels // layer.stride**2)
    frames = layer.projectors
    if frames is None:  # nothing to learn: no taps beyond the block, or projectors of rank 0
        frames = torch.zeros(2 * (layer.kernel_size - stride), inner, 0, dtype=torch.float64)
    identity = torch.eye(inner, dtype=torch.float64)
    kernel = {(0, 0): identity}
    if layer.mix is not None:
        blocks = layer.mix.detach().view(layer.out_channels, inner, stride, stride)
        kernel = {(i, j): blocks[:, :, i, j] for i in range(stride) for j in range(stride)}
    for index, frame in enumerate(frames.detach()):
        projector = frame @ frame.T
        assert (projector @ projector - projector).abs().max() < 1e-13
        first, second = identity - projector, projector
        if index // 2 % 2:
            first, second = second, first
        step = (1, 0) if index % 2 else (0, 1)
        filtered: dict[tuple[int, int], Tensor] = {}
        for (i, j), tap in kernel.items():
            for place, matrix in (((i, j), first), ((i + step[0], j + step[1]), second)):
                filtered[place] = filtered.get(place, 0) + tap @ matrix
        kernel = filtered
    if layer.expand is not None:
        kernel = {place: tap @ layer.expand.detach() for place, tap in kernel.items()}
    result = torch.zeros(layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size).double()
    for (i, j), tap in kernel.items():
        result[:, :, i, j] = tap
    return result


@pytest.mark.parametrize(("fan_in", "fan_out", "taps", "stride"), GRID)
def test_the_kernel_is_the_composition_of_its_blocks(fan_in: int, fan_out: int, taps: int, stride: int) -> None:
    layer = exact(fan_in, fan_out, taps, stride)
    assert (layer.weight - naive_kernel(layer)).abs().max() < 1e-13


def test_the_forward_pass_is_its_blocks_one_after_the_other() -> None:
    layer = exact(2, 12, 4, 2, bias=False)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    z = torch.einsum("oi,nihw->nohw", layer.expand, x)
    for index in reversed(range(len(layer.projectors))):  # the last factor of the product acts first
        projector = layer.projectors[index] @ layer.projectors[index].T
        first, second = torch.eye(3).double() - projector, projector
        if index // 2 % 2:
            first, second = second, first
        shifted = torch.roll(z, -1, dims=2 if index % 2 else 3)
        z = torch.einsum("oi,nihw->nohw", first, z) + torch.einsum("oi,nihw->nohw", second, shifted)
    blocks = F.pixel_unshuffle(z, 2)
    z = torch.einsum("oi,nihw->nohw", layer.mix, blocks)
    assert (layer(x) - z[:, :, :3, :3]).abs().max() < 1e-13  # where nothing was wrapped


def test_a_filter_is_orthogonal_at_every_frequency() -> None:
    frame = Stiefel().retract(torch.randn(5, 2, dtype=torch.float64))
    projector = (frame @ frame.T).to(torch.complex128)
    identity = torch.eye(5, dtype=torch.complex128)
    for omega in torch.linspace(0, 2 * math.pi, 17, dtype=torch.float64):
        response = projector + torch.exp(1j * omega) * (identity - projector)
        assert (response @ response.mH - identity).abs().max() < 1e-14


def test_control_a_reshaped_orthogonal_kernel_is_not_orthogonal() -> None:
    # RKO: an orthogonal matrix reshaped to a kernel, scaled by 1/k: its norm is at most 1, and far below 1 elsewhere
    matrix = Stiefel().retract(torch.randn(4, 4 * 9, dtype=torch.float64))
    reshaped = torch.linalg.svdvals(circular_matrix(matrix.view(4, 4, 3, 3), 6))
    scaled = reshaped / 3
    assert reshaped[0] > 1.3  # not even a bound without the scale
    assert scaled[-1] < 0.1
    ours = torch.linalg.svdvals(circular_matrix(exact(4, 4, 3).weight, 6))
    assert ours[-1] > 1 - 1e-12


def test_the_norm_of_the_gradient_survives_many_layers() -> None:
    layers = nn.Sequential(*[exact(8, 8, 3, 1, 1, padding_mode="circular") for _ in range(10)])
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(layers(x), x, cotangent)
    assert float(gradient.norm() / cotangent.norm()) == pytest.approx(1, rel=1e-12)


def test_the_centre_of_a_kernel_carries_its_energy() -> None:
    # ranks alternate, so that a random 3x3 kernel is no mere shift: the mean place of its energy is the middle tap
    energy = torch.stack([OrthoConv2d(16, 16, 3).weight.detach().square().sum(dim=(0, 1)) for _ in range(20)]).mean(0)
    energy = energy / energy.sum()
    place = torch.arange(3.0)
    assert abs(float(energy.sum(0) @ place) - 1) < 0.05
    assert abs(float(energy.sum(1) @ place) - 1) < 0.05


@pytest.mark.parametrize(("fan_in", "fan_out"), [(1, 1), (3, 2), (3, 3), (5, 4)])
def test_odd_channels_are_centred_too(fan_in: int, fan_out: int) -> None:
    energy = torch.stack(
        [OrthoConv2d(fan_in, fan_out, 3).weight.detach().square().sum((0, 1)) for _ in range(40)]
    ).mean(0)
    energy = energy / energy.sum()
    assert abs(float(energy.sum(0) @ torch.arange(3.0)) - 1) < 0.1


def test_trained_factors_stay_orthogonal_after_large_steps() -> None:
    layer = OrthoConv2d(3, 8, 3, 2, 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(10 * torch.randn_like(parameter))
    retract_parameters(layer)
    values = torch.linalg.svdvals(circular_matrix(layer.weight, 6, 2))
    assert (values - 1).abs().max() < 2e-6


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reflect", "replicate", "zero", ""])
def test_padding_that_amplifies_is_refused(mode: str) -> None:
    with pytest.raises(InputError) as caught:
        OrthoConv2d(2, 2, 3, padding=1, padding_mode=mode)
    assert str(caught.value).startswith(f'padding_mode: expected "zeros" or "circular", got {mode!r}: reflect and')


def test_control_replicate_padding_does_amplify() -> None:
    shift = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    shift[0, 0, 1, 0] = 1  # orthogonal on the torus: it moves the picture
    assert (torch.linalg.svdvals(circular_matrix(shift, 5)) - 1).abs().max() < 1e-14
    basis = torch.eye(25, dtype=torch.float64).view(25, 1, 5, 5)
    padded = F.conv2d(F.pad(basis, (1, 1, 1, 1), mode="replicate"), shift).flatten(1).T
    assert norm(padded) > 1.4


def test_a_kernel_smaller_than_its_stride_is_refused() -> None:
    with pytest.raises(InputError, match="expected kernel_size >= stride, got 1 < 2: a smaller kernel skips pixels"):
        OrthoConv2d(2, 2, 1, stride=2)


@pytest.mark.parametrize(
    "arguments", [(0, 1, 3, 1, 0), (1, 0, 3, 1, 0), (1, 1, 0, 1, 0), (1, 1, 3, 0, 0), (1, 1, 3, 1, -1)]
)
def test_sizes_below_1_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match="expected in_channels, out_channels, kernel_size, stride >= 1 and padding >= 0"
    ):
        OrthoConv2d(*arguments)


@pytest.mark.parametrize(
    ("taps", "stride", "padding", "size", "words"),
    [
        (3, 1, 2, 6, "would count wrapped pixels twice"),
        (2, 1, 1, 6, "would count wrapped pixels twice"),
        (3, 2, 1, 5, "expected a size divisible by the stride"),
        (3, 2, 3, 6, "would count wrapped pixels twice"),
        (5, 1, 2, 4, "expects images of at least 5 pixels, got 4"),
    ],
)
def test_circular_overlap_is_refused(taps: int, stride: int, padding: int, size: int, words: str) -> None:
    layer = OrthoConv2d(2, 4, taps, stride, padding, padding_mode="circular")
    for shape in ((1, 2, size, 30), (1, 2, 30, size)):
        with pytest.raises(InputError, match=words):
            layer(torch.zeros(shape))


@pytest.mark.parametrize(
    ("taps", "stride", "padding", "size"), [(3, 1, 0, 5), (4, 1, 1, 6), (4, 2, 0, 6), (5, 2, 1, 6)]
)
def test_circular_padding_that_is_let_through_never_amplifies(taps: int, stride: int, padding: int, size: int) -> None:
    layer = exact(2, 9, taps, stride, padding, padding_mode="circular", bias=False)
    basis = torch.eye(2 * size**2, dtype=torch.float64).view(-1, 2, size, size)
    assert norm(layer(basis).flatten(1).T.detach()) <= 1 + 1e-12


def test_pairs_are_taken_as_torch_gives_them_if_they_are_square() -> None:
    layer = OrthoConv2d(2, 4, (3, 3), stride=(2, 2), padding=(1, 1))
    assert (layer.kernel_size, layer.stride, layer.padding) == (3, 2, 1)
    with pytest.raises(InputError, match=r"kernel_size: expected one size for both directions, got \(3, 5\)"):
        OrthoConv2d(2, 4, (3, 5))


@pytest.mark.parametrize("layer", [OrthoConv2d(1, 1, 3), OrthoConv2d(2, 4, 1), OrthoConv2d(2, 8, 2, stride=2)])
def test_every_parameter_is_learned(layer: OrthoConv2d) -> None:
    """Data-parallel training waits for the gradient of each parameter: there must be none without."""
    layer(torch.randn(1, layer.in_channels, 6, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.numel(), name
        assert parameter.grad is not None, name
