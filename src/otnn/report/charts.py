"""Charts as geometry: where lines, bars and ticks stand, in the units of an SVG; charts.html.j2 draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to places.

    Attributes:
        low: the value at `start`.
        high: the value at `end`.
        start: a place in SVG units.
        end: likewise.
        share: label the ticks as percentages.
        unsigned: label them without their sign.
    """

    low: float
    high: float
    start: float
    end: float
    share: bool = False
    unsigned: bool = False

    def place(self, values: ArrayLike) -> NDArray[np.float64]:
        """The places of values."""
        return self.start + (np.asarray(values, dtype=float) - self.low) / (self.high - self.low) * (
            self.end - self.start
        )

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Places and labels of round values, at most `most` of them."""
        return [(round(float(self.place(v)), 1), self.label(v)) for v in round_values(self.low, self.high, most)]

    def label(self, value: float) -> str:
        """A value as a tick label."""
        value = abs(value) if self.unsigned else value
        return (f"{100 * value:.6g} %" if self.share else f"{value:.6g}").replace("-", "−")


@dataclass
class Chart:
    """A chart with its axes, and what was drawn into it.

    Attributes:
        title: what the chart shows, for its text alternative.
        description: what can be read from it, for its text alternative.
        x: the axis of the abscissa.
        y: the axis of the ordinate.
        x_label: its name and unit.
        y_label: likewise.
    """

    title: str
    description: str
    x: Axis
    y: Axis
    x_label: str
    y_label: str
    width: int
    height: int
    lines: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    zones: list[dict[str, Any]] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    zero: float | None = None
    marker: tuple[float, float] | None = None

    def line(self, x: ArrayLike, y: ArrayLike, style: str, name: str = "", *, steps: bool = False) -> None:
        """Draw a line through points; values that are not finite are left out.

        Args:
            x: (points,) values.
            y: likewise.
            style: the CSS class.
            name: the name in the legend, if any.
            steps: hold each value until the next point.
        """
        across, up = self.x.place(x), self.y.place(y)
        if steps:
            across, up = np.repeat(across, 2)[1:], np.repeat(up, 2)[:-1]
        finite = np.isfinite(across) & np.isfinite(up)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across[finite], up[finite], strict=True))
        self.lines.append({"points": points, "style": style})
        if name:
            self.legend.append((style, name))

    def bar(self, low: float, high: float, base: float, top: float, style: str, title: str) -> None:
        """Draw a bar between two abscissae, from `base` to `top`."""
        left, right = float(self.x.place(low)), float(self.x.place(high))
        one, two = sorted((float(self.y.place(base)), float(self.y.place(top))))
        box = {"x": left + 0.5, "y": one, "width": max(right - left - 1, 0.5), "height": two - one}
        self.bars.append({"style": style, "title": title} | {k: round(v, 2) for k, v in box.items()})

    def rule(self, value: float, style: str, name: str = "") -> None:
        """Draw a line across the chart at an abscissa."""
        self.rules.append({"x": round(float(self.x.place(value)), 1), "style": style})
        if name:
            self.legend.append((style, name))

    def zone(self, low: float, high: float, style: str) -> None:
        """Shade the chart between two abscissae."""
        left, right = float(self.x.place(low)), float(self.x.place(min(high, self.x.high)))
        self.zones.append({"x": round(left, 1), "width": round(max(right - left, 0.0), 1), "style": style})

    def points(self, x: ArrayLike, y: ArrayLike) -> list[list[float]]:
        """The places of points, as a marker moves over them."""
        pairs: list[list[float]] = np.stack([self.x.place(x), self.y.place(y)], axis=1).round(1).tolist()
        return pairs


def chart(
    title: str,
    description: str,
    x: tuple[float, float, str],
    y: tuple[float, float, str],
    *,
    share: bool = False,
    unsigned: bool = False,
    width: int = 400,
    height: int = 250,
) -> Chart:
    """An empty chart.

    Args:
        title: what it shows.
        description: what can be read from it.
        x: low, high and label of the abscissa.
        y: likewise of the ordinate.
        share: the ordinate is a share, labelled in percent.
        unsigned: values below zero are labelled without their sign, as in a mirrored histogram.
        width: of the whole chart, in SVG units.
        height: likewise.
    """
    across = Axis(*_spread(x[0], x[1]), 46, width - 12)
    upwards = Axis(*_spread(y[0], y[1]), height - 38, 22, share, unsigned)
    return Chart(title, description, across, upwards, x[2], y[2], width, height)


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def round_values(low: float, high: float, most: int) -> list[float]:
    """Round values in [low, high], at most `most`, with steps of 1, 2, 2.5 or 5 times a power of ten.

    Example:
        >>> round_values(0.0, 0.93, 6)
        [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if (high - low) / (s * power) <= most - 1 + 1e-9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]


def headroom(values: Sequence[float], *, share: float = 0.06) -> tuple[float, float]:
    """A range around the finite ones of some values, with a little room on both sides."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    room = share * (high - low) or 0.5
    return low - room, high + room
