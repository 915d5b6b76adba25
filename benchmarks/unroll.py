"""Memory and time of the unroll: the adjoint against the plain one, each in a fresh process, in fp32, eager unless asked otherwise.

python benchmarks/unroll.py [--steps 20] [--images 50] [--network convnet] [--shape 3,32,32] [--compile] [--json FILE]

`--compile` compiles a step of the adjoint, as a run does; the plain unroll records its steps and stays eager.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from potstill.compiling import Graphs, keep_memory
from potstill.data import Classification
from potstill.functional import Key, tree_map
from potstill.measure import peak_bytes, reset_peak
from potstill.networks import State, network
from potstill.objectives import Net, Real, Sizes, Unrolled
from potstill.synthetic import Synthetic, group_index

WAYS = ("adjoint", "plain")


def build(args: argparse.Namespace, way: str, dtype: torch.dtype) -> tuple[Unrolled, tuple[Any, ...]]:
    """The objective, and what its `value_and_grad` takes: random numbers of the asked sizes."""
    shape = tuple(int(n) for n in args.shape.split(","))
    task = Classification(args.classes)
    objective = Unrolled(
        steps=args.steps,
        real=args.real,
        momentum=args.momentum,
        memory=way,
        task=task,
        graph=Graphs(args.compile and way == "adjoint"),
    )
    net = network(args.network, shape, args.classes)
    groups = torch.arange(args.images) % args.classes
    groups = groups.sort().values
    learned = {"inputs": Key(1).normal(args.images, *shape), "lr": objective.start_rates().log()}
    index, mask = group_index(groups, args.classes)
    real = Real(Key(2).normal(args.real, *shape), torch.arange(args.real) % args.classes, torch.ones(args.real))
    draws = objective.draws(Key(3), Sizes(args.classes, args.images, args.real))
    state = net.init(Key(0))

    def at(tree: Any) -> Any:
        return tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)

    bound = Net(net, State(*at(tuple(state))))
    target = objective.target(Real(*at(tuple(real))), bound, draws)
    return objective, (Synthetic(at(learned), {"labels": groups}, index, mask, "hard"), target, bound, at(draws), ())


def measure(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """In this process: estimated and measured peak above what is there after import and building, and seconds."""
    torch.set_num_threads(args.threads)
    if args.keep_memory:
        keep_memory()
    objective, given = build(args, way, torch.float32)
    reset_peak()
    before = peak_bytes()
    objective.value_and_grad(*given)  # warms up, and compiles where that is asked for
    reset_peak()
    seconds = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        objective.value_and_grad(*given)
        seconds.append(time.perf_counter() - begin)
    grown = peak_bytes() - before
    return {
        "way": way,
        "peak_bytes": grown,
        "estimated_bytes": objective.estimates(*given[:-1])[way],
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
    }


def difference(args: argparse.Namespace) -> dict[str, float]:
    """Relative difference of the two gradients in float64, for each part of S."""
    found = []
    for way in WAYS:
        objective, given = build(args, way, torch.float64)
        found.append(objective.value_and_grad(*given)[1])
    one, other = found
    return {k: float((one[k] - other[k]).norm() / other[k].norm()) for k in one}


def main() -> None:
    """Measure each in a process of its own, print a table."""
    parser = argparse.ArgumentParser(description="Memory and time of the adjoint against the plain unroll.")
    sizes = {"steps": 20, "images": 50, "classes": 10, "real": 64, "threads": torch.get_num_threads(), "repeats": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--network", default="convnet")
    parser.add_argument("--shape", default="3,32,32")
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--keep-memory", action="store_true", help="as in a run: freed memory is kept for the next use")
    parser.add_argument("--compile", action="store_true", help="a step of the adjoint is compiled")
    parser.add_argument("--no-difference", action="store_true", help="leave the float64 comparison out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=(*WAYS, "difference"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 3:
        parser.error(f"--repeats {args.repeats} is below 3")
    if args.only:
        print(json.dumps(difference(args) if args.only == "difference" else measure(args, args.only)))
        return

    def alone(what: str) -> Any:
        out = subprocess.run([sys.executable, *sys.argv, "--only", what], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(out.stdout.splitlines()[-1])

    rows = [alone(way) for way in WAYS]
    apart = {} if args.no_difference else alone("difference")
    print(f"{args.network}, {args.images} images of {args.shape}, {args.steps} steps, {args.threads} threads{', the step of the adjoint compiled: what the compiler leaves in memory counts' if args.compile else ''}")
    print(f"{'':10}{'peak MiB':>10}{'estimated':>11}{'seconds':>10}")
    for row in rows:
        peak, guess = row["peak_bytes"] / 2**20, row["estimated_bytes"] / 2**20
        print(f"{row['way']:10}{peak:10.1f}{guess:11.1f}{row['seconds']:10.3f}")
    ratios = {k: rows[0][k] / rows[1][k] for k in ("peak_bytes", "estimated_bytes", "seconds")}
    print(f"{'ratio':10}{ratios['peak_bytes']:10.3f}{ratios['estimated_bytes']:11.3f}{ratios['seconds']:10.3f}")
    if apart:
        print("relative difference of the gradients in float64: " + ", ".join(f"{k} {v:.1e}" for k, v in apart.items()))
    if args.json:
        options = {k: v for k, v in vars(args).items() if k not in ("json", "only")}
        result = {"options": options, "rows": rows, "ratios": ratios, "difference": apart, "torch": torch.__version__}
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
