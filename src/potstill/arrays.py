"""What a user has, arrays or items of a dataset, as arrays that fit together: checked, with errors that name the place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import PotstillError
from .pictures import Odd, pixels


def as_array(x: Any, what: str) -> np.ndarray:
    """What a user has, as an array."""
    if isinstance(x, Tensor):
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)
    try:
        return np.asarray(x)
    except ValueError as error:  # rows of different lengths
        raise PotstillError(f"{what} is no regular array ({first_line(error)})") from error


def numbers(x: Any, what: str) -> np.ndarray:
    """Raw inputs as the library keeps them: bytes stay bytes (true and false are 255 and 0), all else is float32."""
    array = as_array(x, what)
    if array.dtype.kind not in "uifb":
        raise PotstillError(f"{what} has elements of type {array.dtype}; numbers are needed")
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    with np.errstate(over="ignore"):  # becomes infinity, which is refused by name where it matters
        return array if array.dtype in (np.uint8, np.float32) else array.astype(np.float32)


def as_inputs(x: Any, what: str, channels: str | None = None) -> Tensor:
    """An array as a tensor (N, C, H, W) or (N, F), checked; channels are `first`, `last`, or found by their number."""
    array = numbers(x, what)
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise PotstillError(
            f"{what} has shape {array.shape}; (N, F), (N, H, W), (N, C, H, W) or (N, H, W, C) is needed"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.nonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))[0][0])
        raise PotstillError(f"{what} has a value that is not finite (NaN or infinity), first in sample {row}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4:
        first, last = array.shape[1], array.shape[3]
        if channels is None and (first == last or max(first, last) <= 4 or min(first, last) > 32):
            raise PotstillError(
                f"{what} has shape {array.shape}, which does not tell whether channels are axis 1 or 3; "
                "give (N, H, W), or channels first with a number of channels that is clearly the smaller, "
                "or say channels='first' or 'last' to Data.from_arrays"
            )
        if channels == "last" or (channels is None and last < first):
            array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def as_labels(y: Any, what: str, n: int) -> np.ndarray:
    """One class per sample (N,): numbers or texts."""
    array = as_array(y, what)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.round(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind == "U" and not _is_text(array):
        raise PotstillError(f"{what} has a text with characters that are none")
    if array.ndim != 1 or array.dtype.kind not in "iuUSb":
        raise PotstillError(f"{what} has shape {array.shape} and type {array.dtype}; one class per sample is needed")
    if len(array) != n:
        raise PotstillError(f"{what} has {len(array)} labels for {n} samples")
    return array


def _is_text(array: np.ndarray) -> bool:
    """Whether texts in an array, which a file may have put there as numbers, are text that can be written."""
    if not array.size or not array.dtype.itemsize:
        return True
    codes = np.frombuffer(array.tobytes(), array.dtype.newbyteorder("=").str[0] + "u4")
    codes = codes if array.dtype.isnative else codes.byteswap()
    return bool((codes < 0x110000).all() and not ((codes >= 0xD800) & (codes < 0xE000)).any())


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut short; empty where it has none."""
    return next(iter(str(error).splitlines()), "")[:120]


def read_items(dataset: Any, what: str, names: Sequence[str] | None) -> tuple[Any, np.ndarray, str | None]:
    """All inputs and labels of a map-style dataset, and where the channels are if that is known.

    Args:
        dataset: With a length and items (input, label).
        what: `train` or `test`, for messages.
        names: Of the classes; labels are then 0 to one less than their number.

    Raises:
        PotstillError: The first item that does not fit.
    """
    from PIL import Image

    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(
        dataset, Tensor | np.ndarray
    ):
        raise PotstillError(
            f"{what} is of type {type(dataset).__name__}; a map-style Dataset is needed, with a length and numbered items"
        )
    if not len(dataset):
        raise PotstillError(f"{what} has no sample")
    xs: list[np.ndarray] = []
    ys: list[int] = []
    channels = None
    for i in range(len(dataset)):
        item = dataset[i]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise PotstillError(f"{what}[{i}] is of type {type(item).__name__}; a pair (input, label) is needed")
        x, y = item
        if isinstance(x, Image.Image):
            try:
                x, channels = pixels(x), "first"
            except Odd as error:
                raise PotstillError(f"{what}[{i}] {error}") from error
        else:
            channels = "first" if isinstance(x, Tensor) else channels
            x = numbers(x, f"{what}[{i}]")
        if xs and (x.shape != xs[0].shape or x.dtype != xs[0].dtype):
            raise PotstillError(
                f"{what}[{i}] has shape {x.shape} and type {x.dtype}, {what}[0] {xs[0].shape} and {xs[0].dtype}; "
                "all must be equal"
            )
        xs.append(x)
        ys.append(_whole(y, f"{what}[{i}]", names))
    return np.stack(xs), np.array(ys, dtype=np.int64), channels


def _whole(y: Any, what: str, names: Sequence[str] | None) -> int:
    """A label as a number that one of the classes has."""
    value = np.asarray(y.numpy(force=True) if isinstance(y, Tensor) else y)
    if value.size != 1 or value.dtype.kind not in "iub":
        raise PotstillError(f"{what} has the label {str(y)[:40]!r}; a whole number is needed")
    number = int(value.reshape(()))
    if names is not None and not 0 <= number < len(names):
        raise PotstillError(
            f"{what} has label {number}; 0 to {len(names) - 1} is allowed, as there are {len(names)} classes"
        )
    return number
