"""What was written is what is read: checksums, bounds, edits, and commits that a crash cuts short."""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from otnn.cli import main
from otnn.errors import InputError
from otnn.report import write_report
from otnn.run import config
from otnn.run import manifest as manifest_module
from otnn.run.certify import certify_run
from otnn.run.config import TrainingConfig
from otnn.run.folder import Run, open_run
from otnn.run.manifest import DERIVED, sealed
from otnn.run.train import train

TRAINED = (
    "config.toml",
    "metrics.jsonl",
    "results.json",
    "networks/otnn.safetensors",
    "networks/unconstrained.safetensors",
)
COMMANDS = ("certify", "explain", "report")


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def reseal(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest as a forger would, with its digest made anew."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_bytes(sealed(manifest))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["otnn", *arguments])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_the_manifest_lists_every_file_with_its_digest(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    written = {file.relative_to(whole).as_posix() for file in whole.rglob("*") if file.is_file()}
    assert written == {*TRAINED, *DERIVED, "manifest.json"}
    assert set(manifest["files"]) == written - {"manifest.json"}
    for name, checksum in manifest["files"].items():
        assert hashlib.sha256((whole / name).read_bytes()).hexdigest() == checksum, name
    seal = manifest.pop("sha256")
    assert hashlib.sha256((json.dumps(manifest, indent=2) + "\n").encode()).hexdigest() == seal
    assert manifest["config"]["model"]["widths"] == [64, 64]


@pytest.mark.parametrize("name", [*TRAINED, *DERIVED, "manifest.json"])
def test_one_flipped_bit_is_refused_by_every_command(
    whole: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = whole / name
    good = file.read_bytes()
    bits = np.random.default_rng(list(name.encode())).integers(0, 8 * len(good), 25).tolist()
    for bit in [0, 8 * len(good) - 1, *bits]:
        flip(file, bit)
        with pytest.raises(InputError) as caught:
            open_run(whole)
        # a flip in the format of the manifest makes it one of another format
        assert str(caught.value).startswith((f"{file}: ", f"{whole}: written in run format")), bit
        file.write_bytes(good)
    open_run(whole)
    flip(file, bits[0])
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for stage in COMMANDS:
        assert command(monkeypatch, stage, str(whole)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert str(whole) in captured.err
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["certificates.csv", "certificates.npz"])
def test_a_damaged_derived_file_is_deleted_and_made_again(whole: Path, name: str) -> None:
    good = (whole / name).read_bytes()
    flip(whole / name, 99)
    mend = f"delete it, and make it again with `otnn certify {whole}`"
    with pytest.raises(InputError, match=re.escape(mend)):
        open_run(whole)
    (whole / name).unlink()
    certify_run(open_run(whole))
    assert (whole / name).read_bytes() == good
    open_run(whole)


def test_a_missing_derived_file_leaves_the_manifest_and_is_no_file_of_the_run_then(whole: Path) -> None:
    (whole / "explanations.npz").rename(whole.parent / "elsewhere.npz")
    write = open_run(whole).write
    write({}, {"seconds": {"total": 1.0}})
    assert set(open_run(whole).manifest["files"]) == {*TRAINED, *DERIVED} - {"explanations.npz"}
    (whole.parent / "elsewhere.npz").rename(whole / "explanations.npz")
    with pytest.raises(InputError, match=r"explanations\.npz: is not in the manifest, .* `otnn explain "):
        open_run(whole)


def test_a_file_damaged_after_the_opening_is_not_taken_over(whole: Path) -> None:
    run = open_run(whole)
    flip(whole / "results.json", 4)
    before = (whole / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"results\.json: its SHA-256 differs"):
        run.write({}, {"seconds": {"total": 1.0}})
    assert (whole / "manifest.json").read_bytes() == before


def test_a_run_trained_anew_gets_nothing_of_the_old_one(run: Run, tmp_path: Path) -> None:
    quick = config.load(overrides=["training.epochs=1", "model.widths=[8]", "twin=false"])
    train(quick, run.path, force=True, quiet=True)
    with pytest.raises(InputError, match="trained anew since it was opened"):
        run.write({}, {"seconds": {"certify": 1.0}})
    assert "certify" not in open_run(run.path).results()["seconds"]


@pytest.mark.parametrize(
    "change",
    [
        lambda bounds: bounds["otnn"].update(constant=bounds["otnn"]["constant"] * (1 - 1e-8)),
        lambda bounds: bounds["otnn"].update(constant=bounds["otnn"]["constant"] * (1 + 1e-8)),
        lambda bounds: bounds["otnn"].update(constant=None),
        lambda bounds: bounds["otnn"]["layers"].update({"2": 0.5}),
        lambda bounds: bounds["otnn"]["layers"].pop("2"),
        lambda bounds: bounds["otnn"]["layers"].update(more=1.0),
        lambda bounds: bounds.clear(),
        lambda bounds: bounds.update(unconstrained={"constant": 1.0, "layers": {}}),
    ],
)
def test_bounds_that_do_not_reproduce_are_refused_by_every_command(
    whole: Path,
    change: Callable[[dict[str, Any]], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reseal(whole, lambda manifest: change(manifest["bounds"]))
    text = "manifest.json: the bounds of the manifest do not reproduce from the weights of the network"
    for stage in COMMANDS:
        assert command(monkeypatch, stage, str(whole)) == 2
        assert text in capsys.readouterr().err


def test_other_weights_under_the_proven_bounds_are_refused(whole: Path) -> None:
    file = whole / "networks" / "otnn.safetensors"
    weights = load_file(file)
    name = next(name for name, value in weights.items() if name.startswith("body.") and value.ndim == 2)
    weights[name] = 1.01 * weights[name]
    file.write_bytes(save(weights))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    reseal(whole, lambda manifest: manifest["files"].update({"networks/otnn.safetensors": digest}))
    with pytest.raises(InputError, match="the bounds of the manifest do not reproduce"):
        open_run(whole)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("epochs = 5", "epochs = 30", "training.epochs is 30, was 5; undo that"),
        ("epochs = 5", "epoch = 5", "training.epochs is not set, was 5; training.epoch is 5, was not set; undo that"),
        ("epochs = 5", "epochs = true", "training.epochs is True, was 5; undo that"),
        ('name = "digits"', 'name = "digits"\nsize = 9', "data.size is 9, was not set; undo that"),
        ("seed = 0", "seed = 0 # zero", "no setting changed, only layout or comments; undo that"),
    ],
)
def test_an_edited_configuration_is_named_with_what_changed(whole: Path, old: str, new: str, text: str) -> None:
    file = whole / "config.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError) as caught:
        open_run(whole)
    said = f"{file}: edited by hand since the training: {text}, or go on with --accept-edits"
    assert str(caught.value) == said


def test_accepted_edits_are_used_and_stay_edits(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = whole / "config.toml"
    file.write_text(file.read_text().replace("seed = 0", "seed = 77"))
    assert open_run(whole, accept_edits=True).config.seed == 77
    for stage in COMMANDS:
        assert command(monkeypatch, stage, str(whole)) == 2
        assert "seed is 77, was 0" in capsys.readouterr().err
        assert command(monkeypatch, stage, str(whole), "--accept-edits") == 0
    assert re.search(r"seed\D*77", (whole / "report.html").read_text())
    file.write_text(file.read_text().replace("epochs = 5", "epochs = 0"))
    capsys.readouterr()
    assert command(monkeypatch, "report", str(whole), "--accept-edits") == 2
    assert "config.toml: training.epochs: expected a number > 0, got 0" in capsys.readouterr().err
    with pytest.raises(InputError, match="edited by hand"):
        open_run(whole)


class PowerCut(BaseException):
    """The machine stops: nothing after it reaches the disk."""


def cut_power(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], int]:
    """Let `after` writes, renames and removals happen, and stop at the next; returns how many happened."""
    done = 0

    def counted(operation: Callable[..., None], half: bool = False) -> Callable[..., None]:
        def step(*arguments: Any) -> None:
            nonlocal done
            if done >= after:
                if half:
                    operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise PowerCut
            done += 1
            operation(*arguments)

        return step

    monkeypatch.setattr(manifest_module, "write_through", counted(manifest_module.write_through, half=True))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    return lambda: done


# four files and the manifest are written, the manifest is renamed, then the four
@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("stage", ["certified", "again"])
def test_a_crash_leaves_the_old_run_or_the_new_one(run: Run, stage: str, after: int) -> None:
    new = {"certificates.npz": b"new", "certificates.csv": b"new too", "explanations.npz": b"third"}
    if stage == "again":
        run.write(dict.fromkeys(new, b"old"), {"otnn": {"mean_radius": 0.5}})
    old_files = {name: (run.path / name).read_bytes() for name in new if (run.path / name).exists()}
    with pytest.MonkeyPatch.context() as patch:
        cut_power(patch, after)
        with pytest.raises(PowerCut):
            run.write(new, {"otnn": {"mean_radius": 0.7}})
    opened = open_run(run.path)
    assert not list(run.path.glob(".*"))
    found = {name: (run.path / name).read_bytes() for name in new if (run.path / name).exists()}
    committed = after >= 6
    assert found == (new if committed else old_files)
    assert opened.results()["otnn"].get("mean_radius") == (0.7 if committed else 0.5 if old_files else None)
    assert {name for name in opened.manifest["files"] if name in DERIVED} == set(found)
    opened.write({"report.html": b"page"}, {})
    assert (open_run(run.path).path / "report.html").read_bytes() == b"page"


def test_a_commit_takes_as_many_steps_as_the_crashes_above_count(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = cut_power(monkeypatch, 99)
    run.write({"certificates.npz": b"1", "certificates.csv": b"2", "explanations.npz": b"3"}, {"seconds": {"x": 1}})
    assert steps() == 10


def test_an_interruption_leaves_nothing_pending(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run.path / "manifest.json").read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        run.write({"report.html": b"page"}, {})
    assert (run.path / "manifest.json").read_bytes() == before
    assert not list(run.path.glob(".*"))
    assert not (run.path / "report.html").exists()


def test_a_medium_that_cannot_be_written_opens(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    (whole / ".report.html.pending").write_bytes(b"cut short")
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rename", "mkdir"):
            patch.setattr(os, name, refuse)
        assert open_run(whole).path == whole
    assert open_run(whole).path == whole
    assert not (whole / ".report.html.pending").exists()


def test_stages_on_one_opened_run_add_up(run: Run) -> None:
    other = open_run(run.path)
    figures = certify_run(run)
    other.write({"explanations.npz": b"made by another process"}, {"seconds": {"explain": 2.0}})
    run.write({}, {"seconds": {"total": 3.0}})
    results = open_run(run.path).results()
    assert results["otnn"]["mean_radius"] == figures["mean_radius"]
    assert {"train_otnn", "certify", "explain", "total"} <= set(results["seconds"])
    assert {"certificates.npz", "certificates.csv", "explanations.npz"} <= set(open_run(run.path).manifest["files"])


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_stages_at_the_same_time_add_up(run: Run) -> None:
    failures: list[BaseException] = []

    def write(worker: int) -> None:
        try:
            for step in range(10):
                open_run(run.path).write({list(DERIVED)[worker]: bytes([step])}, {"seconds": {f"{worker}.{step}": 1.0}})
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=write, args=(worker,)) for worker in range(len(DERIVED))]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert failures == []
    opened = open_run(run.path)
    assert {f"{worker}.{step}" for worker in range(len(DERIVED)) for step in range(10)} <= set(
        opened.results()["seconds"]
    )
    assert [(run.path / name).read_bytes() for name in DERIVED] == [b"\x09"] * len(DERIVED)


def test_the_report_is_written_into_its_run(whole: Path) -> None:
    before = (whole / "report.html").read_bytes()
    (whole / "report.html").unlink()
    assert write_report(open_run(whole)) == whole / "report.html"
    # no figure of the page depends on when it was written
    assert (whole / "report.html").read_bytes() == before


@pytest.mark.parametrize("network", ["otnn", "unconstrained"])
def test_weights_that_are_not_finite_are_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    def spoil(model: torch.nn.Module, *_: object, constrained: bool, **__: object) -> None:
        if constrained == (network == "otnn"):
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = torch.nan

    monkeypatch.setattr("otnn.run.train.fit", spoil)
    said = "body.2.weight holds NaN" if network == "otnn" else "of the network unconstrained is not finite"
    with pytest.raises(FloatingPointError, match=said):
        train(config.load(overrides=["model.widths=[8]"]), tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match=r"training\.twin_learning_rate: expected a finite number, got inf"):
        config.Config(training=TrainingConfig(twin_learning_rate=float("inf")))
    with pytest.raises(InputError, match=r"loss\.temperature: expected a finite number, got inf"):
        config.load(overrides=["loss.temperature=inf"])


def edit(path: Path, text: str) -> None:
    (path / "config.toml").write_text(text)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "no such run folder; make one with `otnn train"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json is missing"),
    "other format": (lambda path: reseal(path, lambda m: m.update(format=99)), "written in run format 99"),
    "manifest cut": (lambda path: os.truncate(path / "manifest.json", 50), r"manifest\.json: cannot be read"),
    "not finite": (
        lambda path: (path / "manifest.json").write_text('{"format": 2, "bounds": NaN}\n'),
        "its SHA-256 differs from the one in it",
    ),
    "network gone": (
        lambda path: (path / "networks" / "otnn.safetensors").unlink(),
        r"half-written: networks/otnn\.safetensors is missing",
    ),
    "no model": (lambda path: reseal(path, lambda m: m.update(model={})), "damaged: what it says of the network"),
    "model 3": (lambda path: reseal(path, lambda m: m.update(model=3)), "damaged: what it says of the network"),
    "no files": (lambda path: reseal(path, lambda m: m.update(files={})), "damaged: what it says of the network"),
    "no config": (lambda path: reseal(path, lambda m: m.pop("config")), "damaged: what it says of the network"),
    "strange file": (
        lambda path: reseal(path, lambda m: m["files"].update({"../thesis.tex": "0"})),
        "damaged: what it says of the network",
    ),
    "config cut": (lambda path: edit(path, "[data"), r"config\.toml: damaged: Expected"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_folder_is_refused_with_the_reason(run: Run, what: str) -> None:
    damage, text = DAMAGE[what]
    damage(run.path)
    with pytest.raises(InputError, match=text):
        open_run(run.path)
