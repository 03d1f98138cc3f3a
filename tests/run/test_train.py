import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split
from torch import nn

from otnn import losses
from otnn.cli import main
from otnn.data import Dataset, Split
from otnn.errors import InputError
from otnn.manifold import Stiefel, constrained_parameters
from otnn.models import build, predict
from otnn.nn import Householder
from otnn.run import config
from otnn.run.certify import certify_run
from otnn.run.config import LossConfig, TrainingConfig
from otnn.run.fit import augment, fit, scores_of
from otnn.run.folder import Run, open_run
from otnn.run.train import make_loss, train, tune_threshold, twin_loss, unbalanced
from tests.run.conftest import QUICK


def test_a_run_holds_both_networks_and_honest_results(run: Run) -> None:
    results = run.results()
    pixels, labels = load_digits(return_X_y=True)
    _, test_pixels, _, test_labels = train_test_split(
        pixels / 16, labels, test_size=0.2, stratify=labels, random_state=0
    )
    images = torch.tensor(test_pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    for name in ("otnn", "unconstrained"):
        prediction = predict(scores_of(run.network(name), images)).numpy()
        assert results[name]["accuracy"] == pytest.approx((prediction == test_labels).mean())
        assert results[name]["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(test_labels, prediction))
        assert results[name]["accuracy"] > 0.8  # chance is 0.1; five epochs reach about 0.93
    assert results["data"]["test"] == 360
    assert results["otnn"]["loss"] == "soft_hkr"
    assert results["otnn"]["margin"] == 0.5
    assert results["versions"]["torch"] == torch.__version__


def test_the_stored_network_is_plain_orthogonal_and_proven(run: Run) -> None:
    network = run.network("otnn")
    assert not list(constrained_parameters(network))
    layers = [layer for layer in network.body if isinstance(layer, nn.Linear)]
    assert [type(layer) for layer in layers] == [nn.Linear] * len(layers)
    for layer in layers:
        assert Stiefel().distance(layer.weight.double()) < 1e-5
    assert 1 - 1e-5 <= run.results()["otnn"]["lipschitz_bound"] <= 1
    assert run.manifest["bounds"]["otnn"]["constant"] == run.results()["otnn"]["lipschitz_bound"]


def test_metrics_are_one_json_line_per_epoch_and_network(run: Run) -> None:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["network"], line["epoch"]) for line in lines] == [
        (network, epoch) for network in ("otnn", "unconstrained") for epoch in range(1, 6)
    ]
    ours = [line for line in lines if line["network"] == "otnn"]
    assert ours[-1]["loss"] < ours[0]["loss"]
    assert 0 < ours[-1]["validation_certified_accuracy"] <= ours[-1]["validation_accuracy"]
    assert lines[-1]["validation_certified_accuracy"] is None


def test_one_seed_gives_the_same_networks_and_another_seed_others(trained: Path, tmp_path: Path) -> None:
    first = load_file(trained / "networks" / "otnn.safetensors")
    train(config.load(overrides=[*QUICK, "twin=false"]), tmp_path / "same", quiet=True)
    same = load_file(tmp_path / "same" / "networks" / "otnn.safetensors")
    assert all(torch.equal(first[name], same[name]) for name in first)
    train(config.load(overrides=[*QUICK, "twin=false", "seed=1"]), tmp_path / "other", quiet=True)
    other = load_file(tmp_path / "other" / "networks" / "otnn.safetensors")
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not (tmp_path / "same" / "networks" / "unconstrained.safetensors").exists()
    assert not open_run(tmp_path / "same").has_twin


def test_a_run_of_another_activation_and_head_opens_and_certifies_again(tmp_path: Path) -> None:
    choices = ["model.activation=householder", "model.head=frobenius", "loss.margin=0.1", "twin=false"]
    train(config.load(overrides=[*QUICK, *choices]), tmp_path / "run", quiet=True)
    run = open_run(tmp_path / "run")
    assert (run.config.model.activation, run.config.model.head) == ("householder", "frobenius")
    model = run.network("otnn")
    angles = [layer.angle.detach() for layer in model.body if isinstance(layer, Householder)]
    assert len(angles) == 2
    assert all(float((angle - torch.pi / 2).abs().min()) > 0 for angle in angles)  # learned, and restored
    assert 1 - 1e-6 <= float(model.head.weight.detach().norm()) <= 1 + 1e-7
    certify_run(run)
    results = json.loads((run.path / "results.json").read_text())["otnn"]
    assert results["accuracy"] > 0.8
    assert results["lipschitz_bound"] <= 1
    assert results["certified_accuracy"]["0.25"] > 0.3


def test_an_existing_folder_is_refused_and_overwritten_only_with_force(run: Run, tmp_path: Path) -> None:
    quick = config.load(overrides=["training.epochs=1", "model.widths=[8]", "twin=false"])
    before = (run.path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"exists already.*--force"):
        train(quick, run.path, quiet=True)
    assert (run.path / "manifest.json").read_bytes() == before
    assert open_run(train(quick, run.path, force=True, quiet=True).path).config.model.widths == (8,)
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not a run folder, so --force does not replace it"):
        train(quick, other, force=True, quiet=True)
    assert (other / "thesis.tex").read_text() == "years of work"


def test_a_failed_training_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("otnn.run.train.fit", fail)
    with pytest.raises(KeyboardInterrupt):
        train(config.load(overrides=QUICK), tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_binary_task_gets_one_output_and_the_binary_loss(tmp_path: Path) -> None:
    steps = ("training.epochs=20", "training.batch_size=32")
    settings = config.load(options={"data.classes": ["0", "8"]}, overrides=[*QUICK, *steps, "loss.alpha=0.1"])
    with_alpha = train(settings, tmp_path / "run", quiet=True)
    results = with_alpha.results()["otnn"]
    assert results["loss"] == "hkr"
    assert results["margin"] > 0.1  # it starts at 0.1, and the digits 0 and 8 are far apart
    assert with_alpha.network("otnn").head.out_features == 1
    assert results["accuracy"] > 0.95


@pytest.mark.parametrize("name", ["one_vs_all_hkr", "soft_hkr", "cross_entropy"])
def test_every_loss_trains(tmp_path: Path, name: str) -> None:
    settings = config.load(overrides=[*QUICK, "twin=false", f"loss.name={name}"])
    assert train(settings, tmp_path / "run", quiet=True).results()["otnn"]["accuracy"] > 0.7


def test_a_loss_that_does_not_fit_is_named() -> None:
    shares = torch.full((10,), 0.1)
    with pytest.raises(InputError, match=r"loss\.name: hkr does not fit 10 classes"):
        make_loss(LossConfig(name="hkr", margin=0.5, hinge_weight=1.0), shares)
    with pytest.raises(InputError, match=r"loss\.name: expected one of auto, hkr.*got 'mse'"):
        LossConfig(name="mse")


def test_twin_loss_weighs_rare_classes() -> None:
    scores, labels = torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 0])
    weighted = twin_loss(torch.tensor([0.9, 0.1]))(scores, labels)
    # weights 1 / (2 * share): 5 for the rare class and 5/9 for the other
    expected = (5 * torch.log1p(torch.exp(torch.tensor(-2.0))) + 5 / 9 * torch.log1p(torch.exp(torch.tensor(-1.0)))) / 2
    assert weighted == pytest.approx(float(expected))
    assert unbalanced(torch.tensor([0.7, 0.3]))
    assert not unbalanced(torch.tensor([0.55, 0.45]))


def test_the_tuned_threshold_has_the_best_balanced_accuracy() -> None:
    torch.manual_seed(0)
    model = build("dense", (1, 4, 4), 2, widths=(8,)).eval()
    images, labels = torch.rand(60, 1, 4, 4), (torch.arange(60) % 6 == 0).long()
    scores = scores_of(model, images)[:, 0].numpy().copy()
    tune_threshold(model, Split(images, labels))
    tuned = balanced_accuracy_score(labels, predict(scores_of(model, images)))
    best = max(balanced_accuracy_score(labels, scores > threshold) for threshold in scores)
    assert tuned >= best - 1e-9
    assert tuned > 0.5


def test_augmentation_keeps_the_pixels_it_may() -> None:
    images = torch.arange(2 * 3 * 5 * 5, dtype=torch.float32).view(2, 3, 5, 5)
    generator = torch.Generator().manual_seed(0)
    same = augment(images, TrainingConfig(), generator)
    assert torch.equal(same, images)
    mirrored = augment(images, TrainingConfig(flip=True), torch.Generator().manual_seed(1))
    for one, image in zip(mirrored, images, strict=True):
        assert torch.equal(one, image) or torch.equal(one, image.flip(2))
    shifted = augment(images.expand(2, 3, 5, 5), TrainingConfig(shift=1), torch.Generator().manual_seed(0))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    for k in range(2):
        windows = [padded[k, :, i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
        assert any(np.array_equal(shifted[k].numpy(), window) for window in windows)


def test_an_exploding_loss_stops_with_a_word(tmp_path: Path) -> None:
    class Broken(losses.Loss):
        def forward(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return scores.sum() * torch.inf

    split = Split(torch.rand(8, 1, 4, 4), torch.arange(8) % 2)
    dataset = Dataset("made", ("a", "b"), split, split, split, ())
    model = build("dense", dataset.input_shape, 2, widths=(4,))
    text = r"^in epoch 1, step 1, the loss became inf at scores of the head .*rate \(training\.learning_rate\)$"
    with pytest.raises(FloatingPointError, match=text):
        fit(
            model,
            Broken(),
            split,
            split,
            TrainingConfig(epochs=1, batch_size=4),
            learning_rate=0.1,
            constrained=True,
            seed=0,
        )


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("learning_rate=1e38", r"the loss became (nan|inf) at scores of the head up to \d\.\de\+\d\d; lower"),
        ("learning_rate=1e20", r"(head|body\.\d+)\.\w+.* became NaN or infinite in the step, which was undone; lower"),
        ("twin_learning_rate=1e36", r"the loss became (nan|inf), first in the output of body\.\d+; lower"),
    ],
)
def test_training_that_diverges_is_one_sentence_with_epoch_and_layer_and_leaves_no_folder(
    setting: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--out", str(tmp_path / "run")]
    for override in ("training.epochs=1", "model.widths=[16, 16]", f"training.{setting}"):
        arguments += ["--set", override]
    monkeypatch.setattr("sys.argv", ["otnn", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    key = "training." + setting.split("=")[0]
    assert re.fullmatch(rf"otnn: training failed: in epoch 1, step \d+, {text} the learning rate \({key}\)", last), last
    assert list(tmp_path.iterdir()) == []


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    """Gradients of half batches average to the gradient of the batch, so 20 steps agree to rounding."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport torch\ntorch.set_num_threads(1)\n"
        "from otnn.run import config\nfrom otnn.run.train import train\n"
        "settings = config.load(overrides=['training.epochs=2', 'model.widths=[16]', 'twin=false'])\n"
        "train(settings, Path(sys.argv[1]), quiet=True)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in ([sys.executable, str(script), "one"], [*launch, str(script), "two"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "networks" / "otnn.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name


def test_a_binary_network_can_be_trained_with_cross_entropy() -> None:
    loss = make_loss(LossConfig(name="cross_entropy", temperature=2.0), torch.tensor([0.5, 0.5]))
    scores, labels = torch.tensor([[1.0], [-0.5]]), torch.tensor([1, 1])
    expected = (torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log1p(torch.exp(torch.tensor(1.0)))) / 4
    assert loss(scores, labels) == pytest.approx(float(expected))


def test_several_processes_take_equal_shares_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otnn.run.fit.world", lambda: 2)
    split = Split(torch.rand(9, 1, 4, 4), torch.arange(9) % 2)
    model = build("dense", (1, 4, 4), 2, widths=(4,))
    loss = losses.HKRLoss(margin=0.1, hinge_weight=1.0)
    for batch_size, text in ((5, "expected a multiple of the 2 processes, got 5"), (2, "two images for each of 2")):
        settings = TrainingConfig(epochs=1, batch_size=batch_size)
        with pytest.raises(InputError, match=text):
            fit(model, loss, split, split, settings, learning_rate=0.1, constrained=True, seed=0)
