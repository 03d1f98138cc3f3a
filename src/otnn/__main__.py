"""`python -m otnn`, which torchrun starts on every process."""

from otnn.cli.main import main

main()
