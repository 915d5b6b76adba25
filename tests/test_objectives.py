"""Objectives against their papers' formulas, typed out, and against what must hold whatever the network."""

import pytest
import torch

from potstill.augment import Augment
from potstill.functional import Key
from potstill.methods import DSA
from potstill.networks import network
from potstill.objectives import DistributionMatching, Net, Real, Sizes
from potstill.synthetic import Synthetic, group_index

NORMS = ["none", "instance", "batch", "group", "layer"]


def setting(norm: str = "instance", counts=(2, 2, 2), real=6, augment=None):
    net = network(f"convnet-{norm}-w8-d2", (1, 8, 8), 3)
    state = net.init(Key(0))
    state = type(state)(
        {k: v.double() for k, v in state.params.items()}, {k: v.double() for k, v in state.buffers.items()}
    )
    groups = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    index, mask = group_index(groups, 3)
    inputs = Key(1).normal(len(groups), 1, 8, 8).double()
    s = Synthetic({"inputs": inputs}, {"labels": groups}, index, mask.double())
    batch = Key(2).normal(3, real, 1, 8, 8).double()
    t = Real(batch, torch.arange(3)[:, None].expand(3, real), torch.ones(3, real).double())
    objective = DistributionMatching(real=real, augment=augment or Augment())
    draws = objective.draws(Key(3), Sizes(3, len(groups), 3 * real))
    return objective, s, t, Net(net, state), draws


def value(objective, s, real, net, draws):
    return objective.loss(s, objective.target(real, net, draws), net, draws, ())[0]


@pytest.mark.parametrize("norm", ["none", "instance", "group", "layer"])
def test_dm_is_the_papers_formula(norm):
    """Sum over classes of || mean of psi(x) - mean of psi(s) ||^2, class by class."""
    objective, s, real, net, draws = setting(norm, counts=(1, 2, 3))
    total = 0.0
    for c in range(3):
        of_real = net.network.features(net.state, real.inputs[c]).mean(0)
        of_synthetic = net.network.features(net.state, s.learned["inputs"][s.fixed["labels"] == c]).mean(0)
        total += float(((of_real - of_synthetic) ** 2).sum())
    assert float(value(objective, s, real, net, draws)) == pytest.approx(total, rel=1e-12)


def test_dm_with_batch_norm_takes_the_statistics_of_all_classes_together():
    objective, s, real, net, draws = setting("batch")
    joint = net.network.features(net.state, real.inputs.flatten(0, 1)).unflatten(0, (3, 6)).mean(1)
    synthetic = net.network.features(net.state, s.learned["inputs"]).unflatten(0, (3, 2)).mean(1)
    assert float(value(objective, s, real, net, draws)) == pytest.approx(float((joint - synthetic).square().sum()))


@pytest.mark.parametrize("norm", NORMS)
def test_dm_is_zero_when_s_is_t(norm):
    objective, s, real, net, draws = setting(norm, counts=(6, 6, 6))
    same = s.at({"inputs": real.inputs.flatten(0, 1)})
    assert float(value(objective, same, real, net, draws)) < 1e-20
    assert float(value(objective, s, real, net, draws)) > 1e-3


@pytest.mark.parametrize("augment", [Augment(), DSA])
def test_dm_is_zero_when_s_is_t_under_siamese_augmentation(augment):
    objective, s, real, net, draws = setting(counts=(6, 6, 6), augment=augment)
    assert float(value(objective, s.at({"inputs": real.inputs.flatten(0, 1)}), real, net, draws)) < 1e-20


def test_dm_does_not_see_repeated_samples():
    """A set in which every sample stands twice has the same class means."""
    objective, s, real, net, draws = setting(counts=(1, 2, 3))
    twice = torch.repeat_interleave(torch.arange(6), 2)
    index, mask = group_index(s.fixed["labels"][twice], 3)
    again = Synthetic(
        {"inputs": s.learned["inputs"][twice]}, {"labels": s.fixed["labels"][twice]}, index, mask.double()
    )
    once, doubled = value(objective, s, real, net, draws), value(objective, again, real, net, draws)
    assert float(once) == pytest.approx(float(doubled), rel=1e-12)


def test_dm_ignores_padding_of_small_classes():
    """Real samples behind the mask change nothing."""
    objective, s, real, net, draws = setting()
    mask = real.mask.clone()
    mask[1, 4:] = 0
    spoilt = real.inputs.clone()
    spoilt[1, 4:] = 100.0
    a = value(objective, s, real._replace(mask=mask), net, draws)
    b = value(objective, s, real._replace(mask=mask, inputs=spoilt), net, draws)
    assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_dm_target_has_no_gradient_and_the_loss_has():
    objective, s, real, net, draws = setting()
    target = objective.target(real, net, draws)
    loss, grads, _ = objective.value_and_grad(s, target, net, draws, ())
    assert not target.requires_grad and grads["inputs"].shape == s.learned["inputs"].shape and float(loss) > 0


def test_dm_siamese_draws_are_shared_by_both_sides():
    """With the same image as real and synthetic sample the loss is 0 for any draw, and not so with two draws."""
    objective, s, real, net, _ = setting(counts=(1, 1, 1), real=1, augment=DSA)
    same = s.at({"inputs": real.inputs.flatten(0, 1)})
    differs = 0
    for i in range(12):
        one, two = (objective.draws(Key(i).fold(side), Sizes(3, 3, 3)) for side in "ab")
        assert float(value(objective, same, real, net, one)) < 1e-20
        apart = objective.loss(same, objective.target(real, net, one), net, two, ())[0]
        differs += float(apart) > 1e-6
    assert differs > 6
