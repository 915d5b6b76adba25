"""Data cards in Markdown: what a set is and where it comes from, its licence as far as it is known, how to use it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import PotstillError
from .exchange import DistilledSet
from .places import SET
from .records import read_json

UNKNOWN = (
    "Not known. The samples were made from the source data, whose terms may reach them: look these up before you "
    "pass the set on."
)
CIFAR = (
    "CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html) states no licence; its authors ask to be cited. "
    "It is in use for research; nothing is known to allow more with a set that was made from it."
)
JPEG = (
    "The source data are a copy of CIFAR-10 in which each image was stored once as JPEG of quality 75, not the original: "
    "what was distilled is that copy, and accuracies are on its test images. "
)
FASHION = (
    "The source data, Fashion-MNIST, are under the MIT licence, © 2017 Zalando SE "
    "(https://github.com/zalandoresearch/fashion-mnist)."
)
LICENCES = {  # of source data, by the names that `load_data` knows them by: the licence's own name, and words
    "fashion-mnist": ("mit", FASHION),
    "cifar10": ("unknown", CIFAR),
    "cifar10-jpeg75": ("unknown", JPEG + CIFAR),
}

USES = {
    "safetensors": """import potstill
set_ = potstill.load("{file}")        # a torch.utils.data.Dataset of (input, label)
x, y = set_.inputs, set_.labels
prepare = set_.transform                     # your test inputs, as in the source data""",
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
    "safetensors": "The set itself, bit by bit, with everything that prepares inputs as its own are: a whitening matrix, too, where it has one.",
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


def licence_of(data: str) -> tuple[str, str]:
    """A licence's name for the head of a card, and what is known of it in words, for data of this name."""
    return LICENCES.get(data, ("unknown", UNKNOWN))


def title_of(made: DistilledSet) -> str:
    """Method, data, number of samples."""
    return f"{plain(made.meta.method)} on {plain(made.meta.data)}, {len(made)} samples"


def head(made: DistilledSet) -> list[str]:
    """The first lines: a YAML header, the title, a sentence."""
    kind = "image" if len(made.shape) == 3 else "tabular"
    size = next((s for s, n in (("n<1K", 10**3), ("1K<n<10K", 10**4)) if len(made) < n), "10K<n<100K")
    title = title_of(made)
    return [
        "---", f"license: {licence_of(made.meta.data)[0]}", f"pretty_name: {json.dumps(title)}", "task_categories:",
        f"- {kind}-classification", "size_categories:", f"- {size}", "tags:", "- dataset-distillation", "---", "",
        f"# {title}", "",
        f"{len(made)} samples that stand for a training set, made with potstill {plain(made.meta.software)}: networks are trained on them",
        "in place of all of it.", "",
    ]  # fmt: skip


def facts(made: DistilledSet, more: Sequence[str] = ()) -> list[str]:
    """What a set says of itself as a table, and its licence.

    Args:
        made: A set.
        more: Rows for the end of the table.
    """
    m, means = made.meta, made.meta.transform.get("mean", [])
    space = made_with(made).replace("/", " / ") if 0 < len(means) <= 16 else "with the set" if means else "none"
    ipc = str(m.ipc[0]) if len(set(m.ipc)) == 1 else ", ".join(map(str, m.ipc))
    return [
        "| | |", "| --- | --- |", f"| source data | {plain(m.data)}, fingerprint {plain(m.fingerprint)} |",
        f"| classes | {len(m.class_names)}: {', '.join(map(plain, m.class_names[:100]))} |", f"| samples per class | {ipc} |",
        f"| input | {' × '.join(map(str, made.shape))} |", f"| labels | {_labels(made)} |",
        f"| learned learning rate | {'none' if made.lr is None else made.lr.tolist()} |",
        f"| mean, standard deviation | {space} |", *_whitening(made),
        f"| asks for | network {plain(m.student)}, protocol {plain(m.protocol)} |",
        f"| steps, seed | {plain(m.steps)}, {plain(m.seed)} |", *more, "", f"**Licence.** {licence_of(m.data)[1]}", "",
    ]  # fmt: skip


def _whitening(made: DistilledSet) -> list[str]:
    """Of a whitened set, what its matrix is and where it comes from."""
    if made.meta.transform["name"] != "zca":
        return []
    size = made.inputs[0].numel()
    cure = (
        'where it is not with the set, `potstill evaluate` and `potstill.load_data(..., transform="zca")` make it again'
    )
    return [
        f"| whitening | {size:,} × {size:,} float32, {4 * size * size:,} bytes, made from the training data: {cure} |"
    ]


def accuracies(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Results as a table."""
    beside = " and its baselines" if len({r["set"] for r in rows}) > 1 else ""
    lines = [f"On test data, of networks trained on the set itself{beside}:", "",
             "| trained on | network | protocol | accuracy | networks |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    lines += [
        f"| {plain(r['set'])} | {plain(r['network'])} | {plain(r['protocol'])} "
        f"| {percent(r['accuracy_mean'], r['accuracy_std'], r['repeats'])} | {r['repeats']} |"
        for r in rows
    ]
    return lines if rows else ["Not measured here: there was no record of this set beside it."]


def percent(mean: float, std: float, n: int) -> str:
    """An accuracy for people: mean and, of more than one, standard deviation.

    Example:
        >>> percent(0.7156, 0.0028, 5), percent(0.825, 0.0, 1)
        ('71.6 % ± 0.3', '82.5 %')
    """
    return f"{100 * mean:.1f} %" + (f" ± {100 * std:.1f}" if n > 1 else "")


def record_of(place: Path) -> dict[str, Any]:
    """The record beside a set; empty where there is none, or it is another set's.

    Args:
        place: The set's folder or file.
    """
    file = place / SET if place.is_dir() else place
    try:
        record = read_json(file.parent / "record.json")
        return record if record["set"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() else {}
    except (PotstillError, OSError, KeyError, TypeError):
        return {}


def rows_of(results: Any) -> list[dict[str, Any]]:
    """The part of results that a card prints, all of them or, where one is none, nothing."""
    try:
        rows = [{k: r[k] for k in ("set", "network", "protocol", "accuracy_mean", "accuracy_std", "repeats")}
                for r in results]  # fmt: skip
    except (KeyError, TypeError):
        return []
    kinds = (str, str, str, int | float, int | float, int)
    return rows if all(isinstance(v, k) for r in rows for v, k in zip(r.values(), kinds, strict=True)) else []


def export_card(made: DistilledSet, to: str, file: str, results: list[dict[str, Any]], whitened: bool = False) -> str:
    """The card of an export: what the set is, what is not known of it, how to use it.

    Args:
        made: The set as it is exported.
        to: `png`, `npz`, `parquet` or `safetensors`.
        file: Name of the file in the folder.
        results: As `rows_of` gives them.
        whitened: Whether the set itself is, and the export is not.
    """
    m = made.meta
    mean, std = list(m.transform.get("mean", [])), list(m.transform.get("std", []))
    if to == "png":  # a picture's 0 and 1 are the set's limits
        low, high = m.limits
        mean, std = [(v - low) / (high - low) for v in mean], [v / (high - low) for v in std]
    hard, soft = ("y_train", f"{row_name(made)}s") if to == "npz" else ("label", row_name(made))
    use = USES[to].format(
        file=re.sub(r'[\\"\n]', "", file),
        labels=soft if made.labels.ndim == 2 else hard,
        scale=m.scale,
        mean=mean,
        std=std,
        view=".view(-1, 1, 1)" if len(made.shape) == 3 else "",
        prepare=f", v2.Normalize({mean}, {std})",
    )
    lines = [
        *head(made), *facts(made), "**What the files hold.** " + SPACE[to] + (WHITENED if whitened else ""), "",
        "## Use", "", "```python", "import numpy as np, torch" if to == "npz" else "import torch", use, "```", "",
        "## Accuracy", "", *accuracies(results), "", "## Recipe", "", "```json", json.dumps(m.recipe, indent=1), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def made_with(made: DistilledSet) -> str:
    """Mean and standard deviation as `--normalisation` takes them."""
    t = made.meta.transform
    return "/".join(",".join(map(repr, t[column])) for column in ("mean", "std"))


def row_name(made: DistilledSet) -> str:
    """What a row of labels (C,) is called in a file."""
    return "centred_label" if made.meta.labels == "centred" else "soft_label"


def _labels(made: DistilledSet) -> str:
    """What the labels are, in a few words."""
    if made.labels.ndim == 1:
        return "hard"
    if made.meta.labels == "centred":
        return "centred: targets around 0 of a squared loss, half the squared distance of a network's outputs to them"
    return "soft: probabilities of the classes"


def plain(text: Any) -> str:
    """A stranger's words as words: one line, nothing that Markdown or HTML would act on."""
    line = "".join(c if c.isprintable() else " " for c in str(text))[:100]
    return re.sub(r"([\\`*_\[\]<>|#&!])", r"\\\1", line)
