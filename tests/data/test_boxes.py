"""Bounding boxes: columns of the metadata that follow their images through every cut, crop and resize."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from otnn.data import Split, load
from otnn.data.boxes import fit_boxes
from otnn.errors import InputError
from otnn.metrics import box_regions
from tests.data.image_makers import make_zip, png, table

Row = dict[str, object]
BOX = ("x0", "y0", "x1", "y1")


def painted(box: tuple[int, int, int, int], size: tuple[int, int], **options: object) -> bytes:
    """A black PNG whose box, the last pixel inside, is white."""
    width, height = size
    array = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    array[y0 : y1 + 1, x0 : x1 + 1] = 255
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png", **options)
    return stream.getvalue()


def painted_zip(path: Path, split: str, boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> Path:
    images = {f"s/{split}/{i:02}.png": painted(box, size) for i, box in enumerate(boxes)}
    rows: list[Row] = [
        {"file_name": f"{i:02}.png", "label": i % 3} | dict(zip(BOX, box, strict=True)) for i, box in enumerate(boxes)
    ]
    return make_zip(path, images | {f"s/{split}/metadata.csv": table(rows[::-1])})


def white(split: Split) -> torch.Tensor:
    """Where the images are white."""
    return split.images.mean(dim=1) > 0.5


def some_boxes(count: int, side: int, step: int) -> list[tuple[int, int, int, int]]:
    rng = np.random.default_rng(0)
    low = rng.integers(0, side // 2 // step, (count, 2)) * step
    high = rng.integers(side // 2 // step + 1, side // step + 1, (count, 2)) * step - 1
    return [tuple(map(int, row)) for row in np.hstack([low, high])]


@pytest.mark.parametrize("size", [16, 8])
def test_boxes_are_where_the_object_is_in_every_split(tmp_path: Path, size: int) -> None:
    painted_zip(tmp_path / "s-train.zip", "train", some_boxes(60, 16, 2), (16, 16))
    painted_zip(tmp_path / "s-test.zip", "test", some_boxes(30, 16, 2)[15:], (16, 16))
    data = load(str(tmp_path), size=size, classes=["2", "0"])
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 10)
    for split in (data.train, data.validation, data.test):
        assert split.boxes is not None
        assert split.boxes.dtype == torch.int64
        assert torch.equal(box_regions(split.boxes, (size, size)), white(split))
    assert len(torch.unique(data.train.boxes, dim=0)) > 10


def test_the_test_fifth_and_skipped_images_keep_the_boxes_in_step(tmp_path: Path) -> None:
    boxes = some_boxes(60, 12, 1)
    path = painted_zip(tmp_path / "s.zip", "train", boxes, (12, 12))
    with ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    make_zip(path, members | {"s/train/07.png": b"broken"})
    data = load(str(path), size=12, skip_broken=True)
    assert data.skipped == ("s.zip/s/train/07.png",)
    found = []
    for split in (data.train, data.validation, data.test):
        assert split.boxes is not None
        assert torch.equal(box_regions(split.boxes, (12, 12)), white(split))
        found += (split.boxes - torch.tensor([0, 0, 1, 1])).tolist()
    assert sorted(found) == sorted(list(box) for k, box in enumerate(boxes) if k != 7)


def test_boxes_follow_the_crop_and_the_orientation(tmp_path: Path) -> None:
    """20 x 10 pixels, cropped to the ten in the middle; the last file lies on its side (EXIF 6)."""
    boxes = [(5, 0, 14, 9), (0, 2, 9, 5), (15, 0, 19, 9), (8, 3, 16, 4)]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the upright picture is 20 wide
    upright = np.zeros((10, 20, 3), np.uint8)
    upright[3:5, 8:17] = 255
    stream = io.BytesIO()
    Image.fromarray(np.rot90(upright)).save(stream, "png", exif=exif)
    images = {f"{k}.png": painted(box, (20, 10)) for k, box in enumerate(boxes[:3])} | {"3.png": stream.getvalue()}
    rows: list[Row] = [
        {"file_name": f"{k}.png", "label": k % 2} | dict(zip(BOX, box, strict=True)) for k, box in enumerate(boxes)
    ]
    for split in ("train", "test"):
        copies = {f"{copy}-{name}": data for copy in range(6) for name, data in images.items()}
        listed = [row | {"file_name": f"{copy}-{row['file_name']}"} for copy in range(6) for row in rows]
        make_zip(tmp_path / f"s-{split}.zip", copies | {"metadata.csv": table(listed)})
    test = load(str(tmp_path), size=10).test
    assert test.boxes is not None
    assert test.boxes[:4].tolist() == [[0, 0, 10, 10], [0, 2, 5, 6], [0, 0, 0, 0], [3, 3, 10, 5]]
    assert torch.equal(box_regions(test.boxes, (10, 10)), white(test))


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(4, 40), st.integers(4, 40), st.integers(4, 32))
def test_a_fitted_box_is_within_half_a_pixel_of_the_true_one(
    data: st.DataObject, width: int, height: int, side: int
) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    fitted = fit_boxes(np.array([[left, top, right, bottom]], float), np.array([[width, height]]), side)[0]
    scale = min(width, height) / side
    true = [
        min(max((end - (extent - scale * side) / 2) / scale, 0), side)
        for end, extent in ((left, width), (top, height), (right, width), (bottom, height))
    ]
    if true[0] >= true[2] or true[1] >= true[3]:
        assert fitted.tolist() == [0, 0, 0, 0]
        return
    for begin, end, low, high in ((fitted[0], fitted[2], true[0], true[2]), (fitted[1], fitted[3], true[1], true[3])):
        assert 0 <= begin < end <= side
        # rounded to the nearest border, or one pixel that overlaps the box
        nearest = max(abs(begin - low), abs(end - high)) <= 0.5 + 1e-9
        assert nearest or (end - begin == 1 and high - low < 1 and begin < high and low < end)


def test_empty_cells_are_no_box_and_other_columns_none_at_all(tmp_path: Path) -> None:
    def boxes_of(*rows: Row) -> list[list[int]] | None:
        images = {f"{k:02}.png": png(k, (6, 6), "L") for k in range(24)}
        listed = [{"file_name": f"{k:02}.png", "label": k % 2} | rows[k % len(rows)] for k in range(24)]
        for split in ("train", "test"):
            make_zip(tmp_path / f"s-{split}.zip", images | {"metadata.csv": table(listed)})
        data = load(str(tmp_path), size=6)
        assert (data.train.boxes is None) == (data.test.boxes is None)
        return None if data.test.boxes is None else data.test.boxes.tolist()

    full, empty = {"x0": 1, "y0": 2, "x1": 3, "y1": 5}, dict.fromkeys(BOX, "")
    assert boxes_of(full) == [[1, 2, 4, 6]] * 24
    assert boxes_of(full, full, empty) == [[1, 2, 4, 6], [1, 2, 4, 6], [0, 0, 0, 0]] * 8
    assert boxes_of(empty) is None
    assert boxes_of({"x0": 1, "y0": 2, "x1": 3}) is None
    assert boxes_of({"x": 1}) is None


@pytest.mark.parametrize(
    ("box", "shown"),
    [
        ((0, 0, 6, 5), "0, 0, 6, 5"),  # the end is inside, so that a picture of 6 pixels ends at 5
        ((0, 0, 5, 6), "0, 0, 5, 6"),
        ((4, 0, 3, 5), "4, 0, 3, 5"),
        ((0, 4, 5, 3), "0, 4, 5, 3"),
        ((-1, 0, 5, 5), "-1, 0, 5, 5"),
        (("", 0, 5, 5), "nan, 0, 5, 5"),
        (("left", 0, 5, 5), "left, 0, 5, 5"),
    ],
)
def test_wrong_boxes_are_told(tmp_path: Path, box: tuple[object, ...], shown: str) -> None:
    images = {f"{k:02}.png": png(k, (6, 6), "L") for k in range(24)}
    good = (0, 0, 5, 5)
    rows: list[Row] = [
        {"file_name": f"{k:02}.png", "label": k % 2} | dict(zip(BOX, box if k == 9 else good, strict=True))
        for k in range(24)
    ]
    make_zip(tmp_path / "s.zip", images | {"metadata.csv": table(rows)})
    text = (
        r"^s.zip/09.png: expected a box with 0 <= x0 <= x1 <= 5 and 0 <= y0 <= y1 <= 5, the first and last pixel "
        rf"inside, got x0, y0, x1, y1 = (None|{shown})(\.0)?.*; correct the row, or rename the four columns"
    )
    with pytest.raises(InputError, match=text):
        load(str(tmp_path / "s.zip"), size=6)


def test_data_without_metadata_have_no_boxes() -> None:
    data = load("digits")
    assert data.train.boxes is data.validation.boxes is data.test.boxes is None


def test_tiny_imagenet(real: Callable[[str], Path]) -> None:
    """The ends are inside: no file says 64, and the median area is the .61 that comes with the data only so."""
    folder = real("tinyimagenet10")
    data = load("tinyimagenet10", data_dir=folder, size=64)
    with ZipFile(folder / "tinyimagenet10" / "tinyimagenet10-val.zip") as archive:
        (name,) = (member for member in archive.namelist() if member.endswith("metadata.csv"))
        rows = list(csv.DictReader(io.StringIO(archive.read(name).decode())))
    listed = sorted([int(row["x0"]), int(row["y0"]), int(row["x1"]) + 1, int(row["y1"]) + 1] for row in rows)
    assert data.test.boxes is not None
    assert data.train.boxes is not None
    assert sorted(data.test.boxes.tolist()) == listed
    area = box_regions(data.train.boxes, (64, 64)).flatten(1).double().mean(dim=1)
    assert float(area.median()) == pytest.approx(0.61, abs=0.005)
