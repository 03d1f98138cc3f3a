"""The commands that train: `train`, `demo` and `snowflakes`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from otnn.cli.options import (
    Adversarial,
    AsJson,
    Classes,
    ConfigFile,
    Data,
    DataDir,
    Device,
    Force,
    NoTwin,
    Overrides,
    Preset,
    Seed,
    Size,
    SkipBroken,
    Target,
    say,
    settings_of,
    tell,
)
from otnn.cli.tables import networks_table, radii_table, snowflakes_table


def train(
    out: Annotated[Path, typer.Option(help="The run folder to make.", metavar="DIR")],
    data: Data = None,
    data_dir: DataDir = None,
    classes: Classes = None,
    target: Target = None,
    size: Size = None,
    skip_broken: SkipBroken = False,
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    no_twin: NoTwin = False,
    adversarial: Adversarial = None,
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train an OTNN and its unconstrained twin."""
    from otnn.run.train import train as run_training

    settings = settings_of(
        preset, config, overrides, data, data_dir, classes, target, size, skip_broken, seed, no_twin, adversarial
    )
    run = run_training(settings, out, force=force, device=device)
    results = run.results()
    tell(results, as_json, networks_table(results))
    folder = shlex.quote(str(out))
    say(f"next: otnn certify {folder}; otnn explain {folder}; otnn report {folder}", as_json)


def demo(
    out: Annotated[Path | None, typer.Option(help="The run folder; the first free otnn-demo by default.")] = None,
    data: Data = None,
    data_dir: DataDir = None,
    classes: Classes = None,
    target: Target = None,
    size: Size = None,
    skip_broken: SkipBroken = False,
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    no_twin: NoTwin = False,
    adversarial: Adversarial = None,
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train, certify, explain, audit and report in one go; on the embedded digits by default."""
    from otnn.run.demo import free_folder, run_all

    settings = settings_of(
        preset, config, overrides, data, data_dir, classes, target, size, skip_broken, seed, no_twin, adversarial
    )
    folder = out if out is not None else free_folder(Path("otnn-demo"))
    run = run_all(settings, folder, force=force, device=device)
    results = run.results()
    tell(results, as_json, networks_table(results), radii_table(results))
    say(f"report: {folder / 'report.html'}", as_json)


def snowflakes(
    out: Annotated[Path, typer.Option(help="Folder of the picture and its figures.", metavar="DIR")] = Path("."),
    seed: Annotated[int, typer.Option(help="Seed of the networks.", min=0, max=2**63 - 1)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw the figure of the paper: a network on two Koch snowflakes beside the exact optimum and an ordinary one."""
    from otnn.run.snowflakes import ARROWS, PICTURE, missed, run_snowflakes

    content = run_snowflakes(out, seed=seed, force=force)
    tell(content, as_json, snowflakes_table(content))
    say(f"pictures: {out / PICTURE}, {out / ARROWS}", as_json)
    if short := missed(content):
        say(f"below its bar: {', '.join(short)}", as_json)
