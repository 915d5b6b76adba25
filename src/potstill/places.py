"""Where things lie that are reached by name: what comes with the package, and sets of the zoo."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from .errors import PotstillError, unknown

ZOO = "POTSTILL_ZOO"
NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,63}/){2}[1-9][0-9]{0,5}", re.ASCII)  # data/method/ipc: no way out of a folder
SET = "set.safetensors"
IN_ZOO = "zoo:"  # before a name in a record, where a path would stand
IN_FILE = "file:"  # before the name of a file that a row brings
HINT = f"`potstill list zoo` shows all, {ZOO} names folders of more; a path must be that of a folder with a {SET}, or of such a file"


def shipped(name: str) -> Path | None:
    """A folder that comes with the package: the repository's where that is a checkout, else the one in the wheel.

    Args:
        name: Its path in the repository: `zoo` or `benchmarks`. In the wheel they are `potstill/_zoo` and
            `potstill/_benchmarks`.

    Returns:
        The folder, or nothing where neither is there.
    """
    package = Path(__file__).resolve().parent
    checkout = [package.parent.parent / name] if package.parent.name == "src" else []
    places = [*checkout, package / f"_{name}"]
    return next((p for p in places if p.is_dir()), None)


def folders() -> list[Path]:
    """Where sets of the zoo are looked for, the first one first: those of `POTSTILL_ZOO`, then the shipped one.

    Raises:
        PotstillError: The variable names a folder that is not there.
    """
    own = [Path(part).expanduser() for part in os.environ.get(ZOO, "").split(os.pathsep) if part]
    for folder in own:
        if not folder.is_dir():
            raise PotstillError(f"{ZOO} names {folder}, which is no folder")
    there = shipped("zoo")
    return own if there is None else [*own, there]


def inside(folder: Path) -> dict[str, Path]:
    """Every set in a zoo by its name, and its folder.

    Raises:
        PotstillError: The zoo is not there.
    """
    if not folder.is_dir():
        raise PotstillError(f"no folder {folder}")
    found = {file.parent.relative_to(folder).as_posix(): file.parent for file in folder.glob(f"*/*/*/{SET}")}
    return {name: found[name] for name in sorted(filter(NAME.fullmatch, found), key=_order)}


def sha256(folder: Path) -> str:
    """That of the set in a folder; nothing where none is."""
    file = folder / SET
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def names() -> dict[str, Path]:
    """Every set of all zoos by its name, and its folder; of two with one name the first."""
    found: dict[str, Path] = {}
    for folder in reversed(folders()):
        found |= inside(folder)
    return {name: found[name] for name in sorted(found, key=_order)}


def _order(name: str) -> tuple[str, str, int]:
    data, method, ipc = name.split("/")
    return data, method, int(ipc)


def find(name: str) -> Path:
    """The folder of a set of the zoo.

    Args:
        name: `data/method/ipc`, such as `fashion-mnist/dm/1`.

    Raises:
        PotstillError: No name of this form, or no set of this name.
    """
    if not NAME.fullmatch(name):
        raise PotstillError(
            f"{name[:100]!r} is no name of a set: data/method/ipc is, such as fashion-mnist/dm/1; {HINT}"
        )
    for folder in folders():
        if (folder / name / SET).is_file():
            return folder / name
    raise unknown("set", name, names(), HINT)


def locate(path: str | Path) -> Path:
    """What a user means by a path or a name: a path that is there wins, even over a name of the zoo.

    Raises:
        PotstillError: Something of a name's form that is neither.
    """
    name = path.as_posix() if isinstance(path, Path) else path.removesuffix("/")
    return find(name) if not os.path.exists(path) and NAME.fullmatch(name) else Path(path)
