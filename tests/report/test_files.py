"""What the report refuses, and how it says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from otnn.errors import InputError
from tests.report.synthetic import make_run, write_page


def change_results(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = run / "results.json"
    results = json.loads(file.read_text())
    change(results)
    file.write_text(json.dumps(results))


def change_arrays(file: Path, **changes: Any) -> None:
    with np.load(file) as archive:
        arrays = {key: archive[key] for key in archive.files} | changes
    np.savez(file, **{key: value for key, value in arrays.items() if value is not None})


def test_the_page_repeats_exactly(run: Path) -> None:
    first = write_page(run).read_bytes()
    assert first.startswith(b"<!DOCTYPE html>")
    assert write_page(run).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("certificates.npz", "no such file; make it with `otnn certify "),
        ("explanations.npz", "no such file; make it with `otnn explain "),
        ("results.json", "cannot be read"),
    ],
)
def test_a_missing_file_is_named_with_its_mend(run: Path, name: str, mend: str) -> None:
    (run / name).unlink()
    with pytest.raises(InputError, match=mend) as caught:
        write_page(run)
    assert name in str(caught.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("certificates.npz", "otnn certify"),
        ("explanations.npz", "otnn explain"),
        ("results.json", "otnn train"),
        ("config.toml", "otnn train"),
        ("metrics.jsonl", "line 1 is damaged"),
    ],
)
@pytest.mark.parametrize("content", [b"garbage", b"PK\x03\x04 cut short", b"\xff\xfe"])
def test_a_damaged_file_is_named_with_its_mend(run: Path, name: str, mend: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(InputError, match=mend) as caught:
        write_page(run)
    assert name in str(caught.value)


def test_a_cut_archive(run: Path) -> None:
    file = run / "explanations.npz"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="otnn explain"):
        write_page(run)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder; make one with `otnn train"):
        write_page(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r.update(format=2), "expected format 1, got 2"),
        (lambda r: r["data"].pop("classes"), "data lacks classes"),
        (lambda r: r["otnn"].pop("certified_accuracy"), "otnn lacks certified_accuracy; make it with `otnn certify"),
        (lambda r: r["otnn"].update(accuracy="high"), "a figure is missing or no number"),
        (lambda r: r["data"].update(class_shares=[1.0]), "a figure is missing or no number"),
        (lambda r: r["data"].update(test=7), "expected the 7 test samples of results.json, got 200"),
        (lambda r: r["otnn"]["certified_accuracy"].update({"0.25": 0.5}), "at radius 0.25, results.json has 0.5000"),
        (lambda r: r.pop("unconstrained"), None),
        (lambda r: r.pop("seconds"), None),
        (lambda r: r["otnn"].pop("margin"), None),
    ],
)
def test_results_that_do_not_fit(run: Path, change: Callable[[dict[str, Any]], Any], text: str | None) -> None:
    change_results(run, change)
    if text is None:
        write_page(run)
        return
    with pytest.raises(InputError, match=text):
        write_page(run)


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("certificates.npz", {"radius": None}, "the array radius is missing"),
        ("certificates.npz", {"radius": np.full(200, np.nan)}, "expected finite radii >= 0"),
        ("certificates.npz", {"label": np.full(200, 9)}, r"label: expected class indices in 0\.\.2"),
        ("explanations.npz", {"radius": np.ones(3)}, r"radius: expected shape \(4\), got \(3,\)"),
        (
            "explanations.npz",
            {"images": np.ones((4, 1, 9, 9))},
            r"saliency: expected shape \(4, 1, 9, 9\), got \(4, 1, 8, 8\)",
        ),
        ("explanations.npz", {"status": np.ones(4)}, "status: expected text"),
        (
            "explanations.npz",
            {"guarantee_sentence": None},
            "guarantee_sentence is missing; make it with `otnn explain ",
        ),
        (
            "explanations.npz",
            {"guarantee": np.array(list("abc"))},
            "expected guarantees among .*, got a, b, c; make it",
        ),
        ("explanations.npz", {"guarantee_share": np.ones(2)}, r"guarantee_share: expected shape \(3\), got \(2,\)"),
        ("explanations.npz", {"box": None}, "the array box is missing; make it with `otnn explain "),
        ("explanations.npz", {"iterations": np.ones(4)}, r"iterations: expected shape \(\), got \(4,\)"),
        ("explanations.npz", {"unconstrained_saliency": None}, "unconstrained_saliency is missing"),
        ("explanations.npz", {"scores": np.ones((4, 21, 7))}, "expected scores of 3 classes, got 7"),
        ("explanations.npz", {"status": np.array([{}] * 4, dtype=object)}, "cannot be read .*allow_pickle=False"),
    ],
)
def test_arrays_that_do_not_fit(run: Path, name: str, changes: dict[str, Any], text: str) -> None:
    change_arrays(run / name, **changes)
    with pytest.raises(InputError, match=text):
        write_page(run)


def test_explanations_of_another_data_set(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", shape=(1, 9, 9))
    (run / "explanations.npz").write_bytes((other / "explanations.npz").read_bytes())
    with pytest.raises(InputError, match=r"expected images of shape \(1, 8, 8\).*got \(1, 9, 9\)"):
        write_page(run)


def test_metrics_and_configuration_may_be_absent(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "config.toml").unlink()
    page = write_page(run).read_text()
    assert 'id="training"' not in page
    assert "data.name" not in page


def test_a_line_of_metrics_may_hold_no_number(run: Path) -> None:
    line = {"network": "otnn", "epoch": 4, "loss": float("nan"), "validation_accuracy": None}
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    assert "NaN" not in write_page(run).read_text()


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong(run: Path, right: bool) -> None:
    label = np.zeros(200, dtype=int)
    radius = np.full(200, 0.5) if right else np.zeros(200)
    change_arrays(run / "certificates.npz", label=label, prediction=label if right else label + 1, radius=radius)
    certified = {"0": float(right), "0.25": float(right)}
    change_results(
        run, lambda r: r["otnn"].update(certified_accuracy=certified, accuracy=float(right), mean_radius=0.0)
    )
    page = write_page(run).read_text()
    assert f"{200 if right else 0} right: median radius" in page
    assert "nan" not in page.lower()
