"""The running mean against slow means, and the projections against their matrices."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.nn import BatchCentering, LayerCentering
from tests.operators import layer_matrix


def batches(count: int, *shape: int) -> Tensor:
    return torch.randn(count, 6, *shape, generator=torch.Generator().manual_seed(count)).double()


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 5)])
def test_training_subtracts_the_mean_of_the_batch(shape: tuple[int, ...]) -> None:
    (x,) = batches(1, *shape)
    layer = BatchCentering(3).double()
    torch.nn.init.normal_(layer.bias)
    centred = layer(x).movedim(1, 0).flatten(1)
    assert (centred.mean(dim=1) - layer.bias).abs().max() < 1e-14
    # what batch normalisation does, but for its division
    expected = nn.functional.batch_norm(x, None, None, training=True, eps=1e-300)
    deviation = x.movedim(1, 0).flatten(1).std(dim=1, correction=0).view(-1, *[1] * (len(shape) - 1))
    assert (layer(x) - layer.bias.view(-1, *[1] * (len(shape) - 1)) - expected * deviation).abs().max() < 1e-13


@pytest.mark.parametrize("momentum", [None, 0.1, 0.4, 1.0])
def test_the_running_mean_is_the_slow_mean(momentum: float | None) -> None:
    layer = BatchCentering(3, momentum).double()
    means: list[Tensor] = []
    for x in batches(25, 3, 2, 2):
        layer(x)
        means.append(torch.stack([x[:, channel].sum() / 24 for channel in range(3)]))
        weights = torch.ones(1, dtype=torch.float64)
        for n in range(2, len(means) + 1):  # unrolled: batch n takes its share of everything before it
            share = 1 / n if momentum is None else max(momentum, 1 / n)
            weights = torch.cat([weights * (1 - share), torch.tensor([share], dtype=torch.float64)])
        assert abs(float(weights.sum()) - 1) < 1e-14
        assert (layer.running_mean - weights @ torch.stack(means)).abs().max() < 1e-14
        if momentum is None or len(means) <= 1 / momentum:
            assert (layer.running_mean - torch.stack(means).mean(dim=0)).abs().max() < 1e-14
    assert int(layer.num_batches_tracked) == 25


def test_the_first_batch_is_the_running_mean_whatever_the_momentum() -> None:
    (x,) = batches(1, 3)
    layer = BatchCentering(3, momentum=0.01).double()
    assert torch.equal(layer.eval()(x), x)  # before any batch
    trained = layer.train()(x)
    assert (layer.eval()(x) - trained).abs().max() < 1e-15


def test_a_checkpoint_goes_on_as_if_nothing_had_been() -> None:
    first = BatchCentering(3).double()
    for x in batches(4, 3):
        first(x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = BatchCentering(3).double()
    second.load_state_dict(torch.load(file, weights_only=True))
    for x in batches(5, 3):
        assert torch.equal(first(x), second(x))
    assert torch.equal(first.running_mean, second.running_mean)
    x = batches(5, 3)[0]
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_leaves_the_running_mean_alone(bad: float) -> None:
    layer = BatchCentering(3)
    layer(torch.rand(4, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.rand(4, 3)
    x[2, 1] = bad
    with pytest.raises(FloatingPointError, match="was left out of the running mean"):
        layer(x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert bool(torch.isnan(layer.eval()(x)).any() | torch.isinf(layer.eval()(x)).any())  # no sample is hidden


def test_gradients_in_training_pass_through_the_mean() -> None:
    layer = BatchCentering(2).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(point: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"bias": bias}, (point,))

    assert torch.autograd.gradcheck(function, (x, layer.bias))
    assert torch.autograd.gradgradcheck(function, (x, layer.bias))
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert gradient.abs().max() < 1e-14  # the sum of what is centred is constant


def test_reset_forgets() -> None:
    layer = BatchCentering(3)
    layer(torch.rand(4, 3))
    layer.reset_parameters()
    assert {name: value.abs().sum().item() for name, value in layer.state_dict().items()} == {
        "bias": 0,
        "running_mean": 0,
        "num_batches_tracked": 0,
    }


@pytest.mark.parametrize(("over", "rank"), [("channels", 2 * 4), ("sample", 11)])
def test_layer_centering_is_an_orthogonal_projection(over: str, rank: int) -> None:
    layer = LayerCentering(3, over=over)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.bias)
    matrix = layer_matrix(layer, (3, 2, 2))
    assert (matrix - matrix.T).abs().max() < 1e-15
    assert (matrix @ matrix - matrix).abs().max() < 1e-15
    assert round(float(matrix.trace()), 12) == rank
    assert bound(layer, (3, 2, 2)).constant == 1


def test_layer_centering_is_layer_normalisation_without_its_division() -> None:
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    whole = LayerCentering(4, over="sample", bias=False)(x)
    deviation = x.flatten(1).std(dim=1, correction=0).view(-1, 1, 1)
    assert (whole - nn.functional.layer_norm(x, (4, 3), eps=0) * deviation).abs().max() < 1e-14
    places = LayerCentering(4, bias=False)(x).movedim(1, 2)
    deviation = x.std(dim=1, correction=0).unsqueeze(2)
    assert (places - nn.functional.layer_norm(x.movedim(1, 2), (4,), eps=0) * deviation).abs().max() < 1e-14


def test_the_bound_in_training_is_refused() -> None:
    with pytest.raises(InputError, match=r"mixes the samples of a batch in training mode; call \.eval\(\)"):
        bound(nn.Sequential(BatchCentering(3)))
    assert bound(nn.Sequential(BatchCentering(3)).eval()).constant == 1


REFUSED = [
    (lambda: BatchCentering(0), "num_features: expected at least one channel, got 0"),
    (lambda: BatchCentering(3, momentum=0.0), r"momentum: expected a weight in \(0, 1\], or None .* got 0.0"),
    (lambda: BatchCentering(3, momentum=1.5), r"momentum: expected a weight in \(0, 1\]"),
    (lambda: BatchCentering(3)(torch.zeros(2, 4)), r"expected \(batch, 3 channels, ...\), got \(2, 4\)"),
    (lambda: BatchCentering(3)(torch.zeros(0, 3)), "expected at least one sample to take the mean of, got none"),
    (lambda: LayerCentering(0), "num_features: expected at least one channel, got 0"),
    (lambda: LayerCentering(1), 'expected num_features >= 2, or over="sample"'),
    (lambda: LayerCentering(2, over="rows"), 'over: expected "channels" or "sample"'),  # type: ignore[arg-type]
    (lambda: LayerCentering(3)(torch.zeros(3)), r"expected \(batch, 3 channels, ...\), got \(3,\)"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_what_does_not_fit_is_refused(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=words):
        call()


PROCESSES = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from otnn.nn import BatchCentering

torch.set_num_threads(1)
parallel = len(sys.argv) > 2
if parallel:
    dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 4), BatchCentering(4), nn.Tanh(), nn.Linear(4, 1)).double()
called = DistributedDataParallel(net) if parallel else net
optimizer = torch.optim.SGD(net.parameters(), 0.5)
for _ in range(4):
    x = torch.randn(8, 3, dtype=torch.float64)
    if parallel:
        x = x.chunk(2)[dist.get_rank()]
    optimizer.zero_grad()
    called(x).square().mean().backward()
    optimizer.step()
if not parallel or dist.get_rank() == 1:  # not the one whose buffers are broadcast
    torch.save(net.state_dict(), sys.argv[1])
if parallel:
    # unequal shares: the mean is that of all samples, not that of the means
    share = torch.arange(6.0, dtype=torch.float64).view(6, 1)[: 2] if dist.get_rank() == 0 else torch.full((1, 1), 8.0)
    layer = BatchCentering(1).double()
    layer(share.double())
    assert layer.running_mean.item() == 3.0, layer.running_mean
    del called  # its threads end before the group that they belong to
    dist.barrier()  # and no process leaves while the other still waits for it
    dist.destroy_process_group()
"""


def test_two_processes_centre_by_the_mean_of_both(tmp_path: Path) -> None:
    """Weights, gradients included, and running means are those of one process with the whole batch."""
    script = tmp_path / "centre.py"
    script.write_text(PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in ([sys.executable, str(script), "one"], [*launch, str(script), "two", "parallel"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-12), name
