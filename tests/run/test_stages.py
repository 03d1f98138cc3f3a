import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from otnn.certify import certify
from otnn.errors import InputError
from otnn.run import config
from otnn.run.certify import certify_run
from otnn.run.explain import choose_gallery, class_index, explain_files, explain_gallery
from otnn.run.folder import Run
from otnn.run.train import dataset_of, fingerprint, load_dataset, train


def test_certify_writes_the_same_figures_everywhere(run: Run) -> None:
    figures = certify_run(run)
    arrays = np.load(run.path / "certificates.npz", allow_pickle=False)
    right = arrays["label"] == arrays["prediction"]
    for radius, share in figures["certified_accuracy"].items():
        assert share == pytest.approx((right & (arrays["radius"] >= float(radius))).mean())
    assert figures["mean_radius"] == pytest.approx((arrays["radius"] * right).mean())
    assert figures["certified_accuracy"]["0"] == pytest.approx(run.results()["otnn"]["accuracy"])
    assert figures["certified_accuracy"]["5"] == 0
    with (run.path / "certificates.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["radius"]) for row in rows] == arrays["radius"].tolist()
    assert [row["right"] for row in rows] == [str(int(value)) for value in right]
    assert run.results()["otnn"]["mean_radius"] == figures["mean_radius"]


def test_the_gallery_agrees_with_the_networks(run: Run) -> None:
    explain_gallery(run)
    gallery = np.load(run.path / "explanations.npz", allow_pickle=False)
    dataset = load_dataset(run.config.data)
    assert torch.equal(torch.tensor(gallery["images"]), dataset.test.images[gallery["index"]])
    assert gallery["label"].tolist() == dataset.test.labels[gallery["index"]].tolist()
    assert set(gallery["label"]) == set(range(10))
    model = run.network("otnn")
    certificate = certify(model, torch.tensor(gallery["images"]))
    assert gallery["radius"] == pytest.approx(certificate.radius.numpy(), abs=1e-5)
    ok = gallery["status"] == "ok"
    assert ok.mean() > 0.5
    # along the path: positive before the boundary, not after it; it ends at twice the boundary
    assert (gallery["potential"][ok, 0] > 0).all()
    assert (gallery["potential"][ok, -1] <= 1e-9).all()
    assert gallery["distances"][ok, -1] == pytest.approx(2 * gallery["boundary_distance"][ok])
    assert ((gallery["tightness"][ok] > 0) & (gallery["tightness"][ok] <= 1 + 1e-9)).all()
    moved = np.linalg.norm((gallery["path"][:, -1] - gallery["images"]).reshape(len(ok), -1), axis=1)
    assert moved == pytest.approx(gallery["distances"][:, -1], rel=1e-5)


def test_the_gallery_shows_errors_where_there_are_any(run: Run) -> None:
    dataset = load_dataset(run.config.data)
    model = run.network("otnn")
    prediction = certify(model, dataset.test.images).prediction
    wrong = prediction != dataset.test.labels
    assert wrong.sum() >= 3
    index = choose_gallery(model, dataset.test, 20)
    assert len(set(index.tolist())) == 20
    assert wrong[index].sum() == 3
    assert set(dataset.test.labels[index].tolist()) == set(range(10))


def test_explain_files_writes_pictures_and_arrays(run: Run, tmp_path: Path) -> None:
    dataset = load_dataset(run.config.data)
    for folder, k in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        pixels = (dataset.test.images[k, 0] * 255).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / folder / "digit.png")
    files = [tmp_path / "a" / "digit.png", tmp_path / "b" / "digit.png"]
    rows = explain_files(run, files, target="3", out=tmp_path / "out")
    assert [Path(row["picture"]).name for row in rows] == ["digit.explained.png", "digit-2.explained.png"]
    for row in rows:
        with Image.open(row["picture"]) as picture:
            assert picture.size[0] > 1000
        assert row["target"] == "3"
    arrays = np.load(tmp_path / "out" / "digit.explained.npz", allow_pickle=False)
    assert arrays["images"].shape == (1, 1, 8, 8)
    assert arrays["images"][0, 0] == pytest.approx(dataset.test.images[0, 0].numpy(), abs=1 / 255)
    with pytest.raises(InputError, match=r"digit\.explained\.png: exists already.*--force"):
        explain_files(run, files, target="3", out=tmp_path / "out")
    assert len(explain_files(run, files, target="4", out=tmp_path / "out", force=True)) == 2
    arrays = np.load(tmp_path / "out" / "digit.explained.npz", allow_pickle=False)
    # the radius is that of the prediction, whatever target the path was asked to reach
    model = run.network("otnn")
    assert arrays["radius"] == pytest.approx(certify(model, torch.tensor(arrays["images"])).radius.numpy(), abs=1e-5)


def test_a_target_that_is_the_prediction_is_told_for_that_image_only(run: Run, tmp_path: Path) -> None:
    dataset = load_dataset(run.config.data)
    files = []
    for k in range(6):
        files.append(tmp_path / f"{k}.png")
        Image.fromarray((dataset.test.images[k, 0] * 255).round().byte().numpy()).save(files[-1])
    first = explain_files(run, files)
    rows = explain_files(run, files, target=first[0]["prediction"], force=True)
    assert rows[0]["status"] == "the target is the predicted class already"
    assert any(row["status"] == "ok" for row in rows)


def test_pictures_never_fall_on_the_images_they_explain(run: Run, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    explain_files(run, [tmp_path / "mine.png"], out=tmp_path)
    assert (tmp_path / "mine.png").read_bytes() == before
    with pytest.raises(InputError, match="cannot be made a folder"):
        explain_files(run, [tmp_path / "mine.png"], out=tmp_path / "mine.png")


def test_broken_images_are_skipped_by_name(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "fine.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = [tmp_path / "broken.png", tmp_path / "fine.png"]
    with pytest.raises(InputError, match=r"broken\.png cannot be read"):
        explain_files(run, files)
    rows = explain_files(run, files, skip_broken=True)
    assert [Path(row["file"]).name for row in rows] == ["fine.png"]
    assert "left out 1 broken image" in capsys.readouterr().err.replace("\n", " ")


def test_changed_data_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, level in (("cat", 60), ("dog", 180)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for k in range(12):
            pixels = np.clip(generator.normal(level, 20, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{k}.png")
    settings = config.load(
        "digits",
        options={"data.name": str(tmp_path / "pets"), "data.size": 8, "twin": False},
        overrides=["training.epochs=2", "model.widths=[8]", "training.batch_size=8"],
    )
    run = train(settings, tmp_path / "run", quiet=True)
    certify_run(run)
    before = (run.path / "results.json").read_bytes()
    (tmp_path / "pets" / "cat").rename(tmp_path / "pets" / "x")
    with pytest.raises(InputError, match="have changed since"):
        certify_run(run)
    assert (run.path / "results.json").read_bytes() == before
    (tmp_path / "pets" / "x").rename(tmp_path / "pets" / "cat")
    # the audit speaks of the training images: any of them counts as well
    fresh = dataset_of(run)
    changed = replace(fresh, train=replace(fresh.train, images=fresh.train.images.roll(1, 0)))
    assert fingerprint(changed) != fingerprint(fresh) == run.manifest["data"]
    (tmp_path / "pets").rename(tmp_path / "moved")
    assert dataset_of(run, tmp_path / "moved").classes == ("cat", "dog")
    with pytest.raises(InputError, match="the data of this run cannot be loaded again"):
        explain_gallery(run)


def test_a_configuration_repeats_its_run(run: Run, tmp_path: Path) -> None:
    again = config.load(file=run.path / "config.toml", overrides=["twin=false"])
    train(again, tmp_path / "again", quiet=True)
    first, second = (load_file(path / "networks" / "otnn.safetensors") for path in (run.path, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    learned = config.load(file=run.path / "config.toml", overrides=["loss.alpha=0.05"])
    assert (learned.loss.alpha, learned.loss.margin, learned.loss.hinge_weight) == (0.05, None, None)


def test_an_unknown_class_is_named(run: Run) -> None:
    assert class_index(run.classes, "7") == 7
    with pytest.raises(InputError, match="--target cat: no such class; expected one of 0, 1, 2"):
        class_index(run.classes, "cat")
