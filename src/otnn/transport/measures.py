"""How far a given potential is from the exact optimum of its problem: every figure of the audit, for any function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from otnn.batches import sample_norm, spread
from otnn.errors import InputError
from otnn.transport.costs import pair_distances
from otnn.transport.problem import TransportProblem
from otnn.transport.solution import TransportSolution

Function = Callable[[Tensor], Tensor]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# A sample counts as moved onto the zero level where this share of its value is left, at most.
REACHED = 0.05
_BATCH = 256
_CHUNK = 1 << 24  # numbers


@dataclass(frozen=True)
class Summary:
    """Weighted mean and quantiles of a figure; None where there is nothing to weigh.

    Attributes:
        mean: the mean.
        quantiles: at `QUANTILES`: 5, 25, 50, 75 and 95 %.
    """

    mean: float
    quantiles: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return self.quantiles[2]


@dataclass(frozen=True)
class GapParts:
    """The terms that make up L(f) - L*, each >= 0, and their sum to rounding.

    Attributes:
        transport: sum of pi (c - (f(x) - f(z))): pairs of the plan that f does not tell apart by their distance.
        hinge_x: positives inside the margin that the plan carries less often than it may, and those outside it that it
            carries more than once.
        hinge_z: the same of the negatives.
        margin: of a learned margin, m (2 (|pi| - 1) - lambda alpha); 0 for a fixed one.
    """

    transport: float
    hinge_x: float
    hinge_z: float
    margin: float


@dataclass(frozen=True)
class Measures:
    """A potential against the optimum of its problem. Shares and summaries are weighted by the plan unless said.

    Attributes:
        loss: L(f) on the samples.
        optimum: L*.
        w1: W1 of the two samples.
        gap: (L(f) - L*) / W1; None where W1 is 0.
        shifted_gap: the same of f + b for the best constant b.
        constant_gap: the same of the constant 0, which says nothing of any sample.
        parts: the terms of the gap, divided by W1.
        kr: KR(f) / W1, at most 1.
        slackness: (f(x) - f(z)) / ||x - z||, at most 1.
        cosine_x: of grad f(x) with x - z, for each pair.
        cosine_z: of grad f(z) with x - z.
        optimal_cosine_x: the same of the exact potential: below 1 where samples have several partners but one gradient.
        optimal_cosine_z: likewise.
        gradient_norm: ||grad f|| at the samples, weighted by the samples.
        segment_cosine: of grad f with x - z, at points inside segments drawn from the plan.
        segment_norm: ||grad f|| at the same points.
        segment_profile: (position, mean cosine, mean norm) along the segments, from 0 at x to 1 at z.
        beyond_x: share of the plan with ||x - z|| >= |f(x)|; this and the next three are None for the plain problem,
            whose potentials have a free constant.
        beyond_z: share of the plan with ||x - z|| >= |f(z)|.
        reached: share of the samples with |f(x - f grad f)| <= 5 % of |f(x)|, by their weights, both sides alike.
        right: share of the samples whose sign f has right, weighted likewise.
        coincident: number of pairs of the plan at distance 0, which have no direction.
        coincident_mass: what they carry.
    """

    loss: float
    optimum: float
    w1: float
    gap: float | None
    shifted_gap: float | None
    constant_gap: float | None
    parts: GapParts | None
    kr: float | None
    slackness: Summary | None
    cosine_x: Summary | None
    cosine_z: Summary | None
    optimal_cosine_x: Summary | None
    optimal_cosine_z: Summary | None
    gradient_norm: Summary | None
    segment_cosine: Summary | None
    segment_norm: Summary | None
    segment_profile: tuple[tuple[float, float, float], ...]
    beyond_x: float | None
    beyond_z: float | None
    reached: float | None
    right: float | None
    coincident: int
    coincident_mass: float


def measure(
    function: Function,
    solution: TransportSolution,
    w1: float,
    *,
    margin: float | None = None,
    segments: int = 500,
    positions: int = 9,
    seed: int = 0,
    batch_size: int = _BATCH,
) -> Measures:
    """Measure a differentiable potential f against the exact optimum on the same samples.

    Args:
        function: maps (batch, ...) samples, float64, to (batch,) values; 1-Lipschitz, or the gap means nothing.
        solution: the optimum of the hKR problem, of Euclidean cost.
        w1: W1 of the two samples, the optimum of the plain problem.
        margin: the margin that was learned with f; by default the problem's.
        segments: pairs of the plan whose segments are looked at, drawn with its masses as weights.
        positions: points inside each segment.
        seed: of that draw.
        batch_size: samples of one call of the function.

    Raises:
        InputError: another norm than the Euclidean, a learned margin without `margin`.
    """
    problem = solution.problem
    if problem.norm != 2:
        raise InputError(f"the audit speaks of Euclidean gradients: expected norm=2, got {problem.norm}")
    margin = solution.margin if margin is None and not problem.learns_margin else margin
    flat_x, flat_z = problem.x, problem.z
    x, z = flat_x.view(-1, *problem.shape), flat_z.view(-1, *problem.shape)
    f_x, gradient_x = values_and_gradients(function, x, batch_size)
    f_z, gradient_z = values_and_gradients(function, z, batch_size)
    loss = problem.loss(f_x, f_z, margin)
    samples = torch.cat([problem.sample_weight_x, problem.sample_weight_z])
    ends = [
        values_of(function, part - spread(f, gradient) * gradient, batch_size).abs() <= REACHED * f.abs()
        for part, f, gradient in ((x, f_x, gradient_x), (z, f_z, gradient_z))
    ]
    pairs = _Pairs(flat_x, flat_z, solution.rows, solution.columns, solution.mass)
    apart = pairs.apart()
    i, j, weight, length = apart.rows, apart.columns, apart.mass, apart.length
    norm_x, norm_z = sample_norm(gradient_x), sample_norm(gradient_z)
    best_x, best_z = (
        values_and_gradients(partial(_optimal, solution, label), part, batch_size)[1]
        for part, label in ((x, 1), (z, 0))
    )
    cosines, norms = _along(function, problem.shape, apart, segments, positions, seed, batch_size)
    places = [(k + 0.5) / positions for k in range(positions)]
    profile = zip(places, cosines.mean(dim=0).tolist(), norms.mean(dim=0).tolist(), strict=True)
    equal = torch.ones(cosines.numel(), dtype=torch.float64)
    total = float(solution.mass.sum())
    centred = problem.hinge_weight > 0  # otherwise f + b is as good as f
    return Measures(
        loss=loss,
        optimum=solution.value,
        w1=w1,
        gap=(loss - solution.value) / w1 if w1 > 0 else None,
        shifted_gap=(_best_shift(problem, f_x, f_z, margin) - solution.value) / w1 if w1 > 0 else None,
        constant_gap=(problem.loss(0 * f_x, 0 * f_z, margin) - solution.value) / w1 if w1 > 0 else None,
        parts=_parts(solution, pairs, f_x, f_z, margin or 0.0, w1) if w1 > 0 else None,
        kr=float(problem.sample_weight_x @ f_x - problem.sample_weight_z @ f_z) / w1 if w1 > 0 else None,
        slackness=summarise((f_x[i] - f_z[j]) / length, weight),
        cosine_x=summarise(apart.cosines(gradient_x, i), weight),
        cosine_z=summarise(apart.cosines(gradient_z, j), weight),
        optimal_cosine_x=summarise(apart.cosines(best_x, i), weight),
        optimal_cosine_z=summarise(apart.cosines(best_z, j), weight),
        gradient_norm=summarise(torch.cat([norm_x, norm_z]), samples),
        segment_cosine=summarise(cosines.flatten(), equal),
        segment_norm=summarise(norms.flatten(), equal),
        segment_profile=tuple(profile) if len(cosines) else (),
        beyond_x=_share(pairs.mass[pairs.length >= f_x[pairs.rows].abs()], total) if centred else None,
        beyond_z=_share(pairs.mass[pairs.length >= f_z[pairs.columns].abs()], total) if centred else None,
        reached=_share(samples[torch.cat(ends)], 2.0) if centred else None,
        right=_share(samples[torch.cat([f_x > 0, f_z < 0])], 2.0) if centred else None,
        coincident=len(pairs.mass) - len(weight),
        coincident_mass=max(0.0, total - float(weight.sum())) if len(weight) < len(pairs.mass) else 0.0,
    )


def summarise(values: Tensor, weights: Tensor) -> Summary | None:
    """Weighted mean and quantiles; a quantile is the smallest value up to which at least that share of weight lies.

    Example:
        >>> summarise(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 1.0, 2.0]))
        Summary(mean=5.25, quantiles=(1.0, 1.0, 2.0, 9.0, 9.0))
    """
    total = weights.sum()
    if not total > 0:
        return None
    order = values.argsort()
    below = weights[order].cumsum(0) / total
    # half a rounding step of the sums, so that exact shares are met
    at = torch.tensor(QUANTILES, dtype=below.dtype) * (1 - 1e-12 if below.dtype == torch.float64 else 1 - 1e-6)
    index = torch.searchsorted(below, at).clamp(max=len(values) - 1)
    quantiles: Sequence[float] = values[order][index].tolist()
    return Summary(float((weights * values).sum() / total), tuple(quantiles))


def values_and_gradients(function: Function, inputs: Tensor, batch_size: int = _BATCH) -> tuple[Tensor, Tensor]:
    """Values f (n,) and gradients (n, ...) at every input, by batches, as float64 on the CPU."""
    values, gradients = [], []
    for batch in inputs.split(batch_size):
        batch = batch.detach().clone().requires_grad_()
        value = function(batch)
        (gradient,) = torch.autograd.grad(value.sum(), batch)
        values.append(value.detach().double().cpu())
        gradients.append(gradient.double().cpu())
    return torch.cat(values), torch.cat(gradients)


@torch.no_grad()
def values_of(function: Function, inputs: Tensor, batch_size: int = _BATCH) -> Tensor:
    """Values f (n,) at every input, by batches, as float64 on the CPU."""
    return torch.cat([function(batch).double().cpu() for batch in inputs.split(batch_size)])


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a plan: flat samples of both sides, indices, masses."""

    x: Tensor
    z: Tensor
    rows: Tensor
    columns: Tensor
    mass: Tensor

    @cached_property
    def length(self) -> Tensor:
        """||x - z|| of each pair, by chunks."""
        chunks = [pair_distances(self.x[i], self.z[j]) for i, j in self._chunks(self.rows, self.columns)]
        return torch.cat(chunks) if chunks else self.mass

    def apart(self) -> "_Pairs":
        """The pairs whose samples differ."""
        kept = self.length > 0
        return _Pairs(self.x, self.z, self.rows[kept], self.columns[kept], self.mass[kept])

    def cosines(self, gradient: Tensor, at: Tensor) -> Tensor:
        """Cosine of the gradient (n, ...) at one end of each pair with x - z; 0 where the gradient is 0."""
        flat, norm = gradient.flatten(1), sample_norm(gradient)[at]
        products = [
            ((self.x[i] - self.z[j]) * flat[k]).sum(dim=1) for i, j, k in self._chunks(self.rows, self.columns, at)
        ]
        product = torch.cat(products) if products else self.length
        scale = norm * self.length
        return torch.where(scale > 0, product / torch.where(scale > 0, scale, 1.0), 0.0)

    def _chunks(self, *indices: Tensor) -> list[tuple[Tensor, ...]]:
        size = max(1, _CHUNK // self.x.shape[1])
        return list(zip(*(index.split(size) for index in indices), strict=True)) if len(self.rows) else []


def _along(
    function: Function,
    shape: tuple[int, ...],
    pairs: _Pairs,
    segments: int,
    positions: int,
    seed: int,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Cosine with x - z and norm of the gradient inside segments drawn by mass: both (drawn, positions)."""
    if not len(pairs.mass):
        return torch.zeros(0, positions, dtype=torch.float64), torch.zeros(0, positions, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(pairs.mass, segments, replacement=True, generator=generator)
    x, z = pairs.x[pairs.rows[drawn]], pairs.z[pairs.columns[drawn]]
    way = x - z
    unit = way / way.norm(dim=1, keepdim=True)
    cosines, norms = [], []
    for k in range(positions):
        points = x - (k + 0.5) / positions * way
        _, gradient = values_and_gradients(function, points.view(-1, *shape), batch_size)
        norm = sample_norm(gradient)
        product = (gradient.flatten(1) * unit).sum(dim=1)
        cosines.append(torch.where(norm > 0, product / torch.where(norm > 0, norm, 1.0), 0.0))
        norms.append(norm)
    return torch.stack(cosines, dim=1), torch.stack(norms, dim=1)


def _parts(solution: TransportSolution, pairs: _Pairs, f_x: Tensor, f_z: Tensor, margin: float, w1: float) -> GapParts:
    """The gap, term by term (theory, section 2): slackness of the pairs, of the marginal ranges and of the mass."""
    problem = solution.problem
    i, j, mass, length = pairs.rows, pairs.columns, pairs.mass, pairs.length
    extra = []
    for weight, index in ((problem.sample_weight_x, i), (problem.sample_weight_z, j)):
        carried = torch.zeros_like(weight).index_add(0, index, mass)
        extra.append(carried - weight)
    violation_x, violation_z = margin - f_x, margin + f_z
    hinge_x = problem.slack_x * problem.sample_weight_x * violation_x.clamp(min=0) - extra[0] * violation_x
    hinge_z = problem.slack_z * problem.sample_weight_z * violation_z.clamp(min=0) - extra[1] * violation_z
    of_margin = 0.0
    if problem.alpha is not None:
        of_margin = margin * (2 * (float(mass.sum()) - 1) - problem.hinge_weight * problem.alpha)
    return GapParts(
        transport=float((mass * (length - (f_x[i] - f_z[j]))).sum()) / w1,
        hinge_x=float(hinge_x.sum()) / w1,
        hinge_z=float(hinge_z.sum()) / w1,
        margin=of_margin / w1,
    )


def _best_shift(problem: TransportProblem, f_x: Tensor, f_z: Tensor, margin: float | None) -> float:
    """Return min over b of L(f + b): convex and piecewise linear in b, with kinks where a sample is on its margin."""
    if problem.hinge_weight == 0 or margin is None:
        return problem.loss(f_x, f_z, margin)
    candidates = torch.cat([margin - f_x, -margin - f_z]).sort().values
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        here, there = (problem.loss(f_x + b, f_z + b, margin) for b in candidates[middle : middle + 2])
        low, high = (low, middle) if here <= there else (middle + 1, high)
    return problem.loss(f_x + candidates[low], f_z + candidates[low], margin)


def _optimal(solution: TransportSolution, label: int, points: Tensor) -> Tensor:
    """The exact potential at points of one class, by the extension without a cone there."""
    return solution.potential(points, torch.full((len(points),), label))


def _share(weights: Tensor, total: float) -> float:
    """The sum of some weights over that of all, at most 1 whatever the rounding."""
    return min(1.0, float(weights.sum()) / total)
