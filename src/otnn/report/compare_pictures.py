"""The pictures of a comparison: maps side by side on one signed scale, and quality against forwards, as PNG."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otnn.report import words
from otnn.report.figures import DIVERGING
from otnn.report.gallery import unit_map
from otnn.report.pictures import label, show_image

# What is stronger than this share of all pixels has the colour of the end: a few peaks would leave all else white
_SHOWN = 0.995
COLOURS = {"otnn": "#a84300", "unconstrained": "#0b4f8a", "adversarial": "#4d7c3a"}
_MARKS = {"otnn": "o", "unconstrained": "s", "adversarial": "^"}


def maps_picture(
    images: NDArray[Any], labels: Sequence[str], columns: Sequence[tuple[str, str, NDArray[Any] | None]]
) -> bytes:
    """Draw images in rows, with the map of each network and method beside them.

    Maps are signed channel means on one symmetric colour scale, each divided by its own L2 norm.

    Args:
        images: (n, channels, height, width).
        labels: the class of each.
        columns: network, method and maps (n, channels, height, width), or None where the method does not apply.

    Returns:
        The bytes of a PNG.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    count = len(images)
    scaled = [None if maps is None else np.stack([unit_map(one) for one in maps]) for _, _, maps in columns]
    drawn = [np.abs(maps).ravel() for maps in scaled if maps is not None]
    limit = (float(np.quantile(np.concatenate(drawn), _SHOWN)) if drawn else 0.0) or 1.0
    colours = LinearSegmentedColormap.from_list("diverging", [[part / 255 for part in stop] for stop in DIVERGING])
    networks = list(dict.fromkeys(network for network, _, _ in columns))
    widths = [1, *(sum(network == one for one, _, _ in columns) for network in networks)]
    size = (max(1.25 * sum(widths) + 0.2, 6.5), 1.25 * count + 1.9)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    rows: Any = figure.subfigures(2, 1, height_ratios=(size[1] - 0.8, 0.8))
    groups = np.atleast_1d(rows[0].subfigures(1, len(widths), width_ratios=widths))
    groups[0].suptitle(" ", fontsize=13)
    for row, axes in enumerate(groups[0].subplots(count, 1, squeeze=False)[:, 0]):
        # an empty second line where the names of methods have one: the rows stay level
        show_image(axes, images[row], "")
        axes.set_title(label(labels[row]) + ("\n" if row == 0 else ""), fontsize=10)
    for network, width, group in zip(networks, widths[1:], groups[1:], strict=True):
        name = "\n".join(textwrap.wrap(words.network(network), 14 * width))
        group.suptitle(name, fontsize=13, color=COLOURS[network])
        grid = group.subplots(count, width, squeeze=False)
        own = [(method, maps) for (of, method, _), maps in zip(columns, scaled, strict=True) if of == network]
        for axes, (method, maps), row in ((grid[r][c], own[c], r) for r in range(count) for c in range(width)):
            axes.set_axis_off()
            lines = textwrap.wrap(words.method(method), 12)
            axes.set_title("\n".join([*lines, ""][:2]) if row == 0 else " ", fontsize=10)
            if maps is None:
                axes.text(0.5, 0.5, "not\napplicable", ha="center", va="center", fontsize=9, transform=axes.transAxes)
            else:
                axes.imshow(maps[row], cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    if drawn:
        scale = ScalarMappable(Normalize(-limit, limit), colours)
        bar = figure.colorbar(
            scale, cax=rows[1].add_axes((0.2, 0.62, 0.6, 0.22)), orientation="horizontal", extend="both"
        )
        bar.set_label(
            "blue speaks against, orange for the network's own answer (share of the map's L2 norm)", fontsize=10
        )
        bar.ax.tick_params(labelsize=10)
    return _png(figure)


def pareto_picture(content: Mapping[str, Any]) -> bytes:
    """Draw the quality of compare.json: mean rank over the metrics against the forwards of one map.

    The line joins those of all networks than which no other is both better and cheaper.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained", dpi=110)
    axes = figure.subplots()
    points = content["quality"]
    for network in content["networks"]:
        own = [point for point in points if point["network"] == network]
        axes.scatter(
            [point["forwards"] for point in own],
            [point["mean_rank"] for point in own],
            color=COLOURS[network],
            marker=_MARKS[network],
            s=40,
            label=words.network(network),
            zorder=3,
        )
    places: dict[tuple[str, int, float], list[str]] = {}
    for point in points:
        place = (point["network"], point["forwards"], round(point["mean_rank"], 2))
        places.setdefault(place, []).append(words.method(point["method"]))
    most = max((forwards for _, forwards, _ in places), default=1)
    for (network, forwards, rank), names in places.items():
        right = forwards**2 > most  # names stay within the axes
        axes.annotate(
            ", ".join(names),
            (forwards, rank),
            xytext=(-6, 3) if right else (6, 3),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=8,
            color=COLOURS[network],
        )
    front = sorted((point["forwards"], point["mean_rank"]) for point in points if point["front"])
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color="0.6", linewidth=1, zorder=1)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("forwards for one map")
    axes.set_ylabel("mean rank over the metrics (1 is best)")
    if points:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(fontsize=9)
    else:
        axes.text(0.5, 0.5, "nothing to rank", ha="center", transform=axes.transAxes)
    return _png(figure)


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
