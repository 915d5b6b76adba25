"""Files that are either whole or not there: JSON records and everything else that is written."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import strict
from .errors import PotstillError, Unwritable

FORMAT = 1
SEAL = "checksum"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write_whole(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write a file so that at any moment, also after a crash, it holds the old content or the new one, whole.

    Args:
        path: The file.
        content: All of it.
        keep: Where the old file lies afterwards; it is put there when the new one is whole on disk.

    Raises:
        Unwritable: The disk is full or the folder cannot be written to; the old file is untouched.
    """
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        if keep is not None and path.exists():
            _link(path, keep)
        os.replace(name, path)
    except OSError as error:
        raise Unwritable(
            f"{path.name} cannot be written in {path.parent} ({error.strerror}); what was there is untouched"
        ) from error
    finally:
        if name and os.path.exists(name):
            os.unlink(name)


def _link(path: Path, other: Path) -> None:
    """Give a file another name, in place of what had it; where a system has no links, as its only name."""
    between = other.with_name(f".{other.name}.{os.getpid()}")
    between.unlink(missing_ok=True)  # of a killed process that had our number
    try:
        os.link(path, between)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.replace(path, other)
        return
    try:
        os.replace(between, other)  # does nothing where both are one file already
    finally:
        between.unlink(missing_ok=True)


def replace(path: Path, other: Path) -> None:
    """Put a file in the place of another.

    Raises:
        Unwritable: The folder cannot be written to; both are untouched.
    """
    try:
        os.replace(path, other)
    except OSError as error:
        raise Unwritable(
            f"{other.name} cannot be replaced in {other.parent} ({error.strerror}); what was there is untouched"
        ) from error


def sweep(path: Path) -> None:
    """Take away what a killed process left half-written of a file, where no other one writes it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        left.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Refuse a place where something would be lost.

    Raises:
        PotstillError: There is a file, or a folder that is not empty.
    """
    if path.is_dir() and not path.is_symlink():
        found = next(iter(sorted(p.name for p in path.iterdir())), None)
        if found is not None:
            raise PotstillError(f"--out {path} is a folder that is not empty ({found}); name a new one")
    elif path.exists() or path.is_symlink():
        raise PotstillError(f"--out {path} is there already; name a new one")


def write_folder(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a folder that is new or empty so far: with all of its files, or not at all.

    Args:
        path: The folder; those above it are made.
        files: Paths within it, with `/` between their parts, and contents.

    Raises:
        PotstillError: There is something at the path.
        Unwritable: The disk is full or the folder cannot be written; nothing is there.
    """
    check_free(path)
    draft: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:100]}."))
        for name, content in files:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(content)
        os.chmod(draft, 0o755)
        os.replace(draft, path)  # refused by the system where the folder has been filled meanwhile
    except OSError as error:
        raise Unwritable(
            f"{path.name} cannot be written in {path.parent} ({error.strerror}); nothing is left"
        ) from error
    finally:
        if draft is not None and draft.exists():
            shutil.rmtree(draft, ignore_errors=True)


def write_json(path: Path, record: Any) -> None:
    """A record as JSON, whole."""
    write_whole(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """A record as JSON, whole, with a checksum of its contents."""
    plain = json.loads(json.dumps(record, allow_nan=False))  # as it will be read
    write_json(path, {**plain, SEAL: _seal(plain)})


def unsealed(record: Any) -> Any:
    """A record without its checksum, if it has one.

    Raises:
        ValueError: Its contents are not those that the checksum was made of.
    """
    if not isinstance(record, dict) or SEAL not in record:
        return record
    plain = {k: v for k, v in record.items() if k != SEAL}
    if record[SEAL] != _seal(plain):
        raise ValueError("its contents do not have the checksum that it names")
    return plain


def _seal(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_json(path: Path) -> Any:
    """A record, held against its checksum if it has one.

    Raises:
        PotstillError: It is not there, not JSON, or damaged.
    """
    try:
        return unsealed(strict.read_json(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise PotstillError(f"{path} is not a whole record ({type(error).__name__})") from error


def cache(room: str) -> Path:
    """A folder of what can be made again, at a cost: below `POTSTILL_CACHE`, else `~/.cache/potstill`."""
    return Path(os.environ.get("POTSTILL_CACHE") or Path.home() / ".cache" / "potstill").expanduser() / room


def digest(value: Any) -> str:
    """A short hash of plain values: equal values, equal hash."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()


def software(device: str) -> dict[str, Any]:
    """Versions and machine, as far as they can change a number."""
    import torch

    from . import __version__

    return {
        "potstill": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "device": device},
    }


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
