"""What cannot be used, and what a method has no meaning for: each refusal says what was expected."""

from collections.abc import Callable

import captum.attr
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from otnn.errors import InputError
from otnn.explain import NotApplicableError, attribute
from otnn.models import build
from otnn.nn import MaxMin
from tests.explain.nets import images, linear, relu_net

X = images(2)


class Pair(nn.Module):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.flatten(1), inputs.flatten(1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: attribute(m, X, 1, "saliencey"), r"expected one of saliency, .*, forgrad, got 'saliencey'; did you"),
        (lambda m: attribute(m, X, 1, "saliency", steps=3), "saliency does not take steps=; it takes no settings"),
        (lambda m: attribute(m, X, 1, "lime", smaples=3), r"takes samples=, grid=, .*; did you mean samples\?"),
        (lambda m: attribute(m, X, 1, 3), "a captum object such as"),
        (lambda m: attribute(m, X, 1, captum.attr.Saliency), "a captum object such as"),
        (lambda m: attribute(m, X, 1, captum.attr.Saliency(m), score="margin"), "choose what they explain"),
        (lambda m: attribute(m, X, 1, score="probability"), '"logit" or "margin"'),
        (lambda m: attribute(m, X, 4), "expected integers in 0..3, got 4..4"),
        (lambda m: attribute(m, X, torch.tensor([-1, 0])), "expected integers in 0..3, got -1..0"),
        (lambda m: attribute(m, X, torch.tensor([1])), "one per sample"),
        (lambda m: attribute(m, X, torch.full((2, 4), 0.5)), "one-hot"),
        (lambda m: attribute(m, X[:0], 1), "empty batch"),
        (lambda m: attribute(m, X * torch.tensor([1, torch.nan]).view(2, 1, 1, 1), 1), "sample 1 holds NaN"),
        (lambda m: attribute(m, (X * 255).byte(), 1), "divide 8-bit images"),
        (lambda m: attribute(m, X[0, 0, 0], 1), "add a batch dimension"),
        (
            lambda m: attribute(m, X[..., None], 1),
            r"expected images .*, signals .*, rows .*, got shape \(2, 2, 8, 8, 1",
        ),
        (lambda m: attribute(m, X[:, :1], 1), r"does not take torch.float32 of shape \(2, 1, 8, 8\)"),
        (lambda m: attribute(m, X.double(), 1), "does not take torch.float64"),
        (lambda m: attribute(m.train(), X, 1), "the model is in training mode"),
        (lambda m: (m[3].train(), attribute(m, X, 1)), "3 is in training mode"),
        (lambda m: attribute(Pair().eval(), X, 1), "got tuple; wrap the model"),
        (lambda m: attribute(m, X, 1, memory_budget=10), "memory_budget: expected at least"),
        (lambda m: attribute(m, X, 1, "integrated_gradients", steps=0), "steps: expected an integer >= 1, got 0"),
        (lambda m: attribute(m, X, 1, "smoothgrad", samples=2.5), "samples: expected an integer >= 1, got 2.5"),
        (lambda m: attribute(m, X, 1, "smoothgrad", sigma=-1), "sigma: expected a share"),
        (lambda m: attribute(m, X, 1, "integrated_gradients", baseline=torch.rand(3)), "broadcasts to"),
        (lambda m: attribute(m, X, 1, "occlusion", baseline=torch.inf), "baseline: expected finite"),
        (lambda m: attribute(m, X, 1, "occlusion", window=9), r"window: expected at most the input, \(8, 8\)"),
        (lambda m: attribute(m, X, 1, "occlusion", window=2, stride=3), "so that nothing is left out"),
        (lambda m: attribute(m, X, 1, "occlusion", window=(2, 2, 2)), "one for each of 2 dimensions"),
        (lambda m: attribute(m, X, 1, "lime", grid=9), "at most 8 cells a side"),
        (lambda m: attribute(m, X, 1, "lime", ridge=0), "expected positive numbers"),
        (lambda m: attribute(m, X, 1, "kernel_shap", samples=20), "expected an integer >= 51"),
        (lambda m: attribute(m, X, 1, "kernel_shap", grid=1), "at least 2, got 1"),
        (lambda m: attribute(m, X, 1, "gradcam", layer="conv"), "the name of a module of the model, got 'conv'"),
        (lambda m: attribute(m, X, 1, "gradcam", layer=nn.ReLU()), "this ReLU is no module of the model"),
        (lambda m: attribute(m, X, 1, "gradcam", layer=m[5]), r"expected maps \(n, channels, ...\) from this Linear"),
        (lambda m: attribute(m, X, 1, lambda m, x, t: x.numpy), "<lambda>: expected a tensor, got builtin"),
        (
            lambda m: attribute(m, X, 1, lambda m, x, t: x[:, 0]),
            r"of shape \(2, 2, 8, 8\) or \(2, 1, 8, 8\), got \(2, 8",
        ),
        (lambda m: attribute(m, X, 1, lambda m, x, t: x / 0), "the map of sample 0 holds NaN or infinite"),
    ],
)
def test_bad_input_says_what_was_expected(change: Callable[[nn.Module], object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        change(relu_net())


def test_a_gradient_that_is_not_finite_names_the_method_and_the_sample() -> None:
    class Root(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.sqrt()

    with pytest.raises(InputError, match="saliency: the map of sample 1 holds NaN or infinite values"):
        attribute(Root().eval(), torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 0)


def test_images_of_another_shape_than_the_classifier_was_built_for() -> None:
    with pytest.raises(InputError, match=r"expected images of shape \(1, 8, 8\), got \(2, 8, 8\)"):
        attribute(build("dense", (1, 8, 8), 3, widths=(8,)).eval(), X, 1)


@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution"])
@pytest.mark.parametrize("architecture", ["dense", "conv", "resnet"])
def test_relu_methods_refuse_an_otnn_and_take_its_twin(method: str, architecture: str) -> None:
    x = images(2, 1)
    with pytest.raises(NotApplicableError, match=rf"{method} changes .* also computes Sort\(\)"):
        attribute(build(architecture, (1, 8, 8), 3, widths=(8, 8)).eval(), x, 1, method)
    twin = build(architecture, (1, 8, 8), 3, widths=(8, 8), constrained=False).eval()
    maps = attribute(twin, x, 1, method, score="margin")
    assert not torch.allclose(maps, attribute(twin, x, 1, score="margin"))


class Functional(nn.Module):
    """A module of ReLU, and a function after it."""

    def __init__(self, function: Callable[[Tensor], Tensor], relu: bool = True) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(4, 6), nn.ReLU() if relu else nn.Identity(), nn.Linear(6, 3)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.function(self.relu(self.first(inputs))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Functional(F.relu), "also computes ReLU outside of nn.ReLU modules"),
        (Functional(F.relu, relu=False), "also computes ReLU outside of nn.ReLU modules"),
        (Functional(nn.GELU()), "also computes Gelu"),
        (Functional(nn.LeakyReLU()), "also computes LeakyRelu"),
        (Functional(lambda x: x.clamp(min=0)), "also computes Clamp"),
        (Functional(MaxMin()), r"also computes Sort\(\)"),
        (Functional(torch.tanh, relu=False), "also computes Tanh"),
        (Functional(torch.sigmoid, relu=False), "runs none"),
        (Functional(lambda x: x, relu=False), "runs none: the map would silently be the plain gradient"),
    ],
)
def test_relu_methods_see_what_a_model_computes(model: nn.Module, text: str) -> None:
    x = torch.rand(2, 4)
    with pytest.raises(NotApplicableError, match=text):
        attribute(model.eval(), x, 1, "guided_backprop")


def test_relu_methods_take_pooling_in_place_reuse_and_gates() -> None:
    """One ReLU module that runs twice is as good as two."""
    shared = nn.ReLU(inplace=True)
    first, second, last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 16, 3), nn.Linear(16, 3)
    one, two = (
        nn.Sequential(
            *(first, relu, nn.MaxPool2d(2), second, other, nn.Flatten(), last, nn.LayerNorm(3), nn.Softmax(dim=1))
        ).eval()
        for relu, other in ((shared, shared), (nn.ReLU(), nn.ReLU()))
    )
    maps = attribute(one, X, 1, "guided_backprop")
    assert maps.abs().max() > 0
    assert torch.equal(maps, attribute(two, X, 1, "guided_backprop"))
    assert attribute(Functional(torch.sigmoid).eval(), torch.rand(2, 4), 1, "deconvolution").shape == (2, 4)


@pytest.mark.parametrize("method", ["gradcam", "gradcam_pp"])
def test_gradcam_needs_a_convolution_or_a_chosen_layer(method: str) -> None:
    with pytest.raises(NotApplicableError, match="weighs the channels of a convolution, and the model has none"):
        attribute(linear((2, 8, 8)), X.double(), 1, method)
    with pytest.raises(NotApplicableError, match=rf"{method} takes images .* or signals .*, got rows"):
        attribute(linear((5,)), torch.rand(2, 5).double(), 1, method)
    model = relu_net()
    by_name, by_module = (attribute(model, X, 1, method, layer=layer) for layer in ("1", model[1]))  # type: ignore[index]
    assert torch.equal(by_name, by_module)
    assert not torch.allclose(by_name, attribute(model, X, 1, method))


def test_signals_and_rows_have_maps_of_their_shape() -> None:
    signals = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14, 3)).eval()
    x = torch.rand(2, 2, 16)
    for method in ("saliency", "smoothgrad", "guided_backprop", "occlusion", "lime", "kernel_shap"):
        assert attribute(signals, x, 1, method).shape == (2, 2, 16)
    for method in ("gradcam", "gradcam_pp", "rise", "forgrad"):
        assert attribute(signals, x, 1, method).shape == (2, 1, 16)
    rows = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    for method in ("saliency", "integrated_gradients", "deconvolution", "occlusion", "lime", "kernel_shap", "sobol"):
        assert attribute(rows, torch.rand(2, 6), 1, method, score="margin").shape == (2, 6)
    with pytest.raises(NotApplicableError, match="forgrad takes images"):
        attribute(rows, torch.rand(2, 6), 1, "forgrad")
