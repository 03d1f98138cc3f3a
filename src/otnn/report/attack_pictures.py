"""The picture of attacks: certified and attacked accuracy over radii of each network, and how the attacks collapse."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from otnn.report import words
from otnn.report.compare_pictures import COLOURS

# Told apart by colour-blind readers (Okabe and Ito 2008), then by dashes
_LINES = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#7a5b00", "#999999", "#000000", "#5b2a86")
_DASHES = ("-", "--", "-.", ":")
_BINS = 40
# Of the distances and radii that are drawn: the last are few and far out
_SHOWN = 0.99


def attack_picture(content: Mapping[str, Any]) -> bytes:
    """Draw attacks.json.

    Above, for each network, the share that is certified (filled) and that each attack leaves, over the radius; attacks
    within a radius are known at the radii of the grid alone (dots). Below, of the OTNN and of its twin, histograms of
    the cosine between perturbation and gradient, and of the distance over the certified radius.

    Returns:
        The bytes of a PNG.
    """
    from matplotlib.figure import Figure

    names = list(content["networks"])
    collapsed = [name for name in names if any(_told(content, name).values())][:2]
    panels: list[tuple[str, str]] = [(name, "cosine") for name in collapsed]
    panels += [(name, "ratio") for name in collapsed[:1]]
    columns = max(len(names), len(panels))
    figure: Any = Figure(figsize=(4.4 * columns, 7.4 if panels else 4.2), layout="constrained", dpi=110)
    grid = figure.subplots(2 if panels else 1, columns, squeeze=False)
    styles = {
        name: {"color": _LINES[k % len(_LINES)], "linestyle": _DASHES[k % len(_DASHES)]}
        for k, name in enumerate(content["attacks"])
    }
    end = _end(content)
    for axes, name in zip(grid[0], names, strict=False):
        _curves(axes, content, name, styles, end)
    for axes, (name, what) in zip(grid[-1] if panels else (), panels, strict=False):
        _histogram(axes, content, name, what, styles)
    for axes in grid.ravel():
        if not axes.has_data():
            axes.set_axis_off()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _curves(axes: Any, content: Mapping[str, Any], name: str, styles: Mapping[str, Any], end: float) -> None:
    network = content["networks"][name]
    grid = np.linspace(0, end, 400)
    radius = np.array(network["certified_radius"])
    right = np.array([each != 0 for each in network["best"]["distance"]])  # 0 where the prediction is wrong
    share = (right & (radius >= grid[:, None])).mean(axis=1)
    axes.fill_between(grid, share, color=COLOURS[name], alpha=0.3, linewidth=0, label="certified")
    for attack, style in styles.items():
        told = network["attacks"][attack]
        label = words.attack(attack)
        if content["attacks"][attack]["minimal"]:
            distance = np.array([np.inf if each is None else each for each in told["distance"]])
            axes.plot(grid, (distance > grid[:, None]).mean(axis=1), linewidth=1.4, label=label, **style)
        else:
            axes.plot(content["radii"], told["accuracy"], linewidth=1.2, marker="o", ms=3, label=label, **style)
    axes.set_title(words.network(name), fontsize=12, color=COLOURS[name])
    axes.set(xlim=(0, end), ylim=(0, 1.02), xlabel=f"radius ({_NORMS[content['norm']]} norm, pixels in [0, 1])")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("share right")


_NORMS = {"l2": "L2", "linf": "largest"}


def _histogram(axes: Any, content: Mapping[str, Any], name: str, what: str, styles: Mapping[str, Any]) -> None:
    told = {attack: [each for each in values[what] if each is not None] for attack, values in _values(content, name)}
    every = np.concatenate([np.array(values, dtype=float) for values in told.values()] or [np.zeros(0)])
    if not len(every):
        return
    low, high = float(every.min()), 1.0
    if what == "ratio":
        low, high = min(1.0, low), float(np.quantile(every, _SHOWN))
    edges = np.linspace(min(low, high - 0.05), high, _BINS + 1)
    for attack, values in told.items():
        if values:
            clipped = np.clip(values, edges[0], edges[-1])
            weights = np.full(len(values), 1 / len(values))
            axes.hist(clipped, edges, weights=weights, histtype="step", linewidth=1.3, **styles[attack])
    title = {
        "cosine": f"{words.network(name)}:\ncosine of perturbation and gradient",
        "ratio": f"{words.network(name)}:\ndistance over certified radius",
    }
    axes.set_title(title[what], fontsize=11, color=COLOURS[name])
    axes.set_xlabel({"cosine": "cosine", "ratio": "distance / radius (the last bin holds all beyond)"}[what])
    axes.set_ylabel("share of the turned images")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _told(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {attack: told["collapse"] for attack, told in content["networks"][name]["attacks"].items()}


def _values(content: Mapping[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    return [(attack, told["per_sample"]) for attack, told in _told(content, name).items() if told]


def _end(content: Mapping[str, Any]) -> float:
    """The radius up to which is drawn: where little is left of every network, wherever the grid has its radii."""
    last: float = content["radii"][-1]
    ends = []
    for network in content["networks"].values():
        best = sorted(last if each is None else each for each in network["best"]["distance"])
        ends.append(best[int(_SHOWN * (len(best) - 1))])
    return min(1.1 * max(ends), last) or last
