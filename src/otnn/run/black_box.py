"""A search without gradients on what the other attacks left: what it turns there tells that gradients mislead them."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from otnn.attacks.autoattack_attacks import searchable, square
from otnn.attacks.table import ATTACKS
from otnn.run.attacked import SLACK, Found, Victim

QUERIES = 300
# Images at each radius
EACH = 16


def search_left(
    victim: Victim, found: Mapping[str, Found], radii: Sequence[float], seed: int, begin: Callable[[str], None]
) -> dict[str, Any] | None:
    """Run Square at each radius on the first images that no attack turned there and no certificate covers.

    Args:
        victim: the network.
        found: what the attacks on it found.
        radii: ascending, from 0.
        seed: of the search.
        begin: called with a text before the search.

    Returns:
        `queries` for each image, for each of `radii` how many images were `tried` and `turned`, and how many points lie
        `below` the certified radius; None where Square cannot run: without pyautoattack, on inputs that are no
        pictures, or in L2 on those that are not square or below 5 x 5 pixels.
    """
    begin("what is left")
    images = victim.images
    if find_spec(ATTACKS["square"].source) is None or not searchable(images, victim.settings["norm"]):
        return None
    best = torch.stack([one.distance for one in found.values()]).amin(dim=0)
    left = [(victim.right & (best > radius) & (victim.radius < radius)).nonzero().squeeze(1)[:EACH] for radius in radii]
    index = torch.cat(left)
    counts = torch.tensor([len(each) for each in left])
    which = torch.arange(len(radii)).repeat_interleave(counts)
    turned = torch.zeros(len(radii), dtype=torch.long)
    judged = Found(torch.full_like(best, torch.inf), images.clone(), torch.zeros_like(victim.right))
    if len(index):
        limits = torch.tensor(radii, dtype=torch.float64)[which] * (1 - SLACK)
        generator = torch.Generator().manual_seed(seed)
        settings = {"queries": QUERIES, "generator": generator, **victim.settings}
        points = square(victim.model, images[index], victim.labels[index], limits.to(images.device), **settings)
        turned.index_add_(0, which, victim.judge(judged, index, points).long().cpu())
    return {"queries": QUERIES, "tried": counts.tolist(), "turned": turned.tolist(), "below": judged.below}
