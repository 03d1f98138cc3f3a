"""The collapse of attacks: closed forms of linear models, an independent loop, and what is undefined."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from otnn.attacks.collapse import collapse
from otnn.errors import InputError


def test_the_step_to_the_boundary_of_a_linear_model_has_cosine_and_ratio_1() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    inputs = torch.randn(20, 3, 4, generator=generator, dtype=torch.float64)
    # score <w, x>: the gradient is w, the distance to the boundary |<w, x>| / ||w||
    score = (inputs * weight).sum(dim=(1, 2))
    radius = score.abs() / weight.norm()
    direction = -score.sign().view(-1, 1, 1) * weight
    points = inputs + radius.view(-1, 1, 1) * direction / weight.norm()
    assert torch.allclose((points * weight).sum(dim=(1, 2)), torch.zeros(20, dtype=torch.float64), atol=1e-12)
    found = collapse(inputs, points, direction, radius)
    assert torch.allclose(found.cosine, torch.ones(20, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found.ratio, torch.ones(20, dtype=torch.float64), atol=1e-12)
    assert (found.samples, found.successes, found.no_cosine, found.no_ratio) == (20, 20, 0, 0)
    # twice as far, the wrong way
    back = collapse(inputs, inputs - 2 * (points - inputs), direction, radius)
    assert torch.allclose(back.cosine, -torch.ones(20, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(back.ratio, torch.full((20,), 2.0, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_agrees_with_a_loop_in_numpy(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, points, direction = (torch.randn(15, 2, 3, 3, generator=generator, dtype=dtype) for _ in range(3))
    radius = torch.rand(15, generator=generator, dtype=torch.float64) + 0.1
    success = torch.rand(15, generator=generator) < 0.6
    found = collapse(inputs, points, direction, radius, success)
    for k in range(15):
        change = points[k].double().numpy().ravel() - inputs[k].double().numpy().ravel()
        way = direction[k].double().numpy().ravel()
        if not success[k]:
            assert math.isnan(found.cosine[k])
            assert math.isnan(found.ratio[k])
            continue
        cosine = change @ way / np.linalg.norm(change) / np.linalg.norm(way)
        assert float(found.cosine[k]) == pytest.approx(cosine, abs=1e-12)
        assert float(found.ratio[k]) == pytest.approx(np.linalg.norm(change) / float(radius[k]), rel=1e-12)
    assert found.cosine.dtype == found.ratio.dtype == torch.float64
    assert found.successes == int(success.sum()) < found.samples == 15


def test_what_is_undefined_is_nan_and_counted() -> None:
    inputs = torch.zeros(6, 2)
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [torch.nan, 0.0], [1.0, 0.0], [torch.inf, 0.0]])
    direction = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [torch.nan, 0.0], [1.0, 0.0]])
    radius = torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5, 0.5])
    found = collapse(inputs, points, direction, radius)
    assert found.cosine.isnan().tolist() == [True, True, False, True, True, True]
    assert found.ratio.isnan().tolist() == [False, False, True, True, False, True]
    assert (found.successes, found.no_cosine, found.no_ratio) == (6, 5, 3)
    nothing = collapse(inputs, points, direction, radius, torch.zeros(6, dtype=torch.bool))
    assert (nothing.successes, nothing.no_cosine, nothing.no_ratio) == (0, 0, 0)
    assert nothing.cosine.isnan().all()


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200])
def test_no_square_vanishes_or_overflows(scale: float) -> None:
    inputs = torch.zeros(1, 2, dtype=torch.float64)
    points, direction = torch.tensor([[3.0, 4.0]]).double() * scale, torch.tensor([[4.0, 3.0]]).double() * scale
    found = collapse(inputs, points, direction, torch.tensor([1.0]))
    assert float(found.cosine) == pytest.approx(0.96, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": torch.zeros(0, 3)}, "at least one sample"),
        ({"inputs": torch.full((2, 3), torch.nan)}, "NaN or infinite"),
        ({"adversarial": torch.zeros(2, 4)}, r"adversarial: expected the shape of the inputs \(2, 3\), got \(2, 4\)"),
        ({"direction": torch.zeros(3)}, r"direction: expected the shape of the inputs \(2, 3\)"),
        ({"radius": torch.zeros(3)}, r"radius: expected one for each sample \(2,\)"),
        ({"radius": torch.tensor([0.0, -1.0])}, "radius: expected finite radii >= 0"),
        ({"radius": torch.tensor([0.0, torch.nan])}, "radius: expected finite radii >= 0"),
        ({"success": torch.ones(2)}, "success: expected booleans"),
        ({"success": torch.ones(1, dtype=torch.bool)}, r"success: expected one for each sample \(2,\)"),
    ],
)
def test_what_cannot_be_used_is_refused(changes: dict[str, Tensor], message: str) -> None:
    arguments: dict[str, Any] = {
        "inputs": torch.zeros(2, 3),
        "adversarial": torch.zeros(2, 3),
        "direction": torch.zeros(2, 3),
        "radius": torch.zeros(2),
    }
    with pytest.raises(InputError, match=message):
        collapse(**{**arguments, **changes})
