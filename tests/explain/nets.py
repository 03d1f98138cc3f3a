"""Small networks of the explanation tests."""

import torch
from torch import Tensor, nn

from otnn.models import Classifier


class Counting(nn.Module):
    """Passes on to a module, and counts the samples that go forward and backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.forwards = self.backwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += len(inputs)
        outputs: Tensor = self.module(inputs)
        if outputs.requires_grad:
            outputs.register_hook(self._count)
        return outputs

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def linear(shape: tuple[int, ...], outputs: int = 3) -> nn.Module:
    """z = W x + b in float64, the closed form of most methods."""
    torch.manual_seed(1)
    features = torch.Size(shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(features, outputs)).double().eval()


def weight(model: nn.Module, target: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The rows of the targets in the shape of the inputs."""
    return model[1].weight.detach()[target].view(len(target), *shape)  # type: ignore[index, no-any-return]


def relu_net(outputs: int = 4) -> nn.Module:
    """Convolutions and ReLU on (n, 2, 8, 8) images, smooth nowhere: nothing is equal by accident."""
    torch.manual_seed(2)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(96, outputs)),
    ).eval()


def images(count: int, channels: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(3), dtype=dtype)


def classifier(weight: Tensor, bias: Tensor, body: nn.Module | None = None, *, multilabel: bool = False) -> Classifier:
    """A classifier of 1 x 1 x d images in float64, linear in what the body makes of the d values."""
    head = nn.Linear(weight.shape[1], len(weight)).double()
    head.weight.data, head.bias.data = weight.double(), bias.double()
    layers = [nn.Flatten()] if body is None else [nn.Flatten(), body]
    return Classifier(nn.Sequential(*layers), head, (1, 1, weight.shape[1]), multilabel=multilabel).eval()


def rows(*values: list[float]) -> Tensor:
    """1 x 1 x d images in float64."""
    return torch.tensor(values, dtype=torch.float64).view(len(values), 1, 1, -1)
