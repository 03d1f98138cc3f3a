"""The campaign: blocks of random networks, and what is reported of all rows."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.campaign import Campaign, Json
from benchmarks.guarantees.checks import DELTA, SAMPLES, TINY, Row, check_network, check_smoothing
from benchmarks.soundness.draws import Draw
from otnn.errors import InputError

NETWORKS = 20  # of a block


def guarantees_campaign(cases: int = 10_000, seed: int = 0) -> Campaign:
    """Check `cases` cases of every guarantee; a network and its samples depend on the seed and their number alone.

    Raises:
        InputError: no case.
    """
    if cases < 1:
        raise InputError(f"cases: expected at least 1, got {cases}")
    networks = -(-cases // SAMPLES)
    settings = {"seed": seed, "cases": networks * SAMPLES, "delta": DELTA, "tolerance": TINY, "sources": _sources()}
    return Campaign(
        "guarantees", settings, -(-networks // NETWORKS), partial(_block, seed=seed, networks=networks), _summary
    )


def check(seed: int, number: int) -> list[Row]:
    """All rows of the network of a number."""
    rows = check_network(number, Draw(seed, 2 * number))
    return [*rows, *check_smoothing(number, Draw(seed, 2 * number + 1))]


def _sources() -> str:
    """Of this folder: the results of other checks are not mixed with these."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _block(number: int, seed: int, networks: int) -> Json:
    torch.set_num_threads(1)
    numbers = range(number * NETWORKS, min(networks, (number + 1) * NETWORKS))
    return {"rows": [row for each in numbers for row in check(seed, each)]}


def _summary(blocks: Sequence[Json]) -> Json:
    rows = [row for block in blocks for row in block["rows"]]
    named = defaultdict(list)
    for row in rows:
        named[row["guarantee"]].append(row)
    smooth = named["certified_smoothgrad"]
    failures = {
        kind: {"failed": sum(row[kind] > 1 for row in smooth), "largest": max(row[kind] for row in smooth)}
        for kind in ("vector", "values")
    }
    # a statement may fail with probability delta / 2 each; four standard deviations more are a violation
    allowed = len(smooth) * DELTA / 2 + 4 * (len(smooth) * DELTA / 2) ** 0.5
    too_many = sum(failure["failed"] > allowed for failure in failures.values())
    return {
        "violations": sum(row["violation"] for row in rows) + too_many,
        "monte_carlo": {"allowed": allowed, **failures},
        "guarantees": {name: _told(each) for name, each in sorted(named.items())},
    }


def _told(rows: Sequence[Row]) -> Json:
    families = defaultdict(list)
    for row in rows:
        families[row["family"]].append(row)
    return {**_figures(rows), "families": {name: _figures(each) for name, each in sorted(families.items())}}


def _figures(rows: Sequence[Row]) -> Json:
    ratios = sorted(row["ratio"] for row in rows if row["ratio"] is not None)
    tight = sorted(row["tightness"] for row in rows if row.get("tightness") is not None)
    figures: Json = {
        "cases": len(rows),
        "not vacuous": sum(not row["vacuous"] for row in rows),
        "violations": sum(row["violation"] for row in rows),
        "ratio": {"median": median(ratios), "max": ratios[-1]} if ratios else None,
    }
    if tight:
        figures["tightness"] = {"min": tight[0], "median": median(tight), "max": tight[-1]}
    failed = Counter(row["case"] for row in rows if row["violation"])
    if failed:
        figures["failures"] = sorted(failed)[:20]
    return figures
