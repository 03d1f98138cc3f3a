import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.conversion import convert
from otnn.conversion.counterparts import Place, counterpart
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.nn import MaxMin, OrthoLinear
from tests.torch_networks import BasicBlock

# Each with whether it is linear: it then has the norm 1, not less.
POOLS = [
    (nn.MaxPool2d(2), (2, 6, 7), False),
    (nn.MaxPool2d(3, 2, 1), (2, 7, 8), False),
    (nn.MaxPool2d(3, 2), (1, 9, 8), False),
    (nn.MaxPool2d(2, 2, ceil_mode=True), (1, 5, 5), False),
    (nn.MaxPool2d(3, 1, 1), (1, 5, 5), False),
    (nn.MaxPool2d((3, 1), (2, 1), (1, 0)), (1, 6, 4), False),
    (nn.AdaptiveMaxPool2d(3), (1, 7, 7), False),
    (nn.AdaptiveMaxPool2d(2), (1, 4, 4), False),
    (nn.AvgPool2d(2), (2, 5, 6), True),
    (nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), (1, 5, 5), True),
    (nn.AvgPool2d(3, 1, 1), (1, 5, 6), True),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 6, 6), True),
    (nn.AdaptiveAvgPool2d(1), (2, 4, 5), True),
    (nn.AdaptiveAvgPool2d((3, None)), (1, 7, 4), True),
    (nn.AdaptiveAvgPool2d(5), (1, 3, 3), True),
    (nn.MaxPool1d(3, 2, 1), (2, 9), False),
    (nn.MaxPool1d(3, 1, 1), (1, 9), False),
    (nn.AvgPool1d(3, 2), (2, 9), True),
    (nn.AdaptiveAvgPool1d(4), (1, 9), True),
    (nn.Upsample(scale_factor=2), (1, 3, 3), True),
    (nn.ReflectionPad2d(1), (1, 4, 4), True),
]


@pytest.mark.parametrize(("pool", "shape", "linear"), POOLS, ids=lambda value: str(value))
def test_pooling_has_norm_1(pool: nn.Module, shape: tuple[int, ...], linear: bool) -> None:
    model = convert(pool, shape).model.double()
    x = torch.randn(shape, dtype=torch.float64)
    assert model(x[None]).shape == pool(x[None]).shape
    assert bound(model.eval(), shape).constant <= 1.0001
    rows = math.prod(model(x[None]).shape)
    jacobian = torch.func.jacrev(lambda point: model(point[None])[0])(x).reshape(rows, -1)
    norm = float(torch.linalg.matrix_norm(jacobian, ord=2))
    assert norm <= 1 + 1e-6
    if linear:
        assert norm >= 1 - 1e-4


@given(
    taps=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    sides=st.tuples(st.integers(5, 12), st.integers(5, 12)),
)
@settings(max_examples=60, deadline=None)
def test_strided_convolutions_keep_the_size_of_their_output(
    taps: int, stride: int, padding: int, sides: tuple[int, int]
) -> None:
    layer = nn.Conv2d(2, 4, taps, stride, padding)
    expected = layer(torch.zeros(1, 2, *sides)).shape[1:]
    found = counterpart(layer, Place((2, *sides), tuple(expected)))
    new: Any = found.layer
    assert new(torch.zeros(1, 2, *sides)).shape[1:] == expected
    assert (new.kernel_size, new.padding) == (taps, padding) or taps < stride
    assert bool(found.why) == (taps < stride)


def _random_layer(kind: str, channels: int, number: int) -> nn.Module:
    layers: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: nn.Conv2d(channels, number, 1 + number % 4, padding=number % 3, bias=number % 2 > 0),
        "strided": lambda: nn.Conv2d(channels, number, 1 + number % 3, stride=2, padding=1),
        "residual": lambda: BasicBlock(channels, number, 1 + number % 2),
        "norm": lambda: nn.BatchNorm2d(channels),
        "act": lambda: nn.Softplus(),
        "max": lambda: nn.MaxPool2d(3, 1 + number % 3, padding=1),
        "average": lambda: nn.AvgPool2d(2, 1 + number % 2, padding=number % 2),
    }
    return layers[kind]()


@given(
    kinds=st.lists(
        st.sampled_from(["conv", "strided", "residual", "norm", "act", "max", "average"]), min_size=1, max_size=5
    ),
    numbers=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    sides=st.tuples(st.integers(9, 13), st.integers(9, 13)),
)
@settings(max_examples=20, deadline=None)
def test_random_networks_become_1_lipschitz(kinds: list[str], numbers: list[int], sides: tuple[int, int]) -> None:
    layers: list[nn.Module] = []
    x = torch.rand(2, 3, *sides)
    for kind, number in zip(kinds, numbers, strict=False):
        layer = _random_layer(kind, x.shape[1], number).eval()
        if min(x.shape[2:]) >= 4:
            layers.append(layer)
            x = layer(x).detach()
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    model = convert(network, (3, *sides)).model
    assert model(torch.rand(2, 3, *sides)).shape == (2, 3)
    assert bound(model.body, (3, *sides)).constant <= 1.0001


@pytest.mark.parametrize(
    ("layer", "shape", "now"),
    [
        (nn.LayerNorm((3, 4, 4)), (3, 4, 4), "LayerCentering"),
        (nn.GroupNorm(2, 4), (4, 3, 3), "LayerCentering"),
        (nn.RMSNorm(4), (4,), "removed"),
        (nn.LocalResponseNorm(2), (4, 3, 3), "removed"),
        (nn.PReLU(), (4,), "MaxMin"),
        (nn.Dropout2d(), (4, 3, 3), "removed"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (4, 5, 5), "OrthoConv2d"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5), "OrthoConv2d"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), (4,), "OrthoLinear"),
    ],
    ids=str,
)
def test_single_layers(layer: nn.Module, shape: tuple[int, ...], now: str) -> None:
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(math.prod(shape), 2))
    conversion = convert(network, shape)
    assert conversion.changes[0].now == now
    assert bound(conversion.model.eval().body, shape).constant <= 1.0001


def test_channels_are_last_after_a_dense_layer_on_sequences() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    model = convert(network, (3, 4)).model.eval()
    assert (model.body[1].dim, type(model.body[1])) == (2, MaxMin)
    assert bound(model.body, (3, 4)).constant <= 1.0001


class _Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class _Uses(nn.Module):
    """A network of one function of two layers' results."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.norm(x)).flatten(1)


def _attention(x: Tensor, y: Tensor) -> Tensor:
    queries, keys = x.flatten(2), y.flatten(2)
    return torch.softmax(queries @ keys.mT, dim=-1)


def _branches(x: Tensor, y: Tensor) -> Tensor:
    return x if x.sum() > 0 else y


def _in_place(x: Tensor, y: Tensor) -> Tensor:
    return F.relu(x, inplace=True) + y + x


def _dashed(x: Tensor, y: Tensor) -> Tensor:
    x.add_(y)
    return x * 0.5


def _overwrites(x: Tensor, y: Tensor) -> Tensor:
    torch.abs(10 * x, out=y)
    return y


REFUSED = [
    (_Uses(_dashed), r"add_: overwrites a value that mul reads later; write add instead of add_"),
    (_Uses(lambda x, y: torch.add(x, 1.0, alpha=3)), r"add: expected two terms or factors"),
    (_Uses(lambda x, y: torch.cat([x, torch.ones(5, 1, 4, 4)], 1)), r"cat: expected torch.cat"),
    (_Uses(lambda x, y: x.squeeze(1)), r"squeeze: no 1-Lipschitz counterpart of squeeze is known; write torch.flatten"),
    (_Uses(lambda x, y: x * y.sigmoid()), r"mul: .*several results"),
    (_Uses(lambda x, y: x - y), r"sub: .*several results is known; write a sum"),
    (_Uses(lambda x, y: x - x), r"sub: subtracts a result from itself, which leaves zero"),
    (_Uses(lambda x, y: torch.add(x, x, alpha=2)), r"add: expected two terms or factors"),
    (_Uses(lambda x, y: x + x.shape[1]), r"add: expected a number or a stored tensor beside first, got a size"),
    (_Uses(lambda x, y: x * x.size(2)), r"mul: expected a number or a stored tensor beside first, got a size"),
    (_Uses(lambda x, y: torch.clamp(x, min=y)), r"clamp: .*expected numbers"),
    (_Uses(lambda x, y: x.clamp(torch.zeros(2, 4, 4))), r"clamp: .*expected numbers"),
    (_Uses(_overwrites), r"abs_1: .*no out"),
    (_Uses(lambda x, y: torch.mean(x, 1, dtype=torch.float32)), r"mean: expected a mean without arguments other than"),
    (_Uses(lambda x, y: torch.cat([x, x], 1, out=y)), r"cat: expected torch.cat"),
    (_Uses(lambda x, y: x.permute(0, 2, 3, 1)), r"permute: .* is known; keep the channels in dimension 1"),
    (_Uses(lambda x, y: x[:, :1]), r"getitem: .* is known; slices have none: take the whole result"),
    (_Uses(lambda x, y: F.interpolate(x, scale_factor=2)), r"interpolate: .* is known; use torch.nn.Upsample"),
    (_Uses(lambda x, y: torch.fft.fft2(y).real), r"fft_fft2: no 1-Lipschitz counterpart of fft_fft2 is known"),
    (_Uses(_attention), r"(matmul|mT|getattr).*: no 1-Lipschitz counterpart"),
    (_Uses(lambda x, y: torch.softmax(x, dim=1)), r"softmax: .*probabilities belong to the end"),
    (_Uses(lambda x, y: x + y.mean((2, 3), keepdim=True)), r"add: copies numbers of"),
    (_Uses(lambda x, y: torch.max(x, 1)[0].repeat(1, 2, 1)), r"max.*: no 1-Lipschitz counterpart of max"),
    (_Uses(lambda x, y: torch.cat([x, y], 0)[: x.shape[0]]), r"mixes the samples of a batch"),
    (_Uses(lambda x, y: 1 / (2 + x)), r"truediv: expected a product with a number"),
    (_Uses(lambda x, y: F.avg_pool2d(x, x.shape[2:])), r"avg_pool2d: expected numbers as its settings"),
    (_Uses(_branches), r"its forward cannot be traced"),
    (_Uses(_in_place), r"overwrites a value that .* reads later; set inplace=False"),
    (nn.Sequential(nn.Flatten(1), nn.LSTM(32, 3)), r"1: no 1-Lipschitz counterpart of LSTM"),
    (nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, batch_first=True)), r"TransformerEncoderLayer"),
    (nn.Sequential(nn.Conv2d(2, 2, (1, 3), padding=(0, 1)), nn.Flatten()), r"0: kernel_size: orthogonal kernels are"),
    (
        nn.Sequential(nn.Conv2d(2, 2, 3, dilation=2, stride=2, padding=2)),
        r"0: expected a dilation without a common factor",
    ),
    (nn.Sequential(nn.LayerNorm(4)), r"0: LayerNorm over the last dimensions \(4,\)"),
    (nn.Sequential(nn.Bilinear(4, 4, 2)), r"(?s)."),
    (nn.Sequential(nn.GLU(1)), r"0: GLU multiplies"),
    (nn.Sequential(nn.LazyConv2d(2, 3)), r"0.weight has no shape yet"),
    (nn.Sequential(nn.Conv2d(2, 2, 3)).half(), r"0.weight is torch.float16"),
]


@pytest.mark.parametrize(("network", "message"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
@pytest.mark.filterwarnings("ignore")  # torch warns of lazy layers and of transformers
def test_refusals_name_the_place(network: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(network, (2, 4, 4))


def test_refused_arguments() -> None:
    layer = nn.Sequential(nn.Linear(4, 2))
    for named, message in (
        ({"activation": "relu"}, "activation: expected one of maxmin"),
        ({"head": "none"}, "head: expected one of unit_rows"),
        ({"share": 1.5}, r"share: expected a share in \[0, 1\]"),
        ({"share": math.nan}, r"share: expected a share in \[0, 1\]"),
    ):
        with pytest.raises(InputError, match=message):
            convert(layer, (4,), **named)
    with pytest.raises(InputError, match="expected the sizes of one sample"):
        convert(layer)
    with pytest.raises(InputError, match="does not take images of shape"):
        convert(layer, (5,))
    with pytest.raises(InputError, match="expected a network of one input, got x, y; wrap it"):
        convert(_Two(), (8,))
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module"):
        convert(lambda x: x, (5,))  # type: ignore[arg-type]


def test_a_counterpart_of_another_shape_is_refused() -> None:
    class Padded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(super().forward(x), (0, 1))

    with pytest.raises(InputError, match=r"0: OrthoLinear gives \(3,\) instead of \(4,\)"):
        convert(nn.Sequential(Padded(4, 3), nn.ReLU(), nn.Linear(4, 2)), (4,))
    with pytest.raises(InputError, match=r"0: OrthoLinear gives \(3,\) instead of \(4,\)"):
        convert(Padded(4, 3), (4,))


def test_what_stays_must_compute_what_its_type_says() -> None:
    class Doubled(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    class Added(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + y

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Added(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x + 1)

    with pytest.raises(InputError, match="0: Doubled computes something else than Identity"):
        convert(nn.Sequential(Doubled(), nn.Flatten()), (4,))
    with pytest.raises(InputError, match="1: Doubled computes something else than Identity"):
        convert(nn.Sequential(nn.Linear(4, 2), Doubled()), (4,))
    with pytest.raises(InputError, match="layer: no 1-Lipschitz counterpart of Added of several results"):
        convert(nn.Sequential(Twice(), nn.Flatten()), (4,))
    with pytest.raises(InputError, match="layer: no 1-Lipschitz counterpart of Added of several results"):
        convert(Twice(), (4,))
    hooked = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
    hooked[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    with pytest.raises(InputError, match="0: a forward hook may change what MaxPool2d computes"):
        convert(hooked, (1, 4, 4))
    constrained = nn.Sequential(nn.utils.parametrizations.spectral_norm(OrthoLinear(4, 4)), nn.ReLU())
    with pytest.raises(InputError, match="0: ParametrizedOrthoLinear has a parametrization beside its own constraint"):
        convert(constrained, (4,))


@pytest.mark.parametrize("place", range(4))
def test_a_hook_is_not_dropped(place: int) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(dim=1))
    network[place].register_forward_hook(lambda module, inputs, output: 3 * output)
    with pytest.raises(InputError, match=rf"{place}: a forward hook may change what .*; remove it$"):
        convert(network, (4,))
    whole = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    whole.register_forward_pre_hook(lambda module, inputs: (255 * inputs[0],))
    with pytest.raises(InputError, match="a forward hook may change what Sequential computes: expected none"):
        convert(whole, (4,))
    old = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.ReLU())
    with pytest.raises(InputError, match=r"0: a forward hook .* by torch\.nn\.utils\.remove_spectral_norm"):
        convert(old, (4,))
