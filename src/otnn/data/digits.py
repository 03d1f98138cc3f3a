"""Handwritten digits that scikit-learn carries: 1,797 grey images of 8 x 8."""

import numpy as np

from otnn.data.stores import Part, Pixels, Source


def read_digits() -> Source:
    """All 1,797 digits, intensities 0..16 divided by 16 (UCI 'Optical Recognition of Handwritten Digits')."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    part = Part(Pixels((bunch.images / 16).astype(np.float32)), bunch.target.astype(np.int64))
    return Source("digits", {"train": part}, tuple(str(name) for name in bunch.target_names), size=8)
