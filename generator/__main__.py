"""`python -m generator` is the `bespoke` command."""

from .cli import main

main()
