"""Sets for other programs: a folder of PNG, `.npz`, Parquet, each with a card that says what it is and how to use it."""

from __future__ import annotations

import hashlib
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

from .errors import PotstillError, unknown
from .exchange import DistilledSet, load
from .records import check_free, read_json, write_folder, write_whole
from .transforms import ZCA, Standardise, describe

FORMATS = ("png", "npz", "parquet")
FILES = {"npz": "set.npz", "parquet": "train.parquet"}  # in the folder that is made where PATH names no file
NAME = 40  # characters of a class name in a folder's name, at most


def export_set(source: DistilledSet | str | Path, to: str, out: str | Path) -> Path:
    """Write a set in a form that other programs read.

    Args:
        source: A set, or the path of one; a `record.json` of the same set beside it gives the card its accuracies.
        to: `png`, `npz` or `parquet`.
        out: A folder that is new or empty. With `npz` and `parquet` also a new file with that ending, which then
            holds the card as well.

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
    made = source if isinstance(source, DistilledSet) else load(source)
    results = [] if isinstance(source, DistilledSet) else _results(Path(source))
    _check(made)
    whitened, made = isinstance(made.standardise, ZCA), standardised(made)
    out = Path(out)
    check_free(out)
    single = FILES.get(to) is not None and out.suffix == f".{to}" and not out.is_dir()
    if single and not out.parent.is_dir():
        raise PotstillError(f"--out {out} is a file in a folder that is not there")
    text = card(made, to, out.name if single else FILES.get(to, ""), results, whitened)
    if to == "png":
        files = _png(made)
    else:
        content = _npz(made, text) if to == "npz" else _parquet(made, text)
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
    """Labels (M, C), where they are no classes: probabilities or targets around 0, as `_row_name` says."""
    return made.labels.float().numpy() if made.labels.ndim == 2 else None


def _row_name(made: DistilledSet) -> str:
    return "centred_label" if made.meta.labels == "centred" else "soft_label"


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
        rows.append(row if soft is None else {**row, _row_name(made): soft[i].tolist()})
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
        arrays[f"{_row_name(made)}s"] = soft
    if made.lr is not None:
        arrays["lr"] = made.lr.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def made_with(made: DistilledSet) -> str:
    """Mean and standard deviation as `--normalisation` takes them."""
    t = made.meta.transform
    return "/".join(",".join(map(repr, t[column])) for column in ("mean", "std"))


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
        columns[_row_name(made)] = pa.array(soft.tolist(), pa.list_(pa.float32()))
        features[_row_name(made)] = {"feature": number, "_type": "Sequence"}
    about = {"huggingface": json.dumps({"info": {"features": features}}), "readme": text}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(about), buffer)
    return buffer.getvalue()


def _distinct(names: list[str]) -> list[str]:
    """Class names as they are, with their number behind where two are the same."""
    return [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names)]


def _results(source: Path) -> list[dict[str, Any]]:
    """What the record beside a set says of its accuracy; nothing where there is none, or it is another set's."""
    file = source / "set.safetensors" if source.is_dir() else source
    try:
        record = read_json(file.parent / "record.json")
        if record["set"]["sha256"] != hashlib.sha256(file.read_bytes()).hexdigest():
            return []
        rows = [{k: r[k] for k in ("set", "network", "protocol", "accuracy_mean", "accuracy_std", "repeats")}
                for r in record["results"]]  # fmt: skip
        return rows if all(isinstance(r[k], int | float) for r in rows for k in list(r)[3:]) else []
    except (PotstillError, OSError, KeyError, TypeError):
        return []


LICENCE = (
    "**Licence.** Not known. The samples were made from the source data, whose terms may reach them: look these up before you "
    "pass the set on."
)

USES = {
    "png": """from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
read = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True){prepare}])
set_ = ImageFolder(".", read, loader=Image.open)      # classes in their order
image, label = set_[0]""",
    "npz": """with np.load("{file}") as file:
    f = dict(file)
x, y = torch.from_numpy(f["x_train"]), torch.from_numpy(f["{labels}"])
prepare = lambda raw: (raw / {scale!r} - f["mean"]) / f["std"]      # your test inputs, as in the source data
for step in range(1000):
    ...                            # train on x and y""",
    "parquet": """from datasets import load_dataset
rows = load_dataset("parquet", data_files="{file}", split="train").with_format("torch")[:]
x, y = rows["input"], rows["{labels}"]
mean, std = torch.tensor({mean}){view}, torch.tensor({std}){view}
prepare = lambda raw: (raw / {scale!r} - mean) / std      # your test inputs, as in the source data""",
}

SPACE = {
    "png": "8 bits, clamped to what a picture holds. Distilled pixels may leave that range, so training on the pictures can "
    "give another accuracy than the set itself; `npz` and `parquet` lose nothing. `labels.json` has class names, the file of "
    "each image, soft or centred labels and the learned learning rate where there are such.",
    "npz": "`x_train` (float32) is what networks are trained on, bit by bit: standardised, not clamped. `mean` and `std` lead "
    "there from unit scale, and raw values divided by `scale` are in unit scale. `y_train` holds classes, `soft_labels` "
    "probabilities, `centred_labels` targets around 0 and `lr` the learned learning rate where there are such.",
    "parquet": "`input` (float32) is what networks are trained on, bit by bit: standardised, not clamped. `image`, where the "
    "inputs are pictures, is to look at: 8 bits, clamped. `label` is the class, `soft_label` its probabilities and `centred_label` "
    "targets around 0 where there are such.",
}


WHITENED = (
    " The set itself is whitened (`zca`), and networks are meant to be trained on it so: `set.safetensors` and `potstill.load` "
    "give it. Here the whitening is undone, which needs no matrix; what is trained on these files as they are can score otherwise."
)


def card(made: DistilledSet, to: str, file: str, results: list[dict[str, Any]], whitened: bool = False) -> str:
    """A data card in Markdown with a YAML header: what the set is, what is not known of it, how to use it."""
    m, picture = made.meta, len(made.shape) == 3
    size = next((s for s, n in (("n<1K", 10**3), ("1K<n<10K", 10**4)) if len(made) < n), "10K<n<100K")
    title = f"{_plain(m.method)} on {_plain(m.data)}, {len(made)} samples"
    ipc = str(m.ipc[0]) if len(set(m.ipc)) == 1 else ", ".join(map(str, m.ipc))
    mean, std = list(m.transform["mean"]), list(m.transform["std"])
    few = len(mean) <= 16
    if to == "png":  # a picture's 0 and 1 are the set's limits
        low, high = m.limits
        mean, std = [(v - low) / (high - low) for v in mean], [v / (high - low) for v in std]
    hard, soft = ("y_train", f"{_row_name(made)}s") if to == "npz" else ("label", _row_name(made))
    use = USES[to].format(
        file=re.sub(r'[\\"\n]', "", file),
        labels=soft if made.labels.ndim == 2 else hard,
        scale=m.scale,
        mean=mean,
        std=std,
        view=".view(-1, 1, 1)" if picture else "",
        prepare=f", v2.Normalize({mean}, {std})",
    )
    lines = [
        "---", "license: unknown", f"pretty_name: {json.dumps(title)}", "task_categories:",
        f"- {'image' if picture else 'tabular'}-classification", "size_categories:", f"- {size}", "tags:",
        "- dataset-distillation", "---", "", f"# {title}", "",
        f"{len(made)} samples that stand for a training set, made with potstill {_plain(m.software)}: networks are trained on them", "in place of all of it.", "",
        "| | |", "| --- | --- |", f"| source data | {_plain(m.data)}, fingerprint {_plain(m.fingerprint)} |",
        f"| classes | {len(m.class_names)}: {', '.join(map(_plain, m.class_names[:100]))} |", f"| samples per class | {ipc} |",
        f"| input | {' × '.join(map(str, made.shape))} |", f"| labels | {_labels(made)} |",
        f"| learned learning rate | {'none' if made.lr is None else made.lr.tolist()} |",
        f"| mean, standard deviation | {made_with(made).replace('/', ' / ') if few else 'with the set'} |",
        f"| asks for | network {_plain(m.student)}, protocol {_plain(m.protocol)} |", f"| steps, seed | {_plain(m.steps)}, {_plain(m.seed)} |", "",
        LICENCE, "", "**What the files hold.** " + SPACE[to] + (WHITENED if whitened else ""), "", "## Use", "", "```python",
        "import numpy as np, torch" if to == "npz" else "import torch", use, "```", "", "## Accuracy", "",
    ]  # fmt: skip
    if results:
        lines += ["On test data, of networks trained on the set itself and its baselines:", "",
                  "| trained on | network | protocol | accuracy | networks |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
        lines += [
            f"| {_plain(r['set'])} | {_plain(r['network'])} | {_plain(r['protocol'])} "
            f"| {100 * r['accuracy_mean']:.1f} % ± {100 * r['accuracy_std']:.1f} | {r['repeats']} |"
            for r in results
        ]
    else:
        lines += ["Not measured here: there was no record of this set beside it."]
    lines += ["", "## Recipe", "", "```json", json.dumps(m.recipe, indent=1), "```", ""]
    return "\n".join(lines)


def _labels(made: DistilledSet) -> str:
    """What the labels are, in a few words."""
    if made.labels.ndim == 1:
        return "hard"
    if made.meta.labels == "centred":
        return "centred: targets around 0 of a squared loss, half the squared distance of a network's outputs to them"
    return "soft: probabilities of the classes"


def _plain(text: Any) -> str:
    """A stranger's words as words: one line, nothing that Markdown or HTML would act on."""
    line = "".join(c if c.isprintable() else " " for c in str(text))[:100]
    return re.sub(r"([\\`*_\[\]<>|#&!])", r"\\\1", line)
