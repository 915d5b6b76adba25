"""What bfloat16 does to the gradient of S: its cosine to the gradient in float32, with the same network, samples and draws.

python benchmarks/precision.py [--methods dm,dc] [--data digits,fashion-mnist] [--draws 5] [--threads 1] [--again] [--scale toy]

Eager, on narrow networks: where the precision is chosen (`auto`), an eager step of such networks stays in float32 and that of larger
ones takes bfloat16, so this asks for it. Beside it the cosine of two float32 gradients with other draws, which says how much of a
gradient is chance anyway. Cells that are in the file already are skipped.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch
from kept import add_arguments, opened
from tables import precision_table

from potstill.costs import recipe_of
from potstill.data import Data, load_data
from potstill.records import software, write_json
from potstill.rows import CostRow
from potstill.still import Settings, Still
from potstill.synthetic import counts_per_group

METHODS = ("dm", "dc", "dsa", "frepo", "dd", "mtt")
WIDE = {"frepo": "widenet-batch-w32"}


def stills(method: str, data: Data, ipc: int, width: str, toy: bool) -> tuple[Still, Still]:
    """The same run in float32 and in bfloat16, from real images, so that they are alike for all methods."""
    settings: dict[str, Any] = {"init": "real"}
    if method in ("dd", "mtt"):
        settings["objective.steps"] = 3 if toy else 20
        settings["objective.memory"] = "adjoint"
    else:
        settings["objective.real"] = 8 if toy else 256 if method == "frepo" else 64
    row = CostRow(method, data.name, ipc, network=WIDE.get(method, width), preset="small", settings=settings)
    recipe, counts = recipe_of(row, data), counts_per_group(ipc, data.counts)
    made = [Still(data, Settings(recipe, counts, 0, 0.0, 1000, "cpu", False, p, torch.get_num_threads())) for p in ("fp32", "bf16")]  # fmt: skip
    return made[0], made[1]


def gradients(still: Still, step: int) -> dict[str, torch.Tensor]:
    """Of S as it starts, with the network and the draws of a step."""
    now = still.fresh()
    _, net, real, draws = still.inputs_of(now, step)
    return still.value_and_grad(now, still.target(net, real, draws), net, draws)[1]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two tensors as vectors."""
    a, b = a.double().flatten(), b.double().flatten()
    return round(float(a @ b / (a.norm() * b.norm())), 8)


def cell(method: str, data: Data, ipc: int, width: str, draws: int, toy: bool) -> dict[str, Any]:
    """Cosines and ratios of norms, one for each draw, for each learned part of S."""
    exact, rough = stills(method, data, ipc, width, toy)
    pairs = [(gradients(exact, step), gradients(rough, step)) for step in range(draws)]
    parts = {
        part: {
            "cosine": [cosine(a[part], b[part]) for a, b in pairs],
            "norm_ratio": [round(float(b[part].norm() / a[part].norm()), 6) for a, b in pairs],
            "between_draws": [cosine(a[part], b[part]) for (a, _), (b, _) in pairwise(pairs)],
        }
        for part in pairs[0][0]
        if pairs[0][0][part].numel() > 1  # of a single number the cosine is a sign
    }
    return {"method": method, "data": data.name, "ipc": ipc, "network": exact.network.name, "parts": parts}


def main() -> None:
    """Measure what is not there yet; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--data", default="digits,fashion-mnist")
    parser.add_argument("--ipc", default="1,10")
    parser.add_argument("--network", default="convnet-w32")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure also what is in the file")
    add_arguments(parser, "precision")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    toy = args.scale == "toy"
    if args.draws < 2:
        parser.error(f"--draws {args.draws} is below 2")
    file, record = opened(parser, args, "precision", "cells")
    for name in args.data.split(","):
        data = load_data(name)
        for method in args.methods.split(","):
            for ipc in map(int, args.ipc.split(",")):
                at = f"{name}/{method}/{ipc}"
                if at in record["cells"] and not args.again:
                    continue
                record["cells"][at] = cell(method, data, ipc, args.network, args.draws, toy)
                record["machine"] = software("cpu")
                write_json(file, record)
                worst = {k: min(v["cosine"]) for k, v in record["cells"][at]["parts"].items()}
                print(f"{at}: least cosine " + ", ".join(f"{k} {v:.5f}" for k, v in worst.items()), flush=True)
    print("\n".join(precision_table(record)))


if __name__ == "__main__":
    main()
