"""Metrics: fidelity, robustness, stability, complexity, randomisation, localisation; measures of counterfactuals."""

from otnn.metrics.complexity import entropy, gini, jpeg_bytes
from otnn.metrics.cost import Cost, cost_of
from otnn.metrics.counterfactuals import (
    concentration,
    data_distance,
    distance_over_radius,
    independent_score,
    tightness,
    validity,
)
from otnn.metrics.fidelity import deletion, insertion, mu_fidelity
from otnn.metrics.localization import (
    BlockImages,
    block_mnist,
    box_regions,
    human_alignment,
    null_block_share,
    pointing_game,
    top_share,
)
from otnn.metrics.maps import Explain
from otnn.metrics.randomization import layers_from_top, mprt
from otnn.metrics.result import Curves, MetricResult
from otnn.metrics.robustness import e_robustness, robustness_sr
from otnn.metrics.stability import Distances, average_stability, explanation_distance
from otnn.metrics.statistics import PairedTest, bootstrap_interval, compare_paired, holm, paired_test, spearman

__all__ = [
    "BlockImages",
    "Cost",
    "Curves",
    "Distances",
    "Explain",
    "MetricResult",
    "PairedTest",
    "average_stability",
    "block_mnist",
    "bootstrap_interval",
    "box_regions",
    "compare_paired",
    "concentration",
    "cost_of",
    "data_distance",
    "deletion",
    "distance_over_radius",
    "e_robustness",
    "entropy",
    "explanation_distance",
    "gini",
    "holm",
    "human_alignment",
    "independent_score",
    "insertion",
    "jpeg_bytes",
    "layers_from_top",
    "mprt",
    "mu_fidelity",
    "null_block_share",
    "paired_test",
    "pointing_game",
    "robustness_sr",
    "spearman",
    "tightness",
    "top_share",
    "validity",
]
