"""Numbers that are not finite, stage by stage, and data that change between stop and resume."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from toyruns import Bar, bytes_of, everything, interrupt, record, run, save_npz, short  # noqa: F401

import potstill
from potstill import cli, recorder, still
from potstill.cli import main
from potstill.errors import Stopped
from potstill.evaluation import evaluate
from potstill.functional import SGD, Key, tree_map
from potstill.objectives import Net, Real
from potstill.teacher import School
from potstill.testing import toy
from potstill.training import PROTOCOLS, Trainer

pytestmark = pytest.mark.usefixtures("short")
Still = still.Still


def spoil(tree, value=math.nan):
    """A tree with one number of each of its tensors spoilt."""

    def one(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point() or not t.numel():
            return t
        t = t.clone()
        t.view(-1)[0] = value
        return t

    return tree_map(one, tree)


# --- data


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("command", ["distill", "experts", "evaluate"])
def test_data_are_refused_before_anything_is_made(tmp_path, capsys, bad, command):
    npz = save_npz(tmp_path / "toy.npz")
    parts = dict(np.load(npz))
    parts["x_train"][7, 0, 3, 3] = bad
    np.savez(npz, **parts)
    first = [npz] if command != "evaluate" else ["fashion-mnist/dm/1", "--data", npz]
    more = [] if command == "evaluate" else ["--out", str(tmp_path / "a")]
    assert main([command, *first, *more]) == 2
    error = capsys.readouterr().err.strip()
    assert "x_train has a value that is not finite (NaN or infinity), first in sample 7" in error and "\n" not in error
    assert not (tmp_path / "a").exists()


# --- the stages of a step


class Spoilt:
    """A step of this number whose named stage is not finite."""

    def __init__(self, patch, stage, at=4):
        self.step = -1
        inputs_of, target, value_and_grad, update = (
            Still.inputs_of,
            Still.target,
            Still.value_and_grad,
            SGD.update,
        )

        def inputs(me, now, step):
            self.step = step
            slot, net, real, draws = inputs_of(me, now, step)
            if step == at and stage == "network":
                net = Net(net.network, type(net.state)(*spoil(tuple(net.state))), net.goal)
            if step == at and stage == "data":
                real = Real(*spoil(tuple(real), math.inf))
            return slot, net, real, draws

        def targets(me, net, real, draws):
            found = target(me, net, real, draws)
            return spoil(found) if self.step == at and stage == "target" else found

        def gradients(me, now, target, net, draws):
            loss, grads, own = value_and_grad(me, now, target, net, draws)
            if self.step == at and stage == "loss":
                loss = loss * math.nan
            if self.step == at and stage == "gradient":
                grads = spoil(grads)
            return loss, grads, own

        def updated(me, *arguments):
            after, slow = update(me, *arguments)
            return (spoil(after, math.inf), slow) if self.step == at and stage == "optimiser" else (after, slow)

        patch.setattr(Still, "inputs_of", inputs)
        patch.setattr(Still, "target", targets)
        patch.setattr(Still, "value_and_grad", gradients)
        patch.setattr(SGD, "update", updated)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("network", "the loss is nan: the network that it was given has weights that are not finite;"),
        ("data", "the loss is nan: the transformed data are not finite;"),
        ("target", "the loss is nan: what the objective makes of the data is not finite;"),
        ("loss", "the loss is nan;"),
        ("gradient", r"the loss is [\d.e+-]+: the gradient of inputs is not finite;"),
        ("optimiser", r"the loss is [\d.e+-]+: the optimiser takes inputs to what is not finite;"),
    ],
)
def test_each_stage_stops_with_the_last_good_set_kept_and_is_named(tmp_path, stage, words):
    with pytest.MonkeyPatch.context() as patch:
        Spoilt(patch, stage)
        with pytest.raises(Stopped, match=rf"^step 5: {words} the last good set, of step 4, is kept in") as caught:
            run(tmp_path / "a")
    assert "\n" not in str(caught.value)
    kept = potstill.load(tmp_path / "a")
    assert kept.meta.steps == 4 and kept.inputs.isfinite().all()
    run(tmp_path / "a", resume=True)
    run(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_gram_matrix_that_cannot_be_solved_with_is_named(tmp_path):
    """Nine samples in a space of two features and no ridge: the matrix has seven eigenvalues that are rounding errors."""
    settings = {"objective.real": 8, "objective.ridge": 0.0, "looks": 0, "network": "mlp-w2", "source.size": 1}
    words = (
        r"^step 1: the loss is nan: kernel ridge regression: with ridge = 0 .* not positive definite .* a larger ridge"
    )
    with pytest.raises(Stopped, match=words):
        run(tmp_path / "a", method="frepo", settings=settings, ipc=3)
    assert potstill.load(tmp_path / "a").meta.steps == 0


# --- experts, teachers, students


def test_an_experts_weights_are_looked_at_after_each_step(tmp_path):
    """Not only its loss: with these weights the next loss would not be finite, and what is saved would be of no use."""
    calls = []

    class Bad(Trainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            step = self.step

            def spoilt(*given):
                calls.append(1)
                state, slow, loss = step(*given)
                return (type(given[0])(*spoil(tuple(state))), slow, loss) if len(calls) == 6 else (state, slow, loss)

            self.step = spoilt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "Trainer", Bad)
        with pytest.raises(Stopped, match="^expert 1, step 2: its loss or weights are not finite; a lower rate"):
            record(tmp_path / "e", epochs=1)
    record(tmp_path / "e", epochs=1, resume=True)
    record(tmp_path / "whole", epochs=1)
    assert bytes_of(tmp_path / "e") == bytes_of(tmp_path / "whole")


def diverging(patch, module_or_class=Trainer):
    """Every network that is trained ends with weights that are not finite."""
    fit = Trainer.fit

    def spoilt(self, *arguments, **options):
        return [type(s)(*spoil(tuple(s))) for s in fit(self, *arguments, **options)]

    patch.setattr(module_or_class, "fit", spoilt)


def test_networks_that_diverge_at_evaluation_are_said_and_the_set_is_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "dsa", replace(PROTOCOLS["dsa"], epochs=2, steps=0))
    made, said = run(tmp_path / "a"), []
    with pytest.MonkeyPatch.context() as patch:
        diverging(patch)
        (result,) = evaluate(made.out, toy(), repeats=2, say=said.append)
    assert [line for line in said if "2 of 2 networks" in line and "not finite" in line]
    assert len(result.accuracies) == 2 and all(0 <= a <= 1 for a in result.accuracies)
    said.clear()
    evaluate(made.out, toy(), repeats=2, say=said.append)
    assert not [line for line in said if "not finite" in line]


def test_a_look_at_a_network_that_diverges_stops_nothing(tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        diverging(patch)
        run(tmp_path / "a")
    run(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_teacher_that_diverges_labels_nothing_and_is_not_kept(monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "whole", replace(PROTOCOLS["whole"], epochs=1))
    school = School(toy().hold_out(0.1), 0)
    with pytest.MonkeyPatch.context() as patch:
        diverging(patch)
        with pytest.raises(Stopped, match="^teacher: mlp-w4 ended with weights that are not finite"):
            school.teacher("mlp-w4")
    assert not school.file("mlp-w4").exists()
    assert school.teacher("mlp-w4").state.params and school.file("mlp-w4").exists()


# --- data that change


SMALL = ["--ipc", "1", "--preset", "small", "--network", "mlp-w4", "--set", "objective.real=4", "--steps", "6", "--no-evaluate", "--compile", "off"]  # fmt: skip
RECORDING = ["--network", "mlp-w4", "--count", "2", "--epochs", "2", "--batch", "8", "--compile", "off"]


def stop(monkeypatch, command, at):
    """Begin a run and interrupt it at this step, or let it end."""
    with monkeypatch.context() as patch:
        patch.setattr(cli, "progress_bar", Bar(at or -1, interrupt))
        assert main(command) == (130 if at else 0)


def refused(command, capsys):
    """A resumed run is refused in a line, and nothing of it is touched."""
    before = everything(command[-1])
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    error = capsys.readouterr().err.strip()
    assert "the data have changed" in error and "\n" not in error and everything(command[-1]) == before


@pytest.mark.parametrize(
    ("what", "at"),
    [("distill", 3), ("distill", None), ("experts", 2), ("experts", 10), ("experts", None)],
    ids=["distill-stopped", "distill-ended", "experts-in-the-first", "experts-in-the-second", "experts-ended"],
)
def test_a_changed_npz_is_refused_on_resume(tmp_path, capsys, monkeypatch, what, at):
    """Of a run that was stopped on its way, and of one that had ended; with the data as they were it ends as another."""
    npz = save_npz(tmp_path / "toy.npz")
    command = [what, npz, *(SMALL if what == "distill" else RECORDING), "--out"]
    stop(monkeypatch, [*command, str(tmp_path / "a")], at)
    parts = dict(np.load(npz))
    changed = {**parts, "x_test": parts["x_test"].copy()}
    changed["x_test"][-1, 0, 0, 0] += 1e-6
    np.savez(npz, **changed)
    refused([*command, str(tmp_path / "a")], capsys)
    np.savez(npz, **parts)
    assert main([*command, str(tmp_path / "a"), "--resume"]) == 0 == main([*command, str(tmp_path / "b")])
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("what", "at"), [("distill", 3), ("distill", None), ("experts", 3)], ids=["distill-stopped", "distill-ended", "experts-stopped"]
)  # fmt: skip
def test_a_changed_picture_is_refused_on_resume(tmp_path, capsys, monkeypatch, what, at):
    for part in ("train", "test"):
        for c in ("a", "b"):
            folder = tmp_path / "pictures" / part / c
            folder.mkdir(parents=True)
            for i in range(4):
                drawn = (Key(ord(c)).fold(part, i).normal(8, 8).abs() * 100).clamp(max=255).byte().numpy()
                Image.fromarray(drawn).save(folder / f"{i}.png")
    options = [*SMALL, "--holdout", "0"] if what == "distill" else RECORDING
    command = [what, str(tmp_path / "pictures"), *options, "--out", str(tmp_path / "a")]
    stop(monkeypatch, command, at)
    file = tmp_path / "pictures" / "train" / "b" / "2.png"
    good = np.asarray(Image.open(file)).copy()
    good[3, 3] ^= 1
    Image.fromarray(good).save(file)
    refused(command, capsys)
