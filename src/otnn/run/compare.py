"""The comparison as a stage: the networks of a run, explanation methods and metrics on the same test images."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from otnn.data import Dataset
from otnn.errors import InputError
from otnn.explain import METHODS
from otnn.explain.methods import complete_settings
from otnn.files import json_bytes
from otnn.metrics import MetricResult
from otnn.report.compare_pictures import maps_picture, pareto_picture
from otnn.run.comparison import METRICS, PAIR, PAIRED, PROFILES, Profile
from otnn.run.folder import Run
from otnn.run.progress import tasks_bar, tell
from otnn.run.standings import Cells, csv_bytes, mark_best, number, paired_tests, quality, verdict
from otnn.run.subject import Subject
from otnn.run.train import dataset_of, versions

PICTURES = 4
_PAIRS = "explanation_distance"


def compare_run(
    run: Run,
    *,
    dataset: Dataset | None = None,
    profile: str = "quick",
    methods: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    samples: int = 100,
    seed: int = 0,
    score: str = "margin",
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Compare explanations: writes compare.json, compare.csv, compare.png and compare-pareto.png.

    Every network of the run is explained on the same random test images, each for the class that it predicts, with the
    same masks and noise. The number of forwards and the time are estimated and told before the start.

    Args:
        run: an opened run.
        dataset: its data, if they are at hand already.
        profile: "quick", gradient methods and cheap metrics with fewer samples; or "full", all methods and all metrics.
        methods: names of `otnn.explain.METHODS`; those of the profile by default.
        metrics: names of `otnn.run.comparison.METRICS`; those of the profile by default.
        samples: test images, at most.
        seed: of the images and of all draws.
        score: "margin" or "logit", see `otnn.explain.attribute`.
        device: where the networks run.

    Returns:
        The content of compare.json (docs/run-folder.md).

    Raises:
        InputError: an unknown profile, method, metric or score, or fewer than one sample.
    """
    start = time.perf_counter()
    chosen = choose(profile, methods, metrics)
    if samples < 1:
        raise InputError(f"samples: expected at least 1 test image, got {samples}; two and more give an interval")
    dataset = dataset or dataset_of(run)
    test = dataset.test
    index = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:samples]
    images = test.images[index].to(device)
    boxes = None if test.boxes is None else test.boxes[index].to(device)
    subjects = [
        Subject(name, run.network(name, device), images, score, seed, chosen.settings, boxes) for name in run.networks
    ]
    reasons = {(s.name, method): s.reason(method) for s in subjects for method in chosen.methods}
    told = [estimate(s, chosen, [m for m in chosen.methods if reasons[s.name, m] is None]) for s in subjects]
    tell(estimate_text(run, told, chosen, len(images)))
    maps, cells = _run_all(run, subjects, chosen, reasons)
    mark_best(cells)
    content = {
        "format": 1,
        "profile": profile,
        "score": score,
        "samples": len(index),
        "seed": seed,
        "versions": versions(),
        "networks": [s.name for s in subjects],
        "methods": list(chosen.methods),
        "metrics": list(chosen.metrics),
        "settings": {name: dict(values) for name, values in chosen.settings.items()},
        "images": index.tolist(),
        "box_area": box_area(subjects[0]),
        "targets": {s.name: s.scorer.target.tolist() for s in subjects},
        "columns": [
            {"name": column, "metric": name, "meaning": meaning, "confounded": METRICS[name].confounded.get(column)}
            for name in chosen.metrics
            for column, meaning in METRICS[name].columns.items()
        ],
        "estimate": told,
        "maps": maps,
        "cells": cells,
        "tests": paired_tests(cells),
    }
    content["quality"] = quality(content)
    content["verdict"] = verdict(content)
    files = {
        "compare.json": json_bytes(content),
        "compare.csv": csv_bytes(cells),
        "compare.png": _maps_picture(subjects, chosen.methods, images, [int(k) for k in test.labels[index]], run),
        "compare-pareto.png": pareto_picture(content),
    }
    run.write(files, {"seconds": {"compare": round(time.perf_counter() - start, 3)}})
    return content


def box_area(subject: Subject) -> float | None:
    """The mean share of the picture that the boxes cover, where there are boxes: what a random map scores in them."""
    if subject.regions is None:
        return None
    areas = subject.regions.flatten(1).double().mean(dim=1)
    return float(areas[areas > 0].mean()) if bool((areas > 0).any()) else None


def choose(profile: str, methods: Sequence[str] | None, metrics: Sequence[str] | None) -> Profile:
    """The methods and metrics of a profile, or those that are named.

    Raises:
        InputError: an unknown or repeated name, or none; the message lists the names.
    """
    if profile not in PROFILES:
        raise InputError(f"profile: expected one of {', '.join(PROFILES)}, got {profile!r}")
    base = PROFILES[profile]
    return Profile(
        _names("methods", base.methods if methods is None else methods, METHODS),
        _names("metrics", base.metrics if metrics is None else metrics, METRICS),
        base.settings,
    )


def _names(what: str, names: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        got = ", ".join(repr(name) for name in unknown) or "none"
        raise InputError(f"{what}: expected some of {', '.join(known)}, got {got}")
    return tuple(dict.fromkeys(names))


def estimate(subject: Subject, chosen: Profile, methods: list[str]) -> dict[str, Any]:
    """Passes of a network for its maps and metrics, and the time for them.

    The time is that of a map times their number, and that of a batched pass times the number of the others.
    """
    count = len(subject.inputs)
    explained = [*methods]
    if _PAIRS in chosen.metrics:
        explained += [method for method in PAIRED if method not in methods]
    maps = dict.fromkeys(explained, count)
    forwards, backwards, exact = 0, 0, True
    for name in chosen.metrics:
        for method, cost in METRICS[name].cost(subject, methods):
            own = subject.passes(method)
            maps[method] += cost.maps
            forwards += cost.forwards - cost.maps * own[0]
            backwards += cost.backwards - cost.maps * own[1]
            exact = exact and cost.exact
    forward, backward = subject.seconds()
    seconds = forwards * forward + backwards * backward
    for method, number_of_maps in maps.items():
        own = subject.passes(method)
        forwards, backwards = forwards + number_of_maps * own[0], backwards + number_of_maps * own[1]
        seconds += number_of_maps * subject.pace(method)
    return {
        "network": subject.name,
        "forwards": forwards,
        "backwards": backwards,
        "exact": exact,
        "seconds": seconds,
    }


def estimate_text(run: Run, told: list[dict[str, Any]], chosen: Profile, count: int) -> str:
    """What the comparison will cost, in a sentence."""
    forwards, backwards, seconds = (sum(entry[key] for entry in told) for key in ("forwards", "backwards", "seconds"))
    most = "" if all(entry["exact"] for entry in told) else "at most "
    length = f"{math.ceil(seconds)} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return (
        f"comparing {run.path}: {len(told)} networks x {len(chosen.methods)} methods x {len(chosen.metrics)} metrics "
        f"on {count} test images: {most}{forwards:,} forwards and {backwards:,} backwards, "
        f"which take {most}about {length}"
    )


def _run_all(
    run: Run, subjects: list[Subject], chosen: Profile, reasons: dict[tuple[str, str], str | None]
) -> tuple[list[dict[str, Any]], Cells]:
    """Maps and cells of all networks, told one by one."""
    maps: list[dict[str, Any]] = []
    cells: Cells = []
    total = len(subjects) * (len(chosen.methods) + len(chosen.metrics))
    with tasks_bar(f"comparing {run.path.name}", total) as begin:
        for subject in subjects:
            for method in chosen.methods:
                begin(f"{subject.name}: {method}")
                entry: dict[str, Any] = {"network": subject.name, "method": method}
                entry |= {"reason": reasons[subject.name, method]}
                if entry["reason"] is None:
                    seconds = subject.explain_all(method)
                    forwards, backwards = subject.passes(method)
                    entry |= {"forwards": forwards, "backwards": backwards, "seconds": round(seconds, 4)}
                    entry["settings"] = complete_settings(method, subject.settings(method))
                maps.append(entry)
            for name in chosen.metrics:
                begin(f"{subject.name}: {name}")
                cells += _cells(subject, name, chosen.methods, reasons)
    return maps, cells


def _cells(subject: Subject, name: str, methods: Sequence[str], reasons: dict[tuple[str, str], str | None]) -> Cells:
    """The cells of a metric: a row per method and column, those that do not apply with their reason."""
    metric = METRICS[name]
    reason = metric.reason(subject)
    runs = reason is None and (subject.maps or name == _PAIRS)
    found = {scored.method: scored for scored in metric.run(subject)} if runs else {}
    rows: Cells = []
    for method in (PAIR,) if name == _PAIRS else methods:
        for column in metric.columns:
            row = {"network": subject.name, "method": method, "metric": column}
            if method in found:
                scored = found[method]
                rows.append(row | _told(scored.results[column], scored.seconds))
            else:
                rows.append(row | {"reason": reasons.get((subject.name, method)) or reason})
    return rows


def _told(result: MetricResult, seconds: float) -> dict[str, Any]:
    """A result as compare.json tells of it; what is not a number is null."""
    summary = result.summary()
    del summary["name"]
    summary["mean"] = number(result.mean)
    summary["interval"] = [number(end) for end in result.interval]
    return {
        "reason": None,
        **summary,
        "seconds": round(seconds, 4),
        "per_sample": [number(value) for value in result.per_sample.tolist()],
    }


def _maps_picture(
    subjects: list[Subject], methods: Sequence[str], images: Tensor, labels: list[int], run: Run
) -> bytes:
    """The maps of the first images."""
    shown = images[:PICTURES].cpu().numpy()
    columns = [
        (s.name, method, s.maps[method][:PICTURES].cpu().numpy() if method in s.maps else None)
        for s in subjects
        for method in methods
    ]
    return maps_picture(shown, [run.classes[label] for label in labels[:PICTURES]], columns)
