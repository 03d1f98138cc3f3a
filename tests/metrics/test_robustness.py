import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from otnn.explain.scores import Scorer
from otnn.lipschitz import bound
from otnn.metrics import cost_of, e_robustness, robustness_sr
from otnn.metrics.robustness import SHARES
from otnn.models import build, predict
from otnn.potential import nearest_rival, pair_distances, pair_potential
from tests.metrics import slow
from tests.metrics.networks import conv, gradient_of, images, linear, seeded


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_of_a_linear_binary_model_it_is_the_distance_within_the_pixels(seed: int) -> None:
    """|g| / ||w on S||, from above within the tolerance of the bisection and never from below."""
    torch.manual_seed(seed)
    w = torch.randn(2, 2 * 20).double()
    x, maps = images(4, 2, 4, 5, seed=seed), torch.randn(4, 1, 4, 5).double()
    model = linear(w, torch.randn(2) * 0.1)
    result = robustness_sr(Scorer(model, x, 0), x, maps, largest=100.0)
    scores = model(x).detach()
    gap = (scores[:, 0] - scores[:, 1]).abs()
    for k in range(4):
        order = maps[k, 0].flatten().abs().argsort(descending=True)
        for level, share in enumerate(SHARES):
            top = order[: max(1, round(share * 20))]
            exact = float(gap[k] / (w[0] - w[1]).view(2, 20)[:, top].norm())
            found = float(result.details["radius"][k, level])
            if exact > 99:
                continue
            assert exact * (1 - 1e-9) <= found <= exact + 1e-3
    assert torch.allclose(result.per_sample, result.details["radius"].mean(dim=1))


def test_one_output_and_outputs_without_a_column_have_distances_too() -> None:
    w, x = torch.tensor([[1.0, -2.0, 2.0]]), images(5, 3)
    layer = nn.Linear(3, 1, dtype=torch.float64).eval()
    layer.weight.data, layer.bias.data = w.double(), torch.tensor([0.3]).double()
    expected = layer(x).detach().squeeze(1).abs() / 3
    for model in (layer, nn.Sequential(layer, nn.Flatten(0)).eval()):
        result = robustness_sr(Scorer(model, x, 1), x, x, shares=(1.0,))
        assert (result.per_sample >= expected * (1 - 1e-9)).all()
        assert torch.allclose(result.per_sample, expected, atol=1e-3)


def test_it_comes_close_to_a_search_over_the_plane() -> None:
    """Two pixels may change: every angle and length is tried, with a curved boundary of three classes."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double().eval()
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight.data *= 2
    x, maps = images(6, 1, 2, 4), torch.rand(6, 1, 2, 4).double()
    result = robustness_sr(Scorer(model, x, 0), x, maps, shares=(0.25,), largest=4.0, attack_steps=20)
    compared = 0
    for k in range(6):
        first, second = maps[k].flatten().argsort(descending=True)[:2].tolist()
        own = int(model(x[k : k + 1]).argmax())

        def changed(moved: Tensor, own: int = own) -> Tensor:
            return model(moved).argmax(dim=1) != own

        true = slow.distance_in_plane(changed, x[k], first, second, 4.0)
        found = float(result.per_sample[k])
        if result.details["failed"][k].any():
            assert found == 4.0
            continue
        compared += 1
        assert true * 0.995 - 0.002 <= found <= true * 1.05 + 0.004
    assert compared >= 3


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000))
def test_it_is_never_below_the_certified_radius(seed: int) -> None:
    """Theory, section 5.7: no pixel set changes the class before the pair potential allows it."""
    torch.manual_seed(seed)
    model = build("dense", (1, 4, 4), 3, widths=(16, 16)).double().eval()
    x = images(5, 1, 4, 4, seed=seed)
    scorer = Scorer(model, x, 0)
    result = robustness_sr(scorer, x, gradient_of(scorer)(x, torch.arange(5)), shares=(0.1, 0.5, 1.0))
    distances, scores = pair_distances(model, bound(model.body)), model(x).detach()
    own = predict(scores)
    g = pair_potential(scores, own, nearest_rival(scores, own, distances), distances)
    assert (result.details["radius"] >= g.unsqueeze(1) * (1 - 1e-9)).all()
    assert (result.details["radius"].diff(dim=1) <= 0).all()  # more pixels, less to move


def test_failures_count_as_the_largest_radius() -> None:
    x = images(3, 4)
    model = linear(torch.tensor([[5.0, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([2.0, 0]))
    named = torch.tensor([[0.0, 0, 1, 0]]).double().expand(3, 4)  # a pixel that the score does not read
    result = robustness_sr(Scorer(model, x, 0), x, named, shares=(0.25,), largest=3.0)
    assert result.per_sample.tolist() == [3, 3, 3]
    assert (result.undefined, result.mean) == (3, 3.0)
    assert result.details["failed"].all()
    assert "the largest radius tried, 3" in result.counted_as
    right = robustness_sr(Scorer(model, x, 0), x, named.flip(1).roll(-1, 1), shares=(0.25,), largest=3.0)
    assert right.undefined == 0
    assert torch.allclose(right.per_sample, x[:, 0] + 0.4, atol=1e-3)


def test_a_gradient_of_zero_is_left_by_a_random_step() -> None:
    class Plateau(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            far = (inputs - 0.5).norm(dim=1)
            return torch.stack([torch.ones_like(far), far.clamp(min=0.9) * 2 - 1], dim=1)

    x = torch.full((2, 6), 0.5, dtype=torch.float64)
    result = robustness_sr(Scorer(Plateau().eval(), x, 0), x, torch.ones_like(x), shares=(1.0,), largest=4.0)
    assert torch.allclose(result.per_sample, torch.ones(2).double(), atol=1e-3)
    assert (result.per_sample >= 1 - 1e-9).all()


def test_the_budget_changes_nothing_and_the_cost_is_kept() -> None:
    x, maps = images(4, 2, 5, 5), images(4, 2, 5, 5, seed=1)
    scorer = Scorer(conv(), x, 0)
    full, small = (robustness_sr(scorer, x, maps, largest=8.0, memory_budget=b) for b in (2**30, 60_000))
    assert torch.allclose(full.per_sample, small.per_sample)
    assert full.forwards == small.forwards
    # one forward of each set finds the class
    assert full.forwards == full.backwards + full.details["radius"].numel()
    most = cost_of("robustness_sr", 4)
    assert full.forwards <= most.forwards
    assert not most.exact


def test_broken_maps_are_left_out() -> None:
    x = images(3, 4)
    maps = x.clone()
    maps[1, 2] = torch.inf
    result = robustness_sr(Scorer(linear(torch.eye(4)), x, 0), x, maps)
    assert result.per_sample.isnan().tolist() == [False, True, False]
    assert result.undefined >= 1


def test_e_robustness_equals_the_slow_one() -> None:
    x = images(4, 2, 4, 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, 3)).double().eval()
    model[1].weight.data *= 4  # curved within the radii tried
    explain = gradient_of(Scorer(model, x, torch.tensor([0, 1, 2, 1])))
    result = e_robustness(explain, x, directions=4, bisections=6, largest=3.0, forwards_per_map=2, generator=seeded())
    towards = torch.randn(4, 2, 4, 5, generator=seeded(), dtype=torch.float64)
    towards = towards / towards.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for k in range(4):
        expected = slow.e_robustness(lambda one, k=k: explain(one[None], torch.tensor([k]))[0], x[k], towards, 3.0, 6)
        assert float(result.per_sample[k]) == pytest.approx(expected)
    assert 0 < result.mean < 3
    assert result.forwards == 2 * result.maps <= 2 * cost_of("e_robustness", 4, directions=4, bisections=6).maps


def test_a_map_that_stays_has_the_largest_ball_and_a_constant_one_none() -> None:
    x, fixed = images(3, 1, 4, 4), images(3, 1, 4, 4, seed=1)
    fixed[2] = 1
    result = e_robustness(lambda inputs, index: fixed[index], x, largest=2.0, bisections=3)
    assert result.per_sample[:2].tolist() == [2, 2]
    assert math.isnan(float(result.per_sample[2]))
    assert result.undefined == 1
    assert result.details["censored"].tolist() == [True, True, False]
    assert math.isnan(e_robustness(lambda inputs, index: 0 * inputs, x, bisections=3).mean)
