"""Campaign `trained`: how far the bounds of ordinary trained layers are above their true norms, and what they cost.

The true norm of a convolution at its image size is bounded from below: ||A v|| / ||v|| for the v of Lanczos' method.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from benchmarks.campaign import Campaign, Json
from otnn.data import load
from otnn.data.splits import Split
from otnn.lipschitz import bound
from otnn.lipschitz.layers import layer_bound
from otnn.models import Classifier, build
from otnn.nn import MaxMin, OrthoConv2d
from otnn.run.config import TrainingConfig
from otnn.run.fit import fit, scores_of
from otnn.run.folder import open_run
from otnn.run.train import twin_loss

# The network of the speed comparisons.
WIDTHS = (32, 64, 128)
IMAGES, EPOCHS = 20_000, 3


def trained_campaign(runs: Sequence[Path] = (), data_dir: Path | None = None, seed: int = 0) -> Campaign:
    """Measure the twins of some runs; without runs, a network that is trained here on Fashion-MNIST.

    The last block takes times, which are those of this machine.
    """
    names = [run.name for run in runs] or ["fashion-mnist"]
    makers = [partial(_twin, run) for run in runs] or [partial(_train, data_dir, seed)]
    settings = {"seed": seed, "trained on": names}
    return Campaign("trained", settings, len(names) + 1, partial(_block, names, makers), _summary)


def _block(names: Sequence[str], makers: Sequence[Callable[[], Classifier]], number: int) -> Json:
    if number == len(makers):
        return {"seconds": times()}
    model = makers[number]()
    return {"network": names[number], "layers": tightness(model)}


def _twin(run: Path) -> Classifier:
    return open_run(run).network("unconstrained")


def _train(data_dir: Path | None, seed: int) -> Classifier:
    """An ordinary network after a few epochs on part of Fashion-MNIST."""
    data = load("fashion-mnist", data_dir=data_dir)
    few = Split(data.train.images[:IMAGES], data.train.labels[:IMAGES])
    torch.manual_seed(seed)
    model = build("conv", data.input_shape, len(data.classes), widths=WIDTHS, constrained=False)
    config = TrainingConfig(epochs=EPOCHS)
    fit(
        model,
        twin_loss(data.shares),
        few,
        data.validation,
        config,
        learning_rate=config.twin_learning_rate,
        constrained=False,
        seed=seed,
    )
    accuracy = float((scores_of(model, data.test.images).argmax(dim=1) == data.test.labels).double().mean())
    if accuracy < 0.8:
        raise ArithmeticError(f"the network did not train: accuracy {accuracy:.1%}")
    return model


@torch.no_grad()
def tightness(model: Classifier) -> list[Json]:
    """The bound of each convolution and dense layer at its image size, and what its true norm is at least."""
    rows = []
    values = torch.zeros(1, *model.input_shape)
    for name, layer in [
        *((f"body.{name}", layer) for name, layer in model.body.named_children()),
        ("head", model.head),
    ]:
        outputs = layer(values)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            shape, after = tuple(values.shape[1:]), tuple(outputs.shape[1:])
            told, any_size = layer_bound(layer, shape, after).constant, layer_bound(layer, None, None).constant
            least = largest_stretch(layer, shape)
            rows.append(
                {
                    "layer": name,
                    "kind": repr(layer),
                    "shape": list(shape),
                    "bound": told,
                    "norm at least": least,
                    "ratio": told / least,
                    "ratio at any size": any_size / least,
                }
            )
        values = outputs
    return rows


def largest_stretch(layer: nn.Conv2d | nn.Linear, shape: Sequence[int]) -> float:
    """A lower bound of the norm: how much the layer stretches the leading vector that Lanczos' method finds."""
    weight = layer.weight.detach().double()

    def forward(images: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return F.linear(images, weight)
        return F.conv2d(images, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    example = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        image = forward(example)

    def gram(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        stretched = forward(torch.from_numpy(vector).view(1, *shape))
        return torch.autograd.grad(image, example, stretched, retain_graph=True)[0].flatten().numpy()

    size = example.numel()
    start = np.random.default_rng(0).normal(size=size)
    operator = LinearOperator((size, size), matvec=gram, dtype=np.float64)
    vector = torch.from_numpy(eigsh(operator, k=1, which="LA", v0=start, tol=1e-10)[1][:, 0].copy()).view(1, *shape)
    return float(torch.linalg.vector_norm(forward(vector)) / torch.linalg.vector_norm(vector))


def times() -> Json:
    """Seconds that `bound` takes, the median of five calls."""
    shape = (1, 28, 28)
    nets = {
        "the network of the speed comparisons": (build("conv", shape, 10, widths=WIDTHS).eval(), shape),
        "its unconstrained twin": (build("conv", shape, 10, widths=WIDTHS, constrained=False).eval(), shape),
        "50 orthogonal convolutions of 64 channels": (_deep(lambda: OrthoConv2d(64, 64, 3, padding=1)), (64, 16, 16)),
        "50 ordinary convolutions of 64 channels": (_deep(lambda: nn.Conv2d(64, 64, 3, padding=1)), (64, 16, 16)),
    }
    return {name: _seconds(partial(bound, net, shape)) for name, (net, shape) in nets.items()}


def _deep(layer: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(*[each for _ in range(50) for each in (layer(), MaxMin())])


def _seconds(call: Callable[[], Any]) -> float:
    found = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return median(found)


def _summary(blocks: Sequence[Json]) -> Json:
    networks = list(blocks[:-1])
    ratios = [row["ratio"] for network in networks for row in network["layers"]]
    return {
        "violations": sum(ratio < 1 - 1e-12 for ratio in ratios),
        "largest ratio": max(ratios),
        "networks": networks,
        "seconds on this machine": blocks[-1]["seconds"],
    }
