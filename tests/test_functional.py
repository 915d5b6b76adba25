"""Keys, trees and pure optimiser steps."""

import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.functional import OPTIMISERS, SGD, Adam, Key, Lamb, cast, detach, leaves, to, tree_map

OPTIMISER_CASES = [
    (SGD(lr=0.1), torch.optim.SGD, {"lr": 0.1}),
    (SGD(lr=0.1, momentum=0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD(lr=0.05, weight_decay=0.01), torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.01}),
    (
        SGD(lr=0.05, momentum=0.5, weight_decay=0.01),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01},
    ),
    (Adam(lr=0.01), torch.optim.Adam, {"lr": 0.01}),
    (
        Adam(lr=0.02, beta1=0.5, beta2=0.9, eps=1e-4, weight_decay=0.1),
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1},
    ),
    (Adam(lr=0.01, beta1=0.0), torch.optim.Adam, {"lr": 0.01, "betas": (0.0, 0.999)}),
    (Adam(lr=0.01, beta2=0.0, eps=0.1), torch.optim.Adam, {"lr": 0.01, "betas": (0.9, 0.0), "eps": 0.1}),
]


def params():
    key = Key(3).fold("net")
    return {"w1": key.fold(1).normal(6, 4).double(), "b1": key.fold(2).normal(6).double(), "w2": key.fold(3).normal(6)}


def loss_of(p, x):
    return ((torch.tanh(x @ p["w1"].T + p["b1"]) @ p["w2"].to(x.dtype)) ** 2).mean()


def batch(step):
    return Key(5).fold("batch", step).normal(8, 4).double()


@pytest.mark.parametrize(("ours", "maker", "options"), OPTIMISER_CASES, ids=[str(c[0]) for c in OPTIMISER_CASES])
@pytest.mark.parametrize("override", [False, True])
def test_twenty_steps_equal_torch_optim(ours, maker, options, override):
    """The same weights as `torch.optim` after every step, also with a learning rate that changes, given as a tensor."""
    mine = cast(params(), torch.float64)
    state = ours.init(mine)
    theirs = {k: v.clone().requires_grad_() for k, v in mine.items()}
    optimiser = maker(list(theirs.values()), **options)
    for step in range(20):
        lr = 0.03 / (1 + step) if override else None
        for group in optimiser.param_groups:
            group["lr"] = options["lr"] if lr is None else lr
        optimiser.zero_grad()
        loss_of(theirs, batch(step)).backward()
        optimiser.step()
        grads = torch.func.grad(loss_of)(mine, batch(step))
        mine, state = ours.update(mine, grads, state, None if lr is None else torch.tensor(lr, dtype=torch.float64))
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimiser", [c[0] for c in OPTIMISER_CASES], ids=str)
def test_a_step_leaves_its_arguments_untouched(optimiser):
    p, x = params(), batch(0)
    grads = torch.func.grad(loss_of)(p, x)
    _, state = optimiser.update(p, grads, optimiser.init(p))  # a state with numbers in it
    before = tree_map(torch.clone, (p, grads, state))
    after, fresh = optimiser.update(p, grads, state)
    assert all(torch.equal(a, b) for a, b in zip(leaves(before), leaves((p, grads, state)), strict=True))
    assert not torch.equal(after["w1"], p["w1"])
    assert list(fresh) == list(state)
    assert [t.dtype for t in leaves(after)] == [t.dtype for t in leaves(p)]  # float32 stays float32 beside float64


@pytest.mark.parametrize("optimiser", [SGD(momentum=0.9), Adam()])
def test_a_step_is_differentiable_in_its_learning_rate(optimiser):
    p, x = cast(params(), torch.float64), batch(0)
    grads = torch.func.grad(loss_of)(p, x)

    def after(lr):
        return loss_of(optimiser.update(p, grads, optimiser.init(p), lr)[0], x)

    lr, h = torch.tensor(0.02, dtype=torch.float64), 1e-6
    numeric = (after(lr + h) - after(lr - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(after)(lr), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_is_algorithm_2_of_its_paper(decay):
    """m, v, their corrections, r = m/(sqrt(v)+eps) + decay x, and a step of lr |x|/|r| along r: in NumPy, tensor by tensor."""
    ours = Lamb(lr=0.02, beta1=0.8, beta2=0.95, weight_decay=decay)
    x = cast(params(), torch.float64)
    theirs = {k: v.numpy().copy() for k, v in x.items()}
    m, v = ({k: np.zeros_like(a) for k, a in theirs.items()} for _ in range(2))
    state = ours.init(x)
    for t in range(1, 6):
        grads = {k: Key(7).fold(k, t).normal(*p.shape).double() for k, p in x.items()}
        x, state = ours.update(x, grads, state)
        for k, g in grads.items():
            g = g.numpy()
            m[k] = 0.8 * m[k] + 0.2 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            r = m[k] / (1 - 0.8**t) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-6) + decay * theirs[k]
            theirs[k] = theirs[k] - 0.02 * np.linalg.norm(theirs[k]) / np.linalg.norm(r) * r
    for k, p in x.items():
        np.testing.assert_allclose(p.numpy(), theirs[k], rtol=1e-10)


def test_lamb_moves_zeros_too():
    """A tensor of zeros has no size to scale to, and takes the direction as it is."""
    moved, _ = Lamb(lr=0.1).update({"a": torch.zeros(3)}, {"a": torch.ones(3)}, Lamb().init({"a": torch.zeros(3)}))
    assert torch.allclose(moved["a"], torch.full((3,), -0.1), atol=1e-5)


def test_optimisers_by_name():
    assert OPTIMISERS["sgd"] is SGD and OPTIMISERS["adam"] is Adam and OPTIMISERS["lamb"] is Lamb
    assert SGD().init(params()) == {}


# --- keys

PARTS = st.lists(st.one_of(st.text(max_size=4), st.integers(-5, 2**40)), max_size=4).map(tuple)


@given(PARTS, PARTS, st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_a_key_is_its_seed_and_path(a, b, seed):
    one, two = Key(seed).fold(*a).fold(*b), Key(seed).fold(*a, *b)
    assert one == two and torch.equal(one.normal(4), two.normal(4))
    same = a == b
    assert torch.equal(Key(seed).fold(*a).normal(4), Key(seed).fold(*b).normal(4)) is same
    assert not torch.equal(one.normal(4), Key(seed + 1).fold(*a, *b).normal(4))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("a", 1), ("a1",)),
        (("a", 1), ("a", "1")),
        (("a", 1), (1, "a")),
        (("a", "b"), ("ab",)),
        (("a", "b"), ("a', 'b",)),
        ((1, 2), (12,)),
        ((), ("",)),
        ((0,), ()),
    ],
)
def test_like_looking_paths_differ(a, b):
    assert not torch.equal(Key(0).fold(*a).normal(8), Key(0).fold(*b).normal(8))


def test_a_seed_is_not_a_part_of_the_path():
    assert not torch.equal(Key(1, (2,)).normal(8), Key(2, (1,)).normal(8))


def test_draws_leave_the_global_generators_alone():
    before = torch.get_rng_state().clone(), np.random.get_state()[1].tolist(), random.getstate()
    key = Key(0).fold("x")

    def draw():
        return [key.normal(3), key.uniform(3), key.integers(1000, 3), key.permutation(20)]

    first = draw()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        assert all(map(torch.equal, first, draw()))  # and do not depend on them


def test_draws_do_not_depend_on_torchs_default_type():
    before = [Key(0).normal(5), Key(0).uniform(5, low=-1.0)]
    torch.set_default_dtype(torch.float64)
    try:
        after = [Key(0).normal(5), Key(0).uniform(5, low=-1.0)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_draws_are_independent_standard_normals():
    """Moments of 200 keys' draws, and of neighbours' products, within five standard errors."""
    n, m = 200, 500
    x = torch.stack([Key(0).fold("real", i).normal(m) for i in range(n)]).double()
    total = n * m
    assert abs(float(x.mean())) < 5 / math.sqrt(total)
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2 / total)
    assert abs(float((x[1:] * x[:-1]).mean())) < 5 / math.sqrt(total - m)
    assert abs(float((x[:, 1:] * x[:, :-1]).mean())) < 5 / math.sqrt(total - n)
    first = torch.stack([Key(seed).normal(1) for seed in range(2000)]).double()  # across seeds, too
    assert abs(float(first.mean())) < 5 / math.sqrt(2000)
    assert abs(float((first[1:] * first[:-1]).mean())) < 5 / math.sqrt(1999)


def test_uniform_bounds_and_moments():
    x = Key(0).uniform(100, 1000, low=-3.0, high=5.0).double()
    assert x.shape == (100, 1000) and -3 <= float(x.min()) < -2.99 and 4.99 < float(x.max()) <= 5
    assert abs(float(x.mean()) - 1) < 5 * (8 / math.sqrt(12)) / math.sqrt(1e5)
    assert Key(0).uniform(2).dtype == torch.float32


def test_integers_cover_their_range_evenly():
    x = Key(0).integers(7, 70000)
    counts = torch.bincount(x, minlength=7)
    assert x.dtype == torch.int64 and len(counts) == 7 and int(x.min()) == 0
    assert (counts - 10000).abs().max() < 5 * math.sqrt(70000 * 6 / 49)


def test_permutation_is_one():
    x = Key(0).permutation(50)
    assert torch.equal(x.sort().values, torch.arange(50)) and not torch.equal(x, torch.arange(50))
    places = torch.stack([Key(0).fold(i).permutation(4) for i in range(2000)])
    share = torch.nn.functional.one_hot(places, 4).double().mean(0)
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 2000)
    assert Key(0).permutation(0).tolist() == []


# --- trees


class Pair(NamedTuple):
    a: object
    b: object


def test_cast_to_and_detach_reach_every_tensor_and_nothing_else():
    x = torch.ones(2, requires_grad=True)
    tree = {"f": x * 2, "i": torch.arange(2), "more": [Pair(x, None), ("text", 3, torch.ones(1).bool())]}
    half = cast(tree, torch.bfloat16)
    assert half["f"].dtype == half["more"][0].a.dtype == torch.bfloat16
    assert half["i"].dtype == torch.int64 and half["more"][1][2].dtype == torch.bool
    assert isinstance(half["more"][0], Pair) and half["more"][1][:2] == ("text", 3)
    assert half["f"].requires_grad and cast(tree, None) is tree
    cut = detach(tree)
    assert not any(t.requires_grad for t in leaves(cut) if isinstance(t, torch.Tensor)) and tree["f"].requires_grad
    assert torch.equal(cut["f"], tree["f"]) and cut["more"][1][0] == "text"
    moved = to(tree, "meta")
    assert {t.device.type for t in leaves(moved) if isinstance(t, torch.Tensor)} == {"meta"}
    assert moved["more"][1][1] == 3 and tree["i"].device.type == "cpu"
