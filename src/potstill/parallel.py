"""One run on several processes, as `torchrun` starts them: who they are, what they tell each other, how they share a step.

Every process runs the same program on the same data. What differs is handed down as a `Group`; nothing asks a global.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor
from torch import distributed as dist

from .errors import PotstillError, Stopped, Terminated, unknown
from .exchange import pack, unpack
from .functional import Key, Tree, leaves, tree_map
from .launch import launched, restarts, speaks
from .networks import Network
from .objectives import ByGroup, Objective, Real

MODES = ("batch", "networks")
PATIENCE = timedelta(
    hours=24
)  # ranks wait while the first one looks at S or writes; one that has ended is noticed at once


class Lost(Stopped):
    """Another process of the run has ended; this one cannot go on without it."""


@dataclass(frozen=True)
class Group:
    """The processes of one run. Alone, all of its methods hand back what they are given.

    All ranks call the same methods in the same order: each but `leads` waits for the others.

    Args:
        rank: This process, 0 to size - 1; rank 0 writes and prints.
        size: How many there are.

    Raises:
        Lost: Another process has ended.

    Example:
        >>> Group().mean({"x": torch.ones(2)}, weight=3.0)
        {'x': tensor([1., 1.])}
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def mean(self, tree: Tree, weight: Tensor | float = 1.0) -> Tree:
        r"""The weighted mean of every leaf over the ranks, the same bits on all of them.

        $$ \bar x = \sum_r w_r x_r \Big/ \sum_r w_r $$

        Args:
            tree: Tensors of the same shapes on every rank.
            weight: This rank's: one number, or (G,) for leaves (G, ...). Where it is 0 the leaf is not looked at.
        """
        if self.size == 1:
            return tree
        own = torch.as_tensor(weight, dtype=torch.float64)

        def over(leaf: Tensor) -> Tensor:
            return own.to(leaf.device, leaf.dtype).reshape(own.shape + (1,) * (leaf.ndim - own.ndim))

        parts = [torch.where(over(x) > 0, over(x) * x, torch.zeros_like(x)) for x in leaves(tree)]
        *sums, own = self._each([*parts, own], dist.all_reduce)
        made = iter(s / over(s) for s in sums)
        return tree_map(lambda x: next(made), tree)

    def same(self, tree: Tree) -> Tree:
        """The first rank's tensors; the others give some of the same shapes and types."""
        if self.size == 1:
            return tree
        made = iter(self._each(leaves(tree), lambda flat: dist.broadcast(flat, 0)))
        return tree_map(lambda x: next(made), tree)

    def first(self, number: float) -> float:
        """The first rank's number."""
        return float(self.same(torch.tensor(number, dtype=torch.float64)))

    def _each(self, tensors: Sequence[Tensor], collective: Any) -> list[Tensor]:
        """A collective on copies of all tensors, those of one type together: one message, not one for each."""
        out = [t.detach().clone() for t in tensors]
        kinds = [(t.dtype, t.device) for t in out]
        for kind in dict.fromkeys(kinds):
            at = [i for i, k in enumerate(kinds) if k == kind]
            flat = torch.cat([out[i].flatten() for i in at])
            with _together():
                collective(flat)
            for i, part in zip(at, flat.split([out[i].numel() for i in at]), strict=True):
                out[i] = part.reshape(out[i].shape)
        return out

    def share(self, tree: Tree) -> Tree:
        """The first rank's tree of tensors, numbers, strings and None; what the others give is not looked at."""
        if self.size == 1:
            return tree
        content = _bytes(tree) if self.leads else torch.zeros(0, dtype=torch.uint8)
        size = torch.tensor(len(content))
        with _together():
            dist.broadcast(size, 0)
            content = content if self.leads else torch.zeros(int(size), dtype=torch.uint8)
            dist.broadcast(content, 0)
        return _tree(content)

    def collect(self, tree: Tree) -> list[Tree]:
        """On the first rank every rank's tree, in order; on the others nothing."""
        if self.leads:
            return [tree, *(_tree(self._receive(r)) for r in range(1, self.size))]
        content = _bytes(tree)
        with _together():
            dist.send(torch.tensor(len(content)), 0)
            dist.send(content, 0)
        return []

    def _receive(self, rank: int) -> Tensor:
        with _together():
            size = torch.tensor(0)
            dist.recv(size, rank)
            content = torch.zeros(int(size), dtype=torch.uint8)
            dist.recv(content, rank)
        return content

    def gather(self, tree: Tree) -> list[Tree]:
        """Every rank's tree, in order, on all ranks."""
        return list(self.share(self.collect(tree)))

    def mine(self, things: Sequence[Any]) -> list[Any]:
        """This rank's share of a list: every size-th, from its own number on."""
        return list(things[self.rank :: self.size])

    def dealt(self, things: Sequence[Any]) -> list[Any]:
        """The whole list of which every rank gives its share, in the order before `mine`."""
        hands = self.gather(list(things))
        return [hands[i % self.size][i // self.size] for i in range(sum(map(len, hands)))]

    def agree(self, what: dict[str, Any]) -> None:
        """Refuse ranks that do not hold the same.

        Raises:
            PotstillError: The first thing that differs, and where.
        """
        for rank, other in enumerate(self.gather(what)):
            for name, value in what.items():
                if other[name] != value:
                    raise PotstillError(f"the processes do not see the same {name}: rank {rank} has {other[name]}, rank {self.rank} {value}")  # fmt: skip


ALONE = Group()


@contextmanager
def _together() -> Iterator[None]:
    """What the backend raises where another process has ended, as ours."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0][:200]
        raise Lost(
            f"another process of this run has ended ({why}); torchrun --max-restarts N starts all again"
        ) from error


def _bytes(tree: Tree) -> Tensor:
    """A tree as bytes (N,): JSON and safetensors, no pickle."""
    tensors: dict[str, Tensor] = {}
    header = json.dumps(pack(tree, tensors)).encode()
    return torch.frombuffer(bytearray(len(header).to_bytes(8, "little") + header + encode(tensors)), dtype=torch.uint8)


def _tree(content: Tensor) -> Tree:
    """What `_bytes` was given."""
    raw = content.numpy().tobytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return unpack(json.loads(raw[8:end]), decode(raw[end:]))


@contextmanager
def joined(device: str = "cpu") -> Iterator[Group]:
    """The group that torchrun has started this process in; without torchrun, one process alone.

    gloo carries what lies on a CPU, nccl what lies on a GPU; each process takes the GPU of its local rank. Of an error that
    ends the run only the first process to meet it speaks, the others end silently.

    Args:
        device: Where the run computes.

    Example:
        >>> with joined() as group:
        ...     group.size
        1
    """
    if not launched():
        yield ALONE
        return
    group = Group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    gpus = device.startswith("cuda") and torch.cuda.is_available()
    if gpus and device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    began = group.size > 1 and not dist.is_initialized()
    if began:
        backend, store = "cpu:gloo,cuda:nccl" if gpus else "gloo", _store(timedelta(minutes=30))
        dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.size, timeout=PATIENCE)
    try:
        yield group
    except BaseException as error:
        ours = isinstance(error, PotstillError | Stopped | KeyboardInterrupt)
        if group.size > 1 and not _first_to_fail() and ours:
            codes = ((PotstillError, 2), (Terminated, 143), (KeyboardInterrupt, 130), (Stopped, 1))
            raise SystemExit(next(code for kind, code in codes if isinstance(error, kind))) from error
        raise
    finally:
        if began:
            dist.destroy_process_group()


def _store(patience: timedelta) -> dist.Store:
    """What the processes know of each other. torchrun's store outlives a restart, with addresses of processes that are gone."""
    found, _, _ = next(dist.rendezvous("env://", timeout=patience))
    return dist.PrefixStore(f"potstill/{restarts()}", found)


def _first_to_fail() -> bool:
    """Whether no other process of this run has met an error before."""
    with suppress(RuntimeError):
        return int(_store(timedelta(seconds=10)).add("failed", 1)) == 1
    return speaks()


@dataclass(frozen=True)
class Sharing:
    """How the ranks of a group share a step.

    Args:
        group: The ranks.
        mode: `alone`; `batch`: one network, each rank has some of the real samples; or `networks`: each rank has a network,
            real samples and draws of its own, and the gradient is averaged.
        averaged: In mode `batch`, what the objective says that ranks average: `target` or `loss`.
    """

    group: Group = ALONE
    mode: str = "alone"
    averaged: str | None = None

    def key(self, key: Key) -> Key:
        """Where this rank's draws come from; the first rank has those of a run alone."""
        return key.fold("rank", self.group.rank) if self.mode == "networks" and self.group.rank else key

    def places(self, count: int, by_group: bool) -> Tensor:
        """Places of this rank's samples among `count` of a real batch, or of each of its groups, as many on each rank;
        those beyond the last are padding. Of a batch from all, which has no mask, only places that are there."""
        if self.mode != "batch":
            return torch.arange(count)
        rank, size = self.group.rank, self.group.size
        return torch.arange(rank, -(-count // size) * size if by_group else count, size)

    def rows(self, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of a real batch: sample numbers and mask, both (G, n) or (n,)."""
        at, count = self.places(index.shape[-1], index.ndim > 1), index.shape[-1]
        return index[..., at % count], mask[..., at % count] * (at < count)

    def draws(self, draws: Tree, shape: torch.Size) -> Tree:
        """Draws of which those for single real samples, under `real`, are cut as the batch of this shape is."""
        if self.mode != "batch" or not isinstance(draws, dict) or "real" not in draws:
            return draws
        axis, count = len(shape) - 1, shape[-1]
        at = self.places(count, axis > 0) % count
        own = tree_map(lambda t: t.index_select(axis, at) if t.shape[axis] == count else t, draws["real"])
        return {**draws, "real": own}

    def target(self, target: Tree, real: Real | None) -> Tree:
        """The target of the whole batch, from this rank's: the mean by counts of real samples."""
        if self.mode != "batch" or self.averaged != "target" or real is None:
            return target
        return self.group.mean(target, real.mask.sum(-1))

    def gradient(self, loss: Tensor, grads: Tree, real: Real | None) -> tuple[Tensor, Tree]:
        """Loss and gradient that every rank goes on with, the same bits on all of them."""
        if self.mode == "alone":
            return loss, grads
        if self.mode == "batch" and self.averaged == "target":
            return tuple(self.group.same((loss, grads)))
        weight = float(real.mask.sum()) if self.mode == "batch" and real is not None else 1.0
        return tuple(self.group.mean((loss, grads), weight))

    def others(self, own: Tree) -> list[Tree]:
        """What the other ranks have of their own, for the first one's checkpoint; nothing where all have the same."""
        return self.group.collect(own)[1:] if self.mode == "networks" else []

    def saves(self, error: BaseException) -> bool:
        """Whether a checkpoint can be written after an error: where ranks have pools of their own all must be at the same
        step, as they are where the loss has run away."""
        return self.mode != "networks" or type(error) is Stopped


def choose(
    asked: str | None, group: Group, objective: Objective | None, network: Network, samples: int
) -> tuple[str, str]:
    """How a run is shared, and why where the user has not said it.

    Args:
        asked: `batch`, `networks` or nothing: the batch, where it can be split.
        group: The ranks.
        objective: Of the run.
        network: Of the run.
        samples: In the training data.

    Raises:
        PotstillError: What cannot be shared in this way, and what can.
    """
    if asked is not None and asked not in MODES:
        raise unknown("way for --parallel", asked, MODES)
    if asked is not None and not launched() and group.size == 1:
        raise PotstillError(f"--parallel {asked} shares a run among processes, and there is one only; torchrun --nproc-per-node 2 -m potstill distill ... starts two")  # fmt: skip
    if group.size == 1:
        return "alone", ""
    if objective is None:
        raise PotstillError("this method takes no steps that processes could share; run it without torchrun")
    reasons = {"batch": _no_batch(objective, network, group.size, samples), "networks": _no_networks(objective)}
    can = [mode for mode in MODES if not reasons[mode]]
    if asked in can:
        return str(asked), "asked for"
    if asked is not None or not can:
        help_ = f"--parallel {can[0]} works" if can else "run it without torchrun"
        raise PotstillError(f"--parallel {asked or MODES[0]}: {reasons[asked or MODES[0]]}; {help_}")
    return can[0], reasons[
        "batch"
    ] or "the step is that of one process, --parallel networks averages over several networks"


def _no_batch(objective: Objective, network: Network, size: int, samples: int) -> str:
    """Why a real batch cannot be split, or nothing."""
    needs = objective.needs.real
    if needs is None:
        return "this method compares with no real batch that could be split"
    if objective.averaged(network) is None:
        if network.mixes_samples:
            return f"{network.name} mixes the samples of a batch (batch norm), and no process would see the whole batch"
        return f"{type(objective).__name__} does not say what the parts of a batch average to (Objective.averaged)"
    count = needs.count if isinstance(needs, ByGroup) else min(needs.count, samples)
    return f"{count} real samples are fewer than the {size} processes" if count < size else ""


def _no_networks(objective: Objective) -> str:
    """Why each rank cannot have a network of its own, or nothing."""
    return "" if objective.needs.network else "this method needs no network that each process could have one of"
