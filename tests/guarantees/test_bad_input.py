"""What cannot be answered of one sample is told of that sample; all others get what they get alone."""

import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.guarantees import (
    Guarantee,
    Potential,
    bracket,
    certified_smoothgrad,
    constant_saliency,
    gradient_agreement,
    guarantees,
    in_words,
    masking_ceiling,
    occlusion_masks,
    path_stability,
    robustness_bracket,
    smallest_change,
    walk,
)
from otnn.lipschitz import LipschitzBound, bound
from otnn.models import Classifier, build

NAMES = [
    *("boundary_bracket", "path_stability", "gradient_agreement", "certified_smoothgrad", "constant_saliency"),
    *("masking_deletion", "masking_insertion", "masking_mu_fidelity", "masking_occlusion", "robustness_sr"),
]


def model_of(classes: int = 3) -> Classifier:
    return build("dense", (1, 6, 6), classes, widths=(16,)).double().eval()


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 6, 6, dtype=torch.float64)


def compute(model: Classifier, inputs: Tensor, body: LipschitzBound | None, **settings: object) -> dict[str, Guarantee]:
    generator = torch.Generator().manual_seed(0)
    upper = torch.full((len(inputs), 2), 3.0)
    return guarantees(model, inputs, body, robustness=upper, samples=20, generator=generator, **settings)  # type: ignore[arg-type]


def test_a_bad_sample_does_not_touch_its_batch_mates() -> None:
    model = model_of()
    inputs = images(5)
    with torch.no_grad():
        own = model(inputs).argmax(dim=1)
    target = (own + 1) % 3
    inputs[1, 0, 2, 2] = torch.nan
    inputs[3, 0, 0, 0] = -torch.inf
    target[2] = own[2]
    body = bound(model.body)
    found = compute(model, inputs, body, target=target)
    assert list(found) == NAMES
    for name, guarantee in found.items():
        for k in (1, 3):
            assert guarantee.reason[k] == "the input holds NaN or infinite values"
            assert bool(guarantee.vacuous[k])
            assert bool(guarantee.bound[k].isnan())
        if name != "robustness_sr":  # which is about the prediction, whatever the target
            assert guarantee.reason[2] == "the target is what is predicted already"
            assert bool(guarantee.vacuous[2])
    for k in (0, 4):
        alone = compute(model, inputs[k : k + 1], body, target=target[k : k + 1])
        for name, guarantee in found.items():
            assert guarantee.reason[k] == alone[name].reason[0]
            # batches sum in another order: the last digits may differ, and what is measured of slopes near 1 with them
            assert torch.allclose(guarantee.bound[k], alone[name].bound[0], rtol=1e-6, atol=1e-6)
            for part, values in alone[name].details.items():
                assert torch.allclose(guarantee.details[part][k].double(), values[0].double(), 1e-6, 1e-6, True), part


def test_ties_flat_places_and_unreached_boundaries_have_their_reason() -> None:
    # z = max(x_1 - 1/2, 0) + bias: flat where x_1 < 1/2, and with bias > 0 no boundary anywhere
    layer, head = nn.Linear(4, 2, dtype=torch.float64), nn.Linear(2, 1, dtype=torch.float64)
    layer.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]).double()
    layer.bias.data, head.weight.data = torch.tensor([-0.5, 0.0]).double(), torch.tensor([[1.0, 0.0]]).double()
    head.bias.data = torch.zeros(1).double()
    model = Classifier(nn.Sequential(nn.Flatten(), layer, nn.ReLU()), head, (1, 2, 2)).eval()
    inputs = torch.tensor([[0.9, 0, 0, 0], [0.1, 0, 0, 0], [0.7, 1, 1, 1]], dtype=torch.float64).view(3, 1, 2, 2)
    potential = Potential(model, inputs, bound(model.body))
    tie = "the decision is a tie: the lead is below the rounding error"
    assert potential.reason == ("", tie, "")
    ends = bracket(potential)
    # the boundary is where the score is no longer positive for certain: it never becomes negative, so none is confirmed
    assert ends.details["upper"].tolist() == [torch.inf] * 3
    assert ends.reason[0].startswith("no boundary was found")
    assert ends.bound[0] == pytest.approx(0.4, rel=1e-9)
    assert not bool(ends.vacuous[0])
    assert in_words(ends)[0].startswith("No change of the whole image with an L2 norm below 0.399 can alter")
    way = walk(potential, ends.details["upper"])
    assert path_stability(way).reason == ("no boundary was found along the gradient: no path", tie, way.reason[2])
    head.bias.data += 0.25
    flat = Potential(model, inputs, bound(model.body))
    assert flat.still.tolist() == [False, True, False]
    ends = bracket(flat)
    assert ends.reason[1] == "the gradient is zero, so that no upper end was searched"
    assert ends.bound[1] == pytest.approx(0.25, rel=1e-9)
    assert walk(flat, torch.ones(3)).reason == ("", "the gradient is zero: no path", "")
    assert walk(flat, torch.tensor([0.0, 1.0, torch.nan])).reason[::2] == (
        "a path has a length above 0",
        "no boundary was found along the gradient: no path",
    )
    found = compute(model, inputs, bound(model.body))
    assert found["certified_smoothgrad"].share == 0
    assert found["constant_saliency"].reason[0] == "body.2 is ReLU: only affine and GroupSort layers have such a radius"


@pytest.mark.parametrize("kind", ["none", "infinite", "unknown layer", "unknown rounding"])
def test_without_a_bound_all_is_vacuous(kind: str) -> None:
    model = model_of()
    body: LipschitzBound | None = bound(model.body)
    if kind == "none":
        body = None
    elif kind == "infinite":
        body = LipschitzBound(torch.inf, ())
    else:
        layer = nn.LayerNorm(16) if kind == "unknown layer" else nn.Tanh()
        model.body.append(layer.double())
    found = compute(model, images(3), body)
    assert list(found) == NAMES
    for guarantee in found.values():
        assert guarantee.vacuous.all()
        assert guarantee.share == 0
        assert bool(guarantee.bound.isnan().all())
        assert all("no proven Lipschitz bound" in r or "nothing is proven" in r for r in guarantee.reason)
        assert all("no guarantee, as" in sentence for sentence in in_words(guarantee))
        assert guarantee.summary()["quantiles"] == {}
    if kind == "unknown rounding":
        assert "Tanh" in str(found["boundary_bracket"].reason[0]) or "body" in found["boundary_bracket"].reason[0]


def test_a_loose_bound_is_told_as_vacuous() -> None:
    model, inputs = model_of(2), images(4)
    body = bound(model.body)
    exact, loose = compute(model, inputs, body), compute(model, inputs, LipschitzBound(1e4 * body.constant, ()))
    assert exact["boundary_bracket"].share > 0.5
    for name in NAMES:
        if name != "constant_saliency":  # which has bounds of its own, of every layer
            assert loose[name].share == 0, name
    for name in ("boundary_bracket", "robustness_sr"):
        assert torch.allclose(exact[name].bound, 1e4 * loose[name].bound, rtol=1e-6)
    found = loose["boundary_bracket"].details["upper"].isfinite()
    assert bool(found.any())
    assert bool((loose["path_stability"].bound[found] > 1.99).all())
    assert loose["path_stability"].reason[found.tolist().index(True)].startswith("a map of zeros along the path")
    assert exact["path_stability"].share > 0


def test_a_sample_outside_the_box_or_without_a_target_is_told_alone() -> None:
    model, inputs = model_of(), images(5)
    with torch.no_grad():
        own = model(inputs).argmax(dim=1)
    target = (own + 1) % 3
    body = bound(model.body)
    whole = compute(model, inputs, body, target=target)
    inputs[1, 0, 2, 2], target[3] = 1.01, -1
    found = compute(model, inputs, body, target=target)
    assert Potential(model, inputs, body, target).prediction.tolist() == [*own[:1], -1, *own[2:]]
    assert Potential(model, inputs, body, target).target[3] == -1
    for name, guarantee in found.items():
        assert guarantee.reason[1] == "the input leaves [0, 1]"
        assert bool(guarantee.vacuous[1])
        assert bool(guarantee.bound[1].isnan())
        if name != "robustness_sr":  # which is about the prediction, whatever the target
            assert guarantee.reason[3] == "no target is known"
            assert bool(guarantee.bound[3].isnan())
        for k in (0, 2, 4):
            assert guarantee.reason[k] == whole[name].reason[k]
            assert torch.allclose(guarantee.bound[k], whole[name].bound[k], rtol=1e-6, atol=1e-6)
    assert set(Potential(model, 255 * images(2) + 2, body).reason) == {"the input leaves [0, 1]"}
    assert set(Potential(model, images(2), body, -1).reason) == {"no target is known"}


def test_one_class_or_label_stands_for_all() -> None:
    for multilabel in (False, True):
        head = nn.Linear(9, 3, dtype=torch.float64)
        model = Classifier(nn.Sequential(nn.Flatten()), head, (1, 3, 3), multilabel=multilabel).eval()
        inputs, body = torch.rand(5, 1, 3, 3, dtype=torch.float64), bound(model.body)
        one = {"label": 2} if multilabel else {"target": 2}
        each = {name: torch.full((5,), value) for name, value in one.items()}
        first, second = (compute(model, inputs, body, **given) for given in (one, each))
        for name in NAMES:
            assert torch.equal(first[name].bound.nan_to_num(), second[name].bound.nan_to_num()), name
            assert first[name].reason == second[name].reason


@pytest.mark.parametrize("kind", ["rows", "three classes", "one output", "label"])
def test_a_constant_lead_is_no_tie(kind: str) -> None:
    outputs = {"rows": 2, "three classes": 3, "one output": 1, "label": 2}[kind]
    head = nn.Linear(4, outputs, dtype=torch.float64)
    head.weight.data = torch.tensor([[1.0, 0, 0, 0]]).double().expand(outputs, 4).clone()
    head.bias.data = torch.tensor([0.75, 0.25, -0.5]).double()[:outputs].clone()
    if kind in ("one output", "label"):
        head.weight.data[0] = 0
    model = Classifier(nn.Sequential(nn.Flatten()), head, (1, 2, 2), multilabel=kind == "label").eval()
    inputs, body = torch.rand(3, 1, 2, 2, dtype=torch.float64), bound(model.body)
    label = 0 if kind == "label" else None
    potential = Potential(model, inputs, body, label=label)
    assert set(potential.reason) == {"the lead is constant: no change of the image alters it"}
    found = guarantees(model, inputs, body, label=label, samples=5, robustness=torch.full((3, 1), torch.inf))
    assert all("the lead is constant" in sentence for sentence in in_words(found["boundary_bracket"]))
    if kind != "label":  # the other label can change
        assert potential.radius.tolist() == [torch.inf] * 3
        assert found["robustness_sr"].share == 1
        assert set(found["robustness_sr"].reason) == {""}
        assert "no change of the image alters it" in in_words(found["robustness_sr"])[0]
    head.bias.data = torch.zeros(outputs, dtype=torch.float64)
    tie = "the decision is a tie: the lead is below the rounding error"
    assert set(Potential(model, inputs, body, label=label).reason) == {tie}


def test_a_mask_that_changes_less_than_rounding_has_no_ratio() -> None:
    head = nn.Linear(4, 1, dtype=torch.float64)
    head.weight.data, head.bias.data = torch.full((1, 4), 0.5).double(), torch.full((1,), 0.25).double()
    model = Classifier(nn.Sequential(nn.Flatten()), head, (1, 2, 2)).eval()
    inputs = 0.25 + 0.5 * torch.rand(50, 1, 2, 2, dtype=torch.float64)
    potential = Potential(model, inputs, bound(model.body))
    mask = torch.zeros(1, 1, 2, 2)
    tiny = masking_ceiling(potential, mask, inputs - 8e-16 * potential.direction)
    assert bool((tiny.details["ceiling"] > 0).all())
    assert bool(tiny.details["ratio"].isnan().all())
    assert all("nan" not in sentence for sentence in in_words(tiny))
    for length in (1e-13, 1e-10, 0.1):  # along the gradient of an affine model the ratio is 1, and by rounding not more
        ratio = masking_ceiling(potential, mask, inputs - length * potential.direction).details["ratio"]
        assert bool((ratio <= 1).all())
        assert bool((ratio >= 1 - 4e-15 / length).all())


def test_a_path_that_leaves_the_box_is_told() -> None:
    head = nn.Linear(4, 1, dtype=torch.float64)
    head.weight.data, head.bias.data = torch.tensor([[1.0, 0, 0, 0]]).double(), torch.zeros(1).double()
    model = Classifier(nn.Sequential(nn.Flatten()), head, (1, 2, 2)).eval()
    head.bias.data += 0.5
    inputs = torch.full((1, 1, 2, 2), 0.25, dtype=torch.float64)  # the boundary is at x_1 = -1/2
    ends = bracket(Potential(model, inputs, bound(model.body)))
    assert ends.details["outside"].tolist() == [0.25]
    assert ends.details["upper"].item() == pytest.approx(0.75)
    assert "takes 25 % of the values out of the range of pixels" in in_words(ends)[0]


def test_labels_have_potentials_of_their_own() -> None:
    head = nn.Linear(9, 3, dtype=torch.float64)
    model = Classifier(nn.Sequential(nn.Flatten()), head, (1, 3, 3), multilabel=True).eval()
    inputs = torch.rand(5, 1, 3, 3, dtype=torch.float64)
    scores, norms = model(inputs).detach(), head.weight.detach().norm(dim=1)
    nearest = Potential(model, inputs, bound(model.body))
    assert torch.allclose(nearest.value, (scores.abs() / norms).amin(dim=1), rtol=1e-9)
    assert torch.allclose(nearest.radius, nearest.value, rtol=1e-9)
    label = torch.tensor([0, 1, 2, 0, 1])
    chosen = Potential(model, inputs, bound(model.body), label=label)
    assert torch.allclose(chosen.value, (scores.abs() / norms).gather(1, label[:, None])[:, 0], rtol=1e-9)
    assert torch.equal(chosen.prediction, (scores.gather(1, label[:, None])[:, 0] > 0).long())
    ends = bracket(chosen)
    assert torch.allclose(ends.details["upper"], ends.bound, rtol=1e-9)
    same = Potential(model, inputs, bound(model.body), chosen.prediction, label=label)
    assert set(same.reason) == {"the target is what is predicted already"}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p, x: Potential(nn.Linear(2, 2), x, None), "expected an otnn Classifier"),  # type: ignore[arg-type]
        (lambda p, x: Potential(p.model, x, None, 3), "integers in 0..2"),
        (lambda p, x: Potential(p.model, x, None, torch.tensor([0, -2])), "integers in 0..2"),
        (lambda p, x: Potential(p.model, x[:0], None), "at least one sample"),
        (lambda p, x: Potential(p.model, x[:, :, :5], None), "images of shape"),
        (lambda p, x: Potential(p.model, x, None, torch.tensor([0, 3])), "integers in 0..2"),
        (lambda p, x: Potential(p.model, x, None, label=torch.tensor([0, 1])), "decides between classes"),
        (lambda p, x: Potential(p.model.train(), x, None), "training mode"),
        (lambda p, x: bracket(p, x[:1]), "one point per sample"),
        (lambda p, x: walk(p, torch.ones(3)), "one per sample"),
        (lambda p, x: gradient_agreement(walk(p, torch.ones(2)), steps=0), "steps: expected at least 1"),
        (lambda p, x: certified_smoothgrad(p, share=0.5), "in (0, 1/2)"),
        (lambda p, x: certified_smoothgrad(p, sigma=0.0), "sigma"),
        (lambda p, x: certified_smoothgrad(p, samples=0), "samples"),
        (lambda p, x: certified_smoothgrad(p, delta=1.0), "delta"),
        (lambda p, x: smallest_change(torch.rand(1, 4), 2), "less than half"),
        (lambda p, x: masking_ceiling(p, torch.rand(3, 5)), "masks: expected a bank"),
        (lambda p, x: masking_ceiling(p, 2 * torch.ones(1, 1, 6, 6)), "values in [0, 1]"),
        (lambda p, x: masking_ceiling(p, torch.ones(1, 1, 6, 6), torch.rand(5)), "baseline: expected a number"),
        (lambda p, x: masking_ceiling(p, torch.ones(1, 1, 6, 6), torch.nan), "finite"),
        (lambda p, x: occlusion_masks((6, 6), patch=7), "1 to 6 pixels"),
        (lambda p, x: robustness_bracket(p, torch.ones(2)), "expected distances (2, sets)"),
        (lambda p, x: robustness_bracket(p, torch.ones(2, 1), torch.ones(2, 1)), "support: expected sets"),
    ],
)
def test_calls_that_no_sample_can_be_answered_of_raise(call: object, text: str) -> None:
    model, inputs = model_of(), images(2)
    potential = Potential(model, inputs, bound(model.body))
    with pytest.raises(InputError) as error:
        call(potential, inputs)  # type: ignore[operator]
    assert text in str(error.value)


def test_nothing_depends_on_the_memory_budget() -> None:
    model, inputs = model_of(), images(3)
    body = bound(model.body)
    whole = compute(model, inputs, body)
    small = compute(model, inputs, body, memory_budget=20_000)
    for name in NAMES:
        assert torch.allclose(whole[name].bound, small[name].bound, rtol=1e-9, atol=1e-6)
    assert constant_saliency(Potential(model, inputs, body)).bound.equal(whole["constant_saliency"].bound)
