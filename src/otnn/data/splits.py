"""What a loaded data set is, and the stratified split that cuts it."""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otnn.errors import InputError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images (n, channels, height, width), float32 in [0, 1], and their labels (n,), int64.

    `boxes` (n, 4), int64, say where the object is, where the metadata tell: left, top, right, bottom in pixels of
    `images`, right and bottom outside; four zeros for an image without a box.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits: fit on `train`, choose on `validation`, report on `test`.

    `classes[k]` names label k; of two classes the second is the positive one. `skipped` names the broken
    images that were left out.

    >>> from otnn.data import load
    >>> digits = load("digits")
    >>> digits.input_shape, len(digits.train), len(digits.validation), len(digits.test)
    ((1, 8, 8), 1293, 144, 360)
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    skipped: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def shares(self) -> Tensor:
        """Share of each class in the train split: (classes,) float64, summing to 1."""
        counts = torch.bincount(self.train.labels, minlength=len(self.classes))
        return counts.double() / len(self.train)


def stratified(labels: Indices, share: float, classes: tuple[str, ...], what: str) -> tuple[Indices, Indices]:
    """Indices (kept, held out): `share` of the samples is held out, in each class alike, by a fixed seed.

    It is scikit-learn's `train_test_split(stratify=labels, random_state=0)`, whatever the seed of training.

    Args:
        labels: (n,) integers in 0..classes-1.
        share: share of the samples to hold out, in (0, 1).
        classes: their names, for the message.
        what: what is held out ("test" or "validation"), for the message.

    Raises:
        InputError: where a class is too small to be on both sides.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels, minlength=len(classes))
    held = math.ceil(share * len(labels))
    smallest = int(counts.argmin())
    mend = "add images, drop the class, or hold out a larger share"
    message = (
        f"class {classes[smallest]!r} has {counts[smallest]} samples to split, too few to hold out a "
        f"{what} share of {share:g} of {len(labels)}; {mend}"
    )
    if counts[smallest] < 2 or min(held, len(labels) - held) < len(classes):
        raise InputError(message)
    kept, out = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=0)
    if any(len(np.unique(labels[side])) < len(classes) for side in (kept, out)):
        raise InputError(message)
    return cast(Indices, kept), cast(Indices, out)
