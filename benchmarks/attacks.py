"""Is our minimal-norm search as near as foolbox's attacks, and do attacks on an OTNN collapse onto its gradient?

python -m benchmarks.attacks compare       minimal_norm against C&W, DeepFool, DDN and FMN, on networks of the digits
python -m benchmarks.attacks snowflakes    where attacks on the OTNN of the snowflakes go, and how far

Both need the extra `attacks`. A figure that misses its bar is told, and does not fail.
"""

import copy
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from benchmarks import command
from benchmarks.timing import Json, by_turns, ratios, spread
from otnn.attacks import evaluate, minimal_norm, pgd
from otnn.attacks.collapse import collapse
from otnn.attacks.foolbox_attacks import carlini_wagner, ddn, deepfool, fmn
from otnn.attacks.objective import Objective
from otnn.batches import spread as broadcast
from otnn.data.snowflakes import snowflakes as snowflake_points
from otnn.files import json_bytes, write_whole
from otnn.lipschitz import export
from otnn.models import Classifier, predict
from otnn.run.config import load
from otnn.run.snowflakes import Recipe, potential_of, train_otnn
from otnn.run.train import dataset_of, train, versions

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Attack = Callable[..., Tensor]
OURS = "minimal_norm"
FOOLBOX: Mapping[str, Attack] = {"carlini_wagner": carlini_wagner, "deepfool": deepfool, "ddn": ddn, "fmn": fmn}
# Our median distance over the smallest of foolbox's
BAR = 1.01
# Median cosine with the gradient, of these attacks, and median distance of the best attack over the certified radius
COSINE, COLLAPSING, RATIO = 0.99, ("pgd", "carlini_wagner", "ddn"), 1.05
# Radii of PGD over the certified one, tried in this order: a sample keeps the first that is won
SHARES = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0)
# L2 radius of the attacks in adversarial training
TRAINED_RADIUS = 0.5

Seed = Annotated[int, typer.Option(help="Of the first network.")]
Threads = Annotated[int, typer.Option(help="Of torch.", min=1)]
CarliniWagner = Annotated[int, typer.Option(help="Steps of C&W for each constant.", min=1)]


@app.command()
def compare(
    seeds: Annotated[int, typer.Option(help="How many of each network are trained.", min=1)] = 3,
    images: Annotated[int, typer.Option(help="Test images.", min=1)] = 100,
    rounds: Annotated[int, typer.Option(help="How often each attack is timed.", min=1)] = 3,
    epochs: Annotated[int, typer.Option(help="Of training.", min=1)] = 15,
    widths: Annotated[list[int] | None, typer.Option("--width", help="Of a hidden layer; 64, 64 by default.")] = None,
    cw_steps: CarliniWagner = 200,
    seed: Seed = 0,
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="The report.", metavar="FILE")] = Path("attacks-compare.json"),
) -> None:
    """Compare the median L2 distances of minimal_norm and of foolbox's attacks, with and without the box."""
    torch.set_num_threads(threads)
    attacks = _attacks(cw_steps)
    measured = []
    with command.progress() as progress:
        task = progress.add_task("attacks", total=seeds * 6 * rounds)
        for number in range(seed, seed + seeds):
            progress.update(task, description=f"training, seed {number}")
            networks, points, labels = digits(number, images, epochs, tuple(widths or (64, 64)))
            for name, model in networks.items():
                for box in (False, True):
                    progress.update(task, description=f"{name}, seed {number}")
                    row = measure(model, points, labels, attacks, box, rounds, lambda: progress.advance(task))
                    measured.append({"network": name, "seed": number, "box": box, **row})
    report = _head("compare", seed, threads) | {
        "seeds": seeds, "rounds": rounds, "epochs": epochs, "widths": widths or [64, 64], "C&W steps": cw_steps,
        "bar": BAR, "measured": measured,
    }  # fmt: skip
    _write(report, out, compare_lines(report))


@app.command()
def snowflakes(
    points: Annotated[int, typer.Option(help="On each snowflake.", min=3)] = 500,
    steps: Annotated[int, typer.Option(help="Of training.", min=1)] = Recipe.steps,
    cw_steps: CarliniWagner = 200,
    seed: Seed = 0,
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="The report.", metavar="FILE")] = Path("attacks-snowflakes.json"),
) -> None:
    """Where the attacks on the OTNN of the snowflakes go: cosine with the gradient, distance over certified radius."""
    torch.set_num_threads(threads)
    data = snowflake_points(points)
    network, seconds = train_otnn(data, Recipe(steps=steps), seed)
    with command.progress() as progress:
        task = progress.add_task("attacks", total=None)
        found = where_attacks_go(
            export(network.eval()), data.images, cw_steps, lambda name: progress.update(task, description=name)
        )
    report = _head("snowflakes", seed, threads) | {
        "points": points, "steps": steps, "training seconds": round(seconds, 1), "C&W steps": cw_steps,
        "bars": {"median cosine": COSINE, "of": COLLAPSING, "median distance of the best over radius": RATIO}, **found,
    }  # fmt: skip
    _write(report, out, snowflake_lines(report))


# --- compare -----------------------------------------------------------------------------------------------------


def digits(seed: int, count: int, epochs: int, widths: tuple[int, ...]) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """A dense OTNN of the digits, its ordinary twin and one trained adversarially; test images and their labels."""
    options = {
        "seed": seed,
        "model.widths": list(widths),
        "training.epochs": epochs,
        "training.adversarial": TRAINED_RADIUS,
    }
    config = load(preset="digits", options=options)
    with TemporaryDirectory() as folder:
        run = train(config, Path(folder) / "run", quiet=True)
        test = dataset_of(run).test
        return {name: run.network(name) for name in run.networks}, test.images[:count], test.labels[:count]


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Attack],
    box: bool,
    rounds: int,
    advance: Callable[[], None],
) -> Json:
    """Distances, passes and seconds of each attack on the images that the model classifies correctly."""
    with torch.no_grad():
        right = predict(model(images)) == labels
    images, labels = images[right], labels[right]
    rows: Json = {}
    for name, attack in attacks.items():
        counted = Counted(model).eval()
        outcome = evaluate(model, images, labels, attack(counted, images, labels, box=box), box=box)
        # a failure is infinitely far
        distance = torch.where(outcome.success, outcome.distance, torch.inf)
        rows[name] = {
            "success": float(outcome.success.double().mean()),
            "median distance": _number(_median(distance)),
            "mean distance of successes": _number(outcome.distance[outcome.success].mean()),
            "forwards": round(counted.forwards / len(images), 1),
            "backwards": round(counted.backwards / len(images), 1),
            "distance": distance,
        }
    jobs = {name: partial(attack, model, images, labels, box=box) for name, attack in attacks.items()}
    seconds = by_turns(jobs, rounds, advance)
    ours = rows[OURS]["distance"]
    rivals = {name: row["distance"] for name, row in rows.items() if name != OURS}
    nearest = torch.stack(list(rivals.values())).amin(dim=0)
    found = {
        "images": len(images),
        "ratio to foolbox's best": _number(_median(ours) / min(_median(distance) for distance in rivals.values())),
        # against the nearest point of all four, sample by sample
        "ratio to the best of each sample": {
            q: _number((ours / nearest).nan_to_num(nan=torch.inf).quantile(share))
            for q, share in (("median", 0.5), ("0.9 quantile", 0.9))
        },
    }
    for name, row in rows.items():
        del row["distance"]
        row["seconds"] = spread(seconds[name])
        if name != OURS:
            row["seconds of ours over its own"] = spread(ratios(seconds[OURS], seconds[name]))
    return found | {"attacks": rows}


class Counted(nn.Module):
    """A model that counts the samples which pass it, forwards and backwards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.model(images)
        self.forwards += len(images)
        if scores.requires_grad:
            scores.register_hook(self._count)
        return scores

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


# --- snowflakes --------------------------------------------------------------------------------------------------


def _median(values: Tensor) -> Tensor:
    """The mean of the two middle values, where `Tensor.median` takes the lower one; infinite where either is."""
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def where_attacks_go(model: Classifier, images: Tensor, cw_steps: int, tell: Callable[[str], None]) -> Json:
    """Cosines and ratios of each attack on the class predicted, without a box, by the margin and the cross-entropy."""
    with torch.no_grad():
        labels = predict(model(images))
        # the output over the proven bound of the whole network; `certify` takes pixels
        radius = potential_of(copy.deepcopy(model))(images.double()).abs()
    positive = radius > 0
    images, labels, radius = images[positive], labels[positive], radius[positive]
    losses: Json = {}
    for loss in ("margin", "cross_entropy"):
        objective = Objective(model, images, labels, loss=loss)
        _, direction = objective.slopes(images, torch.arange(len(images)))
        rows: Json = {}
        best = torch.full_like(radius, torch.inf)
        for name, attack in {"pgd": partial(nearest_pgd, radius=radius), **_attacks(cw_steps)}.items():
            if loss == "cross_entropy" and name in ("carlini_wagner", "fmn"):
                continue  # made of the margin
            tell(f"{name}, {loss}")
            points = attack(model, images, labels, loss=loss)
            outcome = evaluate(model, images, labels, points)
            found = collapse(images, points, direction, radius, outcome.success)
            best = torch.where(outcome.success, torch.minimum(best, found.ratio), best)
            rows[name] = {
                "success": found.successes / found.samples,
                "cosine": _quantiles(found.cosine),
                "distance over radius": _quantiles(found.ratio),
                "below the radius": int((outcome.distance < radius)[outcome.success].sum()),
            }
        losses[loss] = {"attacks": rows, "best distance over radius": _quantiles(best)}
    return {"samples": len(images), "without a radius": int((~positive).sum()), "losses": losses}


def nearest_pgd(model: nn.Module, images: Tensor, labels: Tensor, *, radius: Tensor, loss: str = "margin") -> Tensor:
    """PGD at growing radii, without the gradient step; each sample keeps the point of the first that is won."""
    points, open_ = images.clone(), torch.ones(len(images), dtype=torch.bool)
    for share in SHARES:
        index = open_.nonzero().squeeze(1)
        if not len(index):
            break
        tried = pgd(model, images[index], labels[index], share * radius[index], loss=loss, one_step=False)
        won = evaluate(model, images[index], labels[index], tried).success
        points = points.index_copy(0, index, torch.where(broadcast(won, tried), tried, points[index]))
        open_[index[won]] = False
    return points


# --- both --------------------------------------------------------------------------------------------------------


def _attacks(cw_steps: int) -> dict[str, Attack]:
    rivals = {**FOOLBOX, "carlini_wagner": partial(carlini_wagner, steps=cw_steps)}
    return {OURS: minimal_norm, **rivals}


def _number(value: Tensor) -> float | None:
    """None where it is not finite, for which JSON has no number."""
    return float(value) if bool(torch.isfinite(value)) else None


def _quantiles(values: Tensor) -> Json:
    known = values[torch.isfinite(values)]
    if not len(known):
        return {"count": 0}
    shares = {"min": 0.0, "0.1 quantile": 0.1, "median": 0.5, "0.9 quantile": 0.9, "max": 1.0}
    return {"count": len(known), **{name: float(known.quantile(share)) for name, share in shares.items()}}


def _head(name: str, seed: int, threads: int) -> Json:
    libraries = {name: importlib.metadata.version(name) for name in ("foolbox", "eagerpy")}
    return {
        "benchmark": f"attacks {name}", "seed": seed, "threads": threads, "cores": os.cpu_count(),
        "versions": {**versions(), **libraries},
    }  # fmt: skip


def _write(report: Json, out: Path, lines: Iterator[str]) -> None:
    write_whole(out, json_bytes(report))
    for line in lines:
        print(line)
    print(out)


def compare_lines(report: Json) -> Iterator[str]:
    """What the terminal shows: the ratio beside its bar, and each attack."""
    for entry in report["measured"]:
        ratio = entry["ratio to foolbox's best"]
        within = ratio is not None and ratio <= report["bar"]
        shown = "-" if ratio is None else f"{ratio:.4f}"
        yield (
            f"{entry['network']}, seed {entry['seed']}, {'box' if entry['box'] else 'no box'}, {entry['images']} images"
            f": {shown} x foolbox's best, {'within' if within else 'NOT within'} {report['bar']:g} x"
        )
        for name, row in entry["attacks"].items():
            distance = "-" if row["median distance"] is None else f"{row['median distance']:.4f}"
            yield (
                f"  {name}: median {distance}, success {row['success']:.1%}, {row['forwards']:g} forwards, "
                f"{row['backwards']:g} backwards, {row['seconds']['median']:.2f} s"
            )


def snowflake_lines(report: Json) -> Iterator[str]:
    """What the terminal shows: each attack, with the bars of the margin."""
    for loss, entry in report["losses"].items():
        yield f"{loss}, {report['samples']} points"
        for name, row in entry["attacks"].items():
            cosine, ratio = row["cosine"].get("median"), row["distance over radius"].get("median")
            line = f"  {name}: success {row['success']:.1%}"
            if cosine is not None and ratio is not None:
                line += f", median cosine {cosine:.4f}, distance over radius {ratio:.4f}"
                if loss == "margin" and name in COLLAPSING:
                    line += f", {'within' if cosine >= COSINE else 'NOT within'} {COSINE:g}"
            yield line
        best = entry["best distance over radius"].get("median")
        if best is not None:
            bar = f", {'within' if best <= RATIO else 'NOT within'} {RATIO:g}" if loss == "margin" else ""
            yield f"  best of each point: median distance over radius {best:.4f}{bar}"


def main() -> None:
    """Run a command; a wrong setting is told on stderr, with exit status 2."""
    command.run(app)


if __name__ == "__main__":
    main()
