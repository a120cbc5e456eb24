"""`python -m cropi`."""

from cropi.cli import main

main()
