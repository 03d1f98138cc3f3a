"""Pair potentials: the 1-Lipschitz function behind every certificate, counterfactual and guarantee.

For classes t and j, g_tj = (z_t - z_j) / (L_body ||w_t - w_j||), w the rows of the head and L_body the bound of the
body; for one output g = z / (L_body ||w||), with the sign of the predicted class (theory, section 0).
"""

import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import LipschitzBound, computes_like
from otnn.models import Classifier


def pair_distances(model: Classifier, body: LipschitzBound) -> Tensor:
    """The Lipschitz constants of the score differences: L_body ||w_t - w_j||.

    Args:
        model: a classifier that names its head.
        body: `otnn.lipschitz.bound(model.body)`.

    Returns:
        (classes, classes) float64 with zeros on the diagonal. With one output, z has the constant L_body ||w||.

    Raises:
        InputError: a head or a model that computes something else than its type says.
    """
    if not (computes_like(model, Classifier) and computes_like(model.head, nn.Linear)):
        raise InputError("expected a Classifier with a linear head, both without a forward of their own or hooks")
    rows = model.head.weight.detach().double()
    if len(rows) == 1:
        rows = torch.cat([-rows / 2, rows / 2])  # as two classes with scores -z/2 and z/2
    lengths: Tensor = torch.linalg.vector_norm(rows.unsqueeze(1) - rows.unsqueeze(0), dim=2)
    return body.constant * lengths


def class_scores(scores: Tensor) -> Tensor:
    """Scores (batch, outputs) as (batch, classes): one output z becomes (-z/2, z/2), whose difference is z."""
    return torch.cat([-scores / 2, scores / 2], dim=1) if scores.shape[1] == 1 else scores


def pair_potential(scores: Tensor, own: Tensor, rival: Tensor, distances: Tensor) -> Tensor:
    """g_tj of each sample, positive where class `own` beats class `rival`.

    Args:
        scores: (batch, outputs).
        own: (batch,) the class t.
        rival: (batch,) the class j; the potential is 0 where it equals t.
        distances: `pair_distances`.

    Returns:
        (batch,) in the dtype of the scores, in input units (L2).

    Example:
        >>> distances = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> pair_potential(torch.tensor([[1.0, 4.0]]), torch.tensor([1]), torch.tensor([0]), distances)
        tensor([1.5000])
    """
    logits = class_scores(scores)
    difference = (logits.gather(1, own.unsqueeze(1)) - logits.gather(1, rival.unsqueeze(1))).squeeze(1)
    distance = distances[own, rival].to(scores)
    return torch.where(distance > 0, difference / torch.where(distance > 0, distance, 1.0), 0.0)


def rival_potentials(scores: Tensor, own: Tensor, distances: Tensor) -> Tensor:
    """The pair potentials of class t = `own` against every class: (batch, classes), infinite at t itself.

    A tie of classes with equal rows is 0/0: nothing separates them and the potential is 0.
    """
    logits = class_scores(scores)
    differences = logits.gather(1, own.unsqueeze(1)) - logits
    potentials = (differences / distances[own].to(scores)).nan_to_num(nan=0.0, posinf=torch.inf)
    return potentials.masked_fill(_is_own(logits, own), torch.inf)


def logit_gap(scores: Tensor, own: Tensor) -> Tensor:
    """z_t - z_second of class t = `own` against the strongest other class, or |z| for one output. (batch,)"""
    logits = class_scores(scores)
    others = logits.masked_fill(_is_own(logits, own), -torch.inf)
    return logits.gather(1, own.unsqueeze(1)).squeeze(1) - others.amax(dim=1)


def nearest_rival(scores: Tensor, own: Tensor, distances: Tensor) -> Tensor:
    """The class j != t with the smallest pair potential: the one whose boundary may be nearest. (batch,)"""
    return rival_potentials(scores, own, distances).argmin(dim=1)


def _is_own(logits: Tensor, own: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(own, logits.shape[1]).bool()
