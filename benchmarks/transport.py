"""How fast is the exact optimum? `otnn.transport.solve` against POT's `ot.emd`, in one process, by turns.

python -m benchmarks.transport    2,000 x 2,000 samples in 784 dimensions, and how the time grows with n

`solve` takes the samples, and its time includes the matrix of distances; `ot.emd` is given that matrix, and solves the
plain problem alone. Ratios are of times of the same round. The bar is 6 x.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import ot
import scipy
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import command
from benchmarks.timing import Json, peak_memory, ratios, spread, timed
from otnn.data import load
from otnn.errors import InputError
from otnn.files import json_bytes, write_whole
from otnn.run.train import versions
from otnn.transport import Round, TransportProblem, TransportSolution, solve
from otnn.transport.costs import distances
from otnn.transport.flow import required_memory

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)

Floats = NDArray[np.float64]

BAR = 6.0
SIZES = (250, 500, 1000, 2000, 4000)
LARGE = 10_000
DIMS = (2, 784)
HINGE_WEIGHT, ALPHA = 10.0, 0.1
# Times in the JSON and curves of the plot
MATRIX, EMD, PLAIN, FIXED, LEARNED = "cost matrix", "ot.emd", "plain", "fixed margin", "learned margin"
_AGREE = 1e-9
_PIVOTS = 2**31 - 1


@app.command()
def transport(
    samples: Annotated[int, typer.Option(help="Of each class, in the comparison.", min=2)] = 2000,
    dims: Annotated[int, typer.Option(help="Of the Gaussian samples in the comparison.", min=1)] = 784,
    rounds: Annotated[int, typer.Option(help="How often each is timed.", min=1)] = 5,
    size: Annotated[list[int] | None, typer.Option(help="Samples of each class in the growth.", min=2)] = None,
    large: Annotated[bool, typer.Option("--large", help="Also grow to 10,000, with peak memory.")] = False,
    naive: Annotated[bool, typer.Option("--naive", help="Also solve the quadrupled form by ot.emd, once.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local data sets: also MNIST, 0 against 8.", envvar="OTNN_DATA_DIR")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of torch; ot.emd takes one.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    out: Annotated[Path, typer.Option(help="The report; a plot of the same name with .png.", metavar="FILE")] = Path(
        "transport-benchmark.json"
    ),
) -> None:
    """Time the exact optimum; exits 1 where two ways to it disagree."""
    torch.set_num_threads(threads)
    sizes = sorted({*(size or SIZES), *([LARGE] if large else [])})
    clouds = {f"gaussian, {dims} dimensions": gaussians(samples, dims, seed)}
    if data_dir is not None:
        clouds["MNIST, 0 against 8"] = digits(samples, data_dir)
    with command.progress() as progress:
        task = progress.add_task("transport", total=len(clouds) * (rounds + naive) + len(sizes) * len(DIMS))
        compared = []
        for name, (x, z) in clouds.items():
            progress.update(task, description=name)
            compared.append({"data": name, **compare(x, z, rounds, naive, lambda: progress.advance(task))})
        grown = []
        for n in sizes:
            for d in DIMS:
                progress.update(task, description=f"n = {n}, {d} dimensions")
                grown.append(growth(n, d, seed, 1 if n > max(SIZES) else min(rounds, 3)))
                progress.advance(task)
    report = {
        "benchmark": "transport",
        "samples": samples, "rounds": rounds, "sizes": sizes, "seed": seed,
        "hinge weight": HINGE_WEIGHT, "alpha": ALPHA,
        "threads": threads, "cores": os.cpu_count(),
        "versions": {**versions(), "ot": ot.__version__, "scipy": scipy.__version__},
        "bar": BAR,
        "comparison": compared,
        "growth": grown,
        "exponents": exponents(grown),
    }  # fmt: skip
    write_whole(out, json_bytes(report))
    write_whole(out.with_suffix(".png"), plot(grown))
    for line in lines(report):
        print(line)
    print(f"{out}, {out.with_suffix('.png')}")
    if any(difference > _AGREE for row in compared for difference in row["relative difference"].values()):
        raise typer.Exit(1)


# --- samples -----------------------------------------------------------------------------------------------------


def gaussians(n: int, dims: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two clouds (n, dims) of unit variance whose centres lie 1 apart."""
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, n, dims, generator=generator, dtype=torch.float64)
    x[:, 0] += 1
    return x, z


def digits(n: int, data_dir: Path) -> tuple[Tensor, Tensor]:
    """The first n zeros and eights of MNIST's train split."""
    train = load("mnist", data_dir=data_dir, classes=["8", "0"]).train
    x, z = train.images[train.labels == 1], train.images[train.labels == 0]
    if min(len(x), len(z)) < n:
        raise InputError(f"samples: expected at most {min(len(x), len(z))}, the eights of MNIST, got {n}")
    return x[:n], z[:n]


# --- times -------------------------------------------------------------------------------------------------------


def compare(x: Tensor, z: Tensor, rounds: int, naive: bool, advance: Callable[[], None]) -> Json:
    """Times of `solve` for the three problems and of `ot.emd` for the plain one, and whether their values agree."""
    costs = _costs(x, z)
    w1 = -_emd(costs)[1]
    forms = _forms(w1)
    solved: dict[str, tuple[TransportSolution, int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in (MATRIX, EMD, *forms)}
    for _ in range(rounds):
        with timed(seconds[MATRIX]):
            costs = _costs(x, z)
        with timed(seconds[EMD]):
            _emd(costs)
        for name, form in forms.items():
            with timed(seconds[name]):
                solved[name] = _solve(x, z, form)
        advance()
    report: Json = {
        "samples": [len(x), len(z)],
        "w1": w1,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "ratio to ot.emd": {name: spread(ratios(seconds[name], seconds[EMD])) for name in forms},
        "problems": {name: _facts(*found) for name, found in solved.items()},
        "relative difference": {"ot.emd": abs(solved[PLAIN][0].value + w1) / w1},
    }
    if naive:
        report["naive"] = {}
        for name in (FIXED, LEARNED):
            once: list[float] = []
            problem, value = solved[name][0].problem, solved[name][0].value
            with timed(once):
                other = naive_value(problem)
            report["naive"][name] = {"seconds": once[0], "ratio to solve": once[0] / median(seconds[name])}
            report["relative difference"][f"naive, {name}"] = abs(other - value) / w1
        advance()
    return report


def growth(n: int, dims: int, seed: int, rounds: int) -> Json:
    """Times at n x n Gaussian samples, and the memory that `solve` takes at its peak."""
    x, z = gaussians(n, dims, seed)
    forms = _forms(1.0)
    seconds: dict[str, list[float]] = {PLAIN: [], LEARNED: [], EMD: []}
    with peak_memory() as memory:
        solution, count = _solve(x, z, forms[LEARNED])
    facts = _facts(solution, count)
    del solution
    for _ in range(rounds):
        for name in (PLAIN, LEARNED):
            with timed(seconds[name]):
                _solve(x, z, forms[name])
        costs = _costs(x, z)
        with timed(seconds[EMD]):
            _emd(costs)
        del costs
    return {
        "n": n,
        "dims": dims,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "ratio to ot.emd": {name: spread(ratios(seconds[name], seconds[EMD])) for name in (PLAIN, LEARNED)},
        LEARNED: facts,
        "peak bytes": memory[0],
        "estimated bytes": required_memory(n, n, x.shape[1]),
    }


def exponents(grown: Sequence[Json]) -> Json:
    """For each number of dimensions and each curve, k of the n^k that fits its times best."""
    return {
        f"{dims} dimensions": {name: _slope(*_curve(grown, dims, name)) for name in (PLAIN, LEARNED, EMD)}
        for dims in DIMS
    }


# --- what is timed -----------------------------------------------------------------------------------------------


def _forms(w1: float) -> dict[str, Json]:
    return {
        PLAIN: {"hinge_weight": 0.0},
        # half of W1: pairs nearer than W1 earn more than they cost, so that the hinge binds
        FIXED: {"hinge_weight": HINGE_WEIGHT, "margin": w1 / 2},
        LEARNED: {"hinge_weight": HINGE_WEIGHT, "alpha": ALPHA},
    }


def _solve(x: Tensor, z: Tensor, form: Json) -> tuple[TransportSolution, int]:
    rounds: list[Round] = []
    return solve(TransportProblem(x, z, **form), on_round=rounds.append), len(rounds)


def _costs(x: Tensor, z: Tensor) -> Floats:
    return distances(x.flatten(1).double(), z.flatten(1).double()).numpy()


def _emd(costs: Floats) -> tuple[Floats, float]:
    """The plan between equal weights, and minus its cost."""
    n, m = costs.shape
    return _emd_between(np.full(n, 1 / n), np.full(m, 1 / m), costs)


def _emd_between(supply: Floats, demand: Floats, costs: Floats) -> tuple[Floats, float]:
    plan, log = ot.emd(supply, demand, costs, numItermax=_PIVOTS, log=True)
    return plan, -float(log["cost"])


def naive_value(problem: TransportProblem) -> float:
    """The optimum by mandatory and optional copies of every sample and two dummies (theory, section 2), by `ot.emd`.

    Optional to dummy and dummy to dummy cost nothing, mandatory to dummy is forbidden, each optional end earns m.
    """
    a, b = problem.sample_weight_x.numpy(), problem.sample_weight_z.numpy()
    s, t = problem.slack_x, problem.slack_z
    obliged = problem.hinge_weight * (problem.alpha or 0.0) / 2
    m = problem.margin or 0.0
    pairs = distances(problem.x, problem.z, problem.norm).numpy()
    costs = np.zeros((2 * len(a) + 1, 2 * len(b) + 1))
    costs[:-1, :-1] = np.block([[pairs, pairs - m], [pairs - m, pairs - 2 * m]])
    forbidden = 10 * (float(pairs.max()) + m)
    costs[: len(a), -1] = costs[-1, : len(b)] = forbidden
    supply = np.concatenate([a, a * s, [t - obliged]])
    demand = np.concatenate([b, b * t, [s - obliged]])
    return _emd_between(supply, demand, costs)[1]


# --- what is reported --------------------------------------------------------------------------------------------


def _facts(solution: TransportSolution, rounds: int) -> Json:
    return {
        "value": solution.value,
        "gap": solution.gap,
        "margin": solution.margin,
        "mass": float(solution.mass.sum()),
        "pairs": len(solution.mass),
        "rounds": rounds,
    }


def _curve(grown: Sequence[Json], dims: int, name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in grown if row["dims"] == dims]
    return [row["n"] for row in rows], [row["seconds"][name]["median"] for row in rows]


def _slope(sizes: Sequence[int], seconds: Sequence[float]) -> float | None:
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def lines(report: Json) -> Iterator[str]:
    """What the terminal shows."""
    for row in report["comparison"]:
        n, m = row["samples"]
        times = ", ".join(f"{name} {spread['median']:.2f} s" for name, spread in row["seconds"].items())
        yield f"{row['data']}, {n} x {m}: {times}"
        for name, ratio in row["ratio to ot.emd"].items():
            verdict = "within" if ratio["median"] <= report["bar"] else "NOT within"
            yield f"  {name}: {ratio['median']:.2f} x ot.emd, {verdict} {report['bar']:g} x"
        for name, other in row.get("naive", {}).items():
            yield f"  {name}, quadrupled: {other['seconds']:.1f} s, {other['ratio to solve']:.1f} x solve"
    for row in report["growth"]:
        memory = "" if row["peak bytes"] is None else f", {row['peak bytes'] / 1e9:.2f} GB at the peak"
        times = ", ".join(f"{name} {spread['median']:.2f} s" for name, spread in row["seconds"].items())
        yield f"n = {row['n']}, {row['dims']} dimensions: {times}{memory}"


def plot(grown: Sequence[Json]) -> bytes:
    """A PNG: time against n, log-log, one panel for each number of dimensions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained", dpi=110)
    curves = {
        PLAIN: ("otnn.solve, plain", "o-", "tab:blue"),
        LEARNED: ("otnn.solve, learned margin", "s-", "tab:orange"),
        EMD: ("ot.emd, plain, distances given", "x--", "tab:gray"),
    }
    for axes, dims in zip(figure.subplots(1, len(DIMS), sharey=True), DIMS, strict=True):
        for name, (label, marks, colour) in curves.items():
            axes.loglog(*_curve(grown, dims, name), marks, color=colour, label=label)
        axes.set_title(f"{dims} dimensions", fontsize=11)
        axes.set_xlabel("samples of each class")
        axes.grid(which="both", alpha=0.25)
        ticks = sorted({row["n"] for row in grown})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main() -> None:
    """Run the benchmark."""
    command.run(app)


if __name__ == "__main__":
    main()
