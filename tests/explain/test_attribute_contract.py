"""What holds for every method: chance, memory, cost, and what is left as it was; captum objects and functions."""

from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.explain import METHODS, attribute, cost
from otnn.explain.scores import Scorer
from otnn.memory import chunk_size
from otnn.models import build
from tests.explain.nets import Counting, images, linear, relu_net

NAMES = [
    *("saliency", "gradient_input", "integrated_gradients", "smoothgrad", "squaregrad", "vargrad", "gradcam"),
    *("gradcam_pp", "guided_backprop", "deconvolution", "occlusion", "rise", "lime", "kernel_shap", "sobol", "hsic"),
    "forgrad",
]
RANDOM = ["smoothgrad", "squaregrad", "vargrad", "rise", "lime", "kernel_shap", "sobol", "hsic"]
FEW = {
    "rise": 40,
    "lime": 60,
    "kernel_shap": 60,
    "sobol": 4,
    "hsic": 40,
    "smoothgrad": 7,
    "squaregrad": 7,
    "vargrad": 7,
}


def settings(method: str) -> dict[str, Any]:
    """Fewer samples than by default."""
    small = {"samples": FEW[method]} if method in FEW else {}
    return small | ({"steps": 9} if method == "integrated_gradients" else {})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_seventeen_are_registered() -> None:
    assert sorted(METHODS) == sorted(NAMES)
    assert {entry.kind for entry in METHODS.values()} == {"gradient", "perturbation", "class activation"}
    assert [name for name in NAMES if METHODS[name].draws] == RANDOM


@pytest.mark.parametrize("method", NAMES)
def test_chance_comes_from_the_generator_and_global_states_stay(method: str) -> None:
    model, x = relu_net(), images(2)
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    def maps(generator: torch.Generator | None) -> Tensor:
        return attribute(model, x, 1, method, generator=generator, **settings(method))

    assert torch.equal(maps(seeded(5)), maps(seeded(5)))
    assert torch.equal(maps(None), maps(None))
    assert torch.equal(maps(seeded(5)), maps(seeded(6))) == (method not in RANDOM)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("score", ["logit", "margin"])
def test_a_map_depends_on_neither_the_budget_nor_its_batch_mates(method: str, score: str) -> None:
    model, x, target = relu_net().double(), images(5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])

    def maps(x: Tensor, target: Tensor, budget: float) -> Tensor:
        return attribute(
            model, x, target, method, score=score, generator=seeded(1), memory_budget=budget, **settings(method)
        )

    whole = maps(x, target, 2**30)
    with pytest.raises(InputError, match=r"expected at least \d+ bytes") as error:
        maps(x, target, 1000)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (least, 3.5 * least):
        assert torch.allclose(maps(x, target, budget), whole, rtol=1e-6, atol=1e-9)
    for k in (0, 4):
        assert torch.allclose(maps(x[k : k + 1], target[k : k + 1], 2**30), whole[k : k + 1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("scale", [1, 4])
def test_the_cost_is_what_the_model_counts(method: str, scale: int) -> None:
    model, x = Counting(relu_net()).eval(), images(5)
    scorer, entry = Scorer(model, x, 1), METHODS[method]
    budget = 6000 * scale * 64
    # what is spent once, to find layers, activations and the memory of a sample
    once = {"gradcam": 1, "gradcam_pp": 1, "guided_backprop": 1, "deconvolution": 1}.get(method, 0)
    model.forwards = model.backwards = 0
    chunk_size(x[:1], budget, model, gradient=True)
    measure = model.forwards
    chosen = settings(method)
    expected = cost(method, x, chosen)
    model.forwards = model.backwards = 0
    entry.function(scorer, x, memory_budget=budget, **chosen)
    spent = model.forwards - once - 5 * expected[0]
    assert spent % measure == 0
    assert spent <= 4 * measure if method not in ("rise", "sobol") else spent >= 0
    if entry.kind == "perturbation":
        assert expected[1] == 0 == model.backwards
    else:
        assert model.backwards - 5 * expected[1] in (0, measure)


def test_settings_change_the_cost() -> None:
    x = torch.rand(2, 1, 28, 28)
    assert cost("saliency", x) == (1, 1)
    assert cost("smoothgrad", x) == cost("integrated_gradients", x) == (50, 50)
    assert cost("sobol", x) == (2112, 0)
    assert cost("occlusion", x, {"window": 5, "stride": 5}) == (37, 0)
    assert cost("occlusion", torch.rand(1, 30)) == (31, 0)
    with pytest.raises(InputError, match="saliency does not take steps=; it takes no settings"):
        cost("saliency", x, {"steps": 3})


def state(model: nn.Module, x: Tensor) -> list[object]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [module.training for module in model.modules()],
        [[len(getattr(module, kind)) for kind in kinds] for module in model.modules()],
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        {name: value.clone().tolist() for name, value in model.state_dict().items()},
        (x.requires_grad, x.grad is None),
    ]


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("frozen", [False, True])
def test_everything_is_left_as_it_was_also_after_an_error(method: str, frozen: bool) -> None:
    model, x = relu_net().requires_grad_(not frozen), images(2)
    model[1].register_forward_hook(lambda *_: None)  # type: ignore[index]
    before = state(model, x)
    maps = attribute(model, x, 1, method, **settings(method))
    assert state(model, x) == before
    with torch.inference_mode():
        assert torch.allclose(attribute(model, x, 1, method, **settings(method)), maps, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(attribute(model, x, 1, method, **settings(method)), maps)

    class BrokenError(Exception):
        pass

    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:  # after those of the scorer
            raise BrokenError

    handle = model[4].register_forward_hook(fail)  # type: ignore[index]
    before = state(model, x)
    with pytest.raises(BrokenError):
        attribute(model, x, 1, method, **settings(method))
    assert state(model, x) == before
    handle.remove()


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_captum_objects_are_methods() -> None:
    model, x, target = relu_net(), images(3), torch.tensor([0, 1, 3])
    hand = captum.attr.DeepLift(model).attribute(x.clone().requires_grad_(), target=target).detach()
    maps = attribute(model, x, torch.eye(4)[target], captum.attr.DeepLift(model))
    assert torch.equal(maps, hand)
    tunnel = captum.attr.NoiseTunnel(captum.attr.InputXGradient(model))
    before = torch.get_rng_state()
    maps = attribute(model, x, target, tunnel, generator=seeded(2), nt_samples=3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(maps, attribute(model, x, target, tunnel, generator=seeded(2), nt_samples=3))
    assert not torch.equal(maps, attribute(model, x, target, tunnel, generator=seeded(3), nt_samples=3))


def test_a_captum_object_explains_class_1_of_one_output() -> None:
    model, x = relu_net(1), images(2)
    method = captum.attr.InputXGradient(model)
    assert torch.allclose(attribute(model, x, 1, method), attribute(model, x, 1, "gradient_input"))
    with pytest.raises(InputError, match="explains class 1 only"):
        attribute(model, x, 0, method)


def test_functions_are_methods() -> None:
    model, x = linear((4,)), torch.rand(3, 4, dtype=torch.float64)

    def noise(model: nn.Module, x: Tensor, target: Tensor, *, factor: float = 1.0) -> Tensor:
        model.train()
        model.requires_grad_(False)
        model[1].register_forward_hook(lambda *_: None)  # type: ignore[index]
        model(x).sum().backward()
        return factor * torch.rand_like(x) * target.unsqueeze(1)

    before = state(model, x)
    maps = attribute(model, x, torch.tensor([0, 1, 2]), noise, factor=2.0)
    assert state(model, x) == before
    assert maps[0].eq(0).all()
    assert maps[1].gt(0).all()

    def writes(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        nn.init.zeros_(model[1].weight)  # type: ignore[index, arg-type]
        return x

    with pytest.raises(InputError, match="it changed the weights of the model"):
        attribute(model, x, 1, writes)


@pytest.mark.parametrize("method", NAMES)
def test_parametrised_weights_change_nothing(method: str) -> None:
    """Their weights are built once for a call, whose passes share the graph."""
    model, x = relu_net(), images(4)
    plain = attribute(model, x, 1, method, memory_budget=2**18, **settings(method))
    for index in (0, 2, 5):
        nn.utils.parametrize.register_parametrization(model[index], "weight", nn.Identity())  # type: ignore[index, arg-type]
    maps = attribute(model.eval(), x, 1, method, memory_budget=2**18, **settings(method))
    assert torch.allclose(maps, plain, rtol=1e-5, atol=1e-7)


def test_margins_follow_weights_that_were_written_in_place() -> None:
    model = build("dense", (1, 8, 8), 3, widths=(16,), constrained=False).eval()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        first = Scorer(model, x, 1, "margin")(x)
        model.head.weight.mul_(2)
        model.head.bias.mul_(2)
        # scores and their constants both double
        assert torch.allclose(Scorer(model, x, 1, "margin")(x), first, rtol=1e-5)
    # a write that leaves no trace in the version of the tensor, and weights put in its place
    model.head.weight.data.mul_(2)
    model.head.bias = nn.Parameter(2 * model.head.bias.detach())
    with torch.no_grad():
        assert torch.allclose(Scorer(model, x, 1, "margin")(x), first, rtol=1e-5)
