"""Keys, trees of tensors and pure optimiser steps: what every other room stands on.

Nothing here keeps state. A key is a path of names below a seed; a draw is a function of its key alone, so
a resumed run, a prefetching thread or a second process needs no generator state to draw the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any  # nested dicts, tuples and lists with tensors at the leaves


@dataclass(frozen=True)
class Key:
    """A name for one draw: a seed and a path below it.

    Two keys with the same seed and path give the same numbers anywhere, two different ones give
    independent numbers. Draws are made on the CPU whatever the device, so that a run on another device
    sees the same randomness.

    Args:
        seed: The run's seed.
        path: Names and counters, such as `("real", 17)`.

    Example:
        >>> key = Key(0).fold("real", 17)
        >>> bool((key.normal(3) == key.normal(3)).all())
        True
    """

    seed: int
    path: tuple[str | int, ...] = ()

    def fold(self, *parts: str | int) -> Key:
        """The key of a draw below this one."""
        return Key(self.seed, self.path + tuple(p if isinstance(p, str) else int(p) for p in parts))

    def generator(self) -> torch.Generator:
        """A fresh generator for this key: hash(seed, path) as its seed."""
        text = repr((int(self.seed), *self.path)).encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        return generator

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 numbers of the given shape."""
        return torch.randn(shape, generator=self.generator(), dtype=torch.float32)  # whatever torch's default is

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform float32 numbers in [low, high) of the given shape."""
        return torch.rand(shape, generator=self.generator(), dtype=torch.float32) * (high - low) + low

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform int64 numbers in [0, high) of the given shape."""
        return torch.randint(high, shape, generator=self.generator())

    def permutation(self, n: int) -> Tensor:
        """A random order of 0 ... n-1."""
        return torch.randperm(n, generator=self.generator())


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply a function to corresponding leaves of one or more trees."""
    return pytree.tree_map(function, tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """All leaves of a tree, in a fixed order."""
    return pytree.tree_leaves(tree)


def form_of(tree: Tree) -> Any:
    """What a tree is without its numbers: shapes and types of tensors, types of all else; a named tuple is a tuple."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, dict):
        return {k: form_of(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return "list" if isinstance(tree, list) else "tuple", [form_of(v) for v in tree]
    return type(tree)


def finite(tree: Tree) -> bool:
    """Whether all numbers of a tree are finite."""
    found = (t for t in leaves(tree) if isinstance(t, Tensor) and t.is_floating_point())
    return all(bool(t.isfinite().all()) for t in found)


def detach(tree: Tree) -> Tree:
    """The same tree, cut from the graph."""
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tree)


def cast(tree: Tree, dtype: torch.dtype | None) -> Tree:
    """Floating-point leaves in another precision; `None` leaves all as they are."""
    if dtype is None:
        return tree
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Every tensor of a tree on a device."""
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, tree)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent as a pure function, equal to `torch.optim.SGD`.

    Args:
        lr: Learning rate.
        momentum: Factor of the velocity; the first step has velocity = gradient.
        weight_decay: L2 penalty, added to the gradient.
    """

    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0

    def init(self, params: Tree) -> Tree:
        """Zero velocities, or nothing where there is no momentum."""
        return {"velocity": tree_map(torch.zeros_like, params)} if self.momentum else {}

    def update(self, params: Tree, grads: Tree, state: Tree, lr: Tensor | float | None = None) -> tuple[Tree, Tree]:
        """One step.

        Args:
            params: Tree of tensors.
            grads: Tree of the same form.
            state: What `init` or the step before returned.
            lr: A learning rate that replaces the configured one, a tensor if it is learned or scheduled.

        Returns:
            New parameters and new state; the arguments are untouched.
        """
        rate = self.lr if lr is None else lr
        if self.weight_decay:
            grads = tree_map(lambda g, p: g + self.weight_decay * p, grads, params)
        if self.momentum:
            # torch.optim starts the velocity at the first gradient; mu * 0 + g is the same number
            velocity = tree_map(lambda v, g: self.momentum * v + g, state["velocity"], grads)
            grads, state = velocity, {"velocity": velocity}
        return tree_map(lambda p, g: p - rate * g, params, grads), state


@dataclass(frozen=True)
class Adam:
    """Adam as a pure function, equal to `torch.optim.Adam` (Kingma and Ba 2015, Algorithm 1).

    Args:
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: L2 penalty, added to the gradient.
    """

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def init(self, params: Tree) -> Tree:
        """Zero moments and a step counter (a float64 tensor, so that a compiled step stays one graph)."""
        first = next(iter(leaves(params)), torch.zeros(()))
        return {
            "mean": tree_map(torch.zeros_like, params),
            "square": tree_map(torch.zeros_like, params),
            "count": torch.zeros((), dtype=torch.float64, device=first.device),
        }

    def update(self, params: Tree, grads: Tree, state: Tree, lr: Tensor | float | None = None) -> tuple[Tree, Tree]:
        """One step; as `SGD.update`."""
        rate = self.lr if lr is None else lr
        if self.weight_decay:
            grads = tree_map(lambda g, p: g + self.weight_decay * p, grads, params)
        ways, state = self.direction(grads, state)
        return tree_map(lambda p, w: p - rate * w, params, ways), state

    def direction(self, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Corrected first moment over the root of the corrected second one, and the next state."""
        count = state["count"] + 1
        mean = tree_map(lambda m, g: self.beta1 * m + (1 - self.beta1) * g, state["mean"], grads)
        square = tree_map(lambda v, g: self.beta2 * v + (1 - self.beta2) * g * g, state["square"], grads)
        fix1 = 1 - torch.exp(count * math.log(self.beta1)) if self.beta1 else torch.ones_like(count)
        fix2 = 1 - torch.exp(count * math.log(self.beta2)) if self.beta2 else torch.ones_like(count)

        def way(m: Tensor, v: Tensor) -> Tensor:
            return (m / fix1.to(m.dtype)) / ((v / fix2.to(v.dtype)).sqrt() + self.eps)

        return tree_map(way, mean, square), {"mean": mean, "square": square, "count": count}


@dataclass(frozen=True)
class Lamb:
    """LAMB as a pure function: Adam's direction, scaled for each tensor to the size of the tensor (You and others 2020,
    Reducing BERT Pre-Training Time to 76 Minutes, Algorithm 2).

    Args:
        lr: Learning rate: the share of its own norm by which a tensor moves in a step.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Factor of the parameters that is added to the direction.
    """

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0

    def init(self, params: Tree) -> Tree:
        """As `Adam.init`."""
        return Adam(self.lr, self.beta1, self.beta2, self.eps).init(params)

    def update(self, params: Tree, grads: Tree, state: Tree, lr: Tensor | float | None = None) -> tuple[Tree, Tree]:
        """One step; as `SGD.update`."""
        rate = self.lr if lr is None else lr
        ways, state = Adam(self.lr, self.beta1, self.beta2, self.eps).direction(grads, state)

        def step(p: Tensor, w: Tensor) -> Tensor:
            w = w + self.weight_decay * p
            size, length = p.norm(), w.norm()
            ratio = torch.where((size > 0) & (length > 0), size / length.clamp(min=1e-30), torch.ones_like(size))
            return p - rate * ratio * w

        return tree_map(step, params, ways), state


Optimiser = SGD | Adam | Lamb
OPTIMISERS: dict[str, type[SGD | Adam | Lamb]] = {"sgd": SGD, "adam": Adam, "lamb": Lamb}
