"""What loops of one's own do: clip, accumulate, average, save and go on, scale, share between processes."""

import io
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from otnn import export
from otnn.certify import certify
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.losses import HKRLoss
from otnn.manifold import UnitRows, constrained_parameters, keep_on_manifold, retract_parameters
from otnn.models import Classifier
from otnn.nn import BatchCentering, LayerCentering, MaxMin, OrthoConv2d, OrthoLinear, UnitNormLinear
from tests.matrices import tangent


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> Classifier:
    torch.manual_seed(seed)
    body = nn.Sequential(
        OrthoConv2d(1, 4, 3, stride=2, padding=1, bias=False),
        BatchCentering(4),
        MaxMin(),
        OrthoConv2d(4, 4, 3, padding=1),
        LayerCentering(4),
        MaxMin(),
        nn.Flatten(),
        OrthoLinear(64, 8),
        MaxMin(),
    )
    model = Classifier(body, UnitNormLinear(8, 1), (1, 8, 8)).to(dtype)
    retract_parameters(model)  # layers are drawn in float32
    return model


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Noise that is brighter on the left or on the right; three of four samples of the first half have label 1."""
    labels = torch.tensor([1, 1, 1, 0] * 2 + [0, 0, 1, 0] * 2)
    noise = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    left = (torch.arange(8) < 4).to(dtype)
    return 0.6 * noise + 0.4 * torch.where(labels.view(-1, 1, 1, 1) == 1, left, 1 - left), labels


def off(*modules: nn.Module) -> float:
    """The largest distance of a constrained parameter from its manifold."""
    points = [(p.detach(), manifold) for module in modules for _, p, manifold in constrained_parameters(module)]
    return max(float(manifold.distance(point.double()).max()) for point, manifold in points)


def gap(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two states, buffers included."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    return max(float((value.double() - states[1][name].double()).abs().max()) for name, value in states[0].items())


class Training:
    """A network, a loss with a learned margin, an optimizer, and the hooks."""

    def __init__(self, make: Callable[..., Optimizer] = Adam, rate: float = 0.02, **settings: Any) -> None:
        self.model, self.loss = network(), HKRLoss(alpha=0.1).double()
        self.parameters = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = make(self.parameters, lr=rate, **settings)
        keep_on_manifold(self.optimizer, self.model, self.loss)

    def backward(self, seed: int) -> None:
        self.optimizer.zero_grad()
        images, labels = batch(seed)
        self.loss(self.model(images), labels).backward()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.optimizer.step()


# --- clipping, and the ways that torch computes a step -------------------------------------------------------------


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_clipped_steps_with_weight_decay_are_the_same_one_by_one_together_and_fused(
    make: Callable[..., Optimizer],
) -> None:
    ways = [Training(make, weight_decay=0.1, **way) for way in ({"foreach": False}, {"foreach": True}, {"fused": True})]
    for training in ways:
        for seed in range(3):
            training.backward(seed)
            before = nn.utils.clip_grad_norm_(training.parameters, 0.5)
            after = torch.stack([p.grad.norm() for p in training.parameters]).norm()
            assert before > 0.5 > after > 0.4999
            training.optimizer.step()
    assert off(ways[0].model, ways[0].loss) < 1e-13
    assert gap(ways[0].model, network()) > 0.01
    for other in ways[1:]:
        assert gap(ways[0].model, other.model) < 1e-12  # float64 rounding, which Adam divides by small gradients


def test_a_clipped_step_is_the_projection_of_the_plain_one() -> None:
    training = Training(SGD, rate=0.3, weight_decay=0.1)
    training.backward(0)
    before = deepcopy(training.model)
    norm = nn.utils.clip_grad_norm_(training.parameters, 0.5)
    raw = {name: p.grad * (norm / 0.5) for name, p in training.model.named_parameters()}
    training.optimizer.step()
    moved = before
    for name, parameter, manifold in constrained_parameters(moved):
        raw[name] = tangent(manifold, parameter.detach(), raw[name])
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter -= 0.3 * (raw[name] * (0.5 / norm) + 0.1 * parameter)
    assert projection_gap(training.model, moved) < 1e-13


def projected(point: Tensor, manifold: object) -> Tensor:
    """The closest point, by another way than the package's: singular values, and division by norms."""
    if isinstance(manifold, UnitRows):
        return point / point.square().sum(dim=1, keepdim=True).sqrt()
    u, _, v = torch.linalg.svd(point.double(), full_matrices=False)
    return (u @ v).to(point.dtype)


def projection_gap(model: nn.Module, plain: nn.Module) -> float:
    """How far the parameters of `model` are from the closest ones to those of `plain`."""
    expected = {name: p.detach() for name, p in plain.named_parameters()}
    for name, parameter, manifold in constrained_parameters(plain):
        expected[name] = projected(parameter.detach(), manifold)
    return max(float((p.detach() - expected[name]).abs().max()) for name, p in model.named_parameters())


def test_weight_decay_has_no_hold_on_an_orthogonal_weight() -> None:
    """Decay scales a weight and projection scales it back; of the biases the factor 1 - rate * decay remains."""
    training = Training(AdamW, rate=0.1, weight_decay=0.5)
    with torch.no_grad():
        for layer in (training.model.body[3], training.model.body[7], training.model.head):
            layer.bias.fill_(1.0)
    before = deepcopy(training.model)
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    constrained = {name for name, _, _ in constrained_parameters(before)}
    for name, parameter in training.model.named_parameters():
        expected = before.get_parameter(name) * (1.0 if name in constrained else 0.95)
        assert (parameter - expected).abs().max() < 1e-14, name


def test_clipping_an_infinite_gradient_ends_in_a_refusal_not_in_lost_weights() -> None:
    training = Training()
    training.step(0)
    training.backward(1)
    training.model.head.weight.grad[0, 0] = math.inf
    before = deepcopy(training.model)
    nn.utils.clip_grad_norm_(training.parameters, 1.0)
    with pytest.raises(FloatingPointError, match=r"^head\.weight got a NaN or infinite gradient"):
        training.optimizer.step()
    assert gap(training.model, before) == 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_two_optimizers_share_one_network() -> None:
    """Muon takes matrices only, Adam the rest; each brings all weights back."""
    model, loss = network(), HKRLoss(margin=0.5, hinge_weight=10.0).double()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), Adam(others, lr=0.02)]
    for optimizer in optimizers:
        keep_on_manifold(optimizer, model)
    losses = []
    for seed in range(8):
        images, labels = batch(seed)
        model.zero_grad()
        value = loss(model(images), labels)
        value.backward()
        losses.append(float(value.detach()))
        for optimizer in optimizers:
            optimizer.step()
        assert off(model) < 1e-13
    assert losses[-1] < 0.5 * losses[0]


# --- accumulation, scaling, saving ---------------------------------------------------------------------------------


def accumulated(training: Training, parts: int) -> None:
    training.optimizer.zero_grad()
    images, labels = batch(0)
    for share, targets in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        (training.loss(training.model(share), targets) / parts).backward()
    training.optimizer.step()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int) -> None:
    """With a prior the loss is a mean over samples, whatever classes a part holds, and its centre is a constant that
    moves between the parts without a gradient. Only means over the batch would differ, so they are at rest here."""
    whole, split = Training(SGD, rate=0.1), Training(SGD, rate=0.1)
    for training in (whole, split):
        training.model.eval()
        training.loss.running_mean.value.fill_(0.3)
    accumulated(whole, 1)
    accumulated(split, parts)
    assert gap(whole.model, network()) > 0.01
    assert gap(whole.model, split.model) < 1e-14
    assert (whole.loss.margin - split.loss.margin).abs() < 1e-14
    # the loss itself has taken in more batches
    assert (int(whole.loss.running_mean.steps), int(split.loss.running_mean.steps)) == (1, parts)


def test_batch_centring_sees_each_part_by_itself() -> None:
    """As batch normalisation does: the parts are centred by their own means, which enter the mean of all batches."""
    whole, split = Training(SGD, rate=0.1), Training(SGD, rate=0.1)
    accumulated(whole, 1)
    accumulated(split, 2)
    assert gap(whole.model.body[0], split.model.body[0]) > 1e-4
    means = [training.model.body[1].running_mean for training in (whole, split)]
    assert (means[0] - means[1]).abs().max() < 1e-15


def test_a_gradient_scaler_changes_nothing() -> None:
    """Powers of two scale without rounding, so the steps are the same bit for bit, clipping included."""
    plain, scaled = Training(), Training()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(4):
        plain.backward(seed)
        nn.utils.clip_grad_norm_(plain.parameters, 0.5)
        plain.optimizer.step()
        scaled.optimizer.zero_grad()
        images, labels = batch(seed)
        scaler.scale(scaled.loss(scaled.model(images), labels)).backward()
        scaler.unscale_(scaled.optimizer)
        nn.utils.clip_grad_norm_(scaled.parameters, 0.5)
        scaler.step(scaled.optimizer)
        scaler.update()
    assert gap(plain.model, scaled.model) == gap(plain.loss, scaled.loss) == 0


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped() -> None:
    """Hooks are no part of a state: they are set again."""
    straight = Training()
    for seed in range(3):
        straight.step(seed)
    file = io.BytesIO()
    parts = {"model": straight.model, "loss": straight.loss, "optimizer": straight.optimizer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    resumed, saved = Training(rate=1.0), torch.load(file, weights_only=True)
    for name, part in (("model", resumed.model), ("loss", resumed.loss), ("optimizer", resumed.optimizer)):
        part.load_state_dict(saved[name])
    for seed in range(3, 6):
        straight.step(seed)
        resumed.step(seed)
    assert gap(straight.model, resumed.model) == gap(straight.loss, resumed.loss) == 0
    assert off(resumed.model, resumed.loss) < 1e-13


# --- averages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, 0.9])
def test_an_average_of_weights_is_brought_back_by_one_call(decay: float | None) -> None:
    training = Training(rate=0.1)
    ema = None if decay is None else get_ema_multi_avg_fn(decay)
    averaged = AveragedModel(training.model, multi_avg_fn=ema, use_buffers=True)
    slow = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    for seed in range(6):
        training.step(seed)
        averaged.update_parameters(training.model)
        for name, parameter in training.model.named_parameters():
            # torch's average starts at the first update
            weight = 1 / (seed + 1) if decay is None or seed == 0 else 1 - decay
            slow[name] += weight * (parameter.detach() - slow[name])
    model = averaged.module.eval()
    assert max(float((p.detach() - slow[name]).abs().max()) for name, p in model.named_parameters()) < 1e-14
    images = batch(9)[0]
    assert off(model) > 1e-2
    with pytest.raises(InputError, match=r"is off its manifold.* call otnn\.manifold\.retract_parameters"):
        export(model)
    plain = deepcopy(model)
    retract_parameters(averaged)
    assert off(averaged) < 1e-13
    assert projection_gap(model, plain) < 1e-13
    assert 1 - 1e-5 < bound(model.body).constant < 1 + 1e-5
    certificate = certify(model, images)
    assert (certificate.radius > 0).all()
    assert (certificate.radius - model(images).abs().view(-1)).abs().max() < 1e-5
    assert (export(model)(images) - model(images)).abs().max() < 1e-6
    assert off(training.model) < 1e-13  # and training goes on


# --- two processes -------------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """Network and loss as one module, so that one wrapper averages the gradients of both."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.loss = network(), HKRLoss(alpha=0.1).double()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = self.loss(self.model(images), labels)
        return value


def share_of_training(rank: int, world: int, folder: str) -> None:
    """Twenty steps on a share of each batch; buffers are not broadcast, so that they have to agree by themselves."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    objective = Objective()
    parallel = DistributedDataParallel(objective, broadcast_buffers=False) if world > 1 else objective
    optimizer = Adam(objective.parameters(), lr=0.02)
    keep_on_manifold(optimizer, objective)
    for seed in range(20):
        images, labels = batch(seed)
        optimizer.zero_grad()
        parallel(images.chunk(world)[rank], labels.chunk(world)[rank]).backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
        optimizer.step()
    torch.save(objective.state_dict(), Path(folder) / f"{rank} of {world}")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_give_the_weights_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(share_of_training, (2, str(tmp_path)), nprocs=2)
    share_of_training(0, 1, str(tmp_path))
    names = ("0 of 1", "0 of 2", "1 of 2")
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in names)
    start = Objective().state_dict()
    assert max(float((value - start[name]).abs().max()) for name, value in one.items()) > 0.1
    trained = Objective()
    trained.load_state_dict(second)
    assert off(trained) < 1e-13
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(value, first[name], rtol=0, atol=1e-10), name
