"""What every metric returns: scores per sample, their mean with an interval, and how they are to be read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from otnn.metrics.statistics import bootstrap_interval

Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Curves:
    """Scores along the removal or insertion of pixels.

    Attributes:
        shares: (steps + 1,) share of the pixels that are removed (Deletion) or inserted (Insertion), 0 to 1.
        raw: (n, steps + 1) the scores s.
        normalised: (n, steps + 1) (s - s_base) / (s_0 - s_base), 1 at the whole sample and 0 at the baseline; NaN for a
            sample whose score does not exceed that of the baseline, where no part of it can be called evidence.
        ceiling: (n, steps + 1) ||x - x_masked||_2, which no drop of a 1-Lipschitz score exceeds (theory, section 5.6).
    """

    shares: Tensor
    raw: Tensor
    normalised: Tensor
    ceiling: Tensor


@dataclass(frozen=True)
class MetricResult:
    """The score of one method by one metric.

    Attributes:
        name: the metric.
        per_sample: (n,) float64; NaN where it is undefined and left out.
        mean: of the samples that count.
        interval: 95 % bootstrap interval of the mean (percentiles, fixed seed); NaN of fewer than two samples.
        direction: "up" where higher is better, "down" where lower is.
        forwards: samples that the metric passed through the network, for all of the batch; what the given maps had cost
            is not in it.
        signed: whether the signed map was read, or its absolute value.
        undefined: how many samples the metric could not tell, such as those with a constant map.
        counted_as: what those samples count as, in words.
        backwards: as `forwards`, of the metric's own gradients.
        maps: explanations that the metric asked for beyond the given ones; their forwards are in `forwards`.
        curves: of Deletion and Insertion.
        details: further tensors, named in the docstring of the metric.
        settings: what the score depends on.
    """

    name: str
    per_sample: Tensor
    mean: float
    interval: tuple[float, float]
    direction: Direction
    forwards: int
    signed: bool
    undefined: int
    counted_as: str
    backwards: int = 0
    maps: int = 0
    curves: Curves | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arrow(self) -> str:
        """The direction as a table shows it."""
        return "↑" if self.direction == "up" else "↓"

    def summary(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON and tables."""
        return {
            "name": self.name,
            "mean": self.mean,
            "interval": list(self.interval),
            "direction": self.direction,
            "samples": len(self.per_sample),
            "undefined": self.undefined,
            "counted_as": self.counted_as,
            "map": "signed" if self.signed else "absolute",
            "forwards": self.forwards,
            "backwards": self.backwards,
            "maps": self.maps,
            "settings": dict(self.settings),
        }


def summarise(
    name: str,
    values: Tensor,
    direction: Direction,
    *,
    signed: bool,
    undefined: Tensor,
    counted_as: str,
    forwards: int = 0,
    backwards: int = 0,
    maps: int = 0,
    curves: Curves | None = None,
    details: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> MetricResult:
    """Gather scores (n,) into a result; NaN are left out of mean and interval.

    Args:
        name: as in `MetricResult`, and so on.
        values: (n,).
        direction: "up" or "down".
        signed: whether the signed map was read.
        undefined: (n,) bool.
        counted_as: what those count as.
        forwards: of the batch.
        backwards: of the batch.
        maps: of the batch.
        curves: if there are any.
        details: further tensors.
        settings: what the score depends on.

    Example:
        >>> values = torch.tensor([1.0, 3.0, torch.nan])
        >>> result = summarise("x", values, "up", signed=True, undefined=values.isnan(), counted_as="left out")
        >>> result.mean, result.undefined
        (2.0, 1)
    """
    values = values.detach().double()
    return MetricResult(
        name=name,
        per_sample=values,
        mean=float(torch.nanmean(values)),
        interval=bootstrap_interval(values),
        direction=direction,
        forwards=forwards,
        signed=signed,
        undefined=int(undefined.sum()),
        counted_as=counted_as,
        backwards=backwards,
        maps=maps,
        curves=curves,
        details=details or {},
        settings=settings or {},
    )
