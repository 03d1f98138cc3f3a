"""Networks under `torch.compile`: one graph, with the values and gradients of the network."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from otnn.nn import ConvexResidual, GroupSort, MaxMin, OrthoConv2d, OrthoLinear
from tests.test_training import Training, batch, gap

pytestmark = pytest.mark.usefixtures("_fresh_compiler")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_network_trains_like_the_network() -> None:
    """The whole network is one graph; the steps, with the hooks, are outside of it."""
    plain, compiled = Training(), Training()
    model, call = compiled.model, torch.compile(compiled.model, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        plain.step(seed)
        images, labels = batch(seed)
        compiled.optimizer.zero_grad()
        compiled.loss(call(images), labels).backward()
        compiled.optimizer.step()
    assert gap(plain.model, model) < 1e-12
    assert gap(plain.loss, compiled.loss) < 1e-12
    assert int(model.body[1].num_batches_tracked) == 3
    # a graph does not stop at a number, but the batch is left out, and the step is refused
    mean = model.body[1].running_mean.clone()
    compiled.optimizer.zero_grad()
    call(torch.full_like(images, math.nan)).sum().backward()
    with pytest.raises(FloatingPointError, match="got a NaN or infinite gradient"):
        compiled.optimizer.step()
    assert torch.equal(model.body[1].running_mean, mean)
    assert int(model.body[1].num_batches_tracked) == 3


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_sorts_have_the_gradient_of_the_sort_also_at_ties(autocast: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ConvexResidual(OrthoConv2d(8, 8, 3, padding=1)), GroupSort(4), MaxMin())
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for function in (model, call):
        images = torch.randint(0, 2, (3, 8, 2, 2), generator=torch.Generator().manual_seed(1)).float()
        images.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = function(images)
        (gradient,) = torch.autograd.grad(outputs, images, torch.arange(96.0).view(3, 8, 2, 2))
        results.append((outputs.detach(), gradient))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    ties = torch.ones(1, 8, requires_grad=True)
    sort = torch.compile(nn.Sequential(GroupSort(4), MaxMin()), backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(sort(ties), ties, torch.arange(8.0).view(1, 8))
    assert torch.equal(gradient.sort().values, torch.arange(8.0).view(1, 8))  # a permutation, where maxima would mix


def compiler_works() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")  # torch's own import
def test_code_generated_for_a_network_computes_the_same() -> None:
    if not compiler_works():
        pytest.skip("torch.compile's inductor needs a C++ compiler")
    torch.manual_seed(0)
    model = nn.Sequential(OrthoLinear(4, 4), MaxMin()).double()
    call = torch.compile(model, fullgraph=True)
    inputs = torch.randn(6, 4, dtype=torch.float64)
    # what a large network gains from, and two small kernels only wait for
    cheap = {"compile_threads": 1, "cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False}
    results = []
    for function in (model, call):
        model.zero_grad()
        with torch._inductor.config.patch(cheap):
            outputs = function(inputs)
            outputs.square().sum().backward()
        results.append([outputs.detach(), *[parameter.grad for parameter in model.parameters()]])
    for eager, generated in zip(*results, strict=True):
        assert (eager - generated).abs().max() < 1e-14
