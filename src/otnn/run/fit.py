"""The training loop, the same for the OTNN and its twin, on one process or several.

Under `torchrun` every process sees its share of each batch and gradients are averaged, so that the weights of the OTNN
are those of one process with the whole batch. Batch normalisation sees the share only, so those of the twin are not.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from otnn.batches import sample_norm, spread
from otnn.data import Split
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.manifold import keep_on_manifold
from otnn.models import Classifier, predict
from otnn.nn import OrthoConv2d
from otnn.potential import pair_distances, rival_potentials
from otnn.run.config import TrainingConfig
from otnn.run.distributed import rank, world


@dataclass(frozen=True)
class EpochMetrics:
    """What an epoch ended with: means over its steps, and the validation split."""

    epoch: int
    step: int
    loss: float
    accuracy: float
    certified_accuracy: float | None
    margin: list[float] | float | None
    seconds: float


class Objective(nn.Module):
    """A network and its loss as one module, so that one wrapper averages the gradients of both."""

    def __init__(self, model: Classifier, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        value: Tensor = self.loss(self.model(inputs), labels)
        return value


def fit(
    model: Classifier,
    loss: nn.Module,
    train: Split,
    validation: Split,
    config: TrainingConfig,
    *,
    learning_rate: float,
    constrained: bool,
    seed: int,
    radius: float | None = None,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    on_epoch: Callable[[EpochMetrics], None] = lambda metrics: None,
) -> None:
    """Train `model` in place with Adam and a one-cycle schedule; constrained weights return to their manifolds.

    Args:
        model: on its device.
        loss: called with scores and labels; its parameters (learned margins) are trained as well.
        train: the training split.
        validation: measured after each epoch.
        config: epochs, batch size and so on.
        learning_rate: the peak of the schedule.
        constrained: whether the network is an OTNN, whose certified accuracy is measured.
        seed: of the batches, the augmentation and the attacks.
        radius: the L2 radius of attacks on each batch, on which the network is trained in place of the images.
        on_step: called with (step, steps, loss).
        on_epoch: called with the metrics of each epoch.

    Raises:
        InputError: fewer training images than a batch needs.
        FloatingPointError: the loss, a gradient or a weight became NaN or infinite; the message names epoch and layer.
    """
    device = model.head.weight.device
    loss = loss.to(device)
    batch_size = _batch_size(len(train), config.batch_size)
    convolutional = any(isinstance(layer, OrthoConv2d | nn.Conv2d) for layer in model.modules())
    memory_format = torch.channels_last if convolutional else torch.contiguous_format
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    objective: nn.Module = Objective(model, loss)
    parallel = DistributedDataParallel(objective) if world() > 1 else objective
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    handle = keep_on_manifold(optimizer, model, loss)
    per_epoch = len(train) // batch_size
    steps = config.epochs * per_epoch
    schedule = _one_cycle(optimizer, learning_rate, steps, config.warmup_share)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    step = 0
    for epoch in range(1, config.epochs + 1):
        objective.train()
        total = 0.0
        for index in _batches(len(train), batch_size, generator):
            images = augment(train.images[index], config, generator)
            share = _share_of_process(len(index))
            images = images[share].to(device).contiguous(memory_format=memory_format)
            labels = train.labels[index][share].to(device)
            if radius is not None:
                images = attacked(model, loss, images, labels, radius, config.attack_steps, generator)
            optimizer.zero_grad()
            value = parallel(images, labels)
            number = float(value.detach())
            try:
                _check_loss(number, model, images)
                value.backward()
                optimizer.step()
            except FloatingPointError as error:
                rate = "training.learning_rate" if constrained else "training.twin_learning_rate"
                raise FloatingPointError(f"in epoch {epoch}, step {step + 1}, {error} ({rate})") from error
            schedule.step()
            total += number
            step += 1
            on_step(step, steps, number)
        on_epoch(_measure(model, loss, validation, epoch, step, total / per_epoch, config, constrained, start))
    handle.remove()
    model.eval()


@torch.no_grad()
def scores_of(model: Classifier, images: Tensor, batch_size: int = 1024) -> Tensor:
    """All class scores of images, on the CPU, by batches."""
    device = model.head.weight.device
    return torch.cat([model(batch.to(device)).cpu() for batch in images.split(batch_size)])


def attacked(
    model: Classifier,
    loss: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Images within an L2 radius of a batch, in [0, 1], that raise its loss: projected gradient ascent (Madry 2018).

    It starts at a random point of the ball and takes steps of 2.5 radius / steps along the gradient of each image. The
    network is in `eval()` mode meanwhile, so that the attacks do not enter its running statistics.
    """
    model.eval()
    noise = torch.randn(images.shape, generator=generator).to(images)
    length = torch.rand(len(images), generator=generator).to(images) ** (1 / images[0].numel())
    moved = _within(images, images + _unit(noise) * spread(radius * length, images), radius)
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(moved), labels), moved)
        moved = _within(images, moved.detach() + 2.5 * radius / steps * _unit(gradient), radius)
    model.train()
    return moved


def _within(images: Tensor, moved: Tensor, radius: float) -> Tensor:
    """Points brought back into the ball around each image, and then into [0, 1], which keeps them in the ball."""
    way = moved - images
    length = spread(sample_norm(way), way)
    inside: Tensor = images + way * (radius / length.clamp(min=radius))
    return inside.clamp(0, 1)


def _unit(directions: Tensor) -> Tensor:
    """Each direction divided by its L2 norm; 0 stays 0."""
    length = spread(sample_norm(directions), directions)
    return directions / torch.where(length > 0, length, 1.0)


def augment(images: Tensor, config: TrainingConfig, generator: torch.Generator) -> Tensor:
    """Mirror and move each image of a batch at random, as configured; pixels that enter repeat the border."""
    if config.flip:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    if config.shift:
        *_, height, width = images.shape
        moves = torch.randint(-config.shift, config.shift + 1, (2, len(images), 1), generator=generator)
        rows = (torch.arange(height) + moves[0]).clamp(0, height - 1)
        columns = (torch.arange(width) + moves[1]).clamp(0, width - 1)
        batch = torch.arange(len(images))
        images = images.movedim(1, 3)[batch[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    return images


def _batch_size(images: int, configured: int) -> int:
    """The samples of a step over all processes: equal shares, at least two images each."""
    batch_size = min(configured, images) // world() * world()
    if batch_size < configured <= images:
        raise InputError(f"training.batch_size: expected a multiple of the {world()} processes, got {configured}")
    if batch_size < 2 * world():
        raise InputError(
            f"expected at least two images for each of {world()} processes, got {images} training images in batches of "
            f"{configured}"
        )
    return batch_size


def _one_cycle(optimizer: Optimizer, peak: float, steps: int, warmup_share: float) -> LRScheduler:
    share = max(warmup_share, 2 / (steps + 1))  # a warm-up of no step divides by zero in torch
    return OneCycleLR(optimizer, max_lr=peak, total_steps=steps + 1, pct_start=share)


def _check_loss(value: float, model: nn.Module, images: Tensor) -> None:
    """Raise FloatingPointError if a loss is NaN or infinite; the message names the layer where it began."""
    if math.isfinite(value):
        return
    broken: list[str] = []  # innermost first: a layer ends before those that contain it

    def look(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        if not torch.isfinite(output).all():
            broken.append(name)

    with torch.no_grad(), ExitStack() as hooks:
        for name, layer in model.named_modules():
            hooks.enter_context(layer.register_forward_hook(partial(look, name)))
        largest = float(model(images).abs().max())
    where = f", first in the output of {broken[0]}" if broken else f" at scores of the head up to {largest:.1e}"
    raise FloatingPointError(f"the loss became {value}{where}; lower the learning rate")


def _measure(
    model: Classifier,
    loss: nn.Module,
    validation: Split,
    epoch: int,
    step: int,
    mean_loss: float,
    config: TrainingConfig,
    constrained: bool,
    start: float,
) -> EpochMetrics:
    model.eval()
    scores = scores_of(model, validation.images)
    prediction = predict(scores)
    right = prediction == validation.labels
    certified = None
    if constrained:
        # of the network in training, to choose by; the certificates are those of the exported one
        radii = rival_potentials(scores, prediction, pair_distances(model, bound(model.body))).amin(dim=1)
        certified = float((right & (radii >= config.radius)).double().mean())
    margin = getattr(loss, "margin", None)
    return EpochMetrics(
        epoch=epoch,
        step=step,
        loss=mean_loss,
        accuracy=float(right.double().mean()),
        certified_accuracy=certified,
        margin=margin.tolist() if isinstance(margin, Tensor) else margin,
        seconds=time.perf_counter() - start,
    )


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random batches of equal size; the last, partial one is dropped."""
    order = torch.randperm(count, generator=generator)
    yield from order[: count // batch_size * batch_size].split(batch_size)


def _share_of_process(batch_size: int) -> slice:
    """The part of a batch that this process computes; equal parts, so that the mean of means is the mean."""
    part = batch_size // world()
    return slice(rank() * part, (rank() + 1) * part)
