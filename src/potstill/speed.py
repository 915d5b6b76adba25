"""Where the time of a step goes, for each method: phases, operations, and their share of what the machine can do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .compiling import check_device, choose_compile, choose_precision
from .costs import DONE, PHASES, in_own_process, recipe_of
from .errors import PotstillError, unknown
from .loaders import load
from .methods import METHODS, PRESETS
from .networks import network as build_network
from .recipe import find
from .records import software
from .rows import CostRow

FORMAT = 1
SIDE = 2048  # of the square matrices of the yardstick: large enough that more side is no faster
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
WORDS = {"draws": "draws", "real": "real side", "synthetic": "synthetic side", "update": "update"}


def distillers() -> list[str]:
    """The methods that take steps."""
    return [name for name in METHODS if find(name, "small").objective is not None]


def matrix_product(precision: str, device: str = "cpu", repeats: int = 5) -> float:
    """Floating-point operations per second of the machine's own product of two square matrices, the median.

    Args:
        precision: `fp64`, `fp32` or `bf16`.
        device: Where.
        repeats: Timed products, after two that warm up.
    """
    a = torch.ones(SIDE, SIDE, dtype=DTYPES[precision], device=device)
    took = []
    for _ in range(2 + repeats):
        begin = time.perf_counter()
        (a @ a).sum().item()  # a number that is read: a GPU has finished
        took.append(time.perf_counter() - begin)
    return 2 * SIDE**3 / median(took[2:])


def speed(
    data: str = "fashion-mnist",
    methods: Sequence[str] = (),
    *,
    ipc: int = 1,
    preset: str = "small",
    network: str | None = None,
    settings: Mapping[str, Any] | None = None,
    repeats: int = 5,
    limit_seconds: float = 600.0,
    data_root: str | Path | None = None,
    device: str = "cpu",
    precision: str = "auto",
    compile: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the steps of methods by phase, each method in a process of its own.

    Args:
        data: As `load_data` takes it.
        methods: All that take steps, if none are given.
        ipc: Images per class.
        preset: `small` or `paper`.
        network: In place of the recipe's.
        settings: Recipe fields to change, dotted path to value; for every method.
        repeats: Timed steps, after two that warm up and compile.
        limit_seconds: After which a method is given up.
        data_root: Folder of downloaded data.
        device: Where to compute.
        precision: `auto`, `fp32` or `bf16`.
        compile: `on`, `off`, or `auto`, which is `on` where there is a compiler.
        say: Receives a line before each method.

    Returns:
        `machine`, `matrix_product` (operations per second by precision) and `rows`. Of each row: `phases` with `seconds`
        (the median), `flops` (operations counted in eager float32) and `share` of the matrix product at the row's precision;
        `step_seconds`, `peak_bytes`; or `status` and `reason`.

    Raises:
        PotstillError: A name that is not known, or data that are not there.
    """
    names = list(methods) or distillers()
    for name in names:
        if name not in distillers():
            raise unknown("method that takes steps", name, distillers())
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    if ipc < 1 or repeats < 1:
        raise PotstillError(f"--ipc {ipc}, --repeats {repeats}: both must be at least 1")
    check_device(device)
    on, _ = choose_compile(compile, math.inf, device)
    found = load(data, data_root)
    if network is not None:
        choose_precision(precision, device, build_network(network, found.shape, found.task.outputs))
    asked = [
        CostRow(name, data, ipc, "full", "plain", network or "", preset, repeats, limit_seconds, dict(settings or {}))
        for name in names
    ]
    refused = []
    for row in asked:
        try:
            recipe_of(row, found)
        except PotstillError as error:
            refused.append(error)
    if len(refused) == len(asked):
        raise refused[0]
    yardstick: dict[str, float] = {}
    rows = []
    for row in asked:
        say(f"{row.method}: {2 + repeats} steps" + (", compiled first" if on else ""))
        measured = in_own_process(row, data, data_root, on, precision, device)
        if measured["status"] == DONE:
            exact = measured["precision"]
            yardstick.setdefault(exact, matrix_product(exact, device))
            for phase in measured["phases"].values():
                done, took = phase["flops"], phase["seconds"]
                phase["share"] = round(done / took / yardstick[exact], 4) if done is not None and took else None
        head = {"method": row.method, "data": data, "ipc": ipc, "preset": preset, "settings": dict(row.settings)}
        rows.append({**head, **measured})
    return {
        "format": FORMAT,
        "kind": "speed",
        "machine": software(device),
        "matrix_product": {k: round(v) for k, v in yardstick.items()},
        "rows": rows,
    }


def lines(found: Mapping[str, Any]) -> list[Sequence[str]]:
    """The table for people: seconds by phase, operations per second of the whole step, their share of the matrix product."""
    out: list[Sequence[str]] = [("method", *WORDS.values(), "whole step", "GFLOP/s", "share", "precision", "peak MiB")]
    for row in found["rows"]:
        if row["status"] != DONE:
            out.append((row["method"], f"{row['status']}: {row['reason']}", *[""] * (len(out[0]) - 2)))
            continue
        parts = [row["phases"][phase] for phase in PHASES]
        counted = [p["flops"] for p in parts]
        rate = None if None in counted else sum(counted) / row["step_seconds"]
        share = rate and rate / found["matrix_product"][row["precision"]]
        times = (f"{t:.3g} s" for t in (*(p["seconds"] for p in parts), row["step_seconds"]))
        speeds = ("", "") if rate is None else (f"{rate / 1e9:.1f}", f"{share:.3f}")
        out.append((row["method"], *times, *speeds, row["precision"], f"{row['peak_bytes'] / 2**20:.0f}"))
    return out
