import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import activations
from otnn.lipschitz.layers import EXACT, LayerBound, Rounding, layer_bound
from tests.operators import layer_matrix, norm

Shape = tuple[int, ...]
# A bound and an SVD are each rounded, by a few units of 2^-53 relative to the norm
ROUNDING = 1 + 1e-12
TIGHT = 1.0001


def rule(layer: nn.Module, shape: Shape) -> LayerBound:
    return layer_bound(layer, shape, tuple(layer(torch.zeros(2, *shape)).shape[1:]))


def assert_refused(layer: nn.Module, text: str, shape: Shape | None = None) -> None:
    with pytest.raises(InputError) as caught:
        layer_bound(layer, shape, shape)
    assert str(caught.value) == text


def prelu(*slopes: float) -> nn.PReLU:
    layer = nn.PReLU(len(slopes))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(slopes))
    return layer


def batch_norm(channels: int, dims: int = 2, affine: bool = True) -> nn.BatchNorm1d | nn.BatchNorm2d:
    layer = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(channels, affine=affine).eval()
    for value in (layer.running_mean, layer.weight, layer.bias):
        if value is not None:
            nn.init.normal_(value, 0.0, 2.0)
    nn.init.uniform_(layer.running_var, 0.01, 2.0)  # type: ignore[arg-type]
    return layer


# --- elementwise functions ---------------------------------------------------------------------------------------

# Layers and their bounds where these are short.
ELEMENTWISE: list[tuple[nn.Module, float | None]] = [
    (nn.LeakyReLU(), 1),
    (nn.LeakyReLU(1.5), 1.5),
    (nn.LeakyReLU(-2.5), 2.5),
    (nn.RReLU().eval(), 1),
    (nn.RReLU(1.1, 1.4).eval(), 1.25),
    (prelu(0.25), 1),
    (prelu(-3.0), 3),
    (nn.ReLU6(), 1),
    (nn.Hardtanh(-2, 0.5), 1),
    (nn.ELU(), 1),
    (nn.ELU(1.7), 1.7),
    (nn.ELU(-1.7), 1.7),
    (nn.CELU(), 1),
    (nn.CELU(0.3), 1),
    (nn.SELU(), None),
    (nn.GELU(), None),
    (nn.GELU("tanh"), None),
    (nn.SiLU(), None),
    (nn.Mish(), None),
    (nn.Softplus(), 1),
    (nn.Softplus(3.0, 25), 1),
    (nn.Softsign(), 1),
    (nn.Tanh(), 1),
    (nn.Sigmoid(), 0.25),
    (nn.LogSigmoid(), 1),
    (nn.Hardsigmoid(), None),
    (nn.Hardswish(), None),
    (nn.Tanhshrink(), 1),
    (nn.Softshrink(), 1),
    (nn.Softshrink(0.0), 1),
    (nn.Hardshrink(0.0), 1),
    (nn.Threshold(0.5, 0.5), 1),
]


@pytest.mark.parametrize(("layer", "expected"), ELEMENTWISE, ids=lambda value: str(value))
def test_the_bound_is_the_largest_slope(layer: nn.Module, expected: float | None) -> None:
    points = torch.linspace(-32, 32, 2**19 + 1, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(layer.double()(points[None])[0].sum(), points)
    found, steepest = layer_bound(layer.float(), None, None).constant, float(slopes.abs().max())
    assert steepest <= found * ROUNDING
    assert found <= TIGHT * steepest
    if expected is not None:
        assert found == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("layer", "curvature"),
    [(nn.GELU(), 4.0), (nn.GELU("tanh"), 4.0), (nn.SiLU(), 4.0), (nn.Mish(), 4.0)],
    ids=str,
)
def test_the_printed_slopes_bound_those_between_the_points(layer: nn.Module, curvature: float) -> None:
    # around its maximum a slope grows by at most the third derivative times h^2 / 8 between points h apart
    step = 2.0**-14
    points = torch.arange(-12, 12, step, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(layer(points).sum(), points)
    third = slopes.detach().diff().diff() / step**2
    assert float(third.abs().max()) < curvature
    found = layer_bound(layer, None, None).constant
    assert float(slopes.max()) + curvature * step**2 / 8 <= found <= float(slopes.max()) + 1.1e-7


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.floats(-4, 4, allow_subnormal=False), st.integers(0, 2**30))
def test_no_pair_of_points_exceeds_the_bound(setting: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 64, 5, dtype=torch.float64, generator=generator) * 3
    layers = [nn.LeakyReLU(setting), nn.ELU(setting), nn.CELU(abs(setting) + 0.1), nn.Threshold(setting, setting)]
    for layer in [*layers, nn.Softshrink(abs(setting)), nn.Hardtanh(setting, setting + 1), prelu(setting)]:
        moved = (layer.double().requires_grad_(False)(first) - layer(second)).norm(dim=1) / (first - second).norm(dim=1)
        assert float(moved.max()) <= layer_bound(layer, None, None).constant * ROUNDING


# --- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.LeakyReLU(0.3),
        nn.LeakyReLU(-1.7),
        nn.RReLU().eval(),
        prelu(0.1, -0.7, 2.3),
        nn.Softsign(),
        nn.Softshrink(0.7),
        nn.Hardtanh(-0.7, 0.3),
        nn.Threshold(0.7, 0.7),
        batch_norm(3),
        batch_norm(3, affine=False),
    ],
    ids=str,
)
def test_the_rounding_is_bounded_where_it_is_known(layer: nn.Module) -> None:
    shape = (3, 5, 5)
    layer = copy.deepcopy(layer).requires_grad_(False)
    assert layer_bound(layer, None, None).rounding is None
    rounding = rule(layer, shape).rounding
    assert rounding is not None
    assert rounding.outputs == 75
    slope, offset = rounding.local(torch.float32)
    largest = 0.0
    for scale in (1e-6, 0.1, 1.0, 3.0, 1e3):
        images = scale * torch.randn(100, *shape)
        wide = images.double()
        executed = layer(images).double()
        exact = layer.double()(wide)
        layer.float()
        error = (executed - exact).flatten(1).norm(dim=1)
        allowed = slope * wide.flatten(1).norm(dim=1) + offset
        assert bool((error <= allowed).all())
        largest = max(largest, float((error / allowed).max()))
    assert largest > 0.02  # not a wild bound, and an error that is not zero


def test_the_rounding_that_layers_state() -> None:
    assert rule(nn.LeakyReLU(0.3), (4,)).rounding == Rounding(2, 0.3, 0.0, 4)
    assert rule(prelu(0.5), (2, 2)).rounding == Rounding(1, 0.5, 0.0, 4)
    assert rule(prelu(0.5, -3.0), (2, 2)) == LayerBound(3.0, Rounding(1, 3.0, 0.0, 4))
    for layer in (nn.ReLU6(), nn.Hardtanh(0, math.inf), nn.Threshold(0, 0), nn.Hardshrink(0.0), nn.Dropout().eval()):
        assert layer_bound(layer, None, None) == LayerBound(1.0, EXACT)
    for layer in (nn.Tanh(), nn.GELU(), nn.SiLU(), nn.ELU(), nn.CELU(), nn.Softplus(), nn.Softmax(1), nn.Hardswish()):
        assert rule(layer, (4,)).rounding is None
    rounding = rule(nn.Hardtanh(0.1, 0.5), (4,)).rounding
    assert rounding is not None
    assert (rounding.operations, rounding.weight) == (1, 0.0)
    assert rounding.offset == pytest.approx(0.2)  # of 0.1; 0.5 is exact


# --- normalisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True])
def test_batch_normalisation_has_the_norm_of_its_matrix(affine: bool) -> None:
    for layer, shape in [
        (batch_norm(4, 1, affine), (4,)),
        (batch_norm(3, 1, affine), (3, 5)),
        (batch_norm(2, 2, affine), (2, 3, 4)),
    ]:
        found, true = rule(layer, shape).constant, norm(layer_matrix(layer, shape))
        assert true <= found * ROUNDING
        assert found <= true * (1 + 1e-12)
        assert found == layer_bound(layer, None, None).constant


def test_the_offset_of_batch_normalisation_counts_mean_and_bias() -> None:
    layer = nn.BatchNorm2d(2, eps=0.0).eval()
    layer.running_mean = torch.tensor([3.0, 0.0])
    layer.running_var = torch.tensor([4.0, 1.0])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, -0.5]))
        layer.bias.copy_(torch.tensor([-1.0, 3.0]))
    found = rule(layer, (2, 5, 5))
    assert found.constant == pytest.approx(1)
    assert found.rounding is not None
    assert found.rounding.weight == found.constant
    assert found.rounding.offset == pytest.approx(5 * math.hypot(3 + 1, 3))


def test_batch_normalisation_without_fixed_statistics_is_refused() -> None:
    for layer in (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False).eval()):
        name = type(layer).__name__
        assert_refused(layer, f"{name} mixes the samples of a batch; expected eval mode and track_running_stats=True")


@pytest.mark.parametrize(("variance", "eps"), [(0.0, 0.0), (-1e-6, 1e-5), (1.0, -0.5), (0.0, 1e-40)])
def test_batch_normalisation_that_divides_by_nearly_zero_is_refused(variance: float, eps: float) -> None:
    layer = nn.BatchNorm1d(2, eps=eps).eval()
    layer.running_var = torch.tensor([1.0, variance])
    text = f"BatchNorm1d divides by nearly zero: expected eps = 1e-5, got {eps} + variance {variance:g}"
    assert_refused(layer, text)


def test_weights_of_batch_normalisation_that_may_be_flushed_to_zero_count() -> None:
    layer = nn.BatchNorm1d(1, eps=1e-29).eval()
    layer.running_var = torch.zeros(1)
    with torch.no_grad():
        layer.weight.fill_(1e-38)  # below the smallest normal number, and multiplied by 3e14
    rounding = rule(layer, (1,)).rounding
    assert rounding is not None
    assert rounding.local(torch.float32)[0] >= 1e-38 / math.sqrt(1e-29)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LayerNorm(4), "divides by the deviation of the sample, so its bound grows like 1 / sqrt(eps)"),
        (nn.GroupNorm(2, 4), "divides by the deviation of the sample, so its bound grows like 1 / sqrt(eps)"),
        (nn.InstanceNorm1d(4), "divides by the deviation of the sample, so its bound grows like 1 / sqrt(eps)"),
        (nn.InstanceNorm2d(4), "divides by the deviation of the sample, so its bound grows like 1 / sqrt(eps)"),
        (nn.RMSNorm(4), "divides by the norm of the sample, so its bound grows like 1 / sqrt(eps)"),
        (nn.LocalResponseNorm(2), "divides by a sum of squares of the sample, for which no bound is known"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_normalisation_by_the_sample_is_refused(layer: nn.Module, reason: str) -> None:
    name = type(layer).__name__
    assert_refused(layer.eval(), f"{name} {reason}; use BatchNorm in eval mode or otnn.nn.Centering", (4, 4, 4))


# --- softmax -----------------------------------------------------------------------------------------------------


def slope_at(layer: nn.Module, point: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda inputs: layer(inputs[None])[0], point)
    return norm(jacobian.view(point.numel(), point.numel()))


@pytest.mark.parametrize("kind", [nn.Softmax, nn.Softmin])
def test_softmax_is_bounded_by_a_half(kind: Callable[[int], nn.Module]) -> None:
    layer, points = kind(1), 4 * torch.randn(50, 5, dtype=torch.float64)
    assert layer_bound(layer, None, None) == LayerBound(0.5, None)
    assert max(slope_at(layer, point) for point in points) <= 0.5
    sign = 1 if kind is nn.Softmax else -1
    assert slope_at(layer, sign * torch.tensor([0, 0, -50.0, -50.0], dtype=torch.float64)) == pytest.approx(0.5)
    assert layer_bound(kind(-1), None, None).constant == 0.5
    assert layer_bound(kind(-2), (3, 4), (3, 4)).constant == 0.5
    image = torch.zeros(2, 1, 1, dtype=torch.float64)
    assert layer_bound(nn.Softmax2d(), None, None).constant == 0.5
    assert slope_at(nn.Softmax2d(), image) == pytest.approx(0.5)


def test_log_softmax_is_bounded_by_the_root_of_the_classes() -> None:
    for dim, shape in [(1, (5,)), (-1, (2, 5)), (2, (3, 5)), (-2, (5, 3))]:
        assert layer_bound(nn.LogSoftmax(dim), shape, shape).constant == pytest.approx(math.sqrt(5))
    layer, points = nn.LogSoftmax(1), 4 * torch.randn(50, 5, dtype=torch.float64)
    assert max(slope_at(layer, point) for point in points) <= math.sqrt(5) * ROUNDING
    assert slope_at(layer, torch.tensor([50.0, 0, 0, 0, 0], dtype=torch.float64)) == pytest.approx(math.sqrt(5))
    text = "the bound of LogSoftmax depends on the number of classes: expected input_shape, got none"
    assert_refused(layer, text)


# --- dropout, shuffles, reshapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU]
)
def test_random_layers_are_refused_in_training(kind: type[nn.Module]) -> None:
    assert layer_bound(kind().eval(), None, None).constant == pytest.approx(1)
    assert_refused(kind(), f"{kind.__name__} is random in training mode; call eval() before")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.PixelShuffle(2), (8, 2, 3)),
        (nn.PixelUnshuffle(2), (2, 4, 2)),
        (nn.ChannelShuffle(2), (4, 2, 2)),
        (nn.Unflatten(1, (2, 3)), (6, 2)),
        (nn.Unflatten(-1, (2, 3)), (2, 6)),
        (nn.Unflatten(-2, (2, 3)), (6, 2)),
    ],
    ids=str,
)
def test_rearrangements_have_norm_one(layer: nn.Module, shape: Shape) -> None:
    assert rule(layer, shape) == LayerBound(1.0, EXACT)
    matrix = layer_matrix(layer, shape)
    assert torch.equal(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64))


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [
        (nn.Softmax(0), None, 0),
        (nn.Softmin(-2), (4,), -2),
        (nn.LogSoftmax(-3), (4, 4), -3),
        (nn.Softmax2d(), (4, 4), -3),
        (nn.Unflatten(0, (2, 1)), None, 0),
        (nn.Unflatten(-2, (2, 1)), (4,), -2),
        (nn.PixelShuffle(1), (4, 4), -3),
        (nn.PixelUnshuffle(1), (4, 4), -3),
    ],
    ids=str,
)
def test_layers_along_the_batch_are_refused(layer: nn.Module, shape: Shape | None, dim: int) -> None:
    name = type(layer).__name__
    text = f"{name} along dimension {dim} mixes the samples of a batch; expected dim >= 1"
    assert_refused(layer, text, shape)


@pytest.mark.parametrize("layer", [nn.Softmax(-2), nn.LogSoftmax(-2), nn.Unflatten(-2, (2, 1))], ids=str)
def test_layers_that_may_work_along_the_batch_ask_for_the_shape(layer: nn.Module) -> None:
    name = type(layer).__name__
    text = f"{name} along dimension -2 depends on the input's shape: expected dim >= 1 or input_shape"
    assert_refused(layer, text)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.CELU(-1.0), "CELU has unbounded slopes unless alpha > 0, got -1.0; set alpha=1.0"),
        (
            nn.Softplus(threshold=5),
            "Softplus(beta=1.0, threshold=5) jumps at its threshold: expected beta > 0 and threshold >= 20",
        ),
        (
            nn.Softplus(beta=-1.0),
            "Softplus(beta=-1.0, threshold=20.0) jumps at its threshold: expected beta > 0 and threshold >= 20",
        ),
        (
            nn.Softplus(threshold=math.nan),
            "Softplus(beta=1.0, threshold=nan) jumps at its threshold: expected beta > 0 and threshold >= 20",
        ),
        (nn.Softshrink(-0.5), "Softshrink is not continuous with lambd=-0.5; expected lambd >= 0"),
        (nn.Hardshrink(0.5), "Hardshrink jumps at 0.5, so it has no Lipschitz bound; use Softshrink"),
        (nn.Threshold(0.5, 0.0), "Threshold(0.5, 0.0) jumps, so it has no Lipschitz bound; expected value = threshold"),
        (nn.GLU(), "GLU multiplies two parts of its input, so it has no Lipschitz bound; use another activation"),
        (nn.Softmax(), "Softmax without dim may mix the samples of a batch; expected dim=1"),
        (nn.LogSoftmax(), "LogSoftmax without dim may mix the samples of a batch; expected dim=1"),
        (nn.LeakyReLU(math.nan), "expected a finite setting, got nan; repair the layer"),
        (nn.RReLU(0.0, math.inf).eval(), "expected a finite setting, got inf; repair the layer"),
        (nn.ELU(math.inf), "expected a finite setting, got inf; repair the layer"),
        (nn.CELU(math.nan), "expected a finite setting, got nan; repair the layer"),
        (nn.Softplus(math.nan), "expected a finite setting, got nan; repair the layer"),
        (nn.Softshrink(math.inf), "expected a finite setting, got inf; repair the layer"),
        (nn.Hardtanh(-1e300, 1), "expected settings that float32 can hold, got -1e+300, 1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_has_no_bound_is_refused(layer: nn.Module, text: str) -> None:
    assert_refused(layer, text)


def test_the_reasons_of_refusals_hold() -> None:
    # each pair is nearly one point, and its images are far apart
    for layer, point in [(nn.Hardshrink(0.5), 0.5), (nn.Threshold(0.5, 0.0), 0.5), (nn.Softplus(threshold=1), 1.0)]:
        below, above = torch.tensor([point - 1e-6, point + 1e-6], dtype=torch.float64)
        assert float((layer(below) - layer(above)).abs()) > 0.3
    assert float((nn.CELU(-1.0)(torch.tensor(-9.0)) - nn.CELU(-1.0)(torch.tensor(-8.0))).abs()) > 1000


def test_the_module_registers_its_rules() -> None:
    for kind in (nn.GELU, nn.BatchNorm2d, *activations._SMOOTH, *activations._REFUSED):
        assert kind in layer_bound.registry
