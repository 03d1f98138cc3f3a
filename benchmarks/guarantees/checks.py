"""One random network with a few samples: is each guarantee true of them, and how much of its bound is attained?

A ratio is what was found over what the guarantee allows, so 1 is tight and more is a violation. TINY is what rounding
may add to quantities of order 1 that are found in float64.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.guarantees.attacks import climb, lowest_lead
from benchmarks.guarantees.exact import Plain, exact_smoothing, pieces
from benchmarks.guarantees.nets import network
from benchmarks.soundness.draws import Draw
from otnn.batches import sample_norm, spread
from otnn.errors import InputError
from otnn.explain.scores import Scorer
from otnn.guarantees import (
    Guarantee,
    Potential,
    bracket,
    cell_masks,
    certified_smoothgrad,
    constant_saliency,
    deletion_masks,
    gradient_agreement,
    insertion_masks,
    masking_ceiling,
    noise_error,
    occlusion_masks,
    path_stability,
    robustness_bracket,
    smoothed_gradient,
    value_errors,
    walk,
)
from otnn.guarantees.smoothing import pixel_scores
from otnn.lipschitz import LipschitzBound, bound
from otnn.metrics import robustness_sr
from otnn.models import Classifier
from otnn.nn import Centering, MaxMin, OrthoLinear, UnitNormLinear

SAMPLES = 5
TINY = 1e-9
SHARE = 0.3  # of the pixels, the set whose robustness is bracketed
DELTA = 0.1  # probability that a statement on SmoothGrad may fail: large, so that failures could be seen
Row = dict[str, Any]


def check_network(number: int, draw: Draw) -> list[Row]:
    """One row per guarantee and sample: name, family, case, ratio (None where vacuous without a bound), violation."""
    family, model = network(number, draw)
    inputs = torch.rand(SAMPLES, *model.input_shape, dtype=torch.float64)
    inputs = (inputs * draw.one_of(1.0, 1.0, 0.2) + draw.one_of(0.0, 0.4, 0.8)).clamp(0, 1)
    if draw.chance(0.1):
        inputs[draw.integer(0, SAMPLES - 1), 0, 0, 0] = draw.one_of(math.nan, math.inf)
    target = torch.randint(model.classes, (SAMPLES,)) if draw.chance(0.5) else None
    potential = Potential(model, inputs, _bound(model), target)
    plain = Plain(copy.deepcopy(model))
    try:
        found = _Checks(model, plain, potential, draw).run()
    finally:
        plain.remove()
    return [
        {
            "family": family,
            "case": number * SAMPLES + k,
            "guarantee": name,
            "vacuous": bool(guarantee.vacuous[k]),
            **row,
        }
        for name, (guarantee, rows) in found.items()
        for k, row in enumerate(rows)
    ]


def _bound(model: Classifier) -> LipschitzBound | None:
    try:
        return bound(model.body, model.input_shape)
    except InputError:
        return None


Found = tuple[Guarantee, list[Row]]


class _Checks:
    """All checks of one network; scores and gradients come from the plain network, lengths from the formulas."""

    def __init__(self, model: Classifier, plain: Plain, potential: Potential, draw: Draw) -> None:
        self.model, self.plain, self.potential, self.draw = model, plain, potential, draw
        self.inputs = potential.inputs
        self.own, self.rival = potential.prediction.clamp(min=0), potential.target
        constant = _bound(model)
        rows = model.head.weight.detach().double()
        rows = torch.cat([-rows / 2, rows / 2]) if len(rows) == 1 else rows
        apart = torch.linalg.vector_norm(rows[self.own] - rows[self.rival], dim=1)
        self.scale = apart * (math.inf if constant is None else constant.constant)

    def run(self) -> dict[str, Found]:
        ends = bracket(self.potential)
        found = {"boundary_bracket": (ends, self.bracket(ends))}
        factor = 2.0 ** torch.empty(SAMPLES, dtype=torch.float64).uniform_(-4, 1)
        way = walk(self.potential, ends.details["upper"] * factor)
        stability, agreement = path_stability(way), gradient_agreement(way, steps=self.draw.integer(1, 20))
        turns, distances = self.along(way.end)
        found["path_stability"] = (
            stability,
            [_row(turn, limit) for turn, limit in zip(turns, stability.bound, strict=True)],
        )
        rows = [_row(distance, limit) for distance, limit in zip(distances, agreement.bound, strict=True)]
        found["gradient_agreement"] = agreement, self.midpoint(agreement, rows)
        regions = constant_saliency(self.potential)
        found["constant_saliency"] = regions, self.regions(regions)
        for kind in ("deletion", "insertion", "occlusion", "mu_fidelity", "random"):
            found[f"masking_{kind}"] = self.masks(kind)
        found["robustness_sr"] = self.robustness()
        return found

    def potential_of(self, lead: Tensor) -> Tensor:
        return lead / self.scale

    def bracket(self, found: Guarantee) -> list[Row]:
        """No change within the lower end makes the pair even, and the point at the upper end is beyond it."""
        lower = found.bound.nan_to_num()
        with torch.no_grad():
            start = self.plain.lead(self.inputs, self.own, self.rival)
            point = torch.where(found.details["boundary"].isnan(), self.inputs, found.details["boundary"])
            beyond = self.plain.lead(point, self.own, self.rival)
        lowest = lowest_lead(self.plain, self.inputs, lower * (1 - TINY), self.own, self.rival)
        fallen = self.potential_of(start - lowest)
        upper, length = found.details["upper"], sample_norm(point - self.inputs)
        wrong = (self.potential_of(lowest) < -1e-12) & ~found.bound.isnan()
        ends = upper.isfinite()
        wrong |= ends & ((beyond > 1e-12) | ((length - upper).abs() > TINY * upper) | (upper < lower))
        rows = []
        for k in range(SAMPLES):
            row = _row(fallen[k], found.bound[k])
            row["tightness"] = float(found.details["tightness"][k]) if bool(ends[k]) else None
            row["violation"] = row["violation"] or bool(wrong[k])
            rows.append(row)
        return rows

    def along(self, ends: Tensor) -> tuple[list[float], list[float]]:
        """The exact mean of ||grad g - u||^2 on each path, and the L1 distance of exact IG and T u * u."""
        turns, distances = [], []
        _, gradients = self.plain.gradient(self.inputs, self.own, self.rival)
        for k in range(SAMPLES):
            if not bool(ends[k].isfinite().all()):
                turns.append(math.nan)
                distances.append(math.nan)
                continue
            start, end = self.inputs[k : k + 1], ends[k : k + 1]
            unit = (gradients[k] / gradients[k].norm()).flatten()
            cut = pieces(self.plain, start, end)
            own, rival = self.own[k].expand(len(cut.shares)), self.rival[k].expand(len(cut.shares))
            slopes = self.plain.gradient(cut.middles, own, rival)[1].flatten(1) / self.scale[k]
            turns.append(float((cut.shares * (slopes - unit).square().sum(dim=1)).sum()))
            integrated = (start - end).flatten() * (cut.shares.unsqueeze(1) * slopes).sum(dim=0)
            distances.append(float((integrated - (start - end).norm() * unit**2).abs().sum()))
        return turns, distances

    def midpoint(self, found: Guarantee, rows: list[Row]) -> list[Row]:
        """The distance of the midpoint sum is below sqrt(2 (s + c) T), c its error of completeness."""
        details = found.details
        limit = (2 * (details["slack"] + details["completeness"]) * details["length"]).sqrt()
        wrong = details["measured"] > limit * (1 + TINY) + TINY
        return [{**row, "violation": row["violation"] or bool(wrong[k])} for k, row in enumerate(rows)]

    def regions(self, found: Guarantee) -> list[Row]:
        """The exact distance to the nearest kink is no smaller, and no change within the radius moves the gradient."""
        rows = []
        radius = found.bound.nan_to_num(posinf=1.0)
        noise = torch.randn_like(self.inputs)
        moved = self.inputs + spread(radius * (1 - TINY) / sample_norm(noise), noise) * noise
        before, after = (self.plain.gradient(points, self.own, self.rival)[1] for points in (self.inputs, moved))
        changed = (before - after).flatten(1).abs().amax(dim=1) > TINY * before.flatten(1).abs().amax(dim=1)
        for k in range(SAMPLES):
            limit = float(found.bound[k])
            if math.isnan(limit) or limit == 0:
                rows.append(_row(math.nan, math.nan))
                continue
            exact = self.plain.region_radius(self.inputs[k : k + 1])
            row = _row(1.0, 1.0) if math.isinf(exact) and math.isinf(limit) else _row(limit, exact, slack=0.0)
            row["violation"] = row["violation"] or bool(changed[k])
            rows.append(row)
        return rows

    def masks(self, kind: str) -> Found:
        """|g(x) - g(x_masked)| is below the ceiling, also for fillings that are chosen to lower g the most."""
        inputs, size = self.inputs, tuple(self.inputs.shape[2:])
        _, gradient = self.plain.gradient(inputs, self.own, self.rival)
        maps = gradient if self.draw.chance(0.5) else torch.randn_like(gradient)
        masks = {
            "deletion": lambda: deletion_masks(maps, steps=self.draw.integer(1, 10)),
            "insertion": lambda: insertion_masks(maps, steps=self.draw.integer(1, 10)),
            "occlusion": lambda: occlusion_masks(size, patch=self.draw.integer(1, min(size)), stride=2),
            "mu_fidelity": lambda: cell_masks(size, samples=8, grid=3),
            "random": lambda: torch.rand(SAMPLES, 6, *inputs.shape[1:], dtype=torch.float64),
        }[kind]()
        slope = spread(torch.where(gradient.flatten(1).any(dim=1), sample_norm(gradient), 1.0), gradient)
        falling = inputs - self.draw.one_of(0.01, 1.0) * gradient / slope
        baseline = self.draw.one_of(0.0, 0.5, torch.rand_like(inputs), falling, falling)
        found = masking_ceiling(self.potential, masks, baseline, name=f"masking_{kind}")
        bank = masks if masks.ndim == inputs.ndim + 1 else masks.unsqueeze(0)
        masked = bank * inputs.unsqueeze(1) + (1 - bank) * torch.as_tensor(baseline).double().expand_as(
            inputs
        ).unsqueeze(1)
        count = masked.shape[1]
        with torch.no_grad():
            lead = self.plain.lead(masked.flatten(0, 1), *[x.repeat_interleave(count) for x in (self.own, self.rival)])
            start = self.plain.lead(inputs, self.own, self.rival)
        change = self.potential_of(start).unsqueeze(1) - lead.view(SAMPLES, count) / self.scale.unsqueeze(1)
        ceiling = found.details["ceiling"]
        ratio = torch.where(ceiling > TINY, change.abs() / ceiling, 0.0).amax(dim=1)
        # the measured drops are those of the plain network
        apart = ((change - found.details["drop"]).abs() > TINY).any(dim=1)
        rows = []
        for k in range(SAMPLES):
            row = _row(ratio[k], torch.where(found.bound[k].isnan(), torch.nan, 1.0))
            row["violation"] = row["violation"] or bool(apart[k])
            rows.append(row)
        return found, rows

    def robustness(self) -> Found:
        """No change below the lower end alters the prediction, of a set of pixels or of all; a search finds none."""
        maps = torch.randn_like(self.inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scorer = Scorer(self.plain.model, self.inputs, self.own)
            search = robustness_sr(scorer, self.inputs, maps, shares=(SHARE,), bisections=6, attack_steps=4)
        distance = torch.where(search.details["failed"], torch.inf, search.details["radius"])
        found = robustness_bracket(self.potential, distance)
        lower = found.bound.nan_to_num()
        support = torch.rand(self.inputs[:, :1].shape) < SHARE
        lowest = lowest_lead(self.plain, self.inputs, lower * (1 - TINY), self.own, support=support)
        anywhere = lowest_lead(self.plain, self.inputs, lower * (1 - TINY), self.own)
        rows = []
        for k in range(SAMPLES):
            none = bool(found.bound[k].isnan() | ~distance[k, 0].isfinite())
            row = _row(found.bound[k], math.nan if none else distance[k, 0], slack=0.0)
            row["violation"] |= bool(torch.minimum(lowest, anywhere)[k] < -1e-12) and not bool(found.bound[k].isnan())
            rows.append(row)
        return found, rows


def _row(found: float | Tensor, limit: float | Tensor, *, slack: float = TINY) -> Row:
    """The ratio, and whether what was found exceeds the limit by more than rounding; no ratio without a limit."""
    found, limit = float(found), float(limit)
    if math.isnan(limit):
        return {"ratio": None, "violation": False}
    violation = not found <= limit * (1 + TINY) + slack
    return {"ratio": found / limit if limit > 1e-6 else None, "violation": violation}


def check_smoothing(number: int, draw: Draw) -> list[Row]:
    """Certified SmoothGrad of a network with one sorted layer, whose smoothed gradient is known exactly."""
    pixels = draw.one_of((1, 1, 3), (1, 1, 5), (1, 2, 4), (2, 2, 3), (1, 4, 4))
    features = math.prod(pixels)
    width = 2 * draw.integer(1, 4)
    layer = OrthoLinear(features, width) if draw.chance(0.8) else nn.Linear(features, width)
    nn.init.normal_(layer.bias, std=draw.one_of(0.01, 0.3))
    body = nn.Sequential(Centering(torch.rand(pixels[0])), nn.Flatten(), layer, MaxMin())
    model = Classifier(body, UnitNormLinear(width, draw.one_of(1, 3)), pixels).eval()
    inputs = torch.rand(SAMPLES, *pixels, dtype=torch.float64)
    sigma, samples = draw.one_of(0.05, 0.25, 1.0), draw.one_of(64, 512, 4096)
    share = draw.one_of(0.1, 0.3)
    potential = Potential(model, inputs, bound(model.body, model.input_shape))
    seed = draw.integer(0, 2**31)
    settings: Mapping[str, Any] = {"sigma": sigma, "samples": samples}
    found = certified_smoothgrad(
        potential, share=share, delta=DELTA, generator=torch.Generator().manual_seed(seed), **settings
    )
    mean, squares = smoothed_gradient(potential, generator=torch.Generator().manual_seed(seed), **settings)
    rows = []
    for k in range(SAMPLES):
        exact = exact_smoothing(copy.deepcopy(model), sigma, potential.coefficients[k : k + 1])
        point, radius = inputs[k : k + 1], float(found.bound[k])
        off = mean[k : k + 1] - exact(point)
        apart = float(off.norm()) / noise_error(samples, DELTA / 2)
        by_value = float((off.abs() / value_errors(squares[k : k + 1], samples, DELTA / 2)).max())
        row: Row = {"ratio": None, "violation": False, "vector": apart, "values": by_value}
        if radius > 0:
            top = max(1, round(share * pixels[1] * pixels[2]))
            worst = climb(exact, point, radius * (1 - TINY), found.details["candidates"][k], top, pixel_scores)
            row["violation"] = worst > TINY
            row["ratio"] = _climbed(exact, found, k, inputs, top, radius)
        rows.append({**row, "family": "one sorted layer", "case": number * SAMPLES + k, "guarantee": found.name})
        rows[-1]["vacuous"] = bool(found.vacuous[k])
    return rows


def _climbed(exact: Any, found: Guarantee, k: int, inputs: Tensor, top: int, radius: float) -> float | None:
    """The radius over the least multiple of it at which a pixel from outside is found in the top: below 1."""
    for factor in (1.0, 1.5, 2.0, 3.0, 5.0, 10.0):
        candidates = found.details["candidates"][k]
        if climb(exact, inputs[k : k + 1], radius * factor, candidates, top, pixel_scores) > TINY:
            return 1 / factor
    return None
