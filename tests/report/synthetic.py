"""A run folder out of thin air: a linear classifier on random images, so that every figure has a closed form."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otnn.report.load import load_run
from otnn.report.page import render

# A name that would break a page that does not escape it.
NASTY = """<b>T-shirt/top & "x"</b>'s"""
STEPS = 21
RADII = ("0", "0.1", "0.25", "0.5", "1", "5")


def make_run(
    folder: Path,
    *,
    shape: tuple[int, int, int] = (1, 8, 8),
    classes: Sequence[str] = (NASTY, "two", "three"),
    tests: int = 200,
    gallery: int = 4,
    twin: bool = True,
    one_output: bool = False,
    metrics: bool = True,
    images: NDArray[Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write the files that the report reads; returns the folder.

    The last image of a gallery of 4 or more has no way (NaN), the one before a way without a boundary.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    count = len(classes)
    label = random.integers(0, count, tests)
    wrong = random.random(tests) < 0.1
    prediction = np.where(wrong, (label + 1) % count, label)
    radius = random.gamma(4.0, 0.15, tests) * np.where(wrong, 0.3, 1.0)
    radius[7 * np.arange(gallery)] = np.linspace(0.3, 0.9, gallery)  # those of `explanations`
    np.savez_compressed(
        folder / "certificates.npz", label=label, prediction=prediction, logit_gap=radius * 1.4, radius=radius
    )
    np.savez_compressed(
        folder / "explanations.npz",
        **explanations(random, shape, count, gallery, twin=twin, one_output=one_output, images=images),
    )
    right = label == prediction
    network = {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean([right[label == k].mean() for k in range(count)])),
        "recall": {name: float(right[label == k].mean()) for k, name in enumerate(classes)},
        "parameters": 150794,
    }
    results: dict[str, Any] = {
        "format": 1,
        "data": {
            "name": f"synthetic {NASTY}",
            "classes": list(classes),
            "input_shape": list(shape),
            "train": 1000,
            "validation": 100,
            "test": tests,
            "class_shares": [1 / count] * count,
            "skipped": ["<i>broken</i>.png"],
        },
        "versions": {"otnn": "0.1.0", "torch": "2.13.0", "numpy": "2.4.0", "python": "3.11.7"},
        "seed": seed,
        "seconds": {"train_otnn": 11.8, "train_unconstrained": 2.3, "total": 130.0},
        "otnn": network
        | {
            "certified_accuracy": {r: float((right & (radius >= float(r))).mean()) for r in RADII},
            "mean_radius": float((radius * right).mean()),
            "lipschitz_bound": 1.0000038,
            "loss": "hkr" if count == 2 else "soft_hkr",
            "margin": [0.25] * count,
            "architecture": "dense",
            "widths": [64, 64],
        },
    }
    if twin:
        results["unconstrained"] = network | {"accuracy": 0.9833}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.toml").write_text('seed = 0\n[data]\nname = "synthetic"\ndata_dir = "private-place"\n')
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in training_lines(twin=twin)))
    return folder


def write_page(folder: Path) -> Path:
    """Write report.html as `write_report` does, which takes a run with networks and a manifest."""
    page = render(load_run(folder))
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def explanations(
    random: np.random.Generator,
    shape: tuple[int, int, int],
    count: int,
    gallery: int,
    *,
    twin: bool,
    one_output: bool,
    images: NDArray[Any] | None,
) -> dict[str, NDArray[Any]]:
    """Arrays as a network leaves them whose potential falls with slope 0.9 along every way."""
    images = random.random((gallery, *shape), dtype=np.float32) if images is None else images.astype(np.float32)
    label = np.arange(gallery) % count
    prediction = label.copy()
    prediction[1:2] = (label[1:2] + 1) % count
    target = (prediction + 1) % count
    direction = random.normal(size=images.shape)
    direction /= np.sqrt((direction**2).sum(axis=(1, 2, 3), keepdims=True))
    radius = np.linspace(0.3, 0.9, gallery)
    end = radius / 0.9
    distances = 2 * end[:, None] * np.linspace(0, 1, STEPS)
    path = images[:, None] - distances[:, :, None, None, None] * direction[:, None]
    potential = radius[:, None] - 0.9 * distances
    status = np.array(["ok"] * gallery, dtype="U80")
    if gallery >= 4:
        end[-2:] = np.nan
        status[-2:] = "no boundary within 64 certified radii along the gradient"
        potential[-2] = radius[-2] - 0.1 * distances[-2]
        distances[-1], path[-1], potential[-1] = np.nan, np.nan, np.nan
    arrays = {
        "images": images,
        "label": label,
        "prediction": prediction,
        "target": target,
        "radius": radius,
        "saliency": direction.astype(np.float32),
        "distances": distances,
        "path": path.astype(np.float32),
        "potential": potential,
        "scores": scores_of(potential, prediction, target, 1 if one_output else count),
        "one_step": images,
        "boundary": images,
        "boundary_distance": end,
        "tightness": radius / end,
        "flipped": np.isfinite(end),
        "status": status,
        "index": np.arange(gallery) * 7,
        "box": np.array(False),
        "iterations": np.array(1),
    }
    arrays |= guarantee_arrays(gallery, radius, end)
    if twin:
        arrays["unconstrained_prediction"] = label
        arrays["unconstrained_saliency"] = (50 * random.normal(size=images.shape)).astype(np.float32)
    return arrays


def guarantee_arrays(gallery: int, radius: NDArray[Any], end: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Three guarantees: the bracket of every image, the turn of those with a boundary, and one that is vacuous."""
    found = np.isfinite(end)
    turn = np.where(found, 0.25, np.nan)
    bound = np.stack([radius, turn, np.full(gallery, 1e-7)], axis=1)
    vacuous = np.stack([np.zeros(gallery, dtype=bool), ~found, np.ones(gallery, dtype=bool)], axis=1)
    sentences = [
        [f"No change below {radius[k]:.3f} & <none> of {k}.", f"The map of {k} turns by 50 %.", f"Constant map of {k}."]
        for k in range(gallery)
    ]
    return {
        "guarantee": np.array(["boundary_bracket", "path_stability", "constant_saliency"]),
        "guarantee_domain": np.array(["Every <real> change.", "In the mean.", "Below the radius."]),
        "guarantee_unit": np.array(["L2 norm of the change", "mean square", "L2 norm of the change"]),
        "guarantee_share": (~vacuous).mean(axis=0),
        "guarantee_median": np.array([np.median(radius), 0.25, 1e-7]),
        "guarantee_median_tightness": np.array([0.9, np.nan, np.nan]),
        "guarantee_samples": np.array(0),
        "guarantee_sentence": np.array(sentences),
        "guarantee_reason": np.where(vacuous, "why", ""),
        "guarantee_bound": bound,
        "guarantee_tightness": np.where(vacuous, np.nan, 0.9),
        "guarantee_vacuous": vacuous,
    }


def scores_of(
    potential: NDArray[Any], prediction: NDArray[Any], target: NDArray[Any], outputs: int
) -> NDArray[np.float64]:
    """Scores (samples, steps, outputs) with the given lead of the prediction over the target."""
    if outputs == 1:
        return (np.where(prediction == 1, 1.0, -1.0)[:, None] * potential)[:, :, None]
    scores = np.full((*potential.shape, outputs), -5.0)
    for k in range(len(potential)):
        scores[k, :, prediction[k]] = potential[k] / 2
        scores[k, :, target[k]] = -potential[k] / 2
    return scores


def training_lines(*, twin: bool) -> list[dict[str, Any]]:
    """Three epochs of each network."""
    lines = []
    for network in ("otnn", *(["unconstrained"] if twin else [])):
        for epoch in (1, 2, 3):
            line = {"network": network, "epoch": epoch, "step": 10 * epoch, "loss": 3.0 / epoch, "seconds": 1.0}
            certified = 0.2 * epoch if network == "otnn" else None
            lines.append(
                line | {"validation_accuracy": 0.3 * epoch, "validation_certified_accuracy": certified, "margin": 0.5}
            )
    return lines
