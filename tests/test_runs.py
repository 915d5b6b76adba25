"""Every method through the loop: what a set keeps, resuming to the same bytes, pools, recorded networks, files for others."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import potstill
from potstill import loop, still
from potstill.augment import Augment
from potstill.errors import PotstillError
from potstill.experts import record
from potstill.export import export_set
from potstill.functional import Key
from potstill.kernels import kernel, predict
from potstill.methods import METHODS
from potstill.networks import network
from potstill.objectives import Net
from potstill.recipe import change
from potstill.sources import Pool
from potstill.still import cosine
from potstill.testing import still_for, toy
from potstill.training import PROTOCOLS

NET = {"network": "convnet-w4", "student": "convnet-w4", "looks": 1}
SMALL = {
    "dd": {**NET, "objective.steps": 3, "objective.real": 8, "objective.rates": "each"},
    "kip": {**NET, "student": "kernel", "objective.real": 12},
    "frepo": {**NET, "objective.real": 8, "source.size": 3, "source.lifetime": 4},
    "mtt": {**NET, "objective.steps": 2, "optimiser.inputs.lr": 1.0, "source.max_start": 2, "source.span": 1},
    "dm": {**NET, "objective.real": 4},
}
MADE = ("dd", "kip", "frepo", "mtt")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Looks and evaluations of a few epochs: what is tested here are runs."""
    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=3))
    for name in ("dsa", "mtt", "frepo", "kip", "whole"):
        monkeypatch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], epochs=3, steps=0, lengths=()))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two short experts."""
    folder = tmp_path_factory.mktemp("experts") / "toy"
    record(toy(), out=folder, count=2, epochs=2, network="convnet-w4", batch=8, augment="none")
    return folder


@pytest.fixture
def run(tmp_path, recorded):
    def make(method, out="a", **options):
        settings = {**SMALL.get(method, NET), **options.pop("settings", {})}
        usual = {"ipc": 2, "steps": 6, "preset": "small", "evaluate": False, "out": tmp_path / out}
        if method == "mtt":
            usual["experts"] = recorded
        return potstill.distill(toy(), method, **{**usual, **options}, settings=settings)

    return make


def bytes_of(folder):
    return (Path(folder) / "set.safetensors").read_bytes()


def refused(call, *arguments, **options):
    """The one line of an error."""
    with pytest.raises(PotstillError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- runs


class Interrupt:
    """A progress bar that presses Ctrl-C at some step."""

    def __init__(self, at):
        self.at = at

    def __call__(self, total, title, start):
        self.step = start
        return self

    def update(self, n=1):
        self.step += n
        if self.step == self.at:
            raise KeyboardInterrupt

    def set_postfix_str(self, text, refresh=True): ...

    def close(self): ...


@pytest.mark.parametrize(("method", "at"), [("dd", 1), ("kip", 2), ("frepo", 4), ("mtt", 5)])
def test_a_resumed_run_gives_the_same_bytes(run, method, at):
    whole = run(method, "whole")
    with pytest.raises(KeyboardInterrupt):
        run(method, "cut", bar=Interrupt(at))
    cut = run(method, "cut", resume=True)
    assert bytes_of(cut.out) == bytes_of(whole.out)
    assert cut.record["curve"] == whole.record["curve"] and cut.record["looks"] == whole.record["looks"]
    assert [step for step, _ in whole.record["curve"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("method", MADE)
def test_from_distilling_to_judging(run, method):
    """What the run measures at its end is what `evaluate` finds with the set alone."""
    made = run(method, evaluate=True, repeats=2, ipc=1, steps=3)
    own = made.record["results"][0]
    again = potstill.evaluate(made.out, toy(), repeats=2)[0]
    assert (
        again.accuracies == own["accuracies"] and again.protocol == own["protocol"] == METHODS[method]("small").protocol
    )
    assert (again.network == "ntk-dense-d1") == (method == "kip") and len(again.accuracies) == (
        1 if method == "kip" else 2
    )
    assert again.labels == {"kip": "centred", "frepo": "centred"}.get(method, "hard")
    assert {"random", "k-means"} <= {r["method"] for r in made.record["results"]}
    if method == "kip":
        (finite,) = potstill.evaluate(made.out, toy(), networks=["convnet-w4"], repeats=2)
        assert finite.protocol == "kip" and len(finite.accuracies) == 2


def test_learned_labels_and_rates_are_kept(run, monkeypatch):
    """The file has the numbers that the last step made; where nothing is learned they are those of the start."""
    seen = {}
    step = loop.Still.step

    def spy(self, now, i):
        after, loss = step(self, now, i)
        seen.update({k: v.clone() for k, v in after.learned.items()})
        return after, loss

    monkeypatch.setattr(loop.Still, "step", spy)
    for method in ("kip", "frepo"):
        set_ = potstill.load(run(method, method).out)
        assert torch.equal(set_.labels, seen["labels"]) and torch.equal(set_.inputs, seen["inputs"])
        assert set_.meta.labels == "centred" and set_.lr is None and set_.labels.shape == (6, 3)
        assert not torch.equal(set_.labels, potstill.load(run(method, f"{method}0", steps=0).out).labels)
    for method, count in (("dd", 3), ("mtt", 1)):
        set_ = potstill.load(run(method, method).out)
        start = METHODS[method]("small").objective.rate
        assert torch.equal(set_.lr, seen["lr"].exp()) and set_.lr.shape == (count,) and (set_.lr > 0).all()
        assert not torch.allclose(set_.lr, torch.full((count,), start), rtol=1e-6)
        fixed = potstill.load(run(method, f"{method}0", settings={"learn": ["inputs"]}).out)
        assert torch.allclose(fixed.lr, torch.full((count,), start), rtol=1e-6) and fixed.labels.dtype == torch.int64


def test_labels_alone_may_be_learned(run):
    """Logits come out as probabilities, and the inputs stay where they are."""
    rule = {"kind": "adam", "lr": 0.5}
    settings = {"learn": ["labels"], "labels": "logits", "optimiser.labels": rule}
    made, start = (run("dd", f"s{steps}", steps=steps, settings=settings).set for steps in (4, 0))
    assert made.meta.labels == "soft" and torch.equal(made.inputs, start.inputs)
    assert torch.allclose(made.labels.sum(1), torch.ones(6)) and not torch.allclose(
        made.labels, start.labels, atol=1e-3
    )
    own = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.allclose(start.labels[range(6), own], torch.full((6,), math.e**5 / (math.e**5 + 2)))


def test_rates_of_the_optimiser_fall_along_a_cosine(monkeypatch):
    """Half a wave from the whole rate to `final` of it at the end of the run."""
    run = still_for(change(METHODS["kip"]("small"), {"final": 0.1, "objective.real": 8, **NET}), toy(), steps=8)
    rates = []
    rule = type(run.settings.recipe.optimiser["inputs"])
    update = rule.update

    def spy(self, params, grads, state, lr=None):
        rates.append((next(iter(params)), lr))
        return update(self, params, grads, state, lr)

    monkeypatch.setattr(rule, "update", spy)
    now = run.fresh()
    for i in range(8):
        now, _ = run.step(now, i)
    factors = [0.55 + 0.45 * math.cos(math.pi * i / 8) for i in range(8)]
    for part, lr in (("inputs", 0.04), ("labels", 0.01)):
        assert [r for p, r in rates if p == part] == pytest.approx([lr * f for f in factors])
    assert cosine(0.0, 0.1) == 1 and cosine(1.0, 0.1) == pytest.approx(0.1) and cosine(0.3, 1.0) == 1


def test_a_run_that_diverges_advises_a_lower_rate(run, monkeypatch):
    monkeypatch.setattr(loop.Still, "step", lambda self, now, i: (now, math.nan))
    for method, words in (("dd", "optimiser.inputs.lr=0.003"), ("kip", "optimiser.inputs.lr=0.004")):
        with pytest.raises(potstill.Stopped) as caught:
            run(method, method)
        assert f"--set {words}" in str(caught.value) and "\n" not in str(caught.value)


# --- pools


def pool_step(pool, state, slot, step, counter=None, s=None):
    """One step of a pool by hand: what it holds afterwards."""
    data, net = toy(), network("mlp-w4", (1, 8, 8), 3)
    s = s or still_for(change(METHODS["dm"]("small"), NET), data).start
    train = pool.train_step(net, Augment(), data.task)

    def counted(*arguments):
        if counter is not None:
            counter.append(len(arguments[2]))
        return train(*arguments)

    held = state["states"][slot]
    weights = type(net.init(Key(0)))(*held[0]) if len(held) else net.init(Key(step).fold("weights"))
    return pool.advance(state, slot, Net(net, weights), s, counted, Augment(), Key(step))


@pytest.mark.parametrize(("size", "lifetime"), [(10, 100), (3, 4), (4, 1), (1, 5), (10, 3)])
def test_ages_begin_staggered_and_networks_retire(size, lifetime):
    pool = Pool(size=size, lifetime=lifetime)
    state = pool.init()
    ages = state["ages"].tolist()
    assert ages == sorted(ages) and ages[0] == 0 and max(ages) < lifetime
    if lifetime >= size:
        gaps = [b - a for a, b in zip(ages, [*ages[1:], lifetime], strict=True)]
        assert max(gaps) - min(gaps) <= 1, "evenly"
    slot, served = size - 1, 0
    while True:
        state, served = pool_step(pool, state, slot, served), served + 1
        if not len(state["states"][slot]):
            break
    assert served == lifetime - ages[slot] and int(state["ages"][slot]) == 0


@pytest.mark.parametrize(
    ("fields", "batches"),
    [
        ({"epochs": 2, "batch": 4}, [4, 2, 4, 2]),
        ({"epochs": 2, "batch": 4, "limit": 3}, [4, 2, 4]),
        ({"epochs": 1, "batch": 1000, "limit": 1}, [6]),
        ({"epochs": 3, "batch": 2, "limit": 1}, [2]),
        ({"epochs": 0}, []),
    ],
)
def test_training_between_steps_is_as_long_as_said(fields, batches):
    pool, made = Pool(lifetime=5, **fields), []
    pool_step(pool, pool.init(), 0, 0, made)
    assert made == batches


def test_adams_state_lives_as_long_as_its_network():
    """The network of a pool is trained as by one torch.optim.Adam, and a fresh one by a fresh one."""
    pool = Pool(lifetime=4, epochs=1, rule="adam", lr=0.01, batch=100)
    s = still_for(change(METHODS["dm"]("small"), NET), toy()).start
    state, net = pool.init(), network("mlp-w4", (1, 8, 8), 3)
    x, y = s.take(torch.arange(6))
    for life in range(2):
        params = {k: torch.nn.Parameter(v.clone()) for k, v in net.init(Key(4 * life).fold("weights")).params.items()}
        rule = torch.optim.Adam(params.values(), lr=0.01)
        for i in range(3):
            state = pool_step(pool, state, 0, 4 * life + i, s=s)
            rule.zero_grad()
            torch.nn.functional.cross_entropy(net(type(net.init(Key(0)))(params, {}), x), y).backward()
            rule.step()
            (held, _), slow = state["states"][0]
            assert int(slow["count"]) == i + 1
            assert all(torch.allclose(held[k], v, atol=1e-5) for k, v in params.items())
        state = pool_step(pool, state, 0, 4 * life + 3, s=s)
        assert state["states"][0] == ()


# --- recorded networks


def test_other_methods_take_recorded_networks(run, recorded):
    """Each step of distribution matching has one of the networks on disk, any epoch of any expert."""
    from potstill.trajectories import open_experts

    seen, fetch = [], potstill.replay.Experts.fetch

    def spy(self, *arguments):
        seen.append(fetch(self, *arguments))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(potstill.replay.Experts, "fetch", spy)
        made = run("dm", experts=recorded, steps=40)
    kept = [open_experts(recorded).state(i, e) for i in range(2) for e in range(3)]
    assert made.record["recipe"]["source"] == {"kind": "experts", "max_start": 3, "span": 0}
    found = set()
    for _, net in seen:
        same = [i for i, k in enumerate(kept) if all(torch.equal(net.state.params[n], v) for n, v in k.params.items())]
        assert len(same) == 1 and net.goal is None
        found.add(same[0])
    assert found == set(range(6))
    assert bytes_of(made.out) != bytes_of(run("dm", "fresh", steps=40).out)
    assert str(recorded) not in (made.out / "record.json").read_text()
    assert " --experts DIR" in made.record["command"] and made.record["experts"] == open_experts(recorded).mark


def test_an_interrupted_run_on_recorded_networks_goes_on(run, recorded, tmp_path):
    whole = run("dm", "whole", experts=recorded)
    with pytest.raises(KeyboardInterrupt):
        run("dm", "cut", experts=recorded, bar=Interrupt(3))
    assert "source was" in refused(run, "dm", "cut", resume=True), "fresh networks are something else"
    others = tmp_path / "others"
    record(toy(), out=others, count=2, epochs=2, network="convnet-w4", batch=8, augment="none", seed=1)
    assert "experts was" in refused(run, "dm", "cut", resume=True, experts=others)
    assert bytes_of(run("dm", "cut", resume=True, experts=recorded).out) == bytes_of(whole.out)


def test_what_experts_do_not_fit_is_one_line(run, recorded, tmp_path):
    assert "experts are needed" in refused(run, "mtt", experts=None)
    assert "no experts in" in refused(run, "mtt", experts=tmp_path / "nowhere")
    line = refused(run, "mtt", settings={"network": "convnet-w8"})
    assert "convnet-w4" in line and "convnet-w8" in line
    assert "2 epochs" in refused(run, "mtt", settings={"source.span": 4})
    for settings in ({"source.span": 0}, {"source": {"kind": "pool"}}):
        assert "source.span = 1 or more" in refused(run, "mtt", settings=settings)
    for method in ("kip", "random"):
        assert f"method '{method}' needs no network" in refused(run, method, experts=recorded, steps=0)
    assert "experts are needed" in refused(run, "dm", settings={"source": {"kind": "experts"}})
    assert not (tmp_path / "a").exists()


# --- mistakes


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("dd", {"learn": ["labels"], "optimiser.labels": {"kind": "adam"}}, "set labels to logits or centred"),
        ("dm", {"learn": ["inputs", "lr"], "optimiser.lr": {"kind": "adam"}}, "has no learning rates to learn"),
        ("dm", {"learn": ["lr"]}, "'lr' is learned but has no optimiser; set optimiser.lr"),
        ("dm", {"protocol": "mtt"}, "protocol 'mtt' needs a set with learning rates"),
        ("dm", {"protocol": "unrolled"}, "protocol 'unrolled' needs a set with learning rates"),
        ("random", {"protocol": "unrolled"}, "protocol 'unrolled' needs a set with learning rates"),
        ("kip", {"student": "ntk-dens-d1"}, "ntk-dens"),
        ("kip", {"final": 1.5}, "final = 1.5 is not within 0 ... 1"),
        ("kip", {"labels": "centered"}, "did you mean 'centred'"),
        ("frepo", {"optimiser.inputs.kind": "lam"}, "lamb"),
        ("frepo", {"source.rule": "adm"}, "did you mean 'adam'"),
        ("frepo", {"source.limit": -1}, "source.limit = -1 is below 0"),
        ("dd", {"objective.rate": 0.0}, "objective.rate = 0"),
        ("dd", {"objective.feed": "al"}, "did you mean 'all'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(run, tmp_path, method, settings, words):
    steps = 0 if method == "random" else 6
    assert words in refused(run, method, settings=settings, steps=steps)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("method", "student"), [("kip", "ntk-dense-d1"), ("frepo", "mlp"), ("dd", "mlp")])
def test_vectors_have_a_network_that_takes_them(tmp_path, monkeypatch, method, student):
    data = toy(shape=(9,))
    settings = {k: v for k, v in SMALL[method].items() if k not in ("network", "student")}
    made = potstill.distill(data, method, steps=2, preset="small", settings=settings, out=tmp_path / "a", repeats=1)
    assert made.record["results"][0]["network"] == student and made.record["recipe"]["network"] == "mlp"


# --- files for others


@pytest.mark.parametrize(
    ("kind", "name", "words"), [("centred", "centred_label", "squared loss"), ("logits", "soft_label", "probabilities")]
)
def test_exports_say_what_the_labels_are(run, tmp_path, kind, name, words):
    if kind == "centred":
        made = run("frepo")
    else:
        rule = {"kind": "adam", "lr": 0.1}
        made = run("dd", settings={"learn": ["inputs", "labels"], "labels": kind, "optimiser.labels": rule})
    other = "soft_label" if kind == "centred" else "centred_label"
    export_set(made.out, "png", tmp_path / "png")
    rows = json.loads((tmp_path / "png" / "labels.json").read_text())["images"]
    assert torch.allclose(torch.tensor([r[name] for r in rows]), made.set.labels) and other not in rows[0]
    export_set(made.out, "npz", tmp_path / "npz")
    with np.load(tmp_path / "npz" / "set.npz") as arrays:
        assert np.array_equal(arrays[f"{name}s"], made.set.labels.numpy()) and f"{other}s" not in arrays.files
        assert ("lr" in arrays.files) == (kind == "logits")
    export_set(made.out, "parquet", tmp_path / "parquet")
    table = pytest.importorskip("pyarrow.parquet").read_table(
        io.BytesIO((tmp_path / "parquet" / "train.parquet").read_bytes())
    )
    assert torch.equal(torch.tensor(table[name].to_pylist()), made.set.labels) and other not in table.column_names
    for form, key in (("png", None), ("npz", f"{name}s"), ("parquet", name)):
        card = (tmp_path / form / "README.md").read_text()
        (line,) = [row for row in card.splitlines() if row.startswith("| labels |")]
        assert words in line and (key is None or f'["{key}"]' in card)


def test_an_export_with_a_rate_for_each_step_can_be_judged(run, tmp_path):
    made = run("dd")
    export_set(made.out, "npz", tmp_path / "set.npz")
    (row,) = potstill.evaluate(tmp_path / "set.npz", toy(), networks=["convnet-w4"], protocol="mtt", repeats=1)
    (own,) = potstill.evaluate(made.out, toy(), protocol="mtt", repeats=1)
    assert row.accuracies == own.accuracies


def test_random_truncated_windows_run(run):
    """RaT-BPTT: the end of a window anywhere within the walk."""
    made = run("dd", settings={"objective.steps": 5, "objective.window": 2, "objective.random_end": True, "objective.rates": "one"})  # fmt: skip
    assert made.record["steps"] == 6 and bool(made.set.inputs.isfinite().all())


def test_a_checkpoint_from_before_a_field_is_gone_on_from(run, monkeypatch):
    """The field has its default."""
    plain = still.Settings.plain

    def older(self, data):
        found = plain(self, data)
        del found["recipe"]["objective"]["solve"]
        return found

    monkeypatch.setattr(still.Settings, "plain", older)
    run("kip", steps=2)
    monkeypatch.undo()
    assert run("kip", steps=2, resume=True).record["steps"] == 2


def test_a_look_at_a_set_for_one_initialisation_starts_from_it(run):
    """On the student itself: a narrower one would have other weights than the set was made for."""
    wide = {"network": "convnet-w40", "student": "convnet-w40", "objective.steps": 2, "objective.real": 4}
    fresh = run("dd", out="fresh", steps=2, settings=wide)
    alike = run("dd", out="alike", steps=2, settings={**wide, "source.lifetime": 1000})
    assert {look["network"] for look in fresh.record["looks"]} == {"convnet-w32"}
    assert {look["network"] for look in alike.record["looks"]} == {"convnet-w40"}
    other = run("dd", out="other", steps=2, settings={**wide, "source.lifetime": 1000, "protocol": "dsa"})
    assert {look["network"] for look in other.record["looks"]} == {"convnet-w32"}


def test_a_kernel_in_closed_form_is_float64_and_not_compiled(run):
    said = []
    made = run("kip", steps=2, compile="on", say=said.append)
    assert (made.record["choices"]["precision"], made.record["choices"]["compile"]) == ("fp64", "off")
    assert any("kernel in closed form" in line for line in said)
    again = run("kip", steps=2, compile="on", resume=True)
    assert torch.equal(again.set.inputs, made.set.inputs)


@pytest.mark.parametrize(("method", "scale"), [("kip", 1.0), ("frepo", (3 / 10) ** -0.5)])
def test_labels_begin_at_the_scale_of_their_paper(method, scale):
    """Three classes: KIP's as its targets are, one-hot less 1/C; FRePo's divided by sqrt(C/10)."""
    start = still_for(change(METHODS[method]("small"), SMALL[method]), toy()).start
    hot = torch.eye(3)[torch.tensor([0, 1, 1, 2, 2, 2])] - 1 / 3
    assert torch.allclose({**start.fixed, **start.learned}["labels"], scale * hot)


def test_labels_are_solved_for_at_the_end(run):
    """Those of the saved set make the squared error on the samples of the solve smallest; the run's own are not touched."""
    plain = run("kip", "plain", steps=2)
    solved = run("kip", "solved", steps=2, settings={"objective.solve": 24})
    assert torch.equal(solved.set.inputs, plain.set.inputs) and not torch.allclose(solved.set.labels, plain.set.labels)
    data = toy().hold_out(0.1)
    at = Key(0).fold("finish").permutation(len(data.train))[:24]
    gram, x = kernel("ntk-dense-d1"), solved.set.inputs.double()
    rows = data.prepare(data.train.inputs[at]).double()
    wanted = torch.eye(3).double()[data.train.labels[at]] - 1 / 3

    def error(labels):
        return float((predict(gram(rows, x), gram(x, x), labels.double(), 1e-6) - wanted).square().sum())

    least = error(solved.set.labels)
    assert least < error(plain.set.labels)
    for i in range(20):
        assert error(solved.set.labels + 1e-2 * Key(i).normal(*solved.set.labels.shape)) > least
    line = refused(run, "frepo", settings={"objective.solve": 3})
    assert "closed form" in line
    line = refused(run, "kip", settings={"objective.solve": 3, "labels": "hard", "learn": ["inputs"]})
    assert "labels = centred" in line
