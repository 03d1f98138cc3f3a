"""The command line of the campaigns; it exits 1 where a campaign finds a violation, 2 on a wrong setting."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import command
from benchmarks.campaign import Campaign, run_campaign
from benchmarks.soundness.attacks import attacks_campaign
from benchmarks.soundness.bounds import bounds_campaign
from benchmarks.soundness.rounding import rounding_campaign
from benchmarks.soundness.trained import trained_campaign

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Seed = Annotated[int, typer.Option(help="Of every draw.")]
Out = Annotated[Path | None, typer.Option(help="The report; soundness-CAMPAIGN.json by default.", metavar="FILE")]
Workers = Annotated[int, typer.Option(help="Processes.", min=1)]


@app.command()
def bounds(
    cases: Annotated[int, typer.Option(help="How many.")] = 10_000,
    seed: Seed = 0,
    out: Out = None,
    workers: Workers = 1,
) -> None:
    """Every bound against the largest singular value of the true operator."""
    torch.set_num_threads(1)  # the same sums everywhere
    _run(bounds_campaign(cases, seed), out, workers)


@app.command()
def rounding(
    trials: Annotated[int, typer.Option(help="For each arithmetic.")] = 100_000,
    seed: Seed = 0,
    out: Out = None,
    workers: Workers = 1,
) -> None:
    """A search for points inside a certified ball whose prediction differs."""
    torch.set_num_threads(1)
    _run(rounding_campaign(trials, seed), out, workers)


@app.command()
def trained(
    run: Annotated[list[Path] | None, typer.Option(help="A run folder whose twin is measured.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of local data sets (or OTNN_DATA_DIR).")] = None,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """The bounds of an ordinary trained network against its true norms, and their times."""
    _run(trained_campaign(run or (), data_dir, seed), out, 1)


@app.command()
def attacks(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")],
    images: Annotated[int, typer.Option(help="Of the gradient step and PGD; 0 takes all.", min=0)] = 0,
    few: Annotated[int, typer.Option(help="Of the attacks that take hundreds of passes.", min=0)] = 500,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of local data sets (or OTNN_DATA_DIR).")] = None,
    seed: Seed = 0,
    out: Out = None,
    workers: Workers = 1,
) -> None:
    """A search for adversarial points below the certified radii of trained networks."""
    _run(attacks_campaign(runs, data_dir, seed, images, few), out, workers)


def _run(campaign: Campaign, out: Path | None, workers: int) -> None:
    out = out or Path(f"soundness-{campaign.name}.json")
    report = run_campaign(campaign, out, workers=workers)
    print(f"{campaign.name}: {report['violations']} violations; {out}")
    if report["violations"]:
        raise typer.Exit(1)


def main() -> None:
    """Run a campaign."""
    command.run(app)


if __name__ == "__main__":
    main()
