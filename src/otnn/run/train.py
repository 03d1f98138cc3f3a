"""The first stage: data and configuration to a run folder with trained networks."""

import dataclasses
import hashlib
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from otnn import __version__, losses
from otnn.data import KNOWN, Dataset, Split, load
from otnn.errors import InputError
from otnn.lipschitz import export
from otnn.models import Classifier, build, default_widths, parameter_count, predict
from otnn.potential import class_scores
from otnn.run.config import Config, DataConfig, LossConfig
from otnn.run.distributed import processes, rank
from otnn.run.fit import EpochMetrics, fit, scores_of
from otnn.run.folder import Run, new_run, open_run, save_run
from otnn.run.progress import name_skipped, status, training_bar

# Class shares that differ by more than this factor count as unbalanced: class weights and a tuned threshold.
_UNBALANCED = 1.5


def train(config: Config, out: Path, *, force: bool = False, device: str = "auto", quiet: bool = False) -> Run:
    """Train the OTNN, its unconstrained twin and, where asked for, an adversarially trained one, into a run folder.

    Under `torchrun` all processes train together and the first one writes.

    Args:
        config: what to train on what.
        out: the run folder; it appears only when everything went well.
        force: replace an existing run folder.
        device: "auto", or any name torch knows.
        quiet: no progress.

    Raises:
        InputError: data, configuration or folder that cannot be used.
    """
    with (
        processes(choose_device(device)) as place,
        new_run(out, force=force) if rank() == 0 else TemporaryDirectory() as name_of_folder,
    ):
        folder = Path(name_of_folder)
        quiet = quiet or rank() > 0
        with status(f"reading {config.data.name}"):
            dataset = load_dataset(config.data)
        name_skipped(dataset.skipped)
        shape = dataset.input_shape
        widths = config.model.widths or default_widths(config.model.architecture, shape)
        mean = dataset.train.images.mean(dim=(0, 2, 3))
        networks: dict[str, Classifier] = {}
        results: dict[str, Any] = {
            "format": 1,
            "data": describe(dataset),
            "versions": versions(),
            "device": str(place),
            "seed": config.seed,
            "seconds": {},
        }
        for name in names_of(config):
            constrained = name == "otnn"
            torch.manual_seed(config.seed)
            model = build(
                config.model.architecture,
                shape,
                len(dataset.classes),
                widths=widths,
                mean=mean,
                constrained=constrained,
                activation=config.model.activation,
                head=config.model.head,
            ).to(place)
            loss = make_loss(config.loss, dataset.shares) if constrained else twin_loss(dataset.shares)
            begin = time.perf_counter()
            train_network(model, loss, dataset, config, name, folder / "metrics.jsonl", quiet)
            results["seconds"][f"train_{name}"] = round(time.perf_counter() - begin, 3)
            if constrained:
                model = export(model)  # what is measured, stored and used from here on
            if len(dataset.classes) == 2 and unbalanced(dataset.shares):
                tune_threshold(model, dataset.validation)
            if constrained and isinstance(loss, losses.Loss):
                results[name] = describe_loss(loss, config)
            results.setdefault(name, {}).update(measure(model, dataset))
            results[name].update(architecture=config.model.architecture, widths=list(widths))
            networks[name] = model
        model_description = {
            "architecture": config.model.architecture,
            "input_shape": list(shape),
            "classes": list(dataset.classes),
            "widths": list(widths),
            "activation": config.model.activation,
            "head": config.model.head,
        }
        (folder / "networks").mkdir(exist_ok=True)
        save_run(folder, resolved(config, widths), model_description, fingerprint(dataset), networks, results)
    return open_run(out)


def names_of(config: Config) -> list[str]:
    """The networks that a configuration asks for."""
    names = ["otnn"]
    if config.twin:
        names.append("unconstrained")
    if config.training.adversarial is not None:
        names.append("adversarial")
    return names


def resolved(config: Config, widths: Sequence[int]) -> Config:
    """The configuration as it was used: chosen widths written out, local paths absolute."""
    data = config.data
    if data.name not in KNOWN and Path(data.name).exists():
        data = dataclasses.replace(data, name=str(Path(data.name).absolute()))
    if data.data_dir is not None:
        data = dataclasses.replace(data, data_dir=str(Path(data.data_dir).absolute()))
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, widths=tuple(widths)))


def train_network(
    model: Classifier, loss: nn.Module, dataset: Dataset, config: Config, name: str, metrics_file: Path, quiet: bool
) -> None:
    """Train one network with progress, and append its metrics to a file of JSON lines."""
    rate = config.training.learning_rate if name == "otnn" else config.training.twin_learning_rate
    with training_bar(name, quiet) as bar, metrics_file.open("a", encoding="utf-8") as stream:

        def on_epoch(metrics: EpochMetrics) -> None:
            line = {
                "network": name,
                "epoch": metrics.epoch,
                "step": metrics.step,
                "loss": metrics.loss,
                "validation_accuracy": metrics.accuracy,
                "validation_certified_accuracy": metrics.certified_accuracy,
                "margin": metrics.margin,
                "seconds": round(metrics.seconds, 3),
            }
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            if not quiet:
                bar.on_epoch(metrics)

        fit(
            model,
            loss,
            dataset.train,
            dataset.validation,
            config.training,
            learning_rate=rate,
            constrained=name == "otnn",
            seed=config.seed,
            radius=config.training.adversarial if name == "adversarial" else None,
            on_step=bar.on_step,
            on_epoch=on_epoch,
        )
    if isinstance(loss, losses.Loss):
        loss.warn_at_zero_margin()


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the classes, the training and the test split: whether figures of one run speak of the same images."""
    digest = hashlib.sha256(json.dumps(dataset.classes).encode())
    for split in (dataset.train, dataset.test):
        for tensor in (split.labels, split.images):
            digest.update(tensor.contiguous().numpy().data)  # no copy: a training split may fill the memory
    return digest.hexdigest()


def dataset_of(run: Run, data_dir: Path | None = None) -> Dataset:
    """Load the data set that a run was trained on.

    Args:
        run: an opened run.
        data_dir: where the data lie now, if they have moved: the folder that holds a named set, or the set's own.

    Raises:
        InputError: the data are not there, or their classes, training or test images have changed since.
    """
    data = run.config.data
    if data_dir is not None and data.name in KNOWN:
        data = dataclasses.replace(data, data_dir=str(data_dir))
    elif data_dir is not None:
        data = dataclasses.replace(data, name=str(data_dir))
    try:
        with status(f"reading {data.name}"):
            dataset = load_dataset(data)
    except InputError as error:
        raise InputError(
            f"the data of this run cannot be loaded again (--data-dir says where they are now): {error}"
        ) from None
    if fingerprint(dataset) != run.manifest["data"]:
        raise InputError(
            f"the data {run.config.data.name} have changed since {run.path} was trained: other classes or images; "
            "bring the data back, or train again"
        )
    return dataset


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set of a configuration."""
    return load(
        config.name,
        data_dir=None if config.data_dir is None else Path(config.data_dir),
        size=config.size,
        classes=config.classes,
        target=config.target,
        validation_share=config.validation_share,
        skip_broken=config.skip_broken,
    )


def make_loss(config: LossConfig, shares: Tensor) -> losses.Loss:
    """The loss of the OTNN, with the priors of the training split.

    Raises:
        InputError: a loss that does not fit the number of classes.
    """
    name = config.name
    if name == "auto":
        name = "hkr" if len(shares) == 2 else "soft_hkr"
    if name != "cross_entropy" and (name == "hkr") != (len(shares) == 2):
        raise InputError(
            f"loss.name: {name} does not fit {len(shares)} classes; expected hkr for two, another for more"
        )
    common: dict[str, Any] = {"margin": config.margin, "hinge_weight": config.hinge_weight, "alpha": config.alpha}
    if name == "hkr":
        return losses.HKRLoss(**common, prior=float(shares[1]), balanced=unbalanced(shares))
    if name == "one_vs_all_hkr":
        return losses.OneVsAllHKRLoss(shares, **common)
    if name == "soft_hkr":
        return losses.SoftHKRLoss(
            shares,
            **common,
            temperature=config.temperature,
            kr_form=config.kr_form,
            hinge_form=config.hinge_form,
        )
    return losses.TemperatureCrossEntropyLoss(config.temperature)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with fixed class weights, of one output or several: the mean over samples of weight times loss.

    Unlike torch's it does not divide by the batch's own sum of weights, so that the mean over processes is the mean.
    """

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of (batch, outputs) scores."""
        losses_of = nn.functional.cross_entropy(class_scores(scores), labels, reduction="none")
        return (self.weights[labels] * losses_of).mean()


def twin_loss(shares: Tensor) -> nn.Module:
    """Cross-entropy, with class weights 1 / (classes * share) where the classes are unbalanced."""
    balanced = 1 / (len(shares) * shares.float())
    return WeightedCrossEntropy(balanced if unbalanced(shares) else torch.ones(len(shares)))


def unbalanced(shares: Tensor) -> bool:
    """Whether the largest class is more than 1.5 times the smallest."""
    return float(shares.max() / shares.min()) > _UNBALANCED


@torch.no_grad()
def tune_threshold(model: Classifier, validation: Split) -> None:
    """Shift the head's bias so that the sign of the one output has the best balanced accuracy on validation.

    A shift keeps the Lipschitz constant, and the sign still decides.
    """
    scores, order = scores_of(model, validation.images)[:, 0].double().sort()
    positive = (validation.labels[order] == 1).double()
    # threshold k lies between the sorted scores k and k + 1, where they differ
    below_positive, below_negative = positive.cumsum(0)[:-1], (1 - positive).cumsum(0)[:-1]
    balanced = below_negative / (1 - positive).sum() - below_positive / positive.sum()
    balanced[scores[1:] == scores[:-1]] = -torch.inf
    if not bool(torch.isfinite(balanced).any()):
        return  # all scores are equal
    best = (balanced >= balanced.max() - 1e-12).nonzero().squeeze(1)
    middle = best[len(best) // 2]
    chosen = (scores[middle] + scores[middle + 1]) / 2
    model.head.bias.sub_(chosen.to(model.head.bias))


def measure(model: Classifier, dataset: Dataset) -> dict[str, Any]:
    """Accuracy, balanced accuracy and recall of each class on the test split, and the number of parameters."""
    prediction = predict(scores_of(model, dataset.test.images))
    right = prediction == dataset.test.labels
    recall = [float(right[dataset.test.labels == k].double().mean()) for k in range(len(dataset.classes))]
    return {
        "accuracy": float(right.double().mean()),
        "balanced_accuracy": math.fsum(recall) / len(recall),
        "recall": dict(zip(dataset.classes, recall, strict=True)),
        "parameters": parameter_count(model),
    }


def describe(dataset: Dataset) -> dict[str, Any]:
    """The data as results.json tells of them."""
    return {
        "name": dataset.name,
        "classes": list(dataset.classes),
        "input_shape": list(dataset.input_shape),
        "train": len(dataset.train),
        "validation": len(dataset.validation),
        "test": len(dataset.test),
        "class_shares": dataset.shares.tolist(),
        "skipped": list(dataset.skipped),
    }


def describe_loss(loss: losses.Loss, config: Config) -> dict[str, Any]:
    """The loss as results.json tells of it: its name and its margin, learned or fixed."""
    names: Sequence[tuple[type, str]] = (
        (losses.HKRLoss, "hkr"),
        (losses.OneVsAllHKRLoss, "one_vs_all_hkr"),
        (losses.SoftHKRLoss, "soft_hkr"),
        (losses.TemperatureCrossEntropyLoss, "cross_entropy"),
    )
    name = next(name for kind, name in names if isinstance(loss, kind))
    margin = getattr(loss, "margin", None)
    used = {"hinge_weight", "alpha"} if name != "cross_entropy" else {"temperature"}
    if name == "soft_hkr":
        used |= {"temperature", "kr_form", "hinge_form"}
    settings = {
        key: value for key, value in dataclasses.asdict(config.loss).items() if key in used and value is not None
    }
    return {"loss": name, "loss_settings": settings, "margin": margin.tolist() if isinstance(margin, Tensor) else None}


def versions() -> dict[str, str]:
    """The versions that the figures depend on."""
    return {
        "otnn": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" takes the accelerator if there is one.

    Raises:
        InputError: a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise InputError(
            f"device: {name!r} cannot be used here; expected auto, cpu, or an accelerator with float64 that torch finds"
        ) from None
    # TensorFloat-32 keeps ten bits of a product: no ground for certificates, nor for staying on a manifold
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return device
