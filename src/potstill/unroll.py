"""Gradients through many training steps: exact, at the memory of one step.

A training run is a walk `state -> step(state, shared, each) -> state`: `shared` is what gradients are wanted for (S and its
learning rates, in every step the same), `each` what differs from step to step and takes none (which samples, drawn
augmentation). The adjoint walks it backwards: with the gradient of the end with respect to the state after a step, the
vector-Jacobian product of that one step gives it with respect to the state before it, and the step's share of the gradient
of `shared`. Only the states are kept, each step is computed once more, and no formula is derived by hand: whatever `step`
does (momentum, weight decay, augmentation, batch statistics) is covered.

Reference: Maclaurin, Duvenaud and Adams 2015, Gradient-based Hyperparameter Optimization through Reversible Learning (ICML),
for the backward walk; states are stored here and not reversed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .functional import Tree, detach, leaves, tree_map

Step = Callable[[Tree, Tree, Tree], Tree]  # state, shared, each -> the state after
End = Callable[[Tree], Tensor]  # the last state -> a scalar
Slope = Callable[[Tree], tuple[Tree, Tensor]]  # the last state -> the gradient of that scalar, and the scalar
Back = Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]


def pulled(function: Callable[..., Tree], args: tuple[Tree, ...], after: Tree | None = None) -> tuple[Tree, Tree]:
    """What a function gives, and the gradients that follow from that of what it gives.

    `torch.func` also records the backward pass itself, to be differentiated again: about twice the memory. Here nothing
    follows, so in eager mode autograd does it without; inside a compiled graph, where what is not used is not kept,
    `torch.func` remains.

    Args:
        function: Pure.
        args: Trees of tensors; whole numbers among them are constants, whose gradients are zeros.
        after: Gradient with respect to what it gives; 1, for a scalar, if absent.

    Returns:
        What the function gives, without a graph, and the gradients with respect to args.
    """
    flat, form = pytree.tree_flatten(args)
    floats = [t for t in flat if t.is_floating_point()]

    def run(*values: Tensor) -> Tree:
        full, used = [], 0
        for t in flat:
            full.append(values[used] if t.is_floating_point() else t)
            used += t.is_floating_point()
        return function(*pytree.tree_unflatten(full, form))

    if torch.compiler.is_compiling():

        def split(*values: Tensor) -> tuple[list[Tensor], Tree]:
            out = run(*values)
            return [o for o in leaves(out) if o.is_floating_point()], out

        made: Any = torch.func.vjp(split, *floats, has_aux=True)
        _, pull, out = made
        along = [torch.ones_like(out)] if after is None else [a for a in leaves(after) if a.is_floating_point()]
        found: Any = pull(along)
    else:
        moving = [t.detach().requires_grad_() for t in floats]
        with torch.enable_grad():
            out = run(*moving)
        pairs = zip(leaves(out), [None] if after is None else leaves(after), strict=True)
        ends = [(o, a) for o, a in pairs if o.requires_grad]
        outs, given = [o for o, _ in ends], [a for _, a in ends]
        found = torch.autograd.grad(outs, moving, given, allow_unused=True, materialize_grads=True)
        out = detach(out)
    grads, used = [], 0
    for t in flat:
        grads.append(found[used] if t.is_floating_point() else torch.zeros_like(t))
        used += t.is_floating_point()
    return out, pytree.tree_unflatten(grads, form)


def pull_back(step: Step) -> Back:
    """The vector-Jacobian product of one step.

    Args:
        step: Pure; whole numbers in state and shared, such as a buffer of places, have no gradient.

    Returns:
        A function of state, shared, each and the gradient with respect to the state after the step, to the gradients with
        respect to the state before it and to shared.
    """

    def back(state: Tree, shared: Tree, each: Tree, after: Tree) -> tuple[Tree, Tree]:
        before, share = pulled(lambda s, r: step(s, r, each), (state, shared), after)[1]
        return before, share

    return back


def walk(step: Step, state: Tree, shared: Tree, each: Sequence[Tree]) -> list[Tree]:
    """The state before every step and after the last: one more than steps. No graph is kept."""
    states = [state]
    with torch.no_grad():
        for given in each:
            states.append(detach(step(states[-1], shared, given)))
    return states


def last(step: Step, state: Tree, shared: Tree, each: Sequence[Tree]) -> Tree:
    """The state after the last step. No graph is kept, and no state on the way."""
    for given in each:
        state = walk(step, state, shared, [given])[-1]
    return state


def adjoint(
    step: Step,
    slope: Slope,
    state: Tree,
    shared: Tree,
    each: Sequence[Tree],
    window: int | None = None,
    back: Back | None = None,
) -> tuple[Tensor, Tree, Tree]:
    """Value at the end of a walk and its gradients, with the graph of one step at a time.

    Args:
        step: Of the walk.
        slope: Gradient and value of what is made of the last state.
        state: The first.
        shared: The same in every step.
        each: One for each step.
        window: Walk back over so many steps only, all if absent: a truncated gradient.
        back: `pull_back(step)`, compiled perhaps.

    Returns:
        The value, its gradient with respect to `shared`, and that with respect to the first state (with a window: to the
        state at its beginning).
    """
    back = back or pull_back(step)
    steps = len(each)
    first = 0 if window is None else max(steps - window, 0)
    states = walk(step, last(step, state, shared, each[:first]), shared, each[first:])
    after, value = slope(states[-1])
    total = tree_map(torch.zeros_like, shared)
    for at in reversed(range(first, steps)):
        after, share = back(states[at - first], shared, each[at], after)
        total = tree_map(torch.add, total, share)
        states.pop()  # no longer needed: the walk back gives memory free as it goes
    return value, total, after


def plain(
    step: Step, end: End, state: Tree, shared: Tree, each: Sequence[Tree], window: int | None = None
) -> tuple[Tensor, Tree, Tree]:
    """The same by differentiating the whole walk at once: the graph of every step is kept.

    Args:
        step: As for `adjoint`, like all but the next.
        end: What is made of the last state.
    """
    first = 0 if window is None else max(len(each) - window, 0)
    start = last(step, state, shared, each[:first])

    def whole(shared: Tree, state: Tree) -> Tensor:
        for given in each[first:]:
            state = step(state, shared, given)
        return end(state)

    value, (total, before) = pulled(whole, (shared, start))
    return value, total, before


def state_bytes(state: Tree) -> int:
    """Bytes of one state: what the adjoint keeps for every step."""
    return sum(t.nbytes for t in leaves(state) if isinstance(t, Tensor))
