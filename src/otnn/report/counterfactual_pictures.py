"""The grid of counterfactuals: images, signed maps and images along their way, in blocks of rows, as PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otnn.report.figures import DIVERGING
from otnn.report.gallery import unit_map

# What is stronger than this share of all pixels has the colour of the end: a few peaks would leave all else white
_SHOWN = 0.995
_FONT = 7.5
# Inches: of an image, between images, below one for its caption, above a block, and above all
_WIDE, _GAP, _CAPTION, _TITLES, _NOTE = 1.2, 0.1, 0.5, 0.62, 0.9
# of the page, so that the note fits
_LEAST = 7.5
# A small image below the caption, as a share of the size of the others, and its own caption
_SMALL, _LINE = 0.5, 0.34


@dataclass(frozen=True)
class Panel:
    """One cell of the grid.

    Attributes:
        values: (channels, height, width); None where only the caption is written.
        caption: what stands below, in lines.
        signed: draw the channel mean of a signed map instead of an image.
        below: a second image, drawn small below the caption.
    """

    values: NDArray[Any] | None
    caption: str
    signed: bool = False
    below: "Panel | None" = None


@dataclass(frozen=True)
class Block:
    """The rows of one network.

    Attributes:
        title: what stands above.
        rows: of panels, one a column; None leaves a cell empty.
    """

    title: str
    rows: Sequence[Sequence[Panel | None]]


def grid_picture(columns: Sequence[str], blocks: Sequence[Block], note: str) -> bytes:
    """Draw blocks of rows below each other, with titles over the columns of each.

    Maps are each divided by their own L2 norm, on one symmetric colour scale over all.

    Args:
        columns: the titles.
        blocks: with as many cells a row as columns.
        note: how to read it, below the title of the picture.

    Returns:
        The bytes of a PNG.
    """
    page = _Page(columns, blocks)
    page.write(page.width / 2, 0.08, note, _FONT + 1)
    top = _NOTE
    for block in blocks:
        page.write(page.width / 2, top + 0.06, block.title, _FONT + 3, fontweight="bold")
        for column, title in enumerate(columns):
            if block.rows and all(row[column] is None for row in block.rows):
                continue
            page.write(page.middle(column), top + _TITLES - 0.05, title, _FONT + 0.5, va="bottom")
        top += _TITLES
        for row in block.rows:
            for column, panel in enumerate(row):
                if panel is not None:
                    page.draw(column, top, panel)
            top += page.row(row)
    stream = io.BytesIO()
    page.figure.savefig(stream, format="png")
    return stream.getvalue()


class _Page:
    """One pair of axes in inches from the top left: a pair for each image, and a layout engine, would take seconds."""

    def __init__(self, columns: Sequence[str], blocks: Sequence[Block]) -> None:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure

        panels = [panel for block in blocks for row in block.rows for panel in row if panel is not None]
        shapes = [panel.values.shape for panel in panels if panel.values is not None]
        self.tall = _WIDE * max((height / width for _, height, width in shapes), default=1.0)
        self.width = max(_LEAST, len(columns) * (_WIDE + _GAP) + _GAP)
        self.height = _NOTE + sum(_TITLES + sum(map(self.row, block.rows)) for block in blocks)
        self.figure: Any = Figure(figsize=(self.width, self.height), dpi=110)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, self.width), ylim=(self.height, 0), autoscale_on=False)
        self.limit = _limit(panels)
        stops = [[part / 255 for part in stop] for stop in DIVERGING]
        self.colours = LinearSegmentedColormap.from_list("diverging", stops)

    def row(self, panels: Sequence[Panel | None]) -> float:
        """The height of a row with its captions."""
        small = any(panel is not None and panel.below is not None for panel in panels)
        return float(self.tall + _CAPTION + small * (_SMALL * self.tall + _LINE))

    def middle(self, column: int) -> float:
        """The middle of a column."""
        return _GAP + column * (_WIDE + _GAP) + _WIDE / 2

    def write(self, x: float, y: float, text: str, size: float, va: str = "top", **how: Any) -> None:
        """A text that is centred at x."""
        self.axes.text(x, y, text, fontsize=size, ha="center", va=va, **how)

    def draw(self, column: int, top: float, panel: Panel, size: float = 1.0) -> None:
        """A panel with its caption, and what stands below it."""
        middle, wide, tall = self.middle(column), size * _WIDE, size * self.tall
        if panel.values is None:
            self.write(middle, top + tall / 4, panel.caption, _FONT)
            return
        place = (middle - wide / 2, middle + wide / 2, top + tall, top)
        how: dict[str, Any] = {"extent": place, "aspect": "auto", "interpolation": "nearest"}
        if panel.signed:
            self.axes.imshow(unit_map(panel.values), cmap=self.colours, vmin=-self.limit, vmax=self.limit, **how)
        else:
            pixels = np.clip(panel.values, 0, 1)
            shown = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels.mean(axis=0)
            self.axes.imshow(shown, cmap="gray", vmin=0, vmax=1, **how)
        self.write(middle, top + tall + 0.04, panel.caption, _FONT)
        if panel.below is not None:
            self.draw(column, top + tall + _CAPTION, panel.below, _SMALL)


def _limit(panels: Sequence[Panel]) -> float:
    """The end of the colour scale of all maps."""
    maps = [np.abs(unit_map(p.values)).ravel() for p in panels if p.signed and p.values is not None]
    return (float(np.quantile(np.concatenate(maps), _SHOWN)) if maps else 0.0) or 1.0
