"""The training of one expert, step by step: from a network with fresh weights to the rows of its trajectory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from safetensors.torch import save as encode
from torch import Tensor

from .data import Data
from .errors import Stopped
from .exchange import HEADER
from .faults import memory_said
from .functional import Key, Tree, finite, to, tree_map
from .networks import Network, State
from .training import Protocol, Trainer
from .trajectories import FORMAT, Layout


class Progress(NamedTuple):
    """How far one expert is: one value, exchanged whole, so that an interrupt finds no half of it.

    Args:
        expert: Its number.
        step: Steps that it has made.
        state: The network.
        slow: Of the optimiser.
        total: Sum of the losses of this epoch.
        rows: Parameters and buffers, flat, at the start and after each epoch.
        accuracies: On held-out data, at the same places; empty where nothing is held out.
        losses: Mean of each epoch.
    """

    expert: int
    step: int
    state: State
    slow: Tree
    total: float
    rows: tuple[tuple[Tensor, Tensor], ...]
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]


class Recorder:
    """Trains experts of one network on one data set.

    Args:
        data: With its held-out part taken away.
        net: In the precision that it computes in.
        protocol: How it is trained, at a constant rate.
        seed: Of everything random; an expert's numbers do not depend on how many there are.
        compile: Whether a step is compiled.
        device: Where.
    """

    def __init__(self, data: Data, net: Network, protocol: Protocol, seed: int, compile: bool, device: str) -> None:
        self.data, self.net, self.protocol, self.key, self.device = data, net, protocol, Key(seed), device
        self.trainer = Trainer(net, protocol, data.task, compile, device, together=1)
        self.epochs, self.each = protocol.plan(len(data.train))
        self.batch = min(protocol.batch, len(data.train))
        start = net.init(Key(0))
        self.layouts = Layout.of(start.params), Layout.of(start.buffers)

    def rows(self, state: State) -> tuple[Tensor, Tensor]:
        """Parameters and buffers, flat."""
        return self.layouts[0].row(state.params), self.layouts[1].row(state.buffers)

    def look(self, state: State) -> tuple[float, ...]:
        """Accuracy on held-out data, if there are any."""
        held = self.data.heldout
        return (round(self.trainer.score(state, held.inputs, held.labels, self.data.prepare), 6),) if len(held) else ()

    def begin(self, expert: int) -> Progress:
        """An expert before its first step."""
        state = State(*to(tuple(self.net.init(self.key.fold("expert", expert, "weights"))), self.device))
        slow = self.trainer.optimiser.init(state.params)
        return Progress(expert, 0, state, slow, 0.0, (self.rows(state),), self.look(state), ())

    def go_on(self, now: Progress) -> Iterator[Progress]:
        """What comes after each further step of an expert, until its last one.

        Raises:
            Stopped: The loss or a weight is no longer finite.
        """
        key, samples = self.key.fold("expert", now.expert), len(self.data.train)
        rate = torch.tensor(self.protocol.rate(0, 1), device=self.device)
        for epoch in range(now.step // self.each, self.epochs):
            order = key.fold("order", epoch).permutation(samples)
            draws = self.protocol.augment.draws(key.fold("augment", epoch), self.each, self.batch)
            for j in range(now.step - epoch * self.each, self.each):
                at = order[j * self.batch : (j + 1) * self.batch]
                x = self.data.prepare(self.data.train.inputs[at].to(self.device))[None]
                y = self.data.train.labels[at].to(self.device)[None]
                # the operation is drawn per step (1), its parameters per sample (batch)
                drawn = to({k: d[j : j + 1, : len(at)] for k, d in draws.items()}, self.device)
                stacked = tree_map(lambda t: t[None], (tuple(now.state), now.slow))
                with memory_said(f"expert {now.expert}, step {now.step + 1}; what was recorded before is kept"):
                    state, slow, loss = self.trainer.step(State(*stacked[0]), stacked[1], x, y, drawn, rate)
                state, slow = tree_map(lambda t: t[0], (tuple(state), slow))
                after = now._replace(step=now.step + 1, state=State(*state), slow=slow, total=now.total + float(loss))
                if not math.isfinite(after.total) or not finite(tuple(after.state)):
                    raise Stopped(
                        f"expert {now.expert}, step {after.step}: its loss or weights are not finite; "
                        f"a lower rate than --lr {self.protocol.lr:g} usually helps"
                    )
                now = self.close(after) if j == self.each - 1 else after
                yield now

    def close(self, now: Progress) -> Progress:
        """The end of an epoch: a row, a look at held-out data, and the mean loss."""
        return now._replace(
            rows=(*now.rows, self.rows(now.state)),
            accuracies=now.accuracies + self.look(now.state),
            losses=(*now.losses, now.total / self.each),
            total=0.0,
        )

    def encode(self, now: Progress) -> bytes:
        """An expert's file."""
        parts = zip(("params", "buffers"), self.layouts, zip(*now.rows, strict=True), strict=True)
        tensors = {name: torch.stack(rows) for name, layout, rows in parts if layout.size}
        header = json.dumps({"format": FORMAT, "kind": "expert", "expert": now.expert})
        return encode(tensors, metadata={HEADER: header})
