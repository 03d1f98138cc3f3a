"""The guarantees of explained images, as arrays that run folders hold and as figures for tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otnn.data import Split
from otnn.explain import saliency
from otnn.explain.scores import Scorer
from otnn.guarantees import Guarantee, guarantees, in_words
from otnn.lipschitz import LipschitzBound
from otnn.metrics import robustness_sr
from otnn.models import Classifier, predict

# Cheap enough for every image; certified SmoothGrad says something from some 10,000 gradients on
GRADIENTS = 10
_MASKS, _STEPS = 16, 4
# Of the most important pixels; any change that is found bounds the distance from above, so a short search is sound
_SHARES, _BISECTIONS, _ATTACK_STEPS = (0.05, 0.25, 0.45), 3, 2
_BUDGET = 2**30  # bytes
_CHUNK = 32


def guarantee_arrays(
    model: Classifier,
    images: Tensor,
    body: LipschitzBound,
    target: Tensor | None = None,
    boundary: Tensor | None = None,
    *,
    attribution: Tensor | None = None,
    gradients: int = GRADIENTS,
) -> dict[str, Any]:
    """Every guarantee of n images, G in number, as arrays.

    Noise and masks are the same for every image and every call, so that nothing depends on the rest of the batch.

    Returns:
        `guarantee`, `guarantee_domain` and `guarantee_unit` (G,); `guarantee_sentence`, `guarantee_reason`,
        `guarantee_bound`, `guarantee_tightness` and `guarantee_vacuous` (n, G).
    """
    found = list(
        guarantees(
            model,
            images,
            body,
            target,
            boundary=boundary,
            attribution=attribution,
            robustness=_found_changes(model, images, attribution),
            samples=gradients,
            masks=_MASKS,
            steps=_STEPS,
            generator=torch.Generator().manual_seed(0),
            memory_budget=_BUDGET,
        ).values()
    )
    names = [each.name for each in found]
    attained = tightness({each.name: each for each in found})
    return {
        "guarantee": np.array(names),
        "guarantee_domain": np.array([each.domain for each in found]),
        "guarantee_unit": np.array([each.unit for each in found]),
        "guarantee_sentence": np.array([in_words(each) for each in found]).T,
        "guarantee_reason": np.array([each.reason for each in found]).T,
        "guarantee_bound": torch.stack([each.bound for each in found], dim=1).cpu().numpy(),
        "guarantee_tightness": torch.stack([attained[name] for name in names], dim=1).cpu().numpy(),
        "guarantee_vacuous": torch.stack([each.vacuous for each in found], dim=1).cpu().numpy(),
    }


def _found_changes(model: Classifier, images: Tensor, attribution: Tensor | None) -> Tensor:
    """Distances (n, sets) at which changing only the top pixels of the map altered the prediction; infinite if none.

    The map is the saliency of the predicted class unless one is given. Images that cannot be read have no change.
    """
    found = images.new_full((len(images), len(_SHARES)), torch.inf)
    readable = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1)
    if not bool(readable.any()):
        return found
    kept = images[readable]
    with torch.no_grad():
        own = predict(torch.cat([model(part) for part in kept.split(_CHUNK)]))
    result = robustness_sr(
        Scorer(model, kept, own),
        kept,
        saliency(model, kept, own) if attribution is None else attribution[readable].to(kept),
        shares=_SHARES,
        bisections=_BISECTIONS,
        attack_steps=_ATTACK_STEPS,
        generator=torch.Generator().manual_seed(0),
        memory_budget=_BUDGET,
    )
    found[readable] = result.details["radius"].masked_fill(result.details["failed"], torch.inf).to(found)
    return found


def tightness(found: Mapping[str, Guarantee]) -> dict[str, Tensor]:
    """How much of each bound is used: what was measured of each sample over what is proven, (n,).

    The bracket and Robustness-Sr: lower over upper end. Path stability and agreement: the turn and the distance at the
    points of the midpoint sum, which is no integral and may be above it. Masks: the mean change over its ceiling. At
    most 1 but for that sum; NaN where nothing was measured.
    """
    result = {}
    for name, each in found.items():
        part = torch.full_like(each.bound, torch.nan)
        if "tightness" in each.details:
            part = each.details["tightness"].view(len(part), -1).mean(dim=1)
        elif "ratio" in each.details:
            part = each.details["ratio"].nanmean(dim=1)
        elif name == "gradient_agreement":
            part = each.details["measured"] / each.bound
        elif name == "path_stability" and "gradient_agreement" in found:
            part = found["gradient_agreement"].details["turn"] / each.bound
        result[name] = part
    return result


def over_samples(
    model: Classifier,
    body: LipschitzBound,
    test: Split,
    samples: int,
    *,
    gradients: int = GRADIENTS,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Shares and medians of the guarantees over random test images; the boundary is searched along the gradient."""
    index = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:samples]
    chunks = [
        guarantee_arrays(model, test.images[part].double().to(device), body, gradients=gradients)
        for part in index.split(_CHUNK)
    ]
    names = ("guarantee_bound", "guarantee_tightness", "guarantee_vacuous")
    arrays = chunks[0] | {name: np.concatenate([chunk[name] for chunk in chunks]) for name in names}
    return shares(arrays) | {"guarantee_samples": np.array(len(index))}


def shares(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """`guarantee_share` of the images that are not vacuous, median of the bounds and of their tightness: (G,) each."""
    return {
        "guarantee_share": (~arrays["guarantee_vacuous"]).mean(axis=0),
        "guarantee_median": _medians(arrays["guarantee_bound"]),
        "guarantee_median_tightness": _medians(arrays["guarantee_tightness"]),
        "guarantee_samples": np.array(0),
    }


def figures(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Share, medians, unit and domain by name, for JSON and tables; None where there is no finite figure."""
    return {
        str(name): {
            "share": float(arrays["guarantee_share"][g]),
            "median_bound": _finite(arrays["guarantee_median"][g]),
            "median_tightness": _finite(arrays["guarantee_median_tightness"][g]),
            "unit": str(arrays["guarantee_unit"][g]),
            "domain": str(arrays["guarantee_domain"][g]),
        }
        for g, name in enumerate(arrays["guarantee"])
    }


def image_guarantees(arrays: Mapping[str, Any], k: int) -> dict[str, dict[str, Any]]:
    """What is guaranteed of image k, by name: sentence, bound (None where there is no finite one), vacuous, reason."""
    return {
        str(name): {
            "sentence": str(arrays["guarantee_sentence"][k, g]),
            "bound": _finite(arrays["guarantee_bound"][k, g]),
            "vacuous": bool(arrays["guarantee_vacuous"][k, g]),
            "reason": str(arrays["guarantee_reason"][k, g]),
        }
        for g, name in enumerate(arrays["guarantee"])
    }


def _medians(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The median of each column without its NaN; NaN of a column that has nothing else."""
    columns = [column[~np.isnan(column)] for column in values.T]
    return np.array([np.median(column) if len(column) else np.nan for column in columns])


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
