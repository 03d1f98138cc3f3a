"""Optimal-transport losses: each as a function, and as a module that holds its state."""

from otnn.losses.functional import hinge, hkr, kr, one_vs_all_hkr, soft_hkr, temperature_cross_entropy
from otnn.losses.modules import (
    HingeLoss,
    HKRLoss,
    KRLoss,
    Loss,
    OneVsAllHKRLoss,
    SoftHKRLoss,
    TemperatureCrossEntropyLoss,
)

__all__ = [
    "HKRLoss",
    "HingeLoss",
    "KRLoss",
    "Loss",
    "OneVsAllHKRLoss",
    "SoftHKRLoss",
    "TemperatureCrossEntropyLoss",
    "hinge",
    "hkr",
    "kr",
    "one_vs_all_hkr",
    "soft_hkr",
    "temperature_cross_entropy",
]
