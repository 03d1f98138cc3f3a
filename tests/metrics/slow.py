"""Every metric once more from its definition, with loops over masks and pixels: the oracle of the fast ones."""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

Score = Callable[[Tensor], float]  # of one sample


def pixel(map_: Tensor, place: tuple[int, ...], signed: bool) -> float:
    """The value of one pixel of a map (channels, ...)."""
    channels = [float(map_[(c, *place)]) for c in range(len(map_))]
    return sum(channels) / len(channels) if signed else math.sqrt(sum(v * v for v in channels))


def pixels_of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(int(k) for k in place) for place in np.ndindex(*shape)]


def curve(
    score: Score, x: Tensor, map_: Tensor, steps: int, baseline: Tensor, *, insert: bool, signed: bool = True
) -> tuple[list[float], list[float]]:
    """Shares and scores of Deletion or Insertion, of a sample (channels, ...) without ties."""
    order = sorted(pixels_of(tuple(x.shape[1:])), key=lambda place: -pixel(map_, place, signed))
    shares, scores = [], []
    steps = min(steps, len(order))
    for step in range(steps + 1):
        count = math.floor(step * len(order) / steps + 0.5)
        current = baseline.clone() if insert else x.clone()
        for place in order[:count]:
            for c in range(len(x)):
                current[(c, *place)] = x[(c, *place)] if insert else baseline[(c, *place)]
        shares.append(count / len(order))
        scores.append(score(current))
    return shares, scores


def area(shares: list[float], scores: list[float]) -> float:
    return sum((b - a) * (s + t) / 2 for a, b, s, t in zip(shares, shares[1:], scores, scores[1:], strict=False))


def mu_fidelity(
    score: Score, x: Tensor, map_: Tensor, hidden: Tensor, baseline: Tensor, *, signed: bool = True
) -> float:
    """Of one picture (channels, height, width); hidden (masks, g, g) bool. NaN counts as 0."""
    _, height, width = x.shape
    drops, sums = [], []
    for mask in hidden:
        g, w = mask.shape
        current, total = x.clone(), 0.0
        for i, j in pixels_of((height, width)):
            if mask[i * g // height, j * w // width]:
                current[:, i, j] = baseline[:, i, j]
                total += pixel(map_, (i, j), signed)
        drops.append(score(x) - score(current))
        sums.append(total)
    if len(set(sums)) == 1 or len(set(drops)) == 1:
        return 0.0
    return float(spearmanr(sums, drops).statistic)


def unit(values: np.ndarray) -> np.ndarray:
    norm = math.sqrt(sum(float(v) ** 2 for v in values))
    return values / norm if norm else values


def flat(map_: Tensor, signed: bool = True) -> np.ndarray:
    return np.array([pixel(map_, place, signed) for place in pixels_of(tuple(map_.shape[1:]))])


def distances(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    return float(np.sqrt(((unit(first) - unit(second)) ** 2).sum())), 1 - float(spearmanr(first, second).statistic)


def stability(explain: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor) -> tuple[float, float]:
    own = flat(explain(x))
    pairs = [distances(own, flat(explain(x + one))) for one in noise]
    return float(np.mean([p[0] for p in pairs])), float(np.mean([p[1] for p in pairs]))


def e_robustness(
    explain: Callable[[Tensor], Tensor], x: Tensor, towards: Tensor, largest: float, bisections: int
) -> float:
    own = flat(explain(x))

    def stays(radius: float) -> bool:
        return all(distances(own, flat(explain(x + radius * d)))[1] < 0.1 for d in towards)

    if stays(largest):
        return largest
    low, high = 0.0, largest
    for _ in range(bisections):
        middle = (low + high) / 2
        low, high = (middle, high) if stays(middle) else (low, middle)
    return low


def jpeg_bytes(map_: Tensor) -> int:
    values = flat(map_, signed=False).reshape(map_.shape[1:])
    span = values.max() - values.min()
    grey = np.zeros(values.shape, np.uint8)
    for place in np.ndindex(*values.shape):
        grey[place] = round(255 * (values[place] - values.min()) / span) if span else 0
    with io.BytesIO() as buffer:
        Image.fromarray(grey).save(buffer, "JPEG", quality=95)
        return len(buffer.getvalue())


def entropy(map_: Tensor) -> float:
    values = flat(map_, signed=False)
    return -sum(v / values.sum() * math.log(v / values.sum()) for v in values if v > 0)


def gini(map_: Tensor) -> float:
    """Half the relative mean absolute difference."""
    values = flat(map_, signed=False)
    return sum(abs(a - b) for a in values for b in values) / (2 * len(values) ** 2 * values.mean())


def share_inside(map_: Tensor, region: Tensor, share: float) -> float:
    places = sorted(pixels_of(tuple(map_.shape[1:])), key=lambda place: -pixel(map_, place, False))
    count = max(1, round(share * len(places)))
    return sum(bool(region[place]) for place in places[:count]) / count


def distance_in_plane(changed: Callable[[Tensor], Tensor], x: Tensor, first: int, second: int, reach: float) -> float:
    """Smallest change of two values of one sample that changes the class, by a search over angles and lengths."""
    angles = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)[:-1]
    lengths = torch.linspace(0, reach, 2001, dtype=torch.float64)[1:]
    best = math.inf
    for angle in angles:
        moved = x.flatten().repeat(len(lengths), 1)
        moved[:, first] += lengths * angle.cos()
        moved[:, second] += lengths * angle.sin()
        hit = changed(moved.view(-1, *x.shape)).nonzero()
        if len(hit):
            best = min(best, float(lengths[int(hit[0])]))
    return best
