"""Files that notice damage: a checkpoint with a checksum of all that it holds, and the one before it kept beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save as encode
from torch import Tensor

from . import records
from .errors import PotstillError
from .exchange import HEADER, read_tensors

CHECKPOINT = "checkpoint.safetensors"
BEFORE = "checkpoint-before.safetensors"

T = TypeVar("T")


class OtherVersion(PotstillError):
    """A file that is whole, but of another format."""


def seal_of(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """Hash of a file's contents: every name, type, shape and number, and the header."""
    total = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def before_of(file: Path) -> Path:
    """Where the checkpoint before a given one is kept."""
    return file.with_name(f"{file.stem}-before{file.suffix}")


def write_checkpoint(file: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a checkpoint; when the new one is whole on disk, the last one takes the place of the one before.

    Args:
        file: Its place.
        tensors: By name.
        header: Plain values.

    Raises:
        Unwritable: The disk is full or the folder cannot be written to; both old files are untouched.
    """
    records.write_whole(file, encoded(tensors, header), keep=before_of(file))


def encoded(tensors: dict[str, Tensor], header: dict[str, Any]) -> bytes:
    """The contents of a file that `read_sealed` reads."""
    plain = json.loads(json.dumps(header))  # as it will be read
    sealed = json.dumps({**plain, records.SEAL: seal_of(tensors, plain)})
    return encode(tensors, metadata={HEADER: sealed})


def read_sealed(file: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file, held against its checksum; one from before there were checksums has none.

    Raises:
        PotstillError: It is damaged or another program's.
    """
    tensors, header, text = read_tensors(file, kind)
    seal = header.pop(records.SEAL, None)
    # another spelling of the same numbers, 1E-05 for 1e-05, is a flipped bit as well
    if seal is not None and (seal != seal_of(tensors, header) or text != json.dumps({**header, records.SEAL: seal})):
        raise PotstillError(f"{file} is damaged (its contents do not have the checksum that it names)")
    return tensors, header


def newest(file: Path, read: Callable[[Path], T], say: Callable[[str], None]) -> T | None:
    """What the newest checkpoint that is whole holds; nothing where there is none.

    A damaged one is replaced by the one before it, so that saving again cannot put it in that one's place.

    Args:
        file: Its place.
        read: A file's contents; raises PotstillError where it is damaged.
        say: Receives the line that the one before is used.

    Raises:
        PotstillError: All that there are are damaged, or of another version.
    """
    before = before_of(file)
    if not file.exists():
        return read(before) if before.exists() else None
    try:
        return read(file)
    except OtherVersion:
        raise
    except PotstillError as error:
        if not before.exists() or isinstance(error.__cause__, OSError):  # unread is not damaged
            raise
        try:
            found = read(before)
        except PotstillError as other:
            raise PotstillError(f"{error}, and so is {before.name} before it; --force starts again") from other
        say(f"{error}: the one before it is used")
        records.replace(before, file)
        return found
