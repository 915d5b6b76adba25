"""Where the networks of a step come from. Only a source makes, trains and retires networks.

A source is a frozen description; its state is a tree of tensors that the loop keeps and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import Augment
from .data import Classification, Data
from .errors import PotstillError, unknown
from .functional import SGD, Adam, Key, Tree, detach, form_of, to
from .networks import Network, State
from .objectives.base import Net
from .synthetic import Synthetic

Step = Callable[[State, Tree, Tensor, Tensor, Tree], tuple[State, Tree]]  # also the optimiser's state, in and out
RULES: dict[str, type[SGD | Adam]] = {"sgd": SGD, "adam": Adam}


@dataclass(frozen=True)
class Source:
    """Where networks come from. This one, `none`, is for objectives that need no network: it hands out one without weights."""

    def init(self) -> Tree:
        """The source's state before the first step."""
        return ()

    def fetch(self, network: Network, pool: Tree, key: Key, progress: float) -> tuple[int, Net]:
        """A slot and the network in it.

        Args:
            network: What the networks are.
            pool: The source's state.
            key: Of this step.
            progress: Share of the run that is done, 0 to 1.
        """
        return 0, Net(network, State({}, {}))

    def check(self, network: Network, data: Data) -> None:
        """Refuse what does not fit, before any step.

        Raises:
            PotstillError: The source's networks are for another network or other data.
        """

    def fits(self, network: Network, pool: Tree) -> bool:
        """Whether a state that was read from a file can be this source's for such a network."""
        return bool(form_of(pool) == form_of(self.init()))

    def calibrate(self, net: Net, x: Tensor) -> Net:
        """The network with the batch statistics of x (N, *shape) as its stored ones."""
        with torch.no_grad():
            return net._replace(state=State(net.state.params, net.network.forward(net.state, x, "batch")[1]))

    def advance(self, pool: Tree, slot: int, net: Net, s: Synthetic, train: Step, augment: Augment, key: Key) -> Tree:
        """The source's state after a step; the used network may be trained, or gone.

        Args:
            pool: The source's state.
            slot: Of the used network.
            net: The used network.
            s: The set after the step.
            train: `train_step`, or its compiled form.
            augment: Drawn anew for each training step: the operation per step, its parameters per sample.
            key: Of this step.
        """
        return pool

    @property
    def optimiser(self) -> SGD | Adam:
        """What trains the networks."""
        return SGD()

    def train_step(self, network: Network, augment: Augment, task: Classification) -> Step:
        """A function from state, optimiser state, inputs, labels and draws to both states after one step."""

        def step(state: State, slow: Tree, x: Tensor, y: Tensor, draws: Tree) -> tuple[State, Tree]:
            x = augment(x[None], draws)[0]

            def loss(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
                logits, seen = network.forward(State(params, state.buffers), x, "batch")
                return task.loss(logits, y), seen

            grads, seen = torch.func.grad(loss, has_aux=True)(state.params)
            params, slow = self.optimiser.update(state.params, grads, slow)
            return State(params, network.stored(state.buffers, seen)), slow

        return step


@dataclass(frozen=True)
class Pool(Source):
    """A pool of networks of which each step uses one, replaced by a fresh one when it has served its time.

    Args:
        size: Networks in the pool; a step takes one of them at random.
        lifetime: Steps that a network serves. With size 1 and lifetime 1 every step has a fresh network. At the start of a
            run the ages of several are staggered, so that they are not all replaced at once.
        epochs: Passes over S that a network is trained for after each step but its last.
        limit: Training steps at most, in place of whole passes; 0 for no limit.
        rule: `sgd`, plain, or `adam`.
        lr: Learning rate of that training.
        batch: Samples in a step of it, all of S where it is smaller.
    """

    size: int = 1
    lifetime: int = 1
    epochs: int = 0
    limit: int = 0
    rule: str = "sgd"
    lr: float = 0.01
    batch: int = 256

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown("source.rule", self.rule, RULES)
        for name, least in (("size", 1), ("lifetime", 1), ("epochs", 0), ("limit", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise PotstillError(f"source.{name} = {getattr(self, name)} is below {least}")

    def init(self) -> Tree:
        """The pool before the first step: nothing in it; networks are made when they are first fetched."""
        return {"states": [()] * self.size, "ages": torch.arange(self.size) * self.lifetime // self.size}

    def fits(self, network: Network, pool: Tree) -> bool:
        """Whether its places are empty or hold such a network with the state of its optimiser."""
        state = network.init(Key(0))
        forms = [form_of(()), form_of((state, self.optimiser.init(state.params)))]
        empty = {**pool, "states": [() for _ in pool["states"]]} if isinstance(pool, dict) and isinstance(pool.get("states"), list) else {}  # fmt: skip
        return form_of(empty) == form_of(self.init()) and all(form_of(s) in forms for s in pool["states"])

    def fetch(self, network: Network, pool: Tree, key: Key, progress: float) -> tuple[int, Net]:
        slot = int(key.fold("slot").integers(self.size))
        held = pool["states"][slot]
        state = State(*held[0]) if len(held) else network.init(key.fold("weights"))
        return slot, Net(network, state)

    def advance(self, pool: Tree, slot: int, net: Net, s: Synthetic, train: Step, augment: Augment, key: Key) -> Tree:
        states, ages = list(pool["states"]), pool["ages"].clone()
        ages[slot] += 1
        if int(ages[slot]) >= self.lifetime:
            states[slot], ages[slot] = (), 0
            return {"states": states, "ages": ages}
        state, made = net.state, 0
        slow = pool["states"][slot][1] if len(pool["states"][slot]) else self.optimiser.init(state.params)
        for epoch in range(self.epochs):
            order = key.fold("order", epoch).permutation(len(s)).to(s.index.device)
            for i, index in enumerate(order.split(self.batch)):
                if self.limit and made == self.limit:
                    break
                drawn = to(augment.draws(key.fold("augment", epoch, i), 1, len(index)), index.device)
                state, slow = train(state, slow, *s.take(index), drawn)
                made += 1
        states[slot] = (detach(state), detach(slow))
        return {"states": states, "ages": ages}

    @property
    def optimiser(self) -> SGD | Adam:
        """What trains its networks."""
        return RULES[self.rule](self.lr)
