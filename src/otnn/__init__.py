"""Optimal-transport neural networks: 1-Lipschitz classifiers that certify and explain themselves."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otnn.conversion import convert
    from otnn.lipschitz import export
    from otnn.transport import audit

__version__ = "0.1.0"
__all__ = ["__version__", "audit", "convert", "export"]


def __getattr__(name: str) -> Any:
    """Import functions when they are asked for: `otnn --version` need not wait for torch."""
    if name == "convert":
        from otnn.conversion import convert

        return convert
    if name == "export":
        from otnn.lipschitz import export

        return export
    if name == "audit":
        from otnn.transport import audit

        return audit
    raise AttributeError(f"module 'otnn' has no attribute {name!r}")
