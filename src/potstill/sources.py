"""Where the networks of a step come from. Only a source makes, trains and retires networks.

A source is a frozen description; its state is a tree of tensors that the loop keeps and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import Augment
from .data import Classification
from .errors import PotstillError
from .functional import SGD, Key, Tree, detach, to
from .networks import Network, State, blend
from .objectives.base import Net
from .synthetic import Synthetic

Step = Callable[[State, Tensor, Tensor, Tree], State]


@dataclass(frozen=True)
class Pool:
    """A pool of networks of which each step uses one, replaced by a fresh one when it has served its time.

    Args:
        size: Networks in the pool; a step takes one of them at random.
        lifetime: Steps that a network serves. With size 1 and lifetime 1 every step has a fresh network.
        epochs: Passes over S that a network is trained for after each step but its last.
        lr: Learning rate of that training, plain SGD.
        batch: Samples in a step of it, all of S where it is smaller.
    """

    size: int = 1
    lifetime: int = 1
    epochs: int = 0
    lr: float = 0.01
    batch: int = 256

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("lifetime", 1), ("epochs", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise PotstillError(f"source.{name} = {getattr(self, name)} is below {least}")

    def init(self) -> Tree:
        """The pool before the first step: nothing in it; networks are made when they are first fetched."""
        return {"states": [()] * self.size, "ages": torch.zeros(self.size, dtype=torch.int64)}

    def fetch(self, network: Network, pool: Tree, key: Key, progress: float) -> tuple[int, Net]:
        """A slot and the network in it.

        Args:
            network: What the networks are.
            pool: The pool's state.
            key: Of this step.
            progress: Share of the run that is done, 0 to 1.
        """
        slot = int(key.fold("slot").integers(self.size))
        state = State(*pool["states"][slot]) if len(pool["states"][slot]) else network.init(key.fold("weights"))
        return slot, Net(network, state)

    def calibrate(self, net: Net, x: Tensor) -> Net:
        """The network with the batch statistics of x (N, *shape) as its stored ones."""
        with torch.no_grad():
            return Net(net.network, State(net.state.params, net.network.forward(net.state, x, "batch")[1]))

    def advance(self, pool: Tree, slot: int, net: Net, s: Synthetic, train: Step, augment: Augment, key: Key) -> Tree:
        """The pool after a step: the used network is one older and trained on S, or gone when its time is served.

        Args:
            pool: The pool's state.
            slot: Of the used network.
            net: The used network.
            s: The set after the step.
            train: `train_step`, or its compiled form.
            augment: Drawn anew for each training step: the operation per step, its parameters per sample.
            key: Of this step.
        """
        states, ages = list(pool["states"]), pool["ages"].clone()
        ages[slot] += 1
        if int(ages[slot]) >= self.lifetime:
            states[slot], ages[slot] = (), 0
            return {"states": states, "ages": ages}
        state = net.state
        for epoch in range(self.epochs):
            order = key.fold("order", epoch).permutation(len(s)).to(s.index.device)
            for i, index in enumerate(order.split(self.batch)):
                drawn = to(augment.draws(key.fold("augment", epoch, i), 1, len(index)), index.device)
                state = train(state, *s.take(index), drawn)
        states[slot] = detach(state)
        return {"states": states, "ages": ages}

    def train_step(self, network: Network, augment: Augment, task: Classification) -> Step:
        """A function from state, inputs, labels and draws to the state after one step of plain SGD."""

        def step(state: State, x: Tensor, y: Tensor, draws: Tree) -> State:
            x = augment(x[None], draws)[0]

            def loss(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
                logits, seen = network.forward(State(params, state.buffers), x, "batch")
                return task.loss(logits, y), seen

            grads, seen = torch.func.grad(loss, has_aux=True)(state.params)
            return State(SGD(self.lr).update(state.params, grads, {})[0], blend(state.buffers, seen))

        return step


SOURCES: dict[str, type[Pool]] = {"pool": Pool}
