import json
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import otnn.onnx
from otnn import __version__
from otnn.certify import certify
from otnn.errors import InputError
from otnn.lipschitz import bound, export
from otnn.models import Classifier, build
from otnn.nn import (
    Abs,
    AdaptiveL2NormPool2d,
    BatchCentering,
    Centering,
    ConcatResidual,
    ConvexResidual,
    FrobeniusLinear,
    FullSort,
    GroupSort,
    Householder,
    L2NormPool2d,
    LayerCentering,
    MaxMin,
    OrthoConv2d,
    OrthoLinear,
    ScaledAdaptiveAvgPool2d,
    ScaledAvgPool2d,
    UnitNormLinear,
)
from otnn.onnx import write_onnx


def multilabel() -> Classifier:
    body = nn.Sequential(Centering(torch.full((3,), 0.5)), nn.Flatten(), OrthoLinear(297, 16), MaxMin())
    return Classifier(body, UnitNormLinear(16, 4), (3, 9, 11), multilabel=True)


def circular() -> Classifier:
    body = nn.Sequential(
        OrthoConv2d(1, 4, 3, padding=1, padding_mode="circular"),
        MaxMin(),
        OrthoConv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Flatten(),
    )
    return Classifier(body, UnitNormLinear(96, 3), (1, 8, 8))


def activations() -> Classifier:
    """Every activation of otnn, sorts of small and of large groups, and a head of Frobenius norm 1."""
    layers: list[nn.Module] = [OrthoConv2d(1, 12, 3, stride=2, padding=1), GroupSort(4), Householder(12), nn.Flatten()]
    for activation in (Abs(), GroupSort(16), FullSort(), Householder(32), GroupSort(2)):
        layers += [OrthoLinear(12 * 16 if len(layers) == 4 else 32, 32), activation]
    model = Classifier(nn.Sequential(*layers), FrobeniusLinear(32, 3), (1, 8, 8))
    for layer in model.modules():
        if isinstance(layer, Householder):
            nn.init.uniform_(layer.angle, -3, 3)
    return model


def blocks() -> Classifier:
    """Every layer that pools, centres or passes channels by."""
    centering = BatchCentering(8)
    centering(torch.rand(16, 8))
    body = nn.Sequential(
        nn.PixelUnshuffle(2),
        OrthoConv2d(4, 8, 3, padding=1),
        centering,
        ConcatResidual(ConvexResidual(OrthoConv2d(4, 4, 3, padding=1), 0.3), kept=4),
        LayerCentering(8),
        L2NormPool2d(2),
        ScaledAvgPool2d((1, 2)),
        LayerCentering(8, over="sample"),
        ScaledAdaptiveAvgPool2d((2, 1)),
        AdaptiveL2NormPool2d(1),
        nn.Flatten(),
    )
    return Classifier(body, UnitNormLinear(8, 3), (1, 20, 20))


class Cube(nn.Module):
    """A layer without a Lipschitz constant."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs**3


MODELS = {
    "dense": lambda: build("dense", (1, 8, 8), 10, widths=(32, 16), mean=torch.tensor([0.3])),
    "conv, one output": lambda: build("conv", (3, 16, 16), 2, widths=(4, 8, 16), mean=torch.tensor([0.4, 0.5, 0.6])),
    "conv": lambda: build("conv", (1, 28, 28), 5, widths=(4, 16)),
    "conv, odd size": lambda: build("conv", (3, 9, 11), 3, widths=(4, 8, 16)),
    "multilabel": multilabel,
    "resnet": lambda: build("resnet", (3, 18, 18), 3, widths=(4, 8, 16)),
    "blocks": blocks,
    "circular": circular,
    "activations": activations,
}


# What layers without weights compute with: 0 and 1, and the roots of the sizes of two adaptive windows of "blocks".
SETTINGS = {np.float32(0).tobytes(), np.float32(1).tobytes(), np.sqrt(np.float32([4, 6])).tobytes()}


@dataclass
class Written:
    """A file, the model that it was written from, and what was printed."""

    model: Classifier
    content: bytes
    printed: str

    def run(self, images: Tensor) -> Tensor:
        session = onnxruntime.InferenceSession(self.content, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])

    def metadata(self) -> dict[str, str]:
        return {entry.key: entry.value for entry in onnx.load_from_string(self.content).metadata_props}


def trained(name: str) -> Classifier:
    """A model whose biases are not the zeros of its start."""
    torch.manual_seed(sorted(MODELS).index(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@cache
def file_of(name: str) -> bytes:
    model = trained(name)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        path = Path(folder) / "model.onnx"
        write_onnx(model, path, classes=[f"class {k}" for k in range(max(2, model.head.out_features))])
        assert list(Path(folder).iterdir()) == [path]
        return path.read_bytes()


@pytest.fixture(scope="module", params=MODELS)
def written(request: pytest.FixtureRequest) -> Written:
    capture = request.config.pluginmanager.getplugin("capturemanager")
    capture.read_global_capture()
    content = file_of(request.param)
    printed = capture.read_global_capture()
    return Written(trained(request.param), content, printed.out + printed.err)


def test_onnxruntime_computes_the_scores_of_torch(written: Written) -> None:
    for size in (1, 2, 7, 64):
        images = torch.rand(size, *written.model.input_shape)
        expected = written.model(images).detach()
        found = written.run(images)
        assert found.shape == expected.shape
        norms = images.flatten(1).norm(dim=1, keepdim=True)
        assert bool(((found - expected).abs() <= 1e-6 * norms).all())


def test_the_metadata_certify_without_torch(written: Written) -> None:
    images = torch.rand(50, *written.model.input_shape)
    certificate = certify(written.model, images)
    metadata, scores = written.metadata(), written.run(images).numpy()
    if written.model.multilabel:
        radius = np.abs(scores) / np.array(json.loads(metadata["label_distances"]))
    elif scores.shape[1] == 1:
        radius = np.abs(scores[:, 0]) / json.loads(metadata["pair_distances"])[0][1]
    else:
        distances = np.array(json.loads(metadata["pair_distances"]))
        top = scores.argmax(axis=1)
        gaps = scores[np.arange(50), top, None] - scores
        rivals = np.arange(scores.shape[1]) != top[:, None]
        radius = np.divide(gaps, distances[top], where=rivals, out=np.full_like(gaps, np.inf, dtype=float)).min(axis=1)
    assert radius.max() > 1e-2
    np.testing.assert_allclose(radius, certificate.radius.numpy(), rtol=0, atol=1e-5)


def test_metadata_are_those_of_the_model(written: Written) -> None:
    metadata, plain = written.metadata(), export(written.model)
    assert metadata["otnn"] == __version__
    assert metadata["input"] == f"pixels in [0, 1], shape (batch, {str(plain.input_shape)[1:-1]})"
    assert float(metadata["lipschitz_bound"]) == bound(plain.body, plain.input_shape).constant
    assert 0.9999 < float(metadata["lipschitz_bound"]) <= 1
    assert json.loads(metadata["classes"]) == [f"class {k}" for k in range(max(2, plain.head.out_features))]
    how = {"label": "label t is set", "one": "class 1 where", "several": "class t of the largest score"}
    kind = "label" if plain.multilabel else "one" if plain.head.out_features == 1 else "several"
    assert [key for key, text in how.items() if text in metadata["radius"]] == [kind]
    assert ("label_distances" in metadata, "pair_distances" in metadata) == (kind == "label", kind != "label")


def test_weights_are_stored_bit_by_bit(written: Written) -> None:
    initializers = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(written.content).graph.initializer
    }
    stored = {name: array for name, array in initializers.items() if array.dtype == np.float32}
    plain = export(written.model)
    expected = {name: value.numpy() for name, value in plain.state_dict().items() if value.is_floating_point()}
    # torch gives the reshaped numbers of centring layers names of their own
    centring = [f"{name}." for name, layer in plain.named_modules() if "Centering" in type(layer).__name__]
    reshaped = [expected.pop(name).tobytes() for name in [*expected] if name.startswith(tuple(centring or "-"))]
    angles = [expected.pop(name) for name in list(expected) if name.endswith(".angle")]
    for name, value in expected.items():
        assert stored.pop(name).tobytes() == value.tobytes(), name
    # the sizes of windows by which pooling divides are no weights
    left = sorted(array.tobytes() for array in stored.values() if array.tobytes() not in SETTINGS)
    if angles:  # folded into the sine and the cosine of their halves, beside the factors of the reflection
        parts = [part for angle in angles for part in (np.sin(angle / 2), -np.cos(angle / 2), [0.0], [1.0], [-2.0])]
        numbers = [np.frombuffer(array, np.float32) for array in left if array not in reshaped]
        assert all(any(len(a) == len(b) and np.allclose(a, b, rtol=0, atol=1e-7) for b in parts) for a in numbers)
        return
    assert left == sorted(reshaped)  # nothing else is left


def test_the_file_is_valid_and_plain(written: Written) -> None:
    file = onnx.load_from_string(written.content)
    onnx.checker.check_model(file, full_check=True)
    assert {node.domain for node in file.graph.node} == {""}
    plain = {"Sub", "Conv", "Split", "Max", "Min", "Concat", "Gemm", "Pad", "Reshape", "Shape", "Squeeze", "Constant"}
    plain |= {"Add", "Mul", "Div", "Pow", "Sqrt", "Abs", "Equal", "Where", "Slice", "Transpose", "Gather", "TopK"}
    plain |= {"AveragePool", "ReduceMean", "ReduceMax", "ReduceSum"}
    assert {node.op_type for node in file.graph.node} <= plain
    (images,), (scores,) = file.graph.input, file.graph.output
    shape = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert (images.name, shape) == ("images", ["batch", *written.model.input_shape])
    shape = [dim.dim_param or dim.dim_value for dim in scores.type.tensor_type.shape.dim]
    assert (scores.name, shape) == ("scores", ["batch", written.model.head.out_features])


def test_nothing_is_printed_and_no_path_of_the_machine_is_written(written: Written) -> None:
    assert written.printed == ""
    assert str(Path(otnn.__file__).parent).encode() not in written.content


def test_the_weights_of_a_batch_normalisation_are_not_fused_into_those_before_it() -> None:
    model = build("conv", (1, 8, 8), 3, widths=(4, 8), constrained=False).eval()
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict(state, strict=False)
    graph = onnx.load_from_string(otnn.onnx._onnx_bytes(model, {})).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    del state["body.0.mean"]
    assert all(stored[name].tobytes() == value.numpy().tobytes() for name, value in state.items())


# --- what is refused ---------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(otnn.onnx, "_onnx_bytes", lambda *_: file_of("dense"))
    model = trained("dense").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_onnx(model, tmp_path / "model.onnx")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_differs_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(otnn.onnx, "_onnx_bytes", lambda *_: file_of("dense"))
    model = trained("dense")
    with torch.no_grad():
        model.head.bias[3] += 1e-3
    with pytest.raises(InputError, match=r"differ from torch's by 0.001, so no file is written; upgrade torch"):
        write_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # then nothing can be compared
    write_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == file_of("dense")


def test_bad_paths_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(otnn.onnx, "_onnx_bytes", lambda *_: file_of("dense"))
    model = trained("dense")
    with pytest.raises(InputError, match=r"missing/model.onnx: cannot be written \(No such file or directory\)"):
        write_onnx(model, tmp_path / "missing" / "model.onnx")
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\); choose another file"):
        write_onnx(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnxscript", "onnx_ir"])
def test_missing_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r'need the packages onnx and onnxscript: pip install "otnn\[onnx\]"'):
        write_onnx(trained("dense"), tmp_path / "model.onnx")


def test_weights_that_cannot_be_proven_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(InputError, match=r"body.0.mean: expected float32 weights, got torch.float64"):
        write_onnx(trained("dense").double(), path)
    for value in (torch.nan, torch.inf):
        model = trained("dense")
        with torch.no_grad():
            model.head.bias[0] = value
        with pytest.raises(InputError, match=r"head.bias holds NaN or infinite values"):
            write_onnx(model, path)
    unknown = Classifier(nn.Sequential(nn.Flatten(), Cube()), nn.Linear(64, 3), (1, 8, 8))
    with pytest.raises(InputError, match=r"no Lipschitz bound is known for pow"):
        write_onnx(unknown, path)
    with pytest.raises(InputError, match=r"classes: expected 10 names, got 2"):
        write_onnx(trained("dense"), path, classes=["cat", "dog"])
    assert not path.exists()


def test_what_the_exporter_refuses_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("No ONNX function for aten.frobnicate\nmore\nlines")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(InputError) as caught:
        write_onnx(trained("dense"), tmp_path / "model.onnx")
    assert str(caught.value) == (
        "torch cannot write this network as ONNX: No ONNX function for aten.frobnicate; expected other layers"
    )
