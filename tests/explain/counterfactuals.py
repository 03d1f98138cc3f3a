"""What the tests of counterfactuals share."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from otnn.explain import Counterfactual
from otnn.lipschitz import LipschitzBound
from otnn.models import Classifier
from tests.explain.nets import classifier

ONE = LipschitzBound(1.0, ())
SAMPLE_FIELDS = [field.name for field in fields(Counterfactual) if field.name not in ("label", "radius_reason")]
# Where numbers that were refined in float64 agree
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def images(count: int, values: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 1, values, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three_classes() -> Classifier:
    weight = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0.5, 0.5, 1.0, -1.0]])
    return classifier(weight, torch.tensor([0.1, -0.2, 0.0]))


def assert_alike(first: Counterfactual, second: Counterfactual, samples: Any = slice(None)) -> None:
    """Two results, the first on all samples and the second on some, agree in every field."""
    for name in SAMPLE_FIELDS:
        one, other = getattr(first, name), getattr(second, name)
        if name == "status":
            assert [one[k] for k in range(len(one))][samples] == list(other)
        else:
            assert torch.allclose(one[samples].double(), other.double(), equal_nan=True, **CLOSE), name
