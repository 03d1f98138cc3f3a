"""Drop-in layers of `torch.nn` whose Lipschitz constant is 1."""

from otnn.nn.activation import Abs, FullSort, GroupSort, Householder, MaxMin, group_sort, householder, maxmin
from otnn.nn.conv import OrthoConv2d
from otnn.nn.linear import Centering, FrobeniusLinear, OrthoLinear, UnitNormLinear

__all__ = [
    "Abs",
    "Centering",
    "FrobeniusLinear",
    "FullSort",
    "GroupSort",
    "Householder",
    "MaxMin",
    "OrthoConv2d",
    "OrthoLinear",
    "UnitNormLinear",
    "group_sort",
    "householder",
    "maxmin",
]
