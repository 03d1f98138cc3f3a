"""All stages in a row: data to report."""

import time
from pathlib import Path

from otnn.errors import InputError
from otnn.report import write_report
from otnn.run.audit import audit_run
from otnn.run.certify import certify_run
from otnn.run.config import Config
from otnn.run.distributed import launched
from otnn.run.explain import explain_gallery
from otnn.run.folder import Run
from otnn.run.train import choose_device, dataset_of, train


def run_all(config: Config, out: Path, *, force: bool = False, device: str = "auto") -> Run:
    """Train, certify, explain, audit and report into one run folder.

    Raises:
        InputError: see `otnn.run.train.train`; more than one process.
    """
    if launched() > 1:
        raise InputError(
            "demo runs in one process; under torchrun use `otnn train`, then the other commands without it"
        )
    start = time.perf_counter()
    run = train(config, out, force=force, device=device)
    dataset = dataset_of(run)
    place = choose_device(device)
    certify_run(run, dataset=dataset, device=place)
    explain_gallery(run, dataset=dataset, device=place)
    audit_run(run, dataset=dataset, device=place)
    run.write({}, {"seconds": {"total": round(time.perf_counter() - start, 3)}})
    write_report(run)
    return run


def free_folder(base: Path) -> Path:
    """`base`, or the first of `base-2`, `base-3`, ... that does not exist."""
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path
