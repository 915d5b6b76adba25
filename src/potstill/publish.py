"""`potstill report`: a benchmark's page as HTML, Markdown or CSV, from records only; nothing here trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from .errors import PotstillError
from .gallery import cards
from .layout import Table, cost_tables, csv_text, fair_table, figures, performance_table, transfer_table
from .page import BASELINES, STATES, Cell, Entry, Group, Record, collect, cost, order, performance, transfer, wholes_of
from .places import IN_FILE, IN_ZOO
from .plots import COLOURS, MARKERS, Axis, Series, heat_map, line_plot
from .records import write_whole

SHAPES = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}


@dataclass(frozen=True)
class Chart:
    """A drawing, what it is of, and the methods in it; `beside` is the key of a table that it stands beside."""

    title: str
    caption: str
    svg: str
    data: str
    methods: tuple[str, ...] = ()
    wide: bool = False
    beside: str = ""


@dataclass(frozen=True)
class Part:
    """What a heading of the page holds: tables, what stands beside them, drawings."""

    table: tuple[Table, ...]
    fair: Table | None = None
    charts: tuple[Chart, ...] = ()
    title: str = ""

    @property
    def legend(self) -> set[str]:
        """Methods that the drawings tell apart by colour."""
        return {m for c in self.charts if not c.wide for m in c.methods}


@dataclass(frozen=True)
class Page:
    """Everything that is written, in the order in which it is read."""

    title: str
    facts: tuple[tuple[str, str], ...]
    performance: tuple[Part, ...]
    transfer: tuple[Part, ...]
    cost: tuple[Part, ...]
    findings: tuple[Record, ...]
    methods: tuple[str, ...]
    data: tuple[str, ...]
    styles: dict[str, tuple[int, int]]


def publish(folders: Sequence[Path], out: Path) -> str:
    """Write the page of one or several results folders.

    Args:
        folders: Folders that `potstill benchmark` has written. Where several have a cell, a later one counts if it is
            done.
        out: A file; its ending says what is written: `.html`, `.md` or `.csv`.

    Returns:
        A line that says what was written.

    Raises:
        PotstillError: Another ending, no place for the file, no records, or a record that cannot be read.
    """
    writers: dict[str, Callable[[list[Cell], list[Record]], str]] = {
        ".html": html_page, ".md": markdown_page, ".csv": lambda cells, _: csv_page(cells)
    }  # fmt: skip
    if out.suffix.lower() not in writers:
        raise PotstillError(f"--out {out} does not end in {', '.join(list(writers)[:-1])} or {list(writers)[-1]}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise PotstillError(f"--out {out} cannot be written; a file in a folder that is there is needed")
    cells, findings = collect(folders)
    write_whole(out, writers[out.suffix.lower()](cells, findings).encode())
    done = sum(c.record["status"] == "done" for c in cells)
    return f"{done} of {len(cells)} cells are done: {out}"


def csv_page(cells: Sequence[Cell]) -> str:
    """A line for each cell and network; see `layout.CSV`."""
    groups = performance(cells)
    return csv_text([*groups, *transfer(cells), *cost(cells)], wholes_of(groups))


def html_page(cells: Sequence[Cell], findings: Sequence[Record]) -> str:
    """One file with styles, script and pictures inside that loads nothing."""
    page = page_of(cells, findings, drawn=True)
    entries = [e for g in performance(cells) for e in g.entries if e.mean is not None]
    shown = cards(sorted(entries, key=lambda e: (e.data, e.ipc or 0, order(e.method))))
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    room = jinja2.Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    context = {"page": page, "cards": shown, "colours": COLOURS, "glyphs": [SHAPES[m] for m in MARKERS]}
    return room.get_template("benchmark.html.j2").render(context)


def markdown_page(cells: Sequence[Cell], findings: Sequence[Record]) -> str:
    """The tables as Markdown: best in bold, second in italics, notes below."""
    page = page_of(cells, findings, drawn=False)
    lines = [f"# {_plain(page.title)}", "", *(f"- {_plain(k)}: {_plain(v)}" for k, v in page.facts)]
    for heading, parts in (("Accuracy", page.performance), ("Transfer", page.transfer), ("Cost", page.cost)):
        lines += ["", f"## {heading}"] if parts else []
        for part in parts:
            lines += ["", f"### {_plain(part.title)}"] if part.title else []
            for table in (*part.table, *([part.fair] if part.fair else [])):
                lines += _markdown(table)
    if page.findings:
        lines += ["", "## Findings", "", "| claim | verdict | numbers | command |", "| --- | --- | --- | --- |"]
        for f in page.findings:
            numbers = ". ".join(str(f[k]) for k in ("numbers", "note") if f.get(k))
            cells_ = (_plain(str(c)) for c in (f.get("claim"), f.get("verdict") or "", numbers))
            lines.append(f"| {' | '.join(cells_)} | {_code(str(f.get('command') or ''))} |")
    return "\n".join(lines) + "\n"


def page_of(cells: Sequence[Cell], findings: Sequence[Record], drawn: bool) -> Page:
    """Everything that a page shows, with drawings or without."""
    groups, moved, spent = performance(cells), transfer(cells), cost(cells)
    methods = sorted({str(c.record["method"]) for c in cells}, key=order)
    styles = _styles(methods)
    wholes = wholes_of(groups)
    first = tuple(
        Part(
            (performance_table(g, f"p{i}"),),
            fair_table(g, wholes, f"f{i}"),
            tuple(accuracy_charts(g, f"p{i}", styles)) if drawn else (),
        )
        for i, g in enumerate(groups)
    )
    second = tuple(
        Part((transfer_table(g, f"t{i}"),), None, tuple(transfer_chart(g, f"t{i}")) if drawn else ())
        for i, g in enumerate(moved)
    )
    third = tuple(
        Part(
            tuple(cost_tables(g, f"c{i}")),
            None,
            tuple(cost_charts(g, f"c{i}", styles)) if drawn else (),
            " · ".join(w for w in (g.entries[0].data, g.network) if w),
        )
        for i, g in enumerate(spent)
    )
    data = tuple(sorted({str(c.record["data"]) for c in cells}))
    return Page(
        _title(methods, data), tuple(_facts(cells)), first, second, third, tuple(findings), tuple(methods), data, styles
    )


def accuracy_charts(group: Group, key: str, styles: dict[str, tuple[int, int]]) -> Iterable[Chart]:
    """Accuracy against images per class, bytes and minutes, for each data set; none without two places on its axis.

    Rows with a name of their own are no points of their method's line.
    """
    against: tuple[tuple[str, str, Callable[[Entry], float | None]], ...] = (
        ("images per class", "ipc", lambda e: e.ipc),
        ("kB stored", "bytes", lambda e: None if e.stored is None else e.stored / 1e3),
        ("minutes to make", "minutes", lambda e: e.minutes),
    )
    for i, data in enumerate(sorted({e.data for e in group.entries})):
        mine = [e for e in group.entries if e.data == data and e.competes and not e.form]
        for words, short, value in against:
            ticks = (
                tuple(sorted({float(e.ipc) for e in mine if e.ipc and e.mean is not None})) if short == "ipc" else ()
            )
            points = {
                m: tuple((float(x), 100 * e.mean, 100 * e.std) for e in mine if e.method == m and e.mean is not None and (x := value(e)))
                for m in styles
            }  # fmt: skip
            if svg := _drawn(
                f"{key}-{i}-{short}", points, styles, Axis(words, True, ticks), Axis("accuracy, %", False)
            ):
                kept = tuple(m for m, p in points.items() if p)
                yield Chart(f"{data}: accuracy against {words}", data, svg, data, kept)


def cost_charts(group: Group, key: str, styles: dict[str, tuple[int, int]]) -> Iterable[Chart]:
    """Seconds of a step and peak memory of the plain forms against images per class."""
    for value, words, scale in (("step_seconds", "seconds a step", 1.0), ("loss_seconds", "seconds of the loss", 1.0), ("peak_bytes", "peak memory, MB", 1e-6)):  # fmt: skip
        done = [e for e in group.entries if e.status == "done" and e.ipc and e.record.get(value)]
        mine = [e for e in done if e.record.get("form") != "saving"]
        ticks = tuple(sorted({float(e.ipc) for e in mine if e.ipc}))
        points = {
            m: tuple((float(e.ipc or 0), e.record[value] * scale, 0.0) for e in mine if e.method == m) for m in styles
        }
        if svg := _drawn(f"{key}-{value}", points, styles, Axis("images per class", True, ticks), Axis(words)):
            kept = tuple(m for m, p in points.items() if p)
            title = f"{words} against images per class"
            yield Chart(title, "", svg, group.entries[0].data, kept, beside=f"{key}-{value}")


def transfer_chart(group: Group, key: str) -> Iterable[Chart]:
    """A heat map of methods by networks, if anything was measured on two of them; without rows of a name of their own."""
    mine = [e for e in group.entries if e.mean is not None and not e.form]
    networks = list(dict.fromkeys(e.network for e in mine))
    methods = sorted({e.method for e in mine}, key=order)
    found = {(e.method, e.network): e.mean for e in mine}
    if len(networks) > 1:
        values = [[found.get((m, n)) for n in networks] for m in methods]
        yield Chart(
            "accuracy by network, %",
            "accuracy, %",
            heat_map(key, methods, networks, values),
            group.entries[0].data,
            tuple(methods),
            True,
        )


def _drawn(
    name: str,
    points: dict[str, tuple[tuple[float, float, float], ...]],
    styles: dict[str, tuple[int, int]],
    x: Axis,
    y: Axis,
) -> str:
    if len({p[0] for line in points.values() for p in line}) < 2:
        return ""
    return line_plot(name, [Series(line, *styles[m]) for m, line in points.items() if line], x, y)


def _styles(methods: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Colour and marker of each method, the same in all drawings of a page; baselines share a quiet colour."""
    quiet = [m for m in methods if m in BASELINES]
    loud = [m for m in methods if m not in BASELINES and m != "whole"]
    return {m: (-1, i) for i, m in enumerate(quiet)} | {m: (i % COLOURS, i) for i, m in enumerate(loud)}


def _title(methods: Sequence[str], data: Sequence[str]) -> str:
    count, simple = (len([m for m in methods if m != "whole" and (m in BASELINES) == b]) for b in (False, True))
    sets = data[0] if len(data) == 1 else f"{len(data)} data sets"
    parts = [f"{count} {'method' if count == 1 else 'methods'} of data set distillation"] if count else []
    parts += [f"{simple} {'selection' if simple == 1 else 'selections'} of real samples"] if simple else []
    return f"{' and '.join(parts) or 'Whole training sets'} on {sets}"


def _facts(cells: Sequence[Cell]) -> Iterable[tuple[str, str]]:
    """What was run, where and with what."""
    records = [c.record for c in cells]
    yield "suite", ", ".join(dict.fromkeys(r["suite"] for r in records))
    states = [r["status"] for r in records]
    rest = [f"{states.count(s)} {word}" for s, word in STATES.items() if s in states]
    done = states.count("done")
    yield "cells", ", ".join([f"{done} measured" if not rest else f"{done} of {len(states)} measured", *rest])
    seconds = sum(s for r in records if isinstance(s := r.get("seconds"), int | float))
    if seconds:
        took = f"{figures(seconds / 3600)} hours" if seconds >= 5400 else f"{figures(seconds / 60)} minutes"
        there = any(str(s.get("path")).startswith((IN_ZOO, IN_FILE)) for r in records for s in r.get("sets") or [])
        yield "time", took + (", without the making of sets that were there before" if there else "")
    software = [s for r in records if isinstance(s := r.get("software"), dict)]
    machines = [m for s in software if isinstance(m := s.get("machine"), dict)]
    named = dict.fromkeys(
        f"{m.get('processor')}, {m.get('threads')} {'thread' if m.get('threads') == 1 else 'threads'}, {m.get('device')}"
        for m in machines
    )
    if named:
        yield ("machine" if len(named) == 1 else "machines"), "; ".join(named)
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in s.items() if k != "machine") for s in software)
    if versions:
        yield "software", "; ".join(versions)


def _markdown(table: Table) -> list[str]:
    """A table as lines, its notes below."""
    heads = [table.first, *(" ".join(w for w in h if w) for h in table.heads)]
    lines = ["", f"**{_plain(table.title)}**", "", _plain(table.words), ""]
    lines += [f"| {' | '.join(map(_plain, heads))} |", f"| --- |{' ---: |' * len(table.heads)}"]
    for row in table.rows:
        boxes = [_plain(", ".join(w for w in (row.name, row.tag) if w))]
        for box in row.boxes:
            if box is None:
                boxes.append("–")
                continue
            text = {"best": "**{}**", "second": "*{}*"}.get(box.mark, "{}").format(_plain(box.text))
            text += "".join(f" [{n}]" for n in box.notes) + "".join(f", {_plain(s)}" for s in box.small)
            boxes.append(text + (f" (published {_plain(box.published)} [{box.source}])" if box.published else ""))
        lines.append(f"| {' | '.join(boxes)} |")
    return lines + [""] * bool(table.notes) + [f"{i}. {_plain(note)}" for i, note in enumerate(table.notes, 1)]


def _code(text: str) -> str:
    """A command in a cell of Markdown, as a shell takes it."""
    if not text or "`" in text or "<" in text:  # what could be read as something else stays words
        return _plain(text)
    return f"`{' '.join(text.split())}`".replace("|", "\\|")


def _plain(text: str) -> str:
    """Text that means nothing else in a cell of Markdown."""
    for sign, harmless in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, harmless)
    return " ".join(text.split())
