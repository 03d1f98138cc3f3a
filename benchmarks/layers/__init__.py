"""What orthogonality costs: a training step, the constraint alone, evaluation, memory and growth.

python -m benchmarks.layers

otnn's layers against the same network without a constraint and, where they are installed (`peers.py` tells how),
against deel-torchlip and orthogonium: in one process, by turns, each network in the memory format that is fastest for
it. Ratios are medians of ratios of the same round, and each is told with its bar.
"""
