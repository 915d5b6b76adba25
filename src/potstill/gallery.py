"""A benchmark's sets as pictures: all images of a set in one sheet, and one sheet for each step that its run has kept."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import places
from .errors import PotstillError
from .layout import percent
from .page import Entry
from .report import extent, pixels, png_bytes

BYTES = 6_000_000  # of all pictures of a page before base64
CLASSES = 20  # shown of a set
STEPS = 12  # of a run, at most

Array = np.ndarray


@dataclass(frozen=True)
class Pictures:
    """A set's pictures, unclamped floats in a picture's range.

    Args:
        names: Of its classes.
        images: Of each class.
        evolution: Steps, and the first image of each class at them (K, ...).
        end: Step of the finished set.
    """

    names: tuple[str, ...]
    images: tuple[Array, ...]
    evolution: tuple[tuple[int, Array], ...] = ()
    end: int = 0


@dataclass(frozen=True)
class Sheet:
    """Images side by side in one PNG: `rows` of classes, `columns` of images, each `width` x `height`."""

    uri: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Card:
    """What the page shows of a set. The last sheet of `steps` is the finished set's first image of each class."""

    entry: Entry
    names: tuple[str, ...]
    classes: int
    ratio: str
    steps: tuple[tuple[str, Sheet], ...]
    all: Sheet | None
    most: int

    @property
    def text(self) -> str:
        """The accuracy, in percent."""
        return percent(self.entry.mean or 0.0, self.entry.std)


def cards(entries: Sequence[Entry], total: int = BYTES) -> list[Card]:
    """A card for each entry whose set lies in its results folder and can be read.

    Args:
        entries: Of performance groups, in the order of the page.
        total: Bytes for all pictures together. Small sets leave theirs to large ones; where it is too little, images and
            then steps are left out.
    """
    found = [(e, p) for e in entries if (p := pictures(e)) is not None]
    budgets = share([_bytes(p) for _, p in found], total)
    return [_card(e, p, budget) for (e, p), budget in zip(found, budgets, strict=True)]


def pictures(entry: Entry) -> Pictures | None:
    """The first set of an entry, if it is there and can be shown; no path leads out of the results folder."""
    sets = entry.record.get("sets") or []
    folder = _place(entry, str(sets[0].get("path") or "")) if sets else None
    found = places.sha256(folder) if folder is not None else ""
    if folder is None or not found or sets[0].get("sha256", found) != found:
        return None  # not there, or another one by now, whose pictures are not those of the numbers beside them
    from .exchange import load

    try:
        set_ = load(folder)
        counts, images = set_.meta.ipc, set_.images.numpy()
    except PotstillError:
        return None  # damaged, or whitened and its matrix not there: the numbers are still good
    if set_.labels.ndim == 1:  # soft labels leave a sample in the class that it was started for
        images = images[np.argsort(set_.labels.numpy(), kind="stable")]
    there, starts = [g for g, count in enumerate(counts) if count], np.cumsum([0, *counts])
    names = tuple(set_.meta.class_names[g] for g in there)
    by_class = tuple(images[starts[g] : starts[g + 1]] for g in there)
    kept = _evolution(folder / "snapshots.safetensors", [counts[g] for g in there], images)
    return Pictures(names, by_class, tuple((s, x) for s, x in kept if s < set_.meta.steps), set_.meta.steps)


def _place(entry: Entry, path: str) -> Path | None:
    """The folder of a set: below the results folder, or that of its name in the zoo."""
    if path.startswith(places.IN_ZOO):
        return places.names().get(path.removeprefix(places.IN_ZOO))
    folder = (entry.folder / path).resolve()
    return folder if path and folder.is_relative_to(entry.folder.resolve()) else None


def _evolution(file: Path, counts: Sequence[int], images: Array) -> tuple[tuple[int, Array], ...]:
    """The first image of each class at each step that a run has kept; nothing if it has kept none that fit.

    A snapshot holds the first few of each class, the same number of all that have so many.
    """
    if not file.is_file():
        return ()
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        kept = {int(name): x for name, x in load_file(file).items()}
    except (SafetensorError, ValueError, OSError):
        return ()
    fits = {sum(min(c, each) for c in counts): each for each in range(max(counts), 0, -1)}
    shapes = {x.shape for x in kept.values()}
    each = fits.get(next(iter(shapes))[0]) if len(shapes) == 1 else None
    if each is None or next(iter(shapes))[1:] != images.shape[1:]:
        return ()
    first = np.cumsum([0, *(min(c, each) for c in counts)])[:-1]
    return tuple((step, kept[step][first].astype(np.float32)) for step in sorted(kept))


def share(wants: Sequence[int], total: int) -> list[int]:
    """A total divided so that nobody gets more than they want, and the small are served before the large.

    Example:
        >>> share([10, 100, 100], 90)
        [10, 40, 40]
    """
    given, left = [0] * len(wants), total
    for place, i in enumerate(sorted(range(len(wants)), key=lambda i: wants[i])):
        given[i] = min(wants[i], left // (len(wants) - place))
        left -= given[i]
    return given


def _size(p: Pictures) -> int:
    """Bytes of one image, about: what is learned hardly gets smaller in a PNG."""
    shape = p.images[0].shape[1:]
    return int(np.prod(shape[-2:])) * (3 if len(shape) == 3 and shape[0] == 3 else 1)


def _bytes(p: Pictures) -> int:
    shown = p.images[:CLASSES]
    return _size(p) * (sum(map(len, shown)) + len(shown) * (1 + min(STEPS, len(p.evolution))))


def _card(entry: Entry, p: Pictures, budget: int) -> Card:
    """As much as a number of bytes allows: the first of each class always, then steps, then all images."""
    shown, names = p.images[:CLASSES], p.names[:CLASSES]
    row = _size(p) * len(shown)
    limits = extent([*p.images, *(x for _, x in p.evolution)])
    first = np.stack([x[0] for x in shown])
    most = max(map(len, shown))
    steps = min(STEPS, len(p.evolution), max(0, int(0.6 * budget / row) - 1 if most > 1 else budget // row - 1))
    picked = sorted({round(i) for i in np.linspace(0, len(p.evolution) - 1, steps)}) if steps > 1 else []
    kept = [p.evolution[i] for i in picked]
    sheets = [(f"{step:,}", _sheet(x[:CLASSES][:, None], limits)) for step, x in kept]
    sheets += [(f"{p.end:,}", _sheet(first[:, None], limits))]
    many = min(most, (budget - row * len(sheets)) // row)
    every = None
    if many > 1:
        table = np.full((len(shown), many, *first.shape[1:]), np.nan, np.float32)
        for line, images in zip(table, shown, strict=True):
            line[: len(images[:many])] = images[:many]
        every = _sheet(table, limits)
    width, height = _tile(first, limits)
    return Card(entry, names, len(p.names), f"{width}/{height}", tuple(sheets), every, most)


def _tile(images: Array, limits: tuple[float, float]) -> tuple[int, int]:
    height, width = pixels(images[:1], limits).shape[1:3]
    return width, height


def _sheet(table: Array, limits: tuple[float, float]) -> Sheet:
    """A table of images (rows, columns, ...) as one PNG at natural size."""
    rows, columns = table.shape[:2]
    tiles: Any = pixels(table.reshape(-1, *table.shape[2:]), limits)
    height, width = tiles.shape[1:3]
    grid = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)
    picture = Image.fromarray(np.ascontiguousarray(grid.reshape(rows * height, columns * width, *tiles.shape[3:])))
    return Sheet(f"data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}", rows, columns)
