"""Runs of the benchmark: each finished one is stored at once, and none is made twice."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.training import Run, code_digest
from benchmarks.campaign import Json, console, differences, partial_file, read_partial, work_through
from otnn.files import json_bytes, read_json, write_whole

Rows = dict[Run, Json]
Job = Callable[[Run], Json]
HEADER = "made with"


def finished(out: Path, header: Mapping[str, Any]) -> Rows:
    """The runs that are stored, by today's code: in the partial file, or else in a report of the same header.

    Raises:
        InputError: a partial file of another header.
    """
    kept = read_partial(partial_file(out), header)
    if kept is None:
        if not out.exists():
            return {}
        kept = read_json(out)
        if kept.get(HEADER) != header:
            _tell(f"{out}: made with {differences(kept.get(HEADER), header)}; its runs are made again")
            return {}
    rows = {run_of(row): row for row in kept["runs"]}
    own = {run: row for run, row in rows.items() if row.get("code") == code_digest(run.library)}
    if len(own) < len(rows):
        _tell(f"{out}: {len(rows) - len(own)} of {len(rows)} runs were made by other code; they are made again")
    return own


def run_of(row: Json) -> Run:
    """The run that a row tells of."""
    return Run(**{name: row[name] for name in Run.__dataclass_fields__})


def run_all(runs: Sequence[Run], job: Job, out: Path, header: Mapping[str, Any], workers: int) -> Rows:
    """Make the runs that are missing and store each; all that are stored, in the order of `runs`, others behind.

    Args:
        runs: in the order of work.
        job: what is told of a run; other processes must find it.
        out: the report, beside which they are stored.
        header: what all of them depend on.
        workers: processes of one thread each; with 1, runs are made in this one.

    Raises:
        InputError: a partial file of another header.
    """
    rows = finished(out, header)

    def keep(run: Run) -> None:
        write_whole(partial_file(out), json_bytes({"header": header, "runs": list(rows.values())}))
        if not console.is_terminal:
            _tell(f"{named(run)}: {told(rows[run])}")

    work_through(runs, job, rows, keep, name="accuracy", workers=workers, words=named)
    return {run: rows[run] for run in [*runs, *rows]}


def named(run: Run) -> str:
    """A run in words."""
    settings = f"rate {run.learning_rate:g}, margin {run.margin:g}, temperature {run.temperature:g}"
    return f"{run.library}, {settings}, seed {run.seed}"


def told(row: Json) -> str:
    """The figures of a run in words."""
    if "diverged" in row:
        return f"diverged: {row['diverged']}"
    held = ", ".join(f"{value:.1%} at {radius}" for radius, value in row["certified"].items())
    return f"clean {row['clean']:.1%}, certified {held}; {row['seconds']:.0f} s"


def _tell(message: str) -> None:
    console.print(message, soft_wrap=True)
