"""The report of a run: one self-contained HTML page that a non-expert can read."""

from pathlib import Path

from otnn.files import write_whole


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all.

    It reads results.json, certificates.npz, explanations.npz, and, if they are there, metrics.jsonl and config.toml:
    neither a network nor a data set.

    Args:
        run: the run folder.

    Returns:
        The file that was written.

    Raises:
        InputError: a file is missing, damaged, or of another run than the others; the message names the command that
            makes it again.
    """
    from otnn.report.load import load_run
    from otnn.report.page import render

    content = render(load_run(run))
    file = run / "report.html"
    write_whole(file, content.encode())
    return file
