"""Data sets of the Hugging Face Hub by name, from the network or from the cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from otnn.data.columns import class_labels
from otnn.data.metadata import quiet_datasets
from otnn.data.splits import Indices
from otnn.data.stores import Files, Part, Source
from otnn.errors import InputError

TIMEOUT = 5.0  # seconds to wait for the Hub's first answer
SPLITS = {"train": ("train",), "test": ("test",), "validation": ("validation", "valid", "val")}


def read_hub(repository: str, name: str) -> Source:
    """Data set `repository` ("org/name") of the Hub: its splits, images, classes and other columns.

    Raises:
        InputError: where the Hub cannot be reached and nothing is cached, or there is no such image data set.
    """
    import datasets

    tables = _fetch(repository)
    found = {s: next((tables[n] for n in names if n in tables), None) for s, names in SPLITS.items()}
    splits = {split: table for split, table in found.items() if table is not None}
    if "train" not in splits:
        raise InputError(f"{repository}: expected a split train, got {', '.join(tables)}; take another data set")
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    features = splits["train"].features
    pictures = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    if not pictures:
        raise InputError(f"{repository}: expected a column of images, got {', '.join(features)}; take another one")
    # of several label columns, the one that is simply called label
    known = [c for c, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    column = min(known, key=lambda c: c != "label", default=None)
    names = {s: [f"{repository}/{s}/{i}" for i in range(len(t))] for s, t in splits.items()}
    columns = {s: t.remove_columns(pictures).to_dict() for s, t in splits.items()}
    if column is not None:
        classes: tuple[str, ...] = tuple(features[column].names)
        labels = {s: _checked(c.pop(column), len(classes), names[s]) for s, c in columns.items()}
    else:
        classes, labels = class_labels(columns, names) or ((), {})
    encoded = {s: t.cast_column(pictures[0], datasets.Image(decode=False)) for s, t in splits.items()}
    files = {s: Files(names[s], _opener(t, pictures[0])) for s, t in encoded.items()}
    return Source(name, {s: Part(files[s], labels.get(s), columns[s]) for s in splits}, classes)


def _fetch(repository: str) -> Any:
    """Download, or take from the cache; one short request first: `datasets` retries for half a minute."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    offline = False
    try:
        HfApi().dataset_info(repository, timeout=TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{repository}: no such data set on the Hugging Face Hub, or it is private; check the name"
        ) from error
    # the client's network errors differ between its versions; whatever it was, only the cache is left
    except Exception:
        offline = True
    with quiet_datasets(offline=offline):
        try:
            return datasets.load_dataset(repository)
        except Exception as error:
            if offline:
                raise InputError(
                    f"{repository} is not on this computer and the Hugging Face Hub cannot be reached; "
                    "connect to the network, or put the data into a folder and give its parent by --data-dir"
                ) from error
            raise InputError(
                f"{repository} cannot be loaded from the Hugging Face Hub "
                f"({type(error).__name__}: {str(error).split(chr(10))[0]}); take another data set or a folder"
            ) from error


def _checked(values: list[int | None], count: int, names: list[str]) -> Indices:
    for value, name in zip(values, names, strict=True):
        if value is None or not 0 <= value < count:
            raise InputError(
                f"{name}: expected a label in 0..{count - 1}, got {value}; the split is not labelled, "
                "take another data set"
            )
    return np.array(values, dtype=np.int64)


def _opener(table: Any, column: str) -> Any:
    @contextmanager
    def open_table() -> Iterator[Callable[[int], bytes]]:
        def read(index: int) -> bytes:
            image = table[index][column]
            data: bytes = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            return data

        yield read

    return open_table
