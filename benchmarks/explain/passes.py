"""The time of our methods and of every metric, over the passes that they make."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.explain.subjects import SHAPE, Subject
from benchmarks.timing import Json, by_turns, ratios, spread, timed
from otnn import metrics
from otnn.explain import attribute, cost
from otnn.explain.scores import Scorer

BAR = 1.2
# Fewer masks than the defaults: a ratio does not depend on them once they fill a chunk
METHODS: Mapping[str, Mapping[str, int]] = {
    "rise": {"samples": 500},
    "sobol": {"samples": 8},
    "hsic": {"samples": 500},
    "gradcam_pp": {},
    "forgrad": {},
}
_BATCHES = (32, 64, 128, 256)
_FLOOR = 512
FORWARD, BACKWARD = "one batched forward", "one batched forward and backward"

Pass = Callable[[], None]


def passes(subject: Subject, rounds: int, advance: Callable[[], None]) -> Json:
    """Seconds, passes and ratios of everything on one network; None for what makes no pass."""
    jobs, made = _jobs(subject)
    forward, both = _floor(subject)
    seconds = by_turns({FORWARD: forward, BACKWARD: both, **jobs}, rounds, advance)
    rows = {}
    for name in jobs:
        forwards, backwards = made[name]
        floor = [
            (forwards * f + backwards * max(0.0, b - f)) / _FLOOR
            for f, b in zip(seconds[FORWARD], seconds[BACKWARD], strict=True)
        ]
        rows[name] = {
            "seconds": spread(seconds[name]),
            "forwards": forwards,
            "backwards": backwards,
            "ratio": spread(ratios(seconds[name], floor)) if forwards else None,
        }
    return {
        "network": subject.name,
        "images": len(subject.images),
        "milliseconds of a forward": spread([1e3 * s / _FLOOR for s in seconds[FORWARD]]),
        "milliseconds of a forward and backward": spread([1e3 * s / _FLOOR for s in seconds[BACKWARD]]),
        "of": rows,
    }


def _jobs(subject: Subject) -> tuple[dict[str, Pass], dict[str, tuple[int, int]]]:
    """What is timed, and the forwards and backwards that it makes on all images."""
    model, images, target, n = subject.model, subject.images, subject.target, len(subject.images)
    jobs: dict[str, Pass] = {}
    made: dict[str, tuple[int, int]] = {}
    for name, settings in METHODS.items():
        if name == "gradcam_pp" and "conv" not in subject.name:
            continue
        jobs[name] = lambda name=name, settings=settings: attribute(model, images, target, name, **settings)  # type: ignore[misc]
        forwards, backwards = cost(name, images, settings)
        made[name] = n * forwards, n * backwards
    for name, run in _metrics(subject).items():
        results = _results(run())
        jobs[name] = run
        own, maps = results[0], results[0].maps
        # a map is a saliency here, one forward and one backward
        made[name] = own.forwards, own.backwards + maps
    return jobs, made


def _metrics(subject: Subject) -> dict[str, Callable[[], Any]]:
    model, images, target = subject.model, subject.images, subject.target
    maps = attribute(model, images, target)
    scorer = Scorer(model, images, target)
    height, width = SHAPE[1:]
    box = metrics.box_regions(torch.tensor([[4, 4, 24, 24]]).expand(len(images), 4), (height, width))

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def explain(inputs: Tensor, index: Tensor) -> Tensor:
        return attribute(model, inputs, target[index])

    return {
        "deletion": lambda: metrics.deletion(scorer, images, maps, generator=seeded()),
        "insertion": lambda: metrics.insertion(scorer, images, maps, generator=seeded()),
        "mu_fidelity": lambda: metrics.mu_fidelity(scorer, images, maps, generator=seeded()),
        "robustness_sr": lambda: metrics.robustness_sr(
            scorer, images, maps, shares=(0.05, 0.25, 0.45), bisections=10, generator=seeded()
        ),
        "average_stability": lambda: metrics.average_stability(explain, images, generator=seeded()),
        "e_robustness": lambda: metrics.e_robustness(explain, images, bisections=3, generator=seeded()),
        "mprt": lambda: metrics.mprt(model, explain, images, generator=seeded()),
        "explanation_distance": lambda: metrics.explanation_distance(maps, maps * images),
        "jpeg_bytes": lambda: metrics.jpeg_bytes(maps),
        "entropy": lambda: metrics.entropy(maps),
        "gini": lambda: metrics.gini(maps),
        "top_share": lambda: metrics.top_share(maps, box),
        "pointing_game": lambda: metrics.pointing_game(maps, box),
    }


def _results(found: Any) -> list[metrics.MetricResult]:
    return [found] if isinstance(found, metrics.MetricResult) else list(found)


def _floor(subject: Subject) -> tuple[Pass, Pass]:
    """Forwards of 512 images, and forwards and backwards, each in the batches that are fastest for them."""
    inputs = subject.images.repeat(-(-_FLOOR // len(subject.images)), 1, 1, 1)[:_FLOOR]
    model = subject.model

    def forward(size: int) -> None:
        with torch.no_grad():
            for batch in inputs.split(size):
                model(batch)

    def both(size: int) -> None:
        for batch in inputs.split(size):
            leaf = batch.clone().requires_grad_()
            torch.autograd.grad(model(leaf).amax(dim=1).sum(), leaf)

    def fastest(run: Callable[[int], None]) -> int:
        times: dict[int, float] = {}
        for size in _BATCHES:
            once: list[float] = []
            run(size)
            for _ in range(2):
                with timed(once):
                    run(size)
            times[size] = min(once)
        return min(times, key=times.__getitem__)

    alone, together = fastest(forward), fastest(both)
    return lambda: forward(alone), lambda: both(together)
