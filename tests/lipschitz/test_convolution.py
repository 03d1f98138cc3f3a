import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import bound, convolution, convolution_bound, matrix_bound
from otnn.lipschitz.layers import layer_bound
from otnn.manifold import Stiefel
from otnn.nn import OrthoConv2d
from tests.lipschitz.rational import is_norm_bound
from tests.operators import circular_matrix, layer_matrix, norm

# The SVD in float64 is itself off by p(n) 2^-53 relative to the norm, p(n) of some tens at these sizes; tiny operators
# are proven in rational arithmetic without any tolerance
ROUNDING = 1 + 3e-14
# What a bound may add on an orthogonal layer stored in float32
LOOSE = 1 + 1e-5
CLASSIC = torch.tensor([2 / 3, 2 / 3, -1 / 3], dtype=torch.float64)


def convolution_layer(kernel: Tensor, **settings: Any) -> nn.Conv1d | nn.Conv2d:
    """A layer without bias (beside which its dense twin would lose small weights)."""
    kind = nn.Conv1d if kernel.ndim == 3 else nn.Conv2d
    channels = (kernel.shape[1] * settings.get("groups", 1), kernel.shape[0])
    layer = nn.utils.skip_init(kind, *channels, kernel.shape[2:], bias=False, dtype=kernel.dtype, **settings)
    with torch.no_grad():
        layer.weight.copy_(kernel)
    return layer


def assert_bounds(layer: nn.Conv1d | nn.Conv2d, shape: tuple[int, ...], at_any_size: bool = True) -> float:
    """Check both bounds of a layer against the SVD of its dense twin; return the looseness of the one at this size."""
    operator = layer_matrix(layer, shape)
    outputs = tuple(layer(torch.zeros(1, *shape, dtype=layer.weight.dtype)).shape[1:])
    true = norm(operator)
    found = layer_bound(layer, shape, outputs).constant
    assert true <= found * ROUNDING, f"{layer} on {shape}: {found} is below the norm {true}"
    if at_any_size:
        assert true <= layer_bound(layer, None, None).constant * ROUNDING
    return found / true if true else 1.0


def random_kernel(generator: torch.Generator, kind: str, shape: tuple[int, ...]) -> Tensor:
    kernel = torch.randn(shape, generator=generator)
    match kind:
        case "positive":  # the norm is attained at frequency 0
            kernel = kernel.abs()
        case "separable":
            kernel = kernel[:1, :1] * torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=generator)
        case "sparse":
            kernel = kernel * (torch.rand(shape, generator=generator) < 0.3)
        case "orthogonal":  # as a reshaped matrix
            kernel = Stiefel().retract(kernel.flatten(1).double()).view(shape).float()
        case "shift":  # nearly a multiple of one tap
            kernel = kernel * 1e-6
            kernel.view(-1)[0] = 1.0
        case "mixed":
            kernel = kernel * 10 ** (5 * torch.randn(shape, generator=generator)).clamp(-30, 30)
        case "ones":
            kernel = torch.ones(shape)
    return kernel


KINDS = ["gaussian", "positive", "separable", "sparse", "orthogonal", "shift", "mixed", "ones"]


def pick(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def random_case(generator: torch.Generator, kind: str, dims: int) -> tuple[nn.Conv1d | nn.Conv2d, tuple[int, ...]]:
    """A layer with zero padding, and an image that it takes; kernels are larger than the image too."""
    groups = pick(generator, 1, 2)
    inputs, outputs = pick(generator, 1, 3), groups * pick(generator, 1, 3)
    taps = [pick(generator, 1, 5) for _ in range(dims)]
    stride = [pick(generator, 1, 3) for _ in range(dims)]
    dilation = [pick(generator, 1, 2) for _ in range(dims)]
    reach = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
    padding = [pick(generator, 0, r + 1) for r in reach]
    size = [max(pick(generator, 1, 6), r + 1 - 2 * p) for r, p in zip(reach, padding, strict=True)]
    kernel = random_kernel(generator, kind, (outputs, inputs, *taps))
    layer = convolution_layer(kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return layer, (inputs * groups, *size)


# --- zero padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [1, 2])
def test_never_below_the_svd(kind: str, dims: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        layer, shape = random_case(generator, kind, dims)
        # small images are bounded as dense matrices, unless the bound is about 1 anyway
        loose = assert_bounds(layer, shape)
        assert loose < 1.0001 or kind in ("orthogonal", "shift", "mixed")
        # and by their frequencies, which alone count on larger ones
        size = (1, *shape[1:])[-2:]
        pair = {name: (1, *getattr(layer, name))[-2:] for name in ("stride", "dilation")}
        kernel = layer.weight if dims == 2 else layer.weight.unsqueeze(2)
        found = convolution_bound(kernel, groups=layer.groups, size=(size[0], size[1]), **pair)
        assert norm(layer_matrix(layer, shape)) <= found * ROUNDING


@pytest.mark.parametrize("scale", [1.0, 1e38, 1e-20, 1e-38, 1e-40, 1e-45])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)])
def test_never_below_in_rational_arithmetic(scale: float, stride: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    for taps in ((1, 1), (1, 3), (2, 2), (3, 2)):
        kernel = (torch.randn(1, 1, *taps, generator=generator).double().clamp(-3, 3) * scale).float()
        layer = convolution_layer(kernel, stride=stride, padding=1)
        for size in ((1, 1), (2, 2), (1, 4)):
            if any(n + 2 < k for n, k in zip(size, taps, strict=True)):
                continue
            operator = layer_matrix(layer, (1, *size))
            assert is_norm_bound(bound(layer, (1, *size)).constant, operator)
            assert is_norm_bound(convolution_bound(kernel, stride=stride, size=size), operator)
            assert is_norm_bound(convolution_bound(kernel, stride=stride), operator)


@pytest.mark.parametrize("padding", [*range(6), "same"])
@pytest.mark.parametrize("taps", [(1, 1), (2, 2), (4, 4), (5, 3), (1, 5)])
def test_padding_from_none_to_more_than_the_kernel(taps: tuple[int, int], padding: int | str) -> None:
    generator = torch.Generator().manual_seed(2)
    if padding == "same":
        taps = (taps[0] | 1, taps[1] | 1)  # torch warns of even kernels
    for kind in ("gaussian", "ones"):
        kernel = random_kernel(generator, kind, (2, 2, *taps))
        for size in ((1, 1), (3, 4), (5, 5)):
            if padding == "same" or all(n + 2 * padding >= k for n, k in zip(size, taps, strict=True)):
                assert_bounds(convolution_layer(kernel, padding=padding), (2, *size))


@pytest.mark.parametrize("stride", list(itertools.product([1, 2, 3], [1, 2, 4])))
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_every_pair_of_strides_and_dilations(stride: tuple[int, int], dilation: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    kernel = random_kernel(generator, "gaussian", (3, 2, 3, 2))
    for size in ((5, 4), (6, 7)):
        assert_bounds(convolution_layer(kernel, stride=stride, dilation=dilation, padding=1), (2, *size))
    # far from borders nothing is lost: the bound at any size is nearly attained
    true = norm(layer_matrix(convolution_layer(kernel[:1, :1], stride=stride, dilation=dilation), (1, 24, 24)))
    assert convolution_bound(kernel[:1, :1], stride=stride, dilation=dilation) <= 1.06 * true


def test_groups_count_as_their_maximum() -> None:
    generator = torch.Generator().manual_seed(4)
    for groups, inputs, outputs in ((2, 2, 3), (3, 1, 1), (4, 1, 2), (6, 2, 1)):
        kernel = random_kernel(generator, "gaussian", (groups * outputs, inputs, 3, 3))
        parts = [convolution_bound(part) for part in kernel.chunk(groups)]
        # a product over groups would be larger or smaller by far
        assert convolution_bound(kernel, groups=groups) == pytest.approx(max(parts), rel=0.03)
        assert_bounds(convolution_layer(kernel, groups=groups, padding=1), (groups * inputs, 6, 6))
    scales = torch.tensor([0.5, 3.0, 0.0]).view(3, 1, 1, 1)
    assert 3 <= convolution_bound(scales, groups=3) < 3 + 1e-6
    shrinking = torch.full((4, 1, 1, 1), 0.5)
    assert 0.5 <= convolution_bound(shrinking, groups=4) < 0.5 + 1e-6  # their product would be 1/16


@pytest.mark.parametrize("size", range(3, 9))
@pytest.mark.parametrize("turn", [False, True])
def test_the_kernel_that_breaks_frequency_bounds(size: int, turn: bool) -> None:
    # (2/3, 2/3, -1/3): norm 1 on the torus of 3 pixels, 1.085 with zero padding on 3
    kernel = CLASSIC.view(1, 1, 1, 3).mT if turn else CLASSIC.view(1, 1, 1, 3)
    layer = convolution_layer(kernel, padding=(1, 0) if turn else (0, 1))
    image = (size, 1) if turn else (1, size)
    true = norm(layer_matrix(layer, (1, *image)))
    assert 1.08 < true < 1.225
    assert bound(layer, (1, *image)).constant == pytest.approx(true, rel=1e-10)  # as a dense matrix
    # the frequencies of the torus of n + k - 1 pixels
    frequencies = float(torch.fft.fft(CLASSIC, size + 2).abs().max())
    assert true <= convolution_bound(kernel, size=image) == pytest.approx(frequencies, rel=1e-10)
    # the supremum over all frequencies is the limit of large images
    supremum = float(torch.fft.fft(CLASSIC, 2**12).abs().max())
    assert supremum <= convolution_bound(kernel) <= 1.01 * supremum


def test_control_the_frequency_bound_at_n_is_no_bound() -> None:
    assert float(torch.fft.fft(CLASSIC).abs().max()) == pytest.approx(1.0, abs=1e-12)
    layer = convolution_layer(CLASSIC.view(1, 1, 3), padding=1)
    assert norm(layer_matrix(layer, (1, 3))) == pytest.approx(1.085, abs=5e-4)


@pytest.mark.parametrize(("near", "far"), [(3, 3), (4, 7), (8, 24)])
def test_any_grid_gives_a_bound(near: int, far: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # M. Riesz: what a coarse grid misses is in the factor 1 / cos; without it these kernels would be underestimated
    monkeypatch.setattr(convolution, "_NEAR_GRID", near)
    monkeypatch.setattr(convolution, "_FAR_GRID", far)
    monkeypatch.setattr(convolution, "_CHUNK", far**2)  # a few frequencies at a time
    generator = torch.Generator().manual_seed(5)
    for shape in ((1, 1, 3, 1), (2, 3, 2, 3), (1, 1, 1, 6)):
        for _ in range(5):
            kernel = random_kernel(generator, "gaussian", shape)
            frequencies = torch.fft.fft2(kernel.double(), (256, 256)).permute(2, 3, 0, 1)
            assert float(torch.linalg.matrix_norm(frequencies, 2).max()) <= convolution_bound(kernel) * ROUNDING


@pytest.mark.parametrize(
    ("channels", "taps", "stride", "size"),
    [((1, 16), 3, 1, 28), ((3, 16), 7, 2, 32), ((8, 8), 3, 1, 12), ((8, 16), 3, 2, 16), ((16, 16), 1, 1, 9)],
)
@pytest.mark.parametrize("smooth", [False, True])
def test_ordinary_layers_at_their_size_are_bounded_tightly(
    channels: tuple[int, int], taps: int, stride: int, size: int, smooth: bool
) -> None:
    generator = torch.Generator().manual_seed(6)
    kernel = torch.randn(channels[1], channels[0], taps, taps, generator=generator)
    if smooth:
        window = torch.exp(-torch.linspace(-1, 1, taps).square())
        kernel = kernel + 2 * torch.randn(*kernel.shape[:2], 1, 1, generator=generator) * torch.outer(window, window)
    layer = convolution_layer(kernel, stride=stride, padding=taps // 2)
    shape = (channels[0], size, size)
    # a lower bound of the norm, by power iteration on the images themselves
    image = torch.randn(1, *shape, generator=generator)
    for _ in range(100):
        image.requires_grad_()
        (gradient,) = torch.autograd.grad(layer(image).square().sum(), image)
        image = gradient / gradient.norm()
    reached = float(layer(image).detach().norm())
    assert reached <= bound(layer, shape).constant <= 1.05 * reached


@pytest.mark.parametrize("taps", [(1, 1), (3, 3)])
def test_zeros_and_empty_kernels_have_norm_0(taps: tuple[int, int]) -> None:
    assert convolution_bound(torch.zeros(3, 4, *taps)) == 0.0
    assert convolution_bound(torch.zeros(0, 4, *taps)) == 0.0
    assert convolution_bound(torch.zeros(4, 1, *taps), groups=4) == 0.0
    assert bound(convolution_layer(torch.zeros(2, 3, *taps), padding=1), (3, 5, 5)).constant == 0.0


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-200, 1e200, 1e300])
def test_the_ends_of_float64(scale: float) -> None:
    matrix = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64) * scale
    assert is_norm_bound(convolution_bound(matrix.view(2, 2, 1, 1)), matrix)
    if scale > 1e-310:
        assert convolution_bound(matrix.view(2, 2, 1, 1)) == pytest.approx(5 * scale, rel=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_kernels_that_are_not_finite_have_no_bound(bad: float) -> None:
    kernel = torch.zeros(2, 2, 3, 3)
    kernel[0, 1, 2, 0] = bad
    with pytest.raises(InputError, match=r"^the weight holds NaN or infinite values; train again"):
        convolution_bound(kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_is_proven_of_half_precision(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"^the weight is {dtype}: bounds are proven of float32 and float64 weights"):
        convolution_bound(torch.zeros(2, 2, 3, 3, dtype=dtype))


# --- orthogonal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fan_in", "fan_out", "taps", "stride"),
    [(1, 8, 3, 1), (8, 8, 3, 1), (8, 3, 3, 1), (4, 16, 3, 2), (8, 8, 4, 2), (8, 4, 2, 2), (3, 5, 5, 3), (32, 32, 3, 2)],
)
def test_orthogonal_kernels(fan_in: int, fan_out: int, taps: int, stride: int) -> None:
    torch.manual_seed(7)
    layer = OrthoConv2d(fan_in, fan_out, taps, stride, taps // 2)
    constant = bound(layer).constant
    if fan_in < 32:
        size = 4 * stride if taps <= 4 * stride else 8
        assert norm(layer_matrix(layer, (fan_in, size, size))) <= constant * ROUNDING
        assert norm(circular_matrix(layer.weight, size, stride)) <= constant * ROUNDING
    assert constant <= LOOSE


@pytest.mark.parametrize("noise", [1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 1e-2])
def test_both_branches_are_bounds(noise: float) -> None:
    generator = torch.Generator().manual_seed(8)
    torch.manual_seed(8)
    for stride in (1, 2):
        for _ in range(5):
            layer = OrthoConv2d(2, 4, 3, stride, 1)
            kernel = layer.weight.detach().double()
            kernel = kernel + noise * torch.randn(kernel.shape, generator=generator)
            found = convolution_bound(kernel, stride=(stride, stride))
            assert norm(circular_matrix(kernel, 6, stride)) <= found * ROUNDING
            padded = convolution_layer(kernel, stride=stride, padding=1)
            assert norm(layer_matrix(padded, (2, 5, 7))) <= found * ROUNDING
            # next to orthogonality loose by the size of the noise; beyond, by the percent of the grid
            assert found <= 1 + (60 * noise if found < 1 + 1e-4 else 60 * noise + 0.02)


# --- other paddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_that_repeats_border_pixels_needs_the_size(mode: str) -> None:
    with pytest.raises(InputError) as caught:
        bound(nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode))
    assert (
        str(caught.value) == "Conv2d: the bound of Conv2d depends on the input's size: expected input_shape, got none"
    )
    bound(nn.Conv2d(1, 1, 3, padding_mode=mode))  # nothing is padded


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("dims", [1, 2])
def test_padding_that_repeats_border_pixels_amplifies(mode: str, dims: int) -> None:
    generator = torch.Generator().manual_seed(9)
    for taps, stride, dilation in itertools.product((1, 3, 4), (1, 2), (1, 2)):
        kernel = random_kernel(generator, "gaussian", (2, 1, *[taps] * dims))
        for size, padding in itertools.product((2, 5), (0, 1, 4, "same")):
            reach = dilation * (taps - 1)
            most = -(-reach // 2) if padding == "same" else padding
            too_far = mode == "reflect" and most >= size
            if too_far or (padding == "same" and stride > 1) or size + 2 * most < reach + 1:
                continue
            settings = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode}
            assert_bounds(convolution_layer(kernel, **settings), (1, *[size] * dims), at_any_size=False)


@pytest.mark.parametrize(("taps", "expected"), [(3, 2.0), (5, 3.0), (7, 4.0)])
def test_the_norm_of_replicate_padding(taps: int, expected: float) -> None:
    # a shift kernel in two dimensions reads a corner pixel (p + 1)^2 times; the layer's norm is p + 1
    kernel = torch.eye(1, taps**2).view(1, 1, taps, taps)
    layer = convolution_layer(kernel, padding=taps // 2, padding_mode="replicate")
    assert norm(layer_matrix(layer, (1, 8, 8))) == pytest.approx(expected)
    assert expected <= bound(layer, (1, 8, 8)).constant < expected + 1e-5


@pytest.mark.parametrize("kind", ["gaussian", "ones", "sparse", "shift"])
def test_circular_padding_in_every_corner(kind: str) -> None:
    generator = torch.Generator().manual_seed(10)
    checked = set()
    for taps, stride, size in itertools.product((1, 2, 3, 5), (1, 2, 3), (2, 3, 4)):
        for padding in range(size + 1):  # torch wraps around once at most
            if size + 2 * padding < taps:
                continue
            kernel = random_kernel(generator, kind, (1, 1, taps))
            layer = convolution_layer(kernel, stride=stride, padding=padding, padding_mode="circular")
            assert_bounds(layer, (1, size), at_any_size=2 * padding < taps)
            checked.add((size % stride == 0, 2 * padding < taps, taps > size))
    assert len(checked) == 8  # strides that divide the size or not; outputs once or again; kernels larger or not


@pytest.mark.parametrize("padding", [0, (1, 0), (2, 1), (3, 3), "same"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 3)])
def test_circular_padding_of_images(stride: tuple[int, int], padding: Any) -> None:
    if padding == "same" and stride != (1, 1):
        return
    generator = torch.Generator().manual_seed(11)
    for kind in ("gaussian", "ones"):
        kernel = random_kernel(generator, kind, (2, 1, 3, 3))
        for size in ((3, 3), (4, 6), (5, 4)):
            layer = convolution_layer(kernel, stride=stride, padding=padding, padding_mode="circular")
            assert_bounds(layer, (1, *size), at_any_size=padding in (0, (1, 0), "same"))


def test_circular_outputs_that_repeat_need_the_size() -> None:
    layer = convolution_layer(torch.ones(1, 1, 1), padding=2, padding_mode="circular")
    with pytest.raises(InputError, match="depends on the input's size: expected input_shape, got none"):
        bound(layer)
    # 2 pixels are read as 6: each three times
    assert norm(layer_matrix(layer, (1, 2))) == pytest.approx(math.sqrt(3))
    assert bound(layer, (1, 2)).constant == pytest.approx(math.sqrt(3), rel=1e-6)


# --- small images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.53, 0.58, 0.61, 0.67])
def test_many_outputs_of_few_pixels_sum_up_with_all_their_rounding(weight: float) -> None:
    # equal squares may all be rounded down as they are summed: a sum taken for exact would fall below the norm
    layer = convolution_layer(torch.full((200_000, 1, 1, 1), weight))
    found = bound(layer, (1, 1, 1)).constant
    square = len(layer.weight) * Fraction(float(layer.weight[0].detach())) ** 2
    assert square <= Fraction(found) ** 2 <= square * (1 + Fraction(1, 10**4))


def test_a_small_image_is_bounded_as_a_matrix() -> None:
    generator = torch.Generator().manual_seed(12)
    for settings in ({}, {"stride": 2, "padding": 1}, {"padding": "same"}, {"dilation": 2, "groups": 2, "padding": 3}):
        layer = convolution_layer(random_kernel(generator, "gaussian", (4, 2, 3, 3)), **settings)
        shape = (2 * settings.get("groups", 1), 6, 5)
        assert bound(layer, shape).constant == pytest.approx(matrix_bound(layer_matrix(layer, shape)), rel=1e-9)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_mode_of_the_caller_changes_nothing(context: Any) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    expected = bound(layer, (2, 6, 6)).constant
    with context():
        assert bound(layer, (2, 6, 6)).constant == expected


def test_large_images_with_few_outputs_take_little_memory() -> None:
    layer = nn.Conv2d(3, 1, 32, stride=32, bias=False)  # 150528 pixels: a basis of them would take 181 GB
    found = bound(layer, (3, 224, 224)).constant
    assert found == pytest.approx(float(layer.weight.detach().double().norm()), rel=1e-6)
