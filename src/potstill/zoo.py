"""The zoo: sets that are ready to use, what is known of each, and their cards.

`python -m potstill.zoo FOLDER` writes the `README.md` of a zoo and of every set in it anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cards import accuracies, facts, head, licence_of, percent, plain, record_of, rows_of
from .compiling import PRECISIONS
from .errors import PotstillError
from .exchange import DistilledSet, load
from .places import NAME, SET, find, inside, names
from .recipe import find as find_recipe
from .recipe import from_dict, to_dict
from .records import read_json, write_whole

__all__ = ["Cell", "Score", "card", "cells", "find", "index", "names", "rows", "write_cards"]

HEADS = ("set", "images", "network", "protocol", "accuracy", "networks", "bytes")


@dataclass(frozen=True)
class Score:
    """Accuracy on test data of networks trained on a set: who was judged, by which protocol, how many."""

    network: str
    protocol: str
    mean: float
    std: float
    repeats: int


@dataclass(frozen=True)
class Cell:
    """A set of the zoo.

    Args:
        name: `data/method/ipc`, as `potstill.load` takes it.
        path: Its folder.
        data: What it stands for.
        method: Of its recipe.
        ipc: Images per class, or of each class where they differ.
        images: In all.
        student: Network that it asks for.
        protocol: Evaluation that it asks for.
        bytes: Size of its file.
        score: By what it asks for if that was measured, else by what was.
    """

    name: str
    path: Path
    data: str
    method: str
    ipc: int | tuple[int, ...]
    images: int
    student: str
    protocol: str
    bytes: int
    score: Score | None


def cells(folder: str | Path | None = None) -> list[Cell]:
    """The sets of the zoo, by name.

    Args:
        folder: A zoo; all that are known if absent (`potstill.places.folders`).

    Raises:
        PotstillError: A set is damaged, or a folder is not there.

    Example:
        >>> from potstill import zoo
        >>> [c.images for c in zoo.cells() if c.name == "fashion-mnist/dm/1"]
        [10]
    """
    found = names() if folder is None else inside(Path(folder))
    return [_cell(name, path, load(path)) for name, path in found.items()]


def _cell(name: str, path: Path, made: DistilledSet) -> Cell:
    m = made.meta
    own = [r for r in _results(path, made) if r["set"] == "this set"]
    asked = [r for r in own if (r["network"], r["protocol"]) == (m.student, m.protocol)]
    score = None
    for r in [*asked, *own][:1]:
        score = Score(r["network"], r["protocol"], r["accuracy_mean"], r["accuracy_std"], r["repeats"])
    ipc = m.ipc[0] if len(set(m.ipc)) == 1 else tuple(m.ipc)
    size = (path / SET).stat().st_size
    return Cell(name, path, m.data, m.method, ipc, len(made), m.student, m.protocol, size, score)


def _results(path: Path, made: DistilledSet) -> list[dict[str, Any]]:
    """What `evaluation.json` and the record say of a set and its baselines; what both have, as the former says it.

    A set is judged before its baselines: under each network and protocol the first row of its own method is its own.
    """
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    sources: list[Any] = [_evaluation(path), record_of(path).get("results")]
    for source in sources:
        judged = rows_of(source)
        seen: set[tuple[str, str]] = set()
        for row, raw in zip(judged, source if judged else [], strict=True):
            under = (str(row["network"]), str(row["protocol"]))
            fits = raw.get("method") == made.meta.method and raw.get("images") == len(made)
            who = "this set" if fits and under not in seen else str(row["set"])
            seen |= {under} if fits else set()
            kept.setdefault((*under, who), {**row, "set": who, "precision": raw.get("precision")})
    return list(kept.values())


def _evaluation(path: Path) -> Any:
    try:
        return read_json(path / "evaluation.json")
    except PotstillError:
        return []


def rows(found: Sequence[Cell]) -> list[tuple[str, ...]]:
    """Cells as a table, its heads first: what was measured where it was, else what the set asks for."""
    lines: list[tuple[str, ...]] = [HEADS]
    for c in found:
        s = c.score
        by = (s.network, s.protocol, percent(s.mean, s.std, s.repeats), str(s.repeats)) if s else (
            c.student, c.protocol, "", "")  # fmt: skip
        lines.append((c.name, str(c.images), *by, f"{c.bytes:,}"))
    return lines


def departures(recipe: Mapping[str, Any], ipc: int) -> list[tuple[str, str, str]] | None:
    """Where a recipe departs from the preset `paper` of its method: field, value, the preset's value.

    Args:
        recipe: As a set carries it. Fields that did not exist when it was made have their defaults.
        ipc: Images per class, the most of any.

    Returns:
        The fields, or nothing where the method is no one's here.
    """
    try:
        if ":" in recipe["method"]:  # code from outside, which is not run because a file names it
            return None
        mine, paper = to_dict(from_dict(recipe)), to_dict(find_recipe(recipe["method"], "paper", ipc))
    except (PotstillError, KeyError, TypeError):
        return None
    here, there = _flat(mine), _flat(paper)
    fields = [f for f in {**here, **there} if f != "preset" and here.get(f) != there.get(f)]
    told = [[json.dumps(side[f]) if f in side else "none" for f in fields] for side in (here, there)]
    return list(zip(fields, *told, strict=True))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def card(path: str | Path) -> str:
    """The card of a set in a zoo, in Markdown.

    Args:
        path: Its folder, `.../data/method/ipc`.

    Raises:
        PotstillError: No set is there, or it is damaged.
    """
    place = Path(path)
    made, record = load(place), record_of(place)
    name, m = "/".join(place.resolve().parts[-3:]), made.meta
    if not NAME.fullmatch(name):
        raise PotstillError(f"{place} is no place in a zoo: a folder data/method/ipc is, such as fashion-mnist/dm/1")
    size = f"| bytes | {(place / SET).stat().st_size:,} as a file: inputs {made.inputs.nbytes:,}, labels {made.labels.nbytes:,} |"
    picture = ["![The samples](grid.png)", ""] if (place / "grid.png").is_file() else []
    results = _results(place, made)
    # as the first number below was measured, not as the machine at hand would choose
    how = next((f" --precision {r['precision']}" for r in results if r.get("precision") in PRECISIONS), "")
    lines = [
        *head(made), *picture, *facts(made, [size]), "## Use", "", "```python", "import potstill",
        f'set_ = potstill.load("{name}")  # a torch.utils.data.Dataset of (input, label)',
        "x, y = set_[0]  # set_.transform(raw) prepares your own inputs as these are", "```", "", "```console",
        f"$ potstill evaluate {name}{how}    # on the test data below --data-root or $POTSTILL_DATA", "```", "",
        "## Accuracy", "", *accuracies(results), "", "## Recipe", "", *_recipe(m.recipe, max(m.ipc), record),
    ]  # fmt: skip
    return "\n".join(lines)


def _recipe(recipe: Mapping[str, Any], ipc: int, record: Mapping[str, Any]) -> list[str]:
    """How a set was made, and where that departs from the paper."""
    method, preset, network = (plain(recipe.get(k, "")) for k in ("method", "preset", "network"))
    source = recipe.get("source")
    learned = isinstance(source, Mapping) and source.get("kind") != "none"
    lines = [
        f"Method `{method}`, preset `{preset}`" + (f", learned with `{network}`" if learned else "") + ". "
        "`recipe.toml` is the whole of it, `record.json` the run."
    ]
    data = record.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), int) and isinstance(data.get("heldout"), int):
        lines += [f"It saw {data['train']:,} training samples; {data['heldout']:,} more were held out."]
    if isinstance(record.get("command"), str):
        command = "".join(c for c in record["command"] if c.isprintable() and c != "`")
        lines += ["", "```console", f"$ {command}", "```"]
    if isinstance(record.get("experts"), str):
        mark = plain(record["experts"])
        lines += [
            "",
            f"`DIR` is a folder of recorded experts (mark {mark}); `docs/methods/mtt.md` says how those of the zoo were recorded.",
        ]
    found = departures(recipe, ipc)
    if found:
        lines += ["", "Where it departs from the preset `paper`:", ""]
        lines += ["| field | here | `paper` |", "| --- | --- | --- |"]
        lines += [f"| `{field}` | {plain(here)} | {plain(there)} |" for field, here, there in found]
    elif found is not None:
        lines += ["", "It is the preset `paper`, unchanged."]
    return [*lines, ""]


def index(found: Sequence[Cell]) -> str:
    """The `README.md` of a zoo: a table of its sets."""
    body = [
        "# The zoo", "", "Distilled sets that are ready to use, each with a card, its record, its recipe and a picture. They are reached by name:", "",
        "```python", "import potstill", *[f'set_ = potstill.load("{c.name}")  # a torch Dataset' for c in found[:1]], "```", "",
        "`potstill list zoo` prints this table. Made by `python -m potstill.zoo zoo`, as the cards are.", "",
        *[f"| {' | '.join(line)} |" for line in (HEADS, ["---"] * len(HEADS))],
    ]  # fmt: skip
    for name, *rest in rows(found)[1:]:
        body.append(f"| {' | '.join([f'[{name}]({name}/README.md)', *map(plain, rest)])} |")
    whitened = [c.name for c in found if record_of(c.path).get("choices", {}).get("transform") == "zca"]
    if whitened:
        named = ", ".join(map(plain, whitened))
        body += ["", f"**Whitened (ZCA):** {named}. Where their matrix is not here, the training data give it again, as in `potstill evaluate`; the other sets need nothing beside them."]  # fmt: skip
    for data in dict.fromkeys(c.data for c in found):
        body += ["", f"**{plain(data)}.** {licence_of(data)[1]}"]
    return "\n".join([*body, ""])


def write_cards(folder: str | Path) -> list[Path]:
    """Write the card of every set in a zoo and the zoo's own, over what was there.

    Args:
        folder: The zoo.

    Returns:
        The files.
    """
    found = cells(folder)
    texts = {c.path / "README.md": card(c.path) for c in found} | {Path(folder) / "README.md": index(found)}
    for file, text in texts.items():
        write_whole(file, text.encode(errors="replace"))
    return list(texts)


if __name__ == "__main__":
    for place in sys.argv[1:]:
        print(f"{len(write_cards(place))} files in {place}")
