"""Trajectory matching: some steps on S take a network where some epochs on T took it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import Tree
from ..networks import Network, State
from .base import Needs, Net, Real
from .unrolled import Unroll


@dataclass(frozen=True)
class TrajectoryMatching(Unroll):
    r"""Distance to where training on T led an expert, relative to the way that the expert made.

    $$ L(S, \eta) = \frac{\|\hat\theta_{t+N} - \theta^*_{t+M}\|^2}{\|\theta^*_t - \theta^*_{t+M}\|^2} $$

    with theta-hat after N steps on S from the expert's weights theta*_t. It is 1 if the steps do nothing and 0 if they end at
    the expert's weights M epochs later.

    Example:
        >>> TrajectoryMatching(steps=20).needs.goal
        True

    Reference: Cazenavette, Wang, Torralba, Efros and Zhu 2022, Dataset Distillation by Matching Training Trajectories
    (CVPR), eq. 2. Not from the paper: the gradient is exact at the memory of one step, and the logarithm of the rate is
    learned, so that it stays positive.
    """

    @property
    def needs(self) -> Needs:
        return Needs(real=None, goal=True)

    def target(self, real: Real | None, net: Net, draws: Tree) -> Tree:
        if net.goal is None:
            raise TypeError("trajectory matching needs a source that knows where its networks went: experts")
        return {"goal": net.goal.params, "way": _square(net.state.params, net.goal.params)}

    def end(self, state: State, target: Tree, network: Network) -> Tensor:
        return _square(state.params, target["goal"]) / target["way"]


def _square(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    """Squared distance of two sets of weights."""
    return torch.stack([(a[k] - b[k]).square().sum() for k in a]).sum()
