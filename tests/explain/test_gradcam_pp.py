import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.explain.gradcam_pp import gradcam_pp, last_spatial_layer
from otnn.explain.scores import Scorer
from otnn.memory import chunk_size
from otnn.models import build
from otnn.nn import MaxMin
from tests.explain import slow
from tests.explain.masks import samples


def relu_net(channels: int = 1, size: tuple[int, int] = (6, 5)) -> nn.Sequential:
    """Two ReLU layers behind the features: the score is piecewise linear, with gradients of either sign."""
    inner = 3 * (size[0] - 2) * (size[1] - 2)
    head = (nn.Flatten(), nn.Linear(inner, 10), nn.ReLU(), nn.Linear(10, 3))
    return nn.Sequential(nn.Conv2d(channels, 3, 3), nn.ReLU(), *head).double().eval()


def groupsort_net(size: tuple[int, int] = (6, 5)) -> nn.Sequential:
    inner = 4 * (size[0] - 2) * (size[1] - 2)
    head = (nn.Flatten(), nn.Linear(inner, 10), MaxMin(), nn.Linear(10, 3))
    return nn.Sequential(nn.Conv2d(1, 4, 3), MaxMin(), *head).double().eval()


@pytest.mark.parametrize("make", [relu_net, groupsort_net])
def test_it_is_the_formula_of_the_paper(make: object) -> None:
    """With Y = exp(S) as in the paper, whose map has one factor exp(S) more."""
    model = make()  # type: ignore[operator]
    x = samples(3, 1, 6, 5)
    target = torch.tensor([0, 1, 2])
    maps = gradcam_pp(Scorer(model, x, target), x, layer=model[1])
    signed = make is groupsort_net
    for k in range(3):
        features = model[:2](x[k : k + 1])[0].detach()
        assert bool((features < 0).any()) == signed

        def score(picture: Tensor, t: int = int(target[k])) -> Tensor:
            return model[2:](picture.unsqueeze(0))[0, t]

        expected = slow.gradcam_pp(features, score, positive_total=signed) / score(features).exp().detach()
        assert torch.allclose(maps[k, 0], slow.linear(expected, (6, 5)))
        assert float(maps[k].abs().max()) > 0


def test_of_a_linear_score_the_weights_have_a_closed_form() -> None:
    """S = sum g A with one g > 0 a channel: w = sum_ij g / (2 + g sum A), and nothing for g < 0."""
    g = torch.tensor([0.5, -1.0, 2.0]).double()
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 1, bias=False)).double().eval()
    model[3].weight.data = g.repeat_interleave(16).unsqueeze(0)
    x = samples(2, 1, 4, 4)
    scorer = Scorer(model, x, 1)
    activations = model[:2](x).detach()
    total = activations.sum(dim=(2, 3), keepdim=True)
    weights = torch.where(g > 0, 16 * g, 0).view(1, 3, 1, 1) / (2 + g.view(1, 3, 1, 1) * total)
    assert torch.allclose(gradcam_pp(scorer, x), (weights * activations).sum(dim=1, keepdim=True))


def test_without_the_last_relu_a_groupsort_map_is_not_lost() -> None:
    """All activations below 0: the paper's map is 0 everywhere, the signed one tells the places apart."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), MaxMin(), nn.Flatten(), nn.Linear(32, 2)).double().eval()
    model[0].weight.data[:] = -1.0
    model[0].bias.data[:] = 0.0
    model[3].weight.data[:] = 1.0
    x = samples(1, 1, 4, 4)
    scorer = Scorer(model, x, 0)
    assert float(gradcam_pp(scorer, x, relu=True).abs().max()) == 0
    signed = gradcam_pp(scorer, x)
    # A = -x with the weight 16 / 2 in both channels: no denominator vanishes though sum A g may be -2
    assert torch.allclose(signed, -16 * x)


def test_of_a_relu_network_the_last_relu_changes_nothing() -> None:
    model = relu_net()
    x = samples(3, 1, 6, 5)
    scorer = Scorer(model, x, 0)
    assert torch.equal(gradcam_pp(scorer, x), gradcam_pp(scorer, x, relu=True))


@pytest.mark.parametrize("constrained", [True, False])
def test_the_layer_of_our_networks_is_the_activation_of_the_last_convolution(constrained: bool) -> None:
    model = build("conv", (1, 8, 8), 3, widths=(4, 6, 8), constrained=constrained).eval()
    body = list(model.body)
    flatten = next(k for k, layer in enumerate(body) if isinstance(layer, nn.Flatten))
    x = torch.rand(2, 1, 8, 8)
    assert last_spatial_layer(model, x) is body[flatten - 1]
    maps = gradcam_pp(Scorer(model, x, 0, "margin"), x)
    assert maps.shape == x.shape
    assert torch.isfinite(maps).all()


def test_parametrised_layers_are_layers_and_what_builds_their_weights_is_none() -> None:
    model = relu_net()
    x = samples(2, 1, 6, 5)
    plain = gradcam_pp(Scorer(model, x, 0), x, layer=model[0])
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert last_spatial_layer(model, x) is model[1]
    assert last_spatial_layer(nn.Sequential(model[0], nn.Flatten()), x) is model[0]
    assert torch.allclose(gradcam_pp(Scorer(model, x, 0), x, layer=model[0]), plain)


def test_signals_have_maps_too() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).double().eval()
    x = samples(2, 2, 10)
    maps = gradcam_pp(Scorer(model, x, 0), x)
    assert maps.shape == (2, 1, 10)
    flat = nn.Sequential(nn.Conv2d(2, 3, (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).double().eval()
    flat[0].weight.data[:, :, 0], flat[0].bias.data = model[0].weight.data, model[0].bias.data
    flat[3].load_state_dict(model[3].state_dict())
    picture = x.unsqueeze(2)
    assert torch.allclose(gradcam_pp(Scorer(flat, picture, 0), picture).squeeze(2), maps)


def test_an_in_place_relu_behind_the_layer_does_not_change_what_was_seen() -> None:
    model = relu_net()
    inplace = nn.Sequential(model[0], nn.ReLU(inplace=True), *model[2:]).eval()
    x = samples(2, 1, 6, 5)
    at_convolution = [gradcam_pp(Scorer(m, x, 0), x, layer=m[0]) for m in (model, inplace)]
    assert torch.equal(*at_convolution)
    assert not torch.equal(at_convolution[0], gradcam_pp(Scorer(model, x, 0), x))


def test_the_budget_does_not_change_the_map() -> None:
    model = relu_net()
    x = samples(5, 1, 6, 5)
    scorer = Scorer(model, x, torch.tensor([0, 1, 2, 0, 1]))
    with pytest.raises(InputError, match=r"expected at least \d+ bytes, which one perturbed sample needs") as refusal:
        gradcam_pp(scorer, x, memory_budget=10)
    one = int(str(refusal.value).split(" bytes")[0].split()[-1])
    assert chunk_size(x[:1], 2 * one, model, gradient=True) == 2
    assert torch.allclose(gradcam_pp(scorer, x, memory_budget=2 * one), gradcam_pp(scorer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_left_behind(dtype: torch.dtype) -> None:
    model = relu_net().to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # a frozen model has maps too
    x = samples(2, 1, 6, 5, dtype=dtype)
    with torch.no_grad():
        maps = gradcam_pp(Scorer(model, x, 0), x)
    assert maps.dtype == dtype
    assert not maps.requires_grad
    assert not x.requires_grad
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(InputError, match="layer"):
        gradcam_pp(Scorer(model, x, 0), x, layer=model[3])
    assert all(not module._forward_hooks for module in model.modules())


def test_bad_input_says_what_was_expected() -> None:
    model = relu_net()
    x = samples(2, 1, 6, 5)
    scorer = Scorer(model, x, 0)
    row = nn.Linear(4, 2).double().eval()
    dense = nn.Sequential(nn.Flatten(), nn.Linear(30, 2)).double().eval()
    with pytest.raises(InputError, match="rows have no layer with a place for each channel"):
        gradcam_pp(Scorer(row, samples(2, 4), 0), samples(2, 4))
    with pytest.raises(InputError, match=r"expected one with a convolution, whose channels .* got none; name a layer"):
        gradcam_pp(Scorer(dense, x, 0), x)
    with pytest.raises(InputError, match=r"returns 4 dimensions \(n, channels, ...\), got \(2, 10\); name another"):
        gradcam_pp(scorer, x, layer=model[3])
    with pytest.raises(InputError, match="expected one that the model runs"):
        gradcam_pp(scorer, x, layer=nn.ReLU())

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.used = nn.Conv2d(1, 2, 3).double(), relu_net()

        def forward(self, inputs: Tensor) -> Tensor:
            self.aside(inputs)
            outputs: Tensor = self.used(inputs)
            return outputs

    unused = Aside().eval()
    with pytest.raises(InputError, match="expected one that the score depends on"):
        gradcam_pp(Scorer(unused, x, 0), x, layer=unused.aside)
