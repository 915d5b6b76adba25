"""What bfloat16 does to accuracy: the same runs in both precisions, seed by seed, and one set judged in both.

python benchmarks/precision_runs.py [--data fashion-mnist,digits] [--methods dm,dc] [--seeds 5] [--threads 1] [--again] [--scale toy]

A run has a fixed number of steps at one image per class, compiled, with a ConvNet of width 32 (FRePo: one that widens), and differs from
its twin in the precision alone. MTT's replay the same experts, which are recorded in float32 before. Each set trains one network in
float32, whose accuracy on training data held out is what counts; the test data are not read. The row `evaluation` has sets made in float32 by DM judged by networks that are trained in either
precision. Cells that are in the file already are skipped; `precision.py` has the gradients.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from kept import add_arguments, opened
from tables import precision_runs_table

from potstill import DistilledSet, distill, evaluate
from potstill.data import Data, load_data
from potstill.experts import record as record_experts
from potstill.records import software, write_json

STEPS = {  # fixed, and few enough for five seeds in both precisions
    "digits": {"dm": 100, "dc": 60, "dsa": 60, "frepo": 300, "dd": 30, "mtt": 60},
    "fashion-mnist": {"dm": 60, "dc": 60, "dsa": 60, "frepo": 300, "dd": 30, "mtt": 60},
}
EXPERTS = {"digits": {"count": 5, "epochs": 5, "batch": 64}, "fashion-mnist": {"count": 3, "epochs": 4, "batch": 256}}
OWN = {"frepo": "widenet-batch-w32"}  # the preset's: it is judged by one without norm
EVALUATION = "evaluation"
FORMS = ("fp32", "bf16")


def made(
    data: Data, method: str, steps: int, seed: int, precision: str, network: str, compile: str, experts: str | None
) -> DistilledSet:
    """A set of one image per class."""
    with tempfile.TemporaryDirectory() as out:
        run = distill(data, method, steps=steps, preset="small", seed=seed, network=None if method in OWN else network, precision=precision, compile=compile, experts=experts, evaluate=False, out=f"{out}/run")  # fmt: skip
        if (took := run.record["choices"]["precision"]) != precision:
            raise SystemExit(f"{method} ran in {took} where {precision} was asked for")
        return run.set


def judged(set_: DistilledSet, data: Data, seed: int, precision: str) -> float:
    """One network's accuracy on what the run held out."""
    (found,) = evaluate(set_, data, repeats=1, seed=seed, precision=precision, compile="off")
    return found.accuracies[0]


def cell(data: Data, method: str, steps: int, seeds: int, network: str, compile: str) -> dict[str, Any]:
    """Accuracies by precision, one a seed."""
    held = data.hold_out(0.1)
    aside = replace(held, test=held.heldout)
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        experts = f"{place}/experts" if method == "mtt" else None
        if experts:
            record_experts(data, out=experts, network=network, precision="fp32", compile=compile, **EXPERTS[data.name])
        for seed in range(seeds):
            shared = made(data, "dm", steps, seed, "fp32", network, compile, None) if method == EVALUATION else None
            for form in FORMS:
                set_ = shared or made(data, method, steps, seed, form, network, compile, experts)
                found[form].append(judged(set_, aside, seed, form if shared else "fp32"))
    return {"data": data.name, "method": method, "steps": steps, "network": network, "compile": compile, "software": software("cpu"), "accuracies": found, "seconds": round(time.perf_counter() - begin, 1)}  # fmt: skip


def main() -> None:
    """Measure what is not there yet; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist,digits")
    parser.add_argument("--methods", default=f"dm,frepo,dsa,dc,dd,mtt,{EVALUATION}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--network", default="convnet-w32", help="of all but frepo, which has its preset's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure also what is in the file")
    add_arguments(parser, "precision_runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    toy = args.scale == "toy"
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds} is below 2")
    for given, known in ((args.data.split(","), STEPS), (args.methods.split(","), {EVALUATION, *STEPS["digits"]})):
        if strange := [g for g in given if g not in known]:
            parser.error(f"'{strange[0]}' is none of {', '.join(sorted(known))}")
    file, record = opened(parser, args, "precision_runs", "cells")
    for name in args.data.split(","):
        data = load_data(name)
        for method in args.methods.split(","):
            net = OWN.get(method, args.network)
            at = f"{name}/{method}/{net}"
            before = record["cells"].get(at)
            if before and len(before["accuracies"]["fp32"]) == args.seeds and not args.again:
                continue
            asked = "dm" if method == EVALUATION else method
            if asked not in STEPS[name]:
                print(f"{at}: no length is set for it")
                continue
            steps = 2 if toy else STEPS[name][asked]
            record["cells"][at] = cell(data, method, steps, args.seeds, net, "off" if toy else "on")
            write_json(file, record)
            print(f"{at}: {record['cells'][at]['accuracies']}, {record['cells'][at]['seconds']:g} s", flush=True)
    print("\n".join(precision_runs_table(record)))


if __name__ == "__main__":
    main()
