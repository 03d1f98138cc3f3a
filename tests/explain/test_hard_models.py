"""Models and arguments that a user may well bring: each is explained, or refused with the reason."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.explain import NotApplicableError, attribute
from otnn.explain.scores import Scorer
from otnn.metrics import deletion, robustness_sr
from otnn.models import build

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Applied(nn.Module):
    """A small network behind a function."""

    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(self.first(x))
        return scores


@pytest.mark.parametrize("method", ["saliency", "occlusion", "rise", "lime"])
@pytest.mark.parametrize("score", ["logit", "margin"])
def test_a_model_that_writes_into_its_inputs_is_refused_and_the_images_are_kept(method: str, score: str) -> None:
    x = X.clone()
    with pytest.raises(InputError, match="writes into its inputs"):
        attribute(Applied(lambda inputs: inputs.sub_(0.5)), x, 1, method, score=score)
    assert torch.equal(x, X)
    assert attribute(Applied(lambda inputs: inputs.clone().sub_(0.5)), x, 1, method, score=score).shape[0] == 4


@pytest.mark.parametrize("method", ["saliency", "gradient_input", "integrated_gradients", "smoothgrad"])
def test_scores_without_a_gradient_are_not_applicable(method: str) -> None:
    with pytest.raises(NotApplicableError, match="scores of this model have none"):
        attribute(Applied(lambda inputs: (inputs > 0.5).float()), X, 1, method)
    attribute(Applied(lambda inputs: (inputs > 0.5).float()), X, 1, "occlusion")


def pairs_by_max(x: Tensor) -> Tensor:
    pair = torch.stack(x.flatten(1).chunk(2, 1))
    return torch.cat([pair.amax(0), pair.amin(0)], 1).view_as(x)


@pytest.mark.parametrize("activation", [pairs_by_max, lambda x: x.topk(8, dim=-1).values, lambda x: x * torch.erf(x)])
def test_activations_that_are_written_out_are_no_relu(activation: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotApplicableError, match="also computes"):
        attribute(Applied(activation), X, 1, "guided_backprop")


@pytest.mark.parametrize("target", [1, np.int64(1), torch.tensor(1), torch.full((4,), 1)])
def test_a_target_is_one_class_however_it_is_written(target: Any) -> None:
    assert torch.equal(attribute(Applied(nn.Identity()), X, target), attribute(Applied(nn.Identity()), X, 1))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: attribute(m, X, [1, 1, 1, 1]), "target: expected a tensor of 4 integers"),
        (lambda m: attribute(m, X, 3), r"target: expected integers in 0..2"),
        (lambda m: attribute(m, X.numpy(), 1), "expected a tensor, got ndarray"),
        (lambda m: attribute(m, X, 1, "rise", samples=2.5), "samples: expected an integer >= 1"),
        (lambda m: attribute(m, X, 1, "hsic", grid=2.5), "grid: expected 1 to 8 cells"),
        (lambda m: attribute(m, X, 1, "smoothgrad", sigma="a"), "sigma: expected a share"),
        (lambda m: Scorer(build("dense", (1, 5, 5), 3, widths=(4,)).eval(), X, 1), r"images of shape \(1, 5, 5\)"),
        (lambda m: robustness_sr(Scorer(Applied(lambda x: (x > 0.5).float()), X, 1), X, X), "no gradient"),
    ],
)
def test_bad_arguments_say_what_was_expected(call: Callable[[nn.Module], object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        call(Applied(nn.Identity()))


def test_no_limit_of_memory_is_a_budget() -> None:
    model = Applied(nn.Identity())
    assert torch.equal(
        attribute(model, X, 1, "occlusion", memory_budget=float("inf")), attribute(model, X, 1, "occlusion")
    )
    scorer = Scorer(model, X, 1)
    endless = robustness_sr(scorer, X, X, memory_budget=float("inf"), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        endless.per_sample,
        robustness_sr(scorer, X, X, generator=torch.Generator().manual_seed(0)).per_sample,
        rtol=0,
        atol=1e-3,  # its tolerance
    )


def test_robustness_sr_counts_what_it_passes_and_tells_constant_maps() -> None:
    model = Applied(nn.Identity())
    scorer, passed = Scorer(model, X, model(X).argmax(dim=1)), [0]
    handle = model.register_forward_hook(lambda _, inputs, output: passed.append(len(inputs[0])))
    result = robustness_sr(scorer, X, torch.zeros_like(X), generator=torch.Generator().manual_seed(0))
    handle.remove()
    assert 0 <= sum(passed) - result.forwards <= 3  # beside them: three samples, once, to measure the memory
    assert result.undefined == 4
    with torch.inference_mode():
        again = robustness_sr(scorer, X, torch.zeros_like(X), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.per_sample, result.per_sample)
    assert deletion(scorer, X, torch.zeros_like(X)).undefined == 4
