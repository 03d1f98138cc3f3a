"""What the methods compute: closed forms on linear models, and captum called by hand."""

import captum.attr
import pytest
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from torch import Tensor, nn

from otnn.explain import attribute, saliency
from otnn.explain.captum_perturbations import superpixels
from otnn.explain.guards import draw_seed
from otnn.explain.methods import METHODS
from otnn.lipschitz import bound
from otnn.models import build
from otnn.potential import nearest_rival, pair_distances, pair_potential
from tests.explain.nets import images, linear, relu_net, weight

SHAPES = [(5,), (2, 6), (2, 4, 5)]
TARGET = torch.tensor([0, 2, 2])


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_linear_model_gradient_methods_are_exact(shape: tuple[int, ...]) -> None:
    model, x = linear(shape), rand(3, *shape)
    w, b = weight(model, TARGET, shape), rand(*shape) + 1
    assert torch.equal(attribute(model, x, TARGET), w)
    assert torch.allclose(attribute(model, x, TARGET, "gradient_input"), w * x)
    # captum keeps the weights of its steps in float32
    assert torch.allclose(attribute(model, x, TARGET, "integrated_gradients", baseline=b), w * (x - b), atol=1e-6)
    assert torch.allclose(attribute(model, x, TARGET, "integrated_gradients", steps=1, baseline=1.0), w * (x - 1))
    assert torch.allclose(attribute(model, x, TARGET, "smoothgrad", samples=7, sigma=3.0), w)
    assert torch.allclose(attribute(model, x, TARGET, "squaregrad", samples=7), w**2)
    assert attribute(model, x, TARGET, "vargrad", samples=7).abs().max() < 1e-15


@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_linear_model_occlusion_is_the_mean_over_the_windows_that_hide_a_value(shape: tuple[int, ...]) -> None:
    model, x = linear(shape), rand(3, *shape)
    w, base = weight(model, TARGET, shape), 0.3
    drop = (w * (x - base)).sum(1, keepdim=len(shape) > 1)  # channels are hidden together
    if len(shape) == 1:
        drop = w * (x - base)
    window, stride = 3, 2  # windows start at 0, 2, ... and are cut at the edge
    total, hits = torch.zeros_like(drop), torch.zeros_like(drop)
    spatial = drop.shape[2:] if len(shape) > 1 else drop.shape[1:]
    starts = [range(0, 1 + 2 * -(-(s - window) // stride), stride) for s in spatial]
    for start in torch.cartesian_prod(*[torch.tensor(list(s)) for s in starts]).view(-1, len(spatial)):
        cut = (..., *[slice(int(a), int(a) + window) for a in start])
        inside = torch.zeros_like(drop)
        inside[cut] = 1
        total += inside * (inside * drop).flatten(1).sum(1).view(-1, *[1] * (drop.ndim - 1))
        hits += inside
    assert hits.min() >= 1
    maps = attribute(model, x, TARGET, "occlusion", window=window, stride=stride, baseline=base)
    assert maps.shape == x.shape
    assert torch.allclose(maps, (total / hits).expand_as(x), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "settings"), [("lime", {"ridge": 1e-6}), ("kernel_shap", {})])
def test_on_a_linear_model_lime_and_kernel_shap_find_the_share_of_each_superpixel(
    method: str, settings: dict[str, float], shape: tuple[int, ...]
) -> None:
    model, x, base = linear(shape), rand(3, *shape), rand(3, *shape)
    part = weight(model, TARGET, shape) * (x - base)
    cells = superpixels(x, 3).expand_as(x)
    assert int(cells.max()) + 1 == {1: 5, 2: 3, 3: 9}[len(shape)]
    expected = torch.zeros_like(x)
    for cell in range(int(cells.max()) + 1):
        inside = cells == cell
        expected += inside * (part * inside).flatten(1).sum(1).view(-1, *[1] * len(shape))
    maps = attribute(model, x, TARGET, method, samples=100, grid=3, baseline=base, **settings)
    assert torch.allclose(maps, expected, atol=1e-4)


def test_the_ridge_of_lime_scales_with_the_scores() -> None:
    """captum's Lasso sets every coefficient of small scores to 0."""
    model, x = linear((1, 8, 8)), rand(2, 1, 8, 8)
    maps = attribute(model, x, 1, "lime", samples=200)
    model[1].weight.data /= 1000  # type: ignore[index]
    model[1].bias.data /= 1000  # type: ignore[index]
    assert torch.allclose(attribute(model, x, 1, "lime", samples=200), maps / 1000, rtol=1e-2, atol=1e-7)


def test_noise_is_a_share_of_the_range_of_each_sample_and_the_same_for_all() -> None:
    """Of f = sum x^2 / 2 the gradient under noise is x + sigma (max - min) z."""

    class Half(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.square().sum(1, keepdim=True) / 2

    x = rand(4, 30) * torch.tensor([[1.0], [2.0], [5.0], [0.0]])
    model, level = Half().eval(), 0.1 * (x.amax(1, keepdim=True) - x.amin(1, keepdim=True))
    shift = attribute(model, x, 1, "smoothgrad", sigma=0.1, samples=500) - x
    assert torch.allclose(shift[:3] / level[:3], (shift[:1] / level[:1]).expand(3, -1))
    spread = attribute(model, x, 1, "vargrad", sigma=0.1, samples=500) / level**2
    assert torch.allclose(spread[:3], spread[:1].expand(3, -1))
    assert ((spread[0] > 0.7) & (spread[0] < 1.3)).all()
    assert shift[3].eq(0).all()


def test_the_variance_does_not_cancel_in_float32() -> None:
    class Steep(nn.Module):
        """Gradient 1000 + cos(x): its variance is 1e-8 of its square."""

        def forward(self, inputs: Tensor) -> Tensor:
            return (1000 * inputs + inputs.sin()).sum(1, keepdim=True)

    model, x = Steep().eval(), rand(2, 30)
    exact = attribute(model, x, 1, "vargrad")
    assert exact.min() > 1e-5
    single = attribute(model, x.float(), 1, "vargrad", generator=torch.Generator().manual_seed(1))
    assert single.dtype == torch.float32
    assert 0.5 < float(single.double().mean() / exact.mean()) < 2
    hand = captum.attr.NoiseTunnel(captum.attr.Saliency(model))
    noisy = hand.attribute(x.float().requires_grad_(), "vargrad", nt_samples=50, stdevs=0.2, target=0)
    assert noisy.min() < 0


@pytest.mark.parametrize("score", ["logit", "margin"])
def test_integrated_gradients_are_complete(score: str) -> None:
    model, x = relu_net().double(), images(3, dtype=torch.float64)
    maps = attribute(model, x, TARGET, "integrated_gradients", score=score, steps=400, baseline=0.5)
    scores, start = model(x).detach(), model(torch.full_like(x, 0.5)).detach()
    rival = scores.scatter(1, TARGET.unsqueeze(1), -torch.inf).argmax(1)
    change = (scores - start).gather(1, TARGET.unsqueeze(1)).squeeze(1)
    if score == "margin":
        change = change - (scores - start).gather(1, rival.unsqueeze(1)).squeeze(1)
    assert torch.allclose(maps.flatten(1).sum(1), change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_margin_of_an_otnn_is_its_pair_potential(classes: int) -> None:
    model = build("conv", (1, 8, 8), classes, widths=(4, 8)).double().eval()
    x, target = images(3, 1, torch.float64), torch.tensor([0, 1, classes - 1])
    maps = attribute(model, x, target, score="margin")
    leaf = x.clone().requires_grad_()
    distances = pair_distances(model, bound(model.body))
    scores = model(leaf)
    rival = nearest_rival(
        torch.cat([-scores, scores], 1).detach() / 2 if classes == 2 else scores.detach(), target, distances
    )
    (expected,) = torch.autograd.grad(pair_potential(scores, target, rival, distances).sum(), leaf)
    assert torch.allclose(maps, expected)
    assert (maps.flatten(1).norm(dim=1) <= 1 + 1e-9).all()


@pytest.mark.parametrize("method", ["saliency", "gradient_input", "integrated_gradients", "smoothgrad", "gradcam"])
@pytest.mark.parametrize("score", ["logit", "margin"])
def test_of_one_output_the_two_classes_are_opposite(method: str, score: str) -> None:
    model, x = relu_net(1), images(2)
    one = attribute(model, x, 1, method, score=score)
    assert one.abs().max() > 0
    assert torch.allclose(attribute(model, x, 0, method, score=score), -one, atol=1e-7)


def test_the_saliency_of_the_stages_is_the_method() -> None:
    model, x = build("conv", (1, 8, 8), 4, widths=(4, 8)).eval(), images(3, 1)
    assert torch.equal(saliency(model, x, TARGET), attribute(model, x, TARGET, "saliency"))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_methods_have_the_shape_of_the_input_and_others_may_join_channels(method: str) -> None:
    settings = {"samples": 60} if method in ("lime", "kernel_shap", "rise", "hsic") else {}
    maps = attribute(relu_net(), images(2), 1, method, **settings)
    joined = method in ("gradcam", "gradcam_pp", "rise", "sobol", "hsic", "forgrad")
    assert maps.shape == (2, 1 if joined else 2, 8, 8)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad


def by_hand(name: str, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """captum's own call, with the settings that `attribute` takes by default (fewer samples)."""
    attr, x = captum.attr, x.clone().requires_grad_()
    cells = superpixels(x)
    torch.manual_seed(draw_seed(torch.Generator().manual_seed(4)))
    noise = {"target": target, "nt_samples": 6, "stdevs": 0.2 * float((x.max() - x.min()).detach()), "abs": False}
    match name:
        case "saliency":
            return attr.Saliency(model).attribute(x, target, abs=False)  # type: ignore[no-any-return]
        case "gradient_input":
            return attr.InputXGradient(model).attribute(x, target)  # type: ignore[no-any-return]
        case "integrated_gradients":
            return attr.IntegratedGradients(model).attribute(x, target=target)  # type: ignore[no-any-return]
        case "smoothgrad" | "squaregrad" | "vargrad":
            kind = {"squaregrad": "smoothgrad_sq"}.get(name, name)
            return attr.NoiseTunnel(attr.Saliency(model)).attribute(x, kind, **noise)  # type: ignore[no-any-return]
        case "gradcam":
            cam = attr.LayerGradCam(model, model[3]).attribute(x, target)  # type: ignore[index]
            return attr.LayerAttribution.interpolate(cam, (8, 8), "bilinear")  # type: ignore[no-any-return]
        case "guided_backprop":
            return attr.GuidedBackprop(model).attribute(x, target)  # type: ignore[no-any-return]
        case "deconvolution":
            return attr.Deconvolution(model).attribute(x, target)  # type: ignore[no-any-return]
        case "occlusion":
            return attr.Occlusion(model).attribute(x, (2, 2, 2), (2, 1, 1), target=target)  # type: ignore[no-any-return]
        case "lime":
            kernel = get_exp_kernel_similarity_function("cosine", 0.25)
            lime = attr.Lime(model, SkLearnRidge(alpha=1.0), kernel)
            return lime.attribute(x, target=target, feature_mask=cells, n_samples=80)  # type: ignore[no-any-return]
        case _:
            shap = attr.KernelShap(model)
            return shap.attribute(x, target=target, feature_mask=cells, n_samples=80)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
@pytest.mark.parametrize(
    "method",
    [
        *("saliency", "gradient_input", "integrated_gradients", "smoothgrad", "squaregrad", "vargrad", "gradcam"),
        *("guided_backprop", "deconvolution", "occlusion", "lime", "kernel_shap"),
    ],
)
def test_the_twelve_are_captums(method: str) -> None:
    """Sample by sample, since captum's draws for one sample depend on its batch mates."""
    model, x, target = relu_net(), images(3), torch.tensor([0, 3, 1])
    settings = {name: count for name, count in (("samples", 6),) if "samples" in METHODS[method].settings}
    if method in ("lime", "kernel_shap"):
        settings = {"samples": 80}
    maps = attribute(model, x, target, method, generator=torch.Generator().manual_seed(4), **settings)
    hand = torch.cat([by_hand(method, model, x[k : k + 1], target[k : k + 1]) for k in range(3)])
    # float32 by hand: the variance cancels
    assert (maps - hand.detach()).abs().max() < (1e-3 if method == "vargrad" else 1e-5) * hand.abs().max()
