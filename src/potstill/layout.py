"""Tables in words: what `page` has sorted out, as a person reads it, for HTML and Markdown alike."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from .cards import record_of
from .methods import METHODS
from .page import MARKS, STATES, Entry, Group, fair, lines, ranks
from .places import IN_FILE, IN_ZOO, names
from .recipe import find
from .training import PROTOCOLS

PUBLISHED = "Published: with the paper's own network, protocol and copy of the data."
ZOO_NOTE = "a set of the zoo: its length and settings are those on its card"
MADE_FOR = "; made for {} and protocol {}"
WHITENED = "; whitened, and the baselines beside it too"
FILE_NOTE = "a set from a file, made elsewhere: {}"
FORMER_NOTE = "a set of a zoo ({} steps); the one that is there now is another"


@dataclass(frozen=True)
class Box:
    """One place of a table: a number or why there is none; lines in small type; numbers of notes below the table."""

    text: str
    small: tuple[str, ...] = ()
    published: str = ""
    mark: str = ""
    missing: bool = False
    notes: tuple[int, ...] = ()
    source: int = 0
    data: str = ""
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A row with what a filter looks at."""

    name: str
    tag: str
    boxes: tuple[Box | None, ...]
    data: tuple[str, ...]
    words: str


@dataclass(frozen=True)
class Table:
    """A table with its notes, numbered from 1. `heads` are pairs of a data set (or nothing) and a column's name."""

    key: str
    title: str
    words: str
    heads: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    first: str = "method"


@dataclass
class Notes:
    """Notes below a table: equal ones are said once."""

    found: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        if text not in self.found:
            self.found.append(text)
        return self.found.index(text) + 1


def name_of(group: Group) -> str:
    """Protocol, its hash and the network, as a heading."""
    parts = [f"protocol {group.protocol}" if group.protocol else "", group.hash, group.network]
    return " · ".join(p for p in parts if p) or "not measured"


def performance_table(group: Group, key: str) -> Table:
    """Accuracy of methods by data and images per class."""
    notes = Notes()
    columns = sorted({(e.data, e.ipc) for e in group.entries}, key=lambda c: (c[0], c[1] is None, c[1] or 0))
    rows = _accuracy(group.entries, columns, lambda e: (e.data, e.ipc), notes, lambda e: e.data)
    heads = tuple((data, "all" if ipc is None else str(ipc)) for data, ipc in columns)
    words = f"Accuracy in %, mean ± standard deviation; columns: images per class. {_spread(group.entries)}{_augmented(group.protocol)}"
    words += f" {PUBLISHED}" * any(e.record.get("published") for e in group.entries)
    return Table(key, name_of(group), words, heads, rows, tuple(notes.found))


def _augmented(protocol: str) -> str:
    """What rows of one protocol do not share."""
    own = protocol in PROTOCOLS and PROTOCOLS[protocol].own
    return " Each set is augmented as it was made." if own else ""


def transfer_table(group: Group, key: str) -> Table:
    """Accuracy of methods by network."""
    notes = Notes()
    columns = list(dict.fromkeys(e.network for e in group.entries))
    rows = _accuracy(group.entries, columns, lambda e: e.network, notes, lambda e: "")
    first = group.entries[0]
    title = f"{first.data}, {_per_class(first.ipc)} · {name_of(group)}"
    words = f"Accuracy in %, mean ± standard deviation; columns: networks. {_spread(group.entries)}"
    return Table(key, title, words, tuple(("", c or "network") for c in columns), rows, tuple(notes.found))


COSTS = (
    ("step_seconds", "Seconds of a whole outer step", lambda v: figures(v)),
    ("loss_seconds", "Seconds of the loss alone", lambda v: figures(v)),
    ("peak_bytes", "Peak memory, MB", lambda v: f"{v / 1e6:,.0f}"),
)


def cost_tables(group: Group, key: str) -> list[Table]:
    """Seconds of a step, seconds of the loss, peak memory of methods by images per class; less is better."""
    columns = sorted({e.ipc for e in group.entries}, key=lambda ipc: (ipc is None, ipc or 0))
    tables = []
    for value, title, said in COSTS:
        notes = Notes()
        found = lines(group.entries, lambda e: e.ipc)
        marks = [
            ranks([_cost(row.get(c), value) for _, row in found], high=False) if len(found) > 1 else [""]
            for c in columns
        ]
        rows = []
        for place, (tag, row) in enumerate(found):
            boxes: list[Box | None] = []
            for column, mark in zip(columns, marks, strict=True):
                e = row.get(column)
                number = _cost(e, value)
                if e is None or (number is None and e.status == "done"):
                    boxes.append(None)
                elif number is None:
                    boxes.append(_missing(e, notes))
                else:
                    boxes.append(Box(said(number), mark=mark[place], title=_times(e, value)))
            rows.append(_row(row, tag, boxes))
        heads = tuple(("", "all" if c is None else str(c)) for c in columns)
        words = "columns: images per class"
        tables.append(Table(f"{key}-{value}", title, words, heads, tuple(rows), tuple(notes.found)))
    return tables


FAIR = (
    "images per class",
    "accuracy",
    "gain over random",
    "p",
    "hard-label recovery",
    "improvement over random",
    "label-robust",
    "augmentation-robust",
    "stored",
    "made in",
)


def fair_table(group: Group, wholes: dict[tuple[str, str], float], key: str) -> Table | None:
    """What stands beside every accuracy of a group; nothing where nothing was measured."""
    rows, notes = [], Notes()
    for tag, found in lines(group.entries, lambda e: (e.data, e.ipc)):
        for e in sorted(found.values(), key=lambda e: (e.data, e.ipc or 0)):
            if e.mean is None or e.method == "whole":
                continue
            f = fair(e, wholes)
            against = notes.number(f"against {f.baseline}, same protocol and network") if f.baseline else 0
            texts: list[str | None] = [
                "all" if e.ipc is None else str(e.ipc),
                percent(e.mean, e.std),
                points(f.gain),
                p_words(f.p),
                points(f.recovery, sign=False),
                points(f.over_random),
                _robust(f.label_robust),
                _robust(f.augmentation_robust),
                None if e.stored is None else size(e.stored),
                None if e.minutes is None else duration(60 * e.minutes),
            ]
            boxes = [None if t is None else Box(t) for t in texts]
            if against and texts[2] is not None:
                boxes[2] = Box(texts[2], notes=(against,))
            rows.append(_row({0: e}, ", ".join(w for w in (tag, e.data) if w), boxes))
    heads = tuple(("", h) for h in FAIR)
    words = "Points are percentage points of accuracy; p by Welch's t-test, two-sided; both scores lie in 0 to 1"
    return Table(key, "Beside every accuracy", words, heads, tuple(rows), tuple(notes.found)) if rows else None


CSV = (
    "table",
    "suite",
    "cell",
    "status",
    "reason",
    "method",
    "form",
    "data",
    "ipc",
    "network",
    "protocol",
    "protocol_hash",
    "accuracy_mean",
    "accuracy_std",
    "n",
    "published",
    "published_spread",
    "published_source",
    "published_mark",
    "baseline",
    "gain",
    "p_value",
    "label_recovery",
    "over_random",
    "label_robust",
    "augmentation_robust",
    "stored_bytes",
    "minutes",
    "step_seconds",
    "loss_seconds",
    "peak_bytes",
    "baseline_bytes",
    "command",
)


def csv_text(groups: Sequence[Group], wholes: dict[tuple[str, str], float]) -> str:
    """Every entry as a line, numbers in full: accuracies in [0, 1], units in the names of columns."""
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, CSV, lineterminator="\n")
    table.writeheader()
    for group in groups:
        for e in group.entries:
            r = e.record
            line = {
                "table": r["table"], "suite": r["suite"], "cell": r["cell"], "status": e.status, "reason": e.reason, "method": e.method, "form": r.get("form"),
                "data": e.data, "ipc": e.ipc, "network": e.network, "protocol": e.protocol, "protocol_hash": e.hash,
                "stored_bytes": e.stored, "minutes": e.minutes, "command": r.get("command"),
            }  # fmt: skip
            line |= {name: r.get(name) for name in ("step_seconds", "loss_seconds", "peak_bytes", "baseline_bytes")}
            if e.mean is not None:
                line |= {"accuracy_mean": e.mean, "accuracy_std": e.std, "n": e.n}
                line |= dict(
                    zip(CSV[CSV.index("baseline") : CSV.index("stored_bytes")], astuple(fair(e, wholes)), strict=True)
                )
            if isinstance(published := r.get("published"), dict) and _is_first(e):
                names = ("accuracy", "spread", "source", "mark")
                line |= dict(zip(CSV[CSV.index("published") :], map(published.get, names), strict=False))
            table.writerow(line)
    return buffer.getvalue()


def percent(mean: float, std: float = 0.0) -> str:
    """An accuracy for people."""
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std else "")


def points(value: float | None, sign: bool = True) -> str | None:
    """A difference of accuracies in percentage points."""
    return None if value is None else f"{100 * value:{'+' if sign else ''}.1f}".replace("-", "−")


def p_words(p: float | None) -> str | None:
    """A p-value for people."""
    return None if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def figures(value: float) -> str:
    """Three significant figures, and all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{figures(count / scale)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A time for people."""
    return f"{figures(seconds)} s" if seconds < 60 else f"{figures(seconds / 60)} min"


def _accuracy(
    entries: Sequence[Entry],
    columns: Sequence[Any],
    column: Callable[[Entry], Any],
    notes: Notes,
    data: Callable[[Entry], str],
) -> tuple[Row, ...]:
    """Rows of accuracies, marked by column."""
    found = lines(entries, column)
    marks = [ranks([e.mean if (e := row.get(c)) and e.competes else None for _, row in found]) for c in columns]
    same = len({e.n for e in entries if e.mean is not None}) == 1
    rows = []
    for place, (tag, row) in enumerate(found):
        boxes: list[Box | None] = []
        for c, mark in zip(columns, marks, strict=True):
            e = row.get(c)
            if e is None:
                boxes.append(None)
                continue
            published, source = _published(e, notes) if _is_first(e) else ("", 0)
            if e.mean is None:
                box = _missing(e, notes)
                boxes.append(Box(box.text, (), published, "", True, box.notes, source, data(e), box.title))
            else:
                small = () if same else (f"n = {e.n}",)
                text = percent(e.mean, e.std)
                sets = e.record.get("sets") or []
                made = ", ".join(filter(None, dict.fromkeys(_through(e, s) for s in sets)))
                title = f"{e.record['cell']}: n = {e.n}" + (f", made with {made}" if made else "")
                told = tuple(notes.number(line) for line in dict.fromkeys(map(_origin, sets)) if line)
                boxes.append(Box(text, small, published, mark[place], False, told, source, data(e), title))
        rows.append(_row(row, tag, boxes))
    return tuple(rows)


def _through(e: Entry, made: Mapping[str, Any]) -> str:
    """The network through which a set was made; nothing for one that was made without, whatever its recipe names."""
    network = made.get("network")
    if not isinstance(network, str) or e.method not in METHODS:
        return network if isinstance(network, str) else ""
    objective = find(e.method).objective
    if objective is not None:
        return network if objective.needs.network else ""
    row, lies = e.record.get("row") or {}, names().get(str(made.get("path")).removeprefix(IN_ZOO))
    zoo = record_of(lies).get("recipe", {}) if lies is not None else {}  # where an older record does not say it
    space = made.get("space") or zoo.get("space") or (row.get("settings") or {}).get("space", "pixels")
    return network if space != "pixels" else ""  # samples are compared in a space of features


def _origin(made: Mapping[str, Any]) -> str:
    """What a reader has to know of where a set comes from; nothing of one that its benchmark has made."""
    path = str(made.get("path"))
    if path.startswith(IN_FILE):
        return FILE_NOTE.format(path.removeprefix(IN_FILE))
    if not path.startswith(IN_ZOO):
        return ""
    lies = names().get(path.removeprefix(IN_ZOO))
    now = record_of(lies) if lies is not None else {}
    same = bool(now) and now["set"]["sha256"] == made.get("sha256")
    about = made if "student" in made else {**now.get("recipe", {}), **now.get("choices", {})} if same else {}
    note = ZOO_NOTE if same or not now else FORMER_NOTE.format(made.get("steps"))
    if about.get("student") and about.get("protocol"):
        note += MADE_FOR.format(about["student"], about["protocol"])
    return note + (WHITENED if about.get("transform") == "zca" else "")


def _is_first(e: Entry) -> bool:
    """Whether a cell's published number is that of this network: it is that of the first."""
    wanted = (e.record.get("row") or {}).get("networks") or [e.network]
    return e.network == wanted[0] or e.record["table"] != "transfer"


def _published(e: Entry, notes: Notes) -> tuple[str, int]:
    """The published accuracy and the number of the note on its source."""
    p = e.record.get("published")
    if not isinstance(p, dict) or not isinstance(p.get("accuracy"), int | float):
        return "", 0
    spread = p.get("spread")
    mark = MARKS.get(str(p.get("mark")), str(p.get("mark")))
    text = percent(p["accuracy"], spread if isinstance(spread, int | float) else 0.0)
    return text, notes.number(f"published: {p.get('source') or 'no source'} ({mark})")


def _missing(e: Entry, notes: Notes) -> Box:
    """Why there is no number."""
    word = STATES.get(e.status, e.status)
    numbers = (notes.number(f"{word}: {e.reason}"),) if e.reason else ()
    return Box(word, missing=True, notes=numbers, title=e.reason)


def _row(found: dict[Any, Entry], tag: str, boxes: Sequence[Box | None]) -> Row:
    first = next(iter(found.values()))
    data = tuple(dict.fromkeys(e.data for e in found.values()))
    words = [first.method, tag, *data, *dict.fromkeys(e.network for e in found.values()), first.protocol]
    return Row(first.method, tag, tuple(boxes), data, " ".join(w for w in words if w).lower())


def _cost(e: Entry | None, value: str) -> float | None:
    number = e.record.get(value) if e is not None and e.status == "done" else None
    return float(number) if isinstance(number, int | float) else None


def _times(e: Entry, value: str) -> str:
    """How often a time was taken, or what the memory stood at before."""
    times = (e.record.get("times") or {}).get(value.partition("_")[0])
    if times:
        return f"median of {len(times)}: {', '.join(figures(t) for t in times[:9])} s"
    before = e.record.get("baseline_bytes")
    return f"{size(before)} of it before the first step" if value == "peak_bytes" and before else ""


def _spread(entries: Sequence[Entry]) -> str:
    """How many networks stand behind every number, where it is the same for all."""
    counts = {e.n for e in entries if e.mean is not None}
    return f"n = {counts.pop()} each." if len(counts) == 1 else ""


def _per_class(ipc: int | None) -> str:
    return "all images" if ipc is None else f"{ipc} {'image' if ipc == 1 else 'images'} per class"


def _robust(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
