"""Runs of a campaign: each finished one is stored at once, and none is made twice."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.accuracy.training import Run
from otnn.errors import InputError
from otnn.files import json_bytes, read_json, write_whole

Json = dict[str, Any]
Rows = dict[Run, Json]
Job = Callable[[Run], Json]
console = Console(stderr=True, highlight=False, markup=False)
HEADER = "made with"


def partial_file(out: Path) -> Path:
    """Where finished runs are kept until the report is written."""
    return out.with_name(f"{out.name}.partial")


def finished(out: Path, header: Mapping[str, Any]) -> Rows:
    """The runs that are stored: in the partial file, or else in a report of the same header.

    Raises:
        InputError: a partial file of another header.
    """
    file = partial_file(out)
    if file.exists():
        kept = read_json(file)
        if kept.get(HEADER) != header:
            raise InputError(
                f"{file}: begun with {_difference(kept.get(HEADER), header)}; delete it to begin again, or choose "
                "another --out"
            )
    elif out.exists():
        kept = read_json(out)
        if kept.get(HEADER) != header:
            _tell(f"{out}: made with {_difference(kept.get(HEADER), header)}; its runs are made again")
            return {}
    else:
        return {}
    return {run_of(row): row for row in kept["runs"]}


def run_of(row: Json) -> Run:
    """The run that a row tells of."""
    return Run(**{name: row[name] for name in Run.__dataclass_fields__})


def _difference(kept: Any, header: Mapping[str, Any]) -> str:
    """Words for what another header has."""
    if not isinstance(kept, Mapping):
        return "other settings"
    names = [name for name in {**header, **kept} if header.get(name) != kept.get(name)]
    return "other " + ", ".join(names)


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
    missing = [run for run in runs if run not in rows]
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[now]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("accuracy", total=len(runs), completed=len(runs) - len(missing), now="")

        def begun(working: Sequence[Run]) -> None:
            progress.update(task, now="; ".join(map(named, working)))

        for run, row in _results(job, missing, workers, begun):
            rows[run] = row
            write_whole(partial_file(out), json_bytes({HEADER: header, "runs": list(rows.values())}))
            progress.advance(task)
            if not console.is_terminal:
                _tell(f"{named(run)}: {told(row)}")
        progress.update(task, now="")
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


def _results(
    job: Job, runs: Sequence[Run], workers: int, begun: Callable[[Sequence[Run]], None]
) -> Iterator[tuple[Run, Json]]:
    if workers == 1:
        for run in runs:
            begun([run])
            yield run, job(run)
        return
    waiting, working = iter(runs), dict[Future[Json], Run]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while True:
            # no more than are in work, so that a campaign that is stopped does not begin others
            for run in waiting:
                working[pool.submit(job, run)] = run
                if len(working) == workers:
                    break
            if not working:
                return
            begun(list(working.values()))
            done, _ = wait(working, return_when=FIRST_COMPLETED)
            for future in done:
                yield working.pop(future), future.result()


def _tell(message: str) -> None:
    console.print(message, soft_wrap=True)
