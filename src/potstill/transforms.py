"""Transforms from unit scale to what networks see, their inverses, and how they travel with a set.

Three kinds, by name: `standardise`, `zca`, `none`. The field calls several different transforms ZCA; the one here is
FRePo's (see `ZCA`).
"""

from __future__ import annotations

import hashlib
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor

from .errors import PotstillError, unknown
from .records import cache, write_whole

PART = 4096  # samples at a time: a sum over a whole set needs no copy of it in float,
NUMBERS = 1 << 21  # and no more numbers than this
MOST = 16384  # features that are whitened at most: the matrix alone takes 1 GiB
REG = 0.1  # FRePo's


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

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether inputs (*shape) can go through it."""
        return {len(self.mean), len(self.std)} == {shape[0]} and self.trailing == len(shape) - 1

    @classmethod
    def of(cls, raw: Tensor, scale: float) -> Standardise:
        """Mean and standard deviation of inputs (N, C, H, W) or (N, F), exact, without a copy of them in float."""
        trailing = raw.ndim - 2
        axes = [0, *range(2, raw.ndim)]
        rows = min(PART, max(1, NUMBERS // math.prod(raw.shape[1:])))
        count = raw.numel() // raw.shape[1]
        if raw.dtype == torch.uint8:  # whole numbers: exact, and quicker
            sums, squares = torch.zeros(2, raw.shape[1], dtype=torch.int64)
            for part in raw.split(max(1, rows // 8)):  # a byte becomes eight in between
                sums += part.sum(axes, dtype=torch.int64)
                squares += part.int().square_().sum(axes, dtype=torch.int64)
            pairs = [(s, q) for s, q in zip(sums.tolist(), squares.tolist(), strict=True)]
            mean = torch.tensor([s / count / scale for s, _ in pairs], dtype=torch.float64)
            std = torch.tensor([math.sqrt(count * q - s * s) / count / scale for s, q in pairs], dtype=torch.float64)
            return cls._rounded(mean, std, trailing)
        # float64 sums of differences from one value of the channel: nothing cancels, and a constant gives exactly 0
        first = raw[:1].flatten(2)[:, :, :1].double() if trailing else raw[:1].double()
        first = first.view(1, -1, *(1,) * trailing)
        total, square = 0.0, 0.0
        for part in raw.split(rows):
            part = part.double().sub_(first).div_(scale)
            total, square = total + part.sum(axes), square + part.square().sum(axes)
        shift = torch.as_tensor(total / count)
        std = (torch.as_tensor(square / count) - shift.square()).clamp(min=0).sqrt()
        return cls._rounded(shift + first.flatten() / scale, std, trailing)

    @classmethod
    def _rounded(cls, mean: Tensor, std: Tensor, trailing: int) -> Standardise:
        """Of as many digits as are worth writing down."""
        std = torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))  # less is the rounding of float32
        places = [max(6, 4 - math.floor(math.log10(v))) for v in std.tolist()]  # small units keep their digits
        means, stds = (tuple(map(round, column.tolist(), places)) for column in (mean, std))
        return cls(means, stds, trailing)


@dataclass(frozen=True)
class ZCA:
    """Whitening after standardisation, FRePo's variant: z = W s, with s the standardised input laid out flat.

    With C = E[s sᵀ] over the training data, d the number of features and λ = reg · tr(C) / d,

        W = U diag((e + λ)^(-1/2)) Uᵀ,    C = U diag(e) Uᵀ.

    Nothing is subtracted but the channel means of the standardisation, so C is a second moment, not a covariance about
    the mean of each pixel. Other transforms of the name, not meant here: KIP's first gives every image zero mean and
    unit norm; others standardise nothing and add an absolute constant, 0.1, to the eigenvalues.

    Args:
        standardise: The step before.
        matrix: W (d, d), float32, symmetric.
        reg: λ as a share of the mean eigenvalue.
        digest: Hash of the matrix, by which it is found and checked.

    Reference:
        Zhou, Nezhadarya and Ba 2022, "Dataset Distillation using Neural Feature Regression".
    """

    standardise: Standardise
    matrix: Tensor = field(compare=False, repr=False)
    reg: float
    digest: str
    _places: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    name = "zca"

    @cached_property
    def inverse(self) -> Tensor:
        """W^-1 (d, d), solved in float64."""
        try:
            return torch.linalg.inv(self.matrix.double()).float()
        except torch.linalg.LinAlgError as error:
            raise PotstillError("the whitening of this set cannot be undone: its matrix has no inverse") from error

    def _turn(self, x: Tensor, which: str) -> Tensor:
        place = f"{which} {x.device} {x.dtype}"
        if place not in self._places:
            self._places[place] = (self.matrix if which == "matrix" else self.inverse).to(x.device, x.dtype)
        shape = x.shape[-1 - self.standardise.trailing :]
        return (x.flatten(-len(shape)) @ self._places[place]).unflatten(-1, shape)

    def apply(self, x: Tensor) -> Tensor:
        """Unit scale to whitened; any leading axes."""
        return self._turn(self.standardise.apply(x), "matrix")

    def invert(self, z: Tensor) -> Tensor:
        """Whitened to unit scale, unclamped; any leading axes."""
        return self.standardise.invert(self._turn(z, "inverse"))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether inputs (*shape) can go through it."""
        return self.standardise.fits(shape) and tuple(self.matrix.shape) == (math.prod(shape),) * 2

    @classmethod
    def of(cls, raw: Tensor, scale: float, standardise: Standardise, reg: float = REG) -> ZCA:
        """From training inputs (N, *shape), sums and eigenvectors in float64.

        Raises:
            PotstillError: More features than a matrix is made for.
        """
        size = raw[0].numel()
        if size > MOST:
            raise PotstillError(f"--transform zca whitens up to {MOST} numbers per input; these have {size}")
        moment = torch.zeros(size, size, dtype=torch.float64)
        for part in raw.split(PART):
            flat = standardise.apply(part.double() / scale).flatten(1)
            moment.addmm_(flat.T, flat)
        moment /= len(raw)
        values, vectors = torch.linalg.eigh(moment)
        root = (values.clamp(min=0) + reg * moment.trace() / size).rsqrt()
        matrix = (vectors * root) @ vectors.T
        matrix = ((matrix + matrix.T) / 2).float().contiguous()
        return cls(standardise, matrix, reg, digest_of(matrix))


@dataclass(frozen=True)
class Nothing:
    """The transform that changes nothing: networks see unit scale."""

    name = "none"

    def apply(self, x: Tensor) -> Tensor:
        """The same."""
        return x

    def invert(self, z: Tensor) -> Tensor:
        """The same."""
        return z

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether inputs (*shape) can go through it: all can."""
        return True


Transform = Standardise | ZCA | Nothing
TRANSFORMS = ("standardise", "zca", "none")


def check_transform(name: str) -> None:
    """Refuse a transform that does not exist.

    Raises:
        PotstillError: With the ones that do.
    """
    if name not in TRANSFORMS:
        raise unknown("transform", name, TRANSFORMS)


def digest_of(matrix: Tensor) -> str:
    """Hash of a matrix: its bytes and shape."""
    content = matrix.detach().cpu().contiguous()
    head = repr((str(content.dtype), tuple(content.shape))).encode()
    return hashlib.blake2b(head + content.numpy().tobytes(), digest_size=8).hexdigest()


def learned(name: str, raw: Tensor, scale: float, standardise: Standardise, fingerprint: str) -> Transform:
    """A transform by name for training inputs (N, *shape); a whitening matrix is kept in the cache for the next time.

    Args:
        name: Of `TRANSFORMS`.
        raw: All of the training data.
        scale: Its divisor to unit scale.
        standardise: Its standardisation.
        fingerprint: Of the data, under which the matrix is kept.

    Raises:
        PotstillError: No such transform, or too many features for it.
    """
    check_transform(name)
    if name == "none":
        return Nothing()
    if name == "standardise":
        return standardise
    folder = cache("zca") / f"{fingerprint}-{len(raw)}-{REG:g}"
    found = sorted(folder.glob("zca-*.safetensors"))
    if len(found) == 1:
        try:
            digest = found[0].stem.removeprefix("zca-")
            kept = ZCA(standardise, read_matrix(found[0], digest), REG, digest)
            if kept.fits(tuple(raw.shape[1:])):
                return kept
        except PotstillError:
            pass  # damaged: made again
    made = ZCA.of(raw, scale, standardise)
    for old in found:
        old.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder, made)
    return made


def describe(transform: Transform) -> dict[str, Any]:
    """A transform as plain values, for a set's header: a matrix only by its hash."""
    if isinstance(transform, Nothing):
        return {"name": transform.name}
    plain = transform.standardise if isinstance(transform, ZCA) else transform
    said: dict[str, Any] = {
        "name": transform.name,
        "mean": list(plain.mean),
        "std": list(plain.std),
        "trailing": plain.trailing,
    }
    return {**said, "reg": transform.reg, "matrix": transform.digest} if isinstance(transform, ZCA) else said


def matrix_of(transform: Transform) -> Tensor | None:
    """The whitening matrix of a transform that has one."""
    return transform.matrix if isinstance(transform, ZCA) else None


def build(said: dict[str, Any], matrix: Tensor | None = None) -> Transform:
    """The transform that `describe` was given.

    Args:
        said: What a header holds.
        matrix: W of a whitening, from beside the set or from within it.

    Raises:
        PotstillError: A kind that is not known, or a whitening without its matrix.
    """
    kind = said["name"]
    check_transform(kind)
    if kind == "none":
        return Nothing()
    plain = plain_part(said)
    if kind == "standardise":
        return plain
    if matrix is None:
        raise PotstillError(f"the whitening matrix {file_of(said.get('matrix'))} of this set is missing")
    return ZCA(plain, matrix, said["reg"], said["matrix"])


def plain_part(said: dict[str, Any]) -> Standardise:
    """The standardisation that `describe` was given, alone or below a whitening.

    Raises:
        PotstillError: It divides by 0, or is none.
    """
    columns = [torch.as_tensor(said[k], dtype=torch.float32) for k in ("mean", "std")]
    sound = all(c.ndim == 1 and c.isfinite().all() for c in columns) and type(said["trailing"]) is int
    if not sound or not columns[1].all():
        raise PotstillError("the mean and standard deviation of this set are no rows of numbers, or one divides by 0")
    if said["name"] == "zca" and not (type(said["reg"]) is float and 0 <= said["reg"] < math.inf):
        raise PotstillError("the whitening of this set has no factor of 0 or more")
    return Standardise(tuple(said["mean"]), tuple(said["std"]), said["trailing"])


def file_of(digest: Any) -> str:
    """Name of a matrix's file.

    Raises:
        PotstillError: The hash in a header is no hash: a name from a foreign file leads nowhere else.
    """
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{16}", digest):
        raise PotstillError(f"the whitening matrix is named by {str(digest)[:40]!r}, which is no hash")
    return f"zca-{digest}.safetensors"


def write_beside(folder: Path, transform: Transform) -> None:
    """Put the matrix of a whitening into a folder, in a file named by its hash, unless it is there."""
    if isinstance(transform, ZCA) and not (folder / file_of(transform.digest)).is_file():
        write_whole(folder / file_of(transform.digest), encode({"matrix": transform.matrix.contiguous()}))


def find_beside(folder: Path, said: dict[str, Any]) -> Tensor | None:
    """The matrix of a whitening that lies beside a set, checked by its hash; nothing where none does, or none is needed.

    Raises:
        PotstillError: It is damaged, or another one.
    """
    file = folder / file_of(said.get("matrix")) if said.get("name") == "zca" else None
    return read_matrix(file, said["matrix"]) if file is not None and file.is_file() else None


def find_cached(said: dict[str, Any], fingerprint: str, shape: tuple[int, ...]) -> Tensor | None:
    """The matrix of a whitening of inputs (*shape) that was made before from the training data with this fingerprint.

    Another machine's is the same up to rounding, so its hash is not asked for.
    """
    if not re.fullmatch("[0-9a-f]+", fingerprint):
        return None  # no name from a foreign file leads out of the cache
    for file in sorted(cache("zca").glob(f"{fingerprint}-*-{said['reg']:g}/zca-*.safetensors")):
        with suppress(PotstillError):  # damaged: made again when the data are next whitened
            matrix = read_matrix(file, file.stem.removeprefix("zca-"))
            if tuple(matrix.shape) == (math.prod(shape),) * 2 and bool(matrix.isfinite().all()):
                return matrix
    return None


def read_matrix(file: Path, digest: str) -> Tensor:
    """A matrix that has the given hash.

    Raises:
        PotstillError: It is missing, damaged, or another one.
    """
    if not file.is_file():
        raise PotstillError(f"{file} is missing: the whitening matrix of the set beside which it should lie")
    try:
        matrix = decode(file.read_bytes())["matrix"]
    except (SafetensorError, ValueError, OSError, KeyError) as error:
        raise PotstillError(f"{file} is damaged: no whitening matrix in it ({type(error).__name__})") from error
    if matrix.dtype != torch.float32 or digest_of(matrix) != digest:
        raise PotstillError(f"{file} is damaged: its content does not have the hash in its name")
    return matrix
