"""The workplace of a benchmark: a results folder, data loaded once, and locks among the processes that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from .data import Data, load_data
from .errors import PotstillError
from .judge import Judge, protocol_of
from .records import digest

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """Where a benchmark works, and how.

    Args:
        out: The results folder: a record for each cell (`cells/`), the sets (`runs/`), and the recordings (`experts/`)
            that they were made of.
        exchange: Names of data to others that stand for them: `{"cifar10": "hf:cifar10-jpeg75"}`.
        zoo: Whether a set of the zoo is taken, where there is one, in place of making it.
        data_root: Folder of downloaded data.
        device: Where to compute.
        compile: `auto`, `on` or `off`.
        precision: `auto`, `fp32` or `bf16`.
        say: Receives lines for the user.
        bar: Makes a progress bar of a length, a title and a start.
    """

    out: Path
    exchange: Mapping[str, str] = field(default_factory=dict)
    zoo: bool = True
    data_root: str | Path | None = None
    device: str = "cpu"
    compile: str = "auto"
    precision: str = "auto"
    say: Say = lambda line: None
    bar: Callable[[int, str, int], Any] | None = None
    loaded: dict[str, Data | PotstillError] = field(default_factory=dict)

    def data(self, name: str) -> Data:
        """Data by name, or those that stand for them, loaded once.

        Raises:
            PotstillError: They are not here; the same error each time.
        """
        name = self.exchange.get(name, name)
        if name not in self.loaded:
            try:
                self.loaded[name] = load_data(name, self.data_root)
            except PotstillError as error:
                self.loaded[name] = error
        found = self.loaded[name]
        if isinstance(found, PotstillError):
            raise found
        return found

    def judge(self, data: Data, protocol: str, repeats: int) -> Judge:
        """The judge of a cell."""
        asked = protocol_of(protocol)
        how = (self.device, self.compile, self.precision, self.say, self.bar)
        return Judge(data, asked, repeats, 0, *how, unfinished=self.out / "unfinished")

    @contextmanager
    def locked(self, path: Path, wait: bool = False) -> Iterator[None]:
        """Sole use of what a path stands for, among all processes on the folder; a process that dies gives it back.

        Raises:
            filelock.Timeout: Another process has it, and this one does not wait.
        """
        lock = self.out / "locks" / f"{digest(str(path.relative_to(self.out)))}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=-1 if wait else 0):
            yield
