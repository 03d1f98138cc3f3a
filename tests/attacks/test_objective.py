import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from otnn.attacks import ATTACKS, evaluate, gradient_step, minimal_norm, pgd
from otnn.attacks.objective import Objective, check_norm, distances, radii_of
from otnn.errors import InputError
from tests.attacks.nets import Batches, Plain, linear, predicted, relu_net, rows
from tests.explain.nets import classifier

EVERY = torch.arange(30)


def slow(z: list[float], label: int, loss: str) -> float:
    if len(z) == 1:
        z = [-z[0] / 2, z[0] / 2]
    if loss == "margin":
        return max(z[j] for j in range(len(z)) if j != label) - z[label]
    return math.log(sum(math.exp(value - z[label]) for value in z))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_losses_are_their_formulas(outputs: int, loss: str, targeted: bool) -> None:
    model, x = linear(outputs), rows(30)
    labels = torch.randint(0, max(2, outputs), (30,), generator=torch.Generator().manual_seed(0))
    objective = Objective(model, x, labels, loss=loss, targeted=targeted)
    values, _ = objective.slopes(x, EVERY)
    expected = [(-1 if targeted else 1) * slow(model(x[k]).tolist(), int(labels[k]), loss) for k in range(30)]
    assert objective.classes == max(2, outputs)
    assert torch.allclose(values, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    is_label = predicted(model, x) == labels
    assert torch.equal(objective.won(objective.scores(x), EVERY), is_label if targeted else ~is_label)
    assert torch.equal(objective.margin(objective.scores(x), EVERY) > 0, is_label if targeted else ~is_label)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
@pytest.mark.parametrize("outputs", [1, 4])
def test_gradients_are_those_of_finite_differences(outputs: int, loss: str, targeted: bool) -> None:
    """Central differences of 1e-6 in float64: their error is about 1e-9 where no kink is crossed."""
    model, x = relu_net(outputs), rows(30)
    labels = torch.arange(30) % max(2, outputs)
    objective = Objective(model, x, labels, loss=loss, targeted=targeted)
    _, gradient = objective.slopes(x, EVERY)
    for k in range(x.shape[1]):
        change = torch.zeros_like(x)
        change[:, k] = 1e-6
        ends = [objective.value(objective.scores(x + sign * change), EVERY) for sign in (1, -1)]
        assert torch.allclose(gradient[:, k], (ends[0] - ends[1]) / 2e-6, rtol=0, atol=1e-7)


def test_one_output_is_attacked_as_two_scores() -> None:
    """-log softmax(-z/2, z/2)_1 = log(1 + exp(-z)), the logistic loss; the margin is -z."""
    model, x = linear(1), rows(30)
    z = model(x).detach().squeeze(1)
    positive = torch.ones(30).long()
    entropy = Objective(model, x, positive, loss="cross_entropy").slopes(x, EVERY)[0]
    assert torch.allclose(entropy, nn.functional.softplus(-z))
    assert torch.allclose(Objective(model, x, positive).slopes(x, EVERY)[0], -z)


def test_a_vector_of_scores_is_one_output() -> None:
    model, x = linear(1), rows(30)
    flat = Plain(lambda rows: model(rows).squeeze(1))
    labels = predicted(model, x)
    assert torch.equal(Objective(flat, x, labels).scores(x), Objective(model, x, labels).scores(x))


def test_passes_are_as_large_as_the_budget_allows() -> None:
    model, x = Batches(relu_net()), rows(30)
    labels = predicted(model, x)
    whole = Objective(model, x, labels)
    small = Objective(model, x, labels, memory_budget=5000)
    model.sizes.clear()
    assert torch.allclose(small.scores(x), whole.scores(x))
    forward = model.sizes[0]
    assert forward < 30
    assert max(model.sizes) == 30
    model.sizes.clear()
    for one, other in zip(small.slopes(x, EVERY), whole.slopes(x, EVERY), strict=True):
        assert torch.allclose(one, other)
    assert model.sizes[0] <= forward  # a backward keeps more


def test_a_score_that_is_not_finite_wins_nothing() -> None:
    model, x = linear(3), rows(30)
    objective = Objective(model, x, predicted(model, x))
    scores = torch.tensor([[0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0], [0.0, -torch.inf, 1.0]], dtype=torch.float64)
    for row in scores:
        assert not objective.won(row.expand(30, 3), EVERY).any()


def test_the_distances_are_those_of_float64() -> None:
    """A change of 1e-8 is lost beside 1 in float32, but not beside 1e-8."""
    x = torch.tensor([[1e-8, 0.0]])
    assert float(distances(x, x * 2)) == pytest.approx(1e-8, rel=1e-7)
    assert distances(x, x * 2).dtype == torch.float64
    change = torch.tensor([[0.3, -0.4, 0.0]], dtype=torch.float64)
    zero = torch.zeros(1, 3).double()
    assert float(distances(zero, change)) == pytest.approx(0.5)
    assert float(distances(zero, change, "linf")) == 0.4
    with pytest.raises(InputError, match="norm: expected one of l2, linf, got 'l1'"):
        check_norm("l1")


def test_radii_are_numbers_or_one_for_each_sample() -> None:
    x = rows(3)
    assert torch.equal(radii_of(0.5, x), torch.full((3,), 0.5, dtype=torch.float64))
    assert torch.equal(radii_of(torch.tensor([0, 1, 2]), x), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))


ATTACK: dict[str, Callable[..., Tensor]] = {
    "step": lambda *args, **kwargs: gradient_step(*args, 0.5, **kwargs),
    "pgd": lambda *args, **kwargs: pgd(*args, 0.5, **kwargs),
    "minimal": minimal_norm,
}
LABELS = torch.tensor([0, 1, 2])


def partly_training() -> nn.Module:
    model = nn.Sequential(linear(6), nn.BatchNorm1d(6), linear(3)).double().eval()
    model[1].train()
    return model


@pytest.mark.parametrize("attack", ATTACK)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda x: x}, "model: expected a torch.nn.Module, got function"),
        ({"model": linear(3).train()}, "the model is in training mode; call model.eval"),
        ({"model": partly_training()}, "^1 is in training mode; call model.eval"),
        ({"model": linear(3, dtype=torch.float32)}, "inputs: expected torch.float32 as the weights .* torch.float64"),
        ({"model": Plain(lambda rows: linear(3)(rows.sub_(0.5)))}, "model: expected a forward that leaves its input"),
        (
            {"model": Plain(lambda rows: linear(3)(rows.data.mul_(2)))},
            "model: expected a forward that leaves its input",
        ),
        ({"generator": 3}, "generator: expected a torch.Generator or None, got 3"),
        ({"model": Plain(lambda rows: (rows, rows))}, "model: expected a tensor of scores .batch, outputs., got tuple"),
        ({"model": Plain(lambda rows: rows.view(-1, 2, 3))}, r"model: expected scores \(1, outputs\), got shape"),
        ({"model": Plain(lambda rows: rows.mean())}, r"model: expected scores \(1, outputs\), got shape \(\)"),
        ({"inputs": rows(0)}, "inputs: expected at least one sample, got an empty batch"),
        ({"inputs": rows(3) * torch.nan}, "inputs: sample 0 holds NaN or infinite values"),
        ({"inputs": rows(3).masked_fill(torch.eye(3, 6) == 1, torch.inf)}, "inputs: sample 0 holds NaN or infinite"),
        ({"inputs": (255 * rows(3)).long()}, "inputs: expected floating-point values in .0, 1., got torch.int64"),
        ({"inputs": 2 * rows(3), "box": True}, r"inputs: expected values in \[0, 1\], got \[.*rescale"),
        ({"inputs": rows(3) - 0.5, "box": True}, r"inputs: expected values in \[0, 1\], got \[-"),
        ({"labels": [0, 1, 2]}, "labels: expected a tensor, got list; convert it with torch.as_tensor"),
        ({"labels": LABELS[:2]}, r"labels: expected one per sample, shape \(3,\), got \(2,\)"),
        ({"labels": nn.functional.one_hot(LABELS)}, r"labels: expected one per sample, shape \(3,\), got \(3, 3\)"),
        ({"labels": LABELS.float()}, "labels: expected integers, got torch.float32"),
        ({"labels": LABELS + 1}, r"labels: expected integers in 0..2, got 1..3"),
        ({"labels": LABELS - 1}, r"labels: expected integers in 0..2, got -1..1"),
        ({"labels": LABELS + 1, "targeted": True}, r"targets: expected integers in 0..2, got 1..3"),
        ({"loss": "hinge"}, "loss: expected one of margin, cross_entropy, got 'hinge'"),
        ({"norm": "l1"}, "norm: expected one of l2, linf, got 'l1'"),
        ({"memory_budget": 10}, "memory_budget: expected at least"),
    ],
)
def test_what_cannot_be_attacked_is_refused(attack: str, change: dict[str, Any], message: str) -> None:
    given = {"model": linear(3), "inputs": rows(3), "labels": LABELS, **change}
    settings = {key: value for key, value in given.items() if key not in ("model", "inputs", "labels")}
    with pytest.raises(InputError, match=message):
        ATTACK[attack](given["model"], inputs := given["inputs"], given["labels"], **settings)
    if "model" in change:
        assert torch.equal(inputs, rows(3))


def test_the_statistics_of_a_part_in_training_mode_are_not_moved() -> None:
    model = partly_training()
    for use in (lambda: pgd(model, rows(3), LABELS, 0.5), lambda: evaluate(model, rows(3), LABELS, rows(3))):
        with pytest.raises(InputError, match="1 is in training mode"):
            use()
    assert torch.equal(model[1].running_mean, torch.zeros(6).double())  # type: ignore[index]


def test_a_model_that_converts_its_inputs_is_attacked() -> None:
    model, x = linear(3), rows(10)
    found = gradient_step(Plain(lambda rows: model(rows.double())), x.float(), predicted(model, x), 0.5)
    assert torch.allclose(found, gradient_step(model, x, predicted(model, x), 0.5).float(), atol=1e-6)


@pytest.mark.parametrize("attack", ATTACK)
def test_classifiers_are_checked_as_everywhere(attack: str) -> None:
    weight, x = torch.randn(3, 4), rows(3, 4).view(3, 1, 1, 4)
    several = classifier(weight, torch.zeros(3), multilabel=True)
    single = classifier(weight, torch.zeros(3))
    for model, inputs, message in (
        (several, x, "expected classes that exclude each other, got several labels"),
        (single, x.view(3, 4), r"inputs: expected images of shape \(1, 1, 4\), got \(4,\)"),
        (single, x.float(), "inputs: expected torch.float64 as the weights of the model, got torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            ATTACK[attack](model, inputs, LABELS)


@pytest.mark.parametrize("attack", ["step", "pgd"])
@pytest.mark.parametrize(
    ("radius", "message"),
    [
        (-0.1, "radius: expected finite numbers >= 0, got a negative one"),
        (torch.nan, "radius: expected finite numbers >= 0"),
        (torch.inf, "radius: expected finite numbers >= 0"),
        (1e308, r"radius: expected at most 4.494e\+307, a quarter of the largest torch.float64, got 1e\+308"),
        (torch.zeros(2), r"radius: expected one number, or one for each sample \(3,\), got \(2,\)"),
    ],
)
def test_radii_that_are_refused(attack: str, radius: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ATTACKS[attack].function(linear(3), rows(3), LABELS, radius)


@pytest.mark.parametrize("attack", ATTACK)
def test_an_attack_leaves_everything_as_it_was(attack: str) -> None:
    model, x = relu_net(), rows(20)
    labels = predicted(model, x)
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    first = ATTACK[attack](model, x, labels)
    with torch.no_grad():  # a caller without gradients gets the same
        assert torch.equal(ATTACK[attack](model, x, labels), first)
    assert torch.equal(x, rows(20))
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.source == "otnn"])
def test_the_table_says_what_the_attacks_are(name: str) -> None:
    attack, model, x = ATTACKS[name], linear(3), rows(10)
    labels = predicted(model, x)
    radius = () if attack.minimal else (0.3,)
    drawn = {"generator": torch.Generator().manual_seed(1)} if attack.draws else {}
    for norm in attack.norms:
        points = attack.function(model, x, labels, *radius, norm=norm, box=True, **drawn)
        outcome = evaluate(model, x, labels, points, norm=norm, box=True)
        assert outcome.finite.all()
        assert attack.minimal or (outcome.distance <= 0.3).all()
