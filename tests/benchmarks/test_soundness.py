"""A share of the campaigns, and failures planted in what they check."""

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.campaign import Campaign, run_campaign
from benchmarks.soundness import bounds, rounding
from benchmarks.soundness.__main__ import main
from benchmarks.soundness.draws import Draw
from benchmarks.soundness.execution import Exact, orders, sequential_scores, torch_executions
from benchmarks.soundness.families import FAMILIES
from benchmarks.soundness.nets import NETS
from benchmarks.soundness.operators import convolution_operator, is_proven_below, largest_singular_value
from benchmarks.soundness.points import base_images
from benchmarks.soundness.search import Ball
from benchmarks.soundness.trained import tightness
from otnn.errors import InputError
from otnn.lipschitz import LipschitzBound, bound
from otnn.models import build

# --- the share of the campaigns ----------------------------------------------------------------------------------


def test_no_bound_is_below_the_true_norm(tmp_path: Path) -> None:
    report = run_campaign(bounds.bounds_campaign(400, seed=0), tmp_path / "bounds.json")
    assert report["violations"] == report["refused"] == 0
    assert report["families"].keys() == {name for name, _ in FAMILIES}
    assert sum(family["cases"] for family in report["families"].values()) == 400
    # 0.0001 is what an orthogonal layer may add; in general a bound near the norm is decided exactly
    assert report["families"]["orthogonal convolution"]["loose"] == 0
    assert report["families"]["dense"]["decided exactly"] > 20
    assert json.loads((tmp_path / "bounds.json").read_text()) == report


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "IMAGES", 3)
    monkeypatch.setattr(rounding, "TRIALS", 240)


@pytest.mark.usefixtures("small_blocks")
def test_no_rounding_breaks_a_certificate_but_the_plain_formula(tmp_path: Path) -> None:
    report = run_campaign(rounding.rounding_campaign(240 * len(NETS)), tmp_path / "rounding.json")
    assert report["violations"] == 0
    assert report["failures"] == []
    assert report["nets"].keys() == {name for name, _ in NETS}
    for part in ("real", "float32"):
        assert report["all"][part]["trials"] >= 240 * len(NETS)
        assert report["all"][part]["radius"]["min"] > 0
    plain = report["all"]["plain formula"]
    assert plain["broken"] >= 0.3 * plain["images"]
    assert report["nets"]["linear, one output"]["plain formula"]["broken"] >= 3
    exact = report["nets"]["linear, ten classes"]["real"]
    assert 0.999 < exact["radius over exact distance"]["min"] <= exact["radius over exact distance"]["max"] <= 1
    outside = report["all"]["real"]["just outside"]
    assert outside["changed"] == outside["images"] > 0


def test_tightness_of_a_small_network() -> None:
    rows = tightness(build("conv", (1, 8, 8), 10, widths=(4, 8), constrained=False).eval())
    assert [row["layer"] for row in rows] == ["body.1", "body.4", "body.8", "head"]
    assert all(1 - 1e-12 <= row["ratio"] <= min(1.05, row["ratio at any size"] + 1e-12) for row in rows)


# --- planted failures --------------------------------------------------------------------------------------------


def scaled_bound(factor: float) -> Callable[..., LipschitzBound]:
    def planted(*arguments: Any) -> LipschitzBound:
        found = bound(*arguments)
        return replace(found, constant=found.constant * factor)

    return planted


@pytest.mark.parametrize(("factor", "kind"), [(1 - 3e-13, "below"), (1.001, "loose")])
def test_the_campaign_finds_wrong_bounds(monkeypatch: pytest.MonkeyPatch, factor: float, kind: str) -> None:
    monkeypatch.setattr(bounds, "bound", scaled_bound(factor))
    results = [bounds.check(bounds.draw_case(0, index)[1])[kind] for index in range(40)]
    assert sum(results) >= 3


def test_the_torus_of_the_images_size_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(module: nn.Module, shape: Any = None) -> LipschitzBound:
        spectrum = torch.fft.fft(module.weight.detach().double()[0, 0], n=3)
        return LipschitzBound(float(spectrum.abs().max()), ())

    layer = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    layer.weight.data = torch.tensor([[[2 / 3, 2 / 3, -1 / 3]]])
    case = next(case for index in (4, 14, 24, 34) if (case := bounds.draw_case(0, index)[1]).told)
    operator = partial(convolution_operator, layer, (1, 3))
    case = replace(case, module=layer, shape=(1, 3), operator=operator)
    assert not bounds.check(case)["below"]
    monkeypatch.setattr(bounds, "bound", planted)
    result = bounds.check(case)
    assert result["below"]
    assert result["bound"] == pytest.approx(1)
    assert result["norm"] == pytest.approx(1.085, abs=1e-3)


def test_close_cases_are_decided_exactly() -> None:
    matrix = np.array([[3.0, 0.0], [4.0, 0.0]]) * 2.0**-1060
    assert largest_singular_value(matrix) == 5 * 2.0**-1060
    assert not is_proven_below(5 * 2.0**-1060, matrix)
    assert is_proven_below(np.nextafter(5 * 2.0**-1060, 0).item(), matrix)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("arithmetic", "factor"), [("real", 1.0001), ("float32", 1.1)])
def test_the_search_breaks_larger_radii(monkeypatch: pytest.MonkeyPatch, arithmetic: str, factor: float) -> None:
    certify = rounding.certify

    def planted(*arguments: Any, **settings: Any) -> Any:
        found = certify(*arguments, **settings | {"arithmetic": "real"})
        return replace(found, radius=found.radius * (factor if settings["arithmetic"] == arithmetic else 1e-3))

    monkeypatch.setattr(rounding, "certify", planted)
    report = rounding._summary([rounding._block(0, 0)])
    assert report["violations"] > 3
    assert {failure["arithmetic"] for failure in report["failures"]} == {arithmetic}


# --- numbered blocks ---------------------------------------------------------------------------------------------


def test_an_interrupted_campaign_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "BLOCK", 10)
    whole = tmp_path / "whole.json"
    run_campaign(bounds.bounds_campaign(40), whole)
    campaign, ran = bounds.bounds_campaign(40), []

    def interrupted(number: int) -> Any:
        ran.append(number)
        if ran == [0, 1, 2]:
            raise KeyboardInterrupt
        return campaign.run(number)

    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        run_campaign(replace(campaign, run=interrupted), out)
    assert ran == [0, 1, 2]
    assert not out.exists()
    with pytest.raises(InputError, match=r"out\.json\.partial: begun with other seed; delete it to begin again"):
        run_campaign(bounds.bounds_campaign(40, seed=1), out)
    run_campaign(replace(campaign, run=interrupted), out)
    assert ran == [0, 1, 2, 2, 3]
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.json", "whole.json"]


@pytest.mark.usefixtures("small_blocks")
def test_the_same_seed_gives_the_same_report(tmp_path: Path) -> None:
    reports = []
    for name in ("first", "second"):
        run_campaign(rounding.rounding_campaign(240, seed=3), tmp_path / name)
        reports.append((tmp_path / name).read_bytes())
    assert reports[0] == reports[1]


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["soundness", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    out = tmp_path / "b.json"
    assert command("bounds", "--cases", "4", "--out", str(out)) == 0
    assert capsys.readouterr().out == f"bounds: 0 violations; {out}\n"
    assert json.loads(out.read_text())["cases"] == 4
    monkeypatch.setattr(bounds, "bound", scaled_bound(0.5))
    assert command("bounds", "--cases", "4", "--out", str(out)) == 1
    assert command("bounds", "--cases", "0") == 2
    assert capsys.readouterr().err == "cases: expected at least 1, got 0\n"
    assert command("rounding", "--trials", "0") == 2
    assert capsys.readouterr().err == "trials: expected at least 1, got 0\n"


def test_blocks_run_in_other_processes(tmp_path: Path) -> None:
    campaign = Campaign("names", {"seed": 1}, 3, str, lambda blocks: {"blocks": list(blocks)})
    report = run_campaign(campaign, tmp_path / "out.json", workers=2)
    assert report["blocks"] == ["0", "1", "2"]
    assert report["seed"] == 1


# --- independent executions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(NETS)))
def test_executions_agree(number: int) -> None:
    draw = Draw(5, number)
    model = NETS[number][1](draw)
    images = base_images(model, draw.rng, 3)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    with torch.no_grad():
        wide = model.double()(images.double()).numpy()
        model.float()
        others = [way(images).numpy() for way in torch_executions(model).values()]
    others += [sequential_scores(model, images.numpy(), order) for order in orders(draw.rng).values()]
    scale = max(1.0, np.abs(wide).max(), float(model.head.weight.detach().abs().max()) * 1e3)
    for scores in others:
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, wide, atol=1e-4 * scale)
    exact, power = Exact(model)(images[0].numpy())
    np.testing.assert_allclose([float(Fraction(z, 2**power)) for z in exact], wide[0], atol=1e-12 * scale)


def test_a_ball_holds_only_what_is_inside() -> None:
    ball = Ball(np.zeros(4, dtype=np.float32), 0.5)
    points = np.array([[0.25] * 4, [np.nextafter(0.25, 0)] + [0.25] * 3, [0.2] * 4])
    assert ball.holds(points).tolist() == [False, True, True]


def test_loops_and_torch_build_the_same_operator() -> None:
    case = bounds.draw_case(0, 1)[1]
    with pytest.raises(ArithmeticError, match="two ways to find one operator disagree"):
        bounds.check(replace(case, operator=lambda: 2 * case.operator()))  # type: ignore[misc]
