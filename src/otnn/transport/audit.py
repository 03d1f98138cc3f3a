"""The audit of a trained network: its potentials against the exact optimum of the problem that they were trained for.

One output trained by binary hKR, and each class of one-vs-all hKR, are measured against their own problem. Soft hKR and
cross-entropy have no exact dual: there the pair potential of each two classes is measured against the problem of that
pair, which describes the network and proves nothing.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from otnn.checks import check_images, check_labels
from otnn.data import Split
from otnn.errors import InputError
from otnn.losses import Loss
from otnn.models import Classifier, check_model
from otnn.transport.flow import check_budget
from otnn.transport.measures import Function, Measures, measure, values_of
from otnn.transport.problem import TransportProblem
from otnn.transport.solution import TransportSolution
from otnn.transport.solver import MEMORY_BUDGET, Round, solve
from otnn.transport.trained import TrainedPotential, potentials_of

SAMPLES = 2000
# Segments of the plan that are looked at, shared by all potentials of a network, each of which has at most _SEGMENTS.
_ALL_SEGMENTS, _SEGMENTS = 2000, 500
# Minibatches of the upper bracket: at least so many that share no sample, each of at most that many of a class.
_MINIBATCHES, _MINIBATCH = 8, 256
# What counts as rounding, as a share of the distances.
_ROUNDING = 1e-9
_NORMAL, _STUDENT = 1.959963984540054, {7: 2.3646}  # 97.5 % points


@dataclass(frozen=True)
class Estimate:
    """A mean over independent samples, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Bracket:
    """W1 of the two laws behind the samples, from both sides: KR(f) <= W1 <= E[W1 of two minibatches].

    Attributes:
        kr: KR(f), a lower bound for any 1-Lipschitz f that does not depend on these samples: held-out ones.
        minibatch_w1: the upper bound, for minibatches of `minibatch` samples of each class.
        minibatch: that number; more samples bring the bound down.
        minibatches: how many were taken, without a common sample.
    """

    kr: Estimate
    minibatch_w1: Estimate
    minibatch: int
    minibatches: int


@dataclass(frozen=True)
class Hypotheses:
    """What Proposition 2 asks of these samples (theory, section 3): an exact optimum whose sign is right everywhere.

    Where several potentials are optimal, the one that was found is judged; another may separate where it does not.

    Attributes:
        distance: smallest distance of two samples of different classes, of those that were drawn.
        margin: of the optimum, fixed or learned.
        hinge_can_vanish: margin <= distance / 2, up to rounding: at a larger margin every 1-Lipschitz function leaves
            samples inside it.
        optimum_right: share of the samples, weighted, whose sign the optimum has right.
        optimum_separates: whether it has all of them right, so that Proposition 2 holds for it.
    """

    distance: float
    margin: float
    hinge_can_vanish: bool
    optimum_right: float
    optimum_separates: bool


@dataclass(frozen=True)
class PotentialAudit:
    """One potential of a network against the exact optimum.

    Attributes:
        name: of the potential, such as "8 against 0".
        exact: whether the network was trained for this very problem; otherwise the figures are descriptive.
        function: the potential, of (batch, ...) samples.
        problem: what was solved.
        solution: its optimum.
        indices: of the samples in the data, of the positives and of the negatives.
        lipschitz: the bound that the scores were divided by, so that the potential is 1-Lipschitz.
        measures: every figure.
        margin: of the network, fixed or learned, in units of the potential; that of the optimum is the solution's.
        hypotheses: what Proposition 2 asks; None for the plain problem, whose potentials have a free constant.
        bracket: None where a class has fewer than 16 samples.
    """

    name: str
    exact: bool
    function: Function
    problem: TransportProblem
    solution: TransportSolution
    indices: tuple[Tensor, Tensor]
    lipschitz: float
    margin: float | None
    measures: Measures
    hypotheses: Hypotheses | None
    bracket: Bracket | None


@dataclass(frozen=True)
class Audit:
    """The audit of a network: one entry for each of its potentials."""

    potentials: tuple[PotentialAudit, ...]

    @property
    def exact(self) -> bool:
        """Whether the network was trained for the problems that it is measured against."""
        return all(entry.exact for entry in self.potentials)


def audit(
    model: Classifier,
    data: Split | tuple[Tensor, Tensor],
    loss: Loss | None = None,
    *,
    classes: tuple[str, ...] | None = None,
    samples: int | None = SAMPLES,
    seed: int = 0,
    memory_budget: float = MEMORY_BUDGET,
    on_round: Callable[[str, Round], None] = lambda name, last: None,
) -> Audit:
    """Measure how near a trained network is to the exact optimum of its loss on these data.

    Args:
        model: a classifier in `eval()` mode; it is measured in float64.
        data: a split of a data set, or samples and labels: those of the training, or others.
        loss: the loss that it was trained with, whose problem is solved. Without one, and with cross-entropy, the
            potentials are measured against plain Wasserstein-1.
        classes: names of the classes.
        samples: samples taken at random from each side of a problem, at most; None takes all. The optimum on fewer
            samples is lower, so that gaps of different numbers do not compare.
        seed: of those draws, of the segments and of the minibatches.
        memory_budget: see `otnn.transport.solve`.
        on_round: called with the name of a potential, and its number where there are several, and the last round of
            its solver.

    Raises:
        InputError: samples or labels that cannot be used, a class without samples, a model in training mode or with
            several labels, a loss that does not fit the outputs, a problem beyond the memory budget.

    Example:
        >>> from otnn.data import load
        >>> from otnn.losses import HKRLoss
        >>> from otnn.models import build
        >>> digits = load("digits", classes=["0", "8"])
        >>> model = build("dense", (1, 8, 8), 2, widths=(16,)).eval()
        >>> untrained = audit(model, digits.test, HKRLoss(margin=0.5, hinge_weight=10.0)).potentials[0]
        >>> untrained.measures.gap > 1 and untrained.measures.slackness.mean < 0.5
        True
    """
    data = _as_split(data)
    if not isinstance(model, Classifier):
        raise InputError(f"model: expected a Classifier, which names body and head, got {type(model).__name__}")
    check_images(data.images)
    check_model(model, data.images)
    check_labels(data.labels, len(data.images), model.classes)
    if model.multilabel:
        raise InputError("the audit needs classes that exclude each other; this model decides labels one by one")
    names = classes or tuple(str(k) for k in range(model.classes))
    if len(names) != model.classes:
        raise InputError(f"classes: expected {model.classes} names, got {len(names)}")
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise InputError(f"samples: expected a whole number >= 1, or None for all, got {samples}")
    potentials = list(potentials_of(copy.deepcopy(model).double(), loss, names))
    draw = _Draw(data, samples, seed)
    for potential in potentials:  # all that will be refused is refused before the first is solved
        sides = [draw(chosen, potential.name) for chosen in (potential.positive, potential.negative)]
        check_budget(len(sides[0][0]), len(sides[1][0]), data.images[0].numel(), memory_budget)
    count = len(potentials)
    segments = min(_SEGMENTS, -(-_ALL_SEGMENTS // count))
    return Audit(
        tuple(
            _audited(
                potential, draw, seed, segments, memory_budget,
                partial(on_round, potential.name if count == 1 else f"{potential.name} ({number} of {count})"),
            )
            for number, potential in enumerate(potentials, 1)
        )
    )  # fmt: skip


class _Draw:
    """The samples of some classes: the same draw wherever they occur, held once."""

    def __init__(self, data: Split, samples: int | None, seed: int) -> None:
        self.data, self.samples, self.seed = data, samples, seed
        self.drawn: dict[tuple[int, ...], tuple[Tensor, Tensor, int]] = {}

    def __call__(self, classes: tuple[int, ...], name: str) -> tuple[Tensor, Tensor, int]:
        """Indices, samples, and how many there were to draw from."""
        if classes not in self.drawn:
            labels = self.data.labels
            members = torch.isin(labels, torch.tensor(classes, device=labels.device)).nonzero().squeeze(1)
            if not len(members):
                raise InputError(
                    f"{name}: found no sample of class {', '.join(map(str, classes))}; give data that hold all classes"
                )
            generator = torch.Generator().manual_seed(self.seed)
            chosen = members[torch.randperm(len(members), generator=generator)[: self.samples].sort().values]
            self.drawn[classes] = chosen, self.data.images[chosen], len(members)
        return self.drawn[classes]


def _as_split(data: object) -> Split:
    if isinstance(data, Split):
        return data
    if isinstance(data, tuple | list) and len(data) == 2:
        return Split(torch.as_tensor(data[0]), torch.as_tensor(data[1]))
    raise InputError(f"data: expected a split such as dataset.train, or (samples, labels), got {type(data).__name__}")


def _audited(
    potential: TrainedPotential,
    draw: _Draw,
    seed: int,
    segments: int,
    memory_budget: float,
    on_round: Callable[[Round], None],
) -> PotentialAudit:
    (positives, x, count_x), (negatives, z, count_z) = (
        draw(chosen, potential.name) for chosen in (potential.positive, potential.negative)
    )
    prior = count_x / (count_x + count_z) if potential.prior is None else potential.prior
    plain = solve(TransportProblem(x, z, hinge_weight=0.0, prior=prior), memory_budget=memory_budget, on_round=on_round)
    if potential.hinge_weight > 0:
        learned = potential.alpha is not None
        problem = TransportProblem(
            x,
            z,
            hinge_weight=potential.hinge_weight,
            margin=None if learned else potential.margin,
            alpha=potential.alpha,
            prior=prior,
        )
        solution = solve(problem, memory_budget=memory_budget, on_round=on_round)
    else:
        problem, solution = plain.problem, plain
    w1 = plain.transport_cost
    margin = potential.margin if problem.learns_margin else None
    return PotentialAudit(
        name=potential.name,
        exact=potential.exact,
        function=potential.function,
        problem=problem,
        solution=solution,
        indices=(positives, negatives),
        lipschitz=potential.lipschitz,
        margin=potential.margin,
        measures=measure(potential.function, solution, w1, margin=margin, segments=segments, seed=seed),
        hypotheses=hypotheses(solution) if problem.hinge_weight > 0 else None,
        bracket=_bracket(potential.function, x, z, torch.Generator().manual_seed(seed)),
    )


def hypotheses(solution: TransportSolution) -> Hypotheses:
    """What Proposition 2 asks of the samples of a solved problem."""
    problem = solution.problem
    # values are exact up to the gap, and a learned margin is often exactly half the distance
    rounding = _ROUNDING * max(solution.transport_cost, solution.class_distance, solution.margin)
    right_x, right_z = solution.potential_x > rounding, solution.potential_z < -rounding
    right = float(problem.sample_weight_x[right_x].sum() + problem.sample_weight_z[right_z].sum()) / 2
    return Hypotheses(
        distance=solution.class_distance,
        margin=solution.margin,
        hinge_can_vanish=solution.margin <= solution.class_distance / 2 + rounding,
        optimum_right=min(1.0, right),
        optimum_separates=bool(right_x.all() and right_z.all()),
    )


def _bracket(function: Function, x: Tensor, z: Tensor, generator: torch.Generator) -> Bracket | None:
    size = min(_MINIBATCH, min(len(x), len(z)) // _MINIBATCHES)
    if size < 2:
        return None
    f_x, f_z = (values_of(function, side.double()) for side in (x, z))
    kr = float(f_x.mean() - f_z.mean())
    error = math.sqrt(float(f_x.var() / len(f_x) + f_z.var() / len(f_z)))
    orders = [torch.randperm(len(side), generator=generator)[: _MINIBATCHES * size] for side in (x, z)]
    batches = zip(*(order.split(size) for order in orders), strict=True)
    found = torch.tensor(
        [solve(TransportProblem(x[i], z[j], hinge_weight=0.0)).transport_cost for i, j in batches],
        dtype=torch.float64,
    )
    mean, spread = float(found.mean()), float(found.std()) / math.sqrt(len(found))
    reach = _STUDENT[_MINIBATCHES - 1] * spread
    return Bracket(
        kr=Estimate(kr, kr - _NORMAL * error, kr + _NORMAL * error),
        minibatch_w1=Estimate(mean, mean - reach, mean + reach),
        minibatch=size,
        minibatches=_MINIBATCHES,
    )
