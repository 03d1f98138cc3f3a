"""The classification task: all classes, some of them in a given order, or one binary attribute."""

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from otnn.data.columns import CLASS_COLUMNS, binary, is_missing
from otnn.data.splits import Indices
from otnn.data.stores import Part, Source
from otnn.errors import InputError

LISTED = 12


def listing(names: Sequence[str]) -> str:
    """Names joined by commas, the first dozen of them.

    >>> listing(["a", "b"]), listing([str(k) for k in range(14)])[-17:]
    ('a, b', '10, 11 and 2 more')
    """
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def all_labels(source: Source, target: str | None) -> tuple[tuple[str, ...], dict[str, Indices]]:
    """Names of the classes, and the label of every sample of every split.

    Args:
        source: the data set as found.
        target: a binary attribute that replaces the classes: 0 is its absence, 1 its presence.

    Raises:
        InputError: where the attribute is unknown or not binary, or there are no classes.
    """
    if target is not None:
        labels = _attribute(source, target)
        return (f"no {target}", target), labels
    known = {split: part.labels for split, part in source.parts.items() if part.labels is not None}
    if len(known) < len(source.parts):
        attributes = _attributes(source.parts)
        if attributes:
            raise InputError(
                f"{source.name} has no classes but {len(attributes)} attributes; pick one with --target: "
                f"{listing(attributes)}"
            )
        raise InputError(
            f"{source.name}: expected at least two class folders, or a metadata file with a column label, found "
            "neither; put the images of each class into a folder of their own"
        )
    return source.classes, known


def choose(names: tuple[str, ...], classes: Sequence[str]) -> list[int]:
    """Labels of the classes asked for, by name or by index, in the order given.

    >>> choose(("cats", "dogs", "birds"), ["birds", "0"])
    [2, 0]

    Raises:
        InputError: where one is unknown or repeated, or there are fewer than two.
    """
    chosen: list[int] = []
    for wanted in map(str, classes):
        text = wanted.strip()
        if text in names:
            index = names.index(text)
        elif text.isdecimal() and int(text) < len(names):
            index = int(text)
        else:
            raise InputError(f"unknown class {wanted!r}{_hint(text, names)}; choose among {listing(names)}")
        if index in chosen:
            raise InputError(f"class {wanted!r} is given twice; name each class once, out of {listing(names)}")
        chosen.append(index)
    if len(chosen) < 2:
        raise InputError(
            f"expected at least two classes, got {len(chosen)}; choose two or more out of {listing(names)}"
        )
    return chosen


def _attribute(source: Source, target: str) -> dict[str, Indices]:
    parts = source.parts
    if not all(target in part.columns for part in parts.values()):
        attributes = _attributes(parts)
        there = f"there are {listing(attributes)}" if attributes else "it has none, leave out --target"
        raise InputError(f"{source.name} has no attribute {target!r}{_hint(target, attributes)}; {there}")
    cells = [value for part in parts.values() for value in part.columns[target]]
    empty = sum(map(is_missing, cells))
    if empty:
        raise InputError(
            f"attribute {target!r} is empty for {empty} of {len(cells)} images; fill it in or delete their rows"
        )
    joint = binary(cells)
    if joint is None:
        shown = ", ".join(sorted({str(value) for value in cells})[:3])
        raise InputError(
            f"attribute {target!r}: expected only 0/1, -1/1 or true/false, got values such as {shown}; "
            f"there are {listing(_attributes(parts)) or 'no binary attributes'}"
        )
    ends = np.cumsum([len(part) for part in parts.values()])[:-1]
    return dict(zip(parts, np.split(joint, ends), strict=True))


def _attributes(parts: Mapping[str, Part]) -> list[str]:
    """Names of the columns that are binary in all splits together."""
    everywhere = [name for name in next(iter(parts.values())).columns if all(name in p.columns for p in parts.values())]
    cells = {name: [value for p in parts.values() for value in p.columns[name]] for name in everywhere}
    return [name for name in everywhere if name not in CLASS_COLUMNS and binary(cells[name]) is not None]


def _hint(wanted: str, names: Sequence[str]) -> str:
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wanted.lower(), lowered, n=1)
    return f" (did you mean {lowered[close[0]]!r}?)" if close else ""
