"""Damaged files: noticed, said, and the one before is used; what can be made again is made again."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from toyruns import Bar, bytes_of, copy, damages, everything, flipped, interrupt, record, run, short  # noqa: F401

import potstill
from potstill import checkpoint, sealed
from potstill.bench import Bench
from potstill.benchmark import Benchmark
from potstill.cli import main
from potstill.errors import PotstillError, Unwritable
from potstill.records import read_json
from potstill.rows import suites
from potstill.training import PROTOCOLS
from potstill.trajectories import open_experts

pytestmark = pytest.mark.usefixtures("short")


@pytest.fixture
def cut(tmp_path):
    """A run stopped at its fourth step; its checkpoint is of that step, the one before of the third."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", bar=Bar(4, interrupt))
    return tmp_path / "cut"


def test_of_a_checkpoint_that_is_damaged_anywhere_the_one_before_is_used_and_it_is_said(tmp_path, cut):
    newest, before = ((cut / n).read_bytes() for n in (sealed.CHECKPOINT, sealed.BEFORE))
    assert newest != before
    cases = list(damages(newest, 60))
    for what, content in cases:
        (cut / sealed.CHECKPOINT).write_bytes(content)
        (cut / sealed.BEFORE).write_bytes(before)
        said = []
        found = checkpoint.load_checkpoint(cut, said.append)
        assert found is not None and found[1].step == 3, what
        assert len(said) == 1 and "\n" not in said[0] and "is damaged" in said[0], what
        assert said[0].endswith("the one before it is used")
        assert (cut / sealed.CHECKPOINT).read_bytes() == before and not (cut / sealed.BEFORE).exists()
    print(f"checkpoint: {len(cases)} damages")  # for docs/reliability.md
    assert len(cases) > 120


def test_a_number_that_is_spelt_otherwise_is_damage(tmp_path):
    """A flipped bit that makes 1e-05 of 1E-05 changes no value, and the promise is of any bit."""
    file = tmp_path / sealed.CHECKPOINT
    sealed.write_checkpoint(file, {"a": torch.ones(2)}, {"small": 1e-05, "none": float("nan"), "text": "é"})
    whole = file.read_bytes()
    assert whole.count(b"1e-05") == 1 and sealed.read_sealed(file, "checkpoint")[1]["small"] == 1e-05
    file.write_bytes(whole.replace(b"1e-05", b"1E-05"))
    with pytest.raises(PotstillError, match="is damaged"):
        sealed.read_sealed(file, "checkpoint")


def test_a_run_goes_on_from_the_one_before_to_the_same_bytes(tmp_path, cut):
    file = cut / sealed.CHECKPOINT
    file.write_bytes(flipped(file.read_bytes(), len(file.read_bytes()) - 5, 3))
    said = []
    run(cut, resume=True, say=said.append)
    assert [line for line in said if "the one before it is used" in line] and "resumed at step 3 of 6" in said
    run(tmp_path / "whole")
    assert bytes_of(cut) == bytes_of(tmp_path / "whole")


def test_without_a_newest_one_the_one_before_is_used(tmp_path, cut):
    """As where a process dies between the two renamings on a system without links."""
    (cut / sealed.CHECKPOINT).unlink()
    run(cut, resume=True)
    run(tmp_path / "whole")
    assert bytes_of(cut) == bytes_of(tmp_path / "whole")


def test_both_damaged_is_one_line_and_nothing_is_touched(tmp_path, cut, capsys):
    for name in (sealed.CHECKPOINT, sealed.BEFORE):
        content = (cut / name).read_bytes()
        (cut / name).write_bytes(flipped(content, len(content) // 2, 1))
    left = everything(cut)
    with pytest.raises(PotstillError, match=r"checkpoint\.safetensors is damaged .*--force starts again"):
        run(cut, resume=True)
    assert everything(cut) == left
    arguments = ["distill", "digits", "--ipc", "2", "--steps", "6", "--preset", "small", "--network", "mlp-w4", "--set", "objective.real=4",
                 "--resume", "--out", str(cut)]  # fmt: skip
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "is damaged" in error and "\n" not in error and everything(cut) == left


def test_a_checkpoint_from_before_there_were_checksums_is_read(cut):
    tensors, header = sealed.read_sealed(cut / sealed.CHECKPOINT, "checkpoint")
    plain = sealed.encode(tensors, metadata={sealed.HEADER: json.dumps(header)})
    (cut / sealed.CHECKPOINT).write_bytes(plain)
    assert checkpoint.load_checkpoint(cut, pytest.fail)[1].step == 4


class Died(BaseException):
    """The process is no more: nothing after this line happens, no `finally` either, as far as the disk is concerned."""


@pytest.mark.parametrize("links", [True, False])
def test_wherever_a_write_ends_there_is_a_checkpoint_that_is_whole(tmp_path, monkeypatch, links):
    """Every step of writing fails once, as on a full disk; then both files are as they were, or one further."""

    def write(i):
        sealed.write_checkpoint(tmp_path / sealed.CHECKPOINT, {"x": torch.full((5,), float(i))}, {"i": i})

    def found():
        return sealed.newest(
            tmp_path / sealed.CHECKPOINT, lambda file: sealed.read_sealed(file, "checkpoint")[1]["i"], pytest.fail
        )

    real = {name: getattr(os, name) for name in ("replace", "link", "fsync", "chmod")}
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
        real["link"] = _no_links
    calls, fail_at = [], [-1]

    def failing(name):
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) - 1 == fail_at[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real[name](*arguments, **options)

        return call

    for name in real:
        monkeypatch.setattr(os, name, failing(name))
    for k in range(20):
        fail_at[0] = -1
        for i in range(2):
            write(i)
        before = everything(tmp_path)
        calls.clear()
        fail_at[0] = k
        try:
            write(2)
        except Unwritable as error:
            assert "No space left" in str(error)
            assert found() == 1
            assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
            if calls[k] in ("fsync", "chmod", "link"):  # the new one is not whole yet, or nothing is in its new place
                assert everything(tmp_path) == before, f"failed at {calls[k]}, and the one before is gone"
        else:
            assert found() == 2
        if len(calls) <= k:
            break
    assert k > 3
    assert sealed.read_sealed(tmp_path / sealed.BEFORE, "checkpoint")[1]["i"] == 1


def _no_links(*arguments):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def test_a_damaged_set_is_written_again_from_its_checkpoint(tmp_path):
    run(tmp_path / "a")
    file = tmp_path / "a" / "set.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-7])
    with pytest.raises(PotstillError, match="is damaged"):
        potstill.load(tmp_path / "a")
    run(tmp_path / "a", resume=True)
    assert file.read_bytes() == good


# --- experts


def test_a_recording_goes_on_from_the_checkpoint_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "e", bar=Bar(9, interrupt))
    file, said = tmp_path / "e" / sealed.CHECKPOINT, []
    content = file.read_bytes()
    file.write_bytes(flipped(content, len(content) - 20, 6))
    again = Bar(-1, None)
    record(tmp_path / "e", resume=True, say=said.append, bar=again)
    assert sum("the one before it is used" in line for line in said) == 1
    record(tmp_path / "whole")
    assert bytes_of(tmp_path / "e") == bytes_of(tmp_path / "whole")
    assert not (tmp_path / "e" / sealed.BEFORE).exists()


def test_a_recordings_checkpoints_both_damaged_are_one_line(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "e", bar=Bar(9, interrupt))
    for name in (sealed.CHECKPOINT, sealed.BEFORE):
        (tmp_path / "e" / name).write_bytes((tmp_path / "e" / name).read_bytes()[:-3])
    with pytest.raises(PotstillError, match="is damaged .*--force starts again"):
        record(tmp_path / "e", resume=True)


def test_a_flipped_bit_in_any_row_of_an_expert_is_named_before_anything_is_added(tmp_path):
    record(tmp_path / "e")
    file = tmp_path / "e" / "expert-001.safetensors"
    good = file.read_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    for at in range(size, len(good), max(1, (len(good) - size) // 12)):
        file.write_bytes(flipped(good, at, 2))
        with pytest.raises(PotstillError, match=r"expert-001\.safetensors is damaged: epoch \d does not have the hash"):
            record(tmp_path / "e", count=3, resume=True)
    file.write_bytes(good)
    assert record(tmp_path / "e", count=3, resume=True).count == 3


def test_a_changed_digit_in_an_index_is_named(tmp_path):
    made = record(tmp_path / "e")
    file = tmp_path / "e" / "experts.json"
    digits = str(made.meta["experts"][0]["losses"][0])
    assert digits in file.read_text()
    file.write_text(file.read_text().replace(digits, digits[:-1] + ("1" if digits[-1] != "1" else "2")))
    for use in (lambda: open_experts(tmp_path / "e"), lambda: record(tmp_path / "e", resume=True)):
        with pytest.raises(PotstillError, match=r"experts\.json is damaged .*checksum"):
            use()


# --- a benchmark


def test_a_changed_digit_in_a_cells_record_or_a_baselines_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "dc", replace(PROTOCOLS["dc"], epochs=2, steps=0))
    text = """title = "t"\ntable = "performance"
[[row]]
method = "random"
data = "digits"
ipc = 1
networks = ["mlp-w4"]
protocol = "dc"
repeats = 2
baselines = ["random"]
"""
    (tmp_path / "mine.toml").write_text(text)

    def work():
        return Benchmark(suites(str(tmp_path / "mine.toml"), []), Bench(tmp_path / "out", zoo=False))

    first = work()
    assert first.run(first.plan()) == {"done": 1}
    cell = first.file(first.suites[0].rows[0], "performance")
    (baseline,) = (tmp_path / "out" / "baselines").iterdir()
    good = [r["accuracies"] for r in read_json(cell)["results"]]
    (cell.parent / f".{cell.name}.k1ll3d").write_text("{")
    for file in (cell, baseline):
        content = file.read_text()
        at = content.index('"accuracies": [') + len('"accuracies": [')
        at = next(i for i in range(at, len(content)) if content[i] == ".") + 1
        file.write_text(content[:at] + str((int(content[at]) + 1) % 10) + content[at + 1 :])
        with pytest.raises(PotstillError, match="is not a whole record"):
            read_json(file)
    again = work()
    assert [c.fate for c in again.plan()] == ["to do"] and again.run(again.plan()) == {"done": 1}
    assert [r["accuracies"] for r in read_json(cell)["results"]] == good
    assert not list(cell.parent.glob(".*")), "what a killed process left half-written goes"
    assert work().plan()[0].fate == "kept"
