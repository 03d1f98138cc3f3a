"""The command line of the benchmark of layers; a bar that is missed is told, and does not fail."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

import benchmarks.layers
from benchmarks import command
from benchmarks.layers import measure, peers
from benchmarks.layers.nets import CIRCULAR, MAXMIN, OTNN, PLAN, TORCHLIP, ZEROS, families
from benchmarks.timing import Json
from otnn.files import json_bytes, write_whole
from otnn.run.train import versions

app = typer.Typer(help=benchmarks.layers.__doc__, pretty_exceptions_enable=False, add_completion=False)


@dataclass(frozen=True)
class Bar:
    """A figure of the report and what it should be: at most the limit, or at least."""

    what: str
    figure: Callable[[Json], float]
    limit: float
    least: bool = False

    def met(self, figure: float) -> bool:
        """Whether a figure is within the bar."""
        return figure >= self.limit if self.least else figure <= self.limit


BARS = (
    Bar("step / unconstrained, same activation and format", lambda r: r["step"]["otnn over MaxMin"]["median"], 1.05),
    Bar("step / unconstrained ReLU, channels_last",
        lambda r: r["step"]["otnn over ReLU, channels_last"]["median"], 1.25),
    Bar("step of deel-torchlip / otnn", lambda r: r["step"]["each over otnn"][TORCHLIP]["median"], 2.2, least=True),
    Bar("step of orthogonium / otnn", lambda r: r["step"]["each over otnn"][CIRCULAR]["median"], 4.0, least=True),
    Bar("step of orthogonium with zeros and MaxMin / otnn", lambda r: r["step"]["each over otnn"][ZEROS]["median"],
        1.5, least=True),
    Bar("constraint, ms", lambda r: 1e3 * r["constraint"][OTNN]["seconds"]["median"], 5.0),
    Bar("exported evaluation / unconstrained, same activation and format",
        lambda r: r["evaluation"]["otnn over MaxMin"]["median"], 1.02),
    Bar("peak memory / unconstrained, same activation", lambda r: r["peak bytes"][OTNN] / r["peak bytes"][MAXMIN], 1.1),
    # at most 1 where the constrained step grows no faster than the step itself
    Bar("growth with width, convolutions: most of ratio / first ratio",
        lambda r: rise(r["growth"], "conv", "width"), 1.0),
    Bar("growth with depth, convolutions: most of ratio / first ratio",
        lambda r: rise(r["growth"], "conv", "depth"), 1.0),
    Bar("growth with width, dense: most of ratio / first ratio",
        lambda r: rise(r["growth"], "dense", "width"), 1.0),
    Bar("growth with depth, dense: most of ratio / first ratio",
        lambda r: rise(r["growth"], "dense", "depth"), 1.0),
)  # fmt: skip
GROWN = tuple((kind, along) for kind in ("conv", "dense") for along in ("width", "depth"))
# The other size, while one grows
WIDTH, DEPTH = 64, 4


@app.command()
def layers(
    rounds: Annotated[int, typer.Option(help="How often each is timed.", min=1)] = 30,
    samples: Annotated[int, typer.Option(help="Images of a batch.", min=2)] = 256,
    growth_rounds: Annotated[
        int, typer.Option(help="The same, at each size of the growth; 0 leaves it out.", min=0)
    ] = 9,
    growth_samples: Annotated[int, typer.Option(help="Images of a batch of the growth.", min=2)] = 256,
    width: Annotated[list[int] | None, typer.Option(help="Of the growth; 64 to 1024 by default.", min=2)] = None,
    depth: Annotated[list[int] | None, typer.Option(help="Of the growth; 4 to 64 by default.", min=1)] = None,
    threads: Annotated[int, typer.Option(help="Of torch.", min=1)] = 2,
    keep_freed: Annotated[
        bool, typer.Option("--keep-freed", help="Keep freed memory, as `otnn train` does, for all networks.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The report; a plot of the same name with .png.", metavar="FILE")] = Path(
        "layers.json"
    ),
) -> None:
    """Time the layers and tell which bars are met."""
    torch.set_num_threads(threads)
    if keep_freed:
        command.keep_memory()
    found = families()
    widths, depths = sorted(width or measure.WIDTHS), sorted(depth or measure.DEPTHS)
    sizes = {"width": [(w, DEPTH) for w in widths], "depth": [(WIDTH, d) for d in depths]}
    total = 3 * rounds + (growth_rounds > 0) * 2 * sum(map(len, sizes.values()))
    with command.progress() as progress:
        task = progress.add_task("layers", total=total)

        def advance() -> None:
            progress.advance(task)

        report: Json = {
            "benchmark": "layers",
            "rounds": rounds, "samples": samples, "growth rounds": growth_rounds, "growth samples": growth_samples,
            "threads": threads, "cores": os.cpu_count(), "freed memory kept": keep_freed,
            "versions": versions() | peers.installed(),
            "constraint": measure.constraints(found, PLAN, rounds, advance),
            "step": measure.steps(found, PLAN, samples, rounds, advance),
            "evaluation": measure.evaluations(found, PLAN, samples, rounds, advance),
            "peak bytes": measure.memories(found, PLAN, samples),
            "growth": [
                {"along": along, **row}
                for kind, along in GROWN
                if growth_rounds
                for row in measure.growth(kind, sizes[along], growth_samples, growth_rounds, advance)
            ],
        }  # fmt: skip
    report["bars"] = judged(report)
    write_whole(out, json_bytes(report))
    files = [str(out)]
    if report["growth"]:
        write_whole(out.with_suffix(".png"), plot(report["growth"]))
        files.append(str(out.with_suffix(".png")))
    for line in lines(report):
        print(line)
    print(", ".join(files))


def rows_of(grown: Sequence[Json], kind: str, along: str) -> list[Json]:
    """One curve of the growth, from its smallest size to its largest."""
    return [row for row in grown if row["layers"] == kind and row["along"] == along]


def rise(grown: Sequence[Json], kind: str, along: str) -> float:
    """The largest ratio of the constrained step to the step, over that at the smallest size."""
    first, *rest = (row["otnn over MaxMin"]["median"] for row in rows_of(grown, kind, along))
    return max(rest) / first


def judged(report: Json) -> list[Json]:
    """Each bar with its figure; bars of peers that are not installed, and of growth that was left out, are absent."""
    rows = []
    for bar in BARS:
        try:
            figure = bar.figure(report)
        except (KeyError, ValueError):
            continue
        sense = "least" if bar.least else "most"
        rows.append({"what": bar.what, "figure": figure, f"at {sense}": bar.limit, "met": bar.met(figure)})
    return rows


def lines(report: Json) -> Iterator[str]:
    """What the terminal shows."""
    for name, ratio in report["step"]["ratio to ReLU"].items():
        label = report["step"]["best format"][name]
        seconds = report["step"]["seconds"][name][label]["median"]
        evaluation = report["evaluation"]["ratio to ReLU"][name]["median"]
        constraint = report["constraint"].get(name)
        cost = "" if constraint is None else f", constraint {1e3 * constraint['seconds']['median']:.1f} ms"
        yield (
            f"{name}: step {1e3 * seconds:.0f} ms, {ratio['median']:.2f} x ReLU ({label}); evaluation "
            f"{evaluation:.2f} x{cost}; {report['peak bytes'][name] / 1e6:.0f} MB at the peak"
        )
    for row in report["growth"]:
        ratio, step = row["otnn over MaxMin"]["median"], row["seconds"][MAXMIN]["median"]
        yield f"{row['layers']}, width {row['width']}, depth {row['depth']}: {ratio:.2f} x of {1e3 * step:.1f} ms"
    for bar in report["bars"]:
        sense = "least" if "at least" in bar else "most"
        verdict = "met" if bar["met"] else "MISSED"
        yield f"{verdict}: {bar['what']}: {bar['figure']:.3g}, at {sense} {bar[f'at {sense}']:g}"


def plot(grown: Sequence[Json]) -> bytes:
    """A PNG: above the seconds of both steps, below their ratio, against width and depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained", dpi=100)
    above, below = figure.subplots(2, len(GROWN), sharex="col", sharey="row")
    for (kind, along), times, ratio in zip(GROWN, above, below, strict=True):
        rows = rows_of(grown, kind, along)
        sizes = [row[along] for row in rows]
        for name, marks in ((OTNN, "o-"), (MAXMIN, "x--")):
            times.loglog(sizes, [row["seconds"][name]["median"] for row in rows], marks, label=name)
        ratio.loglog(sizes, [row["otnn over MaxMin"]["median"] for row in rows], "o-", color="black")
        times.set_title("convolutions" if kind == "conv" else "dense layers", fontsize=11)
        ratio.set_xlabel(along)
        ratio.set_xticks(sizes, [f"{size:,}" for size in sizes])
        for axes in (times, ratio):
            axes.grid(which="both", alpha=0.25)
            axes.minorticks_off()
    above[0].set_ylabel("seconds of a training step")
    most = max(row["otnn over MaxMin"]["median"] for row in grown)
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50) if tick < 1.3 * most]
    below[0].set(ylabel="otnn / unconstrained", ylim=(0.9, 1.3 * most))
    below[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    above[0].legend(fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main() -> None:
    """Run the benchmark."""
    command.run(app)


if __name__ == "__main__":
    main()
