"""Minutes of distillation to an accuracy, one method at a time: sets are kept at given seconds and judged afterwards.

python benchmarks/time_to.py frepo [--data fashion-mnist] [--ipc 1] [--goal 0.70] [--seconds 30,60,120] [--set PATH=VALUE] [--json FILE [--name NAME]]

Compiling is done before the clock starts and told apart. Each kept set is judged by its own student and protocol on training
data held out; the first that reaches the goal is then judged on the test data, once. With `--json` the finding is added to a file
that has one for each method, or for each `--name`; `benchmarks/results/time_to.json` is what `tables.py` reads, and `real_batch.json` in
the same way.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from potstill.asking import with_experts
from potstill.cli import settings_of
from potstill.compiling import choose_precision, keep_memory
from potstill.data import load_data
from potstill.evaluation import evaluate
from potstill.networks import network
from potstill.recipe import change, find
from potstill.records import read_json, software, write_json
from potstill.replay import Experts
from potstill.still import Settings, Still
from potstill.synthetic import counts_per_group

FORMAT = 1
USUAL = {"data": "fashion-mnist", "ipc": 1, "preset": "small", "goal": 0.7}  # of the table in docs/performance.md


def main() -> None:
    """Distil by the clock, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--experts", type=Path)
    parser.add_argument("--goal", type=float, default=0.70)
    parser.add_argument("--seconds", default="15,30,60,120,240")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", default="on", choices=("on", "off"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", help="of the run in the file, where the method alone does not tell (default: METHOD)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    goal = {k: getattr(args, k) for k in ("data", "ipc", "preset", "goal")}
    so_far = {
        "format": FORMAT,
        "kind": "time_to",
        "scale": "full" if goal == USUAL else "toy",
        "asked": goal,
        "runs": {},
    }
    if args.json and args.json.exists():
        so_far = read_json(args.json)
        if so_far["asked"] != goal:
            parser.error(f"{args.json} has runs of {so_far['asked']}, these are of {goal}: another file")
    torch.set_num_threads(args.threads)
    keep_memory()
    data = load_data(args.data).hold_out(0.1)
    recipe = find(args.method, args.preset, args.ipc)
    recipe = change(recipe, settings_of(args.set)) if args.set else recipe
    if args.experts:
        recipe = with_experts(recipe, args.experts)
    net = network(recipe.network, data.shape, data.task.outputs)
    if isinstance(recipe.source, Experts):
        recipe.source.check(net, data)
    on = args.compile == "on" and recipe.objective.needs.network  # as in a run
    counts = counts_per_group(args.ipc, data.counts)
    precision = choose_precision("auto", "cpu", net, on and recipe.objective.narrow_bf16)
    settings = Settings(recipe, counts, 0, 0.1, 1000, "cpu", on, precision, args.threads)
    still, begin = Still(data, settings), time.perf_counter()
    now, took = still.fresh(), []
    for i in range(6):
        since = time.perf_counter()
        now, _ = still.step(now, i)
        took.append(time.perf_counter() - since)
    warm = time.perf_counter() - begin
    marks = [float(s) for s in args.seconds.split(",")]
    still = still.with_steps(max(1, int(marks[-1] / median(took[1:]))))
    kept, now, step, spent = [], still.fresh(), 0, 0.0
    while len(kept) < len(marks):
        since = time.perf_counter()
        now, _ = still.step(now, step)
        step, spent = step + 1, spent + time.perf_counter() - since
        if spent >= marks[len(kept)]:
            kept.append((spent, step, still.set(now.learned, step)))
    aside = replace(data, test=data.heldout)
    rows, reached = [], None
    for seconds, steps, set_ in kept:
        (found,) = evaluate(set_, aside, repeats=args.repeats)
        rows.append({"seconds": round(seconds, 1), "steps": steps, "heldout": found.accuracies})
        print(f"{seconds:7.1f} s  {steps:6} steps  held out {100 * found.accuracy_mean:.1f} ± {100 * found.accuracy_std:.1f} %", flush=True)  # fmt: skip
        if found.accuracy_mean >= args.goal:
            (test,) = evaluate(set_, data, repeats=args.repeats)
            reached = rows[-1] | {"test": test.accuracies, "network": test.network, "protocol": test.protocol}
            print(f"{args.method}: {args.goal:g} after {seconds:.0f} s and {steps} steps; test {100 * test.accuracy_mean:.1f} ± {100 * test.accuracy_std:.1f} %")  # fmt: skip
            break
    if reached is None:
        print(f"{args.method}: {args.goal:g} not reached in {kept[-1][0]:.0f} s")
    print(f"compiling and the first six steps: {warm:.0f} s; {still.precision}, {args.threads} threads")
    if args.json:
        shown = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != "json"}
        record = {"asked": shown, "warm_seconds": warm, "precision": still.precision, "software": software("cpu"), "kept": rows, "reached": reached}  # fmt: skip
        write_json(args.json, {**so_far, "runs": {**so_far["runs"], args.name or args.method: record}})


if __name__ == "__main__":
    main()
