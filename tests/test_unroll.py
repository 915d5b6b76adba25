"""The unroll: a step against torch.optim, the adjoint against autograd, windows, feeds and rates."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from potstill.compiling import Graphs
from potstill.data import Classification
from potstill.errors import PotstillError
from potstill.functional import Key, leaves, tree_map
from potstill.methods import DSA
from potstill.networks import State, network
from potstill.objectives import Net, Real, Sizes, Unrolled
from potstill.objectives.trajectory import TrajectoryMatching
from potstill.synthetic import Synthetic, group_index
from potstill.unroll import adjoint, plain, pull_back, pulled, walk

CLASSES, SHAPE = 3, (1, 8, 8)


def double(tree):
    return tree_map(lambda t: t.double() if t.is_floating_point() else t, tree)


def setting(
    objective, norm="instance", labels="hard", per_class=2, learn=("inputs", "labels", "lr"), name="convnet-{}-w6-d2"
):
    """An objective bound to a small network, a small S and a real batch, all in float64."""
    squared = labels == "centred"
    task = Classification(CLASSES, "squared" if squared else "cross-entropy")
    objective = type(objective)(**{**vars(objective), "task": task})
    net = network(name.format(norm), SHAPE, CLASSES)
    groups = torch.arange(CLASSES).repeat_interleave(per_class)
    index, mask = group_index(groups, CLASSES)
    parts = {"inputs": Key(1).normal(len(groups), *SHAPE), "lr": objective.start_rates().log()}
    parts["labels"] = groups if labels == "hard" else Key(2).normal(len(groups), CLASSES)
    learned = {k: v for k, v in parts.items() if k in learn and not (k == "labels" and labels == "hard")}
    s = Synthetic(double(learned), double({k: v for k, v in parts.items() if k not in learned}), index, mask, labels)
    real = Real(Key(3).normal(12, *SHAPE).double(), torch.arange(12) % CLASSES, torch.ones(12).double())
    draws = double(objective.draws(Key(4), Sizes(CLASSES, len(groups), 12)))
    state = State(*double(tuple(net.init(Key(0)))))
    goal = State(*double(tuple(net.init(Key(9)))))
    return objective, s, real, Net(net, state, goal), draws


CASES = {
    "plain": (Unrolled(steps=4, rate=0.1), {}),
    "momentum": (Unrolled(steps=5, rate=0.05, momentum=0.9, weight_decay=0.01), {}),
    "each": (Unrolled(steps=4, rate=0.1, rates="each", momentum=0.5), {}),
    "sequence": (Unrolled(steps=5, rate=0.1, feed="sequence", momentum=0.9), {}),
    "random": (Unrolled(steps=5, rate=0.1, feed="random", batch=4), {}),
    "augmented": (Unrolled(steps=3, rate=0.1, momentum=0.9, augment=DSA), {}),
    "batch norm": (Unrolled(steps=3, rate=0.1, momentum=0.9), {"norm": "batch"}),
    "logits": (Unrolled(steps=3, rate=0.1, momentum=0.9), {"labels": "logits"}),
    "centred": (Unrolled(steps=3, rate=0.1), {"labels": "centred"}),
    "trajectory": (TrajectoryMatching(steps=4, rate=0.1, feed="random", batch=4, augment=DSA), {"labels": "logits"}),
}


@pytest.mark.parametrize("case", ["momentum", "sequence", "trajectory"])
def test_the_adjoints_gradient_is_that_of_differences(case):
    """Central differences along a direction through inputs, labels and rates at once."""
    objective, options = CASES[case]
    objective, s, real, net, draws = setting(objective, **options)
    target = objective.target(real, net, draws)
    objective = type(objective)(**{**vars(objective), "memory": "adjoint"})
    grads = objective.value_and_grad(s, target, net, draws, ())[1]
    along = {k: Key(7).fold(k).normal(*v.shape).double() for k, v in s.learned.items()}

    def at(size):
        return float(objective.value_and_grad(s.at({k: v + size * along[k] for k, v in s.learned.items()}), target, net, draws, ())[0])  # fmt: skip

    size = 1e-6
    slope = sum(float((grads[k] * along[k]).sum()) for k in grads)
    assert (at(size) - at(-size)) / (2 * size) == pytest.approx(slope, rel=1e-5) and abs(slope) > 1e-6


@pytest.mark.parametrize("compiling", [False, True])
def test_whole_numbers_in_a_state_are_constants(compiling, monkeypatch):
    """Such as a buffer of places: no gradient flows into them, and all others are as they would be without."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)

    def step(state, shared, each):
        weight, places = state
        return weight - 0.1 * (weight * shared)[places], places

    state, shared = (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 1])), torch.tensor([0.5, -1.0, 2.0])
    end = lambda state: state[0].square().sum()
    leaf = shared.clone().requires_grad_()
    now = state
    for _ in range(3):
        now = step(now, leaf, ())
    reached = end(now)
    (wanted,) = torch.autograd.grad(reached, leaf)

    def slope(state):
        value, ((weight, places),) = pulled(end, (state,))  # as an objective's slope
        return (weight, places), value

    for value, total, before in (
        plain(step, end, state, shared, [()] * 3),
        adjoint(step, slope, state, shared, [()] * 3),
    ):
        assert torch.allclose(total, wanted) and float(value) == pytest.approx(reached.item())
        assert before[1].tolist() == [0, 0, 0] and before[0].abs().sum() > 0


def compiled_against_eager():
    """Each piece of the adjoint is a graph of its own; the graphs are made once and serve other values."""
    objective, s, real, net, draws = setting(CASES["momentum"][0], name="mlp-w8")
    ways = [type(objective)(**{**vars(objective), "memory": "adjoint", "graph": Graphs(on)}) for on in (False, True)]
    for factor in (1.0, 0.5):
        moved = s.at({k: factor * v for k, v in s.learned.items()})
        (value, grads, _), (other, found, _) = (
            o.value_and_grad(moved, o.target(real, net, draws), net, draws, ()) for o in ways
        )
        torch.testing.assert_close((other, found), (value, grads), rtol=1e-9, atol=1e-12)
    assert set(ways[1].graph.made) == {"step", "back", "end"}


@pytest.mark.compiled
def test_the_compiled_adjoint_is_the_one_that_is_not(tmp_path):
    """In a process without the checks of shapes, which a compiler does not get through."""
    done = subprocess.run(
        [sys.executable, "-c", "import test_unroll; test_unroll.compiled_against_eager()"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_adjoint_is_autograd(case):
    """To 1e-10 in float64: value and gradients with respect to inputs, labels and rates."""
    objective, options = CASES[case]
    objective, s, real, net, draws = setting(objective, **options)
    target = objective.target(real, net, draws)
    found, grads, _ = type(objective)(**{**vars(objective), "memory": "adjoint"}).value_and_grad(
        s, target, net, draws, ()
    )
    learned = {k: v.clone().requires_grad_() for k, v in s.learned.items()}
    value, _ = objective.loss(s.at(learned), target, net, draws, ())
    wanted = dict(zip(learned, torch.autograd.grad(value, list(learned.values())), strict=True))
    assert float(found) == pytest.approx(value.item(), rel=1e-12)
    assert set(grads) == set(wanted) and "lr" in grads
    for name, grad in wanted.items():
        assert float((grads[name] - grad).norm()) <= 1e-10 * float(grad.norm()), name
        assert float(grad.norm()) > 1e-9
    if options.get("labels") == "logits":
        assert "labels" in grads
    also, plainly, _ = type(objective)(**{**vars(objective), "memory": "plain"}).value_and_grad(
        s, target, net, draws, ()
    )
    assert float(also) == pytest.approx(value.item(), rel=1e-12)
    for name, grad in wanted.items():
        assert torch.allclose(plainly[name], grad, rtol=1e-9, atol=1e-14), name


def test_gradient_of_the_starting_weights():
    """The walk back ends at the first state: its gradient, too, is autograd's."""
    objective, s, real, net, draws = setting(Unrolled(steps=4, rate=0.1, momentum=0.9))
    target, each = objective.target(real, net, draws), objective.each(s, draws)
    step = objective.train_step(net.network, s.labels)

    def end(state):
        return objective.end(State(*state[:2]), target, net.network)

    _, _, (params, _, _) = adjoint(step, torch.func.grad_and_value(end), objective.begin(net), s.learned, each)
    start = {k: v.clone().requires_grad_() for k, v in net.state.params.items()}
    state = objective.begin(Net(net.network, State(start, net.state.buffers)))
    for given in each:
        state = step(state, s.learned, given)
    for name, grad in zip(start, torch.autograd.grad(end(state), list(start.values())), strict=True):
        assert torch.allclose(params[name], grad, rtol=1e-9, atol=1e-13), name
    _, _, (plainly, _, _) = plain(step, end, objective.begin(net), s.learned, each)
    assert all(torch.allclose(plainly[k], params[k], rtol=1e-9, atol=1e-13) for k in params)


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_is_torch_optims(norm, momentum):
    """Four steps of the walk equal four of torch.optim.SGD on the same batches with the same rates."""
    objective = Unrolled(steps=4, rate=0.1, rates="each", momentum=momentum, weight_decay=0.01)
    objective, s, _, net, draws = setting(objective, norm)
    s = s.at({**s.learned, "lr": torch.tensor([0.3, 0.1, 0.05, 0.2], dtype=torch.float64).log()})
    mine = objective.fit(s, net, draws)
    params = {k: v.clone().requires_grad_() for k, v in net.state.params.items()}
    optimiser = torch.optim.SGD(list(params.values()), lr=1.0, momentum=momentum, weight_decay=0.01)
    for rate in (0.3, 0.1, 0.05, 0.2):
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        logits = net.network(State(params, net.state.buffers), s.learned["inputs"], "batch")
        F.cross_entropy(logits, s.fixed["labels"]).backward()
        optimiser.step()
    for name, p in params.items():
        assert torch.allclose(mine.params[name], p, rtol=1e-10, atol=1e-13), name
    if norm == "batch":  # stored statistics have moved with the steps
        assert not any(torch.equal(a, b) for a, b in zip(leaves(mine.buffers), leaves(net.state.buffers), strict=True))


@pytest.mark.parametrize("memory", ["adjoint", "plain"])
@pytest.mark.parametrize(("window", "random_end"), [(1, False), (3, False), (7, False), (2, True)])
def test_a_window_is_a_detached_start(window, random_end, memory):
    """The truncated gradient is autograd's where everything before the window is cut off."""
    asked = Unrolled(steps=5, rate=0.1, momentum=0.9, window=window, random_end=random_end, memory=memory)
    objective, s, real, net, draws = setting(asked)
    assert not random_end or window < int(draws["end"]) < 5  # or the case is one of the others
    target, each = objective.target(real, net, draws), objective.each(s, draws)
    value, grads, _ = objective.value_and_grad(s, target, net, draws, ())
    step, state = objective.train_step(net.network, s.labels), objective.begin(net)
    learned = {k: v.clone().requires_grad_() for k, v in s.learned.items()}
    for i, given in enumerate(each):
        if i == len(each) - window:
            state = tree_map(torch.Tensor.detach, state)
        state = step(state, learned, given)
    loss = objective.end(State(*state[:2]), target, net.network)
    assert loss.item() == pytest.approx(value.item(), rel=1e-12)
    for name, grad in zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True):
        assert torch.allclose(grads[name], grad, rtol=1e-9, atol=1e-14), name


def test_a_random_end_lies_between_window_and_steps():
    objective = Unrolled(steps=6, window=2, random_end=True)
    ends = {int(objective.draws(Key(i), Sizes(2, 4, 8))["end"]) for i in range(60)}
    assert ends == {2, 3, 4, 5, 6}
    objective, s, real, net, draws = setting(objective)
    assert len(objective.each(s, draws)) == int(draws["end"])
    with pytest.raises(PotstillError, match="no loss"):
        Unrolled(steps=5, window=2).loss(
            s, objective.target(real, net, draws), net, Unrolled(steps=5).draws(Key(0), Sizes(3, 6, 1)), ()
        )


def test_feeds():
    """`sequence` shows the next sample of every class, `random` every sample once before any comes again."""
    objective, s, _, _, draws = setting(Unrolled(steps=5, feed="sequence"), per_class=3)
    shown = [given["index"].tolist() for given in objective.each(s, draws)]
    assert shown == [[0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 3, 6], [1, 4, 7]]
    objective, s, _, _, draws = setting(Unrolled(steps=6, feed="random", batch=3), per_class=3)
    shown = torch.stack([given["index"] for given in objective.each(s, draws)])
    assert shown.shape == (6, 3)
    assert sorted(shown[:3].flatten().tolist()) == sorted(shown[3:].flatten().tolist()) == list(range(9))
    objective, s, _, _, draws = setting(Unrolled(steps=2), per_class=3)
    assert all(given["index"].tolist() == list(range(9)) for given in objective.each(s, draws))


def test_augmentation_is_replayed():
    """The walk, its recomputation and a second call see the same augmentation; another key sees another."""
    objective, s, _, net, draws = setting(Unrolled(steps=3, rate=0.1, augment=DSA))
    first, second = (objective.fit(s, net, draws) for _ in range(2))
    other = objective.fit(s, net, double(objective.draws(Key(5), Sizes(CLASSES, 6, 12))))
    assert all(torch.equal(a, b) for a, b in zip(leaves(first.params), leaves(second.params), strict=True))
    weights = [
        name for name in first.params if name.endswith("weight")
    ]  # an instance norm takes a convolution's bias away
    assert weights and not any(torch.equal(first.params[n], other.params[n]) for n in weights)


def test_every_step_is_augmented_in_its_own_way():
    """Step i takes row i of what was drawn: the walk by hand, each batch augmented outside of it."""
    objective, s, _, net, draws = setting(Unrolled(steps=3, rate=0.1, augment=DSA))
    mine = objective.fit(s, net, draws).params
    params = net.state.params
    for i in range(3):
        x = DSA(s.learned["inputs"][None], {k: d[i : i + 1] for k, d in draws["augment"].items()})[0]

        def loss(params, x=x):
            return F.cross_entropy(net.network(State(params, {}), x, "batch"), s.fixed["labels"])

        grads = torch.func.grad(loss)(params)
        params = {k: p - s.rates[0] * grads[k] for k, p in params.items()}
    assert all(torch.allclose(mine[k], p, rtol=1e-10, atol=1e-13) for k, p in params.items())


def test_a_learned_rate_is_never_negative():
    """However hard a step pushes it down."""
    s = Synthetic(
        {"inputs": torch.zeros(1, 2), "lr": torch.tensor([-60.0, -1e3, 3.0])},
        {},
        torch.zeros(1, 1).long(),
        torch.ones(1, 1),
    )
    assert (s.rates >= 0).all() and s.rates[2] > 20


def test_trajectory_is_one_without_steps_and_zero_at_the_goal():
    objective, s, _, net, draws = setting(TrajectoryMatching(steps=2, rate=1e-30))
    value, _, _ = objective.value_and_grad(s, objective.target(None, net, draws), net, draws, ())
    assert float(value) == pytest.approx(1.0, abs=1e-12)
    objective, s, _, net, draws = setting(TrajectoryMatching(steps=2, rate=0.1))
    there = Net(net.network, net.state, objective.fit(s, net, draws))
    value, _, _ = objective.value_and_grad(s, objective.target(None, there, draws), there, draws, ())
    assert float(value) < 1e-25


def test_trajectory_is_the_papers_formula():
    objective, s, _, net, draws = setting(TrajectoryMatching(steps=3, rate=0.1))
    value, _ = objective.loss(s, objective.target(None, net, draws), net, draws, ())
    ended = objective.fit(s, net, draws).params

    def flat(params):
        return torch.cat([params[k].flatten() for k in net.state.params])

    theta, start, goal = flat(ended), flat(net.state.params), flat(net.goal.params)
    assert float(value) == pytest.approx(float((theta - goal).norm() ** 2 / (start - goal).norm() ** 2), rel=1e-10)


def test_walk_keeps_no_graph():
    def step(state, shared, each):
        return {"x": state["x"] * shared["a"] + each}

    states = walk(
        step,
        {"x": torch.ones(2)},
        {"a": torch.tensor(2.0, requires_grad=True)},
        [torch.tensor(float(i)) for i in range(3)],
    )
    assert [float(state["x"][0]) for state in states] == [1.0, 2.0, 5.0, 12.0]
    assert not any(state["x"].requires_grad for state in states)
    before, share = pull_back(step)(
        {"x": torch.ones(2)}, {"a": torch.tensor(2.0)}, torch.tensor(0.0), {"x": torch.ones(2)}
    )
    assert before["x"].tolist() == [2.0, 2.0] and float(share["a"]) == 2.0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"feed": "al"}, "feed"),
        ({"memory": "adjoin"}, "adjoint"),
        ({"rates": "every"}, "each"),
        ({"steps": 0}, "steps = 0 is below 1"),
        ({"batch": 0}, "batch = 0 is below 1"),
        ({"window": -1}, "window = -1 is below 0"),
        ({"rate": -0.1}, "rate = -0.1"),
        ({"rate": float("inf")}, "above 0"),
        ({"random_end": True}, "window"),
        ({"random_end": True, "window": 11}, "1 ... 10"),
    ],
)
def test_a_wrong_number_is_named(wrong, words):
    with pytest.raises(PotstillError, match=words):
        Unrolled(**wrong)
