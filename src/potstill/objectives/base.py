"""What a paper brings: an objective. Mathematics only, no optimiser, loop, device or file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

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
    """What a source hands out: a network, its present state and, from experts, the state that training on T took it to."""

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
        network: Whether a network is needed.
        goal: Whether its state after more training on T is needed, too.
        finish: A real batch for `finish`, or none where S is done as it is.
    """

    real: ByGroup | Uniform | None
    calibrate: int = 0
    network: bool = True
    goal: bool = False
    finish: Uniform | None = None


@dataclass(frozen=True)
class Sizes:
    """What the draws of a step may depend on: sizes, never values."""

    groups: int
    synthetic: int
    real: int


Graph = Callable[[str, Callable[..., Any]], Callable[..., Any]]


def as_it_is(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A `Graph` that compiles nothing."""
    return function


@dataclass(frozen=True)
class Objective(ABC):
    """A differentiable comparison of S with T, minimised over what is learned of S.

    Target and loss are apart: no gradient flows through the target, so it may be computed in another precision,
    in pieces, on several machines, or kept. Both are pure; all that is random comes in as `draws`.

    Args:
        augment: The recipe's augmentation; the loop puts it here.
        task: Loss of a network; the loop puts it here.
        graph: Compiles a function under a name, where the run compiles; the loop puts it here.
        rows: Samples at a time in what it computes for each alone, to save memory, 0 for all; the loop puts it here.
    """

    narrow_bf16: ClassVar[bool] = False
    """Whether `auto` takes bfloat16 for narrow networks, too, where the step is compiled: measured to move no accuracy."""

    augment: Augment = field(default=Augment(), kw_only=True, metadata={"recipe": False})
    task: Classification = field(default=Classification(1), kw_only=True, metadata={"recipe": False})
    graph: Graph = field(default=as_it_is, kw_only=True, metadata={"recipe": False}, compare=False)
    rows: int = field(default=0, kw_only=True, metadata={"recipe": False})

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What a step needs."""

    def draws(self, key: Key, sizes: Sizes) -> Tree:
        """Every random tensor of the step, made eagerly.

        What is drawn for each real sample stands under `real`, with the sizes of the batch ahead, so that a split batch can
        take its draws along.
        """
        return {}

    def init(self, task: Classification, s: Synthetic) -> Tree:
        """State of the objective's own, kept in checkpoints; nothing by default."""
        return ()

    def separable(self, network: Network) -> bool:
        """Whether the target of some groups is those rows of the target of all, given those rows of batch and draws.

        The loop then computes it a few groups at a time, which is quicker on a CPU and takes less memory.
        """
        return False

    def averaged(self, network: Network) -> str | None:
        """What processes that split the real batch average, by counts of real samples, so that the step stays that of the
        whole batch: `target`, where each group's is a mean over its real samples; `loss`, where that is such a mean, with
        its gradient, plus what does not depend on them; or nothing, where the batch cannot be split."""
        return None

    @property
    def in_parts(self) -> bool:
        """Whether the loss, too, is better taken group by group: where it is separable and costly. Its parts are added."""
        return False

    @property
    def adds(self) -> bool:
        """Whether, where it is separable, the loss of some groups is the sum of their losses."""
        return self.in_parts

    @property
    def target_parts(self) -> str | None:
        """How the target follows from those of some real samples each: it is their `mean`, weighted by the number of
        samples (of each group, by their masks), or has a row for each (`rows`); or not at all."""
        return None

    @property
    def in_pieces(self) -> bool:
        """Whether `value_and_grad` is too large for one graph and compiles its pieces itself, with `graph`."""
        return False

    @property
    def way(self) -> str | None:
        """How the gradient is computed, where that is a choice of memory against time."""
        return None

    def estimates(self, s: Synthetic, target: Tree, net: Net, draws: Tree) -> dict[str, int]:
        """Peak bytes of each such way."""
        return {}

    def settle(self, estimates: dict[str, int], compiled: bool) -> Objective:
        """The objective with that choice made."""
        return self

    def start_rates(self) -> Tensor | None:
        """Learning rates (1,) or (steps,) that S begins with, for objectives that train on S."""
        return None

    def label_scale(self, classes: int) -> float:
        """What the centred one-hot labels that S begins with are multiplied by."""
        return 1.0

    def finish(self, x: Tensor, y: Tensor, real: Real) -> Tensor:
        """Labels of S as it is judged and saved, from its inputs and labels and the batch that `needs.finish` names."""
        return y

    def why(self, s: Synthetic, target: Tree, net: Net) -> str:
        """What makes a loss that is not finite, as far as the objective knows; asked outside of compiled steps."""
        return ""

    @abstractmethod
    def target(self, real: Real, net: Net, draws: Tree) -> Tree:
        """The real side; real is absent where `needs` says so."""

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
