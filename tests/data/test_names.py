import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch

from otnn.data import load
from otnn.errors import InputError
from tests.data.image_makers import png


@pytest.fixture
def _unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)


def test_unknown_names_list_the_known_ones() -> None:
    for name in ("imagenet", "", "./digits", "no/such/path", "set.zip", "a/b.zip"):
        with pytest.raises(InputError, match=r"expected digits, mnist, fashion-mnist, celeba10k.*--data-dir"):
            load(name)


def test_folder_sets_ask_for_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="but OTNN_DATA_DIR is not set; give the folder that holds it with --data-dir"):
        load("celeba10k")
    with pytest.raises(InputError, match="has no folder catdog; give the folder"):
        load("catdog", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"--data-dir: expected a folder that holds the data sets, got .*absent"):
        load("mnist", data_dir=tmp_path / "absent")
    monkeypatch.setenv("OTNN_DATA_DIR", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="OTNN_DATA_DIR: expected a folder"):
        load("mnist")
    assert load("digits").name == "digits"


@pytest.mark.usefixtures("_unreachable")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "nobody/nothing-otnn"])
def test_without_a_network_the_answer_is_quick(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    begun = time.monotonic()
    with pytest.raises(InputError, match="the Hugging Face Hub cannot be reached; connect to the network, or put"):
        load(name)
    assert time.monotonic() - begun < 10
    assert not datasets.config.HF_HUB_OFFLINE
    assert datasets.is_progress_bar_enabled()


def hub_set(count: int, **columns: Any) -> datasets.Dataset:
    images = [{"bytes": png(i, (28, 28), "L"), "path": None} for i in range(count)]
    features = {"image": datasets.Image(), **{name: feature for name, (feature, _) in columns.items()}}
    values = {name: list(values) for name, (_, values) in columns.items()}
    return datasets.Dataset.from_dict({"image": images, **values}, features=datasets.Features(features))


def serve(monkeypatch: pytest.MonkeyPatch, splits: dict[str, datasets.Dataset]) -> list[str]:
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or splits)
    return asked


def test_fashion_mnist_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    label = datasets.ClassLabel(names=[f"other {k}" for k in range(10)])
    splits = {
        "train": hub_set(100, label=(label, np.arange(100) % 10)),
        "test": hub_set(20, label=(label, np.arange(20) % 10)),
    }
    asked = serve(monkeypatch, splits)
    data = load("fashion-mnist")
    assert asked == ["zalando-datasets/fashion_mnist"]
    assert data.classes[:2] == ("T-shirt/top", "Trouser")
    assert (data.name, data.input_shape) == ("fashion-mnist", (1, 28, 28))
    assert data.test.labels.tolist() == [*range(10)] * 2
    assert torch.equal(data.test.images[:, 0, 5, 5], torch.arange(20) / 255)


def test_attributes_and_three_splits_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = datasets.Value("bool")
    splits = {
        name: hub_set(count, Smiling=(flag, np.arange(count) % 2 == 1))
        for name, count in (("train", 30), ("valid", 8), ("test", 6))
    }
    serve(monkeypatch, splits)
    data = load("org/faces", target="Smiling", size=8)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 8, 6)
    assert data.test.labels.tolist() == [0, 1] * 3
    with pytest.raises(InputError, match="org/faces has no classes but 1 attributes; pick one with --target: Smiling"):
        load("org/faces")


def test_hub_sets_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    label = datasets.ClassLabel(names=["a", "b"])
    serve(
        monkeypatch,
        {"train": hub_set(20, label=(label, [0, 1] * 10)), "test": hub_set(2, label=(label, [-1, -1]))},
    )
    with pytest.raises(InputError, match=r"org/x/test/0: expected a label in 0..1, got -1"):
        load("org/x")
    serve(monkeypatch, {"train": datasets.Dataset.from_dict({"text": ["a"]})})
    with pytest.raises(InputError, match="org/x: expected a column of images, got text"):
        load("org/x")
    serve(monkeypatch, {"all": hub_set(2)})
    with pytest.raises(InputError, match="org/x: expected a split train, got all"):
        load("org/x")


def test_a_name_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(huggingface_hub.errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def refuse(*args: object, **kwargs: object) -> None:
        raise Absent

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(InputError, match="nobody/nothing: no such data set on the Hugging Face Hub"):
        load("nobody/nothing")
