"""Benchmarks: rows read strictly, cells run once, and whatever goes wrong in one stays in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

from potstill import cells as cells_module
from potstill import costs, distill, evaluate, scores, still
from potstill.bench import Bench
from potstill.benchmark import Benchmark, planned, reason
from potstill.cli import main
from potstill.errors import NoMemory, PotstillError, Unwritable
from potstill.exchange import load
from potstill.judge import Judge
from potstill.records import digest
from potstill.rows import CostRow, Suite, suites
from potstill.testing import toy
from potstill.training import PROTOCOLS

HEAD = 'title = "t"\ntable = "performance"\n'
PLACES = HEAD.replace("performance", "transfer")
DM = """[[row]]
method = "dm"
data = "toy"
ipc = 1
steps = 4
network = "convnet-w4"
networks = ["convnet-w4", "mlp-w4"]
protocol = "dc"
repeats = 2
baselines = ["random", "k-means"]
settings = { "objective.real" = 4 }
"""
RANDOM = '[[row]]\nmethod = "random"\ndata = "toy"\nipc = 2\nnetworks = ["convnet-w4"]\nprotocol = "dsa"\nrepeats = 2\n'


@pytest.fixture
def short(monkeypatch):
    """Trainings of a few epochs."""
    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=5))
    for name in ("dc", "dsa", "kip", "whole"):
        monkeypatch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], epochs=4, steps=0))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data root with toy data, and no zoo or cache of this machine."""
    data, folder = toy(), tmp_path / "data"
    folder.mkdir()
    parts = {f"{n}_{p}": getattr(s, "inputs" if n == "x" else "labels").numpy() for p, s in (("train", data.train), ("test", data.test)) for n in "xy"}  # fmt: skip
    np.savez(folder / "toy.npz", **parts)
    monkeypatch.setenv("POTSTILL_DATA", str(folder))
    monkeypatch.setattr(cells_module.places, "names", dict)
    return folder


def bench_of(tmp_path, text, name="mine", **options):
    file = tmp_path / f"{name}.toml"
    file.write_text(text)
    return Benchmark(suites(str(file), []), Bench(tmp_path / "out", **options))


def records(tmp_path):
    files = sorted((tmp_path / "out" / "cells").rglob("*.json"))
    return {
        f.relative_to(tmp_path / "out" / "cells").with_suffix("").as_posix(): json.loads(f.read_text()) for f in files
    }


# rows


def test_all_mistakes_of_all_rows_are_told_at_once(tmp_path):
    rows = [
        'method = "dmm"\ndata = "toy"\nipc = 1\nsteps = 1\nnetworks = ["mlp"]\nprotocol = "dc"',
        'method = "dm"\ndata = "toy"\nipc = 0\nsteps = 1\nnetworks = ["mlp"]\nprotocol = "dcc"\nrepeats = 0',
        'method = "dm"\ndata = 3\nipc = true\nnetworks = []\nprotocol = "dc"\nepoch = 1',
        'method = "dm"\ndata = "toy"\nipc = 1\nnetworks = ["mlp"]\nprotocol = "dc"',
        'method = "dm"\ndata = "toy"\nipc = 1\nsteps = 1\nminutes = 2.0\nnetworks = ["mlp"]\nprotocol = "dc"\nexperts = "none"',
        'method = "dm"\ndata = "toy"\nipc = 3\nsteps = 1\nnetworks = ["mlp"]\nprotocol = "dc"\nsettings = { "objective.rael" = 1 }',
        'method = "dm"\ndata = "toy"\nipc = 4\nsteps = 1\nnetworks = ["mlp"]\nprotocol = "dc"\npublished = { accuracy = 70.7, source = "x", mark = "seen" }',
        'method = "random"\ndata = "toy"\nipc = 9\nnetworks = ["mlp"]\nprotocol = "dc"',
        'method = "random"\ndata = "toy"\nipc = 9\nnetworks = ["mlp"]\nprotocol = "dc"',
    ]
    (tmp_path / "bad.toml").write_text(HEAD + "colour = 1\n" + "".join(f"[[row]]\n{r}\n" for r in rows))
    with pytest.raises(PotstillError) as error:
        suites("bad", [tmp_path])
    text = str(error.value)
    for words in (
        "no field 'colour'",
        "row 1 (dmm): no method 'dmm'; did you mean 'dm'",
        "row 2 (dm): ipc 0 is below 1",
        "row 2 (dm): repeats 0 is below 1",
        "row 2 (dm): no protocol 'dcc'",
        "row 3 (dm): data is 3; str is needed",
        "row 3 (dm): ipc is True; int is needed",
        "row 3 (dm): networks is []",
        "row 3 (dm): no field 'epoch'",
        "row 4 (dm): minutes or steps are needed",
        "row 5 (dm): minutes and steps exclude each other",
        "row 5 (dm): no recording [experts] 'none'",
        "row 6 (dm): no recipe field 'objective.rael'",
        "row 7 (dm): published: accuracy 70.7 is no fraction",
        "row 7 (dm): no mark 'seen'",
        "row 9 (random): a second row for toy/random/9",
    ):
        assert words in text, words
    assert "18 mistakes" in text or text.count("\n") >= 16


def test_a_name_stands_for_its_file_and_its_parts_and_an_unknown_one_for_none(tmp_path):
    for i, name in enumerate(("quick", "quick-two", "other"), 1):
        (tmp_path / f"{name}.toml").write_text(HEAD + RANDOM.replace("ipc = 2", f"ipc = {i}"))
    assert [s.name for s in suites("quick", [tmp_path])] == ["quick", "quick-two"]
    assert [s.name for s in suites(str(tmp_path / "other.toml"), [])] == ["other"]
    with pytest.raises(PotstillError, match="no benchmark 'quik'; did you mean 'quick'"):
        suites("quik", [tmp_path])
    with pytest.raises(PotstillError, match=r"none.toml cannot be read"):
        suites(str(tmp_path / "none.toml"), [])
    (tmp_path / "torn.toml").write_text("title = ")
    with pytest.raises(PotstillError, match=r"torn.toml cannot be read"):
        suites(str(tmp_path / "torn.toml"), [])


def test_what_is_no_table_and_cells_of_two_files(tmp_path):
    (tmp_path / "a.toml").write_text("experts = 3\n" + HEAD + RANDOM.replace('"toy"', '""'))
    with pytest.raises(PotstillError, match=r"experts are no tables \[experts.NAME\]\n.*data is empty"):
        suites("a", [tmp_path])
    for name in ("b", "b-more"):
        (tmp_path / f"{name}.toml").write_text(HEAD + RANDOM)
    with pytest.raises(PotstillError, match=r"b-more.toml: a row for toy/random/2, as in b.toml"):
        suites("b", [tmp_path])


# cells


def test_a_cells_numbers_are_those_of_a_judge_and_a_second_run_does_nothing(root, tmp_path, short, capsys):
    work = bench_of(tmp_path, HEAD + DM + RANDOM)
    assert work.run(work.plan()) == {"done": 2}
    found = records(tmp_path)["performance/toy/dm/1"]
    assert found["status"] == "done" and found["sets"][0]["steps"] == 4 and found["sets"][0]["images"] == 3
    set_ = load(tmp_path / "out" / found["sets"][0]["path"])
    data = work.bench.data("toy")
    for name in ("convnet-w4", "mlp-w4"):
        alone = Judge(data, cells_module.protocol_of("dc"), 2).set(set_, "dm", name)
        (mine,) = [r for r in found["results"] if (r["role"], r["network"]) == ("set", name)]
        assert mine["accuracies"] == alone.accuracies
    roles = [(r["role"], r["variant"], r["network"]) for r in found["results"]]
    assert roles == [(role, "own", n) for n in ("convnet-w4", "mlp-w4") for role in ("set", "random", "k-means")]
    assert str(tmp_path) not in json.dumps(found)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "cells").rglob("*.json")}
    assert work.run(work.plan()) == {"kept": 2}
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "cells").rglob("*.json")}


def test_a_baseline_is_measured_once_for_all_cells_in_which_it_is_the_same(root, tmp_path, short, monkeypatch):
    calls, random = [], Judge.random
    monkeypatch.setattr(Judge, "random", lambda self, *a: calls.append(self.protocol.name) or random(self, *a))
    chosen = RANDOM + 'baselines = ["random"]\n'
    rows = [chosen.replace('"random"\ndata', f'"{m}"\ndata') for m in ("random", "herding", "k-center")]
    work = bench_of(tmp_path, HEAD + rows[0] + rows[1] + rows[2].replace('"dsa"', '"dc"'))
    assert work.run(work.plan()) == {"done": 3}
    assert calls == ["dsa", "dc"]
    found = records(tmp_path)
    one, two, other = (found[f"performance/toy/{m}/2"]["results"][1] for m in ("random", "herding", "k-center"))
    assert one == two and one["role"] == "random" and other["protocol"] == "dc"
    set_ = load(tmp_path / "out" / found["performance/toy/herding/2"]["sets"][0]["path"])
    alone = random(Judge(work.bench.data("toy"), cells_module.protocol_of("dsa"), 2), set_, "convnet-w4")
    assert two["accuracies"] == alone.accuracies
    again = bench_of(tmp_path, HEAD + rows[1].replace("repeats = 2", "repeats = 3"))
    assert again.run(again.plan()) == {"done": 1} and calls[2:] == ["dsa"]


def test_a_set_with_learned_labels_is_held_against_random_samples_with_a_teachers(root, tmp_path, short, monkeypatch):
    """Its gain is above those; the baseline is that of `evaluate`, made once for all cells in which it is the same."""
    calls, soft = [], Judge.random_soft
    monkeypatch.setattr(Judge, "random_soft", lambda self, *a: calls.append(a) or soft(self, *a))
    row = '[[row]]\nmethod = "kip"\ndata = "toy"\nipc = 1\nsteps = 4\nnetworks = ["convnet-w4"]\nprotocol = "dc"\nrepeats = 2\n'
    row += 'baselines = ["random", "random-soft"]\nsettings = { "objective.real" = 8 }\n'
    work = bench_of(tmp_path, HEAD + row + row.replace("ipc", 'name = "again"\nipc'))
    assert work.run(work.plan()) == {"done": 2} and len(calls) == 1
    record = records(tmp_path)["performance/toy/kip/1"]
    found = {r["role"]: r["accuracies"] for r in record["results"]}
    assert set(found) == {"set", "random", "random-soft"}
    set_ = load(tmp_path / "out" / record["sets"][0]["path"])
    one = soft(Judge(work.bench.data("toy"), cells_module.protocol_of("dc"), 2), set_, "convnet-w4")
    assert found["random-soft"] == one.accuracies
    assert scores.gain(record) == pytest.approx(sum(found["set"]) / 2 - sum(one.accuracies) / 2)


def test_a_cell_is_measured_again_when_its_row_changes_and_its_set_kept_when_only_the_judging_does(
    root, tmp_path, short
):
    work = bench_of(tmp_path, HEAD + RANDOM)
    work.run(work.plan())
    old = records(tmp_path)["performance/toy/random/2"]
    more = bench_of(tmp_path, HEAD + RANDOM.replace("repeats = 2", "repeats = 3"))
    assert more.run(more.plan()) == {"done": 1}
    new = records(tmp_path)["performance/toy/random/2"]
    assert new["inputs"] != old["inputs"] and len(new["results"][0]["accuracies"]) == 3
    assert new["results"][0]["accuracies"][:2] == old["results"][0]["accuracies"]
    published = RANDOM + 'published = { accuracy = 0.5, source = "here", mark = "read" }\n'
    same = bench_of(tmp_path, HEAD + published.replace("repeats = 2", "repeats = 3"))
    assert [c.fate for c in same.plan()] == ["kept"], "what a paper says changes no number"


def test_what_a_row_asks_for_more_is_added_to_what_its_cell_has(root, tmp_path, short, monkeypatch):
    """A network, a seed, a baseline or a variant more is measured alone; fewer are no reason to measure."""
    few = RANDOM
    many = few.replace('["convnet-w4"]', '["convnet-w4", "mlp-w4"]') + 'seeds = [0, 1]\nbaselines = ["random"]\n'
    work, more = bench_of(tmp_path, PLACES + few), bench_of(tmp_path, PLACES + many)
    assert work.run(work.plan()) == {"done": 1}
    old = records(tmp_path)["transfer/toy/random/2"]
    asked, judged = [], Judge.set
    monkeypatch.setattr(
        Judge, "set", lambda self, set_, named, net: asked.append(net) or judged(self, set_, named, net)
    )
    assert more.run(more.plan()) == {"done": 1}
    new = records(tmp_path)["transfer/toy/random/2"]
    assert asked == ["mlp-w4", "convnet-w4", "mlp-w4"] and new["inputs"] == old["inputs"]
    assert new["results"][0] == old["results"][0] and len(new["sets"]) == 2
    assert {(r["seed"], r["role"], r["network"]) for r in new["results"]} == {
        *((seed, "set", net) for seed in (0, 1) for net in ("convnet-w4", "mlp-w4")), (0, "random", "convnet-w4"), (0, "random", "mlp-w4")}  # fmt: skip
    assert [x["seeds"] for x in new["met"]] == [[0], [0, 1]]
    for row in (few, many):
        again = bench_of(tmp_path, PLACES + row)
        assert [c.fate for c in again.plan()] == ["kept"]
    other = bench_of(tmp_path, PLACES + few.replace('"convnet-w4"', '"mlp-w8"'))
    assert other.run(other.plan()) == {"done": 1} and asked[3:] == ["mlp-w8"]
    found = records(tmp_path)["transfer/toy/random/2"]
    assert found["row"]["networks"] == ["mlp-w8", "convnet-w4", "mlp-w4"]
    crossed = bench_of(tmp_path, PLACES + few.replace('"convnet-w4"', '"mlp-w8"') + 'baselines = ["random"]\n')
    assert [c.fate for c in crossed.plan()] == ["to do"], "the baseline was measured on the other networks only"
    turned = bench_of(tmp_path, PLACES + many.replace("[0, 1]", "[1, 0]"))
    assert turned.plan()[0].mark != again.plan()[0].mark, "baselines stand beside the first seed's set"


def test_a_table_of_performance_has_the_network_of_its_last_run(root, tmp_path, short):
    """Its cells are told apart by nothing else: another network's numbers are not added but take the place."""
    for network in ("convnet-w4", "mlp-w4"):
        work = bench_of(tmp_path, HEAD + RANDOM.replace("convnet-w4", network))
        assert work.run(work.plan()) == {"done": 1}
        assert [r["network"] for r in records(tmp_path)["performance/toy/random/2"]["results"]] == [network]


def test_what_cannot_be_added_leaves_what_was_there(root, tmp_path, short, monkeypatch):
    """A network that fails, or a process that is killed: the numbers stay, and the rest is still to do."""
    few = PLACES + RANDOM
    more = few.replace('["convnet-w4"]', '["convnet-w4", "mlp-w4"]')
    work, wider = bench_of(tmp_path, few), bench_of(tmp_path, more)
    work.run(work.plan())
    old = records(tmp_path)["transfer/toy/random/2"]

    def fail(self, *args):
        on_disk = records(tmp_path)["transfer/toy/random/2"]
        assert on_disk["status"] == "done" and on_disk["results"] == old["results"], "as it is if the process ends here"
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "set", fail)
        assert wider.run(wider.plan()) == {"out of memory": 1}
    found = records(tmp_path)["transfer/toy/random/2"]
    assert (
        found["status"] == "done"
        and found["results"] == old["results"]
        and found["reason"] == "more than this machine has"
    )
    assert [bench_of(tmp_path, x).plan()[0].fate for x in (few, more)] == ["kept", "to do"]
    again = bench_of(tmp_path, more)
    assert again.run(again.plan()) == {"done": 1} and len(records(tmp_path)["transfer/toy/random/2"]["results"]) == 2
    assert bench_of(tmp_path, more).plan()[0].fate == "kept"


def test_a_set_of_which_nothing_is_missing_is_not_made_again(root, tmp_path, short):
    """Records without their runs, as they are handed on: a further seed is measured alone."""
    work = bench_of(tmp_path, HEAD + DM)
    work.run(work.plan())
    old = records(tmp_path)["performance/toy/dm/1"]
    shutil.rmtree(tmp_path / "out" / "runs")
    file = tmp_path / "out" / "cells" / "performance" / "toy" / "dm" / "1.json"
    before = json.loads(file.read_text())
    del before["met"], before["checksum"]  # as records were before they said what they have met
    file.write_text(json.dumps(before))
    assert bench_of(tmp_path, HEAD + DM).plan()[0].fate == "kept"
    more = bench_of(tmp_path, HEAD + DM + "seeds = [0, 1]\n")
    assert more.run(more.plan()) == {"done": 1}
    new = records(tmp_path)["performance/toy/dm/1"]
    assert new["results"][: len(old["results"])] == old["results"] and [s["seed"] for s in new["sets"]] == [0, 1]
    assert [p.name[:5] for p in (tmp_path / "out" / "runs").rglob("seed*")] == ["seed1"]


def test_another_length_is_another_set_and_the_old_one_is_found_again(root, tmp_path, short, monkeypatch):
    """A finished run of other minutes would resume without complaint: nothing that makes a set may find another's."""
    short_, long = DM.replace("steps = 4", "minutes = 0.01"), DM.replace("steps = 4", "minutes = 0.02")
    sets = []
    for text in (short_, long, short_):
        work = bench_of(tmp_path, HEAD + text)
        assert work.run(work.plan()) == {"done": 1}
        sets.append(records(tmp_path)["performance/toy/dm/1"]["sets"][0])
    assert sets[0]["path"] != sets[1]["path"]
    assert [sets[2][k] for k in ("path", "sha256")] == [sets[0][k] for k in ("path", "sha256")]
    more = bench_of(tmp_path, HEAD + short_.replace("repeats = 2", "repeats = 3"))
    assert more.run(more.plan()) == {"done": 1}
    assert records(tmp_path)["performance/toy/dm/1"]["sets"][0]["sha256"] == sets[0]["sha256"], "judging changes no set"


def test_numbers_of_a_set_that_has_gone_are_not_those_of_another(root, tmp_path, short):
    work = bench_of(tmp_path, HEAD + DM)
    work.run(work.plan())
    file = tmp_path / "out" / "cells" / "performance" / "toy" / "dm" / "1.json"
    whole = json.loads(file.read_text())
    torn = {**whole, "status": "running", "sets": [{**whole["sets"][0], "sha256": "0" * 64}]}
    torn["results"] = [{**r, "accuracies": [0.0, 0.0]} for r in whole["results"][:3]]
    file.write_text(json.dumps(torn))
    assert work.run(work.plan()) == {"done": 1}
    again = json.loads(file.read_text())
    assert [r["accuracies"] for r in again["results"]] == [r["accuracies"] for r in whole["results"]]


def test_a_full_disk_does_not_cost_what_is_there(root, tmp_path, short, monkeypatch):
    work, calls = bench_of(tmp_path, HEAD + DM), []
    work.run(work.plan())
    (tmp_path / "out" / "cells" / "performance" / "toy" / "dm" / "1.json").unlink()

    def full(*args, **options):
        calls.append(options.get("force", False))
        raise Unwritable("no room")

    monkeypatch.setattr(cells_module, "distill", full)
    assert work.run(work.plan()) == {"failed": 1} and calls == [False]


def test_data_that_have_gone_leave_their_records(root, tmp_path, short):
    work = bench_of(tmp_path, HEAD + RANDOM)
    work.run(work.plan())
    before = records(tmp_path)
    (root / "toy.npz").rename(root / "away.npz")
    later = Benchmark(work.suites, Bench(tmp_path / "out"))
    assert later.run(later.plan()) == {"absent": 1} and records(tmp_path) == before


def test_what_device_and_precision_change_is_measured_again(root, tmp_path):
    work = bench_of(tmp_path, HEAD + RANDOM)
    marks = {Benchmark(work.suites, Bench(tmp_path / "out", precision=p, compile=c)).plan()[0].mark for p in ("auto", "bf16") for c in ("auto", "off")}  # fmt: skip
    assert len(marks) == 2, "compiling changes no accuracy"


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"inputs": "MARK"}'])
def test_a_damaged_record_is_measured_again(root, tmp_path, short, content):
    work = bench_of(tmp_path, HEAD + RANDOM)
    file = work.file(work.suites[0].rows[0], "performance")
    file.parent.mkdir(parents=True)
    file.write_text(content.replace("MARK", work.plan()[0].mark))
    with pytest.raises(PotstillError, match=r"2\.json is no"):
        work.judge_findings(tmp_path / "none.toml")
    assert work.run(work.plan()) == {"done": 1}


def test_data_may_be_a_path_and_records_stay_in_their_folder(root, tmp_path, short):
    for name in (str(root / "toy.npz"), "../toy.npz"):
        work = bench_of(tmp_path, HEAD + RANDOM.replace('"toy"', f'"{name}"'))
        (tmp_path / "out").mkdir(exist_ok=True)
        file = work.file(work.suites[0].rows[0], "performance")
        assert file.resolve().is_relative_to(tmp_path / "out" / "cells" / "performance")
    work = bench_of(tmp_path, HEAD + RANDOM.replace('"toy"', f'"{root}/toy.npz"'))
    assert work.run(work.plan()) == {"done": 1}
    (found,) = records(tmp_path).values()
    assert found["data"] == "$POTSTILL_DATA/toy.npz"


def test_what_fails_and_what_is_absent_is_recorded_and_stops_nothing(root, tmp_path, short):
    absent = RANDOM.replace('"toy"', '"./nowhere"')
    deep = RANDOM.replace("convnet-w4", "convnet-w4-d9").replace("ipc = 2", "ipc = 3")
    many = RANDOM.replace("ipc = 2", "ipc = 99")
    work = bench_of(tmp_path, HEAD + absent + deep + many + RANDOM)
    assert work.run(work.plan()) == {"absent": 1, "failed": 2, "done": 1}
    found = records(tmp_path)
    assert "--ipc 99 is more than" in found["performance/toy/random/99"]["reason"]
    assert found["performance/toy/random/3"]["reason"] and found["performance/toy/random/2"]["reason"] == ""
    assert work.run(work.plan()) == {"absent": 1, "failed": 2, "kept": 1}, "failed cells are tried again"


def test_an_unexpected_error_and_a_lack_of_memory_have_their_own_words(root, tmp_path, short, monkeypatch):
    def fail(error):
        def set_(*args, **kwargs):
            raise error

        monkeypatch.setattr(Judge, "set", set_)

    work = bench_of(tmp_path, HEAD + RANDOM)
    fail(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert work.run(work.plan()) == {"out of memory": 1}
    fail(NoMemory("step 3: memory has run out"))
    assert work.run(work.plan()) == {"out of memory": 1}
    fail(RuntimeError("shapes differ"))
    assert work.run(work.plan()) == {"failed": 1}
    assert records(tmp_path)["performance/toy/random/2"]["reason"] == "RuntimeError: shapes differ"
    fail(ValueError("not a PotstillError"))
    assert work.run(work.plan()) == {"failed": 1}
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        work.run(work.plan())


def test_an_interrupted_cell_goes_on_with_the_numbers_that_it_has(root, tmp_path, short, monkeypatch):
    work, judge, calls = bench_of(tmp_path, HEAD + DM), Judge.judge, []

    def judged(self, name, *args, **kwargs):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(self, name, *args, **kwargs)

    monkeypatch.setattr(Judge, "judge", judged)
    with pytest.raises(KeyboardInterrupt):
        work.run(work.plan())
    assert records(tmp_path)["performance/toy/dm/1"]["status"] == "running"
    monkeypatch.setattr(cells_module, "distill", None)  # the set is there: nothing is distilled again
    assert work.run(work.plan()) == {"done": 1}
    assert len(calls) == 7 and len(records(tmp_path)["performance/toy/dm/1"]["results"]) == 6


def test_numbers_of_a_set_that_is_gone_go_with_it(root, tmp_path, short, monkeypatch):
    work = bench_of(tmp_path, HEAD + DM)
    work.run(work.plan())
    file = tmp_path / "out/cells/performance/toy/dm/1.json"
    record = json.loads(file.read_text())
    record["status"], record["sets"][0]["sha256"] = "running", "of another set"
    for row in record["results"]:
        row["accuracies"] = [-1.0]
    file.write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "out/runs")
    assert work.run(work.plan()) == {"done": 1}
    rows = json.loads(file.read_text())["results"]
    assert len(rows) == 6 and all(min(r["accuracies"]) >= 0 for r in rows)


def test_another_process_keeps_a_cell_to_itself(root, tmp_path, short):
    work = bench_of(tmp_path, HEAD + DM + RANDOM)
    file = work.file(work.suites[0].rows[0], "performance").relative_to(tmp_path / "out")
    place = tmp_path / "out" / "locks"
    place.mkdir(parents=True)
    with FileLock(place / f"{digest(str(file))}.lock"):
        assert work.run(work.plan()) == {"done": 1, "in another process": 1}
    assert work.run(work.plan()) == {"done": 1, "kept": 1}


def test_a_budget_a_pattern_and_data_that_stand_for_others(root, tmp_path, short):
    rows = DM.replace("steps = 4", "minutes = 2.0") + RANDOM.replace('"toy"', '"cifar10"')
    work = bench_of(tmp_path, HEAD + rows, exchange={"cifar10": "toy"})
    fates = [(c.row.cell, c.fate) for c in work.plan(budget=1.0)]
    assert fates == [("toy/dm/1", "left out"), ("cifar10/random/2", "to do")]
    assert [c.row.cell for c in work.plan("*/dm/*")] == ["toy/dm/1"] and work.plan("mnist/*") == []
    text = planned(work.plan(budget=1.0))
    assert "left out: beyond the budget" in text and "1 of 2 cells to do" in text
    assert work.plan()[0].minutes >= 2
    assert work.run(work.plan("cifar10/*")) == {"done": 1}
    assert records(tmp_path)["performance/cifar10/random/2"]["data"] == "toy", "what they stand for names the cell only"


def test_a_pattern_tells_the_same_cell_of_two_tables_apart(root, tmp_path):
    (tmp_path / "mine-transfer.toml").write_text(HEAD.replace("performance", "transfer") + RANDOM)
    (tmp_path / "mine.toml").write_text(HEAD + RANDOM)
    work = Benchmark(suites("mine", [tmp_path]), Bench(tmp_path / "out"))
    for pattern, tables in (
        ("toy/random/2", ["performance"]),
        ("toy/*", ["performance"]),
        ("transfer/toy/random/2", ["transfer"]),
        ("*/random/2", ["performance", "transfer"]),
        (None, ["performance", "transfer"]),
    ):
        assert [cell.suite.table for cell in work.plan(pattern)] == tables
    assert [cell.suite.table for cell in work.plan(shlex.split(work._command(work.plan()[1]))[-1])] == ["transfer"]
    bf16 = Benchmark(work.suites, Bench(tmp_path / "out", precision="bf16"))
    assert bf16._command(bf16.plan()[0]).endswith("--only toy/random/2 --precision bf16")


def test_other_students_in_place_of_the_rows_own(root, tmp_path, short):
    work = bench_of(tmp_path, HEAD + RANDOM)
    with pytest.raises(PotstillError, match="a table of performance has one network"):
        work.suites[0].judged_with(["mlp-w4", "mlp-w8"])
    other = replace(work, suites=[work.suites[0].judged_with(["mlp-w4"])])
    taught = replace(work.suites[0].rows[0], method="random-soft")
    narrow = replace(work.suites[0], rows=(taught, *work.suites[0].rows)).judged_with(["mlp-w4"]).rows
    assert narrow[0].settings["student"] == "mlp-w4" and "student" not in narrow[1].settings, "the teacher goes along"
    (kernel, *_) = replace(work.suites[0], rows=(taught,)).judged_with(["ntk-dense-d1"]).rows
    assert "student" not in kernel.settings, "a kernel teaches nobody"
    assert other.run(other.plan()) == {"done": 1}
    (record,) = records(tmp_path).values()
    assert [r["network"] for r in record["results"]] == ["mlp-w4"] and record["command"].endswith("--networks mlp-w4")
    assert work.plan()[0].fate == "to do" and other.plan()[0].fate == "kept"


def test_a_reason_that_cells_share_is_said_once(root, tmp_path):
    lost = RANDOM.replace('"toy"', '"lost.npz"')
    work = bench_of(tmp_path, HEAD + lost + lost.replace("ipc = 2", "ipc = 3"))
    first, second, total = planned(work.plan()).splitlines()
    assert "absent: " in first and second.endswith("  absent") and total.startswith("0 of 2")


def test_experts_are_recorded_once_and_shared(root, tmp_path, short, monkeypatch):
    head = '[experts.e]\ndata = "toy"\nnetwork = "convnet-w4"\ncount = 1\nepochs = 3\nbatch = 16\n'
    row = DM.replace('"dm"', '"mtt"').replace(
        '{ "objective.real" = 4 }', '{ "objective.steps" = 2, "source.max_start" = 1 }'
    )
    row = row.replace('network = "convnet-w4"\n', 'network = "convnet-w4"\nexperts = "e"\n').replace('baselines = ["random", "k-means"]\n', "")  # fmt: skip
    work = bench_of(tmp_path, HEAD + head + row + row.replace("ipc = 1", "ipc = 2"))
    assert work.run(work.plan()) == {"done": 2}
    assert len(list((tmp_path / "out" / "experts").iterdir())) == 1


def test_a_set_of_the_zoo_is_taken_in_place_of_making_one(root, tmp_path, short, monkeypatch):
    work = bench_of(tmp_path, HEAD + DM)
    work.run(work.plan())
    lies = tmp_path / "out" / records(tmp_path)["performance/toy/dm/1"]["sets"][0]["path"]
    monkeypatch.setattr(cells_module.places, "names", lambda: {"toy/dm/1": lies})
    again = Benchmark(work.suites, Bench(tmp_path / "second"))
    monkeypatch.setattr(cells_module, "distill", None)
    assert again.run(again.plan()) == {"done": 1}
    one, two = (json.loads((tmp_path / o / "cells/performance/toy/dm/1.json").read_text()) for o in ("out", "second"))
    assert two["sets"][0]["path"] == "zoo:toy/dm/1" and two["sets"][0]["sha256"] == one["sets"][0]["sha256"]
    assert [r["accuracies"] for r in one["results"]] == [r["accuracies"] for r in two["results"]]
    older = json.loads((lies / "record.json").read_text())
    del older["set"]["input_bytes"], older["set"]["label_bytes"]
    (lies / "record.json").write_text(json.dumps(older))
    last = Benchmark(work.suites, Bench(tmp_path / "last"))
    assert last.run(last.plan()) == {"done": 1}, "an older record does not say how large the set is; the set does"
    three = json.loads((tmp_path / "last/cells/performance/toy/dm/1.json").read_text())
    assert three["sets"] == two["sets"] and three["sets"][0]["input_bytes"] > 0
    alone = Benchmark(work.suites, Bench(tmp_path / "third", zoo=False))
    assert alone.plan()[0].mark != again.plan()[0].mark
    assert again.plan()[0].minutes < alone.plan()[0].minutes, "a set that is there takes no time"
    (lies / "record.json").unlink()
    assert again.plan()[0].mark == alone.plan()[0].mark, "a set of which nothing is known is not taken"


def test_fairness_variants_use_hard_labels_and_no_augmentation(root, tmp_path, short):
    row = RANDOM.replace('"random"', '"kip"').replace(
        "ipc = 2", 'ipc = 2\nsteps = 3\nbaselines = ["random"]\nvariants = ["hard", "plain"]'
    )
    work = bench_of(tmp_path, HEAD + row.replace('"random"\n', '"random"\n'))
    assert work.run(work.plan()) == {"done": 1}
    rows = records(tmp_path)["performance/toy/kip/2"]["results"]
    assert {(r["role"], r["variant"], r["labels"]) for r in rows} == {
        ("set", "own", "centred"), ("random", "own", "hard"), ("set", "hard", "hard"), ("whole", "own", "hard"),
        ("set", "plain", "centred"), ("random", "plain", "hard"),
    }  # fmt: skip
    own, plain = (
        [r["protocol_hash"] for r in rows if r["variant"] == v and r["role"] == "set"] for v in ("own", "plain")
    )
    assert own != plain


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_benchmark_ends_as_an_uninterrupted_one(root, tmp_path):
    """Kill -9 inside the making of a set; started again it resumes there, to the same accuracies."""
    text = HEAD + DM.replace("steps = 4", "steps = 40").replace(
        'networks = ["convnet-w4", "mlp-w4"]', 'networks = ["mlp-w4"]'
    )
    (tmp_path / "k.toml").write_text(text)
    command = [
        sys.executable,
        "-m",
        "potstill",
        "benchmark",
        str(tmp_path / "k.toml"),
        "--compile",
        "off",
        "--no-zoo",
        "--out",
    ]
    running = subprocess.Popen([*command, str(tmp_path / "a")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cell, until = tmp_path / "a/runs/performance/toy/dm/1", time.monotonic() + 120
    while not list(cell.glob("*/checkpoint.safetensors")) and running.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert list(cell.iterdir()) and not (tmp_path / "a/cells/performance/toy/dm/1.json").exists()
    said = [
        subprocess.run([*command, str(tmp_path / o)], capture_output=True, text=True, timeout=300, check=True)
        for o in "ab"
    ]
    assert "resumed at step" in said[0].stdout and "resumed" not in said[1].stdout
    one, two = (json.loads((tmp_path / o / "cells/performance/toy/dm/1.json").read_text()) for o in "ab")
    assert [r["accuracies"] for r in one["results"]] == [r["accuracies"] for r in two["results"]]


# cost


def test_a_cost_cell_times_the_step_and_the_loss_within_it(root):
    row = CostRow("dc", "toy", 2, network="convnet-w4", preset="small", repeats=3)
    found = costs.measure(row, toy(), False, "auto")
    assert found["status"] == "done" and len(found["times"]["step"]) == len(found["times"]["loss"]) == 3
    assert found["step_seconds"] == sorted(found["times"]["step"])[1] > found["loss_seconds"] > 0
    assert found["peak_bytes"] >= found["baseline_bytes"] > 0


def test_experts_are_made_up_for_costs_and_s_goes_in_whole(root):
    row = CostRow("mtt", "toy", 2, network="convnet-w4", preset="small", repeats=1, settings={"objective.steps": 2})
    recipe = costs.recipe_of(row, toy())
    assert recipe.objective.feed == "all" and costs.measure(row, toy(), False, "auto")["loss_seconds"] > 0
    with pytest.raises(PotstillError, match="takes S whole"):
        costs.recipe_of(CostRow("dm", "toy", 2, batch=4), toy())


def test_a_cost_cell_in_its_own_process_and_what_ends_one(root, monkeypatch):
    row = CostRow("dm", "toy", 1, network="convnet-w4", preset="small", repeats=1)
    assert costs.in_own_process(row, "toy", root, False, "auto")["status"] == "done"
    deep = CostRow("dm", "toy", 1, network="convnet-w4-d9", preset="small", repeats=1)
    failed = costs.in_own_process(deep, "toy", root, False, "auto")
    assert failed["status"] == "failed" and "too deep for 8 x 8" in failed["reason"]
    quick = CostRow("dm", "toy", 1, network="convnet-w4", limit_seconds=0.01)
    assert costs.in_own_process(quick, "toy", root, False, "auto") == {
        "status": "out of time",
        "reason": "14 steps, with starting and compiling, took longer than 0.01 s",
    }
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(costs.subprocess, "run", lambda *a, **k: killed)
    assert costs.in_own_process(row, "toy", root, False, "auto")["status"] == "out of memory"


def test_running_out_of_memory_is_a_result(root, monkeypatch):
    """In a process with less address space than the step needs."""
    code = (
        "import json, sys, resource, potstill.costs as c\n"
        "c._limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (int(open('/proc/self/statm').read().split()[0]) * 4096 + 2**26,) * 2)\n"
        "print(json.dumps(c._answer(json.load(sys.stdin))))"
    )
    request = {"row": {"method": "dm", "data": "toy", "ipc": 7, "network": "convnet-w2048", "preset": "small", "settings": {}},
               "data": "toy", "root": str(root), "compile": False, "precision": "fp32", "device": "cpu"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(request), capture_output=True, text=True, timeout=120
    )
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "out of memory", done.stderr[-500:]


def test_cost_cells_run_in_a_suite(root, tmp_path, monkeypatch):
    row = '[[row]]\nmethod = "dm"\ndata = "toy"\nipc = 1\nnetwork = "convnet-w4"\nrepeats = 1\n'
    work = bench_of(tmp_path, 'title = "c"\ntable = "cost"\n' + row + row.replace("ipc = 1", "ipc = 2"))
    answers = iter([{"status": "done", "step_seconds": 0.5}, {"status": "out of time", "reason": "longer"}])
    monkeypatch.setattr("potstill.benchmark.in_own_process", lambda *a: next(answers))
    assert work.run(work.plan()) == {"done": 1, "out of time": 1}
    found = records(tmp_path)
    assert (
        found["cost/toy/dm/1/plain"]["step_seconds"] == 0.5
        and found["cost/toy/dm/1/plain"]["cell"] == "cost/toy/dm/1/plain"
    )
    assert found["cost/toy/dm/2/plain"]["step_seconds"] is None
    assert [c.fate for c in work.plan()] == ["kept", "kept"], "a limit that was met is a result"


# for people


def test_the_command(root, tmp_path, short, capsys):
    (tmp_path / "mine.toml").write_text(HEAD + RANDOM)
    place = ["benchmark", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "out")]
    assert main([*place, "--plan"]) == 0 and "1 of 1 cells to do" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(place) == 0 and "1 done" in capsys.readouterr().out
    (tmp_path / "file").touch()
    for wrong, words in (
        (["--only", "x/*"], "keeps no cell"),
        (["--data", "cifar10"], "NAME=OTHER is needed"),
        (["--data", "tpy=toy"], "no data of a row 'tpy'; did you mean 'toy'"),
        (["--minutes", "nan"], "--minutes nan is not a time"),
        (["--minutes", "-1"], "--minutes -1 is not a time"),
        (["--out", str(tmp_path / "file")], "is a file; a folder is needed"),
        (["--out", str(tmp_path / "file" / "below")], "cannot be made"),
        (["--compile", "of"], "did you mean 'off'"),
        (["--precision", "fp23"], "did you mean 'fp32'"),
        (["--device", "gpu"], "--device 'gpu' is not usable here"),
    ):
        assert main([*place, *wrong]) == 2 and words in capsys.readouterr().err
    assert (
        records(tmp_path)["performance/toy/random/2"]["command"] == "potstill benchmark mine.toml --only toy/random/2"
    )
    assert main(["benchmark", "nothing"]) == 2 and "no benchmark 'nothing'" in capsys.readouterr().err


def test_a_reason_names_no_path_of_this_machine(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    line = reason(PotstillError(f"no {root}/x nor {tmp_path}/y", "second line"))
    assert line == "no $POTSTILL_DATA/x nor ~/y"
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "results", Path("results")):
        line = reason(PotstillError(f"kept in {tmp_path}/results/runs/one"), out)
        assert line == "kept in runs/one"
    assert reason(PotstillError("no /data/a/b in docs/methods/x"), Path("a")) == "no /data/a/b in docs/methods/x"


def test_findings_about_other_cells_are_left_out(root, tmp_path):
    row = CostRow("dm", "toy", 1, network="convnet-w4", preset="small", repeats=1)
    work = Benchmark([Suite("mine", "Mine", "cost", (row,), {}, "mine")], Bench(tmp_path))
    (tmp_path / "f.toml").write_text(
        "".join(
            f'[[finding]]\nname = "{name}"\nclaim = "c"\nsource = "s"\nkind = "seconds"\nmore = "{more}"\n'
            'than = "cost/toy/dc/1/plain"\ncommand = "potstill benchmark mine"\n'
            for name, more in (("ours", f"{row.cell}@step_seconds"), ("theirs", "cost/toy/mtt/1/plain@step_seconds"))
        )
    )
    assert [v["name"] for v in work.judge_findings(tmp_path / "f.toml")] == ["ours"]


# sets from files


def test_anybodys_file_is_judged_beside_the_methods(root, tmp_path, short, capsys):
    """Ours by its folder, another project's by its normalisation; the number is that of `evaluate`, and a new file is a new cell."""
    data = toy()
    run = distill(data, "random", ipc=1, out=tmp_path / "ours", evaluate=False, seed=7)
    stranger = tmp_path / "theirs.npz"
    np.savez(stranger, x=run.set.inputs.numpy(), y=run.set.labels.numpy())
    common = 'data = "toy"\nipc = 1\nnetworks = ["convnet-w4"]\nprotocol = "dc"\nrepeats = 2\n'
    ours = f'[[row]]\nmethod = "mine"\nset = "{tmp_path / "ours"}"\nbaselines = ["random"]\n{common}'
    theirs = f'[[row]]\nmethod = "theirs"\nset = "{stranger}"\nnormalisation = "standardise"\n{common}'
    bench = bench_of(tmp_path, HEAD + ours + theirs)
    assert bench.run(bench.plan()) == {"done": 2}
    found = records(tmp_path)
    (expected,) = evaluate(run.set, data, networks=["convnet-w4"], protocol="dc", repeats=2)
    for name, file in (("mine", "ours"), ("theirs", "theirs.npz")):
        record = found[f"performance/toy/{name}/1"]
        own = next(r for r in record["results"] if r["role"] == "set")
        assert own["accuracies"] == expected.accuracies
        assert [s["path"] for s in record["sets"]] == [f"file:{file}"] and record["sets"][0]["seconds"] is None
    assert {r["role"] for r in found["performance/toy/mine/1"]["results"]} == {"set", "random"}
    assert bench.run(bench.plan()) == {"kept": 2}
    assert str(tmp_path) not in json.dumps(found)  # no path of this machine
    (tmp_path / "moved").mkdir()
    stranger = stranger.rename(tmp_path / "moved" / stranger.name)
    theirs = theirs.replace(str(tmp_path), str(tmp_path / "moved"))
    bench = bench_of(tmp_path, HEAD + ours + theirs)
    assert bench.run(bench.plan()) == {"kept": 2}  # where a file lies is no part of what it is
    np.savez(stranger, x=-run.set.inputs.numpy(), y=run.set.labels.numpy())
    assert bench.run(bench.plan()) == {"kept": 1, "done": 1}
    changed = records(tmp_path)["performance/toy/theirs/1"]["results"]
    assert changed[0]["accuracies"] != expected.accuracies
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| mine |" in page and "a set from a file, made elsewhere: theirs.npz" in page


def test_a_file_that_does_not_fit_its_row_is_told_before_or_recorded(root, tmp_path, short):
    common = 'data = "toy"\nnetworks = ["convnet-w4"]\nprotocol = "dc"\nrepeats = 1\n'
    place = tmp_path / "ours"
    own = distill(toy(), "random", ipc=2, out=place, evaluate=False).set
    np.savez(tmp_path / "a.npz", x=own.inputs.numpy(), y=own.labels.numpy())
    for more, words in (
        (f'method = "mine"\nipc = 2\nset = "{tmp_path / "none"}"\n', f"no set at {tmp_path / 'none'}"),
        (f'method = "dm"\nipc = 2\nset = "{place}"\n', "method 'dm': what the set is called in tables is needed"),
        (f'method = "whole"\nipc = 2\nset = "{place}"\n', "method 'whole': what the set is called in tables is needed"),
        (f'method = "mine"\nipc = 2\nset = "{place}"\nnormalisation = "unit"\n', "normalisation is for a set from"),
        (
            f'method = "mine"\nipc = 2\nset = "{tmp_path / "a.npz"}"\nnormalisation = "wrong"\n',
            "normalisation 'wrong' is",
        ),
        (f'method = "mine"\nipc = 2\nset = "{place}"\nsteps = 4\n', "steps: a set from a file is made already"),
        (f'method = "mine"\nipc = 2\nset = "{place}"\nseeds = [0, 1]\n', "2 seeds: a file holds one set"),
        (
            'method = "random"\nipc = 2\nnormalisation = "unit"\n',
            "normalisation is for a set from another project's file",
        ),
    ):
        with pytest.raises(PotstillError, match=re.escape(words)):
            bench_of(tmp_path, f"{HEAD}[[row]]\n{more}{common}")
    stranger = bench_of(tmp_path, f'{HEAD}[[row]]\nmethod = "mine"\nipc = 1\nset = "{tmp_path / "a.npz"}"\n{common}')
    assert stranger.run(stranger.plan()) == {"failed": 1}
    told = records(tmp_path)["performance/toy/mine/1"]["reason"]
    assert "normalisation is needed" in told and "--normalisation" not in told
    bench = bench_of(tmp_path, f'{HEAD}[[row]]\nmethod = "mine"\nipc = 1\nset = "{place}"\n{common}')
    assert bench.run(bench.plan()) == {"failed": 1}
    classes = toy().task.classes
    reason = records(tmp_path)["performance/toy/mine/1"]["reason"]
    assert reason == f"ours has {2 * classes} images, not 1 of each of {classes} classes"
    assert str(tmp_path) not in told + reason  # a record has no path of this machine


def test_a_set_that_is_entered_again_keeps_its_place(tmp_path):
    """The first set of a cell is the one whose pictures are shown."""
    sets = [{"seed": s, "path": f"runs/{s}", "sha256": "a"} for s in (3, 1, 2)]
    record = {"sets": list(sets), "results": [{"seed": s} for s in (3, 1, 2)]}
    cells_module._replace(record, dict(sets[0], images=4))
    assert [e["seed"] for e in record["sets"]] == [3, 1, 2] == [r["seed"] for r in record["results"]]
    cells_module._replace(record, dict(sets[1], sha256="b"))
    assert [e["seed"] for e in record["sets"]] == [3, 1, 2] and [r["seed"] for r in record["results"]] == [3, 2]
    cells_module._replace(record, dict(sets[0], seed=7))
    assert [e["seed"] for e in record["sets"]] == [3, 1, 2, 7]


def test_without_augmentation_a_set_has_the_baselines_that_it_has_with_it(root, tmp_path, short):
    row = '[[row]]\nmethod = "kip"\ndata = "toy"\nipc = 1\nsteps = 4\nnetworks = ["convnet-w4"]\nprotocol = "dsa"\nrepeats = 1\n'
    row += 'baselines = ["random", "random-soft"]\nvariants = ["plain"]\nsettings = { "objective.real" = 8 }\n'
    bench = bench_of(tmp_path, HEAD + row)
    assert bench.run(bench.plan()) == {"done": 1}
    record = records(tmp_path)["performance/toy/kip/1"]
    found = {(r["role"], r["variant"]) for r in record["results"]}
    assert found == {(role, way) for role in ("set", "random", "random-soft") for way in ("own", "plain")}
    assert scores.augmentation_robust(record) is not None


def test_baselines_of_a_file_with_learned_labels_are_as_many_of_each_class(root, tmp_path, short):
    """Whichever label is largest: random samples of some classes alone would make any set look good."""
    classes, shape = toy().task.classes, toy().shape
    soft = np.full((classes, classes), 0.5 / (classes - 1), np.float32)
    soft[:, 0] = 0.5
    np.savez(tmp_path / "soft.npz", x=np.random.default_rng(0).normal(size=(classes, *shape)).astype("f4"), y=soft)
    row = f'[[row]]\nmethod = "soft"\nset = "{tmp_path / "soft.npz"}"\nnormalisation = "standardise"\nbaselines = ["random"]\n'
    row += 'data = "toy"\nipc = 1\nnetworks = ["convnet-w4"]\nprotocol = "dc"\nrepeats = 1\n'
    bench = bench_of(tmp_path, HEAD + row)
    assert bench.run(bench.plan()) == {"done": 1}, records(tmp_path)["performance/toy/soft/1"]["reason"]
    results = records(tmp_path)["performance/toy/soft/1"]["results"]
    assert [r["ipc"] for r in results if r["role"] == "random"] == [1]
    uneven = soft.argmax(1)
    uneven[1:] = 1
    np.savez(tmp_path / "soft.npz", x=np.zeros((classes, *shape), np.float32), y=uneven)
    assert bench.run(bench.plan()) == {"failed": 1}
    assert "not 1 of each" in records(tmp_path)["performance/toy/soft/1"]["reason"]


def test_all_that_is_read_for_a_file_and_nothing_else_makes_its_hash(tmp_path):
    folder = tmp_path / "mtt"
    folder.mkdir()
    for name in ("images_best.pt", "labels_best.pt", "images_9.pt", "log.txt"):
        (folder / name).write_bytes(name.encode())
    whole = cells_module.sha256_of(str(folder))
    assert (
        whole
        == hashlib.sha256(b"images_best.ptlabels_best.pt").hexdigest()
        == cells_module.sha256_of(str(folder / "labels_best.pt"))
    )
    (folder / "images_9.pt").write_bytes(b"x")
    assert cells_module.sha256_of(str(folder)) == whole
    (folder / "labels_best.pt").write_bytes(b"x")
    assert cells_module.sha256_of(str(folder)) != whole and cells_module.sha256_of(str(tmp_path / "none.npz")) == ""


def test_a_teacher_is_counted_once_for_all_cells_that_share_it(root, tmp_path, monkeypatch):
    soft = '[[row]]\nmethod = "random"\ndata = "toy"\nipc = {}\nnetworks = {}\nprotocol = "dc"\nrepeats = 1\nbaselines = {}\n'
    rows = [
        (1, '["convnet-w4"]', '["random"]'),
        (2, '["convnet-w4"]', '["random-soft"]'),
        (3, '["convnet-w4", "mlp-w4"]', '["random-soft"]'),
        (4, '["mlp-w4"]', '["random-soft"]'),
    ]
    text = HEAD + "".join(soft.format(*row) for row in rows)
    text += '[[row]]\nmethod = "random-soft"\ndata = "toy"\nipc = 5\nnetworks = ["convnet-w4"]\nprotocol = "dc"\nrepeats = 1\nsettings = { student = "mlp-w8" }\n'
    trained = {"convnet-w4": 600.0, "mlp-w4": 1200.0, "mlp-w8": 2400.0}
    monkeypatch.setattr(cells_module, "School", lambda *a: SimpleNamespace(seconds=trained.get))
    work = bench_of(tmp_path, text)
    assert [round(cell.minutes, -1) for cell in work.plan()] == [0, 10, 20, 0, 40]
    # A cell that is left out trains no teacher for the next one.
    planned = work.plan(budget=21)
    assert [(round(c.minutes, -1), c.fate) for c in planned[1:4]] == [(10, "to do"), (20, "left out"), (20, "left out")]
    assert round(work.again(work.suites[0], work.suites[0].rows[2]).minutes, -1) == 30
