"""Gradient matching against the paper's formula, typed out with autograd alone, and what must hold whatever the network."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from potstill.augment import Augment
from potstill.data import Classification
from potstill.functional import Key
from potstill.methods import DSA, METHODS, loops
from potstill.networks import State, network
from potstill.objectives import ByGroup, GradientMatching, Net, Real, Sizes
from potstill.recipe import change
from potstill.synthetic import Synthetic, group_index
from potstill.testing import still_for, toy


def setting(norm="instance", counts=(1, 2, 3), real=6, augment=None):
    net = network(f"convnet-{norm}-w8-d2", (1, 8, 8), 3)
    state = net.init(Key(0))
    state = State({k: v.double() for k, v in state.params.items()}, {k: v.double() for k, v in state.buffers.items()})
    groups = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    index, mask = group_index(groups, 3)
    s = Synthetic({"inputs": Key(1).normal(len(groups), 1, 8, 8).double()}, {"labels": groups}, index, mask.double())
    labels = torch.arange(3)[:, None].expand(3, real)
    t = Real(Key(2).normal(3, real, 1, 8, 8).double(), labels, torch.ones(3, real).double())
    objective = GradientMatching(real=real, augment=augment or Augment())
    return objective, s, t, Net(net, state), objective.draws(Key(3), Sizes(3, len(groups), 3 * real))


def value(objective, s, real, net, draws):
    return float(objective.loss(s, objective.target(real, net, draws), net, draws, ())[0])


@pytest.mark.parametrize("augment", [Augment(), DSA], ids=["dc", "dsa"])
@pytest.mark.parametrize("norm", ["none", "instance", "group", "layer", "batch"])
def test_is_the_papers_formula(norm, augment):
    """Class by class, weight by weight, row by row: one minus the cosine of the two gradients; with augmentation, each class
    transformed in one way on both sides."""
    objective, s, real, net, draws = setting(norm, augment=augment)
    params = {k: v.clone().requires_grad_() for k, v in net.state.params.items()}
    total = 0.0
    for c in range(3):
        sides = []
        of_class = {name: drawn[c : c + 1] for name, drawn in draws["augment"].items()}
        for x in (real.inputs[c], s.learned["inputs"][s.fixed["labels"] == c]):
            x = torch.cat([augment(one[None, None], of_class)[0] for one in x])
            logits = net.network(State(params, net.state.buffers), x, "stored")
            loss = F.cross_entropy(logits, torch.full((len(x),), c))
            sides.append(dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)))
        for name, of_real in sides[0].items():
            if of_real.ndim == 1:
                continue
            for a, b in zip(of_real.reshape(len(of_real), -1), sides[1][name].reshape(len(of_real), -1), strict=True):
                total += float(1 - (a @ b) / (a.norm() * b.norm() + 1e-6))
    assert value(objective, s, real, net, draws) == pytest.approx(total, rel=1e-9)


def test_centred_labels_have_their_squared_loss():
    """Learned labels that are those of the real classes are the same as these, and others are not."""
    objective, s, real, net, draws = setting()
    objective = replace(objective, task=Classification(3, fit="squared"))
    rows = torch.eye(3).double()[s.fixed["labels"]] - 1 / 3
    centred, off = (replace(s, fixed={"labels": y}, labels="centred") for y in (rows, rows + 0.5 * rows.roll(1, 1)))
    assert value(objective, centred, real, net, draws) == pytest.approx(value(objective, s, real, net, draws), rel=1e-7)
    assert value(objective, off, real, net, draws) != pytest.approx(value(objective, s, real, net, draws), rel=1e-5)
    logits, labels = Key(5).normal(4, 3), torch.tensor([0, 2, 1, 1])
    for fit in ("cross-entropy", "squared"):
        task = Classification(3, fit=fit)
        assert torch.allclose(task.losses(logits, labels).mean(), task.loss(logits, labels))


@pytest.mark.parametrize("augment", [Augment(), DSA])
def test_is_zero_when_s_is_t(augment):
    objective, s, real, net, draws = setting(counts=(6, 6, 6), augment=augment)
    same = s.at({"inputs": real.inputs.flatten(0, 1)})
    dead = sum(int((g.flatten(2).norm(dim=2) < 1e-3).sum()) for g in objective.target(real, net, draws).values())
    assert value(objective, same, real, net, draws) < 1e-2 + dead
    assert value(objective, s, real, net, draws) > 10


def test_the_cosine_ignores_the_size_of_gradients():
    objective, s, real, net, draws = setting()
    target = objective.target(real, net, draws)
    grown = {k: 1e4 * v for k, v in target.items()}
    losses = [float(objective.loss(s, t, net, draws, ())[0]) for t in ({k: 1e2 * v for k, v in target.items()}, grown)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_padding_of_small_classes_changes_nothing():
    objective, s, real, net, draws = setting()
    mask = real.mask.clone()
    mask[1, 4:] = 0
    spoilt = real.inputs.clone()
    spoilt[1, 4:] = 100.0
    a, b = (value(objective, s, real._replace(mask=mask, inputs=x), net, draws) for x in (real.inputs, spoilt))
    assert a == pytest.approx(b, rel=1e-9)


def test_only_weights_with_rows_are_compared():
    objective, _, real, net, draws = setting()
    assert sorted(objective.target(real, net, draws)) == ["conv0.weight", "conv1.weight", "head.weight"]


def small(method, **settings):
    settings = {"network": "convnet-w8-d2", "student": "convnet-w8-d2", "objective.real": 4, **settings}
    return change(METHODS[method]("small", 3), settings)


def test_batch_norm_is_calibrated_on_real_samples():
    still = still_for(small("dc", network="convnet-batch-w8-d2"), toy())
    _, net, _, _ = still.inputs_of(still.fresh(), 0)
    batch = still.real(ByGroup(16), still.key.fold("calibrate", 0))
    seen = net.network.forward(net.state, batch.inputs.flatten(0, 1), "batch")[1]
    assert seen and all(torch.allclose(net.state.buffers[k], v) for k, v in seen.items())


def test_networks_are_trained_on_s_as_torch_would_and_then_replaced():
    """Three steps of one network with two passes over S after each but the last, against torch.optim.SGD."""
    still = still_for(small("dc", **{"source.lifetime": 3, "source.epochs": 2}), toy())
    now, seen = still.fresh(), []
    for step in range(4):
        _, net, _, _ = still.inputs_of(now, step)
        seen.append(net.state.params)
        now, _ = still.step(now, step)
        if step == 0:
            x, y = still.synthetic(now.learned).take(torch.arange(len(still.start)))
            plain = {k: torch.nn.Parameter(v.clone()) for k, v in seen[0].items()}
            optimiser = torch.optim.SGD(plain.values(), lr=0.01)
            for _ in range(2):
                optimiser.zero_grad()
                F.cross_entropy(net.network(State(plain, {}), x), y).backward()
                optimiser.step()
    for k, v in seen[1].items():
        assert torch.allclose(v, plain[k], atol=1e-6)
        assert v.ndim == 1 or not torch.equal(v, seen[0][k])  # a bias before an instance norm has no gradient
    moved = [float((seen[i]["head.weight"] - seen[0]["head.weight"]).norm()) for i in (1, 2, 3)]
    assert moved[0] < moved[1] < 0.5 < moved[2], "the fourth step has a fresh network"


@pytest.mark.parametrize(
    ("ipc", "expected"), [(1, (1, 1)), (10, (10, 50)), (50, (50, 10)), (3, (3, 167)), (100, (50, 10))]
)
def test_loops_by_images_per_class(ipc, expected):
    assert loops(ipc) == expected
    assert METHODS["dsa"]("paper", ipc).source.lifetime == expected[0]


@pytest.mark.parametrize("method", ["dc", "dsa"])
def test_the_loss_falls_over_a_run(method):
    still = still_for(small(method, **{"source.lifetime": 1, "source.epochs": 0, "optimiser.inputs.lr": 1.0}), toy())
    now, losses = still.fresh(), []
    for step in range(60):
        now, loss = still.step(now, step)
        losses.append(loss)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
