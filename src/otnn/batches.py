"""What is said of each sample of a batch, and put back over its values."""

import torch
from torch import Tensor


def sample_norm(batch: Tensor) -> Tensor:
    """The L2 norm of each sample: (n,) of (n, ...).

    Example:
        >>> sample_norm(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]]))
        tensor([5., 0.])
    """
    norm: Tensor = torch.linalg.vector_norm(batch.flatten(1), dim=1)
    return norm


def spread(values: Tensor, batch: Tensor) -> Tensor:
    """One value per sample (n,) as (n, 1, ..., 1), which broadcasts to the batch (n, ...).

    Example:
        >>> spread(torch.zeros(2), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    return values.view(-1, *[1] * (batch.ndim - 1))
