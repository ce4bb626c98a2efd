"""`python -m t2l.cli`."""

from t2l.cli import main

main()
