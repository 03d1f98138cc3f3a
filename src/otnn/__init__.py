"""Optimal-transport neural networks: 1-Lipschitz classifiers that certify and explain themselves."""

__version__ = "0.1.0"
