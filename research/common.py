"""What the scripts share."""

import sys
from collections.abc import Callable

from t2l.errors import T2LError


def exit_code(run: Callable[[], None]) -> int:
    """Runs a script: 0; 1 after one line that says why it failed; 130 if it was interrupted."""
    try:
        run()
    except T2LError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
