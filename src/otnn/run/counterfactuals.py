"""Counterfactuals as a stage: the networks of a run on the same test images, measured and shown."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from otnn import metrics
from otnn.data import Dataset
from otnn.errors import InputError
from otnn.explain import Counterfactual, counterfactual
from otnn.files import json_bytes
from otnn.lipschitz import LipschitzBound, bound
from otnn.metrics import MetricResult
from otnn.metrics.result import Direction, summarise
from otnn.models import Classifier
from otnn.report.counterfactual_pictures import grid_picture
from otnn.run.counterfactual_data import (
    ALONG,
    NEIGHBOURS,
    Real,
    along,
    along_together,
    data_distance,
    followed,
    real_images,
)
from otnn.run.counterfactual_grid import blocks
from otnn.run.counterfactual_words import mark_best, verdict
from otnn.run.explain import class_index
from otnn.run.folder import Run
from otnn.run.judge import judge_of
from otnn.run.progress import tasks_bar
from otnn.run.standings import number
from otnn.run.train import dataset_of, versions

SAMPLES = 1000
STEPS = 9
# Bytes of the images that one chunk of paths keeps
_BUDGET = 2**28


@dataclass(frozen=True)
class Measure:
    """How a figure of counterfactuals.json is to be read.

    Attributes:
        meaning: in words.
        compared: whether a better value makes a better network; others describe.
    """

    meaning: str
    compared: bool


MEASURES: Mapping[str, Measure] = {
    "validity": Measure("share of the images that flip to the target", True),
    "distance": Measure("L2 distance to the first point predicted as the target", False),
    "distance_over_radius": Measure("that distance over the certified radius of the pair", True),
    "tightness": Measure("certified radius of the pair over the distance to its boundary", True),
    "data_distance": Measure("distance of the reflected image to the data of the target; 1: as a real image", True),
    "data_distance_start": Measure("the same of the image itself", False),
    "independent_score": Measure("share of the reflected images that the judge sees as the target", True),
    "independent_score_start": Measure("the same of the image itself", False),
    "concentration": Measure("share of the L2 norm of the change in the top 10 % of the pixels", False),
    "price": Measure("distance to the boundary in the pixel box over that without it", False),
    "outside": Measure("share of the values outside [0, 1] at the boundary, or that would be", False),
}


def counterfactual_run(
    run: Run,
    *,
    dataset: Dataset | None = None,
    samples: int | None = SAMPLES,
    seed: int = 0,
    source: str | None = None,
    target: str | None = None,
    box: bool = False,
    iterations: int = 1,
    judge: Run | None = None,
    steps: int = STEPS,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Measure counterfactuals: writes counterfactuals.json and counterfactuals.png.

    All networks of the run move the same test images, in float32: boundaries are found to about 1e-6.

    Args:
        run: an opened run.
        dataset: its data, if they are at hand already.
        samples: test images at most, drawn at random; None takes all.
        seed: of the draw.
        source: take the test images of this class only, by name or index.
        target: the class that they go to, which then gives no images; by default the nearest rival of each.
        box: keep the paths in [0, 1].
        iterations: gradients on the way to the boundary, and beyond it.
        judge: the run whose ordinary network judges the images; by default one is trained and kept in the folder.
        steps: images along each path.
        device: where the networks run.

    Returns:
        The content of counterfactuals.json (docs/run-folder.md).

    Raises:
        InputError: an unknown class, a source that is the target, settings that cannot be used, or a judge that does
            not fit.
    """
    start = time.perf_counter()
    _check(samples, steps, iterations)
    ends = tuple(
        None if name is None else class_index(run.classes, name, option)
        for name, option in ((source, "--from"), (target, "--to"))
    )
    if source is not None and ends[0] == ends[1]:
        raise InputError(f"--from and --to: expected two different classes, got {run.classes[ends[0] or 0]} for both")
    dataset = dataset or dataset_of(run)
    index = choose_images(dataset.test.labels, samples, seed, *ends)
    appointed = judge_of(run, dataset, judge, device)
    real = real_images(dataset, device)
    settings: dict[str, Any] = {"steps": steps, "box": box, "iterations": iterations}
    inputs = dataset.test.images[index]
    size = max(1, _BUDGET // (4 * steps * inputs[0].numel() * inputs.element_size()))
    wholly = followed(len(inputs), real, steps)
    # the images come in random order, so that the first are a draw as well
    chunks = [chunk for part in (inputs[:wholly], inputs[wholly:]) if len(part) for chunk in part.split(size)]
    told = {}
    with tasks_bar(f"counterfactuals of {run.path.name}", len(run.networks) * len(chunks)) as begin:
        for name in run.networks:
            model = run.network(name, device)
            began, done = time.perf_counter(), 0
            parts, ways = [], []
            for chunk in chunks:
                begin(f"{name}: {done + len(chunk)} of {len(inputs)} images")
                way = walk(model, chunk.to(device), ends[1], settings)
                parts.append((measured(way, real, appointed.model), way.status))
                if done < wholly:
                    ways.append(along(way, real))
                done += len(chunk)
            told[name] = _network(parts, time.perf_counter() - began) | {"along": along_together(ways)}
    content = {
        "format": 1,
        "samples": len(index),
        "seed": seed,
        "from": None if ends[0] is None else run.classes[ends[0]],
        "to": None if ends[1] is None else run.classes[ends[1]],
        **settings,
        "neighbours": NEIGHBOURS,
        "versions": versions(),
        "judge": appointed.description,
        "usual_distance": {name: number(float(d)) for name, d in zip(run.classes, real.usual, strict=True)},
        "columns": [
            {"name": name, "meaning": measure.meaning, "compared": measure.compared}
            for name, measure in MEASURES.items()
        ],
        "along": {
            "samples": wholly,
            "columns": [{"name": name, "meaning": meaning} for name, meaning in ALONG.items()],
        },
        "networks": told,
    }
    mark_best(content)
    content["verdict"] = verdict(content)
    picture = grid_picture(
        *blocks(run, dataset, index, ends[0], ends[1], appointed.model, box=box, iterations=iterations, device=device)
    )
    files = {"counterfactuals.json": json_bytes(content), "counterfactuals.png": picture}
    run.write(files, {"seconds": {"counterfactual": round(time.perf_counter() - start, 3)}})
    return content


def _check(samples: int | None, steps: int, iterations: int) -> None:
    """Refuse settings before a judge is trained in vain."""
    if samples is not None and samples < 1:
        raise InputError(f"samples: expected at least 1 test image, got {samples}; two and more give an interval")
    for name, value, least in (("steps", steps, 2), ("iterations", iterations, 1)):
        if value < least:
            raise InputError(f"{name}: expected at least {least}, got {value}")


def choose_images(labels: Tensor, samples: int | None, seed: int, source: int | None, target: int | None) -> Tensor:
    """Indices (n,) of the test images: a random draw, of one class or of all but the target.

    Raises:
        InputError: there are none.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if source is not None:
        order = order[labels[order] == source]
    elif target is not None:
        order = order[labels[order] != target]
    if not len(order):
        raise InputError("--from: expected a class with test images, got one without any")
    return order if samples is None else order[:samples]


def walk(model: Classifier, images: Tensor, target: int | None, settings: Mapping[str, Any]) -> Counterfactual:
    """The counterfactuals of images on one network, with the bound that can be proven of it."""
    body: LipschitzBound = bound(model.body, model.input_shape)
    goal = None if target is None else torch.full((len(images),), target, device=images.device)
    return counterfactual(model, images, body, goal, **settings)


def measured(way: Counterfactual, real: Real, judge: Classifier) -> dict[str, MetricResult]:
    """Every figure of `MEASURES`, of one chunk of images."""
    still = replace(way, path=way.inputs.unsqueeze(1))
    return {
        "validity": metrics.validity(way),
        "distance": _plain("distance", way.distance, "down"),
        "distance_over_radius": metrics.distance_over_radius(way),
        "tightness": metrics.tightness(way),
        "data_distance": data_distance(way, real),
        "data_distance_start": data_distance(still, real),
        "independent_score": metrics.independent_score(way, judge),
        "independent_score_start": metrics.independent_score(still, judge),
        "concentration": metrics.concentration(way),
        "price": _plain("price", way.price, "down"),
        "outside": _plain("outside", way.outside, "down"),
    }


def _plain(name: str, values: Tensor, direction: Direction) -> MetricResult:
    return summarise(name, values, direction, signed=True, undefined=values.isnan(), counted_as="left out")


def _network(parts: Sequence[tuple[dict[str, MetricResult], tuple[str, ...]]], seconds: float) -> dict[str, Any]:
    """The chunks of one network as counterfactuals.json tells of them together."""
    measures = {}
    for name in MEASURES:
        results = [part[name] for part, _ in parts]
        values = torch.cat([result.per_sample for result in results])
        first = results[0]
        whole = summarise(
            name,
            values,
            first.direction,
            signed=True,
            undefined=values.isnan(),
            counted_as=first.counted_as,
            settings=first.settings,
        )
        measures[name] = {
            "mean": number(whole.mean),
            "interval": [number(end) for end in whole.interval],
            "direction": whole.direction,
            "samples": len(values),
            "undefined": whole.undefined,
            "counted_as": whole.counted_as,
            "settings": dict(whole.settings),
            "best": False,
        }
    return {
        "measures": measures,
        "statuses": dict(Counter(status for _, statuses in parts for status in statuses)),
        "seconds": round(seconds, 3),
    }
