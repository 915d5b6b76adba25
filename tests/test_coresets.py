"""Coresets: each selection against its definition; soft labels by a teacher; both as methods, starts and baselines."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import potstill
from potstill import coresets, evaluation, still, teacher
from potstill import recipe as recipes
from potstill.augment import Augment
from potstill.coresets import herding, k_center, k_means, nearest
from potstill.data import Split
from potstill.errors import PotstillError
from potstill.evaluation import Judge
from potstill.functional import Key
from potstill.methods import METHODS, cite
from potstill.networks import network
from potstill.recipe import change
from potstill.synthetic import SELECTORS, initialise, pick
from potstill.teacher import TEMPERATURES, UNCHOSEN, School, soften
from potstill.testing import toy
from potstill.training import PROTOCOLS, Protocol, Trainer

CORESETS = ["herding", "k-center", "k-means", "k-means-centre"]
SMALL = {"network": "convnet-w8", "student": "convnet-w8"}


@pytest.fixture
def short(monkeypatch):
    """Trainings of a few epochs."""
    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=5))
    monkeypatch.setattr(teacher, "QUICK", replace(teacher.QUICK, epochs=20))
    for name in ("dsa", "whole"):
        monkeypatch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], epochs=8, steps=0))


def rows(seed, n, f, dtype=torch.float32):
    return Key(seed).normal(n, f).to(dtype)


def global_state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def distinct(index):
    return len(set(index.tolist())) == len(index)


# --- the selections ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "expected", "by_chance"), [(10, 0.48, 1.8), (50, 0.083, 0.78), (200, 0.025, 0.39)])
def test_herding_has_the_mean_of_all_far_better_than_chance(count, expected, by_chance):
    """2,000 rows of N(0, I) in 32 dimensions: the farthest instead of the closest mean would be worse than chance."""
    x = rows(0, 2000, 32)
    off = [(x[i].mean(0) - x.mean(0)).norm().item() for i in (herding(x, count), Key(1).permutation(2000)[:count])]
    assert off[0] == pytest.approx(expected, rel=0.15) and off[1] == pytest.approx(by_chance, rel=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_herding_is_its_definition(seed):
    x = rows(seed, 15, 3, torch.float64) + 10
    chosen = []
    for k in range(1, 16):
        rest = [i for i in range(15) if i not in chosen]
        means = {i: (x.mean(0) - x[[*chosen, i]].sum(0) / k).norm().item() for i in rest}
        chosen.append(min(means, key=means.get))
    assert herding(x, 15).tolist() == chosen


def test_herding_does_not_lose_digits_to_a_large_common_part():
    x = rows(0, 500, 8)
    assert herding((x + 1000).double(), 40).tolist() == herding(x.double(), 40).tolist()
    moved = ((x * 1024).round() / 1024) + 1000  # exact in float32
    assert herding(moved, 40).tolist() == herding((moved - 1000), 40).tolist()


@pytest.mark.parametrize("select", [herding, k_center])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_longer_greedy_selection_begins_with_the_shorter_one(select, dtype):
    x = rows(3, 40, 5, dtype)
    longest = select(x, 40)
    assert sorted(longest.tolist()) == list(range(40))
    for count in (1, 7, 39):
        assert torch.equal(select(x, count), longest[:count])


def radius(x, index):
    return torch.cdist(x, x[index]).min(1).values.max().item()


@pytest.mark.parametrize("seed", range(8))
def test_k_center_is_within_twice_the_best(seed):
    x = rows(seed, 10, 2, torch.float64)
    for count in (1, 2, 3, 4):
        best = min(radius(x, list(some)) for some in itertools.combinations(range(10), count))
        assert best <= radius(x, k_center(x, count)) <= 2 * best + 1e-12


def test_k_center_starts_near_the_mean_and_goes_farthest_first():
    x = rows(1, 60, 4, torch.float64)
    chosen = k_center(x, 12).tolist()
    assert chosen[0] == (x - x.mean(0)).norm(dim=1).argmin().item()
    for k in range(1, 12):
        assert chosen[k] == torch.cdist(x, x[chosen[:k]]).min(1).values.argmax().item()


@pytest.mark.parametrize("select", [herding, k_center, lambda x, n: nearest(x, k_means(x, n, 0))])
def test_rows_that_are_alike_are_chosen_once_each(select):
    same = torch.ones(6, 3)
    assert sorted(select(same, 6).tolist()) == list(range(6)) and distinct(select(same, 4))
    two = torch.tensor([[0.0], [0.0], [0.0], [5.0], [5.0], [5.0]])
    assert set(two[select(two, 2)].flatten().tolist()) == {0.0, 5.0} and distinct(select(two, 5))


def test_the_lowest_number_wins_a_tie():
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert herding(square, 2).tolist() == [0, 2]
    assert k_center(square, 4).tolist() == [0, 2, 1, 3]
    assert nearest(square, torch.zeros(3, 2)).tolist() == [0, 1, 2]


def test_k_means_finds_clusters_and_ends_where_each_centre_is_the_mean_of_its_rows():
    centres = 20 * rows(0, 4, 6)
    x = centres.repeat_interleave(25, 0) + rows(1, 100, 6)
    found = k_means(x, 4, 0)
    member = torch.cdist(x, found).argmin(1)
    for i in range(4):
        assert torch.allclose(found[i], x[member == i].mean(0), atol=1e-4)
    assert torch.cdist(found, centres).min(1).values.max() < 2
    assert distinct(torch.cdist(found, centres).argmin(1))
    assert torch.equal(found, k_means(x, 4, 0)) and found.dtype == x.dtype
    assert k_means(x.double(), 3, 0).dtype == torch.float64


def test_k_means_with_one_centre_is_the_mean():
    x = rows(0, 30, 4)
    assert torch.allclose(k_means(x, 1, 0)[0], x.mean(0), atol=1e-6)
    assert nearest(x, k_means(x, 1, 0)).tolist() == k_center(x, 1).tolist() == herding(x, 1).tolist()


def test_the_nearest_row_goes_to_the_first_that_wants_it():
    x = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    assert nearest(x, torch.tensor([[0.1], [0.2], [9.0], [0.0]])).tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize(
    "select", [herding, k_center, lambda x, n: k_means(x, n, 0), lambda x, n: nearest(x, x[:1].expand(n, -1))]
)
def test_a_number_that_cannot_be_chosen_is_refused(select):
    for count in (0, 5):
        with pytest.raises(PotstillError, match=f"coreset of {count} .* 1 to 4"):
            select(rows(0, 4, 2), count)


def test_blocks_change_nothing(monkeypatch):
    x = rows(0, 50, 3)
    before = k_center(x, 20), nearest(x, rows(1, 9, 3))
    monkeypatch.setattr(coresets, "BLOCK", 7)
    assert all(map(torch.equal, before, (k_center(x, 20), nearest(x, rows(1, 9, 3)))))


# --- in a data set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9), (6,)])
@pytest.mark.parametrize("selector", SELECTORS)
def test_samples_are_of_their_class_and_distinct_and_as_many_as_asked_for(selector, shape):
    data, counts = toy(shape=shape, sizes=(12, 9, 1)), [12, 4, 1]
    before = global_state()
    threads = torch.get_num_threads()
    index = pick(data, counts, selector, Key(0))
    assert global_state() == before and torch.get_num_threads() == threads
    assert distinct(index)
    assert data.train.labels[index].tolist() == [0] * 12 + [1] * 4 + [2]
    assert torch.equal(index, pick(data, counts, selector, Key(0)))


@pytest.mark.parametrize("init", CORESETS)
def test_a_start_repeats_by_key_and_touches_no_global_generator(init):
    data = toy(sizes=(60, 40, 1))
    before = global_state()
    a, b, c = (initialise(data, [5, 8, 1], init, key) for key in (Key(0), Key(0), Key(1)))
    assert global_state() == before
    assert torch.equal(a.learned["inputs"], b.learned["inputs"]) and a.fixed["labels"].tolist() == [0] * 5 + [1] * 8 + [
        2
    ]
    drawn = init.startswith("k-means")
    assert torch.equal(a.learned["inputs"], c.learned["inputs"]) != drawn
    real = data.prepare(data.train.inputs)
    found = [(real == row).flatten(1).all(1).any().item() for row in a.learned["inputs"]]
    assert all(found) or init == "k-means-centre"
    assert sum(found) < 5 or init != "k-means-centre"  # the class of one sample, and clusters of one


def test_centres_of_one_are_class_means():
    data = toy()
    s = initialise(data, [1, 1, 1], "k-means-centre", Key(0))
    for g in range(3):
        mean = data.prepare(data.train.inputs[data.train.labels == g]).mean(0)
        assert torch.allclose(s.learned["inputs"][g], mean, atol=1e-5)


def test_samples_are_compared_in_standardised_pixels():
    """A feature with a huge unit does not decide alone."""
    x = torch.cat([rows(0, 40, 1) * 1e4, rows(1, 40, 5)], 1).numpy()
    y = np.arange(40) % 2
    data, own = (potstill.Data.from_arrays(a, y, a, y) for a in (x, x / np.array([1e4, 1, 1, 1, 1, 1], np.float32)))
    for selector in SELECTORS:
        assert torch.equal(pick(data, [5, 5], selector, Key(0)), pick(own, [5, 5], selector, Key(0)))


def test_an_unknown_selector_is_named():
    with pytest.raises(PotstillError, match="did you mean 'herding'"):
        pick(toy(), [1, 1, 1], "hearding", Key(0))


# --- as methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*CORESETS, "random-soft"])
@pytest.mark.parametrize("ipc", [1, [3, 1, 2]])
def test_methods_run_and_their_sets_come_back(short, tmp_path, method, ipc):
    data = toy()
    run = potstill.distill(data, method, ipc=ipc, settings=SMALL, evaluate=False, out=tmp_path / "run")
    counts = [ipc] * 3 if isinstance(ipc, int) else ipc
    again = potstill.load(tmp_path / "run")
    assert torch.equal(again.inputs, run.set.inputs) and torch.equal(again.labels, run.set.labels)
    assert again.meta == run.set.meta and again.meta.method == method and again.meta.ipc == counts
    assert recipes.from_dict(again.meta.recipe) == change(METHODS[method]("small"), SMALL)
    assert run.record["steps"] == 0 and run.record["recipe"]["init"] == run.set.meta.recipe["init"]
    size = run.record["set"]
    assert size["input_bytes"] == sum(counts) * 64 * 4
    assert size["label_bytes"] == sum(counts) * (3 * 4 if method == "random-soft" else 8)
    assert run.record["labels"]["kind"] == ("soft" if method == "random-soft" else "hard")


@pytest.mark.parametrize("method", CORESETS)
def test_a_method_is_a_start_before_the_first_step(short, tmp_path, method):
    options = {"ipc": 3, "settings": SMALL, "evaluate": False}
    alone = potstill.distill(toy(), method, out=tmp_path / "a", **options)
    start = potstill.distill(toy(), "dm", init=method, steps=0, out=tmp_path / "b", **options)
    assert torch.equal(alone.set.inputs, start.set.inputs) and start.record["recipe"]["init"] == method
    moved = potstill.distill(toy(), "dm", init=method, steps=2, out=tmp_path / "c", **options)
    assert not torch.equal(alone.set.inputs, moved.set.inputs)


def test_nothing_that_is_held_out_is_chosen(short, tmp_path):
    data = toy(sizes=(30, 20))
    run = potstill.distill(data, "herding", ipc=[27, 18], settings=SMALL, evaluate=False, out=tmp_path / "run")
    held = data.prepare(data.hold_out(0.1).heldout.inputs)
    assert len(held) == 5 and not any((held == row).flatten(1).all(1).any() for row in run.set.inputs)


def test_a_coreset_of_an_older_version_is_the_same_coreset(tmp_path):
    """Its recipe lacks the fields that came later; another method's is refused as ever."""
    options = {"settings": SMALL, "evaluate": False, "out": tmp_path / "run"}
    made = potstill.distill(toy(), "random", **options).set
    augment = {k: v for k, v in made.meta.recipe["augment"].items() if k not in ("fill", "jitter")}
    assert len(augment) < len(made.meta.recipe["augment"])
    made.meta = replace(made.meta, recipe={**made.meta.recipe, "augment": augment})
    made.save(tmp_path / "run" / "set.safetensors")
    again = potstill.distill(toy(), "random", resume=True, **options).set
    assert torch.equal(again.inputs, made.inputs) and "fill" in again.meta.recipe["augment"]
    with pytest.raises(PotstillError, match="holds a run of other settings"):
        potstill.distill(toy(), "herding", resume=True, **options)


@pytest.mark.parametrize("space", ["features", "random-features"])
@pytest.mark.parametrize("net", ["convnet-w8", "convnet-batch-w8", "mlp-w16"])
def test_selection_on_features_is_selection_on_the_features_that_it_names(short, tmp_path, space, net):
    data, settings = toy(sizes=(40, 30, 20)), {"network": net, "student": "mlp-w16", "space": space}
    run = potstill.distill(data, "herding", ipc=4, settings=settings, evaluate=False, out=tmp_path / "run")
    part, named = data.hold_out(0.1), network(net, data.shape, 3)
    if space == "features":
        trainer = Trainer(named, PROTOCOLS["whole"], data.task, False, "cpu")
        pair = (part.prepare(part.train.inputs), part.train.labels)
        (state,) = trainer.fit([pair], [Key(0).fold("teacher")], lambda n: None)
    else:
        state = named.init(Key(0).fold("space"))
    for g in range(3):
        members = part.prepare(part.train.inputs[part.train.labels == g])
        chosen = herding(named.features(state, members, "stored"), 4)
        assert torch.equal(run.set.inputs[4 * g : 4 * g + 4], members[chosen])
    on_pixels = initialise(part, [4, 4, 4], "herding", Key(0).fold("init"))
    assert not torch.equal(run.set.inputs, on_pixels.learned["inputs"])
    assert run.set.meta.recipe["space"] == space and run.set.meta.recipe["network"] == net


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("herding", {"space": "featurs"}, "no space 'featurs'; did you mean 'features'"),
        ("random", {"space": "features"}, "init 'real' chooses no samples in features"),
        ("k-means-centre", {"space": "random-features"}, "'k-means-centre' chooses no samples"),
        ("random", {"labels": "sofft"}, "did you mean 'soft'"),
        ("dm", {"labels": "soft"}, "labels = soft is for coresets; method 'dm'"),
        ("dm", {"init": "k-center-"}, "did you mean 'k-center'"),
        ("herding", {"steps": 3}, "takes 0 steps"),
    ],
)
def test_a_wrong_choice_is_named(method, settings, words):
    with pytest.raises(PotstillError, match=words):
        change(METHODS[method]("paper"), settings)


def test_a_method_without_steps_keeps_its_own_start(short, tmp_path):
    """A set that says `random` is one."""
    with pytest.raises(PotstillError, match="--init herding: method 'random' is its start"):
        potstill.distill(toy(), "random", init="herding", settings=SMALL, evaluate=False, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_sources_are_cited():
    assert "2009" in cite("herding") and "2018" in cite("k-center") and "Lloyd" in cite("k-means")
    assert cite("k-means-centre") == cite("k-means")


# --- soft labels -------------------------------------------------------------------------------------------------


def soft_run(data, out, **options):
    options = {"ipc": 4, "settings": SMALL, "evaluate": False, **options}
    return potstill.distill(data, "random-soft", out=out, **options)


def test_soft_labels_are_the_teachers_probabilities_of_the_random_samples(short, tmp_path):
    data = toy(sizes=(40, 30, 20))
    hard = potstill.distill(data, "random", ipc=4, settings=SMALL, evaluate=False, out=tmp_path / "hard").set
    soft = soft_run(data, tmp_path / "soft").set
    assert torch.equal(hard.inputs, soft.inputs) and soft.meta.labels == "soft" and hard.meta.teacher is None
    assert soft.labels.shape == (12, 3) and (soft.labels >= 0).all()
    assert torch.allclose(soft.labels.sum(1), torch.ones(12), atol=1e-6)
    part, net = data.hold_out(0.1), network("convnet-w8", data.shape, 3)
    pair = (part.prepare(part.train.inputs), part.train.labels)
    trainer = Trainer(net, PROTOCOLS["whole"], data.task, False, "cpu")
    (state,) = trainer.fit([pair], [Key(0).fold("teacher")], lambda n: None)
    known = soft.meta.teacher
    assert known["network"] == "convnet-w8" and known["protocol_hash"] == PROTOCOLS["whole"].hash
    expected = torch.exp(net(state, soft.inputs, "stored") / known["temperature"])
    assert torch.allclose(soft.labels, expected / expected.sum(1, keepdim=True), atol=1e-5)
    again = soft_run(data, tmp_path / "again")
    assert (tmp_path / "soft" / "set.safetensors").read_bytes() == (tmp_path / "again" / "set.safetensors").read_bytes()
    assert again.record["labels"] == {"kind": "soft", "teacher": known}


def test_the_temperature_is_the_one_that_held_out_data_like_best(short, tmp_path):
    known = soft_run(toy(sizes=(90, 80, 70)), tmp_path / "a").set.meta.teacher
    tried = dict(map(tuple, known["heldout_accuracy"]))
    assert tuple(tried) == TEMPERATURES
    best = [t for t in TEMPERATURES if tried[t] == max(tried.values())]
    assert known["temperature"] == best[0]


@pytest.mark.parametrize("scores", [(0.2, 0.3, 0.9, 0.4), (0.5, 0.5, 0.1, 0.5)])
def test_the_best_score_chooses_and_the_lowest_of_equals(short, monkeypatch, scores):
    data = toy(sizes=(40, 30, 20)).hold_out(0.1)
    seen, left = [], list(scores)

    def score(self, state, inputs, labels, prepare):
        seen.append((inputs, labels))
        return left.pop(0)

    monkeypatch.setattr(Trainer, "score", score)
    made = School(data, 0).teacher("mlp-w8").label(data, data.prepare(data.train.inputs[:6]), "mlp-w8", Key(0))
    assert made.temperature == TEMPERATURES[scores.index(max(scores))]
    assert [s for _, s in made.heldout] == list(scores)
    assert len(seen) == 4 and all(x is data.heldout.inputs and y is data.heldout.labels for x, y in seen)


def test_test_data_play_no_part_and_held_out_data_do(short, tmp_path, monkeypatch):
    data = toy(sizes=(90, 80, 70))
    other = replace(data, test=Split(-9 * data.test.inputs, data.test.labels.flip(0)))
    a = soft_run(data, tmp_path / "a").set
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    b = soft_run(other, tmp_path / "b").set
    assert torch.equal(a.labels, b.labels) and a.meta.teacher == b.meta.teacher
    monkeypatch.setattr(teacher, "QUICK", replace(teacher.QUICK, epochs=200))
    monkeypatch.setitem(PROTOCOLS, "whole", replace(PROTOCOLS["whole"], epochs=60))
    part = data.hold_out(0.1)
    wrong = replace(part, heldout=Split(part.heldout.inputs, (part.heldout.labels + 1) % 3))
    inputs = part.prepare(part.train.inputs[::9])
    right, misled = (School(d, 0).teacher("mlp-w8").label(d, inputs, "mlp-w8", Key(0)) for d in (part, wrong))
    assert min(s for _, s in right.heldout) > 0.7 and max(s for _, s in misled.heldout) < 0.3


def test_without_held_out_data_the_temperature_is_not_chosen(short, tmp_path):
    lines = []
    run = soft_run(toy(), tmp_path / "a", holdout=0, say=lines.append)
    assert run.set.meta.teacher["temperature"] == UNCHOSEN and run.set.meta.teacher["heldout_accuracy"] == []
    assert any("nothing is held out" in line for line in lines)


def test_a_higher_temperature_is_softer_and_keeps_the_order():
    logits = 5 * rows(0, 20, 4)
    sharp, soft = soften(logits, 1.0), soften(logits, 8.0)
    assert (sharp.max(1).values > soft.max(1).values).all() and torch.equal(sharp.argmax(1), soft.argmax(1))
    assert torch.allclose(sharp, nn.functional.softmax(logits, 1))


def test_any_coreset_may_have_soft_labels(short, tmp_path):
    settings = {**SMALL, "labels": "soft"}
    run = potstill.distill(toy(), "k-center", ipc=2, settings=settings, evaluate=False, out=tmp_path / "a")
    assert run.set.labels.shape == (6, 3) and run.set.meta.labels == "soft"


@pytest.mark.parametrize("batch", [256, 4])
def test_certain_soft_labels_train_as_hard_ones_in_any_order_and_augmented(batch):
    """The label goes with its sample through shuffling, batches and augmentation."""
    data = toy()
    net = network("convnet-w8", data.shape, 3)
    protocol = Protocol("short", epochs=6, lr=0.05, batch=batch, augment=Augment(ops=("crop", "flip")))
    x, y = data.prepare(data.train.inputs[::2]), data.train.labels[::2]
    states = [
        Trainer(net, protocol, data.task, False, "cpu").fit([(x, labels)] * 2, [Key(0), Key(1)], lambda n: None)
        for labels in (y, nn.functional.one_hot(y, 3).float())
    ]
    for hard, soft in zip(*states, strict=True):
        assert all(torch.allclose(hard.params[k], soft.params[k], atol=1e-5) for k in hard.params)


def test_a_teacher_is_trained_once_and_for_its_own_data(short, monkeypatch, tmp_path):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    data = toy(sizes=(20, 20)).hold_out(0.1)
    school = School(data, 0)
    assert school.seconds("mlp-w8") > 0
    first = school.teacher("mlp-w8")
    assert school.seconds("mlp-w8") == 0 < school.seconds("mlp-w16")
    moved = replace(data, train=data.train[torch.arange(len(data.train) - 1)])
    others = (School(data, 1), School(moved, 0), School(replace(data, scale=2.0), 0), School(data, 0, precision="bf16"))
    assert len({s.file("mlp-w8") for s in (school, *others)}) == 5
    file = school.file("mlp-w8")
    with monkeypatch.context() as refuse:
        refuse.setattr(Trainer, "fit", None)
        assert torch.equal(
            school.teacher("mlp-w8").logits(torch.ones(2, 1, 8, 8)), first.logits(torch.ones(2, 1, 8, 8))
        )
    for damage in (b"", file.read_bytes()[:-9], b"{}"):
        file.write_bytes(damage)
        assert torch.equal(school.teacher("mlp-w8").state.params["head.weight"], first.state.params["head.weight"])
    School(data, 0).teacher("mlp-w16")
    file.write_bytes(school.file("mlp-w16").read_bytes())
    assert school.teacher("mlp-w8").state.params["head.weight"].shape == (2, 8)


def test_only_the_given_seed_decides_about_a_teacher(short):
    data = toy(sizes=(20, 20)).hold_out(0.1)
    inputs = data.prepare(data.train.inputs[::4])
    before = global_state()
    made = [School(data, seed).teacher("mlp-w8").label(data, inputs, "mlp-w8", Key(0)).labels for seed in (0, 1)]
    spaces = [School(data, seed).embedding("random-features", "mlp-w8")(data.train.inputs) for seed in (0, 1)]
    assert global_state() == before
    assert not torch.equal(*made) and not torch.equal(*spaces)


# --- as baselines ------------------------------------------------------------------------------------------------


def judged(data, out, **options):
    set_ = potstill.distill(data, "random", ipc=[4, 3, 2], settings=SMALL, evaluate=False, out=out).set
    return potstill.evaluate(set_, data, repeats=2, **options)


def test_baselines_have_an_order_names_and_bytes(short, tmp_path):
    data = toy(sizes=(40, 30, 20))
    found = judged(data, tmp_path / "a", baselines=["whole", "random-soft", "k-means", "random"])
    assert [(r.method, r.set) for r in found] == [
        ("random", "this set"),
        ("random", "random real"),
        ("k-means", "k-means real"),
        ("random-soft", "random real, soft labels"),
        ("whole", "whole training set"),
    ]
    assert [r.spread for r in found[1:4]] == ["sets and networks", "networks", "sets and networks"]
    assert [r.input_bytes for r in found] == [9 * 64 * 4] * 4 + [90 * 64 * 4]
    assert [r.label_bytes for r in found] == [9 * 8] * 3 + [9 * 3 * 4, 90 * 8]
    assert [r.labels for r in found] == ["hard"] * 3 + ["soft", "hard"]
    assert found[3].temperature in TEMPERATURES and found[0].temperature is None
    assert [r.images for r in found] == [9] * 4 + [90]
    again = judged(data, tmp_path / "b", baselines=["random", "k-means", "random-soft", "whole"])
    assert [r.accuracies for r in again] == [r.accuracies for r in found]
    assert evaluation.BASELINES == ("random", "k-means", "random-soft", "whole")


def test_the_k_means_baseline_is_the_k_means_of_all_training_data(short, monkeypatch):
    data, seen = toy(), []
    monkeypatch.setattr(Judge, "judge", lambda self, *args, **kwargs: seen.append(args))
    recipe = METHODS["random"]("paper")
    meta = potstill.exchange.describe_set(data, recipe, [2, 2, 1], 0, 0)
    set_ = potstill.DistilledSet(torch.zeros(5, 1, 8, 8), torch.tensor([0, 0, 1, 1, 2]), meta)
    Judge(data, PROTOCOLS["dsa"], repeats=3, seed=4).k_means(set_, "convnet-w8")
    ((_, _, _, sets, *_),) = seen
    index = pick(data, [2, 2, 1], "k-means", Key(4).fold("k-means"))
    assert len(sets) == 3
    assert all(
        torch.equal(x, data.prepare(data.train.inputs[index])) and y.tolist() == [0, 0, 1, 1, 2] for x, y in sets
    )


def test_the_soft_baseline_uses_nothing_that_is_held_out(short, monkeypatch, tmp_path):
    data, sets = toy(sizes=(40, 30, 20)), []
    whole = Judge.judge
    monkeypatch.setattr(Judge, "judge", lambda self, *a, **k: sets.append((a[0], a[3])) or whole(self, *a, **k))
    judged(data, tmp_path / "a", baselines=["random-soft"])
    held = data.prepare(data.hold_out(0.1).heldout.inputs)
    ((_, drawn),) = [s for s in sets if s[0] != "this set"]
    assert len(drawn) == 2 and not torch.equal(drawn[0][0], drawn[1][0])
    for x, y in drawn:
        assert not any((held == row).flatten(1).all(1).any() for row in x)
        assert torch.allclose(y.sum(1), torch.ones(9), atol=1e-6)


def test_a_costly_teacher_is_left_out_and_said(short, monkeypatch, tmp_path):
    lines = []
    with monkeypatch.context() as refuse:
        refuse.setattr(School, "teacher", None)
        found = judged(toy(), tmp_path / "a", baselines=evaluation.BASELINES, affordable=1e-9, say=lines.append)
    assert [r.method for r in found] == ["random", "random", "k-means"]
    assert sum("not measured, about" in line for line in lines) == 2
    assert any("--baselines random-soft measures it" in line for line in lines)


def test_a_class_that_is_too_small_for_its_soft_baseline_is_said(short, tmp_path):
    lines, data = [], toy()
    run = potstill.distill(
        data, "random", ipc=[12, 1, 1], holdout=0, settings=SMALL, evaluate=False, out=tmp_path / "a"
    )
    found = potstill.evaluate(run.set, data, repeats=1, baselines=["random-soft"], say=lines.append)
    assert len(found) == 1 and any("too few samples" in line for line in lines)
    less = replace(data, train=data.train[torch.arange(5, len(data.train))])
    with pytest.raises(PotstillError, match="more than the 7 training samples of class 0"):
        potstill.evaluate(run.set, less, repeats=1, baselines=["random"])


# --- with transforms, networks from outside and other projects' sets ----------------------------------------------


@pytest.mark.parametrize("method", ["herding", "k-means-centre", "random-soft"])
@pytest.mark.parametrize("transform", ["zca", "none"])
def test_a_coreset_goes_through_the_transform_and_takes_it_along(short, tmp_path, method, transform):
    options = {"ipc": 3, "settings": SMALL, "evaluate": False, "transform": transform}
    data = toy(sizes=(40, 30, 20))
    run = potstill.distill(data, method, out=tmp_path / "run", **options)
    again, seen = potstill.load(tmp_path / "run"), data.with_transform(transform)
    assert torch.equal(again.inputs, run.set.inputs) and again.meta.transform["name"] == transform
    assert (again.matrix is not None) == (transform == "zca")
    assert torch.allclose(again.transform(data.train.inputs), seen.prepare(data.train.inputs), atol=1e-5)
    real = seen.prepare(data.train.inputs)
    found = [torch.isclose(real, row, atol=1e-5).flatten(1).all(1).any().item() for row in run.set.inputs]
    assert all(found) or method == "k-means-centre"
    start = {"herding": "herding", "k-means-centre": "k-means-centre", "random-soft": "real"}[method]
    moved = potstill.distill(data, "dsa", init=start, steps=0, out=tmp_path / "start", **options)
    assert torch.equal(moved.set.inputs, run.set.inputs)


def test_every_baseline_goes_through_the_transform_of_the_set(short, monkeypatch, tmp_path):
    data, seen = toy(sizes=(40, 30, 20)), {}
    made = potstill.distill(
        data, "random", ipc=3, transform="zca", settings=SMALL, evaluate=False, out=tmp_path / "run"
    ).set
    judge = Judge.judge

    def spy(self, name, method, ipc, sets, prepare, *rest, **options):
        seen[name] = [prepare(x) if options.get("raw") else x for x, _ in sets], prepare
        return judge(self, name, method, ipc, sets, prepare, *rest, **options)

    monkeypatch.setattr(Judge, "judge", spy)
    potstill.evaluate(made, data, repeats=2, baselines=evaluation.BASELINES)
    assert len(seen) == 5
    whitened, raw = data.with_transform("zca").prepare(data.train.inputs), data.train.inputs
    for name, (sets, prepare) in seen.items():
        assert torch.allclose(prepare(raw), whitened, atol=1e-5), name
        for x in sets:
            assert all(torch.isclose(whitened, row, atol=1e-5).flatten(1).all(1).any() for row in x), name


def test_a_teacher_from_outside_is_not_kept(short, monkeypatch, tmp_path):
    """Its code may change under its name."""
    (tmp_path / "outside_teacher.py").write_text(
        "from potstill.networks import network\ndef mine(shape, outputs):\n    return network('mlp-w8', shape, outputs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    data, name = toy(sizes=(20, 20)).hold_out(0.1), "outside_teacher:mine"
    school = School(data, 0)
    made, known = school.teacher(name), school.teacher("mlp-w8")
    assert not school.file(name).exists() and school.file("mlp-w8").exists()
    assert school.seconds(name) > 0 == school.seconds("mlp-w8")
    inputs = data.prepare(data.train.inputs)
    assert torch.equal(made.logits(inputs), known.logits(inputs))
    labels = made.label(data, inputs[::4], name, Key(0))
    assert labels.teacher == name and labels.labels.shape == (9, 2)


def test_baselines_of_a_set_that_lacks_a_class(short, tmp_path):
    """Another project's set may; ours have one of each at least."""
    data = toy(sizes=(40, 30, 20))
    np.savez(tmp_path / "foreign.npz", x_train=np.zeros((3, 1, 8, 8), np.float32), y_train=np.array([0, 0, 2]))
    found = potstill.evaluate(
        tmp_path / "foreign.npz", data, networks=["mlp-w8"], normalisation="standardise", repeats=1,
        baselines=["random", "k-means", "random-soft"],
    )  # fmt: skip
    assert [r.images for r in found] == [3] * 4


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_images_per_class(method):
    assert METHODS[method]("small", 10).method == method == recipes.find(method, "small", 10).method
