"""Where the networks of a step come from. Only a source makes, trains and retires networks.

A source is a frozen description; its state is a tree of tensors that the loop keeps and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import PotstillError
from .functional import Key, Tree
from .networks import Network, State
from .objectives.base import Net


@dataclass(frozen=True)
class Pool:
    """A pool of networks of which each step uses one, replaced by a fresh one when it has served its time.

    Args:
        size: Networks in the pool; a step takes one of them at random.
        lifetime: Steps that a network serves. With size 1 and lifetime 1 every step has a fresh network.
    """

    size: int = 1
    lifetime: int = 1

    def __post_init__(self) -> None:
        for name in ("size", "lifetime"):
            if getattr(self, name) < 1:
                raise PotstillError(f"source.{name} = {getattr(self, name)} is below 1")

    def init(self, network: Network, key: Key) -> Tree:
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

    def advance(self, pool: Tree, slot: int, net: Net) -> Tree:
        """The pool after a step: the used network is one older, and gone when its time is served."""
        states, ages = list(pool["states"]), pool["ages"].clone()
        ages[slot] += 1
        retired = int(ages[slot]) >= self.lifetime
        states[slot] = () if retired else net.state
        if retired:
            ages[slot] = 0
        return {"states": states, "ages": ages}


SOURCES: dict[str, type[Pool]] = {"pool": Pool}
