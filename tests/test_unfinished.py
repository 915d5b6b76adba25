"""Trainings that are cut off go on to the same bits."""

from dataclasses import replace

import pytest
import torch
from test_benchmark import DM, HEAD, bench_of, records, root, short  # noqa: F401
from test_students import a_set

from potstill import unfinished
from potstill.errors import Stopped
from potstill.exchange import DistilledSet
from potstill.functional import Key, leaves
from potstill.judge import Judge
from potstill.networks import network
from potstill.sealed import encoded, read_sealed
from potstill.teacher import School
from potstill.testing import toy
from potstill.training import PROTOCOLS, Trainer
from potstill.unfinished import Unfinished, mark_of


class Cut(Exception):
    """The end of a process."""


def stop_at(step):
    """A tick that ends the training after so many steps of networks."""
    seen = []

    def tick(count):
        seen.append(count)
        if sum(seen) >= step:
            raise Cut

    return tick


def alike(one, two):
    return all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(two), strict=True))


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY", 0.0)


@pytest.fixture(params=["sgd, one by one", "sgd, side by side", "adam, batch norm"])
def trainer(request):
    data = toy()
    rule = "adam" if "adam" in request.param else "sgd"
    name = "convnet-batch-w4" if "norm" in request.param else "mlp-w4"
    # batches that do not divide the set, augmentation of its own for each step
    protocol = replace(PROTOCOLS["dsa"], rule=rule, epochs=3, steps=0, batch=4, lr=0.01)
    net = network(name, data.shape, data.task.outputs)
    made = Trainer(net, protocol, data.task, False, "cpu", 3 if "side" in request.param else 1)
    sets = [(torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(r)), torch.arange(10) % 3) for r in range(3)]  # fmt: skip
    step, made.calls = made.step, 0

    def counted(*args):
        made.calls += 1
        return step(*args)

    made.step = counted
    made.train = lambda tick, kept=None: made.fit(sets, [Key(r) for r in range(3)], tick, None, kept)
    return made


@pytest.mark.parametrize("after", [1, 3, 9, 14, 26, 27])
def test_a_training_that_is_cut_off_goes_on_to_the_same_bits(trainer, tmp_path, often, after):
    """Three networks of nine steps each, cut off at the start, at the end of an epoch, of a network, of all."""
    whole, calls = trainer.train(lambda n: None), trainer.calls
    place, ticks = tmp_path / "new" / "it.safetensors", []
    with pytest.raises(Cut):
        trainer.train(stop_at(after), Unfinished(place, "a"))
    again = trainer.train(ticks.append, Unfinished(place, "a"))
    assert alike(again, whole) and sum(ticks) == 27
    assert trainer.calls == 2 * calls + 1, "the step after which it was cut off is lost, and no other"
    Unfinished(place, "a").end()
    Unfinished(place, "a").end()
    assert not place.exists()


def test_nothing_is_gone_on_with_that_is_of_another_training_or_damaged(trainer, tmp_path, often):
    place = tmp_path / "it.safetensors"
    with pytest.raises(Cut):
        trainer.train(stop_at(9), Unfinished(place, "a"))
    done, step, now = Unfinished(place, "a").begun()
    assert (done or step) and now is not None
    assert Unfinished(place, "b").begun() == ([], 0, None)
    raw = bytearray(place.read_bytes())
    raw[-5] ^= 1
    place.write_bytes(raw)
    assert Unfinished(place, "a").begun() == ([], 0, None)
    place.write_bytes(b"none")
    assert Unfinished(place, "a").begun() == ([], 0, None)


def test_a_short_training_writes_nothing_and_seconds_add_up(trainer, tmp_path, monkeypatch):
    place = tmp_path / "it.safetensors"
    trainer.train(lambda n: None, Unfinished(place, "a"))
    assert not place.exists()
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    kept = Unfinished(place, "a", earlier=50.0)
    trainer.train(lambda n: None, kept)
    later = Unfinished(place, "a")
    later.begun()
    assert 50 < later.earlier <= later.seconds < 60


def test_a_mark_is_of_every_bit():
    x, y = torch.arange(12.0).view(3, 4), torch.tensor([0, 1, 2])
    marks = [mark_of([(x, y)] * 2, "p"), mark_of([(x, y)], "p"), mark_of([(x, y)] * 2, "q"), mark_of([(x.view(4, 3), y)] * 2, "p")]  # fmt: skip
    assert len({*marks}) == 4 and marks[0] == mark_of([(x.clone(), y.clone()), (x, y)], "p")
    x[1, 1] = 5.0000005
    assert mark_of([(x, y)] * 2, "p") != marks[0]


def test_a_cell_that_is_cut_off_in_its_judging_goes_on_with_the_networks_under_training(root, tmp_path, short, monkeypatch, often):  # noqa: F811  # fmt: skip
    monkeypatch.setitem(PROTOCOLS, "dc", replace(PROTOCOLS["dc"], epochs=40, steps=0))
    text = HEAD + DM.replace('networks = ["convnet-w4", "mlp-w4"]', 'networks = ["mlp-w4"]')
    update, calls = Trainer._update, []

    def counted(self, *args):
        calls.append(self.protocol.name)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return update(self, *args)

    monkeypatch.setattr(Trainer, "_update", counted)
    (tmp_path / "plain").mkdir()
    whole, limit = bench_of(tmp_path / "plain", text), 0
    whole.run(whole.plan())
    steps = len(calls)
    work, limit = bench_of(tmp_path, text), len(calls) + steps // 2
    with pytest.raises(KeyboardInterrupt):
        work.run(work.plan())
    (left,) = (tmp_path / "out" / "unfinished").iterdir()
    monkeypatch.setattr(Unfinished, "seconds", 1000.0)
    tensors, header = read_sealed(left, "training")
    left.write_bytes(encoded(tensors, {**header, "seconds": 1000.0}))
    work.run(work.plan())
    assert len(calls) == 2 * steps + 1, "the step in which it was cut off is made again, and no other"
    assert not list((tmp_path / "out" / "unfinished").iterdir())
    mine, theirs = (records(p)["performance/toy/dm/1"]["results"] for p in (tmp_path, tmp_path / "plain"))
    assert [(r["role"], r["accuracies"]) for r in mine] == [(r["role"], r["accuracies"]) for r in theirs]
    assert [r["seconds"] > 1000 for r in mine].count(True) == 1


def kept_by(judge, set_, name="mlp-w4"):
    """What a judge leaves of a training that is cut off in its third step."""
    update, calls = Trainer._update, []

    def cut_off(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise Cut
        return update(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", cut_off)
        with pytest.raises(Cut):
            judge.set(set_, "it", name)
    return {p.name for p in judge.unfinished.glob("*")}


def test_a_training_is_told_from_every_other_one(tmp_path, short, often):  # noqa: F811
    data = toy()
    set_ = a_set("dm", {"objective.real": 2}, "hard", None, data=data)
    judge = Judge(data, PROTOCOLS["dc"], 2, compile="off", unfinished=tmp_path)
    files = kept_by(judge, set_)
    assert len(files) == 1
    others = [
        replace(judge, protocol=PROTOCOLS["dsa"]),
        replace(judge, seed=1),
        replace(judge, precision="bf16"),
        replace(judge, repeats=3),
    ]
    for i, other in enumerate(others):
        assert len(kept_by(other, set_)) == 2 + i
    assert len(kept_by(judge, set_, "mlp-w5")) == 6
    shifted = DistilledSet(set_.inputs * 1.001, set_.labels, set_.meta)
    assert len(kept_by(judge, shifted)) == 7


def test_a_network_from_outside_begins_anew(tmp_path, monkeypatch, short, often):  # noqa: F811
    """Its code may have changed under its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "import torch\ndef net(shape, outputs):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs))\n"
    (tmp_path / "outside_unfinished.py").write_text(code)
    data = toy()
    set_ = a_set("dm", {"objective.real": 2}, "hard", None, data=data)
    judge = Judge(data, PROTOCOLS["dc"], 2, compile="off", unfinished=tmp_path / "kept")
    assert kept_by(judge, set_, "outside_unfinished:net") == set()


def test_where_nothing_can_be_kept_the_training_goes_on(trainer, tmp_path, often):
    (tmp_path / "file").write_text("")
    kept = Unfinished(tmp_path / "file" / "it.safetensors", "a")
    assert alike(trainer.train(lambda n: None, kept), trainer.train(lambda n: None))
    assert kept.begun() == ([], 0, None)
    kept.end()


def test_another_machine_begins_anew(trainer, tmp_path, monkeypatch, often):
    place = tmp_path / "it.safetensors"
    with pytest.raises(Cut):
        trainer.train(stop_at(9), Unfinished(place, "a"))
    assert Unfinished(place, "a").begun()[2] is not None
    monkeypatch.setattr("potstill.records.processor", lambda: "another")
    assert Unfinished(place, "a").begun() == ([], 0, None)


def test_a_teacher_that_is_cut_off_goes_on(tmp_path, monkeypatch, often):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    monkeypatch.setitem(PROTOCOLS, "whole", replace(PROTOCOLS["whole"], epochs=4, steps=0))
    school = School(toy(), 0)
    update, count = Trainer._update, []

    def cut_off(self, *args):
        count.append(1)
        if len(count) == 3:
            raise Stopped("cut off")
        return update(self, *args)

    monkeypatch.setattr(Trainer, "_update", cut_off)
    with pytest.raises(Stopped):
        school.teacher("mlp-w4")
    part = school.file("mlp-w4").with_suffix(".part")
    assert part.exists() and not school.file("mlp-w4").exists()
    made = school.teacher("mlp-w4")
    assert not part.exists() and school.file("mlp-w4").exists()
    steps = len(count) - 1
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(Trainer, "_update", update)
    assert alike(tuple(made.state), tuple(School(toy(), 0).teacher("mlp-w4").state))
    assert steps == Trainer(made.net, PROTOCOLS["whole"], toy().task, False, "cpu").steps(len(toy().train))


def test_a_teacher_that_diverges_leaves_nothing_behind(tmp_path, monkeypatch, often):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    monkeypatch.setitem(PROTOCOLS, "whole", replace(PROTOCOLS["whole"], epochs=4, steps=0, lr=1e30))
    with pytest.raises(Stopped):
        School(toy(), 0).teacher("mlp-w4")
    assert not list((tmp_path / "teachers").iterdir())
