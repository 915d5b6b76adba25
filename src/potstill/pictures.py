"""Pictures as arrays: decoded once, in parallel, into a cache that is mapped into memory where it is large.

A cache is a folder named by a hash of where the pictures come from and a hash of what lies there (names, sizes, times).
It is written under another name and then renamed, so one that is there is whole. It holds pixels, labels and what is
known of them: fingerprint, mean and standard deviation, so that nothing is read whole at a start. What a killed process has
decoded is found by its hashes, and not decoded anew; a second process waits for the first.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from .errors import PotstillError

FORMAT = 1
CHUNK = 128  # pictures that one thread takes at a time
MOST = 1 << 25  # pixels of a picture
MAPPED_SHARE = 0.25  # of the machine's memory: larger inputs are mapped, not read,
MAPPED = 64 << 20  # and so are those of more bytes than this
MARK = 16  # bytes of the hash of decoded pictures
CHANNELS = {"1": "L", "L": "L", "RGB": "RGB", "RGBA": "RGBA"}
NO_RESERVING = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)  # of a file system
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
FILES = ("train-inputs.npy", "train-labels.npy", "test-inputs.npy", "test-labels.npy")


class Odd(Exception):
    """Why a picture cannot be used; the caller says which one."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a split before they are decoded.

    Args:
        labels: Class of each (N,).
        batch: Name and content (or path) of the pictures from one number up to another.
    """

    labels: np.ndarray
    batch: Callable[[int, int], Sequence[tuple[str, bytes | Path]]]


@dataclass(frozen=True)
class Listing:
    """What a reader found: class names and the two splits."""

    class_names: tuple[str, ...]
    train: Pictures
    test: Pictures


@dataclass(frozen=True)
class Decoded:
    """What a cache holds: arrays (N, C, H, W) of bytes and labels (N,), in memory or mapped, and what is known of them."""

    arrays: tuple[np.ndarray, ...]
    known: dict[str, Any]


def pixels(image: Any, convert: str | None = None) -> np.ndarray:
    """A PIL image as bytes (C, H, W): grey, RGB or RGBA; two-colour pictures are grey, those with a palette RGB(A).

    Args:
        image: The image; of several frames the first.
        convert: A mode to which all are brought.

    Raises:
        Odd: Another mode.
    """
    mode = image.mode
    wanted = convert or CHANNELS.get(mode) or (mode == "P" and ("RGBA" if "transparency" in image.info else "RGB"))
    if not wanted:
        raise Odd(f"has mode {mode}; grey, RGB or RGBA with 8 bits per channel is needed")
    array = np.asarray(image if mode == wanted else image.convert(wanted))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def decode(content: bytes | Path, convert: str | None = None) -> np.ndarray:
    """A picture's file as bytes (C, H, W).

    Raises:
        Odd: It does not decode, or has a mode that is not taken.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.width * image.height > MOST:  # of a few bytes a picture can be made that takes all memory
                raise Odd(f"says that it is {image.width}x{image.height}; {MOST:,} pixels are taken at most")
            return pixels(image, convert)
    except Odd:
        raise
    except Exception as error:  # whatever a damaged file makes a codec raise
        raise Odd(f"cannot be decoded ({type(error).__name__})") from error


def said(array: np.ndarray) -> str:
    """Size and mode of a picture for people: width x height, as image programs have it."""
    return f"{array.shape[2]}x{array.shape[1]} {({1: 'grey', 3: 'RGB', 4: 'RGBA'})[array.shape[0]]}"


def memory() -> int:
    """Bytes of memory that the machine has; 8 GiB where it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def key_of(value: Any) -> str:
    """A hash of plain values for a folder's name."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def cached(
    root: Path,
    name: str,
    origin: str,
    stamp: Any,
    listing: Callable[[Path], Listing],
    order: Callable[[np.ndarray], np.ndarray],
    known: Callable[[Sequence[np.ndarray]], dict[str, Any]],
    convert: str | None = None,
) -> Decoded:
    """Decoded pictures, from the cache or into it.

    Args:
        root: Folder of the caches.
        name: Of the data, for messages.
        origin: Where the pictures come from: a cache of the same origin with another stamp is removed.
        stamp: What lies there, plain values: the cache holds as long as they stay equal.
        listing: Finds the pictures; called only where there is no cache, with a folder for what it has to write.
        order: Order of the training rows, from their labels.
        known: What is worth keeping of the four arrays, plain values.
        convert: A mode to which all are brought.

    Raises:
        PotstillError: A picture that does not fit, by name; a cache that cannot be written.
    """
    first, second = key_of([FORMAT, convert, origin]), key_of(stamp)
    folder = root / f"{first}-{second}"
    if (found := _open(folder)) is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        for old in root.glob(f".{first}-*"):  # what a killed process left half-written of what lay there before
            if old.name != f".{folder.name}" and old.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(old, ignore_errors=True)
        with _alone(root / f".{folder.name}") as work:
            if (other := _open(folder)) is not None:  # of another process in the meantime
                shutil.rmtree(work)
                return other
            try:
                scratch = work / "scratch"
                shutil.rmtree(scratch, ignore_errors=True)
                _fill(work, listing(scratch), order, known, convert)
                shutil.rmtree(scratch, ignore_errors=True)
                for old in root.glob(f"{first}-*"):  # damaged, or of what lay there before
                    shutil.rmtree(old, ignore_errors=True)
                work.rename(folder)
            except BaseException as error:
                if isinstance(error, Exception) or not _begun(work):
                    shutil.rmtree(work, ignore_errors=True)
                raise
    except Odd as error:
        raise PotstillError(f"{name}: {error}") from error
    except OSError as error:
        raise PotstillError(
            f"{name}: the decoded pictures cannot be kept in {root} ({error.strerror}); POTSTILL_CACHE names another place"
        ) from error
    if (made := _open(folder)) is None:
        raise PotstillError(f"{name}: the decoded pictures in {folder} cannot be read again; is the disk damaged?")
    return made


@contextmanager
def _alone(work: Path) -> Iterator[Path]:
    """A folder that no other process has, as it was left by the last one; where there are no locks, a fresh one."""
    if fcntl is None:
        yield Path(tempfile.mkdtemp(prefix=f"{work.name}-", dir=work.parent))
        return
    while True:
        work.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            handle = os.open(work, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if work.exists() and os.path.samestat(os.fstat(handle), work.stat()):  # else it was renamed meanwhile
                    yield work
                    return
            finally:
                os.close(handle)


def _begun(work: Path) -> bool:
    """Whether pictures have been decoded into a folder."""
    with suppress(OSError, ValueError):
        return any(np.load(file).any() for file in work.glob("*-done.npy"))
    return False


def _opened(file: Path, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A file of bytes in this shape, mapped: the one that is there, if it is such a one.

    Raises:
        OSError: The disk has no room for it.
    """
    made = None
    with suppress(OSError, ValueError):
        found = np.lib.format.open_memmap(file, mode="r+")
        if found.shape == shape and found.dtype == np.uint8:
            made = found
    if made is None:
        made = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    _reserve(file)
    return made


def _reserve(file: Path) -> None:
    """Take the room that a file's size promises: a full disk is an error here, but a signal that kills the process where
    a page of a mapped file is written to and finds none.

    Raises:
        OSError: There is not as much.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS, Windows
        return
    with file.open("rb+") as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, max(os.fstat(handle.fileno()).st_size, 1))
        except OSError as error:
            if error.errno not in NO_RESERVING:
                raise


def _open(folder: Path) -> Decoded | None:
    """A cache, mapped where it is large; nothing where there is none or it is damaged."""
    try:
        info = json.loads((folder / "known.json").read_bytes())
        if [(folder / f).stat().st_size for f in FILES] != info["sizes"]:
            return None
        mapped = sum(info["sizes"]) > min(MAPPED_SHARE * memory(), MAPPED)
        # "c": writable for PyTorch's sake, and what is written never reaches the file
        arrays = tuple(
            np.load(folder / f, mmap_mode="c" if mapped and "inputs" in f else None, allow_pickle=False) for f in FILES
        )
        return Decoded(arrays, info["known"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fill(
    folder: Path,
    listing: Listing,
    order: Callable[[np.ndarray], np.ndarray],
    known: Callable[[Sequence[np.ndarray]], dict[str, Any]],
    convert: str | None,
) -> None:
    """Decode everything into files of a folder."""
    ((first_name, content),) = listing.train.batch(0, 1)
    first = _decode(first_name, content, convert)
    arrays: list[np.ndarray] = []
    for split, pictures in (("train", listing.train), ("test", listing.test)):
        count = len(pictures.labels)
        rows = order(pictures.labels) if split == "train" else np.arange(count)
        place = np.empty(count, dtype=np.int64)
        place[rows] = np.arange(count)
        out = _opened(folder / f"{split}-inputs.npy", (count, *first.shape))
        done = _opened(folder / f"{split}-done.npy", (-(-count // CHUNK), MARK))  # hashes of decoded pictures

        def work(
            start: int,
            pictures: Pictures = pictures,
            out: np.ndarray = out,
            place: np.ndarray = place,
            n: int = count,
            done: np.ndarray = done,
        ) -> None:
            stop, known, mark = min(start + CHUNK, n), done[start // CHUNK], hashlib.blake2b(digest_size=MARK)
            if known.any():
                for i in range(start, stop):
                    mark.update(out[place[i]].data)
                if mark.digest() == known.tobytes():
                    return
                mark = hashlib.blake2b(digest_size=MARK)
            for i, (name, content) in enumerate(pictures.batch(start, stop), start):
                array = _decode(name, content, convert)
                if array.shape != first.shape:
                    raise Odd(
                        f"{name} is {said(array)}, {first_name} is {said(first)}; all pictures must be equal in both"
                    )
                out[place[i]] = array
                mark.update(np.ascontiguousarray(array).data)
            known[:] = np.frombuffer(mark.digest(), np.uint8)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
            jobs = [pool.submit(work, start) for start in range(0, count, CHUNK)]
            try:
                for job in jobs:  # in order: the first error is that of the first odd picture
                    job.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        out.flush()
        np.save(folder / f"{split}-labels.npy", pictures.labels[rows].astype(np.int64))
        arrays += [out, np.load(folder / f"{split}-labels.npy")]
    info = {
        "known": {**known(arrays), "class_names": listing.class_names},
        "sizes": [(folder / f).stat().st_size for f in FILES],
    }
    (folder / "known.json").write_text(json.dumps(info))
    for hashes in folder.glob("*-done.npy"):
        hashes.unlink()
    for name in (*FILES, "known.json"):
        with (folder / name).open("rb+") as handle:
            os.fsync(handle.fileno())


def _decode(name: str, content: bytes | Path, convert: str | None) -> np.ndarray:
    try:
        return decode(content, convert)
    except Odd as error:
        raise Odd(f"{name} {error}") from error
