"""The training of networks that was cut off: kept now and then, and gone on with, on the same machine to the same bits.

What is kept is insurance: where it cannot be written, or is damaged, the training goes on or begins anew without it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import PotstillError
from .exchange import pack, unpack
from .functional import Tree
from .records import software, sweep, write_whole
from .sealed import encoded, read_sealed

FORMAT = 1
# Seconds from one writing to the next, as for the checkpoints of a run; a training that takes no longer is never written.
EVERY = 30.0


@dataclass
class Unfinished:
    """Where one training is kept while it lasts.

    Args:
        file: Its place, this training's own.
        mark: Of everything that its numbers hang on (`mark_of`); a file with another one is not gone on with.
        earlier: Seconds that were spent on it before, by this process or by another that trains the same.
    """

    file: Path
    mark: str
    earlier: float = 0.0
    _begun: float = field(default_factory=time.perf_counter)
    _last: float = field(default_factory=time.perf_counter)

    def begun(self) -> tuple[list[Tree], int, Tree]:
        """States of the networks that are done, steps of those under way, and their state; nothing done where no file is,
        or a damaged one."""
        if not self.file.exists():
            return [], 0, None
        try:
            tensors, header = read_sealed(self.file, "training")
            if (header["format"], header["mark"], header["machine"]) != (FORMAT, self.mark, software("")):
                return [], 0, None
            done, step, now = unpack(header["tree"], tensors)
            self.earlier = float(header["seconds"])
            return list(done), int(step), now
        except (PotstillError, OSError, KeyError, ValueError, TypeError, RuntimeError):
            return [], 0, None

    def keep(self, done: Sequence[Tree], step: int, now: Tree) -> None:
        """Write what there is, if the last time is long enough ago and the disk allows it."""
        moment = time.perf_counter()
        if moment - self._last < EVERY:
            return
        tensors: dict[str, Tensor] = {}
        tree = pack(([tuple(s) for s in done], step, now), tensors)
        header = {"format": FORMAT, "mark": self.mark, "machine": software(""), "tree": tree, "seconds": round(self.seconds, 3)}  # fmt: skip
        with suppress(PotstillError, OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            sweep(self.file)
            write_whole(self.file, encoded(tensors, header))
        self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent so far, on all beginnings."""
        return self.earlier + time.perf_counter() - self._begun

    def end(self) -> None:
        """The outcome of the training is on disk, or is none that anybody wants."""
        with suppress(OSError):
            self.file.unlink(missing_ok=True)


def mark_of(sets: Sequence[tuple[Tensor, Tensor]], *parts: Any) -> str:
    """A hash of sets (inputs, labels), bit by bit, and of values that have a `repr` of their own."""
    total = hashlib.blake2b(repr(parts).encode(), digest_size=16)
    known: dict[int, bytes] = {}  # the same set for each network is looked at once
    for tensor in (t for pair in sets for t in pair):
        if id(tensor) not in known:
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            shape = repr((tensor.dtype, tuple(tensor.shape))).encode()
            known[id(tensor)] = hashlib.blake2b(raw.data, digest_size=16).digest() + shape
        total.update(known[id(tensor)])
    return total.hexdigest()
