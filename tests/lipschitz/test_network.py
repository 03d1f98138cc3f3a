import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.lipschitz import LipschitzBound, bound, matrix_bound
from otnn.manifold import keep_on_manifold
from otnn.models import build
from otnn.nn import Centering, MaxMin, OrthoLinear
from tests.lipschitz.networks import Forward, Net, linear
from tests.operators import layer_matrix, norm

# A bound and an SVD are each rounded, by a few tens of 2^-53 relative to the norm
ROUNDING = 1 + 1e-13


def steepest(module: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest norm of the Jacobian of the module itself, as it is called, at random points."""
    generator = torch.Generator().manual_seed(0)
    norms = []
    for _ in range(10):
        point = 3 * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda x: module(x.clone()), point)
        norms.append(norm(jacobian.reshape(-1, point.numel())))
    return max(norms)


# --- chains ------------------------------------------------------------------------------------------------------


def test_a_sequence_multiplies_and_names_its_layers() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    model = nn.Sequential(Centering(torch.zeros(3)), first, MaxMin(), nn.Sequential(second, nn.ReLU()), nn.Identity())
    found = bound(model)
    assert isinstance(found, LipschitzBound)
    expected = norm(first.weight.detach().double()) * norm(second.weight.detach().double())
    assert expected <= found.constant * ROUNDING
    assert found.constant == pytest.approx(expected, rel=1e-12)
    assert [name for name, _ in found.layers] == ["0", "1", "2", "3.0", "3.1", "4"]
    assert math.prod(constant for _, constant in found.layers) <= found.constant
    assert bound(nn.Sequential()).constant == 1.0


def test_a_single_layer_is_a_chain_of_one() -> None:
    layer = nn.Linear(3, 4)
    assert bound(layer).layers == (("0", bound(layer).constant),)
    assert bound(layer).constant == matrix_bound(layer.weight)


def test_a_layer_that_is_applied_twice_counts_twice() -> None:
    layer = nn.Linear(4, 4)
    once = bound(layer).constant
    assert bound(nn.Sequential(layer, MaxMin(), layer)).constant == pytest.approx(once**2)
    block = nn.Sequential(layer, MaxMin())
    found = bound(nn.Sequential(block, block, layer))
    assert found.constant == pytest.approx(once**3)
    assert len(found.layers) == 5


def test_zeros_and_numbers_beyond_float64_stay_bounds() -> None:
    zero = nn.Linear(2, 2)
    nn.init.zeros_(zero.weight)
    assert bound(nn.Sequential(zero, nn.Linear(2, 2))).constant == 0.0
    huge = nn.Linear(2, 2, dtype=torch.float64)
    nn.init.constant_(huge.weight, 8e307)
    assert bound(nn.Sequential(huge, huge)).constant == math.inf
    for join in (lambda net, x: net.a(x) + net.a(x), lambda net, x: torch.cat([net.a(x), net.a(x)], 1)):
        assert bound(Net(join, a=huge), (2,)).constant == math.inf
    assert bound(nn.Sequential(huge, zero.double())).constant == 0.0


def test_the_bound_follows_the_weights() -> None:
    # nothing is cached, as a power iteration would be: a stale bound would be the one before
    model = nn.Sequential(OrthoLinear(4, 4), MaxMin(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2)))
    before = bound(model, (4,)).constant
    for layer in (model[0], model[2], model[3][0]):
        with torch.no_grad():
            layer.weight.mul_(3)
    assert bound(model, (4,)).constant == pytest.approx(27 * before, rel=1e-6)
    model[2].weight.data = torch.eye(4)
    expected = 3 * 1 * norm(model[3][0].weight.detach().double())
    assert bound(model, (4,)).constant == pytest.approx(expected, rel=1e-6)


def test_a_buffer_that_changed_counts_as_it_is() -> None:
    net = Net(lambda net, x: x / net.std.view(1, -1), std=torch.tensor([0.5, 4.0]))
    before = set(vars(net))
    assert bound(net, (2,)).constant == pytest.approx(2.0)
    net.std.fill_(0.25)
    assert bound(net, (2,)).constant == pytest.approx(4.0)
    assert set(vars(net)) == before, "bounding left something behind in the network"


def test_bounding_changes_neither_the_network_nor_the_random_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten()).eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    bound(model, (1, 6, 6))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- graphs ------------------------------------------------------------------------------------------------------

A, B, MEAN = linear(), linear(6), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
STD = torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
SIGMA_A, SIGMA_B = norm(A.weight.detach()), norm(B.weight.detach())


def dense_block(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.a(x))
    return torch.cat([h, net.b(h)], dim=1)


def two_residuals(net: Any, x: Tensor) -> Tensor:
    x = x + net.a(x)
    return x - net.a(torch.relu(x))


GRAPHS: dict[str, tuple[Forward, dict[str, Any], tuple[int, ...], float]] = {
    "input": (lambda net, x: x, {}, (4,), 1.0),
    "residual": (lambda net, x: x + net.a(x), {"a": A}, (4,), 1 + SIGMA_A),
    "difference": (lambda net, x: net.a(x) - x, {"a": A}, (4,), 1 + SIGMA_A),
    "twice": (lambda net, x: x + x, {}, (4,), 2.0),
    "two residuals": (two_residuals, {"a": A}, (4,), (1 + SIGMA_A) ** 2),
    "concatenation": (lambda net, x: torch.cat([x, net.a(x)], 1), {"a": A}, (4,), math.hypot(1, SIGMA_A)),
    "concatenation from the end": (lambda net, x: torch.cat((x, x), dim=-1), {}, (4,), math.sqrt(2)),
    "dense block": (dense_block, {"a": A, "b": B}, (4,), SIGMA_A * math.hypot(1, SIGMA_B)),
    "normalisation": (lambda net, x: (x - net.mean) / net.std, {"mean": MEAN, "std": STD}, (3, 2, 2), 4.0),
    "numbers": (lambda net, x: 2 * (1 - x) / 0.5 + 7, {}, (4,), 4.0),
    "negative numbers": (lambda net, x: -(x * -3), {}, (4,), 3.0),
    "parameter": (lambda net, x: x * net.scale, {"scale": nn.Parameter(torch.tensor([1.0, -5.0]))}, (2,), 5.0),
    "relu": (lambda net, x: F.relu(net.a(torch.relu(x.relu()))), {"a": A}, (4,), SIGMA_A),
    "flatten": (lambda net, x: net.a(torch.flatten(x, 1)), {"a": A}, (1, 2, 2), SIGMA_A),
    "flatten from the end": (lambda net, x: net.a(x.flatten(-3)), {"a": A}, (1, 2, 2), SIGMA_A),
    "view": (lambda net, x: net.a(x.view(x.shape[0], -1)), {"a": A}, (1, 2, 2), SIGMA_A),
    "view of size": (lambda net, x: net.a(x.view(x.size(0), 4)), {"a": A}, (1, 2, 2), SIGMA_A),
    "reshape": (lambda net, x: net.a(x.reshape(-1, 4)), {"a": A}, (1, 2, 2), SIGMA_A),
    "contiguous": (lambda net, x: x.contiguous().neg(), {}, (4,), 1.0),
    "pooling": (lambda net, x: F.avg_pool2d(F.max_pool2d(x, 2), 2), {}, (1, 4, 4), 0.5),
    "keyword": (lambda net, x: net.a(input=x), {"a": A}, (4,), SIGMA_A),
    "without gradient": (lambda net, x: torch.no_grad()(net.a)(x), {"a": A}, (4,), SIGMA_A),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_counts_as_what_it_is(name: str) -> None:
    function, parts, shape, expected = GRAPHS[name]
    net = Net(function, **parts)
    assert bound(net, shape).constant == pytest.approx(expected, rel=1e-6)
    if name != "without gradient":
        assert steepest(net.double(), shape) <= bound(net, shape).constant * ROUNDING
    # inside a container it is the same
    assert bound(nn.Sequential(net, nn.Flatten()), shape).constant == pytest.approx(expected, rel=1e-6)


def shifted_in_place(net: Any, x: Tensor) -> Tensor:
    x -= 0.5
    return F.silu(x, inplace=True)


def test_a_chain_may_overwrite_its_input() -> None:
    expected = bound(nn.SiLU(), (4,)).constant
    assert bound(nn.Sequential(nn.SiLU(inplace=True), nn.Flatten()), (4,)).constant == pytest.approx(expected)
    assert bound(Net(shifted_in_place), (4,)).constant == pytest.approx(expected)


def test_a_layer_without_outputs_has_norm_0() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        layer = nn.Linear(4, 0)
    assert bound(layer, (4,)).constant == 0.0


def test_a_residual_that_is_aligned_attains_its_bound() -> None:
    layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    layer.weight.data = 2 * torch.eye(3, dtype=torch.float64)
    net = Net(lambda net, x: x + net.a(x), a=layer)
    assert norm(layer_matrix(net, (3,))) == 3.0
    assert 3.0 <= bound(net, (3,)).constant < 3 + 1e-12
    joined = Net(lambda net, x: torch.cat([x, net.a(x), x], 1), a=layer)
    assert norm(layer_matrix(joined, (3,))) == pytest.approx(math.sqrt(6))
    assert 6.0 <= bound(joined, (3,)).constant ** 2 * ROUNDING < 6 + 1e-11


def test_layers_of_a_graph_are_named() -> None:
    found = bound(Net(dense_block, a=A, b=B), (4,))
    assert [name for name, _ in found.layers] == ["a", "relu", "b"]
    assert [constant for _, constant in found.layers] == pytest.approx([SIGMA_A, 1.0, SIGMA_B])


# --- trained networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "shape", "widths"),
    [("dense", (1, 4, 4), (32, 32)), ("conv", (2, 8, 8), (8, 16, 16)), ("resnet", (2, 8, 8), (8, 16, 16))],
)
def test_the_body_of_a_trained_network(architecture: str, shape: tuple[int, ...], widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build(architecture, shape, 3, widths=widths)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    keep_on_manifold(optimizer, model)
    x, y = torch.rand(24, *shape), torch.arange(24) % 3
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(20 * model(x), y).backward()
        optimizer.step()
    found = bound(model.body)
    assert found.constant <= 1.00001
    jacobian = torch.func.jacrev(lambda image: model.body(image[None])[0])(x[0]).flatten(1)
    assert norm(jacobian.double()) <= found.constant * (1 + 1e-6)  # the Jacobian is computed in float32
    # borders of the convolutions take some, and a mix of x and h(x) that point in different ways
    assert norm(jacobian.double()) > (0.1 if architecture == "resnet" else 0.3)


@pytest.mark.parametrize(
    ("architecture", "shape", "widths"),
    [("dense", (1, 4, 4), (8, 8)), ("conv", (2, 8, 8), (4, 4, 8)), ("resnet", (2, 8, 8), (4, 4, 8))],
)
def test_the_unconstrained_twin(architecture: str, shape: tuple[int, ...], widths: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    model = build(architecture, shape, 3, widths=widths, constrained=False)
    for _ in range(5):
        model(torch.rand(16, *shape))  # batch normalisation finds its statistics
    model.eval()
    whole, body = bound(model), bound(model.body, shape)
    head = matrix_bound(model.head.weight)
    assert whole.constant == pytest.approx(body.constant * head, rel=1e-12)  # a Classifier knows its own shape
    assert steepest(model.double(), shape) <= whole.constant
