"""The report of a run: one self-contained HTML page that a non-expert can read."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otnn.run.folder import Run


def write_report(run: "Run") -> Path:
    """Write `report.html` into a run folder, whole or not at all.

    It reads results.json, certificates.npz, explanations.npz, metrics.jsonl and config.toml: neither a network nor a
    data set.

    Args:
        run: an opened run.

    Returns:
        The file that was written.

    Raises:
        InputError: a file is missing, damaged, or of another run than the others; the message names the command that
            makes it again.
    """
    from otnn.report.load import load_run
    from otnn.report.page import render

    run.write({"report.html": render(load_run(run.path)).encode()}, {})
    return run.path / "report.html"
