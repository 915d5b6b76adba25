"""What each of the two processes does that tests/test_parallel.py starts with torchrun; what it finds goes into a file per rank.

Steps are compared here, where both the shared step and that of one process can be made; pytest reads the findings.
"""

import copy
import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import potstill
from potstill import cli, experts, loop, still, training
from potstill.errors import Stopped
from potstill.functional import leaves, tree_map
from potstill.launch import restarts
from potstill.methods import METHODS
from potstill.objectives import DistributionMatching, Net
from potstill.parallel import Group, Sharing, joined
from potstill.recipe import change
from potstill.recorder import Recorder
from potstill.still import Settings, Still
from potstill.testing import toy

NETWORK = {"network": "convnet-w8", "student": "convnet-w8"}
SMALL = {**NETWORK, "objective.real": 8, "looks": 1}
STEPS = {  # a method and what it is given: real samples that two processes cannot halve, and a class that has but one
    "dm": {"objective.real": 7},
    "dm-all": {"objective.real": 7, "augment.mode": "all"},
    "dm-each": {},
    "dc": {"objective.real": 7, "source.epochs": 1, "source.lifetime": 3, "network": "convnet-batch-w8"},
    "dsa": {"objective.real": 7, "source.epochs": 1, "source.lifetime": 2},
    "dd": {"objective.real": 9, "objective.steps": 3},
    "frepo": {"objective.real": 9, "source.size": 2, "source.lifetime": 2},
    "kip": {"objective.real": 9},
}


def double(tree):
    return tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree)


class Double(Still):
    """A run that computes in float64."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        fetch, self.source = self.source.fetch, copy.copy(self.source)

        def fetched(*args):
            slot, net = fetch(*args)
            return slot, Net(net.network, *double(tuple(net)[1:]))

        object.__setattr__(self.source, "fetch", fetched)

    def _memory(self):
        return {}  # of the walk back, in mixed precision

    def batch(self, index, mask, later=False):
        return type(made := super().batch(index, mask, later))(*double(tuple(made)))

    def inputs_of(self, now, step):
        slot, net, real, draws = super().inputs_of(now, step)
        return slot, net, real, double(draws)

    def fresh(self):
        return type(now := super().fresh())(*double(tuple(now)))

    def synthetic(self, learned):
        s = super().synthetic(learned)
        return replace(s, fixed=double(s.fixed), mask=s.mask.double())


@dataclass(frozen=True)
class Each(DistributionMatching):
    """Distribution matching with a draw of its own for each real sample."""

    def draws(self, key, sizes):
        each = self.augment.draws(key.fold("real"), sizes.groups, sizes.real // sizes.groups)
        return {**super().draws(key, sizes), "real": each}

    def target(self, real, net, draws):
        return self._means(real.inputs, real.mask, net, {"augment": draws["real"]})


def recipe_for(name, given):
    base = METHODS[name.partition("-")[0]]("small", 2)
    if name == "dm-each":
        return replace(change(base, NETWORK), objective=Each(real=7))
    own = {} if name == "kip" else NETWORK
    return change(base, {**own, **given})


def made(recipe, mode, group, kind=Double):
    data = toy(sizes=(12, 9, 1))
    settings = Settings(recipe, [1, 2, 1], 0, 0.0, 8, "cpu", False, "fp32", 1, parallel=mode, ranks=group.size)
    return kind(data, settings, group=group)


def steps_of(run, count=3):
    now, losses = run.fresh(), []
    for i in range(count):
        now, loss = run.step(now, i)
        losses.append(loss)
    return now, losses


def apart(a, b):
    """The largest difference of two trees, relative to the largest number of the leaf."""
    pairs = zip(leaves(a), leaves(b), strict=True)
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-300)) for x, y in pairs)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def agreed(group, tree):
    """Whether all ranks hold the same bits."""
    return all(equal(other, tree) for other in group.gather(tree))


def batch(group, found):
    """Each method's shared steps beside those of one process, both in float64."""
    for name, given in STEPS.items():
        recipe = recipe_for(name, given)
        one, one_losses = steps_of(made(recipe, "alone", Group()))
        now, losses = steps_of(made(recipe, "batch", group))
        moved = apart(made(recipe, "alone", Group()).fresh().learned, one.learned)
        found[name] = {
            "learned": apart(now.learned, one.learned),
            "loss": apart(torch.tensor(losses, dtype=torch.float64), torch.tensor(one_losses, dtype=torch.float64)),
            "moved": moved,
            "same": agreed(group, now.learned),
        }


def networks(group, found):
    """The gradient is the mean of what each rank's network gives; rank 0 has the network of a run alone."""
    for name in ("dm", "frepo", "dd"):
        recipe = recipe_for(name, STEPS[name])
        shared = made(recipe, "networks", group)
        now = shared.fresh()
        each = []
        for rank in range(group.size):
            run = made(recipe, "alone", Group())
            run.sharing = Sharing(Group(rank, group.size), "networks")
            _, net, real, draws = run.inputs_of(now, 0)
            each.append((net.state, run.value_and_grad(now, run.target(net, real, draws), net, draws)))
        alone = made(recipe, "alone", Group()).inputs_of(now, 0)
        _, net, real, draws = shared.inputs_of(now, 0)
        loss, grads, _ = shared.value_and_grad(now, shared.target(net, real, draws), net, draws)
        _, grads = shared.sharing.gradient(loss, grads, real)
        mean = tree_map(lambda a, b: (a + b) / 2, each[0][1][1], each[1][1][1])
        after, _ = steps_of(shared)
        found[name] = {
            "gradient": apart(grads, mean),
            "first": equal(tuple(each[0][0]), tuple(alone[1].state)),
            "another": not equal(tuple(each[1][0]), tuple(alone[1].state)),
            "own": equal(tuple(net.state), tuple(each[group.rank][0])),
            "same": agreed(group, after.learned),
            "pools": agreed(group, [x for x in leaves(after.pool) if isinstance(x, torch.Tensor)]),
        }


def distilled(group, out, name, steps=9, method="frepo", **options):
    """A short run with a pool of networks for each rank, unless told otherwise."""
    options = {"parallel": "networks", "preset": "small", "settings": {**SMALL, **POOL}, **options}
    return potstill.distill(toy(), method, ipc=2, out=out / name, steps=steps, evaluate=False, group=group, **options)


def runs(group, out, found):
    """Whole runs: resumed ones end as others do, whatever pools the ranks have; a time budget is one number of steps."""

    run = partial(distilled, group, out)
    whole = run("whole")
    good = Still.step

    def stops(self, now, step):
        after, loss = good(self, now, step)
        return (after, float("nan")) if step == 5 else (after, loss)

    Still.step = stops
    try:
        run("cut")
    except Stopped as error:
        found["stopped"] = str(error)
    Still.step = good
    again = run("cut", resume=True)
    found["resumed"] = (
        torch.equal(whole.set.inputs, again.set.inputs) and whole.record["curve"] == again.record["curve"]
    )
    found["command"] = whole.record["command"]
    found["set"] = agreed(group, whole.set.inputs)
    found["minutes"] = run("timed", None, minutes=0.02).record["steps"]
    try:
        run("whole", resume=True, parallel="batch")
    except potstill.PotstillError as error:
        found["other"] = str(error)
    found["batch"] = run("batch", **{**BATCH, "parallel": None}).record["choices"]["parallel"]
    short = {"objective.steps": 2, "source.span": 1, "source.max_start": 1, "looks": 1, **NETWORK}
    mtt = change(METHODS["mtt"]("small"), short)
    made = run("mtt", 3, method=mtt, parallel=None, experts=out / "two", settings={})
    found["mtt"] = [made.record["choices"]["parallel"], agreed(group, made.set.inputs)]
    return whole


POOL = {"source.size": 2, "source.lifetime": 3}
BATCH = {"method": "dm", "parallel": "batch", "settings": SMALL}
RECORDING = {"count": 3, "epochs": 2, "network": "convnet-w8", "batch": 8}


def recordings(group, out):
    """Experts: three by two processes, and by one."""
    experts.record(toy(), out=out / "two", group=group, **RECORDING)
    if group.leads:
        experts.record(toy(), out=out / "one", **RECORDING)
    first = experts.record

    def cut(*args, **rest):
        return first(*args, **{**rest, "count": 1})

    cut(toy(), out=out / "resumed", group=group, **RECORDING)
    experts.record(toy(), out=out / "resumed", group=group, resume=True, **RECORDING)


def evaluations(group, whole, found):
    """The networks of a number, divided and not."""
    for name, many in (("one by one", 1), ("side by side", 16)):
        training.MANY = many
        asked = {"networks": ["convnet-w8"], "baselines": ["random", "random-soft", "whole"], "repeats": 3}
        shared = potstill.evaluate(whole.set, toy(), protocol="dc", group=group, **asked)
        alone = potstill.evaluate(whole.set, toy(), protocol="dc", **asked)
        found[name] = [[r.accuracies for r in results] for results in (shared, alone)]
        found["methods"] = [r.method for r in shared]


def compare(group, out):
    """Everything that is held beside what one process makes."""
    found = {name: {} for name in ("batch", "networks", "runs", "evaluations")}
    batch(group, found["batch"])
    networks(group, found["networks"])
    recordings(group, out)
    whole = runs(group, out, found["runs"])
    evaluations(group, whole, found["evaluations"])
    found["threads"] = torch.get_num_threads()
    (out / f"rank{group.rank}.json").write_text(json.dumps(found))
    group.share(None)
    plain = ["--network", "convnet-w8", "--set", "looks=0", "--set", "objective.real=4", "--no-evaluate"]
    assert (
        cli.main(["distill", "digits", "--steps", "2", *plain, "--parallel", "batch", "--out", str(out / "cli")]) == 0
    )


def dies(group, at, number):
    """Rank 1 kills itself without warning at this step of the run of this number, if it is the first time."""
    if at == 5 and group.rank == 1 and restarts() == number:
        os.kill(os.getpid(), signal.SIGKILL)


def killed(group, out, number, name, **options):
    """A run once more, in which rank 1 dies; torchrun starts both processes again."""
    good = Still.step

    def step(self, now, step):
        dies(group, step, number)
        return good(self, now, step)

    Still.step = step
    distilled(group, out, name, say=lambda line: print(line, flush=True) if "resumed" in line else None, **options)
    Still.step = good


def killed_recording(group, out, number):
    """The recording once more; rank 1 dies in the second epoch of its first expert."""
    good = Recorder.go_on

    def go_on(self, now):
        if restarts() > number:
            print(f"rank {group.rank} goes on with expert {now.expert} at step {now.step}", flush=True)
        for after in good(self, now):
            dies(group, after.step, number)
            yield after

    Recorder.go_on = go_on
    experts.record(toy(), out=out / "killed-experts", group=group, **RECORDING)
    Recorder.go_on = good


def mistaken(group, out):
    """A mistake on one rank while the other is in the middle of a step."""

    def broken(self, now, step):
        raise potstill.PotstillError(f"a planted mistake on rank {group.rank}")

    if group.rank == 1:
        Still.step = broken
    return cli.main(["distill", "digits", "--steps", "3", "--network", "convnet-w8", "--out", str(out / "error")])


def main(out):
    """All of it in one start and a restart for each death: what ended before is not begun again."""
    deaths = [
        lambda number: killed(group, out, number, "killed"),
        lambda number: killed(group, out, number, "killed-batch", **BATCH),
        lambda number: killed_recording(group, out, number),
    ]
    with joined() as group:
        if not restarts():
            compare(group, out)
        for number in range(max(restarts() - 1, 0), len(deaths)):
            deaths[number](number)
        sys.exit(mistaken(group, out))


if __name__ == "__main__":
    loop.SAVE_EVERY = 0.0
    still.LOOK = replace(still.LOOK, epochs=5)
    for name in ("dc", "whole"):
        training.PROTOCOLS[name] = replace(training.PROTOCOLS[name], epochs=5, steps=0)
    os.environ["POTSTILL_CACHE"] = str(Path(sys.argv[1]) / f"cache{os.environ['RANK']}")
    main(Path(sys.argv[1]))
