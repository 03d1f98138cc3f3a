"""The command `otnn`."""

from otnn.cli.main import main

__all__ = ["main"]
