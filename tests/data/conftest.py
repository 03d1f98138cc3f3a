import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test depends on the caller's folders or caches unless it asks for `real`."""
    monkeypatch.delenv("OTNN_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


REAL = os.environ.get("OTNN_DATA_DIR")


@pytest.fixture
def real() -> Callable[[str], Path]:
    """The data folder of the environment, for a test on one of the real sets."""

    def find(name: str) -> Path:
        if not REAL:
            pytest.skip("OTNN_DATA_DIR is not set: no real images to test on")
        if not Path(REAL, name).is_dir():
            pytest.skip(f"OTNN_DATA_DIR has no folder {name}")
        return Path(REAL)

    return find
