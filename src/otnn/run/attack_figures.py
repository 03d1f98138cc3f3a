"""What attacks.json says of one network: accuracy over radii of each attack, and how the attacks collapse."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from otnn.attacks.collapse import collapse
from otnn.attacks.table import ATTACKS
from otnn.run.attacked import Found, Victim
from otnn.run.standings import number

QUANTILES = (0.05, 0.5, 0.95)


def network_figures(
    victim: Victim, found: Mapping[str, Found], radii: Sequence[float], left: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A network with every attack on it.

    Args:
        victim: the network.
        found: by attack.
        radii: ascending, from 0.
        left: of `search_left`.
    """
    attacks = {name: _attack_figures(victim, one, radii, ATTACKS[name].minimal) for name, one in found.items()}
    distances = torch.stack([one.distance for one in found.values()])
    best = distances.amin(dim=0)
    turned = victim.right & (best < torch.inf)
    first = ((distances == best) & turned).sum(dim=1).tolist()
    at_largest = torch.stack([one.at_largest for one in found.values()]).any(dim=0)
    held = victim.right & (victim.radius >= torch.tensor(radii, device=best.device, dtype=best.dtype).unsqueeze(1))
    return {
        "accuracy": victim.accuracy,
        "right": int(victim.right.sum()),
        "certified": held.double().mean(dim=1).tolist(),
        "mean_radius": float(victim.radius.mean()),
        "certified_radius": victim.radius.tolist(),
        "not_finite": int((~torch.isfinite(victim.scores).all(dim=1)).sum()),
        "deterministic": victim.deterministic(),
        "gradients": victim.gradients(),
        "attacks": attacks,
        "best": {
            "accuracy": [float((best > radius).double().mean()) for radius in radii],
            "nearest": dict(zip(found, first, strict=True)),
            "distance": [number(each) for each in best.tolist()],
        },
        "at_largest": float((victim.right & ~at_largest).double().mean()),
        "left": left,
    }


def collapse_figures(victim: Victim, found: Found, minimal: bool) -> dict[str, Any] | None:
    """Cosine with the gradient and distance over certified radius, of the right predictions that were turned.

    The points of an attack within a radius are drawn towards their inputs first, as far as they stay adversarial: their
    distance is that of the radius otherwise. None in the largest norm, in which the gradient is not the direction.
    """
    if victim.settings["norm"] != "l2":
        return None
    near = found if minimal else victim.shortened(found)
    if near is not found:
        found.below, found.rounding = found.below + near.below, found.rounding + near.rounding
    told = collapse(victim.images, near.points, victim.direction, victim.radius, near.turned())
    return {
        "successes": told.successes,
        "cosine": _summary(told.cosine),
        "no_cosine": told.no_cosine,
        "ratio": _summary(told.ratio),
        "no_ratio": told.no_ratio,
        "per_sample": {
            "cosine": [number(each) for each in told.cosine.tolist()],
            "ratio": [number(each) for each in told.ratio.tolist()],
        },
    }


def _attack_figures(victim: Victim, found: Found, radii: Sequence[float], minimal: bool) -> dict[str, Any]:
    turned = found.turned()
    collapsed = collapse_figures(victim, found, minimal)  # it may find a point below the radius as well
    return {
        "accuracy": found.accuracy(radii),
        "at_largest": float((victim.right & ~found.at_largest).double().mean()),
        "successes": int(turned.sum()),
        "median_distance": float(found.distance[turned].median()) if bool(turned.any()) else None,
        "not_finite": found.not_finite,
        "below": found.below,
        "rounding": found.rounding,
        "seconds": round(found.seconds, 3),
        "distance": [number(each) for each in found.distance.tolist()],
        "collapse": collapsed,
    }


def _summary(values: Tensor) -> dict[str, Any] | None:
    """Mean and quantiles (at `QUANTILES`) of what is defined."""
    known = values[values.isfinite()]
    if not len(known):
        return None
    shares = torch.tensor(QUANTILES, dtype=known.dtype, device=known.device)
    return {
        "mean": float(known.mean()),
        "least": float(known.min()),
        "quantiles": torch.quantile(known, shares).tolist(),
    }
