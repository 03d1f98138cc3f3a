"""A search over rounding directions: points of a floating-point grid strictly inside a ball, scored as executed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.floating]
# Of points (batch, pixels): the numbers to lower, and which of them changed the prediction.
Judge = Callable[[Points], tuple[NDArray[np.float64], NDArray[np.bool_]]]

BATCH, PARENTS = 64, 8


@dataclass(frozen=True)
class Ball:
    """An open ball of images.

    Attributes:
        centre: (pixels,), numbers of float32.
        radius: positive.
    """

    centre: NDArray[np.float32]
    radius: float

    def holds(self, points: Points) -> NDArray[np.bool_]:
        """Which of some points (batch, pixels) are inside for certain: distances are found in extended precision.

        Differences, squares and sums err by at most (pixels + 4) units; what is nearer to the sphere counts as outside.
        """
        distances = np.square(np.subtract(points, self.centre, dtype=np.longdouble)).sum(axis=1)
        unsure = (len(self.centre) + 8) * np.finfo(np.longdouble).eps
        inside: NDArray[np.bool_] = distances * (1 + unsure) < np.square(np.longdouble(self.radius))
        return inside


@dataclass
class Found:
    """What a search found: trials are points inside the ball, changes those with another prediction."""

    trials: int = 0
    changes: int = 0

    def __add__(self, other: "Found") -> "Found":
        return Found(self.trials + other.trials, self.changes + other.changes)


def search(
    ball: Ball,
    directions: Sequence[NDArray[np.float64]],
    judge: Judge,
    rng: np.random.Generator,
    *,
    trials: int,
    dtype: type[np.floating],
    stop: bool = False,
) -> Found:
    """Try points of a grid near the sphere, then neighbours of the lowest of them.

    Args:
        ball: in which the prediction should not change.
        directions: unit vectors (pixels,) along which the score falls.
        judge: scores points.
        rng: draws the roundings.
        trials: how many points to try.
        dtype: of the grid.
        stop: at the first change.
    """
    found = Found()
    parents: Points = np.empty((0, len(ball.centre)), dtype=dtype)
    scores = np.empty(0)
    step = float(np.finfo(dtype).eps)  # how far inside the sphere points are aimed at; adapted
    explore = trials // 3
    while found.trials < trials:
        if found.trials < explore or not len(parents):
            along = np.stack([directions[index] for index in rng.integers(len(directions), size=BATCH)])
            depth = np.abs(rng.normal(size=(BATCH, 1))) * step
            aim = ball.centre - along * np.maximum(ball.radius - depth, 0)
        else:
            aim = parents[rng.integers(len(parents), size=BATCH)]
        points = _rounded(aim.astype(dtype), rng)
        inside = ball.holds(points)
        step *= 2 if inside.mean() < 0.3 else 0.7 if inside.mean() > 0.9 else 1
        points = points[inside][: trials - found.trials]
        if not len(points):
            points = ball.centre[None].astype(dtype)  # the centre itself, at least
        lows, changed = judge(points)
        found.trials += len(points)
        found.changes += int(changed.sum())
        parents, scores = np.concatenate([parents, points]), np.concatenate([scores, lows])
        best = np.argsort(scores, kind="stable")[:PARENTS]
        parents, scores = parents[best], scores[best]
        if stop and found.changes:
            break
    return found


def _rounded(points: Points, rng: np.random.Generator) -> Points:
    """Move some of the coordinates up or down by one unit of the last place."""
    share = 10.0 ** rng.uniform(-2.5, 0, size=(len(points), 1))
    moved = rng.random(points.shape) < share
    ends = np.where(rng.random(points.shape) < 0.5, points.dtype.type(-np.inf), points.dtype.type(np.inf))
    return np.where(moved, np.nextafter(points, ends), points)
