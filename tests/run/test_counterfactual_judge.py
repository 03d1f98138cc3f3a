"""The judge of counterfactuals: trained once, the same again, of another run; what is refused before one is trained."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from otnn.errors import InputError
from otnn.models import predict
from otnn.run import config
from otnn.run.counterfactuals import counterfactual_run
from otnn.run.fit import scores_of
from otnn.run.folder import Run, open_run
from otnn.run.judge import FILE
from otnn.run.train import dataset_of, train


def test_the_judge_is_trained_once(
    walked: tuple[Run, dict[str, Any]], judged: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained_again(*_: Any, **__: Any) -> None:
        raise AssertionError("the judge is there already")

    monkeypatch.setattr("otnn.run.judge.fit", trained_again)
    _, first = walked
    before = (judged.path / FILE).read_bytes()
    again = counterfactual_run(judged, samples=20, seed=3)
    assert again["judge"] == first["judge"]
    for name, network in again["networks"].items():
        for measure, told in network["measures"].items():
            assert told["mean"] == pytest.approx(first["networks"][name]["measures"][measure]["mean"], rel=1e-4)
    assert (judged.path / FILE).read_bytes() == before
    damaged = bytearray(before)
    damaged[-1] ^= 1
    (judged.path / FILE).write_bytes(damaged)
    with pytest.raises(InputError, match=r"judge\.safetensors: its SHA-256 differs .* `otnn counterfactual "):
        counterfactual_run(judged, samples=4)


def test_a_run_has_the_same_judge_again(walked: tuple[Run, dict[str, Any]], run: Run) -> None:
    counterfactual_run(run, samples=1)
    first, second = (load_file(one.path / FILE) for one in (walked[0], run))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_another_run_judges(run: Run, tmp_path: Path) -> None:
    tiny = ("training.epochs=1", "model.widths=[16]", "seed=7")
    other = train(config.load(overrides=tiny), tmp_path / "other", quiet=True)
    content = counterfactual_run(run, samples=4, judge=other)
    assert (content["judge"]["from"], content["judge"]["seed"], content["judge"]["epochs"]) == ("other", 7, 1)
    assert not (run.path / FILE).exists()
    data = dataset_of(run)
    right = predict(scores_of(other.network("unconstrained"), data.test.images)) == data.test.labels
    assert content["judge"]["accuracy"] == float(right.double().mean())


def test_judges_that_do_not_fit_are_refused(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "copy")
    with pytest.raises(InputError, match=r"the ordinary network of .*copy is the one that is judged; give a run of an"):
        counterfactual_run(run, samples=2, judge=open_run(tmp_path / "copy"))
    with pytest.raises(InputError, match="is the one that is judged"):
        counterfactual_run(run, samples=2, judge=run)
    tiny = ("training.epochs=1", "model.widths=[16]")
    for name, options, what in (
        ("two", ('data.classes=["0", "8"]',), r"judge: expected the classes of .*run, \['0', '1', .* got \['0', '8'\]"),
        ("alone", ("twin=false",), r"alone has no ordinary network \(--no-twin\)"),
    ):
        other = train(config.load(overrides=(*tiny, *options)), tmp_path / name, quiet=True)
        with pytest.raises(InputError, match=what):
            counterfactual_run(run, samples=2, judge=other)
    shaped = open_run(tmp_path / "copy")
    shaped.manifest["model"]["input_shape"] = [1, 9, 9]
    with pytest.raises(InputError, match=r"expected the input shape of .*, \[1, 8, 8\], got \[1, 9, 9\]"):
        counterfactual_run(run, samples=2, judge=shaped)
    assert not (run.path / "counterfactuals.json").exists()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"source": "ten"}, "--from ten: no such class; expected one of 0, 1,"),
        ({"target": "11"}, "--to 11: no such class"),
        ({"source": "3", "target": "3"}, "--from and --to: expected two different classes, got 3 for both"),
        ({"samples": 0}, "samples: expected at least 1 test image, got 0"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"steps": 1}, "steps: expected at least 2, got 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_a_judge_is_trained(
    run: Run, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        counterfactual_run(run, **settings)
    assert not (run.path / FILE).exists()
