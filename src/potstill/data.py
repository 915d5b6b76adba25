"""A data set: inputs in the source's own type, labels, groups; its transform; its task.

Shape, channels, classes, mean and standard deviation are found, not asked for; `loaders` has the names and readers.
What a run learns from is `train`; a stratified part of it can be held out for looks and choices, and `test` is for the
one reading at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .arrays import as_inputs, as_labels, first_line, numbers, read_items
from .errors import PotstillError
from .functional import Key
from .transforms import Standardise, Transform, check_transform, learned

__all__ = ["Classification", "Data", "Split", "Standardise", "first_line", "load_data", "numbers", "stratified"]


@dataclass(frozen=True)
class Classification:
    """Naming one of several classes; accuracy in [0, 1] is the score.

    Args:
        classes: How many.
        fit: The loss: `cross-entropy` of logits against classes or probabilities, or `squared`: half the squared distance
            of outputs to centred labels.
    """

    classes: int
    fit: str = "cross-entropy"

    metric = "accuracy"

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return self.classes

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits (N, C) against classes (N,), probabilities (N, C) or, squared, centred labels (N, C)."""
        if self.fit == "squared":
            return 0.5 * (logits - self.centred(labels)).square().sum(1).mean()
        return F.cross_entropy(logits, labels)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each sample (N,): `loss` before the mean."""
        if self.fit == "squared":
            return 0.5 * (logits - self.centred(labels)).square().sum(1)
        return F.cross_entropy(logits, labels, reduction="none")

    def centred(self, labels: Tensor) -> Tensor:
        """Classes (N,) as one-hot rows less their mean 1/C; rows (N, C) stay as they are."""
        if labels.is_floating_point():
            return labels
        hot = labels[..., None] == torch.arange(self.classes, device=labels.device)  # one_hot does not run under vmap
        return hot.float() - 1 / self.classes

    def score(self, logits: Tensor, labels: Tensor) -> float:
        """Accuracy of logits (N, C) against classes (N,)."""
        return float((logits.argmax(1) == labels).double().mean())


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
        name: What records and sets call it, and what `load_data` finds it by again.
        train: What is learned from.
        test: Read once, at the end.
        class_names: One per class.
        scale: Raw inputs are divided by this to come to unit scale: 255 for bytes.
        transform: Unit scale to what networks see.
        task: Loss and score.
        fingerprint: Hash of inputs and labels.
        heldout: A part of the training data that `train` no longer has; may be empty.
        mirror: Whether a mirrored input keeps its class; where not, augmentations leave `flip` out.
        ordered: The rows lie in `holdout_order`, so that any held-out part is their end and costs no copy.

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
    transform: Transform
    task: Classification
    fingerprint: str
    heldout: Split
    mirror: bool = True
    ordered: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def counts(self) -> Tensor:
        """Training samples per group (G,)."""
        return torch.bincount(self.train.groups, minlength=self.task.classes)

    def prepare(self, raw: Tensor) -> Float[Tensor, ...]:
        """Raw inputs to what networks see: float32, through the transform."""
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
        whole = self.whole
        if self.ordered:
            out = _last(whole.groups, fraction)
            first = len(whole) - int(out.sum())
            if bool(out[first:].all()):
                return replace(self, train=whole[:first], heldout=whole[first:])
        else:
            out = stratified(whole.groups, fraction, Key(0).fold("holdout"))
        return replace(self, train=whole[~out], heldout=whole[out])

    @property
    def whole(self) -> Split:
        """All of the training data, what is held out included."""
        if not len(self.heldout):
            return self.train
        return Split(
            _joined(self.train.inputs, self.heldout.inputs), torch.cat([self.train.labels, self.heldout.labels])
        )

    def with_transform(self, name: str) -> Data:
        """The same data under another transform, found from all of the training data.

        Args:
            name: `standardise`, `zca` or `none`.

        Raises:
            PotstillError: No such transform, or more features than it can whiten.
        """
        check_transform(name)
        if name == self.transform.name:
            return self
        raw = self.whole.inputs
        plain = self.transform if isinstance(self.transform, Standardise) else Standardise.of(raw, self.scale)
        return replace(self, transform=learned(name, raw, self.scale, plain, self.fingerprint))

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in self.name.removeprefix("hf:"))

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
        channels: str | None = None,
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
            channels: `first` or `last` axis of an image; found by their number if absent.

        Raises:
            PotstillError: Shapes that do not fit each other or are ambiguous, a value that is not finite, fewer than
                two classes, a class of the test data that training lacks.

        Example:
            >>> x, y = np.random.rand(20, 5), np.arange(20) % 2
            >>> Data.from_arrays(x, y, x, y).shape
            (5,)
        """
        if channels not in (None, "first", "last"):
            raise PotstillError(f"channels='{channels}' is neither 'first' nor 'last'")
        train_x, test_x = as_inputs(x_train, "x_train", channels), as_inputs(x_test, "x_test", channels)
        if train_x.shape[1:] != test_x.shape[1:]:
            raise PotstillError(
                f"{name}: x_train has inputs of shape {tuple(train_x.shape[1:])}, x_test of {tuple(test_x.shape[1:])}"
            )
        raw_train, raw_test = as_labels(y_train, "y_train", len(train_x)), as_labels(y_test, "y_test", len(test_x))
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
        task, mark = Classification(len(names)), fingerprint_of(train, test)
        return cls(name, train, test, names, scale, transform, task, mark, train[:0], mirror)

    @classmethod
    def from_datasets(
        cls,
        train: Any,
        test: Any,
        *,
        name: str = "datasets",
        class_names: Sequence[str] | None = None,
        scale: float | None = None,
        mirror: bool = True,
    ) -> Data:
        """A data set from two map-style `torch.utils.data.Dataset`s, read once from first to last.

        Args:
            train: Items (input, label): a PIL image (1, L, P, RGB or RGBA), a tensor (channels first) or an array, all
                of one shape; and a whole number.
            test: Likewise.
            name: What records call it.
            class_names: Label i is called `class_names[i]`; `train.classes` if absent and there, else the labels.
            scale: As for `from_arrays`.
            mirror: Likewise.

        Raises:
            PotstillError: No map-style dataset; an item that is no pair or of another shape than the first; a label
                that is no whole number or outside the classes; and all that `from_arrays` refuses.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> made = TensorDataset(torch.rand(20, 3, 8, 8), torch.arange(20) % 2)
            >>> Data.from_datasets(made, made).shape
            (3, 8, 8)
        """
        names = class_names if class_names is not None else getattr(train, "classes", None)
        x, y, channels = read_items(train, "train", names)
        test_x, test_y, _ = read_items(test, "test", names)
        missing = sorted(set(range(len(names or ()))) - set(y.tolist()))
        if names is not None and missing:
            raise PotstillError(f"{name}: train has no sample of class {missing[0]} ({names[missing[0]]})")
        return cls.from_arrays(
            x, y, test_x, test_y, name=name, class_names=names, scale=scale, mirror=mirror, channels=channels
        )


def stratified(groups: Tensor, fraction: float, key: Key) -> Tensor:
    """A mask (N,) that takes the given fraction, rounded, of every group; at least one sample of each is left."""
    mask = torch.zeros(len(groups), dtype=torch.bool)
    for g in groups.unique().tolist():
        members = (groups == g).nonzero().flatten()
        take = min(round(fraction * len(members)), len(members) - 1)
        mask[members[key.fold(g).permutation(len(members))[:take]]] = True
    return mask


def _last(groups: Tensor, fraction: float) -> Tensor:
    """A mask (N,) like that of `stratified`, for rows in `holdout_order`: the last ones of every group."""
    mask = torch.zeros(len(groups), dtype=torch.bool)
    for g in groups.unique().tolist():
        members = (groups == g).nonzero().flatten()
        take = min(round(fraction * len(members)), len(members) - 1)
        mask[members[len(members) - take :]] = True
    return mask


def holdout_order(groups: Tensor) -> Tensor:
    """An order (N,) of rows in which the part held out is the end of the rows, whatever its share.

    The members of each group are drawn in a fixed random order; the k-th of n stands at 1 - (k + 1/2) / n of the way.
    """
    place = torch.empty(len(groups), dtype=torch.float64)
    for g in groups.unique().tolist():
        members = (groups == g).nonzero().flatten()
        shuffled = members[Key(0).fold("holdout").fold(g).permutation(len(members))]
        place[shuffled] = (torch.arange(len(members)) + 0.5).double() / len(members)
    return torch.argsort(place, descending=True, stable=True)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Rows of two tensors, one after the other; without a copy where they are neighbours in memory already."""
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if same and first.is_contiguous() and first.storage_offset() + first.numel() == second.storage_offset():
        return first.as_strided((len(first) + len(second), *first.shape[1:]), first.stride())
    return torch.cat([first, second])


def fingerprint_of(*splits: Split) -> str:
    """Hash of inputs and labels."""
    digest = hashlib.blake2b(digest_size=8)
    for split in splits:
        for tensor in (split.inputs, split.labels):
            digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_data(source: str | Path, root: str | Path | None = None, transform: str = "standardise") -> Data:
    """Load a data set.

    Args:
        source: A name of `potstill list datasets`; the path of a `.npz`; that of a folder of images, `train/<class>/*`
            and `test/<class>/*` or `val/<class>/*`; or `hf:` and a repository or folder for the `datasets` library.
            A path that is not there is looked for below `root`, with `.npz` behind it too.
        root: Folder of data; `POTSTILL_DATA`, else `~/.cache/potstill/data`, if absent.
        transform: `standardise`, `zca` or `none`.

    Returns:
        The data. Their name leads back to them: it is the source's own name, or the path below `root` (the last part
        of a path elsewhere), without `.npz`, and without `hf:` unless the data come from a repository.

    Raises:
        PotstillError: No such data set or file, or its content is damaged.
    """
    from .loaders import load

    check_transform(transform)
    return load(str(source), root).with_transform(transform)
