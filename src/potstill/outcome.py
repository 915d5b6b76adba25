"""What a run leaves behind beside its set: the record, the picture and the page."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
import torch

from . import records
from .checkpoint import Ask, Progress
from .data import Data
from .exchange import DistilledSet
from .functional import Key
from .measure import Clock, cost
from .recipe import Recipe, find, to_dict
from .replay import Experts
from .still import SHOWN, Still
from .synthetic import pick_random


def record_of(
    ask: Ask,
    data: Data,
    recipe: Recipe,
    counts: list[int],
    set_: DistilledSet,
    progress: Progress | None,
    still: Still | None,
    out: Path,
    clock: Clock,
) -> dict[str, Any]:
    """Everything about a run in plain values; no absolute path."""
    steps = progress.step if progress else 0
    file = (out / "set.safetensors").read_bytes()
    losses = progress.losses.tolist() if progress else []
    every = max(1, len(losses) // 500)
    per_step = clock.seconds["loop"] / steps if progress and steps else None
    return {
        "format": records.FORMAT,
        "kind": "distillation",
        "method": recipe.method,
        "command": command(ask, data, recipe, counts, steps),
        "software": records.software(ask.device),
        "data": data.describe(),
        "recipe": to_dict(recipe),
        "seed": ask.seed,
        "steps": steps,
        "ipc": counts[0] if len(set(counts)) == 1 else counts,
        "choices": {
            "preset": recipe.preset,
            "compile": "on" if still and still.settings.compile else "off",
            "precision": still.precision if still else "fp32",
            "transform": data.transform.name,
            "network": recipe.network,
            "student": recipe.student,
            "protocol": recipe.protocol,
            **({"unroll": still.objective.way} if still and still.memory else {}),
            **({"parallel": ask.parallel, "ranks": ask.ranks} if ask.ranks > 1 else {}),
            "budget": f"{ask.minutes:g} minutes" if ask.minutes else f"{steps} steps",
        },
        "curve": [[i + 1, losses[i]] for i in range(0, len(losses), every)],
        "looks": progress.looks if progress else [],
        "cost": cost(clock, per_step, ask.device),
        **({"estimated_peak_bytes": still.memory} if still and still.memory else {}),
        "results": [],
        "set": {
            "file": "set.safetensors",
            "sha256": hashlib.sha256(file).hexdigest(),
            "bytes": len(file),
            "images": len(set_),
            **set_.sizes,
        },
        "experts": recipe.source.trajectories.mark if isinstance(recipe.source, Experts) else None,
        "labels": {
            "kind": set_.meta.labels,
            **({"teacher": set_.meta.teacher} if set_.meta.teacher else {}),
        },
    }


def command(ask: Ask, data: Data, recipe: Recipe, counts: list[int], steps: int) -> str:
    """The command that makes this set again, from a recipe file where the method has no name to call it by."""
    start = ["torchrun", "--nproc-per-node", str(ask.ranks), "-m"] if ask.ranks > 1 else []
    parts = [*start, "potstill", "distill", data.name]
    parts += ["--parallel", ask.parallel] if ask.ranks > 1 else []
    parts += ["--method", ask.method] if isinstance(ask.method, str) else ["--recipe", "recipe.toml"]
    parts += ["--ipc"]
    parts.append(str(counts[0]) if len(set(counts)) == 1 else ",".join(map(str, counts)))
    if recipe.objective is not None:
        parts += ["--steps", str(steps)]
        parts += ["--preset", recipe.preset] if isinstance(ask.method, str) else []
    for name, value, usual in (
        ("network", ask.network, None), ("init", ask.init, None), ("seed", ask.seed, 0), ("holdout", ask.holdout, 0.1),
        ("transform", data.transform.name, "standardise"), ("precision", ask.precision, "auto"), ("compile", ask.compile, "auto"), ("device", ask.device, "cpu"), ("memory", ask.memory, None),
    ):  # fmt: skip
        if value != usual:
            parts += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    if isinstance(recipe.source, Experts):
        parts += ["--experts", "DIR"]  # where they lie is no part of a record; which they are is
    asked = find(ask.method, recipe.preset, max(counts)) if isinstance(ask.method, str) else ask.method
    fewer = {"looks": recipe.looks} if recipe.looks < ask.settings.get("looks", asked.looks) else {}  # by --minutes
    for path, value in {**ask.settings, **fewer}.items():
        parts += ["--set", f"{path}={_inline(value)}"]
    return shlex.join(parts)


def _inline(value: Any) -> str:
    """A setting as TOML on one line, which is what `--set` reads."""
    if isinstance(value, Mapping):
        bare = re.compile(r"[\w-]+", re.ASCII)
        pairs = (f"{k if bare.fullmatch(k) else _inline(k)} = {_inline(v)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)  # inf is no JSON


def write(
    out: Path, record: dict[str, Any], set_: DistilledSet, progress: Progress | None, still: Still | None, data: Data
) -> None:
    """Record, recipe, picture and page."""
    from .report import write_run_report

    records.write_json(out / "record.json", record)
    records.write_whole(out / "recipe.toml", tomli_w.dumps(record["recipe"]).encode())
    evolution = []
    if progress is not None and still is not None:
        shown = set_.classes[still.shown]
        first = torch.tensor([int((shown == g).nonzero()[0]) for g in shown.unique().tolist()])
        evolution = [(step, x[first].numpy()) for step, x in sorted(progress.snapshots.items())]
    real = pick_random(data, [int(g < SHOWN) for g in range(data.task.classes)], Key(record["seed"]).fold("random", 0))
    samples = data.display(data.prepare(data.train.inputs[real])).numpy()
    write_run_report(out, record, set_.images.numpy(), set_.classes.numpy(), evolution, samples)
