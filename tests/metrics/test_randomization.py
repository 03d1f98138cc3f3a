import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from otnn.explain.scores import Scorer
from otnn.lipschitz import bound
from otnn.manifold import Stiefel, constrained_parameters
from otnn.metrics import cost_of, layers_from_top, mprt
from otnn.metrics.randomization import redraw, restored
from otnn.models import build
from tests.metrics import slow
from tests.metrics.networks import conv, gradient_of, images, seeded


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def same(model: nn.Module, kept: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, kept[name]) for name, tensor in state(model).items())


def test_mprt_equals_the_slow_one() -> None:
    x, model = images(3, 2, 5, 5), conv()
    explain = gradient_of(Scorer(model, x, torch.tensor([0, 1, 2])))
    index = torch.arange(3)
    kept, own = state(model), explain(x, index)
    result = mprt(model, explain, x, forwards_per_map=2, generator=seeded(3))
    expected = []
    torch.manual_seed(int(torch.randint(2**62, (1,), generator=seeded(3))))
    for layer in (model[4], model[0]):
        layer.reset_parameters()
        now = explain(x, index)
        expected.append([spearmanr(slow.flat(a), slow.flat(b)).statistic for a, b in zip(own, now, strict=True)])
    assert torch.allclose(result.details["spearman"], torch.tensor(expected).double().T)
    assert result.per_sample.tolist() == pytest.approx([sum(row) / 2 for row in zip(*expected, strict=True)])
    assert result.settings["layers"] == ["4", "0"]
    assert result.maps == cost_of("mprt", 3, layers=2).maps == 9
    assert result.forwards == cost_of("mprt", 3, layers=2, forwards_per_map=2).forwards
    assert not same(model, kept)


@pytest.mark.parametrize("architecture", ["dense", "conv", "resnet"])
def test_an_otnn_is_redrawn_on_its_manifold_and_restored(architecture: str) -> None:
    torch.manual_seed(0)
    model = build(architecture, (1, 8, 8), 3, widths=(8, 8)).double().eval()
    x = images(4, 1, 8, 8)
    explain = gradient_of(Scorer(model, x, torch.tensor([0, 1, 2, 0])))
    kept, seen = state(model), []

    def watched(inputs: Tensor, index: Tensor) -> Tensor:
        for _, parameter, manifold in constrained_parameters(model):
            assert float(manifold.distance(parameter.detach()).max()) < 1e-6
        assert bound(model.body).constant < 1 + 1e-5
        seen.append(state(model))
        return explain(inputs, index)

    result = mprt(model, watched, x, generator=seeded())
    assert same(model, kept)
    layers = [name for name, _ in layers_from_top(model, x)]
    assert layers[0] == "head"
    assert len(seen) == len(layers) + 1
    for k, name in enumerate(layers):  # cascading: what has been redrawn differs, what has not is as it was
        for parameter, value in kept.items():
            if parameter.startswith(f"{name}.") and value.any() and value.numel() > 1:
                assert torch.equal(seen[k][parameter], value)
                assert not torch.equal(seen[k + 1][parameter], value)
    assert result.mean < 0.6
    assert result.direction == "down"


def test_a_map_that_ignores_the_model_does_not_fall() -> None:
    x, model = images(4, 1, 8, 8), build("dense", (1, 8, 8), 2, widths=(8,)).double().eval()
    result = mprt(model, lambda inputs, index: inputs, x)
    assert result.mean == pytest.approx(1)
    assert torch.allclose(result.details["cosine"], torch.ones(4, 2).double())


def test_the_model_comes_back_after_an_exception() -> None:
    x, model = images(2, 1, 8, 8), build("conv", (1, 8, 8), 2, widths=(4, 8), constrained=False).double().eval()
    kept, random_state, calls = state(model), torch.get_rng_state(), []

    def breaks(inputs: Tensor, index: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("lost")
        return inputs

    with pytest.raises(RuntimeError, match="lost"):
        mprt(model, breaks, x, generator=seeded())
    assert same(model, kept)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_seeds_decide() -> None:
    x, model = images(3, 2, 5, 5), conv()
    explain = gradient_of(Scorer(model, x, 1))
    scores = [mprt(model, explain, x, generator=seeded(seed)).per_sample for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])


def test_layers_are_ordered_by_when_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(4, 2), nn.Linear(1, 1), nn.Linear(3, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.first(inputs))

    names = [name for name, _ in layers_from_top(Backwards(), torch.rand(2, 3))]
    assert names == ["last", "first", "unused"]


@pytest.mark.parametrize("wrap", ["orthogonal", "spectral_norm", "weight_norm"])
def test_raw_weights_behind_a_parametrisation_are_redrawn(wrap: str) -> None:
    """`reset_parameters` would write to a weight that is computed anew: a false failure."""
    layer = getattr(parametrizations, wrap)(nn.Linear(6, 6)).double().eval()
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 2).double()).eval()
    kept, weight = state(model), layer.weight.clone()
    with restored(model):
        redraw(layer)
        assert not torch.allclose(layer.weight, weight, atol=0.1)
        norms = torch.linalg.svdvals(layer.weight.detach())
        if wrap == "orthogonal":
            assert torch.allclose(norms, torch.ones(6).double())
        if wrap == "spectral_norm":
            assert float(norms.max()) == pytest.approx(1, abs=0.05)
        assert not layer.training
        assert not any(part.training for part in layer.modules())
    assert same(model, kept)
    assert torch.equal(layer.weight, weight)
    x = images(2, 6)
    names = mprt(model, lambda inputs, index: inputs, x).settings["layers"]
    assert names == ["2", "0"]


def test_parameters_without_a_rule_become_noise_of_their_size() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((1000,), 5.0))

    layer = Scale()
    redraw(layer)
    assert float(layer.scale.detach().square().mean().sqrt()) == pytest.approx(5, rel=0.1)
    assert abs(float(layer.scale.detach().mean())) < 1


def test_a_manifold_is_enough_to_redraw_a_layer() -> None:
    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.eye(5)), nn.Parameter(torch.ones(5))
            self.manifolds = {"weight": Stiefel()}

    layer = Rotation()
    redraw(layer)
    weight = layer.weight.detach()
    assert not torch.allclose(weight, torch.eye(5), atol=0.1)
    assert float(Stiefel().distance(weight)) < 1e-5
    assert not torch.equal(layer.shift, torch.ones(5))


def test_constant_maps_are_counted() -> None:
    x, model = images(3, 1, 8, 8), build("dense", (1, 8, 8), 2, widths=(8,)).double().eval()
    calls = []

    def explain(inputs: Tensor, index: Tensor) -> Tensor:
        calls.append(1)
        maps = inputs.clone()
        maps[0] = 0
        if len(calls) > 1:
            maps[1] = 0
        return maps

    result = mprt(model, explain, x)
    assert result.undefined == 1
    assert math.isnan(float(result.per_sample[0]))
    assert result.per_sample[1:].tolist() == pytest.approx([0, 1])


def test_batch_statistics_are_restored() -> None:
    model = build("conv", (1, 8, 8), 2, widths=(4, 8), constrained=False).double()
    model(images(16, 1, 8, 8))
    model.eval()
    kept, x = state(model), images(2, 1, 8, 8)
    mprt(model, gradient_of(Scorer(model, x, 1)), x)
    assert same(model, kept)
