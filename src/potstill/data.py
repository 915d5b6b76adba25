"""A data set in memory: inputs in the source's own type, labels, groups; its transform and the inverse; its task.

Loaders find shape, channels, classes, mean and standard deviation by themselves. What a run learns from is
`train`; a stratified part of it can be held out for looks and choices, and `test` is for the one reading at the end.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .errors import PotstillError, unknown
from .functional import Key

DATA_ROOT = "POTSTILL_DATA"


@dataclass(frozen=True)
class Classification:
    """Naming one of several classes: cross-entropy is the loss, accuracy in [0, 1] the score."""

    classes: int

    metric = "accuracy"

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return self.classes

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits (N, C) against classes (N,) or probabilities (N, C)."""
        return F.cross_entropy(logits, labels)

    def score(self, logits: Tensor, labels: Tensor) -> float:
        """Accuracy of logits (N, C) against classes (N,)."""
        return float((logits.argmax(1) == labels).double().mean())


@dataclass(frozen=True)
class Standardise:
    """The transform z = (x - mean) / std, per channel of an image or per feature of a vector.

    Args:
        mean: One number per channel, in unit scale (0 to 1 for the bytes of an image).
        std: Likewise; a channel that never changes has 1.
        trailing: Axes behind the channel: 2 for images, 0 for vectors.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    trailing: int = 2

    name = "standardise"

    def _columns(self, like: Tensor) -> list[Tensor]:
        shape = (-1,) + (1,) * self.trailing
        return [torch.tensor(v, dtype=like.dtype, device=like.device).view(shape) for v in (self.mean, self.std)]

    def apply(self, x: Tensor) -> Tensor:
        """Unit scale to standardised; any leading axes."""
        mean, std = self._columns(x)
        return (x - mean) / std

    def invert(self, z: Tensor) -> Tensor:
        """Standardised to unit scale, unclamped; any leading axes."""
        mean, std = self._columns(z)
        return z * std + mean

    @classmethod
    def of(cls, raw: Tensor, scale: float) -> Standardise:
        """Mean and standard deviation of inputs (N, C, H, W) or (N, F), exact, without a copy of them in float."""
        trailing = raw.ndim - 2
        axes = [0, *range(2, raw.ndim)]
        # float64 sums of differences from one value of the channel: nothing cancels, and a constant gives exactly 0
        first = raw[:1].flatten(2)[:, :, :1].double() if trailing else raw[:1].double()
        first = first.view(1, -1, *(1,) * trailing)
        total, square, count = 0.0, 0.0, raw.numel() // raw.shape[1]
        for part in raw.split(4096):
            part = (part.double() - first) / scale
            total, square = total + part.sum(axes), square + part.square().sum(axes)
        shift = torch.as_tensor(total / count)
        std = (torch.as_tensor(square / count) - shift.square()).clamp(min=0).sqrt()
        mean = shift + first.flatten() / scale
        std = torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))  # less is the rounding of float32
        places = [max(6, 4 - math.floor(math.log10(v))) for v in std.tolist()]  # small units keep their digits
        means, stds = (tuple(map(round, column.tolist(), places)) for column in (mean, std))
        return cls(means, stds, trailing)


@dataclass(frozen=True)
class Split:
    """Inputs (N, *shape) in the source's type, labels (N,) and groups (N,): classes, here the labels again."""

    inputs: Tensor
    labels: Tensor

    @property
    def groups(self) -> Tensor:
        return self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Split:
        return Split(self.inputs[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """A labelled data set with its transform and task.

    Args:
        name: What records and sets call it.
        train: What is learned from.
        test: Read once, at the end.
        class_names: One per class.
        scale: Raw inputs are divided by this to come to unit scale: 255 for bytes.
        transform: Unit scale to what networks see.
        task: Loss and score.
        heldout: A part of the training data that `train` no longer has; may be empty.
        mirror: Whether a mirrored input keeps its class; where not, augmentations leave `flip` out.

    Example:
        >>> data = load_data("digits")
        >>> data.shape, len(data.train) + len(data.test)
        ((1, 8, 8), 1797)
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    scale: float
    transform: Standardise
    task: Classification
    fingerprint: str
    heldout: Split
    mirror: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def counts(self) -> Tensor:
        """Training samples per group (G,)."""
        return torch.bincount(self.train.groups, minlength=self.task.classes)

    def prepare(self, raw: Tensor) -> Float[Tensor, ...]:
        """Raw inputs to what networks see: float32, standardised."""
        return self.transform.apply(raw.float() / self.scale)

    def display(self, prepared: Tensor) -> Tensor:
        """What networks see back to a range of about 0 to 1 for pictures, unclamped."""
        unit = self.transform.invert(prepared)
        if self.scale != 1:
            return unit
        raw = self.train.inputs
        low, high = float(raw.min()), float(raw.max())
        return (unit - low) / (high - low if high > low else 1.0)

    def hold_out(self, fraction: float) -> Data:
        """The same data with a stratified part of `train` moved to `heldout`, the same part whatever the seed; what was
        held out before goes back first.

        Raises:
            PotstillError: The fraction is not in [0, 0.5].
        """
        if not 0 <= fraction <= 0.5:
            raise PotstillError(f"--holdout {fraction:g} is not between 0 and 0.5")
        inputs = torch.cat([self.train.inputs, self.heldout.inputs]) if len(self.heldout) else self.train.inputs
        whole = Split(inputs, torch.cat([self.train.labels, self.heldout.labels]))
        out = stratified(whole.groups, fraction, Key(0).fold("holdout"))
        return replace(self, train=whole[~out], heldout=whole[out])

    def describe(self) -> dict[str, Any]:
        """What a record keeps of it."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "classes": self.task.classes,
            "class_names": list(self.class_names),
            "shape": list(self.shape),
            "train": len(self.train),
            "heldout": len(self.heldout),
            "test": len(self.test),
        }

    @classmethod
    def from_arrays(
        cls,
        x_train: Any,
        y_train: Any,
        x_test: Any,
        y_test: Any,
        *,
        name: str = "arrays",
        class_names: Sequence[str] | None = None,
        scale: float | None = None,
        mirror: bool = True,
    ) -> Data:
        """A data set from arrays or tensors.

        Args:
            x_train: (N, F) vectors, or images (N, H, W), (N, C, H, W) or (N, H, W, C); bytes or floats.
            y_train: (N,) labels: integers or strings, not necessarily 0 ... C-1.
            x_test: Like `x_train`.
            y_test: Like `y_train`, with no class that the training data lack.
            name: What records call it.
            class_names: In the order of the sorted labels; the labels themselves if absent.
            scale: Divisor to unit scale; 255 for bytes and 1 otherwise if absent.
            mirror: Whether a mirrored input keeps its class.

        Raises:
            PotstillError: Shapes that do not fit each other or are ambiguous, a value that is not finite, fewer than
                two classes, a class of the test data that training lacks.

        Example:
            >>> x, y = np.random.rand(20, 5), np.arange(20) % 2
            >>> Data.from_arrays(x, y, x, y).shape
            (5,)
        """
        train_x, test_x = _inputs(x_train, "x_train"), _inputs(x_test, "x_test")
        if train_x.shape[1:] != test_x.shape[1:]:
            raise PotstillError(
                f"{name}: x_train has inputs of shape {tuple(train_x.shape[1:])}, x_test of {tuple(test_x.shape[1:])}"
            )
        raw_train, raw_test = _labels(y_train, "y_train", len(train_x)), _labels(y_test, "y_test", len(test_x))
        values, train_y = np.unique(raw_train, return_inverse=True)
        if len(values) < 2:
            raise PotstillError(f"{name}: y_train has one class only ({values[0]}); at least two are needed")
        strange = np.setdiff1d(raw_test, values)
        if len(strange):
            raise PotstillError(f"{name}: y_test has classes that y_train lacks: {', '.join(map(str, strange[:5]))}")
        names = tuple(
            v.decode(errors="replace") if isinstance(v, bytes) else str(v)
            for v in (values if class_names is None else class_names)
        )
        if len(names) != len(values):
            raise PotstillError(f"{name}: {len(names)} class names for {len(values)} classes")
        scale = scale or (255.0 if train_x.dtype == torch.uint8 else 1.0)
        train = Split(train_x, torch.from_numpy(train_y.astype(np.int64)))
        test = Split(test_x, torch.from_numpy(np.searchsorted(values, raw_test).astype(np.int64)))
        transform = Standardise.of(train_x, scale)
        task, mark = Classification(len(names)), _hash(train, test)
        return cls(name, train, test, names, scale, transform, task, mark, train[:0], mirror)


def stratified(groups: Tensor, fraction: float, key: Key) -> Tensor:
    """A mask (N,) that takes the given fraction, rounded, of every group; at least one sample of each is left."""
    mask = torch.zeros(len(groups), dtype=torch.bool)
    for g in groups.unique().tolist():
        members = (groups == g).nonzero().flatten()
        take = min(round(fraction * len(members)), len(members) - 1)
        mask[members[key.fold(g).permutation(len(members))[:take]]] = True
    return mask


def _hash(*splits: Split) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for split in splits:
        for tensor in (split.inputs, split.labels):
            digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _array(x: Any, what: str) -> np.ndarray:
    """What a user has, as an array."""
    if isinstance(x, Tensor):
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)
    try:
        return np.asarray(x)
    except ValueError as error:  # rows of different lengths
        raise PotstillError(f"{what} is no regular array ({first_line(error)})") from error


def numbers(x: Any, what: str) -> np.ndarray:
    """Raw inputs as the library keeps them: bytes stay bytes (true and false are 255 and 0), all else is float32."""
    array = _array(x, what)
    if array.dtype.kind not in "uifb":
        raise PotstillError(f"{what} has elements of type {array.dtype}; numbers are needed")
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    with np.errstate(over="ignore"):  # becomes infinity, which is refused by name where it matters
        return array if array.dtype in (np.uint8, np.float32) else array.astype(np.float32)


def _inputs(x: Any, what: str) -> Tensor:
    """An array as a tensor (N, C, H, W) or (N, F), checked."""
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
        if first == last or max(first, last) <= 4 or min(first, last) > 32:
            raise PotstillError(
                f"{what} has shape {array.shape}, which does not tell whether channels are axis 1 or 3; "
                "give (N, H, W), or channels first with a number of channels that is clearly the smaller"
            )
        if last < first:
            array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _labels(y: Any, what: str, n: int) -> np.ndarray:
    array = _array(y, what)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.round(array)).all():
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iuUSb":
        raise PotstillError(f"{what} has shape {array.shape} and type {array.dtype}; one class per sample is needed")
    if len(array) != n:
        raise PotstillError(f"{what} has {len(array)} labels for {n} samples")
    return array


def _digits(root: Path) -> Data:
    """Scikit-learn's 8x8 digits (embedded there), a fixed stratified fifth of them as the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.images.astype(np.uint8), bunch.target
    test = stratified(torch.from_numpy(y), 0.2, Key(0).fold("digits", "test")).numpy()
    return Data.from_arrays(x[~test], y[~test], x[test], y[test], name="digits", scale=16.0, mirror=False)


def _torchvision(kind: str, name: str, mirror: bool) -> Callable[[Path], Data]:
    """A loader for one of torchvision's MNIST-shaped data sets, downloaded where absent."""

    def loader(root: Path) -> Data:
        from torchvision import datasets

        maker = getattr(datasets, kind)
        raw = root / kind / "raw"
        try:
            try:
                parts = [maker(root, train=train, download=False) for train in (True, False)]
            except RuntimeError as error:
                if "not found" not in str(error):  # torchvision's words for "not there"; else a damaged file
                    raise
                if raw.is_dir() and any(raw.iterdir()) and not os.access(raw, os.W_OK):
                    raise
                _download(lambda: maker(root, train=True, download=True), name, raw)
                parts = [maker(root, train=train, download=False) for train in (True, False)]
        except PotstillError:
            raise
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise PotstillError(
                f"{name} in {shown(root)} cannot be read ({type(error).__name__}: {first_line(error)}); "
                f"remove {shown(raw)} and run again, or put whole files there"
            ) from error
        (x, y), (tx, ty) = ((p.data.numpy(), p.targets.numpy()) for p in parts)
        if len(x) != len(y) or len(tx) != len(ty):
            raise PotstillError(f"{name} in {shown(root)} has a different number of images and labels; fetch it again")
        names = [c.split(" - ")[0] for c in parts[0].classes]  # MNIST's are "0 - zero"
        return Data.from_arrays(x, y, tx, ty, name=name, class_names=names, mirror=mirror)

    loader.__doc__ = f"Torchvision's {kind}, 28 x 28 grey; downloaded where absent."
    return loader


def _download(fetch: Callable[[], Any], name: str, folder: Path, patience: float = 25.0) -> None:
    """Run a download; give up with the manual steps once `patience` seconds bring no new byte."""
    problem: list[BaseException] = []

    def run() -> None:
        try:
            fetch()
        except BaseException as error:  # noqa: BLE001  (handed to the waiting thread)
            problem.append(error)

    def size() -> int:
        return sum(f.stat().st_size for f in folder.glob("*")) if folder.is_dir() else 0

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
        raise PotstillError(
            f"{name} is not in {shown(folder)} and cannot be downloaded ({why}); put its four idx files "
            f"(train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte) there, "
            f"or point --data-root or {DATA_ROOT} at the folder that has {folder.parent.name}/raw"
        )


def _npz(path: Path) -> Data:
    """A `.npz` with x_train, y_train, x_test, y_test."""
    wanted = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            missing = [w for w in wanted if w not in file.files]
            if missing:
                raise PotstillError(
                    f"{path.name} lacks {', '.join(missing)}; it has {', '.join(file.files) or 'nothing'}"
                )
            arrays = [file[w] for w in wanted]
    except PotstillError:
        raise
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise PotstillError(
            f"{path.name} is not a whole .npz of plain arrays ({type(error).__name__}: {first_line(error)})"
        ) from error
    return Data.from_arrays(*arrays, name=path.stem)


LOADERS: dict[str, Callable[[Path], Data]] = {
    "digits": _digits,
    "fashion-mnist": _torchvision("FashionMNIST", "fashion-mnist", mirror=True),
    "mnist": _torchvision("MNIST", "mnist", mirror=False),
}


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut short; empty where it has none."""
    return next(iter(str(error).splitlines()), "")[:120]


def shown(path: Path) -> str:
    """A path as messages and records may show it: the data root prints as $POTSTILL_DATA."""
    root = os.environ.get(DATA_ROOT)
    if not root or not path.is_relative_to(Path(root).expanduser()):
        return str(path)
    return str(f"${DATA_ROOT}" / path.relative_to(Path(root).expanduser()))


def load_data(source: str | Path, root: str | Path | None = None) -> Data:
    """Load a data set by name or from a `.npz`.

    Args:
        source: One of `potstill list datasets`, or the path of a `.npz`.
        root: Folder of downloaded data; `POTSTILL_DATA`, else `~/.cache/potstill/data`, if absent.

    Raises:
        PotstillError: No such data set or file, or its content is damaged.
    """
    path = Path(source)
    if str(source) in LOADERS:
        base = Path(root or os.environ.get(DATA_ROOT) or Path.home() / ".cache" / "potstill" / "data").expanduser()
        return LOADERS[str(source)](base)
    if path.suffix == ".npz":
        if not path.is_file():
            raise PotstillError(f"no file {path}")
        return _npz(path)
    raise unknown("data set", str(source), LOADERS, "`potstill list datasets` shows all; a path must end in .npz")
