"""What the cells of a comparison say: the best, tests against the OTNN's saliency, ranks, and a table as CSV."""

import csv
import io
import math
from typing import Any

import torch
from torch import Tensor

from otnn.metrics import holm, paired_test
from otnn.metrics.statistics import ranks
from otnn.run.comparison import PAIR

# A difference counts where its adjusted p value is below this
LEVEL = 0.05

Cells = list[dict[str, Any]]


def mark_best(cells: Cells) -> None:
    """Set `best` in every cell: among the methods of its network by its metric, where there are two and more."""
    for cell in cells:
        rivals = [
            other["mean"]
            for other in cells
            if (other["network"], other["metric"]) == (cell["network"], cell["metric"]) and _has_mean(other)
        ]
        extreme = max if cell.get("direction") == "up" else min
        cell["best"] = len(rivals) > 1 and _has_mean(cell) and cell["mean"] == extreme(rivals)


def _has_mean(cell: dict[str, Any]) -> bool:
    return cell["reason"] is None and cell["mean"] is not None


def paired_tests(cells: Cells) -> list[dict[str, Any]]:
    """OTNN saliency against every method on the unconstrained network, by every metric.

    Wilcoxon's signed rank test on the same images, two-sided, with Holm's correction over all tests of the list. The
    distance between Saliency and SmoothGrad on one network is tested against that on the other. "better" is by the sign
    of the ranks (`otnn.metrics.PairedTest.effect`): a few samples can turn the mean the other way.
    """
    found = {(cell["network"], cell["method"], cell["metric"]): cell for cell in cells if cell["reason"] is None}
    tests: Cells = []
    for (network, method, metric), other in found.items():
        own = found.get(("otnn", PAIR if method == PAIR else "saliency", metric))
        if network != "unconstrained" or own is None:
            continue
        test = paired_test(_series(own), _series(other))
        tests.append(
            {
                "metric": metric,
                "method": method,
                "difference": number(test.difference),
                "interval": [number(end) for end in test.interval],
                "p_value": number(test.p_value),
                "samples": test.samples,
                "test": test.test,
                "effect": test.effect,
                "better": test.effect > 0 if own["direction"] == "up" else test.effect < 0,
            }
        )
    # without a pair there is nothing to tell apart
    alone = [1.0 if test["p_value"] is None else test["p_value"] for test in tests]
    return [test | {"adjusted": p} for test, p in zip(tests, holm(alone), strict=True)]


def _series(cell: dict[str, Any]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in cell["per_sample"]], dtype=torch.float64)


def quality(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean rank of every network and method over the metrics that tell networks apart, and whether none is both better
    and cheaper.

    Ranks are over all networks and methods together, 1 the best; equal means share theirs.
    """
    compared = {column["name"] for column in content["columns"] if column["confounded"] is None}
    placed: dict[tuple[str, str], list[float]] = {}
    for metric in sorted(compared):
        cells = [
            cell for cell in content["cells"] if cell["metric"] == metric and cell["method"] != PAIR and _has_mean(cell)
        ]
        if len(cells) < 2:
            continue
        means = torch.tensor([cell["mean"] for cell in cells], dtype=torch.float64)
        places = ranks(-means if cells[0]["direction"] == "up" else means).tolist()
        for cell, place in zip(cells, places, strict=True):
            placed.setdefault((cell["network"], cell["method"]), []).append(place)
    points = [
        {
            "network": entry["network"],
            "method": entry["method"],
            "mean_rank": sum(standing) / len(standing),
            "metrics": len(standing),
            "forwards": entry["forwards"],
        }
        for entry in content["maps"]
        if (standing := placed.get((entry["network"], entry["method"])))
    ]
    for point in points:
        point["front"] = not any(_dominates(other, point) for other in points)
    return points


def _dominates(other: dict[str, Any], point: dict[str, Any]) -> bool:
    ours, theirs = ((p["mean_rank"], p["forwards"]) for p in (point, other))
    return theirs != ours and theirs[0] <= ours[0] and theirs[1] <= ours[1]


def csv_bytes(cells: Cells) -> bytes:
    """compare.csv: a row per network, method and metric."""
    stream = io.StringIO()
    names = ("network", "method", "metric", "direction", "mean", "low", "high", "best", "samples", "undefined")
    passes = ("forwards", "backwards", "maps", "seconds", "reason")
    writer = csv.DictWriter(stream, [*names, *passes], restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        ends = dict(zip(("low", "high"), cell.get("interval", ()), strict=False))
        writer.writerow({**cell, **ends, "best": int(cell["best"])})
    return stream.getvalue().encode()


def verdict(content: dict[str, Any]) -> list[str]:
    """Sentences on the tests, by the metrics that tell networks apart."""
    confounded = {column["name"] for column in content["columns"] if column["confounded"] is not None}
    in_boxes = [name.replace("_", " ") for name in content["metrics"] if name in ("box_share", "pointing_game")]
    chance = []
    if in_boxes and content["box_area"] is not None:
        chance = [
            f"The boxes cover {content['box_area']:.1%} of a picture on average: the {' and '.join(in_boxes)} of a map "
            "at random."
        ]
    tests = [test for test in content["tests"] if test["metric"] not in confounded]
    if not tests:
        return ["There is no ordinary network or no saliency of the OTNN here: nothing was tested.", *chance]
    sentences = []
    subjects = (
        (None, "The OTNN's saliency against every method on the unconstrained network"),
        ("saliency", "The OTNN's saliency against saliency on the unconstrained network"),
        (PAIR, "The distance of saliency to SmoothGrad on the OTNN against that on the unconstrained network"),
    )
    for method, name in subjects:
        own = [test for test in tests if method in (None, test["method"])]
        if not own:
            continue
        better = [test for test in own if test["adjusted"] < LEVEL and test["better"]]
        worse = [test for test in own if test["adjusted"] < LEVEL and not test["better"]]
        text = (
            f"{name}: better in {len(better)}, worse in {len(worse)} and "
            f"undecided in {len(own) - len(better) - len(worse)} of {len(own)} tests"
        )
        if method is None:
            text += (
                f" (signed ranks on {content['samples']} images, p < {LEVEL} after Holm's correction over all "
                f"{len(content['tests'])} tests)"
            )
        elif worse:
            text += f"; worse by {', '.join(test['metric'] for test in worse)}"
        sentences.append(f"{text}.")
    return sentences + chance


def number(value: float) -> float | None:
    """The value, or None where it is not finite, which JSON cannot hold."""
    return value if math.isfinite(value) else None
