"""The loop: same seed same bits, resume after any end, what stops a run, what a folder may hold."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import potstill
from potstill import Stopped, checkpoint, compiling, loop, still
from potstill.errors import PotstillError
from potstill.methods import METHODS
from potstill.networks import network
from potstill.recipe import change
from potstill.records import read_json
from potstill.testing import toy
from potstill.training import PROTOCOLS

SMALL = {"network": "convnet-w8", "student": "convnet-w8", "objective.real": 8, "looks": 1}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Looks and evaluations of a few epochs: what is tested here is the loop."""
    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=5))
    for name in ("dsa", "whole"):
        monkeypatch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], epochs=5, steps=0))


def run(out, **options):
    options = {"ipc": 2, "steps": 12, "preset": "small", "settings": SMALL, "evaluate": False, **options}
    return potstill.distill(toy(), options.pop("method", "dm"), out=out, **options)


def bytes_of(folder):
    return (Path(folder) / "set.safetensors").read_bytes()


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b")
    run(tmp_path / "c", seed=1)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") != bytes_of(tmp_path / "c")


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


@pytest.mark.parametrize("at", [1, 5, 11])
def test_resume_after_ctrl_c_gives_the_same_bytes(tmp_path, at):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", bar=Interrupt(at))
    part = potstill.load(tmp_path / "cut")
    assert part.meta.steps == at and not torch.equal(part.inputs, whole.set.inputs)
    again = run(tmp_path / "cut", resume=True)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    assert again.record["curve"] == whole.record["curve"] and again.record["looks"] == whole.record["looks"]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run(tmp_path / "a")
    before = bytes_of(tmp_path / "a")
    again = run(tmp_path / "a", resume=True)
    assert bytes_of(tmp_path / "a") == before and again.record["curve"] == first.record["curve"]


def test_resume_without_a_checkpoint_begins(tmp_path):
    run(tmp_path / "a", resume=True)
    run(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


KILLED = """
import sys, potstill
from dataclasses import replace
from potstill import loop, still
from potstill.testing import toy
loop.SAVE_EVERY = 0.0
still.LOOK = replace(still.LOOK, epochs=5)
class Bar:
    def __call__(self, total, title, start): return self
    def update(self, n=1): print("step", flush=True)
    def set_postfix_str(self, text, refresh=True): ...
    def close(self): ...
potstill.distill(toy(), "dm", ipc=2, steps=40, preset="small", evaluate=False, out=sys.argv[1], resume=True, bar=Bar(),
    settings={"network": "convnet-w8", "student": "convnet-w8", "objective.real": 8, "looks": 1})
print("done", flush=True)
"""


@pytest.mark.parametrize("after", [3, 17])
def test_resume_after_kill_9_gives_the_same_bytes(tmp_path, after):
    """A process killed without warning in mid-run leaves a usable set, and goes on to the same end."""

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "cut")], stdout=subprocess.PIPE, text=True
        )

    process = start()
    for _ in range(after):
        assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(potstill.load(tmp_path / "cut")) == 6
    with start() as second:
        output = second.stdout.read().split()
    assert output[-1] == "done" and len(output) < 40
    run(tmp_path / "whole", steps=40)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_every_checkpoint_holds_a_usable_set(tmp_path, monkeypatch):
    seen = []
    save = loop.save_checkpoint

    def spy(out, *rest):
        save(out, *rest)
        seen.append(potstill.load(out).meta.steps)

    monkeypatch.setattr(loop, "save_checkpoint", spy)
    run(tmp_path / "a", settings={**SMALL, "looks": 4})
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 12 and set(seen) == {0, 3, 6, 9, 12}


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_state(tmp_path):
    steps = []
    good = loop.Still.step

    def poisoned(self, now, step):
        after, loss = good(self, now, step)
        steps.append(step)
        return (after, float("nan")) if step == 5 else (after, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Still, "step", poisoned)
        with pytest.raises(Stopped, match=r"step 6: the loss is nan; the last good set, of step 5") as caught:
            run(tmp_path / "a")
    assert len(str(caught.value).splitlines()) == 1
    kept = potstill.load(tmp_path / "a")
    assert kept.meta.steps == 5 and kept.inputs.isfinite().all()
    run(tmp_path / "a", resume=True)
    run(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_rate_that_is_far_too_high_is_seen_as_divergence(tmp_path):
    with pytest.raises(Stopped, match="has run away|is nan|is inf"):
        run(tmp_path / "a", steps=60, settings={**SMALL, "optimiser.inputs.lr": 1e6, "network": "convnet-none-w8"})
    assert potstill.load(tmp_path / "a").inputs.isfinite().all()


def test_a_compiled_step_takes_bf16_from_smaller_networks_on(tmp_path, monkeypatch):
    """On a processor that multiplies it; a run that is not compiled, or a smaller network, stays in float32, and what is asked for is taken."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    net = network("convnet-w8", (1, 8, 8), 10)
    flops = compiling.sample_flops(net)
    found = []
    for bound in (flops + 1, flops - 1):
        monkeypatch.setattr(compiling, "FUSED", bound)
        found += [compiling.choose_precision(asked, "cpu", net, fused) for asked in ("auto", "fp32") for fused in (False, True)]  # fmt: skip
    assert found == ["fp32"] * 5 + ["bf16"] + ["fp32"] * 2
    monkeypatch.setattr(compiling, "FUSED", 1.0)
    monkeypatch.setattr(still, "compiled", lambda function, on: function)  # the choice is what is looked at
    said = []
    for form in ("on", "off"):
        run(tmp_path / form, steps=2, compile=form, say=said.append)
    assert [read_json(tmp_path / f / "record.json")["choices"]["precision"] for f in ("on", "off")] == ["bf16", "fp32"]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", compile="on", bar=Interrupt(5))
    monkeypatch.setattr(compiling, "FUSED", flops * 1e6)  # what a run began with it ends with
    run(tmp_path / "cut", compile="on", resume=True)
    monkeypatch.setattr(compiling, "FUSED", 1.0)
    run(tmp_path / "dc", steps=2, compile="on", method="dc")
    assert [read_json(tmp_path / f / "record.json")["choices"]["precision"] for f in ("cut", "dc")] == ["bf16", "fp32"]
    assert [line for line in said if "precision" in line] == [f"compile {f} (asked for), precision {p}" for f, p in (("on", "bf16"), ("off", "fp32"))]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"ipc": 1}, "counts was"),
        ({"steps": 13}, "steps was 12, now 13"),
        ({"holdout": 0.2}, "data have changed|holdout was"),
        ({"settings": {**SMALL, "objective.real": 4}}, "objective was"),
        ({"precision": "bf16"}, "precision was fp32, now bf16"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, options, words):
    run(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with pytest.raises(PotstillError, match=words):
        run(tmp_path / "a", resume=True, **options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_changed_data_are_refused(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(PotstillError, match="the data have changed"):
        potstill.distill(
            toy(seed=1), "dm", out=tmp_path / "a", ipc=2, steps=12, preset="small", settings=SMALL, resume=True
        )


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path / "a")
    for name in ("checkpoint.safetensors", "checkpoint-before.safetensors"):
        file = tmp_path / "a" / name
        file.write_bytes(file.read_bytes()[:-100])
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with pytest.raises(PotstillError, match=r"checkpoint\.safetensors is damaged .* so is checkpoint-before"):
        run(tmp_path / "a", resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years")
    for options in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(PotstillError, match=r"something else \(thesis\.tex\)"):
            run(tmp_path / "a", **options)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["thesis.tex"]


def test_a_folder_that_holds_a_run_wants_resume_or_force(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(PotstillError, match="--resume continues it, --force starts it again"):
        run(tmp_path / "a")
    run(tmp_path / "a", force=True, seed=5)
    run(tmp_path / "b", seed=5)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_mistake_does_not_touch_a_finished_run(tmp_path):
    run(tmp_path / "a")
    before = bytes_of(tmp_path / "a")
    with pytest.raises(PotstillError):
        run(tmp_path / "a", force=True, ipc=1000)
    assert bytes_of(tmp_path / "a") == before


def test_unequal_counts(tmp_path):
    made = run(tmp_path / "a", ipc=[1, 3, 2])
    assert torch.bincount(made.set.labels).tolist() == [1, 3, 2] and made.record["ipc"] == [1, 3, 2]
    assert len(made.record["curve"]) == 12


def test_minutes_fix_the_steps_before_the_first_and_print_them(tmp_path):
    lines = []
    made = run(tmp_path / "a", steps=None, minutes=0.05, say=lines.append)
    planned = [line for line in lines if "--steps" in line]
    assert len(planned) == 1 and f"--steps {made.record['steps']} " in planned[0] and made.record["steps"] >= 1
    again = run(tmp_path / "b", steps=made.record["steps"])
    assert torch.equal(made.set.inputs, again.set.inputs)


def test_a_time_budget_is_for_steps_and_not_for_looks(tmp_path, monkeypatch):
    looked = still.Still.look
    monkeypatch.setattr(still.Still, "look", lambda self, now: (time.sleep(0.5), looked(self, now))[1])
    lines, settings = [], {**SMALL, "looks": 4}
    made = run(tmp_path / "a", steps=None, minutes=0.04, settings=settings, say=lines.append)
    count = made.record["recipe"]["looks"]
    assert count == len(made.record["looks"]) - 1 < 4 and made.record["steps"] > 1
    assert any(f"{count} of 4 after this one" in line for line in lines)
    assert f"--set looks={count}" in next(line for line in lines if "the same as" in line)
    assert f"looks={count}" in made.record["command"]
    resumed = run(tmp_path / "a", steps=None, minutes=0.04, settings=settings, resume=True)
    assert resumed.record["recipe"] == made.record["recipe"]
    with pytest.raises(PotstillError, match="looks was"):
        run(tmp_path / "a", steps=made.record["steps"], settings=settings, resume=True)


def test_looks_use_held_out_data_and_are_left_out_without(tmp_path):
    made = run(tmp_path / "a", settings={**SMALL, "looks": 4})
    assert [look["step"] for look in made.record["looks"]] == [0, 3, 6, 9, 12]
    assert all(0 <= look["accuracy"] <= 1 for look in made.record["looks"])
    assert run(tmp_path / "b", holdout=0.0).record["looks"] == []


def test_the_set_moves_away_from_its_start_and_only_its_inputs(tmp_path):
    start = run(tmp_path / "a", steps=0)
    end = run(tmp_path / "b")
    assert not torch.equal(start.set.inputs, end.set.inputs)
    assert torch.equal(start.set.labels, end.set.labels)


def test_random_takes_no_steps(tmp_path):
    made = run(tmp_path / "a", method="random", steps=None, settings={"student": "convnet-w8"})
    assert made.record["steps"] == 0 and made.record["curve"] == []
    with pytest.raises(PotstillError, match="takes 0 steps"):
        run(tmp_path / "b", method="random", settings={})


def test_a_recipe_of_ones_own(tmp_path):
    mine = change(METHODS["dm"]("small"), {**SMALL, "method": "mine"})
    assert run(tmp_path / "a", method=mine, settings={}).set.meta.method == "mine"


def test_the_record_is_whole_and_has_no_absolute_path(tmp_path):
    made = run(tmp_path / "a", evaluate=True, repeats=2)
    text = (tmp_path / "a" / "record.json").read_text()
    record = json.loads(text)
    assert str(tmp_path) not in text and os.path.expanduser("~") not in text
    assert [r["method"] for r in record["results"]] == ["dm", "random", "k-means", "random-soft", "whole"]
    for r in record["results"]:
        assert len(r["accuracies"]) == r["repeats"] and 0 <= r["accuracy_mean"] <= 1
    assert record["set"]["bytes"] == len(bytes_of(tmp_path / "a")) and record["cost"]["seconds_per_step"] > 0
    assert made.record == record
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(checkpoint.OURS)


def test_a_full_disk_keeps_the_old_set(tmp_path):
    """A limit on file sizes stands in for a full disk: every write of the new run fails, the old set survives."""
    script = f"""
import resource, sys
import potstill
from potstill.testing import toy
from potstill import loop
def go(**options):
    potstill.distill(toy(), "dm", ipc=2, steps=12, preset="small", evaluate=False, out={str(tmp_path / "a")!r},
        settings={SMALL!r}, **options)
class Full:
    def __call__(self, total, title, start): return self
    def update(self, n=1): resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    def set_postfix_str(self, text, refresh=True): ...
    def close(self): ...
try:
    go(bar=Full())
except potstill.Stopped as error:
    print(error)
    sys.exit(1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot be written" in done.stdout, done.stderr
    kept = potstill.load(tmp_path / "a")
    assert kept.meta.steps == 0 and not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".")]
    run(tmp_path / "a", resume=True)
    run(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_import_is_quick_and_loads_no_torch():
    script = "import sys, potstill; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True)
    assert time.perf_counter() - begin < 2


def test_a_clock_never_counts_twice_nor_backwards():
    from potstill.measure import Clock

    clock = Clock()
    begin = time.perf_counter()
    with clock.phase("loop"):
        time.sleep(0.05)
        with clock.phase("looks"):
            time.sleep(0.03)
            assert clock.seconds["loop"] >= 0.05, "what an open phase has taken is there when an inner one begins"
        time.sleep(0.02)
    took = time.perf_counter() - begin
    assert clock.seconds["loop"] >= 0.07 and clock.seconds["looks"] >= 0.03
    assert sum(clock.seconds.values()) == pytest.approx(took, abs=0.01)


@pytest.mark.parametrize("ipc", [1.0, True, "1", [1, 2.5, 1]])
def test_images_per_class_are_whole_numbers(tmp_path, ipc):
    with pytest.raises(PotstillError, match="not a whole number"):
        run(tmp_path / "a", ipc=ipc)


def test_images_per_class_of_numpy(tmp_path):
    import numpy as np

    assert run(tmp_path / "a", ipc=np.int64(2)).set.meta.ipc == [2, 2, 2]
    assert run(tmp_path / "b", ipc=np.array([1, 2, 1])).set.meta.ipc == [1, 2, 1]


def test_snapshots_of_many_classes_stay_small():
    """The first hundred classes are shown: with a thousand each snapshot would be as large as S."""
    data = toy(sizes=(2,) * 120)
    run = still.Still(data, still.Settings(METHODS["dm"]("small"), [1] * 120, 0, 0.0, 1, "cpu", False, "fp32", 1))
    assert run.shown.tolist() == list(range(still.SHOWN)) and still.SHOWN == 100
    few = still.Still(toy(), still.Settings(METHODS["dm"]("small"), [3] * 3, 0, 0.0, 1, "cpu", False, "fp32", 1))
    assert few.shown.tolist() == list(range(9)), "all of a small set"
