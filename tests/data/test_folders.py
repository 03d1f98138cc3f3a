import zipfile
from pathlib import Path

import pytest
import torch
from sklearn.model_selection import train_test_split

from otnn.data import load
from otnn.errors import InputError
from tests.data.image_makers import make_folder, make_zip, png, save, table


def colours(images: torch.Tensor) -> list[tuple[int, ...]]:
    """The 8-bit colour of each plain image."""
    return [tuple((image[:, 0, 0] * 255).round().int().tolist()) for image in images]


def test_flat_class_folders_get_a_fixed_test_fifth(tmp_path: Path) -> None:
    data = load(str(make_folder(tmp_path / "pets", {"cats": 30, "dogs": 20})), size=8)
    labels = [0] * 30 + [1] * 20
    _, expected = train_test_split(range(50), test_size=0.2, stratify=labels, random_state=0)
    plain = [(10 * (i >= 30), i - 30 * (i >= 30), 200) for i in range(50)]
    assert colours(data.test.images) == [plain[i] for i in expected]
    assert data.test.labels.tolist() == [labels[i] for i in expected]
    assert (data.name, data.classes, data.input_shape) == ("pets", ("cats", "dogs"), (3, 8, 8))
    splits = [set(colours(split.images)) for split in (data.train, data.validation, data.test)]
    assert [len(split) for split in splits] == [36, 4, 10]
    assert set.union(*splits) == set(plain)
    assert data.shares.tolist() == pytest.approx([0.6, 0.4], abs=0.02)


@pytest.mark.parametrize("held", ["test", "val", "Validation"])
def test_split_folders(tmp_path: Path, held: str) -> None:
    root = make_folder(tmp_path, {"a": 20, "b": 20}, "train")
    make_folder(root, {"a": 2, "b": 3}, held)
    data = load(str(root), size=8, classes=["b", "a"])
    assert data.test.labels.tolist() == [1, 1, 0, 0, 0]
    assert colours(data.test.images) == [(0, 0, 200), (0, 1, 200), (10, 0, 200), (10, 1, 200), (10, 2, 200)]
    assert (len(data.train), len(data.validation)) == (36, 4)


def test_train_val_and_test_folders_are_used_as_they_are(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        make_folder(tmp_path, {"a": count, "b": count}, split)
    data = load(str(tmp_path), size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 6, 4)


def test_named_folder_in_the_data_folder_and_default_size(tmp_path: Path) -> None:
    make_folder(tmp_path / "sets" / "mine", {"a": 12, "b": 12})
    assert load("mine", data_dir=tmp_path / "sets").input_shape == (3, 64, 64)


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    for k in (0, 1):
        for i in range(12):
            save(tmp_path / str(k) / f"{i}.png", 10 * i, mode="L")
    save(tmp_path / "0" / "rgb-but-grey.png", (5, 5, 5))
    assert load(str(tmp_path), size=8).input_shape == (1, 8, 8)
    save(tmp_path / "0" / "colour.png", (5, 5, 6))
    data = load(str(tmp_path), size=8)
    assert data.input_shape == (3, 8, 8)
    assert sum(colour == (50, 50, 50) for colour in colours(data.train.images)) >= 1


def test_hidden_files_and_others_are_passed_over(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 12, "b": 12})
    (tmp_path / "a" / "._000.png").write_bytes(b"resource fork")
    (tmp_path / "README.txt").write_text("hello")
    make_folder(tmp_path / "__MACOSX", {"a": 1})
    data = load(str(tmp_path), size=8)
    assert len(data.train) + len(data.validation) + len(data.test) == 24


def zip_members(split: str, count: int, prefix: str = "set") -> dict[str, bytes]:
    return {
        f"{prefix}/{split}/{name}/{i}.png": png((10 * k, i, 200))
        for k, name in enumerate(("ants", "bees"))
        for i in range(count)
    }


def test_zips_without_metadata_take_the_class_from_the_path(tmp_path: Path) -> None:
    make_zip(tmp_path / "x-train.zip", zip_members("train", 20))
    make_zip(tmp_path / "x-test.zip", zip_members("test", 4))
    data = load(str(tmp_path), size=8)
    assert data.classes == ("ants", "bees")
    for split in (data.train, data.validation, data.test):
        assert [red // 10 for red, _, _ in colours(split.images)] == split.labels.tolist()
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 8)


def test_a_single_zip_with_and_without_splits(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "both.zip", zip_members("train", 20) | zip_members("test", 4))
    assert len(load(str(path), size=8).test) == 8
    assert len(load(str(tmp_path), size=8).test) == 8
    flat = make_zip(tmp_path / "flat.zip", {n.replace("/train", ""): b for n, b in zip_members("train", 20).items()})
    data = load(str(flat), size=8)
    assert (data.classes, len(data.test)) == (("ants", "bees"), 8)


def metadata_zip(path: Path, split: str, count: int) -> Path:
    """Flat images with metadata in an order other than the names'; the class is not in the path."""
    rows = [
        {
            "file_name": f"{i:02}.png",
            "label": i % 2,
            "class": ("zebra", "ape")[i % 2],
            "even": 1 - i % 2,
            "sign": 2 * (i % 3 == 0) - 1,
            "flag": i % 4 == 0,
            "weight": i,
        }
        for i in reversed(range(count))
    ]
    images = {f"s/{split}/{i:02}.png": png((10 * (i % 2), i, 200)) for i in range(count)}
    return make_zip(path, images | {f"s/{split}/metadata.csv": table(rows)})


def test_metadata_names_the_classes(tmp_path: Path) -> None:
    folder = tmp_path / "odd [1] name"
    metadata_zip(folder / "s-train.zip", "train", 40)
    metadata_zip(folder / "s-val.zip", "val", 10)
    data = load(str(folder), size=8)
    assert data.classes == ("zebra", "ape")
    assert [red // 10 for red, _, _ in colours(data.train.images)] == data.train.labels.tolist()
    assert [green for _, green, _ in colours(data.test.images)] == list(range(10))


@pytest.mark.parametrize(
    ("target", "positive"),
    [("even", lambda i: i % 2 == 0), ("sign", lambda i: i % 3 == 0), ("flag", lambda i: i % 4 == 0)],
)
def test_targets_are_binary_attributes(tmp_path: Path, target: str, positive: object) -> None:
    metadata_zip(tmp_path / "s-train.zip", "train", 60)
    metadata_zip(tmp_path / "s-test.zip", "test", 12)
    data = load(str(tmp_path), size=8, target=target)
    assert data.classes == (f"no {target}", target)
    assert data.test.labels.tolist() == [int(positive(i)) for i in range(12)]  # type: ignore[operator]


def test_bad_targets_are_told(tmp_path: Path) -> None:
    metadata_zip(tmp_path / "s-train.zip", "train", 40)
    metadata_zip(tmp_path / "s-test.zip", "test", 12)
    with pytest.raises(InputError, match=r"no attribute 'evn' \(did you mean 'even'\?\); there are even, sign, flag$"):
        load(str(tmp_path), target="evn")
    with pytest.raises(InputError, match=r"'weight': expected only 0/1, -1/1 or true/false, got values such as 0, 1,"):
        load(str(tmp_path), target="weight")


def test_without_classes_a_target_is_asked_for(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png"} | {f"a{k}": i % 2 for k in range(15)} for i in range(6)]
    make_zip(tmp_path / "s.zip", {f"{i}.png": png(i, mode="L") for i in range(6)} | {"metadata.csv": table(rows)})
    with pytest.raises(InputError, match=r"15 attributes; pick one with --target: a0, a1, .* and 3 more$"):
        load(str(tmp_path))


def test_metadata_in_folders(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("test", 4)):
        root = tmp_path / split
        for i in range(count):
            save(root / f"{i:02}.png", (10 * (i % 2), i, 200))
        rows = [{"file_name": f"{i:02}.png", "label": ("no", "yes")[i % 2]} for i in range(count)]
        (root / "metadata.csv").write_text(table(rows))
    data = load(str(tmp_path), size=8)
    assert data.classes == ("no", "yes")
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    assert [red // 10 for red, _, _ in colours(data.train.images)] == data.train.labels.tolist()


def test_bad_metadata_is_told(tmp_path: Path) -> None:
    images = {f"{i}.png": png(i, mode="L") for i in range(6)}

    def refuse(rows: list[dict[str, object]], message: str, **options: object) -> None:
        path = make_zip(tmp_path / "s.zip", images | {"metadata.csv": table(rows)})
        with pytest.raises(InputError, match=message):
            load(str(path), **options)  # type: ignore[arg-type]

    good: list[dict[str, object]] = [{"file_name": f"{i}.png", "label": i % 2, "x": i % 2} for i in range(6)]
    refuse(
        [{"name": "0.png", "label": 1}],
        r"the metadata cannot be read .*expected a table with a column file_name",
    )
    refuse([*good, good[0]], r"the metadata list 0.png twice")
    refuse([*good[:5], {**good[5], "label": ""}], r"column 'label' is empty for 5.png")
    refuse([*good[:5], {**good[5], "label": -1}], r"expected a class name or an integer from 0, got -1 for 5.png")
    refuse([*good[:5], {**good[5], "label": 0.5}], r"got 0.5 for 5.png")
    refuse([*good[:5], {**good[5], "x": ""}], r"attribute 'x' is empty for 1 of 6 images", target="x")
    refuse([{**row, "x": 0} for row in good], r"class 'x' has 0 samples", target="x")
    refuse([*good, {**good[0], "file_name": "../../secret.png"}], r"the metadata cannot be read")
    absent = [{**row, "file_name": f"{k}{row['file_name']}"} for k in ("", "no-") for row in good]
    refuse(absent, r"s.zip/no-\d.png cannot be read as an image \(There is no item", size=8)


def test_a_broken_image_is_named_and_skipped_only_on_request(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", {"a": 30, "b": 30})
    (tmp_path / "set" / "b" / "007.png").write_bytes(png(0)[:40])
    with pytest.raises(InputError, match=r"^set/b/007.png cannot be read as an image \(.*skip it with --skip-broken$"):
        load(str(tmp_path / "set"), size=8)
    data = load(str(tmp_path / "set"), size=8, skip_broken=True)
    assert data.skipped == ("set/b/007.png",)
    assert len(data.train) + len(data.validation) + len(data.test) == 59
    for split in (data.train, data.validation, data.test):
        assert [red // 10 for red, _, _ in colours(split.images)] == split.labels.tolist()


def test_a_damaged_entry_of_a_zip_is_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "s.zip", zip_members("train", 20))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("set/train/bees/3.png")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 60] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"^s.zip/set/train/bees/3.png cannot be read as an image \(Bad CRC"):
        load(str(path), size=8)
    assert load(str(path), size=8, skip_broken=True).skipped == ("s.zip/set/train/bees/3.png",)


def test_all_images_of_a_class_broken(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 12, "b": 12})
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(InputError, match="every class in the train split, found none of b"):
        load(str(tmp_path), size=8, skip_broken=True)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    def refuse(root: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load(str(root), size=8)

    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"expected images \(bmp, .*webp\), found none")
    refuse(make_folder(tmp_path / "one", {"a": 9}), "put the images of each class into a folder of their own")
    refuse(make_folder(tmp_path / "one-class", {"a": 9}, "train"), "at least two classes, got only a")
    refuse(
        make_folder(tmp_path / "few", {"a": 1, "b": 9}),
        r"class 'a' has 1 samples to split.*test share of 0.2 of 10",
    )
    refuse(
        make_folder(tmp_path / "untrained", {"a": 9, "b": 9}, "test"),
        "expected a train split, found only test",
    )
    mixed = make_folder(tmp_path / "mixed", {"a": 9, "b": 9})
    save(mixed / "stray.png", 0, mode="L")
    refuse(mixed, "stray.png: expected every image in a class folder")
    both = make_folder(make_folder(tmp_path / "both", {"a": 9, "b": 9}, "train"), {"a": 9, "b": 9}, "test")
    make_folder(both, {"a": 2}, "extra")
    refuse(both, "extra/a/000.png lies outside the train and test folders")
    missing = make_folder(make_folder(tmp_path / "missing", {"a": 20, "b": 20}, "train"), {"a": 9}, "test")
    refuse(missing, "every class in the test split, found none of b")
    (tmp_path / "bad.zip").write_bytes(b"PK nothing")
    refuse(tmp_path / "bad.zip", "bad.zip cannot be read as a zip")
    (tmp_path / "a.txt").write_text("x")
    refuse(tmp_path / "a.txt", "expected a folder or a zip of images")
    for name in ("one.zip", "two.zip"):
        make_zip(tmp_path / "pair" / name, zip_members("train", 2))
    refuse(tmp_path / "pair", r"expected one zip, or one each named .* got one.zip, two.zip")


def test_class_folders_named_like_a_split_are_classes(tmp_path: Path) -> None:
    data = load(str(make_folder(tmp_path, {"car": 12, "train": 12})), size=8)
    assert data.classes == ("car", "train")
