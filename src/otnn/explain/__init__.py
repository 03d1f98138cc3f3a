"""Explanations: seventeen methods behind one call, and the counterfactual that the gradient leads to."""

from otnn.explain.applicability import NotApplicableError
from otnn.explain.attribute import attribute
from otnn.explain.counterfactual import Counterfactual, counterfactual
from otnn.explain.methods import METHODS, cost
from otnn.explain.saliency import saliency

__all__ = ["METHODS", "Counterfactual", "NotApplicableError", "attribute", "cost", "counterfactual", "saliency"]
