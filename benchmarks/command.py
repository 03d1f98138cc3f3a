"""How every benchmark is run from the command line."""

import sys

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from otnn.errors import InputError
from otnn.memory import keep_freed_memory


def progress() -> Progress:
    """Bars on stderr, where people look, of tasks whose number of steps is known."""
    console = Console(stderr=True, highlight=False, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def keep_memory() -> None:
    """Keep freed memory in this process.

    Raises:
        InputError: it cannot be done here.
    """
    if not keep_freed_memory():
        raise InputError(
            "freed memory cannot be kept: expected glibc, and an environment without MALLOC_..., GLIBC_TUNABLES and "
            "LD_PRELOAD; unset them"
        )


def run(app: typer.Typer) -> None:
    """Run the commands of a benchmark; a wrong setting is told on stderr, with exit status 2."""
    try:
        app()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
