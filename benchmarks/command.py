"""How every benchmark is run from the command line."""

import sys

import typer

from otnn.errors import InputError
from otnn.memory import keep_freed_memory


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
