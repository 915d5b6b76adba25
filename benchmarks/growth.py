"""How a step's seconds and memory grow with images per class, classes, side and training samples.

python benchmarks/growth.py [--threads 2] [--minutes 8] [--limit 60] [--compile off] [--only dm/side] [--again] [--plot docs/growth.svg]

Each cell is a process of its own, on random images with a narrow network, measured as `potstill speed` measures. Cells that
are in the file already are skipped. Training samples are blank images in memory that the system has not handed out yet: only
what a step reads counts, as with a file that is mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables import AXES, MIB, grown, growth_table

from potstill.compiling import keep_memory
from potstill.costs import DONE, FAILED, MEMORY, TIME, measure, out_of_memory
from potstill.data import Classification, Data, Split
from potstill.records import read_json, software, write_json
from potstill.rows import CostRow
from potstill.transforms import Standardise

FORMAT = 1
BASE = {"ipc": 1, "classes": 10, "side": 32, "samples": 10_000, "real": 32, "uniform": 320, "network": "convnet-w32"}
FEW = {"ipc": (1, 10, 100), "classes": (2, 10, 50), "side": (16, 32, 64), "samples": (1_000, 1_000_000)}
CELLS = {
    "dm": {"ipc": (1, 10, 30, 100), "classes": (2, 10, 50, 200), "side": (8, 16, 32, 64, 128), "samples": (1_000, 10_000, 100_000, 1_000_000)},
    **dict.fromkeys(("dc", "dsa", "frepo", "kip", "dd", "mtt"), FEW),
}  # fmt: skip
REAL = {
    **dict.fromkeys(("dm", "dc", "dsa"), "real"),
    **dict.fromkeys(("frepo", "kip", "dd"), "uniform"),
}  # of each class, or in all; MTT reads none
TOY = {"ipc": (1, 2), "classes": (2, 3), "side": (8, 16), "samples": (1_000, 10_000)}


def blank(classes: int, side: int, samples: int) -> Data:
    """Images of nothing, standardised by numbers that are as good as any."""
    labels = torch.arange(samples) % classes
    train = Split(torch.zeros(samples, 3, side, side, dtype=torch.uint8), labels)
    names = tuple(map(str, range(classes)))
    transform = Standardise((0.5,) * 3, (0.25,) * 3)
    return Data("blank", train, train[:classes], names, 255.0, transform, Classification(classes), "none", train[:0])


def one(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell, in this process."""
    torch.set_num_threads(cell["threads"])
    real = REAL.get(cell["method"])
    settings: dict[str, Any] = {"objective.real": cell[real]} if real else {}
    if cell["method"] in ("dc", "dsa"):  # the training of the network between two steps is left out
        settings["source.epochs"] = 0
    row = CostRow(cell["method"], "blank", cell["ipc"], network=cell["network"], preset="small", repeats=cell["repeats"], settings=settings)  # fmt: skip
    small = replace(
        row, ipc=1, network="convnet-w4", repeats=1, settings={**settings, **({"objective.real": 1} if real else {})}
    )
    measure(small, blank(2, 8, 100), False, "fp32")  # modules that a first step loads are no part of a cell's memory
    keep_memory()
    try:
        data = blank(cell["classes"], cell["side"], cell["samples"])
        return measure(row, data, cell["compile"], "fp32", keep=lambda found: print(json.dumps(found), flush=True))
    except (MemoryError, RuntimeError) as error:
        return {"status": MEMORY if out_of_memory(error) else FAILED, "reason": str(error)[:300]}


def alone(cell: dict[str, Any], limit: float) -> dict[str, Any]:
    """As `one`, in a fresh process with a limit in seconds; the times of a step alone where counting takes longer."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    env = {**os.environ, "OMP_NUM_THREADS": str(cell["threads"])}
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, env=env)
        said, failed = done.stdout, {"status": FAILED, "reason": f"exit code {done.returncode}"}
    except subprocess.TimeoutExpired as late:
        raw = late.stdout or b""
        said = raw.decode() if isinstance(raw, bytes) else raw
        failed = {"status": TIME, "reason": f"longer than {limit:g} s"}
    lines = said.strip().splitlines()
    return dict(json.loads(lines[-1])) if lines else failed


def plot(record: dict[str, Any], file: Path) -> None:
    """Seconds above, memory below, an axis a column, both logarithmic; a thin line for linear growth."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(AXES), figsize=(11, 4.6), sharex="col", sharey="row", squeeze=False)
    for column, (axis, words) in enumerate(AXES.items()):
        for method in CELLS:
            cells = sorted((c for c in record["cells"].values() if (c["method"], c["axis"], c["status"]) == (method, axis, DONE)), key=lambda c: c["at"])  # fmt: skip
            x = [c["at"] for c in cells]
            if not x:
                continue
            for line, values in enumerate(([c["step_seconds"] for c in cells], [grown(c) / MIB for c in cells])):
                axes[line, column].loglog(x, values, marker="o", markersize=3, label=method)
                if method == next(iter(CELLS)) and axis != "samples":
                    power = 2 if axis == "side" else 1
                    straight = [values[-1] * (a / x[-1]) ** power for a in x]
                    axes[line, column].loglog(x, straight, color="0.7", linewidth=0.8, label="linear", zorder=0)
        ticks = sorted({c["at"] for c in record["cells"].values() if c["axis"] == axis})
        axes[1, column].set_xticks(ticks, [f"{t / 1e6:g}M" if t >= 1e6 else f"{t / 1e3:g}k" if t >= 1e3 else str(t) for t in ticks])  # fmt: skip
        axes[1, column].minorticks_off()
        axes[1, column].set_xlabel(words)
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("MiB")
    shown = sorted(zip(*axes[0, 0].get_legend_handles_labels(), strict=True), key=lambda pair: pair[1] == "linear")
    figure.tight_layout(rect=(0, 0, 0.91, 1))
    figure.legend(
        *zip(*shown, strict=True), frameon=False, fontsize=8, loc="center right"
    )  # beside the curves, not on them
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    """Measure what is not there yet; print the table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no cell after so many")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a cell")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", default="off", choices=("on", "off"))
    parser.add_argument("--only", default="", help="method or method/axis, with commas")
    parser.add_argument("--again", action="store_true", help="measure also what is in the file")
    parser.add_argument("--scale", default="full", choices=("full", "toy"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(one(json.loads(args.cell))))
        return
    toy, compiled, root = args.scale == "toy", args.compile == "on", Path(__file__).parent
    if toy and not (args.json and args.plot):
        parser.error("--json and --plot are missing: toys have no place among the results")
    file, picture = args.json or root / "results" / "growth.json", args.plot or root.parent / "docs" / "growth.svg"
    base = BASE | ({"side": 8, "samples": 1_000, "real": 4, "uniform": 8, "network": "convnet-w4"} if toy else {})
    fresh = {"format": FORMAT, "kind": "growth", "scale": args.scale, "compile": compiled, "base": base, "cells": {}}
    torch.set_num_threads(args.threads)  # for the record
    record = read_json(file) if file.exists() else {**fresh, "machine": software("cpu")}
    for name in ("scale", "compile", "base"):
        if record[name] != fresh[name]:
            parser.error(f"{file} has cells with another {name}: {record[name]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    begin, known = time.monotonic(), dict[str, dict[str, Any]]()
    for method, axes in CELLS.items():
        for axis, points in axes.items():
            if args.only and not {method, f"{method}/{axis}"} & set(args.only.split(",")):
                continue
            for at in TOY[axis] if toy else points:
                name = f"{method}/{axis}/{at}"
                old = record["cells"].get(name)
                if old and not args.again:
                    continue
                if time.monotonic() - begin > 60 * args.minutes:
                    print(f"{name}: left for another time", flush=True)
                    continue
                cell = {**base, "method": method, axis: at, "repeats": args.repeats, "threads": args.threads, "compile": compiled}  # fmt: skip
                same = json.dumps(cell, sort_keys=True)  # the base is a cell of every axis
                known[same] = known.get(same) or alone(cell, args.limit)
                found = known[same]
                record["cells"][name] = {"method": method, "axis": axis, "at": at, "load": round(os.getloadavg()[0], 2), **found}  # fmt: skip
                write_json(file, record)
                said = f"{found['step_seconds']:.3f} s, {grown(found) / MIB:.0f} MiB" if found["status"] == DONE else found["status"]  # fmt: skip
                print(f"{name}: {said} ({time.monotonic() - begin:.0f} s so far)", flush=True)
    print("\n".join(growth_table(record)))
    plot(record, picture)


if __name__ == "__main__":
    main()
