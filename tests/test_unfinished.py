"""Trainings that are cut off go on to the same bits."""

from dataclasses import replace

import pytest
import torch
from test_benchmark import DM, HEAD, bench_of, records, root, short  # noqa: F401

from potstill import unfinished
from potstill.errors import Stopped
from potstill.functional import Key, leaves
from potstill.networks import network
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


def test_a_cell_that_is_cut_off_in_its_judging_loses_no_more_than_what_came_after_the_last_writing(
    root,  # noqa: F811
    tmp_path,
    short,  # noqa: F811
    monkeypatch,
    often,
):
    monkeypatch.setitem(PROTOCOLS, "dc", replace(PROTOCOLS["dc"], epochs=40, steps=0))
    text = HEAD + DM.replace('networks = ["convnet-w4", "mlp-w4"]', 'networks = ["mlp-w4"]')
    (tmp_path / "plain").mkdir()
    whole = bench_of(tmp_path / "plain", text)
    whole.run(whole.plan())
    fit, told = Trainer.fit, []

    def cut_off(self, sets, keys, tick, prepare=None, kept=None):
        def counted(n):
            tick(n)
            told.append(n)
            if len(told) == 30:
                raise KeyboardInterrupt

        return fit(self, sets, keys, counted, prepare, kept)

    monkeypatch.setattr(Trainer, "fit", cut_off)
    work = bench_of(tmp_path, text)
    with pytest.raises(KeyboardInterrupt):
        work.run(work.plan())
    left = list((tmp_path / "out" / "unfinished").iterdir())
    assert len(left) == 1
    work.run(work.plan())
    assert not list((tmp_path / "out" / "unfinished").iterdir())
    mine, theirs = (records(p)["performance/toy/dm/1"]["results"] for p in (tmp_path, tmp_path / "plain"))
    assert [(r["role"], r["accuracies"]) for r in mine] == [(r["role"], r["accuracies"]) for r in theirs]


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
