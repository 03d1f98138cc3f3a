"""How near counterfactuals are to real images: at their end, and all along their way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otnn import metrics
from otnn.data import Dataset
from otnn.explain import Counterfactual, nearest
from otnn.metrics import MetricResult, bootstrap_interval
from otnn.metrics.result import summarise
from otnn.run.standings import number

NEIGHBOURS = 5
# Products of two values, of one network, every image of its paths against every training image: some seconds on a core
_PRODUCTS = 2**36
# What is told of each length, and its meaning
ALONG: Mapping[str, str] = {
    "data_distance": "distance to the data of the target; 1: as a real image",
    "nearest_is_target": "share of the images whose nearest training image, of all classes, is of the target",
}


@dataclass(frozen=True)
class Real:
    """Real images that counterfactuals are held against, on the device of the networks.

    Attributes:
        images: (m, ...) of the training.
        labels: (m,).
        usual: (classes,) mean distance of the test images of a class to the nearest training images of it.
    """

    images: Tensor
    labels: Tensor
    usual: Tensor


def real_images(dataset: Dataset, device: str | torch.device) -> Real:
    """The training images of a data set, and how near to them its test images are."""
    images, labels = dataset.train.images.to(device), dataset.train.labels.to(device)
    usual = torch.full((len(dataset.classes),), torch.nan, device=device)
    for k in range(len(dataset.classes)):
        own, test = images[labels == k], dataset.test.images[dataset.test.labels == k].to(device)
        if len(own) and len(test):
            usual[k] = nearest(own, test, k=NEIGHBOURS).distance.mean()
    return Real(images, labels, usual)


def data_distance(way: Counterfactual, real: Real) -> MetricResult:
    """As with the test images as reference, whose own distances are not looked for again for every chunk."""
    found = metrics.data_distance(way, real.images, real.labels, k=NEIGHBOURS)
    ratio = _over_usual(found.per_sample, real, way.target)
    return summarise(
        found.name,
        ratio,
        found.direction,
        signed=True,
        undefined=ratio.isnan(),
        counted_as=found.counted_as,
        settings=found.settings,
    )


def followed(count: int, real: Real, steps: int) -> int:
    """Of how many of `count` images the whole way is measured: as many as the products allow, and at least two."""
    return min(count, max(2, _PRODUCTS // (steps * real.images.numel())))


def along(way: Counterfactual, real: Real) -> dict[str, Tensor]:
    """The measures of `ALONG` at each length of each path (n, steps), and these lengths as multiples of t*.

    NaN where no counterfactual was asked for, and in the multiples where no boundary was found. Other paths without a
    boundary count, as in `data_distance`.
    """
    count, steps = way.lengths.shape
    asked = (way.potential[:, 0] > 0) & torch.isfinite(way.path).flatten(1).all(dim=1)
    distance = torch.full((count, steps), torch.nan, dtype=torch.float64, device=way.path.device)
    for k in way.target[asked].unique().tolist():
        rows, own = asked & (way.target == k), real.images[real.labels == k]
        if len(own):
            points = way.path[rows].flatten(0, 1).to(real.images)
            found = nearest(own, points, k=NEIGHBOURS).distance.mean(dim=1).view(-1, steps)
            distance[rows] = _over_usual(found.double(), real, way.target[rows].unsqueeze(1))
    same = torch.full_like(distance, torch.nan)
    if bool(asked.any()):
        index = nearest(real.images, way.path[asked].flatten(0, 1).to(real.images)).index.view(-1, steps)
        same[asked] = (real.labels[index] == way.target[asked].unsqueeze(1)).to(same)
    multiples = (way.lengths / way.boundary_length.unsqueeze(1)).double()
    return {
        "data_distance": distance.cpu(),
        "nearest_is_target": same.cpu(),
        "lengths": torch.where(asked.unsqueeze(1), multiples, torch.nan).cpu(),
    }


def along_together(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The chunks of one network: mean lengths in multiples of t*, and mean and interval of each measure there."""
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    told: dict[str, Any] = {
        "lengths": [number(round(each, 4)) for each in whole.pop("lengths").nanmean(dim=0).tolist()]
    }
    for name, values in whole.items():
        told[name] = {
            "mean": [number(each) for each in values.nanmean(dim=0).tolist()],
            "interval": [[number(end) for end in bootstrap_interval(each)] for each in values.T],
            "undefined": int(values.isnan().any(dim=1).sum()),
        }
    return told


def _over_usual(distance: Tensor, real: Real, target: Tensor) -> Tensor:
    """Distances over the usual one of each target (same shape, or one a row), NaN where that is 0 or not known."""
    usual = real.usual[target.clamp(min=0)].double()
    return torch.where(usual > 0, distance / torch.where(usual > 0, usual, 1.0), torch.nan)
