"""The command line of the benchmarks of explanations; a ratio above its bar is told, and does not fail."""

import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import benchmarks.explain
from benchmarks import command
from benchmarks.explain import by_hand, passes, peers
from benchmarks.explain.subjects import Subject, subjects
from benchmarks.timing import Json, peak_memory
from otnn.errors import InputError
from otnn.files import json_bytes, write_whole
from otnn.run.train import versions

app = typer.Typer(
    help=benchmarks.explain.__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
console = Console(stderr=True, highlight=False, markup=False)

QUICK_SECONDS, QUICK_BYTES = 600, 4e9

Images = Annotated[int, typer.Option(help="How many.", min=2)]
Rounds = Annotated[int, typer.Option(help="How often each is timed.", min=1)]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of local data sets: images of Fashion-MNIST.", envvar="OTNN_DATA_DIR")
]
Threads = Annotated[int, typer.Option(help="Of torch.", min=1)]
Seed = Annotated[int, typer.Option(help="Of the weights and images.")]
Out = Annotated[Path | None, typer.Option(help="The report; explain-COMMAND.json by default.", metavar="FILE")]


@app.command("passes")
def passes_(
    images: Images = 64,
    rounds: Rounds = 5,
    data_dir: DataDir = None,
    threads: Threads = 2,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Our methods and every metric, over passes x time of one batched pass."""
    _run("passes", passes.passes, passes.BAR, images, rounds, data_dir, threads, seed, out)


@app.command()
def captum(
    images: Images = 32,
    rounds: Rounds = 5,
    data_dir: DataDir = None,
    threads: Threads = 2,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Time captum's methods behind `attribute`, over captum called by hand."""
    _run("captum", by_hand.by_hand, by_hand.BAR, images, rounds, data_dir, threads, seed, out)


@app.command()
def quantus(
    images: Images = 64,
    rounds: Rounds = 5,
    data_dir: DataDir = None,
    threads: Threads = 2,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Deletion, Insertion and muFidelity, over quantus's nearest metrics."""
    if not peers.available():
        raise InputError("quantus cannot be imported here; benchmarks/explain/peers.py tells how to install it")
    _run("quantus", peers.peers, peers.BAR, images, rounds, data_dir, threads, seed, out)


@app.command()
def quick(
    run: Annotated[Path, typer.Argument(help="A run folder with two networks.", metavar="RUN")],
    samples: Annotated[int, typer.Option(help="Test images.", min=2)] = 100,
    data_dir: DataDir = None,
    threads: Threads = 2,
    out: Out = None,
) -> None:
    """Time the quick comparison, with its peak memory; compare.json of the run is written anew."""
    from otnn.run.compare import compare_run
    from otnn.run.folder import open_run
    from otnn.run.train import dataset_of

    torch.set_num_threads(threads)
    opened = open_run(run)
    dataset = dataset_of(opened, data_dir)
    start = time.perf_counter()
    with peak_memory() as memory:
        content = compare_run(opened, dataset=dataset, samples=samples)
    seconds = time.perf_counter() - start
    report = _head("quick", 0, threads) | {
        "samples": samples,
        "networks": content["networks"],
        "seconds": seconds,
        "peak bytes beside the data": memory[0],
        "bars": {"seconds": QUICK_SECONDS, "bytes": QUICK_BYTES},
    }
    _write(report, out)
    used = "" if memory[0] is None else f", {memory[0] / 1e9:.2f} GB beside the data"
    print(f"{len(content['networks'])} networks, {samples} images: {seconds:.1f} s{used}")


def _run(
    name: str,
    measure: Callable[[Subject, int, Callable[[], None]], Json],
    bar: float,
    images: int,
    rounds: int,
    data_dir: Path | None,
    threads: int,
    seed: int,
    out: Path | None,
) -> None:
    torch.set_num_threads(threads)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found = subjects(images, data_dir, seed)
    measured = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        for subject in found:
            progress.update(task, description=subject.name)
            measured.append(measure(subject, rounds, lambda: progress.advance(task)))
    source = "noise" if data_dir is None else "Fashion-MNIST, test images"
    report = _head(name, seed, threads) | {"rounds": rounds, "images": source, "bar": bar, "measured": measured}
    _write(report, out)
    for line in lines(report):
        print(line)


def lines(report: Json) -> Iterator[str]:
    """What the terminal shows: each ratio beside its bar."""
    least = report["benchmark"] == "explain quantus"
    for entry in report["measured"]:
        yield f"{entry['network']}, {entry['images']} images"
        for name, row in entry["of"].items():
            if row["ratio"] is None:
                yield f"  {name}: {1e3 * row['seconds']['median']:.1f} ms, no pass"
                continue
            ratio = row["ratio"]["median"]
            within = ratio >= report["bar"] if least else ratio <= report["bar"]
            yield f"  {name}: {ratio:.2f} x, {'within' if within else 'NOT within'} {report['bar']:g} x"


def _head(name: str, seed: int, threads: int) -> dict[str, Any]:
    peer_versions = {}
    for peer in ("captum", "quantus"):
        try:
            peer_versions[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "benchmark": f"explain {name}",
        "seed": seed,
        "threads": threads,
        "cores": os.cpu_count(),
        "versions": {**versions(), **peer_versions},
    }


def _write(report: Json, out: Path | None) -> None:
    file = out or Path(f"{report['benchmark'].replace(' ', '-')}.json")
    write_whole(file, json_bytes(report))
    print(file)


def main() -> None:
    """Run a benchmark."""
    command.run(app)


if __name__ == "__main__":
    main()
