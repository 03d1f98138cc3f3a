"""`load`: from a name to three splits of floats."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otnn.data.boxes import read_boxes
from otnn.data.digits import read_digits
from otnn.data.folders import read_folder
from otnn.data.hub import read_hub
from otnn.data.idx import is_idx_folder, read_idx_folder
from otnn.data.splits import Dataset, Indices, Split, stratified
from otnn.data.stores import Array, Part, Source
from otnn.data.tasks import all_labels, choose, listing
from otnn.errors import InputError

ENVIRONMENT = "OTNN_DATA_DIR"
SIZES = (4, 512)
TEST_SHARE = 0.2
DIGIT_NAMES = tuple("0123456789")
FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# data sets of the Hub that stand in for a local folder, with their class names
HUB = {
    "mnist": ("ylecun/mnist", DIGIT_NAMES),
    "fashion-mnist": ("zalando-datasets/fashion_mnist", FASHION_NAMES),
}
CLASS_NAMES = {name: classes for name, (_, classes) in HUB.items()}
FOLDERS = ("celeba10k", "catdog", "tinyimagenet10")
KNOWN = ("digits", *HUB, *FOLDERS)
Samples = tuple[Part, Indices, Indices]  # where the images are, which of them, and their labels


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    size: int | None = None,
    classes: Sequence[str] | None = None,
    target: str | None = None,
    validation_share: float = 0.1,
    skip_broken: bool = False,
) -> Dataset:
    """Load a data set as float32 images in [0, 1], split into train, validation and test.

    The validation split is a stratified share of the train split (or the data set's own, where it has train,
    validation and test), and the test split a stratified fifth where the data set has none; both are fixed,
    whatever the seed of training. Colour images have three channels; where all are grey they have one. Metadata
    with columns x0, y0, x1, y1 (the first and last pixel inside a box, counted from 0) give `Split.boxes`.

    Args:
        name: "digits", "mnist", "fashion-mnist", "celeba10k", "catdog", "tinyimagenet10", an image folder or
            zip, or "org/name" on the Hugging Face Hub.
        data_dir: where the folders of named data sets lie; OTNN_DATA_DIR in the environment where left out.
        size: images become size x size, in 4..512: cropped to the centre, then resized with antialiasing.
        classes: names or indices of the classes to keep, in the order of their new labels.
        target: a binary attribute of the metadata to learn instead of the classes.
        validation_share: share of the train split kept for validation, in (0, 0.5].
        skip_broken: leave out images that cannot be decoded, instead of refusing.

    Raises:
        InputError: where the data set, a class, an attribute, a box or an image cannot be used.

    >>> pair = load("digits", classes=["8", "0"], size=12)
    >>> pair.classes, tuple(pair.test.images.shape), pair.test.labels.bincount().tolist()
    (('8', '0'), (71, 1, 12, 12), [35, 36])
    """
    _check(size, classes, target, validation_share)
    source = find_source(name, data_dir)
    size = source.size if size is None else size
    names, labels = all_labels(source, target)
    if len(names) < 2:
        raise InputError(f"{source.name}: expected at least two classes, got only {names[0]}; add another")
    samples = _samples(source, labels, names)
    if classes is not None:
        chosen = choose(names, classes)
        names = tuple(names[k] for k in chosen)
        samples = {split: _restrict(sample, chosen) for split, sample in samples.items()}
    for split, (_, _, found) in samples.items():
        _check_classes(found, names, split, source.name)
    return _dataset(source.name, names, samples, size, validation_share, skip_broken)


def find_source(name: str, data_dir: Path | None) -> Source:
    """The data set of that name, not yet decoded.

    A name that is not known is a path first, then a folder or zip in the data folder, then one of the Hub.

    Raises:
        InputError: where there is none.
    """
    if name == "digits":
        return read_digits()
    if name not in KNOWN and name.strip() and (path := Path(name).expanduser()).exists():
        return _read_path(path, path.resolve().name, ())
    root = _data_root(data_dir)
    if name in KNOWN:
        if root is not None and (root / name).exists():
            return _read_path(root / name, name, CLASS_NAMES.get(name, ()))
        if name in HUB:
            return _read_hub(HUB[name][0], name)
        place = f"{root} has no folder {name}" if root is not None else f"{ENVIRONMENT} is not set"
        raise InputError(
            f"{name} is read from a folder {name}, but {place}; give the folder that holds it with --data-dir"
        )
    if name.strip():
        if root is not None and (root / name).exists():
            return _read_path(root / name, name, ())
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not name.lower().endswith(".zip"):
            return _read_hub(name, name)
    raise InputError(
        f"unknown data set {name!r}: expected {', '.join(KNOWN)}, an image folder or zip (--data-dir says "
        "where named folders lie), or org/name on the Hugging Face Hub"
    )


def _data_root(data_dir: Path | None) -> Path | None:
    given = data_dir is not None
    text = os.environ.get(ENVIRONMENT, "") if data_dir is None else str(data_dir)
    if not text:
        return None
    root = Path(text).expanduser()
    if not root.is_dir():
        origin = "--data-dir" if given else ENVIRONMENT
        raise InputError(f"{origin}: expected a folder that holds the data sets, got {text}; correct the path")
    return root


def _read_path(path: Path, name: str, classes: tuple[str, ...]) -> Source:
    if path.is_dir():
        return read_idx_folder(path, name, classes) if is_idx_folder(path) else read_folder(path, name)
    if path.suffix.lower() == ".zip":
        return read_folder(path, name)
    raise InputError(f"{path}: expected a folder or a zip of images, got another file; name its folder")


def _read_hub(repository: str, name: str) -> Source:
    source = read_hub(repository, name)
    for known, classes in HUB.values():
        if repository == known and len(source.classes) == len(classes):
            return replace(source, classes=classes, size=28)
    return source


def _check(size: int | None, classes: Sequence[str] | None, target: str | None, validation_share: float) -> None:
    if size is not None and not SIZES[0] <= size <= SIZES[1]:
        raise InputError(f"size: expected {SIZES[0]} to {SIZES[1]} pixels, got {size}; choose one in that range")
    if classes is not None and target is not None:
        raise InputError("expected either classes or a target, got both; leave out --classes or --target")
    if isinstance(classes, str):
        raise InputError(f"classes: expected a list of names, got the text {classes!r}; split it at the commas")
    if not 0 < validation_share <= 0.5:
        raise InputError(f"validation_share: expected a share in (0, 0.5], got {validation_share:g}; 0.1 keeps a tenth")


def _samples(source: Source, labels: dict[str, Indices], names: tuple[str, ...]) -> dict[str, Samples]:
    """Every split as it was found; where there is no test split, a stratified fifth of the train split."""
    found = {split: (part, np.arange(len(part)), labels[split]) for split, part in source.parts.items()}
    if "test" in found:
        return found
    part, _, all_of_them = found["train"]
    sides = stratified(all_of_them, TEST_SHARE, names, "test")
    return {s: (part, rows, all_of_them[rows]) for s, rows in zip(("train", "test"), sides, strict=True)}


def _restrict(samples: Samples, chosen: list[int]) -> Samples:
    """Keep the samples of the chosen classes, relabelled by their place in the choice."""
    part, rows, labels = samples
    place = np.full(max(*chosen, int(labels.max(initial=0))) + 1, -1)
    place[chosen] = np.arange(len(chosen))
    renamed = place[labels]
    return part, rows[renamed >= 0], renamed[renamed >= 0]


def _check_classes(labels: Indices, names: tuple[str, ...], split: str, source: str) -> None:
    missing = [name for name, count in zip(names, np.bincount(labels, minlength=len(names)), strict=True) if not count]
    if missing:
        raise InputError(
            f"{source}: expected every class in the {split} split, found none of {listing(missing)}; "
            "add images of it or leave the class out"
        )


def _dataset(
    name: str,
    names: tuple[str, ...],
    samples: dict[str, Samples],
    size: int,
    validation_share: float,
    skip_broken: bool,
) -> Dataset:
    """Decode, cut the validation split off where there is none, and turn bytes into floats."""
    pixels, labels, boxes = {}, {}, {}
    broken: list[str] = []
    for split, (part, rows, found) in samples.items():
        decoded = part.store.decode(rows, size, skip_broken)
        pixels[split], labels[split] = decoded.pixels, found[decoded.kept]
        boxes[split] = read_boxes(part, rows[decoded.kept], decoded.sizes, size)
        broken += decoded.broken
        _check_classes(labels[split], names, split, name)
    channels = 1 if all(_is_grey(images) for images in pixels.values()) else 3
    rows_of = {split: np.arange(len(found)) for split, found in labels.items()}
    origin = {split: split for split in labels}
    if "validation" not in labels:
        kept, held = stratified(labels["train"], validation_share, names, "validation")
        rows_of |= {"train": kept, "validation": held}
        origin["validation"] = "train"
    splits = {}
    for split, of in origin.items():
        rows, places = rows_of[split], boxes[of]
        splits[split] = Split(
            _floats(pixels[of][rows, :channels]),
            torch.from_numpy(labels[of][rows]),
            None if places is None else torch.from_numpy(places[rows]),
        )
    return Dataset(name, names, splits["train"], splits["validation"], splits["test"], tuple(broken))


def _is_grey(pixels: Array) -> bool:
    """Whether all three channels are equal, in blocks that need little memory."""
    blocks = (pixels[i : i + 256] for i in range(0, len(pixels), 256))
    return all(bool((block == block[:, :1]).all()) for block in blocks)


def _floats(pixels: Array) -> Tensor:
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    return images.float().div_(255) if images.dtype == torch.uint8 else images.clamp_(0, 1)
