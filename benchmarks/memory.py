"""Estimated against measured memory of every method under `--memory`, each in a fresh process: a Markdown table.

The measure is resident anonymous memory (RssAnon), read from /proc/PID/status every few milliseconds by this process, over the
whole of `potstill distill`: start, trials, steps, looks, evaluation and baselines. Data are random numbers.

python benchmarks/memory.py [--only GLOB] [--json FILE]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {"28x28": (28, 28), "32x32x3": (3, 32, 32)}
CASES = (  # method, shape, network, images per class, memory, further options
    ("dm", "28x28", "convnet-w32", 1, "8GiB", ()),
    ("dm", "32x32x3", "convnet-w64", 10, "8GiB", ()),
    ("dm", "32x32x3", "convnet-w64", 10, "600MiB", ()),
    ("dm", "32x32x3", "convnet", 10, "1GiB", ()),
    ("dc", "28x28", "convnet-w32", 1, "8GiB", ()),
    ("dc", "32x32x3", "convnet-w64", 10, "8GiB", ()),
    ("dc", "32x32x3", "convnet-w64", 10, "600MiB", ()),
    ("dsa", "28x28", "convnet-w32", 10, "8GiB", ()),
    ("dsa", "32x32x3", "convnet-w64", 1, "600MiB", ()),
    ("dd", "28x28", "convnet-w32", 1, "8GiB", ()),
    ("dd", "32x32x3", "convnet-w64", 10, "8GiB", ()),
    ("dd", "32x32x3", "convnet-w64", 10, "700MiB", ()),
    ("kip", "28x28", "mlp", 1, "8GiB", ()),
    ("kip", "32x32x3", "mlp", 10, "8GiB", ()),
    ("kip", "32x32x3", "mlp", 50, "900MiB", ()),
    ("frepo", "28x28", "widenet-w32", 1, "8GiB", ()),
    ("frepo", "32x32x3", "widenet-w32", 10, "8GiB", ()),
    ("frepo", "32x32x3", "widenet-w32", 10, "800MiB", ()),
    ("mtt", "28x28", "convnet-w32", 1, "8GiB", ()),
    ("mtt", "32x32x3", "convnet-w64", 10, "8GiB", ()),
    ("mtt", "32x32x3", "convnet-w64", 10, "700MiB", ()),
)


def anonymous(pid: int) -> int:
    """Resident anonymous bytes of a process; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def watched(command: list[str], every: float = 0.003) -> tuple[int, int, str]:
    """Exit code, the most resident anonymous bytes, and what a command prints."""
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        peak = 0
        while child.poll() is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(every)
        out.seek(0)
        return child.returncode, peak, out.read()


def data(folder: Path, shape: str) -> Path:
    """Ten classes of random bytes: 3,000 training samples and 600 test samples."""
    file = folder / f"{shape}.npz"
    if not file.exists():
        rng = np.random.default_rng(0)
        parts = {}
        for part, count in (("train", 3000), ("test", 600)):
            parts[f"x_{part}"] = rng.integers(0, 256, (count, *SHAPES[shape]), dtype=np.uint8)
            parts[f"y_{part}"] = np.arange(count) % 10
        np.savez(file, **parts)
    return file


def experts(folder: Path, file: Path, network: str) -> Path:
    """Two experts of four epochs."""
    out = folder / f"{file.stem}-{network}"
    if not out.exists():
        command = [sys.executable, "-m", "potstill", "experts", str(file), "--count", "2", "--epochs", "6", "--network"]
        subprocess.run([*command, network, "--compile", "off", "--out", str(out)], check=True, capture_output=True)
    return out


def measure(folder: Path, case: tuple[Any, ...], number: int) -> dict[str, Any]:
    """One case in a fresh process."""
    method, shape, network, ipc, memory, options = case
    file = data(folder, shape)
    command = [sys.executable, "-m", "potstill", "distill", str(file), "--method", method, "--ipc", str(ipc)]
    command += ["--preset", "small", "--steps", "3", "--set", "looks=1", "--memory", memory, "--repeats", "1", *options]
    command += ["--out", str(folder / f"run{number}"), "--network", network]
    if method == "kip":
        command += ["--set", "student=kernel"]
    if method == "mtt":
        command += ["--experts", str(experts(folder, file, network))]
    begin = time.perf_counter()
    code, peak, said = watched(command)
    if code:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    record = json.loads((folder / f"run{number}" / "record.json").read_text())
    known = record["memory"]
    return {
        "method": method, "shape": shape, "network": network, "ipc": ipc, "memory": memory, **known, "peak_bytes": peak,
        "seconds": round(time.perf_counter() - begin, 1), "trial_seconds": record["cost"]["phases"]["memory"],
    }  # fmt: skip


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    off = found["estimated_bytes"] / found["peak_bytes"] - 1
    cells = [found[k] for k in ("method", "shape", "network", "ipc", "memory", "rows")]
    sizes = [f"{found[k] / 2**20:,.0f}" for k in ("estimated_bytes", "peak_bytes")]
    return "| " + " | ".join(map(str, [*cells, *sizes, f"{100 * off:+.0f} %"])) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="of METHOD/SHAPE/NETWORK/IPC/MEMORY")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    print("| method | inputs | network | images per class | `--memory` | samples in a pass | estimated MiB | measured MiB | off |")
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
    main()
