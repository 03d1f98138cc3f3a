"""Batches of random scores with labels."""

import torch
from torch import Tensor

PRIORS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MARGINS = torch.tensor([0.3, 0.1, 0.7], dtype=torch.float64)


def binary(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % 3 == 0).long()
    return torch.randn(count, generator=generator, dtype=torch.float64), labels


def several(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64), torch.arange(count) % 3
