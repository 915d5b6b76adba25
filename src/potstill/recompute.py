"""Functions that keep their arguments only, and are computed once more for their gradient: memory for time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .functional import Tree

Parts = tuple[Tensor, ...]


class _Recomputed(torch.autograd.Function):
    """The gradient is itself such a function, so that gradients of gradients keep no more."""

    @staticmethod
    def forward(function: Callable[..., Parts], *args: Tensor) -> Parts:
        return function(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *after: Tensor) -> tuple[Tensor | None, ...]:
        args: tuple[Tensor, ...] = ctx.saved_tensors
        asked = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        function = ctx.function

        def pull(*given: Tensor) -> Parts:
            full = list(given[: len(args)])

            def of_asked(*some: Tensor) -> Parts:
                for i, value in zip(asked, some, strict=True):
                    full[i] = value
                return function(*full)

            found: Parts = torch.func.vjp(of_asked, *(full[i] for i in asked))[1](tuple(given[len(args) :]))
            return found

        found = dict(zip(asked, _Recomputed.apply(pull, *args, *after), strict=True))
        return None, *(found.get(i) for i in range(len(args)))


def recomputed(function: Callable[..., Tensor], *args: Tree) -> Tensor:
    """`function(*args)`, differentiable any number of times, at the memory of its arguments and one evaluation.

    As it stands inside `torch.compile`, which does not take it.

    Args:
        function: Pure, of trees of tensors, to one tensor.
        args: The trees.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*args)
    flat, form = pytree.tree_flatten(args)

    def whole(*values: Tensor) -> Parts:
        return (function(*pytree.tree_unflatten(list(values), form)),)

    (out,) = _Recomputed.apply(whole, *flat)
    return out


def in_rows(function: Callable[..., Tensor], x: Tensor, rows: int, *shared: Tree) -> Tensor:
    """`function(x, *shared)` for a function that treats every row of x by itself, a few rows at a time.

    Args:
        function: Of rows (n, ...) and what they share, to rows (n, ...).
        x: (N, ...).
        rows: At a time; 0 for all.
        shared: Trees of tensors.

    Example:
        >>> in_rows(lambda x, w: x * w, torch.arange(5.0), 2, torch.tensor(3.0))
        tensor([ 0.,  3.,  6.,  9., 12.])
    """
    if not rows or len(x) <= rows:
        return function(x, *shared)
    return torch.cat([recomputed(function, part, *shared) for part in x.split(rows)])
