"""The attacks of foolbox and pyautoattack behind our signature, against closed forms and certificates."""

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from otnn.attacks import evaluate
from otnn.attacks.adapter import scales
from otnn.attacks.autoattack_attacks import apgd, fab, square
from otnn.attacks.foolbox_attacks import carlini_wagner, ddn, deepfool, fmn
from otnn.attacks.objective import Objective
from otnn.attacks.table import RIVALS
from otnn.certify import certify
from otnn.errors import InputError
from otnn.lipschitz import export
from otnn.models import build, predict

Points = Callable[..., Tensor]


@dataclass(frozen=True)
class Minimal:
    """A minimal-norm attack, and how many times the distance of the nearest point its own may be on a linear model.

    `two` with one boundary, where nothing but the precision of the method counts: C&W and FMN end on the boundary,
    FAB steps back by a tenth at most and overshoots by 5 % of what is left, the sphere of DDN grows and shrinks by 5 %,
    DeepFool overshoots by 2 %. `many`, in the median with five classes, the nearest of which may not lead.
    `box`, in the median: clamped steps lose some of their length. `coarse`: the steps of Adam, 0.015 a pixel and 0.09
    in all 36, do not resolve shorter distances.
    """

    name: str
    function: Points
    norms: tuple[str, ...]
    two: float
    many: float
    box: float
    settings: dict[str, Any]
    coarse: float = 0.0


MINIMAL = [
    Minimal("carlini_wagner", carlini_wagner, ("l2",), 1.01, 1.01, 1.05, {"steps": 60, "searches": 6}, coarse=0.09),
    Minimal("deepfool", deepfool, ("l2", "linf"), 1.021, 1.021, 1.06, {}),
    Minimal("ddn", ddn, ("l2",), 1.002, 1.002, 1.02, {}),
    Minimal("fmn", fmn, ("l2", "linf"), 1.002, 1.005, 1.02, {}),
    Minimal("fab", fab, ("l2", "linf"), 1.006, 1.006, 1.02, {}),
]
RADIUS: list[tuple[str, Points, dict[str, Any]]] = [("apgd", apgd, {"steps": 30}), ("square", square, {"queries": 100})]
QUICK: dict[str, dict[str, Any]] = {"carlini_wagner": {"steps": 50, "searches": 4}, "square": {"queries": 100}}
PAIRS = [(attack, norm) for attack in MINIMAL for norm in attack.norms]
NAMES = [f"{attack.name}, {norm}" for attack, norm in PAIRS]
minimal = pytest.mark.parametrize(("attack", "norm"), PAIRS, ids=NAMES)


def linear(outputs: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> tuple[nn.Module, Tensor, Tensor]:
    """A random linear model whose boundaries pass through the box, inputs (8, 1, 6, 6) and the classes predicted."""
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, 36, generator=generator, dtype=torch.float64)
    layer = nn.Linear(36, outputs, dtype=dtype)
    layer.weight.data.copy_(weight / size)
    layer.bias.data.copy_(-weight.sum(dim=1) / 2)
    model = nn.Sequential(nn.Flatten(), layer).eval()
    inputs = size * torch.rand(8, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        return model, inputs, predict(model(inputs))


def nearest(model: nn.Module, inputs: Tensor, labels: Tensor, norm: str, box: bool) -> Tensor:
    """The exact distance (n,) of a linear model in float64, by bisection along clamp(x + s d) for each rival.

    d is the direction in which the lead grows most, and the clamp its projection: both optimal in L2 and in Linf.
    """
    weight, bias = (parameter.detach().double() for parameter in model[1].parameters())  # type: ignore[index]
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    x = inputs.double().flatten(1)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for rival in range(len(weight)):
        slope, offset = weight[rival] - weight[labels], bias[rival] - bias[labels]
        direction = slope.sign() if norm == "linf" else slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-9)

        def point(s: Tensor, direction: Tensor = direction) -> Tensor:
            moved = x + s.unsqueeze(1) * direction
            return moved.clamp(0, 1) if box else moved

        low, high = torch.zeros_like(best), torch.full_like(best, 1e6)
        for _ in range(100):
            middle = (low + high) / 2
            won = (slope * point(middle)).sum(dim=1) + offset > 0
            low, high = torch.where(won, low, middle), torch.where(won, middle, high)
        change = point(high) - x
        distance = change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
        reached = (slope * point(high)).sum(dim=1) + offset > 0
        best = torch.where(reached & (labels != rival), torch.minimum(best, distance), best)
    return best


@minimal
@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("box", [False, True])
def test_a_minimal_norm_attack_finds_the_nearest_point_of_a_linear_model(
    attack: Minimal, norm: str, outputs: int, box: bool
) -> None:
    model, inputs, labels = linear(outputs)
    points = attack.function(model, inputs, labels, norm=norm, box=box, **attack.settings)
    outcome = evaluate(model, inputs, labels, points, norm=norm, box=box)
    assert outcome.success.all()
    distance = nearest(model, inputs, labels, norm, box)
    ratio = outcome.distance / distance
    assert ratio.min() > 1 - 1e-5  # the rounding of scores in float32
    fine = ratio[distance > attack.coarse]
    # the bar of adversarial-library for every attack; of five classes, for three samples in four
    assert (fine.max() if outputs == 1 else fine.quantile(0.75)) < 1.25
    if box:
        assert ratio.median() < attack.box
    elif outputs < 5:
        assert ratio.max() < attack.two
    else:
        assert ratio.median() < attack.many


@minimal
def test_without_a_box_an_attack_does_not_see_the_scale_of_its_inputs(attack: Minimal, norm: str) -> None:
    for size in (1e-3, 1e3):
        model, inputs, labels = linear(2, size=size)
        points = attack.function(model, inputs, labels, norm=norm, **attack.settings)
        outcome = evaluate(model, inputs, labels, points, norm=norm)
        assert outcome.success.all()
        assert (outcome.distance / nearest(model, inputs, labels, norm, False)).max() < attack.two


@minimal
def test_the_points_of_float64_networks_are_float64(attack: Minimal, norm: str) -> None:
    model, inputs, labels = linear(2, torch.float64)
    points = attack.function(model, inputs, labels, norm=norm, **attack.settings)
    assert points.dtype == torch.float64
    outcome = evaluate(model, inputs, labels, points, norm=norm)
    assert outcome.success.all()
    assert (outcome.distance >= nearest(model, inputs, labels, norm, False) * (1 - 1e-12)).all()


@minimal
@pytest.mark.parametrize("outputs", [1, 4])
def test_a_targeted_attack_reaches_its_target(attack: Minimal, norm: str, outputs: int) -> None:
    model, inputs, labels = linear(outputs)
    targets = (labels + 1) % max(2, outputs)
    points = attack.function(model, inputs, targets, norm=norm, targeted=True, **attack.settings)
    outcome = evaluate(model, inputs, targets, points, norm=norm, targeted=True)
    assert outcome.success.all()
    assert (outcome.distance >= nearest(model, inputs, labels, norm, False) * (1 - 1e-5)).all()
    if outputs == 1:
        assert (outcome.distance <= nearest(model, inputs, labels, norm, False) * attack.two).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 3, 5])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
def test_apgd_wins_from_the_distance_on_and_never_before(norm: str, box: bool, outputs: int, loss: str) -> None:
    model, inputs, labels = linear(outputs)
    radius = nearest(model, inputs, labels, norm, box)
    for share in (0.999, 1.05):
        points = apgd(model, inputs, labels, share * radius, norm=norm, box=box, loss=loss, steps=50)
        outcome = evaluate(model, inputs, labels, points, norm=norm, box=box)
        assert (outcome.distance <= share * radius).all()
        if share < 1:
            assert not outcome.success.any()
        elif loss == "margin" or outputs < 3:
            # among several classes, the one that leads need not be the nearest
            assert outcome.success.double().mean() >= (1.0 if outputs < 3 else 0.6)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_scale_of_the_scores_does_not_stop_apgd(scale: float, box: bool) -> None:
    """Squares of such gradients are 0 or infinite in float32."""
    model, inputs, labels = linear(2)
    radius = nearest(model, inputs, labels, "l2", box)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    points = apgd(model, inputs, labels, 1.05 * radius, box=box, steps=50)
    assert evaluate(model, inputs, labels, points, box=box).success.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_square_takes_half_precision(norm: str, dtype: torch.dtype) -> None:
    model, inputs, labels = linear(5)
    radius = nearest(model, inputs, labels, norm, False)
    model, inputs = copy.deepcopy(model).to(dtype), inputs.to(dtype)
    points = square(model, inputs, labels, 6 * radius, norm=norm, queries=100)
    assert points.dtype == dtype
    assert evaluate(model, inputs, labels, points, norm=norm).success.any()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
def test_square_raises_the_margin_and_never_beats_the_distance(norm: str, box: bool, outputs: int, loss: str) -> None:
    model, inputs, labels = linear(outputs)
    radius = nearest(model, inputs, labels, norm, box)
    objective, index = Objective(model, inputs, labels), torch.arange(8)
    before = objective.margin(objective.scores(inputs), index)
    for share in (0.999, 3.0):
        points = square(model, inputs, labels, share * radius, norm=norm, box=box, loss=loss, queries=100)
        outcome = evaluate(model, inputs, labels, points, norm=norm, box=box)
        assert (outcome.distance <= share * radius).all()
        assert not (outcome.success.any() and share < 1)
        after = objective.margin(objective.scores(points), index)
        if loss == "margin":  # of eight random searches, most rise, and by more as there is more room
            assert (after > before).double().mean() > 0.7
    assert outcome.success.any()


@pytest.mark.parametrize(("name", "function", "settings"), RADIUS, ids=[row[0] for row in RADIUS])
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
def test_an_attack_within_a_radius_takes_a_target(
    name: str, function: Points, settings: dict[str, Any], outputs: int, loss: str
) -> None:
    model, inputs, labels = linear(outputs)
    targets = (labels + 1) % max(2, outputs)
    points = function(model, inputs, targets, 5.0, targeted=True, loss=loss, **settings)
    assert evaluate(model, inputs, targets, points, targeted=True).success.all()


@pytest.mark.parametrize("name", RIVALS)
def test_no_point_lies_below_the_certified_radius_of_a_lipschitz_network(name: str) -> None:
    attack = RIVALS[name]
    torch.manual_seed(0)
    network = build("dense", (1, 6, 6), 3, widths=(16, 16)).eval()
    model = export(network)
    inputs = torch.rand(16, 1, 6, 6)
    with torch.no_grad():
        labels = predict(model(inputs))
    radius = certify(model, inputs).radius.double()
    settings = QUICK.get(name, {})
    found = 0
    for share in (0.99, 3.0) if not attack.minimal else (None,):
        size = () if share is None else (share * radius,)
        points = attack.function(model, inputs, labels, *size, **settings)
        outcome = evaluate(model, inputs, labels, points)
        assert (outcome.distance[outcome.success] >= radius[outcome.success]).all()
        found += int(outcome.success.sum())
    assert found


@pytest.mark.parametrize("name", RIVALS)
def test_attacks_repeat_themselves_and_leave_global_state_alone(name: str) -> None:
    attack = RIVALS[name]
    model, inputs, labels = linear(3)
    size = () if attack.minimal else (2.0,)
    settings = QUICK.get(name, {})
    torch.manual_seed(5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # noqa: NPY002
    runs = [
        attack.function(model, inputs, labels, *size, generator=torch.Generator().manual_seed(seed), **settings)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    if name in ("apgd", "square"):
        assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index,arg-type]  # noqa: NPY002
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


@minimal
def test_a_sample_does_not_depend_on_its_batch(attack: Minimal, norm: str) -> None:
    model, inputs, labels = linear(5)
    together = attack.function(model, inputs, labels, norm=norm, **attack.settings)
    alone = attack.function(model, inputs[3:4], labels[3:4], norm=norm, **attack.settings)
    # sums of another order, on a path of a hundred steps
    torch.testing.assert_close(alone[0], together[3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", RIVALS)
def test_what_is_won_from_the_start_stays(name: str) -> None:
    attack = RIVALS[name]
    model, inputs, labels = linear(3)
    size = () if attack.minimal else (2.0,)
    settings = QUICK.get(name, {})
    wrong = labels.clone()
    wrong[:4] = (labels[:4] + 1) % 3
    points = attack.function(model, inputs, wrong, *size, **settings)
    assert torch.equal(points[:4], inputs[:4])
    everything = attack.function(model, inputs, (labels + 1) % 3, *size, **settings)
    assert torch.equal(everything, inputs)


@pytest.mark.parametrize("name", RIVALS)
def test_an_attack_that_fails_leaves_a_finite_point(name: str) -> None:
    attack = RIVALS[name]
    model, inputs, labels = linear(2)
    model[1].weight.data.zero_()  # type: ignore[index]
    model[1].bias.data.copy_(torch.tensor([1.0, 0.0]))  # type: ignore[index]
    size = () if attack.minimal else (0.5,)
    settings = QUICK.get(name, {})
    points = attack.function(model, inputs, torch.zeros_like(labels), *size, **settings)
    outcome = evaluate(model, inputs, torch.zeros_like(labels), points)
    assert not outcome.success.any()
    assert outcome.finite.all()
    if attack.minimal:
        assert torch.equal(points, inputs)


def test_the_unit_of_a_sample_is_its_distance() -> None:
    model, inputs, labels = linear(1)
    length, size = scales(Objective(model, inputs, labels), inputs, torch.arange(8))
    distance = nearest(model, inputs, labels, "l2", False)
    torch.testing.assert_close(length.double(), 1.05 * distance, rtol=1e-4, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(size, model(inputs).squeeze(1).abs())


def test_the_unit_of_saturated_scores_is_not_that_of_the_first_order() -> None:
    class Saturated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(3 * x)

    inputs = torch.tensor([[1.5]])  # f / |f'| is 1,350, and the boundary is 1.5 away
    length, _ = scales(Objective(Saturated().eval(), inputs, torch.tensor([1])), inputs, torch.arange(1))
    assert 1.5 < float(length) < 3
    points = ddn(Saturated().eval(), inputs, torch.tensor([1]))
    assert -0.02 < float(points) <= 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, x, y: carlini_wagner(m, x, y, norm="linf"), "carlini_wagner takes l2"),
        (lambda m, x, y: carlini_wagner(m, x, y, loss="cross_entropy"), "carlini_wagner takes margin"),
        (lambda m, x, y: ddn(m, x, y, norm="linf"), "ddn takes l2"),
        (lambda m, x, y: fmn(m, x, y, loss="cross_entropy"), "fmn takes margin"),
        (lambda m, x, y: fab(m, x, y, loss="cross_entropy"), "fab takes margin"),
        (lambda m, x, y: deepfool(m, x, y, candidates=1), "candidates: expected an integer >= 2, got 1"),
        (lambda m, x, y: deepfool(m, x, y, candidates=2.5), "candidates: expected an integer >= 2, got 2.5"),
        (lambda m, x, y: deepfool(m, x, y, overshoot=0), "overshoot: expected a finite number > 0, got 0"),
        (lambda m, x, y: carlini_wagner(m, x, y, step_size=torch.inf), "step_size: expected a finite number > 0"),
        (lambda m, x, y: ddn(m, x, y, radius=torch.nan), "radius: expected a finite number > 0, got nan"),
        (lambda m, x, y: ddn(m, x, y, radius=True), "radius: expected a finite number > 0, got True"),
        (lambda m, x, y: ddn(m, x, y, gamma=1.0), "gamma: expected a number > 0 and < 1, got 1.0"),
        (lambda m, x, y: fmn(m, x, y, step_size=-1.0), "step_size: expected a finite number > 0, got -1.0"),
        (lambda m, x, y: fmn(m, x, y, gamma="a"), "gamma: expected a number > 0 and < 1, got 'a'"),
        (lambda m, x, y: ddn(m, x, y, norm="l1"), "expected one of l2, linf"),
        (lambda m, x, y: ddn(m, x * torch.nan, y), "NaN"),
        (lambda m, x, y: fmn(m, x + 2, y, box=True), r"values in \[0, 1\]"),
        (lambda m, x, y: apgd(m, x, y, -1.0), "finite numbers >= 0"),
        (lambda m, x, y: square(m, x.flatten(1), y, 1.0), "attack others with pgd"),
        (lambda m, x, y: square(m, x[..., :4, :4], y, 1.0), "at least 5 x 5 pixels"),
        (lambda m, x, y: square(m, x.view(-1, 1, 12, 3), y, 1.0), r"as high as wide .* got shape \(8, 1, 12, 3\)"),
        (lambda m, x, y: fab(m, x, y, memory_budget=10), "memory_budget"),
    ],
)
def test_what_cannot_be_attacked_is_refused(call: Callable[..., Tensor], text: str) -> None:
    model, inputs, labels = linear(2)
    if "5 x 5" in text:
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(InputError, match=text):
        call(model, inputs, labels)


@pytest.mark.parametrize("name", RIVALS)
def test_a_missing_library_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("foolbox", "pyautoattack", *(m for m in sys.modules if m.startswith("pyautoattack."))):
        monkeypatch.setitem(sys.modules, module, None)
    model, inputs, labels = linear(2)
    with pytest.raises(InputError, match=r'pip install "otnn\[attacks\]"'):
        RIVALS[name].function(model, inputs, labels, *(() if RIVALS[name].minimal else (1.0,)))


def test_the_table_imports_neither_library() -> None:
    code = "import sys, otnn.attacks.table; print({'foolbox', 'eagerpy', 'pyautoattack'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
