"""What befalls a process from outside: a request to end, and memory that runs out."""

from __future__ import annotations

import errno
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import NoMemory, Stopped, Terminated

WORDS = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "bad_alloc",
    "could not create a memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's for a GPU
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


@contextmanager
def memory_said(what: str) -> Iterator[None]:
    """Turn a lack of memory into one line, and let go of what was being computed, so that the state can be saved.

    Args:
        what: What was being computed, and what is kept.

    Raises:
        NoMemory: Memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, Stopped) or not out_of_memory(error):
            raise
        line = no_memory(error)
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        raise NoMemory(f"{what}: {line}") from None


def no_memory(error: BaseException) -> str:
    """A lack of memory in words."""
    said = next(iter(str(error).splitlines()), "")[:120]
    return "memory has run out" + (f" ({said})" if said else "") + "; a smaller network or batch needs less"


def on_terminate() -> Callable[[], None]:
    """Let SIGTERM, which ends a process unheard, raise `Terminated` from now on, as Ctrl-C raises KeyboardInterrupt.

    Returns:
        What sets things back.
    """

    def raised(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, raised)
    except ValueError:  # not in the main thread, where no signal arrives
        return lambda: None

    def back() -> None:
        signal.signal(signal.SIGTERM, before)

    return back
