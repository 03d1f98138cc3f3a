"""The command line: one command a stage, each from files to files of one run folder."""

import signal
import sys
import warnings
from typing import Annotated, Any

import typer

from otnn import __version__
from otnn.cli import stages, training
from otnn.errors import InputError
from otnn.memory import keep_freed_memory

app = typer.Typer(
    name="otnn",
    help="Train 1-Lipschitz classifiers with optimal transport; certify, explain and report them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    training.train,
    stages.certify,
    stages.attack,
    stages.explain,
    stages.audit,
    stages.compare,
    stages.counterfactual,
    stages.report,
    stages.export,
    training.demo,
    training.snowflakes,
):
    app.command()(_command)


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


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A user's warning in one line; others are for developers and stay silent."""
    if issubclass(category, UserWarning):
        print(f"otnn: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; what a user's input can cause is one sentence on stderr and exit code 2."""
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half-made folder is removed
    keep_freed_memory()
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
