"""Numbered blocks of work whose results are kept, so that an interrupted campaign goes on where it stopped."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import otnn
from otnn.errors import InputError
from otnn.files import json_bytes, read_json, write_whole
from otnn.run.train import versions

Json = dict[str, Any]
console = Console(stderr=True, highlight=False, markup=False)


@dataclass(frozen=True)
class Campaign:
    """What is to be done.

    Attributes:
        name: of the campaign.
        settings: everything that its results depend on, apart from the code: seed, cases and so on.
        blocks: how many there are.
        run: the result of block `number`, which depends on the number and the settings alone. A function of a module,
            so that other processes find it.
        summary: what is reported of all results, in the order of the blocks.
    """

    name: str
    settings: Json
    blocks: int
    run: Callable[[int], Json]
    summary: Callable[[Sequence[Json]], Json]


def run_campaign(campaign: Campaign, out: Path, *, workers: int = 1) -> Json:
    """Run the blocks that are missing, write the report to `out` and return it.

    Finished blocks are kept in `out` with the suffix .partial, which is written whole after each block.

    Raises:
        InputError: there is a partial file of another campaign.
    """
    header = {"campaign": campaign.name, **campaign.settings, "versions": versions(), "code": code_digest()}
    partial = out.with_name(f"{out.name}.partial")
    done = _finished(partial, header)
    missing = [number for number in range(campaign.blocks) if number not in done]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(campaign.name, total=campaign.blocks, completed=len(done))
        for number, result in _results(campaign.run, missing, workers):
            done[number] = result
            write_whole(
                partial, json_bytes({"header": header, "blocks": {str(key): done[key] for key in sorted(done)}})
            )
            progress.advance(task)
    report = {**header, **campaign.summary([done[number] for number in range(campaign.blocks)])}
    write_whole(out, json_bytes(report))
    partial.unlink(missing_ok=True)
    return report


def code_digest() -> str:
    """The SHA-256 of the sources of otnn and of the campaigns: results of other code are not mixed with these."""
    digest = sha256()
    for root in (Path(otnn.__file__).parent, Path(__file__).parent):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _finished(partial: Path, header: Mapping[str, Any]) -> dict[int, Json]:
    if not partial.exists():
        return {}
    kept = read_json(partial)
    if kept.get("header") != header:
        raise InputError(f"{partial}: begun with other settings, versions or code; delete it to begin again")
    return {int(number): result for number, result in kept["blocks"].items()}


def _results(run: Callable[[int], Json], numbers: Sequence[int], workers: int) -> Iterator[tuple[int, Json]]:
    if workers == 1:
        for number in numbers:
            yield number, run(number)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(run, number): number for number in numbers}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
