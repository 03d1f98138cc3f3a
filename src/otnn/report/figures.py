"""Images as data URIs: pictures, signed maps on a diverging scale, and sheets of the frames of a path."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Blue, white, orange: told apart by colour-blind readers, and by lightness from the middle outwards.
DIVERGING = ((11, 79, 138), (106, 174, 214), (255, 255, 255), (242, 163, 94), (168, 67, 0))
# Levels on each side of white. Few enough that maps of noise stay small, too many to see steps.
_LEVELS = 31
# Up to this height and width pictures are enlarged by whole factors and stored without loss.
_SMALL = 48
_ENLARGED = 64
_WEBP_QUALITY = 85


@dataclass(frozen=True)
class Sheet:
    """Frames of one size in one picture, row by row.

    Attributes:
        uri: the picture as a data URI.
        columns: frames per row.
        width: of the picture, in its pixels.
        height: likewise.
        frame_width: of one frame.
        frame_height: likewise.
    """

    uri: str
    columns: int
    width: int
    height: int
    frame_width: int
    frame_height: int

    def window(self, index: int) -> str:
        """The viewBox that shows one frame: each has a rim of one pixel, so that neighbours never shine through."""
        row, column = divmod(index, self.columns)
        x, y = column * (self.frame_width + 2) + 1, row * (self.frame_height + 2) + 1
        return f"{x} {y} {self.frame_width} {self.frame_height}"


def picture(image: NDArray[Any]) -> str:
    """A data URI of an image (channels, height, width) in [0, 1]; values outside are clipped."""
    return _encode(_pixels(image[None])[0])


def signed_picture(values: NDArray[Any], limit: float) -> str:
    """A data URI of a signed map (height, width): blue at -limit, white at 0, orange at limit."""
    return _encode(_levels(values[None], limit)[0], signed=True)


def sheet(frames: NDArray[Any]) -> Sheet:
    """A sheet of images (frames, channels, height, width) in [0, 1]; values outside are clipped."""
    return _sheet(_pixels(frames))


def signed_sheet(frames: NDArray[Any], limit: float) -> Sheet:
    """A sheet of signed maps (frames, height, width) on one scale."""
    return _sheet(_levels(frames, limit), signed=True)


def diverging(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The colours (..., 3) of values in [-1, 1].

    Example:
        >>> diverging(np.array([-1.0, 0.0, 1.0])).tolist()
        [[11, 79, 138], [255, 255, 255], [168, 67, 0]]
    """
    places = np.linspace(-1, 1, len(DIVERGING))
    channels = [np.interp(values, places, anchors) for anchors in zip(*DIVERGING, strict=True)]
    colours: NDArray[np.uint8] = np.stack(channels, axis=-1).round().astype(np.uint8)
    return colours


def _pixels(frames: NDArray[Any]) -> NDArray[np.uint8]:
    """Frames (n, c, h, w) in [0, 1] as bytes (n, h, w, 3), or (n, h, w) where there are not three channels."""
    shown = frames.transpose(0, 2, 3, 1) if frames.shape[1] == 3 else frames.mean(axis=1)
    pixels: NDArray[np.uint8] = (np.clip(shown, 0, 1) * 255).round().astype(np.uint8)
    return pixels


def _levels(frames: NDArray[Any], limit: float) -> NDArray[np.uint8]:
    """Signed maps as indices into the palette of 2 * 31 + 1 colours, white in the middle."""
    scaled = np.clip(frames / limit, -1, 1) if limit > 0 else np.zeros_like(frames)
    levels: NDArray[np.uint8] = ((scaled * _LEVELS).round() + _LEVELS).astype(np.uint8)
    return levels


def _sheet(frames: NDArray[np.uint8], *, signed: bool = False) -> Sheet:
    lossless = signed or max(frames.shape[1:3]) <= _SMALL
    frames = _enlarged(frames, axis=1)
    count, height, width = frames.shape[:3]
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    rim = [(0, rows * columns - count), (1, 1), (1, 1)] + [(0, 0)] * (frames.ndim - 3)
    cells = np.pad(frames, rim, mode="edge").reshape(rows, columns, height + 2, width + 2, *frames.shape[3:])
    page = cells.swapaxes(1, 2).reshape(rows * (height + 2), columns * (width + 2), *frames.shape[3:])
    uri = _write(page, signed=signed, lossless=lossless)
    return Sheet(uri, columns, page.shape[1], page.shape[0], width, height)


def _encode(pixels: NDArray[np.uint8], *, signed: bool = False) -> str:
    small = max(pixels.shape[:2]) <= _SMALL
    return _write(_enlarged(pixels, axis=0), signed=signed, lossless=signed or small)


def _enlarged(pixels: NDArray[np.uint8], axis: int) -> NDArray[np.uint8]:
    """Small pictures by a whole factor: sharp also where a viewer smooths what it enlarges, as in a PDF."""
    size = max(pixels.shape[axis : axis + 2])
    factor = -(-_ENLARGED // size) if size <= _SMALL else 1
    return pixels.repeat(factor, axis=axis).repeat(factor, axis=axis + 1)


def _write(pixels: NDArray[np.uint8], *, signed: bool, lossless: bool) -> str:
    from PIL import Image

    stream = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if signed:
        image.putpalette(diverging(np.linspace(-1, 1, 2 * _LEVELS + 1)).tobytes())
    if lossless:
        image.save(stream, format="png", optimize=True)
        kind = "png"
    else:
        image.save(stream, format="webp", quality=_WEBP_QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
