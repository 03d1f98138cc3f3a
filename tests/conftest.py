import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Layers draw from the global generator: every test starts it at the same place."""
    torch.manual_seed(0)
