"""What befalls a process: another one on its folder, a request to end, a full disk, no more memory."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
from kill import read_whole
from toyruns import Bar, bytes_of, everything, interrupt, record, run, save_npz, short  # noqa: F401

from potstill import cli, compiling, outputs, recorder, records, sealed
from potstill.bench import Bench
from potstill.benchmark import Benchmark
from potstill.cli import main
from potstill.errors import PotstillError, Stopped, Unwritable
from potstill.records import read_json
from potstill.rows import suites
from potstill.training import PROTOCOLS

pytestmark = pytest.mark.usefixtures("short")
TINY = [
    "--ipc",
    "1",
    "--preset",
    "small",
    "--network",
    "mlp-w4",
    "--set",
    "objective.real=4",
    "--set",
    "looks=1",
    "--no-evaluate",
]


def distilling(npz, out, *more):
    return ["distill", npz, *TINY, "--steps", "6", "--compile", "off", "--out", str(out), *more]


def recording(npz, out, *more):
    return ["experts", npz, "--network", "mlp-w4", "--count", "2", "--epochs", "2", "--batch", "8", "--compile", "off", "--out", str(out), *more]  # fmt: skip


# --- two processes on one folder


@pytest.mark.parametrize("make", [run, record])
@pytest.mark.parametrize("options", [{"resume": True}, {"force": True}, {}])
def test_a_second_process_is_refused_and_touches_nothing(tmp_path, make, options):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", bar=Bar(2, interrupt))
    before = everything(tmp_path / "a")
    with outputs.sole(tmp_path / "a"), pytest.raises(PotstillError, match="in use by another process"):
        make(tmp_path / "a", **options)
    assert everything(tmp_path / "a") == before
    make(tmp_path / "a", resume=True)
    assert not (tmp_path / "a" / ".lock").exists()


@pytest.mark.parametrize("make", [run, record])
def test_a_run_keeps_its_folder_to_itself_until_it_ends(tmp_path, make):
    refused = []

    def second():
        with pytest.raises(PotstillError, match="in use by another process") as caught:
            make(tmp_path / "a", resume=True)
        refused.append(str(caught.value))

    make(tmp_path / "a", bar=Bar(3, second))
    make(tmp_path / "b")
    assert len(refused) == 1 and "\n" not in refused[0]
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


HOLDS = """
import sys, time
from pathlib import Path
from potstill.outputs import sole
with sole(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_real_second_process_is_refused_and_a_killed_one_blocks_nobody(tmp_path, capsys):
    out, npz = tmp_path / "a", save_npz(tmp_path / "toy.npz")
    out.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert main(distilling(npz, out)) == 2
        error = capsys.readouterr().err.strip()
        assert (
            error == f"potstill: --out {out} is in use by another process; wait until it ends, or name another folder"
        )
        other.send_signal(signal.SIGKILL)
    assert [p.name for p in out.iterdir()] == [".lock"]
    assert main(distilling(npz, out)) == 0
    assert not (out / ".lock").exists()


def test_a_lock_that_was_taken_away_is_no_lock(tmp_path):
    """Who has waited for a file that its last holder took away has not got the folder: another one may have it anew."""
    entered = []
    with outputs.sole(tmp_path):
        (tmp_path / ".lock").unlink()
        with outputs.sole(tmp_path):
            entered.append(1)
            with pytest.raises(PotstillError), outputs.sole(tmp_path):
                entered.append(2)
    assert entered == [1]


# --- SIGTERM


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("arguments", [distilling, recording])
def test_sigterm_saves_and_exits_with_143(tmp_path, monkeypatch, capsys, arguments):
    npz, before = save_npz(tmp_path / "toy.npz"), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "progress_bar", Bar(4, terminate))
    assert main(arguments(npz, tmp_path / "a")) == 143
    error = capsys.readouterr().err.strip()
    assert error == "potstill: terminated; the same command with --resume goes on from here"
    assert signal.getsignal(signal.SIGTERM) is before
    again = Bar(-1, None)
    monkeypatch.setattr(cli, "progress_bar", again)
    started = []
    monkeypatch.setattr(Bar, "__call__", lambda self, total, title, start: started.append(start) or again)
    again.step = 0
    assert main(arguments(npz, tmp_path / "a", "--resume")) == 0 and started[0] in (3, 4)
    assert main(arguments(npz, tmp_path / "b")) == 0
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


CELL = """title = "t"
table = "performance"
[[row]]
method = "dm"
data = "toy"
ipc = 1
steps = 6
network = "mlp-w4"
networks = ["mlp-w4"]
protocol = "dc"
repeats = 2
settings = { "objective.real" = 4, "looks" = 0 }
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_ends_with_its_number_and_goes_on(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setitem(PROTOCOLS, "dc", replace(PROTOCOLS["dc"], epochs=2, steps=0))
    save_npz(tmp_path / "toy.npz")
    (tmp_path / "mine.toml").write_text(CELL)
    line = [
        "benchmark",
        str(tmp_path / "mine.toml"),
        "--no-zoo",
        "--compile",
        "off",
        "--data-root",
        str(tmp_path),
        "--out",
    ]
    monkeypatch.setattr(cli, "progress_bar", Bar(4, lambda: os.kill(os.getpid(), number)))
    assert main([*line, str(tmp_path / "a")]) == 128 + number
    assert capsys.readouterr().err.strip().endswith("; the same command goes on from here")
    monkeypatch.setattr(cli, "progress_bar", Bar(-1, None))
    assert main([*line, str(tmp_path / "a")]) == 0 == main([*line, str(tmp_path / "b")])
    assert "resumed at step" in capsys.readouterr().out
    one, two = (read_json(tmp_path / o / "cells/performance/toy/dm/1.json") for o in "ab")
    assert [r["accuracies"] for r in one["results"]] == [r["accuracies"] for r in two["results"]]
    assert one["sets"][0]["sha256"] == two["sets"][0]["sha256"]


def test_a_real_process_that_is_asked_to_end(tmp_path):
    npz, out = save_npz(tmp_path / "toy.npz"), tmp_path / "a"
    command = [sys.executable, "-m", "potstill", *distilling(npz, out)]
    command[command.index("--steps") + 1] = "100000"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        until = time.monotonic() + 300
        while not (out / sealed.CHECKPOINT).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 143 and "potstill: terminated" in error and "Traceback" not in error
    for file in out.iterdir():
        read_whole(file)


# --- a full disk, a place that cannot be written


WAYS = [(place, number) for place in ("open", "content", "place") for number in (errno.ENOSPC, errno.EROFS)]


@pytest.fixture
def quick(monkeypatch):
    """Hundreds of runs that fail stay cheap: nothing waits for the disk, no operations are counted, a page is compiled once."""
    compiled, compile = {}, jinja2.Environment.compile

    def once(self, source, *arguments, **options):
        if source not in compiled:
            compiled[source] = compile(self, source, *arguments, **options)
        return compiled[source]

    monkeypatch.setattr(jinja2.Environment, "compile", once)
    monkeypatch.setattr(compiling, "count_flops", lambda function: 0.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def failing(monkeypatch, at, way, number):
    """Let the write of this number fail: a new file cannot be opened, has no room for its content, or cannot be put in place."""
    calls = [0]
    mkstemp, fsync, rename = tempfile.mkstemp, os.fsync, os.replace

    def fails(here):
        if calls[0] - 1 == at and way == here:
            raise OSError(number, os.strerror(number))

    def opened(*arguments, **options):
        calls[0] += 1
        fails("open")
        return mkstemp(*arguments, **options)

    def synced(handle):
        if calls[0] - 1 == at and way == "content":
            os.ftruncate(handle, os.fstat(handle).st_size // 2)  # as far as there was room
        fails("content")
        return fsync(handle)

    def replaced(source, target):
        if not str(target).endswith(sealed.BEFORE):
            fails("place")
        return rename(source, target)

    monkeypatch.setattr(records.tempfile, "mkstemp", opened)
    monkeypatch.setattr(records.os, "fsync", synced)
    monkeypatch.setattr(records.os, "replace", replaced)
    return calls


@pytest.mark.parametrize("make", [run, record])
def test_each_write_in_turn_fails_and_nothing_is_lost(tmp_path, quick, make):
    """Each at each place, for want of room and of permission."""
    options = {"steps": 2, "compile": "off"} if make is run else {"epochs": 1}
    make(tmp_path / "whole", **options)
    wanted, k, said, ended = bytes_of(tmp_path / "whole"), 0, set(), False
    while not ended:
        for way, number in WAYS:
            out = tmp_path / f"fails{k}-{way}-{number}"
            with pytest.MonkeyPatch.context() as patch:
                calls = failing(patch, k, way, number)
                try:
                    make(out, **options)
                except Unwritable as error:
                    said.add(str(error).partition(" cannot be written")[0])
                    assert "\n" not in str(error) and f"({os.strerror(number)})" in str(error)
                else:
                    assert calls[0] <= k
                    ended = True
                    break
            for file in out.iterdir():
                assert not file.name.startswith("."), f"write {k}, {way}, leaves {file.name}"
                read_whole(file)
            make(out, resume=True, **options)
            assert bytes_of(out) == wanted, f"write {k}, {way}"
            shutil.rmtree(out)
        else:
            k += 1
    print(f"{make.__name__}: {k} writes failed in turn, each in {len(WAYS)} ways")  # for docs/reliability.md
    names = (
        "set.safetensors",
        "snapshots.safetensors",
        sealed.CHECKPOINT,
        "record.json",
        "recipe.toml",
        "grid.png",
        "report.html",
    )
    assert said == (set(names) if make is run else {"experts.json", sealed.CHECKPOINT, "expert-000.safetensors", "expert-001.safetensors"})  # fmt: skip


def test_each_write_of_a_benchmark_in_turn_fails_and_nothing_is_lost(tmp_path, monkeypatch, quick):
    monkeypatch.setitem(PROTOCOLS, "dc", replace(PROTOCOLS["dc"], epochs=2, steps=0))
    save_npz(tmp_path / "toy.npz")
    (tmp_path / "mine.toml").write_text(CELL.replace("steps = 6", "steps = 1"))

    def cell(out):
        work = Benchmark(
            suites(str(tmp_path / "mine.toml"), []), Bench(out, zoo=False, data_root=tmp_path, compile="off")
        )
        work.run(work.plan())
        found = read_json(out / "cells/performance/toy/dm/1.json")
        return found["status"], found["reason"], [r["accuracies"] for r in found["results"]]

    wanted = cell(tmp_path / "whole")
    assert wanted[0] == "done"
    k, fates = 0, []
    while "done" not in fates:
        for way, number in WAYS:
            out = tmp_path / f"fails{k}-{way}-{number}"
            with pytest.MonkeyPatch.context() as patch:
                calls = failing(patch, k, way, number)
                try:
                    fate = cell(out)
                except Unwritable as error:
                    fate = ("stopped", str(error), [])
            fates.append(fate[0])
            if calls[0] <= k:
                break
            assert fate[0] in ("failed", "stopped") and "cannot be written" in fate[1], f"write {k}, {way}: {fate}"
            for file in (p for p in out.rglob("*") if p.is_file()):
                assert not file.name.startswith(".")
                read_whole(file)
            assert cell(out) == wanted
            shutil.rmtree(out)
        else:
            k += 1
    print(f"benchmark: {k} writes failed in turn, each in {len(WAYS)} ways")
    assert fates[-1] == "done" and {"failed", "stopped"} <= set(fates) and k > 6


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    """A file system of the kernel's own, on which nobody makes a file."""
    npz = save_npz(tmp_path / "toy.npz")
    for arguments in (distilling, recording):
        assert main(arguments(npz, "/proc/potstill")) == 2
        error = capsys.readouterr().err.strip()
        assert "/proc/potstill cannot be made" in error and "\n" not in error
    (tmp_path / "mine.toml").write_text(CELL)
    assert (
        main(["benchmark", str(tmp_path / "mine.toml"), "--data-root", str(tmp_path), "--out", "/proc/potstill"]) == 2
    )
    assert "/proc/potstill cannot be made" in capsys.readouterr().err


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    def refuse(self, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(Unwritable, match=r"--out .* cannot be written to \(Read-only file system\)"):
        run(tmp_path / "a")


def test_a_full_disk_below_standard_output_is_one_line():
    command = f"{sys.executable} -m potstill cite dm > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "potstill: No space left on device\n"


# --- memory

SHORT_OF = """
import re, resource, sys
from pathlib import Path
from potstill import cli
def limit():
    now = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + 24 * 2**20,) * 2)
class Bar:
    def __call__(self, total, title, start):
        limit()
        return self
    def update(self, n=1): ...
    def set_postfix_str(self, text, refresh=True): ...
    def close(self): ...
cli.progress_bar = Bar()
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_step_that_finds_no_memory_is_one_line_and_the_checkpoint_is_good(tmp_path):
    """A real limit on the memory of a process, set when the first step begins."""
    import numpy as np

    draw, file = np.random.default_rng(0), tmp_path / "large.npz"
    parts = {f"{x}_{p}": v for p, n in (("train", 300), ("test", 20)) for x, v in (("x", draw.random((n, 1, 16, 16), np.float32)), ("y", np.arange(n) % 2))}  # fmt: skip
    np.savez(file, **parts)
    options = [
        *TINY,
        "--set",
        "looks=0",
        "--network",
        "convnet",
        "--set",
        "objective.real=128",
        "--compile",
        "off",
        "--steps",
        "1",
    ]
    command = ["distill", str(file), *options]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF, *command, "--out", str(tmp_path / "a")], capture_output=True, text=True
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert "step 1; the last good set, of step 0, is kept" in lines[0] and "memory has run out" in lines[0]
    for made in (tmp_path / "a").iterdir():
        read_whole(made)
    assert (
        main([*command, "--resume", "--out", str(tmp_path / "a")])
        == 0
        == main([*command, "--out", str(tmp_path / "b")])
    )
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_an_expert_that_finds_no_memory_goes_on_later(tmp_path, monkeypatch, error):
    real, calls = recorder.Trainer, []

    class Short(real):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            step = self.step

            def counted(*given):
                calls.append(1)
                if len(calls) == 6:
                    raise error
                return step(*given)

            self.step = counted

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "Trainer", Short)
        with pytest.raises(Stopped, match="^expert 1, step 2; what was recorded before is kept: memory has run out"):
            record(tmp_path / "e", epochs=1)
    record(tmp_path / "e", epochs=1, resume=True)
    record(tmp_path / "whole", epochs=1)
    assert bytes_of(tmp_path / "e") == bytes_of(tmp_path / "whole")


def test_a_lack_of_memory_anywhere_else_is_one_line(capsys, monkeypatch):
    def none(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("potstill.distilling.distill", none)
    monkeypatch.setattr("potstill.evaluation.evaluate", none)
    for command, more in (("distill", "; the same command with --resume goes on from here"), ("evaluate", "")):
        assert main([command, "digits"]) == 1
        assert capsys.readouterr().err == f"potstill: memory has run out; a smaller network or batch needs less{more}\n"


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def wrong(*arguments, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("potstill.distilling.distill", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["distill", "digits"])
