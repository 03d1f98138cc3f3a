"""One image file to one array: upright, eight bits, cropped to the centre, resized with antialiasing."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from otnn.errors import InputError

Bytes = NDArray[np.uint8]
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class BrokenImageError(Exception):
    """An image that cannot be decoded; the message says why."""


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Silence Pillow's warnings (odd EXIF, very large pictures): what cannot be decoded raises anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(data: bytes, height: int, width: int) -> Bytes:
    """Encoded image to (height, width) grey or (height, width, 3) RGB, uint8.

    EXIF orientation is applied, transparency lies on white, 16-bit grey is scaled to 8 bits, and of an
    animation the first frame counts.

    Raises:
        BrokenImageError: where the bytes hold no such image.
    """
    return decode_sized(data, height, width)[0]


def decode_sized(data: bytes, height: int, width: int) -> tuple[Bytes, tuple[int, int]]:
    """As `decode`, with the (width, height) that the upright picture had before it was cropped and resized."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            wide, high = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
            # JPEG decodes at a fraction of its size; twice the target leaves the resize its antialiasing
            image.draft(None, (2 * max(height, width),) * 2)
            upright = ImageOps.exif_transpose(image)
            return np.asarray(fit(_plain(upright), height, width)), (high, wide) if turned else (wide, high)
    except BrokenImageError:
        raise
    except MemoryError as error:
        raise BrokenImageError("too large for the memory") from error
    # on malformed bytes Pillow's decoders raise a dozen types of errors, SyntaxError among them
    except Exception as error:
        if isinstance(error, UnidentifiedImageError):
            raise BrokenImageError("no image format that Pillow knows") from error
        raise BrokenImageError(str(error).split("\n")[0] or type(error).__name__) from error


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop to the centre with the aspect of (height, width), then resize; weighted means never overshoot."""
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def _plain(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit L or RGB."""
    if image.mode in WIDE_MODES:
        values = np.asarray(image, dtype=np.float64)
        top = 1.0 if image.mode == "F" else 65535.0
        # the negated form also catches NaN
        if not (values.min() >= 0 and values.max() <= top):
            raise BrokenImageError(f"expected pixels in [0, {top:g}], got [{values.min():g}, {values.max():g}]")
        return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def load_images(
    paths: Sequence[Path], shape: tuple[int, int, int], *, skip_broken: bool = False
) -> tuple[Tensor, tuple[str, ...]]:
    """Image files prepared as by `load`: float32 (n, channels, height, width) in [0, 1]; and their paths.

    Args:
        paths: image files of any size and mode.
        shape: (channels, height, width) with 1 (grey) or 3 (RGB) channels.
        skip_broken: leave out files that cannot be read, instead of refusing.

    Raises:
        InputError: where a file is missing or broken, or none is left.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise InputError(f"expected a network of 1 or 3 channels to give it image files, got {channels} channels")
    if not paths:
        raise InputError("expected at least one image file, got none; name one")
    arrays, names = [], []
    for path in map(Path, paths):
        try:
            array = _read(path, height, width)
        except BrokenImageError as error:
            if skip_broken:
                continue
            raise InputError(f"{path} cannot be read as an image ({error}); repair it or leave it out") from error
        image = Image.fromarray(array).convert("L" if channels == 1 else "RGB")
        arrays.append(np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1))
        names.append(str(path))
    if not arrays:
        raise InputError(f"none of the {len(paths)} files can be read as an image; name a PNG or JPEG file")
    return torch.from_numpy(np.stack(arrays)).float().div_(255), tuple(names)


def _read(path: Path, height: int, width: int) -> Bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BrokenImageError(error.strerror or type(error).__name__) from error
    with quiet_decoding():
        return decode(data, height, width)
