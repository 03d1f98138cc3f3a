"""On the real sets in the folder that OTNN_DATA_DIR names; skipped where it is not set."""

from collections.abc import Callable
from pathlib import Path

import pytest

from otnn.data import load
from otnn.errors import InputError

Find = Callable[[str], Path]


@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fashion-mnist", 0.2860)])
def test_idx_sets(real: Find, name: str, mean: float) -> None:
    data = load(name, data_dir=real(name))
    assert (len(data.train), len(data.validation), len(data.test)) == (54000, 6000, 10000)
    fit = (data.train.images.sum(dtype=float) + data.validation.images.sum(dtype=float)) / (60000 * 784)
    assert fit.item() == pytest.approx(mean, abs=1e-4)  # the means that everybody normalises with


def test_celeba_attributes(real: Find) -> None:
    folder = real("celeba10k")
    with pytest.raises(InputError, match=r"celeba10k has no classes but 40 attributes; pick one with --target: 5_o_C"):
        load("celeba10k", data_dir=folder)
    data = load("celeba10k", data_dir=folder, target="Eyeglasses", size=16)
    assert data.classes == ("no Eyeglasses", "Eyeglasses")
    assert data.train.labels.sum() + data.validation.labels.sum() == 476
    assert data.test.labels.sum() == 70
    assert (len(data.train), len(data.validation), len(data.test)) == (6300, 700, 1000)
    assert data.input_shape == (3, 16, 16)


def test_cats_and_dogs(real: Find) -> None:
    data = load("catdog", data_dir=real("catdog"), size=32)
    assert data.classes == ("cats", "dogs")
    assert data.train.labels.bincount().tolist() == [1350, 1350]
    assert data.test.labels.bincount().tolist() == [500, 500]


def test_tiny_imagenet_has_readable_names(real: Find) -> None:
    data = load("tinyimagenet10", data_dir=real("tinyimagenet10"), classes=["pizza", "0"], size=16)
    assert data.classes == ("pizza", "goldfish")
    assert data.train.labels.bincount().tolist() == [450, 450]
    assert data.test.labels.bincount().tolist() == [50, 50]
