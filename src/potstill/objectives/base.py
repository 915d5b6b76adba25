"""What a paper brings: an objective. Mathematics only, no optimiser, loop, device or file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..augment import Augment
from ..data import Classification
from ..errors import PotstillError
from ..functional import Key, Tree
from ..networks import Network, State
from ..synthetic import Synthetic


@dataclass(frozen=True)
class ByGroup:
    """A real batch of `count` samples of every group: inputs (G, count, *shape)."""

    count: int

    def __post_init__(self) -> None:
        _at_least_one(self.count)


@dataclass(frozen=True)
class Uniform:
    """A real batch of `count` samples drawn from all: inputs (count, *shape)."""

    count: int

    def __post_init__(self) -> None:
        _at_least_one(self.count)


def _at_least_one(count: int) -> None:
    if count < 1:
        raise PotstillError(f"objective.real = {count} is below 1: a step compares with at least one real sample")


class Real(NamedTuple):
    """A real batch as an objective sees it: standardised, with a mask where a group has fewer samples than asked.

    By group: inputs (G, n, *shape), labels and mask (G, n). Uniform: inputs (n, *shape), labels and mask (n,).
    """

    inputs: Float[Tensor, "*batch"]
    labels: Int64[Tensor, "*index"]
    mask: Float[Tensor, "*index"]


class Net(NamedTuple):
    """What a source hands out: a network, its present state and, from experts, the later one that it came to."""

    network: Network
    state: State
    goal: State | None = None


@dataclass(frozen=True)
class Needs:
    """What the loop must bring to each step.

    Args:
        real: A real batch, or none.
        calibrate: Real samples of each group from which stored batch statistics are taken before the step, for
            objectives that use them; no matter without batch norm.
    """

    real: ByGroup | Uniform | None
    calibrate: int = 0


@dataclass(frozen=True)
class Sizes:
    """What the draws of a step may depend on: sizes, never values."""

    groups: int
    synthetic: int
    real: int


@dataclass(frozen=True)
class Objective(ABC):
    """A differentiable comparison of S with T, minimised over what is learned of S.

    Target and loss are apart: no gradient flows through the target, so it may be computed in another precision,
    in pieces, on several machines, or kept. Both are pure; all that is random comes in as `draws`.

    Args:
        augment: The recipe's augmentation; the loop puts it here.
    """

    augment: Augment = field(default=Augment(), kw_only=True, metadata={"recipe": False})

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What a step needs."""

    def draws(self, key: Key, sizes: Sizes) -> Tree:
        """Every random tensor of the step, made eagerly."""
        return {}

    def init(self, task: Classification, s: Synthetic) -> Tree:
        """State of the objective's own, kept in checkpoints; nothing by default."""
        return ()

    def separable(self, network: Network) -> bool:
        """Whether the target of some groups is those rows of the target of all, given those rows of batch and draws.

        The loop then computes it a few groups at a time, which is quicker on a CPU and takes less memory.
        """
        return False

    @property
    def in_parts(self) -> bool:
        """Whether the loss, too, is better taken group by group: where it is separable and costly. Its parts are added."""
        return False

    @abstractmethod
    def target(self, real: Real, net: Net, draws: Tree) -> Tree:
        """The real side."""

    @abstractmethod
    def loss(self, s: Synthetic, target: Tree, net: Net, draws: Tree, own: Tree) -> tuple[Tensor, Tree]:
        """The loss of S, a scalar, and the objective's own next state."""

    def value_and_grad(
        self, s: Synthetic, target: Tree, net: Net, draws: Tree, own: Tree
    ) -> tuple[Tensor, dict[str, Tensor], Tree]:
        """Loss, gradient with respect to `s.learned` and own next state: autograd of `loss`, unless overridden."""

        def function(learned: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tree]]:
            value, after = self.loss(s.at(learned), target, net, draws, own)
            return value, (value, after)

        grads, (value, after) = torch.func.grad(function, has_aux=True)(s.learned)
        return value, grads, after
