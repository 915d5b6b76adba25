"""What two processes gain over one on a machine of two cores, for experts and evaluation: whole commands, start to end.

python benchmarks/processes.py [--rounds 3] [--only experts,evaluate] [--scale toy] [--json FILE]

Each round runs a command in its three forms, one after the other: one process with one thread, one with two threads, two processes
under torchrun with one thread each. Seconds are those of the command as a user waits for it, Python's start included, and eager,
so that no form pays for compiling what another finds made. `python benchmarks/tables.py --page docs/scale.md` writes the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

from kept import add_arguments, opened

from potstill.records import software, write_json

WORKS = {
    "experts": "experts digits --network convnet-w32 --count 4 --epochs 50 --compile off --out {out}/experts",
    "evaluate": "evaluate fashion-mnist/dm/1 --networks convnet-w32 --protocol dc --repeats 4 --compile off",
}
TOYS = {"experts": "experts digits --network convnet-w4 --count 2 --epochs 1 --compile off --out {out}/experts"}
FORMS = {"one": (1, 1), "one, two threads": (1, 2), "two": (2, 1)}  # processes, threads of each


def seconds_of(words: list[str], processes: int, threads: int) -> float:
    """One command, start to end.

    Raises:
        SystemExit: It failed; what it said is printed.
    """
    under = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *under, "potstill", *words],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"potstill {' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    return time.perf_counter() - begin


def main() -> None:
    """Take turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="with commas: experts, evaluate")
    add_arguments(parser, "processes")
    args = parser.parse_args()
    works = WORKS if args.scale == "full" else TOYS
    names = args.only.split(",") if args.only else list(works)
    if unknown := set(names) - set(works):
        parser.error(f"no work '{min(unknown)}'; there are: {', '.join(works)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} is below 1")
    file, record = opened(parser, args, "processes", "works")
    for name in names:
        took: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(args.rounds):
            for form, (processes, threads) in FORMS.items():
                with tempfile.TemporaryDirectory() as out:
                    words = works[name].format(out=out).split()
                    took[form].append(round(seconds_of(words, processes, threads), 2))
        shown = "; ".join(f"{form}: {median(t):.1f} s" for form, t in took.items())
        print(f"{name}: {shown}; {median(took['one']) / median(took['two']):.2f} times", flush=True)
        record["works"][name] = {"command": works[name], "seconds": took, "software": software("cpu")}
        write_json(file, record)


if __name__ == "__main__":
    main()
