"""Images as floats in [0, 1], in three splits: digits, idx files, image folders and zips, the Hub."""

from otnn.data.images import load_images
from otnn.data.loading import KNOWN, load
from otnn.data.splits import Dataset, Split

__all__ = ["KNOWN", "Dataset", "Split", "load", "load_images"]
