"""Attacks on the command line, in tables, pictures and the report."""

import copy
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from otnn.attacks.table import ATTACKS
from otnn.cli import main
from otnn.cli.tables import attack_tables
from otnn.errors import InputError
from otnn.report import words
from otnn.report.attack import attack_section
from otnn.report.load import load_run
from otnn.report.page import render
from otnn.run import attack as stage
from otnn.run.attack_checks import check_all
from otnn.run.folder import Run
from tests.run.attacks import Told


def test_on_the_command_line(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["otnn", "attack", str(run.path), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()  # type: ignore[return-value]

    how = ("--samples", "12", "--attacks", "step, pgd", "--radii", "0.25,0.5", "--device", "cpu")
    code, out, _ = command(*how, "--box", "--seed", "5", "--json")
    content = json.loads(out)
    assert code == (1 if content["failed"] else 0)
    assert content == json.loads((run.path / "attacks.json").read_text())
    assert (content["box"], content["seed"], content["radii"]) == (True, 5, [0, 0.25, 0.5, 8])
    code, out, _ = command(*how, "--settings", "--steps", "3")
    assert code == 0
    told = json.loads((run.path / "attacks.json").read_text())
    for text in ("best attack", "certified <= attacked", "gaussian blur", *told["verdict"][0].split()[:6]):
        assert text in out
    assert out.count("% right within a radius") == 2
    code, _, err = command("--radii", "a")
    assert (code, err) == (2, "otnn: --radii: expected numbers with commas, such as 0.25,0.5, got 'a'\n")
    code, _, err = command("--attacks", "x")
    assert code == 2
    assert err.startswith("otnn: attacks: expected some of step, pgd")


def test_tables_over_the_usual_radii_fit_80_columns(told: Told) -> None:
    content = copy.deepcopy(told[1])
    for figures in content["networks"].values():  # the widest figures, and the longest name
        figures["attacks"] = {name: {"accuracy": [0.885] * 11, "collapse": None} for name in ATTACKS}
    screen = io.StringIO()
    for table in attack_tables(content)[:2]:
        Console(file=screen, width=80).print(table)
    rows = screen.getvalue().splitlines()
    assert not any("\N{HORIZONTAL ELLIPSIS}" in row for row in rows)
    assert sum(row.count("88.5") for row in rows) >= 2 * len(ATTACKS) * 11


def test_the_picture_draws_what_it_is_given(told: Told) -> None:
    content = copy.deepcopy(told[1])
    del content["networks"]["unconstrained"]
    for figures in content["networks"]["otnn"]["attacks"].values():
        figures["collapse"] = None
    with (
        Image.open(io.BytesIO(stage.attack_picture(content))) as alone,
        Image.open(io.BytesIO(stage.attack_picture(told[1]))) as whole,
    ):
        assert alone.size[0] < whole.size[0]
        assert alone.size[1] < whole.size[1]


def test_the_report_shows_attacks_and_shouts_where_a_check_failed(whole: Path) -> None:
    files = load_run(whole)
    content = files.attacks
    assert content is not None
    page = render(files)
    assert 'href="#attack"' in page
    assert "FAILED" not in page
    radii = attack_section(files)
    assert radii is not None
    otnn = content["networks"]["otnn"]
    assert radii.radii[1][1][:2] == [words.percent(otnn["certified"][1]), words.percent(otnn["best"]["accuracy"][1])]
    assert f"Share of the pictures that are right within a radius ({radii.norm})" in page
    row = content["corruptions"]["rows"][0]
    name, size, cells = radii.corruptions[0]
    assert (name, size) == ("gaussian noise, deviation 0.05", f"{row['mean_size']:.2f}")
    assert cells == [words.percent(row["accuracy"][network]) for network in content["networks"]]
    assert f'<th scope="row">{name}</th><td class="number">{size}</td><td class="number">{cells[0]}</td>' in page
    content["networks"]["otnn"]["at_largest"] = 0.5
    content["checks"] = check_all(content)
    content["failed"] = sum(row["passed"] is False for row in content["checks"])
    shouted = render(files)
    assert "1 check FAILED: the figures below are not to be trusted." in shouted
    assert "<strong>FAILED</strong>" in shouted
    assert 'href="#attack"' not in render(replace(files, attacks=None))
    (whole / "attacks.png").unlink()
    with pytest.raises(InputError, match=r"attacks\.png: no such file; make it with `otnn attack"):
        load_run(whole)
