"""The idx format of MNIST: two zero bytes, a type, the count of dimensions, big-endian sizes, the values.

Source: http://yann.lecun.com/exdb/mnist, 'The IDX file format'.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from otnn.data.stores import Part, Pixels, Source
from otnn.errors import InputError

UNSIGNED_BYTE = 0x08
STEMS = {"train": "train", "test": "t10k"}


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Array of unsigned bytes from an idx file, gzipped or not.

    Args:
        path: the file.
        dimensions: how many the array must have: 3 for images (n, height, width), 1 for labels (n,).

    Raises:
        InputError: where the magic number, the sizes or the compression do not fit.
    """
    again = "fetch it again"
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error or type(error).__name__}); {again}") from error
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, UNSIGNED_BYTE, dimensions))
    if data[:4] != magic or len(data) < header:
        raise InputError(
            f"{path}: expected an idx file of unsigned bytes with magic number {magic.hex()}, "
            f"got {data[:4].hex() or 'an empty file'}; {again}"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    # Python integers: the sizes of a damaged header may overflow
    size = 1
    for length in shape:
        size *= length
    if len(data) - header != size:
        raise InputError(
            f"{path}: expected {size} values for shape {shape}, got {len(data) - header}; the file is damaged: {again}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def is_idx_folder(folder: Path) -> bool:
    """Whether the folder holds idx files under their official names."""
    return any(folder.glob("*-ubyte")) or any(folder.glob("*-ubyte.gz"))


def read_idx_folder(folder: Path, name: str, classes: tuple[str, ...] = ()) -> Source:
    """Train and test split from the four official files, such as train-images-idx3-ubyte.gz.

    Args:
        folder: where they lie, gzipped or not.
        name: of the data set.
        classes: names of the labels 0, 1, ...; the labels' own numbers where left out.

    Raises:
        InputError: where a file is missing or does not fit.
    """
    images, labels = {}, {}
    for split, stem in STEMS.items():
        picture_file = _find(folder, f"{stem}-images-idx3-ubyte")
        label_file = _find(folder, f"{stem}-labels-idx1-ubyte")
        images[split], labels[split] = read_idx(picture_file, 3), read_idx(label_file, 1)
        if len(images[split]) != len(labels[split]):
            raise InputError(
                f"{label_file}: expected one label for each of the {len(images[split])} images of "
                f"{picture_file.name}, got {len(labels[split])}; fetch both again"
            )
        if images[split].size == 0:
            raise InputError(f"{picture_file}: expected images, got shape {images[split].shape}; fetch it again")
        if classes and labels[split].max() >= len(classes):
            raise InputError(
                f"{label_file}: expected labels in 0..{len(classes) - 1}, got {labels[split].max()}; fetch it again"
            )
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise InputError(
            f"{folder}: expected train and test images of one size, got {images['train'].shape[1:]} and "
            f"{images['test'].shape[1:]}; fetch the files again"
        )
    names = classes or tuple(str(k) for k in range(int(max(values.max() for values in labels.values())) + 1))
    parts = {split: Part(Pixels(images[split]), labels[split].astype(np.int64)) for split in STEMS}
    return Source(name, parts, names, size=min(max(min(images["train"].shape[1:]), 4), 512))


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    raise InputError(f"{folder}: expected {stem}.gz or {stem}, found neither; put all four idx files there")
