"""What a comparison is made of: the metrics as columns, and the profiles."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otnn import metrics
from otnn.explain import METHODS
from otnn.metrics import Cost, MetricResult, cost_of
from otnn.metrics.result import summarise
from otnn.run.subject import Subject

# The row of the distance between the maps of these two methods, which the paper takes
PAIR, PAIRED = "saliency-smoothgrad", ("saliency", "smoothgrad")


@dataclass(frozen=True)
class Profile:
    """What is compared where nothing else is asked for.

    Attributes:
        methods: by name.
        metrics: names of `METRICS`.
        settings: of methods and metrics, by name; what is not here has the defaults of the function.
    """

    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]


class Scored(NamedTuple):
    """The results of a method by one metric, by column, with the seconds that they took together."""

    method: str
    results: dict[str, MetricResult]
    seconds: float


@dataclass(frozen=True)
class Metric:
    """A metric of the comparison.

    Attributes:
        columns: the figures that it gives, with what each means.
        run: scores the maps of a subject.
        function: the name in `otnn.metrics` that the cost is asked for, once a method and call.
        shared: the forwards are made once for all methods.
        calls: of the function for each method, or for all where shared.
        confounded: why two networks cannot be told apart by it, by column; empty where they can.
        reason: why it does not apply to a subject; None where it does.
    """

    columns: Mapping[str, str]
    run: Callable[[Subject], Iterator[Scored]]
    function: str
    shared: bool = False
    calls: int = 1
    confounded: Mapping[str, str] = field(default_factory=dict)
    reason: Callable[[Subject], str | None] = lambda subject: None

    def cost(self, subject: Subject, methods: list[str]) -> list[tuple[str, Cost]]:
        """The passes for these methods, one by one, without those of the maps that are scored."""
        count, settings = len(subject.inputs), subject.settings(self.function)
        if self.function == "mprt":
            settings["layers"] = len(metrics.layers_from_top(subject.model, subject.inputs))
        if self.function in ("deletion", "insertion"):
            settings["pixels"] = subject.inputs[0, 0].numel()
        costs = []
        for method in methods[:1] if self.shared else methods:
            forwards, backwards = subject.passes(method)
            told = cost_of(self.function, count, forwards_per_map=forwards, backwards_per_map=backwards, **settings)
            costs += [(method, told)] * self.calls
        return costs


def _timed(method: str, run: Callable[[], dict[str, MetricResult]]) -> Scored:
    start = time.perf_counter()
    results = run()
    return Scored(method, results, time.perf_counter() - start)


def _area(name: str) -> Callable[[Subject], Iterator[Scored]]:
    """Deletion or Insertion, raw and normalised."""
    function = getattr(metrics, name)

    def run(subject: Subject) -> Iterator[Scored]:
        for method, maps in subject.maps.items():

            def score(maps: Tensor = maps) -> dict[str, MetricResult]:
                raw: MetricResult = function(
                    subject.scorer, subject.inputs, maps, generator=subject.generator(), **subject.settings(name)
                )
                values = raw.details["normalised"]
                normalised = summarise(
                    f"{name}_normalised",
                    values,
                    raw.direction,
                    signed=raw.signed,
                    undefined=values.isnan(),
                    counted_as="left out: the score does not exceed that of the baseline",
                    forwards=raw.forwards,
                    settings=raw.settings,
                )
                return {name: raw, f"{name}_normalised": normalised}

            yield _timed(method, score)

    return run


def _mu_fidelity(subject: Subject) -> Iterator[Scored]:
    """All methods by one bank of masks, which the same seed gives to both baselines."""
    start = time.perf_counter()
    settings = subject.settings("mu_fidelity")
    by_baseline = {
        f"mu_fidelity_{name}": metrics.mu_fidelity(
            subject.scorer,
            subject.inputs,
            subject.maps,
            baseline=baseline,
            generator=subject.generator(),
            **settings,
        )
        for name, baseline in (("zero", 0.0), ("uniform", "uniform"))
    }
    seconds = time.perf_counter() - start
    for method in subject.maps:
        yield Scored(method, {column: results[method] for column, results in by_baseline.items()}, seconds)


def _complexity(subject: Subject) -> Iterator[Scored]:
    functions = (metrics.jpeg_bytes, metrics.entropy, metrics.gini)
    for method, maps in subject.maps.items():
        yield _timed(method, lambda maps=maps: {f.__name__: f(maps) for f in functions})  # type: ignore[misc]


def _distance(subject: Subject) -> Iterator[Scored]:
    """Saliency against SmoothGrad, whose maps are made here where they were not asked for."""

    def score() -> dict[str, MetricResult]:
        every = torch.arange(len(subject.inputs), device=subject.inputs.device)
        first, second = (
            subject.maps[m] if m in subject.maps else subject.explain(m)(subject.inputs, every) for m in PAIRED
        )
        found = metrics.explanation_distance(first, second)
        return {"distance_l2": found.l2, "distance_spearman": found.spearman}

    yield _timed(PAIR, score)


def _of_function(name: str, read: Callable[[Any], dict[str, MetricResult]]) -> Callable[[Subject], Iterator[Scored]]:
    """A metric that asks for further maps; `mprt` gets the model as well, whose weights it redraws."""
    function = getattr(metrics, name)

    def run(subject: Subject) -> Iterator[Scored]:
        for method in subject.maps:

            def score(method: str = method) -> dict[str, MetricResult]:
                model = (subject.model,) if name == "mprt" else ()
                return read(
                    function(
                        *model,
                        subject.explain(method),
                        subject.inputs,
                        forwards_per_map=subject.passes(method)[0],
                        generator=subject.generator(),
                        **subject.settings(name),
                    )
                )

            yield _timed(method, score)

    return run


def _robustness_sr(subject: Subject) -> Iterator[Scored]:
    for method, maps in subject.maps.items():

        def score(maps: Tensor = maps) -> dict[str, MetricResult]:
            settings = subject.settings("robustness_sr")
            found = metrics.robustness_sr(
                subject.scorer, subject.inputs, maps, generator=subject.generator(), **settings
            )
            return {"robustness_sr": found}

        yield _timed(method, score)


def _in_boxes(name: str, column: str) -> Callable[[Subject], Iterator[Scored]]:
    """A metric of maps and regions."""
    function = getattr(metrics, name)

    def run(subject: Subject) -> Iterator[Scored]:
        for method, maps in subject.maps.items():

            def score(maps: Tensor = maps) -> dict[str, MetricResult]:
                settings = subject.settings(name)
                return {column: function(maps, subject.regions, generator=subject.generator(), **settings)}

            yield _timed(method, score)

    return run


def _no_boxes(subject: Subject) -> str | None:
    told = "the test split has no boxes: its metadata have no columns x0, y0, x1, y1, or nothing in them"
    return told if subject.regions is None else None


_UNIT = "in the unit of each network's own score: read the normalised area across networks"
METRICS: dict[str, Metric] = {
    "deletion": Metric(
        {
            "deletion": "area under the score while the most important pixels are removed, in the unit of the score",
            "deletion_normalised": "the same, of the score as a share of its fall from the image to black",
        },
        _area("deletion"),
        "deletion",
        confounded={"deletion": _UNIT},
    ),
    "insertion": Metric(
        {
            "insertion": "area under the score while the most important pixels are inserted, in the unit of the score",
            "insertion_normalised": "the same, of the score as a share of its rise from black to the image",
        },
        _area("insertion"),
        "insertion",
        confounded={"insertion": _UNIT},
    ),
    "mu_fidelity": Metric(
        {
            "mu_fidelity_zero": "rank correlation of the map with the fall of the score when cells turn black",
            "mu_fidelity_uniform": "the same when cells turn to noise",
        },
        _mu_fidelity,
        "mu_fidelity",
        shared=True,
        calls=2,
    ),
    "complexity": Metric(
        {
            "jpeg_bytes": "size of the map as a JPEG",
            "entropy": "entropy of the shares of the pixels in the map",
            "gini": "sparseness of the map",
        },
        _complexity,
        "gini",
    ),
    "explanation_distance": Metric(
        {
            "distance_l2": "L2 between the maps of Saliency and SmoothGrad, at unit norm",
            "distance_spearman": "1 - rank correlation of the maps of Saliency and SmoothGrad",
        },
        _distance,
        "explanation_distance",
    ),
    "stability": Metric(
        {
            "stability_l2": "L2 between the maps of an image and of its noisy neighbours, at unit norm",
            "stability_spearman": "1 - rank correlation of the maps of an image and of its noisy neighbours",
        },
        _of_function(
            "average_stability", lambda found: {"stability_l2": found.l2, "stability_spearman": found.spearman}
        ),
        "average_stability",
    ),
    "robustness_sr": Metric(
        {"robustness_sr": "smallest change of the most important pixels that changes the class"},
        _robustness_sr,
        "robustness_sr",
        confounded={"robustness_sr": "a network that is harder to attack needs larger changes, whatever the map"},
    ),
    "e_robustness": Metric(
        {"e_robustness": "radius of the ball in which the map stays the same"},
        _of_function("e_robustness", lambda found: {"e_robustness": found}),
        "e_robustness",
    ),
    "mprt": Metric(
        {"mprt": "similarity of the map to that of the network with its weights redrawn"},
        _of_function("mprt", lambda found: {"mprt": found}),
        "mprt",
    ),
    "box_share": Metric(
        {"box_share": "share of the top 10 % of the pixels that lie in the box of the object"},
        _in_boxes("top_share", "box_share"),
        "top_share",
        reason=_no_boxes,
    ),
    "pointing_game": Metric(
        {"pointing_game": "share of the images whose highest pixel lies in the box of the object"},
        _in_boxes("pointing_game", "pointing_game"),
        "pointing_game",
        reason=_no_boxes,
    ),
}

PROFILES = {
    "quick": Profile(
        ("saliency", "gradient_input", "integrated_gradients", "smoothgrad"),
        ("deletion", "insertion", "mu_fidelity", "complexity", "explanation_distance", "stability"),
        {
            "integrated_gradients": {"steps": 20},
            "smoothgrad": {"samples": 10},
            "average_stability": {"neighbours": 5},
        },
    ),
    "full": Profile(tuple(METHODS), tuple(METRICS), {}),
}
