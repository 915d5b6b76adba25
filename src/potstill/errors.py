"""The one error that a user sees, and the words that help them out of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MISTAKES = 20  # lines of one message, at most


def one_line(text: str, most: int = 1200) -> str:
    r"""Text from anywhere as a terminal may print it: one line, no control characters, cut in its middle where too long.

    Example:
        >>> print(one_line("a\x1b[2J\nb"))
        a\x1b[2J\nb
    """

    def cut(text: str) -> str:
        return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"

    text = cut(text)
    if text.isprintable():
        return text
    return cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


class PotstillError(ValueError):
    r"""A mistake that the user can mend: one line, naming the argument, its value and what is allowed.

    The command line prints it on standard error and exits with code 2; Python code catches it as a
    `ValueError`. Words from files go into messages as they are: what a terminal would act on is escaped here, and what
    is too long is cut in its middle.

    Args:
        lines: The message; where several mistakes are named at once, a line for each.

    Example:
        >>> print(PotstillError("no class '\x1b[31m'"))
        no class '\x1b[31m'
    """

    def __init__(self, *lines: object) -> None:
        more = [f"... and {len(lines) - MISTAKES} more"] if len(lines) > MISTAKES else []
        shown = [one_line(str(line), 1200 if len(lines) == 1 else 300) for line in lines[:MISTAKES]]
        super().__init__("\n  ".join([*shown, *more]))


class Stopped(RuntimeError):
    """A run that ended before its last step, with everything that is good so far on disk (exit code 1)."""


class NoMemory(Stopped):
    """Memory has run out in the middle of something; what was done before it is good."""


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
    names, name = sorted(allowed), one_line(str(name), 100)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    if close:
        tail = "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    else:
        tail = "there are: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    joint = " " if close else "; "
    return PotstillError(f"no {kind} '{name}'; {tail}" + (f"{joint}{hint}" if hint else ""))
