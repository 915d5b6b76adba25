"""Sets as files: one `set.safetensors` with everything that the set needs to be used as it was meant."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor
from torch.utils.data import Dataset

from .arrays import first_line, numbers
from .data import Data
from .errors import PotstillError
from .places import SET, locate
from .recipe import Recipe, to_dict
from .records import write_whole
from .strict import check_plain, read_json
from .transforms import Transform, build, describe, digest_of, find_beside, find_cached, plain_part, write_beside

FORMAT = 1
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HEADER = "potstill"  # one key: safetensors does not keep the order of several, and the same set must be the same bytes


@dataclass(frozen=True)
class Meta:
    """What a set says of itself.

    Args:
        method: Alias of the recipe.
        data: Name of the data set that it stands for; `load_data` finds the data by it.
        fingerprint: Of that data.
        class_names: One per class.
        ipc: Images of each class.
        labels: Convention of the labels: `hard` (classes), `soft` (probabilities) or `centred` (around 0, for squared losses).
        transform: Its name and numbers, a whitening matrix by its hash; inputs are stored transformed, unclamped.
        scale: Divisor of raw inputs to unit scale.
        limits: What 0 and 1 of a picture mean in unit scale.
        mirror: Whether a mirrored input keeps its class.
        student: Network that the set asks for.
        protocol: Evaluation that it asks for.
        recipe: The recipe, whole.
        seed: Of the run.
        steps: That it was distilled for when this file was written.
        software: Version that wrote it.
        teacher: Who gave soft labels: network, protocol, temperature and the held-out accuracies that it was chosen by.
    """

    method: str
    data: str
    fingerprint: str
    class_names: list[str]
    ipc: list[int]
    labels: str
    transform: dict[str, Any]
    scale: float
    limits: list[float]
    mirror: bool
    student: str
    protocol: str
    recipe: dict[str, Any]
    seed: int
    steps: int
    software: str
    teacher: dict[str, Any] | None = None


class DistilledSet(Dataset[tuple[Tensor, Tensor]]):
    """A distilled set: a `torch.utils.data.Dataset` of (input, label), transformed as the networks want it.

    Attributes:
        inputs: (M, *shape) float32, transformed, not clamped.
        labels: (M,) int64 classes, or (M, C) probabilities or centred labels.
        lr: The learning rates (1,) or (steps,) that go with it, where the method trains on it.
        meta: What the set says of itself.
        matrix: The whitening matrix (d, d), if the transform has one. It lies beside a set, or is found in the cache where the
            training data have been whitened before; without it a set can still be trained on.

    Example:
        >>> set_ = load("fashion-mnist/dm/1")  # doctest: +SKIP
        >>> x, y = set_[0]  # doctest: +SKIP
    """

    def __init__(
        self, inputs: Tensor, labels: Tensor, meta: Meta, lr: Tensor | None = None, matrix: Tensor | None = None
    ) -> None:
        self.inputs, self.labels, self.meta, self.lr, self.matrix = inputs, labels, meta, lr, matrix

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.inputs.shape[1:])

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of inputs and of labels as they are stored."""
        return {"input_bytes": self.inputs.nbytes, "label_bytes": self.labels.nbytes}

    @property
    def classes(self) -> Tensor:
        """The class of each sample (M,), the most probable one where labels are soft."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)

    @cached_property
    def standardise(self) -> Transform:
        """The transform that the inputs have been through, whichever it is.

        Raises:
            PotstillError: It is a whitening whose matrix is neither beside the set nor in the cache.
        """
        try:
            return build(self.meta.transform, self.matrix)
        except PotstillError as error:
            if self.blind:
                cure = f"potstill.load_data({self.meta.data[:80]!r}, transform='zca')"
                raise PotstillError(
                    f"{error}; its training data give it: {cure}, then load the set again, or `potstill evaluate`"
                ) from error
            raise

    @property
    def blind(self) -> bool:
        """Whether it is whitened and the matrix is not there: it can be trained on, but prepares no inputs."""
        return self.matrix is None and self.meta.transform.get("name") == "zca"

    def whitened(self, matrix: Tensor) -> DistilledSet:
        """The set with a matrix (d, d) that its training data gave again: the same up to rounding, with its own hash."""
        meta = replace(self.meta, transform={**self.meta.transform, "matrix": digest_of(matrix)})
        return DistilledSet(self.inputs, self.labels, meta, self.lr, matrix)

    def transform(self, raw: Any) -> Tensor:
        """Your own inputs as the set's are: raw (bytes, or what the source had) to transformed float32.

        Args:
            raw: (*shape) or (N, *shape), array or tensor, in the type of the source data. A grey image (H, W), and
                images (H, W, C) whose channels are last, as PIL gives them, are turned round.
        """
        x = torch.from_numpy(numbers(raw, "raw").astype("float32"))
        if tuple(x.shape) == self.shape:
            pass
        elif len(self.shape) == 3 and tuple(x.shape) in (self.shape[1:], (*self.shape[1:], self.shape[0])):
            x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)
        elif len(self.shape) == 3 and self.shape[0] == 1 and x.ndim == 3 and x.shape[1:] == self.shape[1:]:
            x = x[:, None]
        if tuple(x.shape[-len(self.shape) :]) != self.shape:
            raise PotstillError(f"inputs of shape {tuple(x.shape)} do not fit a set of {self.shape}")
        return self.standardise.apply(x / self.meta.scale)

    @property
    def images(self) -> Tensor:
        """(M, *shape) in a picture's range of about 0 to 1, not clamped."""
        low, high = self.meta.limits
        return (self.standardise.invert(self.inputs) - low) / (high - low)

    def save(self, path: str | Path, self_contained: bool = False) -> None:
        """Write one `.safetensors`, whole or not at all.

        Args:
            path: The file. A whitening matrix comes to lie beside it, in a file named by its hash.
            self_contained: The matrix goes into the file itself.
        """
        if self.matrix is not None and not self_contained:
            write_beside(Path(path).parent, self.standardise)
        write_whole(Path(path), self.encoded(self_contained))

    def encoded(self, self_contained: bool = False) -> bytes:
        """The bytes that `save` writes, with the whitening matrix among them or without."""
        tensors = {"inputs": self.inputs.contiguous(), "labels": self.labels.contiguous()}
        if self.lr is not None:
            tensors["lr"] = self.lr
        if self.matrix is not None and self_contained:
            tensors["matrix"] = self.matrix.contiguous()
        header = json.dumps({"format": FORMAT, **asdict(self.meta)}, sort_keys=True)
        return bytes(encode(tensors, metadata={HEADER: header}))


def describe_set(data: Data, recipe: Recipe, counts: list[int], seed: int, steps: int) -> Meta:
    """What a set made from this data by this recipe says of itself."""
    from . import __version__

    raw = data.train.inputs
    limits = [0.0, 1.0] if data.scale != 1 else [float(raw.min()), float(raw.max())]
    return Meta(
        method=recipe.method,
        data=data.name,
        fingerprint=data.fingerprint,
        class_names=list(data.class_names),
        ipc=counts,
        labels={"logits": "soft", "centred": "centred"}.get(recipe.labels, "hard"),
        transform=describe(data.transform),
        scale=data.scale,
        limits=limits if limits[1] > limits[0] else [0.0, 1.0],
        mirror=data.mirror,
        student=recipe.student,
        protocol=recipe.protocol,
        recipe=to_dict(recipe),
        seed=seed,
        steps=steps,
        software=__version__,
    )


def load(path: str | Path) -> DistilledSet:
    """Read a set.

    Args:
        path: A `.safetensors` that Potstill wrote, or a folder with a `set.safetensors` in it; or, where no such path is
            there, a name of the zoo, such as `fashion-mnist/dm/1`.

    Raises:
        PotstillError: Nothing there, damaged, or not a set.
    """
    file = locate(path)
    file = file / SET if os.path.isdir(file) else file
    if not os.path.isfile(file):  # unlike Path.is_file, at ease with a name that is too long for one
        raise PotstillError(
            f"no set at {file}; a folder with a {SET}, such a file, or a name of `potstill list zoo` is needed"
        )
    tensors, header, _ = read_tensors(file, "set")
    try:
        check_plain(header)
        if header.pop("format") != FORMAT:
            raise PotstillError(f"{file} has a format that this version of potstill does not know; a newer one does")
        meta, matrix = Meta(**header), tensors.get("matrix")
        matrix = find_beside(file.parent, meta.transform) if matrix is None else matrix
        made = DistilledSet(tensors["inputs"], tensors["labels"], meta, tensors.get("lr"), matrix)
        _check(made, file)
        if made.blind and (matrix := find_cached(meta.transform, meta.fingerprint, made.shape)) is not None:
            made = made.whitened(matrix)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, PotstillError):
            raise
        raise PotstillError(f"{file} is no distilled set: {first_line(error)}") from error
    return made


def _check(made: DistilledSet, file: Path) -> None:
    """Refuse a set whose parts do not fit each other."""
    inputs, labels, meta = made.inputs, made.labels, made.meta
    words = ("method", "data", "fingerprint", "labels", "student", "protocol", "software")
    wrong = [w for w in words if not isinstance(getattr(meta, w), str)]
    wrong += [w for w in ("seed", "steps") if type(getattr(meta, w)) is not int]
    wrong += [w for w in ("recipe", "transform") if not isinstance(getattr(meta, w), dict)]
    wrong += [] if isinstance(meta.mirror, bool) else ["mirror"]
    wrong += [] if isinstance(meta.teacher, dict | None) else ["teacher"]
    wrong += [] if _listed(meta.class_names, str) else ["class_names"]
    wrong += [] if _listed(meta.ipc, int) and min(meta.ipc, default=0) >= 0 else ["ipc"]
    numbers = all(type(v) in (int, float) for v in (meta.scale, *meta.limits)) and 0 < meta.scale < float("inf")
    if wrong or not numbers or len(meta.limits) != 2 or not meta.limits[0] < meta.limits[1]:
        raise PotstillError(
            f"{file} is no distilled set: its {(wrong or ['scale or limits'])[0]} is not what it should be"
        )
    sizes = {len(inputs), len(labels), sum(meta.ipc)}
    classes = len(meta.class_names)
    plain = all(t is None or t.dtype in FLOATS for t in (inputs, made.lr, labels if labels.ndim > 1 else None))
    if len(sizes) > 1 or 0 in sizes or len(meta.ipc) != classes or inputs.ndim < 2 or 0 in inputs.shape or not plain:
        raise PotstillError(
            f"{file} is damaged: {tuple(inputs.shape)} inputs, {tuple(labels.shape)} labels, ipc {meta.ipc}"
        )
    if not all(t.isfinite().all() for t in (inputs, labels, made.lr) if t is not None):
        raise PotstillError(f"{file} holds values that are not finite")
    hard = labels.dtype == torch.int64 and labels.ndim == 1 and 0 <= int(labels.min()) <= int(labels.max()) < classes
    soft = labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] == classes
    if not hard and not soft:
        raise PotstillError(f"{file} has labels outside its {classes} classes")
    if (made.meta.labels == "hard") != hard or made.meta.labels not in ("hard", "soft", "centred"):
        raise PotstillError(f"{file} is damaged: its labels are not '{made.meta.labels[:40]}', as it says")
    if made.lr is not None and not (made.lr.is_floating_point() and made.lr.ndim < 2 and bool((made.lr > 0).all())):
        raise PotstillError(f"{file} is damaged: its learning rates are no numbers above 0")
    if hard and torch.bincount(labels, minlength=classes).tolist() != meta.ipc:
        raise PotstillError(f"{file} is damaged: its labels are not {meta.ipc} of each class")
    if made.matrix is not None and digest_of(made.matrix) != meta.transform.get("matrix"):
        raise PotstillError(f"{file} is damaged: its whitening matrix does not have the hash that it names")
    if made.matrix is not None and not (made.matrix.dtype == torch.float32 and made.matrix.isfinite().all()):
        raise PotstillError(f"{file} is damaged: its whitening matrix is no matrix of finite float32 numbers")
    seen = plain_part(meta.transform) if made.blind else made.standardise
    if not seen.fits(made.shape):
        raise PotstillError(f"{file} has a transform that does not fit inputs of shape {made.shape}")


def _listed(value: Any, kind: type) -> bool:
    """Whether a value is a list of one kind of plain values."""
    return isinstance(value, list) and all(type(v) is kind for v in value)


def read_tensors(file: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors and our JSON header of a `.safetensors`, parsed and as it is written.

    Raises:
        PotstillError: It is damaged or another program's.
    """
    try:
        content = file.read_bytes()
        tensors = decode(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
        header = read_json(metadata[HEADER], finite=False)
    except (SafetensorError, ValueError, OSError) as error:
        raise PotstillError(f"{file} is damaged or no safetensors file ({first_line(error)})") from error
    except KeyError as error:
        raise PotstillError(f"{file} is a safetensors file but no {kind} of potstill's") from error
    if not isinstance(header, dict):
        raise PotstillError(f"{file} has a damaged header")
    return tensors, header, metadata[HEADER]


def pack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON, its tensors put aside under running numbers.

    Args:
        tree: Nested dicts, lists and tuples of tensors, numbers, strings and None.
        tensors: Receives the tensors.
    """
    if isinstance(tree, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = tree.detach().cpu().contiguous().clone()  # no two share memory: safetensors refuses that
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": {k: pack(v, tensors) for k, v in tree.items()}}
    if isinstance(tree, tuple):
        return {"tuple": [pack(v, tensors) for v in tree]}
    if isinstance(tree, list):
        return {"list": [pack(v, tensors) for v in tree]}
    return tree


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind not in ("tensor", "dict", "tuple", "list"):
        raise ValueError(f"{str(kind)[:40]!r} is no part of a tree")
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: unpack(v, tensors) for k, v in value.items()}
    parts = [unpack(v, tensors) for v in value]
    return tuple(parts) if kind == "tuple" else parts
