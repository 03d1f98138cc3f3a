"""Tiny networks in float64, and the functions of them that metrics take."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from otnn.explain.scores import Scorer
from otnn.metrics import Explain


def conv(channels: int = 2, classes: int = 3, seed: int = 0) -> nn.Module:
    """A smooth network of pictures of any size."""
    torch.manual_seed(seed)
    return (
        nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(36, classes),
        )
        .double()
        .eval()
    )


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Linear in the flat input: weight (classes, values)."""
    layer = nn.Linear(weight.shape[1], len(weight), dtype=torch.float64)
    layer.weight.data = weight.double()
    layer.bias.data = torch.zeros(len(weight)).double() if bias is None else bias.double()
    return nn.Sequential(nn.Flatten(), layer).eval()


def images(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=seeded(seed), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def score_of(scorer: Scorer, k: int) -> Callable[[Tensor], float]:
    """The score of sample k of a scorer, one sample at a time."""
    return lambda x: float(scorer(x.unsqueeze(0), torch.tensor([k])).detach())


def gradient_of(scorer: Scorer) -> Explain:
    def explain(inputs: Tensor, index: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(scorer(inputs, index).sum(), inputs)
        return gradient

    return explain
