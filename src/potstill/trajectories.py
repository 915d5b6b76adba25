"""Recorded experts: how the numbers of trained networks lie in files, and how they are read again, row by row.

A folder holds `experts.json`, which says what was trained on what and how, and one safetensors file per expert with
`params` (E + 1, P) and, where the network has any, `buffers` (E + 1, B): row e is the network after e epochs, laid out
flat in the order that the index states. Reading maps the file and touches the row that is wanted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .arrays import first_line
from .data import Data
from .errors import PotstillError
from .functional import Key
from .networks import Network, State
from .records import digest, unsealed
from .strict import read_json
from .transforms import describe

FORMAT = 1
INDEX = "experts.json"


def file_of(expert: int) -> str:
    """Name of an expert's file."""
    return f"expert-{expert:03d}.safetensors"


@dataclass(frozen=True)
class Layout:
    """Named tensors as one row of float32 numbers, and back.

    Args:
        parts: (name, shape, type) of each tensor in order. Whole numbers, such as positions that a module keeps in a
            buffer, lie in the row as floats.

    Example:
        >>> layout = Layout.of({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        >>> layout.size, {k: tuple(v.shape) for k, v in layout.tensors(torch.arange(8.0)).items()}
        (8, {'weight': (2, 3), 'bias': (2,)})
    """

    parts: tuple[tuple[str, tuple[int, ...], str], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """That of the given tensors, in their order.

        Raises:
            PotstillError: A number that float32 does not hold.
        """
        for name, t in tensors.items():
            if t.dtype != torch.float32 and (t.is_floating_point() or not torch.equal(t, t.float().to(t.dtype))):
                raise PotstillError(f"experts hold float32 numbers; '{name}' of the network is {t.dtype}")
        return cls(tuple((k, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in tensors.items()))

    @classmethod
    def read(cls, plain: Any) -> Layout:
        """What `plain` gave."""
        return cls(tuple((str(name), tuple(map(int, shape)), str(dtype)) for name, shape, dtype in plain))

    @property
    def plain(self) -> list[list[Any]]:
        """For an index."""
        return [[name, list(shape), dtype] for name, shape, dtype in self.parts]

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return sum(math.prod(shape) for _, shape, _ in self.parts)

    def row(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One row (size,) on the CPU."""
        flat = [tensors[name].detach().to("cpu", torch.float32).flatten() for name, _, _ in self.parts]
        return torch.cat(flat) if flat else torch.zeros(0)

    def tensors(self, row: Tensor) -> dict[str, Tensor]:
        """The tensors of a row, each with memory of its own."""
        pieces = row.split([math.prod(shape) for _, shape, _ in self.parts])
        named = zip(self.parts, pieces, strict=True)
        return {n: piece.clone().view(shape).to(getattr(torch, dtype)) for (n, shape, dtype), piece in named}


def digest_of(params: Tensor, buffers: Tensor) -> str:
    """Hash of the rows of one epoch: a changed bit in a file does not go unseen."""
    total = hashlib.blake2b(digest_size=8)
    for row in (params, buffers):
        total.update(row.contiguous().numpy().data)
    return total.hexdigest()


@dataclass(frozen=True)
class Trajectories:
    """Recorded experts, open for reading.

    Args:
        folder: Where they lie.
        meta: What `experts.json` holds.

    Example:
        >>> experts = open_experts("experts/digits")  # doctest: +SKIP
        >>> experts.state(expert=0, epoch=2).params["conv1/weight"].shape  # doctest: +SKIP
    """

    folder: Path
    meta: dict[str, Any]

    @property
    def count(self) -> int:
        """Experts that are recorded to their end."""
        return len(self.meta["experts"])

    @property
    def epochs(self) -> int:
        """Epochs of each; there is one more row, the start."""
        return int(self.meta["epochs"])

    @property
    def mark(self) -> str:
        """A hash of the recording as it is now: the same as long as no expert is added or recorded anew."""
        return digest(self.meta)

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of parameters and of buffers."""
        return Layout.read(self.meta["params"]), Layout.read(self.meta["buffers"])

    def state(self, expert: int, epoch: int) -> State:
        """An expert's network after the given number of epochs; 0 is the start.

        Raises:
            PotstillError: There is no such expert or epoch, or its file is missing, damaged or another one's.
        """
        for what, value, most in (("expert", expert, self.count - 1), ("epoch", epoch, self.epochs)):
            if not 0 <= value <= most:
                raise PotstillError(f"the experts in {self.folder} have no {what} {value}; the last one is {most}")
        file, layouts = self.folder / file_of(expert), self.layouts
        params, buffers = read_rows(file, layouts, self.epochs, epoch)
        _check_row(file, (params, buffers), epoch, self.meta["experts"][expert]["rows"][epoch])
        return State(layouts[0].tensors(params), layouts[1].tensors(buffers))

    def check(self, network: Network, data: Data) -> None:
        """Refuse experts of something else.

        Args:
            network: What is to go on from the experts' numbers.
            data: What is distilled, its held-out part taken away.

        Raises:
            PotstillError: Another network, other data, another transform, or experts that have seen what is held out.
        """
        meta, where = self.meta, f"the experts in {self.folder} are"
        again = f"`potstill experts {data.name} --network {network.name}` records others"
        if meta["network"] != network.name:
            raise PotstillError(f"{where} of network '{meta['network']}', not of '{network.name}'; {again}")
        if meta["fingerprint"] != data.fingerprint:
            raise PotstillError(
                f"{where} of data '{meta['data']}' (fingerprint {meta['fingerprint']}), "
                f"not of '{data.name}' ({data.fingerprint}); {again}"
            )
        said = describe(data.transform)
        if meta["transform_digest"] != digest(said):
            raise PotstillError(
                f"{where} of transform '{meta['transform']['name']}' ({meta['transform_digest']}), "
                f"not of '{said['name']}' ({digest(said)}); --transform chooses one"
            )
        for mine, theirs in zip(self.layouts, map(Layout.of, network.init(Key(0))), strict=True):
            if mine != theirs:
                pair = [f"{len(x.parts)} tensors of {x.size} numbers" for x in (mine, theirs)]
                raise PotstillError(
                    f"{where} of another network '{network.name}' ({pair[0]}) than this one ({pair[1]})"
                )
        if len(data.heldout) > meta["heldout"]:
            raise PotstillError(
                f"{where} trained with --holdout {meta['holdout']:g}: they have seen some of the "
                f"{len(data.heldout)} samples that are held out here; take that --holdout here, or record others"
            )


def read_rows(file: Path, layouts: tuple[Layout, Layout], epochs: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Parameters (P,) and buffers (B,) of one epoch: views of the mapped file, of which nothing else is read.

    Raises:
        PotstillError: The file is missing, damaged or holds something else.
    """
    rows = []
    try:
        with safe_open(file, framework="pt") as opened:
            for name, layout in zip(("params", "buffers"), layouts, strict=True):
                if not layout.size:
                    rows.append(torch.zeros(0))
                    continue
                part = opened.get_slice(name)
                found, wanted = (part.get_dtype(), list(part.get_shape())), ("F32", [epochs + 1, layout.size])
                if found != wanted:
                    raise PotstillError(f"{file} is damaged: its {name} are {found}, not {wanted}")
                rows.append(part[epoch : epoch + 1][0])
    except FileNotFoundError as error:
        raise PotstillError(f"{file} is missing, though {INDEX} names it") from error
    except (SafetensorError, OSError, RuntimeError) as error:
        raise PotstillError(f"{file} is damaged or no expert's file ({first_line(error)})") from error
    return rows[0], rows[1]


def _check_row(file: Path, rows: tuple[Tensor, Tensor], epoch: int, digest: str) -> None:
    if digest_of(*rows) != digest:
        raise PotstillError(f"{file} is damaged: epoch {epoch} does not have the hash that {INDEX} names")


def check_expert(file: Path, layouts: tuple[Layout, Layout], digests: Sequence[str]) -> None:
    """Read an expert's file from end to end.

    Args:
        file: The expert's.
        layouts: Of parameters and buffers.
        digests: Of each epoch's rows, as the index has them.

    Raises:
        PotstillError: The file is missing, damaged or another one's.
    """
    for epoch, wanted in enumerate(digests):
        _check_row(file, read_rows(file, layouts, len(digests) - 1, epoch), epoch, wanted)


def read_index(folder: Path) -> dict[str, Any]:
    """What `experts.json` holds, its parts checked.

    Raises:
        PotstillError: It is not there, damaged, or of another format version.
    """
    file = folder / INDEX
    if not file.is_file():
        raise PotstillError(f"no experts in {folder}; `potstill experts DATA --out {folder}` records some")
    try:
        meta = unsealed(read_json(file.read_bytes()))
        if meta["format"] != FORMAT:
            raise PotstillError(f"{file} has format version {meta['format']}; this potstill reads version {FORMAT}")
        layouts, epochs = [Layout.read(meta[k]) for k in ("params", "buffers")], int(meta["epochs"])
        texts = all(isinstance(meta[k], str) for k in ("network", "data", "fingerprint", "transform_digest"))
        dtypes = all(isinstance(getattr(torch, d, None), torch.dtype) for x in layouts for _, _, d in x.parts)
        rows = all(len(e["rows"]) == len(e["heldout_accuracy"] or e["rows"]) == epochs + 1 for e in meta["experts"])
        typed = type(meta["epochs"]) is type(meta["heldout"]) is int and type(meta["holdout"]) in (int, float)
        numbers = typed and meta["holdout"] >= 0 <= meta["heldout"] and epochs >= 1 and layouts[0].size >= 1
        if not (texts and dtypes and rows and numbers and meta["transform"]["name"]):
            raise ValueError("its parts do not fit each other")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PotstillError):
            raise
        raise PotstillError(f"{file} is damaged ({type(error).__name__}: {first_line(error)})") from error
    return dict(meta)


def open_experts(folder: str | Path) -> Trajectories:
    """Open what `potstill experts` has recorded; while it still records, the experts that are finished.

    Args:
        folder: With an `experts.json` in it.

    Raises:
        PotstillError: There is none, it is damaged or of another format version, or no expert is finished.
    """
    folder = Path(folder)
    made = Trajectories(folder, read_index(folder))
    if not made.count:
        raise PotstillError(f"no expert in {folder} is finished; `potstill experts ... --resume` goes on recording")
    return made
