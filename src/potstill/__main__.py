"""`python -m potstill`."""

import os
import sys

from .cli import main
from .launch import launched

code = main()
if launched():  # threads of the process group that have not ended yet can abort an ordinary exit, its work done
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
