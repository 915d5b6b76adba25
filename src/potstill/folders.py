"""Folders of images: `train/<class>/*` with `test/<class>/*` or `val/<class>/*`, and Tiny ImageNet's published layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import PotstillError
from .pictures import SUFFIXES, Listing, Pictures

LITTER = ("thumbs.db", "desktop.ini")  # what file managers leave, beside everything that begins with a dot


@dataclass(frozen=True)
class File:
    """An image file: its path, and its name below the data set's folder, size and time for the cache's stamp."""

    path: Path
    name: str
    size: int
    time: int


@dataclass(frozen=True)
class Found:
    """What lies in a folder: classes, and the files and labels of both parts."""

    class_names: tuple[str, ...]
    train: tuple[list[File], list[int]]
    test: tuple[list[File], list[int]]

    @property
    def stamp(self) -> list[object]:
        """Plain values that change when a file does."""
        return [
            list(self.class_names),
            *([[f.name, f.size, f.time, y] for f, y in zip(*p, strict=True)] for p in (self.train, self.test)),
        ]

    def listing(self) -> Listing:
        """For the decoder."""
        return Listing(self.class_names, _pictures(*self.train), _pictures(*self.test))


def _pictures(files: list[File], labels: list[int]) -> Pictures:
    def batch(start: int, stop: int) -> Sequence[tuple[str, bytes | Path]]:
        return [(said(f.name), f.path) for f in files[start:stop]]

    return Pictures(np.array(labels, dtype=np.int64), batch)


def said(name: str) -> str:
    """A file's name in one line, whatever is in it."""
    return name if name.isprintable() else repr(name)


def is_one(path: Path) -> bool:
    """Whether a path is that of a folder of images: there are folders in its `train`."""
    try:
        return any(e.is_dir() for e in _entries(path / "train"))
    except OSError:
        return False


def scan(folder: Path, name: str) -> Found:
    """Find classes and files; nothing is opened.

    Args:
        folder: With `train` and `test` or `val` in it; `test` is taken where both are there.
        name: Of the data, for messages.

    Raises:
        PotstillError: No test part, an empty class, classes that differ, something that is no image, a link that leads
            out of the folder.
    """
    part = next((p for p in ("test", "val") if (folder / p).is_dir()), None)
    if part is None:
        raise PotstillError(f"{name} has train/ but neither test/ nor val/; one of the two is needed")
    train, test = _classes(folder, "train", name), _classes(folder, part, name)
    for here, there, lack in ((train, test, part), (test, train, "train")):
        strange = [c for c in here if c not in there]
        if strange:
            other = part if lack == "train" else "train"
            raise PotstillError(
                f"{name}: {other}/ has the class folder '{said(strange[0])}' that {lack}/ lacks"
                + (f", and {len(strange) - 1} more" if strange[1:] else "")
                + "; both need the same classes"
            )
    if len(train) < 2:
        raise PotstillError(
            f"{name}: train/ has one class folder only ({said(next(iter(train)))}); at least two are needed"
        )
    names = tuple(train)
    parts = [
        ([f for c in names for f in files[c]], [i for i, c in enumerate(names) for _ in files[c]])
        for files in (train, test)
    ]
    return Found(names, parts[0], parts[1])


def _classes(folder: Path, part: str, name: str) -> dict[str, list[File]]:
    """Files of each class folder, both in the order of names."""
    _inside(folder, folder / part, part, name)
    classes = {}
    for entry in _entries(folder / part):
        inner = f"{part}/{entry.name}"
        _inside(folder, Path(entry.path), inner, name)
        if not entry.is_dir():
            raise PotstillError(
                f"{name}: {said(inner)} is no class folder; in {part}/ there are only folders of images"
            )
        classes[entry.name] = _images(folder, Path(entry.path), inner, name)
    if not classes:
        raise PotstillError(f"{name}: {part}/ has no class folders")
    return classes


def _images(folder: Path, inside: Path, inner: str, name: str) -> list[File]:
    """The images of one folder, which must have some and nothing else."""
    files = []
    for entry in _entries(inside):
        file = f"{inner}/{entry.name}"
        _inside(folder, Path(entry.path), file, name)
        if entry.is_dir():
            raise PotstillError(
                f"{name}: {said(file)} is a folder in a class folder; images lie directly in {said(inner)}"
            )
        if not entry.name.lower().endswith(SUFFIXES):
            raise PotstillError(f"{name}: {said(file)} is no image ({', '.join(SUFFIXES)}); remove it or move it away")
        stat = entry.stat()
        files.append(File(Path(entry.path), file, stat.st_size, stat.st_mtime_ns))
    if not files:
        raise PotstillError(f"{name}: the class folder {said(inner)} is empty; remove it or put images there")
    return files


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return sorted(
            (e for e in found if not e.name.startswith(".") and e.name.lower() not in LITTER), key=lambda e: e.name
        )


def _inside(folder: Path, path: Path, inner: str, name: str) -> None:
    """Refuse a link that leads out of the folder, or nowhere."""
    if not path.is_symlink():
        return
    if not path.exists():
        raise PotstillError(f"{name}: {said(inner)} is a link to nothing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise PotstillError(
            f"{name}: {said(inner)} is a link out of the data set's folder; put the files themselves there"
        )


def scan_tiny(folder: Path) -> Found:
    """Tiny ImageNet: `train/<wnid>/images/*`, `val/images/*` with classes in `val/val_annotations.txt`, `words.txt`.

    Raises:
        PotstillError: A part is missing, or does not fit the others.
    """
    name = "tiny-imagenet"
    wnids = [e.name for e in _entries(folder / "train")] if (folder / "train").is_dir() else []
    if len(wnids) < 2:
        raise PotstillError(f"{name}: {folder.name}/train has no class folders; unpack the archive again")
    rows = [line.split("\t") for line in _lines(folder, "val/val_annotations.txt")]
    label = {w: i for i, w in enumerate(wnids)}
    train = [_part(folder, f"train/{w}/images", name) for w in wnids]
    val = {f.path.name: f for f in _part(folder, "val/images", name)}
    files, labels = [], []
    for i, row in enumerate(rows, 1):
        if len(row) < 2 or row[0] not in val or row[1] not in label:
            raise PotstillError(
                f"{name}: line {i} of val/val_annotations.txt names no file of val/images and class of train/: "
                f"{said(' '.join(row[:2]))[:80]}"
            )
        files.append(val.pop(row[0]))
        labels.append(label[row[1]])
    if val:
        raise PotstillError(f"{name}: val/images/{said(min(val))} has no line in val/val_annotations.txt")
    words = dict(line.split("\t", 1) for line in _lines(folder, "words.txt") if "\t" in line)
    short = [words.get(w, w).split(",")[0].strip() for w in wnids]
    names = tuple(s if short.count(s) == 1 else f"{s} ({w})" for s, w in zip(short, wnids, strict=True))
    trained = ([f for part in train for f in part], [i for i, part in enumerate(train) for _ in part])
    return Found(names, trained, (files, labels))


def _part(folder: Path, inner: str, name: str) -> list[File]:
    if not (folder / inner).is_dir():
        raise PotstillError(f"{name}: the folder {said(inner)} is missing; unpack the archive again")
    for path in (folder / inner, (folder / inner).parent):
        _inside(folder, path, inner, name)
    return _images(folder, folder / inner, inner, name)


def _lines(folder: Path, inner: str) -> list[str]:
    try:
        return [line for line in (folder / inner).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PotstillError(f"tiny-imagenet: {inner} cannot be read ({type(error).__name__})") from error
