"""Fronts of clean against certified accuracy, and whether one lies above another."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.accuracy.training import RADII
from benchmarks.layers.nets import OTNN

Json = dict[str, Any]
Point = tuple[float, float]
SETTING = ("learning_rate", "margin", "temperature")
CRITERION = (
    "otnn's front lies above a peer's at a radius if for every point of the peer's front, means over the seeds, there "
    "is a setting of otnn that is at least as good in clean and in certified accuracy. The excess of a point is the "
    "least e such that some setting of otnn is at least as good in both once e is added to both: at most 0 where the "
    "point is matched."
)


def front(points: Sequence[Point]) -> list[int]:
    """The numbers of the points that no other dominates, from the largest first coordinate to the smallest.

    One point dominates another if it is at least as large in both coordinates and larger in one; equal points stay.

    Example:
        >>> front([(0.8, 0.5), (0.9, 0.4), (0.8, 0.4), (0.7, 0.6)])
        [1, 0, 3]
    """
    found: list[int] = []
    best = (math.inf, -math.inf)  # the last point of the front: with the largest second coordinate so far
    for number in sorted(range(len(points)), key=lambda number: points[number], reverse=True):
        if points[number][1] > best[1] or points[number] == best:
            found.append(number)
            best = points[number]
    return found


def excess(point: Point, others: Iterable[Point]) -> float:
    """How much must be added to both coordinates of some other point to be at least as good; infinite without one.

    Example:
        >>> excess((0.5, 0.5), [(0.75, 0.25), (0.75, 1.0)])
        -0.25
    """
    return min((max(point[0] - other[0], point[1] - other[1]) for other in others), default=math.inf)


def summary(rows: Sequence[Json]) -> Json:
    """What is told of runs.

    Args:
        rows: of `training.measured`, the same settings for each library.

    Returns:
        "comparison" of otnn with each peer, "fronts" by radius and library, "settings" with their spread over the
        seeds, and "diverged": settings of which a run diverged. Those are in no front, nor are settings that were run
        with fewer seeds than others.
    """
    every, diverged = _settings(rows)
    most = max((len(one["seeds"]) for own in every.values() for one in own), default=0)
    settings = {name: [one for one in own if len(one["seeds"]) == most] for name, own in every.items()}
    names = list(settings)
    fronts = _fronts(settings)
    peers = [name for name in names if name != OTNN] if OTNN in names else []
    return {
        "criterion": CRITERION,
        "comparison": [
            _compared(radius, peer, fronts[radius][peer], settings[OTNN]) for radius in RADII for peer in peers
        ],
        "fronts": {
            radius: {name: [_short(one, radius) for one in fronts[radius][name]] for name in names} for radius in RADII
        },
        "settings": [one for own in every.values() for one in own],
        "diverged": [dict(zip(("library", *SETTING), key, strict=True)) for key in diverged],
    }


def promising(rows: Sequence[Json]) -> set[tuple[Any, ...]]:
    """The library and setting of each point of a library's own front, at any radius."""
    return {
        (name, *(one[part] for part in SETTING))
        for fronts in _fronts(_settings(rows)[0]).values()
        for name, own in fronts.items()
        for one in own
    }


def _settings(rows: Sequence[Json]) -> tuple[dict[str, list[Json]], list[tuple[Any, ...]]]:
    """By library, what each setting reached; and the library and setting of those of which a run diverged."""
    groups: dict[tuple[Any, ...], list[Json]] = defaultdict(list)
    for row in rows:
        groups[(row["library"], *(row[name] for name in SETTING))].append(row)
    diverged = [key for key, own in groups.items() if any("diverged" in row for row in own)]
    settings: dict[str, list[Json]] = {}
    for key, own in groups.items():
        told = settings.setdefault(key[0], [])
        if key not in diverged:
            told.append(_setting(own))
    return settings, diverged


def _fronts(settings: Mapping[str, Sequence[Json]]) -> dict[str, dict[str, list[Json]]]:
    """By radius and library, the settings that no other of that library dominates."""
    return {
        radius: {name: [own[k] for k in front([_point(one, radius) for one in own])] for name, own in settings.items()}
        for radius in RADII
    }


def _setting(rows: Sequence[Json]) -> Json:
    """A setting with the spread of its runs; `by seed` has their points."""
    rows = sorted(rows, key=lambda row: row["seed"])
    return {
        **{name: rows[0][name] for name in ("library", *SETTING)},
        "seeds": [row["seed"] for row in rows],
        "clean": _spread([row["clean"] for row in rows]),
        "certified": {radius: _spread([row["certified"][radius] for row in rows]) for radius in RADII},
        "mean radius": _spread([row["mean radius"] for row in rows]),
        "constant": _spread([row["constant"] for row in rows]),
        "seconds": _spread([row["seconds"] for row in rows]),
    }


def _spread(values: Sequence[float]) -> Json:
    # equal sums of multiples of 1/10,000 are to compare as equal
    return {"mean": round(fmean(values), 9), "min": min(values), "max": max(values), "each": list(values)}


def _point(setting: Json, radius: str) -> Point:
    return setting["clean"]["mean"], setting["certified"][radius]["mean"]


def _of_seed(setting: Json, radius: str, number: int) -> Point:
    return setting["clean"]["each"][number], setting["certified"][radius]["each"][number]


def _short(setting: Json, radius: str) -> Json:
    return {
        **{name: setting[name] for name in SETTING},
        "clean": _ends(setting["clean"]),
        "certified": _ends(setting["certified"][radius]),
    }


def _ends(spread: Mapping[str, Any]) -> Json:
    return {name: spread[name] for name in ("mean", "min", "max")}


def _compared(radius: str, peer: str, points: Sequence[Json], ours: Sequence[Json]) -> Json:
    """Every point of a peer's front against all settings of otnn."""
    found = []
    for one in points:
        by_seed = [
            round(excess(_of_seed(one, radius, k), [_of_seed(own, radius, k) for own in ours]), 9)
            for k in range(len(one["seeds"]))
        ]
        least = excess(_point(one, radius), [_point(own, radius) for own in ours])
        found.append({**_short(one, radius), "excess": _finite(least), "excess by seed": [*map(_finite, by_seed)]})
    open_points = [one for one in found if one["excess"] is None or one["excess"] > 0]
    return {
        "radius": radius,
        "peer": peer,
        "above": bool(found) and not open_points,
        "points": len(found),
        "matched": len(found) - len(open_points),
        "front": found,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: None where otnn has no setting at all."""
    return round(value, 9) if math.isfinite(value) else None
