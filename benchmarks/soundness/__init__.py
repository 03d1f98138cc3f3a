"""Soundness campaigns: are the bounds and the certificates true? Reproducible by seed, resumed where interrupted.

python -m benchmarks.soundness bounds     every bound against the singular values of the true operator
python -m benchmarks.soundness rounding   a search for roundings that break a certificate
python -m benchmarks.soundness trained    how far the bounds of a trained network are from its true norms
python -m benchmarks.soundness attacks RUN    adversarial points below the certified radii of trained networks
"""
