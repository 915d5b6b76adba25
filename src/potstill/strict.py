"""Files from strangers, read strictly: what is too deep, too large or no plain text and numbers is refused by name.

Every function raises a plain `ValueError`, which says what is wrong; who reads the file knows its name.
"""

from __future__ import annotations

import io
import json
import math
import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

DEPTH = 64  # of tables in tables; what is written here has about ten
TOML = 1 << 20  # bytes of a recipe, or of a benchmark's rows
WHOLE = 1 << 64  # a number of more bits is none of ours
RATIO = (
    200  # times that an archive may grow, where it is larger than `SMALL`: pictures with large plain areas stay below
)
SMALL = 64 << 20  # bytes that may be as empty as they like
MEMBERS = 10000  # of an archive
_DEEP = re.compile(
    r"(?:\.[ \t]*(?:[\w-]+|'[^'\n]*'|\"[^\"\n]*\")[ \t]*){40}|(?:\[\s*){64}"
)  # a.a.a: what tomllib takes is the square of it


def read_json(content: bytes | str, finite: bool = True) -> Any:
    """JSON as this project writes it: text that can be written again, finite numbers, not too deep.

    Args:
        content: The text.
        finite: Whether infinity and NaN, which JSON does not have but Python's does, are refused.

    Raises:
        ValueError: It is none, or holds something else.

    Example:
        >>> read_json('{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
    """
    try:
        plain = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_plain(plain, finite)
    return plain


def check_plain(plain: Any, finite: bool = True) -> None:
    """Refuse plain values that cannot go on into files, pages and tensors.

    Raises:
        ValueError: Deeper than `DEPTH`, a number that is not finite or has more than 64 bits, half a character.
    """
    level = [plain]
    for _ in range(DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list | tuple):
                inner += value
            elif isinstance(value, str):
                if not value.isascii():
                    value.encode()  # a UnicodeEncodeError is a ValueError
            elif finite and isinstance(value, float) and not math.isfinite(value):
                raise ValueError("it holds a number that is not finite")
            elif isinstance(value, int) and abs(value) >= WHOLE:
                raise ValueError("it holds a whole number of more than 64 bits")
        if not inner:
            return
        level = inner
    raise ValueError("it is nested too deeply")


def read_toml(file: Path) -> dict[str, Any]:
    """A file of TOML, of a size and depth at which reading takes neither time nor memory.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no TOML, too large or too deep.
    """
    with file.open("rb") as opened:
        content = opened.read(TOML + 1)
    if len(content) > TOML:
        raise ValueError(f"it has more than {TOML:,} bytes")
    text = content.decode()
    if _DEEP.search(text):
        raise ValueError("it is nested too deeply")
    try:
        plain = tomllib.loads(text)
        check_plain(plain, finite=False)  # TOML has words for them: a field says what it takes
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return plain


def check_archive(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip archive by name, none of them read so far.

    What a member says of its size bounds what is read of it, so that a bomb is seen before it takes memory.

    Raises:
        ValueError: Two members of one name, too many, an encrypted one, or an archive that would grow beyond measure.
        zipfile.BadZipFile: No archive.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    with zipfile.ZipFile(file) as opened:
        found = opened.infolist()
    names = {i.filename: i for i in found}
    if len(found) > MEMBERS or len(names) < len(found):
        raise ValueError(f"its {len(found)} members are too many, or several have one name")
    if any(i.flag_bits & 1 for i in found):
        raise ValueError("it is encrypted")
    total = sum(i.file_size for i in found)
    if total > max(SMALL, RATIO * size):
        raise ValueError(f"its {size:,} bytes would become {total:,}: that is no data but an archive bomb")
    file.seek(0)
    return names


def check_arrays(file: BinaryIO, wanted: list[str]) -> None:
    """See that arrays of a `.npz` have the size that their headers promise, before any memory is taken for them.

    Args:
        file: The archive.
        wanted: Names of its arrays.

    Raises:
        ValueError: An array that holds objects, or more or fewer numbers than it says; and as `check_archive`.
    """
    from numpy.lib import format as npy

    names = check_archive(file)
    with zipfile.ZipFile(file) as opened:
        for name in wanted:
            member = names.get(f"{name}.npy") or names[name]
            with opened.open(member) as stream:
                version = npy.read_magic(stream)
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
                if read is None:
                    raise ValueError(f"{name} has a header of version {version}")
                shape, _, dtype = read(stream, max_header_size=2000)
                if dtype.hasobject:
                    raise ValueError(f"{name} holds Python objects, which are not read")
                there = member.file_size - stream.tell()
                if min(shape, default=1) < 0 or len(shape) > 32 or math.prod(shape) * dtype.itemsize != there:
                    raise ValueError(f"{name} says {_short(shape)} of {str(dtype)[:20]} and has {there:,} bytes")
    file.seek(0)


def _short(shape: tuple[int, ...]) -> str:
    return str(shape if len(shape) < 9 else (*shape[:8], ...))[:100]
