"""Protocols and their networks: held against a plain PyTorch loop, and against what numbers must satisfy."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import potstill
from potstill import training
from potstill.augment import Augment
from potstill.data import Classification, Data
from potstill.errors import PotstillError
from potstill.exchange import DistilledSet, describe_set
from potstill.functional import Key
from potstill.judge import Judge, fitting
from potstill.methods import DSA, METHODS
from potstill.networks import network
from potstill.recipe import change
from potstill.teacher import School
from potstill.testing import toy
from potstill.training import PROTOCOLS, Protocol, Trainer

SHORT = Protocol("short", epochs=30, lr=0.05)


def real_set(data, ipc=3, **changes):
    recipe = change(METHODS["random"]("paper"), {"student": "convnet-w8", "protocol": "dc"})
    counts = [ipc] * data.task.classes
    index = torch.cat([(data.train.labels == g).nonzero().flatten()[:ipc] for g in range(data.task.classes)])
    meta = replace(describe_set(data, recipe, counts, 0, 0), **changes)
    return DistilledSet(data.prepare(data.train.inputs[index]), data.train.labels[index], meta)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "dc", replace(SHORT, name="dc"))
    monkeypatch.setitem(PROTOCOLS, "whole", replace(SHORT, name="whole", schedule="cycle"))


@pytest.mark.parametrize(("samples", "batch"), [(9, 256), (9, 4)])
def test_training_is_a_plain_loop_with_torch_optim(samples, batch):
    """Same weights, order and rates: the same network in the end, momentum, weight decay and drop of the rate included."""
    data, key = toy(), Key(7)
    protocol = replace(SHORT, batch=batch, epochs=6)
    net = network("convnet-w8-d2", data.shape, 3)
    x, y = data.prepare(data.train.inputs[::3])[:samples].double(), data.train.labels[::3][:samples]

    weights = net.init(key.fold("weights"))
    plain = {k: nn.Parameter(v.clone()) for k, v in weights.params.items()}
    optimiser = torch.optim.SGD(plain.values(), lr=protocol.lr, momentum=0.9, weight_decay=5e-4)
    per_epoch = -(-samples // batch)
    for epoch in range(6):
        order = key.fold("order", epoch).permutation(samples)
        for j in range(per_epoch):
            if epoch * per_epoch + j == (6 * per_epoch + 1) // 2:
                optimiser.param_groups[0]["lr"] *= 0.1
            at = order[j * batch : (j + 1) * batch]
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(type(weights)(plain, {}), x[at].float()), y[at]).backward()
            optimiser.step()
    trainer = Trainer(net, protocol, data.task, False, "cpu")
    (state,) = trainer.fit([(x.float(), y)], [key], lambda n: None)
    for name, value in state.params.items():
        assert torch.allclose(value, plain[name], atol=2e-5), name


@pytest.mark.parametrize("name", ["convnet-w8", "convnet-batch-w8", "mlp-w16"])
def test_networks_side_by_side_are_the_networks_one_by_one(name):
    data = toy()
    net = network(name, data.shape, 3)
    sets = [(data.prepare(data.train.inputs[i::4][:6]), data.train.labels[i::4][:6]) for i in range(3)]
    keys = [Key(i) for i in range(3)]
    protocol = replace(SHORT, epochs=8, augment=Augment(ops=("crop", "flip")), batch=4)
    together, apart = (
        Trainer(net, protocol, data.task, False, "cpu", n).fit(sets, keys, lambda n: None) for n in (3, 1)
    )
    for a, b in zip(together, apart, strict=True):
        for k in a.params:
            assert torch.allclose(a.params[k], b.params[k], atol=1e-4), k
        for k in a.buffers:
            assert torch.allclose(a.buffers[k], b.buffers[k], atol=1e-4), k


def test_small_networks_in_half_precision_are_trained_one_by_one():
    """On a few images, where in float32 they stand side by side."""
    data = toy()
    net = network("convnet-w8", data.shape, 3)
    sets = [(data.prepare(data.train.inputs[i::4][:6]), data.train.labels[i::4][:6]) for i in range(2)]
    protocol = replace(SHORT, epochs=3, augment=Augment(ops=("crop", "flip")))
    assert Trainer(net, protocol, data.task, False, "cpu").together(6) > 1
    half = Trainer(net.at(torch.bfloat16), protocol, data.task, False, "cpu")
    assert half.together(6) == 1
    states = half.fit(sets, [Key(0), Key(1)], lambda n: None)
    full = Trainer(net, protocol, data.task, False, "cpu").fit(sets, [Key(0), Key(1)], lambda n: None)
    for a, b in zip(states, full, strict=True):
        for k in a.params:
            assert torch.allclose(a.params[k], b.params[k], atol=0.02), k


def test_networks_stand_side_by_side_where_a_step_is_little_work():
    """By the network and by the samples of a step, which a protocol's batch bounds."""
    task, many = Classification(10), training.MANY

    def together(name, samples, protocol="dsa", **asked):
        return Trainer(network(name, (1, 28, 28), 10), PROTOCOLS[protocol], task, False, "cpu", **asked).together(
            samples
        )

    assert together("convnet-w32", 10) == many and together("convnet-w32", 100) == 1
    assert together("convnet", 1) == 1  # large alone
    assert together("convnet-w4", 100_000) == together("convnet-w4", 256)
    assert together("convnet-w32", 100, together=3) == 3


def test_batch_norm_is_judged_with_its_stored_statistics():
    data = toy()
    net = network("convnet-batch-w8", data.shape, 3)
    trainer = Trainer(net, SHORT, data.task, False, "cpu")
    (state,) = trainer.fit([(data.prepare(data.train.inputs), data.train.labels)], [Key(0)], lambda n: None)
    assert all(not torch.equal(state.buffers[k], net.init(Key(0)).buffers[k]) for k in state.buffers)
    one_by_one = trainer.score(state, data.test.inputs, data.test.labels, data.prepare)
    alone = [
        trainer.score(state, data.test.inputs[i : i + 1], data.test.labels[i : i + 1], data.prepare) for i in range(28)
    ]
    assert one_by_one == pytest.approx(sum(alone) / 28)


def test_the_score_counts_every_test_sample_once():
    """The last batch is filled up by repetition, which must not count."""
    data = toy()
    net = network("mlp-w8", data.shape, 3)
    trainer = Trainer(net, SHORT, data.task, False, "cpu")
    state = net.init(Key(0))
    x, y = data.test.inputs[:1].repeat(1203, 1, 1, 1), torch.zeros(1203, dtype=torch.int64)
    y[1200:] = 2
    guess = int(net(state, data.prepare(x[:1])).argmax())
    expected = float((y == guess).double().mean())
    assert trainer.score(state, x, y, data.prepare) == pytest.approx(expected, abs=1e-12)


def test_the_rate_of_each_schedule():
    drop, cycle = Protocol("a", epochs=10, lr=0.01), Protocol("b", epochs=10, lr=1.0, schedule="cycle")
    assert [drop.rate(i, 10) for i in (0, 4)] == [0.01, 0.01]
    assert [drop.rate(i, 10) for i in (5, 9)] == pytest.approx([0.001, 0.001])
    rates = [cycle.rate(i, 100) for i in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=0.02) and rates.index(max(rates)) in (19, 20) and 0 < rates[-1] < 0.02


@pytest.mark.parametrize(
    ("samples", "batch", "plan"), [(10, 256, (5, 1)), (600, 256, (5, 3)), (2560, 256, (5, 10)), (2600, 256, (5, 10))]
)
def test_the_plan_of_epochs(samples, batch, plan):
    assert Protocol("a", epochs=5, batch=batch).plan(samples) == plan
    assert Protocol("a", epochs=5, batch=batch, steps=100).plan(samples)[0] >= 100 / plan[1]


def test_the_hash_changes_with_every_field():
    base = PROTOCOLS["dsa"]
    changes = (
        {"epochs": 999},
        {"lr": 0.02},
        {"batch": 128},
        {"augment": Augment()},
        {"schedule": "cycle"},
        {"momentum": 0.0},
    )
    assert len({base.hash, *(replace(base, **c).hash for c in changes)}) == 7
    assert base.hash == replace(base).hash


def test_mirroring_is_left_out_where_it_changes_the_class():
    assert "flip" not in fitting(DSA, False, (1, 8, 8)).ops and fitting(DSA, True, (1, 8, 8)) == DSA
    assert fitting(DSA, True, (9,)).is_identity


def test_results_are_in_order_and_repeat(short, tmp_path):
    data = toy()
    set_ = real_set(data)
    options = {"networks": ["convnet-w8", "mlp-w64"], "repeats": 3, "baselines": ["random", "whole"]}
    results = potstill.evaluate(set_, data, **options)
    assert [(r.method, r.network) for r in results] == [
        (m, n) for n in ("convnet-w8", "mlp-w64") for m in ("random", "random", "whole")
    ]
    assert [r.set for r in results[:3]] == ["this set", "random real", "whole training set"]
    again = potstill.evaluate(set_, data, **options)
    assert [r.accuracies for r in results] == [r.accuracies for r in again]
    for r in results:
        assert r.accuracy_mean == pytest.approx(sum(r.accuracies) / len(r.accuracies), abs=1e-6)
        assert r.accuracy_std == pytest.approx(
            torch.tensor(r.accuracies, dtype=torch.float64).std(correction=0).item(), abs=1e-6
        )
    assert results[0].spread == "networks" and results[1].spread == "sets and networks"
    assert results[5].accuracy_mean > 0.9  # the whole set, by the network that learns these patterns
    seeds = [potstill.evaluate(set_, data, networks=["convnet-w4-d3"], repeats=3, seed=i)[0].accuracies for i in (0, 1)]
    assert seeds[0] != seeds[1]


def test_the_sets_own_transform_prepares_the_test_data(short):
    """A set that says it was standardised otherwise is judged on test data standardised in that way."""
    data = toy()
    right = potstill.evaluate(real_set(data), data, networks=["mlp-w64"], repeats=1)[0]
    shifted = {"name": "standardise", "mean": [50.0], "std": [0.01], "trailing": 2}
    wrong = potstill.evaluate(real_set(data, transform=shifted), data, networks=["mlp-w64"], repeats=1)[0]
    assert right.accuracy_mean > 0.8 > wrong.accuracy_mean


@pytest.mark.parametrize("transform", ["standardise", "zca"])
def test_the_whole_set_is_prepared_a_batch_at_a_time(short, monkeypatch, transform):
    """A set that is mapped because it is large never lies in memory whole; the numbers are those of doing all beforehand."""
    monkeypatch.setitem(PROTOCOLS, "whole", replace(PROTOCOLS["whole"], batch=8))
    data, sizes = toy(sizes=(24, 24, 24)).with_transform(transform), []
    prepare = Data.prepare
    monkeypatch.setattr(Data, "prepare", lambda self, raw: sizes.append(len(raw.flatten(0, -4))) or prepare(self, raw))
    data = replace(data, test=data.test[::9])
    got = Judge(data, PROTOCOLS["dc"]).whole("mlp-w16")
    assert len(sizes) > 30 * 9, "not in each of the steps"
    teacher = School(data, 0).teacher("mlp-w16")
    assert max(sizes) <= 8
    assert got.input_bytes == data.train.inputs.nbytes and got.images == 72
    trainer = Trainer(network("mlp-w16", data.shape, 3), PROTOCOLS["whole"], data.task, False, "cpu")
    pair = (prepare(data, data.train.inputs), data.train.labels)
    (before,) = trainer.fit([pair], [Key(0).fold("teacher")], lambda n: None)
    for k, v in before.params.items():
        assert torch.equal(teacher.state.params[k], v) or (
            transform == "zca" and torch.allclose(teacher.state.params[k], v, atol=1e-4)
        )
    (judged,) = trainer.fit([pair], [Key(0).fold("evaluate", 0)], lambda n: None)
    assert got.accuracies == [
        round(trainer.score(judged, data.test.inputs, data.test.labels, lambda x: prepare(data, x)), 6)
    ]


def test_the_whole_set_is_measured_once(short, tmp_path):
    data = toy()
    lines = []
    judge = Judge(data, PROTOCOLS["dc"], say=lines.append)
    first = judge.whole("mlp-w16")
    assert first == judge.whole("mlp-w16")
    assert first.protocol == "whole" and first.repeats == 1
    assert judge.whole("convnet-w64", affordable=0.0) is None and "not measured" in lines[0]


def test_a_set_is_refused_for_other_data(short):
    with pytest.raises(PotstillError, match="3 classes .* not for 2 classes"):
        potstill.evaluate(real_set(toy()), toy(sizes=(5, 5)))
    lines = []
    potstill.evaluate(real_set(toy()), toy(seed=3), repeats=1, say=lines.append)
    assert "made from other data" in lines[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "dsaa"}, "did you mean 'dsa'"),
        ({"networks": ["convnett"]}, "did you mean 'convnet'"),
        ({"baselines": ["rnadom"]}, "did you mean 'random'"),
        ({"repeats": 0}, "--repeats 0"),
        ({"precision": "fp8"}, "precision"),
        ({"compile": "maybe"}, "--compile"),
        ({"device": "gpu9"}, "--device 'gpu9'"),
    ],
)
def test_mistakes_are_named(short, options, words):
    with pytest.raises(PotstillError, match=words):
        potstill.evaluate(real_set(toy()), toy(), **options)


def test_soft_labels_are_trained_on(short):
    data = toy()
    hard = real_set(data)
    soft = DistilledSet(hard.inputs, nn.functional.one_hot(hard.labels, 3).float(), replace(hard.meta, labels="soft"))
    a, b = (potstill.evaluate(s, data, repeats=2)[0].accuracies for s in (hard, soft))
    assert a == pytest.approx(b, abs=0.08)


def test_results_are_plain_json(short):
    from dataclasses import asdict

    row = asdict(potstill.evaluate(real_set(toy()), toy(), repeats=2)[0])
    wanted = {"set", "method", "dataset", "ipc", "network", "protocol", "repeats", "metric", "accuracies", "accuracy_mean",
              "accuracy_std", "seconds", "peak_bytes"}  # fmt: skip
    assert wanted <= set(json.loads(json.dumps(row))) and row["peak_bytes"] > 1e6 and row["seconds"] > 0
    assert not math.isnan(row["accuracy_mean"])


def test_the_reviews_protocols_take_the_loss_that_the_labels_are_made_for():
    data, own = toy(), replace(SHORT, name="mine", fit="own")
    assert PROTOCOLS["review"].fit == PROTOCOLS["review-transfer"].fit == "own"
    hard = real_set(data)
    wild = Key(1).normal(len(hard), 3)
    centred = DistilledSet(hard.inputs, wild, replace(hard.meta, labels="centred"))
    soft = DistilledSet(hard.inputs, wild.softmax(1), replace(hard.meta, labels="soft"))
    for set_, fit in ((hard, "cross-entropy"), (soft, "cross-entropy"), (centred, "squared")):
        mine, named = (Judge(data, p, repeats=2) for p in (own, replace(own, fit=fit)))
        assert mine.resolved(set_, set_.meta.labels) == named.resolved(set_, set_.meta.labels)
        assert mine.set(set_, "", "convnet-w8").accuracies == named.set(set_, "", "convnet-w8").accuracies
    plain = Judge(data, replace(own, fit="cross-entropy"), repeats=2).random(hard, "convnet-w8")
    beside = Judge(data, own, repeats=2).random(centred, "convnet-w8")
    assert beside.accuracies == plain.accuracies, (
        "real samples have classes, whatever the labels of the set they stand beside"
    )
    assert replace(own, fit="squared").hash != own.hash != replace(own, fit="cross-entropy").hash


def test_the_reviews_protocols_take_all_samples_at_once_and_the_sets_own_augmentation():
    data = toy()
    dm, dc = ({"recipe": describe_set(data, METHODS[m]("paper"), [3] * 3, 0, 0).recipe} for m in ("dm", "dc"))
    judge = Judge(data, PROTOCOLS["review"])
    assert judge.resolved(real_set(data, **dm), "hard").augment == fitting(DSA, data.mirror, data.shape) != Augment()
    assert judge.resolved(real_set(data, **dc), "hard").augment == Augment()
    transfer = replace(judge, protocol=PROTOCOLS["review-transfer"])
    assert transfer.resolved(real_set(data, **dc), "hard").augment == fitting(DSA, data.mirror, data.shape)
    for name in ("review", "review-transfer"):
        assert PROTOCOLS[name].plan(5000) == (1000, 1) and PROTOCOLS[name].size(5000) == 5000
    assert "own" in PROTOCOLS["review"].words and "full batch" in PROTOCOLS["review"].words
    assert "the labels' own loss" in PROTOCOLS["review"].words
    all_at_once, shuffled = (replace(SHORT, epochs=6, batch=size) for size in (0, 9))
    net, x, y = (
        network("convnet-w8-d2", data.shape, 3),
        data.prepare(data.train.inputs[::3])[:9],
        data.train.labels[::3][:9],
    )
    (a,), (b,) = (
        Trainer(net, p, data.task, False, "cpu").fit([(x, y)], [Key(7)], lambda n: None)
        for p in (all_at_once, shuffled)
    )
    assert all(torch.equal(a.params[k], b.params[k]) for k in a.params)
