"""What `certify` refuses, with the words that it says."""

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from otnn.certify import certify
from otnn.errors import InputError
from otnn.models import Classifier, build
from otnn.nn import OrthoLinear

SHAPE = (1, 4, 4)
BOTH = pytest.mark.parametrize("arithmetic", ["real", "float32"])


def dense() -> Classifier:
    return build("dense", SHAPE, 3, widths=(8,)).eval()


def image_model(layer: nn.Module) -> Classifier:
    features = layer(torch.zeros(2, *SHAPE)).flatten(1).shape[1]
    return Classifier(nn.Sequential(layer, nn.Flatten()), nn.Linear(features, 3), SHAPE).eval()


def rows_model(layer: nn.Module) -> Classifier:
    body = nn.Sequential(nn.Flatten(), layer).eval()
    return Classifier(body, nn.Linear(body(images()).shape[1], 3), SHAPE).eval()


def images(count: int = 5) -> Tensor:
    return torch.rand(count, *SHAPE)


def refusal(model: object, x: object, arithmetic: str = "real", **settings: int) -> str:
    with pytest.raises(InputError) as caught:
        certify(model, x, arithmetic=arithmetic, **settings)  # type: ignore[arg-type]
    return str(caught.value)


# --- inputs -----------------------------------------------------------------------------------------------------------

FLOATS = "inputs: expected floating-point values in [0, 1], got "
BOX = "inputs: expected values in [0, 1], got "
BAD_INPUTS: dict[str, tuple[Callable[[], object], str]] = {
    "no batch": (lambda: torch.rand(16), "inputs: expected a batch (batch, ...), got shape (16,)"),
    "a number": (lambda: torch.tensor(0.5), "inputs: expected a batch (batch, ...), got shape ()"),
    "empty": (lambda: torch.rand(0, *SHAPE), "inputs: expected at least one sample, got an empty batch"),
    "bytes": (lambda: torch.full((2, *SHAPE), 255).byte(), FLOATS + "torch.uint8; divide 8-bit images by 255 first"),
    "bytes 0 and 1": (lambda: torch.ones(2, *SHAPE).byte(), FLOATS + "torch.uint8"),
    "booleans": (lambda: images() > 0.5, FLOATS + "torch.bool"),
    "complex": (lambda: images().to(torch.complex64), FLOATS + "torch.complex64"),
    "0 to 255": (lambda: 255 * torch.ones(1, *SHAPE), BOX + "[255, 255]"),
    "negative": (lambda: torch.full((1, *SHAPE), -0.25), BOX + "[-0.25, -0.25]"),
    "beside NaN": (lambda: torch.tensor([math.nan, 1.5]).view(2, 1, 1, 1).expand(2, *SHAPE), BOX + "[0, 1.5]"),
    "colours": (lambda: torch.rand(2, 3, 4, 4), "inputs: expected images of shape (1, 4, 4), got (3, 4, 4)"),
    "numpy": (lambda: np.zeros((2, *SHAPE), dtype=np.float32), "inputs: expected a tensor, got ndarray"),
    "a list": (lambda: [[0.5]], "inputs: expected a tensor, got list"),
}


@BOTH
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_cannot_be_certified(name: str, arithmetic: str) -> None:
    make, words = BAD_INPUTS[name]
    assert refusal(dense(), make(), arithmetic).startswith(words)


def test_settings_that_make_no_sense() -> None:
    assert refusal(dense(), images(), "float16").startswith('arithmetic: expected "real" or "float32", got \'float16\'')
    for size in (0, -1):
        assert refusal(dense(), images(), batch_size=size).startswith(f"batch_size: expected at least 1, got {size}")


HALVES: list[tuple[Callable[[Classifier], Classifier], Callable[[Tensor], Tensor], str, str]] = [
    (Classifier.half, Tensor.half, "real", "torch.float16"),
    (Classifier.half, Tensor.float, "float32", "torch.float16"),
    (Classifier.bfloat16, Tensor.bfloat16, "float32", "torch.bfloat16"),
    (Classifier.float, Tensor.half, "real", "torch.float16"),
    (Classifier.float, Tensor.bfloat16, "float32", "torch.bfloat16"),
    (Classifier.double, Tensor.float, "float32", "torch.float64"),
    (Classifier.float, Tensor.double, "float32", "torch.float64"),
]


@pytest.mark.parametrize(("model", "x", "arithmetic", "found"), HALVES)
def test_another_precision(
    model: Callable[[Classifier], Classifier], x: Callable[[Tensor], Tensor], arithmetic: str, found: str
) -> None:
    allowed = "torch.float32 or torch.float64" if arithmetic == "real" else "torch.float32"
    words = f'arithmetic "{arithmetic}" expects weights and inputs of {allowed}, got {found}'
    assert refusal(model(dense()), x(images()), arithmetic).startswith(words)


# --- models -----------------------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


class Called(nn.Linear):
    def __call__(self, inputs: Tensor) -> Tensor:
        return 2 * super().__call__(inputs)


class Convolved(nn.Conv2d):
    def _conv_forward(self, *arguments: Tensor) -> Tensor:  # what the forward of torch's own class calls
        return 10 * super()._conv_forward(*arguments)


class Weighted(nn.Module):
    """A forward of the user's own on a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 16))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs.flatten(1), self.weight)


class OwnForward(Classifier):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * self.head(self.body(inputs))


def hooked(part: Callable[[Classifier], nn.Module], before: bool = False) -> Classifier:
    model = dense()
    layer = part(model)
    register = layer.register_forward_pre_hook if before else layer.register_forward_hook
    register(lambda *arguments: None)  # type: ignore[arg-type]
    return model


def patched(part: Callable[[Classifier], nn.Module]) -> Classifier:
    model = dense()
    part(model).forward = lambda inputs: inputs[:, :8]  # type: ignore[method-assign]
    return model


def changed(change: Callable[[Classifier], object]) -> Classifier:
    model = dense()
    change(model)
    return model


MAP = "no Lipschitz bound is known: its own forward, a hook or a parametrization makes "
BAD_MODELS: dict[str, tuple[Callable[[], object], str]] = {
    "no classifier": (lambda: dense().body, "expected an otnn Classifier, which names its body and its head, got Seq"),
    "training mode": (lambda: dense().train(), "the model is in training mode; call model.eval() before"),
    "a hook on the head": (
        lambda: hooked(lambda model: model.head),
        "head: computes something else than Unit",
    ),
    "a hook before the head": (lambda: hooked(lambda model: model.head, True), "head: computes something else"),
    "a hook on a layer": (
        lambda: hooked(lambda model: model.body[2]),
        "body.2: computes something else than",
    ),
    "a hook on the body": (lambda: hooked(lambda model: model.body), "body: a forward hook "),
    "a hook on the model": (lambda: hooked(lambda model: model), "Classifier: a forward hook "),
    "the head's own forward": (lambda: patched(lambda model: model.head), "head: computes something else"),
    "a layer's own forward": (lambda: patched(lambda model: model.body[2]), "body.2: computes something else"),
    "a model's own forward": (
        lambda: OwnForward(nn.Flatten(), nn.Linear(16, 3), SHAPE).eval(),
        "expected a Classifier",
    ),  # type: ignore[arg-type]
    "a subclass with its own forward": (lambda: rows_model(Doubled(16, 8)), "body.1: " + MAP + "Doubled another map"),
    "a subclass with its own call": (lambda: rows_model(Called(16, 8)), "body.1: " + MAP + "Called another map"),
    "a subclass with its own convolution": (lambda: image_model(Convolved(1, 2, 3)), "body.0: " + MAP + "Convolved"),
    "a parametrization": (lambda: rows_model(spectral_norm(nn.Linear(16, 8))), "body.1: " + MAP + "ParametrizedLinear"),
    "a parametrized head": (lambda: changed(lambda model: spectral_norm(model.head)), "head: computes something else"),
    "a functional layer": (lambda: rows_model(Weighted()), "body.1: linear: no Lipschitz bound is known for linear"),
    "a layer without a bound": (lambda: rows_model(nn.LayerNorm(16)), "body.1: LayerNorm divides by the deviation"),
    "a head that is no linear layer": (
        lambda: changed(lambda model: setattr(model, "head", nn.Identity())),
        "expected a Classifier with a linear head",
    ),
    "weights that are not finite": (
        lambda: changed(lambda model: nn.init.constant_(model.body[2].bias, math.inf)),
        "body.2.bias holds NaN or infinite values; train again with a lower learning rate",
    ),
    "scores that are no vectors": (
        lambda: Classifier(nn.Sequential(), nn.Linear(4, 3), SHAPE).eval(),
        "expected scores of shape (batch, 3), got (batch, 1, 4, 3)",
    ),
}


@BOTH
@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_cannot_be_certified(name: str, arithmetic: str) -> None:
    make, words = BAD_MODELS[name]
    assert refusal(make(), images(), arithmetic).startswith(words)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.Tanh(), nn.SiLU()])
@BOTH
def test_a_layer_of_unknown_rounding(layer: nn.Module, arithmetic: str) -> None:
    model = rows_model(nn.Sequential(OrthoLinear(16, 8), layer))
    assert refusal(model, images(), arithmetic).startswith("body.1.1: its rounding error is not known, so no radius")


def test_a_body_and_a_head_of_different_precision() -> None:
    model = dense()
    model.head.double()
    text = refusal(model, images())
    assert text.startswith("the network does not take images of shape (1, 4, 4)")
    assert "\n" not in text


# --- settings of torch ------------------------------------------------------------------------------------------------


@pytest.fixture
def precision() -> Iterator[None]:
    """Put every setting of precision back."""
    parts = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    before = [part.fp32_precision for part in parts]
    yield
    for part, value in zip(parts, before, strict=True):
        part.fp32_precision = value
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("level", ["medium", "high"])
def test_reduced_precision_of_products(level: str, precision: None) -> None:
    model, x = dense(), images()
    torch.set_float32_matmul_precision(level)
    assert refusal(model, x, "float32").startswith("torch is set to multiply float32 in reduced precision; expected")
    assert certify(model, x).reason == ("",) * 5  # float64 is not concerned
    torch.set_float32_matmul_precision("highest")
    assert certify(model, x, arithmetic="float32").reason == ("",) * 5


@pytest.mark.parametrize("part", ["matmul", "conv"])
def test_reduced_precision_of_one_kind_of_operation(part: str, precision: None) -> None:
    model, x = dense(), images()
    getattr(torch.backends.mkldnn, part).fp32_precision = "bf16"
    assert refusal(model, x, "float32").startswith("torch is set to multiply float32 in reduced precision")
    assert certify(model, x).reason == ("",) * 5


@BOTH
def test_autocast(arithmetic: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert refusal(dense(), images(), arithmetic) == "autocast computes in half precision; certify outside of it"


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="this build has no Winograd convolutions")
def test_winograd_convolutions() -> None:
    """Without oneDNN, torch gives convolutions of 16 samples and more to NNPACK."""
    model, x = image_model(nn.Conv2d(1, 1, 3, padding=1, bias=False)), images(16)
    torch._C._set_mkldnn_enabled(False)  # what torch.backends.mkldnn.flags does, which warns
    try:
        assert "Winograd" in refusal(model, x, "float32")
        assert certify(copy.deepcopy(model), x).reason == ("",) * 16
    finally:
        torch._C._set_mkldnn_enabled(True)
