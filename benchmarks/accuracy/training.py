"""One run: a network of a library is trained, read out into plain layers and certified.

Everything but the layers is the same for all libraries: the plan of the network with zero padding and otnn's MaxMin, a
head with rows of norm 1, the loss, Adam with a one-cycle schedule, the batches of a seed, and the radii.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

import otnn
from benchmarks import campaign
from benchmarks.accuracy import norms as norms_source
from benchmarks.accuracy.norms import norms
from benchmarks.layers import nets, peers
from benchmarks.layers.nets import FAMILIES, MAXMIN, OTNN, PLAN, TORCHLIP, ZEROS, Family, Plan, build, layers_of
from otnn.certify import certify
from otnn.data import load
from otnn.errors import InputError
from otnn.lipschitz import bound, export
from otnn.losses import soft_hkr
from otnn.manifold import constrained_parameters, keep_on_manifold
from otnn.models import Classifier
from otnn.nn import MaxMin

Json = dict[str, Any]

DATA, BATCH, WARMUP = "fashion-mnist", 256, 0.2
RADII: Mapping[str, float] = {"36/255": 36 / 255, "0.5": 0.5, "1": 1.0}
# alpha = .98 of deel-torchlip weighs Kantorovich-Rubinstein by .02 and the hinge by .98
ALPHA, MOMENTUM = 0.98, 0.99
# Scores of the plain network and of the one that was trained
CLOSE, COMPARED = 1e-4, 256
# Sources of otnn on which a run of any library depends, and those on which its own does beside them
PARTS = (
    *("nn", "lipschitz", "losses", "data", "precision.py", "certify.py", "models.py", "potential.py", "checks.py"),
    "errors.py",
)
OWN_PARTS = ("manifold", "polar.py")


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """What is trained.

    Attributes:
        library: a name in `LIBRARIES`.
        learning_rate: the peak of the schedule.
        margin: `min_margin` of deel-torchlip's loss, half of it on each side.
        temperature: of that loss.
        seed: of the initial weights and the batches.
    """

    library: str
    learning_rate: float
    margin: float
    temperature: float
    seed: int


class ReleasedHKR(nn.Module):
    """deel-torchlip's SoftHKRMulticlassLoss, through `otnn.losses.soft_hkr`, so that no run needs that library.

    Two separate hinges at half of `min_margin` with weight 49, softmax weights with a gradient, and their temperature
    times min_margin over a running mean of |scores|, which is at least min_margin.

    Args:
        min_margin: > 0.
        temperature: > 0.
        classes: number of classes.
    """

    def __init__(self, min_margin: float, temperature: float, classes: int) -> None:
        super().__init__()
        self.min_margin, self.temperature = min_margin, temperature
        self.scale = torch.tensor(min_margin)
        self.equal = torch.full((classes,), 1 / classes, dtype=torch.float64)

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch and take its scores into the running mean."""
        mean = MOMENTUM * self.scale + (1 - MOMENTUM) * scores.detach().abs().mean()
        self.scale = mean.clamp(0.005, 1000)
        temperature = self.temperature * self.min_margin / mean.clamp(min=self.min_margin)
        return (1 - ALPHA) * soft_hkr(
            scores, labels, margin=self.min_margin / 2, hinge_weight=ALPHA / (1 - ALPHA),
            temperature=temperature.clamp(0.005, 250), priors=self.equal, hinge_form="separate", detach_weights=False,
        )  # fmt: skip


# --- libraries ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Library:
    """A library under comparison.

    Attributes:
        module: what is imported; the library is there if it is found.
        family: its layers, with zero padding and otnn's MaxMin.
        plain: puts a trained network into `eval()` mode, and returns the same map in plain layers.
    """

    module: str
    family: Callable[[], Family]
    plain: Callable[[nn.Sequential, Plan], nn.Module]


def _otnn_plain(net: nn.Sequential, plan: Plan) -> nn.Module:
    return export(net.eval())


def _torchlip_family() -> Family:
    return dataclasses.replace(nets.families()[TORCHLIP], activation=MaxMin)


@torch.no_grad()
def _torchlip_plain(net: nn.Sequential, plan: Plan) -> nn.Module:
    """Its evaluation weights are those of the last forward pass in training, a step behind: computed once more here."""
    net.train()
    for layer in layers_of(net):
        _ = layer.weight
    return peers.torchlip_exported(net)


@torch.no_grad()
def _orthogonium_plain(net: nn.Sequential, plan: Plan) -> nn.Module:
    net.eval()
    plain = build(FAMILIES[MAXMIN], plan)
    for empty, layer in zip(layers_of(plain), layers_of(net), strict=True):
        empty.weight.copy_(layer.weight)
        empty.bias.copy_(layer.bias)
    return plain.eval()


LIBRARIES: Mapping[str, Library] = {
    OTNN: Library("otnn", lambda: FAMILIES[OTNN], _otnn_plain),
    TORCHLIP: Library("deel", _torchlip_family, _torchlip_plain),
    "orthogonium": Library("orthogonium", lambda: nets.families()[ZEROS], _orthogonium_plain),
}


def installed() -> list[str]:
    """The libraries that can be imported here."""
    return [name for name, library in LIBRARIES.items() if find_spec(library.module) is not None]


# --- a run -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """Images (n, channels, height, width) in [0, 1] with their labels, and the number of classes."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int


@lru_cache(maxsize=1)
def data(data_dir: Path | None) -> Data:
    """All training images (nothing is chosen by a validation split) and all test images.

    Raises:
        InputError: fewer training images than a batch, or images that are not square.
    """
    found = load(DATA, data_dir=data_dir)
    images = torch.cat([found.train.images, found.validation.images])
    labels = torch.cat([found.train.labels, found.validation.labels])
    if len(images) < BATCH:
        raise InputError(f"{DATA}: expected at least the {BATCH} training images of a batch, got {len(images)}")
    if images.shape[2] != images.shape[3]:
        raise InputError(f"{DATA}: expected square images, got {images.shape[2]}x{images.shape[3]}")
    return Data(images, labels, found.test.images, found.test.labels, len(found.classes))


def measured(run: Run, data_dir: Path | None, epochs: int, limit: int | None = None) -> Json:
    """Train and certify; what is told of a run.

    Args:
        run: what is trained.
        data_dir: where the data lie.
        epochs: how often every image is seen.
        limit: stop after so many steps of the schedule; None goes through.

    Returns:
        The settings, the digest of the "code", the `figures` of the network, the largest "difference" between the
        scores of the trained and the plain network, and CPU "seconds" of training; or, where the loss became NaN or
        infinite, "diverged".

    Raises:
        ArithmeticError: the plain network computes something else than the trained one.
    """
    given, library = data(data_dir), LIBRARIES[run.library]
    shape = tuple(given.images.shape[1:])
    plan = dataclasses.replace(PLAN, pixels=shape[1], channels=shape[0], classes=given.classes)
    row: Json = {**dataclasses.asdict(run), "code": code_digest(run.library)}
    start = time.process_time()
    net = build(library.family(), plan, run.seed)
    nets.to_format(net, torch.channels_last)
    try:
        train(net, given, run, epochs, limit)
    except FloatingPointError as error:
        return {**row, "diverged": str(error)}
    row["seconds"] = round(time.process_time() - start, 2)
    plain = library.plain(net, plan)
    with torch.no_grad():
        few = given.test_images[:COMPARED]
        row["difference"] = float((plain(few) - net(few)).abs().max())
    if not row["difference"] <= CLOSE:
        raise ArithmeticError(f"{run}: the plain network's scores differ by {row['difference']:.1e}")
    body, head = plain[:-1], plain[-1]  # type: ignore[index]
    return {**row, **figures(Classifier(body, head, shape).eval(), given.test_images, given.test_labels)}


def train(net: nn.Sequential, given: Data, run: Run, epochs: int, limit: int | None = None) -> None:
    """Train a network in place.

    Raises:
        FloatingPointError: the loss or a weight became NaN or infinite.
    """
    loss = ReleasedHKR(run.margin, run.temperature, given.classes)
    optimizer = Adam(net.parameters(), run.learning_rate)
    if any(True for _ in constrained_parameters(net)):
        keep_on_manifold(optimizer, net)
    per_epoch = len(given.images) // BATCH
    schedule = OneCycleLR(optimizer, run.learning_rate, total_steps=epochs * per_epoch, pct_start=WARMUP)
    generator = torch.Generator().manual_seed(run.seed)
    net.train()
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(given.images), generator=generator)
        for index in order[: per_epoch * BATCH].split(BATCH):
            if step == limit:
                return
            step += 1
            optimizer.zero_grad()
            images = given.images[index].contiguous(memory_format=torch.channels_last)
            scores = net(images)
            if not bool(torch.isfinite(scores).all()):
                raise FloatingPointError(f"scores became NaN or infinite at step {step}")
            value = loss(scores, given.labels[index])
            if not math.isfinite(float(value.detach())):
                raise FloatingPointError(f"the loss became {float(value.detach())} at step {step}")
            value.backward()
            optimizer.step()
            schedule.step()
    for name, parameter in net.named_parameters():
        if not torch.isfinite(parameter).all():
            raise FloatingPointError(f"{name} became NaN or infinite in the last step")


def figures(model: Classifier, images: Tensor, labels: Tensor) -> Json:
    """What a plain network reaches on images.

    The radius is the smallest (z_y - z_j) / (L ||w_y - w_j||) over the rivals j, and 0 where the prediction is wrong.
    L is the product of the `norms` of the layers before the head at their image sizes. "proven" is the same by
    `otnn.certify`, with their proven bounds in the place of the norms.

    Returns:
        "clean" and "certified" accuracy, the "mean radius", the "norms" and their product "constant", and what is
        "proven": "certified" accuracy, "mean radius", "bounds" and their product "constant".
    """
    certificate = certify(model, images)
    right = certificate.prediction == labels
    body = bound(model.body, model.input_shape)
    weighted = {name for name, layer in model.body.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    bounds = [constant for name, constant in body.layers if name in weighted]
    # both are from above, up to the convergence of the norm
    exact = [min(pair) for pair in zip(norms(model.body, model.input_shape), bounds, strict=True)]
    constant = math.prod(exact)

    def reached(radius: Tensor) -> Json:
        held = {name: float((right & (radius >= least)).double().mean()) for name, least in RADII.items()}
        return {"certified": held, "mean radius": float(torch.where(right, radius, 0.0).mean())}

    return {
        "clean": float(right.double().mean()),
        **reached(certificate.radius * (body.constant / constant)),
        "norms": exact,
        "constant": constant,
        "proven": {**reached(certificate.radius), "bounds": bounds, "constant": body.constant},
    }


@cache
def code_digest(library: str) -> str:
    """The SHA-256 of the sources that a run of a library depends on."""
    root = Path(otnn.__file__).parent
    parts = PARTS + (OWN_PARTS if library == OTNN else ())
    own = (Path(nets.__file__), Path(peers.__file__), Path(norms_source.__file__), Path(__file__))
    return campaign.code_digest(*(root / part for part in parts), *own)
