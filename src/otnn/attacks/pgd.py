"""Projected gradient ascent in a ball, from the input and from random starts."""

import torch
from torch import Tensor, nn

from otnn.attacks.ball import ascent, project
from otnn.attacks.objective import Objective, check_norm, radii_of
from otnn.attacks.step import check_count, check_generator, check_number, clearance, is_number, lead, look, take_step
from otnn.batches import spread
from otnn.errors import InputError
from otnn.memory import MEMORY_BUDGET


def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: float | Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    steps: int = 40,
    restarts: int = 1,
    step_size: float | None = None,
    momentum: float = 0.0,
    one_step: bool = True,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Steps x_(k+1) = P(x_k + a v_k / ||v_k||), v_k = momentum v_(k-1) + g_k / ||g_k||, P the projection on the ball.

    The first start is the input, all others are uniform in the ball. The point with the largest margin is returned, of
    all steps, all starts and, if `one_step`, the plain gradient step of the length of the radius, so that the attack is
    never weaker than that step. Where the attack is measured against that step, it must do without. A sample that is
    won is not evaluated again. The cost is at most 2 + steps forwards and 1 + steps backwards, and for each further
    start 1 + steps forwards and steps backwards.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        radius: of the balls, one for all or (n,), in input units.
        norm: "l2" or "linf"; v is followed by its sign in "linf".
        targeted: whether the labels are targets.
        loss: "margin" or "cross_entropy", whose gradient is followed; the margin decides which point is best.
        box: stay in [0, 1]; P is then the projection on the intersection.
        steps: of each start, >= 1.
        restarts: starts, >= 1.
        step_size: a as a share of the radius, > 0 and < 1000; 2.5 / steps by default.
        momentum: in [0, 1].
        one_step: whether the plain gradient step is tried first.
        generator: draws the starts; by default one seeded with 0.
        memory_budget: bytes.

    Returns:
        (n, ...) points, at most the radius away in float64 and in the box. An input that is misclassified already (or
        predicted as the target) stays where it is.

    Raises:
        InputError: what cannot be attacked, or settings out of range.

    Source: Madry et al. 2018, section 2.1; momentum: Dong et al. 2018, algorithm 1.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> pgd(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]), 0.5)
        tensor([[0.2000, 0.1000]])
    """
    check_norm(norm)
    check_count("steps", steps)
    check_count("restarts", restarts)
    check_generator(generator)
    share = 2.5 / steps if step_size is None else step_size
    check_number("step_size", share, below=1000)
    if not is_number(momentum) or not 0 <= momentum <= 1:
        raise InputError(f"momentum: expected a number in [0, 1], got {momentum!r}")
    objective = Objective(model, inputs, labels, targeted=targeted, loss=loss, box=box, memory_budget=memory_budget)
    radii, inputs = radii_of(radius, inputs), inputs.detach()
    generator = generator or torch.Generator().manual_seed(0)

    index = torch.arange(len(inputs), device=inputs.device)
    scores, gradient = look(objective, inputs, index)
    best = inputs.clone()
    clear = clearance(scores, gradient, inputs)
    best_margin, _ = lead(objective, scores, index, clear)
    open_ = ~objective.won(scores, index)

    def offer(points: Tensor, scores: Tensor, index: Tensor) -> None:
        margin, won = lead(objective, scores, index, clear)
        better = margin > best_margin[index]
        best[index[better]], best_margin[index[better]] = points[better], margin[better]
        open_[index[won]] = False

    index = index[open_]
    if one_step and len(index):
        points = take_step(objective, inputs[index], gradient[index], radii[index], norm)
        offer(points, objective.scores(points), index)
    for restart in range(restarts):
        place = inputs.clone()
        if restart:
            place = project(inputs, _uniform(inputs, radii, norm, generator), radii, norm, box=box)
        velocity = torch.zeros_like(inputs)
        for step in range(steps):
            index = open_.nonzero().squeeze(1)
            if not len(index):
                return best
            if step or restart:
                scores, slope = look(objective, place[index], index)
                offer(place[index], scores, index)
            else:
                slope = gradient[index]
            velocity[index] = momentum * velocity[index] + ascent(slope, "l2")
            length = share * spread(radii[index].to(inputs), slope)
            moved = place[index] + length * ascent(velocity[index], norm)
            place[index] = project(inputs[index], moved, radii[index], norm, box=box)
        index = open_.nonzero().squeeze(1)
        if len(index):
            offer(place[index], objective.scores(place[index]), index)
    return best


def _uniform(inputs: Tensor, radii: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """Points (n, ...) uniform in the balls; a number for every sample, so that none depends on which are open."""
    if norm == "linf":
        drawn = torch.rand(inputs.shape, generator=generator, device=generator.device, dtype=inputs.dtype)
        return inputs + spread(radii.to(inputs), inputs) * (2 * drawn.to(inputs.device) - 1)
    drawn = torch.randn(inputs.shape, generator=generator, device=generator.device, dtype=inputs.dtype)
    length = torch.rand(len(inputs), generator=generator, device=generator.device, dtype=torch.float64)
    length = length.to(radii.device) ** (1 / inputs[0].numel()) * radii
    return inputs + spread(length.to(inputs), inputs) * ascent(drawn.to(inputs.device), "l2")
