"""What a step costs: one cell of the cost table, measured in a process of its own, so that a peak is that cell's alone.

`python -m potstill.costs` reads a request as JSON on standard input and writes one line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .compiling import choose_precision, count_flops, keep_memory
from .data import Data
from .errors import PotstillError
from .faults import out_of_memory
from .functional import Key, Tree
from .loaders import load
from .measure import peak_bytes, reset_peak
from .networks import Network
from .networks import network as build_network
from .objectives import Net, Unroll
from .recipe import Recipe, change, find
from .replay import Experts
from .rows import CostRow
from .still import Now, Settings, Still
from .synthetic import counts_per_group

DONE, FAILED, MEMORY, TIME = "done", "failed", "out of memory", "out of time"
# of a step: what is drawn, the real side, loss and gradient, all that moves
PHASES = ("draws", "real", "synthetic", "update")
WARM = 2  # steps before the timed ones: compiling, first allocations


@dataclass(frozen=True)
class Stretch(Experts):
    """A network and another one as its goal, both fresh: costs as much as a recorded expert's stretch, and needs none."""

    def check(self, network: Network, data: Data) -> None:
        """Nothing is recorded."""

    def fetch(self, network: Network, pool: Tree, key: Key, progress: float) -> tuple[int, Net]:
        """As `Source.fetch`."""
        state, goal = (network.init(key.fold("weights", i)) for i in range(2))
        return 0, Net(network, state, goal)


def recipe_of(row: CostRow, data: Data) -> Recipe:
    """The row's recipe: S whole in each inner step where the row says `full`, experts made up."""
    recipe = find(row.method, row.preset, row.ipc)
    settings = {"network": row.network, **row.settings} if row.network else dict(row.settings)
    recipe = change(recipe, settings) if settings else recipe
    if isinstance(recipe.objective, Unroll):
        feed = {"feed": "all"} if row.batch == "full" else {"feed": "random", "batch": int(row.batch)}
        recipe = replace(recipe, objective=replace(recipe.objective, **feed))
    elif row.batch != "full":
        raise PotstillError(f"batch {row.batch}: method '{row.method}' takes S whole")
    return replace(recipe, source=Stretch(span=1)) if isinstance(recipe.source, Experts) else recipe


def measure(
    row: CostRow,
    data: Data,
    compile: bool,
    precision: str,
    device: str = "cpu",
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Seconds of steps and of the loss alone, and the peak of memory, in this process.

    The step is the loop's whole: a network is fetched and trained on, real samples and augmentation are drawn, S is
    updated. The loss alone is target, loss and gradient with respect to what is learned, everything else given.

    Args:
        row: What is measured.
        data: Its data.
        compile: Whether the step is compiled.
        precision: `auto`, `fp32` or `bf16`.
        device: Where.
        keep: Receives everything but the counted operations before these are counted, which takes some steps' time.

    Returns:
        `step_seconds` and `loss_seconds`, medians of `times`; `phases`, the median and the floating-point operations of
        each; `peak_bytes` of the process and `baseline_bytes`, what of it was there before the first step.
    """
    recipe = recipe_of(row, data)
    net = build_network(recipe.network, data.shape, data.task.outputs)
    counts = counts_per_group(row.ipc, data.counts)
    objective = recipe.objective
    compile = compile and objective is not None and objective.needs.network  # as in a run
    exact = choose_precision(precision, device, net, compile and objective is not None and objective.narrow_bf16)
    settings = Settings(recipe, counts, 0, 0.0, 1000, device, compile, exact, torch.get_num_threads())
    reset_peak(device)
    before = peak_bytes(device)
    still = Still(data, settings)
    now = still.fresh()
    times: dict[str, list[float]] = {name: [] for name in ("step", *PHASES, "loss")}

    def timed(name: str, run: Callable[..., Any], *given: Any) -> Any:
        _settle(device)
        begin = time.perf_counter()
        out = run(*given)
        _settle(device)
        times[name].append(time.perf_counter() - begin)
        return out

    for i in range(WARM + row.repeats):
        now, _ = timed("step", still.step, now, i)
    for i in range(WARM + row.repeats):
        slot, net_, real, draws = timed("draws", still.inputs_of, now, i)
        target = timed("real", still.target, net_, real, draws)
        _, grads, own = timed("synthetic", still.value_and_grad, now, target, net_, draws)
        timed("update", still.update, now, i, slot, net_, grads, own)
        times["loss"].append(times["real"][-1] + times["synthetic"][-1])
    kept = {name: [round(t, 6) for t in found[WARM:]] for name, found in times.items()}
    middle = {name: round(median(found), 6) for name, found in kept.items()}
    peak = peak_bytes(device)  # before operations are counted, which keeps more than a step does
    found: dict[str, Any] = {
        "status": DONE,
        "network": net.name if still.objective.needs.network else None,
        "step_seconds": middle["step"],
        "loss_seconds": middle["loss"],
        "times": kept,
        "phases": {name: {"seconds": middle[name], "flops": None} for name in PHASES},
        "peak_bytes": peak,
        "baseline_bytes": before,
        "unroll": still.objective.way,
        "precision": still.precision,
        "compile": "on" if compile else "off",
        "threads": torch.get_num_threads(),
    }
    keep(found)
    counted = _counted(still, now)
    return {**found, "phases": {name: {"seconds": middle[name], "flops": counted[name]} for name in PHASES}}


def operations(still: Still, now: Now) -> dict[str, float]:
    """Floating-point operations of each phase of a step, matrix products and convolutions counted, in eager float32.

    What half precision adds for the processor's sake is not work: it counts as float32 does. A kernel in closed form and an
    unroll's rebuilt steps count as they are made: what is computed twice counts twice.
    """
    recipe, way = still.settings.recipe, still.objective.way
    if way is not None:  # as it was settled: an eager run, and float32, might settle it otherwise
        recipe = change(recipe, {"objective.memory": way})
    eager = Still(still.data, replace(still.settings, recipe=recipe, compile=False, precision="fp32"), still.start)
    slot, net, real, draws = eager.inputs_of(now, 0)
    found: dict[str, float] = {"draws": 0.0}
    target: Tree = None
    grads: dict[str, torch.Tensor] = {}
    own: Tree = ()

    def run_target() -> None:
        nonlocal target
        target = eager.target(net, real, draws)

    def run_gradient() -> None:
        nonlocal grads, own
        _, grads, own = eager.value_and_grad(now, target, net, draws)

    found["real"] = count_flops(run_target)
    found["synthetic"] = count_flops(run_gradient)
    found["update"] = count_flops(lambda: eager.update(now, 0, slot, net, grads, own))
    return found


def _counted(still: Still, now: Now) -> dict[str, float | None]:
    """As `operations`; nothing of each where counting needs more memory than there is and the step itself did not."""
    try:
        return dict(operations(still, now))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return dict.fromkeys(PHASES)


def _settle(device: str) -> None:
    """Wait for what a GPU was told to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def in_own_process(
    row: CostRow, data: str, data_root: str | Path | None, compile: bool, precision: str, device: str = "cpu"
) -> dict[str, Any]:
    """As `measure`, in a fresh process that may run out of memory or time without harm to this one.

    Returns:
        As `measure`; else `status` (`out of memory`, `out of time`, `failed`) and `reason`.
    """
    request = {"row": asdict(row), "data": data, "root": str(data_root) if data_root else None, "compile": compile,
               "precision": precision, "device": device}  # fmt: skip
    command = [sys.executable, "-m", "potstill.costs"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=row.limit_seconds, check=False
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        late_answer = _last(said.decode(errors="replace") if isinstance(said, bytes) else said)
        steps = 2 * (WARM + row.repeats)
        said_so = f"{steps} steps, with starting and compiling, took longer than {row.limit_seconds:g} s"
        return late_answer or {"status": TIME, "reason": said_so}
    if (found := _last(done.stdout)) is not None:
        return found
    if done.returncode == -9:  # the system's own answer to too little memory
        return {"status": MEMORY, "reason": "killed by the system"}
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"status": FAILED, "reason": last[:300]}


def _last(said: str) -> dict[str, Any] | None:
    """The last whole answer of a process: the times come first, once more with operations when these are counted."""
    for line in reversed(said.strip().splitlines()):
        with suppress(ValueError):
            return dict(json.loads(line))
    return None


def _limit() -> None:
    """Run out of memory here, as an error, before the machine does; and if the system must kill somebody, then this."""
    with suppress(OSError, ValueError):
        Path("/proc/self/oom_score_adj").write_text("1000")
        free = {line.split(":")[0]: line.split() for line in Path("/proc/meminfo").read_text().splitlines()}
        own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (own + int(free["MemAvailable"][1]) * 1024,) * 2)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    row = CostRow(**{**request["row"], "settings": dict(request["row"]["settings"])})
    try:
        keep_memory()
        data = load(request["data"], request["root"])
        _limit()
        return measure(row, data, request["compile"], request["precision"], request["device"], _say)
    except PotstillError as error:
        return {"status": FAILED, "reason": str(error)}
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            return {"status": MEMORY, "reason": f"more than this machine's {_total()} of memory"}
        raise


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def _total() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


if __name__ == "__main__":
    _say(_answer(json.load(sys.stdin)))
