"""Records of a benchmark as tables: what was measured, what is missing and why. Nothing here trains or draws."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from . import scores
from .errors import PotstillError
from .records import FORMAT, read_json

Record = dict[str, Any]

BASELINES = ("random", "random-soft", "herding", "k-center", "k-means", "k-means-centre")
ORDER = (*BASELINES, "dd", "kip", "dc", "dsa", "dm", "mtt", "frepo")
STATES = {
    "absent": "no data",
    "failed": "failed",
    "out of memory": "OOM",
    "out of time": "timeout",
    "running": "unfinished",
}
MARKS = {"read": "read at its source", "quoted": "quoted elsewhere", "remembered": "remembered, not looked up"}
FORMS = {"plain": "", "saving": "memory-saving"}


@dataclass(frozen=True)
class Cell:
    """A record and the results folder that it lies in."""

    record: Record
    folder: Path


@dataclass(frozen=True)
class Entry:
    """What stands at one place of a table: a cell, as one network under one protocol has seen it.

    `record` has the results of that network alone, so that every score compares like with like. Without a
    measurement `mean` is `None`; `status` and `reason` say why. `form` tells rows of one method apart: that of a cost,
    or the name of a row that has one of its own.
    """

    record: Record
    folder: Path
    network: str
    protocol: str
    hash: str
    status: str
    reason: str = ""
    mean: float | None = None
    std: float = 0.0
    n: int = 0
    form: str = ""

    @property
    def method(self) -> str:
        return str(self.record["method"])

    @property
    def data(self) -> str:
        return str(self.record["data"])

    @property
    def ipc(self) -> int | None:
        """Images per class; `None` for the whole data, whatever their row says."""
        return None if self.method == "whole" else self.record["ipc"]

    @property
    def competes(self) -> bool:
        """Whether it may be the best: neither the whole data nor a kernel's own prediction may."""
        return self.method != "whole" and not _is_kernel(self.network)

    @property
    def stored(self) -> float | None:
        """Bytes of a set, labels included; the mean over the cell's sets."""
        return _mean_of(self.record.get("sets") or [], lambda s: s["input_bytes"] + s["label_bytes"])

    @property
    def minutes(self) -> float | None:
        """Minutes that it took to make a set; the mean over the cell's sets."""
        known = [s for s in self.record.get("sets") or [] if s["seconds"] is not None]  # a file does not say it
        return _mean_of(known, lambda s: s["seconds"] / 60)


@dataclass(frozen=True)
class Group:
    """Entries that may be compared: one protocol, and for a performance table one network."""

    protocol: str
    hash: str
    network: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Fair:
    """The fairness numbers of an entry; `None` where what they need was not measured."""

    baseline: str
    gain: float | None
    p: float | None
    recovery: float | None
    over_random: float | None
    label_robust: float | None
    augmentation_robust: float | None


def collect(folders: Sequence[Path]) -> tuple[list[Cell], list[Record]]:
    """All cells and findings of results folders; of one cell in several folders a later one counts if it is done.

    Raises:
        PotstillError: A folder without records; a record that cannot be read or is none, by its path.
    """
    kept: dict[tuple[str, ...], Cell] = {}
    findings: dict[str, Record] = {}
    for folder in folders:
        if not folder.is_dir():
            raise PotstillError(f"no folder {folder}; a folder that `potstill benchmark` has written is needed")
        files = sorted((folder / "cells").rglob("*.json"))
        if not files:
            raise PotstillError(f"{folder} has no records (cells/*.json); `potstill benchmark` writes them")
        for file in files:
            record = read_json(file)
            _check(record, file)
            key = (record["suite"], record["table"], record["cell"])
            if key not in kept or record["status"] == "done":
                kept[key] = Cell(record, folder)
        file = folder / "findings.json"
        if file.exists():
            found = read_json(file)
            if not isinstance(found, list) or not all(isinstance(f, dict) and "claim" in f for f in found):
                raise PotstillError(f"{file} is no list of findings")
            findings |= {str(f.get("name", f["claim"])): f for f in found}
    return list(kept.values()), list(findings.values())


def _check(record: Any, file: Path) -> None:
    """Refuse what is no record of a cell, so that nothing below has to doubt one."""
    if not isinstance(record, dict) or record.get("kind") not in ("accuracy", "cost"):
        raise PotstillError(f"{file} is no record of a benchmark's cell")
    if record.get("format") != FORMAT:
        raise PotstillError(f"{file} has format {record.get('format')}; this version of potstill reads {FORMAT}")
    try:
        if record["status"] not in ("done", *STATES):
            raise KeyError("status")
        for word in ("suite", "table", "cell", "method", "data"):
            if not isinstance(record[word], str):
                raise KeyError(word)
        if not isinstance(record["ipc"], int | None):
            raise KeyError("ipc")
        for result in record.get("results") or []:
            words = [result[w] for w in ("role", "variant", "network", "protocol", "protocol_hash", "labels")]
            if not all(isinstance(w, str) for w in words) or not result["accuracies"]:
                raise KeyError("results")
            fmean(result["accuracies"])
        for made in record.get("sets") or []:
            fmean([made["seconds"] or 0, made["input_bytes"], made["label_bytes"]])
    except (KeyError, TypeError, ValueError) as error:
        raise PotstillError(f"{file} is a damaged record: {error.args[0] if error.args else error}") from error


def entries_of(cell: Cell) -> list[Entry]:
    """One entry for each network and protocol of a cell; one without a number where nothing was measured."""
    record, status, reason = cell.record, cell.record["status"], _line(cell.record.get("reason") or "")
    results = record.get("results") or []
    if not any(r["role"] == "set" for r in results):  # a whole training set may be filed under its own name
        results = [{**r, "role": "set"} if r["role"] == record["method"] else r for r in results]
    own = [r for r in results if (r["role"], r["variant"]) == ("set", "own")]
    name = str((record.get("row") or {}).get("name") or "")
    made = []
    for network, protocol, mark in dict.fromkeys((r["network"], r["protocol"], r["protocol_hash"]) for r in own):
        alike = [
            r
            for r in results
            if r["network"] == network and (r["variant"] != "own" or r["role"] == "whole" or r["protocol_hash"] == mark)
        ]
        part = {**record, "results": alike}
        found = scores.mean(part, network) if status == "done" else None
        mean, std, n = found or (None, 0.0, 0)
        made.append(Entry(part, cell.folder, network, protocol, mark, status, reason, mean, std, n, name))
    if status == "done" and not made:
        status, reason = "failed", reason or "the record has no results"
    if not made:
        wanted = (record.get("row") or {}).get("networks") or [""]
        protocol = str(record.get("protocol") or "")
        made = [Entry(record, cell.folder, str(n), protocol, "", status, reason, form=name) for n in wanted]
    return made


def performance(cells: Iterable[Cell]) -> list[Group]:
    """Performance cells by protocol and network, the largest group first.

    A cell without a number knows its protocol by name only; it joins the group of that name and its network which holds
    most of its data.
    """
    entries = [e for c in cells if c.record["table"] == "performance" for e in entries_of(c)]
    found: dict[tuple[str, str, str], list[Entry]] = {}
    for e in entries:
        if e.hash:
            found.setdefault((e.protocol, e.hash, e.network), []).append(e)
    for e in entries:
        if not e.hash:
            fits = [k for k in found if k[0] == e.protocol and _may_be(e.network, k[2])]
            fits.sort(key=lambda k: (any(o.data == e.data and o.hash for o in found[k]), len(found[k])), reverse=True)
            found.setdefault(fits[0] if fits else (e.protocol, "", e.network), []).append(e)
    groups = [Group(*key, entries=tuple(found[key])) for key in found]
    return sorted(
        groups, key=lambda g: (not g.hash, not any(e.competes for e in g.entries), -len(g.entries), g.protocol)
    )


def transfer(cells: Iterable[Cell]) -> list[Group]:
    """Transfer cells by protocol, data and images per class; an unmeasured cell stands at every network."""
    cells = [c for c in cells if c.record["table"] == "transfer"]
    found: dict[tuple[Any, ...], list[Entry]] = {}
    for e in (e for c in cells for e in entries_of(c) if e.hash):
        found.setdefault((e.protocol, e.hash, e.data, e.ipc), []).append(e)
    for first, *rest in ([e for e in entries_of(c) if not e.hash] for c in cells if not entries_of(c)[0].hash):
        fits = [k for k in found if (k[0], k[2], k[3]) == (first.protocol, first.data, first.ipc)]
        key = fits[0] if fits else (first.protocol, "", first.data, first.ipc)
        networks = dict.fromkeys(e.network for e in (found.get(key) or [first, *rest]))
        found.setdefault(key, []).extend(replace(first, network=n) for n in networks)
    return [Group(k[0], k[1], "", tuple(found[k])) for k in sorted(found, key=lambda k: (k[2], k[3] or 0, k[0], k[1]))]


def cost(cells: Iterable[Cell]) -> list[Group]:
    """Cost cells by data; for each form of a method an entry, which names its network where most have another."""
    found: dict[str, list[Entry]] = {}
    for record, folder in ((c.record, c.folder) for c in cells if c.record["table"] == "cost"):
        network, form = str(record.get("network") or ""), str(record.get("form") or "")
        form, reason = FORMS.get(form, form), _line(record.get("reason") or "")
        entry = Entry(record, folder, network, "", "", record["status"], reason, form=form)
        found.setdefault(entry.data, []).append(entry)
    groups = []
    for _, entries in sorted(found.items()):
        networks = [e.network for e in entries if e.network]
        usual = max(networks, key=networks.count, default="")
        named = [
            replace(e, form=", ".join(w for w in (e.form, e.network if e.network != usual else "") if w))
            for e in entries
        ]
        groups.append(Group("", "", usual, tuple(named)))
    return groups


def fair(entry: Entry, wholes: dict[tuple[str, str], float]) -> Fair:
    """The fairness numbers of a measured entry.

    Args:
        entry: With a mean.
        wholes: Accuracy of the whole training set by data and network, for cells that have not measured it themselves;
            it is that of standardised data, and no measure for a set of others.
    """
    record = entry.record
    rival = scores.rival(record)
    rivals = scores.accuracies(record, rival)
    alike = {s.get("transform") or "standardise" for s in record.get("sets") or []} <= {"standardise"}
    whole = wholes.get((entry.data, entry.network)) if alike and not scores.accuracies(record, "whole") else None
    return Fair(
        ("random, soft labels" if rival == "random-soft" else "random") if rivals else "",
        scores.gain(record),
        scores.p_value(scores.accuracies(record), rivals) if rivals else None,
        scores.label_recovery(record, whole),
        scores.over_random(record),
        scores.label_robust(record, whole),
        scores.augmentation_robust(record),
    )


def wholes_of(groups: Iterable[Group]) -> dict[tuple[str, str], float]:
    """Accuracy of the whole training set by data and network, where a cell of its own has measured it."""
    entries = [e for g in groups for e in g.entries if e.method == "whole"]
    return {(e.data, e.network): e.mean for e in entries if e.mean is not None}


def ranks(values: Sequence[float | None], high: bool = True) -> list[str]:
    """`best`, `second` or nothing for each value: equal ones share a mark, one alone has none.

    Args:
        values: `None` for what does not compete.
        high: Whether more is better.

    Example:
        >>> ranks([0.5, None, 0.7, 0.7, 0.6])
        ['', '', 'best', 'best', 'second']
    """
    there = [v for v in values if v is not None]
    steps = sorted(set(there), reverse=high)[:2] if len(there) > 1 else []
    return ["" if v is None or v not in steps else ("best", "second")[steps.index(v)] for v in values]


def lines(entries: Iterable[Entry], column: Callable[[Entry], Hashable]) -> list[tuple[str, dict[Hashable, Entry]]]:
    """Entries as rows of a table, one for each method in the usual order, whole data last.

    Where two entries of a method meet in a column, the method has a row for each suite, or else for each cell, that says
    so in its name.

    Returns:
        The name of each row beside its method, if any, and the entries by column.
    """
    kept: dict[tuple[str, str], list[Entry]] = {}
    for e in entries:
        kept.setdefault((e.method, e.form), []).append(e)
    rows: list[tuple[str, dict[Hashable, Entry]]] = []
    for (_, form), mine in sorted(kept.items(), key=lambda item: (*order(item[0][0]), item[0][1])):
        tags = [""] * len(mine)
        for word in ("suite", "cell"):
            if len({(t, column(e)) for t, e in zip(tags, mine, strict=True)}) < len(mine):
                tags = [str(e.record[word]) for e in mine]
        for tag in dict.fromkeys(tags):
            row = {column(e): e for t, e in zip(tags, mine, strict=True) if t == tag}
            rows.append((", ".join(w for w in (form, tag) if w), row))
    return rows


def order(method: str) -> tuple[int, str]:
    """A method's place in tables: coresets, the methods as reviews list them, others by name, the whole data."""
    return (len(ORDER) + (method == "whole"), method) if method not in ORDER else (ORDER.index(method), "")


def _mean_of(sets: Sequence[Record], value: Callable[[Record], float]) -> float | None:
    return fmean(map(value, sets)) if sets else None


def _is_kernel(network: str) -> bool:
    return network.split("-")[0] in ("kernel", "ntk", "nngp")


def _may_be(asked: str, found: str) -> bool:
    """Whether a network that was asked for may have come to be called so in results."""
    return asked in ("", found) or (_is_kernel(asked) and _is_kernel(found))


def _line(text: str) -> str:
    return " ".join(str(text).split())
