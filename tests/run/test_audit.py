"""The audit as a stage of a run, and on the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import otnn.run.audit
from otnn.errors import InputError
from otnn.report import write_report
from otnn.report.load import load_run
from otnn.run import config
from otnn.run.audit import audit_run, loss_of
from otnn.run.certify import certify_run
from otnn.run.explain import explain_gallery
from otnn.run.folder import Run, open_run
from otnn.run.train import dataset_of, train
from otnn.transport import audit

BINARY = ("training.epochs=5", "model.widths=[32]", 'data.classes=["0", "8"]')


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "binary"
    train(config.load(overrides=BINARY), path, quiet=True)
    return path


def test_the_stage_writes_what_the_function_finds(binary: Path) -> None:
    run = open_run(binary)
    content = audit_run(run, samples=40, seed=3)
    assert json.loads((binary / "audit.json").read_text()) == json.loads(json.dumps(content))
    dataset = dataset_of(run)
    loss = loss_of(run, dataset)
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        (told,) = content["splits"][name]
        (found,) = audit(run.network("otnn"), split, loss, samples=40, seed=3, classes=run.classes).potentials
        assert told["gap"] == pytest.approx(found.measures.gap, rel=1e-9)
        assert told["name"] == "8 against 0"
        assert told["parts"]["transport"] == pytest.approx(found.measures.parts.transport, rel=1e-9)
        assert told["hypotheses"]["optimum_separates"] == found.hypotheses.optimum_separates
        assert (told["bracket"] is None) == (name == "train")
        assert run.results()["audit"][name]["gap"] == told["gap"]
    assert (content["samples"], content["seed"], content["splits"]["train"][0]["positives"]) == (40, 3, 40)
    assert content["verdict"][0].startswith("On the training samples")
    open_run(binary)  # the new files are listed with their checksums


def test_partners_are_training_images_and_steps_are_along_the_gradient(binary: Path) -> None:
    run = open_run(binary)
    audit_run(run, samples=40)
    arrays = np.load(binary / "audit.npz", allow_pickle=False)
    data = dataset_of(run).train
    model = run.network("otnn").double()
    for k in range(len(arrays["label"])):
        image, partner = data.images[arrays["index"][k]], data.images[arrays["partner_index"][k]]
        assert arrays["image"][k] == pytest.approx(image.numpy())
        assert arrays["partner"][k] == pytest.approx(partner.numpy())
        assert arrays["label"][k] == data.labels[arrays["index"][k]] != arrays["partner_label"][k]
        distance = float((image - partner).norm())
        assert arrays["distance"][k] == pytest.approx(distance, rel=1e-5)
        assert np.linalg.norm(arrays["same_length"][k] - arrays["image"][k]) == pytest.approx(distance, rel=1e-5)
        inputs = image.double().unsqueeze(0).requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
        value = float(model(inputs).detach())
        sign = 1 if arrays["label"][k] == 1 else -1
        way = (image - partner).double() * sign
        assert arrays["cosine"][k] == pytest.approx(
            float((gradient[0] * way).sum() / gradient.norm() / way.norm()), abs=1e-6
        )
        step = image.double() - value * gradient[0]
        assert arrays["one_step"][k] == pytest.approx(step.numpy(), abs=1e-5)
        # from a positive down the gradient, from a negative up
        moved = (arrays["same_length"][k] - arrays["image"][k]).ravel()
        assert float(np.sign(moved @ gradient.numpy().ravel())) == -sign
    assert set(arrays["label"]) == {0, 1}
    with Image.open(binary / "audit.png") as picture:
        assert picture.size[0] > 1000


def test_an_interrupted_audit_leaves_the_run_as_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(otnn.run.audit, "partners_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audit_run(run, samples=20)
    assert {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()} == before


def test_an_edited_configuration_does_not_change_the_loss(run: Run) -> None:
    file = run.path / "config.toml"
    file.write_text(file.read_text().replace("hinge_weight = 20.0", "hinge_weight = 1.0"))
    edited = open_run(run.path, accept_edits=True)
    assert edited.config.loss.hinge_weight == 1.0
    assert loss_of(edited, dataset_of(edited)).hinge_weight == 20.0


def test_a_learned_margin_comes_back_with_the_loss(tmp_path: Path) -> None:
    settings = config.load(overrides=(*BINARY, "loss.alpha=0.2", "training.epochs=8"))
    run = train(settings, tmp_path / "run", quiet=True)
    loss = loss_of(run, dataset_of(run))
    assert float(loss.margin.detach()) == run.results()["otnn"]["margin"] != 0.1  # .1 is where training starts
    content = audit_run(run, samples=30)
    assert content["splits"]["train"][0]["alpha"] == 0.2
    told = content["splits"]["train"][0]
    assert told["margin"] == pytest.approx(float(loss.margin.detach()), rel=1e-5)
    assert told["optimal_margin"] != told["margin"]


def test_the_report_shows_the_audit_and_does_without_it(run: Run) -> None:
    certify_run(run)
    explain_gallery(run, size=2)
    write_report(run)
    page = (run.path / "report.html").read_text()
    assert 'id="audit"' not in page
    content = audit_run(run, samples=20)
    write_report(run)
    page = (run.path / "report.html").read_text()
    assert 'id="audit"' in page
    assert all(entry["name"] in page for entry in content["splits"]["train"])
    assert "measured by itself, which describes the network" in page  # soft hKR
    assert page.count("one gradient step: from") == 8
    assert "Potential “" in page


def test_a_damaged_audit_is_refused_by_the_report(run: Run) -> None:
    certify_run(run)
    explain_gallery(run, size=2)
    audit_run(run, samples=20)
    arrays = (run.path / "audit.npz").read_bytes()
    (run.path / "audit.npz").unlink()
    with pytest.raises(InputError, match=r"audit\.npz: no such file; make it with `otnn audit"):
        load_run(run.path)
    (run.path / "audit.npz").write_bytes(arrays)
    (run.path / "audit.json").write_text('{"format": 9}')
    with pytest.raises(InputError, match="expected format 1, got 9"):
        load_run(run.path)
    (run.path / "audit.json").unlink()
    with pytest.raises(InputError, match=r"audit\.json: no such file"):
        load_run(run.path)
