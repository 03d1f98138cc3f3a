"""Ordinary networks in the manner of torchvision and timm, small: what `otnn.convert` is tested on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """As in torchvision: one in-place activation for both places, `out += identity`."""

    def __init__(self, inside: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or inside != width:
            self.downsample = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width // 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != width:
            self.downsample = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class ResNet(nn.Module):
    """The stem, the pooling and the ending of torchvision's."""

    def __init__(self, block: Callable[..., nn.Module], classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(block(4, 4), block(4, 4))
        self.layer2 = nn.Sequential(block(4, 8, 2), block(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: a batch normalisation that holds its activation, and computes by functions."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0, self.eps
        )
        return self.act(self.drop(x))


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate) / (1 - self.rate)


class TimmBlock(nn.Module):
    def __init__(self, inside: int, width: int, stride: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, 1, 1, bias=False)
        self.bn1 = BatchNormAct2d(width, act())
        self.aa = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding="same", bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop_path = DropPath(0.1)
        self.act2 = act()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != width:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity(),
                nn.Conv2d(inside, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.aa(self.bn1(self.conv1(x)))
        x = self.drop_path(self.bn2(self.conv2(x)))
        x = x + self.downsample(shortcut)
        return self.act2(x)


class TimmResNet(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, 2, 1, bias=False)
        self.bn1 = nn.GroupNorm(1, 5)
        self.layer1 = TimmBlock(5, 5, 1, nn.SiLU)
        self.layer2 = TimmBlock(5, 8, 2, nn.GELU)
        self.drop_rate = 0.2
        self.fc = nn.Linear(8, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), kernel_size=3, stride=2, padding=1)
        return self.layer2(self.layer1(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x).mean((2, 3))
        x = F.dropout(x, p=self.drop_rate, training=self.training)
        return self.fc(x)


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (4, "M", 6, 6, "M"):
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(24, 10), nn.ReLU(True), nn.Dropout(), nn.Linear(10, 7), nn.ReLU(True), nn.Linear(7, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.view(x.size(0), -1))


class MLP(nn.Module):
    """By functions and methods, with an input scaled as usual, and probabilities at the end."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.4))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))
        self.first = nn.Linear(3 * 25, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Linear(12, 12)
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x - self.mean) / self.std).flatten(1)
        x = torch.tanh(self.norm(self.first(x)))
        x = torch.add(x, self.second(x)).relu()
        return F.log_softmax(self.last(x), dim=1)


class Signals(nn.Module):
    """One-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(2, 4, 5, padding=2),
            nn.BatchNorm1d(4),
            nn.LeakyReLU(0.1),
            nn.MaxPool1d(3, 2, padding=1),
            nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
            nn.ELU(),
            nn.AvgPool1d(2),
            nn.AdaptiveAvgPool1d(1),
        )
        self.fc = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(self.body(x).flatten(start_dim=1)))


class Inception(nn.Module):
    """Branches of one input side by side, pooling with stride 1, and a shortcut of stride 2 on an odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)
        self.three = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Hardswish())
        self.project = nn.Conv2d(3, 2, 1)
        self.skip = nn.Conv2d(10, 6, 1, stride=2)
        self.way = nn.Conv2d(10, 6, 3, stride=2, padding=1)
        self.norm = nn.InstanceNorm2d(6, affine=True)
        self.up = nn.Upsample(scale_factor=2)
        self.fc = nn.Linear(6 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.project(F.max_pool2d(x, 3, stride=1, padding=1))
        x = torch.cat([self.one(x), self.three(x), pooled], 1)
        x = F.elu(self.norm(self.way(x) + self.skip(x)))
        x = F.avg_pool2d(self.up(x), 3, stride=2) * 2.0
        return self.fc(torch.reshape(x, (x.shape[0], -1)))


# Each with the shape of a sample, and the names of what must change.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "basic": (
        lambda: ResNet(BasicBlock),
        (3, 20, 20),
        {"maxpool", "layer1.1.iadd_1", "layer2.0.downsample.0", "layer2.0.downsample.1", "fc", "avgpool"},
    ),
    "bottleneck": (lambda: ResNet(Bottleneck), (3, 17, 23), {"maxpool", "layer2.0.downsample.0", "fc"}),
    "timm": (TimmResNet, (3, 18, 18), {"bn1", "layer1.bn1.act", "layer2.drop_path", "fc"}),
    "vgg": (VGG, (3, 11, 12), {"features.1", "classifier.2", "avgpool"}),
    "mlp": (MLP, (3, 5, 5), {"norm", "log_softmax", "truediv", "add", "relu", "tanh"}),
    "signals": (Signals, (2, 22), {"body.3", "body.6", "body.7", "sigmoid", "fc"}),
    "inception": (Inception, (3, 7, 7), {"cat", "add", "skip", "up", "max_pool2d", "mul", "elu"}),
}


def modules_of_torch(model: nn.Module) -> dict[str, Any]:
    """The layers of torch by name, without containers and what does nothing."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if not any(True for _ in layer.children()) and not isinstance(layer, nn.Identity)
    }
