"""Manifolds on which weights live, and the hooks that keep an optimizer's steps on them.

A manifold is four functions of a batch of points: `sample`, `project_`, `retract` and `distance`. A module names the
manifold of each constrained parameter in its attribute `manifolds`; `keep_on_manifold(optimizer, module)` does the
rest: before a step gradients lose what points off the manifold, and after it weights come back.
"""

from otnn.manifold.hooks import (
    ManifoldHooks,
    constrained_parameters,
    keep_on_manifold,
    project_gradients,
    retract_parameters,
)
from otnn.manifold.kinds import Frobenius, Interval, Manifold, Stiefel, UnitRows

__all__ = [
    "Frobenius",
    "Interval",
    "Manifold",
    "ManifoldHooks",
    "Stiefel",
    "UnitRows",
    "constrained_parameters",
    "keep_on_manifold",
    "project_gradients",
    "retract_parameters",
]
