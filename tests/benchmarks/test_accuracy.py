"""The benchmark of accuracy on small synthetic clothes: what is certified, what is kept, and what lies above what."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.accuracy import __main__ as command_line
from benchmarks.accuracy import campaign, training
from benchmarks.accuracy.fronts import excess, front, summary
from benchmarks.accuracy.training import LIBRARIES, RADII, ReleasedHKR, Run
from benchmarks.campaign import partial_file
from benchmarks.layers.nets import FAMILIES, OTNN, TORCHLIP, Plan, build, layers_of
from otnn.errors import InputError
from otnn.models import Classifier
from tests.data.image_makers import idx_bytes

RUN = Run(OTNN, 1e-2, 0.25, 10.0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's four files with 8 x 8 pictures: ten random patterns, each with noise of its own."""
    path = tmp_path_factory.mktemp("data") / "fashion-mnist"
    path.mkdir()
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2, (10, 8, 8)) * 200
    for stem, count in (("train", 600), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pictures = (patterns[labels] + rng.integers(0, 56, (count, 8, 8))).astype(np.uint8)
        (path / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(pictures))
        (path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return path.parent


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *arguments: str) -> int:
    every = ("--data-dir", str(folder), "--library", OTNN, "--epochs", "1", "--workers", "1", "--out", str(out))
    monkeypatch.setattr("sys.argv", ["accuracy", *every, *arguments])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    return int(left.value.code or 0)


# --- the campaign ------------------------------------------------------------------------------------------------

GRID = ("--learning-rate", "0.01", "--learning-rate", "0.02", "--margin", "0.25", "--temperature", "10")


def timeless(report: dict) -> dict:
    """A report without the seconds, which differ between runs."""
    for row in [*report["runs"], *report["settings"]]:
        row.pop("seconds")
    return report


def test_a_stopped_campaign_goes_on_to_the_same_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "PLAN", Plan(((8, 1), (8, 2)), (16,), 28))
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert command(monkeypatch, folder, whole, *GRID, "--seeds", "2") == 0
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
    assert str(folder) not in whole.read_text()
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

    def stopped(run: Run, **settings: object) -> dict:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(run)
        return training.measured(run, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(command_line, "measured", stopped)
    assert command(monkeypatch, folder, out, *GRID, "--seeds", "2") == 130
    assert [(run.seed, run.learning_rate) for run in trained] == [(0, 0.01), (0, 0.02)]
    assert not out.exists()
    assert command(monkeypatch, folder, out, *GRID, "--seeds", "1") == 0
    assert len(trained) == 2
    assert [row["seed"] for row in json.loads(out.read_text())["runs"]] == [0, 0]

    # going on from there trains the second seed only
    trained.clear()
    assert command(monkeypatch, folder, out, *GRID, "--seeds", "2") == 0
    assert [(run.seed, run.learning_rate) for run in trained] == [(1, 0.01), (1, 0.02)]
    assert timeless(json.loads(out.read_text())) == report
    assert not partial_file(out).exists()

    # what was made otherwise is not taken for these
    stored = {"header": report["made with"], "runs": report["runs"]}
    partial_file(out).write_text(json.dumps(stored))
    capsys.readouterr()
    assert command(monkeypatch, folder, out, *GRID, "--seeds", "1", "--epochs", "2") == 2
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


def fake(run: Run) -> dict:
    held = dict.fromkeys(RADII, 0.5 - 0.1 * run.seed)
    row = {name: getattr(run, name) for name in Run.__dataclass_fields__}
    row["code"] = training.code_digest(run.library)
    return {**row, "clean": 0.8, "certified": held, "mean radius": 0.5, "constant": 1.0, "seconds": 1.0}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--margin", "-1"), "margin: expected a positive number, got -1.0"),
        (("--learning-rate", "nan"), "learning_rate: expected a positive number, got nan"),
        (("--library", "lip"), "library: expected one of otnn, deel-torchlip, orthogonium, got 'lip'"),
    ],
)
def test_wrong_settings(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    text: str,
) -> None:
    assert command(monkeypatch, folder, tmp_path / "out.json", *arguments) == 2
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


def expected_of(points: dict[Run, tuple[float, float]]) -> list[tuple[str, float]]:
    """Library and rate of what no setting of the same library dominates, by comparing all pairs."""
    return [
        (run.library, run.learning_rate)
        for run, point in points.items()
        if not any(dominates(other, point) for rival, other in points.items() if rival.library == run.library)
    ]


# --- one run -----------------------------------------------------------------------------------------------------


def test_the_radius_is_that_of_the_geometry_of_the_head(folder: Path) -> None:
    given = training.data(folder)
    net = build(FAMILIES[OTNN], Plan(((8, 2),), (16,), 8))
    training.train(net, given, RUN, 20)
    plain = LIBRARIES[OTNN].plain(net, Plan((), (), 8)).double()
    found = training.figures(Classifier(plain[:-1], plain[-1], (1, 8, 8)).eval(), given.test_images, given.test_labels)
    with torch.no_grad():
        scores = plain(given.test_images.double())
    rows = plain[-1].weight.detach()
    radii = []
    for score, label in zip(scores, given.test_labels, strict=True):
        own = int(score.argmax())
        quotients = [
            float((score[own] - score[j]) / (found["constant"] * (rows[own] - rows[j]).norm()))
            for j in range(10)
            if j != own
        ]
        radii.append(min(quotients) if own == int(label) else -1.0)
    assert found["mean radius"] == pytest.approx(sum(max(radius, 0) for radius in radii) / 100, rel=1e-9)
    assert found["clean"] == sum(radius >= 0 for radius in radii) / 100
    for name, radius in RADII.items():
        assert found["certified"][name] == sum(each >= radius for each in radii) / 100
    assert found["clean"] > 0.8  # by chance .1
    assert 1 - 1e-5 < found["constant"] <= 1
    assert [float(row.norm()) for row in rows] == pytest.approx([1] * 10, abs=1e-6)


def test_a_loss_that_is_not_finite_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(self: ReleasedHKR, scores: Tensor, labels: Tensor) -> Tensor:
        return scores.sum() / 0

    monkeypatch.setattr(ReleasedHKR, "forward", infinite)
    row = training.measured(RUN, folder, 1)
    assert "at step 1" in row["diverged"]
    assert "clean" not in row


def test_scores_that_are_not_finite_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(family: Any, plan: Plan, seed: int) -> nn.Sequential:
        net = build(family, plan, seed)
        with torch.no_grad():
            list(layers_of(net))[-1].bias.fill_(torch.nan)
        return net

    monkeypatch.setattr(training, "build", broken)
    row = training.measured(RUN, folder, 1)
    assert row["diverged"] == "scores became NaN or infinite at step 1"


def test_a_plain_network_that_computes_something_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(net: nn.Sequential, plan: Plan) -> nn.Module:
        plain = LIBRARIES[OTNN].plain(net, plan)
        with torch.no_grad():
            plain[-1].bias += 1e-3
        return plain

    wrong = training.Library("otnn", LIBRARIES[OTNN].family, shifted)
    monkeypatch.setattr(training, "LIBRARIES", {OTNN: wrong})
    with pytest.raises(ArithmeticError, match="scores differ by 1"):
        training.measured(RUN, folder, 1)


def test_too_few_images(tmp_path: Path) -> None:
    path = tmp_path / "fashion-mnist"
    path.mkdir()
    for stem, count in (("train", 100), ("t10k", 20)):
        (path / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((count, 8, 8), dtype=np.uint8)))
        (path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count, dtype=np.uint8) % 10))
    with pytest.raises(InputError, match="at least the 256 training images of a batch, got 100"):
        training.data(tmp_path)


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_has_the_same_network_and_is_read_out_exactly(name: str) -> None:
    pytest.importorskip(LIBRARIES[name].module)
    plan = Plan(((4, 1), (6, 2)), (8,), 8, classes=3)
    net = build(LIBRARIES[name].family(), plan)
    kinds = ["MaxMin" if type(layer).__name__ == "MaxMin" else "" for layer in net]
    assert kinds == ["", "MaxMin", "", "MaxMin", "", "", "MaxMin", ""]
    generator = torch.Generator().manual_seed(0)
    given = training.Data(
        torch.rand(512, 1, 8, 8, generator=generator), torch.arange(512) % 3, torch.empty(0), torch.empty(0), 3
    )
    training.train(net, given, Run(name, 1e-2, 0.5, 10.0, 0), 2)
    plain = LIBRARIES[name].plain(net, plan)
    assert {type(layer).__name__ for layer in plain} == {"Conv2d", "MaxMin", "Flatten", "Linear"}
    assert all(layer.padding_mode == "zeros" for layer in plain if isinstance(layer, nn.Conv2d))
    images = torch.rand(20, 1, 8, 8, generator=generator)
    with torch.no_grad():
        assert torch.allclose(plain(images), net(images), atol=1e-5)
    rows = list(layers_of(plain))[-1].weight.detach()
    assert rows.norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-5)


def test_the_weights_of_torchlip_are_those_after_the_last_step() -> None:
    pytest.importorskip("deel.torchlip")
    from deel.torchlip.normalizers import bjorck_normalization

    net = build(LIBRARIES[TORCHLIP].family(), Plan((), (4,), 4, classes=3))
    dense = net[1]
    for _ in range(20):
        net(torch.rand(2, 1, 4, 4))
    with torch.no_grad():
        dense.parametrizations.weight.original.add_(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) / 8)
    stale = net.eval()[1].weight.detach().clone()
    fresh = LIBRARIES[TORCHLIP].plain(net, Plan((), (4,), 4))[1].weight.detach()
    original = dense.parametrizations.weight.original.detach()
    wanted = bjorck_normalization(original / torch.linalg.matrix_norm(original, 2), 1e-6)
    # 15 steps of either do not reach the polar factor to the last digit
    assert (fresh - wanted).abs().max() < 0.02
    assert (stale - wanted).abs().max() > 0.1


# --- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "temperature"), [(1.0, 10.0), (0.5, 20.0), (2.0, 5.0)])
def test_the_loss_is_that_of_torchlip_over_many_batches(margin: float, temperature: float) -> None:
    released = pytest.importorskip("deel.torchlip").SoftHKRMulticlassLoss(
        alpha=0.98, min_margin=margin, temperature=temperature
    )
    ours = ReleasedHKR(margin, temperature, 10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        # scores that grow beyond the margin, so that the running mean counts
        scores = 4 * torch.randn(32, 10, generator=generator)
        labels = torch.randint(10, (32,), generator=generator)
        one, other = (scores.clone().requires_grad_() for _ in range(2))
        signs = 2.0 * nn.functional.one_hot(labels, 10) - 1
        first, second = ours(one, labels), released(other, signs)
        assert first.item() == pytest.approx(second.item(), rel=1e-5)
        first.backward()
        second.backward()
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_the_loss_of_a_score_by_hand() -> None:
    # equal rivals: weights 1/2; own 1, rivals 0, half margin 1: KR -1 - 0, hinges 0 and 1
    loss = ReleasedHKR(2.0, 10.0, 3)(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.02 * -1 + 0.98 * 1)


# --- fronts ------------------------------------------------------------------------------------------------------

coordinates = st.integers(0, 6).map(lambda k: k / 8)
points_of = st.lists(st.tuples(coordinates, coordinates), max_size=12)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


@given(points_of)
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    expected = {k for k, point in enumerate(points) if not any(dominates(other, point) for other in points)}
    found = front(points)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [points[k][0] for k in found] == sorted((points[k][0] for k in found), reverse=True)


@given(st.tuples(coordinates, coordinates), points_of.filter(bool))
def test_the_excess_is_the_least_that_matches(point: tuple[float, float], others: list[tuple[float, float]]) -> None:
    def matched(added: float) -> bool:
        return any(x + added >= point[0] and y + added >= point[1] for x, y in others)

    least = excess(point, others)
    assert matched(least)
    assert not matched(least - 1 / 8)  # coordinates and so the excess are multiples of it
    assert (least <= 0) == matched(0)


def rows(library: str, points: dict[float, list[tuple[float, float]]]) -> list[dict]:
    """Runs with a point for each seed, by learning rate; the same certified accuracy at every radius."""
    return [
        {**fake(Run(library, rate, 1.0, 10.0, seed)), "clean": clean, "certified": dict.fromkeys(RADII, held)}
        for rate, own in points.items()
        for seed, (clean, held) in enumerate(own)
    ]


def test_a_front_that_lies_above() -> None:
    ours = rows(OTNN, {1e-3: [(0.9, 0.4), (0.88, 0.42)], 1e-2: [(0.8, 0.7), (0.8, 0.7)]})
    theirs = rows(TORCHLIP, {1e-3: [(0.89, 0.3), (0.89, 0.3)], 1e-2: [(0.79, 0.65), (0.81, 0.75)]})
    told = summary([*ours, *theirs])
    # the means 0.89, 0.8 match the clean accuracies 0.89 and 0.8; the second point has no more certified accuracy
    assert [(row["radius"], row["above"], row["points"], row["matched"]) for row in told["comparison"]] == [
        (radius, True, 2, 2) for radius in RADII
    ]
    second = told["comparison"][0]["front"][1]
    assert second["learning_rate"] == 1e-2
    assert second["certified"] == {"mean": 0.7, "min": 0.65, "max": 0.75}
    assert second["excess"] == 0
    assert second["excess by seed"] == pytest.approx([-0.01, 0.05])


def test_a_point_that_is_not_matched_is_told_with_how_much() -> None:
    ours = rows(OTNN, {1e-3: [(0.9, 0.4)], 1e-2: [(0.8, 0.7)]})
    theirs = rows("orthogonium", {1e-3: [(0.85, 0.6)], 1e-2: [(0.7, 0.5)]})
    (row, *_) = summary([*ours, *theirs])["comparison"]
    assert (row["peer"], row["above"], row["points"], row["matched"]) == ("orthogonium", False, 1, 0)
    # 0.05 more clean accuracy for (0.8, 0.7), or 0.2 more certified accuracy for (0.9, 0.4)
    assert row["front"][0]["excess"] == pytest.approx(0.05)


def test_a_setting_that_diverged_is_in_no_front() -> None:
    ours = rows(OTNN, {1e-3: [(0.9, 0.4), (0.9, 0.4)], 1e-2: [(0.99, 0.9), (0.99, 0.9)]})
    broken = {**{name: ours[-1][name] for name in Run.__dataclass_fields__}, "diverged": "at step 3"}
    told = summary([*ours[:-1], broken, *rows(TORCHLIP, {1e-3: [(0.95, 0.5)] * 2})])
    assert told["diverged"] == [{"library": OTNN, "learning_rate": 1e-2, "margin": 1.0, "temperature": 10.0}]
    assert [one["learning_rate"] for one in told["settings"] if one["library"] == OTNN] == [1e-3]
    assert not any(row["above"] for row in told["comparison"])


def test_lines_and_plot_of_a_report() -> None:
    both = [*rows(OTNN, {1e-3: [(0.9, 0.4)]}), *rows(TORCHLIP, {1e-3: [(0.85, 0.6)], 1e-2: [(0.8, 0.3)]})]
    report = summary(both)
    text = "\n".join(command_line.lines(report))
    assert text.count("NOT ABOVE: deel-torchlip at ") == len(RADII)
    assert "not matched: rate 0.001, margin 1, temperature 10, by +20.00 points (by seed +20.00)" in text
    picture = command_line.plot(report)
    assert picture.startswith(b"\x89PNG")
    # every point that is reported is drawn
    assert picture != command_line.plot(summary(both[:-1]))
