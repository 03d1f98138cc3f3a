"""The comparison of explanations as a stage of a run, and on the command line."""

import csv
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import otnn.run.compare
from otnn import metrics
from otnn.cli import main
from otnn.cli.tables import compare_tables
from otnn.errors import InputError
from otnn.explain import attribute
from otnn.explain.scores import Scorer
from otnn.metrics import holm, paired_test
from otnn.models import predict
from otnn.report import write_report
from otnn.report.load import load_run
from otnn.report.words import figure
from otnn.run import config
from otnn.run.certify import certify_run
from otnn.run.compare import compare_run
from otnn.run.comparison import METRICS, PAIR, PROFILES
from otnn.run.explain import explain_gallery
from otnn.run.folder import Run, open_run
from otnn.run.standings import Cells, mark_best, paired_tests, quality
from otnn.run.train import dataset_of, train

SOME = ("saliency", "guided_backprop", "smoothgrad")


@pytest.fixture(scope="module")
def compared(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """A run, compared by the quick profile with a method that does not apply to the OTNN."""
    path = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(trained, path)
    run = open_run(path)
    content = compare_run(run, samples=6, seed=3, methods=(*PROFILES["quick"].methods, "guided_backprop"))
    return open_run(path), content


def cell_of(content: dict[str, Any], network: str, method: str, metric: str) -> dict[str, Any]:
    (cell,) = (c for c in content["cells"] if (c["network"], c["method"], c["metric"]) == (network, method, metric))
    return cell


def known(values: torch.Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def without_seconds(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_seconds(value) for name, value in content.items() if name != "seconds"}
    return [without_seconds(value) for value in content] if isinstance(content, list) else content


@pytest.mark.parametrize("network", ["otnn", "unconstrained"])
def test_figures_are_those_of_the_metrics_called_by_hand(compared: tuple[Run, dict[str, Any]], network: str) -> None:
    run, content = compared
    test = dataset_of(run).test
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(3))[:6]
    assert content["images"] == chosen.tolist()
    model, x = run.network(network), test.images[chosen]
    target = predict(model(x).detach())
    assert content["targets"][network] == target.tolist()
    scorer = Scorer(model, x, target, "margin")

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    def explain(inputs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return attribute(model, inputs, target[index], "smoothgrad", score="margin", samples=10, generator=draws())

    smooth = explain(x, torch.arange(6))
    plain = attribute(model, x, target, "saliency", score="margin")
    deleted = metrics.deletion(scorer, x, smooth, generator=draws())
    stable = metrics.average_stability(explain, x, neighbours=5, forwards_per_map=10, generator=draws())
    apart = metrics.explanation_distance(plain, smooth)
    by_hand = {
        ("smoothgrad", "deletion"): deleted,
        ("smoothgrad", "insertion"): metrics.insertion(scorer, x, smooth, generator=draws()),
        ("smoothgrad", "mu_fidelity_zero"): metrics.mu_fidelity(scorer, x, smooth, generator=draws()),
        ("smoothgrad", "mu_fidelity_uniform"): metrics.mu_fidelity(
            scorer, x, smooth, baseline="uniform", generator=draws()
        ),
        ("smoothgrad", "jpeg_bytes"): metrics.jpeg_bytes(smooth),
        ("smoothgrad", "entropy"): metrics.entropy(smooth),
        ("smoothgrad", "gini"): metrics.gini(smooth),
        ("smoothgrad", "stability_l2"): stable.l2,
        ("smoothgrad", "stability_spearman"): stable.spearman,
        (PAIR, "distance_l2"): apart.l2,
        (PAIR, "distance_spearman"): apart.spearman,
    }
    for (method, metric), result in by_hand.items():
        cell = cell_of(content, network, method, metric)
        assert cell["mean"] == pytest.approx(result.mean, rel=1e-9), metric
        assert cell["interval"] == pytest.approx(list(result.interval), rel=1e-9), metric
        assert cell["per_sample"] == pytest.approx(known(result.per_sample), rel=1e-9), metric
        assert (cell["direction"], cell["forwards"], cell["maps"], cell["undefined"]) == (
            result.direction,
            result.forwards,
            result.maps,
            result.undefined,
        ), metric
    normalised = cell_of(content, network, "smoothgrad", "deletion_normalised")
    assert normalised["per_sample"] == pytest.approx(known(deleted.details["normalised"]))


def test_forwards_were_estimated_before_the_start(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    content = compare_run(run, samples=4)
    told = capsys.readouterr().err.splitlines()
    (line,) = (k for k, text in enumerate(told) if "forwards and" in text)
    assert told[line + 1] == "1/20 otnn: saliency"
    assert told[-1] == "20/20 unconstrained: stability"
    for entry in content["estimate"]:
        own = [m for m in content["maps"] if m["network"] == entry["network"]]
        cells = [c for c in content["cells"] if c["network"] == entry["network"]]
        # one column of each metric, and one method of the masks that all share
        count = sum(c["forwards"] for c in cells if c["metric"] in ("deletion", "insertion", "stability_l2"))
        count += sum(c["forwards"] for c in cells if c["metric"][:2] == "mu" and c["method"] == "saliency")
        assert entry["forwards"] == count + 4 * sum(m["forwards"] for m in own)
        assert entry["exact"]
        assert entry["seconds"] > 0
    forwards = sum(entry["forwards"] for entry in content["estimate"])
    assert f"2 networks x 4 methods x 6 metrics on 4 test images: {forwards:,} forwards" in told[line]


def test_the_best_of_each_network_is_marked(compared: tuple[Run, dict[str, Any]]) -> None:
    _, content = compared
    for network in content["networks"]:
        for column in content["columns"]:
            cells = [c for c in content["cells"] if (c["network"], c["metric"]) == (network, column["name"])]
            best = [c["mean"] for c in cells if c["best"]]
            means = [c["mean"] for c in cells if c["reason"] is None]
            if column["metric"] == "explanation_distance":
                assert best == []  # one of its kind
            else:
                assert best[0] == (max if cells[0]["direction"] == "up" else min)(means)


def test_what_does_not_apply_has_its_reason(compared: tuple[Run, dict[str, Any]]) -> None:
    _, content = compared
    cell = cell_of(content, "otnn", "guided_backprop", "gini")
    assert cell["reason"].startswith("guided_backprop changes the backward pass of nn.ReLU modules")
    assert set(cell) == {"network", "method", "metric", "reason", "best"}
    assert not cell["best"]
    assert cell_of(content, "unconstrained", "guided_backprop", "gini")["mean"] > 0
    assert ("otnn", "guided_backprop") not in {(p["network"], p["method"]) for p in content["quality"]}
    assert "guided_backprop" in {test["method"] for test in content["tests"]}


def test_tests_are_paired_and_corrected_together(compared: tuple[Run, dict[str, Any]]) -> None:
    _, content = compared
    tests = content["tests"]
    assert len(tests) == 5 * (len(content["columns"]) - 2) + 2
    assert [t["adjusted"] for t in tests] == pytest.approx(holm([t["p_value"] for t in tests]))
    (told,) = (t for t in tests if (t["method"], t["metric"]) == ("smoothgrad", "gini"))
    own, other = (
        torch.tensor(cell_of(content, *names, "gini")["per_sample"])
        for names in (("otnn", "saliency"), ("unconstrained", "smoothgrad"))
    )
    assert told["p_value"] == paired_test(own, other).p_value
    assert told["difference"] == pytest.approx(float((own - other).mean()), rel=1e-5)
    assert told["better"] == (told["difference"] > 0)
    assert content["verdict"][0].startswith("The OTNN's saliency against every method")


def table_of(**means: tuple[float | None, float | None]) -> Cells:
    """Cells of two metrics, the first better lower and the second better higher."""
    return [
        {"network": "otnn", "method": method, "metric": metric, "direction": way, "mean": mean, "reason": None}
        for method, pair in means.items()
        for metric, way, mean in zip(("low", "high"), ("down", "up"), pair, strict=True)
    ]


def test_ranks_and_the_front_of_a_small_table() -> None:
    cells = table_of(a=(1.0, 5.0), b=(1.0, 4.0), c=(3.0, 6.0), d=(None, None))
    mark_best(cells)
    assert [c["best"] for c in cells] == [True, False, True, False, False, True, False, False]
    columns = [{"name": name, "confounded": None} for name in ("low", "high")]
    maps = [{"network": "otnn", "method": m, "forwards": f} for m, f in zip("abcd", (1, 1, 9, 1), strict=True)]
    points = quality({"cells": cells, "columns": columns, "maps": maps})
    assert [(p["method"], p["mean_rank"], p["front"]) for p in points] == [
        ("a", 1.75, True),
        ("b", 2.25, False),
        ("c", 2.0, False),
    ]
    columns[0]["confounded"] = "in another unit"
    points = quality({"cells": cells, "columns": columns, "maps": maps})
    assert [p["mean_rank"] for p in points] == [2.0, 3.0, 1.0]
    assert paired_tests(cells) == []


def test_csv_and_json_hold_the_same(compared: tuple[Run, dict[str, Any]]) -> None:
    run, content = compared
    assert json.loads((run.path / "compare.json").read_text()) == json.loads(json.dumps(content))
    rows = list(csv.DictReader(io.StringIO((run.path / "compare.csv").read_text())))
    assert len(rows) == len(content["cells"]) == 2 * (5 * 11 + 2)
    for row, cell in zip(rows, content["cells"], strict=True):
        assert (row["network"], row["method"], row["metric"]) == (cell["network"], cell["method"], cell["metric"])
        assert row["reason"] == (cell["reason"] or "")
        assert row["best"] == str(int(cell["best"]))
        if cell["reason"] is None:
            assert float(row["mean"]) == cell["mean"]
            assert [float(row["low"]), float(row["high"])] == cell["interval"]
            assert [int(row[k]) for k in ("forwards", "undefined")] == [cell["forwards"], cell["undefined"]]
        else:
            assert row["mean"] == ""
    for name in ("compare.png", "compare-pareto.png"):
        with Image.open(run.path / name) as picture:
            assert picture.size[0] > 700


def test_a_seed_gives_the_same_figures_and_another_one_others(run: Run) -> None:
    choice: dict[str, Any] = {"methods": SOME[::2], "metrics": ["deletion", "mu_fidelity", "stability"], "samples": 5}
    first, again = (compare_run(run, seed=1, **choice) for _ in range(2))
    assert without_seconds(first) == without_seconds(again)
    other = compare_run(run, seed=2, **choice)
    assert other["images"] != first["images"]
    # the masks and noise do not depend on what else is compared
    alone = compare_run(run, seed=1, methods=["smoothgrad"], metrics=["mu_fidelity"], samples=5)
    for metric in ("mu_fidelity_zero", "mu_fidelity_uniform"):
        own, told = (cell_of(c, "otnn", "smoothgrad", metric)["per_sample"] for c in (alone, first))
        assert own == pytest.approx(told)


def test_costly_metrics_and_an_adversarial_network(tmp_path: Path) -> None:
    options = ("training.epochs=2", "model.widths=[16]", "training.adversarial=0.5", 'data.classes=["0", "8"]')
    run = train(config.load(overrides=options), tmp_path / "run", quiet=True)
    content = compare_run(
        run, profile="full", methods=["saliency"], metrics=["robustness_sr", "e_robustness", "mprt"], samples=2
    )
    assert content["networks"] == ["otnn", "unconstrained", "adversarial"]
    assert {c["metric"] for c in content["cells"]} == {"robustness_sr", "e_robustness", "mprt"}
    assert all(c["mean"] is not None for c in content["cells"])
    for entry in content["estimate"]:
        used = sum(c["forwards"] for c in content["cells"] if c["network"] == entry["network"])
        assert used + 2 <= entry["forwards"]  # at most
        assert not entry["exact"]
    # redrawn weights were put back
    open_run(tmp_path / "run")


def test_a_network_alone_to_which_nothing_applies(tmp_path: Path) -> None:
    settings = config.load(overrides=("training.epochs=1", "model.widths=[16]", "twin=false"))
    run = train(settings, tmp_path / "run", quiet=True)
    content = compare_run(run, methods=["guided_backprop"], samples=2)
    assert [c["metric"] for c in content["cells"] if c["reason"] is None] == ["distance_l2", "distance_spearman"]
    assert (content["quality"], content["tests"]) == ([], [])
    assert content["verdict"] == ["There is no ordinary network or no saliency of the OTNN here: nothing was tested."]
    assert len(compare_tables(content)) == 5
    alone = compare_run(run, methods=["saliency"], metrics=["deletion"], samples=1)
    assert cell_of(alone, "otnn", "saliency", "deletion")["interval"] == [None, None]
    assert not any(c["best"] for c in alone["cells"])
    compare_tables(alone)


def test_an_interrupted_comparison_leaves_the_run_as_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(otnn.run.compare, "pareto_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_run(run, methods=["saliency"], metrics=["deletion"], samples=2)
    assert {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()} == before


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"methods": ["saliency", "salience"]}, r"methods: expected some of saliency, .*forgrad, got 'salience'"),
        ({"metrics": ["deletions"]}, r"metrics: expected some of deletion, .*pointing_game, got 'deletions'"),
        ({"methods": []}, r"methods: expected some of .*, got none"),
        ({"profile": "slow"}, r"profile: expected one of quick, full, got 'slow'"),
        ({"samples": 0}, r"samples: expected at least 1 test image, got 0"),
        ({"score": "softmax"}, r'score: expected "logit" or "margin", got \'softmax\''),
    ],
)
def test_bad_choices_are_refused(run: Run, choice: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        compare_run(run, **choice)
    assert not (run.path / "compare.json").exists()


def test_the_full_profile_takes_all_methods_and_all_metrics() -> None:
    full = PROFILES["full"]
    assert len(full.methods) == 17
    assert full.metrics == tuple(METRICS)
    columns = [column for metric in METRICS.values() for column in metric.columns]
    assert len(set(columns)) == len(columns) == 18


def test_tables_show_the_best_in_bold_and_what_does_not_apply(compared: tuple[Run, dict[str, Any]]) -> None:
    from rich.console import Console

    _, content = compared
    console = Console(width=140, record=True, file=io.StringIO(), force_terminal=True)
    for table in compare_tables(content):
        console.print(table)
    styled, plain = console.export_text(styles=True, clear=False), console.export_text()
    assert "not applicable" in plain
    assert "gini ↑" in plain
    assert "entropy ↓" in plain
    (best,) = (c for c in content["cells"] if c["best"] and (c["network"], c["metric"]) == ("otnn", "entropy"))
    assert re.search(rf"\x1b\[1m *{best['mean']:.4g}\x1b\[0m", styled)
    assert f"{best['interval'][0]:.3g} .. {best['interval'][1]:.3g}" in plain


def test_the_report_shows_the_comparison_and_does_without_it(run: Run) -> None:
    certify_run(run)
    explain_gallery(run, size=2)
    write_report(run)
    assert 'id="compare"' not in (run.path / "report.html").read_text()
    content = compare_run(run, methods=SOME, metrics=["deletion", "explanation_distance"], samples=4)
    write_report(run)
    page = (run.path / "report.html").read_text()
    section = page[page.index('id="compare"') : page.index('id="made"')]
    assert section.count("data:image/png;base64,") == 2
    assert section.count("not applicable") == 2 + 1
    assert 'title="guided_backprop changes the backward pass' in section
    assert all(figure(c["mean"]) in section for c in content["cells"] if c["reason"] is None)
    assert content["verdict"][0].replace("'", "&#39;").replace("<", "&lt;") in section
    (run.path / "compare.png").unlink()
    with pytest.raises(InputError, match=r"compare\.png: no such file; make it with `otnn compare"):
        load_run(run.path)


def test_the_command_prints_tables_or_json(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def otnn_compare(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["otnn", "compare", str(run.path), *arguments])
        code: Any = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    choice = ("--methods", "saliency, gradient_input", "--metrics", "deletion,complexity", "--samples", "4")
    code, out, err = otnn_compare(*choice)
    assert code == 0
    assert "4 test images, bold: best of its network" in out
    assert "The OTNN's saliency against every method" in out
    assert "forwards and" in err
    code, out, _ = otnn_compare(*choice, "--score", "logit", "--seed", "5", "--json")
    assert code == 0
    content = json.loads(out)
    assert (content["score"], content["seed"], content["samples"]) == ("logit", 5, 4)
    assert content["methods"] == ["saliency", "gradient_input"]
    code, out, err = otnn_compare("--methods", "saliency,nothing")
    assert (code, out) == (2, "")
    assert err.startswith("otnn: methods: expected some of saliency, ")
