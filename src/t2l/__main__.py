"""`t2l` and `python -m t2l`: Ctrl-C ends cleanly before anything else is imported; then the command line runs."""

import os
import signal
from types import FrameType


def main() -> None:
    """Entry point of `t2l`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where who called has Ctrl-C ignored
        signal.signal(signal.SIGINT, _interrupted)
    from t2l import cli

    cli.main()


def _interrupted(_: int, frame: FrameType | None) -> None:
    """Ctrl-C, raised as ever; while something is imported it ends the process at once.

    torch imports NumPy from C and takes whatever is raised there for NumPy's absence, and other packages have a bare
    `except` around an import: the command went on, or failed with an error of theirs.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
