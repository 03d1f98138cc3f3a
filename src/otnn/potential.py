"""Pair potentials: the 1-Lipschitz function behind every certificate, counterfactual and guarantee.

For classes t and j, g_tj = (z_t - z_j) / (L_body ||w_t - w_j||), w the rows of the head and L_body the bound of the
body; for one output g = z / (L_body ||w||), with the sign of the predicted class (theory, section 0).
"""

import torch
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.lipschitz import LipschitzBound, computes_like
from otnn.lipschitz.rounding import gamma, power_of_two, up
from otnn.models import Classifier


def pair_distances(model: Classifier, body: LipschitzBound) -> Tensor:
    """The Lipschitz constants of the score differences, L_body ||w_t - w_j||, rounded up.

    Args:
        model: a classifier that names its head.
        body: `otnn.lipschitz.bound(model.body)`.

    Returns:
        (classes, classes) float64 with zeros on the diagonal. With one output, z has the constant L_body ||w||.

    Raises:
        InputError: a head or a model that computes something else than its type says.
    """
    rows = _head_rows(model)
    if len(rows) == 1:
        rows = torch.cat([-rows / 2, rows / 2])  # as two classes with scores -z/2 and z/2
    return _lengths(rows.unsqueeze(1) - rows.unsqueeze(0), body)


def label_distances(model: Classifier, body: LipschitzBound) -> Tensor:
    """The Lipschitz constant of each score by itself, L_body ||w_t||, rounded up: (outputs,) float64.

    Raises:
        InputError: a head or a model that computes something else than its type says.
    """
    return _lengths(_head_rows(model), body)


def _head_rows(model: Classifier) -> Tensor:
    if not (computes_like(model, Classifier) and computes_like(model.head, nn.Linear)):
        raise InputError("expected a Classifier with a linear head, both without a forward of their own or hooks")
    return model.head.weight.detach().double()


def _lengths(vectors: Tensor, body: LipschitzBound) -> Tensor:
    """Norms over the last dimension times the bound of the body, rounded up."""
    scale = power_of_two(float(vectors.abs().max()))  # no square vanishes
    lengths = scale * torch.linalg.vector_norm(vectors / scale, dim=-1)
    outward: Tensor = lengths * body.constant * up(1 + gamma(vectors.shape[-1] + 8))
    return torch.where(lengths > 0, outward, 0.0)  # also where the constant is infinite


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
