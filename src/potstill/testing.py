"""Contract tests that every method must pass, yours too: `potstill.testing.check_method(recipe)`."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from . import recipe as recipes
from .data import Data
from .exchange import load
from .functional import Key, Tree, leaves, tree_map
from .objectives import Net, Real
from .recipe import Recipe, change
from .still import Settings, Still


def toy(seed: int = 0, shape: tuple[int, ...] = (1, 8, 8), sizes: tuple[int, ...] = (12, 9, 7)) -> Data:
    """A small made-up data set: one random pattern per class, noise around it, classes of unequal size."""
    key = Key(seed).fold("toy")
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    patterns = key.fold("patterns").normal(len(sizes), *shape)
    parts = []
    for split in ("train", "test"):
        noise = 0.5 * key.fold(split).normal(len(labels), *shape)
        parts += [(patterns[labels] + noise).numpy(), labels.numpy()]
    return Data.from_arrays(*parts, name="toy")


def still_for(recipe: Recipe, data: Data, seed: int = 0, steps: int = 8) -> Still:
    """A run of a recipe on toy data, eager and in full precision, with 1, 2, 3, ... samples of the classes."""
    counts = list(range(1, data.task.classes + 1))
    settings = Settings(recipe, counts, seed, 0.0, steps, "cpu", False, "fp32", torch.get_num_threads())
    return Still(data, settings)


def _double(tree: Tree) -> Tree:
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def _equal(a: Tree, b: Tree) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(leaves(a), leaves(b), strict=True)
    )


def _globals() -> tuple[Any, ...]:
    return torch.get_rng_state().clone(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]


class Point:
    """One step of a run, taken apart, in float64: the loss as a function of what is learned alone."""

    def __init__(self, still: Still, step: int = 0) -> None:
        now = still.fresh()
        _, net, real, draws = still.inputs_of(now, step)
        self.still, self.own, self.draws = still, _double(now.own), _double(draws)
        self.net = Net(net.network, *_double(tuple(net)[1:]))
        self.real = None if real is None else type(real)(*_double(tuple(real)))
        self.learned = _double(now.learned)
        with torch.no_grad():
            real = cast(Real, self.real)  # absent where the objective does not look at it
            self.target = still.objective.target(real, self.net, self.draws)

    def synthetic(self, learned: dict[str, Tensor]) -> Any:
        s = self.still.synthetic(learned)
        return replace(s, fixed=_double(s.fixed), mask=s.mask.double())

    def loss(self, learned: dict[str, Tensor]) -> Tensor:
        return self.still.objective.loss(self.synthetic(learned), self.target, self.net, self.draws, self.own)[0]

    def value_and_grad(self, learned: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        objective = self.still.objective
        value, grads, _ = objective.value_and_grad(self.synthetic(learned), self.target, self.net, self.draws, self.own)
        return value, grads


def check_method(recipe: Recipe, data: Data | None = None, network: str = "convnet-w8") -> None:
    """Hold a recipe to what every method promises.

    Args:
        recipe: With an objective; its network is exchanged for a small one.
        data: Toy data if absent.
        network: The small network.

    Raises:
        AssertionError: The first broken promise, in words.

    Example:
        >>> from potstill.methods import METHODS
        >>> check_method(METHODS["dm"]("paper"))
    """
    data = data or toy()
    recipe = change(recipe, {"network": network, "student": network})
    for check in CHECKS:
        check(recipe, data)


def reaches_what_is_learned(recipe: Recipe, data: Data) -> None:
    """The gradient is not zero in any sample of anything learned, and there is none for anything else."""
    point = Point(still_for(recipe, data))
    _, grads = point.value_and_grad(point.learned)
    assert set(grads) == set(recipe.learn), f"gradients of {sorted(grads)}, learned is {sorted(recipe.learn)}"
    for name, grad in grads.items():
        assert grad.isfinite().all(), f"the gradient of {name} is not finite"
        rows = grad.flatten(1) if grad.ndim > 1 else grad.reshape(1, -1)
        assert (rows.abs().amax(1) > 0).all(), f"the gradient of {name} is zero in some sample: is the graph cut?"


def equals_central_differences(recipe: Recipe, data: Data) -> None:
    """Along random directions the gradient is the slope of the loss, in float64."""
    point = Point(still_for(recipe, data))
    _, grads = point.value_and_grad(point.learned)
    for i in range(4):
        for name, value in point.learned.items():
            way = Key(i).fold("direction", name).normal(*value.shape).double()
            ends = [float(point.loss({**point.learned, name: value + sign * 1e-6 * way})) for sign in (1, -1)]
            slope, found = (ends[0] - ends[1]) / 2e-6, float((grads[name] * way).sum())
            size = float(grads[name].norm() * way.norm())
            assert abs(slope - found) <= 1e-5 * size + 1e-12, (
                f"gradient of {name} along a direction: {found}, slope {slope}"
            )


def equals_autograd(recipe: Recipe, data: Data) -> None:
    """`value_and_grad`, overridden or not, is `loss` and its autograd."""
    point = Point(still_for(recipe, data))
    value, grads = point.value_and_grad(point.learned)
    learned = {k: v.clone().requires_grad_() for k, v in point.learned.items()}
    loss = point.loss(learned)
    assert torch.allclose(value, loss, rtol=1e-10), f"value_and_grad gives {value}, loss {loss}"
    for (name, _), grad in zip(learned.items(), torch.autograd.grad(loss, list(learned.values())), strict=True):
        assert torch.allclose(grads[name], grad, rtol=1e-8, atol=1e-12), f"value_and_grad and autograd differ in {name}"


def target_comes_in_parts(recipe: Recipe, data: Data) -> None:
    """Where the objective says that its target is separable, the parts are those of the whole; it takes no gradient."""
    still = still_for(recipe, data)
    _, net, real, draws = still.inputs_of(still.fresh(), 0)
    if real is None:
        return
    whole, parts = still.objective.target(real, net, draws), still.target(net, real, draws)
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), "the target in parts is not the target of the whole batch"
        assert not b.requires_grad, "the target carries a gradient"


def leaves_the_network_alone(recipe: Recipe, data: Data) -> None:
    """Target and gradient change neither weights nor buffers nor anything else that they are given."""
    still = still_for(recipe, data)
    now = still.fresh()
    _, net, real, draws = still.inputs_of(now, 0)
    target = still.target(net, real, draws)
    arguments = (tuple(now), target, net.state, real, draws)
    before = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, arguments)
    still.target(net, real, draws)
    still.value_and_grad(now, target, net, draws)
    still.step(now, 0)
    assert _equal(before, arguments), "a step changed its arguments in place"


def loss_comes_in_parts(recipe: Recipe, data: Data) -> None:
    """Where the loss is taken group by group, the parts add up to the whole, loss and gradient."""
    still = still_for(recipe, data)
    now = still.fresh()
    _, net, real, draws = still.inputs_of(now, 0)
    target = still.target(net, real, draws)
    parts = still.value_and_grad(now, target, net, draws)
    whole = still.objective.value_and_grad(still.synthetic(now.learned), target, net, draws, now.own)
    for a, b in zip(leaves(parts[:2]), leaves(whole[:2]), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6), "the loss in parts is not the loss"


def _losses(recipe: Recipe, data: Data, seed: int, steps: int = 4) -> list[float]:
    still = still_for(recipe, data, seed)
    now, losses = still.fresh(), []
    for i in range(steps):
        now, loss = still.step(now, i)
        losses.append(loss)
    return losses


def repeats_with_its_seed(recipe: Recipe, data: Data) -> None:
    """Only the given seed matters: the global generators neither change a run nor are changed by it."""
    torch.manual_seed(1)
    before = _globals()
    first = _losses(recipe, data, seed=3)
    after = _globals()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:], "a run draws from a global generator"
    torch.manual_seed(2)
    assert first == _losses(recipe, data, seed=3), "the same seed gives other losses"
    assert first != _losses(recipe, data, seed=4), "another seed gives the same losses"


def draws_anew_each_step(recipe: Recipe, data: Data) -> None:
    """Two steps see other real samples and other draws, and the same step sees the same again."""
    still = still_for(recipe, data)
    now = still.fresh()
    first, second, again = (still.inputs_of(now, step) for step in (0, 1, 0))
    assert _equal((first[1].state, *first[2:]), (again[1].state, *again[2:])), "the same step draws other numbers"
    for what, a, b in (("real batch", first[2], second[2]), ("network", first[1].state, second[1].state)):
        assert a is None or not leaves(a) or not _equal(a, b), f"two steps have the same {what}"
    if leaves(first[3]):
        assert not _equal(first[3], second[3]), "two steps have the same draws"


def falls_at_a_fixed_network(recipe: Recipe, data: Data) -> None:
    """A small step down the gradient at one network, batch and draw makes the loss smaller, by what the slope says."""
    point = Point(still_for(recipe, data))
    start, grads = point.value_and_grad(point.learned)
    size = sum(float(g.square().sum()) for g in grads.values())
    rate = 1e-7 * abs(float(start)) / size
    end = point.loss({k: v - rate * grads[k] for k, v in point.learned.items()})
    fell = float(start - end) / (rate * size)
    assert 0.5 < fell < 1.5, f"down its own gradient the loss fell {fell:.3g} times as far as the slope says"


def survives_files(recipe: Recipe, data: Data) -> None:
    """A set and its recipe are the same after a round trip through file, TOML and plain dict."""
    assert recipes.from_dict(recipes.to_dict(recipe)) == recipe, "the recipe changes on its way through a dict"
    still = still_for(recipe, data)
    set_ = still.set(still.fresh().learned, 0)
    with tempfile.TemporaryDirectory() as folder:
        set_.save(Path(folder) / "set.safetensors")
        again = load(folder)
        toml = Path(folder) / "recipe.toml"
        toml.write_text(recipes.write(recipe))
        assert recipes.read(toml) == recipe, "the recipe changes on its way through TOML"
    assert torch.equal(set_.inputs, again.inputs) and torch.equal(set_.labels, again.labels), (
        "the set changes in its file"
    )
    assert set_.meta == again.meta, "what the set says of itself changes in its file"


CHECKS: tuple[Callable[[Recipe, Data], None], ...] = (
    reaches_what_is_learned,
    equals_central_differences,
    equals_autograd,
    target_comes_in_parts,
    loss_comes_in_parts,
    leaves_the_network_alone,
    repeats_with_its_seed,
    draws_anew_each_step,
    falls_at_a_fixed_network,
    survives_files,
)
