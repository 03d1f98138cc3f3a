"""A share of the campaign against certified radii, and failures planted in what it checks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.campaign import run_campaign
from benchmarks.soundness import attacks
from benchmarks.soundness.__main__ import main
from benchmarks.soundness.attacks import ABOVE, BELOW, Attempt, attacks_campaign, search, target_of
from otnn.attacks.table import ATTACKS
from otnn.certify import Certificate, certify
from otnn.errors import InputError
from otnn.models import Classifier
from otnn.run import config
from otnn.run.folder import open_run
from otnn.run.train import dataset_of, train

QUICK = ("training.epochs=5", "model.widths=[64, 64]", "twin=false")
SLOW: dict[str, dict[str, Any]] = {
    "minimal": {},
    "carlini_wagner": {"steps": 40, "searches": 2},
    "ddn": {"steps": 30},
    "fab": {"steps": 10},
    "square": {"queries": 100},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the embedded digits."""
    path = tmp_path_factory.mktemp("soundness") / "digits"
    train(config.load(overrides=QUICK), path, quiet=True)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attacks with fewer steps, those that are installed."""
    installed = {name: how for name, how in SLOW.items() if attacks.find_spec(ATTACKS[name].source) is not None}
    monkeypatch.setattr(attacks, "SLOW", installed)


@pytest.mark.usefixtures("quick")
def test_no_attack_gets_below_a_certified_radius(trained: Path, tmp_path: Path) -> None:
    report = run_campaign(attacks_campaign([trained], few=30), tmp_path / "attacks.json")
    assert report["violations"] == report["not finite"] == 0
    assert json.loads((tmp_path / "attacks.json").read_text()) == report
    rows = {(row["attack"], row["ball over radius"]): row for row in report["results"]}
    assert rows["step", BELOW]["images"] == rows["pgd", BELOW]["images"] == 360
    # of all digits something is certified, of errors too
    assert rows["pgd", BELOW]["certified"] == 360
    assert rows["pgd", BELOW]["turned"] == 0
    # after five epochs the network is almost linear: some points at the radius are on the side that float32 rounds to
    assert rows["pgd", BELOW]["rounding"] <= 36
    for row in rows.values():
        assert row["rounding over radius"] is None or row["rounding over radius"] > 0.999
    assert rows["pgd", BELOW]["nearest over radius"] is None
    # the search has force: above the radius points are found, and the nearest attack comes close to it
    assert rows["pgd", ABOVE[-1]]["turned"] > 10
    assert rows["minimal", None]["turned"] == 30
    assert 1 <= rows["minimal", None]["nearest over radius"] < 1.2
    for name in attacks.SLOW:
        row = rows[name, None if ATTACKS[name].minimal else BELOW]
        assert row["images"] == 30
        assert row["turned"] == (30 if ATTACKS[name].minimal else 0), name
    assert report["attacks"]["pgd"] == {"steps": 20}
    assert report["seed"] == 0
    assert report["runs"].keys() == {"digits"}
    assert len(report["runs"]["digits"]) == 64
    assert rows["pgd", BELOW]["seeds"] == [0]
    assert rows["minimal", None]["seeds"] == [1]


def scaled(factor: float, only: str) -> Callable[..., Certificate]:
    def wrong(model: Classifier, images: torch.Tensor, *, arithmetic: str = "real") -> Certificate:
        found = certify(model, images, arithmetic=arithmetic)
        return replace(found, radius=found.radius * (factor if arithmetic == only else 1))

    return wrong


@pytest.mark.parametrize("arithmetic", ["real", "float32"])
def test_wrong_radii_are_found(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arithmetic: str) -> None:
    monkeypatch.setattr(attacks, "SLOW", {"minimal": {}})
    monkeypatch.setattr(attacks, "certify", scaled(1.5, arithmetic))
    report = run_campaign(attacks_campaign([trained], images=20, few=20), tmp_path / "attacks.json")
    rows = {(row["attack"], row["ball over radius"]): row for row in report["results"]}
    assert rows["minimal", None]["violations"] > 10
    assert report["violations"] == sum(row["violations"] for row in rows.values())
    if arithmetic == "real":  # where the balls are larger, so that points are found within them
        assert rows["step", BELOW]["violations"] > 5
        assert rows["pgd", BELOW]["violations"] >= rows["step", BELOW]["violations"]
        assert rows["minimal", None]["nearest over radius"] < 1


def test_points_that_float64_does_not_confirm_are_rounding(trained: Path) -> None:
    run = open_run(trained)
    target = target_of(run.network("otnn"), run.network("otnn").double(), dataset_of(run).test.images[:20])
    near = replace(target, radius=3 * target.radius, executed=torch.zeros_like(target.radius))
    attempt = Attempt("step", BELOW, {})
    assert search(near, attempt, 0)["violations"] > 10
    # a map that decides by its bias: no point is confirmed
    for k in range(20):
        firm = run.network("otnn").double()
        firm.head.bias.data[near.labels[k]] += 100
        one = replace(
            near,
            exact=firm,
            images=near.images[k : k + 1],
            labels=near.labels[k : k + 1],
            radius=near.radius[k : k + 1],
            executed=near.executed[k : k + 1],
        )
        told = search(one, attempt, 0)
        assert told["violations"] == 0
        assert told["turned"] + told["rounding"] <= 1
    nothing = replace(near, images=near.images[:0], labels=near.labels[:0], radius=near.radius[:0])
    assert search(nothing, attempt, 0)["certified"] == 0


def test_an_interrupted_campaign_goes_on(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "SLOW", {"minimal": {}})
    monkeypatch.setattr(attacks, "MANY", 10)
    campaign = attacks_campaign([trained], images=40, few=5)
    assert campaign.blocks == 5
    whole = run_campaign(campaign, tmp_path / "whole.json")
    ran: list[int] = []

    def interrupted(number: int) -> Any:
        ran.append(number)
        if ran == [0, 1, 2]:
            raise KeyboardInterrupt
        return campaign.run(number)

    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        run_campaign(replace(campaign, run=interrupted), out)
    with pytest.raises(InputError, match="begun with other seed"):
        run_campaign(attacks_campaign([trained], images=40, few=5, seed=1), out)
    again = run_campaign(replace(campaign, run=interrupted), out)
    assert ran == [0, 1, 2, 2, 3, 4]

    def timeless(report: dict[str, Any]) -> Any:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in report["results"]]

    assert timeless(again) == timeless(whole)
    assert not out.with_name("out.json.partial").exists()


def test_command_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attacks, "SLOW", {"minimal": {}})

    def command(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["soundness", "attacks", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    out = tmp_path / "a.json"
    few = ("--images", "5", "--few", "5", "--out", str(out))
    assert command(str(trained), *few) == 0
    assert capsys.readouterr().out == f"attacks: 0 violations; {out}\n"
    monkeypatch.setattr(attacks, "certify", scaled(2.0, "real"))
    assert command(str(trained), *few) == 1
    assert command(str(tmp_path / "none"), *few) == 2
    assert "no such run folder" in capsys.readouterr().err
    out.with_name("a.json.partial").write_text("{")
    assert command(str(trained), *few) == 2
    assert capsys.readouterr().err.rstrip().endswith("; delete it to begin again")


def test_settings_that_cannot_be_used_are_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ({"runs": []}, "expected at least one run folder, got none"),
        ({"images": -1}, "images: expected at least 0, got -1"),
        ({"few": -1}, "few: expected at least 0, got -1"),
        ({"runs": [trained, trained]}, "runs: expected folders of different names"),
    ):
        with pytest.raises(InputError, match=message):
            attacks_campaign(**{"runs": [trained], **arguments})  # type: ignore[arg-type]
    monkeypatch.setattr(attacks, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="carlini_wagner needs foolbox, which is not installed"):
        attacks_campaign([trained])
    assert attacks_campaign([trained], few=0).blocks == 1
