from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from otnn.data import load_images
from otnn.data.images import BrokenImageError, decode
from otnn.errors import InputError
from tests.data.image_makers import png, save


def encoded(image: Image.Image, path: Path, **options: object) -> bytes:
    image.save(path, **options)
    return path.read_bytes()


def test_a_plain_image_keeps_its_colour() -> None:
    assert (decode(png((10, 20, 30), (40, 20)), 8, 8) == [10, 20, 30]).all()


def test_three_stripes_keep_their_mean(tmp_path: Path) -> None:
    stripes = np.zeros((48, 48, 3), np.uint8)
    stripes[:16, :, 0], stripes[16:32, :, 1], stripes[32:, :, 2] = 255, 255, 255
    path = tmp_path / "stripes.png"
    Image.fromarray(stripes).save(path)
    images, names = load_images([path], (3, 12, 12))
    # a third of each channel; antialiasing mixes rows at the edges but keeps the sum up to 8-bit rounding
    assert images.mean(dim=(0, 2, 3)).numpy() == pytest.approx([1 / 3] * 3, abs=0.005)
    assert images[0, :, 0, 0].tolist() == [1, 0, 0]
    assert names == (str(path),)


def test_the_centre_is_cropped(tmp_path: Path) -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    assert (decode(encoded(Image.fromarray(wide), tmp_path / "a.png"), 10, 10) == 200).all()
    assert (decode(encoded(Image.fromarray(wide.T), tmp_path / "b.png"), 10, 10) == 200).all()
    assert decode(encoded(Image.fromarray(wide), tmp_path / "c.png"), 4, 12).shape == (4, 12)


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = decode(encoded(Image.fromarray(board), tmp_path / "a.png"), 8, 8)
    assert np.abs(small.astype(float) - 127.5).max() < 3


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    half = np.zeros((16, 16), np.uint8)
    half[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the top becomes the right
    turned = decode(encoded(Image.fromarray(half), tmp_path / "a.jpg", exif=exif, quality=100), 16, 16)
    assert turned[:, 10:].min() > 240
    assert turned[:, :6].max() < 15


def test_a_large_jpeg_gives_the_colour_of_a_small_one(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 1024).astype(np.uint8)[:, None], (1024, 1024))
    data = encoded(Image.fromarray(ramp), tmp_path / "a.jpg", quality=95)
    expected = (np.arange(16) + 0.5) * 255 / 16  # less up to 2.1 at the ends, where the triangle filter is cut
    assert decode(data, 16, 16).mean(axis=1) == pytest.approx(expected, abs=2.5)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (9, 9), 1), 255),
        (Image.new("L", (9, 9), 77), 77),
        (Image.new("LA", (9, 9), (0, 0)), [255] * 3),
        (Image.new("LA", (9, 9), (40, 255)), [40] * 3),
        (Image.new("RGBA", (9, 9), (255, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (9, 9), (255, 0, 0, 255)), [255, 0, 0]),
        (Image.new("RGB", (9, 9), (1, 2, 3)).quantize(4), [1, 2, 3]),
        (Image.fromarray(np.full((9, 9), 257 * 200, np.uint16)), 200),
        (Image.fromarray(np.full((9, 9), 65535, np.uint16)), 255),
    ],
    ids=["1", "L", "LA-clear", "LA", "RGBA-clear", "RGBA", "P", "I;16", "I;16-white"],
)
def test_every_mode_becomes_eight_bits(tmp_path: Path, image: Image.Image, expected: object) -> None:
    array = decode(encoded(image, tmp_path / "a.png"), 5, 5)
    assert array.dtype == np.uint8
    assert (array == expected).all()


def test_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    data = encoded(image, tmp_path / "a.png", transparency=bytes([255, 0]))
    assert (decode(data, 4, 4) == 255).all()


def test_cmyk_and_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    assert decode(encoded(Image.new("CMYK", (9, 9)), tmp_path / "a.jpg"), 4, 4).min() > 250
    frames = [Image.new("L", (9, 9), value) for value in (10, 200)]
    data = encoded(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (decode(data, 4, 4) == 10).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 3.0])
def test_floating_point_pixels_must_lie_in_the_unit_interval(tmp_path: Path, value: float) -> None:
    values = np.full((9, 9), 0.5, np.float32)
    data = encoded(Image.fromarray(values), tmp_path / "a.tif")
    assert (decode(data, 4, 4) == 128).all()
    values[3, 3] = value
    with pytest.raises(BrokenImageError, match=r"expected pixels in \[0, 1\], got"):
        decode(encoded(Image.fromarray(values), tmp_path / "b.tif"), 4, 4)


@pytest.mark.parametrize("data", [b"", b"not an image", png(0)[:40], b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_broken_bytes_raise_one_error(data: bytes) -> None:
    with pytest.raises(BrokenImageError):
        decode(data, 8, 8)


def test_files_take_the_channels_of_the_network(tmp_path: Path) -> None:
    red, grey = save(tmp_path / "red.png", (255, 0, 0)), save(tmp_path / "grey.png", 51, mode="L")
    images, names = load_images([red, grey], (1, 6, 6))
    assert images.shape == (2, 1, 6, 6)
    assert images.dtype == torch.float32
    assert images[:, 0, 0, 0].tolist() == pytest.approx([76 / 255, 0.2])
    assert names == (str(red), str(grey))
    images, _ = load_images([red, grey], (3, 6, 6))
    assert images[1].flatten(1).unique(dim=1).flatten().tolist() == pytest.approx([0.2] * 3)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    good, bad = save(tmp_path / "good.png", (1, 2, 3)), tmp_path / "bad.png"
    bad.write_bytes(b"junk")
    with pytest.raises(InputError, match=r"absent.png cannot be read as an image \(No such file"):
        load_images([good, tmp_path / "absent.png"], (3, 8, 8))
    with pytest.raises(InputError, match=r"bad.png cannot be read as an image \(no image format.*; repair it"):
        load_images([good, bad], (3, 8, 8))
    with pytest.raises(InputError, match=r"cannot be read as an image \(Is a directory"):
        load_images([tmp_path], (3, 8, 8))
    assert load_images([bad, good], (3, 8, 8), skip_broken=True)[1] == (str(good),)
    with pytest.raises(InputError, match="none of the 1 files can be read"):
        load_images([bad], (3, 8, 8), skip_broken=True)
    with pytest.raises(InputError, match="at least one image file, got none"):
        load_images([], (3, 8, 8))
    with pytest.raises(InputError, match=r"1 or 3 channels .* got 2"):
        load_images([good], (2, 8, 8))
