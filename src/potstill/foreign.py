"""Other projects' distilled sets: the files of DC, DSA, DM and MTT, and `.npz`. Nothing in a file is executed."""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import Data, Standardise, first_line
from .errors import PotstillError
from .exchange import DistilledSet, describe_set
from .pickles import checked
from .recipe import find
from .strict import check_arrays

PROTOCOL = "dsa"  # what a set is judged by that asks for nothing
SUFFIXES = (".pt", ".pth", ".npz")
BEST = "images_best.pt"  # of a folder of MTT's
INPUTS, LABELS = ("x_train", "images", "x", "data"), ("y_train", "labels", "y")  # what arrays of a .npz are called
ASK = (
    "--normalisation is needed: what was done to its pixels. `standardise` (the data's own mean and standard deviation), `unit` "
    "(nothing: 0 to 1), or MEAN/STD; DC, DSA and DM used 0.2861/0.3530 for Fashion-MNIST, 0.1307/0.3081 for MNIST, "
    "0.4914,0.4822,0.4465/0.2023,0.1994,0.2010 for CIFAR-10; MTT whitened CIFAR by ZCA unless told otherwise, which cannot be undone here"
)


def is_foreign(path: str | Path) -> bool:
    """Whether a path looks like another project's set: a `.pt`, a `.npz`, or a folder of MTT's."""
    file, _ = located(path)
    if os.path.isdir(file):
        return not (file / "set.safetensors").exists() and any(file.glob("images_*.pt"))
    return file.suffix in SUFFIXES


def read(path: str | Path, data: Data, normalisation: str | None = None) -> list[DistilledSet]:
    """Another project's sets, as `evaluate` judges them. They ask for a ConvNet (vectors: an MLP) and the protocol `dsa`.

    Args:
        path: A `.pt` of DC, DSA or DM, which holds a set for each of its experiments (`file.pt#2` is number 2 of them,
            counted from 0); MTT's folder or one of its `images_*.pt`, with `labels_*.pt` beside; or a `.npz` with
            inputs (x_train, images, x or data) and labels (y_train, labels or y).
        data: What the sets stand for.
        normalisation: What was done to their inputs: `standardise` (the data's own mean and standard deviation), `unit`
            (nothing; they are standardised here), or `MEAN/STD` with commas between channels. A `.npz` may say it
            itself, in a string called `normalisation`.

    Raises:
        PotstillError: Nothing there, damaged, more in it than arrays and numbers, not for this data, or an unknown
            normalisation.

    Example:
        >>> read("res_DM_FashionMNIST_ConvNet_1ipc.pt", data, "0.2861/0.3530")  # doctest: +SKIP
    """
    file, at = located(path)
    if file.is_dir():
        if not (file / BEST).is_file():
            there = ", ".join(sorted(p.name for p in file.glob("images_*.pt"))[:4])
            raise PotstillError(f"{file} has no {BEST}; name one of its files: {there}")
        file = file / BEST
    if not file.is_file():
        raise PotstillError(f"no set at {file}")
    lr, own = None, None
    if file.suffix == ".npz":
        pairs, lr, own = _npz(file)
    else:
        pairs = _pt(file)
    if at is not None and at >= len(pairs):
        raise PotstillError(f"{file} holds {len(pairs)} sets, counted from 0; there is no number {at}")
    chosen = pairs if at is None else [pairs[at]]
    stated = own if own is not None else normalisation
    if stated is None:
        raise PotstillError(f"{file} does not say how its inputs were normalised; {ASK}")
    if own is not None and normalisation not in (None, own):
        raise PotstillError(
            f"{file} says that it was normalised by {own[:200]}; leave --normalisation {normalisation} out"
        )
    transform = _transform(stated, data)
    return [_made(file, x, y, data, transform, stated == "unit", lr) for x, y in chosen]


def files(path: str | Path) -> list[Path]:
    """The files that `read` opens for a path, whether they are there or not."""
    file, _ = located(path)
    file = file / BEST if file.is_dir() else file
    pair = _pair(file)
    return list(pair) if pair and all(f.is_file() for f in pair) else [file]


def located(path: str | Path) -> tuple[Path, int | None]:
    """A file and the number of a set in it; a file whose name ends in `#2` comes first."""
    found = re.fullmatch(r"(.+\.pth?)#([0-9]{1,9})", str(path), re.DOTALL)
    return (Path(found[1]), int(found[2])) if found and not os.path.exists(path) else (Path(path), None)


def stated_numbers(text: str) -> tuple[list[float], list[float]] | None:
    """Means and deviations that a normalisation gives; nothing for one that has a name.

    Raises:
        PotstillError: It is neither.
    """
    if text in ("standardise", "unit"):
        return None
    try:
        mean, std = ([float(v) for v in part.split(",")] for part in text.split("/"))
    except ValueError:
        raise PotstillError(
            f"--normalisation '{text}' is not standardise, unit, or MEAN/STD such as 0.2861/0.3530"
        ) from None
    return mean, std


def _transform(text: str, data: Data) -> Standardise:
    """What `--normalisation` says."""
    numbers = stated_numbers(text)
    if numbers is None:
        return Standardise.of(data.train.inputs, data.scale)
    channels, (mean, std) = data.shape[0], numbers
    mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
    if (len(mean), len(std)) != (channels, channels):
        raise PotstillError(
            f"--normalisation '{text}' has {len(mean)} means and {len(std)} deviations for {channels} channels"
        )
    if not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise PotstillError(
            f"--normalisation '{text}' has a deviation that is not above 0, or a value that is not finite"
        )
    return Standardise(tuple(mean), tuple(std), len(data.shape) - 1)


def _made(file: Path, x: Any, y: Any, data: Data, transform: Standardise, raw: bool, lr: Tensor | None) -> DistilledSet:
    """A set as our own are, from inputs and labels that a stranger wrote."""
    inputs, classes = _shaped(_tensor(x, file, "inputs"), data, file), data.task.classes
    labels = _labels(_tensor(y, file, "labels"), len(inputs), classes, file)
    if not all(t.isfinite().all() for t in (inputs, labels, lr) if t is not None):
        raise PotstillError(f"{file} holds values that are not finite")
    if raw:
        most = float(inputs.max())
        inputs = inputs.float() / data.scale if inputs.dtype == torch.uint8 else inputs.float()
        if data.scale != 1 and float(inputs.abs().max()) > 8:
            raise PotstillError(
                f"{file} has values up to {most:g}, which are no pixels from 0 to 1 (--normalisation unit)"
            )
        inputs = transform.apply(inputs)
    elif not inputs.is_floating_point():
        raise PotstillError(f"{file} holds whole numbers: pixels that nothing was done to, so --normalisation unit")
    hard = labels if labels.ndim == 1 else labels.argmax(1)
    counts = torch.bincount(hard, minlength=classes).tolist()
    about = describe_set(replace(data, transform=transform), find("random"), counts, 0, 0)
    student = "convnet" if len(data.shape) == 3 else "mlp"
    meta = replace(about, method="foreign", labels="hard" if labels.ndim == 1 else "soft", recipe={}, student=student,
                   protocol=PROTOCOL, software="unknown")  # fmt: skip
    return DistilledSet(inputs.float().contiguous(), labels, meta, lr)


def _shaped(x: Tensor, data: Data, file: Path) -> Tensor:
    """Inputs (M, *shape); channels may come last, and a grey image may have no axis for them."""
    shape = data.shape
    if len(x) and tuple(x.shape[1:]) != shape and len(shape) == 3:
        if tuple(x.shape[1:]) == (*shape[1:], shape[0]):
            x = x.permute(0, 3, 1, 2)
        elif shape[0] == 1 and tuple(x.shape[1:]) == shape[1:]:
            x = x[:, None]
    if len(x) == 0 or tuple(x.shape[1:]) != shape:
        raise PotstillError(f"{file} has inputs of shape {tuple(x.shape)}; {data.name} has inputs of shape {shape}")
    return x


def _labels(y: Tensor, count: int, classes: int, file: Path) -> Tensor:
    """Classes (M,) or probabilities (M, C)."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if len(y) != count:
        raise PotstillError(f"{file} has {len(y)} labels for {count} inputs")
    if y.ndim == 2 and y.shape[1] == classes:
        y = y.float()
        if not (y >= 0).all() or not torch.allclose(y.sum(1), torch.ones(count), atol=1e-3):
            raise PotstillError(f"{file} has labels that are no probabilities; give classes, or rows that sum to 1")
        return y
    if y.ndim != 1 or (y.is_floating_point() and not torch.equal(y, y.round())):
        raise PotstillError(
            f"{file} has labels of shape {tuple(y.shape)}; a class for each input, or {classes} probabilities"
        )
    y = y.long()
    if not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise PotstillError(f"{file} has labels from {int(y.min())} to {int(y.max())}; the data have {classes} classes")
    return y


def _tensor(x: Any, file: Path, what: str) -> Tensor:
    """A plain tensor of numbers, with memory behind every one of them."""
    if isinstance(x, np.ndarray) and x.dtype.kind in "uif" and x.dtype.itemsize <= 8 and x.dtype != np.uint64:
        x = torch.from_numpy(np.require(x, x.dtype.newbyteorder("="), ["C", "W"]))
    plain = isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized
    if not plain or x.is_complex() or x.ndim == 0:
        raise PotstillError(f"{file} has {what} that are no plain array of numbers ({type(x).__name__})")
    if x.numel() * x.element_size() > x.untyped_storage().nbytes():
        raise PotstillError(f"{file} is damaged: it has fewer {what} than it says")
    return x.detach()


# --- files


def _npz(file: Path) -> tuple[list[tuple[Any, Any]], Tensor | None, str | None]:
    """Inputs and labels of a `.npz`, a learning rate and the normalisation where it has them."""
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
            names = set(found.files)
            x, y = (next((n for n in wanted if n in names), None) for wanted in (INPUTS, LABELS))
            if x is None or y is None:
                lacking = " or ".join(INPUTS if x is None else LABELS)
                raise PotstillError(f"{file} lacks {lacking}; it has {', '.join(found.files) or 'nothing'}")
            y = "soft_labels" if "soft_labels" in names else y
            wanted = [x, y, *(n for n in ("lr", "normalisation") if n in names)]
            check_arrays(handle, wanted)
            arrays = {n: found[n] for n in wanted}
            own = str(arrays["normalisation"]).encode().decode() if "normalisation" in arrays else None
    except PotstillError:
        raise
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise PotstillError(
            f"{file} is not a whole .npz of plain arrays ({type(error).__name__}: {first_line(error)})"
        ) from error
    rate = arrays.get("lr")
    if rate is not None and (rate.dtype.kind != "f" or rate.ndim > 1 or not rate.size):
        raise PotstillError(f"{file} has a learning rate (lr) that is not one number, nor one for each step")
    lr = None if rate is None else torch.from_numpy(rate.astype("float32"))
    return [(arrays[x], arrays[y])], lr, own


def _pair(file: Path) -> tuple[Path, Path] | None:
    """Images and labels that lie in a file each, by the name of one of them; nothing for another name."""
    head, _, tail = file.name.partition("_")
    if head not in ("images", "labels") or not tail or file.suffix not in (".pt", ".pth"):
        return None
    images, labels = (file.with_name(f"{kind}_{tail}") for kind in ("images", "labels"))
    return images, labels


def _pt(file: Path) -> list[tuple[Any, Any]]:
    """Pairs of images and labels in a `.pt`."""
    held = _unpickled(file)
    if isinstance(held, Tensor):
        pair = _pair(file)
        if pair is None:
            raise PotstillError(
                f"{file} holds one tensor; a file images_NAME.pt with labels_NAME.pt beside it is needed"
            )
        images, labels = pair
        if not images.is_file() or not labels.is_file():
            raise PotstillError(f"{file} needs {(labels if images.is_file() else images).name} beside it")
        return [(_unpickled(images), _unpickled(labels))]
    pairs = held.get("data") if isinstance(held, dict) else None
    if (
        not isinstance(pairs, list | tuple)
        or not pairs
        or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs)
    ):
        raise PotstillError(f"{file} is no set of DC, DSA or DM: {{'data': [[images, labels], ...]}} is needed")
    return [(p[0], p[1]) for p in pairs]


class _Kind:
    """Stands for a NumPy type in a pickle: its name, and the byte order that is set afterwards."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _scalar(kind: Any, content: Any = b"") -> float:
    """Stands for NumPy's reading of one number: accuracies lie beside the images, and nothing here uses them."""
    if (
        not isinstance(kind, _Kind)
        or not re.fullmatch(r"[fiub][1248]", str(kind.code))
        or kind.order not in ("<", ">", "|")
    ):
        raise pickle.UnpicklingError("a number of a type that is not known")
    order = ">" if kind.order == ">" else "<"
    return float(np.frombuffer(content, order + kind.code, count=1)[0])


ALLOWED: list[Any] = [
    (_Kind, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def _unpickled(file: Path) -> Any:
    """What a `.pt` holds, as far as it is tensors, numbers, words and lists and dicts of them.

    Raises:
        PotstillError: It is damaged, or asks for anything else, which is not done.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
            warnings.simplefilter("ignore")  # of old forms of files
            return torch.load(io.BytesIO(checked(file.read_bytes())), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        wants = re.search(r"GLOBAL ([\w.]+)|([\w.]+) (?:was|which is) not an allowed", str(error))
        if wants:
            name = wants[1] or wants[2]
            raise PotstillError(
                f"{file} is refused: it wants {name} to be run, and a set needs tensors and numbers only"
            ) from error
        found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))  # what lies behind PyTorch's advice on options
        why = found[1][:120] if found else first_line(error)
        raise PotstillError(f"{file} is damaged, or no .pt of tensors and numbers ({why})") from error
