"""`python -m t2l`: the command line, also for launchers that take a module."""

from t2l.cli import main

main()
