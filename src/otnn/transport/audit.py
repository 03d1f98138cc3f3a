"""The audit of a trained network: its potentials against the exact optimum of the problem that they were trained for.

One output trained by binary hKR, and each class of one-vs-all hKR, are measured against their own problem. Soft hKR and
cross-entropy have no exact dual: there the pair potential of each two classes is measured against the problem of that
pair, which describes the network and proves nothing.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from otnn.checks import check_images, check_labels
from otnn.data import Split
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.losses import HKRLoss, Loss, OneVsAllHKRLoss, SoftHKRLoss
from otnn.models import Classifier, check_model
from otnn.potential import label_distances, pair_distances, pair_potential
from otnn.transport.measures import Function, Measures, measure
from otnn.transport.problem import TransportProblem
from otnn.transport.solution import TransportSolution
from otnn.transport.solver import MEMORY_BUDGET, Round, solve

SAMPLES = 2000
# Minibatches of the upper bracket: at least so many that share no sample, each of at most that many of a class.
_MINIBATCHES, _MINIBATCH = 8, 64
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
    """Whether Proposition 2 may be applied to these samples (theory, section 3).

    Attributes:
        distance: smallest distance of two samples of different classes.
        margin: of the problem, fixed or learned.
        margin_fits: margin <= distance / 2, without which the hinge cannot vanish.
        optimum_right: share of the samples, weighted, whose sign the exact optimum has right.
        optimum_separates: whether it has all of them right.
    """

    distance: float
    margin: float
    margin_fits: bool
    optimum_right: float
    optimum_separates: bool

    @property
    def hold(self) -> bool:
        """Whether the optimum separates with a margin that fits."""
        return self.margin_fits and self.optimum_separates


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
        hypotheses: whether Proposition 2 may be applied.
        bracket: None where a class has fewer than 16 samples.
    """

    name: str
    exact: bool
    function: Function
    problem: TransportProblem
    solution: TransportSolution
    indices: tuple[Tensor, Tensor]
    lipschitz: float
    measures: Measures
    hypotheses: Hypotheses
    bracket: Bracket | None


@dataclass(frozen=True)
class Audit:
    """The audit of a network: one entry for each of its potentials."""

    potentials: tuple[PotentialAudit, ...]

    @property
    def exact(self) -> bool:
        """Whether the network was trained for the problems that it is measured against."""
        return all(entry.exact for entry in self.potentials)


@dataclass(frozen=True)
class _Potential:
    """A 1-Lipschitz function of a network, and the problem that it belongs to."""

    name: str
    exact: bool
    function: Function
    lipschitz: float
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    hinge_weight: float = 0.0
    margin: float | None = None  # of the network, in units of the potential
    alpha: float | None = None
    prior: float | None = None


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
        on_round: called with the name of a potential and the last round of its solver.

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
    check_images(data.images)
    check_model(model, data.images)
    check_labels(data.labels, len(data.images), model.classes)
    if model.multilabel:
        raise InputError("the audit needs classes that exclude each other; this model decides labels one by one")
    names = classes or tuple(str(k) for k in range(model.classes))
    if len(names) != model.classes:
        raise InputError(f"classes: expected {model.classes} names, got {len(names)}")
    if samples is not None and samples < 1:
        raise InputError(f"samples: expected a number >= 1, or None for all, got {samples}")
    exact_model = copy.deepcopy(model).double()
    return Audit(
        tuple(
            _audited(potential, data, samples, seed, memory_budget, partial(on_round, potential.name))
            for potential in _potentials(exact_model, loss, names)
        )
    )


def _as_split(data: object) -> Split:
    if isinstance(data, Split):
        return data
    if isinstance(data, tuple | list) and len(data) == 2:
        return Split(torch.as_tensor(data[0]), torch.as_tensor(data[1]))
    raise InputError(f"data: expected a split such as dataset.train, or (samples, labels), got {type(data).__name__}")


def _audited(
    potential: _Potential,
    data: Split,
    samples: int | None,
    seed: int,
    memory_budget: float,
    on_round: Callable[[Round], None],
) -> PotentialAudit:
    generator = torch.Generator().manual_seed(seed)
    sides = [_members(data.labels, chosen) for chosen in (potential.positive, potential.negative)]
    for side, what in zip(sides, ("positive", "negative"), strict=True):
        if not len(side):
            raise InputError(f"{potential.name}: expected samples of both sides, found none of the {what} one")
    prior = len(sides[0]) / (len(sides[0]) + len(sides[1])) if potential.prior is None else potential.prior
    drawn = [side[torch.randperm(len(side), generator=generator)[:samples].sort().values] for side in sides]
    x, z = (data.images[index] for index in drawn)
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
        indices=(drawn[0], drawn[1]),
        lipschitz=potential.lipschitz,
        measures=measure(potential.function, solution, w1, margin=margin, seed=seed),
        hypotheses=hypotheses(solution),
        bracket=_bracket(potential.function, x, z, generator),
    )


def hypotheses(solution: TransportSolution) -> Hypotheses:
    """Whether Proposition 2 may be applied to the samples of a solved problem."""
    problem = solution.problem
    right_x, right_z = solution.potential_x > 0, solution.potential_z < 0
    right = float(problem.sample_weight_x[right_x].sum() + problem.sample_weight_z[right_z].sum()) / 2
    return Hypotheses(
        distance=solution.class_distance,
        margin=solution.margin,
        margin_fits=solution.margin <= solution.class_distance / 2,
        optimum_right=right,
        optimum_separates=bool(right_x.all() and right_z.all()),
    )


def _members(labels: Tensor, chosen: tuple[int, ...]) -> Tensor:
    return torch.isin(labels, torch.tensor(chosen, device=labels.device)).nonzero().squeeze(1)


def _potentials(model: Classifier, loss: Loss | None, names: tuple[str, ...]) -> Iterator[_Potential]:
    """The potentials of a network: the one output, each class of one-vs-all, or each pair of classes."""
    body = bound(model.body, model.input_shape)
    if isinstance(loss, HKRLoss) != (model.head.out_features == 1) and isinstance(loss, HKRLoss | OneVsAllHKRLoss):
        raise InputError(f"loss: {type(loss).__name__} does not train a network of {model.head.out_features} outputs")
    if isinstance(loss, OneVsAllHKRLoss):
        if len(loss.priors) != model.classes:
            raise InputError(f"loss: expected priors of {model.classes} classes, got {len(loss.priors)}")
        yield from _one_vs_all(model, loss, label_distances(model, body), names)
        return
    distances = pair_distances(model, body)
    for low, high in combinations(range(model.classes), 2):
        own, rival = (high, low) if model.classes == 2 else (low, high)
        scale = float(distances[own, rival])
        if scale == 0:
            raise InputError(f"classes {names[own]} and {names[rival]}: their rows of the head are equal")
        common = {
            "name": f"{names[own]} against {names[rival]}",
            "function": partial(_pair, model, own, rival, distances),
            "lipschitz": scale,
            "positive": (own,),
            "negative": (rival,),
        }
        if isinstance(loss, HKRLoss):
            yield _Potential(
                **common,  # type: ignore[arg-type]
                exact=True,
                hinge_weight=loss.hinge_weight,
                margin=float(loss.margin.detach()) / scale,
                alpha=loss.alpha,
                prior=0.5 if loss.balanced else loss.prior,
            )
        elif isinstance(loss, SoftHKRLoss):
            # M = (z_t - z_j) / 2 for a pair: with g = (z_t - z_j) / scale the loss is scale / 2 times the binary one
            margins = loss.margin.detach().expand(model.classes)
            margin = float(margins[own] + margins[rival]) / scale
            yield _Potential(
                **common,  # type: ignore[arg-type]
                exact=False,
                hinge_weight=loss.hinge_weight,
                margin=margin,
                prior=0.5,
            )
        else:
            yield _Potential(**common, exact=False)  # type: ignore[arg-type]


def _one_vs_all(
    model: Classifier, loss: OneVsAllHKRLoss, constants: Tensor, names: tuple[str, ...]
) -> Iterator[_Potential]:
    margins = loss.margin.detach().expand(model.classes)
    for k, name in enumerate(names):
        yield _Potential(
            name=f"{name} against the others",
            exact=True,
            function=partial(_score, model, k, float(constants[k])),
            lipschitz=float(constants[k]),
            positive=(k,),
            negative=tuple(other for other in range(model.classes) if other != k),
            hinge_weight=loss.hinge_weight,
            margin=float(margins[k]) / float(constants[k]),
            alpha=loss.alpha,
            prior=float(loss.priors[k]),
        )


def _pair(model: Classifier, own: int, rival: int, distances: Tensor, inputs: Tensor) -> Tensor:
    scores = model(inputs.to(model.head.weight))
    classes = torch.tensor([[own], [rival]], device=scores.device).expand(2, len(scores))
    return pair_potential(scores, classes[0], classes[1], distances.to(scores.device))


def _score(model: Classifier, own: int, constant: float, inputs: Tensor) -> Tensor:
    scores: Tensor = model(inputs.to(model.head.weight))
    return scores[:, own] / constant


@torch.no_grad()
def _bracket(function: Function, x: Tensor, z: Tensor, generator: torch.Generator) -> Bracket | None:
    size = min(_MINIBATCH, min(len(x), len(z)) // _MINIBATCHES)
    if size < 2:
        return None
    f_x, f_z = (torch.cat([function(part.double()) for part in side.split(256)]).cpu() for side in (x, z))
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
