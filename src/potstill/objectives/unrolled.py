"""Unrolling: train a network on S for some steps and differentiate through all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import PotstillError, unknown
from ..estimate import Unpredictable, peak_of
from ..functional import SGD, Key, Tree, tree_map
from ..networks import Network, State
from ..synthetic import Synthetic
from ..unroll import adjoint, plain, pull_back, pulled, state_bytes, walk
from .base import Needs, Net, Objective, Real, Sizes, Uniform, as_it_is

FEEDS = ("all", "sequence", "random")
MEMORY = ("auto", "adjoint", "plain")
AFFORDABLE = 2**29  # bytes that a plain unroll may take before the adjoint is preferred


@dataclass(frozen=True)
class Unroll(Objective):
    """What DD and MTT have in common: a walk of `steps` training steps on S, and its exact gradient.

    A step is SGD on samples of S, augmented by the recipe's augmentation (its operation drawn per step, its parameters per
    sample). Learning rates belong to S: they are positive because their logarithm is what is learned.

    Args:
        steps: Training steps on S.
        rate: Learning rate that S begins with.
        rates: `one` for all steps, or one for `each`.
        momentum: Of the training steps.
        weight_decay: Of the training steps.
        feed: What a step sees: `all` samples, the next sample of every class in `sequence`, or `batch` at `random` without
            repetition until all have been seen.
        batch: Samples in a random step, all where S is smaller.
        window: Differentiate through the last so many steps only; 0 for all.
        random_end: Draw the number of steps uniformly between `window` and `steps`, anew for each step of the loop.
        memory: `adjoint` walks back with the graph of one step at a time, `plain` keeps that of every step; the same
            gradient. `auto` is plain for walks of one or two steps and, in runs that are not compiled, where that is
            estimated to take at most 512 MiB, for it is the quicker one there (the adjoint takes every step twice); else
            the adjoint, which is also compiled a step at a time. The memory that happens to be free plays no part: the
            two round differently, and a run must end with the same bits wherever it goes on.
    """

    steps: int = 10
    rate: float = 0.02
    rates: str = "one"
    momentum: float = 0.0
    weight_decay: float = 0.0
    feed: str = "all"
    batch: int = 256
    window: int = 0
    random_end: bool = False
    memory: str = "auto"

    def __post_init__(self) -> None:
        if self.feed not in FEEDS:
            raise unknown("objective.feed", self.feed, FEEDS)
        if self.memory not in MEMORY:
            raise unknown("objective.memory", self.memory, MEMORY)
        if self.rates not in ("one", "each"):
            raise unknown("objective.rates", self.rates, ("one", "each"))
        for name, value, least in (("steps", self.steps, 1), ("batch", self.batch, 1), ("window", self.window, 0)):
            if value < least:
                raise PotstillError(f"objective.{name} = {value} is below {least}")
        if not 0 < self.rate < float("inf"):
            raise PotstillError(f"objective.rate = {self.rate:g} is no learning rate; a number above 0 is needed")
        if self.random_end and not 0 < self.window <= self.steps:
            raise PotstillError(
                f"objective.random_end draws the end between window and steps; window = {self.window} is not in 1 ... {self.steps}"
            )

    @property
    def in_pieces(self) -> bool:
        return self._walks_back

    @property
    def _walks_back(self) -> bool:
        return self.memory == "adjoint" or (self.memory == "auto" and self.steps > 2)

    @property
    def way(self) -> str:
        return "adjoint" if self._walks_back else "plain"

    def estimates(self, s: Synthetic, target: Tree, net: Net, draws: Tree) -> dict[str, int]:
        """Peak bytes of the tensors that each way of `memory` makes in eager mode; nothing is computed.

        Two or three steps are followed and the rest added: by the bytes of a state for the adjoint, by those of a step's
        graph for the plain unroll. Nothing, where a network's memory cannot be told from shapes.
        """
        steps = min(self.window or self.steps, self.steps)
        each = self.each(s, {k: v for k, v in draws.items() if k != "end"})
        start = self.begin(net)

        def peak(way: str, count: int) -> int:
            one = replace(self, memory=way, window=0, random_end=False, graph=as_it_is)

            def run(start: Tree, learned: Tree, each: Sequence[Tree], target: Tree) -> Tree:
                return one._differentiate(net.network, s.labels, start, learned, each, target)

            return peak_of(run, start, s.learned, each[:count], target)

        try:
            back, two = peak("adjoint", min(steps, 2)), peak("plain", min(steps, 2))
            more = peak("plain", 3) - two if steps > 2 else 0
        except Unpredictable:
            return {}
        beyond = max(steps - 2, 0)
        return {"adjoint": back + beyond * state_bytes(start), "plain": two + beyond * more}

    def settle(self, estimates: dict[str, int], compiled: bool) -> Unroll:
        affordable = not compiled and estimates.get("plain", AFFORDABLE + 1) <= AFFORDABLE
        return replace(self, memory="plain") if self.memory == "auto" and affordable else self

    def start_rates(self) -> Tensor:
        return torch.full((self.steps if self.rates == "each" else 1,), self.rate)

    def draws(self, key: Key, sizes: Sizes) -> Tree:
        count = {"all": sizes.synthetic, "sequence": sizes.groups, "random": min(self.batch, sizes.synthetic)}[
            self.feed
        ]
        drawn: dict[str, Any] = {"augment": self.augment.draws(key.fold("augment"), self.steps, count)}
        if self.feed == "random":
            epochs = -(-self.steps * count // sizes.synthetic)
            order = [key.fold("order", e).permutation(sizes.synthetic) for e in range(epochs)]
            drawn["order"] = torch.cat(order)[: self.steps * count].unflatten(0, (self.steps, count))
        if self.random_end:
            drawn["end"] = self.window + key.fold("end").integers(self.steps - self.window + 1)
        return drawn

    def each(self, s: Synthetic, draws: Tree) -> list[Tree]:
        """What differs from step to step: sample numbers, augmentation, the place of the learning rate; one for each step."""
        steps = int(draws["end"]) if "end" in draws else self.steps
        everything = torch.arange(len(s), device=s.index.device)
        many = len(s.rates) > 1
        out = []
        for i in range(steps):
            index = {"all": everything, "sequence": s.index[:, i % s.index.shape[1]]}.get(self.feed)
            place = torch.tensor([i if many else 0], device=s.index.device)
            out.append(
                {
                    "index": draws["order"][i] if index is None else index,
                    "augment": tree_map(lambda d, i=i: d[i : i + 1], draws["augment"]),
                    "place": place,
                    "fixed": s.fixed,
                    "groups": (s.index, s.mask),
                }
            )
        return out

    def train_step(self, network: Network, labels: str) -> Any:
        """One training step on S, pure: state (params, buffers, slow), what is learned, what differs -> the next state."""
        optimiser = SGD(momentum=self.momentum, weight_decay=self.weight_decay)

        def step(state: Tree, learned: dict[str, Tensor], given: Tree) -> Tree:
            params, buffers, slow = state
            s = Synthetic(learned, given["fixed"], given["groups"][0], given["groups"][1], labels)
            x, y = s.take(given["index"])
            x = self.augment(x[None], given["augment"])[0]

            def loss(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
                logits, seen = network.forward(State(params, buffers), x, "batch")
                return self.task.loss(logits, y), seen

            grads, seen = torch.func.grad(loss, has_aux=True)(params)
            rate = s.rates.gather(0, given["place"])[0]
            params, slow = optimiser.update(params, grads, slow, rate)
            return params, network.stored(buffers, seen), slow

        return step

    def begin(self, net: Net) -> Tree:
        """The state before the first training step."""
        return net.state.params, net.state.buffers, SGD(momentum=self.momentum).init(net.state.params)

    def fit(self, s: Synthetic, net: Net, draws: Tree) -> State:
        """The network after the walk, no graph kept: training on S as the set asks for it."""
        step = self.graph("fit", self.train_step(net.network, s.labels))
        params, buffers, _ = walk(step, self.begin(net), s.learned, self.each(s, draws))[-1]
        return State(params, buffers)

    @abstractmethod
    def end(self, state: State, target: Tree, network: Network) -> Tensor:
        """The loss of the network after the walk."""

    def _end(self, target: Tree, network: Network) -> Any:
        return lambda state: self.end(State(*state[:2]), target, network)

    def loss(self, s: Synthetic, target: Tree, net: Net, draws: Tree, own: Tree) -> tuple[Tensor, Tree]:
        step, state = self.train_step(net.network, s.labels), self.begin(net)
        for given in self._through(self.each(s, draws)):
            state = step(state, s.learned, given)
        return self._end(target, net.network)(state), own

    def _through(self, each: Sequence[Tree]) -> Sequence[Tree]:
        if self.window and self.window < len(each):
            raise PotstillError("a truncated gradient is that of no loss: value_and_grad gives it")
        return each

    def value_and_grad(
        self, s: Synthetic, target: Tree, net: Net, draws: Tree, own: Tree
    ) -> tuple[Tensor, dict[str, Tensor], Tree]:
        """Loss and exact gradient, by the adjoint or plainly."""
        value, grads = self._differentiate(
            net.network, s.labels, self.begin(net), s.learned, self.each(s, draws), target
        )
        return value, grads, own

    def _differentiate(
        self, network: Network, labels: str, start: Tree, learned: Tree, each: Sequence[Tree], target: Tree
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss at the end of a walk and its gradient with respect to what is learned."""
        step, window = self.train_step(network, labels), self.window or None
        if not self._walks_back:
            return plain(step, self._end(target, network), start, learned, each, window)[:2]

        def end(state: Tree, target: Tree) -> tuple[Tree, Tensor]:
            value, (grads,) = pulled(self._end(target, network), (state,))
            return grads, value

        slope, back = self.graph("end", end), self.graph("back", pull_back(step))
        step = self.graph("step", step)
        return adjoint(step, lambda state: slope(state, target), start, learned, each, window, back)[:2]


@dataclass(frozen=True)
class Unrolled(Unroll):
    r"""Loss on real data of a network trained on S.

    $$ L(S, \eta) = \ell(T; \theta_K), \qquad \theta_{k+1} = \theta_k - \eta_k v_{k+1}, \quad
        v_{k+1} = \mu v_k + \nabla_\theta \ell(S_k; \theta_k) $$

    from a fresh network theta_0 each time (or one and the same, as the source says), with learned positive rates eta. With
    a window the gradient passes through the last steps only, and with a random end those lie anywhere (RaT-BPTT).

    Args:
        real: Real samples per step of the loop.

    Reference: Wang, Zhu, Torralba and Efros 2018, Dataset Distillation, Algorithm 1; momentum: Deng and Russakovsky 2022,
    Remember the Past (NeurIPS); random truncated windows: Feng, Vedantam and Kempe 2024, Embarrassingly Simple Dataset
    Distillation (ICLR). Not from the papers: the logarithm of the rates is learned (they take a softplus).
    """

    real: int = 1024

    @property
    def needs(self) -> Needs:
        return Needs(real=Uniform(self.real))

    def averaged(self, network: Network) -> str:
        return "loss"

    @property
    def target_parts(self) -> str | None:
        return "rows"

    def target(self, real: Real, net: Net, draws: Tree) -> Tree:
        return {"inputs": real.inputs, "labels": real.labels}

    def end(self, state: State, target: Tree, network: Network) -> Tensor:
        return self.task.loss(network(state, target["inputs"], "stored"), target["labels"])
