"""Minimal-norm attacks of foolbox behind the signature of ours: C&W, DeepFool, DDN and FMN.

Foolbox gives its steps and its first radius in the units of the inputs, as fits pixels. In the box [0, 1] the attacks
run so. Without a box there is no natural unit, and each sample is attacked in units of its own: the length of the
shortest gradient step that wins (`otnn.attacks.adapter.scales`); the bounds are then infinite, or 100 units in C&W,
whose reparametrisation needs some. Scores are divided by the lead of the input, so that constants have no unit either.
The criterion takes points on the boundary, and `settle` moves them over it.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from otnn.attacks.adapter import SLACK, View, as_they_are, missing, run, scales, settle
from otnn.attacks.objective import Objective, check_norm
from otnn.attacks.step import check_count, check_number
from otnn.batches import spread
from otnn.checks import check_images
from otnn.errors import InputError
from otnn.memory import MEMORY_BUDGET

# Of Adam in C&W
_STEP = 0.03
# Half-width of the bounds of C&W without a box, in units of the sample: tanh is linear within 1e-4 where |u| < 1.7
_WIDE = 100.0


def carlini_wagner(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    steps: int = 200,
    searches: int = 9,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Minimise ||d||^2 + c max(0, -f(x + d)) by Adam, with a binary search for the c of each sample.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        norm: "l2".
        targeted: whether the labels are targets.
        loss: "margin", which the attack is made of.
        box: stay in [0, 1], by x = (1 + tanh w) / 2.
        steps: of Adam, for each c; foolbox takes 10,000.
        searches: values of c.
        step_size: of Adam, which moves every coordinate by it, > 0: in w; without a box, in units of the sample. By
            default 0.03 in the box, where foolbox's 0.01 does not in so few steps leave the walls, at which tanh is
            flat. Without a box 0.1 / sqrt(coordinates), so that a step of all of them is a tenth of a unit long, and
            once more with 0.03 for samples that do not win so: their boundary depends on few coordinates.
        generator: not needed: nothing is drawn.
        memory_budget: bytes.

    Returns:
        (n, ...) points; the input where the attack fails, or where it is won from the start.

    Raises:
        InputError: what cannot be attacked, or settings out of range; foolbox is not installed.

    Source: Carlini and Wagner 2017, section VI A (L2).

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> point = carlini_wagner(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]), steps=80)  # 0.7 away
        >>> 0.7 <= float((point - 0.5).norm()) < 0.71
        True
    """
    foolbox = _foolbox()
    _only("carlini_wagner", norm, ("l2",), loss, ("margin",))
    check_count("steps", steps)
    check_count("searches", searches)
    if step_size is not None:
        check_number("step_size", step_size)
    check_images(inputs, box=box)
    rates = [step_size] if step_size is not None else [_STEP] if box else [0.1 / math.sqrt(inputs[0].numel()), _STEP]
    # A first c of 1 is near the least that wins in these units: long steps in the box cross by overshooting, and the
    # search then goes on below it, where nothing wins
    first = 10.0 if box else 1.0
    bounds = (0.0, 1.0) if box else (-_WIDE, _WIDE)

    def points(rate: float, images: Tensor, classes: Tensor) -> Tensor:
        attack = foolbox.attacks.L2CarliniWagnerAttack(
            # stopping early looks at the sum of the losses of all samples, and so would make them depend on each other
            binary_search_steps=searches, steps=steps, stepsize=rate if box else rate / _WIDE, initial_const=first,
            abort_early=False,
        )  # fmt: skip
        return _minimal(
            attack, model, images, classes, targeted=targeted, loss=loss, box=box, duel=True, bounds=bounds,
            generator=generator, memory_budget=memory_budget, squared=True,
        )  # fmt: skip

    found = points(rates[0], inputs, labels)
    still = (found == inputs).flatten(1).all(dim=1).nonzero().squeeze(1)
    if len(rates) > 1 and len(still):
        found[still] = points(rates[1], inputs[still], labels[still])
    return found


def deepfool(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Step to the nearest boundary of the linearised scores, until the class changes.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        norm: "l2" or "linf".
        targeted: whether the labels are targets; each step then goes to the boundary of the target.
        loss: "margin" or "cross_entropy": differences of log-probabilities are those of scores, so both are the same.
        box: clamp each step to [0, 1].
        steps: at most.
        candidates: how many classes, the largest scores at the input, are looked at, >= 2: the label's and a rival's;
            one backward each.
        overshoot: by how much the sum of the steps is lengthened, > 0.
        generator: not needed: nothing is drawn.
        memory_budget: bytes.

    Returns:
        (n, ...) points; the input where the attack fails, or where it is won from the start.

    Raises:
        InputError: what cannot be attacked, or settings out of range; foolbox is not installed.

    Source: Moosavi-Dezfooli, Fawzi and Frossard 2016, algorithm 2.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> point = deepfool(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
        >>> f"{float((point - 0.5).norm()):.3f}"  # 1.02 times the distance
        '0.714'
    """
    foolbox = _foolbox()
    _only("deepfool", norm, ("l2", "linf"), loss, ("margin", "cross_entropy"))
    check_count("steps", steps)
    check_count("candidates", candidates, least=2)
    check_number("overshoot", overshoot)
    kind = foolbox.attacks.L2DeepFoolAttack if norm == "l2" else foolbox.attacks.LinfDeepFoolAttack
    attack = kind(steps=steps, candidates=candidates, overshoot=overshoot)
    return _minimal(
        attack, model, inputs, labels, targeted=targeted, loss="margin", box=box, duel=targeted,
        generator=generator, memory_budget=memory_budget,
    )  # fmt: skip


def ddn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    steps: int = 100,
    radius: float = 1.0,
    gamma: float = 0.05,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Gradient steps on a sphere that shrinks by 1 - gamma where the class has changed, and grows by 1 + gamma else.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        norm: "l2".
        targeted: whether the labels are targets.
        loss: "margin", as the cross-entropy of the two scores -f/2 and f/2 of the margin f, or "cross_entropy".
        box: stay in [0, 1].
        steps: how many.
        radius: of the first sphere, > 0, in input units; without a box in units of the sample.
        gamma: in (0, 1).
        generator: of the directions where a gradient is 0; seeded with 0 by default.
        memory_budget: bytes.

    Returns:
        (n, ...) points; the input where the attack fails, or where it is won from the start.

    Raises:
        InputError: what cannot be attacked, or settings out of range; foolbox is not installed.

    Source: Rony et al. 2019, algorithm 1.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> point = ddn(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]))  # the distance is 0.7
        >>> 0.7 <= float((point - 0.5).norm()) < 0.71
        True
    """
    foolbox = _foolbox()
    _only("ddn", norm, ("l2",), loss, ("margin", "cross_entropy"))
    check_count("steps", steps)
    check_number("radius", radius)
    check_number("gamma", gamma, below=1)
    attack = foolbox.attacks.DDNAttack(init_epsilon=radius, steps=steps, gamma=gamma)
    return _minimal(
        attack, model, inputs, labels, targeted=targeted, loss=loss, box=box, duel=loss == "margin",
        generator=generator, memory_budget=memory_budget,
    )  # fmt: skip


def fmn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: str = "l2",
    targeted: bool = False,
    loss: str = "margin",
    box: bool = False,
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    generator: torch.Generator | None = None,
    memory_budget: float = MEMORY_BUDGET,
) -> Tensor:
    """Gradient steps in a ball whose radius follows the boundary: first to first order, then by factors 1 +- gamma.

    The L2 projection of foolbox 3.3.4 divides a norm by itself, and so never projects; it is replaced by the one that
    the paper has.

    Args:
        model: see `Objective`.
        inputs: (n, ...) finite; in [0, 1] if `box`.
        labels: (n,) the true classes, or the targets.
        norm: "l2" or "linf".
        targeted: whether the labels are targets.
        loss: "margin", which the attack is made of.
        box: stay in [0, 1].
        steps: how many.
        step_size: of the first step, > 0, in input units; without a box in units of the sample. The last is a
            hundredth.
        gamma: the first, in (0, 1); annealed to 0.001.
        generator: not needed: nothing is drawn.
        memory_budget: bytes.

    Returns:
        (n, ...) points; the input where the attack fails, or where it is won from the start.

    Raises:
        InputError: what cannot be attacked, or settings out of range; foolbox is not installed.

    Source: Pintor et al. 2021, algorithm 1.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> point = fmn(model, torch.tensor([[0.5, 0.5]]), torch.tensor([1]))  # the distance is 0.7
        >>> 0.7 <= float((point - 0.5).norm()) < 0.71
        True
    """
    foolbox = _foolbox()
    _only("fmn", norm, ("l2", "linf"), loss, ("margin",))
    check_count("steps", steps)
    check_number("step_size", step_size)
    check_number("gamma", gamma, below=1)
    kind = _projecting(foolbox, box) if norm == "l2" else foolbox.attacks.LInfFMNAttack
    attack = kind(steps=steps, max_stepsize=step_size, gamma=gamma)
    return _minimal(
        attack, model, inputs, labels, targeted=targeted, loss=loss, box=box, duel=True,
        generator=generator, memory_budget=memory_budget,
    )  # fmt: skip


def _minimal(
    attack: Any,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool,
    loss: str,
    box: bool,
    duel: bool,
    generator: torch.Generator | None,
    memory_budget: float,
    bounds: tuple[float, float] | None = None,
    squared: bool = False,
) -> Tensor:
    """Run a minimisation attack of foolbox; `squared`: its loss adds the scores to a squared distance."""
    foolbox = _foolbox()
    objective = Objective(model, inputs, labels, targeted=targeted, loss=loss, box=box, memory_budget=memory_budget)
    plain = foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
    nearly = _nearly(foolbox)
    inputs = inputs.detach()
    bounds = bounds or ((0.0, 1.0) if box else (-torch.inf, torch.inf))

    def chunk(index: Tensor) -> Tensor:
        images = inputs[index]
        length, size = scales(objective, images, index)
        # in half precision the model alone: Adam's small steps would be lost
        wide = torch.promote_types(images.dtype, torch.float32)
        factor = torch.ones_like(size, dtype=wide) if loss == "cross_entropy" else 1 / size.to(wide)
        if box:
            factor = factor * length.to(wide).square() if squared else factor
            view = View(objective, index, *as_they_are(images), factor, duel=duel)
            start = images.to(wide)
        else:
            view = View(objective, index, images, spread(length.to(images), images), factor, duel=duel)
            start = torch.zeros_like(images, dtype=wide)
        seen = foolbox.PyTorchModel(view, bounds=bounds, device=inputs.device)
        behind = objective.margin(objective.scores(images), index).abs()
        criterion = nearly(view, behind) if duel else plain(view.labels)
        points: Tensor = attack.run(seen, start, criterion)
        return view.images(points.detach())

    return settle(objective, inputs, run(objective, inputs, chunk, generator=generator, memory_budget=memory_budget))


def _only(name: str, norm: str, norms: tuple[str, ...], loss: str, losses: tuple[str, ...]) -> None:
    check_norm(norm)
    for what, given, known in (("norm", norm, norms), ("loss", loss, losses)):
        if given not in known:
            raise InputError(f"{what}: {name} takes {' or '.join(known)}, got {given!r}")


def _nearly(foolbox: Any) -> Any:
    """The criterion of a duel: a point on the boundary counts, which a step of the exact length may never cross."""

    class Nearly(foolbox.criteria.Misclassification):  # type: ignore[misc]
        def __init__(self, view: View, behind: Tensor) -> None:
            super().__init__(view.labels)
            self.least = -SLACK * behind * view.factor.squeeze(1)

        def __call__(self, perturbed: Any, outputs: Any) -> Any:
            return outputs[:, 1] - outputs[:, 0] > self.least

    return Nearly


def _projecting(foolbox: Any, box: bool) -> Any:
    """FMN in L2 with a projection onto the ball, after one onto the box: what is clamped would take up its length."""
    from foolbox.devutils import atleast_kd, flatten

    class Projecting(foolbox.attacks.L2FMNAttack):  # type: ignore[misc]
        def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
            change = (x.clip(0.0, 1.0) if box else x) - x0
            norms = flatten(change).norms.l2(axis=-1)
            share = (epsilon / norms.maximum(1e-12)).minimum(1.0)
            return x0 + change * atleast_kd(share, change.ndim)

    return Projecting


def _foolbox() -> Any:
    try:
        with warnings.catch_warnings():
            # it imports a name from a module that SciPy 2 drops
            warnings.filterwarnings("ignore", r"Please import `gaussian_filter`", DeprecationWarning)
            import foolbox
    except ImportError as error:
        raise missing("foolbox", error) from None
    return foolbox
