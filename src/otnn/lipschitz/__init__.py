"""Rigorous upper bounds of Lipschitz constants: true statements about the stored weights, rounded outward."""

from otnn.lipschitz import (  # noqa: F401  (their rules register themselves)
    activations,
    centering,
    convolution_layers,
    pooling,
    residual,
)
from otnn.lipschitz.bounds import LipschitzBound, bound
from otnn.lipschitz.convolution import convolution_bound
from otnn.lipschitz.export import export, plain_structure
from otnn.lipschitz.layers import computes_like
from otnn.lipschitz.matrix import matrix_bound

__all__ = [
    "LipschitzBound",
    "bound",
    "computes_like",
    "convolution_bound",
    "export",
    "matrix_bound",
    "plain_structure",
]
