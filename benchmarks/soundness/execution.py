"""Other executions of one network: in float32 by sums in any order, and in exact arithmetic.

Both are written layer by layer, apart from torch's kernels and from `otnn.lipschitz.forward_error`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.soundness.operators import convolution_operator, integers
from otnn.models import Classifier
from otnn.nn import Centering, MaxMin

Array = NDArray[np.float32]
# Which order to sum in: from the products of one sample (terms,) to a permutation.
Order = Callable[[Array], NDArray[np.int64]]


def torch_executions(model: Classifier) -> dict[str, Callable[[Tensor], Tensor]]:
    """The ways in which torch may execute a batch in float32: each sums in another order."""

    def one_by_one(images: Tensor) -> Tensor:
        return torch.cat([model(image) for image in images.split(1)])

    def by_seven(images: Tensor) -> Tensor:
        return torch.cat([model(part) for part in images.split(7)])

    def native(images: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN", UserWarning)
            with torch.backends.mkldnn.flags(enabled=False):
                return model(images)

    def channels_last(images: Tensor) -> Tensor:
        return model(images.contiguous(memory_format=torch.channels_last))

    ways = {"batch": model.forward, "one by one": one_by_one, "by seven": by_seven}
    if any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        ways |= {"native": native, "channels last": channels_last}
    return ways


def orders(rng: np.random.Generator) -> dict[str, Order]:
    """Orders of a sum: as stored, drawn, and those that let rounding errors pile up."""
    return {
        "stored": lambda terms: np.arange(len(terms)),
        "drawn": lambda terms: rng.permutation(len(terms)),
        "rising": np.argsort,
        "falling": lambda terms: np.argsort(-terms),
        "largest first": lambda terms: np.argsort(-np.abs(terms)),
    }


def sequential_scores(model: Classifier, images: Array, order: Order) -> Array:
    """The scores (batch, outputs) by float32 sums from the first term to the last, without fused operations.

    The order is that of one output's products on the first sample, and the same for all.
    """
    values = images
    for layer in layers_of(model):
        if isinstance(layer, nn.Linear):
            values = _in_sequence(values, layer.weight.detach().numpy().T, order)
            values = _plus(values, layer.bias)
        elif isinstance(layer, nn.Conv2d):
            values = _convolved(layer, values, order)
        elif isinstance(layer, Centering):
            values = values - layer.mean.numpy()[:, None, None]
        else:
            values = _moved(layer, values)
    return values


def _in_sequence(values: Array, weights: Array, order: Order) -> Array:
    """(batch, ..., terms) times (terms, outputs)."""
    sample = values[0].reshape(-1, values.shape[-1])
    first = sample[len(sample) // 2]
    total = np.zeros((*values.shape[:-1], weights.shape[1]), dtype=np.float32)
    for term in order(first * weights[:, 0]):
        total += values[..., term, None] * weights[term]
    return total


def _convolved(layer: nn.Conv2d, values: Array, order: Order) -> Array:
    pads = [(pad, pad) for pad in layer.padding]
    mode = {"zeros": "constant", "circular": "wrap"}[layer.padding_mode]
    padded = np.pad(values, [(0, 0), (0, 0), *pads], mode=mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, layer.kernel_size, axis=(2, 3))
    windows = windows[:, :, :: layer.stride[0], :: layer.stride[1]].transpose(0, 2, 3, 1, 4, 5)
    kernel = layer.weight.detach().numpy()
    sums = _in_sequence(windows.reshape(*windows.shape[:3], -1), kernel.reshape(len(kernel), -1).T, order)
    return np.ascontiguousarray(_plus(sums, layer.bias).transpose(0, 3, 1, 2))


def _plus(values: Array, bias: Tensor | None) -> Array:
    return values if bias is None else values + bias.detach().numpy()


class Exact:
    """A network in exact arithmetic: every number is an integer over a power of two."""

    def __init__(self, model: Classifier) -> None:
        self.steps: list[tuple[Any, ...]] = []
        shape = model.input_shape
        for layer in layers_of(model):
            if isinstance(layer, Centering):
                offsets = np.broadcast_to(-layer.mean.numpy()[:, None, None], shape)
                self.steps.append(("add", *integers(offsets.ravel())))
            elif isinstance(layer, nn.Linear):
                self.steps.append(("multiply", *integers(layer.weight.detach().numpy())))
                self._add(layer.bias, 1)
                shape = (layer.out_features,)
            elif isinstance(layer, nn.Conv2d):
                self.steps.append(("multiply", *integers(convolution_operator(layer, (shape[1], shape[2])))))
                with torch.no_grad():
                    shape = tuple(layer(torch.zeros(1, *shape)).shape[1:])
                self._add(layer.bias, shape[1] * shape[2])
            else:
                self.steps.append(("move", layer))

    def _add(self, bias: Tensor | None, pixels: int) -> None:
        if bias is not None:
            self.steps.append(("add", *integers(np.repeat(bias.detach().numpy(), pixels))))

    def __call__(self, image: NDArray[np.floating]) -> tuple[NDArray[np.object_], int]:
        """The scores (outputs,) of one image as integers over 2^scale."""
        values, scale = integers(image.ravel())
        for kind, *operands in self.steps:
            if kind == "multiply":
                values, scale = operands[0] @ values, scale + operands[1]
            elif kind == "add":
                common = max(scale, operands[1])
                values = values * 2 ** (common - scale) + operands[0] * 2 ** (common - operands[1])
                scale = common
            else:
                values = _moved(operands[0], values[None])[0]
        return values, scale


def layers_of(model: Classifier) -> Sequence[nn.Module]:
    """The layers in order; a campaign's networks are chains."""
    return [*model.body, model.head]


def _moved(layer: nn.Module, values: NDArray[Any]) -> NDArray[Any]:
    """Layers that only move or compare numbers (batch, channels, ...) or (batch, features)."""
    if isinstance(layer, MaxMin):
        first, second = np.split(values, 2, axis=1)
        return np.concatenate([np.maximum(first, second), np.minimum(first, second)], axis=1)
    if isinstance(layer, nn.ReLU):
        return np.maximum(values, 0)
    if isinstance(layer, nn.Flatten):
        return values.reshape(len(values), -1)
    raise TypeError(f"no execution of {type(layer).__name__} is written here")
