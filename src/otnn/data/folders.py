"""Image folders and zips: which files are images, which split each belongs to, and its class."""

import csv
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from otnn.data.columns import class_labels
from otnn.data.metadata import METADATA_NAMES, read_metadata
from otnn.data.splits import Indices
from otnn.data.stores import Files, Part, Source
from otnn.errors import InputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}


@dataclass(frozen=True)
class Tree:
    """Images under one root (a folder or a zip): members are paths relative to it, with their metadata."""

    root: Path
    members: tuple[str, ...]
    columns: Mapping[str, Sequence[object]]

    def part(self, rows: Sequence[int], labels: Indices | None) -> Part:
        """The images at `rows`, readable."""
        members = [self.members[i] for i in rows]
        names = [f"{self.root.name}/{member}" for member in members]
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Part(Files(names, lambda: _open(self.root, members)), labels, columns)


@dataclass(frozen=True)
class Group:
    """The images of one split: rows of a tree, and the class folder of each ("" where there is none)."""

    tree: Tree
    rows: Sequence[int]
    folders: Sequence[str]

    @property
    def names(self) -> list[str]:
        """Members of the tree, one for each row."""
        return [self.tree.members[i] for i in self.rows]

    @property
    def columns(self) -> dict[str, list[object]]:
        """Metadata of the rows."""
        return {name: [values[i] for i in self.rows] for name, values in self.tree.columns.items()}


def read_folder(path: Path, name: str) -> Source:
    """Data set in a folder or a zip.

    A folder holds train/ and test/ (or val/) with a folder per class or a metadata file, or zips of these
    (`*-train.zip` and `*-test.zip`), or only class folders. With train, test and val all three are used.

    Args:
        path: the folder or zip.
        name: what the data set is called.

    Raises:
        InputError: where no images, no classes or no clear splits are found.
    """
    zips = [path] if path.is_file() else sorted(path.glob("*.zip"))
    has_train = path.is_dir() and any(SPLIT_WORDS.get(p.name.lower()) == "train" for p in path.iterdir())
    if not zips or has_train:
        groups = _groups(read_tree(path))
    elif len(zips) == 1:
        groups = _groups(read_tree(zips[0]))
    else:
        groups = {role: _merged(read_tree(file)) for role, file in _roles(path, zips).items()}
    if "train" not in groups:
        raise InputError(f"{path}: expected a train split, found only {', '.join(groups)}; name one train")
    if "test" not in groups and "validation" in groups:
        groups["test"] = groups.pop("validation")
    classes, labels = _classes(groups)
    parts = {split: g.tree.part(g.rows, labels.get(split)) for split, g in groups.items()}
    return Source(name, parts, _display_names(path, classes))


def read_tree(root: Path) -> Tree:
    """List the images of a folder or a zip, sorted, with the metadata if there are any.

    Raises:
        InputError: where there is no image, or the zip is damaged.
    """
    members = [m for m in _listing(root) if not any(part.startswith((".", "__MACOSX")) for part in m.split("/"))]
    tables = [m for m in members if m.rsplit("/", 1)[-1] in METADATA_NAMES]
    if tables:
        images, columns = read_metadata(root, tables)
    else:
        # a zip without metadata gets wrong labels from `datasets` 5.2.0, so the path decides (`_groups`)
        images, columns = sorted(m for m in members if m.lower().endswith(SUFFIXES)), {}
    if not images:
        raise InputError(f"{root}: expected images ({', '.join(s[1:] for s in SUFFIXES)}), found none; add some")
    return Tree(root, tuple(images), columns)


def _listing(root: Path) -> Iterator[str]:
    if root.is_file():
        try:
            with zipfile.ZipFile(root) as archive:
                yield from (info.filename for info in archive.infolist() if not info.is_dir())
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{root} cannot be read as a zip ({error}); fetch it again") from error
        return
    for folder, _, files in os.walk(root):
        yield from (Path(folder, file).relative_to(root).as_posix() for file in files)


@contextmanager
def _open(root: Path, members: Sequence[str]) -> Iterator[Callable[[int], bytes]]:
    """Reader of the bytes of member i, safe to call from several threads."""
    if root.is_file():
        with zipfile.ZipFile(root) as archive:
            yield lambda i: archive.read(members[i])
    else:
        yield lambda i: (root / members[i]).read_bytes()


def _groups(tree: Tree) -> dict[str, Group]:
    """Split a tree by the folders named train, test or val that hold all its images, if there are such."""
    folders = [member.split("/")[:-1] for member in tree.members]
    for depth in range(min(map(len, folders))):
        found = {SPLIT_WORDS.get(parts[depth].lower()) for parts in folders}
        if None not in found:
            rows: dict[str, list[int]] = {}
            for i, parts in enumerate(folders):
                rows.setdefault(SPLIT_WORDS[parts[depth].lower()], []).append(i)
            after = [parts[depth + 1 :] for parts in folders]
            return {s: Group(tree, r, [after[i][0] if after[i] else "" for i in r]) for s, r in rows.items()}
        if "train" in found and len(found) > 2:
            stray = next(m for m, p in zip(tree.members, folders, strict=True) if p[depth].lower() not in SPLIT_WORDS)
            raise InputError(f"{tree.root}: {stray} lies outside the train and test folders; move it into one")
    common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False)))
    every = range(len(folders))
    return {"train": Group(tree, every, [p[common] if len(p) > common else "" for p in folders])}


def _merged(tree: Tree) -> Group:
    """A tree that is one split as a whole, whatever split folders its paths name."""
    groups = _groups(tree).values()
    order = [(row, folder) for g in groups for row, folder in zip(g.rows, g.folders, strict=True)]
    return Group(tree, [row for row, _ in order], [folder for _, folder in order])


def _roles(path: Path, zips: Sequence[Path]) -> dict[str, Path]:
    roles: dict[str, Path] = {}
    for file in zips:
        words = [SPLIT_WORDS[w] for w in re.split(r"[-_. ]", file.stem.lower()) if w in SPLIT_WORDS]
        if len(words) != 1 or words[0] in roles:
            listing = ", ".join(f.name for f in zips)
            raise InputError(
                f"{path}: expected one zip, or one each named *-train.zip and *-test.zip, got {listing}; "
                "rename or remove the others"
            )
        roles[words[0]] = file
    return roles


def _classes(groups: Mapping[str, Group]) -> tuple[tuple[str, ...], dict[str, Indices]]:
    """Class names and labels from the metadata, or else from the class folders; else nothing."""
    from_columns = class_labels({s: g.columns for s, g in groups.items()}, {s: g.names for s, g in groups.items()})
    if from_columns is not None:
        return from_columns
    classless = [n for g in groups.values() for n, f in zip(g.names, g.folders, strict=True) if not f]
    if classless:
        if any(f for g in groups.values() for f in g.folders):
            raise InputError(f"{classless[0]}: expected every image in a class folder, as others are; move it into one")
        return (), {}
    classes = sorted({f for g in groups.values() for f in g.folders})
    index = {name: k for k, name in enumerate(classes)}
    return tuple(classes), {s: np.array([index[f] for f in g.folders], np.int64) for s, g in groups.items()}


def _display_names(path: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Readable names from a `*classes.csv` with columns folder and words, where it names all."""
    for file in sorted(path.glob("*classes.csv")) if path.is_dir() else []:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        words = {row.get("folder"): (row.get("words") or "").split(",")[0].strip() for row in rows}
        named = tuple(words.get(name, "") for name in classes)
        if all(named) and len(set(named)) == len(classes):
            return named
    return classes
