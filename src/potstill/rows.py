"""A benchmark's rows: strict TOML, one row for each cell, all mistakes found before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import PotstillError, unknown
from .strict import read_toml

TABLES = ("performance", "transfer", "cost")
MARKS = ("read", "quoted", "remembered")
WHOLE = "whole"  # a row's method that is no method: a network on the whole training set


@dataclass(frozen=True)
class Published:
    """What a paper says a cell comes to.

    Args:
        accuracy: In [0, 1].
        source: Where it stands.
        mark: `read` there, `quoted` by another paper, or `remembered` and not checked.
        spread: Its standard deviation, in [0, 1].
    """

    accuracy: float
    source: str
    mark: str
    spread: float = 0.0


def _plain(name: str) -> str:
    """A name as one part of a path that leads down: data may be a path, a method may be `package.module:recipe`."""
    return re.sub(r"[:/\\]+", "-", name).lstrip(".-")


@dataclass(frozen=True)
class Row:
    """One cell of a table of accuracies: a method on data at a number of images per class.

    Args:
        method: A name of `potstill list methods`, or `whole`.
        data: As `potstill distill` takes it.
        ipc: Images per class.
        networks: What the sets are judged with.
        protocol: How.
        minutes: Budget for making each set, in place of `steps`; neither for a coreset.
        steps: Length of the making.
        preset: `small` or `paper`.
        network: What the sets are learned with; the recipe's own if empty.
        seeds: One set each.
        repeats: Fresh networks for each set.
        baselines: Of `random`, `k-means` and `random-soft` (random real samples with a teacher's labels, for sets with learned ones), judged
            beside the first set.
        variants: `hard` (the set with hard labels) and `plain` (no augmentation), for the scores of fairness.
        experts: Name of a recording in the file.
        settings: Recipe fields to change.
        published: What a paper says; of several networks, for the first.
        name: In place of the method in the cell's name, where a method has several rows.
        set: A set that is there, of this library's or another project's, by path; then `method` is what tables call it.
        normalisation: What was done to its inputs, as for `potstill.evaluate`, where it is another project's.
    """

    method: str
    data: str
    ipc: int
    networks: tuple[str, ...]
    protocol: str
    minutes: float = 0.0
    steps: int = 0
    preset: str = "small"
    network: str = ""
    seeds: tuple[int, ...] = (0,)
    repeats: int = 3
    baselines: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    experts: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    published: Published | None = None
    name: str = ""
    set: str = ""
    normalisation: str = ""

    @property
    def plain(self) -> dict[str, Any]:
        """Its fields by name; what rows could not say at first only where it is said, so that older records stay good."""
        return {k: v for k, v in asdict(self).items() if v or k not in ("set", "normalisation")}

    @property
    def cell(self) -> str:
        """Its name within a table."""
        return f"{_plain(self.data)}/{_plain(self.name or self.method)}/{self.ipc}"


@dataclass(frozen=True)
class CostRow:
    """One cell of the table of costs.

    Args:
        method: A name of `potstill list methods`.
        data: As `potstill distill` takes it.
        ipc: Images per class.
        batch: Samples of S in each inner step, for objectives that take some; `full`: all of them.
        form: `plain`, or `saving` for what saves memory.
        network: What S is learned with; the recipe's own if empty.
        preset: `small` or `paper`.
        repeats: Timed steps.
        limit_seconds: After which the cell is out of time.
        settings: Recipe fields to change.
    """

    method: str
    data: str
    ipc: int
    batch: int | str = "full"
    form: str = "plain"
    network: str = ""
    preset: str = "paper"
    repeats: int = 5
    limit_seconds: float = 120.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cell(self) -> str:
        """Its name within the table."""
        return f"cost/{_plain(self.data)}/{_plain(self.method)}/{self.ipc}/{self.form}"


@dataclass(frozen=True)
class Recording:
    """Experts that rows refer to by name: made once, shared."""

    data: str
    count: int
    epochs: int
    network: str = "convnet"
    lr: float = 0.01
    momentum: float = 0.0
    batch: int = 256


@dataclass(frozen=True)
class Suite:
    """The rows of one file; `called` is what `potstill benchmark` takes to find them, `networks` what was asked for in
    place of the rows' own, `code` the modules from outside that they may name."""

    name: str
    title: str
    table: str
    rows: tuple[Row | CostRow, ...]
    experts: Mapping[str, Recording]
    called: str
    networks: tuple[str, ...] = ()
    code: tuple[str, ...] = ()

    def judged_with(self, networks: Sequence[str]) -> Suite:
        """The same rows with other students, such as narrow ones where the rows' own are beyond the machine.

        The teacher of `random-soft` is of the student's architecture: of the first one, unless a row says which or that one is
        a kernel.

        Args:
            networks: One for a table of performance; several where networks are compared.

        Raises:
            PotstillError: Several for a table that has room for one.
        """
        if self.table == "performance" and len(networks) > 1:
            raise PotstillError(f"--networks {','.join(networks)}: a table of performance has one network")
        from .students import is_kernel

        def judged(row: Row) -> Row:
            taught = row.method == "random-soft" and not is_kernel(networks[0])
            more = {"student": networks[0]} if taught else {}
            return replace(row, networks=tuple(networks), settings={**more, **row.settings})

        rows = tuple(judged(r) if isinstance(r, Row) else r for r in self.rows)
        return replace(self, rows=rows, networks=tuple(networks))


def suites(name: str, places: Sequence[Path], code: Sequence[str] = ()) -> list[Suite]:
    """The suites of a name, or the one of a file.

    Args:
        name: A `.toml` file, or a name: `quick` stands for `quick.toml` and all `quick-*.toml`.
        places: Folders in which names are looked for; the first that has it wins.
        code: Modules outside of Potstill that the rows may name, and that are imported where they do.

    Raises:
        PotstillError: No such name or file, code that is not in `code`, or mistakes in it, all of them in one message.
    """
    for module in code:
        if not _is_module(module):
            raise PotstillError(f"--code {module[:80]!r} is no module; package.module[,other] is needed")
    if name.endswith(".toml"):
        found = [Path(name)]
    else:
        known = {file.stem for place in places for file in sorted(place.glob("*.toml"))}
        if name not in known:
            raise unknown("benchmark", name, sorted(known), "a .toml file may be given, too")
        place = next(p for p in places if (p / f"{name}.toml").is_file())
        found = [place / f"{name}.toml", *sorted(place.glob(f"{name}-*.toml"))]
    read_: list[Suite] = []
    mistakes: list[str] = []
    for file in found:
        try:
            suite, wrong = read(file, own=name.endswith(".toml"), code=code)
        except PotstillError:
            raise
        except (OSError, ValueError) as error:
            raise PotstillError(f"{file} cannot be read ({error})") from error
        mistakes += wrong
        mistakes += [f"{file.name}: a row for {row.cell}, as in {other.name}.toml" for other in read_ if other.table == suite.table
                     for row in suite.rows if row.cell in {r.cell for r in other.rows}]  # fmt: skip
        read_.append(suite)
    if mistakes:
        raise PotstillError(f"{name}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}", *mistakes)
    return read_


def read(file: Path, own: bool = True, code: Sequence[str] = ()) -> tuple[Suite, list[str]]:
    """A file's suite, and what is wrong with it: one line each, rows counted from 1.

    Args:
        file: The file.
        own: Whether it is called by its path and not by a name.
        code: As for `suites`.

    Raises:
        PotstillError: Code from outside that is not in `code`.
    """
    plain = read_toml(file)
    mistakes: list[str] = []

    def wrong(line: str) -> None:
        mistakes.append(f"{file.name}: {line}")

    for key in sorted(set(plain) - {"title", "table", "experts", "row"}):
        wrong(f"no field '{key}'; title, table, [experts.NAME] and [[row]] are known")
    table, title, given = plain.get("table"), plain.get("title", ""), plain.get("row", [])
    recorded = plain.get("experts", {})
    if table not in TABLES:
        wrong(f"table is {table!r}; one of {', '.join(TABLES)} is needed")
    if not isinstance(title, str):
        wrong("title is no text")
    if not isinstance(given, list) or not given:
        wrong("no [[row]]")
        given = []
    experts: dict[str, Recording] = {}
    if not isinstance(recorded, Mapping):
        wrong("experts are no tables [experts.NAME]")
        recorded = {}
    for name, entry in recorded.items():
        made, lines = make(Recording, entry)
        for line in lines:
            wrong(f"experts '{name}': {line}")
        if made is not None:
            experts[name] = made
    made_rows: list[tuple[str, Row | CostRow]] = []
    for i, entry in enumerate(given):
        at = f"row {i + 1}" + (f" ({entry['method']})" if isinstance(entry, Mapping) and "method" in entry else "")
        row, lines = make(CostRow if table == "cost" else Row, entry)
        for line in lines:
            wrong(f"{at}: {line}")
        if row is not None:
            made_rows.append((at, row))
    _check_code(file, [*experts.values(), *(row for _, row in made_rows)], code)
    rows: list[Row | CostRow] = []
    cells: set[str] = set()
    for at, row in made_rows:
        for line in faults(row, experts):
            wrong(f"{at}: {line}")
        if row.cell in cells:
            wrong(f"{at}: a second row for {row.cell}")
        cells.add(row.cell)
        rows.append(row)
    called = (file.name if file.is_absolute() else file.as_posix()) if own else file.stem
    return Suite(file.stem, str(title), str(table), tuple(rows), experts, called, code=tuple(code)), mistakes


def _is_module(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _check_code(file: Path, entries: Sequence[Row | CostRow | Recording], code: Sequence[str]) -> None:
    """Refuse code from outside that a file and not the user asks for, before anything of it is imported.

    Raises:
        PotstillError: A `package.module:name` of a module that the user has not named.
    """
    found: list[str] = []
    for entry in entries:
        found += [entry.network] if isinstance(entry, Recording) else [entry.method, entry.network]
        found += [] if isinstance(entry, Recording) else list(_texts(entry.settings))
        found += list(entry.networks) if isinstance(entry, Row) else []
    strange = [name for name in dict.fromkeys(found) if ":" in name and name.partition(":")[0] not in code]
    if not strange:
        return
    if wrong := [name for name in strange if not _is_module(name.partition(":")[0])]:
        raise PotstillError(f"{file.name}: {wrong[0][:80]!r} is no name; package.module:name is needed")
    modules = list(dict.fromkeys(name.partition(":")[0] for name in strange))
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    raise PotstillError(
        f"{file.name} asks for {strange[0][:80]!r}{more}, which is code from outside and is not run because a file says so; "
        f"if you trust it: --code {','.join([*code, *modules])[:400]}"
    )


def make(cls: type, plain: Any) -> tuple[Any, list[str]]:
    """A dataclass from plain values, and every mistake in them; `None` where there are any."""
    if not isinstance(plain, Mapping):
        return None, [f"is {plain!r}; a table of fields is needed"]
    known, values, lines = {f.name: f for f in fields(cls)}, {}, []
    for name, value in plain.items():
        if name not in known:
            lines.append(str(unknown("field", name, known)))
        elif name == "published":
            values[name], wrong = make(Published, value)
            lines += [f"published: {line}" for line in wrong]
        else:
            values[name] = _typed(value, str(known[name].type))
            if values[name] is None:
                lines.append(f"{name} is {value!r}; {known[name].type} is needed")
    for name, f in known.items():
        if f.default is f.default_factory is MISSING and name not in plain:
            lines.append(f"{name} is missing")
    return (None if lines else cls(**values)), lines


def _typed(value: Any, kind: str) -> Any:
    """A value as a field's type wants it; `None` where it does not fit."""
    if isinstance(value, bool):
        return None
    if kind.startswith("tuple"):
        inner = int if "int" in kind else str
        fits = isinstance(value, list) and value and all(type(v) is inner for v in value)
        return tuple(value) if fits else None
    if kind.startswith("Mapping"):
        return dict(value) if isinstance(value, Mapping) else None
    if kind == "float":
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    kinds = {"int": (int,), "str": (str,), "int | str": (int, str)}[kind]
    return value if isinstance(value, kinds) else None


def faults(row: Row | CostRow, experts: Mapping[str, Recording]) -> list[str]:
    """What is wrong with a row although each field is of its type."""
    from .foreign import is_foreign, located, stated_numbers
    from .methods import METHODS, PRESETS
    from .recipe import change, find
    from .training import PROTOCOLS

    lines: list[str] = []

    def check(good: bool, line: str) -> None:
        if not good:
            lines.append(line)

    def among(kind: str, name: str, allowed: Sequence[str]) -> None:
        check(name in allowed, "" if name in allowed else str(unknown(kind, name, allowed)))

    check(bool(_plain(row.data)), "data is empty")
    for part in (row.method, row.data, row.network, *(() if isinstance(row, CostRow) else row.networks)):
        check(part.isprintable(), f"{part!r} is no name: it has characters that cannot be printed")
    check(row.ipc >= 1, f"ipc {row.ipc} is below 1")
    check(row.repeats >= 1, f"repeats {row.repeats} is below 1")
    among("preset", row.preset, PRESETS)
    named = isinstance(row, Row) and (row.method == WHOLE or bool(row.set))
    if not named and ":" not in row.method:
        among("method", row.method, [*METHODS, WHOLE] if isinstance(row, Row) else list(METHODS))
    if isinstance(row, CostRow):
        check(row.form in ("plain", "saving"), f"form is {row.form!r}; plain or saving is needed")
        check(row.batch == "full" or (isinstance(row.batch, int) and row.batch > 0), f"batch is {row.batch!r}; a number of samples or full is needed")  # fmt: skip
        check(row.limit_seconds > 0, "limit_seconds is not above 0")
    else:
        check(re.fullmatch(r"[\w.-]*", row.name) is not None, f"name {row.name!r} is more than letters, digits, . - _")
        among("protocol", row.protocol, list(PROTOCOLS))
        check(
            len(set(row.seeds)) == len(row.seeds) and min(row.seeds) >= 0, "seeds are not different numbers from 0 up"
        )
        for name in row.baselines:
            among("baseline", name, ("random", "k-means", "random-soft"))
        for name in row.variants:
            among("variant", name, ("hard", "plain"))
        if row.set:
            own = [
                n
                for n in ("minutes", "steps", "preset", "network", "experts", "settings")
                if getattr(row, n) != Row.__dataclass_fields__[n].default and getattr(row, n)
            ]
            check(not own, f"{', '.join(own)}: a set from a file is made already")
            check(
                len(row.seeds) == 1, f"{len(row.seeds)} seeds: a file holds one set, or one for each row (`#0`, `#1`)"
            )
            check(
                re.fullmatch(r"\w[\w.-]*", row.method) is not None and row.method not in (*METHODS, WHOLE),
                f"method {row.method!r}: what the set is called in tables is needed, and no method's name",
            )
            check(located(row.set)[0].exists(), f"no set at {row.set}")
        stranger = bool(row.set) and is_foreign(row.set)
        check(stranger or not row.normalisation, "normalisation is for a set from another project's file")
        try:
            stated_numbers(row.normalisation or "unit")
        except PotstillError as error:
            lines.append(str(error).removeprefix("--"))
        if row.experts and not row.set:
            among("recording [experts]", row.experts, list(experts))
        check(not (row.minutes and row.steps), "minutes and steps exclude each other")
        check(row.minutes >= 0 and row.steps >= 0, "minutes or steps below 0")
        if row.published is not None:
            among("mark", row.published.mark, MARKS)
            check(0 < row.published.accuracy < 1, f"published: accuracy {row.published.accuracy} is no fraction")
    if not lines and not named:
        try:
            recipe = find(row.method, row.preset, row.ipc)
            changed = change(recipe, row.settings) if row.settings else recipe
            if isinstance(row, Row) and changed.objective is not None:
                check(bool(row.minutes or row.steps), "minutes or steps are needed: the method takes steps")
            check(not isinstance(row, CostRow) or changed.objective is not None, "a coreset has no step to time")
        except PotstillError as error:
            lines.append(str(error))
    return lines
