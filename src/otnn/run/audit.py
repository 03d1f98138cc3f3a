"""The audit as a stage: the network of a run against the exact optimum on its training and its test images."""

import dataclasses
import time
import warnings
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from otnn.data import Dataset, Split
from otnn.files import json_bytes, npz_bytes
from otnn.losses import Loss
from otnn.report.partners import partners_picture
from otnn.run.config import Config, from_mapping
from otnn.run.folder import Run
from otnn.run.progress import counting
from otnn.run.train import dataset_of, make_loss, versions
from otnn.transport import Audit, PotentialAudit, audit, plan_partner
from otnn.transport.audit import SAMPLES
from otnn.transport.measures import QUANTILES, values_and_gradients, values_of
from otnn.transport.verdict import gaps, verdict

PICTURES = 8


def audit_run(
    run: Run,
    *,
    dataset: Dataset | None = None,
    samples: int | None = SAMPLES,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Audit the OTNN of a run: writes audit.json, audit.npz and audit.png, and its part of results.json.

    Args:
        run: an opened run.
        dataset: its data, if they are at hand already.
        samples: samples of each side of a problem, at most; None takes all.
        seed: of the draws.
        device: where the network runs.

    Returns:
        The content of audit.json.

    Raises:
        InputError: the samples need more memory than the budget.
    """
    start = time.perf_counter()
    dataset = dataset or dataset_of(run)
    loss = loss_of(run, dataset)
    model = run.network("otnn", device)
    with counting(f"auditing {run.path}") as count:
        audits = {
            name: audit(
                model,
                split,
                loss,
                classes=run.classes,
                samples=samples,
                seed=seed,
                on_round=lambda potential, last, name=name: count(  # type: ignore[misc]
                    f"{name}: {potential}: round {last.number}, {last.arcs:,} pairs, gap {last.gap:.0e}"
                ),
            )
            for name, split in (("train", dataset.train), ("test", dataset.test))
        }
        arrays = partners(audits["train"], dataset.train)
    content = {
        "format": 1,
        "samples": samples,
        "seed": seed,
        "quantiles": list(QUANTILES),
        "versions": versions(),
        "splits": {
            name: [figures(entry, held_out=name == "test") for entry in found.potentials]
            for name, found in audits.items()
        },
        "verdict": verdict(audits["train"], audits["test"]),
    }
    files = {
        "audit.json": json_bytes(content),
        "audit.npz": npz_bytes(arrays),
        "audit.png": partners_picture(arrays, run.classes),
    }
    summary = {name: _middle_gap(found) for name, found in audits.items()}
    run.write(files, {"audit": summary, "seconds": {"audit": round(time.perf_counter() - start, 3)}})
    return content


def figures(entry: PotentialAudit, *, held_out: bool) -> dict[str, Any]:
    """One potential as audit.json tells of it."""
    problem = entry.problem
    positives, negatives, _ = problem.sizes
    return {
        "name": entry.name,
        "exact": entry.exact,
        "positives": positives,
        "negatives": negatives,
        "hinge_weight": problem.hinge_weight,
        "margin": entry.margin,
        "optimal_margin": entry.solution.margin,
        "alpha": problem.alpha,
        "prior": problem.prior,
        "lipschitz": entry.lipschitz,
        "solver_gap": entry.solution.gap,
        **dataclasses.asdict(entry.measures),
        "hypotheses": None if entry.hypotheses is None else dataclasses.asdict(entry.hypotheses),
        # the lower end is one only for samples that the network has not seen
        "bracket": dataclasses.asdict(entry.bracket) if held_out and entry.bracket is not None else None,
    }


def loss_of(run: Run, dataset: Dataset) -> Loss:
    """The loss that trained the OTNN of a run, with the margins that it learned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of alpha: told when the run was trained
        # as trained, whatever was edited since
        trained: Config = from_mapping(Config, run.manifest["config"])
        loss = make_loss(trained.loss, dataset.shares)
    margin = getattr(loss, "margin", None)
    if isinstance(margin, nn.Parameter):
        with torch.no_grad():
            margin.copy_(torch.tensor(run.results()["otnn"]["margin"]))
    return loss


def partners(found: Audit, data: Split, count: int = PICTURES) -> dict[str, Any]:
    """Samples with their partners under the plan and their steps along the gradient, as arrays of audit.npz.

    They are taken in turn from the positives and the negatives, from potentials spread over all of them.
    """
    chosen = torch.linspace(0, len(found.potentials) - 1, count).round().long().tolist()
    rows = [_partner(found.potentials[k], data, turn) for turn, k in enumerate(chosen)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _partner(entry: PotentialAudit, data: Split, turn: int) -> dict[str, Any]:
    """The sample number `turn` of one side, its partner that the plan gives most, and both steps of the gradient."""
    positive = turn % 2 == 0
    own_index = entry.indices[0 if positive else 1]
    # spread over the sample; each is carried at least once, so it has a partner
    sample = int(own_index[(turn * len(own_index)) // PICTURES])
    best = plan_partner(entry.solution, torch.tensor([sample]), entry.indices)
    partner = int(best.partner)
    image, target = data.images[sample].double(), data.images[partner].double()
    value, gradient = values_and_gradients(entry.function, image.unsqueeze(0))
    step = image - value[0] * gradient[0]
    after = values_of(entry.function, step.unsqueeze(0))
    norm, length = float(gradient.norm()), float((image - target).norm())
    unit = gradient[0] / norm if norm > 0 else gradient[0]
    way = (image - target) * (1.0 if positive else -1.0)
    return {
        "image": image.float().numpy(),
        "partner": target.float().numpy(),
        "one_step": step.float().numpy(),
        "same_length": _moved(image, unit, length if positive else -length),
        "label": int(data.labels[sample]),
        "partner_label": int(data.labels[partner]),
        "index": sample,
        "partner_index": partner,
        "name": entry.name,
        "potential": float(value[0]),
        "potential_after": float(after[0]),
        "distance": length,
        "share": float(best.share),
        "cosine": float((unit * way).sum() / length) if length > 0 else float("nan"),
    }


def _moved(image: Tensor, unit: Tensor, length: float) -> Any:
    return (image - length * unit).float().numpy()


def _middle_gap(found: Audit) -> dict[str, Any]:
    """The median gap over the potentials, and the number of them."""
    known = [gap for gap, _ in gaps(found)]
    return {"gap": median(known) if known else None, "exact": found.exact, "potentials": len(known)}
