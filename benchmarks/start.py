"""Seconds from the start of a process to the first step of a run, caches warm: interpreter, imports, data, network.

python benchmarks/start.py [--data fashion-mnist] [--method dm] [--repeats 5] [--threads 2] [--scale toy]

A run of one eager step without looks, each time in a fresh process; its first one fills the caches and is not counted. What is already
in the file is replaced.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

from kept import add_arguments, opened

from potstill.records import software, write_json

CHILD = """
import json, sys, time
began, data, method, out, threads = float(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
import torch
import potstill
torch.set_num_threads(threads)
imported = time.time()
class Begun(Exception):
    pass
def bar(*what):
    raise Begun
try:
    potstill.distill(data, method, steps=1, preset="small", settings={"looks": 0}, compile="off", evaluate=False, out=out, bar=bar)
except Begun:
    print(json.dumps({"import": imported - began, "data, network": time.time() - imported, "in all": time.time() - began}))
"""


def once(data: str, method: str, threads: int) -> dict[str, float]:
    """Seconds by part of one process."""
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "-c", CHILD, str(time.time()), data, method, f"{out}/run", str(threads)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise SystemExit(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the run ended before its first step"
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--method", default="dm")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    add_arguments(parser, "start")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} is below 1")
    file, record = opened(parser, args, "start", "runs")
    once(args.data, args.method, args.threads)
    rounds = [once(args.data, args.method, args.threads) for _ in range(args.repeats)]
    found: dict[str, Any] = {k: [round(r[k], 3) for r in rounds] for k in rounds[0]}
    machine = software("cpu")
    machine["machine"]["threads"] = args.threads
    record["runs"][f"{args.data}/{args.method}"] = {"seconds": found, "software": machine}
    write_json(file, record)
    print(", ".join(f"{k}: {median(v):.2f} s" for k, v in found.items()))


if __name__ == "__main__":
    main()
