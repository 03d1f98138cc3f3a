"""Work in pieces whose results are kept, so that an interrupted campaign goes on where it stopped."""

import multiprocessing
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import otnn
from otnn.errors import InputError
from otnn.files import json_bytes, read_json, write_whole
from otnn.run.train import versions

Json = dict[str, Any]
Piece = TypeVar("Piece", bound=Hashable)
console = Console(stderr=True, highlight=False, markup=False)


@dataclass(frozen=True)
class Campaign:
    """What is to be done, in numbered blocks.

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

    Finished blocks are kept in `partial_file(out)`, which is written whole after each block.

    Raises:
        InputError: there is a partial file of another campaign.
    """
    header = {"campaign": campaign.name, **campaign.settings, "versions": versions(), "code": code_digest()}
    partial = partial_file(out)
    kept = read_partial(partial, header) or {}
    done = {int(number): result for number, result in kept.get("blocks", {}).items()}

    def keep(number: int) -> None:
        blocks = {str(key): done[key] for key in sorted(done)}
        write_whole(partial, json_bytes({"header": header, "blocks": blocks}))

    work_through(range(campaign.blocks), campaign.run, done, keep, name=campaign.name, workers=workers)
    report = {**header, **campaign.summary([done[number] for number in range(campaign.blocks)])}
    write_whole(out, json_bytes(report))
    partial.unlink(missing_ok=True)
    return report


def partial_file(out: Path) -> Path:
    """Where finished pieces are kept until the report is written."""
    return out.with_name(f"{out.name}.partial")


def read_partial(file: Path, header: Mapping[str, Any]) -> Json | None:
    """What was kept in a partial file beside its "header"; None without one.

    Raises:
        InputError: a partial file of another header.
    """
    if not file.exists():
        return None
    kept: Json = read_json(file, "delete it to begin again")
    if kept.get("header") != header:
        raise InputError(
            f"{file}: begun with {differences(kept.get('header'), header)}; delete it to begin again, or choose "
            "another --out"
        )
    return kept


def differences(kept: Any, header: Mapping[str, Any]) -> str:
    """Words for what another header has."""
    if not isinstance(kept, Mapping):
        return "other settings"
    names = [name for name in {**header, **kept} if header.get(name) != kept.get(name)]
    return "other " + ", ".join(names)


def work_through(
    pieces: Sequence[Piece],
    job: Callable[[Piece], Json],
    done: MutableMapping[Piece, Json],
    keep: Callable[[Piece], None],
    *,
    name: str,
    workers: int,
    words: Callable[[Piece], str] = lambda piece: "",
) -> None:
    """Do the pieces that are not done yet, under a bar.

    Args:
        pieces: in the order of work.
        job: the result of a piece; with several workers a function of a module.
        done: the results, to which those that were missing are added.
        keep: called with each piece whose result was added, to store it.
        name: of the bar.
        workers: processes of one thread each; with 1, the work is done in this one.
        words: names the pieces in work beside the bar.
    """
    missing = [piece for piece in pieces if piece not in done]
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[now]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=len(pieces), completed=len(pieces) - len(missing), now="")

        def begun(working: Sequence[Piece]) -> None:
            progress.update(task, now="; ".join(map(words, working)))

        for piece, result in _results(job, missing, workers, begun):
            done[piece] = result
            keep(piece)
            progress.advance(task)
        progress.update(task, now="")


def _results(
    job: Callable[[Piece], Json], pieces: Sequence[Piece], workers: int, begun: Callable[[Sequence[Piece]], None]
) -> Iterator[tuple[Piece, Json]]:
    if workers == 1:
        for piece in pieces:
            begun([piece])
            yield piece, job(piece)
        return
    waiting, working = iter(pieces), dict[Future[Json], Piece]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while True:
            # no more than are in work, so that a campaign that is stopped does not begin others
            for piece in waiting:
                working[pool.submit(job, piece)] = piece
                if len(working) == workers:
                    break
            if not working:
                return
            begun(list(working.values()))
            finished, _ = wait(working, return_when=FIRST_COMPLETED)
            for future in finished:
                yield working.pop(future), future.result()


def code_digest(*parts: Path) -> str:
    """The SHA-256 of sources, so that results of other code are not mixed with these.

    Args:
        parts: files, or folders of which every source counts; by default all of otnn and of the benchmarks.
    """
    digest = sha256()
    for part in parts or (Path(otnn.__file__).parent, Path(__file__).parent):
        for file in sorted(part.rglob("*.py")) if part.is_dir() else [part]:
            name = file.relative_to(part).as_posix() if part.is_dir() else file.name
            digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
