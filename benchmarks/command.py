"""How every benchmark is run from the command line."""

import sys

import typer

from otnn.errors import InputError


def run(app: typer.Typer) -> None:
    """Run the commands of a benchmark; a wrong setting is told on stderr, with exit status 2."""
    try:
        app()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
