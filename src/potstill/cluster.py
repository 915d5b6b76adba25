"""A benchmark's cells on a Ray cluster: each is a task in a process of its own, run again where that process dies.

Ray starts and watches processes, nothing else: what a cell makes goes to the shared results folder, under the same locks
and checkpoints as without it.
"""

from __future__ import annotations

import os
import platform
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .bench import Bench
from .benchmark import ABSENT, FAILED, MEMORY, Benchmark, Cell, Through, reason
from .compiling import keep_memory
from .errors import PotstillError
from .rows import CostRow, Row, Suite

RETRIES = 3  # more than one, for a machine may go away while it takes what another one left; a cell that kills its process ends
STORE = 80 << 20  # bytes of Ray's store of objects, its least: tasks hand over a few words
SHARED = ("POTSTILL_DATA", "POTSTILL_CACHE")  # a node's own settings go before the driver's


@dataclass(frozen=True)
class Order:
    """What a task is told: one cell, where it works and how.

    Args:
        suite: The cell's suite.
        row: Its row.
        mark: The driver's digest of all that its numbers depend on.
        bench: The driver's, its folder absolute.
        folder: The driver's working folder, from which paths of data count.
        places: The driver's settings of folders by name of the variable.
        threads: In which the cell computes.
    """

    suite: Suite
    row: Row | CostRow
    mark: str
    bench: Bench
    folder: str
    places: Mapping[str, str]
    threads: int


def carry_out(order: Order) -> tuple[str, list[str]]:
    """Run one cell in this process, which belongs to the task.

    Returns:
        The cell's fate and what it said.

    Raises:
        PotstillError: The results folder or the data are not those of the driver.
    """
    for name, place in order.places.items():
        os.environ.setdefault(name, place)
    if not order.bench.out.is_dir():
        raise PotstillError(
            f"the results folder is not there on {platform.node()}: all machines must share it, at the same path"
        )
    torch.set_num_threads(order.threads)  # as at the driver, for the same bits
    keep_memory()
    said: list[str] = []
    with chdir(order.folder) if Path(order.folder).is_dir() else nullcontext():
        work = Benchmark([order.suite], replace(order.bench, say=said.append, loaded={}))
        cell = work.again(order.suite, order.row)
        if cell.fate == ABSENT:
            raise PotstillError(f"absent on {platform.node()}: {cell.reason}")
        if cell.mark != order.mark:
            raise PotstillError(
                f"on {platform.node()} the data or the version of Potstill are others than at the driver"
            )
        return work.single(cell), said


@contextmanager
def on_ray(work: Benchmark, where: str) -> Iterator[Through]:
    """What runs a benchmark's cells on a Ray cluster, to which this process belongs meanwhile.

    A cell takes as many processors as this process has threads, and computes in as many: the bits are those of a run
    without Ray. A worker that dies is replaced, and its cell goes on from its checkpoint; one whose workers die `RETRIES`
    times more is recorded as failed.

    Args:
        work: The benchmark.
        where: `ray`, the cluster of `RAY_ADDRESS` or else one of this machine's processors, started for this run and
            reached from this machine only; `ray:HOST:PORT`, that cluster.

    Raises:
        PotstillError: Ray is not installed, the address is none, no cluster answers, or no machine of it has room for a cell.
    """
    kind, _, address = where.partition(":")
    if kind != "ray" or (where != "ray" and not address.rpartition(":")[2].isdigit()):
        raise PotstillError(f"--on {where!r} is no cluster; `ray` or `ray:HOST:PORT` is needed")
    if work.bench.device != "cpu":
        raise PotstillError(f"--on {where} runs cells on processors; --device {work.bench.device} goes without it")
    address = address or os.environ.get("RAY_ADDRESS", "")
    if (
        not address
    ):  # Ray reads both as it is imported: tell nobody, and do not take 127.0.0.1 for the network's address
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    try:
        import ray
    except ImportError as error:
        raise PotstillError(f"--on {where} needs Ray ({error}); pip install 'potstill[ray]'") from error
    try:
        before = signal.getsignal(signal.SIGTERM)
        _join(ray, address)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts one of its own there
        yield _Cells(ray, work, torch.get_num_threads())
    finally:
        ray.shutdown()  # with a cluster of our own; of another one, this run's workers


def _join(ray: Any, address: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if not address:
        ray.init("local", include_dashboard=False, object_store_memory=STORE, _node_ip_address="127.0.0.1", **quiet)
        return
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise PotstillError(f"no Ray cluster answers at {address} ({first})") from error


class _Cells:
    """A `Through`: cells as tasks.

    Args:
        ray: The module.
        work: The benchmark.
        threads: Of each cell.
    """

    def __init__(self, ray: Any, work: Benchmark, threads: int) -> None:
        self.ray, self.work = ray, work
        sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if max(sizes, default=0) < threads:
            raise PotstillError(
                f"a cell takes {threads} processors, as many as this process has threads, and no machine of the cluster "
                f"has more than {max(sizes, default=0)}; OMP_NUM_THREADS={max(sizes, default=1) or 1} sets fewer"
            )
        work.bench.say(f"Ray nodes: {len(sizes)}, cells at a time: {sum(size // threads for size in sizes)}")
        bench = replace(work.bench, out=work.bench.out.absolute(), say=_unheard, bar=None, loaded={})
        places = {name: os.environ[name] for name in SHARED if name in os.environ}
        self.order = lambda cell: Order(cell.suite, cell.row, cell.mark, bench, os.getcwd(), places, threads)
        # max_calls: a worker ends with its cell, so that a peak of memory and a thread count are that cell's alone
        self.task = ray.remote(num_cpus=threads, max_calls=1, max_retries=RETRIES)(carry_out)

    def __call__(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, str]]:
        waiting = {}
        for cell in cells:
            if cell.fate == ABSENT:
                yield cell, self.work.single(cell)
                continue
            name = self.work.name(cell.suite, cell.row)  # what `ps` shows of its worker
            waiting[self.task.options(name=name).remote(self.order(cell))] = cell
        while waiting:
            (ended,), _ = self.ray.wait(list(waiting), num_returns=1)
            yield (cell := waiting.pop(ended)), self._fate(cell, ended)

    def _fate(self, cell: Cell, ended: Any) -> str:
        """A cell's fate, its words said; where it ended without any, its record is made here."""
        errors = self.ray.exceptions
        try:
            fate, said = self.ray.get(ended)
        except errors.OutOfMemoryError:
            return self.work.lost(cell, MEMORY, "killed by the cluster's watch over memory")
        except errors.RayTaskError as error:
            cause = error.cause
            words = reason(cause, self.work.bench.out)
            return self.work.lost(
                cell, FAILED, words if isinstance(cause, PotstillError) else f"{type(cause).__name__}: {words}"
            )
        except errors.RayError as error:
            why = f"its process died {RETRIES + 1} times ({type(error).__name__})"
            return self.work.lost(cell, FAILED, why)
        for line in said:
            self.work.bench.say(line)
        return str(fate)


def _unheard(line: str) -> None:
    """A worker's lines are kept there and handed over at the end."""
