"""What the tests of attacks share."""

from typing import Any

import torch
from torch import Tensor, nn

from otnn.data import Dataset
from otnn.models import Classifier
from otnn.run.attacked import Victim
from otnn.run.folder import Run

Told = tuple[Run, dict[str, Any]]
OWN = ("step", "pgd")
BOTH = ("otnn", "unconstrained")
HOW: dict[str, Any] = {"norm": "l2", "loss": "margin", "box": False}


def chosen(data: Dataset, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    index = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))[:samples]
    return data.test.images[index], data.test.labels[index]


def linear(score: Tensor, device: str = "cpu") -> tuple[Victim, Tensor]:
    """A linear network on 2x2 images, whose certificate is the distance to its boundary."""
    head = nn.Linear(4, 1, bias=False)
    head.weight.data = torch.tensor([[3.0, -4.0, 12.0, 0.0]])  # of norm 13
    model = Classifier(nn.Sequential(nn.Flatten()), head, (1, 2, 2)).eval()
    images = torch.zeros(len(score), 1, 2, 2)
    images[:, 0, 1, 0] = score.float() / 12
    return Victim("linear", model, images, (score > 0).long(), HOW), score / 13
