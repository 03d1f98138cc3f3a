"""The section of the page on counterfactuals: what another answer would need, on every network of the run."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from otnn.report import words
from otnn.report.charts import Chart, chart, headroom
from otnn.report.load import RunFiles

_STYLES = {"otnn": "otnn", "unconstrained": "twin", "adversarial": "adversarial"}
_ARROWS = {"up": " ↑", "down": " ↓"}
# Measures that are shares of pictures, and told in percent
_SHARES = ("validity", "independent_score", "independent_score_start")


@dataclass(frozen=True)
class Row:
    """A measure of all networks.

    Attributes:
        name: with its arrow, where a better value makes a better network.
        meaning: in words.
        cells: of each network, mean, interval (empty where there is none), and whether it is the best.
    """

    name: str
    meaning: str
    cells: list[tuple[str, str, bool]]


@dataclass(frozen=True)
class CounterfactualSection:
    """What the section shows.

    Attributes:
        samples: test pictures.
        source: the class that they are of; empty for all.
        target: the class that they go to; empty for the nearest rival.
        box: whether the pictures stay in the range from black to white.
        iterations: gradients to the boundary.
        verdict: sentences.
        networks: their names.
        rows: of the table.
        statuses: what became of the pictures, with the number on each network.
        judge: which network judges, in words.
        charts: how near to real pictures the moved ones are, over the length moved.
        followed: pictures that the charts are about.
        picture: data URI of the grid.
    """

    samples: int
    source: str
    target: str
    box: bool
    iterations: int
    verdict: list[str]
    networks: list[str]
    rows: list[Row]
    statuses: list[tuple[str, list[int]]]
    judge: str
    charts: list[Chart]
    followed: int
    picture: str


def counterfactual_section(files: RunFiles) -> CounterfactualSection | None:
    """The section of a run whose counterfactuals were measured."""
    content = files.counterfactuals
    if content is None:
        return None
    networks, judge = content["networks"], content["judge"]
    origin = "an ordinary network of another run" if judge["from"] else "another ordinary network of the same kind"
    statuses = dict.fromkeys(status for network in networks.values() for status in network["statuses"])
    return CounterfactualSection(
        samples=content["samples"],
        source=content["from"] or "",
        target=content["to"] or "",
        box=content["box"],
        iterations=content["iterations"],
        verdict=[str(sentence) for sentence in content["verdict"]],
        networks=[words.network(name) for name in networks],
        rows=[_row(column, networks) for column in content["columns"]],
        statuses=[(text, [each["statuses"].get(text, 0) for each in networks.values()]) for text in statuses],
        judge=f"{origin}, which is right on {words.percent(judge['accuracy'])} of the test pictures",
        charts=[_distances(networks), _shares(networks)],
        followed=content["along"]["samples"],
        picture=f"data:image/png;base64,{base64.b64encode(files.counterfactual_picture).decode()}",
    )


def _row(column: Mapping[str, Any], networks: Mapping[str, Any]) -> Row:
    cells = [network["measures"][column["name"]] for network in networks.values()]
    show = words.percent if column["name"] in _SHARES else words.figure
    told = []
    for cell in cells:
        low, high = cell["interval"]
        interval = "" if low is None or high is None else f"{show(low)} to {show(high)}"
        told.append(("–" if cell["mean"] is None else show(cell["mean"]), interval, bool(cell["best"])))
    arrow = _ARROWS[cells[0]["direction"]] if column["compared"] else ""
    name = column["name"].replace("_start", ", picture itself").replace("_", " ")
    return Row(f"{name}{arrow}", column["meaning"], told)


def _distances(networks: Mapping[str, Any]) -> Chart:
    curves = _curves(networks, "data_distance")
    low, high = headroom([1.0, *(value for _, values in curves.values() for value in values)])
    return _drawn(
        "Distance to the data of the target",
        curves,
        "{:.2f}",
        (low, high, "distance; 1: as a real picture of the target"),
        share=False,
    )


def _shares(networks: Mapping[str, Any]) -> Chart:
    return _drawn(
        "Whose real picture is the nearest",
        _curves(networks, "nearest_is_target"),
        "{:.1%}",
        (0.0, 1.0, "share whose nearest real picture is of the target"),
        share=True,
    )


def _curves(networks: Mapping[str, Any], name: str) -> dict[str, tuple[list[float], list[float]]]:
    """Lengths and values of each network that has both everywhere."""
    curves = {}
    for network, told in networks.items():
        lengths, values = told["along"]["lengths"], told["along"][name]["mean"]
        if None not in (*lengths, *values):
            curves[network] = (lengths, values)
    return curves


def _drawn(
    title: str,
    curves: Mapping[str, tuple[list[float], list[float]]],
    form: str,
    ordinate: tuple[float, float, str],
    *,
    share: bool,
) -> Chart:
    """Curves over the length moved, with a rule at the boundary."""
    ends = [
        f"{words.network(name)}: from {form.format(values[0])} to {form.format(values[-1])}"
        for name, (_, values) in curves.items()
    ]
    far = max((lengths[-1] for lengths, _ in curves.values()), default=2.0)
    drawn = chart(
        title,
        "; ".join(ends).replace("%", " %") + "." if ends else "There is no picture to tell of.",
        (0.0, far, "length moved; 1: even with the target"),
        ordinate,
        share=share,
    )
    for name, (lengths, values) in curves.items():
        drawn.line(lengths, values, _STYLES.get(name, "certified-line"), words.network(name))
    drawn.rule(1.0, "boundary", "even with the target")
    return drawn
