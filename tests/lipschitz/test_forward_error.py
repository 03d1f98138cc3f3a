"""The bound of the rounding error against executions, exact arithmetic and the worst rounding that the model allows."""

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz.forward_error import BoundedExecution, Execution
from otnn.lipschitz.graph import trace
from otnn.lipschitz.layers import layer_bound
from otnn.nn import Abs, Centering, GroupSort, Householder, MaxMin, OrthoConv2d, OrthoLinear
from tests.exact import Beside, Residual, Scaled, Shape, covers, distance, exactly, fractions
from tests.operators import layer_matrix, norm

U = 2.0**-24


def run(net: nn.Module, x: Tensor) -> Execution:
    """Execute in the dtype of the inputs."""
    return BoundedExecution(trace(net.eval(), tuple(x.shape[1:])), x.dtype)(x)


def linear(rows: list[list[float]], bias: list[float] | None = None, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias is not None, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows, dtype=dtype))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias, dtype=dtype))
    return layer


def ones(layer: nn.Linear | nn.Conv2d, bias: float = 0.0) -> nn.Module:
    with torch.no_grad():
        layer.weight.fill_(1.0)
        if layer.bias is not None:
            layer.bias.fill_(bias)
    return layer


def tilted(channels: int) -> Householder:
    """With random angles."""
    layer = Householder(channels)
    nn.init.uniform_(layer.angle, -3, 3)
    return layer


NETS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(40, 30), MaxMin(), nn.Linear(30, 5)), (40,)),
    "orthogonal": (lambda: nn.Sequential(OrthoLinear(20, 20), MaxMin(), OrthoLinear(20, 20), MaxMin()), (20,)),
    "cancelling": (lambda: linear([[1e4, -1e4], [1.0, 1e-4]]), (2,)),
    "large bias": (lambda: linear([[1.0, 2.0]], [1e6]), (2,)),
    "image": (lambda: nn.Sequential(Centering(torch.tensor([0.1, 0.3])), nn.Conv2d(2, 4, 3, padding=1)), (2, 6, 5)),
    "strided": (lambda: nn.Sequential(OrthoConv2d(2, 8, 3, 2, 1), MaxMin(), nn.Conv2d(8, 2, 2)), (2, 8, 8)),
    "wide kernel": (lambda: ones(nn.Conv2d(1, 1, 5, padding=2)), (1, 9, 9)),
    "residual": (lambda: nn.Sequential(Residual(nn.Linear(6, 6), nn.ReLU()), Residual(nn.Linear(6, 6))), (6,)),
    "concatenation": (lambda: nn.Sequential(Beside(nn.Linear(4, 3)), nn.Linear(7, 2)), (4,)),
    "pooling": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(2, 2), nn.Flatten()), (1, 6, 6)),
    "sorted": (lambda: nn.Sequential(nn.Linear(9, 12), GroupSort(4), nn.Linear(12, 6), Abs(), nn.Linear(6, 3)), (9,)),
    "reflected": (lambda: nn.Sequential(tilted(8), nn.Linear(8, 6), tilted(6), tilted(6)), (8,)),
    "scaled": (lambda: nn.Sequential(Scaled(1 / 3), nn.Linear(4, 4), Scaled(0.1)), (4,)),
}


def inputs(shape: Shape, count: int = 8) -> Tensor:
    """Random, constant, nearly cancelling, sparse, huge and tiny samples."""
    x = torch.rand(6 * count, *shape)
    x[count : 2 * count] = torch.rand(count, *[1] * len(shape))
    x[2 * count : 3 * count] = 0.7 + 1e-6 * torch.randn(count, *shape)  # neighbours differ by 1e-6
    x[3 * count : 4 * count] *= torch.rand(count, *shape) < 0.1
    x[4 * count : 5 * count] *= 1e4
    x[5 * count :] = 1e-39 * (x[5 * count :] - 0.5)
    return x


@pytest.mark.parametrize("name", NETS)
def test_float32_stays_within_the_bound(name: str) -> None:
    build, shape = NETS[name]
    x = inputs(shape)
    for _ in range(5):
        net = build()
        found, reference = run(net, x), run(net, x.double())
        gap = (found.scores.double() - reference.scores).flatten(1).norm(dim=1)
        assert bool((gap <= found.error + reference.error).all())
        assert bool((reference.error < 1e-7 * found.error).all())
        assert float(gap.max()) > 0
        assert found.scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETS)
def test_no_execution_leaves_the_bound_of_exact_arithmetic(name: str, dtype: torch.dtype) -> None:
    build, shape = NETS[name]
    shape = (shape[0], 5, 5) if len(shape) > 1 else shape
    net = build().to(dtype)
    if name == "strided":  # the factors of a kernel are multiplied: what executes is the product
        net = nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), MaxMin(), nn.Conv2d(8, 2, 2)).to(dtype)
    x = inputs(shape, 1).to(dtype)
    found = run(net, x)
    for sample, scores, error in zip(x, found.scores, found.error.tolist(), strict=True):
        true, _ = exactly(net, fractions(sample), shape)
        assert covers(error, distance(fractions(scores), true))


@pytest.mark.parametrize("radius", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", NETS)
def test_around_and_growth_bound_the_error_within_the_radius(name: str, radius: float) -> None:
    build, shape = NETS[name]
    net, x = build(), inputs(shape, 3)
    found = run(net, x)
    for trial in range(6):
        way = torch.randn(x.shape).sign() if trial == 0 else torch.randn(x.shape)
        if trial == 1:
            way = x  # outward: everything grows
        way = nn.functional.normalize(way.double().flatten(1)).view_as(x)
        moved = (x + radius * (1.0 if trial < 3 else torch.rand(1)) * way).float()
        there, reference = run(net, moved), run(net, moved.double())
        gap = (there.scores.double() - reference.scores).flatten(1).norm(dim=1)
        far = (moved.double() - x.double()).flatten(1).norm(dim=1)
        assert bool((gap <= found.around + found.growth * far + reference.error).all())
        assert bool((there.error <= (found.around + found.growth * far) * (1 + 1e-12)).all())
        assert bool((found.around >= found.error).all())


# --- the worst rounding that the model of arithmetic allows ----------------------------------------------------------


def accumulated(products: Tensor, start: Tensor) -> Tensor:
    """A sum over the last dimension of rounded products, every operation rounded up by a factor 1 + u."""
    total = start
    for term in products.unbind(-1):
        total = (total + term * (1 + U)) * (1 + U)
    return total


@torch.no_grad()
def worst(layer: nn.Module, x: Tensor) -> Tensor:
    """What a network of non-negative numbers gives if every operation is rounded up by u; in float64."""
    if isinstance(layer, nn.Sequential):
        for child in layer:
            x = worst(child, x)
        return x
    if isinstance(layer, nn.ReLU):
        return x
    if isinstance(layer, Residual):
        return (x + worst(layer.inner, x)) * (1 + U)
    if isinstance(layer, Beside):
        return torch.cat([x, worst(layer.inner, x)], 1)
    if isinstance(layer, Scaled):
        return x * layer.factor * (1 + U)
    if isinstance(layer, Centering):
        return (x - layer.mean.double().view(-1, *[1] * (x.ndim - 2))) * (1 + U)
    if isinstance(layer, nn.Linear):
        bias = torch.zeros(()) if layer.bias is None else layer.bias
        return accumulated(x.unsqueeze(1) * layer.weight.double(), bias.double())
    assert isinstance(layer, (nn.Conv2d, nn.AvgPool2d))
    windows = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2)
    if isinstance(layer, nn.AvgPool2d):
        return accumulated(windows, torch.zeros(())) / windows.shape[-1] * (1 + U)
    rows = layer.weight.double().flatten(1)
    bias = torch.zeros(len(rows)) if layer.bias is None else layer.bias
    return accumulated(windows.unsqueeze(2) * rows, bias.double()).transpose(1, 2).flatten(1)


# Each in a case where hardly anything else counts, so that a bound without it would be broken: (network, input,
# largest bound / error)
TERMS: dict[str, tuple[nn.Module, Tensor, float]] = {
    "products": (ones(nn.Linear(2, 2, bias=False)), torch.ones(1, 2), 1.21),
    "sums of many": (ones(nn.Linear(100, 3, bias=False)), torch.ones(1, 100), 2.0),
    "bias": (ones(nn.Linear(2, 3), 5.0), torch.zeros(1, 2), 1.51),
    "bias of every pixel": (ones(nn.Conv2d(1, 1, 1), 5.0), torch.zeros(1, 1, 6, 6), 2.01),
    "windows": (ones(nn.Conv2d(1, 1, 5, padding=2, bias=False)), torch.ones(1, 1, 24, 24), 2.1),
    "strided windows": (ones(nn.Conv2d(1, 1, 6, 3, bias=False)), torch.ones(1, 1, 24, 24), 2.3),
    "layers": (nn.Sequential(*[ones(nn.Linear(2, 2, bias=False)) for _ in range(4)]), torch.ones(1, 2), 1.21),
    "centring": (Centering(torch.tensor([-3.0])), torch.ones(1, 1, 4), 1.01),
    "sum": (Residual(nn.ReLU()), torch.ones(1, 3), 1.01),
    "sum of rounded": (Residual(ones(nn.Linear(1, 1, bias=False))), torch.ones(1, 1), 1.4),
    "beside": (nn.Sequential(Beside(ones(nn.Linear(1, 1, bias=False)))), torch.ones(1, 1), 1.01),
    "average": (nn.AvgPool2d(2, 2), torch.ones(1, 1, 4, 4), 1.4),
}


@pytest.mark.parametrize("name", TERMS)
def test_the_worst_rounding_is_covered_and_the_bound_is_near_it(name: str) -> None:
    net, x, slack = TERMS[name]
    found = run(net, x)
    exact = BoundedExecution(trace(net, tuple(x.shape[1:])), torch.float64)(x.double()).scores
    gap = float((worst(net, x.double()).flatten() - exact.flatten()).norm())
    # the worst case rounds h itself up by some u, which is of second order
    assert gap <= float(found.error) * (1 + 1e-5)
    assert float(found.error) <= slack * gap


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_far_from_zero_the_error_grows_with_the_distance(depth: int) -> None:
    """From x = 0, where nothing is rounded, only the growth tells of the error at a distance."""
    net = nn.Sequential(*[ones(nn.Linear(2, 2, bias=False)) for _ in range(depth)])
    found = run(net, torch.zeros(1, 2))
    far = torch.ones(1, 2, dtype=torch.float64)
    gap = float((worst(net, far) - 2.0**depth).norm())
    assert gap <= found.growth * math.sqrt(2) * (1 + 1e-5)
    assert found.growth * math.sqrt(2) <= 1.21 * gap
    assert float(found.around) < 1e-30


def test_around_contains_the_error_of_every_layer() -> None:
    net = nn.Sequential(*[ones(nn.Linear(2, 2, bias=False)) for _ in range(3)])
    x = 1e3 * torch.ones(1, 2)
    found = run(net, x)
    gap = float((worst(net, x.double()) - 8e3).norm())
    assert gap <= float(found.around) * (1 + 1e-5)
    assert float(found.around) <= 1.21 * gap


KERNELS = [
    (taps, stride, padding, dilation, groups, mode)
    for taps, stride, padding, dilation, groups in itertools.product((1, 2, 3), (1, 2), (0, 1, 3), (1, 2), (1, 2))
    for mode in (("zeros", "reflect", "replicate", "circular") if padding else ("zeros",))
]


def convolutions(mode: str) -> Iterator[nn.Conv2d]:
    for taps, stride, padding, dilation, groups, kind in KERNELS:
        if kind == mode and dilation * (taps - 1) < 4 + 2 * padding:
            layer = nn.Conv2d(2, 4, taps, stride, padding, dilation, groups, padding_mode=mode)
            ones(layer)
            yield layer


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_the_weight_of_a_convolution_bounds_its_absolute_values(mode: str) -> None:
    """The kernel's own norm would not do: a pixel is in several windows, and padding may copy it."""
    shape, kernel_alone = (2, 4, 5), 0
    for layer in convolutions(mode):
        rounding = layer_bound(layer, shape, tuple(layer(torch.zeros(1, *shape)).shape[1:])).rounding
        assert rounding is not None
        true = norm(layer_matrix(layer, shape).abs())
        assert true <= rounding.weight * (1 + 1e-12), layer
        kernel_alone += true > float(layer.weight.detach().norm()) * (1 + 1e-9)
    assert kernel_alone > 10


@pytest.mark.parametrize("rows", [1, 3])
def test_the_weight_of_a_dense_layer_bounds_its_absolute_values(rows: int) -> None:
    """Its own norm would not do: that of the Hadamard matrix is 1, that of its absolute values 4."""
    matrix = torch.ones(1, 1)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    layer = linear(matrix.tolist(), [1.0] * 16)
    found = layer_bound(layer, (rows, 16), (rows, 16))
    assert found.constant < 1.001
    assert found.rounding is not None
    assert 4 <= found.rounding.weight * (1 + 1e-6) < 4.001
    assert found.rounding.offset == pytest.approx(4 * math.sqrt(rows))
    assert found.rounding.operations == 17


# --- underflow, overflow, constants -----------------------------------------------------------------------------------


def test_products_that_vanish_are_counted() -> None:
    x = torch.full((1, 1), 2.0**-149)
    found = run(linear([[0.5]]), x)
    assert float(found.scores) == 0
    assert 2.0**-150 <= float(found.error) < 1e-36


@pytest.mark.parametrize(
    ("net", "value"),
    [(linear([[1.0]]), 1.1e-38), (linear([[1.1e-38]]), 1e5), (Residual(nn.ReLU()), 1.1e-38), (Scaled(1.1e-38), 1e5)],
)
def test_numbers_that_are_flushed_to_zero_are_counted(net: nn.Module, value: float) -> None:
    x = torch.full((1, 1), value)
    true, _ = exactly(net, fractions(x), (1,))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        found = run(net, x)
    finally:
        torch.set_flush_denormal(False)
    assert float(found.scores) == 0
    assert covers(float(found.error), distance([Fraction(0)], true))


@pytest.mark.parametrize("size", [1e-170, 1e-250])
def test_norms_whose_squares_vanish_are_counted(size: float) -> None:
    x = size * torch.rand(20, 3, dtype=torch.float64)
    net = linear([[0.1, 0.7, -1 / 3]], dtype=torch.float64)
    found = run(net, x)
    for sample, score, error in zip(x, found.scores, found.error.tolist(), strict=True):
        true, _ = exactly(net, fractions(sample), (3,))
        assert covers(error, distance(fractions(score), true))


def test_a_number_that_overflowed_on_the_way_has_no_finite_bound() -> None:
    net = nn.Sequential(linear([[3e38], [3e38]], [-3e38, 1.0]), nn.ReLU(), linear([[1.0, 0.0]]))
    found = run(net, torch.tensor([[-3.0], [0.5]]))
    assert found.scores.isfinite().all()  # ReLU hides the infinity
    assert found.error.isfinite().tolist() == [False, True]
    assert found.around.isfinite().tolist() == [False, True]


class Shifted(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.shift


class Divided(Shifted):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / self.shift


@pytest.mark.parametrize("kind", [Shifted, Scaled, Divided])
@pytest.mark.parametrize("number", [0.1, 0.3, 1 / 3, 1 + 2**-24 * 0.999])
def test_numbers_in_the_code_are_rounded_to_float32_before_they_are_used(
    kind: Callable[[float], nn.Module], number: float
) -> None:
    net = kind(number)
    x = torch.cat([torch.rand(2000, 1), torch.tensor([[2.0**-24 * 0.9999]])])
    found = run(net, x)
    given = Fraction(number)
    for value, score, error in zip(x.tolist(), found.scores.tolist(), found.error.tolist(), strict=True):
        whole = Fraction(value[0])
        true = {Shifted: whole + given, Scaled: whole * given, Divided: whole / given}[kind]
        assert abs(Fraction(score[0]) - true) <= Fraction(error)


# --- what it is told of ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [nn.GELU(), nn.Tanh(), nn.SiLU(), nn.Softplus()], ids=lambda layer: type(layer).__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_of_unknown_rounding_is_named(layer: nn.Module, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), layer)).eval()
    with pytest.raises(InputError) as caught:
        BoundedExecution(trace(net, (3,)), dtype)
    assert str(caught.value).startswith("1.1: its rounding error is not known, so no radius would be sound; use MaxMin")


def test_a_function_of_unknown_rounding_is_named() -> None:
    class Smooth(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.tanh(inputs)

    with pytest.raises(InputError, match=r"^tanh: its rounding error is not known"):
        BoundedExecution(trace(Smooth().eval(), (3,)), torch.float32)


def test_samples_do_not_share_their_errors_and_the_network_is_left_alone() -> None:
    net, x = NETS["image"][0]().eval(), torch.rand(4, 2, 6, 5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x[2] *= 1e6
    whole = run(net, x.double())
    for i in range(4):
        single = run(net, x[i : i + 1].double())
        assert float(single.error) == pytest.approx(float(whole.error[i]), rel=1e-12)
        assert single.growth == whole.growth
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert float(run(net, x).error[0]) == pytest.approx(2**29 * float(whole.error[0]), rel=1e-3)
