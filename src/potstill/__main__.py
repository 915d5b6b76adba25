"""`python -m potstill`."""

import os
import sys

from .cli import main
from .launch import launched


def _code() -> int:
    """What the command ends with; a process that another one of its group spoke for leaves by an exception."""
    try:
        return main()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)


code = _code()
if launched():  # threads of the process group that have not ended yet can abort an ordinary exit, its work done
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
