"""Small data sets made on the spot."""

import csv
import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def save(path: Path, colour: object, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def make_folder(root: Path, counts: dict[str, int], split: str = "") -> Path:
    """A folder of PNGs per class: image i of class k is of colour (10 k, i, 200)."""
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            save(root / split / name / f"{i:03}.png", (10 * k, i, 200))
    return root


def png(colour: object, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "png")
    return buffer.getvalue()


def table(rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def make_zip(path: Path, members: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_patterns(folder: Path, train: int, test: int) -> None:
    """MNIST's four files with 8 x 8 pictures in a new folder: ten random patterns, each with noise of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2, (10, 8, 8)) * 200
    for stem, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pictures = (patterns[labels] + rng.integers(0, 56, (count, 8, 8))).astype(np.uint8)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(pictures))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
