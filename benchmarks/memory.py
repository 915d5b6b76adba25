"""Estimated against measured memory of every method under `--memory`, each in a process of its own: a Markdown table.

The measure is resident anonymous memory (RssAnon), read from /proc/PID/status every few milliseconds by this process, over the
whole of `potstill distill`: start, trials, steps, looks, evaluation and baselines. Data are random numbers, and networks are
trained for two passes at looks and at the end: their memory does not depend on how long. The processes are forked from one that
has imported the library and done nothing else, which spares them the import.

python benchmarks/memory.py [--only GLOB] [--json FILE]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill import distilling, evaluation, still, teacher, training  # noqa: F401
from potstill.cli import main

SHAPES = {"28x28": (28, 28), "32x32x3": (3, 32, 32)}
CASES = (  # method, shape, network, images per class, memory, whether the set is judged at the end
    ("dm", "28x28", "convnet-w32", 1, "8GiB", False),
    ("dm", "32x32x3", "convnet-w64", 10, "8GiB", False),
    ("dm", "32x32x3", "convnet-w64", 10, "500MiB", False),
    ("dc", "28x28", "convnet-w32", 1, "8GiB", False),
    ("dc", "32x32x3", "convnet-w64", 10, "500MiB", False),
    ("dsa", "32x32x3", "convnet-w64", 1, "8GiB", False),
    ("dd", "28x28", "convnet-w32", 5, "8GiB", False),
    ("dd", "32x32x3", "convnet-w64", 5, "600MiB", False),
    ("kip", "28x28", "mlp", 10, "8GiB", True),
    ("kip", "32x32x3", "mlp", 50, "750MiB", False),
    ("frepo", "28x28", "widenet-w32", 1, "8GiB", False),
    ("frepo", "32x32x3", "widenet-w32", 10, "700MiB", False),
    ("mtt", "28x28", "convnet-w32", 1, "8GiB", False),
    ("mtt", "32x32x3", "convnet-w32", 5, "500MiB", False),
    ("dm", "28x28", "convnet-w32", 10, "8GiB", True),
)


def anonymous(pid: int) -> int:
    """Resident anonymous bytes of a process; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def run(arguments: list[str], out: Path) -> None:
    """The command, with short training, in this process; what it prints goes into a file."""
    with out.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name, p in training.PROTOCOLS.items():
        training.PROTOCOLS[name] = replace(p, epochs=min(p.epochs, 2), steps=min(p.steps, 2), lengths=())
    still.LOOK = replace(still.LOOK, epochs=2)
    teacher.QUICK = replace(teacher.QUICK, epochs=2)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def watched(arguments: list[str], out: Path, every: float = 0.005) -> int:
    """The most resident anonymous bytes of a command in a process of its own."""
    child = multiprocessing.get_context("fork").Process(target=run, args=(arguments, out))
    child.start()
    peak = 0
    while child.is_alive():
        peak = max(peak, anonymous(child.pid or 0))
        time.sleep(every)
    if child.exitcode:
        raise SystemExit(f"potstill {' '.join(arguments)}\n{out.read_text()}")
    return peak


def data(folder: Path, shape: str) -> Path:
    """Ten classes of random bytes: 1,400 training samples and 500 test samples."""
    file = folder / f"{shape}.npz"
    if not file.exists():
        rng = np.random.default_rng(0)
        parts = {}
        for part, count in (("train", 1400), ("test", 500)):
            parts[f"x_{part}"] = rng.integers(0, 256, (count, *SHAPES[shape]), dtype=np.uint8)
            parts[f"y_{part}"] = np.arange(count) % 10
        np.savez(file, **parts)
    return file


def measure(folder: Path, case: tuple[Any, ...], number: int) -> dict[str, Any]:
    """One case."""
    method, shape, network, ipc, memory, judged = case
    file, out = data(folder, shape), folder / f"run{number}"
    options = [
        "--method",
        method,
        "--ipc",
        str(ipc),
        "--preset",
        "small",
        "--steps",
        "1",
        "--set",
        "looks=1",
        "--repeats",
        "1",
    ]
    options += ["--memory", memory, "--network", network, "--out", str(out)]
    options += [] if judged else ["--no-evaluate"]
    if method == "kip":
        options += ["--set", "student=kernel"]
    if method == "mtt":
        recorded = folder / f"{shape}-{network}"
        asked = ["--count", "1", "--epochs", "2", "--network", network, "--compile", "off"]
        watched(["experts", str(file), *asked, "--out", str(recorded)], folder / "said")
        options += ["--experts", str(recorded), "--set", "source.max_start=1"]
    begin = time.perf_counter()
    peak = watched(["distill", str(file), *options], folder / "said")
    record = json.loads((out / "record.json").read_text())
    seconds = {"seconds": round(time.perf_counter() - begin, 1), "trial_seconds": record["cost"]["phases"]["memory"]}
    named = {"method": method, "shape": shape, "network": network, "ipc": ipc, "memory": memory, "judged": judged}
    return {**record["memory"], **named, "peak_bytes": peak, **seconds}


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    off = found["estimated_bytes"] / found["peak_bytes"] - 1
    cells = [found[k] for k in ("method", "shape", "network", "ipc", "memory", "rows")]
    cells[0] += ", judged" if found["judged"] else ""
    sizes = [f"{found[k] / 2**20:,.0f}" for k in ("estimated_bytes", "peak_bytes")]
    return "| " + " | ".join(map(str, [*cells, *sizes, f"{100 * off:+.0f} %"])) + " |"


def table() -> None:
    """The cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="of METHOD/SHAPE/NETWORK/IPC/MEMORY")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    print(
        "| method | inputs | network | images per class | `--memory` | samples in a pass | estimated MiB | measured MiB | off |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["POTSTILL_CACHE"] = str(folder / "cache")
        for number, case in enumerate(CASES):
            if fnmatch.fnmatch("/".join(map(str, case[:5])), args.only):
                found.append(measure(folder, case, number))
                print(row(found[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    table()
