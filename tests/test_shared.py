"""Several processes, on one machine or a Ray cluster, share one results folder: each cell is measured once, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill import cluster
from potstill.bench import Bench
from potstill.benchmark import ABSENT, FAILED, Benchmark
from potstill.checkpoint import load_checkpoint
from potstill.errors import PotstillError
from potstill.rows import suites

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
ROWS = """title = "t"
table = "performance"
[[row]]
method = "dm"
data = "digits"
ipc = 1
steps = 40
network = "mlp-w16"
networks = ["mlp-w16"]
protocol = "dc"
repeats = 1
settings = { "objective.real" = 4, "looks" = 2 }
[[row]]
method = "random"
data = "digits"
ipc = 1
networks = ["mlp-w16"]
protocol = "dc"
repeats = 1
[[row]]
method = "herding"
data = "digits"
ipc = 1
networks = ["mlp-w16"]
protocol = "dc"
repeats = 1
"""
FIRST, *OTHERS = "digits/dm/1", "digits/random/1", "digits/herding/1"
LONG = 800  # seconds that no wait reaches, however slow the machine


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.toml"
    file.write_text(ROWS)
    return file


@pytest.fixture
def begin(rows, tmp_path):
    """Starts `potstill benchmark` in a process of its own; its output is a file."""
    running = []

    def start(name, *more, **environment):
        command = [sys.executable, "-u", "-m", "potstill", "benchmark", str(rows), "--no-zoo", "--compile", "off"]
        with open(tmp_path / f"{name}.txt", "w") as out:
            running.append(subprocess.Popen([*command, "--out", str(tmp_path / "out"), *more], stdout=out,
                                            stderr=subprocess.STDOUT, env={**os.environ, **environment}))  # fmt: skip
        return running[-1], tmp_path / f"{name}.txt"

    yield start
    for process in running:
        process.kill()
        process.wait()


def until(condition, process):
    """Wait for something that a process brings about."""
    end = time.monotonic() + LONG
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return found


def in_mid_cell(tmp_path, process):
    """Wait until the first cell's second checkpoint lies there, which is not that of step 0; the folder of its run."""
    seen: set[int] = set()

    def second():
        for file in (tmp_path / "out/runs/performance" / FIRST).glob("*/checkpoint.safetensors"):
            seen.add(file.stat().st_mtime_ns)
            if len(seen) > 1:
                return file.parent
        return None

    return until(second, process)


def begun(text):
    """The cells that a process has begun, in order."""
    return [line.partition(": begins")[0] for line in text.splitlines() if ": begins" in line]


def made(folder):
    """Of each cell, what must not depend on who measured it: the sets' bytes and all accuracies."""
    found = {}
    for file in (folder / "cells").rglob("*.json"):
        record = json.loads(file.read_text())
        assert record["status"] == "done", record["reason"]
        found[record["cell"]] = [s["sha256"] for s in record["sets"]] + [r["accuracies"] for r in record["results"]]
    return found


@pytest.fixture(scope="module")
def alone(rows):
    """The same cells, measured by this process one after the other."""
    work = Benchmark(suites(str(rows), []), Bench(rows.parent / "alone", zoo=False, compile="off"))
    assert work.run(work.plan()) == {"done": 3}
    return made(work.bench.out)


@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
def test_two_processes_share_the_cells_and_what_one_leaves_the_other_takes_up(begin, alone, tmp_path, dies):
    """The first is stopped inside a cell while the second works, and then goes on, or is killed."""
    one, said = begin("one")
    run = in_mid_cell(tmp_path, one)
    one.send_signal(signal.SIGSTOP)
    two, answered = begin("two")
    until(lambda: begun(answered.read_text()), two)
    _, kept = load_checkpoint(run, print)
    one.send_signal(signal.SIGKILL if dies else signal.SIGCONT)
    assert [two.wait(LONG), one.wait(LONG)] == [0, -signal.SIGKILL if dies else 0], answered.read_text()
    first, second = begun(said.read_text()), begun(answered.read_text())
    assert first[0] == FIRST and second[0] == OTHERS[0], "the second leaves the first its cell"
    assert made(tmp_path / "out") == alone
    if dies:
        assert kept.step > 0 and second == [*OTHERS, FIRST], "and takes it up when the first is gone"
        assert f"resumed at step {kept.step} of 40" in answered.read_text(), "from the very last checkpoint"
    else:
        assert sorted(first + second) == sorted([FIRST, *OTHERS]), "no cell is measured twice"
        assert "resumed" not in said.read_text() + answered.read_text()


# Ray

HEAD = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False, "temp_dir": sys.argv[1]})
cluster.add_node(**node)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
PRIVATE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # no file in the user's home
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 stays what it is
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_worker_niceness": "0",  # on a busy machine the usual 15 starves a test
}


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, int]]:
    """A Ray cluster of two workers on this machine, a processor each, reached from here only: its address, its process."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    ) as place:  # a short path: sockets
        head = subprocess.Popen([sys.executable, "-c", HEAD, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True, env={**os.environ, **PRIVATE})  # fmt: skip
        with head:
            yield head.stdout.readline().strip(), head.pid
            head.stdin.close()


def parent(process):
    """The process that started one."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def workers(cell, head):
    """The processes in which a cluster of ours runs a cell."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            named = (process / "cmdline").read_bytes().startswith(f"ray::{cell}".encode())
            if named and parent(parent(process.name)) == head:
                found.append(int(process.name))
        except OSError:
            continue  # it has ended
    return found


def test_a_cluster_measures_what_one_process_does_also_when_a_worker_is_killed_in_mid_cell(
    two_nodes, begin, alone, tmp_path
):
    address, head = two_nodes
    driver, said = begin("driver", "--on", f"ray:{address}", **PRIVATE)
    in_mid_cell(tmp_path, driver)
    (worker,) = workers(FIRST, head)
    os.kill(worker, signal.SIGKILL)
    assert driver.wait(LONG) == 0, said.read_text()
    text = said.read_text()
    assert "Ray nodes: 2, cells at a time: 2" in text and "3 done" in text
    assert text.count("resumed at step") == 1 and "resumed at step 0" not in text
    assert made(tmp_path / "out") == alone


def test_ray_and_its_address_are_asked_for_in_one_line(rows, tmp_path, monkeypatch):
    work = Benchmark(suites(str(rows), []), Bench(tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # it is not asked
    for where, bench, words in (
        ("ray", work.bench, r"--on ray needs Ray .* pip install 'potstill\[ray\]'"),
        ("slurm", work.bench, "--on 'slurm' is no cluster; `ray` or `ray:HOST:PORT` is needed"),
        ("ray:here", work.bench, "--on 'ray:here' is no cluster"),
        ("ray", Bench(tmp_path / "out", device="cuda"), "--device cuda goes without it"),
    ):
        with pytest.raises(PotstillError, match=words), cluster.on_ray(Benchmark(work.suites, bench), where):
            pass


def test_a_task_refuses_another_folder_or_other_data(rows, tmp_path, monkeypatch):
    """What a machine of a cluster may lack or have otherwise."""
    work = Benchmark(suites(str(rows), []), Bench(tmp_path / "out", zoo=False))
    cell = work.plan()[0]
    order = cluster.Order(cell.suite, cell.row, "another", work.bench, str(tmp_path), {}, 1)
    with pytest.raises(PotstillError, match="all machines must share it, at the same path"):
        cluster.carry_out(order)
    (tmp_path / "out").mkdir()
    with pytest.raises(PotstillError, match="the data or the version of Potstill are others than at the driver"):
        cluster.carry_out(order)
    monkeypatch.setattr(
        Benchmark, "again", lambda self, suite, row: cluster.Cell(suite, row, 0.0, "", ABSENT, "not here")
    )
    with pytest.raises(PotstillError, match=r"absent on .*: not here"):
        cluster.carry_out(order)


def test_a_cell_whose_processes_all_died_is_recorded_and_tried_again(rows, tmp_path):
    work = Benchmark(suites(str(rows), []), Bench(tmp_path / "out", zoo=False, compile="off"))
    cells = work.plan("*/random/*")
    work.bench.out.mkdir()
    assert work.lost(cells[0], FAILED, "its process died 4 times") == FAILED
    record = json.loads(work.file(cells[0].row, "performance").read_text())
    assert (record["status"], record["reason"], record["results"]) == ("failed", "its process died 4 times", [])
    assert [cell.fate for cell in work.plan("*/random/*")] == ["to do"]
    assert work.run(cells) == {"done": 1} and work.lost(cells[0], FAILED, "late") == "kept"
