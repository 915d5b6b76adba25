"""The benchmark's files: strict TOML, names that exist, published figures as they stand in print, findings about cells that exist."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from potstill import findings
from potstill.findings import ANY_WIDTH, WIDTH
from potstill.loaders import LOADERS
from potstill.methods import METHODS
from potstill.networks import network
from potstill.recipe import change, find
from potstill.students import KERNEL, is_kernel
from potstill.training import PROTOCOLS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES = sorted((BENCHMARKS / "rows").glob("*.toml"))
SUITES = {file.stem: tomllib.loads(file.read_text()) for file in FILES}
WRITTEN: list[dict[str, Any]] = tomllib.loads((BENCHMARKS / "findings.toml").read_text())["finding"]
FINDINGS = findings.read(BENCHMARKS / "findings.toml")
each_suite = pytest.mark.parametrize("suite", SUITES)

SHAPES = {
    "digits": ((1, 8, 8), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "tiny-imagenet": ((3, 64, 64), 200),
}
TOP = {"title": str, "table": str, "experts": dict, "row": list}
RECORDING = {"data": str, "network": str, "count": int, "epochs": int, "lr": float, "momentum": float, "batch": int}
ACCURACY = {
    "method": str, "data": str, "ipc": int, "preset": str, "minutes": float, "steps": int, "network": str,
    "networks": list, "protocol": str, "seeds": list, "repeats": int, "baselines": list, "variants": list,
    "experts": str, "settings": dict, "published": dict, "name": str,
}  # fmt: skip
COST = {
    "method": str, "data": str, "ipc": int, "network": str, "batch": (int, str), "form": str, "repeats": int,
    "limit_seconds": (int, float), "settings": dict,
}  # fmt: skip
PUBLISHED = {"accuracy": float, "spread": float, "source": str, "mark": str}
FINDING = {
    "name": str, "claim": str, "source": str, "table": str, "kind": str, "more": (str, list),
    "than": (str, list), "factor": float, "each": dict, "note": str, "command": str,
}  # fmt: skip


def fits(plain: dict[str, Any], fields: dict[str, Any], needed: str) -> None:
    assert set(plain) <= set(fields), f"no fields of the schema: {set(plain) - set(fields)}"
    assert set(needed.split()) <= set(plain), f"missing: {set(needed.split()) - set(plain)}"
    for name, value in plain.items():
        assert isinstance(value, fields[name]) and not isinstance(value, bool), (name, value)


def cell(table: str, row: dict[str, Any]) -> str:
    name = f"{row['data']}/{row.get('name', row['method'])}/{row['ipc']}"
    return f"cost/{name}/{row['form']}" if table == "cost" else name


def test_every_suite_is_there_and_has_no_field_of_its_own() -> None:
    assert set(SUITES) >= {"quick", "quick-transfer", "quick-cost", "review", "review-transfer", "cost"}
    for plain in SUITES.values():
        fits(plain, TOP, "title table row")
        assert "\n" not in plain["title"]
        assert plain["table"] in ("performance", "transfer", "cost")


@each_suite
def test_cells_are_unique_within_a_suite(suite: str) -> None:
    table = SUITES[suite]["table"]
    cells = [cell(table, row) for row in SUITES[suite]["row"]]
    assert sorted(cells) == sorted(set(cells))


@each_suite
def test_recordings_are_used_and_fit_their_rows(suite: str) -> None:
    experts, rows = SUITES[suite].get("experts", {}), SUITES[suite]["row"]
    assert set(experts) == {row["experts"] for row in rows if "experts" in row}
    for made in experts.values():
        fits(made, RECORDING, "data count epochs")
    for row in rows:
        if SUITES[suite]["table"] != "cost":
            assert (row["method"] == "mtt") == ("experts" in row)
        if "experts" in row:
            made = experts[row["experts"]]
            assert (made["data"], made["network"]) == (row["data"], row["network"])
            source = change(find("mtt", "small", row["ipc"]), row.get("settings", {})).source
            assert source.max_start - 1 + source.span <= made["epochs"]


@each_suite
def test_rows_name_what_the_library_has(suite: str) -> None:
    table = SUITES[suite]["table"]
    for row in SUITES[suite]["row"]:
        at = cell(table, row)
        if table == "cost":
            fits(row, COST, "method data ipc batch form repeats limit_seconds")
            assert row["form"] in ("plain", "saving"), at
            assert row["batch"] == "full" or isinstance(row["batch"], int), at
            assert row["repeats"] >= 1 and row["limit_seconds"] > 0, at
        else:
            fits(row, ACCURACY, "method data ipc networks protocol seeds repeats")
            assert row["protocol"] in {*PROTOCOLS, "review", "review-transfer"}, at
            assert row["networks"] and (len(row["networks"]) == 1) == (table == "performance"), at
            assert row["seeds"] and all(type(seed) is int for seed in row["seeds"]) and row["repeats"] >= 1, at
            assert set(row.get("baselines", [])) <= {"random", "k-means", "random-soft"}, at
            assert set(row.get("variants", [])) <= {"hard", "plain"}, at
        assert row["method"] in METHODS or (row["method"] == "whole" and table == "performance"), at
        assert row["data"] in LOADERS and row["ipc"] >= 1, at
        judged = [n for n in row.get("networks", []) if not is_kernel(n)]
        assert set(row.get("networks", [])) <= {*judged, KERNEL}, at
        for name in [*judged, *([row["network"]] if "network" in row else [])]:
            assert network(name, *SHAPES[row["data"]]).name == name, f"{at}: not the name that results will have"


@each_suite
def test_recipes_exist_and_only_what_takes_steps_has_a_budget(suite: str) -> None:
    table = SUITES[suite]["table"]
    for row in SUITES[suite]["row"]:
        at = cell(table, row)
        if row["method"] == "whole":
            assert not {"minutes", "steps", "settings", "network"} & set(row), at
            continue
        preset = row.get("preset", "paper" if table == "cost" else "small")
        recipe = change(find(row["method"], preset, row["ipc"]), row.get("settings", {}))
        if table == "cost":
            assert recipe.objective is not None, at
            memory = getattr(recipe.objective, "memory", "plain")
            assert memory == {"plain": "plain", "saving": "adjoint"}[row["form"]], at
        elif recipe.objective is None:
            assert not {"minutes", "steps"} & set(row), at
        else:
            assert ("minutes" in row) != ("steps" in row), at
            assert row.get("minutes", 1.0) > 0 and row.get("steps", 1) > 0, at


@each_suite
def test_published_figures_are_fractions_with_source_and_mark(suite: str) -> None:
    for row in SUITES[suite]["row"]:
        if "published" in row:
            published, at = row["published"], cell("", row)
            fits(published, PUBLISHED, "accuracy source mark")
            assert 0 < published["accuracy"] < 1 and 0 <= published.get("spread", 0.0) < 0.1, at
            assert published["mark"] in ("read", "quoted", "remembered") and published["source"].strip(), at


# in percent, as printed
PRINTED = [
    ("review", "fashion-mnist/random/1", 51.4, 3.8, "read"),
    ("review", "fashion-mnist/k-center/10", 54.7, 1.5, "read"),
    ("review", "fashion-mnist/dsa/50", 88.7, 0.2, "read"),
    ("review", "fashion-mnist/dm/1", 70.7, 0.6, "quoted"),
    ("review", "fashion-mnist/dd/1", 83.4, 0.3, "remembered"),
    ("review", "fashion-mnist/whole/1", 93.5, 0.1, "read"),
    ("review", "mnist/dc/10", 97.4, 0.2, "read"),
    ("review", "mnist/frepo/1", 93.0, 0.4, "remembered"),
    ("review", "cifar10/dc/1", 28.3, 0.5, "read"),
    ("review", "cifar10/dm/10", 48.9, 0.6, "quoted"),
    ("review", "cifar10/mtt/50", 71.6, 0.2, "read"),
    ("review", "cifar10/frepo/10", 65.5, 0.4, "quoted"),
    ("review", "cifar10/kip/10", 46.5, None, "read"),
    ("review", "cifar10/random-soft/1", 21.1, None, "read"),
    ("review", "cifar100/mtt/1", 24.3, 0.3, "read"),
    ("review", "cifar100/herding/50", 33.7, None, "read"),
    ("review", "tiny-imagenet/dsa/10", 16.3, None, "read"),
    ("review", "tiny-imagenet/whole/1", 37.6, 0.4, "read"),
    ("review-transfer", "cifar10/dsa/10", 52.1, 0.4, "read"),
    ("review-transfer", "cifar10/mtt/10", 64.3, 0.7, "read"),
]


@pytest.mark.parametrize("suite, name, percent, spread, mark", PRINTED)
def test_published_figures_are_the_printed_ones(
    suite: str, name: str, percent: float, spread: float | None, mark: str
) -> None:
    (found,) = [row["published"] for row in SUITES[suite]["row"] if cell("", row) == name]
    assert found["accuracy"] == pytest.approx(percent / 100)
    assert found.get("spread") == (None if spread is None else pytest.approx(spread / 100))
    assert found["mark"] == mark


@pytest.mark.parametrize("name", ["cifar100/kip/50", "tiny-imagenet/frepo/50", "tiny-imagenet/dd/1", "mnist/k-means/1"])
def test_what_nobody_printed_is_left_out(name: str) -> None:
    (row,) = [row for row in SUITES["review"]["row"] if cell("", row) == name]
    assert "published" not in row


def test_findings_have_names_of_their_own() -> None:
    names = [finding.name for finding in FINDINGS]
    assert sorted(names) == sorted(set(names)) and len(names) > len(WRITTEN)


@pytest.mark.parametrize("finding", WRITTEN, ids=[f["name"] for f in WRITTEN])
def test_a_finding_has_the_fields_of_the_schema(finding: dict[str, Any]) -> None:
    fits(finding, FINDING, "name claim source table kind more than command")
    for key in finding.get("each", {}):
        assert f"{{{key}}}" in finding["name"], "each choice has a name of its own"
        assert f"{{{key}}}" in finding["claim"] or f"{{{key.upper()}}}" in finding["claim"], "and a claim"


@pytest.mark.parametrize("finding", FINDINGS, ids=[f.name for f in FINDINGS])
def test_a_finding_is_about_cells_that_its_command_measures(finding: findings.Finding) -> None:
    table = finding.table
    assert (
        finding.kind in {"performance": ("accuracy",), "transfer": ("accuracy",), "cost": ("seconds", "bytes")}[table]
    )
    assert finding.factor > 0 and (table == "cost" or finding.factor == 1)
    assert finding.claim.endswith(".") and finding.source.startswith("review, ") and "{" not in finding.claim
    parts = re.fullmatch(r"potstill benchmark ([a-z-]+) --only '([^']+)'(?: --networks ([\w,-]+))?", finding.command)
    assert parts is not None
    suite, only, networks = parts.groups()
    suites = [plain for stem, plain in SUITES.items() if stem == suite or stem.startswith(f"{suite}-")]
    cells = {cell(table, row): row for plain in suites if plain["table"] == table for row in plain["row"]}
    # the page adds `--networks` of the records, of which a table of performance takes one
    assert table != "transfer" or all(plain["table"] == table for plain in suites)
    sides = (*finding.more, *finding.than)
    assert len(set(sides)) == len(sides)
    for side in (part for name in sides for part in name.split(findings.LESS)):
        name, _, last = side.partition("@")
        name = name.removeprefix("transfer/") if table == "transfer" else name
        assert side.startswith({"performance": "", "transfer": "transfer/", "cost": "cost/"}[table])
        assert name in cells, f"{name} is no cell of {suite}"
        whole = side.partition("@")[0]
        assert fnmatch(whole, only), f"--only {only} leaves {whole} out"
        if table == "transfer":
            there = networks.split(",") if networks else cells[name]["networks"]
            assert last in there or last in {WIDTH.sub("", n) + ANY_WIDTH for n in there}
        elif table == "cost":
            assert last in {"seconds": ("step_seconds", "loss_seconds"), "bytes": ("peak_bytes",)}[finding.kind]
        else:
            assert last in ("", "gain")
            assert last == "" or "random" in cells[name].get("baselines", ()), "a gain needs random samples beside it"
