"""Attacks: our gradient step, PGD and minimal-norm search, and those of rival libraries behind the same signature."""

from otnn.attacks.minimal import minimal_norm
from otnn.attacks.outcome import Outcome, evaluate
from otnn.attacks.pgd import pgd
from otnn.attacks.step import gradient_step
from otnn.attacks.table import ATTACKS, Attack

__all__ = ["ATTACKS", "Attack", "Outcome", "evaluate", "gradient_step", "minimal_norm", "pgd"]
