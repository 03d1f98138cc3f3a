"""The figure of potentials in the plane: level sets, and the segments from each sample to where its gradient leads."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLUE, ORANGE, RED = "#0b4f8a", "#e07b1a", "#c01818"
# Between two level lines; where a 1-Lipschitz function has its full slope they are as far apart.
_STEP = 0.1


class Panel(NamedTuple):
    """One potential.

    Attributes:
        title: its name.
        axis: (size,) places of the grid, on both axes.
        values: (size, size) the potential there, rows upwards.
        starts: (samples, 2) the samples.
        ends: (samples, 2) where their segments end.
    """

    title: str
    axis: NDArray[Any]
    values: NDArray[Any]
    starts: NDArray[Any]
    ends: NDArray[Any]


def levels_picture(points: NDArray[Any], labels: NDArray[Any], panels: Sequence[Panel]) -> bytes:
    """Draw a row for each potential: data with level sets, then the segments of each class.

    The zero level is a red dashed line; class 1 is blue, class 0 orange.

    Args:
        points: (samples, 2).
        labels: (samples,) of 0 and 1.
        panels: the potentials.

    Returns:
        The bytes of a PNG.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.5 * len(panels)), layout="constrained", dpi=110)
    rows = figure.subplots(len(panels), 3, squeeze=False)
    for row, panel in zip(rows, panels, strict=True):
        first, *others = row
        for label, colour, sign in ((1, BLUE, 1), (0, ORANGE, -1)):
            levels = _STEP * np.arange(1, np.floor((sign * panel.values).max() / _STEP) + 1)
            if len(levels):
                style: Any = {"colors": colour, "linestyles": "solid", "linewidths": 0.5}
                first.contour(panel.axis, panel.axis, panel.values, levels=np.sort(sign * levels), **style)
            first.scatter(*points[labels == label].T, s=2, color=colour)
        first.set_title(f"{panel.title}: level sets, {_STEP} apart")
        for axes, label, colour in ((others[0], 1, BLUE), (others[1], 0, ORANGE)):
            chosen = labels == label
            lines = np.stack([panel.starts[chosen], panel.ends[chosen]], axis=1)
            axes.add_collection(LineCollection(list(lines), colors=colour, linewidths=0.8))
            axes.scatter(*points[chosen].T, s=3, color=colour)
            axes.set_title(r"from $x$ to $x - f(x)\,\nabla f(x)$, " + f"class {label}")
        for axes in row:
            if panel.values.min() < 0 < panel.values.max():
                axes.contour(
                    panel.axis, panel.axis, panel.values, levels=[0.0], colors=RED, linestyles="dashed", linewidths=1.2
                )
            axes.set_aspect("equal")
            axes.set_xlim(panel.axis[0], panel.axis[-1])
            axes.set_ylim(panel.axis[0], panel.axis[-1])
            axes.tick_params(labelsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
