"""The measuring scripts: their tables from records made by hand, and one row at toy size from end to end."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("performance_tables", BENCHMARKS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def side(seconds, peak=3 * 2**20, baseline=2**20):
    middle = {k: sorted(v)[len(v) // 2] for k, v in seconds.items()}
    return {"seconds": seconds, "median": middle, "peak_bytes": peak, "baseline_bytes": baseline}


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_ratio_is_the_others_median_over_ours(tables):
    """Medians 3 and 12: 4; neighbouring rounds 10/2, 12/3 and 24/4; memory 9 MiB against 2."""
    ours, other = side({"step": [2.0, 3.0, 4.0]}), side({"step": [10.0, 12.0, 24.0]}, 10 * 2**20)
    row = {"title": "a step", "other": "plain", "bars": {"step": [2.5, 4.0], "memory": [4.0, 4.0]}}
    lines = tables.beside_table({"rows": {"x": {**row, "sides": {"ours": ours, "plain": other}}}})
    assert cells_of(lines[2]) == ["a step", "plain", "12 s", "3 s", "4.00× (4.00-6.00)", "2.5×", "4×"]
    assert cells_of(lines[3])[2:5] == ["9 MiB", "2 MiB", "4.50×"]


def test_a_share_is_of_the_matrix_product_at_the_same_precision(tables):
    """100 operations in 2 s are a quarter of 1,000 in 5 s."""
    took = {f"{p} {form}": [2.0] for p in ("fp32", "bf16") for form in ("eager", "compiled")}
    took |= {"fp32 product": [1.0], "bf16 product": [5.0]}
    ours = {**side(took), "flops": 100.0, "product_flops": 1000.0, "images": 256}
    lines = tables.features_table({"rows": {"feature-pass": {"bars": {"share": [0.55, 0.7]}, "sides": {"ours": ours}}}})
    bf16 = next(line for line in lines if "compiled, bf16" in line)
    assert cells_of(bf16)[2:] == ["0.25 (0.25-0.25)", "0.55", "0.7"]
    assert cells_of(next(line for line in lines if "eager, fp32" in line))[2].startswith("0.05")


def test_exponents_are_those_of_the_last_two_points(tables):
    """The side counts as the number of pixels; a cell that was not done counts for nothing."""

    def cell(axis, at, seconds, mib, status="done"):
        return {"method": "dm", "axis": axis, "at": at, "status": status, "step_seconds": seconds, "peak_bytes": mib * 2**20, "baseline_bytes": 0}  # fmt: skip

    made = [cell("ipc", 1, 5.0, 7), cell("ipc", 10, 1.0, 2), cell("ipc", 100, 100.0, 20), cell("side", 8, 1.0, 4), cell("side", 16, 4.0, 8)]  # fmt: skip
    made.append({**cell("side", 32, 0, 0, "out of time"), "reason": "longer"})
    lines = tables.growth_table({"cells": {str(i): c for i, c in enumerate(made)}})
    assert cells_of(lines[2])[3:] == ["2.00", "1.00"]
    assert cells_of(lines[3])[3:] == ["1.00", "0.50"] and "32: out of time" in lines[3]


def test_a_missed_bar_says_so(tables):
    side = {"baseline_bytes": 0, "peak_bytes": 0}
    ours, other = ({**side, "seconds": {"step": [t]}, "median": {"step": t}} for t in (1.0, 3.9))
    for bar, shown in ((4.0, "4×, missed"), (3.9, "3.9×")):
        row = {
            "title": "a step",
            "other": "plain",
            "bars": {"step": [bar, 5.0]},
            "sides": {"ours": ours, "plain": other},
        }
        assert cells_of(tables.beside_table({"rows": {"x": row}})[2])[4:] == ["3.90× (3.90-3.90)", shown, "5×"]


def test_seconds_to_the_first_step_are_medians_and_ends(tables):
    run = {"seconds": {"import": [1.0, 3.0, 2.0], "data, network": [0.5, 0.5, 0.5], "in all": [1.5, 3.5, 2.5]}, "software": {"machine": {"threads": 2}}}  # fmt: skip
    (line,) = tables.start_table({"runs": {"digits/dm": run}})[2:]
    assert cells_of(line) == ["`digits/dm`", "2.00 (1.00-3.00)", "0.50 (0.50-0.50)", "2.50 (1.50-3.50)", "2", "3"]


def test_the_start_of_a_run_is_measured_in_fresh_processes(tables, tmp_path):
    file = tmp_path / "start.json"
    command = [sys.executable, str(BENCHMARKS / "start.py"), "--data", "digits", "--repeats", "2", "--threads", "1", "--scale", "toy", "--json", str(file)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds = json.loads(file.read_text())["runs"]["digits/dm"]["seconds"]
    assert all(len(t) == 2 for t in seconds.values()) and min(seconds["in all"]) > max(seconds["import"]) > 0
    strange = subprocess.run([*command[:3], "nothing", *command[4:]], capture_output=True, text=True)
    assert strange.returncode == 1 and "nothing" in strange.stderr and "Traceback" not in strange.stderr


def test_the_page_says_what_the_records_say(tables):
    """No number was typed, and none is older than its record."""
    shown = set()
    for page in (ROOT / "docs" / "performance.md", ROOT / "docs" / "scale.md"):
        text = page.read_text()
        assert tables.fill(text, BENCHMARKS / "results") == text
        shown |= {name for _, name, _ in tables.BLOCK.findall(text)}
    assert shown == set(tables.TABLES)


def test_two_processes_gain_what_the_medians_say(tables):
    """Medians 8 and 4: 2; rounds 6/4, 8/2 and 9/6."""
    took = {"one": [6.0, 8.0, 9.0], "one, two threads": [7.0, 7.0, 7.0], "two": [4.0, 2.0, 6.0]}
    lines = tables.processes_table({"works": {"x": {"command": "evaluate a", "seconds": took}}})
    assert cells_of(lines[2])[:4] == ["`potstill evaluate a`", "8.0 s", "7.0 s", "4.0 s"]
    assert cells_of(lines[2])[4:] == ["2.00× (1.50-4.00)", "1.75× (1.17-3.50)"]


def test_toys_and_unknown_tables_do_not_come_on_the_page(tables, tmp_path):
    toy = {"scale": "toy", "cells": {}}
    (tmp_path / "precision.json").write_text(json.dumps(toy))
    with pytest.raises(SystemExit, match="toys"):
        tables.fill("<!-- table: precision -->\n<!-- end -->", tmp_path)
    with pytest.raises(SystemExit, match="no table 'speeds'"):
        tables.fill("<!-- table: speeds -->\n<!-- end -->", tmp_path)


def test_a_toy_row_from_end_to_end_and_not_twice(tmp_path):
    """The sides are processes that work in turns; a row in the file is skipped."""
    file = tmp_path / "beside.json"
    command = [sys.executable, str(BENCHMARKS / "beside.py"), "--only", "frepo", "--scale", "toy", "--eager", "--repeats", "3", "--threads", "1", "--json", str(file)]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert first.returncode == 0, first.stderr
    row = json.loads(file.read_text())["rows"]["frepo"]
    assert {len(s["seconds"]["step"]) for s in row["sides"].values()} == {3} and set(row["sides"]) == {"ours", "plain"}
    assert all(s["peak_bytes"] > s["baseline_bytes"] > 0 for s in row["sides"].values())
    before = file.read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert "measured already" in again.stdout and file.read_bytes() == before


def test_seconds_to_a_goal_from_end_to_end_beside_those_of_other_methods(tables, tmp_path):
    """A file has one finding for each method, the quickest first; what was not reached says so."""
    file = tmp_path / "time_to.json"
    asked = {"json": file, "data": "digits", "goal": 0.8, "repeats": 1, "compile": "off", "threads": 1}
    small = [part for name, value in asked.items() for part in (f"--{name}", str(value))]
    net = [
        p for s in ("network=convnet-w4", "student=convnet-w4", "objective.real=8", "protocol=dc") for p in ("--set", s)
    ]
    for more in (["dm", *net, "--seconds", "0.05,0.1", "--name", "dm, 8"], ["kip", "--seconds", "0.5"]):
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / "time_to.py"), *more, *small], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    other = [sys.executable, str(BENCHMARKS / "time_to.py"), "kip", *small, "--goal", "0.6"]
    refused = subprocess.run(other, capture_output=True, text=True)
    assert refused.returncode == 2 and "another file" in refused.stderr.splitlines()[-1]
    record = json.loads(file.read_text())
    assert record["scale"] == "toy", "the page shows one goal only"
    kip, dm = (cells_of(line) for line in tables.time_to_table(record)[2:])
    reached = record["runs"]["kip"]["reached"]
    assert kip[:2] == ["`kip`", "`ntk-dense-d1`, `kip`"] and kip[2] == f"{reached['seconds']:g}"
    warm = record["runs"]["kip"]["warm_seconds"]
    assert kip[3:5] == [f"{warm:.0f}", f"{(warm + reached['seconds']) / 60:.1f}"]
    assert kip[7] == f"{100 * reached['test'][0]:.1f}" and len(record["runs"]["dm, 8"]["kept"]) == 2
    assert dm[0] == "`dm`" and dm[2].startswith("not in 0.") and dm[9].startswith("`network=convnet-w4` `student=")
    run = record["runs"]["dm, 8"]
    (real,) = (cells_of(line) for line in tables.real_batch_table({"runs": {"dm, 8": run}})[2:])
    last = run["kept"][-1]
    assert real[:4] == ["`dm`", "8", f"not in {last['seconds']:g}", str(last["steps"])]
    assert real[4] == f"{1000 * last['seconds'] / last['steps']:.0f}"


def test_a_recording_by_one_process_and_by_two_from_end_to_end(tmp_path):
    """Three commands a round, each to its end; what is not known is one line."""
    file = tmp_path / "processes.json"
    command = [sys.executable, str(BENCHMARKS / "processes.py"), "--scale", "toy", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert record["scale"] == "toy" and set(record["works"]) == {"experts"}
    assert {form: len(took) for form, took in record["works"]["experts"]["seconds"].items()} == {"one": 1, "one, two threads": 1, "two": 1}  # fmt: skip
    refused = subprocess.run(command[:-2], capture_output=True, text=True)
    assert refused.returncode == 2 and "--json is missing" in refused.stderr.splitlines()[-1]
    refused = subprocess.run([*command, "--only", "distill"], capture_output=True, text=True)
    assert refused.returncode == 2 and "no work 'distill'" in refused.stderr.splitlines()[-1]


def test_runs_in_both_precisions_from_end_to_end_and_not_twice(tables, tmp_path):
    """Twins are compared seed by seed: 0.5, 0.6 and 0.7 beside 0.5, 0.7 and 0.6 differ by 0 ± 10 points."""
    file = tmp_path / "precision_runs.json"
    command = [sys.executable, str(BENCHMARKS / "precision_runs.py"), "--data", "digits", "--methods", "dm,mtt,evaluation", "--network", "convnet-w4", "--seeds", "2", "--scale", "toy", "--json", str(file)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = json.loads(file.read_text())["cells"]
    assert {name: [len(a) for a in c["accuracies"].values()] for name, c in cells.items()} == {f"digits/{m}/convnet-w4": [2, 2] for m in ("dm", "mtt", "evaluation")}  # fmt: skip
    exact, rough = cells["digits/evaluation/convnet-w4"]["accuracies"].values()
    assert exact != rough, "one set, judged in two precisions"
    before = file.read_bytes()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and file.read_bytes() == before
    refused = subprocess.run([*command, "--scale", "full"], capture_output=True, text=True)
    assert refused.returncode == 2 and "has cells of scale toy" in refused.stderr.splitlines()[-1]
    refused = subprocess.run([*command, "--methods", "dmm"], capture_output=True, text=True)
    assert refused.returncode == 2 and "'dmm' is none of dc, dd" in refused.stderr.splitlines()[-1]
    twins = {"method": "dm", "data": "d", "network": "n", "steps": 3, "accuracies": {"fp32": [0.5, 0.6, 0.7], "bf16": [0.5, 0.7, 0.6]}}  # fmt: skip
    (line,) = tables.precision_runs_table({"cells": {"x": twins}})[2:]
    assert cells_of(line)[4:] == ["60.0 ± 8.2", "60.0 ± 8.2", "+0.0 ± 8.2", "1.00", "3"]
