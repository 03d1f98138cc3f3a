"""Metadata of image folders and zips, read by `datasets` (`imagefolder`) with no network and no trace."""

import gc
import glob
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from otnn.errors import InputError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@contextmanager
def quiet_datasets(*, offline: bool) -> Iterator[None]:
    """Keep `datasets` from drawing bars, logging and, where `offline`, from any request; then restore it."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    verbosity = datasets.logging.get_verbosity()
    was_offline = datasets.config.HF_HUB_OFFLINE
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_HUB_OFFLINE = was_offline or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _closing_leaks() -> Iterator[None]:
    """Collect the table readers that `datasets` leaves open, while their warning is silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            yield
        finally:
            gc.collect()


def read_metadata(root: Path, members: Sequence[str]) -> tuple[list[str], dict[str, list[object]]]:
    """Image members, sorted, and the metadata's columns in that order.

    Args:
        root: a zip, or a folder.
        members: the metadata files in it, relative to it.

    Raises:
        InputError: where `datasets` cannot read them, or an image is listed twice.
    """
    import datasets

    archive = root.is_file()
    files = [root] if archive else [root / member for member in members]
    with quiet_datasets(offline=True), _closing_leaks(), tempfile.TemporaryDirectory(prefix="otnn-") as cache:
        try:
            table = datasets.load_dataset(
                "imagefolder",
                data_files={"train": [glob.escape(str(file.resolve())) for file in files]},
                split="train",
                cache_dir=cache,  # a cache that outlives the load could serve files that have changed
                keep_in_memory=True,
            )
            columns = table.cast_column("image", datasets.Image(decode=False)).to_dict()
        # pandas, pyarrow and datasets each have their own errors for a malformed table
        except Exception as error:
            cause = error.__cause__ or error
            raise InputError(
                f"{root}: the metadata cannot be read ({type(cause).__name__}: "
                f"{str(cause).partition(chr(10))[0]}); "
                "expected a table with a column file_name relative to its folder"
            ) from error
    paths = [_member(image["path"], root, archive) for image in columns.pop("image")]
    order = sorted(range(len(paths)), key=paths.__getitem__)
    ordered = [paths[i] for i in order]
    twice = next((a for a, b in pairwise(ordered) if a == b), None)
    if twice is not None:
        raise InputError(f"{root}: the metadata list {twice} twice; delete one of the rows")
    return ordered, {name: [values[i] for i in order] for name, values in columns.items()}


def _member(path: str, root: Path, archive: bool) -> str:
    if archive:
        return path.removeprefix("zip://").rsplit("::", 1)[0]
    return Path(path).relative_to(root.resolve()).as_posix()
