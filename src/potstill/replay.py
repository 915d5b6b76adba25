"""Networks of recorded experts as a source: stretches of their trajectories, or a pool of cached checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from .data import Data
from .errors import PotstillError
from .functional import Key, Tree
from .networks import Network
from .objectives.base import Net
from .sources import Source
from .trajectories import Trajectories, open_experts


@dataclass(frozen=True)
class Experts(Source):
    """Networks that `potstill experts` has recorded: each step takes one expert at one epoch, both at random.

    With t uniform in 0 ... max_start - 1 the network is that after t epochs and its goal the same expert's after
    t + span. With span 0 there is no goal, and any objective may use the networks as cached checkpoints: the second
    way to fetch a network in Yu, Liu and Wang, "Dataset Distillation: A Comprehensive Review".

    Args:
        max_start: Epochs, from 0 on, that a stretch may start at: all below this.
        span: Epochs from its start to its goal.
        folder: Of the recording. It is no part of the recipe: no path goes into a record.

    Raises:
        PotstillError: A number below what makes sense.

    Reference:
        Cazenavette, Wang, Torralba, Efros and Zhu 2022, "Dataset Distillation by Matching Training Trajectories",
        CVPR, Algorithm 1.
    """

    max_start: int = 1
    span: int = 0
    folder: str = field(default="", compare=False, metadata={"recipe": False})

    def __post_init__(self) -> None:
        for name, least in (("max_start", 1), ("span", 0)):
            if getattr(self, name) < least:
                raise PotstillError(f"source.{name} = {getattr(self, name)} is below {least}")

    @cached_property
    def trajectories(self) -> Trajectories:
        """The recording, opened when it is first asked for.

        Raises:
            PotstillError: No folder is named, it holds no experts, or they are too short.
        """
        if not self.folder:
            raise PotstillError(
                "experts are needed: `potstill experts DATA --out DIR` records some, --experts DIR names them"
            )
        made, most = open_experts(self.folder), self.max_start - 1 + self.span
        if most > made.epochs:
            raise PotstillError(
                f"the experts in {self.folder} have {made.epochs} epochs; source.max_start = {self.max_start} and "
                f"source.span = {self.span} need {most}: `potstill experts ... --epochs {most}` records as many"
            )
        return made

    def check(self, network: Network, data: Data) -> None:
        """Refuse experts of another network, other data or another transform, or too short ones, before any step.

        Raises:
            PotstillError: What does not fit, with both names.
        """
        self.trajectories.check(network, data)

    def fetch(self, network: Network, pool: Tree, key: Key, progress: float) -> tuple[int, Net]:
        """Slot 0, and an expert's network with its goal.

        Args:
            network: What the networks are.
            pool: Nothing.
            key: Of this step; the draw depends on nothing else.
            progress: Share of the run that is done, 0 to 1.
        """
        expert = int(key.fold("expert").integers(self.trajectories.count))
        start = int(key.fold("start").integers(self.max_start))
        goal = self.trajectories.state(expert, start + self.span) if self.span else None
        return 0, Net(network, self.trajectories.state(expert, start), goal)
