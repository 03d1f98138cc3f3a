"""Optimal-transport neural networks: 1-Lipschitz classifiers that certify and explain themselves."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otnn.lipschitz import export

__version__ = "0.1.0"
__all__ = ["__version__", "export"]


def __getattr__(name: str) -> Any:
    """Import `otnn.export` when it is asked for, so that `otnn --version` need not wait for torch."""
    if name == "export":
        from otnn.lipschitz import export

        return export
    raise AttributeError(f"module 'otnn' has no attribute {name!r}")
