"""The residual network from pictures to a certified, exported run."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from otnn.certify import certify
from otnn.cli import main
from otnn.manifold import constrained_parameters
from otnn.nn import ConvexResidual
from otnn.run.folder import open_run

SETTINGS = ("model.architecture=resnet", "training.epochs=5", "training.batch_size=8", "model.widths=[4,8,8,8]")


def command(*arguments: str) -> None:
    """Run `otnn ...`, which must end well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["otnn", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 70x66 pixels: bright on the left, bright on the right."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for side in ("left", "right"):
        (folder / side).mkdir()
        for k in range(20):
            pixels = random.integers(0, 100, (66, 70, 3), dtype=np.uint8)
            pixels[:, slice(0, 35) if side == "left" else slice(35, 70)] += 120
            Image.fromarray(pixels).save(folder / side / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "resnet"
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    command("train", "--data", str(pictures), "--size", "64", "--out", str(out), *sets)
    return out


def test_train_certify_and_export(trained: Path, tmp_path: Path) -> None:
    command("certify", str(trained))
    run = open_run(trained)
    results = run.results()
    assert results["otnn"]["architecture"] == "resnet"
    assert 1 - 1e-4 < results["otnn"]["lipschitz_bound"] <= 1
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for name in ("otnn", "unconstrained"):  # so few steps only begin
        losses = [line["loss"] for line in lines if line["network"] == name]
        assert losses[-1] < losses[0]
    command("export", str(trained), "--out", str(tmp_path / "net.onnx"))
    network = run.network("otnn")
    images = torch.rand(3, 3, 64, 64)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"images": images.numpy()})
    assert (torch.from_numpy(scores) - network(images)).abs().max() < 1e-5


def test_the_stored_networks_are_residual(trained: Path) -> None:
    run = open_run(trained)
    network, twin = run.network("otnn"), run.network("unconstrained")
    blocks = [layer for layer in network.body if isinstance(layer, ConvexResidual)]
    assert len(blocks) == 6
    shares = torch.stack([block.mix.alpha.detach() for block in blocks])
    assert bool(((shares >= 0) & (shares <= 1)).all())
    assert len(set(shares.tolist())) > 1  # they were learned
    assert {name.rsplit(".", 1)[-1] for name, _, _ in constrained_parameters(network)} == {"alpha"}
    assert all(isinstance(layer, nn.Conv2d) for block in blocks for layer in block.branch[::2])
    convolutions = [[m.weight.shape for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (network, twin)]
    assert convolutions[0] == convolutions[1]


def test_radii_of_both_arithmetics(trained: Path) -> None:
    network = open_run(trained).network("otnn")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    real, executed = (certify(network, images, arithmetic=arithmetic) for arithmetic in ("real", "float32"))
    assert torch.equal(real.prediction, executed.prediction)
    assert bool((executed.radius < real.radius).all())
    assert bool((executed.radius > 0.5 * real.radius).all())
