"""The command line of the benchmark of accuracy; a front that does not lie above is told, and does not fail."""

import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

import benchmarks.accuracy
from benchmarks import command
from benchmarks.accuracy.campaign import HEADER, Rows, run_all
from benchmarks.accuracy.fronts import SETTING, promising, summary
from benchmarks.accuracy.training import (
    ALPHA,
    BATCH,
    DATA,
    LIBRARIES,
    RADII,
    WARMUP,
    Run,
    installed,
    measured,
)
from benchmarks.campaign import Json, partial_file
from benchmarks.layers import peers
from otnn.errors import InputError
from otnn.files import json_bytes, write_whole
from otnn.run.train import versions

app = typer.Typer(help=benchmarks.accuracy.__doc__, pretty_exceptions_enable=False, add_completion=False)

RATES, MARGINS, TEMPERATURES = (1e-2, 3e-2), (0.5, 1.5, 4.0), (10.0, 20.0)
COLOURS = dict(zip(LIBRARIES, ("#0b6e4f", "#d1495b", "#2e6fba"), strict=True))
MARKS = dict(zip(LIBRARIES, "osD", strict=True))


@app.command()
def accuracy(
    learning_rate: Annotated[
        list[float] | None, typer.Option(help=f"Peak of the schedule; {RATES} by default; repeatable.")
    ] = None,
    margin: Annotated[
        list[float] | None, typer.Option(help=f"min_margin of the loss; {MARGINS} by default; repeatable.")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help=f"Of the loss; {TEMPERATURES} by default; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each setting, seeds 0, 1, ...", min=1)] = 3,
    narrow: Annotated[
        bool, typer.Option(help="Seeds after the first only for settings on a library's own front with the first.")
    ] = False,
    stored: Annotated[
        bool, typer.Option("--stored", help="Report also on stored settings that every library has with all seeds.")
    ] = False,
    epochs: Annotated[int, typer.Option(help="Of each run.", min=1)] = 2,
    library: Annotated[
        list[str] | None, typer.Option(help="Of otnn, deel-torchlip, orthogonium; those installed by default.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.", min=1)] = 2,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of local data sets.", envvar="OTNN_DATA_DIR")] = None,
    out: Annotated[Path, typer.Option(help="The report; a plot of the same name with .png.", metavar="FILE")] = Path(
        "accuracy-fronts.json"
    ),
) -> None:
    """Train every library with every setting and compare the fronts; goes on where it was interrupted.

    Runs are made seed by seed over the whole grid. They are kept beside the report with the suffix .partial, which a
    call with fewer seeds or settings reports on, and one with more adds to.
    """
    torch.set_num_threads(1)
    names = _libraries(library)
    grid = {
        name: _positive(name, given)
        for name, given in zip(
            SETTING, (learning_rate or RATES, margin or MARGINS, temperature or TEMPERATURES), strict=True
        )
    }
    header = header_of(epochs)
    runs = runs_of(names, grid, 1 if narrow else seeds)
    job = partial(measured, data_dir=data_dir, epochs=epochs)
    rows = run_all(runs, job, out, header, workers)
    if narrow:
        runs += narrowed(rows, runs, seeds)
        rows = run_all(runs, job, out, header, workers)
    if stored:
        runs += shared(rows, runs, names, seeds)
    report = report_of(rows, runs, header, grid)
    write_whole(out, json_bytes(report))
    write_whole(out.with_suffix(".png"), plot(report))
    if len(rows) == len(runs):
        partial_file(out).unlink(missing_ok=True)  # others that are stored there stay
    for line in lines(report):
        print(line)
    print(f"{out}, {out.with_suffix('.png')}")


def _libraries(asked: Sequence[str] | None) -> list[str]:
    found = installed()
    for name in asked or ():
        if name not in LIBRARIES:
            raise InputError(f"library: expected one of {', '.join(LIBRARIES)}, got {name!r}")
        if name not in found:
            raise InputError(f"{name} is not installed; benchmarks/layers/peers.py tells how")
    return [name for name in found if not asked or name in asked]


def _positive(name: str, values: Sequence[float]) -> list[float]:
    for value in values:
        if not 0 < value < math.inf:
            raise InputError(f"{name}: expected a positive number, got {value}")
    return sorted(set(values))


def header_of(epochs: int) -> Json:
    """What all runs of a campaign have in common: the protocol and the versions."""
    return {
        "data": DATA,
        "epochs": epochs,
        "batch": BATCH,
        "alpha": ALPHA,
        "pct_start": WARMUP,
        "versions": versions() | peers.installed(),
    }


def runs_of(libraries: Sequence[str], grid: Mapping[str, Sequence[float]], seeds: int) -> list[Run]:
    """The runs in the order of work: all libraries of a setting, all settings of a seed."""
    settings = itertools.product(*(grid[name] for name in SETTING))
    return [
        Run(library, *setting, seed)
        for seed, setting, library in itertools.product(range(seeds), list(settings), libraries)
    ]


def narrowed(rows: Rows, runs: Sequence[Run], seeds: int) -> list[Run]:
    """The seeds after the first of the settings that lie on their library's front at some radius with the first."""
    found = promising([rows[run] for run in runs])
    kept = [run for run in runs if (run.library, run.learning_rate, run.margin, run.temperature) in found]
    return [replace(run, seed=seed) for seed in range(1, seeds) for run in kept]


def shared(rows: Rows, runs: Sequence[Run], libraries: Sequence[str], seeds: int) -> list[Run]:
    """The stored runs, beside those, of the settings that every library has with all seeds."""
    asked = set(runs)
    return [
        run
        for run in rows
        if run not in asked
        and run.library in libraries
        and run.seed < seeds
        and all(replace(run, library=library, seed=seed) in rows for library in libraries for seed in range(seeds))
    ]


def report_of(rows: Rows, runs: Sequence[Run], header: Json, grid: Mapping[str, Sequence[float]]) -> Json:
    """The report on some of the runs that are stored."""
    own = [rows[run] for run in runs]
    return {
        "benchmark": "accuracy",
        HEADER: header,
        "cores": os.cpu_count(),
        "grid": dict(grid),
        **summary(own),
        "runs": own,
    }


def lines(report: Json) -> Iterator[str]:
    """What the terminal shows."""
    for radius, fronts in report["fronts"].items():
        for name, points in fronts.items():
            yield f"{name}, certified at {radius}:"
            for one in points:
                clean, held = one["clean"], one["certified"]
                yield f"  {_in_words(one)}: clean {_percent(clean)}, certified {_percent(held)}"
    for one in report["diverged"]:
        yield f"diverged, and in no front: {one['library']}, {_in_words(one)}"
    for row in report["comparison"]:
        verdict = "above" if row["above"] else "NOT ABOVE"
        yield f"{verdict}: {row['peer']} at {row['radius']}: {row['matched']} of {row['points']} points matched"
        for one in row["front"]:
            if one["excess"] is None or one["excess"] > 0:
                by_seed = ", ".join(map(_points, one["excess by seed"]))
                yield f"  not matched: {_in_words(one)}, by {_points(one['excess'])} points (by seed {by_seed})"


def _in_words(setting: Json) -> str:
    return f"rate {setting['learning_rate']:g}, margin {setting['margin']:g}, temperature {setting['temperature']:g}"


def _percent(spread: Json) -> str:
    mean, least, most = (100 * spread[name] for name in ("mean", "min", "max"))
    return f"{mean:.2f} ({least:.2f} to {most:.2f}) %"


def _points(excess: float | None) -> str:
    return "any number of" if excess is None else f"{100 * excess:+.2f}"


def plot(report: Json) -> bytes:
    """A PNG: for each radius clean against certified accuracy, with every setting as a dot and the fronts as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 5.2), layout="constrained", dpi=110)
    for axes, (radius, fronts) in zip(figure.subplots(1, len(RADII)), report["fronts"].items(), strict=True):
        for name, points in fronts.items():
            colour, mark = COLOURS[name], MARKS[name]
            every = [one for one in report["settings"] if one["library"] == name]
            axes.plot(*_means(every, radius), mark, color=colour, alpha=0.3, markersize=4.5, markeredgewidth=0)
            clean, held = _means(points)
            bars = [
                [[100 * abs(one[of][end] - one[of]["mean"]) for one in points] for end in ("min", "max")]
                for of in ("certified", "clean")
            ]
            axes.errorbar(clean, held, *bars, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.7)
            axes.plot(clean, held, mark, color=colour, markersize=5.5, label=name)
        axes.set_title(f"certified at {radius}", fontsize=11)
        axes.set_xlabel("clean accuracy, %")
        axes.grid(alpha=0.25)
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # lines to the sides of a panel are not to widen it
        corner = (axes.get_xlim()[0], axes.get_ylim()[0])
        for name, points in fronts.items():
            axes.plot(*_stairs(*_means(points), corner), color=COLOURS[name], linewidth=1.3, zorder=1)
    figure.axes[0].set_ylabel("certified accuracy, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=10, loc="outside lower center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _means(points: Sequence[Json], radius: str | None = None) -> tuple[list[float], list[float]]:
    """Clean and certified accuracy in %, of settings at a radius, or of points of a front."""
    held = [one["certified"] if radius is None else one["certified"][radius] for one in points]
    return [100 * one["clean"]["mean"] for one in points], [100 * one["mean"] for one in held]


def _stairs(
    clean: Sequence[float], held: Sequence[float], corner: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """The edge of what a front dominates, from the bottom of a panel to its left side."""
    x, y, height = [], [], corner[1]
    for along, up in zip(clean, held, strict=True):
        x += [along, along]
        y += [height, up]
        height = up
    return ([*x, corner[0]], [*y, height]) if x else (x, y)


def main() -> None:
    """Run the benchmark."""
    command.run(app)


if __name__ == "__main__":
    main()
