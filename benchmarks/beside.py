"""Steps, evaluations and passes side by side: ours against the official code or a plain loop, in one run on one machine.

python benchmarks/beside.py --official PATH [--only dm,dc] [--threads 2] [--repeats 5] [--minutes M] [--again] [--scale toy]
python benchmarks/beside.py --prepare       # compiles only, into the cache on disk: to be done before the machine is quiet

PATH is a checkout of the official code (`official.py` says which). Both sides of a row are processes of their own, which
warm up one after the other and then work in turns. A row that is in the file already is skipped; the file is written after
each row, so that a run may be stopped and taken up again. At the end the tables of docs/performance.md can be filled by
`python benchmarks/tables.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kept import add_arguments, opened
from official import COMMIT, REPOSITORY, commit_of
from tables import beside_table

from potstill.records import software, write_json

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        title: What works.
        other: The side against ours: `official`, `plain` or none.
        bars: What each measured time is to be won by, and what is aimed at.
        usual: Whether it belongs to a run that names no rows.
        limit_seconds: For one round of one side; ten times as much for warming up.
    """

    title: str
    other: str
    bars: dict[str, tuple[float, float]] = field(default_factory=dict)
    usual: bool = True
    limit_seconds: float = 120.0


ROWS = {
    "dm": Row("DM step", "official", {"step": (4.0, 5.0)}),
    "dc": Row("DC step, the network's training apart", "official", {"step": (2.5, 4.0)}),
    "dsa": Row("DSA step, the network's training apart", "official", {"step": (2.5, 4.0)}),
    "frepo": Row("FRePo step", "plain", {"step": (2.5, 4.0)}),
    "evaluation-10": Row("evaluation, protocol dsa, 10 images, a network", "official", {"epoch": (6.0, 10.0)}),
    "evaluation-100": Row("evaluation, protocol dsa, 100 images, a network", "official", {"epoch": (2.0, 3.0)}),
    "feature-pass": Row("features of 256 images", "", {"share": (0.55, 0.7)}),
    "whole-epoch": Row("ten steps on all of Fashion-MNIST", "plain", {"steps": (2.0, 4.0)}),
    "dd": Row("DD step, T = 20", "plain", {"step": (1.2, 1.8), "memory": (4.0, 4.0)}, limit_seconds=300.0),
    "mtt": Row("MTT step, T = 20", "plain", {"step": (1.2, 1.8), "memory": (4.0, 4.0)}, limit_seconds=300.0),
    "whole-run": Row("all of Fashion-MNIST by protocol whole, once", "", {"accuracy": (0.93, 0.93)}, False, 7200.0),
}
ONCE = ("whole-run",)


class Process:
    """A side at work.

    Args:
        row: Its row.
        side: `ours` or the row's other.
        args: Of the command line.

    Raises:
        RuntimeError: It ended or was late.
    """

    def __init__(self, row: str, side: str, args: argparse.Namespace) -> None:
        self.name, self.limit = f"{row} {side}", ROWS[row].limit_seconds
        command = [sys.executable, str(HERE / "sides.py"), row, side, "--scale", args.scale, "--threads", str(args.threads)]  # fmt: skip
        command += ["--official", str(args.official)] if args.official else []
        command += ["--eager"] if args.eager else []
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.warm = self._answer(10 * self.limit)["warm_seconds"]

    def _answer(self, limit: float) -> dict[str, Any]:
        late = threading.Timer(limit, self.process.kill)
        late.start()
        assert self.process.stdout is not None
        try:
            line = self.process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"{self.name} ended with code {code}" + (" (out of memory or time)" if code == -9 else ""))  # fmt: skip
        return dict(json.loads(line))

    def _say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def go(self) -> dict[str, float]:
        """Seconds of one round."""
        self._say("go")
        return dict(self._answer(self.limit)["seconds"])

    def end(self) -> dict[str, Any]:
        """What there is to say at the end."""
        self._say("end")
        found = self._answer(60.0)
        self.process.wait()
        return {**found.pop("facts"), "warm_seconds": self.warm, **found}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A row's record: seconds of every round, what the sides are, the load of the machine before and after."""
    row, load = ROWS[name], os.getloadavg()[0]
    sides: dict[str, Process] = {}
    times: dict[str, dict[str, list[float]]] = {}
    try:
        for side in ["ours", *([row.other] if row.other else [])]:
            sides[side], times[side] = Process(name, side, args), {}
            print(f"{name}: {side} warm after {sides[side].warm:.1f} s", flush=True)
        for i in range(1 if name in ONCE else args.repeats):
            for side, process in sides.items():
                took = process.go()
                for what, value in took.items():
                    times[side].setdefault(what, []).append(round(value, 6))
                said = ", ".join(f"{what} {value:.4g} s" for what, value in took.items())
                print(f"{name}: {i + 1}/{args.repeats} {side}: {said}", flush=True)
        ends = {side: process.end() for side, process in sides.items()}
    finally:
        for process in sides.values():
            process.process.kill()
    found: dict[str, Any] = {"title": row.title, "other": row.other, "bars": {k: list(v) for k, v in row.bars.items()}}
    found["official"] = f"{REPOSITORY} {COMMIT}" if row.other == "official" else None
    found["load"] = [round(load, 2), round(os.getloadavg()[0], 2)]
    found["sides"] = {
        side: {**ends[side], "seconds": times[side], "median": {k: median(v) for k, v in times[side].items()}}
        for side in sides
    }
    return found


def prepare(names: Sequence[str], args: argparse.Namespace) -> None:
    """Compile what is ours in each row."""
    for name in names:
        if name in ONCE:
            continue
        process = Process(name, "ours", args)
        process.end()
        print(f"{name}: compiled and warm after {process.warm:.1f} s", flush=True)


def main() -> None:
    """Measure what is asked for and not there yet; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help=f"a checkout of {REPOSITORY}")
    parser.add_argument("--only", default="", help="rows, with commas: " + ", ".join(ROWS))
    parser.add_argument("--again", action="store_true", help="measure also what is in the file")
    parser.add_argument("--prepare", action="store_true", help="compile only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after so many")
    parser.add_argument("--eager", action="store_true", help="compile nothing: for toys")
    add_arguments(parser, "beside")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)  # for the record; nothing is computed here
    names = args.only.split(",") if args.only else [n for n, row in ROWS.items() if row.usual]
    strange = [n for n in names if n not in ROWS]
    if strange:
        parser.error(f"no row '{strange[0]}'; there are: {', '.join(ROWS)}")
    toy = args.scale == "toy"
    if args.repeats < (1 if toy else 5):
        parser.error(f"--repeats {args.repeats} is below 5")
    if args.eager and not toy:
        parser.error("--eager is for --scale toy")
    if args.prepare:
        return prepare(names, args)
    if any(ROWS[n].other == "official" for n in names):
        if args.official is None:
            parser.error(f"--official is missing: a checkout of {REPOSITORY} at {COMMIT}")
        commit_of(args.official)
    file, record = opened(parser, args, "beside", "rows")
    begin, failed = time.monotonic(), []
    for name in names:
        if name in record["rows"] and not args.again:
            print(f"{name}: measured already", flush=True)
            continue
        if time.monotonic() - begin > 60 * args.minutes:
            print(f"{name}: left for another time", flush=True)
            continue
        try:
            found = measure(name, args)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        record["rows"][name] = {**found, "machine": software("cpu")}
        write_json(file, record)
    print("\n".join(beside_table(record)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
