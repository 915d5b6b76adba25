"""A folder that a run writes to: what may lie in it, and that one process at a time has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import PotstillError, Unwritable

LOCK = ".lock"


@contextmanager
def opened(out: Path, resume: bool, force: bool, ours: Callable[[str], bool]) -> Iterator[None]:
    """Make a run's folder, or see that an existing one may be used; no other process has it until the end.

    Args:
        out: The folder.
        resume: Whether what is there is to be continued.
        force: Whether it is to be deleted.
        ours: Whether a file of a given name is one that the run writes.

    Raises:
        PotstillError: It holds something else, or a run that was not to be continued, or another process works in it.
    """
    if resume and force:
        raise PotstillError("--resume continues a run and --force starts it again; give one of them")
    contents(out, ours)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PotstillError(f"--out {out} cannot be made ({error.strerror})") from error
    with sole(out):
        inside = contents(out, ours)
        if inside and not resume and not force:
            raise PotstillError(f"--out {out} holds a run already; --resume continues it, --force starts it again")
        for path in out.iterdir():
            if path.name != LOCK and (force or not ours(path.name)):  # what a killed process left half-written
                path.unlink()
        yield


def contents(out: Path, ours: Callable[[str], bool]) -> list[str]:
    """Names of a run's files in a folder, those that a killed process left half-written included.

    Raises:
        PotstillError: It holds something else, or is no folder.
    """
    try:
        if out.exists() and not out.is_dir():
            raise PotstillError(f"--out {out} is a file; a folder is needed")
        inside = sorted(p.name for p in out.iterdir() if p.name != LOCK) if out.is_dir() else []
    except OSError as error:
        raise PotstillError(f"--out {out} cannot be used ({error.strerror})") from error
    # a killed process leaves files half-written under the name that `write_whole` gives them meanwhile
    foreign = [
        n
        for n in inside
        if (out / n).is_dir() or not (ours(n) or (n.startswith(".") and ours(n[1:].rpartition(".")[0])))
    ]
    if foreign:
        raise PotstillError(
            f"--out {out} holds something else ({foreign[0]}); name a folder that is empty or not there"
        )
    return inside


@contextmanager
def sole(out: Path) -> Iterator[None]:
    """Sole use of a folder that is there; a process that dies gives it back.

    Raises:
        PotstillError: Another process has it.
        Unwritable: Nothing can be written in it.
    """
    file = out / LOCK
    lock = FileLock(file, timeout=0)
    try:
        while True:
            file.touch()
            before = file.stat().st_ino
            lock.acquire()
            if file.exists() and file.stat().st_ino == before:
                break
            lock.release()  # a process that was just ending has taken the file away under our hands
    except Timeout as error:
        raise PotstillError(
            f"--out {out} is in use by another process; wait until it ends, or name another folder"
        ) from error
    except FileNotFoundError:  # taken away between two lines above
        raise PotstillError(f"--out {out} is in use by another process that is just ending; try again") from None
    except OSError as error:
        raise Unwritable(f"--out {out} cannot be written to ({error.strerror}); what was there is untouched") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is released: whoever waits for it looks whether it is still there
        lock.release()
