"""One step a few samples at a time: the same loss and gradient in less memory.

Groups are taken some at a time where their losses are added, real samples some at a time where a target is their mean or
has a row for each, and they are read from the data only then. Inside, networks take a few rows in one pass (`Network.by`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import Data
from .functional import Tree, tree_map
from .objectives import ByGroup, Net, Real

if TYPE_CHECKING:
    from .still import Now, Still


@dataclass(frozen=True)
class Drawn:
    """Training samples that are chosen but not read yet; parts are taken as of a tensor.

    Args:
        data: Where they are.
        index: Their numbers, in the shape of the batch.
        device: Where they go.
    """

    data: Data
    index: Tensor
    device: str

    def __getitem__(self, at: Any) -> Drawn:
        return replace(self, index=self.index[at])

    def read(self) -> Tensor:
        """The samples (*index, *shape), prepared."""
        raw = self.data.train.inputs[self.index.flatten()].to(self.device)
        return self.data.prepare(raw).unflatten(0, self.index.shape)


def read(real: Real | None) -> Real | None:
    """A real batch with its inputs."""
    return real._replace(inputs=real.inputs.read()) if real is not None and isinstance(real.inputs, Drawn) else real


def rows(tree: Tree, start: int, stop: int) -> Tree:
    """The same rows of every leaf."""
    return tree_map(lambda leaf: leaf[start:stop], tree)


def target_of(still: Still, net: Net, real: Real | None, draws: Tree) -> Tree:
    """The real side of some groups, or of a batch drawn from all, `settings.rows` samples at a time."""
    most, kind = still.settings.rows, still.objective.target_parts
    alone = net.network.splits("stored") and (kind == "rows" or still.objective.separable(net.network))
    with torch.no_grad():
        if real is None or kind is None or not alone or real.mask.shape[-1] <= most:
            return still._target(read(real), net, draws)
        spans = [(i, i + most) for i in range(0, real.mask.shape[-1], most)]
        if kind == "rows":
            parts = [still._target(read(Real(*rows(tuple(real), *span))), net, draws) for span in spans]
            return tree_map(lambda *found: torch.cat(found), *parts)
        sums, number = None, real.mask.sum(1)
        for start, stop in spans:
            part = Real(*(leaf[:, start:stop] for leaf in real))
            weight = part.mask.sum(1) / number
            if not bool(weight.all()):  # padding only: a mean of nothing
                continue
            found = tree_map(_weighted(weight), still._target(read(part), net, draws))
            sums = found if sums is None else tree_map(torch.add, sums, found)
        return sums


def _weighted(weight: Tensor) -> Any:
    return lambda leaf: leaf * weight.to(leaf.dtype).view(-1, *(1,) * (leaf.ndim - 1))


def value_and_grad(
    still: Still, now: Now, net: Net, real: Real | None, draws: Tree, blocks: int | None = None
) -> tuple[Tensor, dict[str, Tensor], Tree]:
    """Loss, gradient and own next state of a step, in parts of at most `settings.rows` samples.

    Args:
        still: The run.
        now: Before the step.
        net: The step's network.
        real: The step's real batch, its inputs `Drawn`.
        draws: The step's.
        blocks: Stop after so many blocks of groups: enough to see the memory, not the gradient. All if absent.
    """
    objective, most, s = still.objective, still.settings.rows, still.synthetic(now.learned)
    apart = real is not None and isinstance(objective.needs.real, ByGroup) and objective.separable(net.network)
    if real is None or not apart:
        target = still.sharing.target(target_of(still, net, real, draws), real)
        return still._gradient(now.learned, s.index, s.mask, target, net, draws, now.own)

    def targets(first: int, last: int) -> Tree:
        """Of groups: as many at a time as have no more than `most` samples."""
        each = max(1, most // real.mask.shape[1])
        spans = [(i, min(i + each, last)) for i in range(first, last, each)][:blocks]
        parts = [target_of(still, net, Real(*rows(tuple(real), *span)), rows(draws, *span)) for span in spans]
        made = tree_map(lambda *found: torch.cat(found), *parts)
        return made if blocks is not None else still.sharing.target(made, Real(*rows(tuple(real), first, last)))

    groups, width = s.index.shape
    each = 1 if objective.in_parts else max(1, most // width) if objective.adds else groups
    loss: Tensor | None = None
    grads, own = tree_map(torch.zeros_like, now.learned), now.own
    for first in list(range(0, groups, each))[:blocks]:
        last = min(first + each, groups)
        target = targets(first, last)
        if blocks is not None:  # the rest of the groups counts as if its targets were there
            target = tree_map(lambda leaf, n=last - first: leaf[torch.arange(n) % len(leaf)], target)
        index, mask, drawn = rows((s.index, s.mask, draws), first, last)
        value, more, own = still._gradient(now.learned, index, mask, target, net, drawn, now.own)
        loss, grads = value if loss is None else loss + value, tree_map(torch.add, grads, more)
    assert loss is not None
    return loss, grads, own
