import shutil
from pathlib import Path

import pytest

from otnn.run import config
from otnn.run.folder import Run, open_run
from otnn.run.train import train

# Five epochs on the embedded digits: about a second, and far better than chance.
QUICK = ("training.epochs=5", "model.widths=[64, 64]")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with both networks; tests that change it take `run`, a copy."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    train(config.load(overrides=QUICK), path, quiet=True)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copytree(trained, tmp_path / "run")
    return open_run(tmp_path / "run")
