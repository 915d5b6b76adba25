"""Protocols and the training of networks by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .augment import Augment
from .compiling import LARGE, compiled, sample_flops
from .data import Classification
from .errors import PotstillError
from .functional import SGD, Adam, Key, Tree, to, tree_map
from .layers import HALF
from .methods import DSA
from .networks import Network, State
from .records import digest

if TYPE_CHECKING:
    from .unfinished import Unfinished

Prepare = Callable[[Tensor], Tensor]  # raw inputs to what networks see
MANY = 16  # small networks are trained side by side, so many at most
LITTLE = (
    2e8  # operations of a step's forward pass of one network: above, one after the other (measured: 2.4 times at 1.5e9)
)


@dataclass(frozen=True)
class Protocol:
    """How networks are trained on a set. Frozen; its hash stands beside every number.

    Args:
        name: What `--protocol` calls it.
        epochs: Passes over the set.
        steps: At least so many steps: more passes where the set is small.
        batch: Samples per step, all of them where the set is smaller or this is 0.
        lr: Learning rate; 0 for the one that the set has learned.
        momentum: Of SGD.
        weight_decay: Added to the gradient, times the weights.
        schedule: `drop` (a tenth of the rate after half of the steps), `cycle` (up to the rate over a fifth of the
            steps, then down to nothing, both linear), `warm` (up to the rate over 500 steps, half of them where there are
            fewer than 1,000, then down to a hundredth along a cosine) or `constant`.
        augment: Drawn anew for every step; the operation per step, its parameters per sample.
        rule: `sgd` or `adam`.
        fit: The loss: `cross-entropy`; `squared` for outputs near centred labels; or `own`, that which the labels are
            made for: squared for centred ones, cross-entropy for classes and probabilities.
        own: Whether the augmentation is, in place of `augment`, the one that a set was made with.
        lengths: (samples, steps) in place of `steps`: for sets up to so many samples at least so many steps.
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
    rule: str = "sgd"
    fit: str = "cross-entropy"
    lengths: tuple[tuple[int, int], ...] = ()
    own: bool = False

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits; two numbers may be compared where it is the same.

        What protocols could not say at first counts only where it is said, so that older numbers keep theirs.
        """
        later = {f.name: f.default for f in fields(self) if f.name in ("rule", "fit", "lengths", "own")}
        return digest({k: v for k, v in self.plain().items() if k not in later or v != later[k]})

    def plain(self) -> dict[str, Any]:
        """Its fields by name, for digests."""
        return {**asdict(self), "augment": self.augment.plain()}

    @property
    def words(self) -> str:
        """What it does, in a line for the user."""
        if self.name == "unrolled":
            return "the steps, rates and order of samples that the set was made with"
        least = (
            f"{self.lengths[0][1]} to {self.lengths[-1][1]} steps by size" if self.lengths else f"{self.steps} steps"
        )
        long = [f"{self.epochs} epochs"] * (self.epochs > 0) + [least] * bool(self.lengths or self.steps)
        rate = f"{self.lr:g}" if self.lr else "at the set's own rate"
        loss = {"cross-entropy": "", "own": ", the labels' own loss"}.get(self.fit, f", {self.fit} loss")
        rule = {"sgd": "SGD", "adam": "Adam"}[self.rule]
        batch = f"batch {self.batch}" if self.batch else "full batch"
        augment = "the set's own" if self.own else str(self.augment)
        return f"{', at least '.join(long)}, {rule} {rate}, {batch}{loss}, augmentation {augment}"

    def fitted(self, labels: str) -> Protocol:
        """This protocol with its loss settled for labels that are `hard`, `soft` or `centred`."""
        loss = "squared" if labels == "centred" else "cross-entropy"
        return replace(self, fit=loss) if self.fit == "own" else self

    def size(self, samples: int) -> int:
        """Samples in a step."""
        return min(self.batch or samples, samples)

    def plan(self, samples: int) -> tuple[int, int]:
        """Epochs, and steps in each. A partial batch is kept where a set has few batches, left out elsewhere."""
        full, rest = divmod(samples, self.batch or samples)
        each = full + (rest > 0) if full < 10 else full
        enough = [steps for most, steps in self.lengths if samples <= most] or [s for _, s in self.lengths[-1:]]
        return max(self.epochs, -(-max([self.steps, *enough[:1]]) // each)), each

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "drop":
            return self.lr if step < (total + 1) // 2 else 0.1 * self.lr
        if self.schedule == "warm":
            warm = min(500, total // 2)
            if step < warm:
                return self.lr * step / warm
            fallen = 0.5 * (1 - math.cos(math.pi * (step - warm) / max(total - warm, 1)))
            return self.lr * (1 - 0.99 * fallen)
        rise = 0.2 * total
        return self.lr * min((step + 1) / rise, (total - step) / (total - rise))


FREPO = Protocol(  # its authors mirror colour images only: `frepo-flip`
    "frepo",
    epochs=0,
    batch=500,
    lr=3e-4,
    momentum=0.0,
    weight_decay=0.0,
    schedule="warm",
    augment=Augment(
        ("color", "crop", "scale", "rotate", "cutout"),
        brightness=0.5,
        jitter=0.25,
        cutout=0.25,
        scale=1.25,
        fill="edge",
    ),
    rule="adam",
    fit="squared",
    lengths=((10, 1000), (100, 2000), (500, 5000), (1000, 10_000), (5000, 40_000)),
)
PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("dc", epochs=300),
        Protocol("dsa", epochs=1000, augment=DSA),
        Protocol("mtt", epochs=1000, lr=0.0, augment=DSA),
        Protocol("review", epochs=1000, batch=0, fit="own", own=True),
        Protocol("review-transfer", epochs=1000, batch=0, fit="own", augment=DSA),
        FREPO,
        replace(FREPO, name="frepo-flip", augment=replace(FREPO.augment, ops=("flip", *FREPO.augment.ops))),
        Protocol("kip", epochs=0, steps=5000, batch=100, fit="squared", schedule="warm", weight_decay=1e-3, lr=0.02),
        Protocol("unrolled", epochs=0),
        Protocol("whole", epochs=10, steps=600, batch=128, lr=0.05, schedule="cycle"),
    )
}
LOOK = Protocol("look", epochs=200)  # what a run looks at held-out accuracy with: short, no augmentation


class Trainer:
    """Trains networks of one kind by one protocol, several at once where each is small.

    Args:
        net: The network.
        protocol: How it is trained.
        task: Loss and score.
        compile: Whether a step is compiled.
        device: Where.
        together: Networks trained side by side in one step; by the work of a step if absent. One in half precision.
    """

    def __init__(
        self,
        net: Network,
        protocol: Protocol,
        task: Classification,
        compile: bool,
        device: str,
        together: int | None = None,
    ) -> None:
        if protocol.lr <= 0:
            raise PotstillError(
                f"protocol '{protocol.name}' trains with the rate that a set has learned; this one has none"
            )
        self.net, self.protocol, self.task, self.device = net, protocol, replace(task, fit=protocol.fit), device
        self.side_by_side = together
        self.optimiser: SGD | Adam = SGD(protocol.lr, protocol.momentum, protocol.weight_decay)
        if protocol.rule == "adam":
            self.optimiser = Adam(protocol.lr, weight_decay=protocol.weight_decay)
        self.step = compiled(self._update, compile)
        self._score = Scorer(net, task, compile, device)

    def _one(self, state: State, slow: Tree, x: Tensor, y: Tensor, rate: Tensor) -> tuple[State, Tree, Tensor]:
        def loss(params: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            logits, seen = self.net.forward(State(params, state.buffers), x, "batch")
            value = self.task.loss(logits, y)
            return value, (value, seen)

        grads, (value, seen) = torch.func.grad(loss, has_aux=True)(state.params)
        params, slow = self.optimiser.update(state.params, grads, slow, rate)
        return State(params, self.net.stored(state.buffers, seen)), slow, value

    def _update(self, states: Tree, slow: Tree, x: Tensor, y: Tensor, draws: Tree, rate: Tensor) -> Tree:
        """One step of the networks side by side; every leaf has a leading axis for them."""
        x = self.protocol.augment(x, draws)
        if len(x) > 1:
            state, slow, value = torch.vmap(self._one, in_dims=(0, 0, 0, 0, None))(states, slow, x, y, rate)
            return state, slow, value
        first = tree_map(lambda t: t[0], (states, slow))
        out = self._one(first[0], first[1], x[0], y[0], rate)
        return tree_map(lambda t: t[None], out)

    @property
    def name(self) -> str:
        """Of the network."""
        return self.net.name

    def together(self, samples: int) -> int:
        """Networks trained side by side on sets of so many samples: several where a step of one is little work.

        One graph for all spares what each call costs; convolutions for several networks at once are slower than for one.
        """
        if self.net.precision in HALF:  # maps with their channels innermost cannot be in a `vmap`
            return 1
        if self.side_by_side:
            return self.side_by_side
        if self.net.rows:
            return 1
        each = sample_flops(self.net)
        return 1 if each > LARGE or each * self.protocol.size(samples) > LITTLE else MANY

    def steps(self, samples: int) -> int:
        """Training steps of one network."""
        epochs, each = self.protocol.plan(samples)
        return epochs * each

    def flops(self, samples: int) -> float:
        """Floating-point operations of training one network: forward and twice as much backward."""
        epochs, each = self.protocol.plan(samples)
        return 3 * sample_flops(self.net) * self.protocol.size(samples) * epochs * each

    def fit(
        self,
        sets: Sequence[tuple[Tensor, Tensor]],
        keys: Sequence[Key],
        tick: Callable[[int], object],
        prepare: Callable[[Tensor], Tensor] | None = None,
        kept: Unfinished | None = None,
    ) -> list[State]:
        """Train one network on each set; all sets have the same size.

        Args:
            sets: (inputs (M, *shape), labels (M,) or (M, C)) for each network.
            keys: One for each network.
            tick: Called after each step with the number of networks that made it.
            prepare: Raw inputs of a step to what networks see, where there are too many to do it beforehand.
            kept: Where the training is kept while it lasts, and may have been begun.
        """
        done, step, now = kept.begun() if kept is not None else ([], 0, None)
        states = [State(*to(s, self.device)) for s in done]
        many = self.together(len(sets[0][0]))
        if states:
            tick(len(states) * self.steps(len(sets[0][0])))
        for i in range(len(states), len(sets), many):
            keep = None if kept is None else partial(kept.keep, list(states))
            begun, step, now = (step, now), 0, None
            states += self._fit(sets[i : i + many], keys[i : i + many], tick, prepare, begun, keep)
        return states

    def _fit(
        self,
        sets: Sequence[tuple[Tensor, Tensor]],
        keys: Sequence[Key],
        tick: Callable[[int], object],
        prepare: Callable[[Tensor], Tensor] | None,
        begun: tuple[int, Tree],
        keep: Callable[[int, Tree], None] | None,
    ) -> list[State]:
        samples = len(sets[0][0])
        batch = self.protocol.size(samples)
        epochs, each = self.protocol.plan(samples)
        made = [self.net.init(key.fold("weights")) for key in keys]
        states = State(*tree_map(lambda *t: torch.stack(t).to(self.device), *map(tuple, made)))
        slow = {**self.optimiser.init(states.params)}
        if "count" in slow:  # one for each network, as every other leaf
            slow["count"] = slow["count"].expand(len(keys)).clone()
        first, now = begun
        if now is not None:
            states, slow = State(*to(now[0], self.device)), to(now[1], self.device)
            tick(first * len(sets))
        # a single set may be a file mapped into memory: no copy of it
        parts = [sets[0][j][None] if len(sets) == 1 else torch.stack([s[j] for s in sets]) for j in (0, 1)]
        x, y = (part.to(self.device) for part in parts)
        rows = torch.arange(len(sets))[:, None]
        for epoch in range(first // each, epochs):
            draws = [self.protocol.augment.draws(key.fold("augment", epoch), each, batch) for key in keys]
            order = torch.stack([key.fold("order", epoch).permutation(samples) for key in keys])
            for j in range(max(first - epoch * each, 0), each):
                at = order[:, j * batch : (j + 1) * batch]
                # the operation is drawn per step (1), its parameters per sample (batch)
                drawn = {k: torch.stack([d[k][j, : at.shape[1]] for d in draws]).to(self.device) for k in draws[0]}
                rate = torch.tensor(self.protocol.rate(epoch * each + j, epochs * each), device=self.device)
                inputs = x[rows, at] if prepare is None else prepare(x[rows, at])
                states, slow, _ = self.step(states, slow, inputs, y[rows, at], drawn, rate)
                tick(len(sets))
                if keep is not None:
                    keep(epoch * each + j + 1, (tuple(states), slow))
        return [State(*tree_map(lambda t, r=r: t[r], tuple(states))) for r in range(len(sets))]

    def score(self, state: State, inputs: Tensor, labels: Tensor, prepare: Prepare) -> float:
        """The task's score on raw inputs (N, *shape)."""
        return self._score(state, inputs, labels, prepare)


class Scorer:
    """Reads the task's score of trained networks.

    Args:
        net: The network.
        task: The score.
        compile: Whether the pass is compiled.
        device: Where.
    """

    def __init__(self, net: Network, task: Classification, compile: bool, device: str) -> None:
        self.net, self.task, self.device = net, task, device
        self._logits = compiled(self._predict, compile)

    def _predict(self, state: State, x: Tensor) -> Tensor:
        return self.net(state, x, "stored")

    def __call__(self, state: State, inputs: Tensor, labels: Tensor, prepare: Prepare) -> float:
        """The score on raw inputs (N, *shape), in batches of one static size."""
        batch = min(self.net.rows or 500, 500, len(inputs))
        parts = []
        with torch.inference_mode():
            for start in range(0, len(inputs), batch):
                at = torch.arange(start, start + batch).clamp(max=len(inputs) - 1)  # the last batch repeats its end
                logits = self._logits(state, prepare(inputs[at]).to(self.device))
                parts.append(logits[: len(inputs) - start].cpu())
        return self.task.score(torch.cat(parts), labels)
