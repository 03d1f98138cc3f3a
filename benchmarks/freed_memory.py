"""What it gives to keep freed memory in the process, as the command `otnn` does (`otnn.memory.keep_freed_memory`).

python -m benchmarks.freed_memory     training steps of the network of benchmarks.layers, some minutes

Every measurement is a process of its own, because an allocator that was told once stays so; with kept and with returned
memory by turns, and ratios are of the same round. Linux with glibc only.
"""

import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks import command
from benchmarks.layers.measure import FORMATS, training_step
from benchmarks.layers.nets import FAMILIES, OTNN, PLAN, RELU, Batch, build, to_format
from benchmarks.timing import Json, ratios, spread
from otnn.errors import InputError
from otnn.files import json_bytes, write_whole
from otnn.run.train import versions

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)
WARM_UP = 5


def measured(name: str, keep: bool, steps: int, samples: int, threads: int) -> Json:
    """Median seconds of a training step, page faults of each, and the peak of the resident memory, of this process."""
    if keep:
        command.keep_memory()
    torch.set_num_threads(threads)
    kind = FORMATS["channels_last"]
    batch = Batch(PLAN, samples)
    step = training_step(to_format(build(FAMILIES[name], PLAN), kind), batch.images[kind], batch.labels)
    seconds, faults = [], []
    for _ in range(WARM_UP + steps):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": median(seconds[WARM_UP:]), "page faults": median(faults[WARM_UP:]), "peak resident bytes": peak}


def alone(name: str, keep: bool, steps: int, samples: int, threads: int) -> Json:
    """`measured` in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, name, keep, steps, samples, threads).result()


def compared(name: str, threads: int, kept: list[Json], returned: list[Json]) -> Json:
    """A network on some threads: the ratio of the seconds, and what was measured either way."""
    ratio = ratios([one["seconds"] for one in kept], [one["seconds"] for one in returned])
    row: Json = {"network": name, "threads": threads, "kept over returned": spread(ratio)}
    for way, results in (("kept", kept), ("returned", returned)):
        row[way] = {key: spread([one[key] for one in results]) for key in results[0]}
    return row


def line(row: Json) -> str:
    """What the terminal shows of it."""
    kept, returned = ({key: row[way][key]["median"] for key in row[way]} for way in ("kept", "returned"))
    return (
        f"{row['network']}, {row['threads']} threads: {row['kept over returned']['median']:.3f} x the time, "
        f"{1e3 * returned['seconds']:.0f} to {1e3 * kept['seconds']:.0f} ms a step; page faults of a step "
        f"{returned['page faults']:.0f} to {kept['page faults']:.0f}; peak of the process "
        f"{returned['peak resident bytes'] / 1e6:.0f} to {kept['peak resident bytes'] / 1e6:.0f} MB"
    )


@app.command()
def freed_memory(
    rounds: Annotated[int, typer.Option(help="How often each is measured.", min=1)] = 7,
    steps: Annotated[int, typer.Option(help="Of a measurement, after the first five.", min=1)] = 20,
    samples: Annotated[int, typer.Option(help="Images of a batch.", min=2)] = 256,
    thread: Annotated[list[int] | None, typer.Option(help="Of torch; 1 and 2 by default.", min=1)] = None,
    network: Annotated[list[str] | None, typer.Option(help="A name of benchmarks.layers; two by default.")] = None,
    out: Annotated[Path, typer.Option(help="The report.", metavar="FILE")] = Path("freed-memory.json"),
) -> None:
    """Time training steps with kept and with returned memory."""
    if unknown := set(network or ()) - set(FAMILIES):
        raise InputError(
            f"network: expected one of {', '.join(map(repr, FAMILIES))}, got {', '.join(map(repr, unknown))}"
        )
    cases = [(name, threads) for name in network or (RELU, OTNN) for threads in thread or (1, 2)]
    rows: list[Json] = []
    with command.progress() as progress:
        task = progress.add_task("freed memory", total=2 * rounds * len(cases))
        for name, threads in cases:
            found: dict[bool, list[Json]] = {False: [], True: []}
            for _ in range(rounds):
                for keep, results in found.items():
                    results.append(alone(name, keep, steps, samples, threads))
                    progress.advance(task)
            rows.append(compared(name, threads, found[True], found[False]))
    report = {
        "benchmark": "freed memory", "rounds": rounds, "steps": steps, "samples": samples, "cores": os.cpu_count(),
        "versions": versions(), "rows": rows,
    }  # fmt: skip
    write_whole(out, json_bytes(report))
    for row in rows:
        print(line(row))
    print(out)


def main() -> None:
    """Run the benchmark."""
    command.run(app)


if __name__ == "__main__":
    main()
