"""The benchmark of the exact optimum, at sizes that take no time."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import transport
from otnn.transport import TransportProblem, solve


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.delenv("OTNN_DATA_DIR", raising=False)
    monkeypatch.setattr("sys.argv", ["transport", *arguments])
    with pytest.raises(SystemExit) as left:
        transport.main()
    return int(left.value.code or 0)


SMALL = ("--samples", "30", "--dims", "40", "--rounds", "2", "--naive", "--size", "20")


def test_report_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    assert command(monkeypatch, *SMALL, "--size", "30", "--out", str(out)) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.png"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    assert {"otnn", "torch", "ot", "scipy"} <= report["versions"].keys()
    assert report["seed"] == 0
    (row,) = report["comparison"]
    assert row["data"] == "gaussian, 40 dimensions"
    # the three ways mean the same problems, and the fixed margin binds
    assert row["relative difference"].keys() == {"ot.emd", "naive, fixed margin", "naive, learned margin"}
    assert max(row["relative difference"].values()) < 1e-9
    assert row["problems"]["fixed margin"]["mass"] > 1.01
    assert row["problems"]["learned margin"]["mass"] == pytest.approx(1 + 10 * 0.1 / 2)
    assert row["problems"]["plain"]["mass"] == pytest.approx(1)
    assert all(spread["min"] > 0 for spread in row["seconds"].values())
    for ratio in row["ratio to ot.emd"].values():
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert [(row["n"], row["dims"]) for row in report["growth"]] == [(20, 2), (20, 784), (30, 2), (30, 784)]
    assert report["exponents"].keys() == {"2 dimensions", "784 dimensions"}
    text = capsys.readouterr().out
    assert "learned margin, quadrupled: " in text
    assert text.count(" x ot.emd, ") == 3


def test_a_wrong_value_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "naive_value", lambda problem: solve(problem).value * (1 + 1e-6))
    out = tmp_path / "report.json"
    assert command(monkeypatch, *SMALL, "--rounds", "1", "--out", str(out)) == 1
    assert json.loads(out.read_text())["comparison"][0]["relative difference"]["naive, fixed margin"] > 1e-9


def test_mnist_is_asked_for_where_a_folder_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mnist").mkdir()
    assert command(monkeypatch, *SMALL, "--data-dir", str(tmp_path), "--out", str(tmp_path / "report.json")) == 2
    assert "mnist" in capsys.readouterr().err


def test_the_naive_form_is_that_of_the_theory() -> None:
    # two points at distance 5, m = 4: the extra mass min(s, t) earns 2m - 5 a unit
    x, z = (torch.tensor([[value]]) for value in (5.0, 0.0))
    problem = TransportProblem(x, z, hinge_weight=6.0, margin=4.0, prior=0.25)
    assert transport.naive_value(problem) == pytest.approx(-5 + 6 * 0.25 * 3)


CURVES = ("plain", "learned margin", "ot.emd")


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_exponents_are_those_of_the_times(power: float) -> None:
    rows = [
        {
            "n": n,
            "dims": dims,
            "seconds": {name: {"median": 3e-6 * n**power} for name in ("plain", "learned margin", "ot.emd")},
        }
        for n in (100, 200, 400)
        for dims in (2, 784)
    ]
    for curves in transport.exponents(rows).values():
        assert list(curves.values()) == pytest.approx([power] * 3)
