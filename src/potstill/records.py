"""Files that are either whole or not there: JSON records and everything else that is written."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from .errors import PotstillError, Stopped

FORMAT = 1


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at any moment, also after a crash, it holds the old content or the new one, whole.

    Raises:
        Stopped: The disk is full or the folder cannot be written to; the old file is untouched.
    """
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise Stopped(
            f"{path.name} cannot be written in {path.parent} ({error.strerror}); what was there is untouched"
        ) from error
    finally:
        if name and os.path.exists(name):
            os.unlink(name)


def write_json(path: Path, record: Any) -> None:
    """A record as JSON, whole."""
    write_whole(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """A record.

    Raises:
        PotstillError: It is not there or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PotstillError(f"{path} is not a whole record ({type(error).__name__})") from error


def cache(room: str) -> Path:
    """A folder of costly results below `$POTSTILL_CACHE`, or the user's own cache."""
    return Path(os.environ.get("POTSTILL_CACHE") or Path.home() / ".cache" / "potstill") / room


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
