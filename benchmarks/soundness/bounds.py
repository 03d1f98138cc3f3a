"""Campaign `bounds`: no bound may be below the largest singular value of the true operator.

The singular value is itself rounded. LAPACK's is that of a matrix which differs by a few units of 2^-53 times the norm;
on 2,900 operators of these families it was within 7.1e-15 of the value in extended precision, and SLACK is 14 times
that. A bound within CLOSE of the singular value is decided in exact arithmetic, without any slack, where the entries of
the operator are the stored weights.

With each layer, the norm of its absolute weights is checked as well, on which the bounds of rounding errors are built.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.campaign import Campaign, Json
from benchmarks.soundness.draws import Draw
from benchmarks.soundness.families import FAMILIES, Case, operator_of
from benchmarks.soundness.operators import (
    is_proven_below,
    largest_quotient,
    largest_singular_value,
    layer_operator,
)
from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.lipschitz.layers import layer_bound

SLACK, CLOSE = 1e-13, 1e-12
KINDS_OF_FAILURE = ("below", "loose", "rounding too low")
BLOCK = 100


def bounds_campaign(cases: int = 10_000, seed: int = 0) -> Campaign:
    """Check `cases` cases; case i depends on the seed and i alone."""
    if cases < 1:
        raise InputError(f"cases: expected at least 1, got {cases}")
    return Campaign(
        "bounds", {"seed": seed, "cases": cases}, -(-cases // BLOCK), partial(_block, seed=seed, cases=cases), _summary
    )


def draw_case(seed: int, number: int) -> tuple[str, Case]:
    """The family and the case of a number."""
    family, draw_one = FAMILIES[number % len(FAMILIES)]
    return family, draw_one(Draw(seed, number))


def check(case: Case) -> Json:
    """Compare the bound of a case with its true norm."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths", UserWarning)
        try:
            found = case.bound() if case.bound else bound(case.module, case.shape if case.told else None).constant
        except InputError as error:
            return {"refused": str(error)}
        return _compared(case, found)


def _compared(case: Case, found: float) -> Json:
    below = close = False
    if case.operator is None:
        true = largest_quotient(case.module, case.shape)
    else:
        matrix = case.operator()
        _check_operator(case, matrix)
        true = largest_singular_value(matrix)
        close = case.exact and true * (1 - CLOSE) <= found <= true * (1 + CLOSE)
        below = close and is_proven_below(found, matrix)
    ratio = found / true if true > 0 else None
    return {
        "bound": found,
        "norm": true,
        "ratio": ratio,
        "decided exactly": close,
        "below": below or not found >= true * (1 - SLACK),
        "loose": case.limit is not None and not (ratio is not None and ratio <= case.limit),
        "rounding too low": _rounding_is_low(case),
    }


def _rounding_is_low(case: Case) -> bool:
    """Whether the norm that forward errors count with is below that of the absolute weights."""
    layer = case.module
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        return False
    output = layer(torch.zeros(1, *case.shape, dtype=layer.weight.dtype)).shape[1:]
    rounding = layer_bound(layer, case.shape, tuple(output)).rounding
    absolute = copy.deepcopy(layer)
    absolute.weight.data.abs_()
    least = largest_singular_value(operator_of(absolute, case.shape)) * (1 - SLACK)
    return rounding is None or not rounding.weight >= least


def _check_operator(case: Case, matrix: Any) -> None:
    """The loops and torch must mean the same operator: the campaign checks itself."""
    other = layer_operator(case.module, case.shape)
    largest = np.abs(other).max(initial=0.0)
    if matrix.shape != other.shape or not np.abs(matrix - other).max(initial=0.0) <= 1e-13 * largest:
        raise ArithmeticError(f"two ways to find one operator disagree: {case.parameters}")


def _block(number: int, seed: int, cases: int) -> Json:
    results = []
    for index in range(number * BLOCK, min(cases, (number + 1) * BLOCK)):
        family, case = draw_case(seed, index)
        results.append({"case": index, "family": family, **check(case), "parameters": case.parameters})
    return {"cases": results}


def _summary(blocks: Sequence[Json]) -> Json:
    families = defaultdict(list)
    for block in blocks:
        for result in block["cases"]:
            families[result["family"]].append(result)
    rows = {family: _family(results) for family, results in sorted(families.items())}
    total = {kind: sum(row[kind] for row in rows.values()) for kind in (*KINDS_OF_FAILURE, "refused")}
    violations = sum(total[kind] for kind in KINDS_OF_FAILURE)
    return {"violations": violations, **total, "slack": SLACK, "close": CLOSE, "families": rows}


def _family(results: Sequence[Json]) -> Json:
    checked = [result for result in results if "refused" not in result]
    rated = sorted((result for result in checked if result["ratio"] is not None), key=lambda result: result["ratio"])
    ratios = [result["ratio"] for result in rated]
    return {
        "cases": len(results),
        "refused": len(results) - len(checked),
        **{kind: sum(result[kind] for result in checked) for kind in (*KINDS_OF_FAILURE, "decided exactly")},
        "within slack": sum(1 - SLACK <= ratio < 1 for ratio in ratios),
        "zero norm": len(checked) - len(rated),
        "ratio": {"min": ratios[0], "median": median(ratios), "max": ratios[-1]} if rated else None,
        "closest": rated[0] if rated else None,
        "loosest": rated[-1] if rated else None,
        "failures": [result for result in checked if any(result[kind] for kind in KINDS_OF_FAILURE)],
    }
