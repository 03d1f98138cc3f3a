"""Small networks from a forward function, for tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


class Net(nn.Module):
    """A network from its forward function (net, inputs) and its parts; plain tensors become buffers."""

    def __init__(self, function: Forward, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Any:
        return self.function(self, inputs)


def linear(outputs: int = 4, inputs: int = 4) -> nn.Linear:
    torch.manual_seed(outputs + 10 * inputs)
    return nn.Linear(inputs, outputs, dtype=torch.float64)
