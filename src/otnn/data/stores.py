"""Where images rest until they are decoded at the size asked for: arrays in memory, or files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from otnn.data.images import BrokenImageError, decode_sized, fit, quiet_decoding
from otnn.data.splits import Indices
from otnn.errors import InputError

Array = NDArray[Any]
CHUNK = 32
THREADS = 2
PATIENCE = 2.0  # seconds until the progress bar appears


@dataclass(frozen=True)
class Decoded:
    """Images (n, channels, size, size), uint8 or float32 in [0, 1], of the samples at `kept`.

    `sizes` (n, 2) are the width and height that they had.
    """

    pixels: Array
    kept: Indices
    sizes: Indices
    broken: tuple[str, ...] = ()


class Store(Protocol):
    """Images that can be decoded at a size."""

    def __len__(self) -> int: ...

    def decode(self, indices: Indices, size: int, skip_broken: bool) -> Decoded:
        """Decode the samples at `indices`."""
        ...


@dataclass(frozen=True)
class Pixels:
    """Grey images in memory: (n, height, width), uint8 or float32 in [0, 1]."""

    array: Array

    def __len__(self) -> int:
        return len(self.array)

    def decode(self, indices: Indices, size: int, skip_broken: bool) -> Decoded:
        """Resize where the size differs; nothing in memory can be broken."""
        chosen = self.array[indices]
        if chosen.shape[1:] != (size, size):
            resized = np.empty((len(chosen), size, size), chosen.dtype)
            for row, image in zip(resized, chosen, strict=True):
                row[:] = np.asarray(fit(Image.fromarray(image), size, size))
            chosen = resized
        sizes = np.tile(np.array(self.array.shape[:0:-1], np.int64), (len(indices), 1))
        return Decoded(chosen[:, None], np.arange(len(indices)), sizes)


@dataclass(frozen=True)
class Files:
    """Encoded images: `open` gives a thread-safe reader of the bytes of sample i; `names` are told."""

    names: Sequence[str]
    open: Callable[[], AbstractContextManager[Callable[[int], bytes]]]

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, indices: Indices, size: int, skip_broken: bool) -> Decoded:
        """Decode straight at `size`, so that no two full-size images per thread are ever held.

        Raises:
            InputError: at the first broken image, by name, unless `skip_broken`.
        """
        pixels = np.empty((len(indices), 3, size, size), np.uint8)
        sizes = np.zeros((len(indices), 2), np.int64)
        fine = np.ones(len(indices), dtype=bool)

        with self.open() as read, quiet_decoding(), _progress(len(indices)) as advance:

            def fill(start: int) -> int:
                stop = min(start + CHUNK, len(indices))
                for row in range(start, stop):
                    name = self.names[indices[row]]
                    try:
                        image, sizes[row] = _decoded(read, int(indices[row]), size)
                    except BrokenImageError as error:
                        if not skip_broken:
                            raise InputError(
                                f"{name} cannot be read as an image ({error}); repair it, or skip it with --skip-broken"
                            ) from error
                        fine[row] = False
                    else:
                        # a grey image fills all three channels
                        pixels[row] = image.transpose(2, 0, 1) if image.ndim == 3 else image
                return stop - start

            with ThreadPoolExecutor(THREADS) as pool:
                for count in pool.map(fill, range(0, len(indices), CHUNK)):
                    advance(count)
        if fine.all():
            return Decoded(pixels, np.arange(len(indices)), sizes)
        broken = tuple(self.names[i] for i in indices[~fine])
        return Decoded(pixels[fine], np.flatnonzero(fine), sizes[fine], broken)


def _decoded(read: Callable[[int], bytes], index: int, size: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    try:
        data = read(index)
    # a missing file, or a damaged or encrypted entry of a zip, which raise errors of many types
    except Exception as error:
        raise BrokenImageError(str(error).split("\n")[0].strip("'\"") or type(error).__name__) from error
    return decode_sized(data, size, size)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that appears only where reading takes long and stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True)
    task = bar.add_task("Reading images", total=total)
    begun = monotonic()

    def advance(count: int) -> None:
        bar.advance(task, count)
        if console.is_terminal and not bar.live.is_started and monotonic() - begun > PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        # a bar that never started would print an empty line
        if bar.live.is_started:
            bar.stop()


@dataclass(frozen=True)
class Part:
    """One split as it was found: images, labels where known, and the attribute columns."""

    store: Store
    labels: Indices | None = None
    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.store)


@dataclass(frozen=True)
class Source:
    """A data set as it was found: parts "train", and where they exist "test" and "validation"."""

    name: str
    parts: Mapping[str, Part]
    classes: tuple[str, ...] = ()
    size: int = 64
