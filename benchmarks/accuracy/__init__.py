"""Accuracy at equal epochs and equal tuning: otnn against deel-torchlip and orthogonium on Fashion-MNIST.

python -m benchmarks.accuracy --data-dir DIR    one network, one loss and one grid of settings for every library

Reported is the front of clean against certified accuracy of each library, and whether otnn's lies above the others'.
"""
