import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.nn import Centering, MaxMin, OrthoConv2d, OrthoLinear, UnitNormLinear
from tests.lipschitz.networks import Forward, Net, linear
from tests.operators import layer_matrix, norm

A = linear()


def refusal(module: nn.Module, shape: Any = None) -> str:
    with pytest.raises(InputError) as caught:
        bound(module, shape)
    text = str(caught.value)
    assert "\n" not in text, f"more than one line: {text}"
    return text


# --- operations --------------------------------------------------------------------------------------------------


def overwritten(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return h + net.act(h)


def overwritten_by_name(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return h + F.leaky_relu(h, 10.0, inplace=True)


def overwritten_by_position(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return h + F.leaky_relu(h, 10.0, True)


def overwritten_method(net: Any, x: Tensor) -> Tensor:
    h = x.neg()
    return h + F.leaky_relu(h, 10.0, inplace=True)


def overwritten_alias(net: Any, x: Tensor) -> Tensor:
    h = x.neg()
    view = h.flatten(1)
    return h + F.leaky_relu(view, 10.0, inplace=True)


def added_in_place(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    alias = h
    h += h
    return alias + h


def assigned(net: Any, x: Tensor) -> Tensor:
    x[:, 0] = 5 * x[:, 1]
    return x


REFUSED: dict[str, tuple[Forward, dict[str, Any], tuple[int, ...] | None, str]] = {
    "control flow": (lambda net, x: x if x.sum() > 0 else 10 * x, {}, (4,), "Net: its forward cannot be traced ("),
    "loop over values": (lambda net, x: sum(x), {}, (4,), "Net: its forward cannot be traced ("),
    "square": (lambda net, x: x * x, {}, (4,), "mul: a product of two results, or a quotient by one, has no"),
    "gate": (lambda net, x: net.a(x) * x, {"a": A}, (4,), "mul: a product of two results, or a quotient by one"),
    "inverse": (lambda net, x: 2 / x, {}, (4,), "truediv: a product of two results, or a quotient by one"),
    "ratio": (lambda net, x: x / net.a(x), {"a": A}, (4,), "truediv: a product of two results, or a quotient"),
    "power": (lambda net, x: x**2, {}, (4,), "pow_1: no Lipschitz bound is known for pow"),
    "matrix product": (lambda net, x: x @ x, {}, (5,), "matmul: no Lipschitz bound is known for matmul"),
    "unknown function": (lambda net, x: torch.exp(x), {}, (4,), "exp: no Lipschitz bound is known for exp"),
    "dead branch": (lambda net, x: (torch.exp(x), x)[1], {}, (4,), "exp: no Lipschitz bound is known for exp"),
    "broadcast sum": (
        lambda net, x: x + net.a(x),
        {"a": nn.Conv2d(3, 1, 1)},
        (3, 4, 4),
        "add: copies numbers by broadcasting: shapes (3, 4, 4) and (1, 4, 4) become (3, 4, 4); expected equal shapes",
    ),
    "broadcast constant": (
        lambda net, x: x * net.c,
        {"c": torch.ones(3, 1, 1)},
        (1, 4, 4),
        "mul: copies numbers by broadcasting: shapes (1, 4, 4) become (3, 4, 4); expected equal shapes",
    ),
    "sum of unknown shapes": (
        lambda net, x: x + net.a(x),
        {"a": A},
        None,
        "add: whether this copies numbers (broadcasting) depends on the input's size: expected input_shape",
    ),
    "concatenated samples": (lambda net, x: torch.cat([x, x]), {}, None, "cat: concatenation along dimension 0 mixes"),
    "samples by number": (lambda net, x: torch.cat([x, x], 0), {}, (4,), "cat: mixes the samples of a batch"),
    "samples from the end": (lambda net, x: torch.cat([x, x], -2), {}, (4,), "cat: mixes the samples of a batch"),
    "unknown dimension": (
        lambda net, x: torch.cat([x, x], -1),
        {},
        None,
        "cat: whether dimension -1 is that of the samples",
    ),
    "concatenated constant": (
        lambda net, x: torch.cat([x, net.c], 1),
        {"c": torch.zeros(5, 1)},
        (4,),
        "cat: expected a concatenation of results of layers",
    ),
    "flatten from 0": (lambda net, x: x.flatten(), {}, None, "flatten: flatten from dimension 0 mixes the samples"),
    "flattened samples": (lambda net, x: torch.flatten(x), {}, (4,), "flatten: mixes the samples of a batch"),
    "view of the channels": (
        lambda net, x: x.view(x.shape[1:][0], -1),
        {},
        None,
        "view: expected a reshape whose first size is that of the batch",
    ),
    "view of a number": (lambda net, x: x.view(1, -1), {}, None, "view: expected a reshape whose first size is that"),
    "view as rows": (lambda net, x: x.view(-1, 2), {}, (4,), "view: mixes the samples of a batch"),
    "slice": (lambda net, x: x[:, :3], {}, (4,), "getitem: no Lipschitz bound is known for getitem"),
    "first sample": (lambda net, x: x[0], {}, (4,), "getitem: mixes the samples of a batch"),
    "transpose": (lambda net, x: x.transpose(0, 1), {}, (5,), "transpose: no Lipschitz bound is known for transpose"),
    "sum with a factor": (
        lambda net, x: torch.add(x, x, alpha=3),
        {},
        (4,),
        "add: expected a sum of two terms without",
    ),
    "rounded quotient": (
        lambda net, x: torch.div(x, 2, rounding_mode="floor"),
        {},
        (4,),
        "div: expected a product of two factors without further arguments",
    ),
    "zero divisor": (lambda net, x: x / net.c, {"c": torch.tensor([1.0, 0.0])}, (2,), "truediv: divides by zero;"),
    "size as a factor": (lambda net, x: x * x.shape[1], {}, (4,), "mul: expected a number or a stored tensor"),
    "complex number": (lambda net, x: x * 2j, {}, (4,), "mul: expected a number or a stored tensor"),
    "factor NaN": (lambda net, x: x * math.nan, {}, (4,), "mul: "),
    "factor infinity": (lambda net, x: x * math.inf, {}, (4,), "mul: "),
    "term NaN": (lambda net, x: x + math.nan, {}, (4,), "add: "),
    "empty factor": (lambda net, x: x * net.c, {"c": torch.zeros(0)}, None, "mul: "),
    "in-place relu": (
        overwritten,
        {"a": A, "act": nn.ReLU(inplace=True)},
        (4,),
        "act: overwrites a value that ",
    ),
    "in-place by name": (overwritten_by_name, {"a": A}, (4,), "leaky_relu: overwrites a value that "),
    "in-place by position": (overwritten_by_position, {"a": A}, (4,), "leaky_relu: overwrites a value that "),
    "in-place after a method": (overwritten_method, {}, (4,), "leaky_relu: overwrites a value that "),
    "in-place on a view": (overwritten_alias, {}, (4,), "leaky_relu: overwrites a value that "),
    "in-place sum": (added_in_place, {"a": A}, (4,), "iadd: overwrites a value that "),
    "in-place method": (lambda net, x: x.neg().add_(x), {}, (4,), "add_: no Lipschitz bound is known for add_"),
    "overwritten input": (lambda net, x: x.copy_(10 * x), {}, (4,), "copy_: no Lipschitz bound is known for copy_"),
    "assigned elements": (assigned, {}, (4,), "Net: its forward cannot be traced ("),
    "pair": (lambda net, x: (x, net.a(x)), {"a": A}, (4,), "Net: expected one tensor as its output"),
    "dictionary": (lambda net, x: {"scores": x}, {}, (4,), "Net: expected one tensor as its output"),
    "nothing": (lambda net, x: None, {}, (4,), "Net: expected one tensor as its output"),
    "constant": (lambda net, x: net.c, {"c": torch.zeros(2)}, None, "Net: expected one tensor as its output"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_bound_is_refused(name: str) -> None:
    function, parts, shape, text = REFUSED[name]
    assert refusal(Net(function, **parts), shape).startswith(text)


def test_two_inputs_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

    class Optional(nn.Module):
        def forward(self, first: Tensor, factor: float = 2.0) -> Tensor:
            return first * factor

    class Named(nn.Module):
        def forward(self, *, inputs: Tensor) -> Tensor:
            return inputs

    refusal(Named(), (4,))
    for shape in (None, (4,)):
        assert refusal(Two(), shape) == "second: expected a network of one input"
        assert refusal(Optional(), shape) == "factor: expected a network of one input"


@pytest.mark.parametrize(
    "layer",
    [nn.Bilinear(2, 2, 2), nn.MultiheadAttention(4, 2), nn.GRU(2, 2), nn.Conv3d(1, 1, 1), nn.ModuleList([A])],
    ids=lambda layer: type(layer).__name__,
)
def test_an_unknown_layer_is_named(layer: nn.Module) -> None:
    words = f"no Lipschitz bound is known for {type(layer).__name__}; use a layer of otnn.nn or of torch.nn"
    assert refusal(nn.Sequential(OrthoLinear(4, 4), nn.Sequential(layer))) == f"1.0: {words}"
    assert refusal(layer) == f"{type(layer).__name__}: {words}"


def test_layer_normalisation_is_refused() -> None:
    words = "LayerNorm divides by the deviation of the sample, so its bound grows like 1 / sqrt(eps)"
    assert refusal(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))).startswith(f"1: {words}")


def test_batch_normalisation_in_training_mode_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)))
    assert refusal(model) == "1.0: is in training mode; call .eval() first"
    assert refusal(nn.BatchNorm1d(4)) == "BatchNorm1d: is in training mode; call .eval() first"
    assert bound(model.eval(), (4,)).constant > 0


# --- modules that compute something else than their type says ------------------------------------------------------


class Tenfold(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return 10 * super().forward(inputs)


class TenfoldCall(nn.Linear):
    def __call__(self, inputs: Tensor) -> Tensor:
        return 10 * super().__call__(inputs)


class TenfoldInside(nn.Conv2d):
    def _conv_forward(self, *arguments: Any) -> Tensor:
        return 10 * super()._conv_forward(*arguments)


class TenfoldSequence(nn.Sequential):
    def __call__(self, inputs: Tensor) -> Tensor:
        return 10 * super().__call__(inputs)


def tenfold_instance(module: nn.Module) -> nn.Module:
    kept = module.forward
    module.forward = lambda inputs: 10 * kept(inputs)  # type: ignore[method-assign]
    return module


def tenfold_instance_inside(module: nn.Conv2d) -> nn.Module:
    kept = module._conv_forward
    module._conv_forward = lambda *arguments: 10 * kept(*arguments)  # type: ignore[method-assign]
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: 10 * output)
    return module


def hooked_before(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, inputs: (10 * inputs[0],))
    return module


ANOTHER_MAP: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Tenfold(4, 4),
    "subclass in a sequence": lambda: nn.Sequential(Tenfold(4, 4)),
    "convolution inside": lambda: nn.Sequential(TenfoldInside(1, 1, 1), nn.Flatten()),
    "instance convolution inside": lambda: nn.Sequential(tenfold_instance_inside(nn.Conv2d(1, 1, 1))),
    "hook on a layer": lambda: hooked(nn.Linear(4, 4)),
    "hook on a layer in a sequence": lambda: nn.Sequential(hooked(nn.Linear(4, 4))),
    "hook before a layer": lambda: nn.Sequential(hooked_before(nn.Linear(4, 4))),
    "hook on a container": lambda: hooked(nn.Sequential(nn.Linear(4, 4))),
    "hook on an inner container": lambda: nn.Sequential(hooked_before(nn.Sequential(nn.Linear(4, 4)))),
    "hook on a network": lambda: hooked(Net(lambda net, x: net.a(x), a=linear())),
    "instance forward of a layer": lambda: tenfold_instance(nn.Linear(4, 4)),
    "instance forward in a sequence": lambda: nn.Sequential(tenfold_instance(nn.Linear(4, 4))),
    "instance forward of a container": lambda: tenfold_instance(nn.Sequential(nn.Linear(4, 4))),
    "instance forward of a network": lambda: tenfold_instance(Net(lambda net, x: net.a(x), a=linear())),
    "call of a container": lambda: TenfoldSequence(nn.Linear(4, 4)),
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "parametrized convolution": lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Conv2d(4, 4, 1))),
    "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4))),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's old spectral norm
@pytest.mark.parametrize("name", ANOTHER_MAP)
def test_what_computes_something_else_is_refused(name: str) -> None:
    text = refusal(ANOTHER_MAP[name]())
    assert "another map than" in text or "hook" in text or "its own" in text


@pytest.mark.parametrize("layer", [lambda: TenfoldCall(4, 4), lambda: nn.Sequential(TenfoldCall(4, 4))])
def test_a_call_of_its_own_is_traced_or_refused(layer: Callable[[], nn.Module]) -> None:
    module = layer()
    try:
        found = bound(module).constant
    except InputError:
        return
    assert norm(layer_matrix(module, (4,))) <= found * (1 + 1e-6)


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    norms = nn.BatchNorm2d(4).eval()
    layers = [OrthoLinear(4, 4), OrthoConv2d(2, 4, 3), UnitNormLinear(4, 2), norms, Centering(torch.zeros(3))]
    model = nn.Sequential(*layers)
    places = {"0.weight": layers[0].weight, "1.projectors": layers[1].projectors, "1.bias": layers[1].bias}
    places |= {"3.running_var": norms.running_var, "4.mean": layers[4].mean}
    for name, value in places.items():
        kept = value.detach().clone()
        with torch.no_grad():
            value.view(-1)[0] = bad
        assert refusal(model) == f"{name} holds NaN or infinite values; train again with a lower learning rate"
        with torch.no_grad():
            value.copy_(kept)
    bound(model)


def test_factors_whose_kernel_overflows_have_no_bound() -> None:
    layer = OrthoConv2d(2, 2, 3)
    with torch.no_grad():
        layer.projectors.fill_(1e30)  # finite, but their products are not
    assert "NaN or infinite" in refusal(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    words = f"the weight is {dtype}: bounds are proven of float32 and float64 weights; convert it with .float()"
    assert refusal(nn.Linear(4, 4).to(dtype)) == f"Linear: {words}"
    assert refusal(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).to(dtype), (4,)) == f"1: {words}"
    assert refusal(nn.Sequential(nn.Conv2d(1, 1, 3)).to(dtype)) == f"0: {words}"


@pytest.mark.parametrize("shape", [4, (-1,), (3,), (2, 3), ("a",)], ids=str)
def test_a_shape_that_does_not_fit_is_told(shape: Any) -> None:
    text = refusal(nn.Sequential(nn.Linear(4, 4)), shape)
    assert text.startswith(("input_shape: ", "the network does not take images of shape "))


def test_images_without_channels_are_refused() -> None:
    # torch takes a batch of 5 images of one dimension less for one image of 5 channels
    for layer, shape in ((nn.Conv1d(5, 5, 3, padding=1), (8,)), (nn.Conv2d(5, 5, 3, padding=1), (8, 8))):
        words = f"expected images of {len(shape) + 1} dimensions, channels first, got shape {shape}"
        assert refusal(layer, shape) == f"{type(layer).__name__}: {words}"


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_weights_without_values_are_refused() -> None:
    assert refusal(nn.Sequential(nn.LazyLinear(4)), (4,)) == "0.weight has no values yet; load the weights first"
    assert refusal(nn.Linear(4, 4, device="meta")) == "weight has no values yet; load the weights first"


@pytest.mark.parametrize("layer", [MaxMin(0), nn.Flatten(0)], ids=["MaxMin", "Flatten"])
def test_layers_over_samples_are_refused(layer: nn.Module) -> None:
    assert "mixes the samples of a batch; expected " in refusal(nn.Sequential(layer))


def test_layers_over_samples_counted_from_the_end_are_refused() -> None:
    assert "mixes the samples of a batch" in refusal(nn.Sequential(nn.Linear(4, 4), nn.Flatten(-2)), (4,))
    refusal(nn.Sequential(nn.Linear(4, 4), MaxMin(-2)), (4,))
