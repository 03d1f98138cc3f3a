"""Campaign `rounding`: no rounding inside a certified ball may change the prediction.

Each block draws a network, places images near its boundaries and searches the balls of three radii: certified for
exact arithmetic, certified for float32, and of the plain float32 formula at the same images as the latter.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.campaign import Campaign, Json
from benchmarks.soundness.draws import Draw
from benchmarks.soundness.judges import ExactMap, Executed
from benchmarks.soundness.nets import NETS
from benchmarks.soundness.points import base_images, falling_directions, near_the_boundary
from benchmarks.soundness.search import Ball, Found, search
from otnn.certify import certify
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.models import Classifier, predict

# Of each block, for each arithmetic.
IMAGES, TRIALS = 10, 2500
# Exponents of ten of the smallest radii that are looked for.
SMALLEST = {"real": -8, "float32": -6}
# Just outside the radius: how far, and from which share of the exact distance on a radius is expected to be that near.
OUTSIDE, CLEAR = 1.000001, 1 - 5e-7

Target = tuple[Tensor, int, float]  # an image, its prediction and its radius


def rounding_campaign(trials: int = 100_000, seed: int = 0) -> Campaign:
    """Search with at least `trials` points for each arithmetic; block i depends on the seed and i alone.

    Raises:
        InputError: no trials.
    """
    if trials < 1:
        raise InputError(f"trials: expected at least 1, got {trials}")
    return Campaign("rounding", {"seed": seed, "trials": trials}, -(-trials // TRIALS), partial(_block, seed), _summary)


@torch.no_grad()
def plain_radius(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions, and radii by plain float32: min (z_t - z_j) / (L ||w_t - w_j||), or |z| / (L ||w||)."""
    scores, rows = model(images), model.head.weight
    constant = torch.tensor(bound(model.body, model.input_shape).constant, dtype=torch.float32)
    prediction = predict(scores)
    if scores.shape[1] == 1:
        return prediction, scores[:, 0].abs() / (constant * rows[0].norm())
    gaps = scores.gather(1, prediction[:, None]) - scores
    radii = gaps / (constant * (rows[prediction][:, None] - rows).norm(dim=2))
    own = torch.nn.functional.one_hot(prediction, scores.shape[1]).bool()
    return prediction, radii.masked_fill(own, torch.inf).amin(dim=1)


def _block(seed: int, number: int) -> Json:
    draw = Draw(seed, number)
    name, make = NETS[number % len(NETS)]
    model = make(draw)
    images = base_images(model, draw.rng, IMAGES)
    return {"block": number, "net": name, "real": _real(model, images, draw.rng), **_float32(model, images, draw.rng)}


def _placed(model: Classifier, images: Tensor, arithmetic: str, rng: np.random.Generator) -> list[Target]:
    """Images of small positive radius, with their prediction and radius."""
    smallest = torch.from_numpy(10.0 ** rng.uniform(SMALLEST[arithmetic], 0, size=len(images)))
    placed = near_the_boundary(model, images, arithmetic, smallest)
    found = certify(model, placed, arithmetic=arithmetic)
    each = zip(placed, found.prediction.tolist(), found.radius.tolist(), strict=True)
    return [(image, own, radius) for image, own, radius in each if radius > 0]


def _real(model: Classifier, images: Tensor, rng: np.random.Generator) -> Json:
    targets = _placed(model, images, "real", rng)
    exact = ExactMap(model)
    found, quotients, outside = [], [], []
    for image, own, radius in targets:
        ball = Ball(image.flatten().numpy(), radius)
        directions = falling_directions(exact.wide, ball, own)
        judge = partial(exact.judge, own=own)
        one = Found()
        for dtype in (np.float32, np.float64):
            one += search(ball, directions, judge, rng, trials=-(-TRIALS // (2 * len(targets))), dtype=dtype)
        if len(model.body) == 1:  # a linear network, whose boundary is known
            holds, quotient = exact.tightness(ball.centre, own, radius)
            one.changes += not holds
            quotients.append(quotient)
            if quotient >= CLEAR:
                outside.append(exact.gap(ball.centre - OUTSIDE * radius * directions[0], own) <= 0)
        found.append(one)
    return {**_counts(found), "radii": [radius for *_, radius in targets], "quotients": quotients, "outside": outside}


def _float32(model: Classifier, images: Tensor, rng: np.random.Generator) -> Json:
    targets = _placed(model, images, "float32", rng)
    wide = ExactMap(model).wide

    def searched(target: Target, *, plain: bool) -> Found:
        image, own, radius = target
        ball = Ball(image.flatten().numpy(), radius)
        judge = Executed(model, own, rng, any_order=not plain)
        directions = falling_directions(wide, ball, own)
        return search(ball, directions, judge, rng, trials=-(-TRIALS // len(targets)), dtype=np.float32, stop=plain)

    certified = [searched(target, plain=False) for target in targets]
    formula = []
    for image, *_ in targets:
        prediction, radius = plain_radius(model, image[None])
        formula.append(searched((image, int(prediction), float(radius)), plain=True))
    usual = certify(model, images, arithmetic="float32").radius / plain_radius(model, images)[1].double()
    return {
        "float32": {**_counts(certified), "radii": [radius for *_, radius in targets]},
        "plain": _counts(formula),
        "float32 over plain": usual.tolist(),
    }


def _counts(found: Sequence[Found]) -> Json:
    return {
        "images": len(found),
        "trials": sum(one.trials for one in found),
        "violations": sum(one.changes for one in found),
        "broken": [index for index, one in enumerate(found) if one.changes],
    }


def _summary(blocks: Sequence[Json]) -> Json:
    nets = defaultdict(list)
    for block in blocks:
        nets[block["net"]].append(block)
    everything = _figures(blocks)
    return {
        "violations": everything["real"]["violations"] + everything["float32"]["violations"],
        "all": everything,
        "nets": {name: _figures(nets[name]) for name in sorted(nets)},
        "failures": [
            {"block": block["block"], "arithmetic": part, "images": block[part]["broken"]}
            for block in blocks
            for part in ("real", "float32")
            if block[part]["violations"]
        ],
    }


def _figures(blocks: Sequence[Json]) -> Json:
    def total(part: str, size: Callable[[Any], int], figure: str) -> int:
        return sum(size(block[part][figure]) for block in blocks)

    def joined(part: str, figure: str) -> list[Any]:
        return [value for block in blocks for value in block[part][figure]]

    figures: Json = {
        part: {
            "images": total(part, int, "images"),
            "trials": total(part, int, "trials"),
            "violations": total(part, int, "violations"),
            "radius": _spread(joined(part, "radii")),
        }
        for part in ("real", "float32")
    }
    outside = joined("real", "outside")
    figures["real"]["radius over exact distance"] = _spread(joined("real", "quotients"))
    figures["real"]["just outside"] = {"images": len(outside), "changed": sum(outside)}
    images, broken = total("plain", int, "images"), total("plain", len, "broken")
    share = broken / images if images else None
    plain = {"images": images, "trials": total("plain", int, "trials"), "broken": broken, "share": share}
    ratios = [ratio for block in blocks for ratio in block["float32 over plain"]]
    return {**figures, "plain formula": plain, "float32 over plain, usual images": _spread(ratios)}


def _spread(values: Sequence[float]) -> Json | None:
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None
