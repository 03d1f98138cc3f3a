"""The fronts of the benchmark of accuracy: what lies on one, which lies above which, and how that is told."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy import __main__ as command_line
from benchmarks.accuracy.fronts import excess, front, summary
from benchmarks.accuracy.training import RADII, Run
from benchmarks.layers.nets import OTNN, TORCHLIP
from tests.benchmarks.accuracy import dominates, fake

coordinates = st.integers(0, 6).map(lambda k: k / 8)
points_of = st.lists(st.tuples(coordinates, coordinates), max_size=12)


@given(points_of)
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    expected = {k for k, point in enumerate(points) if not any(dominates(other, point) for other in points)}
    found = front(points)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [points[k][0] for k in found] == sorted((points[k][0] for k in found), reverse=True)


@given(st.tuples(coordinates, coordinates), points_of.filter(bool))
def test_the_excess_is_the_least_that_matches(point: tuple[float, float], others: list[tuple[float, float]]) -> None:
    def matched(added: float) -> bool:
        return any(x + added >= point[0] and y + added >= point[1] for x, y in others)

    least = excess(point, others)
    assert matched(least)
    assert not matched(least - 1 / 8)  # coordinates and so the excess are multiples of it
    assert (least <= 0) == matched(0)


def rows(library: str, points: dict[float, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Runs with a point for each seed, by learning rate; the same certified accuracy at every radius."""
    return [
        {**fake(Run(library, rate, 1.0, 10.0, seed)), "clean": clean, "certified": dict.fromkeys(RADII, held)}
        for rate, own in points.items()
        for seed, (clean, held) in enumerate(own)
    ]


def test_a_front_that_lies_above() -> None:
    ours = rows(OTNN, {1e-3: [(0.9, 0.4), (0.88, 0.42)], 1e-2: [(0.8, 0.7), (0.8, 0.7)]})
    theirs = rows(TORCHLIP, {1e-3: [(0.89, 0.3), (0.89, 0.3)], 1e-2: [(0.79, 0.65), (0.81, 0.75)]})
    told = summary([*ours, *theirs])
    # the means 0.89, 0.8 match the clean accuracies 0.89 and 0.8; the second point has no more certified accuracy
    assert [(row["radius"], row["above"], row["points"], row["matched"]) for row in told["comparison"]] == [
        (radius, True, 2, 2) for radius in RADII
    ]
    second = told["comparison"][0]["front"][1]
    assert second["learning_rate"] == 1e-2
    assert second["certified"] == {"mean": 0.7, "min": 0.65, "max": 0.75}
    assert second["excess"] == 0
    assert second["excess by seed"] == pytest.approx([-0.01, 0.05])


def test_a_point_that_is_not_matched_is_told_with_how_much() -> None:
    ours = rows(OTNN, {1e-3: [(0.9, 0.4)], 1e-2: [(0.8, 0.7)]})
    theirs = rows("orthogonium", {1e-3: [(0.85, 0.6)], 1e-2: [(0.7, 0.5)]})
    (row, *_) = summary([*ours, *theirs])["comparison"]
    assert (row["peer"], row["above"], row["points"], row["matched"]) == ("orthogonium", False, 1, 0)
    # 0.05 more clean accuracy for (0.8, 0.7), or 0.2 more certified accuracy for (0.9, 0.4)
    assert row["front"][0]["excess"] == pytest.approx(0.05)


def test_a_setting_that_diverged_is_in_no_front() -> None:
    ours = rows(OTNN, {1e-3: [(0.9, 0.4), (0.9, 0.4)], 1e-2: [(0.99, 0.9), (0.99, 0.9)]})
    broken = {**{name: ours[-1][name] for name in Run.__dataclass_fields__}, "diverged": "at step 3"}
    told = summary([*ours[:-1], broken, *rows(TORCHLIP, {1e-3: [(0.95, 0.5)] * 2})])
    assert told["diverged"] == [{"library": OTNN, "learning_rate": 1e-2, "margin": 1.0, "temperature": 10.0}]
    assert [one["learning_rate"] for one in told["settings"] if one["library"] == OTNN] == [1e-3]
    assert not any(row["above"] for row in told["comparison"])


def test_lines_and_plot_of_a_report() -> None:
    both = [*rows(OTNN, {1e-3: [(0.9, 0.4)]}), *rows(TORCHLIP, {1e-3: [(0.85, 0.6)], 1e-2: [(0.8, 0.3)]})]
    report = summary(both)
    text = "\n".join(command_line.lines(report))
    assert text.count("NOT ABOVE: deel-torchlip at ") == len(RADII)
    assert "not matched: rate 0.001, margin 1, temperature 10, by +20.00 points (by seed +20.00)" in text
    picture = command_line.plot(report)
    assert picture.startswith(b"\x89PNG")
    # every point that is reported is drawn
    assert picture != command_line.plot(summary(both[:-1]))
