"""Counterfactuals on the page: absent without the file, and its figures, sentences and curves with it."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from otnn.errors import InputError
from otnn.report.counterfactuals import counterfactual_section
from otnn.report.load import load_run
from tests.report.synthetic import NASTY, write_page

LENGTHS = [0.0, 0.5, 1.0, 1.5, 2.0]


def cell(mean: float | None, **more: Any) -> dict[str, Any]:
    interval = [None, None] if mean is None else [0.9 * mean, 1.1 * mean]
    return {"mean": mean, "interval": interval, "direction": "up", "best": False, "samples": 9, "undefined": 0, **more}


def along(start: float, end: float) -> dict[str, Any]:
    return {
        "lengths": LENGTHS,
        "data_distance": {"mean": np.linspace(start, end, 5).tolist()},
        "nearest_is_target": {"mean": [0.0, 0.1, 0.2, 0.4, 0.8]},
    }


def network(validity: float, *, best: bool = False) -> dict[str, Any]:
    measures = {
        "validity": cell(validity, best=best),
        "distance": cell(0.0123, direction="down"),
        "independent_score_start": cell(None),
    }
    return {"measures": measures, "statuses": {"ok": 8, f"not {NASTY}": 1}, "along": along(1.6, 1.2), "seconds": 1.0}


@pytest.fixture
def content() -> dict[str, Any]:
    names = (("validity", True), ("distance", False), ("independent_score_start", False))
    return {
        "format": 1,
        "samples": 9,
        "from": None,
        "to": None,
        "box": False,
        "iterations": 1,
        "judge": {"from": None, "accuracy": 0.975, "seed": 1, "epochs": 5},
        "columns": [{"name": name, "meaning": f"what {name} is", "compared": compared} for name, compared in names],
        "along": {"samples": 9, "columns": []},
        "networks": {"otnn": network(0.8123, best=True), "unconstrained": network(0.5), "adversarial": network(0.25)},
        "verdict": [f"It says {NASTY} & more."],
    }


def with_counterfactuals(run: Path, content: dict[str, Any]) -> str:
    """The section as text of the page."""
    (run / "counterfactuals.json").write_text(json.dumps(content))
    (run / "counterfactuals.png").write_bytes(b"\x89PNG of the grid")
    page = write_page(run).read_text()
    found = re.search(r'<section id="counterfactuals".*?</section>', page, re.S)
    assert found
    assert '<a href="#counterfactuals">' in page
    return found[0]


def test_the_page_does_without_it(run: Path) -> None:
    page = write_page(run).read_text()
    assert 'id="counterfactuals"' not in page
    assert "#counterfactuals" not in page
    assert counterfactual_section(load_run(run)) is None


def test_picture_table_and_sentences_are_those_of_the_file(run: Path, content: dict[str, Any]) -> None:
    section = with_counterfactuals(run, content)
    assert section.count("data:image/png;base64,") == 1
    assert "<b>" not in section
    text = html.unescape(section)
    assert content["verdict"][0] in text
    assert f"not {NASTY}" in text
    cells = re.findall(r'<td class="number">(.*?)</td>', section)
    assert cells[:3] == [
        '<strong>81.2 %</strong><br><span class="quiet">73.1 % to 89.4 %</span>',
        '50.0 %<br><span class="quiet">45.0 % to 55.0 %</span>',
        '25.0 %<br><span class="quiet">22.5 % to 27.5 %</span>',
    ]
    assert cells[3].startswith("0.0123<br>")
    assert cells[6] == "–"
    rows = re.findall(r'<th scope="row"><strong>(.*?)</strong><br><span class="quiet">(.*?)</span>', section)
    assert rows == [
        ("validity ↑", "what validity is"),
        ("distance", "what distance is"),
        ("independent score, picture itself", "what independent_score_start is"),
    ]
    assert "9 test pictures were moved" in text
    assert "right on 97.5 % of the test pictures" in text
    assert "follow one straight line; they may leave the range" in text
    assert "the ordinary one that was trained on attacks" in text


def test_the_curves_are_the_means_along_the_way(run: Path, content: dict[str, Any]) -> None:
    with_counterfactuals(run, content)
    section = counterfactual_section(load_run(run))
    assert section is not None
    for drawn, values in zip(section.charts, ([1.6, 1.5, 1.4, 1.3, 1.2], [0.0, 0.1, 0.2, 0.4, 0.8]), strict=True):
        assert [line["style"] for line in drawn.lines] == ["otnn", "twin", "adversarial"]
        points = np.array([[float(v) for v in pair.split(",")] for pair in drawn.lines[0]["points"].split()])
        np.testing.assert_allclose(points[:, 0], drawn.x.place(LENGTHS), atol=0.06)
        np.testing.assert_allclose(points[:, 1], drawn.y.place(values), atol=0.06)
        assert drawn.rules[0]["x"] == pytest.approx(float(drawn.x.place(1.0)), abs=0.06)
    assert "Ordinary network: from 1.60 to 1.20" in section.charts[0].description
    assert "Optimal-transport network: from 0.0 % to 80.0 %" in section.charts[1].description


def test_settings_and_a_part_of_the_pictures_are_told(run: Path, content: dict[str, Any]) -> None:
    content |= {"from": NASTY, "to": "two", "box": True, "iterations": 3}
    content["along"]["samples"] = 4
    content["judge"]["from"] = "other"
    text = html.unescape(with_counterfactuals(run, content))
    assert f"of “{NASTY}” were moved on each network towards “two”" in text
    assert "turns 5 times at most and stay in the range" in text
    assert "follow the first 4 of the pictures" in text
    assert "an ordinary network of another run" in text


def test_without_a_single_path_there_is_no_curve(run: Path, content: dict[str, Any]) -> None:
    nothing = {"lengths": [None] * 5, "data_distance": {"mean": [None] * 5}, "nearest_is_target": {"mean": [None] * 5}}
    content["networks"] = {"otnn": network(0.0) | {"along": nothing}}
    section = with_counterfactuals(run, content)
    assert "There is no picture to tell of." in section
    assert "nan" not in section.lower()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda run, c: (run / "counterfactuals.png").unlink(),
            r"counterfactuals\.png: no such file; make it with `otnn",
        ),
        (lambda run, c: (run / "counterfactuals.json").unlink(), r"counterfactuals\.json: no such file; make it with"),
        (lambda run, c: c.update(format=2), "expected format 1, got 2; make it with `otnn counterfactual "),
        (lambda run, c: c.pop("along"), r"counterfactuals\.json: lacks along; make it with `otnn counterfactual "),
    ],
)
def test_files_that_do_not_fit_are_named_with_their_mend(
    run: Path, content: dict[str, Any], change: Any, text: str
) -> None:
    with_counterfactuals(run, content)
    change(run, content)
    if (run / "counterfactuals.json").exists():
        (run / "counterfactuals.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=text):
        write_page(run)
