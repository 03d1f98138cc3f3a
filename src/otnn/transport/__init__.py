"""Exact optimal transport on finite data, and the distance of a trained network from it."""

from otnn.transport.audit import Audit, PotentialAudit, audit
from otnn.transport.measures import Measures, measure
from otnn.transport.partners import Partners, plan_partner
from otnn.transport.problem import TransportProblem
from otnn.transport.solution import TransportSolution
from otnn.transport.solver import Round, solve

__all__ = [
    "Audit",
    "Measures",
    "Partners",
    "PotentialAudit",
    "Round",
    "TransportProblem",
    "TransportSolution",
    "audit",
    "measure",
    "plan_partner",
    "solve",
]
