"""What every guarantee returns: a bound for each sample, where it holds, and of which samples it says something."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# One grey level of one pixel: a ball below this radius holds no other 8-bit image
GREY = 1 / 255
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Guarantee:
    """A proven bound for each sample of a batch.

    Attributes:
        name: of the guarantee.
        bound: (n,) float64; NaN where there is none.
        unit: of the bound, in words.
        vacuous: (n,) bool, whether the bound is so weak, or missing, that it says nothing of the sample; when that is
            so is told in the docstring of each guarantee.
        reason: per sample, why it is vacuous or what part of it is missing; empty where it is complete.
        domain: where the bound holds, in one sentence.
        details: further tensors, named in the docstring of the guarantee.
    """

    name: str
    bound: Tensor
    unit: str
    vacuous: Tensor
    reason: tuple[str, ...]
    domain: str
    details: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of the samples for which the guarantee is not vacuous."""
        return float((~self.vacuous).double().mean())

    def summary(self) -> dict[str, Any]:
        """Share, quantiles of the bound (None for infinite ones) and reasons of the batch, for JSON and tables."""
        known = self.bound[~self.bound.isnan()].sort().values
        places = [round(q * (len(known) - 1)) for q in _QUANTILES] if len(known) else []
        levels = [float(known[place]) for place in places]
        return {
            "name": self.name,
            "samples": len(self.bound),
            "share": self.share,
            "unit": self.unit,
            "domain": self.domain,
            "quantiles": {
                f"{q:g}": level if level < torch.inf else None for q, level in zip(_QUANTILES, levels, strict=False)
            },
            "reasons": dict(Counter(reason for reason in self.reason if reason)),
        }


def first_reasons(known: Sequence[str], *cases: tuple[Tensor, str]) -> tuple[str, ...]:
    """Of each sample the reason that is known already, else the first case (n,) that holds, else an empty text.

    Example:
        >>> first_reasons(("", "tied", ""), (torch.tensor([True, True, False]), "no boundary"))
        ('no boundary', 'tied', '')
    """
    rows = zip(known, *[case.tolist() for case, _ in cases], strict=True)
    texts = [text for _, text in cases]
    return tuple(
        before or next((text for text, holds in zip(texts, held, strict=True) if holds), "") for before, *held in rows
    )
