"""What an attack came to: every point is evaluated again by the model itself before it counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from otnn.attacks.objective import Objective, check_norm, distances
from otnn.errors import InputError
from otnn.memory import MEMORY_BUDGET


@dataclass(frozen=True)
class Outcome:
    """The points that an attack returned, as the model itself sees them.

    Attributes:
        success: (n,) whether another class (or the target) is predicted.
        distance: (n,) float64, the distance to the input, of successes and failures alike.
        finite: (n,) whether the point and its scores are finite; where not, it is no success.
    """

    success: Tensor
    distance: Tensor
    finite: Tensor

    def accuracy(self, radii: Sequence[float]) -> list[float]:
        """The share of samples that the attack does not turn within each radius.

        A point at distance d counts from the radius d on, as the attack may have found it with any larger budget.
        """
        turned = torch.where(self.success, self.distance, torch.inf)
        return [float((turned > radius).double().mean()) for radius in radii]


def evaluate(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    adversarial: Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    box: bool = False,
    memory_budget: float = MEMORY_BUDGET,
) -> Outcome:
    """Evaluate the points of an attack.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        adversarial: (n, ...) what the attack returned.
        norm: "l2" or "linf", of the distances.
        targeted: whether the labels are targets.
        box: a point outside [0, 1] is no success.
        memory_budget: bytes.

    Raises:
        InputError: inputs, labels or points that cannot be used.

    Example:
        >>> model = nn.Linear(1, 1, bias=False).eval()
        >>> _ = nn.init.ones_(model.weight)
        >>> found = evaluate(model, torch.tensor([[0.5]]), torch.tensor([1]), torch.tensor([[-0.25]]))
        >>> found.success, found.distance, found.accuracy([0.5, 0.75])
        (tensor([True]), tensor([0.7500], dtype=torch.float64), [1.0, 0.0])
    """
    objective = Objective(model, inputs, labels, targeted=targeted, box=box, memory_budget=memory_budget)
    check_norm(norm)
    if not isinstance(adversarial, Tensor):
        raise InputError(f"adversarial: expected a tensor, got {type(adversarial).__name__}")
    inputs, adversarial = inputs.detach(), adversarial.detach()
    if adversarial.shape != inputs.shape or adversarial.dtype != inputs.dtype:
        raise InputError(
            f"adversarial: expected {tuple(inputs.shape)} of {inputs.dtype}, got {tuple(adversarial.shape)} of "
            f"{adversarial.dtype}; the model must see the point as it was found"
        )
    readable = torch.isfinite(adversarial).flatten(1).all(dim=1)
    points = torch.where(readable.view(-1, *[1] * (inputs.ndim - 1)), adversarial, inputs)
    scores = objective.scores(points)
    finite = readable & torch.isfinite(scores).all(dim=1)
    success = objective.won(scores, torch.arange(len(inputs), device=inputs.device)) & finite
    if box:
        success &= ((points >= 0) & (points <= 1)).flatten(1).all(dim=1)
    return Outcome(success, distances(inputs, adversarial, norm), finite)
