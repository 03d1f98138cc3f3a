"""Attacks: our gradient step, PGD and minimal-norm search, and those of rival libraries behind the same signature."""

from otnn.attacks.outcome import Outcome, evaluate

__all__ = ["Outcome", "evaluate"]
