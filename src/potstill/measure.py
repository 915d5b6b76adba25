"""Run time and peak memory by phase."""

from __future__ import annotations

import resource
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch


def peak_bytes(device: str = "cpu") -> int:
    """The most memory that the process has had resident, or on a GPU the most that tensors have taken there."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: str = "cpu") -> None:
    """Begin a new peak where the system can (Linux, CUDA); elsewhere the peak is that of the whole process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _pages() -> tuple[int, int]:
    """Resident pages of the process, and those of them that are shared or of files."""
    resident, shared = Path("/proc/self/statm").read_bytes().split()[1:3]
    return int(resident), int(shared)


def anonymous_bytes() -> int:
    """Resident anonymous memory of the process now (RssAnon), without the pages of mapped files."""
    resident, shared = _pages()
    return (resident - shared) * resource.getpagesize()


class Anonymous:
    """The most resident anonymous memory while it is entered: looked at every few milliseconds from a thread beside.

    Linux only. What the system itself keeps, the most that was resident at all, less the most of it that was of files, serves
    for what lies between two looks.

    Args:
        every: Seconds between looks.
    """

    def __init__(self, every: float = 0.002) -> None:
        self.peak, self._shared, self._over = 0, 0, threading.Event()
        reset_peak()
        threading.Thread(target=_look, args=(weakref.ref(self), self._over, every), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self.look()
        self.peak = max(self.peak, peak_bytes() - self._shared)

    def look(self) -> int:
        """The most so far."""
        resident, shared = (pages * resource.getpagesize() for pages in _pages())
        self.peak, self._shared = max(self.peak, resident - shared), max(self._shared, shared)
        return self.peak


def _look(ref: weakref.ref[Anonymous], over: threading.Event, every: float) -> None:
    """Look until it is over, or nobody asks any more."""
    while not over.wait(every) and (seen := ref()) is not None:
        seen.look()
        del seen


class Clock:
    """Seconds per phase, added up over stops and resumes.

    Args:
        seconds: What earlier parts of the run have taken.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._open: list[str] = []
        self._since = 0.0

    def _settle(self) -> None:
        """Give the time since the last change to the innermost open phase."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside; a phase inside another is not counted in the outer one."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def rounded(self) -> dict[str, float]:
        """Seconds per phase for a record."""
        return {name: round(value, 3) for name, value in self.seconds.items()}


def cost(clock: Clock, seconds_per_step: float | None, device: str) -> dict[str, Any]:
    """The cost part of a record."""
    return {
        "phases": clock.rounded(),
        "seconds": round(sum(clock.seconds.values()), 3),
        "seconds_per_step": seconds_per_step and round(seconds_per_step, 5),
        "peak_bytes": peak_bytes(device),
    }
