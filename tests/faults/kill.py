"""Kill -9 at random moments: every file reads whole after each, and what is gone on with ends as if nothing had been.

    python tests/faults/kill.py distill|experts|benchmark [--count 50] [--seed 0] [--method dm]

The command is the real one at toy size, in a process that is forked from one with everything imported, so that a start
costs nothing and the moments fall where there is work. A run is killed, resumed, and killed again with each new moment,
until it ends before its next one; then it is held against an undisturbed run, bit for bit, and another run begins.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process with threads cannot be forked

import argparse
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import sklearn.datasets
import sklearn.utils.validation
import torch
import torch._dynamo
import torch.utils.flop_counter
from PIL import Image
from safetensors.torch import load_file

import potstill
from potstill import benchmark, cli, experts, loop, outcome, report, still
from potstill.records import read_json
from potstill.sealed import read_sealed
from potstill.training import PROTOCOLS

torch.set_num_threads(1)

SUITE = """title = "toy"
table = "performance"
[experts.e]
data = "digits"
network = "mlp-w8"
count = 2
epochs = 3
batch = 512
[[row]]
method = "dm"
data = "digits"
ipc = 1
steps = 8
network = "mlp-w8"
networks = ["mlp-w8"]
protocol = "dc"
repeats = 2
baselines = ["random", "k-means"]
settings = { "objective.real" = 4 }
[[row]]
method = "mtt"
data = "digits"
ipc = 1
steps = 8
network = "mlp-w8"
experts = "e"
networks = ["mlp-w8"]
protocol = "mtt"
repeats = 2
settings = { "objective.steps" = 2, "source.max_start" = 1 }
[[row]]
method = "random"
data = "digits"
ipc = 2
networks = ["mlp-w8"]
protocol = "dsa"
repeats = 2
"""


POOLED = (
    "frepo",
    "dc",
    "dsa",
)  # networks that are trained on S and retired: a small pool of short lives, so that a run sees both


def command(what: str, room: Path, name: str, method: str) -> list[str]:
    """The command line; it is the same for the first start and the others, where the command allows it."""
    out, usual = ["--out", str(room / name)], ["--compile", "off"]
    if what == "distill":
        pool = ["--set", "source.size=2", "--set", "source.lifetime=5"] if method in POOLED else []
        return ["distill", "digits", "--method", method, "--network", "convnet-w8", "--steps", "24", "--preset", "small", "--set", "looks=3",
                "--set", "objective.real=8", *pool, "--no-evaluate", "--resume", *usual, *out]  # fmt: skip
    if what == "experts":
        return ["experts", "digits", "--network", "convnet-batch-w8", "--count", "3", "--epochs", "2", "--batch", "512", "--momentum",
                "0.9", "--resume", *usual, *out]  # fmt: skip
    (room / "toy.toml").write_text(SUITE)
    return ["benchmark", str(room / "toy.toml"), "--no-zoo", *usual, *out]


def shorten() -> None:
    """Save after each step; look and judge after few epochs: what is tested is what lies on the disk."""
    loop.SAVE_EVERY = experts.SAVE_EVERY = experts.SHARE = 0
    still.LOOK = replace(still.LOOK, epochs=3)
    for name in ("dc", "dsa", "mtt"):
        PROTOCOLS[name] = replace(PROTOCOLS[name], epochs=3, steps=0)


def start(arguments: list[str], log: Path) -> int:
    """A process of its own that runs the command; its number."""
    if (pid := os.fork()) == 0:
        code = 70
        try:
            with log.open("ab", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            shorten()
            code = cli.main(arguments)
        finally:
            os._exit(code)
    return pid


def finish(arguments: list[str], log: Path) -> float:
    """Run the command to its end; seconds."""
    begin = time.monotonic()
    _, status = os.waitpid(start(arguments, log), 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)}: status {status}\n{log.read_text()[-2000:]}")
    return time.monotonic() - begin


def killed(arguments: list[str], log: Path, after: float) -> bool:
    """Run the command and kill it after so many seconds; whether it was still running then."""
    pid, until = start(arguments, log), time.monotonic() + after
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"{' '.join(arguments)}: status {status}\n{log.read_text()[-2000:]}")
            return False
        time.sleep(min(0.002, max(0.0, until - time.monotonic())))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def read_whole(file: Path) -> None:
    """Read a file from end to end as what it is; raises where it is not whole."""
    if file.suffix == ".json":
        read_json(file)
    elif file.name.startswith("checkpoint"):
        read_sealed(file, "checkpoint")
    elif file.name == "set.safetensors":
        potstill.load(file)
    elif file.suffix == ".safetensors":
        load_file(file)
    elif file.suffix == ".toml":
        tomllib.loads(file.read_text())
    elif file.suffix == ".png":
        Image.open(io.BytesIO(file.read_bytes())).load()
    elif file.suffix == ".html":
        if not file.read_text().rstrip().endswith("</html>"):
            raise ValueError("it has no end")
    elif file.suffix != ".lock":
        raise ValueError("no such file is written")


def contents(what: str, folder: Path) -> dict[str, object]:
    """All that must be the same whatever befell the process: everything but times and memory."""
    found: dict[str, object] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        name = str(file.relative_to(folder))
        if file.name.startswith("checkpoint"):
            continue  # how far it was saved before the last one depends on where it was stopped
        if file.suffix == ".json":
            record = read_json(file)
            if what == "experts":
                found[name] = record
            elif "results" in record and "curve" in record:
                found[name] = [record["curve"], record["looks"], record["set"], record["recipe"]]
            elif "results" in record:
                found[name] = [record["status"], [(s["path"], s["sha256"]) for s in record["sets"]],
                               sorted((r["seed"], r["role"], r["variant"], r["network"], r["accuracies"]) for r in record["results"])]  # fmt: skip
            elif "accuracies" in record:
                found[name] = record["accuracies"]
        elif file.suffix in (".safetensors", ".toml", ".png"):
            found[name] = file.read_bytes()
    return found


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("what", choices=("distill", "experts", "benchmark"))
    ask.add_argument("--count", type=int, default=50)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--method", choices=("dm", *POOLED), help="of a distillation; dm unless given")
    args = ask.parse_args()
    if args.method and args.what != "distill":
        ask.error(f"--method is for distill; {args.what} has methods of its own")
    method, named = args.method or "dm", {"method": args.method} if args.method else {}
    for module in (
        benchmark,
        outcome,
        report,
        sklearn.datasets,
        sklearn.utils.validation,
        torch._dynamo,
        torch.utils.flop_counter,
    ):
        assert module  # imported here, so that no child need import it
    draw, begin = random.Random(args.seed), time.monotonic()
    threads = [Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")]
    if len([t for t in threads if t != "jemalloc_bg_thd"]) > 1:  # that one, of pyarrow's, knows how to be forked
        raise SystemExit(f"this process has threads already, and cannot be forked: {', '.join(threads)}")
    room = Path(tempfile.mkdtemp(prefix="potstill-kill-"))
    os.environ["POTSTILL_CACHE"] = str(room / "cache")
    log, told = room / "log", {"kills": 0, "runs": 0, "files_read": 0, "half_written_left": 0}
    try:
        finish(command(args.what, room, "warm", method), log)
        took = finish(command(args.what, room, "whole", method), log)
        wanted = contents(args.what, room / "whole")
        if not wanted:
            raise SystemExit("the undisturbed run left nothing to compare")
        while told["kills"] < args.count:
            name = f"run{told['runs']}"
            line, folder = command(args.what, room, name, method), room / name
            while told["kills"] < args.count and killed(line, log, draw.uniform(0, took)):
                told["kills"] += 1
                for file in (p for p in folder.rglob("*") if p.is_file()):
                    if file.name.startswith("."):
                        told["half_written_left"] += file.name != ".lock"
                        continue
                    try:
                        read_whole(file)
                    except Exception as error:
                        raise SystemExit(f"kill {told['kills']}: {file.relative_to(room)}: {error!r}") from error
                    told["files_read"] += 1
            finish(line, log)
            ended = contents(args.what, folder)
            if wrong := sorted(k for k in {*wanted, *ended} if wanted.get(k) != ended.get(k)):
                raise SystemExit(f"run {told['runs']} ends otherwise than an undisturbed one: {', '.join(wrong)}")
            if left := [p for p in folder.rglob(".*") if p.is_file()]:
                raise SystemExit(f"run {told['runs']} leaves {left[0].relative_to(room)}")
            told["runs"] += 1
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    print(json.dumps({"what": args.what, **named, **told, "survived": told["kills"], "undisturbed_seconds": round(took, 2),
                      "seconds": round(time.monotonic() - begin)}), flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
