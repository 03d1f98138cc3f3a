import shutil
from pathlib import Path
from typing import Any

import pytest

from otnn.report import write_report
from otnn.run import config, counterfactuals
from otnn.run.attack import attack_run
from otnn.run.audit import audit_run
from otnn.run.certify import certify_run
from otnn.run.compare import compare_run
from otnn.run.counterfactuals import counterfactual_run
from otnn.run.explain import explain_gallery
from otnn.run.export import export_run
from otnn.run.folder import Run, open_run
from otnn.run.train import train
from tests.run.attacks import OWN, Told

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


@pytest.fixture(scope="session")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after every stage; tests that change it take `whole`, a copy."""
    path = tmp_path_factory.mktemp("finished") / "digits"
    shutil.copytree(trained, path)
    opened = open_run(path)
    certify_run(opened)
    explain_gallery(opened, size=2)
    audit_run(opened, samples=20)
    compare_run(opened, methods=["saliency"], metrics=["deletion"], samples=2)
    counterfactual_run(opened, samples=2)
    attack_run(opened, samples=10, attacks=["step", "pgd"], steps=3)
    write_report(opened)
    export_run(opened, path / "otnn.onnx")
    return path


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "digits")
    return tmp_path / "digits"


@pytest.fixture(scope="session")
def told(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A run that was attacked, with all settings of the collapse."""
    path = tmp_path_factory.mktemp("attacked") / "run"
    shutil.copytree(trained, path)
    content = attack_run(open_run(path), samples=40, seed=3, attacks=OWN, steps=5, settings=True)
    return open_run(path), content


@pytest.fixture(scope="session")
def walked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """A run with counterfactuals, measured in more chunks than one."""
    path = tmp_path_factory.mktemp("walked") / "run"
    shutil.copytree(trained, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counterfactuals, "_BUDGET", 4 * 9 * 64 * 4 * 7)  # seven images a chunk
        content = counterfactual_run(open_run(path), samples=20, seed=3)
    return open_run(path), content


@pytest.fixture
def judged(walked: tuple[Run, dict[str, Any]], tmp_path: Path) -> Run:
    """A run that has its judge."""
    shutil.copytree(walked[0].path, tmp_path / "judged")
    return open_run(tmp_path / "judged")
