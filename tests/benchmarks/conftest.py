from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.data.image_makers import write_patterns


@pytest.fixture(scope="session")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's four files with 8 x 8 pictures, see `write_patterns`."""
    path = tmp_path_factory.mktemp("data") / "fashion-mnist"
    write_patterns(path, 600, 100)
    return path.parent


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
