import pytest
import torch
from torch import nn

from otnn.errors import InputError
from otnn.memory import chunk_size


def test_activations_are_counted_where_they_live() -> None:
    """A copy, its mask and its filling of 4 float32 each, then 100 values beside the 2 that follow them."""
    model = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 2)).eval()
    x = torch.rand(1, 4)
    each = 4 * (3 * 4 + 100 + 2)
    assert chunk_size(x, each, model) == 1
    assert chunk_size(x, 7 * each + 1, model) == 7
    with pytest.raises(InputError, match=f"at least {each} bytes, which one perturbed sample needs, got {each - 1}"):
        chunk_size(x, each - 1, model)
    # an activation that is dropped makes room for the next: the peak is of two, not of five
    deep = nn.Sequential(*[nn.Linear(50, 50) for _ in range(5)]).eval()
    assert chunk_size(torch.rand(1, 50), 4 * (3 * 50 + 2 * 50), deep) == 1
    # a backward keeps them all, and gradients beside them
    smooth = nn.Sequential(*[nn.Sequential(nn.Linear(50, 50), nn.Tanh()) for _ in range(5)]).eval()
    with pytest.raises(InputError, match="memory_budget"):
        chunk_size(torch.rand(1, 50), 4 * (3 * 50 + 5 * 50), smooth, gradient=True)
    assert chunk_size(torch.rand(1, 50), 4 * (3 * 50 + 4 * 50), smooth) == 1
