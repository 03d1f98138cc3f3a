import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file

from otnn.certify import certify
from otnn.errors import InputError
from otnn.run.export import export_run
from otnn.run.folder import Run, open_run
from otnn.run.train import dataset_of


def test_a_run_is_exported_with_its_classes_and_certificates(run: Run, tmp_path: Path) -> None:
    file = export_run(run, tmp_path / "made" / "digits.onnx")
    assert file == tmp_path / "made" / "digits.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(metadata["classes"])) == run.classes
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}
    weights = load_file(run.path / "networks" / "otnn.safetensors")
    assert {name for name in weights if stored.get(name, 0 * weights[name]).tobytes() != weights[name].tobytes()} == {
        "body.0.mean"  # it is there too, under another name
    }
    images = dataset_of(run).test.images[:100]
    certificate = certify(run.network("otnn"), images)
    scores = torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])
    top = scores.argmax(dim=1)
    assert torch.equal(top, certificate.prediction)
    distances = torch.tensor(json.loads(metadata["pair_distances"]))[top]
    gaps = scores.gather(1, top.unsqueeze(1)) - scores
    radius = (gaps / distances).nan_to_num(nan=torch.inf).amin(dim=1)
    assert radius.numpy() == pytest.approx(certificate.radius.numpy(), abs=1e-5)


def test_files_are_replaced_with_force_only(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "digits.onnx"
    file.write_text("mine")
    with pytest.raises(InputError, match=r"digits.onnx: exists already; choose another --out, or .* --force"):
        export_run(run, file)
    assert file.read_text() == "mine"
    inside = run.path / "otnn.onnx"
    export_run(run, file, force=True)
    export_run(run, inside)
    assert file.read_bytes() == inside.read_bytes()
    open_run(run.path)  # a file of its own does not disturb the run


def test_bad_paths_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder; expected a file name, as --out .*otnn.onnx"):
        export_run(run, tmp_path, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be made a folder \(.*\); choose another --out"):
        export_run(run, tmp_path / "file" / "digits.onnx")
