"""Explanations: seventeen methods behind one call, counterfactuals along the gradient, and the nearest real images."""

from otnn.explain.applicability import NotApplicableError
from otnn.explain.attribute import attribute
from otnn.explain.counterfactual import Counterfactual, counterfactual
from otnn.explain.methods import METHODS, cost
from otnn.explain.nearest import Neighbours, nearest
from otnn.explain.saliency import saliency

__all__ = [
    "METHODS",
    "Counterfactual",
    "Neighbours",
    "NotApplicableError",
    "attribute",
    "cost",
    "counterfactual",
    "nearest",
    "saliency",
]
