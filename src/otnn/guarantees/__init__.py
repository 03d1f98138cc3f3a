"""Guarantees beside each map: what is proven of it, where that holds, and of how many samples it says something."""

from otnn.guarantees.bracket import bracket
from otnn.guarantees.compute import guarantees
from otnn.guarantees.masks import (
    cell_masks,
    deletion_masks,
    insertion_masks,
    masking_ceiling,
    occlusion_masks,
    robustness_bracket,
)
from otnn.guarantees.path import Walk, gradient_agreement, path_stability, walk
from otnn.guarantees.potential import Potential
from otnn.guarantees.regions import constant_saliency
from otnn.guarantees.result import GREY, Guarantee
from otnn.guarantees.smoothing import (
    certified_smoothgrad,
    noise_error,
    smallest_change,
    smoothed_gradient,
    value_errors,
)
from otnn.guarantees.words import in_words

__all__ = [
    "GREY",
    "Guarantee",
    "Potential",
    "Walk",
    "bracket",
    "cell_masks",
    "certified_smoothgrad",
    "constant_saliency",
    "deletion_masks",
    "gradient_agreement",
    "guarantees",
    "in_words",
    "insertion_masks",
    "masking_ceiling",
    "noise_error",
    "occlusion_masks",
    "path_stability",
    "robustness_bracket",
    "smallest_change",
    "smoothed_gradient",
    "value_errors",
    "walk",
]
