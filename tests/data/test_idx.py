import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from otnn.data import load
from otnn.data.idx import read_idx
from otnn.errors import InputError
from tests.data.image_makers import idx_bytes

GENERATOR = np.random.default_rng(0)
TRAIN = GENERATOR.integers(0, 256, (200, 28, 28), dtype=np.uint8)
TEST = GENERATOR.integers(0, 256, (50, 28, 28), dtype=np.uint8)
TRAIN_LABELS, TEST_LABELS = np.arange(200, dtype=np.uint8) % 10, np.arange(50, dtype=np.uint8) % 10


def write_set(folder: Path, *, zipped: bool = True, **changed: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    arrays = {
        "train-images-idx3-ubyte": changed.get("train", TRAIN),
        "train-labels-idx1-ubyte": changed.get("train_labels", TRAIN_LABELS),
        "t10k-images-idx3-ubyte": changed.get("test", TEST),
        "t10k-labels-idx1-ubyte": changed.get("test_labels", TEST_LABELS),
    }
    for name, array in arrays.items():
        data = idx_bytes(array)
        (folder / f"{name}{'.gz' * zipped}").write_bytes(gzip.compress(data) if zipped else data)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_come_back_exactly(tmp_path: Path, zipped: bool) -> None:
    write_set(tmp_path / "fashion-mnist", zipped=zipped)
    data = load("fashion-mnist", data_dir=tmp_path)
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(TEST).float() / 255)
    assert torch.equal(data.test.labels, torch.from_numpy(TEST_LABELS).long())
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[-1] == "Ankle boot"
    assert data.input_shape == (1, 28, 28)
    assert (len(data.train), len(data.validation)) == (180, 20)
    together = torch.cat([data.train.images, data.validation.images])
    assert {i.numpy().tobytes() for i in together} == {(i / np.float32(255)).tobytes() for i in TRAIN}


def test_environment_names_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "sets" / "mnist")
    monkeypatch.setenv("OTNN_DATA_DIR", str(tmp_path / "sets"))
    data = load("mnist", classes=["7", "1"], size=8)
    assert data.classes == ("7", "1")
    assert data.input_shape == (1, 8, 8)
    assert data.test.labels.bincount().tolist() == [5, 5]
    assert data.test.images[0].mean() == pytest.approx(TEST[1].mean() / 255, abs=0.01)


def test_a_folder_of_ones_own_is_named_by_its_labels(tmp_path: Path) -> None:
    labels = {"train_labels": TRAIN_LABELS % 3, "test_labels": TEST_LABELS % 3}
    data = load(str(write_set(tmp_path / "own", **labels)))
    assert (data.name, data.classes, data.input_shape) == ("own", ("0", "1", "2"), (1, 28, 28))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: gzip.compress(data)[:-500], r"x.gz cannot be read \(.*; fetch it again"),
        (lambda data: b"\x1f\x8b" + os.urandom(40), r"x.gz cannot be read"),
        (lambda data: b"", r"got an empty file"),
        (lambda data: data[:7], r"got 00000803"),
        (lambda data: b"\0\0\x0d\x03" + data[4:], r"magic number 00000803, got 00000d03"),
        (lambda data: data[:-3], r"expected 156800 values for shape \(200, 28, 28\), got 156797"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], r"expected \d{20,} values for shape"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(damage(idx_bytes(TRAIN)))  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        read_idx(path, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_labels": TEST_LABELS[:-1]}, r"expected one label for each of the 50 images.*got 49"),
        ({"train_labels": TRAIN_LABELS + 1}, r"train-labels.*expected labels in 0..9, got 10"),
        ({"test": TEST[:0], "test_labels": TEST_LABELS[:0]}, r"expected images, got shape \(0, 28, 28\)"),
        ({"test": TEST[:, :20]}, r"images of one size, got \(28, 28\) and \(20, 28\)"),
        ({"test_labels": TEST_LABELS % 9}, r"every class in the test split, found none of 9"),
        ({"train_labels": TRAIN_LABELS * 0, "test_labels": TEST_LABELS * 0}, r"found none of 1, 2, 3"),
        (
            {"train_labels": np.where(np.arange(200) == 9, 9, TRAIN_LABELS % 9).astype(np.uint8)},
            r"class '9' has 1 ",
        ),
    ],
)
def test_sets_that_do_not_fit_are_refused(tmp_path: Path, changed: dict[str, np.ndarray], message: str) -> None:
    write_set(tmp_path / "mnist", **changed)
    with pytest.raises(InputError, match=message):
        load("mnist", data_dir=tmp_path)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "own", train_labels=TRAIN_LABELS * 0, test_labels=TEST_LABELS * 0)
    with pytest.raises(InputError, match="at least two classes, got only 0"):
        load(str(folder))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write_set(tmp_path / "mnist") / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"expected t10k-labels-idx1-ubyte.gz or t10k-labels-idx1-ubyte, found"):
        load("mnist", data_dir=tmp_path)
