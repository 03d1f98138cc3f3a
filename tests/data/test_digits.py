import sys
from subprocess import run

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from otnn.data import load
from otnn.errors import InputError


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_test_split_is_scikit_learns_own() -> None:
    data = load("digits")
    bunch = load_digits()
    _, images, _, labels = train_test_split(
        bunch.images, bunch.target, test_size=0.2, stratify=bunch.target, random_state=0
    )
    assert torch.equal(data.test.labels, torch.from_numpy(labels))
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(images).float() / 16)
    assert data.classes == tuple("0123456789")
    assert data.train.images.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64
    assert data.skipped == ()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_splits_partition_the_digits(share: float) -> None:
    data = load("digits", validation_share=share)
    splits = [rows(split.images) for split in (data.train, data.validation, data.test)]
    # scikit-learn's digits hold no duplicates, so that sets of images count samples
    assert [len(split) for split in splits] == [len(data.train), len(data.validation), len(data.test)]
    assert len(set.union(*splits)) == 1797
    assert len(data.validation) == pytest.approx(share * 1437, abs=1)
    shares = torch.bincount(data.validation.labels).double() / len(data.validation)
    assert (shares - data.shares).abs().max() < 0.01
    assert data.shares.sum() == pytest.approx(1, abs=1e-12)


def test_validation_does_not_hear_the_training_seed() -> None:
    torch.manual_seed(1)
    first = load("digits").validation
    torch.manual_seed(2)
    assert torch.equal(first.images, load("digits").validation.images)


def test_classes_keep_their_order_and_the_test_split_stays_a_part() -> None:
    everything, pair = load("digits"), load("digits", classes=["8", "0"])
    assert pair.classes == ("8", "0")
    labels = everything.test.labels
    chosen = (labels == 8) | (labels == 0)
    assert torch.equal(pair.test.images, everything.test.images[chosen])
    assert torch.equal(pair.test.labels, (labels[chosen] == 0).long())
    fit = everything.train.labels.tolist() + everything.validation.labels.tolist()
    assert len(pair.train) + len(pair.validation) == fit.count(0) + fit.count(8)


def test_all_classes_in_another_order_keep_the_test_images() -> None:
    data = load("digits", classes=list("9876543210"))
    assert torch.equal(data.test.labels, 9 - load("digits").test.labels)


def test_resized_digits_stay_in_the_unit_interval() -> None:
    data, small = load("digits", size=16), load("digits")
    assert data.input_shape == (1, 16, 16)
    assert data.train.images.min() >= 0
    assert data.train.images.max() <= 1
    assert data.test.images.mean() == pytest.approx(small.test.images.mean().item(), abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["0", "ten"]}, r"^unknown class 'ten'; choose among 0, 1, 2, 3, 4, 5, 6, 7, 8, 9$"),
        ({"classes": ["0", "10"]}, r"unknown class '10'.*choose among 0, 1"),
        ({"classes": ["3", "3"]}, r"class '3' is given twice; name each class once, out of 0, 1"),
        ({"classes": ["3"]}, r"expected at least two classes, got 1; choose two or more out of 0, 1"),
        ({"classes": []}, r"expected at least two classes, got 0"),
        ({"classes": "08"}, r"expected a list of names, got the text '08'"),
        (
            {"classes": ["0", "8"], "target": "x"},
            r"either classes or a target, got both; leave out --classes",
        ),
        ({"target": "Eyeglasses"}, r"digits has no attribute 'Eyeglasses'; it has none, leave out --target"),
        ({"size": 3}, r"size: expected 4 to 512 pixels, got 3"),
        ({"size": 513}, r"size: expected 4 to 512 pixels, got 513"),
        ({"validation_share": 0.0}, r"validation_share: expected a share in \(0, 0.5\], got 0"),
        ({"validation_share": 0.6}, r"got 0.6"),
        ({"validation_share": float("nan")}, r"got nan"),
        ({"validation_share": 0.005}, r"too few to hold out a validation share of 0.005 of 1437"),
    ],
)
def test_bad_options_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load("digits", **options)  # type: ignore[arg-type]


def test_import_is_quick() -> None:
    code = "import sys, otnn.data; sys.exit(bool({'datasets', 'sklearn', 'pandas', 'rich'} & set(sys.modules)))"
    assert run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
