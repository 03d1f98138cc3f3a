"""The command line; it exits 1 where the campaign finds a violation, 2 on a wrong setting."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import command
from benchmarks.campaign import run_campaign
from benchmarks.guarantees import __doc__ as about
from benchmarks.guarantees.campaign import guarantees_campaign

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(help=about)
def run(
    cases: Annotated[int, typer.Option(help="Of each guarantee.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    out: Annotated[Path, typer.Option(help="The report.", metavar="FILE")] = Path("guarantees.json"),
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
) -> None:
    torch.set_num_threads(1)
    report = run_campaign(guarantees_campaign(cases, seed), out, workers=workers)
    print(f"guarantees: {report['violations']} violations; {out}")
    if report["violations"]:
        raise typer.Exit(1)


def main() -> None:
    """Run the campaign."""
    command.run(app)


if __name__ == "__main__":
    main()
