"""What is timed of each network: the training step, the constraint alone and evaluation; and its memory."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from benchmarks.layers import peers
from benchmarks.layers.nets import (
    FAMILIES,
    MAXMIN,
    OTNN,
    RELU,
    TORCHLIP,
    Batch,
    Family,
    Plan,
    build,
    layers_of,
    to_format,
)
from benchmarks.timing import Json, by_turns, ratios, spread, timed
from otnn.lipschitz import export
from otnn.manifold import constrained_parameters, keep_on_manifold

Job = Callable[[], Any]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LEARNING_RATE = 1e-3
# Exported, where the family has a way
EXPORTS: dict[str, Callable[[nn.Module], nn.Module]] = {OTNN: export, TORCHLIP: peers.torchlip_exported}


def training_step(net: nn.Module, images: Tensor, labels: Tensor) -> Job:
    """Forward pass, loss, backward pass and a step of Adam, with the retraction if the network has manifolds."""
    optimizer = Adam(net.parameters(), LEARNING_RATE)
    if any(True for _ in constrained_parameters(net)):
        keep_on_manifold(optimizer, net)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(images), labels).backward()
        optimizer.step()

    return step


def steps(found: Mapping[str, Family], plan: Plan, samples: int, rounds: int, advance: Job) -> Json:
    """Seconds of a training step in both memory formats; ratios are between the best ones of each network."""
    batch = Batch(plan, samples)
    jobs = {
        (name, label): training_step(to_format(build(family, plan), kind), batch.images[kind], batch.labels)
        for name, family in found.items()
        for label, kind in FORMATS.items()
    }
    return _compared(jobs, rounds, lambda: (batch.draw(), advance()))


def evaluations(found: Mapping[str, Family], plan: Plan, samples: int, rounds: int, advance: Job) -> Json:
    """Seconds of a forward pass without gradients, of the exported network where there is an export."""
    batch = Batch(plan, samples)

    def job(name: str, family: Family, kind: torch.memory_format) -> Job:
        net = build(family, plan)
        net = EXPORTS[name](net) if name in EXPORTS else net
        net = to_format(net.eval(), kind)

        def evaluate() -> None:
            with torch.inference_mode():
                net(batch.images[kind])

        return evaluate

    jobs = {(name, label): job(name, family, kind) for name, family in found.items() for label, kind in FORMATS.items()}
    return _compared(jobs, rounds, lambda: (batch.draw(), advance()))


def _compared(jobs: Mapping[tuple[str, str], Job], rounds: int, advance: Job) -> Json:
    seconds = by_turns({f"{name}, {label}": job for (name, label), job in jobs.items()}, rounds, advance)
    times: dict[str, dict[str, list[float]]] = {}
    for name, label in jobs:
        times.setdefault(name, {})[label] = seconds[f"{name}, {label}"]
    best = {name: min(of, key=lambda label: median(of[label])) for name, of in times.items()}
    fastest = {name: times[name][label] for name, label in best.items()}
    ours = fastest[OTNN]
    return {
        "seconds": {name: {label: spread(values) for label, values in of.items()} for name, of in times.items()},
        "best format": best,
        "ratio to ReLU": {name: spread(ratios(of, fastest[RELU])) for name, of in fastest.items()},
        "otnn over each": {name: spread(ratios(ours, of)) for name, of in fastest.items() if name != OTNN},
        "each over otnn": {name: spread(ratios(of, ours)) for name, of in fastest.items() if name != OTNN},
        # the same format on both sides, that of otnn
        "otnn over MaxMin": spread(ratios(ours, times[MAXMIN][best[OTNN]])),
        "otnn over ReLU, channels_last": spread(ratios(ours, times[RELU]["channels_last"])),
    }


# --- the constraint alone ----------------------------------------------------------------------------------------


class Constraint:
    """What a constraint adds to a step, without any image: kernels, their gradients, and the hooks of the optimizer.

    Gradients of the kernels are noise. Between the timed parts Adam moves the parameters, so that a retraction has as
    much to do as in training.
    """

    def __init__(self, net: nn.Module) -> None:
        self.kernels: list[float] = []
        self.hooks: list[float] = []
        self._net = net
        self._composed = [layer for layer in layers_of(net) if "weight" not in layer._parameters]
        generator = torch.Generator().manual_seed(0)
        self._gradients = [torch.randn(layer.weight.shape, generator=generator) for layer in self._composed]
        self._plain = {
            layer.weight: torch.randn(layer.weight.shape, generator=generator)
            for layer in layers_of(net)
            if "weight" in layer._parameters
        }
        self._optimizer = Adam(net.parameters(), LEARNING_RATE)
        # hooks run in the order of their registration: the clock runs around those of the manifold, and only there
        self._optimizer.register_step_pre_hook(self._start)
        self._optimizer.register_step_post_hook(self._start)
        if any(True for _ in constrained_parameters(net)):
            keep_on_manifold(self._optimizer, net)
        self._optimizer.register_step_pre_hook(self._stop)
        self._optimizer.register_step_post_hook(self._stop)

    def __call__(self) -> None:
        """One step; appends its seconds to `kernels` and `hooks`."""
        self._optimizer.zero_grad()
        for weight, gradient in self._plain.items():
            weight.grad = gradient
        if self._composed:
            with timed(self.kernels):
                torch.autograd.backward([layer.weight for layer in self._composed], self._gradients)
        else:
            self.kernels.append(0.0)
        self._spent = 0.0
        self._optimizer.step()
        self.hooks.append(self._spent)

    def _start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self._spent += time.perf_counter() - self._began


def constraints(found: Mapping[str, Family], plan: Plan, rounds: int, advance: Job) -> Json:
    """Seconds of the constraint of each family that has one, by turns."""
    timers = {name: Constraint(build(family, plan)) for name, family in found.items() if name not in (RELU, MAXMIN)}
    by_turns(timers, rounds, advance)
    rows = {}
    for name, timer in timers.items():
        kernels, hooks = timer.kernels[1:], timer.hooks[1:]  # the first warms up
        rows[name] = {
            "seconds": spread([sum(both) for both in zip(kernels, hooks, strict=True)]),
            "kernels": spread(kernels),
            "hooks": spread(hooks),
        }
    return rows


# --- memory ------------------------------------------------------------------------------------------------------


def memories(found: Mapping[str, Family], plan: Plan, samples: int) -> Json:
    """Most bytes that torch's allocator holds for a network, its optimizer and two training steps.

    Taken from torch.profiler, which sees every allocation of a tensor, temporary ones included, but not the scratch
    memory inside of oneDNN. Images and labels are not counted.
    """
    batch = Batch(plan, samples)
    kind = torch.channels_last
    return {name: _peak(lambda f=family: _two_steps(f, plan, batch, kind)) for name, family in found.items()}


def _two_steps(family: Family, plan: Plan, batch: Batch, kind: torch.memory_format) -> None:
    step = training_step(to_format(build(family, plan), kind), batch.images[kind], batch.labels)
    step()
    step()  # the first to find Adam's state there


def _peak(job: Job) -> int:
    """Most bytes held at once of those that a job allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


# --- growth ------------------------------------------------------------------------------------------------------

WIDTHS = (64, 128, 256, 512, 1024)
DEPTHS = (4, 8, 16, 32, 64)
PIXELS = 8
# Large sizes are timed less often: within this time, and at least so many rounds
_SECONDS, _LEAST_ROUNDS = 30.0, 3


def deep(kind: str, width: int, depth: int) -> Plan:
    """`depth` layers of one width: convolutions of 8x8 pixels, or dense layers after as many features."""
    if kind == "conv":
        return Plan(((width, 1),) * depth, (), PIXELS, channels=width)
    return Plan((), (width,) * depth, 1, channels=width)


def growth(kind: str, sizes: Sequence[tuple[int, int]], samples: int, rounds: int, advance: Job) -> list[Json]:
    """Training steps of otnn and of the same network without a constraint at each (width, depth)."""
    rows = []
    for width, depth in sizes:
        plan = deep(kind, width, depth)
        batch = Batch(plan, samples)
        memory = torch.channels_last
        jobs = {
            name: training_step(to_format(build(FAMILIES[name], plan), memory), batch.images[memory], batch.labels)
            for name in (OTNN, MAXMIN)
        }
        once: list[float] = []
        with timed(once):
            for job in jobs.values():
                job()
        seconds = by_turns(jobs, min(rounds, max(_LEAST_ROUNDS, int(_SECONDS / once[0]))), batch.draw)
        rows.append(
            {
                "layers": kind,
                "width": width,
                "depth": depth,
                "rounds": len(seconds[OTNN]),
                "seconds": {name: spread(values) for name, values in seconds.items()},
                "otnn over MaxMin": spread(ratios(seconds[OTNN], seconds[MAXMIN])),
            }
        )
        advance()
    return rows
