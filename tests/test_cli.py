import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from otnn.cli import main
from otnn.run.snowflakes import Recipe

QUICK = ("--set", "training.epochs=2", "--set", "model.widths=[32]")


@pytest.fixture
def otnn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """Run the command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OTNN_DATA_DIR", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["otnn", *arguments])
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_whole_way_from_training_to_report(otnn: Callable[..., tuple], tmp_path: Path) -> None:
    code, out, _ = otnn("train", "--out", "run", *QUICK)
    assert code == 0
    assert "360 test images, 10 classes" in out
    code, out, _ = otnn("certify", "run", "--json")
    assert code == 0
    assert json.loads(out)["certified_accuracy"]["0.25"] <= json.loads(out)["certified_accuracy"]["0"]
    Image.new("L", (20, 16), 128).save(tmp_path / "grey.png")
    code, out, _ = otnn("explain", "run", "grey.png", "--json")
    assert code == 0
    assert json.loads(out)["images"][0]["file"] == "grey.png"
    assert Path(json.loads(out)["images"][0]["picture"]).exists()
    code, out, _ = otnn("report", "run")
    assert code == 0
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert not [name for name in (tmp_path / "run").iterdir() if name.name.startswith(".")]


def test_demo_gives_the_same_figures_for_one_seed(otnn: Callable[..., tuple], tmp_path: Path) -> None:
    results = []
    for folder in ("a", "b"):
        code, out, _ = otnn("demo", "--out", folder, "--seed", "3", *QUICK)
        assert code == 0
        assert "report.html" in out
        content = json.loads((tmp_path / folder / "results.json").read_text())
        assert {"data", "versions", "seconds", "otnn", "unconstrained"} <= set(content)
        assert {"accuracy", "certified_accuracy", "mean_radius", "lipschitz_bound"} <= set(content["otnn"])
        assert "accuracy" in content["unconstrained"]
        assert "0.25" in content["otnn"]["certified_accuracy"]
        del content["seconds"]
        results.append(content)
    assert results[0] == results[1]
    weights = [load_file(tmp_path / folder / "networks" / "otnn.safetensors") for folder in ("a", "b")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_demo_without_out_takes_a_free_folder(otnn: Callable[..., tuple], tmp_path: Path) -> None:
    (tmp_path / "otnn-demo").mkdir()
    (tmp_path / "otnn-demo" / "mine.txt").write_text("mine")
    assert otnn("demo", *QUICK)[0] == 0
    assert (tmp_path / "otnn-demo-2" / "report.html").exists()
    assert [file.name for file in (tmp_path / "otnn-demo").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("train", "--out", "run", "--data", "no-such-set"), "no-such-set"),
        (("train", "--out", "run", "--classes", "0,cat"), "cat"),
        (("train", "--out", "run", "--target", "Hat"), "Hat"),
        (("train", "--out", "run", "--preset", "slow"), "preset: expected one of"),
        (("train", "--out", "run", "--set", "training.epoch=3"), "training.epoch: no such setting"),
        (("train", "--out", "run", "--set", "training.epochs=many"), "training.epochs: expected int, got 'many'"),
        (("train", "--out", "run", "--device", "tpu9"), "device: 'tpu9' cannot be used here"),
        (
            ("train", "--out", "run", "--classes", "0,1", "--set", "loss.alpha=1.5"),
            "loss.alpha: expected a share in (0, 1)",
        ),
        (("certify", "run"), "no such run folder"),
        (("explain", "run", "x.png"), "no such run folder"),
        (("report", "run"), "no such run folder"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr_and_exit_code_2(
    otnn: Callable[..., tuple], tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    code, out, err = otnn(*arguments)
    assert code == 2
    assert out == ""
    assert text in err
    assert err.strip().splitlines()[-1].startswith("otnn: ")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_without_force(otnn: Callable[..., tuple], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code, _, err = otnn("train", "--out", "run", *QUICK)
    assert code == 2
    assert "--force" in err
    assert list((tmp_path / "run").iterdir()) == []
    code, _, _ = otnn("train", "--out", "run", "--force", *QUICK)  # an empty folder holds nothing to lose
    assert code == 0
    code, _, err = otnn("explain", "run", "missing.png")
    assert code == 2
    assert "missing.png" in err


def test_names_with_brackets_are_names(otnn: Callable[..., tuple], tmp_path: Path) -> None:
    """Square brackets are markup to some consoles."""
    for name in ("[red]", "[", "plain"):
        (tmp_path / "data[bold]" / name).mkdir(parents=True)
        for k in range(10):
            Image.new("L", (8, 8), 80 * (name == "[") + 10 * k).save(tmp_path / "data[bold]" / name / f"{k}.png")
    tiny = ("--set", "training.epochs=1", "--set", "model.widths=[8]", "--preset", "digits", "--size", "8")
    code, out, _ = otnn("train", "--data", "data[bold]", "--out", "run[x]", "--no-twin", *tiny)
    assert code == 0
    assert "data[bold]" in out
    assert "otnn certify 'run[x]'" in out


def test_what_cannot_be_written_is_one_sentence(
    otnn: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert otnn("train", "--out", "run", "--no-twin", *QUICK)[0] == 0

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "run/results.json")

    monkeypatch.setattr("otnn.files.os.replace", refuse)
    code, _, err = otnn("certify", "run")
    assert code == 2
    assert "otnn: run/results.json: Permission denied; check the path and its permissions" in err
    assert "Traceback" not in err


def test_version_and_help(otnn: Callable[..., tuple]) -> None:
    from otnn import __version__

    assert otnn("--version")[1].strip() == f"otnn {__version__}"
    assert "demo" in otnn("--help")[1]


def test_audit_prints_table_and_verdict_or_json(otnn: Callable[..., tuple], tmp_path: Path) -> None:
    assert otnn("train", "--out", "run", "--classes", "0,8", "--no-twin", *QUICK)[0] == 0
    code, out, _ = otnn("audit", "run", "--samples", "30")
    assert code == 0
    assert "against the exact optimum of the loss" in out
    assert "8 against 0" in out
    assert "On the training samples the network stays" in out
    code, out, _ = otnn("audit", "run", "--samples", "0", "--json")
    assert code == 0
    content = json.loads(out)
    assert content["samples"] is None
    assert content["splits"]["test"][0]["positives"] + content["splits"]["test"][0]["negatives"] == 71
    assert (tmp_path / "run" / "audit.png").exists()
    code, _, err = otnn("audit", "run", "--samples", "-1")
    assert code == 2
    code, _, err = otnn("audit", "nowhere")
    assert code == 2
    assert "no such run folder" in err


def test_snowflakes_says_which_bars_it_missed(
    otnn: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from otnn.run import snowflakes

    monkeypatch.setattr(snowflakes, "Recipe", lambda: tiny)
    code, out, _ = otnn("snowflakes", "--out", "figure")
    assert code == 0
    assert "below its bar: gap" in out
    assert (tmp_path / "figure" / "snowflakes.png").exists()
    code, _, err = otnn("snowflakes", "--out", "figure")
    assert code == 2
    assert "--force" in err


tiny = Recipe(width=8, depth=2, steps=10, twin_steps=10)
