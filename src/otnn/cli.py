"""The command line: one command a stage, each from files to files of one run folder."""

import json
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from otnn import __version__
from otnn.errors import InputError
from otnn.tables import audit_table, compare_tables, explained_table, networks_table, radii_table, snowflakes_table

if TYPE_CHECKING:
    from otnn.run.config import Config

app = typer.Typer(
    name="otnn",
    help="Train 1-Lipschitz classifiers with optimal transport; certify, explain and report them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
MovedData = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where the data of the run lie now, if they have moved.", metavar="DIR"),
]
AcceptEdits = Annotated[
    bool, typer.Option("--accept-edits", help="Go on with a config.toml that was edited by hand since the training.")
]
DataDir = Annotated[Path | None, typer.Option(help="Folder of local data sets (or OTNN_DATA_DIR).", metavar="DIR")]


def _version(show: bool) -> None:
    if show:
        print(f"otnn {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
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

    settings = _settings(
        preset, config, overrides, data, data_dir, classes, target, size, skip_broken, seed, no_twin, adversarial
    )
    run = run_training(settings, out, force=force, device=device)
    results = run.results()
    _print(results, as_json, networks_table(results))
    folder = shlex.quote(str(out))
    _say(f"next: otnn certify {folder}; otnn explain {folder}; otnn report {folder}", as_json)


@app.command()
def certify(
    run: RunFolder,
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    arithmetic: Annotated[
        str, typer.Option(help='Radii of the map in exact arithmetic ("real"), or as executed ("float32").')
    ] = "real",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Certify every test image: certificates.csv, certificates.npz and certified accuracy over radii."""
    from otnn.run.certify import certify_run
    from otnn.run.folder import open_run
    from otnn.run.train import choose_device, dataset_of

    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    figures = certify_run(opened, arithmetic=arithmetic, dataset=dataset_of(opened, data_dir), device=place)
    _print(figures, as_json, radii_table(opened.results()))


@app.command()
def explain(
    run: RunFolder,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files; without any, a gallery of test images.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The class that the counterfactuals go to.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the pictures; RUN/explanations by default.")] = None,
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    skip_broken: SkipBroken = False,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite pictures that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show where a prediction comes from, and the image that another class would need."""
    from otnn.run.explain import explain_files, explain_gallery
    from otnn.run.folder import open_run
    from otnn.run.train import choose_device, dataset_of

    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    if not images:
        if target is not None or out is not None:
            raise InputError("--target and --out go with image files; give some, or leave them out for the gallery")
        file = explain_gallery(opened, dataset=dataset_of(opened, data_dir), device=place)
        _print({"gallery": str(file)}, as_json, f"gallery of test images: {file}")
        return
    rows = explain_files(opened, images, target=target, out=out, force=force, skip_broken=skip_broken, device=place)
    _print({"images": rows}, as_json, explained_table(rows))
    for row in rows:
        _say(row["picture"], as_json)


@app.command()
def audit(
    run: RunFolder,
    samples: Annotated[
        int, typer.Option(help="Samples of each side of a problem, at most; 0 takes all. More need more time.", min=0)
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the samples that are drawn.", min=0, max=2**63 - 1)] = 0,
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the network against the exact optimum of its loss: audit.json, audit.npz and audit.png."""
    from otnn.run.audit import audit_run
    from otnn.run.folder import open_run
    from otnn.run.train import choose_device, dataset_of

    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    dataset = dataset_of(opened, data_dir)
    content = audit_run(opened, dataset=dataset, samples=samples or None, seed=seed, device=place)
    _print(content, as_json, audit_table(content))
    for sentence in content["verdict"]:
        _say(sentence, as_json)
    _say("slack. is the mean slackness, zero the share moved onto the zero level; all figures: docs/audit.md", as_json)
    _say(f"pictures: {run / 'audit.png'}", as_json)


@app.command()
def compare(
    run: RunFolder,
    profile: Annotated[
        str, typer.Option(help="quick, or full: all methods, and all metrics of the run alone.")
    ] = "quick",
    methods: Annotated[str | None, typer.Option(help="Others than those of the profile, with commas.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Others than those of the profile, with commas.")] = None,
    samples: Annotated[int, typer.Option(help="Test images, drawn at random.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the images, masks and noise.")] = 0,
    score: Annotated[str, typer.Option(help="What is explained: margin or logit.")] = "margin",
    data_dir: MovedData = None,
    accept_edits: AcceptEdits = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare explanation methods on the networks of a run: compare.json, compare.csv and two pictures."""
    from otnn.run.compare import choose, compare_run
    from otnn.run.folder import open_run
    from otnn.run.train import choose_device, dataset_of

    choice: dict[str, Any] = {"profile": profile, "methods": _listed(methods), "metrics": _listed(metrics)}
    choose(**choice)
    place = choose_device(device)
    opened = open_run(run, accept_edits=accept_edits)
    dataset = dataset_of(opened, data_dir)
    content = compare_run(opened, dataset=dataset, samples=samples, seed=seed, score=score, device=place, **choice)
    _print(content, as_json, *compare_tables(content))
    for sentence in content["verdict"]:
        _say(sentence, as_json)
    _say(f"pictures: {run / 'compare.png'}, {run / 'compare-pareto.png'}", as_json)


@app.command()
def report(
    run: RunFolder, data_dir: MovedData = None, accept_edits: AcceptEdits = False, as_json: AsJson = False
) -> None:
    """Write report.html: one page that a non-expert can read; runs certify and explain where they are missing."""
    from otnn.report import write_report
    from otnn.run.certify import certify_run
    from otnn.run.explain import explain_gallery
    from otnn.run.folder import open_run
    from otnn.run.train import dataset_of

    opened = open_run(run, accept_edits=accept_edits)
    certified = (run / "certificates.npz").exists() and "certified_accuracy" in opened.results()["otnn"]
    explained = (run / "explanations.npz").exists()
    if not (certified and explained):
        dataset = dataset_of(opened, data_dir)
        if not certified:
            certify_run(opened, dataset=dataset)
        if not explained:
            explain_gallery(opened, dataset=dataset)
    file = write_report(opened)
    _print({"report": str(file)}, as_json, f"report: {file}")


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The file; RUN/otnn.onnx by default.", metavar="FILE.onnx")] = None,
    accept_edits: AcceptEdits = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the network with its proven bounds as an ONNX file, for use without torch."""
    from otnn.run.export import export_run
    from otnn.run.folder import open_run

    opened = open_run(run, accept_edits=accept_edits)
    file = export_run(opened, run / "otnn.onnx" if out is None else out, force=force)
    _print({"onnx": str(file)}, as_json, f"ONNX file: {file}")


@app.command()
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

    settings = _settings(
        preset, config, overrides, data, data_dir, classes, target, size, skip_broken, seed, no_twin, adversarial
    )
    folder = out if out is not None else free_folder(Path("otnn-demo"))
    run = run_all(settings, folder, force=force, device=device)
    results = run.results()
    _print(results, as_json, networks_table(results), radii_table(results))
    _say(f"report: {folder / 'report.html'}", as_json)


@app.command()
def snowflakes(
    out: Annotated[Path, typer.Option(help="Folder of the picture and its figures.", metavar="DIR")] = Path("."),
    seed: Annotated[int, typer.Option(help="Seed of the networks.", min=0, max=2**63 - 1)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw the figure of the paper: a network on two Koch snowflakes beside the exact optimum and an ordinary one."""
    from otnn.run.snowflakes import PICTURE, missed, run_snowflakes

    content = run_snowflakes(out, seed=seed, force=force)
    _print(content, as_json, snowflakes_table(content))
    _say(f"picture: {out / PICTURE}", as_json)
    if short := missed(content):
        _say(f"below its bar: {', '.join(short)}", as_json)


def _settings(
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
        "data.classes": _listed(classes),
        "data.target": target,
        "data.size": size,
        "data.skip_broken": skip_broken or None,
        "seed": seed,
        "twin": False if no_twin else None,
        "training.adversarial": adversarial,
    }
    return load(preset, file, options, overrides or [])


def _listed(names: str | None) -> list[str] | None:
    """The names of a list with commas."""
    return None if names is None else [name.strip() for name in names.split(",")]


def _print(content: dict[str, Any], as_json: bool, *pretty: Any) -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process speaks
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        for item in pretty:
            _out.print(item)


def _say(message: str, as_json: bool) -> None:
    if not as_json and os.environ.get("RANK", "0") == "0":
        _out.print(message, soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A user's warning in one line; others are for developers and stay silent."""
    if issubclass(category, UserWarning):
        print(f"otnn: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; what a user's input can cause is one sentence on stderr and exit code 2."""
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half-made folder is removed
    try:
        app()
    except InputError as error:
        print(f"otnn: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(
            f"otnn: {error.filename or 'a file'}: {error.strerror or error}; check the path and its permissions",
            file=sys.stderr,
        )
        sys.exit(2)
    except FloatingPointError as error:
        print(f"otnn: training failed: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
