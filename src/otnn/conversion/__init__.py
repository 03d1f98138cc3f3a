"""The 1-Lipschitz counterpart of an ordinary torch network, and what became of each of its layers."""

from otnn.conversion.conversion import Conversion, convert
from otnn.conversion.notes import Change

__all__ = ["Change", "Conversion", "convert"]
