"""The potentials of a trained network, each with the problem that it was trained for, or is measured against."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from otnn.errors import InputError
from otnn.lipschitz import bound
from otnn.losses import HKRLoss, KRLoss, Loss, OneVsAllHKRLoss, SoftHKRLoss, TemperatureCrossEntropyLoss
from otnn.models import Classifier
from otnn.potential import label_distances, pair_distances, pair_potential
from otnn.transport.measures import Function


@dataclass(frozen=True)
class TrainedPotential:
    """A 1-Lipschitz function of a network, and the problem that it belongs to.

    Attributes:
        name: such as "8 against 0".
        exact: whether the network was trained for this very problem.
        function: the potential, of (batch, ...) samples.
        lipschitz: the bound that the scores were divided by.
        positive: classes of the positives.
        negative: classes of the negatives.
        hinge_weight: of the problem; 0 for the plain one.
        margin: of the network, in units of the potential; None without a hinge.
        alpha: of a learned margin, else None.
        prior: share of the positives; None for that in the data.
    """

    name: str
    exact: bool
    function: Function
    lipschitz: float
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    hinge_weight: float = 0.0
    margin: float | None = None
    alpha: float | None = None
    prior: float | None = None


def potentials_of(model: Classifier, loss: Loss | None, names: tuple[str, ...]) -> Iterator[TrainedPotential]:
    """The potentials of a network: the one output, each class of one-vs-all, or each pair of classes."""
    known = (HKRLoss, OneVsAllHKRLoss, SoftHKRLoss, KRLoss, TemperatureCrossEntropyLoss)
    if loss is not None and not isinstance(loss, known):
        raise InputError(
            f"loss: expected one of {', '.join(kind.__name__ for kind in known)}, or None for plain transport, "
            f"got {type(loss).__name__}"
        )
    body = bound(model.body, model.input_shape)
    if isinstance(loss, HKRLoss) != (model.head.out_features == 1) and isinstance(loss, HKRLoss | OneVsAllHKRLoss):
        raise InputError(f"loss: {type(loss).__name__} does not train a network of {model.head.out_features} outputs")
    if isinstance(loss, OneVsAllHKRLoss | SoftHKRLoss) and len(loss.priors) != model.classes:
        raise InputError(f"loss: expected priors of {model.classes} classes, got {len(loss.priors)}")
    if isinstance(loss, OneVsAllHKRLoss):
        yield from _one_vs_all(model, loss, label_distances(model, body), names)
        return
    distances = pair_distances(model, body)
    for low, high in combinations(range(model.classes), 2):
        own, rival = (high, low) if model.classes == 2 else (low, high)
        scale = float(distances[own, rival])
        if scale == 0:
            raise InputError(f"classes {names[own]} and {names[rival]}: their rows of the head are equal")
        plain = TrainedPotential(
            name=f"{names[own]} against {names[rival]}",
            exact=isinstance(loss, KRLoss),
            function=partial(_pair, model, own, rival, distances),
            lipschitz=scale,
            positive=(own,),
            negative=(rival,),
        )
        if isinstance(loss, HKRLoss):
            yield replace(
                plain,
                exact=True,
                hinge_weight=loss.hinge_weight,
                margin=float(loss.margin.detach()) / scale,
                alpha=loss.alpha,
                prior=0.5 if loss.balanced else loss.prior,
            )
        elif isinstance(loss, SoftHKRLoss) and (loss.kr_form, loss.hinge_form) == ("soft", "joint"):
            # M = (z_t - z_j) / 2 for a pair: with g = (z_t - z_j) / scale the loss is scale / 2 times the binary one
            margins = loss.margin.detach().expand(model.classes)
            margin = float(margins[own] + margins[rival]) / scale
            yield replace(plain, hinge_weight=loss.hinge_weight, margin=margin, prior=0.5)
        else:  # the other forms of soft hKR are none of a pair potential
            yield plain


def _one_vs_all(
    model: Classifier, loss: OneVsAllHKRLoss, constants: Tensor, names: tuple[str, ...]
) -> Iterator[TrainedPotential]:
    margins = loss.margin.detach().expand(model.classes)
    for k, name in enumerate(names):
        yield TrainedPotential(
            name=f"{name} against the others",
            exact=True,
            function=partial(_score, model, k, float(constants[k])),
            lipschitz=float(constants[k]),
            positive=(k,),
            negative=tuple(other for other in range(model.classes) if other != k),
            hinge_weight=loss.hinge_weight,
            margin=float(margins[k]) / float(constants[k]),
            alpha=loss.alpha,
            prior=float(loss.priors[k]),
        )


def _pair(model: Classifier, own: int, rival: int, distances: Tensor, inputs: Tensor) -> Tensor:
    scores = model(inputs.to(model.head.weight))
    classes = torch.tensor([[own], [rival]], device=scores.device).expand(2, len(scores))
    return pair_potential(scores, classes[0], classes[1], distances.to(scores.device))


def _score(model: Classifier, own: int, constant: float, inputs: Tensor) -> Tensor:
    scores: Tensor = model(inputs.to(model.head.weight))
    return scores[:, own] / constant
