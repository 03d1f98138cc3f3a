import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from otnn.certify import certify
from otnn.errors import InputError
from otnn.explain import counterfactual, saliency
from otnn.lipschitz import LipschitzBound, bound
from otnn.models import Classifier, build
from otnn.potential import class_scores, nearest_rival, pair_distances, pair_potential

ONE = LipschitzBound(1.0, ())


def linear(weight: torch.Tensor, bias: torch.Tensor) -> Classifier:
    """A linear classifier of 2x2 grey images in float64."""
    head = nn.Linear(weight.shape[1], len(weight)).double()
    head.weight.data, head.bias.data = weight.double(), bias.double()
    return Classifier(nn.Sequential(nn.Flatten()), head, (1, 2, 2)).eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def three_classes() -> Classifier:
    return linear(torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0.5, 0.5, 1.0, -1.0]]), torch.tensor([0.1, -0.2, 0.0]))


def test_on_a_linear_classifier_everything_is_exact(three_classes: Classifier) -> None:
    """The boundary of two classes is a hyperplane: distance, nearest point and path have closed forms."""
    x = images(40)
    way = counterfactual(three_classes, x, ONE)
    scores = three_classes(x).detach()
    w, b = three_classes.head.weight.detach(), three_classes.head.bias.detach()
    for k in range(len(x)):
        t = int(scores[k].argmax())
        candidates = {j: float((scores[k, t] - scores[k, j]) / (w[t] - w[j]).norm()) for j in range(3) if j != t}
        j = min(candidates, key=candidates.__getitem__)
        normal = (w[t] - w[j]) / (w[t] - w[j]).norm()
        nearest = x[k].flatten() - candidates[j] * normal
        assert (int(way.prediction[k]), int(way.target[k])) == (t, j)
        assert float(way.pair_radius[k]) == pytest.approx(candidates[j])
        assert torch.allclose(way.one_step[k].flatten(), nearest)
        assert torch.allclose(way.boundary[k].flatten(), nearest, atol=1e-9)
        assert float((w[t] - w[j]) @ nearest + b[t] - b[j]) == pytest.approx(0, abs=1e-12)
        # the path ends at the mirror image, with the opposite potential
        assert float(way.potential[k, -1]) == pytest.approx(-candidates[j], rel=1e-6)
    assert torch.allclose(way.tightness, torch.ones(40, dtype=torch.float64), atol=1e-9)
    assert (way.tightness <= 1 + 1e-12).all()
    assert set(way.status) == {"ok"}


def test_one_output_goes_both_ways() -> None:
    model = linear(torch.tensor([[3.0, 0, 4.0, 0]]), torch.tensor([-3.0]))
    x = images(20)
    way = counterfactual(model, x, ONE)
    z = model(x).detach().squeeze(1)
    assert set((z > 0).tolist()) == {True, False}
    assert torch.equal(way.prediction, (z > 0).long())
    assert torch.equal(way.target, 1 - way.prediction)
    assert torch.allclose(way.pair_radius, z.abs() / 5)
    assert torch.allclose(way.scores[:, -1, 0], -z)
    assert way.flipped.all()
    assert torch.allclose(way.pair_radius, certify(model, x).radius)
    expected = torch.tensor([[3.0, 0, 4.0, 0]], dtype=torch.float64).view(1, 1, 2, 2)
    assert torch.allclose(saliency(model, x, way.prediction), (2 * way.prediction - 1).view(-1, 1, 1, 1) * expected)


def test_a_chosen_target_is_reached_though_another_class_is_nearer(three_classes: Classifier) -> None:
    x = images(30, seed=1)
    target = torch.full((30,), 2)
    way = counterfactual(three_classes, x, ONE, target)
    ok = torch.tensor([status == "ok" for status in way.status])
    assert torch.equal(ok, way.prediction != 2)
    scores = class_scores(three_classes(way.boundary[ok]).detach())
    own = scores.gather(1, way.prediction[ok].unsqueeze(1)).squeeze(1)
    assert torch.allclose(own, scores[:, 2], atol=1e-9)
    assert {way.status[k] for k in range(30) if not ok[k]} == {"the target is the predicted class already"}
    assert way.boundary_distance[~ok].isnan().all()


def test_a_tie_a_dead_gradient_and_no_boundary_concern_their_sample_only() -> None:
    class Bump(nn.Module):
        """Feature |x_0 - 1/2| (never negative) for the first pixel: some rays from it find no boundary."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            first = inputs.flatten(1)[:, :1]
            return torch.where(first < 0.25, torch.full_like(first, 0.25), (first - 0.5).abs())

    head = nn.Linear(1, 1, bias=True).double()
    head.weight.data, head.bias.data = torch.ones(1, 1).double(), torch.zeros(1).double()
    model = Classifier(nn.Sequential(Bump()), head, (1, 2, 2)).eval()
    x = torch.zeros(4, 1, 2, 2, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor([0.5, 0.1, 0.9, 0.3])
    way = counterfactual(model, x, ONE)
    assert way.status[0] == "the two classes are tied"
    assert way.status[1] == "the gradient is zero: no direction"
    # |x - 1/2| touches 0 and rises again: the sign changes at the touching point, in the sense g <= 0
    assert float(way.pair_radius[2]) == pytest.approx(0.4)
    assert torch.isfinite(way.path).all()
    head.bias.data += 0.1
    assert counterfactual(model, x[2:], ONE).status[0].startswith("no change of sign at the lengths tried")


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 5]))
def test_the_boundary_lies_between_the_radius_and_the_first_flip(seed: int, classes: int) -> None:
    """Theory, section 5.1: g(x) <= dist(x, boundary) <= t*, on random 1-Lipschitz networks."""
    torch.manual_seed(seed)
    model = build("dense", (1, 4, 4), classes, widths=(16, 16)).double().eval()
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    way = counterfactual(model, x, bound(model.body))
    found = torch.tensor([status == "ok" for status in way.status])
    assert (way.pair_radius[found] <= way.boundary_distance[found] * (1 + 1e-9)).all()
    distances = pair_distances(model, bound(model.body))
    at = pair_potential(model(way.boundary[found]), way.prediction[found], way.target[found], distances)
    assert (at <= 0).all()
    assert (at >= -1e-6).all()
    # the potential is 1-Lipschitz along the whole path
    steps = (way.potential[:, 1:] - way.potential[:, :-1]).abs()
    assert (steps <= (way.distances[:, 1:] - way.distances[:, :-1]) * (1 + 1e-9) + 1e-12).all()


def test_saliency_is_the_derivative() -> None:
    torch.manual_seed(0)
    model = build("conv", (3, 8, 8), 4, widths=(4, 8, 8)).double().eval()
    x, target = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    map_ = saliency(model, x, target)
    direction = torch.randn_like(x)
    step = 1e-6
    ahead, behind = model(x + step * direction), model(x - step * direction)
    numeric = ((ahead - behind) / (2 * step)).gather(1, target.unsqueeze(1)).squeeze(1)
    assert torch.allclose((map_ * direction).sum(dim=(1, 2, 3)), numeric, atol=1e-6)
    assert (map_.flatten(1).norm(dim=1) <= bound(model.body).constant + 1e-9).all()


def test_nearest_rival_is_by_potential_not_by_score() -> None:
    distances = torch.tensor([[0, 1.0, 10.0], [1.0, 0, 1.0], [10.0, 1.0, 0]], dtype=torch.float64)
    scores = torch.tensor([[3.0, 2.0, 0.0]])  # class 1 is second (potential 1), class 2 has potential 0.3
    assert nearest_rival(scores, torch.tensor([0]), distances).tolist() == [2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m, x: counterfactual(m, x[:0], ONE), "empty batch"),
        (lambda m, x: counterfactual(m, x * torch.nan, ONE), "sample 0 holds NaN"),
        (lambda m, x: counterfactual(m, x * 255, ONE), r"expected values in \[0, 1\]"),
        (lambda m, x: counterfactual(m, x, ONE, torch.tensor([3, 0])), r"integers in 0..2, got 0..3"),
        (lambda m, x: counterfactual(m, x, ONE, steps=1), "at least 2 images"),
        (lambda m, x: counterfactual(m.train(), x, ONE), "training mode"),
        (lambda m, x: saliency(m.train(), x, torch.tensor([0, 0])), "training mode"),
        (lambda m, x: saliency(m, x, torch.tensor([0])), r"one per sample, shape \(2,\)"),
        (lambda m, x: saliency(m, x, torch.tensor([0.0, 1.0])), "expected integers, got torch.float32"),
        (lambda m, x: saliency(m, (x * 255).byte(), torch.tensor([0, 0])), "divide 8-bit images by 255"),
    ],
)
def test_bad_input_says_what_was_expected(change: object, text: str, three_classes: Classifier) -> None:
    with pytest.raises(InputError, match=text):
        change(three_classes, images(2))  # type: ignore[operator]
