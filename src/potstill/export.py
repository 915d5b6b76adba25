"""Sets for other programs and people: a folder of PNG, `.npz`, Parquet, or the set itself as one file that needs no other; with a
card that says what it is and how to use it."""

from __future__ import annotations

import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .cards import export_card, made_with, record_of, row_name, rows_of
from .errors import PotstillError, unknown
from .exchange import DistilledSet, load
from .places import locate
from .records import check_free, write_folder, write_whole
from .transforms import ZCA, Standardise, describe

FORMATS = ("png", "npz", "parquet", "safetensors")
FILES = {
    "npz": "set.npz",
    "parquet": "train.parquet",
    "safetensors": "set.safetensors",
}  # in the folder that is made where PATH names no file
NAME = 40  # characters of a class name in a folder's name, at most


def export_set(source: DistilledSet | str | Path, to: str, out: str | Path) -> Path:
    """Write a set in a form that other programs read.

    Args:
        source: A set, or the path or zoo name of one; a `record.json` of the same set beside it gives the card its accuracies.
        to: `png`, `npz`, `parquet`, or `safetensors`: the set itself, with its whitening matrix inside.
        out: A folder that is new or empty. But for `png` also a new file with that ending, which then holds the card as
            well; a set says all of itself in its header.

    Returns:
        What was made: the folder, or the file.

    Raises:
        PotstillError: No such format or set, a place that is taken, inputs that the format cannot hold.
        Stopped: The disk is full; nothing is left behind.

    Example:
        >>> export_set("runs/digits-dm-ipc1-seed0", "png", "pictures")  # doctest: +SKIP
    """
    if to not in FORMATS:
        raise unknown("export format", to, FORMATS)
    if isinstance(source, DistilledSet):
        made, results = source, []
    else:
        place = locate(source)
        made, results = load(place), rows_of(record_of(place).get("results"))
    _check(made)
    whitened = isinstance(made.standardise, ZCA) and to != "safetensors"
    made = made if to == "safetensors" else standardised(made)
    out = Path(out)
    check_free(out)
    single = FILES.get(to) is not None and out.suffix == f".{to}" and not out.is_dir()
    if single and not out.parent.is_dir():
        raise PotstillError(f"--out {out} is a file in a folder that is not there")
    text = export_card(made, to, out.name if single else FILES.get(to, ""), results, whitened)
    if to == "png":
        files = _png(made)
    else:
        content = (
            made.encoded(True) if to == "safetensors" else _npz(made, text) if to == "npz" else _parquet(made, text)
        )
        if single:
            write_whole(out, content)
            return out
        files = iter([(FILES[to], content)])
    write_folder(out, [*files, ("README.md", text.encode(errors="replace"))])
    return out


def _check(made: DistilledSet) -> None:
    """Refuse a header whose numbers and names are none: they go into programs, pictures and paths."""
    m = made.meta
    numbers = [m.scale, *m.limits, *m.transform.get("mean", []), *m.transform.get("std", [])]
    sound = all(type(v) in (int, float) and math.isfinite(v) for v in numbers) and m.scale != 0
    if not sound or len(m.limits) != 2 or m.limits[0] == m.limits[1] or not all(type(n) is str for n in m.class_names):
        raise PotstillError(
            "the set's header is damaged: its scale, limits, transform or class names are not what they must be"
        )


def standardised(made: DistilledSet) -> DistilledSet:
    """The same set in the space that mean and standard deviation alone lead to: whitening is undone, and where nothing was
    done to the inputs they are 0 and 1.

    Args:
        made: A set under any transform.
    """
    t, inputs = made.standardise, made.inputs
    if isinstance(t, Standardise):
        return made
    channels = made.shape[0]
    plain = t.standardise if isinstance(t, ZCA) else Standardise((0.0,) * channels, (1.0,) * channels, inputs.ndim - 2)
    meta = replace(made.meta, transform=describe(plain))
    return DistilledSet(plain.apply(t.invert(inputs)), made.labels, meta, made.lr)


def safe_name(name: str) -> str:
    """A class name as a part of a file's name: letters, digits and single signs between them, on every system harmless.

    Example:
        >>> safe_name("../T-shirt/top"), safe_name("CON"), safe_name("\\0")
        ('T-shirt-top', 'CON', '')
    """
    kept = re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", name[: 4 * NAME]))
    return re.sub(r"-{2,}", "-", kept).strip("-_")[:NAME].strip("-_")


def _pictures(made: DistilledSet) -> np.ndarray | None:
    """Bytes (M, H, W) or (M, H, W, 3), clamped to what a byte holds; nothing where inputs are no pictures."""
    if len(made.shape) != 3 or made.shape[0] not in (1, 3):
        return None
    images = (255 * made.images.clamp(0, 1)).round().byte().numpy()
    return images[:, 0] if made.shape[0] == 1 else images.transpose(0, 2, 3, 1)


def _encode(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _rows(made: DistilledSet) -> np.ndarray | None:
    """Labels (M, C), where they are no classes: probabilities or targets around 0, as `row_name` says."""
    return made.labels.float().numpy() if made.labels.ndim == 2 else None


def _png(made: DistilledSet) -> Iterator[tuple[str, bytes]]:
    """A folder for each class, a picture for each sample, and `labels.json` with what a picture cannot say."""
    pictures, soft, names = _pictures(made), _rows(made), made.meta.class_names
    if pictures is None:
        raise PotstillError(
            f"--to png holds grey or RGB images, and the set's inputs are of shape {made.shape}; "
            "--to npz and --to parquet hold any"
        )
    digits, wide = len(str(len(names) - 1)), len(str(len(made) - 1))
    rows: list[dict[str, Any]] = []
    for i, label in enumerate(made.classes.tolist()):
        folder = f"{label:0{digits}d}-{safe_name(names[label])}".rstrip("-")
        row = {"file": f"{folder}/{i:0{wide}d}.png", "label": label}
        rows.append(row if soft is None else {**row, row_name(made): soft[i].tolist()})
        yield row["file"], _encode(pictures[i])
    about = {"class_names": names, "learning_rate": None if made.lr is None else made.lr.tolist(), "images": rows}
    yield "labels.json", (json.dumps(about, indent=1) + "\n").encode()


def _arrays(made: DistilledSet) -> list[np.ndarray]:
    """Mean and standard deviation, as they are set against a batch of inputs."""
    t = made.meta.transform
    return [np.array(t[column], np.float32).reshape(-1, *(1,) * t["trailing"]) for column in ("mean", "std")]


def _npz(made: DistilledSet, text: str) -> bytes:
    """The arrays that training needs, bit by bit, and the transform that test inputs need."""
    mean, std = _arrays(made)
    names = np.array(made.meta.class_names)
    arrays: dict[str, Any] = {
        "x_train": made.inputs.float().numpy(),
        "y_train": made.classes.numpy(),
        "mean": mean,
        "std": std,
        "scale": np.float64(made.meta.scale),
        "class_names": names,
        "normalisation": np.array(made_with(made)),
        "readme": np.array(text),
    }
    soft = _rows(made)
    if soft is not None:
        arrays[f"{row_name(made)}s"] = soft
    if made.lr is not None:
        arrays["lr"] = made.lr.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _parquet(made: DistilledSet, text: str) -> bytes:
    """A row for each sample: a picture to look at, the input to train on, class, and probabilities where there are."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise PotstillError(f"--to parquet needs pyarrow ({error}); pip install 'potstill[parquet]'") from error

    pictures, soft = _pictures(made), _rows(made)
    columns: dict[str, Any] = {}
    features: dict[str, Any] = {}
    if pictures is not None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        cells = [{"bytes": _encode(p), "path": f"{i}.png"} for i, p in enumerate(pictures)]
        columns["image"], features["image"] = pa.array(cells, kind), {"_type": "Image"}
    number: dict[str, Any] = {"dtype": "float32", "_type": "Value"}
    kind, feature = pa.float32(), number
    for _ in made.shape:
        kind, feature = pa.list_(kind), {"feature": feature, "_type": "Sequence"}
    columns["input"], features["input"] = pa.array(made.inputs.float().tolist(), kind), feature
    columns["label"] = pa.array(made.classes.tolist(), pa.int64())
    features["label"] = {"names": _distinct(made.meta.class_names), "_type": "ClassLabel"}
    if soft is not None:
        columns[row_name(made)] = pa.array(soft.tolist(), pa.list_(pa.float32()))
        features[row_name(made)] = {"feature": number, "_type": "Sequence"}
    about = {"huggingface": json.dumps({"info": {"features": features}}), "readme": text}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(about), buffer)
    return buffer.getvalue()


def _distinct(names: list[str]) -> list[str]:
    """Class names as they are, with their number behind where two are the same."""
    return [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names)]
