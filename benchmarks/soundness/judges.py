"""What a network says of points: as executed in float32, or as the exact map of its stored weights."""

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.soundness.execution import Exact, orders, sequential_scores, torch_executions
from benchmarks.soundness.operators import integers
from benchmarks.soundness.search import Points
from otnn.models import Classifier, predict

# How many points of each round are executed in other ways, and how many are decided in exact arithmetic.
EXECUTED, DECIDED = 12, 3
# A multiple of the largest error that float64 may make on a campaign's networks.
DOUBT = 1e-9


def gaps(scores: NDArray[Any], own: int) -> NDArray[Any]:
    """z_own minus the largest other score, (batch,); with one output the score, or minus it for class 0."""
    if scores.shape[1] == 1:
        return scores[:, 0] if own else -scores[:, 0]
    return scores[:, own] - np.delete(scores, own, axis=1).max(axis=1)


class Executed:
    """Judges points by the network as executed in float32.

    Args:
        model: in float32.
        own: the class that should stay.
        rng: draws orders of summation.
        any_order: sum in the orders of `orders` as well, not only as torch does.
    """

    def __init__(self, model: Classifier, own: int, rng: np.random.Generator, *, any_order: bool = True) -> None:
        self.model, self.own = model, own
        self.ways = torch_executions(model)
        self.orders = orders(rng) if any_order else {}

    @torch.no_grad()
    def __call__(self, points: Points) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        images = np.ascontiguousarray(points.reshape(-1, *self.model.input_shape))
        scores = self.model(torch.from_numpy(images))
        low, changed = gaps(scores.double().numpy(), self.own), self._changed(scores)
        few = np.argsort(low, kind="stable")[:EXECUTED]
        for way in self.ways.values():
            changed[few] |= self._changed(way(torch.from_numpy(images[few])))
        for order in self.orders.values():
            changed[few] |= self._changed(torch.from_numpy(sequential_scores(self.model, images[few], order)))
        return low, changed

    def _changed(self, scores: Tensor) -> NDArray[np.bool_]:
        changed: NDArray[np.bool_] = (predict(scores) != self.own).numpy()
        return changed


class ExactMap:
    """A network in float64, and in exact arithmetic where that may err."""

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.wide = copy.deepcopy(model).double()
        self._exact: Exact | None = None  # made when it is first needed

    def gap(self, image: NDArray[np.floating], own: int) -> int:
        """The gap times a power of two; a certificate proves it positive."""
        return int(gaps(self._scores(image)[0][None], own)[0])

    def judge(self, points: Points, own: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Judge points: those whose gap in float64 is not positive, and the lowest ones, in exact arithmetic."""
        images = points.astype(np.float64).reshape(-1, *self.model.input_shape)
        with torch.no_grad():
            low = gaps(self.wide(torch.from_numpy(images)).numpy(), own)
        changed = low < -DOUBT
        for index in {*np.argsort(low, kind="stable")[:DECIDED], *np.flatnonzero(low <= 0)}:
            if abs(low[index]) <= DOUBT:
                changed[index] = self.gap(images[index], own) <= 0
        return low, changed

    def tightness(self, image: NDArray[np.float32], own: int, radius: float) -> tuple[bool, float]:
        """Of a linear network: whether radius <= distance to the boundary, exactly, and their quotient."""
        scores, scale = self._scores(image)
        rows, row_scale = integers(self.model.head.weight.detach().numpy())
        if len(scores) == 1:
            rivals = [(scores[0], rows[0])]
        else:
            rivals = [(scores[own] - scores[k], rows[own] - rows[k]) for k in range(len(scores)) if k != own]
        numerator, denominator = radius.as_integer_ratio()
        holds, quotient = True, 0.0
        for gap, row in rivals:
            # radius^2 ||row / 2^row_scale||^2 <= (gap / 2^scale)^2
            left = numerator**2 * int(row @ row) * 4 ** (scale)
            right = denominator**2 * int(gap) ** 2 * 4**row_scale
            holds = holds and left <= right
            quotient = max(quotient, math.sqrt(left / right) if right else math.inf)
        return holds, quotient

    def _scores(self, image: NDArray[np.floating]) -> tuple[NDArray[np.object_], int]:
        self._exact = self._exact or Exact(self.model)
        return self._exact(image)
