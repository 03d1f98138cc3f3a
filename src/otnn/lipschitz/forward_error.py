"""A forward pass that also bounds its own rounding error, sample by sample.

Layer by layer, with sigma the bound of a layer, h its input as executed and e the norm of the error so far,
e' = sigma e + a ||h|| + b, where a and b are the layer's own rounding (Higham 2002, section 3.5). For any other input
within the distance r, ||h|| grows by at most e + L r + its own error, so its error stays below `around + growth r`.

Covered are direct sums of products in any order, with or without fused operations; not Winograd or Fourier
convolutions, nor reduced precision such as TF32 or bfloat16.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from otnn.errors import InputError
from otnn.lipschitz.bounds import step_constants
from otnn.lipschitz.graph import Trace
from otnn.lipschitz.operations import Step
from otnn.lipschitz.residual import mix_weights
from otnn.lipschitz.rounding import UNDERFLOW, UNIT, add_up, gamma, hypot_up, mul_up, sqrt_up, up

# Told at each step: the node of the graph, its result, and a bound (batch,) of the norm of the result's error
Watch = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class Execution:
    """What a network computed, and how far that may be from exact arithmetic on its stored weights.

    Attributes:
        scores: (batch, outputs) as computed.
        error: (batch,) float64, bounds the norm of the scores' error.
        around: (batch,) float64, with `growth` bounds the error at any input within r: around + growth r.
        growth: per unit of distance.
        reach: (batch,) float64, the distance within which no sum on the way can overflow.
    """

    scores: Tensor
    error: Tensor
    around: Tensor
    growth: float
    reach: Tensor


class BoundedExecution:
    """Executes a traced network in one dtype and bounds the rounding error.

    Args:
        trace: of the network, with the shapes known.
        dtype: float32 or float64; stored weights must be exact in it.

    Raises:
        InputError: a layer whose rounding is not known.
    """

    def __init__(self, trace: Trace, dtype: torch.dtype) -> None:
        for step in trace.steps:
            if step.kind == "layer" and step.bound.rounding is None:
                raise InputError(
                    f"{step.name}: its rounding error is not known, so no radius would be sound; "
                    "use MaxMin, ReLU or another layer that only compares, adds and multiplies"
                )
        self._steps = dict(zip(trace.nodes, trace.steps, strict=True))
        self._constants = step_constants(trace.steps)
        self._graph = copy.deepcopy(trace.graph).to(dtype)
        self.dtype = dtype

    def __call__(self, inputs: Tensor, watch: Watch | None = None) -> Execution:
        """Execute a batch (batch, ...) of the dtype; `watch` sees every step on the way."""
        runner = _Runner(self._graph, self._steps, self._constants, self.dtype, watch)
        with torch.no_grad():
            scores = runner.run(inputs)
        last = runner.found[-1]
        return Execution(scores, last[0], last[1], last[2], runner.reach)


class _Runner(fx.Interpreter):
    """Runs node by node; `found` holds (error, around, growth) of each step, `norms` that of its result."""

    def __init__(
        self,
        graph: fx.GraphModule,
        steps: dict[str, Step],
        constants: Sequence[float],
        dtype: torch.dtype,
        watch: Watch | None,
    ) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self._steps, self._constants, self._dtype, self._watch = steps, constants, dtype, watch
        self.found: list[tuple[Tensor, Tensor, float]] = []
        self.norms: list[Tensor] = []
        self.reach = torch.zeros(0)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        step = self._steps.get(n.name)
        if step is not None:
            self.found.append(self._error(step, result))
            moved = step.kind == "same"  # the same numbers in another order
            self.norms.append(self.norms[step.sources[0]] if moved else _norms(result))
            if self._watch is not None:
                self._watch(n.name, result, self.found[-1][0])
        return result

    def _error(self, step: Step, result: Tensor) -> tuple[Tensor, Tensor, float]:
        if step.kind == "input":
            zero = torch.zeros(len(result), dtype=torch.float64, device=result.device)
            self.reach = torch.full_like(zero, torch.inf)
            return zero, zero, 0.0
        if step.kind == "layer":
            slope, offset = step.bound.rounding.local(self._dtype)  # type: ignore[union-attr]
        elif step.kind == "sum":
            # a term or the sum below the smallest normal number may be flushed to zero
            terms = float(len(step.sources) + 1)
            lost = mul_up(terms, sqrt_up(float(result[0].numel())), UNDERFLOW[self._dtype])
            slope, offset = UNIT[self._dtype], lost
        elif step.kind == "mix":
            slope, offset = _mix_rounding(step.alpha, result[0].numel(), self._dtype)
        else:
            slope = offset = 0.0
        sigmas = mix_weights(step.alpha) if step.kind == "mix" else (step.bound.constant,) * len(step.sources)
        # the errors of separate coordinates are orthogonal to each other, those of terms may point the same way
        apart = step.kind in ("concatenate", "join")
        together = torch.hypot if apart else torch.add
        error, around, growth = torch.zeros_like(self.found[0][0]), torch.zeros_like(self.found[0][0]), 0.0
        for source, sigma in zip(step.sources, sigmas, strict=True):
            before, near, slower = self.found[source]
            norm = self.norms[source]
            self._keep_in_range(step, norm + before + near, add_up(self._constants[source], slower))
            error = together(error, sigma * before + slope * norm)
            around = together(around, (sigma + slope) * near + slope * (norm + before))
            steeper = add_up(mul_up(sigma, slower), mul_up(slope, add_up(self._constants[source], slower)))
            growth = hypot_up(growth, steeper) if apart else add_up(growth, steeper)
        # each of these few operations was rounded to nearest, or, a hypotenuse, within one unit of the last place
        outward = up(1 + gamma(8 * len(step.sources)))
        return (error + offset) * outward, (around + offset) * outward, growth

    def _keep_in_range(self, step: Step, norm: Tensor, slope: float) -> None:
        """Reduce the reach to where weight (norm + slope r) + offset, a bound of every partial sum, is in range."""
        rounding = step.bound.rounding if step.kind == "layer" else None
        weight, offset = (rounding.weight, rounding.offset) if rounding is not None else (float(len(step.sources)), 0.0)
        if step.kind == "mix":
            weight = mul_up(weight, _largest_factor(step.alpha))
        if weight > 0 and step.kind in ("layer", "sum", "mix"):
            largest = torch.finfo(self._dtype).max / 2
            self.reach = torch.minimum(self.reach, (largest - offset - weight * norm) / mul_up(weight, slope))


def _mix_rounding(alpha: float, outputs: int, dtype: torch.dtype) -> tuple[float, float]:
    """The slope, on the norm of each source, and the offset of x + alpha (y - x), or y - (1 - alpha) (y - x)."""
    largest = _largest_factor(alpha)
    # a share, a difference, a product or the sum below the smallest normal number may be flushed to zero
    slope = mul_up(largest, add_up(gamma(5, dtype), mul_up(2.0, UNDERFLOW[dtype])))
    return slope, mul_up(8.0, largest, sqrt_up(float(outputs)), UNDERFLOW[dtype])


def _largest_factor(alpha: float) -> float:
    """Bounds how often each source enters a mix, every term with its absolute value."""
    return add_up(1.0, *mix_weights(alpha))


def _norms(result: Tensor) -> Tensor:
    """Bound the norm of each sample, in float64."""
    norms: Tensor = torch.linalg.vector_norm(result.double().flatten(1), dim=1)
    # squares of numbers below 2^-511 vanish
    return norms * up(1 + gamma(result[0].numel() + 4)) + result[0].numel() * 2.0**-511
