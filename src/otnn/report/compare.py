"""The section of the page on the comparison of explanation methods."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from otnn.report import words
from otnn.report.load import RunFiles

_ARROWS = {"up": "↑", "down": "↓"}
_UNDECIDED = 0.05
# Metrics in one table: more do not fit beside the names
_COLUMNS = 4


@dataclass(frozen=True)
class Cell:
    """A method by a metric.

    Attributes:
        mean: or why there is none.
        interval: 95 % bootstrap interval; empty where there is none.
        best: of its network.
        reason: why the method does not apply; empty where it does.
    """

    mean: str
    interval: str
    best: bool
    reason: str


@dataclass(frozen=True)
class Part:
    """A table of some metrics.

    Attributes:
        caption: what the table is about.
        columns: name with its arrow, and meaning, of each metric.
        networks: name of each network, with method and cells of its rows.
    """

    caption: str
    columns: list[tuple[str, str]]
    networks: list[tuple[str, list[tuple[str, list[Cell]]]]]


@dataclass(frozen=True)
class CompareSection:
    """What the section shows.

    Attributes:
        samples: test images.
        verdict: sentences.
        parts: tables of the metrics.
        costs: network, method, forwards and backwards of a map, seconds of all maps, mean rank.
        tests: metric, method, difference, interval, adjusted p value, and what it says.
        notes: metrics by which networks cannot be told apart, with the reason.
        maps: data URI of the maps side by side.
        pareto: data URI of quality against forwards.
        methods: names of the methods.
    """

    samples: int
    verdict: list[str]
    parts: list[Part]
    costs: list[tuple[str, ...]]
    tests: list[tuple[str, ...]]
    notes: list[tuple[str, str]]
    maps: str
    pareto: str
    methods: list[str]


def compare_section(files: RunFiles) -> CompareSection | None:
    """The section of a run whose explanations were compared."""
    content = files.compare
    if content is None:
        return None
    names = [column["name"] for column in content["columns"]]
    groups = [[name for name in names if name.startswith("distance_")]]
    others = [name for name in names if name not in groups[0]]
    groups[:0] = [others[k : k + _COLUMNS] for k in range(0, len(others), _COLUMNS)]
    return CompareSection(
        samples=content["samples"],
        verdict=[_spaced(str(sentence)) for sentence in content["verdict"]],
        parts=[_part(content, group) for group in groups if group],
        costs=_costs(content),
        tests=[_test(test) for test in content["tests"]],
        notes=[
            (_spaced(column["name"]), str(column["confounded"]))
            for column in content["columns"]
            if column["confounded"]
        ],
        maps=_uri(files.compare_pictures["compare.png"]),
        pareto=_uri(files.compare_pictures["compare-pareto.png"]),
        methods=[words.method(method) for method in content["methods"]],
    )


def _part(content: Mapping[str, Any], names: list[str]) -> Part:
    cells = [cell for cell in content["cells"] if cell["metric"] in names]
    arrows = {cell["metric"]: _ARROWS[cell["direction"]] for cell in cells if cell["reason"] is None}
    meanings = {column["name"]: column["meaning"] for column in content["columns"]}
    networks = []
    for network in content["networks"]:
        rows: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell["network"] == network:
                rows.setdefault(words.method(cell["method"]), []).append(_cell(cell))
        networks.append((words.network(network), list(rows.items())))
    between = all(name.startswith("distance_") for name in names)
    caption = "How far the maps of two methods on one network are apart" if between else "How the methods score"
    return Part(
        caption, [(f"{_spaced(name)} {arrows.get(name, '')}".rstrip(), meanings[name]) for name in names], networks
    )


def _cell(cell: Mapping[str, Any]) -> Cell:
    if cell["reason"] is not None:
        return Cell("not applicable", "", False, str(cell["reason"]))
    if cell["mean"] is None:
        return Cell("undefined", "", False, "")
    return Cell(words.figure(cell["mean"]), _interval(cell["interval"]), bool(cell["best"]), "")


def _costs(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    ranked = {(point["network"], point["method"]): f"{point['mean_rank']:.2f}" for point in content["quality"]}
    rows: list[tuple[str, ...]] = []
    for entry in content["maps"]:
        names = (words.network(entry["network"]), words.method(entry["method"]))
        if entry["reason"] is not None:
            rows.append((*names, "not applicable", "–", "–", "–"))
            continue
        rank = ranked.get((entry["network"], entry["method"]), "–")
        rows.append((*names, f"{entry['forwards']:,}", f"{entry['backwards']:,}", f"{entry['seconds']:.2f}", rank))
    return rows


def _test(test: Mapping[str, Any]) -> tuple[str, ...]:
    says = "undecided" if test["adjusted"] >= _UNDECIDED else "better" if test["better"] else "worse"
    difference = "–" if test["difference"] is None else words.figure(test["difference"])
    told = (difference, _interval(test["interval"]), words.figure(test["adjusted"]), says)
    return (_spaced(test["metric"]), words.method(test["method"]), *told)


def _interval(ends: list[float | None]) -> str:
    return "" if ends[0] is None or ends[1] is None else f"{words.figure(ends[0])} to {words.figure(ends[1])}"


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
