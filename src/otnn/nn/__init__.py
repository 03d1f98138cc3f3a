"""Drop-in layers of `torch.nn` whose Lipschitz constant is 1."""

from otnn.nn.activation import MaxMin, maxmin
from otnn.nn.conv import OrthoConv1d, OrthoConv2d
from otnn.nn.conv_transpose import OrthoConvTranspose2d
from otnn.nn.linear import Centering, OrthoLinear, UnitNormLinear

__all__ = [
    "Centering",
    "MaxMin",
    "OrthoConv1d",
    "OrthoConv2d",
    "OrthoConvTranspose2d",
    "OrthoLinear",
    "UnitNormLinear",
    "maxmin",
]
