from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.image_makers import idx_bytes


@pytest.fixture(scope="session")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's four files with 8 x 8 pictures: ten random patterns, each with noise of its own."""
    path = tmp_path_factory.mktemp("data") / "fashion-mnist"
    path.mkdir()
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2, (10, 8, 8)) * 200
    for stem, count in (("train", 600), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pictures = (patterns[labels] + rng.integers(0, 56, (count, 8, 8))).astype(np.uint8)
        (path / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(pictures))
        (path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return path.parent


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
