"""Suites of rows as cells, each run once: resumable, shared by processes, and a failure stops nothing.

A results folder holds a record for each cell (`cells/`), the sets (`runs/`) and the recordings (`experts/`) that they
were made of. Nothing in a record is an absolute path: the folder may be moved, merged and sent.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from filelock import Timeout

from . import findings
from .bench import Bench
from .cells import ADDED, accuracy, asked, covered, in_zoo, lessons, minutes, sha256_of
from .compiling import PRECISIONS, check_device, choose_compile, keep_memory
from .costs import TIME, in_own_process
from .errors import NoMemory, PotstillError, Stopped, unknown
from .faults import out_of_memory
from .foreign import located
from .judge import protocol_of
from .records import digest, read_json, software, sweep, write_json, write_sealed
from .rows import CostRow, Row, Suite

Record = dict[str, Any]
TODO, DONE, KEPT, OTHER = "to do", "done", "kept", "in another process"
LEFT, ABSENT, FAILED, MEMORY = "left out", "absent", "failed", "out of memory"


@dataclass(frozen=True)
class Cell:
    """One row and what is planned for it.

    Args:
        suite: Its suite.
        row: The row.
        minutes: Estimated, with the teachers that no cell before it trains.
        mark: Digest of all that its numbers depend on; nothing where its data are not there.
        fate: `to do`, `kept` (its record is there), `left out` (of the budget) or `absent`.
        reason: For people.
        teachers: Those that it needs, by data and network.
    """

    suite: Suite
    row: Row | CostRow
    minutes: float
    mark: str
    fate: str
    reason: str = ""
    teachers: frozenset[tuple[str, str]] = frozenset()


Through = Callable[[Sequence[Cell]], Iterable[tuple[Cell, str]]]  # runs cells, and tells each one's fate as it ends


@dataclass(frozen=True)
class Benchmark:
    """Suites on a bench."""

    suites: Sequence[Suite]
    bench: Bench

    def file(self, row: Row | CostRow, table: str) -> Path:
        """Where a cell's record lies."""
        return self.bench.out / "cells" / table / f"{row.cell.removeprefix('cost/')}.json"

    def kept(self, cell: Cell) -> Record | None:
        """A cell's record, whole or so far, if everything it depends on is as it was."""
        file = self.file(cell.row, cell.suite.table)
        if not file.exists():
            return None
        try:
            found = dict(read_json(file))
            if found["inputs"] != cell.mark or not found["status"]:
                return None
            if isinstance(cell.row, Row) and found["status"] == DONE:
                found.setdefault("met", [{k: list(found["row"].get(k, ())) for k in ADDED}])
                covered(found, cell.row)
            return found
        except (PotstillError, KeyError, TypeError, ValueError, AttributeError):
            return None  # damaged: measured again

    def plan(self, only: str | None = None, budget: float | None = None) -> list[Cell]:
        """All cells that a pattern keeps, in order, each with its fate; a budget in minutes leaves out what does not fit.

        Raises:
            PotstillError: A choice of the bench that does not exist, or a budget that is no time.
        """
        b = self.bench
        check_device(b.device)
        choose_compile(b.compile, 0.0, b.device)
        if b.precision not in ("auto", *PRECISIONS):
            raise unknown("precision", b.precision, ("auto", *PRECISIONS))
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise PotstillError(f"--minutes {budget:g} is not a time; a number above 0 is needed")
        if b.out.exists() and not b.out.is_dir():
            raise PotstillError(f"--out {b.out} is a file; a folder is needed")
        names = {row.data for suite in self.suites for row in suite.rows}
        for name in b.exchange:
            if name not in names:
                raise unknown("data of a row", name, names)
        cells: list[Cell] = []
        left, taught = budget, frozenset[tuple[str, str]]()
        for suite in self.suites:
            for row in suite.rows:
                if only is None or fnmatch.fnmatch(self.name(suite, row), only):
                    cell = self._planned(suite, row, taught)
                    if cell.fate == TODO and left is not None:
                        if cell.minutes > left:
                            cell = replace(cell, fate=LEFT, reason="beyond the budget")
                        else:
                            left -= cell.minutes
                    if cell.fate == TODO:
                        taught |= cell.teachers
                    cells.append(cell)
        return cells

    def judge_findings(self, file: Path) -> list[dict[str, str]]:
        """Hold the findings of a file against all records of the folder, and write the verdicts beside them.

        Only those about a cell of these suites or of the folder: others would all be "not measured".
        """
        found = {}
        for path in sorted((self.bench.out / "cells").rglob("*.json")):
            record = read_json(path)
            try:
                found[("transfer/" if record["table"] == "transfer" else "") + record["cell"]] = record
            except (KeyError, TypeError) as error:
                raise PotstillError(f"{path} is no record of a benchmark's cell") from error
        here = {*found, *(self.name(suite, row) for suite in self.suites for row in suite.rows)}
        verdicts = findings.judge_all([f for f in findings.read(file) if here & f.cells], found)
        write_json(self.bench.out / "findings.json", verdicts)
        return verdicts

    @staticmethod
    def name(suite: Suite, row: Row | CostRow) -> str:
        """What `--only` compares and the user reads."""
        return f"transfer/{row.cell}" if suite.table == "transfer" else row.cell

    def _planned(self, suite: Suite, row: Row | CostRow, taught: frozenset[tuple[str, str]] = frozenset()) -> Cell:
        try:
            data = self.bench.data(row.data)
        except PotstillError as error:
            return Cell(suite, row, 0.0, "", ABSENT, reason(error))
        plain = row.plain if isinstance(row, Row) else asdict(row)
        if isinstance(row, Row) and row.set:  # where a file lies is no part of what it is
            plain["set"] = located(row.set)[1]
        parts: list[Any] = [
            suite.table,
            {k: v for k, v in plain.items() if k not in ("published", *ADDED)},
            data.fingerprint,
        ]
        lies = None
        if isinstance(row, Row):
            parts += [protocol_of(row.protocol).hash, row.seeds[0]]
            parts += [row.networks] if suite.table == "performance" else []
            parts += [asdict(suite.experts[row.experts])] if row.experts else []
            lies = in_zoo(self.bench, row, data)
            parts += [read_json(lies / "record.json")["set"]["sha256"]] if lies is not None else []
            parts += [sha256_of(row.set)] if row.set else []
        b = self.bench
        chosen = (b.device, b.precision, b.compile if isinstance(row, CostRow) else "auto")
        parts += [chosen] if chosen != ("cpu", "auto", "auto") else []
        mark = digest(parts)
        cell = Cell(suite, row, 0.0, mark, TODO)
        found = self.kept(cell)
        there = max(
            int(lies is not None or bool(isinstance(row, Row) and row.set)), len(found.get("sets", ())) if found else 0
        )
        try:
            teachers = lessons(row, data, b, there)
            more = sum(m for teacher, m in teachers.items() if teacher not in taught)
            cell = replace(cell, minutes=minutes(row, data, there) + more, teachers=frozenset(teachers))
        except PotstillError as error:
            return replace(cell, reason=reason(error))
        return replace(cell, fate=KEPT) if self._settled(found, row) else cell

    def again(self, suite: Suite, row: Row | CostRow) -> Cell:
        """One cell as it is planned here and now."""
        return self._planned(suite, row)

    def run(self, cells: Sequence[Cell], through: Through | None = None) -> dict[str, int]:
        """Run what is to do; what another process holds is come back to once, at the end.

        Args:
            cells: A plan.
            through: What runs them; this process, one after the other, if absent.

        Returns:
            How many cells met each fate.
        """
        keep_memory()
        try:
            self.bench.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PotstillError(f"--out {self.bench.out} cannot be made ({error.strerror})") from error
        through = through or self._in_turn
        fates = [cell.fate for cell in cells if cell.fate not in (TODO, ABSENT)]
        held = []
        for cell, fate in through([cell for cell in cells if cell.fate in (TODO, ABSENT)]):
            if fate == OTHER:
                held.append(cell)
            else:
                fates.append(fate)
        fates += [fate for _, fate in through(held)]
        return {fate: fates.count(fate) for fate in dict.fromkeys(fates)}

    def _in_turn(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, str]]:
        return ((cell, self.single(cell)) for cell in cells)

    def single(self, cell: Cell) -> str:
        """Run a cell here; whatever goes wrong in it becomes its record. Its fate."""
        return self._recorded(cell, self._measured_now)

    def lost(self, cell: Cell, status: str, why: str) -> str:
        """Record a cell whose process has ended without a word of its own; what it had measured stays. Its fate."""
        return self._recorded(cell, lambda cell, head, file: {**head, "status": status, "reason": why})

    def _measured_now(self, cell: Cell, head: Record, file: Path) -> Record:
        began = perf_counter()
        self.bench.say(f"{self.name(cell.suite, cell.row)}: begins, about {cell.minutes:.1f} min")
        record = self._caught(cell, head, file)
        record["seconds"] = round(head["seconds"] + perf_counter() - began, 3)
        return record

    def _recorded(self, cell: Cell, make: Callable[[Cell, Record, Path], Record]) -> str:
        """Make a cell's record, unless it is there by now or another process is about it."""
        file, name = self.file(cell.row, cell.suite.table), self.name(cell.suite, cell.row)
        try:
            with self.bench.locked(file):
                found = self.kept(cell)
                if self._settled(found, cell.row):
                    return KEPT  # another process has made it since the plan
                if cell.fate == ABSENT and self._measured(file):
                    return ABSENT  # what was measured when the data were here stays
                file.parent.mkdir(parents=True, exist_ok=True)
                sweep(file)
                head = self._head(cell, found)
                if cell.fate == ABSENT:
                    record = {**head, "status": ABSENT, "reason": cell.reason}
                else:
                    record = make(cell, head, file)
                fate, words = str(record["status"]), self._words(record)
                if isinstance(cell.row, Row) and fate == DONE:
                    record = {**record, "met": [*head["met"], asked(cell.row)]}
                elif found is not None and found["status"] == DONE:
                    record = {**record, "status": DONE}  # what was added has failed; what was there stays
                write_sealed(file, record)
        except Timeout:
            return OTHER
        self.bench.say(f"{name}: {fate}{words}")
        return fate

    @staticmethod
    def _settled(found: Record | None, row: Row | CostRow) -> bool:
        """Whether a record needs no further run: it is done and has all that the row asks for. Where costs are measured, a
        limit that was met is a result.
        """
        if found is None:
            return False
        if isinstance(row, CostRow):
            return found["status"] in (DONE, MEMORY, TIME)
        return found["status"] == DONE and covered(found, row)

    @staticmethod
    def _measured(file: Path) -> bool:
        """Whether a record says more than that data are absent."""
        try:
            return bool(read_json(file)["status"] != ABSENT)
        except (PotstillError, KeyError, TypeError):
            return False

    @staticmethod
    def _words(record: Record) -> str:
        """A record's number or reason in a few words."""
        own = [r for r in record.get("results", ()) if (r["role"], r["variant"]) == ("set", "own")]
        if record["status"] == DONE and own:
            return f", {100 * sum(r['accuracy_mean'] for r in own) / len(own):.1f} %"
        if record["status"] == DONE and record.get("step_seconds"):
            return f", {record['step_seconds']:.3g} s a step"
        return f": {record['reason']}" if record["reason"] else ""

    def _head(self, cell: Cell, found: Record | None) -> Record:
        """What all records begin with; of a cell that was interrupted, what it has so far."""
        row = cell.row
        published = row.published if isinstance(row, Row) else None
        record: Record = {
            "format": 1,
            "kind": "cost" if isinstance(row, CostRow) else "accuracy",
            "suite": cell.suite.name,
            "table": cell.suite.table,
            "cell": row.cell,
            "status": "running",
            "reason": "",
            "inputs": cell.mark,
            "method": row.method,
            "data": placeless(self.bench.exchange.get(row.data, row.data)),
            "ipc": row.ipc,
            "row": {
                k: Path(v).name if k == "set" else v for k, v in asdict(row).items() if v not in ("", (), {}, None)
            },
            "command": self._command(cell),
            "seconds": 0.0,
            "software": software(self.bench.device),
        }
        if isinstance(row, CostRow):
            return {**record, "form": row.form, "network": row.network}
        record |= {"protocol": row.protocol, "published": asdict(published) if published else None, "met": [], "sets": [], "results": []}  # fmt: skip
        if found is not None:
            record |= {k: found[k] for k in ("met", "sets", "results", "seconds") if k in found}
        if record["met"]:  # a whole record, to which something is added: it is one all the while
            both = {
                k: list(dict.fromkeys((*getattr(row, k), *(v for met in record["met"] for v in met[k])))) for k in ADDED
            }
            more = set(both["networks"]) != set(row.networks)
            record["command"] = self._command(cell, both["networks"] if more else None)
            record |= {"status": DONE, "row": record["row"] | {k: v for k, v in both.items() if v}}
        return record

    def _command(self, cell: Cell, networks: Sequence[str] | None = None) -> str:
        """The command that runs the cell alone, with other networks than the suite was asked for where they are given."""
        networks = cell.suite.networks if networks is None else networks
        name, b = cell.row.data, self.bench
        parts = ["potstill", "benchmark", cell.suite.called, "--only", self.name(cell.suite, cell.row)]
        parts += ["--data", f"{name}={b.exchange[name]}"] if name in b.exchange else []
        parts += ["--networks", ",".join(networks)] if networks else []
        parts += ["--code", ",".join(cell.suite.code)] if cell.suite.code else []
        parts += ["--device", b.device] if b.device != "cpu" else []
        parts += ["--compile", b.compile] if b.compile != "auto" else []
        parts += ["--precision", b.precision] if b.precision != "auto" else []
        return placeless(shlex.join([*parts, *([] if b.zoo or isinstance(cell.row, CostRow) else ["--no-zoo"])]))

    def _caught(self, cell: Cell, record: Record, file: Path) -> Record:
        try:
            if isinstance(cell.row, CostRow):
                return self._cost(cell.row, record)
            return accuracy(self.bench, cell.suite, cell.row, record, file)
        except NoMemory:
            return {**record, "status": MEMORY, "reason": "more than this machine has"}
        except (PotstillError, Stopped) as error:
            return {**record, "status": FAILED, "reason": reason(error, self.bench.out)}
        except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, OSError,
                RuntimeError, SyntaxError, TypeError, ValueError) as error:  # fmt: skip
            if out_of_memory(error):
                return {**record, "status": MEMORY, "reason": "more than this machine has"}
            return {**record, "status": FAILED, "reason": f"{type(error).__name__}: {reason(error, self.bench.out)}"}

    def _cost(self, row: CostRow, record: Record) -> Record:
        b = self.bench
        on, _ = choose_compile(b.compile, 0.0, b.device)
        blank: Record = {
            "step_seconds": None,
            "loss_seconds": None,
            "times": {},
            "phases": {},
            "peak_bytes": None,
            "baseline_bytes": None,
        }
        measured = in_own_process(row, b.exchange.get(row.data, row.data), b.data_root, on, b.precision, b.device)
        return {**record, **blank, **measured}


def reason(error: BaseException, out: Path | None = None) -> str:
    """An error in a line for a record: no path of this machine in it, and what lies in the results folder from there."""
    line = next(iter(str(error).splitlines()), "")
    for folder in (out.absolute(), out) if out is not None and out != Path() else ():
        line = re.sub(rf"(?<![\w./-]){re.escape(f'{folder}{os.sep}')}", "", line)
    return placeless(line)[:300]


def placeless(line: str) -> str:
    """A line without paths of this machine."""
    for place, name in ((os.environ.get("POTSTILL_DATA"), "$POTSTILL_DATA"), (str(Path.home()), "~")):
        line = line.replace(place, name) if place and place != "/" else line
    return line


def planned(cells: Sequence[Cell]) -> str:
    """A plan for people: every cell, its minutes and fate, and the sum of what is to do. A reason that many cells share is
    given once."""
    rows, given = [], set[str]()
    for c in cells:
        why = f": {c.reason}" if c.reason and c.reason not in given else ""
        rows.append((Benchmark.name(c.suite, c.row), f"{c.minutes:.1f}", c.fate + why))
        given.add(c.reason)
    wide = max((len(r[0]) for r in rows), default=0)
    lines = [f"{name:{wide}}  {minutes:>6} min  {fate}" for name, minutes, fate in rows]
    todo = [c for c in cells if c.fate == TODO]
    lines.append(f"{len(todo)} of {len(cells)} cells to do, about {sum(c.minutes for c in todo):.0f} min")
    return "\n".join(lines)
