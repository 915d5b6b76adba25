"""Protocols: train fresh networks on a set, read the score on the test data once. Any set, however it was made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .augment import Augment
from .compiling import (
    EAGER_FLOPS,
    LARGE,
    PRECISIONS,
    check_device,
    choose_compile,
    choose_precision,
    compiled,
    sample_flops,
)
from .data import Classification, Data, load_data
from .errors import PotstillError, unknown
from .exchange import DistilledSet, load
from .functional import SGD, Key, Tree
from .measure import peak_bytes, reset_peak
from .methods import DSA
from .networks import Network, State, blend, network
from .records import digest, write_json
from .synthetic import pick_random

Say = Callable[[str], None]
MANY = 16  # small networks are trained side by side, so many at most


@dataclass(frozen=True)
class Protocol:
    """How networks are trained on a set. Frozen; its hash stands beside every number.

    Args:
        name: What `--protocol` calls it.
        epochs: Passes over the set.
        steps: At least so many steps: more passes where the set is small.
        batch: Samples per step, all of them where the set is smaller.
        lr: Learning rate of SGD.
        momentum: Of SGD.
        weight_decay: Of SGD.
        schedule: `drop` (a tenth of the rate after half of the steps) or `cycle` (up to the rate over a fifth of the
            steps, then down to nothing, both linear).
        augment: Drawn anew for every step; the operation per step, its parameters per sample.
    """

    name: str
    epochs: int
    steps: int = 0
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "drop"
    augment: Augment = Augment()

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits; two numbers may be compared where it is the same."""
        return digest(asdict(self))

    def plan(self, samples: int) -> tuple[int, int]:
        """Epochs, and steps in each. A partial batch is kept where a set has few batches, left out elsewhere."""
        full, rest = divmod(samples, self.batch)
        each = full + (rest > 0) if full < 10 else full
        return max(self.epochs, -(-self.steps // each)), each

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step."""
        if self.schedule == "drop":
            return self.lr if step < (total + 1) // 2 else 0.1 * self.lr
        rise = 0.2 * total
        return self.lr * min((step + 1) / rise, (total - step) / (total - rise))


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("dc", epochs=300),
        Protocol("dsa", epochs=1000, augment=DSA),
        Protocol("whole", epochs=10, steps=600, batch=128, lr=0.05, schedule="cycle"),
    )
}
LOOK = Protocol("look", epochs=200)  # what a run looks at held-out accuracy with: short, no augmentation


@dataclass(frozen=True)
class Result:
    """One set, one network, one protocol: the scores of several fresh networks.

    `spread` says what varies between the scores: `networks` (one set) or `sets and networks` (a set drawn anew for
    each network).
    """

    set: str
    method: str
    dataset: str
    ipc: int | list[int] | None
    network: str
    protocol: str
    protocol_hash: str
    repeats: int
    spread: str
    metric: str
    accuracies: list[float]
    accuracy_mean: float
    accuracy_std: float
    images: int
    seed: int
    compile: str
    precision: str
    seconds: float
    peak_bytes: int


class Trainer:
    """Trains networks of one kind by one protocol, several at once where each is small.

    Args:
        net: The network.
        protocol: How it is trained.
        task: Loss and score.
        compile: Whether a step is compiled.
        device: Where.
        together: Networks trained side by side in one step, one where the network is large, if absent.
    """

    def __init__(
        self, net: Network, protocol: Protocol, task: Classification, compile: bool, device: str, together: int | None = None
    ) -> None:
        self.net, self.protocol, self.task, self.device = net, protocol, task, device
        self.together = together or (1 if sample_flops(net) > LARGE else MANY)
        self.optimiser = SGD(protocol.lr, protocol.momentum, protocol.weight_decay)
        self._step = compiled(self._update, compile)
        self._logits = compiled(self._predict, compile)

    def _one(self, state: State, slow: Tree, x: Tensor, y: Tensor, rate: Tensor) -> tuple[State, Tree, Tensor]:
        def loss(params: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            logits, seen = self.net.forward(State(params, state.buffers), x, "batch")
            value = self.task.loss(logits, y)
            return value, (value, seen)

        grads, (value, seen) = torch.func.grad(loss, has_aux=True)(state.params)
        params, slow = self.optimiser.update(state.params, grads, slow, rate)
        return State(params, blend(state.buffers, seen)), slow, value

    def _update(self, states: Tree, slow: Tree, x: Tensor, y: Tensor, draws: Tree, rate: Tensor) -> Tree:
        """One step of the networks side by side; every leaf has a leading axis for them."""
        x = self.protocol.augment(x, draws)
        if len(x) > 1:
            state, slow, value = torch.vmap(self._one, in_dims=(0, 0, 0, 0, None))(states, slow, x, y, rate)
            return state, slow, value
        first = torch.utils._pytree.tree_map(lambda t: t[0], (states, slow))
        out = self._one(first[0], first[1], x[0], y[0], rate)
        return torch.utils._pytree.tree_map(lambda t: t[None], out)

    def _predict(self, state: State, x: Tensor) -> Tensor:
        return self.net(state, x, "stored")

    def flops(self, samples: int) -> float:
        """Floating-point operations of training one network: forward and twice as much backward."""
        epochs, each = self.protocol.plan(samples)
        return 3 * sample_flops(self.net) * min(self.protocol.batch, samples) * epochs * each

    def fit(self, sets: Sequence[tuple[Tensor, Tensor]], keys: Sequence[Key], tick: Callable[[int], object]) -> list[State]:
        """Train one network on each set; all sets have the same size.

        Args:
            sets: (inputs (M, *shape) prepared, labels (M,) or (M, C)) for each network.
            keys: One for each network.
            tick: Called after each step with the number of networks that made it.
        """
        states: list[State] = []
        for i in range(0, len(sets), self.together):
            states += self._fit(sets[i : i + self.together], keys[i : i + self.together], tick)
        return states

    def _fit(self, sets: Sequence[tuple[Tensor, Tensor]], keys: Sequence[Key], tick: Callable[[int], object]) -> list[State]:
        samples = len(sets[0][0])
        batch = min(self.protocol.batch, samples)
        epochs, each = self.protocol.plan(samples)
        made = [self.net.init(key.fold("weights")) for key in keys]
        states = State(*torch.utils._pytree.tree_map(lambda *t: torch.stack(t).to(self.device), *map(tuple, made)))
        slow = self.optimiser.init(states.params)
        x, y = (torch.stack([s[j] for s in sets]).to(self.device) for j in (0, 1))
        rows = torch.arange(len(sets))[:, None]
        for epoch in range(epochs):
            draws = [self.protocol.augment.draws(key.fold("augment", epoch), each, batch) for key in keys]
            order = torch.stack([key.fold("order", epoch).permutation(samples) for key in keys])
            for j in range(each):
                at = order[:, j * batch : (j + 1) * batch]
                # the operation is drawn per step (1), its parameters per sample (batch)
                drawn = {k: torch.stack([d[k][j, : at.shape[1]] for d in draws]).to(self.device) for k in draws[0]}
                rate = torch.tensor(self.protocol.rate(epoch * each + j, epochs * each), device=self.device)
                states, slow, _ = self._step(states, slow, x[rows, at], y[rows, at], drawn, rate)
                tick(len(sets))
        return [State(*torch.utils._pytree.tree_map(lambda t, r=r: t[r], tuple(states))) for r in range(len(sets))]

    def score(self, state: State, inputs: Tensor, labels: Tensor, prepare: Callable[[Tensor], Tensor]) -> float:
        """The task's score on raw inputs (N, *shape), in batches of one static size."""
        batch = min(500, len(inputs))
        parts = []
        with torch.no_grad():
            for start in range(0, len(inputs), batch):
                at = torch.arange(start, start + batch).clamp(max=len(inputs) - 1)  # the last batch repeats its end
                logits = self._logits(state, prepare(inputs[at]).to(self.device))
                parts.append(logits[: len(inputs) - start].cpu())
        return self.task.score(torch.cat(parts), labels)


def fitting(augment: Augment, data_mirror: bool, shape: tuple[int, ...]) -> Augment:
    """An augmentation without what the data do not bear: mirroring digits, moving vectors."""
    if len(shape) != 3:
        return Augment()
    return augment if data_mirror else replace(augment, ops=tuple(op for op in augment.ops if op != "flip"))


def protocol_of(name: str) -> Protocol:
    """A protocol by name."""
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS, "`potstill list protocols` shows all")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Judge:
    """Evaluates sets of one data set under one protocol: the part that a set's own number and its baselines share."""

    data: Data
    protocol: Protocol
    repeats: int = 5
    seed: int = 0
    device: str = "cpu"
    compile: str = "auto"
    precision: str = "auto"
    say: Say = lambda line: None
    bar: Callable[[int, str], Any] | None = None

    def judge(
        self,
        name: str,
        method: str,
        ipc: int | list[int] | None,
        sets: Sequence[tuple[Tensor, Tensor]],
        prepare: Callable[[Tensor], Tensor],
        net_name: str,
        varied: bool = False,
    ) -> Result:
        """Scores on the test data of networks trained on the given sets, one each."""
        net = network(net_name, self.data.shape, self.data.task.outputs)
        precision = choose_precision(self.precision, self.device, net)
        net = net.at(PRECISIONS[precision])
        fitted = replace(self.protocol, augment=fitting(self.protocol.augment, self.data.mirror, self.data.shape))
        samples = len(sets[0][0])
        work = Trainer(net, fitted, self.data.task, False, "cpu").flops(samples) * len(sets)
        on, _ = choose_compile(self.compile, work / EAGER_FLOPS, self.device)
        trainer = Trainer(net, fitted, self.data.task, on, self.device)
        epochs, each = fitted.plan(samples)
        reset_peak(self.device)
        start = time.perf_counter()
        bar = self.bar(len(sets) * epochs * each, f"{name} on {net.name}") if self.bar else None
        keys = [Key(self.seed).fold("evaluate", r) for r in range(len(sets))]
        states = trainer.fit(sets, keys, bar.update if bar is not None else lambda n: None)
        scores = [trainer.score(s, self.data.test.inputs, self.data.test.labels, prepare) for s in states]
        if bar is not None:
            bar.close()
        spread = torch.tensor(scores, dtype=torch.float64)
        return Result(
            set=name,
            method=method,
            dataset=self.data.name,
            ipc=ipc,
            network=net.name,
            protocol=self.protocol.name,
            protocol_hash=self.protocol.hash,
            repeats=len(scores),
            spread="sets and networks" if varied else "networks",
            metric=self.data.task.metric,
            accuracies=[round(s, 6) for s in scores],
            accuracy_mean=round(float(spread.mean()), 6),
            accuracy_std=round(float(spread.std(correction=0)), 6),
            images=samples,
            seed=self.seed,
            compile="on" if on else "off",
            precision=precision,
            seconds=round(time.perf_counter() - start, 3),
            peak_bytes=peak_bytes(self.device),
        )

    def set(self, set_: DistilledSet, name: str, net_name: str) -> Result:
        """The set's own number."""
        pair = (set_.inputs, set_.labels)
        return self.judge(name, set_.meta.method, _ipc(set_), [pair] * self.repeats, set_.transform, net_name)

    def random(self, set_: DistilledSet, net_name: str) -> Result:
        """As many real samples of each class, drawn anew for each network."""
        counts = set_.meta.ipc
        picks = [pick_random(self.data, counts, Key(self.seed).fold("random", r)) for r in range(self.repeats)]
        train = self.data.train
        sets = [(self.data.prepare(train.inputs[p]), train.labels[p]) for p in picks]
        return self.judge("random real", "random", _ipc(set_), sets, self.data.prepare, net_name, varied=True)

    def whole(self, net_name: str, affordable: float | None = None) -> Result | None:
        """One network on the whole training set under the protocol `whole`; kept in a cache.

        Args:
            net_name: The network.
            affordable: Not run, and `None` returned, where it would take longer than so many seconds.
        """
        whole = replace(self, protocol=PROTOCOLS["whole"])
        net = network(net_name, self.data.shape, self.data.task.outputs)
        train = self.data.train
        mark = [self.data.fingerprint, len(train), net.name, whole.protocol.hash, self.seed, self.precision]
        cache = Path(os.environ.get("POTSTILL_CACHE") or Path.home() / ".cache" / "potstill") / "whole"
        file = cache / f"{digest(mark)}.json"
        try:
            return Result(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            pass  # not there, or of an older form: measured again
        seconds = Trainer(net, whole.protocol, self.data.task, False, "cpu").flops(len(train)) / EAGER_FLOPS
        if affordable is not None and seconds > affordable:
            self.say(f"whole set: not measured, about {seconds / 60:.0f} min here; --baselines random,whole measures it")
            return None
        pair = (self.data.prepare(train.inputs), train.labels)
        result = whole.judge("whole training set", "whole", None, [pair], self.data.prepare, net_name)
        cache.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(result))
        return result


def _ipc(set_: DistilledSet) -> int | list[int]:
    counts = set_.meta.ipc
    return counts[0] if len(set(counts)) == 1 else counts


BASELINES = ("random", "whole")


def check_fit(set_: DistilledSet, data: Data) -> None:
    """Refuse a set that is not for this data."""
    if set_.shape != data.shape or len(set_.meta.class_names) != data.task.classes:
        raise PotstillError(
            f"the set is for {len(set_.meta.class_names)} classes of {set_.shape} ({set_.meta.data}), "
            f"not for {data.task.classes} classes of {data.shape} ({data.name})"
        )


def evaluate(
    sets: DistilledSet | str | Path | Sequence[DistilledSet | str | Path],
    data: Data | str | None = None,
    *,
    networks: Sequence[str] = (),
    protocol: str | None = None,
    baselines: Sequence[str] = (),
    repeats: int = 5,
    seed: int = 0,
    data_root: str | Path | None = None,
    device: str = "cpu",
    compile: str = "auto",
    precision: str = "auto",
    affordable: float | None = None,
    say: Say = lambda line: None,
    bar: Callable[[int, str], Any] | None = None,
) -> list[Result]:
    """Train fresh networks on sets and read their accuracy on the test data.

    Args:
        sets: One or several, loaded or by path.
        data: The data that they stand for; the one that a set names if absent.
        networks: Names; the student that a set asks for if absent.
        protocol: Name; the one that a set asks for if absent.
        baselines: Of `random` and `whole`, judged beside each set.
        repeats: Fresh networks for each number.
        seed: Of weights, order and augmentation; the same for every set, so that numbers are paired.
        data_root: As for `load_data`.
        device: Where to train.
        compile: `auto`, `on` or `off`.
        precision: `auto`, `fp32` or `bf16`.
        affordable: Leave out the whole set where it would take longer than so many seconds.
        say: Receives lines for the user.
        bar: Makes a progress bar of a length and a title.

    Returns:
        A result for each set, network and baseline, in this order.

    Raises:
        PotstillError: Names that do not exist, a set that does not fit the data, repeats below 1.

    Example:
        >>> evaluate("runs/digits-dm-ipc1", networks=["convnet", "mlp"])  # doctest: +SKIP
    """
    if repeats < 1:
        raise PotstillError(f"--repeats {repeats} is below 1")
    for b in baselines:
        if b not in BASELINES:
            raise unknown("baseline", b, BASELINES)
    check_device(device)
    several = [sets] if isinstance(sets, DistilledSet | str | Path) else list(sets)
    loaded = [(s if isinstance(s, DistilledSet) else load(s), "this set" if isinstance(s, DistilledSet) else str(s)) for s in several]
    known: dict[str, Data] = {}
    work = []
    for set_, name in loaded:  # all mistakes before any training
        source = data if isinstance(data, Data) else known.setdefault(str(data or set_.meta.data), None)  # type: ignore[arg-type]
        if source is None:
            source = known[str(data or set_.meta.data)] = load_data(str(data or set_.meta.data), data_root)
        check_fit(set_, source)
        if source.fingerprint != set_.meta.fingerprint:
            say(f"note: {name} was made from other data than {source.name} as it is here")
        names = list(networks) or [set_.meta.student]
        for n in names:
            network(n, source.shape, source.task.outputs)
        judge = Judge(source, protocol_of(protocol or set_.meta.protocol), repeats, seed, device, compile, precision, say, bar)
        work.append((set_, name, names, judge))
    results = []
    for set_, name, names, judge in work:
        for n in names:
            results.append(judge.set(set_, name, n))
            if "random" in baselines:
                results.append(judge.random(set_, n))
            if "whole" in baselines and (found := judge.whole(n, affordable)):
                results.append(found)
    return results
