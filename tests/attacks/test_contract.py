"""What every attack of the table owes its user, whatever library it comes from."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from otnn.attacks import ATTACKS, evaluate, pgd
from otnn.attacks.adapter import settle
from otnn.attacks.objective import Objective
from otnn.attacks.step import gradient_step
from otnn.errors import InputError


def dense(outputs: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, outputs)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return model


def pictures(count: int = 4) -> Tensor:
    return torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(2))


def attack(name: str, model: nn.Module, inputs: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    entry = ATTACKS[name]
    known = inspect.signature(entry.function).parameters
    few = {key: value for key, value in {"steps": 20, "queries": 50, "searches": 2}.items() if key in known}
    limit = () if entry.minimal else (3.0,)
    points: Tensor = entry.function(model, inputs, labels, *limit, **{**few, **settings})
    return points


@pytest.fixture(autouse=True)
def libraries() -> None:
    pytest.importorskip("foolbox")
    pytest.importorskip("pyautoattack")


class Changed(nn.Module):
    """A network whose scores, or inputs, are changed."""

    def __init__(self, scores: Callable[[Tensor], Tensor], inputs: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.network, self.scores, self.inputs = dense(), scores, inputs
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(self.inputs(images))
        return self.scores(scores)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_layout_of_the_images_in_memory_does_not_matter(name: str) -> None:
    model, x = dense(), pictures()
    labels = model(x).argmax(dim=1)
    strided = x.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    for box in (False, True):
        expected = attack(name, model, x, labels, box=box)
        found = attack(name, model, strided, labels, box=box)
        # sums in another order: the same attack up to rounding
        assert torch.allclose(found, expected, atol=1e-3), box


@pytest.mark.parametrize("name", ATTACKS)
def test_points_carry_no_graph(name: str) -> None:
    model, x = dense(), pictures()
    labels = model(x).argmax(dim=1)
    for inputs in (x, x.clone().requires_grad_()):
        found = attack(name, model, inputs, labels)
        assert not found.requires_grad
        outcome = evaluate(model, inputs, labels, found)
        assert outcome.success.all()
        assert not outcome.distance.requires_grad
        assert inputs.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ATTACKS)
def test_a_caller_without_gradients_gets_the_same(name: str) -> None:
    model, x = dense(), pictures()
    labels = model(x).argmax(dim=1)
    expected = attack(name, model, x, labels)
    with torch.no_grad():
        assert torch.equal(attack(name, model, x, labels, generator=None), expected)
    with pytest.raises(InputError, match=r"generator: expected a torch\.Generator or None, got 3"):
        attack(name, model, x, labels, generator=3)


def along_the_normal(away: list[float]) -> tuple[nn.Module, Tensor]:
    """z = 3 x + 4 y - 3.5 and points so far from its boundary, on the normal through (.5, .5)."""
    model = nn.Linear(2, 1).eval()
    model.weight.data, model.bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([-3.5])
    return model, 0.5 + torch.tensor(away).unsqueeze(1) * torch.tensor([0.6, 0.8])


@pytest.mark.parametrize("name", [name for name, entry in ATTACKS.items() if entry.minimal])
def test_samples_close_to_the_boundary_and_on_it_are_turned(name: str) -> None:
    away = [0.5, 1e-2, 1e-3, 3e-4, 1e-4, 1e-5]
    model, x = along_the_normal([*away, 0.0])
    labels = torch.tensor([1] * 6 + [0])  # a score of 0 is class 0
    points = attack(name, model, x, labels, steps=100) if name == "ddn" else attack(name, model, x, labels)
    found = evaluate(model, x, labels, points)
    assert found.success.all()
    assert all(evaluate(model, x[k : k + 1], labels[k : k + 1], points[k : k + 1]).success for k in range(7))
    # 32 roundings of the terms 3 x + 4 y, which are 6 at most; over the norm 5 of the gradient
    rounding = 32 * torch.finfo(torch.float32).eps * 6 / 5
    assert (found.distance <= 1.1 * torch.tensor([*away, 0.0]) + 5 * rounding).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name, entry in ATTACKS.items() if entry.minimal])
def test_half_precision_is_attacked(name: str, dtype: torch.dtype) -> None:
    model, x = along_the_normal([0.3, 0.1, 0.03])
    model, x, labels = model.to(dtype), x.to(dtype), torch.ones(3).long()
    for box in (False, True):
        found = evaluate(model, x, labels, attack(name, model, x, labels, box=box), box=box)
        assert found.success.all(), box
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(model.float(), x.float(), labels, attack(name, model, x.float(), labels)).success.all()


def test_what_wins_by_less_than_rounding_is_not_given_up_for_the_input() -> None:
    """Beyond the boundary this lead is 1e-6 everywhere, below the 32 roundings of |x| = 1.5."""

    class Low(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 0.5).clamp(min=-1e-6)

    inputs, points, labels = torch.tensor([[1.5], [1.5]]), torch.tensor([[0.4], [0.6]]), torch.ones(2).long()
    found = settle(Objective(Low().eval(), inputs, labels), inputs, points)
    assert torch.equal(found, torch.tensor([[0.4], [1.5]]))


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "square"])
def test_a_model_without_gradients_is_refused(name: str) -> None:
    """An attack that stands still would be taken for a robust network."""
    x = pictures()
    labels = dense()(x).argmax(dim=1)
    for model in (Changed(lambda z: z.detach()), Changed(lambda z: z, lambda x: x.detach())):
        with pytest.raises(InputError, match="no gradient of its scores reaches the inputs"):
            attack(name, model, x, labels)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        attack(name, dense(), x, labels)


def test_square_searches_where_there_is_no_gradient() -> None:
    x = pictures()
    labels = dense()(x).argmax(dim=1)
    model = Changed(lambda z: (64 * z).round() / 64)
    found = attack("square", model, x, labels, queries=200)
    assert evaluate(model, x, labels, found).success.all()
    step = gradient_step(model, x, labels, 3.0)
    assert not evaluate(model, x, labels, step).success.any()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_no_success(name: str, value: float) -> None:
    x = pictures()
    labels = dense()(x).argmax(dim=1)
    for model in (Changed(lambda z: z * value), Changed(lambda z: torch.where(z == z.amax(), value, z))):
        outcome = evaluate(model, x, labels, attack(name, model, x, labels))
        assert not (outcome.success & ~outcome.finite).any()
    assert not outcome.success.all() or outcome.finite.all()


@pytest.mark.parametrize("name", ATTACKS)
def test_counts_below_one_are_refused(name: str) -> None:
    model, x = dense(), pictures()
    labels = model(x).argmax(dim=1)
    known = inspect.signature(ATTACKS[name].function).parameters
    for count in ("steps", "restarts", "queries", "searches", "iterations", "starts"):
        for wrong in (0, 2.5, True):
            if count in known:
                with pytest.raises(InputError, match=f"{count}: expected an integer >= 1"):
                    attack(name, model, x, labels, **{count: wrong})


@pytest.mark.parametrize("radius", ["a", None, [0.5, "b"], True, torch.tensor(1 + 1j)])
def test_a_radius_that_is_no_number_is_refused(radius: Any) -> None:
    model, x = dense(), pictures()
    with pytest.raises(InputError, match="radius: expected a number"):
        gradient_step(model, x, model(x).argmax(dim=1), radius)


def test_evaluate_refuses_what_it_cannot_judge() -> None:
    model, x = dense(), pictures()
    labels = model(x).argmax(dim=1)
    with pytest.raises(InputError, match=r"expected values in \[0, 1\]"):
        evaluate(model, x + 1, labels, x, box=True)
    with pytest.raises(InputError, match="adversarial: expected a tensor, got list"):
        evaluate(model, x, labels, x.tolist())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="norm: expected one of"):
        evaluate(model, x, labels, x, norm="l1")


def test_pgd_without_the_step_goes_its_own_way() -> None:
    """On a boundary that bends, PGD follows the bend; with the step first it stands where the step does."""

    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # the gradient at 0 is along x_0, then x_1 counts more and more
            lead = 1 - x[:, 0] - 4 * x[:, 0] * x[:, 1] - 0.01 * x[:, 1]
            return torch.stack([lead, torch.zeros_like(lead)], dim=1)

    model, x, labels = Bent().eval(), torch.zeros(1, 2), torch.tensor([0])
    step = gradient_step(model, x, labels, 1.5)
    assert torch.equal(pgd(model, x, labels, 1.5), step)
    own = pgd(model, x, labels, 1.5, steps=20, one_step=False)
    assert evaluate(model, x, labels, own).success.all()
    assert float(own[0, 1]) > 0.1 * float(own[0, 0])
    assert float(step[0, 1]) < 0.011 * float(step[0, 0])


def test_carlini_wagner_in_the_box_is_as_near_as_foolbox_called_by_hand() -> None:
    import foolbox

    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = 0.25 + torch.rand(10, 1, 8, 8) / 2
    labels = model(x).argmax(dim=1)
    by_hand = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=9, steps=100, stepsize=0.03, abort_early=False)
    points = by_hand.run(foolbox.PyTorchModel(model, bounds=(0, 1)), x, foolbox.criteria.Misclassification(labels))
    theirs = evaluate(model, x, labels, points.clamp(0, 1), box=True)
    ours = evaluate(
        model, x, labels, attack("carlini_wagner", model, x, labels, box=True, steps=100, searches=9), box=True
    )
    assert ours.success.all()
    # with a first constant of 1 it was 1.14 times as far
    assert float(ours.distance.median()) < 1.05 * float(theirs.distance.median())


@pytest.mark.parametrize(("pixels", "seen"), [(2, 2), (64, 64), (784, 784), (6912, 6912), (6912, 1), (6912, 30)])
def test_carlini_wagner_without_a_box_is_as_near_in_any_dimension(pixels: int, seen: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 1)).eval()
    with torch.no_grad():
        model[1].weight[:, seen:] = 0
    x = torch.rand(8, pixels)
    labels = (model(x)[:, 0] > 0).long()
    points = attack("carlini_wagner", model, x, labels, steps=100, searches=5)
    found = evaluate(model, x, labels, points)
    with torch.no_grad():
        least = model(x)[:, 0].abs().double() / model[1].weight.norm().double()
    assert found.success.all()
    # steps of 0.03 in every coordinate were 5 % too far in 6912 of them, and 30 % on a network of pictures of that size
    assert float((found.distance / least).max()) < 1.01
