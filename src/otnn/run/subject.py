"""One network of a comparison, with the images that it explains and its maps."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from otnn.explain import METHODS, NotApplicableError, attribute, cost
from otnn.explain.scores import Scorer
from otnn.memory import MEMORY_BUDGET, chunk_size
from otnn.metrics import Explain, box_regions
from otnn.models import Classifier, predict
from otnn.run.fit import scores_of

_REPEATS = 3
# Forwards that a trial of a method may make, where one map has not more
_TRIAL = 2048


class Subject:
    """A network with the images that it explains, each for the class that the network predicts.

    Args:
        name: of the network.
        model: in `eval()` mode.
        inputs: (n, channels, height, width).
        score: what is explained, see `otnn.explain.attribute`.
        seed: of every draw: all methods, metrics and networks see the same masks and noise.
        settings: of methods and metrics, by name.
        boxes: (n, 4) where the object is, see `otnn.data.Split`.

    Attributes:
        scorer: of the predictions.
        regions: (n, height, width) bool, the boxes; None without them.
        maps: method to maps, filled by `explain_all`.
    """

    def __init__(
        self,
        name: str,
        model: Classifier,
        inputs: Tensor,
        score: str,
        seed: int,
        settings: Mapping[str, Mapping[str, Any]],
        boxes: Tensor | None = None,
    ) -> None:
        self.name, self.model, self.inputs, self.score, self.seed = name, model, inputs, score, seed
        self._settings = settings
        self.scorer = Scorer(model, inputs, predict(scores_of(model, inputs, 64)), score)
        height, width = inputs.shape[2:]
        self.regions = None if boxes is None else box_regions(boxes, (height, width))
        self.maps: dict[str, Tensor] = {}

    def settings(self, name: str) -> dict[str, Any]:
        """Those of a method or metric that differ from its defaults."""
        return dict(self._settings.get(name, {}))

    def generator(self) -> torch.Generator:
        """A new source of random numbers: the same ones every time."""
        return torch.Generator().manual_seed(self.seed)

    def explain(self, method: str) -> Explain:
        """The method as a function of perturbed inputs and the samples that they came from."""

        def maps(inputs: Tensor, index: Tensor) -> Tensor:
            target = self.scorer.target[index]
            settings = self.settings(method)
            return attribute(
                self.model, inputs, target, method, score=self.score, generator=self.generator(), **settings
            )

        return maps

    def passes(self, method: str) -> tuple[int, int]:
        """Forwards and backwards of one map."""
        return cost(method, self.inputs, self.settings(method))

    def reason(self, method: str) -> str | None:
        """Why a method does not apply to this network, found on one image; None where it does."""
        try:
            self.passes(method)
            if METHODS[method].applies != METHODS["occlusion"].applies:  # not "any model"
                self.explain(method)(self.inputs[:1], torch.zeros(1, dtype=torch.long, device=self.inputs.device))
        except NotApplicableError as error:
            return str(error)
        return None

    def explain_all(self, method: str) -> float:
        """Make the maps of a method, and return the seconds that they took."""
        start = time.perf_counter()
        self.maps[method] = self.explain(method)(self.inputs, torch.arange(len(self.inputs), device=self.inputs.device))
        _wait(self.inputs)
        return time.perf_counter() - start

    def pace(self, method: str) -> float:
        """The seconds of one map of a method, from those of a few images: a map takes more than its passes."""
        count = max(1, min(len(self.inputs), _TRIAL // max(1, self.passes(method)[0]), 32))
        explain, index = self.explain(method), torch.arange(count, device=self.inputs.device)
        explain(self.inputs[:1], index[:1])
        start = time.perf_counter()
        explain(self.inputs[:count], index)
        _wait(self.inputs)
        return (time.perf_counter() - start) / count

    def seconds(self) -> tuple[float, float]:
        """The time of one image in a batched forward, and in a batched backward."""
        count = min(256, chunk_size(self.inputs[:1], MEMORY_BUDGET, self.model, gradient=True))
        index = torch.arange(count, device=self.inputs.device) % len(self.inputs)
        batch = self.inputs[index]
        forward, both = [], []
        for _ in range(_REPEATS + 1):  # the first is left out: it warms up
            start = time.perf_counter()
            with torch.no_grad():
                self.scorer(batch, index)
            _wait(batch)
            forward.append(time.perf_counter() - start)
            leaf = batch.clone().requires_grad_()
            start = time.perf_counter()
            torch.autograd.grad(self.scorer(leaf, index).sum(), leaf)
            _wait(batch)
            both.append(time.perf_counter() - start)
        once, twice = min(forward[1:]), min(both[1:])
        return once / count, max(0.0, twice - once) / count


def _wait(like: Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
