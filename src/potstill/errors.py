"""The one error that a user sees, and the words that help them out of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PotstillError(ValueError):
    """A mistake that the user can mend: one line, naming the argument, its value and what is allowed.

    The command line prints it on standard error and exits with code 2; Python code catches it as a
    `ValueError`.
    """


class Stopped(RuntimeError):
    """A run that ended before its last step, with everything that is good so far on disk (exit code 1)."""


class Unwritable(PotstillError, Stopped):
    """A file that could not be written: a full disk or a place without permission. What was there is untouched."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM: as Ctrl-C, but with exit code 143. Only the command line asks for it."""


def unknown(kind: str, name: str, allowed: Iterable[str], hint: str = "") -> PotstillError:
    """An error for a name that does not exist, with the nearest ones that do.

    Args:
        kind: What was looked for, in the singular: "method", "network".
        name: What was asked for.
        allowed: Every name that exists.
        hint: A closing sentence, such as which command lists them all.

    Example:
        >>> str(unknown("method", "dsm", ["dm", "random"], "`potstill list methods` shows all"))
        "no method 'dsm'; did you mean 'dm'? `potstill list methods` shows all"
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    if close:
        tail = "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    else:
        tail = "there are: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    joint = " " if close else "; "
    return PotstillError(f"no {kind} '{name}'; {tail}" + (f"{joint}{hint}" if hint else ""))
