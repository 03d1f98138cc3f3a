"""Random and adversarial weights, drawn from the generator of a numbered case."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
Values = NDArray[np.float64]
Maker = Callable[[np.random.Generator, tuple[int, ...]], Values]

# The last three leave only denormal numbers, or mostly zeros.
SCALES = {torch.float32: (1e30, 1e-20, 1e-36, 1e-40, 1e-44), torch.float64: (1e300, 1e-200, 1e-300, 1e-315, 1e-323)}


class Draw:
    """The choices of one case, the same whenever the case is drawn."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = np.random.default_rng([seed, number])
        torch.manual_seed(int(self.rng.integers(2**62)))  # layers of otnn.nn draw from torch's generator

    def integer(self, low: int, high: int) -> int:
        """One of low, ..., high."""
        return int(self.rng.integers(low, high + 1))

    def one_of(self, *choices: T) -> T:
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def dtype(self) -> torch.dtype:
        return torch.float64 if self.chance(0.2) else torch.float32

    def weights(self, kind: str, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, float]:
        """Weights of one of `KINDS`, rounded to the dtype, and their scale: mostly 1, else huge, tiny or denormal."""
        scale = self.one_of(*SCALES[dtype]) if self.chance(0.2) else 1.0
        return torch.from_numpy(KINDS[kind](self.rng, tuple(shape)) * scale).to(dtype), scale


def _flat(values: Values) -> Values:
    return values.reshape(len(values), -1)


def _product(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    columns = math.prod(shape[1:])
    rank = int(rng.integers(1, max(2, min(shape[0], columns) // 2 + 1)))
    return (rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, columns))).reshape(shape)


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    rows, columns = shape[0], math.prod(shape[1:])
    basis = np.linalg.qr(rng.normal(size=(max(rows, columns), min(rows, columns))))[0]
    return np.ascontiguousarray(basis if rows >= columns else basis.T).reshape(shape)


def _mixed_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    return rng.normal(size=shape) * 10.0 ** rng.uniform(-40, 2, size=(shape[0], *[1] * (len(shape) - 1)))


def _checkerboard(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    spatial = sum(np.indices(shape)[2:]) if len(shape) > 2 else sum(np.indices(shape))
    return (1.0 - 2.0 * (spatial % 2)) * np.ones(shape)


def _smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Positive bumps: the largest singular value is near frequency 0."""
    bump = np.ones(shape)
    for dim in range(2 if len(shape) > 2 else 0, len(shape)):
        centred = np.linspace(-1, 1, shape[dim])
        bump = bump * np.exp(-((centred * rng.uniform(0.2, 2)) ** 2)).reshape(
            [-1 if other == dim else 1 for other in range(len(shape))]
        )
    return bump


def _shift(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    values = np.zeros(shape)
    flat = _flat(values)
    flat[np.arange(len(flat)), rng.integers(flat.shape[1], size=len(flat))] = 1
    return flat.reshape(shape)


def _classic(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """(2/3, 2/3, -1/3) and its like along the last dimension: the torus of the image's size underestimates it."""
    line = np.array([2.0, 2.0, -1.0]) / 3
    values = np.zeros(shape)
    count = min(3, shape[-1])
    values[..., :count] = (line[:count] if rng.random() < 0.5 else line[::-1][:count]) * rng.choice([-1, 1])
    return values


KINDS: dict[str, Maker] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "positive": lambda rng, shape: rng.random(shape),
    "ones": lambda rng, shape: np.ones(shape),
    "signs": lambda rng, shape: rng.choice([-1.0, 1.0], size=shape),
    "checkerboard": _checkerboard,
    "smooth": _smooth,
    "shift": _shift,
    "classic": _classic,
    "low rank": _product,
    "nearly low rank": lambda rng, shape: _product(rng, shape) + 10.0 ** rng.uniform(-16, -3) * rng.normal(size=shape),
    "orthogonal": _orthogonal,
    "nearly orthogonal": lambda rng, shape: (
        _orthogonal(rng, shape) + 10.0 ** rng.uniform(-12, -2) * rng.normal(size=shape)
    ),
    "mixed rows": _mixed_rows,
    "mixed": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.uniform(-40, 2, size=shape),
    "sparse": lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.2),
    "equal rows": lambda rng, shape: np.broadcast_to(rng.normal(size=shape[1:]), shape).copy(),
}
