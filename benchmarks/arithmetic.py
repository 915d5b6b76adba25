"""What one step of each method takes at any size, counted on tensors that have a shape and no numbers: no data, no GPU, no timing.

python benchmarks/arithmetic.py growth [--methods dm,frepo] [--classes 1000] [--side 64] [--ipc 10]
python benchmarks/arithmetic.py hours --rate 125 --double 7.8 [--methods ...]
python benchmarks/arithmetic.py step METHOD CLASSES SIDE IPC [--seconds S] [--set objective.steps=20]
python benchmarks/arithmetic.py check

Matrix products and convolutions are counted by PyTorch's own formulas (`torch.utils.flop_counter`), factorisations and
triangular solves by the textbook's. `check` holds counts and bytes against real steps on small data.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from potstill.cli import columns, settings_of
from potstill.costs import Stretch, operations
from potstill.data import Classification
from potstill.estimate import Live, words
from potstill.functional import Key, Tree, leaves, tree_map
from potstill.methods import METHODS
from potstill.networks import network
from potstill.objectives import ByGroup, Net, Real, Sizes, Unroll
from potstill.recipe import Recipe, change, find
from potstill.replay import Experts
from potstill.sources import Pool
from potstill.still import Settings, Still
from potstill.synthetic import Synthetic, first_labels, group_index
from potstill.testing import toy

ALL = tuple(name for name in METHODS if find(name, "paper").objective is not None)
PLACES = (  # classes, side, images per class of the table of hours
    (10, 32, 10), (200, 64, 10), (1000, 64, 1), (1000, 64, 10), (1000, 64, 50), (1000, 224, 10),
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of one step.

    Args:
        flops: By phase: `real`, `synthetic`, `update`.
        solves: What of these are factorisations and triangular solves.
        double: What of these is in float64, solves included.
        peak: Bytes of the tensors alive at once: S, the real batch, the network, and the most of what a phase makes.
        gradient: Bytes of what the phase `synthetic` makes.
        real: Bytes of the real batch, drawn whole.
        target: Bytes of the target, where the real side can be split by averaging targets; else 0.
        learned: Bytes of what is learned of S.
    """

    flops: dict[str, float]
    solves: float
    double: float
    peak: int
    gradient: int
    real: int
    target: int
    learned: int

    @property
    def total(self) -> float:
        return sum(self.flops.values())


SOLVES: dict[Any, Callable[..., float]] = {  # Golub and Van Loan, Matrix Computations, sections 3.1 and 4.2
    torch.ops.aten.linalg_cholesky_ex: lambda a, *rest: a[-1] ** 3 / 3,
    torch.ops.aten.cholesky_solve: lambda b, a, *rest: 2.0 * a[-1] ** 2 * b[-1],
    torch.ops.aten.linalg_solve_triangular: lambda a, b, *rest: float(math.prod(b)) * a[-1],
    torch.ops.aten.triangular_solve: lambda b, a, *rest: float(math.prod(b)) * a[-1],
}


class Counted(TorchDispatchMode):
    """Floating-point operations of what runs while this is entered: all, those of solves, those with a result in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.solves = self.double = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, packet, made = func(*args, **(kwargs or {})), func._overloadpacket, 0.0
        if packet in flop_registry:
            made = float(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        elif packet in SOLVES:
            made = SOLVES[packet](*(tuple(a.shape) for a in args if isinstance(a, Tensor)))
            self.solves += made
        self.all += made
        if made and next(t for t in leaves(out) if isinstance(t, Tensor)).dtype == torch.float64:
            self.double += made
        return out


@dataclass(frozen=True)
class Ran:
    """What a function gave; its operations, all, of solves and in float64; the most bytes alive beside its arguments."""

    out: Tree
    counts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    peak: int = 0

    def times(self, often: float) -> tuple[float, float, float]:
        return tuple(often * c for c in self.counts)  # type: ignore[return-value]


def ran(function: Callable[..., Tree], *args: Tree) -> Ran:
    """Run it once, counting."""
    with Live(args) as live, Counted() as counted:
        out = function(*args)
    return Ran(out, (counted.all, counted.solves, counted.double), live.peak)


def size(tree: Tree) -> int:
    """Bytes."""
    return sum(t.nbytes for t in leaves(tree) if isinstance(t, Tensor))


def cost(recipe: Recipe, classes: int, shape: tuple[int, ...], ipc: int) -> Cost:
    """One step of a recipe, as the loop takes it without compiling and without a budget of memory.

    The real side is taken a class at a time where that is allowed, the gradient where the objective asks for it. A walk is
    followed for two and for three steps: each further one takes what the third takes.
    """
    objective, source = recipe.objective, recipe.source
    assert objective is not None and source is not None
    if isinstance(objective, Unroll) and objective.steps > 3:
        two, three = (cost(replace(recipe, objective=replace(objective, steps=n)), classes, shape, ipc) for n in (2, 3))
        more, keeps = objective.steps - 2, two.peak + (objective.steps - 2) * (three.peak - two.peak)
        flops = {k: v + more * (three.flops[k] - v) for k, v in two.flops.items()}
        gradient = two.gradient + more * (three.gradient - two.gradient)
        return replace(two, flops=flops, peak=keeps, gradient=gradient)
    task = Classification(classes, "squared" if recipe.labels == "centred" else "cross-entropy")
    objective = replace(objective, augment=recipe.augment, task=task)
    if isinstance(objective, Unroll) and objective.memory == "auto":
        objective = replace(objective, memory="adjoint")  # what long walks take
    needs, samples = objective.needs, classes * ipc
    net, rates = network(recipe.network, shape, classes), objective.start_rates()
    by_group = isinstance(needs.real, ByGroup)
    count = 0 if needs.real is None else needs.real.count
    sizes = Sizes(classes, samples, count * (classes if by_group else 1))
    drawn = objective.draws(Key(0), sizes)
    numbers = torch.arange(classes).repeat_interleave(ipc)
    index, mask = group_index(numbers, classes)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        drawn, index, mask = tree_map(
            lambda t: fake.from_tensor(t) if isinstance(t, Tensor) else t, (drawn, index, mask)
        )
        state, goal = net.init(Key(0)), net.init(Key(1)) if needs.goal else None
        held = Net(net, state, goal)
        everything = {"inputs": torch.empty(samples, *shape), "labels": first_labels(fake.from_tensor(numbers), classes, recipe.labels)}  # fmt: skip
        everything |= {} if rates is None else {"lr": torch.empty(len(rates))}
        learned = {k: everything[k] for k in recipe.learn}
        s = Synthetic(learned, {k: v for k, v in everything.items() if k not in learned}, index, mask, recipe.labels)
        parts = classes if by_group and objective.separable(net) else 1
        real, some = None, tree_map(lambda t: t[:1], drawn) if parts > 1 else drawn
        if needs.real is not None:
            leading = (classes // parts, count) if by_group else (count,)
            labels = torch.zeros(leading, dtype=torch.int64)
            real = Real(torch.empty(*leading, *shape), labels, torch.ones(leading))
        with torch.no_grad():
            one = ran(objective.target, real, held, some)
        whole = tree_map(lambda t: t.expand(classes, *t.shape[1:]) if parts > 1 else t, one.out)
        if objective.in_parts:
            s, rows = replace(s, index=index[:1], mask=mask[:1]), one.out
        else:
            rows, some = whole, drawn
        made = ran(objective.value_and_grad, s, rows, held, some, ())
        times = classes if objective.in_parts else 1
        trained, often = Ran(()), 0.0
        if isinstance(source, Pool) and source.lifetime > 1 and source.epochs:
            batch = min(source.batch, samples)
            often = source.epochs * samples / batch
            often = min(often, source.limit) if source.limit else often
            often *= (source.lifetime - 1) / source.lifetime  # the last step of a network trains it no more
            index = torch.zeros(batch, dtype=torch.int64)
            augment = tree_map(fake.from_tensor, recipe.augment.draws(Key(0), 1, batch))
            step, slow = source.train_step(net, recipe.augment, task), source.optimiser.init(state.params)
            trained = ran(step, state, slow, *s.take(index), augment)
    phases = {"real": one.times(parts), "synthetic": made.times(times), "update": trained.times(often)}
    batch_bytes, target = parts * size(real), size(whole)
    gradient = made.peak + (2 * size(learned) if objective.in_parts else 0)
    most = max(one.peak + target, gradient + (target if by_group else 0), trained.peak)
    return Cost(
        {name: counts[0] for name, counts in phases.items()},
        sum(counts[1] for counts in phases.values()),
        sum(counts[2] for counts in phases.values()),
        size(learned) + size(tuple(state)) + batch_bytes + most,
        gradient,
        batch_bytes,
        target if by_group else 0,
        size(learned),
    )


def of(method: str, classes: int, side: int, ipc: int, settings: Sequence[str] = ()) -> tuple[Recipe, Cost]:
    """A method with its paper's numbers on colour images, perhaps with some changed."""
    recipe = find(method, "paper", ipc)
    recipe = change(recipe, settings_of(settings)) if settings else recipe
    return recipe, cost(recipe, classes, (3, side, side), ipc)


def power(more: float, less: float, by: float) -> str:
    """The exponent with which something grows."""
    return f"{math.log(more / less) / math.log(by):.2f}" if less else "-"


def growth(methods: Sequence[str], classes: int, side: int, ipc: int) -> list[tuple[str, ...]]:
    """One step at a place, and the powers of classes, pixels and images per class with which it grows from there on."""
    head = ("method", "TFLOP", "real", "synthetic", "update", "~classes", "~pixels", "~ipc", "bytes", "~classes", "~pixels",
            "~ipc", "exchanged")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for method in methods:
        here = of(method, classes, side, ipc)[1]
        kept = find(method, "paper", ipc)
        others = [
            (cost(kept, 2 * classes, (3, side, side), ipc), 2),
            (cost(kept, classes, (3, 2 * side, 2 * side), ipc), 4),
            (cost(kept, classes, (3, side, side), 2 * ipc), 2),
        ]
        shares = [f"{100 * here.flops[k] / here.total:.0f} %" for k in ("real", "synthetic", "update")]
        work = [power(there.total, here.total, by) for there, by in others]
        room = [power(there.peak, here.peak, by) for there, by in others]
        rows.append((method, f"{here.total / 1e12:.3g}", *shares, *work, words(here.peak), *room, words(here.target or here.learned)))  # fmt: skip
    return rows


def hours(methods: Sequence[str], rate: float, double: float) -> list[tuple[str, ...]]:
    """Hours of all steps at the places, at so many operations a second, those in float64 apart; and the bytes of a step."""
    rows = [("method", *(f"{c} x {s} px x {n}" for c, s, n in PLACES))]
    for method in methods:
        row = [method]
        for place in PLACES:
            recipe, found = of(method, *place)
            each = (found.total - found.double) / (1e12 * rate) + found.double / (1e12 * double)
            row.append(f"{each * recipe.steps / 3600:.3g} h, {words(found.peak)}")
        rows.append(tuple(row))
    return rows


def check() -> list[tuple[str, ...]]:
    """Counts and bytes against real steps: three classes of 8 x 8, narrow networks.

    Raises:
        SystemExit: A count that is not the same, or bytes that are more than a tenth apart.
    """
    data = toy(sizes=(12, 12, 12))
    rows: list[tuple[str, ...]] = [("method", "ipc", "counted", "real step", "bytes", "real step")]
    for method in ALL:
        for ipc in (1, 2):
            recipe = find(method, "paper", ipc)
            objective, source = recipe.objective, recipe.source
            assert objective is not None
            if recipe.objective.needs.network:  # type: ignore[union-attr]
                recipe = change(recipe, {"network": recipe.network + "-w8"})
            if hasattr(objective, "real"):
                objective = replace(objective, real=8)
            if isinstance(objective, Unroll):
                objective = replace(objective, steps=5, memory="adjoint")
            if isinstance(source, Experts):
                source = Stretch(span=1)
            if isinstance(source, Pool) and source.epochs:
                source = replace(source, lifetime=4, batch=3 * ipc)
            recipe = replace(recipe, objective=objective, source=source)
            found = cost(recipe, 3, data.shape, ipc)
            still = Still(data, Settings(recipe, [ipc] * 3, 0, 0.0, 8, "cpu", False, "fp32", 1))
            now = still.fresh()
            counted = operations(still, now)
            if isinstance(source, Pool) and source.epochs:
                counted["update"] *= (source.lifetime - 1) / source.lifetime
            _, net, real, draws = still.inputs_of(now, 0)
            target = still.target(net, real, draws)
            with Live((now, target, net, draws, still.start.index, still.start.fixed)) as live:
                still.value_and_grad(now, target, net, draws)
            ours, theirs = found.total - found.solves, sum(counted.values())
            rows.append((method, str(ipc), f"{ours:.0f}", f"{theirs:.0f}", str(found.gradient), str(live.peak)))
            if ours != theirs or abs(found.gradient / live.peak - 1) > 0.1:
                print(columns(rows))
                raise SystemExit(f"{method}, {ipc} images per class: what is counted is not what a step does")
    return rows


def main() -> None:
    """Count, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    g, h, s, _ = (commands.add_parser(name) for name in ("growth", "hours", "step", "check"))
    for p in (g, h):
        p.add_argument("--methods", default=",".join(ALL))
    g.add_argument("--classes", type=int, default=1000)
    g.add_argument("--side", type=int, default=64)
    g.add_argument("--ipc", type=int, default=10)
    h.add_argument("--rate", type=float, required=True, help="10^12 operations a second that are reached")
    h.add_argument("--double", type=float, required=True, help="the same in float64")
    s.add_argument("method")
    for name in ("classes", "side", "ipc"):
        s.add_argument(name, type=int)
    s.add_argument("--seconds", type=float, help="that a published step took: prints the rate that this comes to")
    s.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "check":
        print(columns(check()))
    elif args.command == "step":
        _, found = of(args.method, args.classes, args.side, args.ipc, args.set)
        print(found)
        if args.seconds:
            print(f"{found.total / 1e12 / args.seconds:.3g} TFLOP/s")
    else:
        names = args.methods.split(",")
        made = growth(names, args.classes, args.side, args.ipc) if args.command == "growth" else hours(names, args.rate, args.double)  # fmt: skip
        for i, row in enumerate(made):
            print("| " + " | ".join(row) + " |")
            if not i:
                print("|" + " --- |" * len(row))


if __name__ == "__main__":
    main()
