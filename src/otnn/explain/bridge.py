"""The bridge to captum: a scorer as a module, samples in parts that fit the memory, baselines, and counts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET, chunk_size


class Scoring(nn.Module):
    """A scorer as a module around its model, for captum to call with sample indices, and to hook.

    Args:
        scorer: what is explained.
        inputs: samples; what comes in another precision is cast to theirs.
        total: return the sum of the scores (1,), whose gradient is that of each: captum differentiates many outputs in
            a loop over them.

    Example:
        >>> x = torch.rand(3, 2)
        >>> Scoring(Scorer(nn.Linear(2, 4).eval(), x, 0), x)(x.double(), torch.arange(3)).shape
        torch.Size([3])
    """

    def __init__(self, scorer: Scorer, inputs: Tensor, *, total: bool = False) -> None:
        super().__init__()
        self.training = False
        self.model, self.scorer, self.dtype, self.total = scorer.model, scorer, inputs.dtype, total

    def forward(self, inputs: Tensor, index: Tensor) -> Tensor:
        """Return the scores (n,) of inputs (n, ...) from the samples `index` (n,), or their sum (1,)."""
        scores = self.scorer(inputs.to(self.dtype), index)
        return scores.sum().unsqueeze(0) if self.total else scores


def by_parts(
    attribute: Callable[[Tensor, Tensor, int], Tensor],
    scorer: Scorer,
    inputs: Tensor,
    memory_budget: float = MEMORY_BUDGET,
    *,
    gradient: bool = True,
) -> Tensor:
    """Maps of all samples, as many at a time as the memory allows.

    Args:
        attribute: called with samples, their indices, and how many copies of a sample one pass may hold.
        scorer: what is explained.
        inputs: (n, ...) the samples.
        memory_budget: bytes of one pass.
        gradient: a pass has a backward.

    Raises:
        InputError: the budget does not hold one sample.
    """
    inputs = inputs.detach()
    size = chunk_size(inputs[:1], memory_budget, scorer.model, gradient=gradient)
    indices = torch.arange(len(inputs), device=inputs.device).split(size)
    return torch.cat([attribute(inputs[int(i[0]) : int(i[-1]) + 1], i, size).detach() for i in indices])


def whole_baseline(baseline: Tensor | float, inputs: Tensor) -> Tensor | float:
    """A baseline as a number, or in the shape of the inputs.

    Raises:
        InputError: it is not finite, or does not broadcast to the inputs.
    """
    values = torch.as_tensor(baseline).to(inputs)
    if not bool(torch.isfinite(values).all()):
        raise InputError("baseline: expected finite values, got NaN or infinite ones")
    if values.ndim == 0:
        return float(values)
    try:
        return values.expand_as(inputs)
    except RuntimeError as error:
        raise InputError(
            f"baseline: expected a number or a tensor that broadcasts to {tuple(inputs.shape)}, got "
            f"{tuple(values.shape)}"
        ) from error


def part_of(baseline: Tensor | float, index: Tensor) -> Tensor | float:
    """The baselines of some samples."""
    return baseline[index] if isinstance(baseline, Tensor) else baseline


def check_count(name: str, value: int, least: int) -> None:
    """Refuse what is no integer of at least `least`.

    Raises:
        InputError: with the name.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}: expected an integer >= {least}, got {value!r}")
