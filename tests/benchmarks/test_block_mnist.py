"""The BlockMNIST benchmark, on small synthetic digits that train in a second."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import block_mnist as benchmark
from otnn.metrics import block_mnist
from otnn.models import build
from otnn.run.config import LossConfig
from tests.data.image_makers import write_patterns

NETWORKS = {"otnn", "unconstrained", "adversarial"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's four files with 8 x 8 pictures, see `write_patterns`."""
    path = tmp_path_factory.mktemp("data") / "mnist"
    write_patterns(path, 600, 200)
    return path.parent


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *arguments: str) -> int:
    shape = ("--set", "model.widths=[32]", "--set", "training.batch_size=32")
    sizes = ("--train", "300", "--samples", "40", "--exact", "20")
    every = ("--data-dir", str(folder), *sizes, *shape, "--out", str(out))
    monkeypatch.setattr("sys.argv", ["block_mnist", *every, *arguments])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    return int(left.value.code or 0)


def test_report_picture_and_going_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    assert command(monkeypatch, folder, out, "--epochs", "2") == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    assert report["versions"].keys() >= {"otnn", "torch"}
    assert (report["seed"], report["train"], report["samples"]) == (0, 300, 40)
    assert report["settings"]["training"]["epochs"] == 2
    assert str(folder) not in out.read_text()
    assert report["networks"].keys() == NETWORKS
    for network in report["networks"].values():
        assert network["test images"] == 200
        assert network["accuracy"] > 0.5  # by chance .1
        assert network["null block, %"].keys() == set(benchmark.METHODS)
        for row in network["null block, %"].values():
            assert list(row) == ["5", "10", "15", "20", "25", "30"]
            assert all(0 <= share["mean"] <= 100 for share in row.values())
            assert all(share["interval"][0] <= share["mean"] <= share["interval"][1] for share in row.values())
    assert len(report["tests"]) == 2 * 6
    assert all(test["p_value"] <= test["adjusted"] <= 1 and test["samples"] == 40 for test in report["tests"])
    assert report["paper, saliency, %"]["unconstrained"]["5"] == 42.5
    assert "by chance 50 %" in capsys.readouterr().out

    # networks that are there are not trained again
    kept = {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()}
    assert kept.keys() == {f"{name}.safetensors" for name in NETWORKS} | {"metrics.jsonl"}
    (tmp_path / "report" / "adversarial.safetensors").unlink()
    out.unlink()
    trained: list[str] = []
    train_network = benchmark.train_network

    def counted(
        model: object, loss: object, dataset: object, settings: object, name: str, *rest: object, **more: object
    ):  # type: ignore[no-untyped-def]
        trained.append(name)
        return train_network(model, loss, dataset, settings, name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(benchmark, "train_network", counted)
    assert command(monkeypatch, folder, out, "--epochs", "2") == 0
    assert trained == ["adversarial"]
    assert json.loads(out.read_text()) == report
    assert (tmp_path / "report" / "adversarial.safetensors").read_bytes() == kept["adversarial.safetensors"]
    capsys.readouterr()

    # and those of other settings are not taken for these
    assert command(monkeypatch, folder, out, "--epochs", "3") == 2
    assert "of other settings, versions or code; delete" in capsys.readouterr().err
    (tmp_path / "report" / "otnn.safetensors").write_bytes(b"broken")
    assert command(monkeypatch, folder, out, "--epochs", "2") == 2
    assert "otnn.safetensors: cannot be read as a network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--train", "5000"), "train: expected at most the 540 images that there are, got 5000"),
        (("--samples", "201"), "samples: expected at most the 200 images that there are, got 201"),
    ],
)
def test_more_images_than_there_are(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    text: str,
) -> None:
    assert command(monkeypatch, folder, tmp_path / "out.json", *arguments) == 2
    assert text in capsys.readouterr().err


def test_a_network_that_sees_one_half_is_right_by_half() -> None:
    """Weights on the upper half alone: the top pixels lie in the null block exactly where that is above."""
    generator = torch.Generator().manual_seed(0)
    blocks = block_mnist(torch.rand(60, 1, 8, 8, generator=generator), torch.arange(60) % 3, generator)
    model = build("dense", (1, 16, 8), 3, widths=(2,), constrained=False)
    model.body = nn.Sequential(nn.Flatten())
    model.head = nn.Linear(128, 3)
    with torch.no_grad():
        model.head.weight[:, 64:] = 0
    maps = benchmark.explain_all({"half": model.eval()}, blocks, "margin")["half"]["saliency"]
    above = blocks.null[:, 0, 0].double()
    assert 0.3 < float(above.mean()) < 0.7
    for share in benchmark.shares_of(maps, blocks.null, 0).values():
        assert torch.equal(share.per_sample, above)
        assert benchmark.told(share)["mean"] == pytest.approx(100 * float(above.mean()))


def test_the_exact_optimum_moves_the_digit_and_leaves_the_null_block() -> None:
    """Two classes of one picture each, six pixels apart, in both places: all of the mass stays in its half."""
    pictures = torch.zeros(80, 1, 8, 8)
    labels = torch.arange(80) % 2
    pictures[:, :, 2:6, 2:6] = 0.5
    pictures[labels == 1, :, 3:5, 3:6] = 1
    found = benchmark.exact_shares(pictures, labels, (0, 1), 40, 0, LossConfig(margin=0.1, hinge_weight=5.0))
    assert found["same half, % of the mass"] == pytest.approx(100)
    # the six pixels that change are 5 % of 128; what is further down is 0 in both halves and falls at random
    assert found["null block, %"]["5"] == 0
    assert 10 < found["null block, %"]["30"] < 60
    assert found["gap"] < 1e-9
