"""The numbers behind the page, against closed forms."""

from pathlib import Path

import numpy as np
import pytest

from otnn.report.charts import chart, round_values
from otnn.report.figures import sheet
from otnn.report.gallery import decisions, unit_map
from otnn.report.load import load_run
from otnn.report.page import certified_chart, histogram, radius_rows
from otnn.report.words import down, in_one_place, percent, up


def points(text: str) -> np.ndarray:
    return np.array([[float(v) for v in pair.split(",")] for pair in text.split()])


def test_the_curve_is_the_share_of_right_samples_with_at_least_the_radius(run: Path) -> None:
    files = load_run(run)
    certificates = files.certificates
    right = certificates["label"] == certificates["prediction"]
    drawn = certified_chart(files)
    curve = points(drawn.lines[0]["points"])
    radii = drawn.x.low + (curve[:, 0] - drawn.x.start) / (drawn.x.end - drawn.x.start) * (drawn.x.high - drawn.x.low)
    shares = (drawn.y.start - curve[:, 1]) / (drawn.y.start - drawn.y.end)
    step = drawn.x.high / 480
    for radius, share in zip(radii, shares, strict=True):
        above = (right & (certificates["radius"] >= radius + 1.5 * step)).mean()
        below = (right & (certificates["radius"] >= radius - 1.5 * step)).mean()
        assert above - 0.0005 <= share <= below + 0.0005
    assert shares[0] == pytest.approx(right.mean(), abs=0.0005)
    assert shares[-1] == 0
    clean = points(drawn.lines[1]["points"])
    assert (drawn.y.start - clean[0, 1]) / (drawn.y.start - drawn.y.end) == pytest.approx(0.9833, abs=0.0005)
    assert drawn.lines[1]["style"] == "twin"


def test_the_bars_of_each_group_sum_to_one(run: Path) -> None:
    drawn = histogram(load_run(run))
    unit = float(drawn.y.place(0.0) - drawn.y.place(1.0))
    for style in ("right", "wrong"):
        total = sum(bar["height"] for bar in drawn.bars if bar["style"] == style)
        assert total / unit == pytest.approx(1, abs=0.01)
    zero = float(drawn.y.place(0.0))
    assert all((bar["y"] < zero - 0.01) == (bar["style"] == "right") for bar in drawn.bars)


def test_a_radius_in_words(run: Path) -> None:
    row = {row["radius"]: row for row in radius_rows(load_run(run))}["0.5"]
    assert float(row["evenly"]) == pytest.approx(0.5 / 8 * 255, abs=0.05)
    assert row["one_place"] == "50 % of the way for 1 pixel"
    assert in_one_place(1.0, 1) == "1 pixel"
    assert in_one_place(3.0, 3) == "3.0 pixels"


@pytest.mark.parametrize("value", [0.25, 0.1, 1 / 3, 0.0099999, 1e-7, 2.9999])
def test_certificates_are_rounded_down_and_bounds_up(value: float) -> None:
    assert value * 0.9 <= float(down(value)) <= value
    assert value <= float(up(value)) <= value + 1e-6


def test_only_all_is_100_percent() -> None:
    assert (percent(1.0), percent(0.99996), percent(0.0), percent(0.5)) == ("100 %", "above 99.99 %", "0 %", "50.0 %")


def test_a_map_has_norm_one_before_the_mean_over_channels() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 5))
    expected = values.mean(axis=0) / np.sqrt((values**2).sum())
    np.testing.assert_allclose(unit_map(1000 * values), expected)
    np.testing.assert_array_equal(unit_map(np.zeros((3, 5, 5))), np.zeros((5, 5)))


def test_decisions_are_sign_or_argmax() -> None:
    assert decisions(np.array([[-0.1], [0.0], [0.1]])) == [0, 0, 1]
    assert decisions(np.array([[0.1, 0.3, 0.2], [0.4, 0.3, 0.2]])) == [1, 0]


def test_windows_of_a_sheet_never_touch() -> None:
    drawn = sheet(np.zeros((21, 1, 64, 64)))
    windows = np.array([[int(v) for v in drawn.window(k).split()] for k in range(21)])
    assert len({(x, y) for x, y, _, _ in windows.tolist()}) == 21
    assert (windows[:, 0] + 64 < drawn.width).all()
    assert (windows[:, 1] + 64 < drawn.height).all()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.37, 1.9), (0, 1e-5), (3, 1234), (-2e6, -1e6)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    values = round_values(low, high, 6)
    assert 2 <= len(values) <= 6
    assert all(low - 1e-9 * (high - low) <= v <= high + 1e-9 * (high - low) for v in values)


def test_a_chart_of_one_value_has_a_range() -> None:
    drawn = chart("a", "b", (1.0, 1.0, "x"), (0.0, 0.0, "y"))
    drawn.line([1.0], [0.0], "otnn")
    assert drawn.x.low < 1 < drawn.x.high
    assert "nan" not in drawn.lines[0]["points"]
