"""Tables of images through the `datasets` library (extra `hf`): it reads rows, class names and splits; we decode.

Of a folder it is given each file by its name: left alone it follows a README to any path and address.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from .arrays import first_line
from .errors import PotstillError
from .pictures import Listing, Odd, Pictures

LABELS = ("label", "labels", "fine_label", "class", "target", "y")
TESTS = ("test", "validation", "valid", "val")
FILES = (".parquet", ".arrow")
METADATA = ("README.md", "dataset_infos.json")  # with splits and class names


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


def fetch(where: str, name: str, cache: Path | None = None, folder: Path | None = None) -> Any:
    """All splits of a folder or repository.

    Args:
        where: The repository's name, where no folder is given.
        name: For messages.
        cache: Where the library writes; its own place if absent.
        folder: Of tables; nothing outside of it is read.

    Raises:
        PotstillError: The library is not there, or cannot read this; a folder's file that lies outside of it.
    """
    try:
        import datasets
    except ImportError as error:
        raise PotstillError(f"{name} needs the library `datasets`: pip install 'potstill[hf]'") from error
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        more = {} if folder is None else _named(folder.resolve(), name)
        return datasets.load_dataset(**{"path": where, **more}, cache_dir=None if cache is None else str(cache))
    except PotstillError:
        raise
    except Exception as error:  # whatever the library and its readers raise
        raise PotstillError(f"{name} cannot be read ({type(error).__name__}: {first_line(error)})") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def _named(folder: Path, name: str) -> dict[str, Any]:
    """What the library is told of a folder: the kind of its tables, the files of each split, types if its README has them.

    Args:
        folder: The folder, resolved.
        name: For messages.

    Raises:
        PotstillError: A README that names what lies outside of the folder, a link there, or no table.
    """
    from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns, resolve_pattern
    from datasets.info import DatasetInfosDict

    for file in METADATA:
        _inside(folder, folder / file, name)
    title, config = _config(folder, name)
    base = folder / _within(config.get("data_dir") or ".", name)
    given = config.get("data_files")
    patterns = _patterns(given, name) if given else get_data_patterns(base.as_posix())
    found: dict[str, list[str]] = {}
    for split, of_split in patterns.items():
        for pattern in of_split:
            files = _matching(resolve_pattern, pattern, base)
            found.setdefault(str(split), []).extend(_inside(folder, file, name).as_posix() for file in files)
    kinds = Counter(Path(file).suffix for files in found.values() for file in files)
    if not kinds:
        raise PotstillError(f"{name} has no tables; files that end in {' or '.join(FILES)} are needed")
    kind = kinds.most_common(1)[0][0]
    kept = {split: [f for f in dict.fromkeys(files) if f.endswith(kind)] for split, files in found.items()}
    # lists of the library's own kind are taken as they are, not as patterns once more
    named = DataFilesDict({s: DataFilesList(files, _ages(files)) for s, files in kept.items() if files})
    infos = DatasetInfosDict.from_directory(str(folder))
    info = infos.get(title) or (next(iter(infos.values())) if title is None and len(infos) == 1 else None)
    return {"path": kind[1:], "data_files": named, "features": None if info is None else info.features}


def _config(folder: Path, name: str) -> tuple[str | None, Mapping[str, Any]]:
    """Name and fields of the configuration of a README that counts, as the library chooses it; none where it has none."""
    from huggingface_hub import DatasetCard

    if not (readme := folder / METADATA[0]).is_file():
        return None, {}
    configs = DatasetCard.load(readme).data.to_dict().get("configs") or []
    if not isinstance(configs, list) or not all(isinstance(c, Mapping) for c in configs):
        raise PotstillError(f"{name}: the configs of {METADATA[0]} are no list of tables")
    chosen = [c for c in configs if c.get("default")] or [c for c in configs if c.get("config_name") == "default"]
    chosen = chosen or configs
    if len(chosen) > 1:
        raise PotstillError(f"{name}: {METADATA[0]} has {len(configs)} configs, and not one that is the default")
    return (str(chosen[0].get("config_name")), chosen[0]) if chosen else (None, {})


def _patterns(given: Any, name: str) -> dict[str, list[str]]:
    """Patterns of the files of each split, as a configuration has them: words, or a table for each split."""
    by_split = isinstance(given, list) and all(
        isinstance(g, Mapping) and isinstance(g.get("split"), str) for g in given
    )
    found: dict[str, list[str]] = {}
    for split, path in [(g["split"], g.get("path")) for g in given] if by_split else [("train", given)]:
        found[split] = [_within(p, name) for p in (path if isinstance(path, list) else [path])]
    return found


def _within(pattern: Any, name: str) -> str:
    """A pattern of file names, if it can lead nowhere but down."""
    # a colon begins an address, also one without slashes (file:etc), or a file in an archive
    good = isinstance(pattern, str) and pattern.isprintable() and not pattern.startswith(("/", "\\", "~"))
    if not good or ":" in pattern or ".." in PureWindowsPath(pattern).parts:
        said = repr(pattern[:120]) if isinstance(pattern, str) else "what is no path"
        raise PotstillError(f"{name}: {METADATA[0]} names {said}; no file outside of the data set's folder is read")
    return str(pattern)


def _matching(resolve: Any, pattern: str, base: Path) -> Iterable[Path]:
    """The tables below a folder that fit a pattern."""
    try:
        return [Path(file) for file in resolve(pattern, base.as_posix()) if Path(file).suffix in FILES]
    except FileNotFoundError as error:
        if any(c in pattern for c in "*?["):
            return []
        raise FileNotFoundError(f"there is no {pattern}") from error


def _inside(folder: Path, file: Path, name: str) -> Path:
    """A file that does not lie outside of its folder, links followed."""
    if not file.resolve().is_relative_to(folder):
        raise PotstillError(
            f"{name}: {str(file.relative_to(folder))[:120]!r} is a link out of the data set's folder; put the files themselves there"
        )
    if "::" in str(file):
        raise PotstillError(f"{name}: the path of {file.name!r} has '::' in it, which the library takes for an address")
    return file


def _ages(files: Sequence[str]) -> list[tuple[str, ...]]:
    """What the library tells one state of files from another by."""
    return [(file, str(os.stat(file).st_mtime_ns)) for file in files]


def read(folder: Path, name: str, scratch: Path) -> Listing:
    """The pictures of a folder of tables.

    Raises:
        PotstillError: See `fetch` and `listing_of`.
    """
    return listing_of(fetch(str(folder), name, scratch, folder), name, folder)


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
