"""Kernel ridge regression as an objective: held against scikit-learn, and FRePo's loss against its formula."""

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge as Sklearn

from potstill.augment import Augment
from potstill.data import Classification
from potstill.errors import PotstillError
from potstill.functional import Key
from potstill.infinite import kernel
from potstill.layers import Chain
from potstill.methods import METHODS
from potstill.networks import State, network
from potstill.objectives import KernelRidge, Net, Real
from potstill.recipe import change
from potstill.synthetic import Synthetic, first_labels, group_index
from potstill.testing import still_for, toy

SHAPE, CLASSES, TASK = (1, 8, 8), 3, Classification(3, fit="squared")


def objective(**fields):
    return KernelRidge(**fields, task=TASK, augment=Augment())


def make_s(samples=4, kind="hard", seed=0, dtype=torch.float64):
    key, classes = Key(seed).fold("s"), torch.arange(samples) % CLASSES
    labels = first_labels(classes, CLASSES, kind)
    if kind != "hard":
        labels = (labels + 0.1 * key.fold("labels").normal(*labels.shape)).to(dtype)
    inputs = key.fold("inputs").normal(samples, *SHAPE).to(dtype)
    return Synthetic({"inputs": inputs, "labels": labels}, {}, *group_index(classes, CLASSES), kind)


def make_real(n=11, seed=1, dtype=torch.float64):
    key = Key(seed).fold("real")
    return Real(key.normal(n, *SHAPE).to(dtype), key.fold("labels").integers(CLASSES, n), torch.ones(n, dtype=dtype))


def make_net(name="widenet-w4", seed=2, dtype=torch.float64):
    net = network(name, SHAPE, CLASSES)
    params, buffers = net.init(Key(seed))
    return Net(net, State(*({k: v.to(dtype) for k, v in part.items()} for part in (params, buffers))))


def value(made, s, real, net):
    return made.loss(s, made.target(real, net, {}), net, {}, ())[0]


def hot(labels):
    """One-hot rows less 1/C."""
    return np.eye(CLASSES)[np.asarray(labels)] - 1 / CLASSES


def grams(name, net, x, rows):
    """Both Gram matrices, the features taken by hand."""
    if name == "features":
        a, b = (net.network.features(net.state, v, "stored").detach() for v in (x, rows))
        return (b @ a.T).numpy(), (a @ a.T).numpy()
    gram = kernel(name)
    return gram(rows, x).detach().numpy(), gram(x, x).detach().numpy()


def by_sklearn(cross, own, y, target, ridge):
    """Half the mean squared distance of scikit-learn's predictions, its alpha the ridge times the mean diagonal."""
    fitted = Sklearn(alpha=ridge * np.trace(own) / len(own), kernel="precomputed").fit(own, y)
    return 0.5 * ((fitted.predict(cross) - target) ** 2).sum(1).mean()


@pytest.mark.parametrize("name", ["features", "ntk-dense-d1", "nngp-dense-d2"])
@pytest.mark.parametrize("kind", ["hard", "centred"])
@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_the_loss_is_scikit_learns(name, kind, ridge):
    s, real, net = make_s(kind=kind), make_real(), make_net()
    cross, own = grams(name, net, s.learned["inputs"], real.inputs)
    y = hot(s.learned["labels"]) if kind == "hard" else s.learned["labels"].numpy()
    wanted = by_sklearn(cross, own, y, hot(real.labels), ridge)
    got = value(objective(kernel=name, ridge=ridge), s, real, net)
    assert got.dtype == torch.float64 and float(got) == pytest.approx(wanted, rel=1e-7)


def test_probabilities_are_centred_as_the_targets_are():
    """Labels learned as logits stand for probabilities, which lie 1/C above centred labels."""
    s, real, net = make_s(kind="logits"), make_real(), make_net()
    cross, own = grams("ntk-dense-d1", net, s.learned["inputs"], real.inputs)
    y = s.learned["labels"].softmax(1).numpy() - 1 / CLASSES
    wanted = by_sklearn(cross, own, y, hot(real.labels), 0.01)
    assert float(value(objective(kernel="ntk-dense-d1", ridge=0.01), s, real, net)) == pytest.approx(wanted, rel=1e-7)


def test_frepo_is_its_formula():
    """Squared error on the real batch, summed over classes and halved, plus minus the labels' margin up to 1/C."""
    s, real, net = make_s(5, "centred"), make_real(), make_net()
    f_s, f_t = (net.network.features(net.state, x, "stored") for x in (s.learned["inputs"], real.inputs))
    k_pp, k_tp, n = f_s @ f_s.T, f_t @ f_s.T, 5
    solved = torch.linalg.inv(k_pp + 1e-6 * k_pp.trace() / n * torch.eye(n, dtype=torch.float64)) @ s.learned["labels"]
    error = 0.0
    for i in range(11):
        for c in range(CLASSES):
            y = (1.0 if int(real.labels[i]) == c else 0.0) - 1 / CLASSES
            error += 0.5 * float((k_tp @ solved)[i, c] - y) ** 2 / 11
    margin = 0.0
    for row in s.learned["labels"].tolist():
        second, first = sorted(row)[-2:]
        margin -= min(first - second, 1 / CLASSES) / n
    assert float(value(objective(margin=True), s, real, net)) == pytest.approx(error + margin, rel=1e-6)
    assert float(value(objective(), s, real, net)) == pytest.approx(error, rel=1e-6)


def test_the_margin_pulls_apart_what_is_close_and_leaves_the_rest():
    """Its gradient is -1/n on the largest and 1/n on the second largest of a row, 0 where they are 1/C apart."""
    labels = torch.tensor([[0.2, 0.1, -0.3], [0.6, -0.3, -0.3], [-0.1, 0.0, 0.05]], dtype=torch.float64)
    real, net, grads = make_real(), make_net(), []
    for margin in (False, True):
        s = make_s(3, "centred")
        y = labels.clone().requires_grad_()
        value(objective(margin=margin), s.at({**s.learned, "labels": y}), real, net).backward()
        grads.append(y.grad)
    wanted = torch.tensor([[-1, 1, 0], [0, 0, 0], [0, 1, -1]], dtype=torch.float64) / 3
    assert torch.allclose(grads[1] - grads[0], wanted, atol=1e-9)


@pytest.mark.parametrize("name", ["features", "ntk-dense-d1"])
def test_mirrored_samples_stand_beside_the_others(name):
    s, real, net = make_s(kind="centred"), make_real(), make_net()
    x, y = s.learned["inputs"], s.learned["labels"]
    stacked = Synthetic(
        {"inputs": torch.cat([x, torch.from_numpy(x.numpy()[..., ::-1].copy())]), "labels": torch.cat([y, y])},
        {},
        *group_index(torch.arange(4).repeat(2) % CLASSES, CLASSES),
        "centred",
    )
    got = value(objective(kernel=name, mirror=True, margin=True), s, real, net)
    assert float(got) == pytest.approx(float(value(objective(kernel=name, margin=True), stacked, real, net)), rel=1e-9)
    assert float(got) != pytest.approx(float(value(objective(kernel=name, margin=True), s, real, net)), rel=1e-3)


@pytest.mark.parametrize("name", ["features", "ntk-dense-d1"])
def test_it_interpolates_as_the_ridge_vanishes(name):
    """With S as the real batch the loss is nothing without a ridge and that of no prediction with an endless one."""
    s, net = make_s(), make_net()
    real = Real(s.learned["inputs"], s.learned["labels"], torch.ones(4))
    losses = [float(value(objective(kernel=name, ridge=r), s, real, net)) for r in (0.0, 1e-6, 1e-3, 1.0, 1e9)]
    assert losses[0] < 1e-18 and losses == sorted(losses)
    assert losses[-1] == pytest.approx(0.5 * (1 - 1 / CLASSES), rel=1e-6)


def test_the_gradient_is_that_of_differences():
    s, real, net = make_s(kind="centred"), make_real(), make_net()
    made = objective(ridge=1e-2, margin=True)
    target = made.target(real, net, {})
    _, grads, _ = made.value_and_grad(s, target, net, {}, ())
    for part in ("inputs", "labels"):
        way = Key(5).fold(part).normal(*s.learned[part].shape).double()
        ends = [
            float(made.loss(s.at({**s.learned, part: s.learned[part] + h * way}), target, net, {}, ())[0])
            for h in (1e-6, -1e-6)
        ]
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float((grads[part] * way).sum()), rel=1e-5)


def test_the_real_side_has_no_gradient_and_stored_statistics():
    """Whoever is in the batch with it, a real sample has the same features; nothing of them is in a graph."""
    recipe = change(METHODS["frepo"]("paper"), {"network": "convnet-batch-w4", "student": "convnet-batch-w4"})
    run = still_for(recipe, toy())
    _, net, real, draws = run.inputs_of(run.fresh(), 0)
    statistics = {k: v - 0.3 for k, v in net.state.buffers.items()}
    params = {k: v.requires_grad_() for k, v in net.state.params.items()}
    net = net._replace(state=State(params, statistics))
    rows = run.target(net, real, draws)["rows"]
    assert statistics and not rows.requires_grad
    alone = run.target(net, Real(*(part[:1] for part in real)), draws)["rows"]
    assert torch.allclose(rows[:1], alone, atol=1e-5)
    moved = net._replace(state=State(params, {k: v - 0.2 for k, v in statistics.items()}))
    assert not torch.allclose(run.target(moved, real, draws)["rows"], rows, atol=1e-3)


@pytest.mark.parametrize(("preset", "width"), [("paper", ""), ("small", "-w32")])
def test_frepo_distils_with_batch_norm_and_is_judged_without(preset, width):
    """Fresh networks have the statistics of none, used ones those of S: nine tenths of their last batch."""
    recipe = METHODS["frepo"](preset)
    assert (recipe.network, recipe.student) == (f"widenet-batch{width}", f"widenet{width}")
    run = still_for(change(recipe, {"network": "widenet-batch-w4", "source.size": 1}), toy())
    now = run.fresh()
    _, net, _, _ = run.inputs_of(now, 0)
    fresh = net.state.buffers
    assert all(bool((v == float(k.endswith("variance"))).all()) for k, v in fresh.items()) and len(fresh) > 1
    now, _ = run.step(now, 0)
    _, used, _, _ = run.inputs_of(now, 1)
    s = run.synthetic(now.learned)
    x, _ = s.take(torch.arange(len(s)))
    met = net.network.layers[:4]
    name = next(k for k, _ in met if k.startswith("norm"))
    before = Chain(met[: [k for k, _ in met].index(name)])(net.state, x, "batch", {})
    mean = before.mean((0, 2, 3))
    assert torch.allclose(used.state.buffers[f"{name}.mean"], 0.9 * mean, atol=1e-5) and mean.abs().min() > 1e-4


def test_an_infinite_kernel_needs_no_network_and_features_do():
    assert not objective(kernel="ntk-dense-d1").needs.network and objective().needs.network
    assert objective(real=7).needs.real.count == 7


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kernel": "ntk-dens-d1"}, "did you mean 'ntk-dense'"),
        ({"kernel": "feature"}, "feature"),
        ({"kernel": "ntk-dense-d0"}, "kernel depth 0"),
        ({"ridge": -1e-6}, "objective.ridge = -1e-06 is no finite number of 0 or more"),
        ({"ridge": float("nan")}, "objective.ridge"),
        ({"ridge": float("inf")}, "objective.ridge"),
        ({"real": 0}, "objective.real = 0 is below 1"),
    ],
)
def test_a_wrong_field_is_one_line(fields, words):
    with pytest.raises(PotstillError) as caught:
        _ = objective(**fields).needs
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective.kernel": "features"}, "needs a source of networks"),
        ({"objective.kernel": "features", "source": {"kind": "pool", "size": 0}}, "source.size = 0 is below 1"),
        ({"labels": "hard", "learn": ["inputs", "labels"]}, "set labels to logits or centred"),
        ({"source": {"kind": "pool"}}, "needs no networks: source.kind = none"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(settings, words):
    with pytest.raises(PotstillError) as caught:
        change(METHODS["kip"]("small"), settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_features_in_float32_are_solved_in_float64():
    """Rounding enters through the features alone: the loss stays near that of all in float64."""
    s, real, net = make_s(kind="centred"), make_real(), make_net()
    wanted = float(value(objective(ridge=1e-3), s, real, net))
    single = (make_s(kind="centred", dtype=torch.float32), make_real(dtype=torch.float32))
    got = value(objective(ridge=1e-3), *single, make_net(dtype=torch.float32))
    assert got.dtype == torch.float64 and float(got) == pytest.approx(wanted, rel=1e-4)


def test_more_samples_than_features_stay_solvable_in_float32():
    """The Gram matrix then has eigenvalues of 0, which a product in float32 would put below minus the ridge."""
    s, real, net = (f(dtype=torch.float32) for f in (lambda dtype: make_s(200, dtype=dtype), make_real, make_net))
    exact = value(objective(), make_s(200), make_real(), make_net())
    got = value(objective(), s, real, net)
    assert bool(got.isfinite()) and float(got) == pytest.approx(float(exact), rel=0.05)
