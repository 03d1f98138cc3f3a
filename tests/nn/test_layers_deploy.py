"""What the rows of `LAYERS` inherit besides: gradients on the torus, devices, plain torch layers, ONNX."""

import copy
import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from otnn import export
from otnn.manifold import constrained_parameters, retract_parameters
from otnn.nn import OrthoLinear
from otnn.nn.kernel import OrthoKernel
from otnn.onnx import _onnx_bytes
from tests.nn.test_layers import LAYERS, Case, exact, inputs
from tests.operators import on_the_torus, torus_shape

pytestmark = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)


def moved(case: Case) -> nn.Module:
    """A layer in `eval()` mode whose biases are not the zeros of its start."""
    layer = case.make().eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return layer


def test_the_gradient_keeps_its_norm_without_borders(case: Case) -> None:
    """||J^T J x|| = ||J x||, whether J is an isometry, the transpose of one, or both."""
    layer = exact(case.make())
    if not isinstance(layer, OrthoLinear | OrthoKernel):
        pytest.skip("not an orthogonal layer")
    if isinstance(layer, OrthoKernel):
        x = torch.randn(3, *torus_shape(layer), dtype=torch.float64, requires_grad=True)
        outputs = on_the_torus(layer, x)
    else:
        x = inputs(case).requires_grad_()
        outputs = layer(x)  # its bias starts at 0
    (gradient,) = torch.autograd.grad(outputs, x, outputs.detach())
    norms = [values.detach().flatten(1).norm(dim=1) for values in (x, outputs, gradient)]
    assert bool((norms[1] > 1e-3 * norms[0]).all())
    assert bool(((norms[2] / norms[1] - 1).abs() < 1e-12).all())
    if outputs.numel() >= x.numel():
        assert bool(((norms[1] / norms[0] - 1).abs() < 1e-12).all())


def test_everything_moves_to_another_device(case: Case) -> None:
    layer, x = case.make(), inputs(case).float()
    shape = layer(x).shape
    layer = layer.to("meta")
    assert {value.device.type for value in layer.state_dict().values()} <= {"meta"}
    found = layer(x.to("meta"))  # a constant that stayed behind would be refused
    assert (found.device.type, found.shape) == ("meta", shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_layer_computes_the_same_on_a_gpu_and_comes_back(case: Case) -> None:
    layer, x = exact(case.make()), inputs(case)
    before, expected = copy.deepcopy(layer.state_dict()), layer(x)
    layer = layer.to("cuda")
    found = layer(x.to("cuda"))
    assert found.device.type == "cuda"
    assert (found.cpu() - expected).abs().max() < 1e-12
    retract_parameters(layer)  # leaves what is on its manifold, there as well
    back = layer.to("cpu").state_dict()
    assert all((before[name] - value).abs().max() < 1e-14 for name, value in back.items() if value.numel())


def test_the_export_is_plain_torch_and_computes_the_same(case: Case) -> None:
    layer, x = moved(case), inputs(case).float()
    exported = export(nn.Sequential(layer))
    # numbers for each channel or block stay: angles, biases of centring, shares of a mix
    assert all(parameter.ndim < 2 for _, parameter, _ in constrained_parameters(exported))
    for module in exported.modules():
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            assert type(module).__module__.startswith("torch.nn."), module
    expected = layer(x)
    # the export scales by some 1e-7, and composes the kernel in float64
    assert (exported(x) - expected).abs().max() <= 2e-6 * x.flatten(1).norm(dim=1).max() + 1e-6 * expected.abs().max()
    assert not exported.training


class Rows(nn.Module):
    """All rows side by side, as one network whose input is one vector: writing one file takes seconds."""

    def __init__(self, layers: Sequence[nn.Module], shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers, self.shapes = nn.ModuleList(layers), shapes
        self.input_shape = (sum(map(math.prod, shapes)),)

    def parts(self, images: Tensor) -> list[Tensor]:
        parts = images.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        outputs = [layer(part) for layer, part in zip(self.layers, self.parts(images), strict=True)]
        return torch.cat([output.flatten(1) for output in outputs], dim=1)


@cache
def executed() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By the name of a row: the inputs, what torch and what onnxruntime compute."""
    onnxruntime = pytest.importorskip("onnxruntime")
    layers = [moved(case) for case in LAYERS]
    rows = Rows([export(layer) for layer in layers], [case.shape for case in LAYERS]).eval()
    x = torch.randn(3, *rows.input_shape)
    content = _onnx_bytes(rows, {})  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    scores = torch.from_numpy(session.run(["scores"], {"images": x.numpy()})[0])
    expected = [layer(part).detach().flatten(1) for layer, part in zip(layers, rows.parts(x), strict=True)]
    found = scores.split([each.shape[1] for each in expected], dim=1)
    names = [case.name for case in LAYERS]
    return dict(zip(names, zip(rows.parts(x), expected, found, strict=True), strict=True))


def test_onnxruntime_computes_the_same(case: Case) -> None:
    x, expected, found = executed()[case.name]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-6 * x.flatten(1).norm(dim=1).max() + 1e-6 * expected.abs().max()
