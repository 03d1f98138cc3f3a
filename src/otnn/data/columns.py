"""What the columns of a metadata table say: the class of each image, and its binary attributes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from otnn.data.splits import Indices
from otnn.errors import InputError

Columns = Mapping[str, Sequence[object]]
CLASS_COLUMNS = ("label", "class", "labels", "fine_label")
WORDS = {"true": 1, "false": 0, "1": 1, "0": 0, "-1": -1}


def is_missing(value: object) -> bool:
    """Whether a cell is empty: None, NaN or blank text."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value == ""


def binary(values: Sequence[object]) -> Indices | None:
    """0 or 1 for each cell that says 0/1, -1/1 or true/false; None where any says something else.

    >>> binary([-1, 1]), binary(["True", "false"]), binary([0, 2])
    (array([0, 1]), array([1, 0]), None)
    """
    numbers = []
    for value in values:
        if isinstance(value, str):
            number = WORDS.get(value.strip().lower())
        else:
            number = int(value) if isinstance(value, int | float | np.generic) and value in (-1, 0, 1) else None
        if number is None:
            return None
        numbers.append(number)
    if {-1, 0} <= set(numbers):
        return None
    return np.maximum(np.array(numbers, dtype=np.int64), 0)


def class_labels(
    tables: Mapping[str, Columns], names: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], dict[str, Indices]] | None:
    """Class names and the label of each image of each split, from a column "label" or "class", or None.

    Integers in "label" are named by the text in "class" where the two agree, as image folders often have it;
    text is sorted.

    Args:
        tables: the columns of each split.
        names: the images' names, for messages.

    Raises:
        InputError: where a cell is empty, fractional or negative.
    """
    column = next((c for c in CLASS_COLUMNS if all(c in table for table in tables.values())), None)
    if column is None:
        return None
    keys = {
        split: [_key(value, column, name) for value, name in zip(table[column], names[split], strict=True)]
        for split, table in tables.items()
    }
    found = {key for column_keys in keys.values() for key in column_keys}
    if len({type(key) for key in found}) > 1:
        raise InputError(f"column {column!r}: expected only integers or only names, got both; use one kind")
    ordered = sorted(found)
    index = {key: k for k, key in enumerate(ordered)}
    labels = {split: np.array([index[key] for key in row], np.int64) for split, row in keys.items()}
    return _titles(ordered, tables, keys), labels


def _key(value: object, column: str, name: str) -> int | str:
    if is_missing(value):
        raise InputError(f"column {column!r} is empty for {name}; fill it in or delete the row")
    if isinstance(value, str):
        return value
    if not isinstance(value, int | float) or value != int(value) or value < 0:
        raise InputError(
            f"column {column!r}: expected a class name or an integer from 0, got {value!r} for {name}; "
            "number the classes 0, 1, ..."
        )
    return int(value)


def _titles(
    ordered: Sequence[int | str], tables: Mapping[str, Columns], keys: Mapping[str, Sequence[int | str]]
) -> tuple[str, ...]:
    """Names of the classes: the column "class" where it gives each number a name of its own."""
    plain = tuple(str(key) for key in ordered)
    if not all("class" in table for table in tables.values()):
        return plain
    pairs = {
        (key, value) for split, table in tables.items() for key, value in zip(keys[split], table["class"], strict=True)
    }
    titles = dict(pairs)
    unique = len(pairs) == len(ordered) == len(set(titles.values()))
    if not unique or not all(isinstance(title, str) for title in titles.values()):
        return plain
    return tuple(str(titles[key]) for key in ordered)
