"""Data sets by name and from files: which there are, where they are looked for, how each is read.

A name always leads back to the data, on any machine with the same data root: it is that of a built-in set, the path
below the data root (of a path elsewhere the last part), without `.npz`; a built-in name is told from a folder of the
same name by `./` before the latter. `hf:owner/name` stays for a repository and falls for a folder, whose layout tells
how it is read. Sets and records keep names only, never absolute paths.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import folders, tables
from .arrays import first_line
from .data import Classification, Data, Split, fingerprint_of, holdout_order, stratified
from .errors import PotstillError, unknown
from .functional import Key
from .pictures import Listing, cached
from .records import cache
from .strict import check_arrays
from .transforms import Standardise

DATA_ROOT = "POTSTILL_DATA"
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
HINT = "`potstill list datasets` shows all; a path must be that of a .npz or of a folder"


def load(source: str, root: str | Path | None = None) -> Data:
    """A data set, standardised; see `load_data`."""
    base = Path(root or os.environ.get(DATA_ROOT) or Path.home() / ".cache" / "potstill" / "data").expanduser()
    if source in LOADERS:
        return LOADERS[source](base)
    if source.startswith("hf:"):
        where = source.removeprefix("hf:")
        for path in (Path(where).expanduser(), base / where):
            if where and _there(path) and path.is_dir():
                return _table(path, name_of(path, base))
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", where):
            raise PotstillError(
                f"{source} is neither a folder that is there nor a repository's name, such as hf:owner/name"
            )
        return _repository(where)
    found = [p for p in (Path(source).expanduser(), base / source, base / f"{source}.npz") if source and _there(p)]
    for path in found:
        name = name_of(path, base)
        if path.is_file() and path.suffix == ".npz":
            return _npz(path, name)
        if folders.is_one(path):
            return _folder(path, name)
        if tables.is_one(path):
            return _table(path, name)
    if found:
        raise PotstillError(
            f"{shown(found[0])} is no data set: it is neither a .npz, nor a folder with train/<class>/ and test/<class>/ "
            "or val/<class>/, nor one of tables for hf:"
        )
    if Path(source).suffix == ".npz":
        raise PotstillError(f"no file {source}")
    if "/" in source or os.sep in source:
        raise PotstillError(f"no file or folder {source}, nor in the data root {shown(base)}")
    raise unknown("data set", source, LOADERS, HINT)


def _there(path: Path) -> bool:
    """Whether something is at a path, whatever the path is made of."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def load_named(name: str, root: str | Path | None = None) -> Data:
    """The data that a set names: like `load`, but a name from a file never leads out of the data root.

    Raises:
        PotstillError: The name is a path out of it, or there is no such data set.
    """
    inner = name.removeprefix("hf:")
    parts = re.split(r"[/\\]", inner)
    if (
        not inner.isprintable()
        or ".." in parts
        or Path(inner).is_absolute()
        or inner[:1] in ("/", "\\", "~")
        or ":" in inner
    ):
        raise PotstillError(f"the set names its data {name!r}, which is no name below the data root; give --data")
    try:
        return load(name, root)
    except PotstillError as error:
        raise PotstillError(f"{error} (the set names its data '{name}'; --data gives others)") from error


def name_of(path: Path, base: Path) -> str:
    """The name of data at a path: see the head of this file."""
    whole = path.resolve()
    name = whole.relative_to(base.resolve()).as_posix() if whole.is_relative_to(base.resolve()) else whole.name
    name = name.removesuffix(".npz")
    return f"./{name}" if name in LOADERS else name


def shown(path: Path) -> str:
    """A path as messages and records may show it: the data root prints as $POTSTILL_DATA."""
    root = os.environ.get(DATA_ROOT)
    if not root or not path.is_relative_to(Path(root).expanduser()):
        return str(path)
    return str(f"${DATA_ROOT}" / path.relative_to(Path(root).expanduser()))


def _digits(root: Path) -> Data:
    """Scikit-learn's 8x8 digits (embedded there), a fixed stratified fifth of them as the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.images.astype(np.uint8), bunch.target
    test = stratified(torch.from_numpy(y), 0.2, Key(0).fold("digits", "test")).numpy()
    return Data.from_arrays(x[~test], y[~test], x[test], y[test], name="digits", scale=16.0, mirror=False)


def _torchvision(kind: str, name: str, mirror: bool, inside: str = "", archive: str = "") -> Callable[[Path], Data]:
    """A loader for one of torchvision's data sets, downloaded where absent.

    Args:
        kind: Torchvision's class.
        name: Ours.
        mirror: Whether a mirrored input keeps its class.
        inside: Folder of its files below the data root; that of the MNIST family if absent.
        archive: What it is unpacked from, where it is.
    """

    def loader(root: Path) -> Data:
        from torchvision import datasets

        maker = getattr(datasets, kind)
        raw = root / (inside or f"{kind}/raw")
        try:
            try:
                parts = [maker(root, train=train, download=False) for train in (True, False)]
            except RuntimeError as error:
                if "not found" not in str(error):  # torchvision's words for "not there"; else a damaged file
                    raise
                if raw.is_dir() and any(raw.iterdir()) and not os.access(raw, os.W_OK):
                    raise
                _download(lambda: maker(root, train=True, download=True), name, raw, archive=archive)
                parts = [maker(root, train=train, download=False) for train in (True, False)]
        except PotstillError:
            raise
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise PotstillError(
                f"{name} in {shown(root)} cannot be read ({type(error).__name__}: {first_line(error)}); "
                f"remove {shown(raw)} and run again, or put whole files there"
            ) from error
        (x, y), (tx, ty) = ((np.asarray(p.data), np.asarray(p.targets)) for p in parts)
        if len(x) != len(y) or len(tx) != len(ty):
            raise PotstillError(f"{name} in {shown(root)} has a different number of images and labels; fetch it again")
        names = [c.split(" - ")[0] for c in parts[0].classes]  # MNIST's are "0 - zero"
        return Data.from_arrays(x, y, tx, ty, name=name, class_names=names, mirror=mirror)

    shape = "32 x 32 RGB" if archive else "28 x 28 grey"
    loader.__doc__ = f"Torchvision's {kind}, {shape}; downloaded where absent."
    return loader


def _download(
    fetch: Callable[[], Any],
    name: str,
    folder: Path,
    patience: float = 25.0,
    archive: str = "",
) -> None:
    """Run a download; give up with the manual steps once `patience` seconds bring no new byte.

    Args:
        fetch: Downloads.
        name: Of the data.
        folder: Where its files come to lie.
        patience: In seconds.
        archive: Name of the file beside the folder that it is unpacked from; four idx files in the folder if absent.
    """
    problem: list[BaseException] = []

    def run() -> None:
        try:
            fetch()
        except BaseException as error:  # noqa: BLE001  (handed to the waiting thread)
            problem.append(error)

    def size() -> int:
        files = [*folder.glob("*"), *(folder.parent.glob(archive) if archive else ())]
        return sum(f.stat().st_size for f in files if f.exists())

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10.0)
    try:
        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        seen, since = size(), time.monotonic()
        while worker.is_alive() and time.monotonic() - since < patience:
            worker.join(0.2)
            if (now := size()) != seen:
                seen, since = now, time.monotonic()
    finally:
        socket.setdefaulttimeout(before)
    if worker.is_alive() or problem:
        why = type(problem[0]).__name__ if problem else f"nothing arrived for {patience:.0f} s"
        steps = (
            f"put {archive} into {shown(folder.parent)} and unpack it there, or point --data-root or {DATA_ROOT} at the "
            f"folder that has {folder.name}"
            if archive
            else f"put its four idx files ({', '.join(IDX)}) there, or point --data-root or {DATA_ROOT} at the folder "
            f"that has {folder.parent.name}/raw"
        )
        raise PotstillError(f"{name} is not in {shown(folder)} and cannot be downloaded ({why}); {steps}")


def _npz(path: Path, name: str) -> Data:
    """A `.npz` with x_train, y_train, x_test, y_test."""
    wanted = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            missing = [w for w in wanted if w not in file.files]
            if missing:
                raise PotstillError(
                    f"{path.name} lacks {', '.join(missing)}; it has {', '.join(file.files) or 'nothing'}"
                )
            check_arrays(handle, list(wanted))
            arrays = [file[w] for w in wanted]
    except PotstillError:
        raise
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise PotstillError(
            f"{path.name} is not a whole .npz of plain arrays ({type(error).__name__}: {first_line(error)})"
        ) from error
    return Data.from_arrays(*arrays, name=name)


def _decoded(
    name: str,
    origin: str,
    stamp: Any,
    listing: Callable[[Path], Listing],
    convert: str | None = None,
) -> Data:
    """Data from pictures, by way of the cache."""

    def known(arrays: Sequence[np.ndarray]) -> dict[str, Any]:
        x, y, tx, ty = map(torch.from_numpy, arrays)
        plain = Standardise.of(x, 255.0)
        return {"fingerprint": fingerprint_of(Split(x, y), Split(tx, ty)), "mean": plain.mean, "std": plain.std}

    def order(labels: np.ndarray) -> np.ndarray:
        return holdout_order(torch.from_numpy(labels)).numpy()

    made = cached(cache("decoded"), name, origin, stamp, listing, order, known, convert)
    x, y, tx, ty = map(torch.from_numpy, made.arrays)
    plain = Standardise(tuple(made.known["mean"]), tuple(made.known["std"]), 2)
    names, train = tuple(made.known["class_names"]), Split(x, y)
    return Data(
        name, train, Split(tx, ty), names, 255.0, plain, Classification(len(names)), made.known["fingerprint"],
        train[:0], ordered=True,
    )  # fmt: skip


def _folder(path: Path, name: str) -> Data:
    """A folder of images: `train/<class>/*` and `test/<class>/*` or `val/<class>/*`."""
    found = folders.scan(path, name)
    return _decoded(name, str(path.resolve()), found.stamp, lambda scratch: found.listing())


def _tiny_imagenet(root: Path) -> Data:
    """Tiny ImageNet as published, 64 x 64 RGB, 200 classes; its validation part is the test set. Not downloaded."""
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        raise PotstillError(
            f"tiny-imagenet is not in {shown(root)}; fetch tiny-imagenet-200.zip from where Stanford's course CS231n "
            f"publishes it and unpack it there, or point --data-root or {DATA_ROOT} at the folder that has tiny-imagenet-200"
        )
    found = folders.scan_tiny(folder)
    return _decoded("tiny-imagenet", str(folder.resolve()), found.stamp, lambda scratch: found.listing(), "RGB")


def _table(path: Path, name: str) -> Data:
    """A folder of tables, read through the `datasets` library."""
    return _decoded(
        name, f"hf:{path.resolve()}", tables.stamp_of(path), lambda scratch: tables.read(path, name, scratch)
    )


def _repository(where: str) -> Data:
    """A repository, fetched and kept by the `datasets` library."""
    name = f"hf:{where}"
    parts = tables.fetch(where, name)
    return _decoded(name, name, tables.stamp_of_parts(parts), lambda scratch: tables.listing_of(parts, name, None))


LOADERS: dict[str, Callable[[Path], Data]] = {
    "digits": _digits,
    "fashion-mnist": _torchvision("FashionMNIST", "fashion-mnist", mirror=True),
    "mnist": _torchvision("MNIST", "mnist", mirror=False),
    "cifar10": _torchvision(
        "CIFAR10", "cifar10", mirror=True, inside="cifar-10-batches-py", archive="cifar-10-python.tar.gz"
    ),
    "cifar100": _torchvision(
        "CIFAR100", "cifar100", mirror=True, inside="cifar-100-python", archive="cifar-100-python.tar.gz"
    ),
    "tiny-imagenet": _tiny_imagenet,
}

FORMS = {
    "FILE.npz": "Arrays x_train, y_train, x_test, y_test.",
    "FOLDER": "Images in train/<class>/ and test/<class>/ or val/<class>/.",
    "hf:FOLDER": "Tables (Parquet, Arrow), through the library `datasets` (pip install 'potstill[hf]').",
    "hf:OWNER/NAME": "A repository, through the same library.",
}
