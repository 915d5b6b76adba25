"""Tables of images through the `datasets` library (extra `hf`): it reads rows, class names and splits; we decode."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import first_line
from .errors import PotstillError
from .pictures import Listing, Odd, Pictures

LABELS = ("label", "labels", "fine_label", "class", "target", "y")
TESTS = ("test", "validation", "valid", "val")
FILES = (".parquet", ".arrow")


def is_one(path: Path) -> bool:
    """Whether a path is that of a folder with tables in it, or one folder below."""
    return path.is_dir() and any(f.suffix in FILES for pattern in ("*", "*/*") for f in path.glob(pattern))


def stamp_of(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of all files of a folder: the cache's stamp."""
    found = []
    for inside, _, files in os.walk(folder):
        for file in files:
            path = Path(inside, file)
            stat = path.stat() if path.exists() else path.lstat()
            found.append([path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns])
    return sorted(found)


def stamp_of_parts(parts: Any) -> list[list[Any]]:
    """The same for what the library keeps of a repository."""
    files = [Path(f["filename"]) for split in sorted(parts) for f in parts[split].cache_files]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def fetch(where: str, name: str, cache: Path | None = None) -> Any:
    """All splits of a folder or repository.

    Args:
        where: The folder's path or the repository's name.
        name: For messages.
        cache: Where the library writes; its own place if absent.

    Raises:
        PotstillError: The library is not there, or cannot read this.
    """
    try:
        import datasets
    except ImportError as error:
        raise PotstillError(f"{name} needs the library `datasets`: pip install 'potstill[hf]'") from error
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(where, cache_dir=None if cache is None else str(cache))
    except Exception as error:  # whatever the library and its readers raise
        raise PotstillError(f"{name} cannot be read ({type(error).__name__}: {first_line(error)})") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def read(folder: Path, name: str, scratch: Path) -> Listing:
    """The pictures of a folder of tables.

    Raises:
        PotstillError: See `listing_of`.
    """
    return listing_of(fetch(str(folder), name, scratch), name, folder)


def listing_of(parts: Any, name: str, folder: Path | None) -> Listing:
    """The pictures of splits: which columns, which classes.

    Args:
        parts: Of `fetch`.
        name: For messages.
        folder: Outside of it no file is opened; of a repository what the library has fetched, if absent.

    Raises:
        PotstillError: No such splits or columns, a label outside the classes, a class without samples.
    """
    test = next((t for t in TESTS if t in parts), None)
    if "train" not in parts or test is None:
        raise PotstillError(f"{name} has the splits {', '.join(parts)}; train and one of {', '.join(TESTS)} are needed")
    features = parts["train"].features
    image, label = _image_column(features, name), _label_column(features, name)
    lack = [c for c in (image, label) if c not in parts[test].features]
    if lack:
        raise PotstillError(f"{name}: {test} lacks the column '{lack[0]}' that train has")
    columns = [_labels(parts[split], label, name, split) for split in ("train", test)]
    names = getattr(features[label], "names", None)
    if names is None:
        for split, column in zip(("train", test), columns, strict=True):
            if column.dtype.kind == "i" and column.min() < 0:
                row = int(np.argmax(column < 0))
                raise PotstillError(f"{name}: row {row} of {split} has label {column[row]}; labels begin at 0")
        values = np.unique(columns[0])
        strange = np.setdiff1d(columns[1], values)
        if len(strange):
            raise PotstillError(f"{name}: {test} has labels that train lacks: {', '.join(map(str, strange[:5]))}")
        names, columns = [str(v) for v in values], [np.searchsorted(values, c) for c in columns]
    for split, column in zip(("train", test), columns, strict=True):
        wrong = np.nonzero((column < 0) | (column >= len(names)))[0]
        if len(wrong):
            raise PotstillError(
                f"{name}: row {wrong[0]} of {split} has label {column[wrong[0]]}; 0 to {len(names) - 1} is allowed, "
                f"as there are {len(names)} classes"
            )
    empty = np.nonzero(np.bincount(columns[0], minlength=len(names)) == 0)[0]
    if len(empty):
        raise PotstillError(f"{name}: train has no sample of class {empty[0]} ({names[empty[0]]})")
    if len(names) < 2:
        raise PotstillError(f"{name}: one class only ({names[0]}); at least two are needed")
    first, second = (
        Pictures(column.astype(np.int64), _rows(parts[split], image, split, folder))
        for split, column in zip(("train", test), columns, strict=True)
    )
    return Listing(tuple(map(str, names)), first, second)


def _image_column(features: Any, name: str) -> str:
    """The one column that holds images."""
    import datasets

    def holds(feature: Any) -> bool:
        binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
        return isinstance(feature, datasets.Image) or binary or (isinstance(feature, dict) and "bytes" in feature)

    found = [c for c, f in features.items() if holds(f)]
    if len(found) != 1:
        what = "several columns of images" if found else "no column of images"
        raise PotstillError(f"{name} has {what}; its columns are {', '.join(found or features)}, one is needed")
    return found[0]


def _label_column(features: Any, name: str) -> str:
    """The column of classes: by its usual names, else the only one whose type says so."""
    import datasets

    named = [c for c in LABELS if c in features]
    typed = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if not named and len(typed) != 1:
        raise PotstillError(f"{name} has no column of labels; its columns are {', '.join(features)}, one of "
                            f"{', '.join(LABELS)} is needed")  # fmt: skip
    return next((c for c in named if c in typed), named[0]) if named else typed[0]


def _labels(part: Any, column: str, name: str, split: str) -> np.ndarray:
    """A column of labels as whole numbers or texts."""
    if not len(part):
        raise PotstillError(f"{name}: {split} has no rows")
    arrow = part.select_columns([column]).with_format("arrow")[:].column(column)
    if arrow.null_count:
        raise PotstillError(f"{name}: a row of {split} has no value in column '{column}'")
    found = np.asarray(arrow.to_pylist())
    if found.ndim != 1 or found.dtype.kind not in "iubU":
        raise PotstillError(f"{name}: column '{column}' has values of type {found.dtype}; one class per row is needed")
    return found


def _rows(part: Any, column: str, split: str, folder: Path | None) -> Any:
    table = part.select_columns([column]).with_format("arrow")
    ours = folder.resolve() if folder is not None else None

    def batch(start: int, stop: int) -> Sequence[tuple[str, bytes | Path]]:
        cells = table[start:stop].column(column).to_pylist()
        return [(f"row {i} of {split}", _content(c, f"row {i} of {split}", ours)) for i, c in enumerate(cells, start)]

    return batch


def _content(cell: Any, where: str, folder: Path | None) -> bytes | Path:
    """An image's bytes, or its file where the table only names it."""
    if isinstance(cell, bytes):
        return cell
    if not cell or (cell.get("bytes") is None and not cell.get("path")):
        raise Odd(f"{where} has no image")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    import datasets

    allowed = folder or Path(datasets.config.HF_CACHE_HOME).resolve()
    try:
        path = (allowed / str(cell["path"])).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise Odd(f"{where} names a file that cannot be one") from error
    if not path.is_relative_to(allowed):
        raise Odd(f"{where} names a file outside of the data set's folder")
    return path
