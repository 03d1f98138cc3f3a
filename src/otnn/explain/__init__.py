"""Explanations: the gradient as a saliency map, and the counterfactual that it leads to."""

from otnn.explain.counterfactual import Counterfactual, counterfactual
from otnn.explain.saliency import saliency

__all__ = ["Counterfactual", "counterfactual", "saliency"]
