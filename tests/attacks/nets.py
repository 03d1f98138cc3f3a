"""Small models of the attack tests, and the closed forms of linear ones by independent, slow ways."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linprog, minimize_scalar
from torch import Tensor, nn


class Plain(nn.Module):
    """Any function of a batch of rows as a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs.flatten(1))


class Batches(nn.Module):
    """Passes on to a module and remembers how large each batch was."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.sizes = module, list[int]()
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs))
        return self.module(inputs)  # type: ignore[no-any-return]


def linear(outputs: int, features: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """z = W x + b, rows of different lengths, b such that the middle of the box has small scores."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Linear(features, outputs).to(dtype).eval()
    weight = torch.randn(outputs, features, generator=draw, dtype=torch.float64)
    weight *= 0.5 + torch.rand(outputs, 1, generator=draw, dtype=torch.float64)
    bias = 0.2 * torch.randn(outputs, generator=draw, dtype=torch.float64) - weight.sum(dim=1) / 2
    model.weight.data, model.bias.data = weight.to(dtype), bias.to(dtype)
    return model


def rows(count: int, features: int = 6, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, features, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relu_net(classes: int = 4, features: int = 6) -> nn.Module:
    draw = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(features, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, classes))
    for parameter in model.parameters():
        scale = 1.5 / parameter.shape[-1] ** 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return model.eval()


def predicted(model: nn.Module, inputs: Tensor) -> Tensor:
    scores = model(inputs).detach()
    return (scores[:, 0] > 0).long() if scores.shape[1] == 1 else scores.argmax(dim=1)


def planes(model: nn.Linear, x: Tensor, label: int) -> list[tuple[np.ndarray, float]]:
    """(w, c) of each rival: it is ahead where w . change >= c."""
    weight, bias = model.weight.detach().double().numpy(), model.bias.detach().double().numpy()
    if len(weight) == 1:
        weight, bias = np.stack([-weight[0] / 2, weight[0] / 2]), np.array([-bias[0] / 2, bias[0] / 2])
    scores = weight @ x.double().numpy() + bias
    return [(weight[j] - weight[label], scores[label] - scores[j]) for j in range(len(weight)) if j != label]


def plane_distance(w: np.ndarray, c: float, x: np.ndarray, norm: str, box: bool) -> float:
    """The distance of a half-space w . change >= c > 0, in the box by the change clamp(t d) that reaches it."""
    direction = w if norm == "l2" else np.sign(w)
    if not box:
        return c / (np.linalg.norm(w) if norm == "l2" else np.abs(w).sum())
    low, high = 0.0, 1e6

    def change(t: float) -> np.ndarray:
        return np.clip(x + t * direction, 0, 1) - x

    if w @ change(high) < c:
        return np.inf
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if w @ change(middle) >= c else (middle, high)
    return float(np.linalg.norm(change(high)) if norm == "l2" else np.abs(change(high)).max())


def nearest_rival_distance(model: nn.Linear, x: Tensor, label: int, norm: str, box: bool) -> float:
    return min(plane_distance(w, c, x.double().numpy(), norm, box) for w, c in planes(model, x, label))


def region_distance(model: nn.Linear, x: Tensor, target: int, norm: str) -> float:
    """The distance of the region where the target leads all others: over all sets of rivals that tie with it in L2."""
    cuts = [(-w, -c) for w, c in planes(model, x, target)]  # w . change >= c for every other class
    if norm == "linf":
        features = len(x)
        matrix = np.array(
            [[*-w, 0.0] for w, _ in cuts] + [[*s * row, -1.0] for s in (1, -1) for row in np.eye(features)]
        )
        bounds = [-c for _, c in cuts] + [0.0] * 2 * features
        cost = [0.0] * features + [1.0]
        return float(linprog(cost, matrix, bounds, bounds=[(None, None)] * features + [(0, None)]).fun)
    best = np.inf
    for size in range(1, len(cuts) + 1):
        for tied in itertools.combinations(cuts, size):
            rows_ = np.array([w for w, _ in tied])
            change = np.linalg.lstsq(rows_, np.array([c for _, c in tied]), rcond=None)[0]
            if all(w @ change >= c - 1e-9 for w, c in cuts):
                best = min(best, float(np.linalg.norm(change)))
    return best


def ellipse_distance(axes: np.ndarray, x: np.ndarray) -> float:
    """From a point outside to the ellipse sum (x_i / a_i)^2 = 1 in the plane, by its angle."""

    def away(angle: float) -> float:
        return float(np.linalg.norm(axes * np.array([np.cos(angle), np.sin(angle)]) - x))

    start = min(np.linspace(0, 2 * np.pi, 400), key=away)
    return float(
        minimize_scalar(away, bounds=(start - 0.05, start + 0.05), method="bounded", options={"xatol": 1e-12}).fun
    )
