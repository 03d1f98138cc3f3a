"""The judge of counterfactuals: an ordinary network of another seed, or that of another run."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from otnn.data import Dataset
from otnn.errors import InputError
from otnn.files import sha256
from otnn.models import Classifier, build, predict
from otnn.run.config import Config, from_mapping
from otnn.run.fit import fit, scores_of
from otnn.run.folder import Run, empty_network, open_run
from otnn.run.manifest import TWIN
from otnn.run.progress import training_bar
from otnn.run.train import tune_threshold, twin_loss, unbalanced

FILE = "judge.safetensors"
# Epochs of its training, at most
EPOCHS = 5


@dataclass(frozen=True)
class Judge:
    """A classifier that had no part in making the images that it judges.

    Attributes:
        model: in `eval()` mode.
        description: `from` (the run that it belongs to, by the name of its folder), `seed`, `epochs`, `sha256` of its
            file, and `accuracy` on the test split.
    """

    model: Classifier
    description: dict[str, Any]


def judge_of(run: Run, dataset: Dataset, other: Run | None = None, device: str | torch.device = "cpu") -> Judge:
    """The judge of a run: the ordinary network of another run, or one that is trained once and kept in the folder.

    The latter has the widths and the settings of the run's ordinary network, the next seed, and at most five epochs.

    Args:
        run: an opened run.
        dataset: its data.
        other: the run whose ordinary network judges.
        device: where it runs.

    Raises:
        InputError: the other run has no ordinary network, other classes or another shape, or the network that is
            judged; a file that is damaged.
    """
    if other is not None:
        model, description = _borrowed(run, other, device)
    elif (run.path / FILE).exists():
        model, description = _kept(run, device)
    else:
        model, description = _trained(run, dataset, device)
    right = predict(scores_of(model, dataset.test.images)) == dataset.test.labels
    return Judge(model, {**description, "accuracy": float(right.double().mean())})


def _borrowed(run: Run, other: Run, device: str | torch.device) -> tuple[Classifier, dict[str, Any]]:
    if not other.has_twin:
        raise InputError(f"judge: {other.path} has no ordinary network (--no-twin); give another run")
    for name, what in (("classes", "classes"), ("input_shape", "input shape")):
        own, theirs = run.manifest["model"][name], other.manifest["model"][name]
        if own != theirs:
            raise InputError(f"judge: expected the {what} of {run.path}, {own}, got {theirs} in {other.path}")
    if other.manifest["files"][TWIN] == run.manifest["files"].get(TWIN):
        raise InputError(
            f"judge: the ordinary network of {other.path} is the one that is judged; give a run of another seed"
        )
    description = {
        "from": other.path.absolute().name,
        "seed": other.manifest["config"]["seed"],
        "epochs": other.manifest["config"]["training"]["epochs"],
        "sha256": other.manifest["files"][TWIN],
    }
    return other.network("unconstrained", device), description


def _kept(run: Run, device: str | torch.device) -> tuple[Classifier, dict[str, Any]]:
    open_run(run.path, accept_edits=True)  # the file is as it was written
    file = run.path / FILE
    model = empty_network(run.manifest["model"], constrained=False)
    try:
        content = file.read_bytes()
        model.load_state_dict(load(content))
        with safe_open(file, "pt") as opened:
            told = {name: int(opened.metadata()[name]) for name in ("seed", "epochs")}
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{file}: does not hold the judge of this run: {error}; delete it, it is made again") from None
    return model.to(device).eval(), {"from": None, **told, "sha256": sha256(content)}


def _trained(run: Run, dataset: Dataset, device: str | torch.device) -> tuple[Classifier, dict[str, Any]]:
    """Train the judge, and keep it in the run folder."""
    config: Config = from_mapping(Config, run.manifest["config"])  # as trained, whatever was edited since
    training = dataclasses.replace(config.training, epochs=min(EPOCHS, config.training.epochs))
    seed = config.seed + 1
    torch.manual_seed(seed)
    model = build(
        run.manifest["model"]["architecture"],
        dataset.input_shape,
        len(dataset.classes),
        widths=run.manifest["model"]["widths"],
        mean=dataset.train.images.mean(dim=(0, 2, 3)),
        constrained=False,
    ).to(device)
    with training_bar("judge", quiet=False) as bar:
        fit(
            model,
            twin_loss(dataset.shares),
            dataset.train,
            dataset.validation,
            training,
            learning_rate=training.twin_learning_rate,
            constrained=False,
            seed=seed,
            on_step=bar.on_step,
            on_epoch=bar.on_epoch,
        )
    if len(dataset.classes) == 2 and unbalanced(dataset.shares):
        tune_threshold(model, dataset.validation)
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    run.write({FILE: save(state, {"seed": str(seed), "epochs": str(training.epochs)})}, {})
    return _kept(run, device)
