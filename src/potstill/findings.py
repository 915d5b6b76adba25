"""Claims of the literature held against a benchmark's records: confirmed, refuted, not resolvable with what was measured, or not measured."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from .errors import PotstillError, unknown
from .scores import accuracies, p_value, rival

Cell = Mapping[str, Any]
KINDS = ("accuracy", "seconds", "bytes")
CONFIRMED, REFUTED, OPEN, MISSING = "confirmed", "refuted", "not resolvable", "not measured"
LEVEL = 0.05  # of the test that two accuracies differ
MARGIN = 1.1  # ratio below which two measured costs count as one
ANY_WIDTH = "-w*"
WIDTH = re.compile(r"-w(\d+)(?=-d\d+$|$)")
LESS = " less "
NAMES = {"frepo": "FRePo"}  # methods whose name is not theirs in capitals
LIMITS = {"seconds": "out of time", "bytes": "out of memory"}


@dataclass(frozen=True)
class Finding:
    """One claim: what `more` names lies above what `than` names, in costs by a factor.

    Args:
        name: Short, without blanks.
        claim: In a sentence.
        source: Where it stands.
        kind: `accuracy`, `seconds` or `bytes`.
        more: Cells, each of which lies above each of `than`: `data/method/ipc` (a set's accuracy; with `@gain` that over random),
            `transfer/data/method/ipc@network`, where `-w*` at a network's end stands for the greatest width at which both cells of
            a comparison were measured, or `cost/data/method/ipc/form@step_seconds`, `@loss_seconds`, `@peak_bytes`. Of accuracies
            also `A less B`: the points that B has less than A.
        than: Such cells.
        command: That measures them.
        table: For readers of the file.
        factor: `more` lies above `than` times this.
        note: What else differs between the two, for the reader of the verdict.
    """

    name: str
    claim: str
    source: str
    kind: str
    more: tuple[str, ...]
    than: tuple[str, ...]
    command: str
    table: str = ""
    factor: float = 1.0
    note: str = ""

    @property
    def cells(self) -> set[str]:
        """The cells that it speaks of."""
        return {part.partition("@")[0] for name in (*self.more, *self.than) for part in name.split(LESS)}


def read(file: Path) -> list[Finding]:
    """The findings of a file. A row with `each = { method = ["dd", "dc"], ... }` stands for one finding per choice: what is in braces
    in its texts (`{method}`, or `{METHOD}` for the name in capitals) is that choice.

    Raises:
        PotstillError: It is no TOML, or a row has fields that do not exist or lacks some.
    """
    try:
        plain = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PotstillError(f"{file} cannot be read ({error})") from error
    known, found = {f.name for f in fields(Finding)}, []
    for i, row in _each(plain.get("finding", []), file.name):
        at = f"{file.name}: finding {i + 1} ({row.get('name', 'without a name')})"
        for name in sorted(set(row) - known):
            raise PotstillError(f"{at}: {unknown('field', name, known)}")
        for name in ("name", "claim", "source", "kind", "more", "than", "command"):
            if name not in row:
                raise PotstillError(f"{at}: {name} is missing")
        if row["kind"] not in KINDS:
            raise PotstillError(f"{at}: {unknown('kind', str(row['kind']), KINDS)}")
        sides = {k: tuple(row[k]) if isinstance(row[k], list) else (row[k],) for k in ("more", "than")}
        if not all(side and all(isinstance(name, str) for name in side) for side in sides.values()):
            raise PotstillError(f"{at}: more and than are names of cells, one or a list of them")
        counts = {name.count(LESS) for side in sides.values() for name in side}
        if len(counts) > 1 or max(counts) > 1 or (counts != {0} and row["kind"] != "accuracy"):
            raise PotstillError(f"{at}: `A less B`, of accuracies, is compared with another difference only")
        found.append(Finding(**{**row, **sides}))
    return found


def _each(rows: Sequence[Mapping[str, Any]], file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows, each with its place in the file, once for every choice of what it is `each` for."""
    for i, row in enumerate(rows):
        each = row.get("each", {})
        if not isinstance(each, dict) or not all(isinstance(v, list) and v for v in each.values()):
            raise PotstillError(f"{file}: finding {i + 1}: each = {each!r}: lists by name are needed")
        for chosen in itertools.product(*each.values()):
            names = dict(zip(each, map(str, chosen), strict=True))
            names |= {k.upper(): NAMES.get(v, v.upper()) for k, v in names.items()}
            try:
                yield i, {k: _filled(v, names) for k, v in row.items() if k != "each"}
            except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
                raise PotstillError(
                    f"{file}: finding {i + 1}: {error.args[0]!r} in braces is nothing that it is for each of"
                ) from error


def _filled(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_filled(v, names) for v in value]
    return value.format_map(names) if isinstance(value, str) and names else value


def judge(finding: Finding, cells: Mapping[str, Cell]) -> dict[str, str]:
    """A finding's verdict by the records.

    Accuracies are compared by Welch's t-test over networks and sets at a level of 5 %. Costs differ where their ratio is
    beyond 1.1; a cell that ran out of time took longer than any that did not, and one out of memory needed more of it:
    of the other, neither says anything.

    Args:
        finding: The claim.
        cells: Records by name: that of the cell, after `transfer/` for the table of transfer.

    Returns:
        `name`, `claim`, `verdict` (`confirmed`, `refuted`, `not resolvable`, `not measured`), `numbers`, `note` and `command`, with the options of the
        runs that have measured the cells.
    """
    # One baseline for all: a gain over soft labels is no rival of one over hard ones.
    parts = [part.partition("@") for name in (*finding.more, *finding.than) for part in name.split(LESS)]
    gained = [cells[cell] for cell, _, what in parts if what == "gain" and _accuracy(f"{cell}@gain", cells, "random")]
    chance = "random-soft" if gained and all(rival(c) == "random-soft" for c in gained) else "random"
    value: Callable[..., list[float]] = partial(_accuracy, chance=chance)
    if finding.kind != "accuracy":
        value = partial(_cost, limit=LIMITS[finding.kind])
    verdicts, numbers = [], []
    for pair in itertools.product(finding.more, finding.than):
        name, other = _at_one_width(pair, cells)
        more, than = value(name, cells), value(other, cells)
        missing = [n for n, v in ((name, more), (other, than)) if not v]
        if missing:
            verdicts.append(MISSING)
            where = " at one width" if all(ANY_WIDTH in n for n in (name, other)) else ""
            numbers.append(f"not measured{where}: {', '.join(missing)}")
        elif finding.kind == "accuracy":
            p, higher = p_value(more, than), fmean(more) > fmean(than)
            unit = " points" if LESS in name or name.endswith("@gain") else " %"
            unit += " over random, soft labels" if name.endswith("@gain") and chance != "random" else ""
            verdicts.append(OPEN if p is None or p >= LEVEL else CONFIRMED if higher else REFUTED)
            told = "too few for a test" if p is None else f"p = {p:.2g}"
            numbers.append(f"{name}: {100 * fmean(more):.1f}{unit}, {other}: {100 * fmean(than):.1f}{unit}, {told}, n = {len(more)} and {len(than)}")  # fmt: skip
        else:
            ratio = math.nan if more == than == [math.inf] else more[0] / (than[0] * finding.factor)
            verdicts.append(CONFIRMED if ratio > MARGIN else REFUTED if ratio < 1 / MARGIN else OPEN)
            numbers.append(f"{name}: {_words(more[0], finding.kind)}, {other}: {_words(than[0], finding.kind)}")
    joint = next((v for v in (REFUTED, OPEN, MISSING) if v in verdicts), CONFIRMED)
    options = _options(cells[c] for c in sorted(finding.cells) if c in cells)
    command = " ".join([finding.command, *(o for o in options if o.split()[0] not in finding.command.split())])
    return {"name": finding.name, "claim": finding.claim, "verdict": joint, "numbers": "; ".join(numbers), "note": finding.note, "command": command}  # fmt: skip


def judge_all(findings: Sequence[Finding], cells: Mapping[str, Cell]) -> list[dict[str, str]]:
    """The verdicts on all findings."""
    return [judge(f, cells) for f in findings]


def _options(records: Iterable[Cell]) -> list[str]:
    """The options that all of some cells were measured with, but for which cells and where to."""
    found: list[dict[str, str]] = []
    for record in records:
        try:
            words = iter(shlex.split(str(record.get("command") or ""))[3:])  # after `potstill benchmark NAME`
        except ValueError:  # no command line
            return []
        pairs = {word: "" if word == "--no-zoo" else next(words, "") for word in words}
        found.append({k: v for k, v in pairs.items() if k not in ("--only", "--out")})
    shared = [(k, v) for k, v in (found[0] if found else {}).items() if all(f.get(k) == v for f in found)]
    quoted = ((k, v if "$" in v else shlex.quote(v)) for k, v in shared)  # a shell is to read $POTSTILL_DATA
    return [f"{k} {v}" if found[0][k] else k for k, v in quoted]


def _at_one_width(names: Sequence[str], cells: Mapping[str, Cell]) -> list[str]:
    """Names as they were measured: `-w*` becomes the greatest width that all have, so that a narrow network is compared with one as
    narrow; differences part by part.
    """
    columns = [_one_width(parts, cells) for parts in zip(*(name.split(LESS) for name in names), strict=True)]
    return [LESS.join(parts) for parts in zip(*columns, strict=True)]


def _one_width(names: Sequence[str], cells: Mapping[str, Cell]) -> list[str]:
    """A name stays as it is where its network was measured at no width, or at none that the others have."""
    widths: dict[str, dict[float, str]] = {}
    for name in names:
        if name.endswith(ANY_WIDTH):
            cell, _, network = name.removesuffix(ANY_WIDTH).partition("@")
            record = cells.get(cell, {})
            rows = [r for r in record.get("results", ()) if record["status"] == "done" and (r["role"], r["variant"]) == ("set", "own")]  # fmt: skip
            known = {r["network"]: WIDTH.search(r["network"]) for r in rows if WIDTH.sub("", r["network"]) == network}
            widths[name] = {float(w[1]) if w else math.inf: f"{cell}@{at}" for at, w in known.items()}
    shared = set.intersection(*(set(w) for w in widths.values() if w)) if any(widths.values()) else set()
    return [widths[name].get(max(shared), name) if shared and name in widths else name for name in names]


def _accuracy(name: str, cells: Mapping[str, Cell], chance: str) -> list[float]:
    """Accuracies over networks and sets; with `@gain` those of the first set, each less that of the
    random real samples beside it, so that the spread of both counts; so for one name less another.
    """
    if LESS in name:
        both = [_accuracy(part, cells, chance) for part in name.split(LESS)]
        return [round(a - b, 9) for a, b in zip(*both, strict=False)]
    cell, _, what = name.partition("@")
    record = cells.get(cell)
    if record is None or record.get("status") != "done":
        return []
    if what != "gain":
        return accuracies(record, network=what or None)
    return [round(a - b, 9) for a, b in zip(accuracies(record), accuracies(record, chance), strict=False)]


def _cost(name: str, cells: Mapping[str, Cell], limit: str) -> list[float]:
    """Seconds or bytes; infinite where they ran out."""
    cell, _, what = name.partition("@")
    record = cells.get(cell)
    if record is None:
        return []
    if record.get("status") == limit:
        return [math.inf]
    value = record.get(what or "step_seconds")
    return [float(value)] if record.get("status") == "done" and value else []


def _words(value: float, kind: str) -> str:
    show: Callable[[float], str] = (lambda v: f"{v:.3g} s") if kind == "seconds" else (lambda v: f"{v / 2**20:.0f} MiB")
    return "beyond the limit" if value == math.inf else show(value)
