"""Who learns from a set: conventions of labels, the set's own walk, kernels, and the protocols of single methods."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge as Sklearn
from torch import nn

import potstill
from potstill.errors import PotstillError
from potstill.evaluation import Judge
from potstill.exchange import DistilledSet, describe_set
from potstill.functional import Key
from potstill.infinite import kernel
from potstill.methods import METHODS
from potstill.networks import State, network
from potstill.recipe import change
from potstill.students import Walker, labels_for, own_kernel
from potstill.synthetic import first_labels
from potstill.testing import toy
from potstill.training import PROTOCOLS, Protocol, Trainer


def a_set(method="random", settings=None, kind=None, lr=None, steps=0, counts=(2, 2, 2), data=None, shift=0.0):
    """Real samples that say that they were made by a recipe."""
    data = data or toy()
    recipe = change(METHODS[method]("small"), {"student": "convnet-w4", **(settings or {})})
    index = torch.cat([(data.train.labels == g).nonzero().flatten()[:n] for g, n in enumerate(counts)])
    meta = describe_set(data, recipe, list(counts), 0, steps)
    kind = kind or meta.labels
    y = first_labels(data.train.labels[index], len(counts), kind if kind != "soft" else "logits")
    y = y.softmax(1) if kind == "soft" else y
    y = y + shift * Key(3).normal(*y.shape) if kind == "centred" else y
    return DistilledSet(data.prepare(data.train.inputs[index]), y, replace(meta, labels=kind), lr)


# --- labels


def test_labels_of_every_convention():
    classes = torch.tensor([0, 2, 1, 1])
    hot = nn.functional.one_hot(classes, 3).float()
    for fit in ("cross-entropy", "squared"):
        assert labels_for(fit, classes, "hard") is classes
    soft = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    assert labels_for("cross-entropy", soft, "soft") is soft
    centred = labels_for("squared", soft, "soft")
    assert (
        torch.allclose(centred.sum(1), torch.zeros(2), atol=1e-6)
        and labels_for("squared", centred, "centred") is centred
    )
    assert torch.allclose(labels_for("cross-entropy", centred, "centred"), soft, atol=1e-6), "there and back"
    scaled = first_labels(classes, 3, "centred") / math.sqrt(3 / 10)
    assert torch.allclose(first_labels(classes, 3, "centred"), hot - 1 / 3)
    back = labels_for("cross-entropy", scaled, "centred")
    assert torch.equal(back.argmax(1), classes) and torch.allclose(back.sum(1), torch.ones(4))


def test_labels_far_from_any_classes_are_still_shares():
    wild = 3 * Key(0).normal(50, 4)
    shares = labels_for("cross-entropy", wild, "centred")
    some = (wild > -0.25).any(1)
    assert (shares >= 0).all() and shares.isfinite().all()
    assert torch.allclose(shares[some].sum(1), torch.ones(int(some.sum())), atol=1e-5)
    assert (shares[some].argmax(1) == wild[some].argmax(1)).all()


# --- the set's own walk

WALK = {"network": "convnet-w4", "objective.steps": 4, "objective.momentum": 0.9, "objective.weight_decay": 0.1}


def by_torch(set_, data, key, rates, feeds, settings, kind="hard", start=None):
    """The walk as anyone would write it: torch.optim.SGD, its rate set anew for each step."""
    net = network("convnet-w4", data.shape, 3)
    state = net.init(start or key.fold("weights"))
    params = {k: nn.Parameter(v.clone()) for k, v in state.params.items()}
    rule = torch.optim.SGD(
        params.values(),
        lr=1.0,
        momentum=settings["objective.momentum"],
        weight_decay=settings["objective.weight_decay"],
    )
    for rate, at in zip(rates, feeds, strict=True):
        rule.param_groups[0]["lr"] = rate
        rule.zero_grad()
        out, y = net(State(params, {}), set_.inputs[at]), set_.labels[at]
        loss = 0.5 * (out - y).pow(2).sum(1).mean() if kind == "centred" else nn.functional.cross_entropy(out, y)
        loss.backward()
        rule.step()
    with torch.no_grad():
        logits = net(State(params, {}), data.prepare(data.test.inputs), "stored")
    return params, float((logits.argmax(1) == data.test.labels).double().mean())


@pytest.mark.parametrize(
    ("feed", "rates", "kind", "window"),
    [
        ("all", "one", "hard", 0),
        ("sequence", "each", "hard", 0),
        ("all", "each", "centred", 0),
        ("all", "one", "soft", 0),
        ("all", "one", "hard", 1),  # a set made by truncated windows with a random end is judged on its whole walk
    ],
)
def test_unrolled_walks_as_torch_optim_does(feed, rates, kind, window):
    data, many = toy(), [0.3, 0.1, 0.2, 0.05]
    lr = torch.tensor(many if rates == "each" else [0.2])
    labels = {"soft": "logits"}.get(kind, kind)
    settings = {**WALK, "objective.feed": feed, "objective.rates": rates, "labels": labels}
    settings |= {"objective.window": window, "objective.random_end": True} if window else {}
    set_ = a_set("dd", settings, kind, lr, data=data, shift=0.1)
    feeds = [[i % 2, 2 + i % 2, 4 + i % 2] for i in range(4)] if feed == "sequence" else [list(range(6))] * 4
    got = potstill.evaluate(set_, data, repeats=2, seed=5)[0]
    wanted, walker = (
        [],
        Judge(data, PROTOCOLS["unrolled"]).student("convnet-w4", PROTOCOLS["unrolled"], set_, kind, False),
    )
    for r in range(2):
        key = Key(5).fold("evaluate", r)
        params, score = by_torch(set_, data, key, many if rates == "each" else [0.2] * 4, feeds, settings, kind)
        wanted.append(round(score, 6))
        (state,) = walker.fit([(set_.inputs, set_.labels)], [key], lambda n: None)
        for k, v in state.params.items():
            assert torch.allclose(v, params[k], atol=1e-5), k
    assert got.protocol == "unrolled" and got.accuracies == wanted


def test_a_walk_is_the_one_that_the_set_was_made_by():
    """On the same draws and weights it ends where the objective of the run ends."""
    from potstill.testing import still_for

    data = toy()
    recipe = change(METHODS["dd"]("small"), {**WALK, "student": "convnet-w4", "augment.ops": ["crop", "scale"]})
    run = still_for(recipe, data)
    set_ = run.set(run.fresh().learned, 1)
    key = Key(0).fold("any")
    walker = Walker(run.network, run.task, set_, "hard", False, "cpu")
    (state,) = walker.fit([(set_.inputs, set_.labels)], [key], lambda n: None)
    from potstill.objectives import Net, Sizes

    draws = run.objective.draws(key, Sizes(3, 6, 0))
    own = run.objective.fit(
        run.synthetic(run.fresh().learned), Net(run.network, run.network.init(key.fold("weights"))), draws
    )
    for k, v in own.params.items():
        assert torch.allclose(state.params[k], v, atol=1e-6), k


@pytest.mark.parametrize(
    ("source", "steps", "fixed"),
    [
        ({"source.lifetime": 9}, 9, True),
        ({"source.lifetime": 9}, 10, False),
        ({"source.lifetime": 9, "source.size": 2}, 9, False),
        ({"source.lifetime": 9, "source.epochs": 1}, 9, False),
        ({"source.lifetime": 1}, 1, False),
    ],
)
def test_a_set_for_fixed_weights_is_judged_from_them(source, steps, fixed):
    """One network all run long, never trained between: its weights are those that the set is for."""
    data = toy()
    set_ = a_set("dd", {**WALK, **source}, lr=torch.tensor([0.1]), steps=steps, data=data)
    walker = Walker(network("convnet-w4", data.shape, 3), data.task, set_, "hard", False, "cpu")
    pair, keys = (set_.inputs, set_.labels), [Key(i) for i in range(2)]
    a, b = walker.fit([pair] * 2, keys, lambda n: None)
    assert all(torch.equal(a.params[k], b.params[k]) for k in a.params) == fixed
    if fixed:
        start = Key(0).fold("source", 0, "weights")
        params, _ = by_torch(set_, data, Key(0), [0.1] * 4, [list(range(6))] * 4, WALK, start=start)
        assert all(torch.allclose(a.params[k], v, atol=1e-5) for k, v in params.items())


def test_labels_learned_to_another_class_leave_the_groups_as_they_are():
    data = toy()
    set_ = a_set(
        "dd", {**WALK, "objective.feed": "sequence", "labels": "centred"}, "centred", torch.tensor([0.1]), data=data
    )
    set_.labels[:2] = set_.labels[2:4].clone()  # nothing is of class 0 any more
    assert potstill.evaluate(set_, data, repeats=1)[0].repeats == 1


def test_a_set_without_steps_of_its_own_is_refused():
    data = toy()
    for set_ in (
        a_set("dm"),
        a_set("random"),
        replaced(a_set("dm"), recipe={}),
        replaced(a_set("dm"), recipe={"steps": []}),
    ):
        with pytest.raises(PotstillError) as caught:
            potstill.evaluate(set_, data, protocol="unrolled", repeats=1)
        assert "this one was made without" in str(caught.value) and "\n" not in str(caught.value)


def replaced(set_, **meta):
    return DistilledSet(set_.inputs, set_.labels, replace(set_.meta, **meta), set_.lr)


# --- kernels


@pytest.mark.parametrize(
    ("name", "used", "ridge", "kind"),
    [
        ("kernel", "nngp-dense-d2", 0.05, "centred"),
        ("ntk-dense-d2", "ntk-dense-d2", 0.05, "centred"),
        ("kernel", "nngp-dense-d2", 0.05, "hard"),
        ("kernel", "nngp-dense-d2", 0.05, "soft"),
    ],
)
@pytest.mark.parametrize("protocol", [None, "dsa"])
def test_a_kernel_is_judged_as_scikit_learn_does(name, used, ridge, kind, protocol):
    """Whatever the protocol, which trains networks and no kernels."""
    data = toy()
    settings = {"objective.kernel": "nngp-dense-d2", "objective.ridge": 0.05, "student": "kernel", "method": "mine"}
    set_ = a_set("kip", settings, kind, data=data, shift=0.3)
    y = np.eye(3)[set_.labels] - 1 / 3 if kind == "hard" else set_.labels.double().numpy() - (kind == "soft") / 3
    x, rows = set_.inputs.double(), data.prepare(data.test.inputs).double()
    own = kernel(used)(x, x).numpy()
    fitted = Sklearn(alpha=ridge * np.trace(own) / 6, kernel="precomputed").fit(own, y)
    predicted = fitted.predict(kernel(used)(rows, x).numpy())
    wanted = float((predicted.argmax(1) == data.test.labels.numpy()).mean())
    (got,) = potstill.evaluate(set_, data, networks=[name], repeats=4, protocol=protocol)
    assert got.accuracies == [pytest.approx(wanted, abs=1e-6)] and got.repeats == 1 and got.accuracy_std == 0
    assert (got.network, got.precision) == (used, "fp64")
    judge = Judge(data, PROTOCOLS[protocol or "kip"])
    student = judge.student(name, judge.protocol, set_, kind, False)
    (state,) = student.fit([(set_.inputs, labels_for("squared", set_.labels, kind))], [Key(0)], lambda n: None)
    from potstill.kernels import predict

    mine = predict(kernel(used)(rows, state[0]), state[1], state[2], student.ridge).numpy()
    assert np.abs(mine - predicted).max() < 1e-6


def test_real_baselines_of_a_kernel_are_drawn_anew(capsys):
    data, lines = toy(), []
    rows = potstill.evaluate(
        a_set("kip", {"student": "kernel"}, data=data), data, repeats=3, say=lines.append,
        baselines=["random", "k-means", "random-soft", "whole"],
    )  # fmt: skip
    assert [r.repeats for r in rows] == [1, 3, 1] and rows[1].spread == "sets and networks"
    assert sum("not measured" in line for line in lines) == 2


def test_the_kernel_of_a_set_that_was_made_by_none():
    assert own_kernel(None) == own_kernel(a_set("dm")) == own_kernel(a_set("frepo")) == ("ntk-dense-d1", 1e-6)
    assert own_kernel(replaced(a_set("kip"), recipe={})) == ("ntk-dense-d1", 1e-6)


@pytest.mark.parametrize("name", ["ntk-dens", "nngp", "ntk-dense-d0", "ntk-lstm-d2"])
def test_a_kernel_that_does_not_exist_is_refused(name):
    with pytest.raises(PotstillError) as caught:
        potstill.evaluate(a_set("kip"), toy(), networks=[name])
    assert "\n" not in str(caught.value)


# --- protocols


def test_mtt_trains_with_the_rate_of_the_set(monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "mtt", replace(PROTOCOLS["mtt"], epochs=4))
    data = toy()
    learned = a_set("mtt", lr=torch.tensor([0.03]), data=data)
    judge = Judge(data, PROTOCOLS["mtt"])
    assert judge.resolved(learned, "hard").lr == pytest.approx(0.03)
    assert judge.student(
        "convnet-w4", judge.resolved(learned, "hard"), learned, "hard", False
    ).optimiser.lr == pytest.approx(0.03)
    got = potstill.evaluate(learned, data, repeats=1)[0]
    dsa = replace(PROTOCOLS["dsa"], epochs=4, lr=float(learned.lr[0]))
    wanted = Judge(data, dsa, repeats=1).set(learned, "", "convnet-w4")
    assert got.accuracies == wanted.accuracies and got.protocol == "mtt"
    assert judge.resolved(replaced_lr(learned, torch.tensor([0.01, 0.03])), "hard").lr == pytest.approx(0.02)
    assert Judge(data, PROTOCOLS["dsa"]).resolved(learned, "hard").lr == 0.01, "another protocol has its own"
    with pytest.raises(PotstillError, match="trains with the rate that a set has learned; this one has none"):
        potstill.evaluate(a_set("dm"), data, protocol="mtt", repeats=1)


def replaced_lr(set_, lr):
    return DistilledSet(set_.inputs, set_.labels, set_.meta, lr)


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    frepo = PROTOCOLS["frepo"]
    rates = [frepo.rate(i, 2000) for i in range(2000)]
    for i in range(500):
        assert rates[i] == pytest.approx(3e-4 * i / 500)
    for i in (500, 700, 1250, 1999):
        assert rates[i] == pytest.approx(3e-4 * (0.01 + 0.99 * (1 + math.cos(math.pi * (i - 500) / 1500)) / 2))
    assert rates[500] == max(rates) == pytest.approx(3e-4) and min(rates[500:]) == rates[-1] > 3e-6
    assert frepo.rate(2000, 2000) == pytest.approx(3e-6)
    assert frepo.rate(20, 40) == pytest.approx(3e-4) and frepo.rate(10, 40) == pytest.approx(1.5e-4)
    assert PROTOCOLS["frepo"].rate(0, 1) == pytest.approx(3e-4), "a single step is not lost to warming up"


@pytest.mark.parametrize(
    ("samples", "steps"),
    [(10, 1000), (11, 2000), (100, 2000), (500, 5000), (1000, 10_000), (5000, 40_000), (9000, 40_000)],
)
def test_how_long_frepo_trains(samples, steps):
    epochs, each = PROTOCOLS["frepo"].plan(samples)
    assert steps <= epochs * each < steps + each


@pytest.mark.parametrize(("kind", "weight_decay"), [("centred", 0.0), ("hard", 0.0), ("centred", 0.1)])
def test_frepo_is_torchs_adam_on_a_squared_loss(kind, weight_decay):
    data, key = toy(), Key(7)
    protocol = replace(
        PROTOCOLS["frepo"],
        lengths=(),
        steps=12,
        batch=4,
        weight_decay=weight_decay,
        augment=PROTOCOLS["dc"].augment,
        lr=0.01,
    )
    net = network("convnet-none-w4", data.shape, 3)  # before a norm a bias has no gradient but rounding
    set_ = a_set("frepo", kind=kind, data=data, shift=0.2)
    state = net.init(key.fold("weights"))
    params = {k: nn.Parameter(v.clone()) for k, v in state.params.items()}
    rule = torch.optim.Adam(params.values(), lr=1.0, weight_decay=weight_decay)
    y = set_.labels if kind == "centred" else nn.functional.one_hot(set_.labels, 3) - 1 / 3
    step = 0
    for epoch in range(6):
        order = key.fold("order", epoch).permutation(6)
        for at in (order[:4], order[4:]):
            rule.param_groups[0]["lr"] = protocol.rate(step, 12)
            rule.zero_grad()
            (0.5 * (net(State(params, {}), set_.inputs[at]) - y[at]).pow(2).sum(1).mean()).backward()
            rule.step()
            step += 1
    trainer = Trainer(net, protocol, data.task, False, "cpu")
    got, _ = trainer.fit([(set_.inputs, set_.labels)] * 2, [key, Key(8)], lambda n: None)
    for k, v in got.params.items():
        assert torch.allclose(v, params[k], atol=1e-4), k
        assert not torch.allclose(v, state.params[k], atol=1e-3), k


def test_frepo_mirrors_only_where_it_is_asked_to():
    """Its authors leave grey images as they are."""
    plain, flipped = PROTOCOLS["frepo"], PROTOCOLS["frepo-flip"]
    assert "flip" not in plain.augment.ops and {*flipped.augment.ops} == {*plain.augment.ops, "flip"}
    assert replace(flipped, name="frepo", augment=plain.augment) == plain


def test_a_set_with_centred_labels_under_any_protocol():
    """Cross-entropy sees the shares; nothing else is different."""
    data = toy()
    set_ = a_set("frepo", data=data)
    short = Judge(data, Protocol("short", epochs=20, lr=0.05), repeats=1)
    shares = labels_for("cross-entropy", set_.labels, "centred")
    soft = DistilledSet(set_.inputs, shares, replace(set_.meta, labels="soft"))
    assert short.set(set_, "", "convnet-w4").accuracies == short.set(soft, "", "convnet-w4").accuracies


def test_hashes_stand_beside_numbers_and_do_not_change():
    """Those of the protocols that numbers have been published under, and no two the same."""
    assert {n: PROTOCOLS[n].hash for n in ("dc", "dsa", "whole")} == {
        "dc": "1833d931",
        "dsa": "261432dd",
        "whole": "9e9d6cb1",
    }
    hashes = {p.hash for p in PROTOCOLS.values()}
    assert len(hashes) == len(PROTOCOLS)
    frepo = PROTOCOLS["frepo"]
    changes = {"rule": "sgd", "fit": "cross-entropy", "lengths": ()}
    assert len({frepo.hash, *(replace(frepo, **{k: v}).hash for k, v in changes.items())}) == 4
    assert (frepo.hash, PROTOCOLS["frepo-flip"].hash) == ("991b19ee", "d03816e0")
    a = frepo.augment  # the ranges of the authors' evaluation
    assert (a.brightness / 2, a.jitter, a.scale, a.crop, a.rotate, a.cutout) == (0.25, 0.25, 1.25, 0.125, 15.0, 0.25)
    assert a.fill == "edge" and a.ops == ("color", "crop", "scale", "rotate", "cutout") and a.mode == "one"
    plain = PROTOCOLS["dsa"].augment.plain()
    assert not {"fill", "jitter"} & set(plain) and {"fill", "jitter"} <= set(a.plain()), "older digests hold"


def test_a_gram_matrix_that_cannot_be_solved_is_an_error_and_no_accuracy():
    """Not the share of the first class, which the largest of all NaN is."""
    set_ = a_set("kip", {"student": "kernel", "objective.ridge": 0.0})
    same = DistilledSet(set_.inputs[:1].expand(6, -1, -1, -1).clone(), set_.labels, set_.meta)
    with pytest.raises(PotstillError, match="not positive definite"):
        Judge(toy(), PROTOCOLS["kip"], repeats=1).set(same, "", "kernel")
