"""Mutated inputs for a parser, in a process with limits; those that neither load nor are refused in a line are shown.

python tests/fuzz/run.py KIND... --count 20000 --seed 0        KIND: set pt npz recipe rows experts checkpoint parquet folder
python tests/fuzz/run.py pt --seed 0 --only 1234 --keep DIR    one input, and its files
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

SECONDS = 20  # for one input
BYTES = 512 << 20  # that one input may take beyond what the process has
LONGEST = 1500  # characters of an error, the path of its file aside
LINES = 30  # of the one error that lists mistakes, a line each
KINDS = ("set", "pt", "npz", "recipe", "rows", "experts", "checkpoint", "parquet", "folder")


class TooLong(BaseException):
    """An input took more than its time."""


def alarmed(*_: Any) -> None:
    raise TooLong


def status(word: str) -> int:
    """Bytes that the system says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(word + ":"):
            return int(line.split()[1]) << 10
    return 0


def work(kind: str, seed: int, first: int, last: int, keep: Path | None) -> None:
    """Read inputs one after the other and print a line of JSON for each."""
    import torch

    from fuzz.kinds import KINDS as made_of
    from fuzz.kinds import write
    from potstill.errors import PotstillError

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, alarmed)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        os.environ["POTSTILL_CACHE"] = str(home / "cache")
        os.environ["FUZZ_MARK"] = mark = str(home / "mark")
        (home / "base").mkdir()
        under = made_of[kind](home / "base")
        for sample in under.samples:  # whole files load; and what is loaded lazily is now
            write(home / "in", sample)
            under.read(home / "in")
        if limit := status("VmData"):
            resource.setrlimit(resource.RLIMIT_DATA, (limit + BYTES, limit + BYTES))
        for i in range(first, last):
            rng = Random(f"{kind} {seed} {i}")
            files = under.change(rng, dict(rng.choice(under.samples)), under.samples)
            folder = keep or home / "in"
            write(folder, files)
            print(json.dumps({"begun": i}), file=out, flush=True)
            outcome, what = "loaded", ""
            begin = time.perf_counter()
            try:
                signal.alarm(SECONDS)
                try:
                    under.read(folder)
                finally:
                    signal.alarm(0)
            except PotstillError as error:
                outcome, what = "refused", str(error)
                plain = what.replace(str(folder), "")
                parts = plain.split("\n") if kind == "rows" else [plain]
                if (
                    not all(p.isprintable() for p in parts)
                    or len(plain) > LONGEST * (4 if kind == "rows" else 1)
                    or len(parts) > LINES
                ):
                    outcome, what = (
                        "unexpected",
                        f"an error that is no line: {plain[:300]!r} of {len(plain)} characters",
                    )
            except TooLong:
                outcome, what = "unexpected", f"more than {SECONDS} seconds"
            except BaseException as error:  # noqa: BLE001
                last_lines = traceback.format_exception_only(error)[-1].strip()[:300]
                at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
                outcome, what = "unexpected", f"{last_lines} at {' '.join(at)}"
            if os.path.exists(mark):
                os.rmdir(mark)
                outcome, what = "unexpected", "code of the file has run"
            seconds = time.perf_counter() - begin
            print(
                json.dumps(
                    {"i": i, "outcome": outcome, "what": what[:600], "seconds": seconds, "peak": status("VmHWM")}
                ),
                file=out,
                flush=True,
            )


def fuzz(kind: str, count: int, seed: int, only: int | None = None, keep: Path | None = None) -> dict[str, Any]:
    """Try inputs in workers; one that dies or hangs is replaced behind the input that did it."""
    at, end = (0, count) if only is None else (only, only + 1)
    tried = {"loaded": 0, "refused": 0, "unexpected": 0}
    shown: list[dict[str, Any]] = []
    seconds, low, high = 0.0, 0, 0
    while at < end:
        here = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, __file__, kind, "--seed", str(seed), "--work", str(at), str(end)]
        command += ["--keep", str(keep)] if keep else []
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=here) as worker,
        ):
            assert worker.stdout is not None
            begun, left, rest = None, 300.0, b""
            while True:
                ready, _, _ = select.select([worker.stdout], [], [], left)
                more = os.read(worker.stdout.fileno(), 65536) if ready else b""
                if not more:
                    break
                *lines, rest = (rest + more).split(b"\n")
                for line in map(json.loads, lines):
                    if "begun" in line:
                        begun, left = line["begun"], 4.0 * SECONDS
                        continue
                    tried[line["outcome"]] += 1
                    seconds, at, begun = max(seconds, line["seconds"]), line["i"] + 1, None
                    low, high = low or line["peak"], max(high, line["peak"])
                    if line["outcome"] == "unexpected" or only is not None:
                        shown.append({"i": line["i"], "outcome": line["outcome"], "what": line["what"]})
            worker.kill()
            code = worker.wait()
            if at < end:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()[-3:]
                if begun is None:
                    raise SystemExit(f"the worker for {kind} does not work (exit {code}): {' | '.join(said)}")
                tried["unexpected"] += 1
                shown.append(
                    {
                        "i": begun,
                        "outcome": "unexpected",
                        "what": f"the process died or hung (exit {code}): {' | '.join(said)}",
                    }
                )
                at = begun + 1
    return {
        "kind": kind,
        "seed": seed,
        "tried": sum(tried.values()),
        **tried,
        "slowest_seconds": round(seconds, 2),
        "peak_growth_bytes": high - low,
        "shown": shown,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=KINDS, metavar="KIND")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="I", help="one input")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where its files are left")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.kinds[0], args.seed, *args.work, args.keep)
        return 0
    bad = 0
    for kind in args.kinds:
        begin = time.monotonic()
        found = fuzz(kind, args.count, args.seed, args.only, args.keep)
        bad += found["unexpected"]
        if args.json:
            print(json.dumps(found), flush=True)
            continue
        print(f"{kind:10} {found['tried']} tried, {found['loaded']} loaded, {found['refused']} refused, {found['unexpected']} unexpected; "
              f"slowest {found['slowest_seconds']:.2f} s, at most {found['peak_growth_bytes'] / 2**20:.0f} MiB more memory; {time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
        seen: dict[str, int] = {}
        for line in found["shown"]:
            key = line["what"][:60]
            seen[key] = seen.get(key, 0) + 1
            if seen[key] <= 3:
                print(f"    {line['i']}: {line['outcome']}: {line['what']}", flush=True)
        for key, n in seen.items():
            if n > 3:
                print(f"    ... {n} like: {key}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
