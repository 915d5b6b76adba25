"""The sides of `beside.py`: what works against what, each in a process of its own.

python benchmarks/sides.py ROW SIDE [--scale toy] [--threads 2] [--official PATH]

It builds, warms up and says so in a line of JSON; then does one round for each line `go` on standard input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from official import Official
from torch import Tensor, nn

from potstill.compiling import PRECISIONS, choose_precision, compiled, count_flops, keep_memory
from potstill.costs import recipe_of
from potstill.data import Data, load_data
from potstill.functional import Key, tree_map
from potstill.measure import peak_bytes, reset_peak
from potstill.networks import network
from potstill.rows import CostRow
from potstill.speed import SIDE, matrix_product
from potstill.still import Settings, Still
from potstill.synthetic import counts_per_group
from potstill.training import PROTOCOLS, Trainer

Go = Callable[[], dict[str, float]]
NETWORKS = 5  # of an evaluation


@dataclass(frozen=True)
class Scale:
    """How large everything is; `toy` only shows that it runs."""

    network: str
    official: str
    features: str
    classes: int
    ipc: int
    real: int
    uniform: int
    unroll: int
    test: int
    epochs: dict[int, int]
    whole: int


SCALES = {
    "full": Scale("convnet", "ConvNet", "widenet-batch", 10, 10, 256, 1024, 20, 1000, {1: 20, 10: 10}, 1280),
    "toy": Scale("convnet-w32", "ConvNetW32", "widenet-batch-w4", 3, 2, 4, 16, 3, 20, {1: 2, 10: 2}, 256),
}


@dataclass(frozen=True)
class Side:
    """A round, how often it is done before any is timed, and what a record says of it."""

    go: Go
    facts: dict[str, Any] = field(default_factory=dict)
    warm: int = 2


@dataclass(frozen=True)
class Asked:
    """What `build` is given."""

    scale: Scale
    toy: bool
    official: Path | None
    compile: bool


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def noise(scale: Scale) -> Data:
    """Random images of CIFAR-10's shape: steps do not look at what is on them."""
    shape, per = (3, 32, 32), max(scale.real + scale.real // 4, 10)

    def images(purpose: str, count: int) -> Tensor:
        return Key(0).fold(purpose).integers(256, count, *shape).to(torch.uint8)

    labels = torch.arange(scale.classes * per) % scale.classes
    seen, unseen = images("train", len(labels)), images("test", scale.test)
    return Data.from_arrays(seen, labels, unseen, torch.arange(scale.test) % scale.classes, name="noise")


def step_of(method: str, asked: Asked, ours: bool) -> Side:
    """One step of the loop: compiled in the precision of `auto`, or plain (eager, fp32, the unroll differentiated whole)."""
    scale, data = asked.scale, noise(asked.scale)
    settings: dict[str, Any] = {}
    if method in ("dm", "dc", "dsa"):
        settings["objective.real"] = scale.real
    if method in ("dc", "dsa"):  # the training of the network is timed apart
        settings["source.epochs"] = 0
    if method in ("dd", "mtt"):
        settings["objective.steps"] = scale.unroll
        settings["objective.memory"] = "adjoint" if ours else "plain"
    if method == "frepo":
        settings["objective.real"] = min(scale.uniform, len(data.train))
    net = scale.features if method == "frepo" else scale.network
    preset = "small" if method in ("dd", "mtt") else "paper"
    row = CostRow(method, data.name, scale.ipc, network=net, preset=preset, settings=settings)
    still = still_of(row, data, ours, asked.compile)
    now, at = still.fresh(), 0

    def step() -> None:
        nonlocal now, at
        now, _ = still.step(now, at)
        at += 1

    facts = facts_of(still)
    if method not in ("dc", "dsa"):
        return Side(lambda: {"step": seconds(step)}, facts, 2 if ours else 1)
    passes = still_of(replace(row, settings={**settings, "source.epochs": 1}), data, ours, asked.compile)
    slot, fetched, _, _ = passes.inputs_of(passes.fresh(), 0)
    zeros = tree_map(torch.zeros_like, passes.fresh().learned)

    def training() -> None:
        passes.update(passes.fresh(), 0, slot, fetched, zeros, ())

    return Side(lambda: {"step": seconds(step), "training": seconds(training)}, facts)


def still_of(row: CostRow, data: Data, ours: bool, compile: bool) -> Still:
    """The row's recipe, bound to data."""
    recipe = recipe_of(row, data)
    net = network(recipe.network, data.shape, data.task.outputs)
    exact = choose_precision("auto", "cpu", net, compile and recipe.objective.narrow_bf16) if ours else "fp32"
    counts = counts_per_group(row.ipc, data.counts)
    return Still(data, Settings(recipe, counts, 0, 0.0, 1000, "cpu", ours and compile, exact, torch.get_num_threads()))


def facts_of(still: Still) -> dict[str, Any]:
    """What a record says of how a step is computed."""
    return {
        "network": still.network.name,
        "precision": still.precision,
        "compile": still.settings.compile,
        "unroll": still.objective.way,
    }


def official_side(asked: Asked, ipc: int, augment: bool) -> Official:
    """The official code with the same images."""
    data, scale = noise(asked.scale), asked.scale
    if asked.official is None:
        raise SystemExit("--official is missing")
    real = data.prepare(data.train.inputs)
    return Official(asked.official, scale.official, real, data.train.labels, ipc, scale.real, augment)


def evaluation(asked: Asked, ipc: int, ours: bool) -> Side:
    """Training by protocol `dsa`: seconds of an epoch of one network, and of the pass over the test images."""
    data, epochs = noise(asked.scale), asked.scale.epochs[ipc]
    if not ours:
        test = (data.prepare(data.test.inputs), data.test.labels)
        go = official_side(asked, ipc, True).evaluation(epochs, test)
        return Side(go, {"network": asked.scale.official, "precision": "fp32", "compile": False}, 1)
    net, exact = _network(asked.scale.network, data)
    trainer = Trainer(net, replace(PROTOCOLS["dsa"], epochs=epochs), data.task, asked.compile, "cpu")
    rows = torch.cat([(data.train.labels == c).nonzero().flatten()[:ipc] for c in range(data.task.classes)])
    pair = (data.prepare(data.train.inputs[rows]), data.train.labels[rows])
    keys = [Key(0).fold(i) for i in range(NETWORKS)]

    def go_() -> dict[str, float]:
        states: list[Any] = []
        took = seconds(lambda: states.extend(trainer.fit([pair] * NETWORKS, keys, lambda n: None)))
        judged = seconds(lambda: trainer.score(states[0], data.test.inputs, data.test.labels, data.prepare))
        return {"epoch": took / epochs / NETWORKS, "test": judged}

    together = trainer.together(len(rows))
    return Side(
        go_, {"network": net.name, "precision": exact, "compile": asked.compile, "together": min(together, NETWORKS)}
    )


def _network(name: str, data: Data) -> tuple[Any, str]:
    net = network(name, data.shape, data.task.outputs)
    exact = choose_precision("auto", "cpu", net)
    return net.at(PRECISIONS[exact]), exact


def feature_pass(asked: Asked) -> Side:
    """Features of 256 images in four forms, and the machine's own matrix products."""
    net = network(asked.scale.network, (3, 32, 32), asked.scale.classes)
    state, x = net.init(Key(0)), Key(1).normal(8 if asked.toy else 256, 3, 32, 32)
    forms = {f"{p} {w}": compiled(net.at(PRECISIONS[p]).features, w == "compiled" and asked.compile) for p in ("fp32", "bf16")
             for w in ("eager", "compiled")}  # fmt: skip

    def go() -> dict[str, float]:
        with torch.no_grad():
            took = {form: seconds(lambda run=run: run(state, x)) for form, run in forms.items()}  # type: ignore[misc]
        for precision in ("fp32", "bf16"):
            took[f"{precision} product"] = 2 * SIDE**3 / matrix_product(precision, repeats=1)
        return took

    facts = {"network": net.name, "images": len(x), "flops": count_flops(lambda: net.features(state, x)), "product_flops": 2 * SIDE**3}  # fmt: skip
    return Side(go, facts, 3)


def _grey(asked: Asked) -> Data:
    return load_data("digits") if asked.toy else load_data("fashion-mnist")


def whole_epoch(asked: Asked, ours: bool) -> Side:
    """Steps of protocol `whole` on some of Fashion-MNIST: compiled, or a plain loop over a module in fp32."""
    data, protocol = _grey(asked), replace(PROTOCOLS["whole"], epochs=1, steps=0)
    few = data.train[slice(0, asked.scale.whole)]
    facts: dict[str, Any] = {"samples": len(few), "batch": protocol.batch}
    if ours:
        net, exact = _network(asked.scale.network, data)
        trainer = Trainer(net, protocol, data.task, asked.compile, "cpu")
        pair = (few.inputs, few.labels)
        facts |= {"network": net.name, "precision": exact, "compile": asked.compile}
        return Side(lambda: {"steps": seconds(lambda: trainer.fit([pair], [Key(0)], lambda n: None, data.prepare))}, facts)  # fmt: skip
    net = network(asked.scale.network, data.shape, data.task.outputs)
    module = plain_module(32 if asked.toy else 128, sum(name.startswith("conv") for name, _ in net.layers), data)
    inputs = data.prepare(few.inputs)
    rule = torch.optim.SGD(module.parameters(), lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay)  # fmt: skip

    def epoch() -> None:
        for index in torch.randperm(len(few)).split(protocol.batch):
            rule.zero_grad()
            nn.functional.cross_entropy(module(inputs[index]), few.labels[index]).backward()
            rule.step()

    facts |= {"network": net.name, "precision": "fp32", "compile": False}
    return Side(lambda: {"steps": seconds(epoch)}, facts, 1)


def plain_module(width: int, depth: int, data: Data) -> nn.Module:
    """The ConvNet as one would write it: convolution, instance norm, ReLU, average pool; a linear head."""
    channels, side = data.shape[0], data.shape[1]
    pad = -side % 2**depth // 2 + 1
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else channels, width, 3, padding=1 if i else pad), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]  # fmt: skip
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(data.task.outputs))


def whole_run(asked: Asked) -> Side:
    """Protocol `whole` on all of Fashion-MNIST, once, to its accuracy on the test data."""
    data = _grey(asked)
    net, exact = _network(asked.scale.network, data)
    trainer = Trainer(net, PROTOCOLS["whole"], data.task, asked.compile, "cpu")
    facts: dict[str, Any] = {"network": net.name, "precision": exact, "compile": asked.compile, "protocol": PROTOCOLS["whole"].hash}  # fmt: skip

    def go() -> dict[str, float]:
        states: list[Any] = []
        pair = (data.train.inputs, data.train.labels)
        took = seconds(lambda: states.extend(trainer.fit([pair], [Key(0)], lambda n: None, data.prepare)))
        facts["accuracy"] = trainer.score(states[0], data.test.inputs, data.test.labels, data.prepare)
        return {"run": took}

    return Side(go, facts, 0)


def build(row: str, side: str, asked: Asked) -> Side:
    """A side of a row."""
    ours = side == "ours"
    if row in ("dm", "dc", "dsa") and not ours:
        code = official_side(asked, asked.scale.ipc, row != "dc")
        go = code.matching_features() if row == "dm" else code.matching_gradients()
        return Side(go, {"network": asked.scale.official, "precision": "fp32", "compile": False}, 1)
    if row.startswith("evaluation-"):
        return evaluation(asked, int(row.split("-")[1]) // 10, ours)
    if row == "feature-pass":
        return feature_pass(asked)
    if row == "whole-epoch":
        return whole_epoch(asked, ours)
    if row == "whole-run":
        return whole_run(asked)
    return step_of(row, asked, ours)


def resident() -> int:
    """Bytes of this process in memory now: the peak after a new one has begun."""
    reset_peak()
    return peak_bytes()


def rounds(side: Side) -> Iterator[dict[str, Any]]:
    """Answers of a process: warmed up; then one for each line on standard input; at the end what memory it took."""
    before = resident()
    begin = time.perf_counter()
    for _ in range(side.warm):
        side.go()
    yield {"warm_seconds": round(time.perf_counter() - begin, 3)}
    reset_peak()  # what compiling took is not the step's
    for line in sys.stdin:
        if line.strip() != "go":
            break
        yield {"seconds": side.go()}
    yield {"facts": side.facts, "peak_bytes": peak_bytes(), "baseline_bytes": before}


def main() -> None:
    """Build, then answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row")
    parser.add_argument("side")
    parser.add_argument("--scale", default="full", choices=tuple(SCALES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--official", type=Path)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a side prints is no answer
    torch.set_num_threads(args.threads)
    with suppress(OSError):  # if the machine runs out of memory, then this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    if args.side == "ours":
        keep_memory()  # as in every run of ours; the other side has the system's allocator as it is
    side = build(args.row, args.side, Asked(SCALES[args.scale], args.scale == "toy", args.official, not args.eager))
    for answer in rounds(side):
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
