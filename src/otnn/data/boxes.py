"""One bounding box per image: columns x0, y0, x1, y1 of the metadata, moved to the images as they are loaded.

x0, y0 is the first and x1, y1 the last pixel inside, counted from 0, as in Tiny-ImageNet, whose widest boxes are 0, 63.
"""

import math

import numpy as np
from numpy.typing import NDArray

from otnn.data.columns import is_missing
from otnn.data.splits import Indices
from otnn.data.stores import Files, Part
from otnn.errors import InputError

BOX_COLUMNS = ("x0", "y0", "x1", "y1")
_MEND = "correct the row, or rename the four columns if they are no boxes"


def read_boxes(part: Part, rows: Indices, sizes: Indices, size: int) -> Indices | None:
    """Boxes (n, 4) of the samples at `rows`, cropped and resized as the images are; None where no image has one.

    Left, top, right, bottom in pixels, right and bottom outside, each side rounded to the nearest pixel border, and
    never narrower than a pixel. Four zeros where the cells are empty, or where the crop has left nothing of the box.

    Args:
        part: the split as it was found.
        rows: (n,) samples of it.
        sizes: (n, 2) width and height of their files.
        size: the images become size x size.

    Raises:
        InputError: a cell that is no number, a box that is half empty, inside out or beyond its image.
    """
    if not all(name in part.columns for name in BOX_COLUMNS):
        return None
    cells = [[part.columns[name][row] for name in BOX_COLUMNS] for row in rows]
    found = np.flatnonzero([not all(map(is_missing, cell)) for cell in cells])
    if len(found) == 0:
        return None
    inside = np.array([[_number(cell) for cell in cells[k]] for k in found])
    first, last, limit = inside[:, :2], inside[:, 2:], sizes[found] - 1
    # the negated form also catches NaN
    wrong = np.flatnonzero(~((first >= 0) & (first <= last) & (last <= limit)).all(axis=1))
    if len(wrong):
        bad = found[wrong[0]]
        name = part.store.names[rows[bad]] if isinstance(part.store, Files) else f"image {rows[bad]}"
        right, bottom = limit[wrong[0]]
        raise InputError(
            f"{name}: expected a box with 0 <= x0 <= x1 <= {right} and 0 <= y0 <= y1 <= {bottom}, the first and last "
            f"pixel inside, got x0, y0, x1, y1 = {', '.join(map(str, cells[bad]))}; {_MEND}"
        )
    boxes = np.zeros((len(rows), 4), np.int64)
    boxes[found] = fit_boxes(np.hstack([first, last + 1]), sizes[found], size)
    return boxes


def _number(cell: object) -> float:
    try:
        return float(str(cell))
    except ValueError:
        return math.nan


def fit_boxes(boxes: NDArray[np.float64], sizes: Indices, side: int) -> Indices:
    """Boxes (n, 4) of images of `sizes` (n, 2), right and bottom outside, on the square images that `load` makes.

    Example:
        >>> fit_boxes(np.array([[0.0, 2.0, 10.0, 4.0]]), np.array([[20, 20]]), 10)
        array([[0, 1, 5, 2]])
    """
    scale = sizes.min(axis=1) / side
    # the corner of the crop, as in `otnn.data.images.fit`
    corner = (sizes - scale[:, None] * side) / 2
    ends = (boxes.reshape(-1, 2, 2) - corner[:, None]) / scale[:, None, None]
    first, last = np.moveaxis(ends.clip(0, side), 1, 0)
    begin, end = np.floor(first + 0.5), np.floor(last + 0.5)
    begin = np.where(begin < end, begin, np.floor((first + last) / 2))  # less than a pixel: the one it lies in
    fitted = np.hstack([begin, np.maximum(end, begin + 1)])
    gone = (first >= last).any(axis=1)
    return np.where(gone[:, None], 0, fitted).astype(np.int64)
