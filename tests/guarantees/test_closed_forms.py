"""Every guarantee is attained by a function whose truth is known in closed form."""

import math

import pytest
import torch
from scipy.optimize import brentq, minimize
from torch import Tensor, nn

from benchmarks.guarantees.exact import exact_smoothing
from benchmarks.guarantees.nets import bent
from otnn.certify import certify
from otnn.explain.scores import Scorer
from otnn.guarantees import (
    Potential,
    bracket,
    certified_smoothgrad,
    constant_saliency,
    deletion_masks,
    gradient_agreement,
    insertion_masks,
    masking_ceiling,
    noise_error,
    occlusion_masks,
    path_stability,
    robustness_bracket,
    smallest_change,
    smoothed_gradient,
    smoothing,
    value_errors,
    walk,
)
from otnn.lipschitz import bound
from otnn.metrics import deletion, insertion, robustness_sr
from otnn.models import Classifier, build
from otnn.nn import FullSort, GroupSort, MaxMin, OrthoLinear, UnitNormLinear


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def image(*values: float) -> Tensor:
    return double(*values).view(1, 1, 1, -1)


def potential_of(model: Classifier, inputs: Tensor, target: Tensor | None = None) -> Potential:
    return Potential(model, inputs, bound(model.body, model.input_shape), target)


def affine(outputs: int, pixels: int = 4) -> Classifier:
    head = nn.Linear(pixels**2, outputs)
    nn.init.normal_(head.bias)
    return Classifier(nn.Sequential(nn.Flatten()), head, (1, pixels, pixels)).double().eval()


def images(count: int, *shape: int) -> Tensor:
    return torch.rand(count, *shape, dtype=torch.float64)


# --- bracket, path, Integrated Gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
def test_of_an_affine_model_everything_is_exact(outputs: int) -> None:
    model, inputs = affine(outputs), images(6, 1, 4, 4)
    potential = potential_of(model, inputs)
    ends = bracket(potential)
    weight = model.head.weight.detach()
    rows = torch.cat([-weight / 2, weight / 2]) if outputs == 1 else weight
    apart = rows[potential.prediction] - rows[potential.target]
    scores = model(inputs).detach()
    scores = torch.cat([-scores / 2, scores / 2], dim=1) if outputs == 1 else scores
    lead = scores.gather(1, potential.prediction[:, None]) - scores.gather(1, potential.target[:, None])
    distance = lead.squeeze(1) / apart.norm(dim=1)
    assert torch.allclose(ends.bound, distance, rtol=1e-10)
    assert torch.allclose(ends.details["upper"], distance, rtol=1e-10)
    assert bool((ends.bound <= distance).all())
    assert bool((ends.details["upper"] >= distance * (1 - 1e-15)).all())
    assert torch.allclose(ends.details["tightness"], torch.ones(6).double(), rtol=1e-9)
    assert torch.allclose(ends.bound, certify(model, inputs).radius, rtol=1e-10)
    way = walk(potential, ends.details["upper"])
    assert bool((way.slack >= 0).all())
    assert bool((way.slack < 1e-11).all())
    assert bool((path_stability(way).bound < 1e-9).all())
    agreement = gradient_agreement(way)
    assert bool((agreement.details["measured"] < 1e-12).all())
    total = agreement.details["attribution"].flatten(1).sum(dim=1)
    assert torch.allclose(total, potential.value, rtol=1e-9)  # completeness: g is 0 at the end


def test_the_mean_turn_behind_a_kink_is_twice_the_slack_over_the_length() -> None:
    # g = |x_1 - 0.2| - 0.5 falls over 0.7 from 0.9 to the kink and climbs again
    model = bent(double(0, 0), double(1, 0), 0.2, bias=-0.5)
    potential = potential_of(model, image(0.9, 0.4))
    assert float(potential.value) == pytest.approx(0.2, rel=1e-12)
    for length, turn in [(0.5, 0.0), (0.7, 0.0), (0.8, 4 * 0.1 / 0.8), (1.4, 2.0)]:  # -u over the rest: ||-2u||^2 = 4
        found = path_stability(walk(potential, double(length)))
        assert float(found.bound) == pytest.approx(turn, abs=1e-10)
        assert bool(found.vacuous) == (turn >= 1)
        assert float(found.details["steady"]) == pytest.approx(max(0, 1 - turn), abs=1e-10)
    ends = bracket(potential)
    assert float(ends.details["upper"]) == pytest.approx(0.2, rel=1e-9)


def test_integrated_gradients_attains_its_bound() -> None:
    # From u = (1, 1, 1) / sqrt(3) to v = (1, 1, 5) / (3 sqrt(3)): both of norm 1, and |v - u| is parallel to |u|
    u, v = double(1, 1, 1) / math.sqrt(3), double(1, 1, 5) / (3 * math.sqrt(3))
    start, before = double(0.5, 0.5, 0.5), 1e-6
    kink = (u - v) / 2
    offset = float(kink @ (start - before * u))
    model = bent((u + v) / 2, kink, offset)
    potential = potential_of(model, start.view(1, 1, 1, 3))
    assert torch.allclose(potential.direction.flatten(), u, rtol=1e-12)
    length = 0.8
    way = walk(potential, double(length))
    assert float(path_stability(way).bound) == pytest.approx(4 / 9, rel=1e-5)
    found = gradient_agreement(way, steps=64)
    assert float(found.bound) == pytest.approx(length * 2 / 3, rel=1e-5)
    assert float(found.details["measured"]) == pytest.approx(float(found.bound), rel=1e-5)
    assert float(found.details["relative"]) == pytest.approx(2 / 3, rel=1e-5)
    assert not bool(found.vacuous)


def test_the_upper_end_is_a_point_beyond_the_boundary() -> None:
    model = build("dense", (1, 6, 6), 4, widths=(24, 24)).double().eval()
    inputs = images(20, 1, 6, 6)
    potential = potential_of(model, inputs)
    ends = bracket(potential)
    found = ends.details["upper"].isfinite()
    assert int(found.sum()) > 10
    points = ends.details["boundary"][found]
    scores = model(points).detach()
    lead = scores.gather(1, potential.prediction[found, None]) - scores.gather(1, potential.target[found, None])
    assert bool((lead <= 0).all())
    assert bool((lead > -1e-9).all())  # and no farther than needed
    assert torch.allclose((points - inputs[found]).flatten(1).norm(dim=1), ends.details["upper"][found], rtol=1e-12)


def test_a_boundary_that_is_known_is_confirmed() -> None:
    model, inputs = build("dense", (1, 6, 6), 2, widths=(24,)).double().eval(), images(4, 1, 6, 6)
    potential = potential_of(model, inputs)
    ends = bracket(potential)
    # as of a search in float32: a little before the boundary, or past it
    near = inputs + (ends.details["boundary"] - inputs) * (1 + double(-1e-7, 1e-7, 0, -0.1)).view(-1, 1, 1, 1)
    again = bracket(potential, near)
    assert torch.allclose(again.details["upper"][:3], ends.details["upper"][:3], rtol=1e-4)
    assert bool((again.details["upper"][:3] >= again.bound[:3]).all())
    assert again.details["upper"][3] == torch.inf  # not on the boundary, so not believed
    assert again.reason[3].startswith("no boundary was found")


def test_the_radius_is_that_of_the_certificate() -> None:
    for model in (
        build("dense", (1, 6, 6), 5, widths=(24, 24)).eval(),
        build("conv", (1, 8, 8), 2, widths=(4, 8)).eval(),
    ):
        inputs = torch.rand(7, *model.input_shape)
        potential = potential_of(model, inputs)
        assert torch.allclose(potential.radius, certify(model, inputs).radius, rtol=1e-9)
        chosen = potential_of(model, inputs, torch.zeros(7, dtype=torch.long))
        assert torch.equal(chosen.radius, potential.radius)


# --- constant saliency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sort", "size"), [(MaxMin(), 2), (GroupSort(4), 4), (FullSort(), 16)], ids=str)
def test_the_gradient_changes_right_beyond_the_radius(sort: nn.Module, size: int) -> None:
    layer = OrthoLinear(16, 16)
    nn.init.normal_(layer.bias, std=0.5)
    body = nn.Sequential(nn.Flatten(), layer, sort)
    model = Classifier(body, UnitNormLinear(16, 1), (1, 4, 4)).double().eval()
    inputs = images(10, 1, 4, 4)
    potential = potential_of(model, inputs)
    found = constant_saliency(potential)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    i, j = torch.combinations(torch.arange(16)).unbind(1)
    i, j = (index[(i - j) % (16 // size) == 0] for index in (i, j))  # all pairs that are sorted together
    values = inputs.flatten(1) @ weight.T + bias
    apart = values[:, i] - values[:, j]
    pair = apart.abs().argmin(dim=1)
    assert torch.allclose(found.bound, apart.abs().amin(dim=1) / math.sqrt(2), rtol=1e-6)
    sign = apart.gather(1, pair[:, None]).sign()
    across = -sign * (weight[i[pair]] - weight[j[pair]]) / math.sqrt(2)  # rows are orthonormal
    for factor, same in [(0.9999, True), (1.0001, False)]:
        moved = inputs + (factor * found.bound[:, None] * across).view_as(inputs)
        kept = (potential.gradient_at(moved) - potential.gradient).abs().flatten(1).amax(dim=1) < 1e-12
        assert bool((kept == same).all())
    assert found.details["layer"].tolist() == [0] * 10


def test_a_network_without_sorting_has_one_gradient() -> None:
    found = constant_saliency(potential_of(affine(2), images(2, 1, 4, 4)))
    assert found.bound.tolist() == [torch.inf, torch.inf]
    assert found.summary()["quantiles"]["0.5"] is None
    assert not found.vacuous.any()


# --- certified SmoothGrad --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_smallest_change_is_the_minimum_and_is_attained(k: int) -> None:
    scores = images(20, 3 * k + 2).pow(3)
    found = smallest_change(scores, k)
    for row, change in zip(scores, found, strict=True):
        top = row.sort(descending=True).values.tolist()
        kept, outside = top[k - 1 : 2 * k], top[2 * k]

        def size(c: float, kept: list[float] = kept, outside: float = outside) -> float:
            return (c - outside) ** 2 + sum(max(0.0, r - c) ** 2 for r in kept)

        grid = [outside + (top[k - 1] - outside) * i / 2000 for i in range(2001)]
        best = min(grid, key=size)
        least = minimize(lambda c: size(float(c[0])), [best], tol=1e-14).fun
        assert float(change) ** 2 == pytest.approx(least, rel=1e-6)
    # Attained: that much more and the pixel outside is the k-th highest; the theory's formula is the weaker one
    order = scores.argsort(dim=1, descending=True)
    for factor, inside in [(0.999, False), (1.001, True)]:
        for row, places, change in zip(scores, order, found, strict=True):
            chosen = places[k - 1 : 2 * k + 1]
            values = row[chosen]
            level = brentq(
                lambda c, v=values: float((v[:-1] - c).clamp(min=0).sum() - (c - v[-1])), values[-1], values[0]
            )
            step = torch.where(values[:-1] > level, level - values[:-1], 0.0)
            step = torch.cat([step, level - values[-1:]])
            assert float(step.norm()) == pytest.approx(float(change), rel=1e-9)
            moved = row.clone()
            moved[chosen] += factor * step
            climbs = int((moved > moved[chosen[-1]]).sum()) < k
            assert climbs == inside
    gap = scores.sort(dim=1, descending=True).values
    gap = gap[:, k - 1] - gap[:, 2 * k]
    assert bool((found >= gap / math.sqrt(2) * (1 - 1e-12)).all())
    assert bool((found <= gap * (1 + 1e-12)).all())


def test_the_top_pixel_changes_right_beyond_the_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    # At the kink the smoothed gradient is (0.001, 0.001, 0), and turns at the largest rate along the way to a pixel 3
    # that meets the others; without Monte-Carlo error the radius is the exact distance, up to the size of the slope
    slope, direction, sigma = 0.001 * double(1, 1, 0), double(-1, -1, 2) / math.sqrt(6), 0.3
    parallel = 0.03
    length = math.sqrt(1 - parallel**2) * math.sqrt(1 - float((slope @ direction) / parallel) ** 2)
    start = double(0.4, 0.5, 0.6)
    model = bent(slope, length * direction, length * float(direction @ start), bias=0.5, parallel=parallel)
    inputs = start.view(1, 1, 1, 3)
    potential = potential_of(model, inputs)
    exact = exact_smoothing(model, sigma, potential.coefficients)
    assert torch.allclose(exact(inputs).flatten(), slope, rtol=1e-2, atol=1e-9)
    monkeypatch.setattr(smoothing, "smoothed_gradient", lambda *_, **__: (exact(inputs), exact(inputs).square()))
    monkeypatch.setattr(smoothing, "noise_error", lambda *_: 0.0)
    found = certified_smoothgrad(potential, share=1 / 3, sigma=sigma)
    radius = float(found.bound)
    assert found.details["candidates"].tolist() == [[True, True, False]]
    for factor, inside in [(0.99, True), (1.02, False), (0.99 / 0.9, False)]:  # the last: a radius that forgets a tenth
        moved = exact(inputs + (factor * radius * direction).view_as(inputs)).flatten().abs()
        assert (int(moved.argmax()) in (0, 1)) == inside


def test_the_monte_carlo_mean_is_near_the_exact_one() -> None:
    layer = OrthoLinear(8, 8)
    nn.init.normal_(layer.bias, std=0.3)
    model = Classifier(nn.Sequential(nn.Flatten(), layer, MaxMin()), UnitNormLinear(8, 1), (2, 2, 2)).double().eval()
    inputs = images(3, 2, 2, 2)
    potential = potential_of(model, inputs)
    mean, squares = smoothed_gradient(potential, sigma=0.25, samples=4000, generator=torch.Generator().manual_seed(3))
    for k in range(3):
        exact = exact_smoothing(model, 0.25, potential.coefficients[k : k + 1])(inputs[k : k + 1])
        off = (mean[k : k + 1] - exact).abs()
        # of eight values with variances that sum to at most 1, the distance is about sqrt(1 / 4000) at most
        assert 1e-4 < float(off.norm()) < 2 / math.sqrt(4000) < noise_error(4000, 0.001)
        assert bool((off < value_errors(squares[k : k + 1], 4000, 0.001)).all())
    certified = certified_smoothgrad(potential, sigma=0.25, samples=200_000 // 50, share=0.25)
    assert certified.details["map"].shape == inputs.shape


def test_noise_errors_solve_their_tail_bounds() -> None:
    for samples, delta in [(100, 0.001), (10_000, 0.05)]:
        excess = noise_error(samples, delta) - 1 / math.sqrt(samples)  # beyond the mean distance, by McDiarmid
        assert math.exp(-samples * excess**2 / 2) == pytest.approx(delta)
        squares = images(1, 1, 3, 3).square()
        q = math.log(3 * 9 / delta) / samples
        for square, error in zip(squares.flatten(), value_errors(squares, samples, delta).flatten(), strict=True):
            most = brentq(lambda m, s=float(square), q=q: m - math.sqrt(2 * m * q) - s, float(square), 10)
            assert float(error) == pytest.approx(math.sqrt(2 * most * q) + 2 * q / 3)


def test_noise_errors_hold_for_rare_signs() -> None:
    # values that are 1 or 0 or -1, seldom or often: the worst that a mean of 50 can do, 4,000 times
    samples, delta, repeats = 50, 0.2, 4000
    failed_vector = failed_value = 0
    for chance in (0.02, 0.3, 1.0):
        drawn = (torch.rand(repeats, samples) < chance) * (2 * (torch.rand(repeats, samples) < 0.5) - 1.0)
        off, squares = drawn.mean(dim=1).abs(), drawn.square().mean(dim=1, keepdim=True)
        failed_vector = max(failed_vector, int((off > noise_error(samples, delta)).sum()))
        failed_value = max(failed_value, int((off > value_errors(squares, samples, delta).squeeze(1)).sum()))
    assert failed_vector <= delta * repeats
    assert failed_value <= delta * repeats


# --- masks and Robustness-Sr -----------------------------------------------------------------------------------------


def test_a_filling_along_the_gradient_attains_the_ceiling() -> None:
    model, inputs = affine(1), images(3, 1, 4, 4)
    potential = potential_of(model, inputs)
    filling = inputs - 0.3 * potential.direction
    for masks in (occlusion_masks((4, 4), patch=4), torch.zeros(2, 1, 4, 4)):
        found = masking_ceiling(potential, masks, filling)
        assert torch.allclose(found.bound, torch.full((3,), 0.3, dtype=torch.float64), rtol=1e-12)
        assert torch.allclose(found.details["ratio"], torch.ones_like(found.details["ratio"]), rtol=1e-9)
    # one pixel: the ratio is its share of the gradient
    one = torch.ones(16).scatter(0, torch.tensor(5), 0.0).view(1, 1, 4, 4)
    found = masking_ceiling(potential, one, 0.0)
    share = potential.direction.flatten(1)[:, 5].abs()
    assert torch.allclose(found.details["ratio"][:, 0], share, rtol=1e-9)
    assert torch.allclose(found.details["ceiling"][:, 0], inputs.flatten(1)[:, 5], rtol=1e-12)


def test_deletion_and_insertion_have_the_ceilings_of_their_curves() -> None:
    model, inputs = build("dense", (2, 5, 5), 3, widths=(12,)).double().eval(), images(4, 2, 5, 5)
    potential = potential_of(model, inputs)
    maps, baseline = torch.randn_like(inputs), images(2, 5, 5)
    scorer = Scorer(model, inputs, potential.prediction, "margin")
    for metric, masks in ((deletion, deletion_masks(maps)), (insertion, insertion_masks(maps))):
        curves = metric(scorer, inputs, maps, baseline=baseline, signed=False).curves
        found = masking_ceiling(potential, masks, baseline)
        assert curves is not None
        assert torch.allclose(found.details["ceiling"], curves.ceiling, rtol=1e-9)
        assert torch.allclose(potential.value[:, None] - found.details["drop"], curves.raw, rtol=1e-6, atol=1e-9)
        assert bool((found.details["ratio"].nan_to_num() <= 1).all())
        unchanged = 0 if metric is deletion else -1
        assert bool(found.details["ratio"][:, unchanged].isnan().all())


def test_masks_that_are_safe_leave_the_decision() -> None:
    model, inputs = affine(1), images(3, 1, 4, 4)
    potential = potential_of(model, inputs)
    towards = potential.direction
    for length, safe in [(0.9, 1.0), (1.1, 0.0)]:
        filling = inputs - length * potential.value.view(-1, 1, 1, 1) * towards
        found = masking_ceiling(potential, torch.zeros(1, 1, 4, 4), filling)
        assert found.details["safe"].tolist() == [safe] * 3
        assert found.vacuous.tolist() == [not safe] * 3
        assert bool(((found.details["drop"] < potential.value[:, None]) == bool(safe)).all())


def test_occlusion_covers_every_pixel_once_by_default() -> None:
    hidden = 1 - occlusion_masks((8, 8), patch=4)
    assert torch.equal(hidden.sum(dim=0), torch.ones(1, 8, 8))
    assert bool((1 - occlusion_masks((7, 5), patch=3, stride=3)).sum(dim=0).ge(1).all())  # edges too


def test_robustness_of_an_affine_model() -> None:
    model, inputs = affine(1), images(4, 1, 4, 4)
    potential = potential_of(model, inputs)
    gradient = potential.gradient.flatten(1)
    order = gradient.abs().argsort(dim=1, descending=True)
    support = torch.stack(
        [torch.zeros(4, 16).scatter(1, order[:, :count], 1.0).bool().view(4, 1, 4, 4) for count in (2, 8, 16)], dim=1
    )
    chosen = gradient.unsqueeze(1) * support.flatten(2)
    exact = potential.value[:, None] / chosen.norm(dim=2)
    search = robustness_sr(
        Scorer(model, inputs, potential.prediction), inputs, potential.gradient, shares=(2 / 16, 0.5, 1.0), largest=30.0
    )
    found = robustness_bracket(potential, search.details["radius"], support)
    assert torch.allclose(found.details["first_order"], exact, rtol=1e-9)
    assert torch.allclose(found.details["upper"], exact, rtol=2e-3, atol=2e-3)  # to the tolerance of the search
    assert bool((found.bound[:, None] <= exact * (1 + 1e-9)).all())
    assert torch.allclose(found.bound, exact[:, 2], rtol=1e-9)  # all pixels: the bracket closes
    assert torch.allclose(found.details["tightness"][:, 2], torch.ones(4).double(), rtol=5e-3, atol=5e-3)
    none = robustness_bracket(potential, torch.full((4, 1), torch.nan))
    assert none.vacuous.all()
    assert none.reason == ("the search found no change: no upper end",) * 4
