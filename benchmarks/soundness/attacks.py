"""Campaign `attacks`: a search for adversarial points below the certified radii of trained networks.

Every test image is attacked away from the class that is certified, by the gradient step and PGD within a ball just
below its radius, and some by the attacks of the literature. A point breaks a certificate if

* it is nearer than the radius of the exact map, and that map (in float64) gives it to another class; or
* it is nearer than the radius of the network as executed in float32, and that network does.

What only float32 turns below the radius of the exact map is the rounding of float32, counted apart.

Distances are computed in float64, and there is no tolerance. The points may leave the pixel box: what lies inside is
among them. PGD just above the radius says whether the search has any force.
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.campaign import Campaign, Json
from otnn.attacks.outcome import evaluate
from otnn.attacks.table import ATTACKS, libraries
from otnn.certify import certify
from otnn.errors import InputError
from otnn.models import Classifier
from otnn.run.folder import Run, open_run
from otnn.run.train import dataset_of

# Balls in which is searched, times the certified radius: just below it, and above
BELOW, ABOVE = 1 - 1e-6, (1.05, 1.25)
# On all images
FAST: Mapping[str, Json] = {"step": {}, "pgd": {"steps": 20}}
# On some images
SLOW: Mapping[str, Json] = {
    "minimal": {},
    "carlini_wagner": {"steps": 60, "searches": 4},
    "ddn": {"steps": 50},
    "fab": {"steps": 20},
    "square": {"queries": 300},
}
# Images of a block
MANY, FEW = 500, 125


@dataclass(frozen=True)
class Attempt:
    """An attack with its settings.

    Attributes:
        attack: of `otnn.attacks.ATTACKS`.
        ball: times the certified radius; None for an attack that looks for the nearest point.
        settings: of the attack.
    """

    attack: str
    ball: float | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Piece:
    """One block: attempts on some images of a run.

    Attributes:
        run: the number of the run.
        attempts: on each image.
        start: the first image of the order that the seed gives.
        stop: past the last.
    """

    run: int
    attempts: tuple[Attempt, ...]
    start: int
    stop: int


def attacks_campaign(
    runs: Sequence[Path], data_dir: Path | None = None, seed: int = 0, images: int = 0, few: int = 500
) -> Campaign:
    """Attack the OTNN of some runs.

    Args:
        runs: their folders.
        data_dir: where the data lie now, if they have moved.
        seed: of the order of the images, and of the attacks.
        images: for the gradient step and PGD; 0 takes all test images.
        few: images for the others, and for the balls above the radius.

    Raises:
        InputError: no run, one that cannot be opened, an attack that is not installed, or numbers below 0.
    """
    if not runs:
        raise InputError("expected at least one run folder, got none")
    for name, value in (("images", images), ("few", few)):
        if value < 0:
            raise InputError(f"{name}: expected at least 0, got {value}")
    sources = {name: ATTACKS[name].source for name in SLOW if few and ATTACKS[name].source != "otnn"}
    for name, source in sources.items():
        if find_spec(source) is None:
            raise InputError(
                f'{name} needs {source}, which is not installed: pip install -c constraints.txt ".[attacks]"'
            )
    opened = [open_run(run) for run in runs]
    below = tuple(Attempt(name, BELOW, how) for name, how in FAST.items())
    above = tuple(Attempt(name, ball, how) for ball in ABOVE for name, how in FAST.items())
    slow = tuple(Attempt(name, None if ATTACKS[name].minimal else BELOW, how) for name, how in SLOW.items())
    pieces = []
    for number, run in enumerate(opened):
        total = run.results()["data"]["test"]
        pieces += _pieces(number, below, min(images or total, total), MANY)
        pieces += _pieces(number, (*slow, *above), min(few, total), FEW)
    names = [run.path.absolute().name for run in opened]
    if len(set(names)) < len(names):
        raise InputError(f"runs: expected folders of different names, which tell them apart, got {', '.join(names)}")
    told = {
        "seed": seed,
        "runs": {
            name: run.manifest["files"]["networks/otnn.safetensors"] for name, run in zip(names, opened, strict=True)
        },
        "images": images,
        "few": few,
        "attacks": {name: dict(how) for name, how in {**FAST, **SLOW}.items()},
        "libraries": libraries(sources),
    }
    block = partial(_block, pieces=tuple(pieces), runs=tuple(runs), data_dir=data_dir, seed=seed)
    return Campaign("attacks", told, len(pieces), block, partial(_summary, pieces=pieces, names=names))


def _pieces(run: int, attempts: tuple[Attempt, ...], count: int, size: int) -> list[Piece]:
    return [Piece(run, attempts, start, min(start + size, count)) for start in range(0, count, size)]


@lru_cache(maxsize=4)
def _loaded(path: Path, data_dir: Path | None, seed: int) -> tuple[Classifier, Classifier, Tensor]:
    """The network, the same in float64, and the test images in the order of the seed."""
    run: Run = open_run(path)
    images = dataset_of(run, data_dir).test.images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return run.network("otnn"), run.network("otnn").double(), images[order]


def _block(number: int, pieces: Sequence[Piece], runs: Sequence[Path], data_dir: Path | None, seed: int) -> Json:
    piece = pieces[number]
    model, exact, every = _loaded(runs[piece.run], data_dir, seed)
    target = target_of(model, exact, every[piece.start : piece.stop])
    drawn = seed + number  # another for each block
    rows = [search(target, attempt, drawn) for attempt in piece.attempts]
    return {"seed": drawn, "images": piece.stop - piece.start, "rows": rows}


@dataclass(frozen=True)
class Target:
    """Images with what is certified of them, those of radius 0 left out.

    Attributes:
        model: the network in float32.
        exact: the same in float64.
        images: (n, channels, height, width) in [0, 1].
        labels: (n,) the class that is certified, right or wrong.
        radius: (n,) of the exact map.
        executed: (n,) of the network as executed in float32; 0 where it has another prediction.
    """

    model: Classifier
    exact: Classifier
    images: Tensor
    labels: Tensor
    radius: Tensor
    executed: Tensor


def target_of(model: Classifier, exact: Classifier, images: Tensor) -> Target:
    """Certify images (n, channels, height, width)."""
    real, executed = certify(model, images), certify(model, images, arithmetic="float32")
    chosen = real.radius > 0
    rounded = torch.where(executed.prediction == real.prediction, executed.radius, 0.0)
    return Target(model, exact, images[chosen], real.prediction[chosen], real.radius[chosen], rounded[chosen])


def search(target: Target, attempt: Attempt, seed: int) -> Json:
    """What one attack finds; the seed is of what it draws."""
    images, labels, radius = target.images, target.labels, target.radius
    if not len(images):
        counts = dict.fromkeys(("certified", "violations", "rounding", "turned", "not_finite", "seconds"), 0)
        return {**counts, "nearest": None, "deepest": None}
    attack, how = ATTACKS[attempt.attack], dict(attempt.settings)
    if attack.draws:
        how["generator"] = torch.Generator().manual_seed(seed)
    limit = () if attempt.ball is None else (attempt.ball * radius,)
    start = time.perf_counter()
    points = attack.function(target.model, images, labels, *limit, norm="l2", box=False, **how)
    seconds = time.perf_counter() - start
    in_float32 = evaluate(target.model, images, labels, points)
    in_float64 = evaluate(target.exact, images.double(), labels, points.double())
    distance, turned = in_float64.distance, in_float32.success | in_float64.success
    broken = (in_float64.success & (distance < radius)) | (in_float32.success & (distance < target.executed))
    rounding = turned & (distance < radius) & ~broken
    turned &= ~rounding
    return {
        "certified": len(images),
        "violations": int(broken.sum()),
        "rounding": int(rounding.sum()),
        "deepest": _least((distance / radius)[rounding]),
        "turned": int(turned.sum()),
        "not_finite": int((~(in_float32.finite & in_float64.finite)).sum()),
        "nearest": _least((distance / radius)[turned]),
        "seconds": round(seconds, 3),
    }


def _least(ratios: Tensor) -> float | None:
    return float(ratios.min()) if len(ratios) else None


def _summary(blocks: Sequence[Json], pieces: Sequence[Piece], names: Sequence[str]) -> Json:
    groups: dict[tuple[int, str, float | None], list[Json]] = defaultdict(list)
    seeds: dict[tuple[int, str, float | None], list[int]] = defaultdict(list)
    for piece, block in zip(pieces, blocks, strict=True):
        for attempt, row in zip(piece.attempts, block["rows"], strict=True):
            key = (piece.run, attempt.attack, attempt.ball)
            groups[key].append({"images": block["images"], **row})
            seeds[key].append(block["seed"])
    results = []
    for (run, attack, ball), own in groups.items():
        told: Json = {"run": names[run], "attack": attack, "ball over radius": ball}
        counted = ("images", "certified", "violations", "rounding", "turned", "not_finite")
        told |= {key.replace("_", " "): sum(row[key] for row in own) for key in counted}
        for key, name in (("nearest", "nearest over radius"), ("deepest", "rounding over radius")):
            told[name] = min((row[key] for row in own if row[key] is not None), default=None)
        told["seconds"] = round(math.fsum(row["seconds"] for row in own), 1)
        told["seeds"] = seeds[run, attack, ball]
        results.append(told)
    return {
        "violations": sum(row["violations"] for row in results),
        "not finite": sum(row["not finite"] for row in results),
        "seconds on this machine": round(math.fsum(row["seconds"] for row in results), 1),
        "results": results,
    }
