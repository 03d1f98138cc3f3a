"""The Lipschitz bound of a whole network.

With L the constants of the inputs of a step: a layer multiplies, sums add, and concatenation takes the root of the sum
of squares; residual blocks are in `otnn.lipschitz.residual`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from otnn.lipschitz.graph import trace
from otnn.lipschitz.operations import Step
from otnn.lipschitz.residual import mix_constant
from otnn.lipschitz.rounding import add_up, mul_up, sqrt_up


@dataclass(frozen=True)
class LipschitzBound:
    """An upper bound of a module's Lipschitz constant for Euclidean norms, a true statement about its stored weights.

    Attributes:
        constant: of the whole module, rounded up.
        layers: (name, bound) of each layer; in a chain `constant` is their product.
    """

    constant: float
    layers: tuple[tuple[str, float], ...]


def bound(module: nn.Module, input_shape: Sequence[int] | None = None) -> LipschitzBound:
    """Bound the Lipschitz constant of a layer or a network in `eval()` mode, rounded up.

    The network is traced, so sums, residuals, concatenations and functional calls count as what they are. Weights count
    with the exact values they are stored with.

    Args:
        module: a layer of `otnn.nn`, a plain torch layer, or a network of such.
        input_shape: of one sample, without the batch. Layers whose norm depends on the size of the images need it, and
            convolutions far from orthogonal have a tighter bound with it. A `Classifier` knows its own.

    Raises:
        InputError: a layer whose bound is not known, with its name; weights that are not finite.

    Example:
        >>> from otnn.nn import MaxMin, OrthoLinear
        >>> 1 <= bound(nn.Sequential(OrthoLinear(8, 4), MaxMin(), nn.Flatten())).constant < 1.00001
        True
        >>> bound(nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3)))
        Traceback (most recent call last):
        ...
        otnn.errors.InputError: 1: no Lipschitz bound is known for GRU...
    """
    found = trace(module, input_shape)
    constants = step_constants(found.steps)
    layers = [(step.name, step.bound.constant) for step in found.steps if step.kind == "layer"]
    return LipschitzBound(constants[-1], tuple(layers))


def step_constants(steps: Sequence[Step]) -> list[float]:
    """Bound the Lipschitz constant of the map from the input to the result of each step."""
    constants: list[float] = []
    for step in steps:
        sources = [constants[source] for source in step.sources]
        if step.kind == "input":
            constants.append(1.0)
        elif step.kind == "layer":
            constants.append(mul_up(step.bound.constant, sources[0]))
        elif step.kind == "sum":
            constants.append(add_up(*sources))
        elif step.kind == "mix":
            constants.append(mix_constant(step.alpha, *sources))
        elif step.kind == "join":
            constants.append(max(sources))
        elif step.kind == "concatenate":
            constants.append(sqrt_up(add_up(*[mul_up(constant, constant) for constant in sources])))
        else:
            constants.append(sources[0])
    return constants
