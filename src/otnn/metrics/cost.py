"""What a metric will cost, told before the start."""

from collections.abc import Callable
from dataclasses import dataclass

from otnn.errors import InputError
from otnn.metrics.robustness import DOUBLINGS, SHARES


@dataclass(frozen=True)
class Cost:
    """Passes through the network for a batch of samples.

    Attributes:
        forwards: samples that pass forward, those of the maps included.
        backwards: samples that pass backward, those of the maps included.
        maps: explanations asked for, beyond the one of each sample that is scored.
        exact: False where the number depends on the data, and this is the most.
    """

    forwards: int
    backwards: int
    maps: int
    exact: bool = True

    def seconds(self, forward: float, backward: float = 0.0) -> float:
        """The time for the passes alone, from the measured times of one sample forward and backward."""
        return self.forwards * forward + self.backwards * backward


def cost_of(metric: str, count: int, *, forwards_per_map: int = 1, backwards_per_map: int = 1, **settings: int) -> Cost:
    """The passes of a metric on a batch, from its settings.

    Args:
        metric: the name of its function, such as "average_stability".
        count: samples in the batch.
        forwards_per_map: forwards of one explanation, such as 50 of SmoothGrad.
        backwards_per_map: backwards likewise; 0 of a method that only masks.
        settings: those that multiply the cost, by the names and with the defaults of the function; `pixels` caps the
            steps of deletion and insertion; `layers` of mprt and `shares` of robustness_sr are numbers.

    Raises:
        InputError: an unknown metric or setting, or a number below 1.

    Example:
        >>> cost_of("average_stability", 100, forwards_per_map=50).forwards
        105000
        >>> cost_of("mu_fidelity", 100, samples=500).forwards
        50000
    """
    if metric not in _PASSES:
        raise InputError(f"metric: expected one of {', '.join(_PASSES)}, got {metric!r}")
    defaults, passes = _PASSES[metric]
    unknown = [name for name in settings if name not in defaults]
    if unknown:
        known = ", ".join(defaults) or "none"
        raise InputError(f"{metric}: expected settings among {known}, got {', '.join(unknown)}")
    chosen = defaults | settings
    if count < 1 or any(value < 1 for value in chosen.values()):
        raise InputError(f"{metric}: expected a count and settings of at least 1, got {count} and {chosen}")
    forwards, backwards, maps, exact = passes(chosen)
    return Cost(
        count * (forwards + maps * forwards_per_map),
        count * (backwards + maps * backwards_per_map),
        count * maps,
        exact,
    )


def _area(s: dict[str, int]) -> tuple[int, int, int, bool]:
    return min(s["steps"], s["pixels"]) + 1, 0, 0, True


def _robustness_sr(s: dict[str, int]) -> tuple[int, int, int, bool]:
    each = s["shares"] * (1 + (DOUBLINGS + s["bisections"]) * s["attack_steps"])
    return each, each, 0, False


def _free(_: dict[str, int]) -> tuple[int, int, int, bool]:
    return 0, 0, 0, True


# Defaults of the settings, and forwards, backwards and maps per sample, and whether these are exact
_Passes = Callable[[dict[str, int]], tuple[int, int, int, bool]]
_PASSES: dict[str, tuple[dict[str, int], _Passes]] = {
    "deletion": ({"steps": 10, "pixels": 2**62}, _area),
    "insertion": ({"steps": 10, "pixels": 2**62}, _area),
    "mu_fidelity": ({"samples": 200}, lambda s: (s["samples"], 0, 0, True)),
    "robustness_sr": ({"shares": len(SHARES), "bisections": 25, "attack_steps": 10}, _robustness_sr),
    "e_robustness": (
        {"directions": 10, "bisections": 10},
        lambda s: (0, 0, 1 + s["directions"] * (1 + s["bisections"]), False),
    ),
    "average_stability": ({"neighbours": 20}, lambda s: (0, 0, 1 + s["neighbours"], True)),
    # how many layers there are, the caller must say: len(layers_from_top(model, inputs))
    "mprt": ({"layers": 0}, lambda s: (0, 0, 1 + s["layers"], True)),
    **dict.fromkeys(
        (
            "explanation_distance",
            "jpeg_bytes",
            "entropy",
            "gini",
            "top_share",
            "pointing_game",
            "null_block_share",
            "human_alignment",
        ),
        ({}, _free),
    ),
}
