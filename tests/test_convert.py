import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import otnn
from otnn.certify import certify
from otnn.conversion import Change, convert
from otnn.conversion.counterparts import Place, counterpart
from otnn.errors import InputError
from otnn.explain import attribute, counterfactual
from otnn.lipschitz import bound
from otnn.manifold import constrained_parameters, keep_on_manifold
from otnn.models import Classifier, build
from otnn.nn import (
    BatchCentering,
    ConvexResidual,
    Householder,
    L2NormPool2d,
    MaxMin,
    OrthoConv2d,
    OrthoLinear,
    ScaledAdaptiveAvgPool2d,
    UnitNormLinear,
)
from otnn.nn.residual import ConvexMix
from tests.torch_networks import NETWORKS, VGG, BasicBlock, ResNet, TimmResNet, modules_of_torch

# What stays: it moves numbers only, or is averaged over disjoint windows and so has norm 1 already.
KEPT = {"features.3", "features.10"}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, otnn.conversion.Conversion, tuple[int, ...], set[str]]:
    make, shape, names = NETWORKS[request.param]
    torch.manual_seed(1)
    original = make().eval()
    return original, convert(original, shape), shape, names


def test_the_counterpart_has_the_shapes_of_the_original_and_constant_1(case: Any) -> None:
    original, conversion, shape, _ = case
    model, images = conversion.model, torch.rand(4, *shape)
    assert isinstance(model, Classifier)
    assert model.input_shape == shape
    assert model(images).shape == original(images).shape
    assert bound(model.body, shape).constant <= 1.0001
    assert torch.allclose(model.head.weight.norm(dim=1), torch.ones(model.head.out_features), atol=1e-6)


def test_distances_shrink_but_do_not_vanish(case: Any) -> None:
    """The measured slope is at most 1, and at least a hundredth: a network of plain layers at its start has less."""
    model, shape = copy.deepcopy(case[1].model).double(), case[2]
    points = torch.rand(4, *shape, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x: model.body(x[None])[0]))(points)
    slopes = torch.linalg.matrix_norm(jacobians.flatten(2), ord=2)
    assert slopes.max() <= 1 + 1e-6
    assert slopes.min() >= 0.01


def test_changes_are_complete(case: Any) -> None:
    original, conversion, _, names = case
    changed = {change.name for change in conversion.changes}
    assert names <= changed
    before, after = modules_of_torch(original), modules_of_torch(conversion.model)
    kept = {name for name in before if name not in changed}
    assert kept <= KEPT
    assert {type(before[name]) for name in kept} <= {nn.MaxPool2d}
    # what is left of torch in the result is without weights
    torchs = [layer for layer in after.values() if type(layer).__module__.startswith("torch.")]
    assert not [parameter for layer in torchs for parameter in layer.parameters()]
    lines = str(conversion).split("\n")
    assert len(lines) == len(conversion.changes)
    assert all(line.startswith(change.name) for line, change in zip(lines, conversion.changes, strict=True))


def test_every_weight_gets_a_gradient_and_a_step_stays_on_the_manifold(case: Any) -> None:
    original, conversion, shape, _ = case
    model = copy.deepcopy(conversion.model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    keep_on_manifold(optimizer, model)
    images, classes = torch.rand(16, *shape), model.head.out_features
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):  # a bias before a centring has no gradient, since the mean is subtracted; a weight has
        optimizer.zero_grad()
        (model(images) * torch.randn(16, classes)).sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("bias"):
            assert parameter.grad.abs().max() > 0, name
            assert not torch.equal(parameter, before[name]), name
    for name, parameter, manifold in constrained_parameters(model):
        assert manifold.distance(parameter.detach().double()).max() < 1e-5, name
    assert bound(model.eval().body, shape).constant <= 1.0001
    assert all(torch.isfinite(value).all() for value in original.state_dict().values())


def test_certificates_and_export(case: Any) -> None:
    _, conversion, shape, _ = case
    model, images = conversion.model, torch.rand(3, *shape)
    certificate = certify(model, images)
    assert (certificate.radius > 0).all()
    # nothing within the radius changes the prediction: steps along the gradient of the gap
    inputs = images.double().requires_grad_()
    double = copy.deepcopy(model).double()
    gap = certificate.logit_gap
    scores = double(inputs)
    top = (
        scores.abs().sum()
        if scores.shape[1] == 1
        else (scores.topk(2).values @ torch.tensor([1.0, -1.0]).double()).sum()
    )
    (gradient,) = torch.autograd.grad(top, inputs)
    unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
    moved = inputs - unit * certificate.radius.view(-1, *[1] * (gradient.ndim - 1)) * 0.999
    assert torch.equal(certify(double, images.double()).prediction, _decide(double(moved)))
    assert (gap > 0).all()
    exported = otnn.export(model)
    assert torch.allclose(exported(images), model(images), atol=1e-5)
    assert all(name.endswith("alpha") for name, *_ in constrained_parameters(exported))
    assert bound(exported.body, shape).constant <= 1 + 1e-7


def _decide(scores: Tensor) -> Tensor:
    return (scores[:, 0] > 0).long() if scores.shape[1] == 1 else scores.argmax(dim=1)


def test_a_converted_network_is_left_as_it_is(case: Any) -> None:
    _, conversion, shape, _ = case
    again = convert(conversion.model)
    assert again.changes == ()
    assert str(again) == "nothing to change"
    images = torch.rand(2, *shape)
    assert torch.equal(again.model(images), conversion.model(images))
    assert again.model.state_dict().keys() == conversion.model.state_dict().keys()
    ours = {parameter.data_ptr() for parameter in conversion.model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in again.model.parameters()}


def test_without_the_constraint_only_the_weights_differ(case: Any) -> None:
    original, conversion, shape, _ = case
    ablation = convert(original, shape, constrained=False)
    model, images = ablation.model, torch.rand(2, *shape)
    assert model(images).shape == original(images).shape
    # the free layers are those that an export has, in the same places, with weights of the same shapes
    exported = otnn.export(conversion.model)
    assert [(name, type(layer).__name__) for name, layer in model.named_modules() if name and name != "body"] == [
        (name, type(layer).__name__) for name, layer in exported.named_modules() if name and name != "body"
    ]
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in exported.state_dict().items()}
    assert all(name.endswith("alpha") for name, *_ in constrained_parameters(model))
    # torch's initial weights: uniform in 1 / sqrt(fan in), neither orthogonal nor left unset
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            assert 0 < layer.weight.abs().max() <= 1 / math.sqrt(layer.weight[0].numel()) + 1e-6
    assert {change.now for change in ablation.changes}.isdisjoint({"OrthoLinear", "OrthoConv2d", "UnitNormLinear"})


def test_explanations_and_storing(tmp_path: Path) -> None:
    model, images = convert(ResNet(BasicBlock).eval(), (3, 16, 16)).model, torch.rand(2, 3, 16, 16)
    maps = attribute(model, images, 1)
    inputs = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs)[:, 1].sum(), inputs)
    assert torch.allclose(maps.abs(), gradient.abs(), atol=1e-6)
    found = counterfactual(model, images, bound(model.body, model.input_shape))
    assert ((found.tightness > 0) & (found.tightness <= 1)).all()
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(images), model(images))


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from otnn.onnx import write_onnx

    network = nn.Sequential(BasicBlock(1, 2, 2), nn.Flatten(), nn.Linear(8, 2))
    model = convert(network.eval(), (1, 4, 4)).model
    write_onnx(model, tmp_path / "model.onnx")  # compares the scores itself
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_the_residual_network_computes_what_its_layers_say() -> None:
    """An independent forward: the shortcut has the share 1 - alpha, the branch alpha."""
    model = convert(ResNet(BasicBlock).eval(), (3, 20, 20), share=0.3).model
    body: Any = model.body
    x = torch.rand(2, 3, 20, 20)
    y = body.maxpool(body.relu(body.bn1(body.conv1(x))))
    for block in (getattr(body.layer1, "0"), getattr(body.layer1, "1")):
        branch = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(y)))))
        y = block.relu(0.7 * y + 0.3 * branch)
    first, second = getattr(body.layer2, "0"), getattr(body.layer2, "1")
    shortcut = getattr(first.downsample, "1")(getattr(first.downsample, "0")(y))
    branch = first.bn2(first.conv2(first.relu(first.bn1(first.conv1(y)))))
    y = first.relu(0.7 * shortcut + 0.3 * branch)
    branch = second.bn2(second.conv2(second.relu(second.bn1(second.conv1(y)))))
    y = body.avgpool(second.relu(0.7 * y + 0.3 * branch))
    assert torch.allclose(model(x), model.head(y.flatten(1)), atol=1e-5)


def test_a_chain_becomes_a_sequential() -> None:
    model = convert(VGG(), (3, 8, 8)).model
    assert type(model.body) is nn.Sequential
    found = [type(layer) for layer in model.body]
    conv = [OrthoConv2d, BatchCentering, MaxMin]
    tail = [ScaledAdaptiveAvgPool2d, nn.Flatten, OrthoLinear, MaxMin, OrthoLinear]
    assert found[:-1] == [*conv, nn.MaxPool2d, *conv, *conv, nn.MaxPool2d, *tail]
    assert model.training  # as the original is


def test_fused_normalisation_keeps_its_activation() -> None:
    changes = {change.name: change for change in convert(TimmResNet(), (3, 16, 16)).changes}
    assert (changes["layer1.bn1.batch_norm"].was, changes["layer1.bn1.batch_norm"].now) == (
        "batch_norm",
        "BatchCentering",
    )
    assert (changes["layer2.bn1.act"].was, changes["layer2.bn1.act"].now) == ("GELU", "MaxMin")
    assert changes["layer1.drop_path"] == Change("layer1.drop_path", "DropPath", "removed", "does nothing in eval mode")


def test_shared_activations_fit_the_channels_of_each_place() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.a, self.b, self.c = nn.ReLU(), nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 8)
            self.again = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.c(self.act(self.b(self.act(self.a(x))))))
            return self.again(self.act(self.again(x)))

    conversion = convert(Shared(), (4,))
    now = [(change.name, change.now) for change in conversion.changes if change.name == "act"]
    assert now == [("act", "MaxMin"), ("act", "Abs")]
    assert bound(conversion.model.eval().body).constant <= 1.0001
    # the last layer is the head, and what it did within the network a layer of its own
    assert sum(isinstance(layer, UnitNormLinear) for layer in conversion.model.modules()) == 1
    assert conversion.model(torch.rand(2, 4)).shape == (2, 8)


def test_settings() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3), nn.Sigmoid())
    conversion = convert(network, (3, 2, 2), activation="householder", head="orthogonal", multilabel=True)
    model = conversion.model
    assert isinstance(model, Classifier)
    assert model.multilabel
    assert type(model.head) is OrthoLinear
    assert isinstance(model.body[2], Householder)
    assert convert(model).model.multilabel
    double = convert(network.double(), (3, 2, 2)).model
    assert {parameter.dtype for parameter in double.parameters()} == {torch.float64}


def test_a_twin_becomes_an_otnn_and_back() -> None:
    twin = build("resnet", (1, 8, 8), 4, widths=(4, 6), constrained=False).eval()
    conversion = convert(twin)
    assert bound(conversion.model.body, (1, 8, 8)).constant <= 1.0001
    assert conversion.model.state_dict().keys() >= {"head.weight", "head.bias"}
    assert not any(name.startswith("body.body") for name, _ in conversion.model.named_modules())
    free = convert(conversion.model, constrained=False)
    assert {(change.was, change.now) for change in free.changes} == {
        ("OrthoConv2d", "Conv2d"),
        ("OrthoLinear", "Linear"),
        ("UnitNormLinear", "Linear"),
    }


def test_a_network_without_a_dense_end_is_no_classifier() -> None:
    conversion = convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3)), (1, 6, 6))
    assert not isinstance(conversion.model, Classifier)
    assert conversion.model(torch.rand(2, 1, 6, 6)).shape == (2, 1, 6, 6)
    assert bound(conversion.model.eval(), (1, 6, 6)).constant <= 1.0001
    assert isinstance(convert(nn.Linear(3, 2), (3,)).model, Classifier)


def test_residual_blocks_of_otnn_stay() -> None:
    block = ConvexResidual(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), alpha=0.7)
    model = convert(nn.Sequential(block, nn.Linear(4, 2)), (4,)).model
    alphas = [float(layer.alpha.detach()) for layer in model.modules() if isinstance(layer, ConvexMix)]
    assert alphas == pytest.approx([0.7])


def test_the_original_is_left_alone() -> None:
    original = ResNet(BasicBlock)
    before, training = copy.deepcopy(original.state_dict()), [module.training for module in original.modules()]
    conversion = convert(original, (3, 16, 16))
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in before.items())
    assert [module.training for module in original.modules()] == training
    assert conversion.model.training
    assert all(module.training for module in conversion.model.modules())


def test_weights_follow_the_seed() -> None:
    first, second = (_seeded(3), _seeded(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), _seeded(4).parameters(), strict=True))


def _seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return convert(VGG(), (3, 8, 8)).model


def test_a_graph_module_is_traced_and_its_hooks_are_seen() -> None:
    model = convert(ResNet(BasicBlock).eval(), (3, 16, 16)).model
    assert isinstance(model.body, fx.GraphModule)
    model.body.register_forward_hook(lambda module, inputs, output: 3 * output)
    with pytest.raises(InputError, match="hook"):
        bound(model.body, (3, 16, 16))
    pool = L2NormPool2d(2)
    assert counterpart(pool, Place((1, 4, 4), (1, 2, 2))).layer is pool
