"""What the methods that mask are tried on: a small network, random samples, and budgets of memory."""

import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.memory import chunk_size


def network(inputs: Tensor, classes: int = 3) -> nn.Module:
    """A small network without symmetry, for samples of any rank."""
    features = inputs[0].numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, classes)).to(inputs.dtype).eval()


def samples(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, dtype=dtype)


def budget_for(inputs: Tensor, model: nn.Module, copies: int) -> int:
    """Bytes that hold exactly this many copies."""
    with pytest.raises(InputError) as refusal:
        chunk_size(inputs[:1], 1, model)
    return copies * int(str(refusal.value).split(" bytes")[0].split()[-1])
