"""The picture of local and global counterfactuals in the plane: two arrows from each sample."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otnn.report.levels import BLUE, ORANGE

GREY = "#b4b4b4"
# The corner of the plane that is shown, on both axes
_CORNER = (-0.1, 1.65)


class Panel(NamedTuple):
    """One potential.

    Attributes:
        title: its name.
        starts: (arrows, 2) the samples.
        local: (arrows, 2) their reflected points.
        partners: (arrows, 2) their partners under the plan.
    """

    title: str
    starts: NDArray[Any]
    local: NDArray[Any]
    partners: NDArray[Any]


def arrows_picture(points: NDArray[Any], labels: NDArray[Any], panels: Sequence[Panel]) -> bytes:
    """Draw the upper right of the plane for each potential, class 1 in blue and class 0 in orange.

    Args:
        points: (samples, 2) all data.
        labels: (samples,) of 0 and 1.
        panels: the potentials, side by side.

    Returns:
        The bytes of a PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 5.1), layout="constrained", dpi=100)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    arrow: Any = {"angles": "xy", "scale_units": "xy", "scale": 1, "zorder": 2}
    for axes, panel in zip(row, panels, strict=True):
        for label, colour in ((1, BLUE), (0, ORANGE)):
            axes.scatter(*points[labels == label].T, s=4, color=colour, alpha=0.5, linewidths=0)
        starts = panel.starts.T
        inside = np.all((panel.starts > _CORNER[0]) & (panel.starts < _CORNER[1]), axis=1)
        for ends, colour, width, name in (
            (panel.partners, GREY, 0.01, "partner under the plan"),
            (panel.local, "black", 0.0035, "reflected point"),
        ):
            ways = (ends - panel.starts)[inside].T
            axes.quiver(*starts[:, inside], *ways, color=colour, width=width, label=name, **arrow)
        axes.scatter(*starts[:, inside], s=14, color="black", zorder=3)
        axes.set_title(panel.title)
        axes.set_aspect("equal")
        axes.set_xlim(*_CORNER)
        axes.set_ylim(*_CORNER)
        axes.tick_params(labelsize=8)
    handles, names = row[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
