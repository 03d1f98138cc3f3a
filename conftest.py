import pytest
import torch

# Networks of tests are tiny: a second thread only waits, by a factor of ten where the cores are shared
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Layers draw from the global generator: every test and every example starts it at the same place."""
    torch.manual_seed(0)
