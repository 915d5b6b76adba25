"""The benchmark's page: figures as in the records, marks where they belong, protocols apart, nothing loaded or run."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import stats

from potstill.benchmark import MEMORY
from potstill.cli import main
from potstill.costs import TIME
from potstill.data import load_data
from potstill.distilling import distill
from potstill.errors import PotstillError
from potstill.exchange import DistilledSet, describe_set
from potstill.gallery import _evolution, cards, share
from potstill.methods import METHODS
from potstill.page import collect, performance, ranks
from potstill.plots import Axis, Series, heat_map, line_plot
from potstill.publish import publish
from potstill.records import write_sealed
from potstill.testing import toy

PLANTED = "<script>alert(1)</script>"
SOFTWARE = {
    "potstill": "0.1.0",
    "torch": "2.14.1",
    "machine": {"processor": "a CPU", "threads": 1, "device": "cpu"},
}


def result(accuracies: list[float], **changes: Any) -> dict[str, Any]:
    usual = {"role": "set", "variant": "own", "network": "convnet", "protocol": "dsa", "protocol_hash": "aaaa0000"}
    return {**usual, "labels": "hard", "accuracies": accuracies, **changes}


def cell(
    method: str, ipc: int | None = 1, data: str = "digits", accuracy: float = 0.5, **changes: Any
) -> dict[str, Any]:
    own = [accuracy - 0.01, accuracy, accuracy + 0.01]
    record = {
        "format": 1,
        "kind": "accuracy",
        "suite": "quick",
        "table": "performance",
        "cell": f"{data}/{method}/{ipc}",
        "status": "done",
        "reason": "",
        "inputs": "0123abcd",
        "method": method,
        "data": data,
        "ipc": ipc,
        "protocol": "dsa",
        "row": {"method": method},
        "published": None,
        "command": f"potstill distill {data} --method {method} --ipc {ipc}",
        "sets": [{"seed": 0, "path": f"runs/{data}/{method}/{ipc}/seed0", "steps": 2, "seconds": 90.0, "peak_bytes": 1, "images": 10, "input_bytes": 2560, "label_bytes": 80}],
        "results": [result(own), result([0.3, 0.31, 0.32], role="random")],
        "seconds": 30.0,
        "software": SOFTWARE,
    }  # fmt: skip
    return {**record, **changes}


def unmeasured(method: str, status: str, reason: str, **changes: Any) -> dict[str, Any]:
    return cell(method, status=status, reason=reason, sets=[], results=[], **changes)


def spent(method: str, ipc: int, seconds: float | None, form: str = "plain", **changes: Any) -> dict[str, Any]:
    number = {
        "step_seconds": seconds,
        "loss_seconds": seconds and seconds / 2,
        "peak_bytes": seconds and int(1e9 * seconds),
    }
    head = cell(method, ipc, kind="cost", table="cost", cell=f"cost/digits/{method}/{ipc}/{form}", protocol="", sets=[], results=[])  # fmt: skip
    return {**head, "form": form, "network": "convnet", **number, "times": {}, "baseline_bytes": 1, **changes}


def everything() -> list[dict[str, Any]]:
    """A small benchmark in which each kind of thing happens once."""
    other = {"protocol": "frepo", "protocol_hash": "bbbb1111"}
    frepo = cell("frepo", accuracy=0.9, protocol="frepo")
    frepo["results"] = [
        result([0.9, 0.92], labels="soft", **other),
        result([0.8, 0.81], labels="soft", role="random-soft", **other),
        result([0.5, 0.51], role="random", **other),
        result([0.7, 0.7], variant="hard", **other),
        result([0.95], role="whole", protocol="whole", protocol_hash="cccc2222"),
    ]
    networks = ("convnet", "mlp")
    moved = cell("dm", 10, table="transfer", suite="quick-transfer")
    moved["row"] = {"networks": list(networks)}
    moved["published"] = {"accuracy": 0.655, "spread": None, "source": "NCFM, table 4", "mark": "quoted"}
    moved["results"] = [result([0.6 - 0.1 * i, 0.62 - 0.1 * i], network=n) for i, n in enumerate(networks)]
    return [
        cell(
            "dm", accuracy=0.6, published={"accuracy": 0.712, "spread": 0.006, "source": "DM, table 1", "mark": "read"}
        ),
        cell("dm", 10, accuracy=0.8),
        cell("dc", accuracy=0.55),
        cell("dc", 10, accuracy=0.81),
        cell("random", accuracy=0.31),
        cell("dsa", data="fashion-mnist", accuracy=0.7),
        frepo,
        cell("kip", accuracy=0.99, results=[result([0.99], network="ntk-relu-3")]),
        cell("whole", None, accuracy=0.97),
        unmeasured("dd", "out of memory", "20 GB needed, 15 GB there"),
        unmeasured("mtt", "out of time", "stopped after 60 s"),
        unmeasured("herding", "failed", "the loss is not finite"),
        unmeasured("dm", "absent", "tiny-imagenet is not here", data="tiny-imagenet"),
        moved,
        unmeasured("mtt", "failed", "no experts", ipc=10, table="transfer", suite="quick-transfer"),
        spent("dm", 1, 0.25),
        spent("dm", 10, 0.5),
        spent("dd", 1, 3.0),
        spent("dd", 1, 4.0, "saving"),
        spent("dd", 10, None, status="out of memory", reason="killed at 15 GB"),
        spent("mtt", 1, None, status="out of time", reason="no step in 60 s"),
    ]


def folder_of(path: Path, records: list[dict[str, Any]], findings: Any = None) -> Path:
    for record in records:
        file = path / "cells" / record["table"] / f"{record['cell']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record))
    if findings is not None:
        (path / "findings.json").write_text(json.dumps(findings))
    return path


def with_set(folder: Path, path: str, ipc: int = 1, snapshots: bool = True) -> DistilledSet:
    """A set of digits, and the snapshots of a run, where a benchmark has them."""
    run = folder / path
    run.mkdir(parents=True)
    data = load_data("digits")
    recipe = METHODS["dm"]("small", ipc)
    inputs = torch.rand(10 * ipc, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    meta = describe_set(data, recipe, [ipc] * 10, 0, 2)
    names = ["nought", PLANTED, *map(str, range(2, 10))]
    set_ = DistilledSet(inputs, torch.arange(10).repeat_interleave(ipc), replace(meta, class_names=names))
    set_.save(run / "set.safetensors")
    if snapshots:
        each = min(ipc, 10)
        kept = {f"{s:08d}": torch.full((10 * each, 1, 8, 8), s / 2) for s in (0, 1, 2)}
        save_file(kept, run / "snapshots.safetensors")
    return set_


def written(tmp_path: Path, records: list[dict[str, Any]], ending: str = "html", **more: Any) -> str:
    out = tmp_path / f"page.{ending}"
    publish([folder_of(tmp_path / "results", records, **more)], out)
    return out.read_text()


def text(source: str) -> str:
    """What a reader sees."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", source, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def tables(source: str) -> list[tuple[str, list[list[str]]]]:
    """Each table's name and its rows of texts, as a reader of the HTML sees them."""
    found = []
    for block in re.findall(r'aria-label="([^"]*)">\s*<table.*?<tbody>(.*?)</tbody>', source, flags=re.DOTALL):
        rows = re.findall(r"<tr.*?</tr>", block[1], flags=re.DOTALL)
        found.append((html.unescape(block[0]), [[text(c) for c in re.findall(r"<t[hd].*?</t[hd]>", r, flags=re.DOTALL)] for r in rows]))  # fmt: skip
    return found


def marked(source: str, mark: str) -> list[str]:
    return [text(c) for c in re.findall(rf'<td class="{mark}[ "].*?</td>', source, flags=re.DOTALL)]


def test_figures_are_those_of_the_records(tmp_path: Path) -> None:
    source = written(tmp_path, everything())
    named = dict(tables(source))
    rows = {row[0]: row[1:] for row in named["protocol dsa · aaaa0000 · convnet"]}
    assert rows["dm"][0].startswith("60.0 ± 0.8") and rows["dm"][1] == "80.0 ± 0.8"
    assert rows["dc"][:2] == ["55.0 ± 0.8", "81.0 ± 0.8"]
    for record in everything():
        if record["status"] == "done" and record["table"] != "cost":
            for r in record["results"]:
                if (r["role"], r["variant"]) == ("set", "own") and len(r["accuracies"]) > 1:
                    words = f"{100 * fmean(r['accuracies']):.1f} ± {100 * pstdev(r['accuracies']):.1f}"
                    assert words in text(source), words
    seen = text(source)
    for words in ("quick, quick-transfer", "a CPU, 1 thread, cpu", "potstill 0.1.0, torch 2.14.1", "14 of 21 measured"):
        assert words in seen


def test_best_and_second_by_column(tmp_path: Path) -> None:
    source = written(tmp_path, everything())
    best, second = marked(source, "best"), marked(source, "second")
    assert best[:2] == ["81.0 ± 0.8", "60.0 ± 0.8 71.2 ± 0.6 3"]  # by row: dc before dm
    assert second[:2] == ["55.0 ± 0.8", "80.0 ± 0.8"]
    assert not [b for b in best + second if b.startswith(("97", "99", "91", "70"))]  # whole, kernel, alone
    assert "0.250" in best and "3.00" in second  # less is better where it is a cost


def test_whole_data_and_kernels_do_not_compete(tmp_path: Path) -> None:
    kernels = [cell(m, results=[result([a], network="nngp-2")]) for m, a in (("kip", 0.9), ("dd", 0.8))]
    source = written(tmp_path, [*kernels, cell("dm"), cell("whole", 1, results=[result([0.97])])])
    assert marked(source, "best") == [] and marked(source, "second") == []
    rows = dict(tables(source))["protocol dsa · aaaa0000 · convnet"]
    assert rows == [["dm", "50.0 ± 0.8 n = 3", "–"], ["whole", "–", "97.0 n = 1"]]  # a column of its own, at the end


@pytest.mark.parametrize(
    ("values", "high", "expected"),
    [
        ([0.5, 0.7, 0.6], True, ["", "best", "second"]),
        ([0.5, 0.7, 0.6], False, ["best", "", "second"]),
        ([0.7, 0.7, 0.6, None, 0.6], True, ["best", "best", "second", "", "second"]),
        ([None, 0.7], True, ["", ""]),
        ([], True, []),
    ],
)
def test_ranks(values: list[float | None], high: bool, expected: list[str]) -> None:
    assert ranks(values, high) == expected


def test_published_stands_beside_measured(tmp_path: Path) -> None:
    source = written(tmp_path, everything())
    assert re.search(r'class="pub" title="published: DM, table 1 \(read at its source\)">71\.2 ± 0\.6', source)
    assert "published: DM, table 1 (read at its source)" in text(source)
    assert text(source).count("71.2 ± 0.6") == 1


def test_protocols_and_networks_never_mix(tmp_path: Path) -> None:
    found = tables(written(tmp_path, everything()))
    names = [name for name, _ in found]
    for name in ("protocol dsa · aaaa0000 · convnet", "protocol frepo · bbbb1111 · convnet", "protocol dsa · aaaa0000 · ntk-relu-3"):  # fmt: skip
        assert names.count(name) == 1
    first = dict(found)["protocol dsa · aaaa0000 · convnet"]
    assert "frepo" not in [row[0] for row in first] and "kip" not in [row[0] for row in first]
    assert not any("91.0" in box or "99.0" in box for row in first for box in row)


def test_one_name_two_hashes_are_two_tables(tmp_path: Path) -> None:
    changed = cell("dc", accuracy=0.9, results=[result([0.9, 0.91], protocol_hash="ffff9999")])
    found = dict(tables(written(tmp_path, [cell("dm"), cell("dsa"), changed])))
    assert [row[0] for row in found["protocol dsa · aaaa0000 · convnet"]] == ["dsa", "dm"]
    assert [row[0] for row in found["protocol dsa · ffff9999 · convnet"]] == ["dc"]


def test_what_is_missing_says_why(tmp_path: Path) -> None:
    source = written(tmp_path, everything())
    seen = text(source)
    rows = {row[0]: row[1:] for row in dict(tables(source))["protocol dsa · aaaa0000 · convnet"]}
    assert rows["dd"][0].startswith("OOM") and rows["mtt"][0].startswith("timeout")
    assert rows["herding"][0].startswith("failed") and rows["dm"][-1].startswith("no data")
    for reason in ("20 GB needed, 15 GB there", "stopped after 60 s", "the loss is not finite", "tiny-imagenet is not here"):  # fmt: skip
        assert reason in seen
    cost = dict(tables(source))["Seconds of a whole outer step"]
    assert cost[0][:2] == ["dd", "3.00"] and cost[0][2].startswith("OOM")
    assert cost[1] == ["dd memory-saving", "4.00", "–"]
    assert dict(tables(source))["Peak memory, MB"][2] == ["dm", "250", "500"]
    assert "killed at 15 GB" in seen and "no step in 60 s" in seen


def test_transfer_by_network(tmp_path: Path) -> None:
    source = written(tmp_path, everything())
    rows = dict(tables(source))["digits, 10 images per class · protocol dsa · aaaa0000"]
    assert rows[0] == ["dm", "61.0 ± 1.0 65.5 1", "51.0 ± 1.0"]  # the published number is that of the first network
    assert rows[1] == ["mtt", "failed 2", "failed 2"]
    assert ">61.0</text>" in source and ">51.0</text>" in source and ">mlp</text>" in source  # the heat map


def test_transfer_of_which_nothing_was_measured(tmp_path: Path) -> None:
    row = {"networks": ["convnet", "mlp"]}
    source = written(tmp_path, [unmeasured("mtt", "failed", "no experts", ipc=10, table="transfer", row=row)])
    assert dict(tables(source))["digits, 10 images per class · protocol dsa"] == [["mtt", "failed 1", "failed 1"]]
    assert source.count("no experts</li>") == 1


def test_what_was_not_measured_joins_its_own_network(tmp_path: Path) -> None:
    wide = unmeasured("dc", "failed", "x", row={"network": "mlp", "networks": ["convnet-w8"]})
    kip = cell("kip", protocol="kip", results=[result([0.9], network="ntk-relu-3", protocol="kip", protocol_hash="9")])
    gone = unmeasured("kip", "failed", "y", ipc=10, protocol="kip", row={"networks": ["kernel"]})
    found = dict(tables(written(tmp_path, [cell("dm"), wide, kip, gone])))
    assert [row[0] for row in found["protocol dsa · aaaa0000 · convnet"]] == ["dm"]
    assert found["protocol dsa · convnet-w8"] == [["dc", "failed 1"]]
    assert found["protocol kip · 9 · ntk-relu-3"] == [["kip", "90.0", "failed 1"]]


def test_an_unfinished_cell_has_no_number_yet(tmp_path: Path) -> None:
    half = cell("dc", status="running", accuracy=0.9)
    rows = dict(tables(written(tmp_path, [cell("dm"), half])))["protocol dsa · aaaa0000 · convnet"]
    assert rows == [["dc", "unfinished"], ["dm", "50.0 ± 0.8"]]


def test_cost_names_another_network(tmp_path: Path) -> None:
    records = [spent("dm", 1, 0.1), spent("dm", 2, 0.2), spent("frepo", 1, 0.3, network="widenet"), spent("frepo", 2, 0.4, network="widenet"), spent("kip", 1, 0.5, network=None)]  # fmt: skip
    source = written(tmp_path, records)
    rows = dict(tables(source))["Seconds of a whole outer step"]
    assert [row[0] for row in rows] == ["kip", "dm", "frepo widenet"]
    assert (
        len(re.findall(r'<use xlink:href="#c0-step_seconds-[^"]+" x="[^"]+" y="[^"]+" style="fill: var\(--s\d', source))
        == 5
    )


def test_fairness_beside_accuracy(tmp_path: Path) -> None:
    found = [rows for name, rows in tables(written(tmp_path, everything())) if name == "Beside every accuracy"]
    dm = next(row for rows in found for row in rows if row[0] == "dm digits")
    p = stats.ttest_ind([0.59, 0.6, 0.61], [0.3, 0.31, 0.32], equal_var=False).pvalue
    assert dm[1:5] == ["1", "60.0 ± 0.8", "+29.0 1", f"{p:.2g}" if p >= 1e-4 else "< 0.0001"]
    assert dm[5] == "37.0"  # 97 % by the whole set, in a cell of its own, less 60 %
    assert dm[-2:] == ["2.64 kB", "1.50 min"]
    frepo = next(row for rows in found for row in rows if row[0] == "frepo digits")
    assert frepo[3] == "+10.5 1"  # against random with soft labels: 91.0 - 80.5
    assert frepo[4] == f"{stats.ttest_ind([0.9, 0.92], [0.8, 0.81], equal_var=False).pvalue:.2g}"
    assert frepo[5] == "25.0"  # 95 % by the whole set, less 70 % with hard labels
    over, lost = 0.91 - 0.805, 0.95 - 0.7
    expected = (np.exp(0.5 * over - 0.5 * lost) - np.exp(-1)) / (np.e - np.exp(-1))
    assert frepo[7] == f"{expected:.3f}" and frepo[8] == "–"


def test_csv_parses_back(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(written(tmp_path, everything(), "csv"))))
    assert len(rows) == len(everything()) + 2  # two cells of two networks each
    by = {(r["table"], r["cell"], r["network"]): r for r in rows}
    frepo = by["performance", "digits/frepo/1", "convnet"]
    assert float(frepo["accuracy_mean"]) == fmean([0.9, 0.92]) and float(frepo["accuracy_std"]) == pstdev([0.9, 0.92])
    assert frepo["n"] == "2" and frepo["baseline"] == "random, soft labels" and frepo["protocol_hash"] == "bbbb1111"
    assert float(frepo["gain"]) == fmean([0.9, 0.92]) - fmean([0.8, 0.81])
    dm = by["performance", "digits/dm/1", "convnet"]
    assert [dm[f"published{w}"] for w in ("", "_spread", "_source", "_mark")] == [
        "0.712",
        "0.006",
        "DM, table 1",
        "read",
    ]
    assert float(by["cost", "cost/digits/dm/10/plain", "convnet"]["peak_bytes"]) == 5e8
    dead = by["cost", "cost/digits/dd/10/plain", "convnet"]
    assert (dead["status"], dead["reason"], dead["step_seconds"]) == ("out of memory", "killed at 15 GB", "")


def test_markdown_is_well_formed(tmp_path: Path) -> None:
    records = [*everything(), cell("a|b\n*c* <i>", accuracy=0.2)]
    findings = [{"name": "f", "claim": "a | b", "verdict": "refuted", "numbers": "1 < 2", "command": "x 'd*' | y"}]
    source = written(tmp_path, records, "md", findings=findings)
    lines, runs, run = source.splitlines(), [], []
    for line in [*lines, ""]:
        if line.startswith("|"):
            run.append(re.sub(r"\\\|", "", line).count("|"))
        elif run:
            runs.append(run)
            run = []
    assert len(runs) >= 7 and all(len(set(r)) == 1 and len(r) > 2 for r in runs)
    assert "| dm | **60.0 ± 0.8** (published 71.2 ± 0.6 [" in source
    assert "a\\|b \\*c\\* &lt;i&gt;" in source and "| a \\| b | refuted | 1 &lt; 2 | `x 'd*' \\| y` |" in source
    assert "*55.0 ± 0.8*" in source


def test_a_later_folder_wins_only_if_done(tmp_path: Path) -> None:
    first = folder_of(
        tmp_path / "a", [cell("dm", accuracy=0.4), cell("dc", accuracy=0.5), unmeasured("dd", "failed", "x")]
    )
    second = folder_of(tmp_path / "b", [cell("dm", accuracy=0.6), unmeasured("dc", "failed", "y"), unmeasured("dd", "out of time", "z")])  # fmt: skip
    cells, _ = collect([first, second])
    found = {c.record["method"]: c for c in cells}
    assert found["dm"].folder == second and found["dm"].record["results"][0]["accuracies"][1] == 0.6
    assert found["dc"].folder == first and found["dc"].record["status"] == "done"
    assert found["dd"].record["reason"] == "x"


def test_two_suites_do_not_share_a_place(tmp_path: Path) -> None:
    records = [cell("dm", accuracy=0.4), cell("dc"), cell("dm", accuracy=0.6, suite="long", cell="digits/dm-long/1")]
    rows = dict(tables(written(tmp_path, records)))["protocol dsa · aaaa0000 · convnet"]
    assert [row[:2] for row in rows] == [["dc", "50.0 ± 0.8"], ["dm quick", "40.0 ± 0.8"], ["dm long", "60.0 ± 0.8"]]


def test_a_row_with_a_name_is_no_point_of_its_methods_line(tmp_path: Path) -> None:
    more = {"table": "transfer", "row": {"networks": ["convnet", "mlp"]}}
    plain, part = cell("dm", 10, **more), cell("dm", 10, **more, cell="digits/dm-none/10")
    part["row"] = {**part["row"], "name": "dm-none"}
    for record, start in ((plain, 0.6), (part, 0.2)):
        record["results"] = [result([start, start], network=n) for n in ("convnet", "mlp")]
    alone = cell("dd", row={"name": "dd-bare"}, cell="digits/dd-bare/1")
    page = written(tmp_path, [plain, part, alone])
    heat = next(s for s in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "60.0" in heat and "20.0" not in heat
    names = [row[0] for _, rows in tables(page) for row in rows]
    assert {"dm", "dm dm-none", "dd dd-bare"} <= set(names)


def test_the_title_counts_methods_and_selections_apart_and_hours_say_what_they_leave_out(tmp_path: Path) -> None:
    page = written(tmp_path, [cell("dm"), cell("dc", ipc=10), cell("random"), cell("herding")], "md")
    assert page.startswith("# 2 methods of data set distillation and 2 selections of real samples on digits")
    assert "without the making of sets" not in page
    taken = cell("dm")
    taken["sets"][0] |= {"path": "zoo:digits/dm/1"}
    (tmp_path / "other").mkdir()
    page = written(tmp_path / "other", [taken], "md")
    assert page.startswith("# 1 method of data set distillation on digits")
    assert "time: 0.500 minutes, without the making of sets that were there before" in page


def test_sets_of_the_zoo_are_said_to_be(tmp_path: Path) -> None:
    taken = cell("dm", row={"network": "convnet-w8"})
    taken["sets"][0] |= {"path": "zoo:digits/dm/1", "network": "convnet-w99"}
    page = written(tmp_path, [taken, cell("dc")])
    assert page.count("a set of the zoo: its length and settings are those on its card") == 1
    assert "made with convnet-w99" in page and "convnet-w8" not in page


def test_a_set_that_no_network_made_names_none(tmp_path: Path) -> None:
    cells = [cell("kip"), cell("random"), cell("herding", row={"settings": {"space": "features"}}), cell("k-center"), cell("k-means"), cell("herding", data="fashion-mnist")]  # fmt: skip
    cells[3]["sets"][0]["space"] = "features"
    cells[4]["sets"][0]["space"] = "pixels"
    cells[5]["sets"][0]["path"] = "zoo:fashion-mnist/herding/1"  # chosen on the features of a network
    made_with = [f"convnet-w9{i}" for i in range(6)]
    for made, network in zip(cells, made_with, strict=True):
        made["sets"][0] |= {"network": network}
    page = written(tmp_path, cells)
    assert [network in page for network in made_with] == [False, False, True, True, False, True]


def test_a_whitened_set_is_not_held_against_the_whole_set_as_it_is(tmp_path: Path) -> None:
    for transform, wanted in (("standardise", 0.37), ("zca", None)):
        made = cell("mtt", accuracy=0.6)
        made["sets"][0]["transform"] = transform
        (tmp_path / transform).mkdir()
        lines = written(tmp_path / transform, [made, cell("whole", None, accuracy=0.97)], "csv").splitlines()
        (row,) = [r for r in csv.DictReader(lines) if r["method"] == "mtt"]
        assert float(row["label_recovery"] or "nan") == pytest.approx(wanted or math.nan, nan_ok=True)


def test_what_a_set_of_the_zoo_was_made_for_and_whether_it_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whitened one says so; numbers of a set that the zoo has no more are told apart from those of its successor, and no
    pictures of that stand beside them."""
    run = distill(toy(), "random", ipc=1, out=tmp_path / "zoo" / "toy" / "random" / "1", evaluate=False)
    monkeypatch.setenv("POTSTILL_ZOO", str(tmp_path / "zoo"))
    now, before, told = cell("dd"), cell("mtt"), cell("dm")
    for made in (now, before, told):
        made["sets"][0] |= {"path": "zoo:toy/random/1", "sha256": run.record["set"]["sha256"]}
    before["sets"][0] |= {"sha256": "0" * 64, "steps": 77}
    told["sets"][0] |= {"sha256": "1" * 64, "student": "convnet-w7", "protocol": "unrolled", "transform": "zca"}
    page = written(tmp_path, [now, before, told])
    assert "on its card; made for {student} and protocol {protocol}".format(**run.record["recipe"]) in page
    assert "a set of a zoo (77 steps); the one that is there now is another" in page
    assert "another; made for convnet-w7 and protocol unrolled; whitened, and the baselines beside it too" in page
    assert page.count('class="card"') == 1
    record = tmp_path / "zoo" / "toy" / "random" / "1" / "record.json"
    write_sealed(record, {k: v for k, v in run.record.items() if k not in ("choices", "checksum")})
    assert "on its card" in written(tmp_path, [now])  # somebody's zoo may say less


def test_strangers_words_stay_words(tmp_path: Path) -> None:
    bad = unmeasured(PLANTED, "failed", PLANTED, suite=PLANTED)
    worse = cell(PLANTED, data=PLANTED, command=PLANTED, cell="x/y/1", published={"accuracy": 0.5, "spread": None, "source": PLANTED, "mark": PLANTED})  # fmt: skip
    worse["results"] = [result([0.1, 0.2], network=PLANTED, protocol='" onload="alert(1)', protocol_hash=PLANTED)]
    worse["software"] = {PLANTED: PLANTED, "machine": {"processor": PLANTED}}
    moved = cell(PLANTED, table="transfer", cell="x/z/1", results=[result([0.1], network=n) for n in (PLANTED, "$x$")])
    dear = [spent(PLANTED, ipc, float(ipc), network=PLANTED) | {"cell": f"c/{ipc}"} for ipc in (1, 2)]
    findings = [{"name": PLANTED, "claim": PLANTED, "verdict": PLANTED, "numbers": PLANTED, "command": PLANTED}]
    bad["cell"] = "x/x/1"
    results = folder_of(tmp_path / "results", [bad, worse, moved, *dear], findings)
    with_set(results, worse["sets"][0]["path"].replace(PLANTED, "p"))
    worse["sets"][0]["path"] = worse["sets"][0]["path"].replace(PLANTED, "p")
    folder_of(results, [worse])
    publish([results], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in source and ' onload="' not in source
    assert source.count("<script") == 1 and html.escape(PLANTED) in source
    assert source.count('class="card"') == 1 and ">$x$</text>" in source


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    results = folder_of(tmp_path / "results", everything())
    with_set(results, "runs/digits/dm/1/seed0")
    publish([results], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    targets = re.findall(r"""(?:src|href|action|poster)=["']?([^"'\s>]+)|url\(([^)]+)""", source)
    assert all("".join(t).startswith(("data:", "#")) for t in targets) and len(targets) > 5
    assert not re.search(r"https?://|@import|<metadata|<!DOCTYPE svg", source)
    assert "default-src 'none'" in source
    publish([results], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == source
    names = re.findall(r' id="([^"]+)"', source)
    assert len(names) == len(set(names))
    assert {t[1:] for t in re.findall(r'(?:href="|url\()(#[^")]+)', source)} <= set(names)


def test_the_gallery_shows_the_set_and_how_it_came_about(tmp_path: Path) -> None:
    results = folder_of(tmp_path / "results", [cell("dm", 3), cell("dc"), cell("dsa")])
    set_ = with_set(results, "runs/digits/dm/3/seed0", 3)
    with_set(results, "runs/digits/dc/1/seed0", 1, snapshots=False)
    entries = [e for g in performance(collect([results])[0]) for e in g.entries]
    found = {c.entry.method: c for c in cards(entries)}
    assert set(found) == {"dm", "dc"}
    dm = found["dm"]
    assert [step for step, _ in dm.steps] == ["0", "1", "2"] and dm.names[:2] == ("nought", PLANTED)

    def picture(uri: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))

    expected = (set_.images.numpy().clip(0, 1) * 255).round()
    assert dm.all is not None and dm.all.columns == 3
    assert (picture(dm.all.uri)[8:16, 16:24] == expected[5, 0]).all()  # class 1, its third
    assert (picture(dm.steps[-1][1].uri)[8:16] == expected[3, 0]).all()  # class 1, its first
    assert (picture(dm.steps[1][1].uri) == 128).all()
    assert len(found["dc"].steps) == 1 and found["dc"].all is None
    small = {c.entry.method: c for c in cards(entries, total=3000)}
    assert len(small["dc"].steps) == 1 and len(small["dm"].steps) < 3


def test_the_gallery_finds_sets_of_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, unknown = cell("dc"), cell("dm")
    taken["sets"][0]["path"], unknown["sets"][0]["path"] = "zoo:digits/dc/1", "zoo:../../digits/dc/1"
    with_set(tmp_path / "own", "digits/dc/1")
    monkeypatch.setenv("POTSTILL_ZOO", str(tmp_path / "own"))
    results = folder_of(tmp_path / "results", [taken, unknown])
    entries = [e for g in performance(collect([results])[0]) for e in g.entries]
    assert [c.entry.method for c in cards(entries)] == ["dc"]


def test_sets_that_cannot_be_read_leave_the_numbers(tmp_path: Path) -> None:
    outside = cell("dc")
    outside["sets"][0]["path"] = "../elsewhere"
    results = folder_of(tmp_path / "results", [cell("dm"), outside])
    with_set(tmp_path, "elsewhere")
    (results / "runs/digits/dm/1/seed0").mkdir(parents=True)
    (results / "runs/digits/dm/1/seed0/set.safetensors").write_bytes(b"nothing")
    publish([results], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    assert 'class="card"' not in source and "50.0 ± 0.8" in text(source)


def test_snapshots_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    images, file = np.zeros((20, 1, 8, 8), np.float32), tmp_path / "snapshots.safetensors"
    save_file({"00000000": torch.zeros(7, 1, 8, 8)}, file)
    assert _evolution(file, [2] * 10, images) == ()
    save_file({"00000000": torch.zeros(10, 1, 9, 9)}, file)
    assert _evolution(file, [2] * 10, images) == ()
    save_file({"00000000": torch.arange(11.0)[:, None, None, None].repeat(1, 1, 8, 8)}, file)
    ((step, first),) = _evolution(file, [1, 2, 2, 2, 5, 4], images)  # at most 2 of each: 1 + 2 + 2 + 2 + 2 + 2 = 11
    assert step == 0 and first[:, 0, 0, 0].tolist() == [0, 1, 3, 5, 7, 9]


def test_share() -> None:
    assert share([10, 100, 100], 90) == [10, 40, 40] and share([5, 5], 100) == [5, 5] and share([], 3) == []
    given = share([7, 1000, 30, 400], 500)
    assert sum(given) == 500 and all(g <= w for g, w in zip(given, [7, 1000, 30, 400], strict=True))


def test_plots_without_data_are_not_drawn(tmp_path: Path) -> None:
    assert "<svg" not in written(tmp_path, [cell("dm"), unmeasured("dc", "failed", "x"), spent("dm", 1, 0.2)])
    assert "<svg" in written(tmp_path, [cell("dm"), cell("dm", 10)])


def test_a_plot_shows_the_points_in_the_colours_of_the_page() -> None:
    points = ((1.0, 50.0, 1.0), (10.0, 60.0, 1.0), (50.0, 70.0, 1.0))
    source = line_plot("p", [Series(points, 2, 0), Series(points[:1], -1, 1)], Axis("ipc", True, (1, 10, 50)), Axis("accuracy", False))  # fmt: skip
    assert "var(--s2)" in source and "var(--soft)" in source and not re.search(r"#[0-9a-f]{6}", source)
    for tick in ("1", "10", "50"):
        assert f">{tick}</text>" in source
    marks = re.findall(r'<use xlink:href="#p-[^"]+" x="([0-9.]+)" y="([0-9.]+)" style="fill: var\(--s2\)', source)
    x, y = np.array(marks, float).T
    assert (x[2] - x[1]) / (x[1] - x[0]) == pytest.approx(np.log10(5), abs=0.01)  # logarithmic across
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.1) and y[2] < y[0]
    heat = heat_map("h", ["a<b"], ["x", "y"], [[0.5, None]])
    assert heat.count("var(--copper)") == 1 and ">50.0</text>" in heat and "a&lt;b" in heat


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: shutil.rmtree(p / "cells"), r"results has no records \(cells/\*\.json\); `potstill benchmark` writes"),
        (lambda p: (p / "cells" / "x.json").write_text("{"), r"cells/x\.json is not a whole record"),
        (lambda p: (p / "cells" / "x.json").write_text("[]"), r"cells/x\.json is no record of a benchmark's cell"),
        (lambda p: (p / "cells" / "x.json").write_text(json.dumps(cell("dm", format=9))), r"x\.json has format 9"),
        (lambda p: (p / "cells" / "x.json").write_text(json.dumps(cell("dm", status="odd"))), r"x\.json is a damaged record: status"),
        (lambda p: (p / "cells" / "x.json").write_text(json.dumps(cell("dm", results=[{"role": "set"}]))), r"x\.json is a damaged record: variant"),
        (lambda p: (p / "findings.json").write_text("3"), r"findings\.json is no list of findings"),
        (lambda p: shutil.rmtree(p), r"no folder .*results; a folder that `potstill benchmark`"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    tmp_path: Path, break_it: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = folder_of(tmp_path / "results", [cell("dm")])
    break_it(results)
    with pytest.raises(PotstillError, match=words):
        publish([results], tmp_path / "page.html")
    assert main(["report", str(results), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "page.html").exists()


def test_where_it_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(PotstillError, match=r"page\.pdf does not end in \.html, \.md or \.csv"):
        publish([tmp_path / "none"], tmp_path / "page.pdf")
    with pytest.raises(PotstillError, match="cannot be written; a file in a folder"):
        publish([tmp_path / "none"], tmp_path / "no" / "page.html")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = folder_of(tmp_path / "results", everything())
    assert main(["report", str(results), str(results), "--out", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out == f"14 of 21 cells are done: {tmp_path / 'page.md'}\n"


@pytest.mark.parametrize("name, folders", [("quick", ["quick"]), ("review", ["review", "cost"])])
def test_the_example_is_the_page_of_its_records(tmp_path: Path, name: str, folders: list[str]) -> None:
    """The tables under docs/ to the letter, and no figure in them but of a record that loads."""
    here = Path(__file__).parent.parent
    records = [here / "benchmarks" / "results" / f for f in folders]
    assert main(["report", *map(str, records), "--out", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == (here / "docs" / "example" / f"{name}.md").read_text()
    found = [json.loads(f.read_text()) for r in records for f in (r / "cells").rglob("*.json")]
    assert {r["status"] for r in found if r["kind"] != "cost"} <= {"done"}
    assert {r["status"] for r in found} <= {"done", MEMORY, TIME}  # a limit that a cost meets is a result


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not here")
def test_a_browser_shows_the_page_at_phone_width(tmp_path: Path) -> None:
    """In a frame of 360 pixels: nothing overflows, filter and slider work, the console stays empty."""
    findings = [{"name": "f", "claim": "long " * 40, "verdict": "confirmed", "numbers": "n" * 90, "command": "c" * 90}]
    results = folder_of(tmp_path / "results", everything(), findings)
    with_set(results, "runs/digits/dm/1/seed0")
    publish([results], tmp_path / "page.html")
    act = """<script>
        const seen = (what) => [...document.querySelectorAll(what)].filter((e) => e.offsetParent).length, said = [];
        const wide = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
        const set = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("input", {bubbles: true})); };
        document.querySelectorAll("details").forEach((d) => d.open = true);
        const rows = seen("tr[data-words]"), card = document.querySelector(".card");
        const now = () => getComputedStyle(card.querySelector(".stage .px")).backgroundImage;
        said.push(wide(), rows > 20);
        const before = now(); set("slide0", 0); said.push(now() !== before, card.querySelector("output").textContent);
        set("slide0", 2); said.push(now() === before, card.querySelector("output").textContent);
        set("method", "dm"); said.push([...document.querySelectorAll("tr[data-words]:not([hidden])")].every((r) => r.dataset.method === "dm"), seen(".card"));
        set("method", ""); set("data", "fashion-mnist"); said.push(seen("tr[data-words]"), seen(".card"), seen("thead th[data-col=digits]"));
        set("data", ""); set("words", "frepo nothing"); said.push(seen("tr[data-words]"));
        set("words", ""); said.push(seen("tr[data-words]") === rows, wide());
        document.body.dataset.out = said.join(" ");</script></body>"""
    inner = html.escape((tmp_path / "page.html").read_text().replace("</body>", act))
    outer = f"""<!doctype html><iframe style="width: 360px; height: 800px; border: 0" srcdoc="{inner}"></iframe>
        <p id="out"></p><script>document.querySelector("iframe").onload = (event) => {{
            document.getElementById("out").textContent = event.target.contentDocument.body.dataset.out;
        }};</script>"""
    (tmp_path / "outer.html").write_text(outer)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=3000"
    place = [f"--user-data-dir={tmp_path}/user", "--dump-dom", (tmp_path / "outer.html").as_uri()]
    done = subprocess.run(["chromium", *flags.split(), *place], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r'<p id="out">([^<]*)</p>', done.stdout)
    assert found and found[1] == "0 true true 0 true 2 true 1 2 0 0 0 true 0"
    assert "CONSOLE" not in done.stderr
