"""The gradient step: one step of the length of the radius, the fast gradient method in L2 and its sign form in Linf."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from otnn.attacks.ball import ascent, project
from otnn.attacks.objective import Objective, check_norm, radii_of
from otnn.batches import spread
from otnn.errors import InputError
from otnn.memory import MEMORY_BUDGET

# A lead of fewer roundings of the scores may be lost in a batch of another size
_ROUNDINGS = 32


def gradient_step(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: float | Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """One step along the gradient g of the loss: x + radius g / ||g||_2, or x + radius sign(g) for "linf".

    The cost is one forward and one backward. On a 1-Lipschitz network that is the exact optimum of its problem, the
    step of the length |f(x)| leads to the nearest adversarial point.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        radius: the length of the step, one for all or (n,), in input units.
        norm: "l2" or "linf".
        targeted: whether the labels are targets.
        loss: "margin" or "cross_entropy".
        box: stay in [0, 1]: the step is clamped, and so becomes shorter.
        generator: not needed: nothing is drawn.
        memory_budget: bytes.

    Returns:
        (n, ...) points, at most the radius away in float64. An input that is misclassified already (or predicted as the
        target) stays where it is, and so does one whose gradient is 0.

    Raises:
        InputError: what cannot be attacked.

    Source: Goodfellow, Shlens and Szegedy 2015, section 4 (the sign step).

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> gradient_step(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]), 0.5)
        tensor([[0.2000, 0.1000]])
    """
    check_norm(norm)
    check_generator(generator)
    objective = Objective(model, inputs, labels, targeted=targeted, loss=loss, box=box, memory_budget=memory_budget)
    radii, inputs = radii_of(radius, inputs), inputs.detach()
    index = torch.arange(len(inputs), device=inputs.device)
    scores, gradient = look(objective, inputs, index)
    stays = objective.won(scores, index)
    points = take_step(objective, inputs, gradient, radii, norm)
    return torch.where(spread(stays, inputs), inputs, points)


def take_step(objective: Objective, inputs: Tensor, gradient: Tensor, radii: Tensor, norm: str) -> Tensor:
    """The inputs (m, ...) moved by the radii (m,) along their gradients, in the box of the objective."""
    moved = objective.inside(inputs + spread(radii.to(inputs), inputs) * ascent(gradient, norm))
    return project(inputs, moved, radii, norm)


def look(
    objective: Objective, images: Tensor, index: Tensor, function: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Class scores (m, classes), and gradients (m, ...) of the loss or another function, in one pass.

    Args:
        objective: of the attack.
        images: (m, ...).
        index: (m,) whose images they are.
        function: of class scores (m, classes) and samples (m,); the loss by default.
    """
    seen = []

    def value(scores: Tensor, rows: Tensor) -> Tensor:
        seen.append(scores.detach())
        return (function or objective.value)(scores, rows)

    _, gradient = objective.gradients(images, index, value)
    return torch.cat(seen), gradient


def lead(objective: Objective, scores: Tensor, index: Tensor, clear: Tensor) -> tuple[Tensor, Tensor]:
    """The margin (m,) of samples `index`, -inf where a score is not finite, and whether it exceeds their clearance."""
    finite = torch.isfinite(scores).all(dim=1)
    margin = torch.where(finite, objective.margin(scores, index), -torch.inf)
    return margin, margin > clear[index]


def clearance(scores: Tensor, gradient: Tensor, inputs: Tensor) -> Tensor:
    """The lead (n,) that rounding does not take away when a batch of another size computes it.

    Args:
        scores: (n, classes) of the inputs.
        gradient: (n, ...) of the margin or the loss there: |g| . |x| are terms that cancel in a score near 0.
        inputs: (n, ...).
    """
    terms = (gradient * inputs).flatten(1).abs().sum(dim=1)
    scale = torch.maximum(scores.abs().amax(dim=1), terms).nan_to_num(nan=0.0, posinf=0.0)
    return _ROUNDINGS * torch.finfo(scores.dtype).eps * scale


def check_count(name: str, number: int, least: int = 1) -> None:
    """Refuse a number that is not an integer of at least `least`.

    Raises:
        InputError: what it should be.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise InputError(f"{name}: expected an integer >= {least}, got {number!r}")


def check_number(name: str, number: float, below: float = math.inf) -> None:
    """Refuse what is no number > 0 and < `below`.

    Raises:
        InputError: what it should be.
    """
    if not is_number(number) or not 0 < number < below:
        expected = "a finite number > 0" if below == math.inf else f"a number > 0 and < {below:g}"
        raise InputError(f"{name}: expected {expected}, got {number!r}")


def is_number(value: Any) -> bool:
    """Whether a value is a real number, and no boolean."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_generator(generator: torch.Generator | None) -> None:
    """Refuse what draws no numbers.

    Raises:
        InputError: what to pass.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(
            f"generator: expected a torch.Generator or None, got {generator!r}; "
            "make one with torch.Generator().manual_seed(0)"
        )
