"""The campaign of the benchmark of accuracy: what is run, what is gone on from, what is made again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy import __main__ as command_line
from benchmarks.accuracy import campaign, training
from benchmarks.accuracy.fronts import summary
from benchmarks.accuracy.training import RADII, Run
from benchmarks.campaign import partial_file
from benchmarks.layers.nets import OTNN, TORCHLIP, Plan
from otnn.errors import InputError
from tests.benchmarks.accuracy import dominates, fake


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *arguments: str) -> int:
    every = ("--data-dir", str(folder), "--library", OTNN, "--epochs", "1", "--workers", "1", "--out", str(out))
    monkeypatch.setattr("sys.argv", ["accuracy", *every, *arguments])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    return int(left.value.code or 0)


GRID = ("--learning-rate", "0.01", "--learning-rate", "0.02", "--margin", "0.25", "--temperature", "10")


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    """A report without the seconds, which differ between runs."""
    for row in [*report["runs"], *report["settings"]]:
        row.pop("seconds")
    return report


def test_a_stopped_campaign_goes_on_to_the_same_report(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "PLAN", Plan(((8, 1), (8, 2)), (16,), 28))
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert command(monkeypatch, clothes, whole, *GRID, "--seeds", "2") == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["whole.json", "whole.png"]
    assert whole.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = timeless(json.loads(whole.read_text()))
    assert [(row["seed"], row["learning_rate"]) for row in report["runs"]] == [
        (0, 0.01),
        (0, 0.02),
        (1, 0.01),
        (1, 0.02),
    ]
    assert {"otnn", "torch"} <= report["made with"]["versions"].keys()
    assert str(clothes) not in whole.read_text()
    for row in report["runs"]:
        held = [row["clean"], *row["certified"].values()]
        assert held == sorted(held, reverse=True)
        assert 0 < row["clean"] <= 1  # ten classes, far apart
        assert 0 < row["mean radius"] < 4  # by half of the distance of two images of 64 pixels at most
        assert len(row["norms"]) == len(row["proven"]["bounds"]) == 3  # two convolutions and a dense layer
        assert row["constant"] == pytest.approx(np.prod(row["norms"]))
        assert row["difference"] < 1e-4
    # seeds differ
    assert report["runs"][0]["mean radius"] != report["runs"][2]["mean radius"]

    # interrupted in the third run: the first seed is complete, and a report on it trains nothing
    trained: list[Run] = []

    def stopped(run: Run, **settings: object) -> dict[str, Any]:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(run)
        return training.measured(run, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(command_line, "measured", stopped)
    assert command(monkeypatch, clothes, out, *GRID, "--seeds", "2") == 130
    assert [(run.seed, run.learning_rate) for run in trained] == [(0, 0.01), (0, 0.02)]
    assert not out.exists()
    assert command(monkeypatch, clothes, out, *GRID, "--seeds", "1") == 0
    assert len(trained) == 2
    assert [row["seed"] for row in json.loads(out.read_text())["runs"]] == [0, 0]

    # going on from there trains the second seed only
    trained.clear()
    assert command(monkeypatch, clothes, out, *GRID, "--seeds", "2") == 0
    assert [(run.seed, run.learning_rate) for run in trained] == [(1, 0.01), (1, 0.02)]
    assert timeless(json.loads(out.read_text())) == report
    assert not partial_file(out).exists()

    # what was made otherwise is not taken for these
    stored = {"header": report["made with"], "runs": report["runs"]}
    partial_file(out).write_text(json.dumps(stored))
    capsys.readouterr()
    assert command(monkeypatch, clothes, out, *GRID, "--seeds", "1", "--epochs", "2") == 2
    assert "out.json.partial: begun with other epochs; delete it" in capsys.readouterr().err
    header = command_line.header_of(2)
    partial_file(out).unlink()
    assert campaign.finished(out, header) == {}
    assert "out.json: made with other epochs; its runs are made again" in capsys.readouterr().err.replace("\n", "")


def test_runs_of_other_settings_stay(tmp_path: Path) -> None:
    out, header = tmp_path / "out.json", {"epochs": 1}
    runs = [Run(OTNN, rate, 1.0, 10.0, 0) for rate in (1e-3, 2e-3, 3e-3)]
    campaign.run_all(runs[:2], fake, out, header, 1)
    rows = campaign.run_all(runs[1:], fake, out, header, 1)
    assert list(rows) == [runs[1], runs[2], runs[0]]
    assert set(campaign.finished(out, header)) == set(runs)
    with pytest.raises(InputError, match="begun with other epochs"):
        campaign.finished(out, {"epochs": 2})


def test_runs_of_other_code_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    runs = [Run(library, 1e-3, 1.0, 10.0, 0) for library in (OTNN, TORCHLIP)]
    assert training.code_digest(OTNN) != training.code_digest(TORCHLIP)
    campaign.run_all(runs, fake, out, {}, 1)
    assert list(campaign.finished(out, {})) == runs
    digest = training.code_digest
    monkeypatch.setattr(campaign, "code_digest", lambda name: digest(name) + "changed" * (name == OTNN))
    assert list(campaign.finished(out, {})) == runs[1:]
    assert "1 of 2 runs were made by other code" in capsys.readouterr().err.replace("\n", "")


def test_processes_make_the_same_runs(tmp_path: Path) -> None:
    runs = [Run(OTNN, 1e-3, 1.0, 10.0, seed) for seed in range(5)]
    rows = campaign.run_all(runs, fake, tmp_path / "out.json", {}, 2)
    assert rows == {run: fake(run) for run in runs}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--margin", "-1"), "margin: expected a positive number, got -1.0"),
        (("--learning-rate", "nan"), "learning_rate: expected a positive number, got nan"),
        (("--library", "lip"), "library: expected one of otnn, deel-torchlip, orthogonium, got 'lip'"),
    ],
)
def test_wrong_settings(
    clothes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    text: str,
) -> None:
    assert command(monkeypatch, clothes, tmp_path / "out.json", *arguments) == 2
    assert text in capsys.readouterr().err


def test_every_seed_goes_over_the_whole_grid_before_the_next() -> None:
    grid = {"learning_rate": [1e-3, 1e-2], "margin": [0.5], "temperature": [10.0, 20.0]}
    runs = command_line.runs_of(["a", "b"], grid, 3)
    assert len(set(runs)) == len(runs) == 3 * 4 * 2
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8 + [2] * 8
    assert [run.library for run in runs] == ["a", "b"] * 12
    assert {(r.learning_rate, r.temperature) for r in runs[:8]} == {(x, y) for x in (1e-3, 1e-2) for y in (10.0, 20.0)}


def test_only_settings_on_a_front_are_run_again() -> None:
    runs = command_line.runs_of([OTNN, TORCHLIP], {"learning_rate": [1e-3, 1e-2, 1e-1]}
                                | {"margin": [0.5], "temperature": [10.0]}, 1)  # fmt: skip
    points = dict(zip(runs, [(0.9, 0.4), (0.6, 0.7), (0.8, 0.7), (0.85, 0.5), (0.8, 0.3), (0.7, 0.5)], strict=True))
    made = {run: {**fake(run), "clean": clean, "certified": dict.fromkeys(RADII, held)}
            for run, (clean, held) in points.items()}  # fmt: skip
    again = command_line.narrowed(made, runs, 3)
    assert [(run.library, run.learning_rate, run.seed) for run in again] == [
        (library, rate, seed) for seed in (1, 2) for library, rate in expected_of(points)
    ]
    # a front is of settings with all seeds
    told = summary([*made.values(), *({**made[replace(run, seed=0)], "seed": run.seed} for run in again)])
    assert {len(one["seeds"]) for one in told["settings"]} == {1, 3}
    assert {one["clean"]["mean"] for one in told["fronts"]["1"][OTNN]} == {0.9, 0.8}


def test_stored_settings_count_where_all_libraries_have_them() -> None:
    grid = {"learning_rate": [1e-2], "margin": [0.5], "temperature": [10.0]}
    asked = command_line.runs_of([OTNN, TORCHLIP], grid, 2)
    whole = command_line.runs_of([OTNN, TORCHLIP], grid | {"margin": [4.0]}, 2)
    alone = command_line.runs_of([OTNN], grid | {"margin": [8.0]}, 2)
    once = command_line.runs_of([OTNN, TORCHLIP], grid | {"margin": [2.0]}, 1)
    rows = {run: fake(run) for run in [*asked, *whole, *alone, *once]}
    assert command_line.shared(rows, asked, [OTNN, TORCHLIP], 2) == whole
    assert set(command_line.shared(rows, asked, [OTNN, TORCHLIP], 1)) == {
        run for run in [*whole, *once] if run.seed == 0
    }


def expected_of(points: dict[Run, tuple[float, float]]) -> list[tuple[str, float]]:
    """Library and rate of what no setting of the same library dominates, by comparing all pairs."""
    return [
        (run.library, run.learning_rate)
        for run, point in points.items()
        if not any(dominates(other, point) for rival, other in points.items() if rival.library == run.library)
    ]
