"""The benchmark of attacks, at sizes that take no time."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import attacks
from otnn.attacks import evaluate, pgd
from otnn.attacks.foolbox_attacks import ddn


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["attacks", *arguments])
    with pytest.raises(SystemExit) as left:
        attacks.main()
    return int(left.value.code or 0)


def test_the_report_of_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    small = ("--seeds", "1", "--images", "8", "--rounds", "1", "--epochs", "2", "--width", "16", "--cw-steps", "6")
    assert command(monkeypatch, "compare", *small, "--out", str(out)) == 0
    report = json.loads(out.read_text())
    assert {"otnn", "torch", "foolbox", "eagerpy"} <= report["versions"].keys()
    assert [(row["network"], row["box"]) for row in report["measured"]] == [
        (name, box) for name in ("otnn", "unconstrained", "adversarial") for box in (False, True)
    ]
    for row in report["measured"]:
        assert 0 < row["images"] <= 8
        assert row["attacks"].keys() == {"minimal_norm", "carlini_wagner", "deepfool", "ddn", "fmn"}
        least = min(
            found["median distance"]
            for name, found in row["attacks"].items()
            if name != "minimal_norm"
            if found["median distance"] is not None  # six steps of C&W are too few
        )
        assert row["ratio to foolbox's best"] == pytest.approx(
            row["attacks"]["minimal_norm"]["median distance"] / least
        )
        assert row["attacks"]["ddn"]["success"] > 0.5
        for found in row["attacks"].values():
            assert found["forwards"] >= found["backwards"] > 0
            assert found["seconds"]["min"] > 0
        # what each attack is made of: 100 steps, beside the first look and the scales of a sample
        assert 100 <= row["attacks"]["ddn"]["backwards"] <= 105
        # without a box, what six steps do not win is tried once more with longer ones
        runs = 1 if row["box"] else 2
        assert 9 * 6 <= row["attacks"]["carlini_wagner"]["backwards"] <= runs * (9 * 6 + 5)
    assert "x foolbox's best" in capsys.readouterr().out


def test_the_report_of_the_snowflakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    small = ("--points", "12", "--steps", "150", "--cw-steps", "60")
    assert command(monkeypatch, "snowflakes", *small, "--out", str(out)) == 0
    report = json.loads(out.read_text())
    assert report["samples"] + report["without a radius"] == 24
    margin, entropy = report["losses"]["margin"], report["losses"]["cross_entropy"]
    assert margin["attacks"].keys() == {"pgd", "minimal_norm", "carlini_wagner", "deepfool", "ddn", "fmn"}
    assert entropy["attacks"].keys() == {"pgd", "minimal_norm", "deepfool", "ddn"}
    for row in (*margin["attacks"].values(), *entropy["attacks"].values()):
        assert row["below the radius"] == 0
        assert row["success"] > 0.5
        assert row["distance over radius"]["min"] >= 1
        assert -1 <= row["cosine"]["min"] <= row["cosine"]["max"] <= 1
    assert margin["best distance over radius"]["median"] <= min(
        row["distance over radius"]["median"] for row in margin["attacks"].values() if row["success"] == 1
    )
    assert "distance over radius" in capsys.readouterr().out


def test_pgd_keeps_the_point_of_the_first_radius_that_is_won() -> None:
    model = nn.Linear(3, 1).eval()
    inputs = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = model(inputs).squeeze(1)
        distance = (scores.abs() / model.weight.norm()).double()
    labels = (scores > 0).long()
    for share in (1.0, 0.9, 0.1):  # of the distance: the radii that are tried are 1.001, 1.002, ... times these
        points = attacks.nearest_pgd(model, inputs, labels, radius=share * distance)
        found = evaluate(model, inputs, labels, points)
        first = next((s for s in attacks.SHARES if s * share > 1.0001), None)
        if first is None:
            assert torch.equal(points, inputs)
        else:
            assert found.success.all()
            assert (found.distance <= first * share * distance).all()
            assert (found.distance >= distance * (1 - 1e-5)).all()


def test_passes_are_counted_by_samples() -> None:
    model = nn.Linear(3, 2).eval()
    inputs, labels = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        labels = model(inputs).argmax(dim=1)
    counted = attacks.Counted(model).eval()
    ddn(counted, inputs, labels, steps=10)
    assert counted.backwards >= 4 * 10  # and those of the first look
    counted = attacks.Counted(model).eval()
    pgd(counted, inputs, labels, 1e-9, steps=5)
    assert counted.backwards == pytest.approx(4 * 5, abs=4 * 2)


def test_the_median_is_the_mean_of_the_middle_values_and_no_failure_makes_it_nan() -> None:
    inf = torch.inf
    for values, expected in (([3.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 2.0, 3.0], 2.5), ([1.0, inf], inf), ([inf, inf], inf)):
        assert float(attacks._median(torch.tensor(values))) == expected
