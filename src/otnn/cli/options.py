"""What the commands share: their options, the configuration that these ask for, and how an answer is printed."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from otnn.errors import InputError

if TYPE_CHECKING:
    from otnn.run.config import Config

_out = Console(soft_wrap=False, highlight=False, markup=False)

RunFolder = Annotated[Path, typer.Argument(help="A run folder, as `otnn train` makes it.", metavar="RUN")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing run folder.")]
Data = Annotated[
    str | None, typer.Option(help="digits, mnist, fashion-mnist, ..., a folder, a zip or a Hugging Face name.")
]
Classes = Annotated[
    str | None,
    typer.Option(help="Classes of the task by name or index, with commas: 0,8 (index for names with commas)."),
]
Target = Annotated[str | None, typer.Option(help="An attribute column, for a binary task.")]
Size = Annotated[int | None, typer.Option(help="Pixels of a side.")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave out images that cannot be read, and name them.")]
Preset = Annotated[str | None, typer.Option(help="A named configuration: digits, binary, fast or photos.")]
ConfigFile = Annotated[Path | None, typer.Option(help="A TOML file of settings.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="A setting: --set training.epochs=30.", metavar="NAME=VALUE")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the training.")]
Adversarial = Annotated[
    float | None,
    typer.Option(help="Also train an ordinary network on attacks of that L2 radius.", metavar="EPS"),
]
NoTwin = Annotated[bool, typer.Option("--no-twin", help="Do not train the unconstrained twin.")]
Box = Annotated[bool, typer.Option("--box", help="Keep the counterfactuals in the range of pixels.")]
Iterations = Annotated[int, typer.Option(help="Gradients on the way to the boundary.", min=1)]
MovedData = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where the data of the run lie now, if they have moved.", metavar="DIR"),
]
AcceptEdits = Annotated[
    bool, typer.Option("--accept-edits", help="Go on with a config.toml that was edited by hand since the training.")
]
DataDir = Annotated[Path | None, typer.Option(help="Folder of local data sets (or OTNN_DATA_DIR).", metavar="DIR")]


def settings_of(
    preset: str | None,
    file: Path | None,
    overrides: list[str] | None,
    data: str | None,
    data_dir: Path | None,
    classes: str | None,
    target: str | None,
    size: int | None,
    skip_broken: bool,
    seed: int | None,
    no_twin: bool,
    adversarial: float | None,
) -> "Config":
    """The configuration that the options of `train` and `demo` ask for."""
    from otnn.run.config import load

    options = {
        "data.name": data,
        "data.data_dir": None if data_dir is None else str(data_dir),
        "data.classes": listed(classes),
        "data.target": target,
        "data.size": size,
        "data.skip_broken": skip_broken or None,
        "seed": seed,
        "twin": False if no_twin else None,
        "training.adversarial": adversarial,
    }
    return load(preset, file, options, overrides or [])


def listed(names: str | None) -> list[str] | None:
    """The names of a list with commas."""
    return None if names is None else [name.strip() for name in names.split(",")]


def numbers(text: str | None, option: str) -> list[float] | None:
    """The numbers of a list with commas.

    Raises:
        InputError: one that is none.
    """
    if text is None:
        return None
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: expected numbers with commas, such as 0.25,0.5, got {text!r}") from None


def tell(content: dict[str, Any], as_json: bool, *pretty: Any) -> None:
    """Print an answer: as JSON, or as its tables; under torchrun the first process speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        for item in pretty:
            _out.print(item)


def say(message: str, as_json: bool, style: str = "") -> None:
    """Print a line beside the tables, where people read."""
    if not as_json and os.environ.get("RANK", "0") == "0":
        _out.print(message, soft_wrap=True, style=style)
