"""`python -m otnn.cli`, which torchrun starts on every process."""

from otnn.cli.main import main

main()
