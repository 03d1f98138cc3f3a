"""Drop-in layers of `torch.nn` whose Lipschitz constant is 1."""

from otnn.nn.activation import Abs, FullSort, GroupSort, Householder, MaxMin, group_sort, householder, maxmin
from otnn.nn.centering import BatchCentering, LayerCentering
from otnn.nn.conv import OrthoConv1d, OrthoConv2d
from otnn.nn.conv_transpose import OrthoConvTranspose2d
from otnn.nn.linear import Centering, FrobeniusLinear, OrthoLinear, UnitNormLinear
from otnn.nn.pooling import AdaptiveL2NormPool2d, L2NormPool2d, ScaledAdaptiveAvgPool2d, ScaledAvgPool2d
from otnn.nn.residual import ConcatResidual, ConvexResidual

__all__ = [
    "Abs",
    "AdaptiveL2NormPool2d",
    "BatchCentering",
    "Centering",
    "ConcatResidual",
    "ConvexResidual",
    "FrobeniusLinear",
    "FullSort",
    "GroupSort",
    "Householder",
    "L2NormPool2d",
    "LayerCentering",
    "MaxMin",
    "OrthoConv1d",
    "OrthoConv2d",
    "OrthoConvTranspose2d",
    "OrthoLinear",
    "ScaledAdaptiveAvgPool2d",
    "ScaledAvgPool2d",
    "UnitNormLinear",
    "group_sort",
    "householder",
    "maxmin",
]
