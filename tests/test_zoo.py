"""Sets that are reached by name: where they are found, what is said of them, and what the repository's zoo holds."""

import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_exchange import set_of

import potstill
from potstill import still, zoo
from potstill.arguments import parser
from potstill.asking import recipe_of
from potstill.checkpoint import Ask
from potstill.cli import counts_of, main, settings_of
from potstill.errors import PotstillError
from potstill.exchange import load
from potstill.places import find, folders, locate, names, shipped
from potstill.recipe import change, to_dict
from potstill.recipe import find as find_recipe
from potstill.recipe import read as read_recipe
from potstill.replay import Experts
from potstill.testing import toy
from potstill.training import PROTOCOLS

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "zoo"
CELLS = [str(file.parent.relative_to(ZOO)) for file in sorted(ZOO.glob("*/*/*/set.safetensors"))]
MIB = 2**20


@pytest.fixture(autouse=True)
def no_zoo_of_the_user(monkeypatch):
    monkeypatch.delenv("POTSTILL_ZOO", raising=False)


def put(folder, name, seed=0, **changed):
    """A set of the zoo; its inputs say which one it is."""
    place = folder / name
    place.mkdir(parents=True)
    made = set_of()
    made.meta = replace(made.meta, **changed)
    made.inputs = made.inputs + seed
    made.save(place / "set.safetensors")
    return place


def row(**changed):
    """A result as `evaluate` writes it, as far as a card reads it."""
    given = {"set": "a/b/1", "method": "dm", "images": 4, "network": "convnet-w8", "protocol": "dc", "accuracy_mean": 0.5,
             "accuracy_std": 0.01, "repeats": 5}  # fmt: skip
    return given | changed


def judged(place, *results):
    (place / "evaluation.json").write_text(json.dumps(results))


def recorded(place, *results, **more):
    sha = hashlib.sha256((place / "set.safetensors").read_bytes()).hexdigest()
    (place / "record.json").write_text(json.dumps({"set": {"sha256": sha}, "results": results, **more}))


# --- names


def test_a_name_is_its_path():
    for name in CELLS:
        assert find(name) == ZOO / name
        by_name, by_path = potstill.load(name), potstill.load(ZOO / name)
        assert torch.equal(by_name.inputs, by_path.inputs) and by_name.meta == by_path.meta
    assert list(names()) == [c.name for c in zoo.cells()] and set(names()) == set(CELLS)
    assert shipped("zoo") == ZOO and shipped("no/such") is None


def test_names_are_in_the_order_of_numbers(tmp_path):
    for name in ("b/x/1", "a/x/10", "a/x/2", "a/w/50"):
        put(tmp_path, name)
    assert [c.name for c in zoo.cells(tmp_path)] == ["a/w/50", "a/x/2", "a/x/10", "b/x/1"]


def test_a_path_that_is_there_wins(tmp_path, monkeypatch):
    name = CELLS[0]
    put(tmp_path, name, seed=7)
    monkeypatch.chdir(tmp_path)
    assert potstill.load(name).meta.data == "made" and potstill.load(f"{name}/").meta.data == "made"
    (tmp_path / name / "set.safetensors").unlink()
    with pytest.raises(PotstillError, match=f"no set at {name}/set.safetensors"):
        potstill.load(name)
    monkeypatch.chdir(tmp_path.parent)
    assert (
        potstill.load(name).meta.data
        == potstill.load(Path(name)).meta.data
        == potstill.load(f"{name}/").meta.data
        != "made"
    )


def test_the_folders_of_the_variable_come_first(tmp_path, monkeypatch):
    a, b, name = tmp_path / "a", tmp_path / "b", CELLS[0]
    put(a, "x/dm/1", seed=1), put(b, "x/dm/1", seed=2), put(b, "x/dm/2", seed=3), put(b, name, seed=4)
    (a / name).mkdir(parents=True)  # no set in it: looked for further on
    monkeypatch.setenv("POTSTILL_ZOO", f"{os.pathsep}{a}{os.pathsep}{b}")
    assert folders() == [a, b, ZOO]
    assert find("x/dm/1") == a / "x/dm/1" and find("x/dm/2") == b / "x/dm/2" and find(name) == b / name
    assert find(CELLS[1]) == ZOO / CELLS[1]
    assert {n: p for n, p in names().items() if n not in CELLS[1:]} == {n: find(n) for n in ("x/dm/1", "x/dm/2", name)}
    assert next(c for c in zoo.cells() if c.name == "x/dm/1").path == a / "x/dm/1"
    monkeypatch.setenv("POTSTILL_ZOO", str(tmp_path / "gone"))
    with pytest.raises(PotstillError, match="POTSTILL_ZOO names .*gone, which is no folder"):
        find("x/dm/1")
    put(tmp_path, "real/dm/1")
    assert len(load(tmp_path / "real/dm/1")) == 4, "who gives a path does not need the zoo"


@pytest.mark.parametrize(
    "name",
    ["../b/1", "a/../1", "a/dm/..", "/a/dm/1", "a//1", "a/dm/0", "a/dm/-1", "a/dm/1/2", "a/dm", "", ".", "~/dm/1", "a/dm/1\n", "a/d m/1",
     "a\\dm\\1", "C:/dm/1", ".git/dm/1", "a/\0/1", "é/dm/1", "a/dm/１", "x" * 5000, f"{'x' * 300}/dm/1", "a/$(id)/1", "a/dm/*", "?/dm/1"],
)  # fmt: skip
def test_strange_names_are_refused_in_one_line(tmp_path, monkeypatch, name):
    put(tmp_path, "outside/b/1"), put(tmp_path, "zoo/a/dm/1"), put(tmp_path, "zoo/dm/1")
    monkeypatch.setenv("POTSTILL_ZOO", str(tmp_path / "zoo"))
    with pytest.raises(PotstillError, match="is no name of a set: data/method/ipc is") as error:
        find(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    monkeypatch.chdir(tmp_path / "outside")
    if name not in (".", ""):
        with pytest.raises(PotstillError, match="no set at"):
            potstill.load(name)


def test_an_unknown_name_is_told_the_nearest(capsys):
    with pytest.raises(
        PotstillError, match=r"no set 'fashion-mnist/dmm/1'; did you mean 'fashion-mnist/dm/1'"
    ) as error:
        potstill.load("fashion-mnist/dmm/1")
    assert "`potstill list zoo` shows all" in str(error.value) and "POTSTILL_ZOO" in str(error.value)
    for command in (
        ["evaluate", "fashion-mnist/dmm/1"],
        ["export", "fashion-mnist/dmm/1", "--to", "npz", "--out", "x"],
    ):
        assert main(command) == 2
        line = capsys.readouterr().err.strip()
        assert line == f"potstill: {error.value}" and "\n" not in line
    assert main(["evaluate", "x" * 5000]) == 2
    assert "no set at xxx" in capsys.readouterr().err


def test_what_a_wheel_ships_is_found(tmp_path):
    """The package as it is installed: no checkout around it, `_zoo` and `_benchmarks` inside."""
    package = tmp_path / "site-packages" / "potstill"
    package.mkdir(parents=True)
    for file in ("__init__.py", "places.py", "errors.py"):
        shutil.copy(ROOT / "src" / "potstill" / file, package)
    (package / "_benchmarks").mkdir()
    put(package / "_zoo", "a/dm/1")
    put(tmp_path / "zoo", "b/dm/1")  # beside site-packages: not ours
    program = "import sys; from potstill.places import *; print(find('a/dm/1'), shipped('benchmarks'), list(names()), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site-packages")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(package / "_zoo/a/dm/1"), str(package / "_benchmarks"), "['a/dm/1']", "False"], (
        done.stderr
    )


# --- what is known of a set


def test_a_cell_says_what_the_set_and_its_results_say(tmp_path):
    place = put(tmp_path, "a/b/1")
    (cell,) = zoo.cells(tmp_path)
    size = (place / "set.safetensors").stat().st_size
    assert cell == zoo.Cell("a/b/1", place, "made", "dm", (1, 2, 1), 4, "convnet-w8", "dc", size, None)
    assert zoo.rows([cell])[1] == ("a/b/1", "4", "convnet-w8", "dc", "", "", f"{size:,}")
    recorded(place, row(set="this set", accuracy_mean=0.3), row(set="random real", method="random", accuracy_mean=0.9))
    assert zoo.cells(tmp_path)[0].score == zoo.Score("convnet-w8", "dc", 0.3, 0.01, 5)
    judged(place, row(network="mlp", accuracy_mean=0.6), row(accuracy_mean=0.7))
    (cell,) = zoo.cells(tmp_path)
    assert cell.score == zoo.Score("convnet-w8", "dc", 0.7, 0.01, 5), "the network that it asks for, judged last"
    assert zoo.rows([cell])[1][2:6] == ("convnet-w8", "dc", "70.0 % ± 1.0", "5")
    text = zoo.card(place)
    for line in ("| this set | convnet-w8 | dc | 70.0 % ± 1.0 | 5 |", "| this set | mlp | dc | 60.0 % ± 1.0 | 5 |",
                 "| random real | convnet-w8 | dc | 90.0 % ± 1.0 | 5 |"):  # fmt: skip
        assert line in text
    assert "30.0 %" not in text and "Not measured" not in text
    judged(place, row(network="mlp", repeats=1, accuracy_std=0.0))
    recorded(place)
    assert zoo.rows(zoo.cells(tmp_path))[1][2:6] == ("mlp", "dc", "50.0 %", "1")


def test_a_baseline_is_never_taken_for_the_set(tmp_path):
    place = put(tmp_path, "a/random/1", method="random")
    rows = [row(method="random", accuracy_mean=0.4), row(set="random real", method="random", accuracy_mean=0.8),
            row(set="whole training set", method="whole", protocol="whole", accuracy_mean=0.9, images=30)]  # fmt: skip
    judged(place, *rows)
    assert zoo.cells(tmp_path)[0].score.mean == 0.4
    assert [zoo.card(place).count(f"| {who} |") for who in ("this set", "random real", "whole training set")] == [
        1,
        1,
        1,
    ]
    judged(place, rows[2])
    assert zoo.cells(tmp_path)[0].score is None
    judged(place, row(method="random", images=10))
    assert zoo.cells(tmp_path)[0].score is None, "another set's"


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"a": 1}', '["x"]', json.dumps([row(accuracy_mean="<b>")]), json.dumps([row(network=3)])]
)
def test_results_that_are_none_are_no_results(tmp_path, text):
    place = put(tmp_path, "a/b/1")
    (place / "evaluation.json").write_text(text)
    (place / "record.json").write_text(json.dumps({"set": {"sha256": "0"}, "results": [row()]}))  # another set's record
    assert zoo.cells(tmp_path)[0].score is None and "Not measured here" in zoo.card(place)


def test_departures_are_exactly_what_was_changed():
    paper = find_recipe("dm", "paper")
    assert zoo.departures(to_dict(paper), 1) == []
    changed = to_dict(replace(change(paper, {"objective.real": 64, "init": "noise", "final": 0.5}), preset="small"))
    assert sorted(zoo.departures(changed, 1)) == [
        ("final", "0.5", "1.0"), ("init", '"noise"', '"real"'), ("objective.real", "64", "256"),
    ]  # fmt: skip
    older = {k: v for k, v in changed.items() if k not in ("space", "final", "labels")}
    assert len(zoo.departures(older, 1)) == 2, "a field that did not exist had its default"
    dc = to_dict(find_recipe("dc", "paper", 10))
    assert zoo.departures(dc, 10) == [] != zoo.departures(dc, 1), "the paper's numbers at this many images per class"


def test_code_from_outside_is_not_run_for_a_card(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = {"method": "bad:recipe", "objective": {"kind": "bad:Objective"}, "source": 3}
    for strange in (recipe, {"method": ["dm"]}, to_dict(find_recipe("dm")) | {"method": "bad:recipe"}):
        assert zoo.departures(strange, 1) is None
    place = put(tmp_path / "zoo", "a/b/1", method="bad:recipe", recipe=recipe)
    text = zoo.card(place)
    assert "Method `bad:recipe`" in text and "departs" not in text and "unchanged" not in text


def test_cards_are_written_over_what_was_there(tmp_path):
    first, second = put(tmp_path, "a/b/1"), put(tmp_path, "a/b/2", data="cifar10-jpeg75")
    recorded(first, command="potstill distill x\n```\n# h", data={"train": 54000, "heldout": 6000})
    (first / "README.md").write_text("old")
    files = zoo.write_cards(tmp_path)
    assert set(files) == {first / "README.md", second / "README.md", tmp_path / "README.md"}
    assert (first / "README.md").read_text() == zoo.card(first) and "\n# h" not in zoo.card(first)
    assert "54,000 training samples; 6,000 more" in zoo.card(first) and str(tmp_path) not in zoo.card(first)
    assert (
        "Not known" in zoo.card(first)
        and "JPEG of quality 75" in zoo.card(second)
        and "license: unknown" in zoo.card(second)
    )
    before = {f: f.read_bytes() for f in files}
    assert main(["export", str(first), "--to", "npz", "--out", str(tmp_path / "a.npz")]) == 0
    done = subprocess.run([sys.executable, "-m", "potstill.zoo", str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == f"3 files in {tmp_path}\n" and {f: f.read_bytes() for f in files} == before, done.stderr
    with pytest.raises(PotstillError, match="no folder"):
        zoo.write_cards(tmp_path / "gone")
    put(tmp_path, "elsewhere")
    with pytest.raises(PotstillError, match="is no place in a zoo"):
        zoo.card(tmp_path / "elsewhere")


# --- the commands


def test_list_zoo(capsys):
    assert main(["list", "zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["set", "images", "network", "protocol", "accuracy", "networks", "bytes"]
    assert [line.split()[0] for line in lines[1:]] == list(names())
    size = (ZOO / "fashion-mnist/dm/10/set.safetensors").stat().st_size
    line = next(line for line in lines if line.startswith("fashion-mnist/dm/10 "))
    assert line.split()[1:4] == ["100", "convnet", "dsa"] and line.endswith(f"{size:,}")
    assert main(["list", "zo"]) == 2 and "did you mean 'zoo'" in capsys.readouterr().err


def test_evaluate_and_export_take_names(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=2))
    monkeypatch.setitem(PROTOCOLS, "dsa", replace(PROTOCOLS["dsa"], epochs=2, steps=0))
    out, results = tmp_path / "zoo" / "digits" / "random" / "1", tmp_path / "r.json"
    potstill.distill("digits", "random", ipc=1, evaluate=False, out=out)
    monkeypatch.setenv("POTSTILL_ZOO", str(tmp_path / "zoo"))
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "digits/random/1", "--networks", "mlp-w8", "--repeats", "2", "--json", str(results)]
    assert main(command) == 0 and "digits/random/1" in capsys.readouterr().out
    (by_name,) = json.loads(results.read_text())
    assert by_name["set"] == "digits/random/1" and by_name["images"] == 10
    assert main(["evaluate", "zoo/digits/random/1", *command[2:]]) == 0, "and paths, as before"
    assert json.loads(results.read_text())[0]["accuracies"] == by_name["accuracies"]
    shutil.copy(results, out / "evaluation.json")
    assert next(c for c in zoo.cells() if c.name == "digits/random/1").score.mean == by_name["accuracy_mean"]
    capsys.readouterr()
    assert main(["export", "fashion-mnist/dm/1", "--to", "npz", "--out", "a"]) == 0
    with np.load(tmp_path / "a" / "set.npz") as file:
        assert np.array_equal(file["x_train"], load(ZOO / "fashion-mnist/dm/1").inputs.numpy())
    card = (tmp_path / "a" / "README.md").read_text()
    mean = 100 * next(c for c in zoo.cells() if c.name == "fashion-mnist/dm/1").score.mean
    assert f"| this set | convnet | dsa | {mean:.1f} %" in card and "© 2017 Zalando SE" in card


# --- the repository's zoo


def test_there_is_a_zoo():
    assert len(CELLS) >= 10 and all(len(Path(name).parts) == 3 for name in CELLS)
    folders_ = {str(p.relative_to(ZOO)) for p in ZOO.glob("*/*/*") if p.is_dir()}
    assert folders_ == set(CELLS), "a folder without a set"


@pytest.mark.parametrize("name", CELLS)
def test_a_set_of_the_zoo_is_complete_and_is_what_its_name_says(name):
    place, made = ZOO / name, load(ZOO / name)
    there = {p.name for p in place.iterdir()}
    assert there - {"evaluation.json"} == {"set.safetensors", "record.json", "recipe.toml", "grid.png", "README.md"}
    assert f"{made.meta.data}/{made.meta.method}/{made.meta.ipc[0]}" == name and len(set(made.meta.ipc)) == 1
    assert made.meta.transform["name"] in ("standardise", "zca"), "a whitening matrix is made from the training data"
    assert tomllib.loads((place / "recipe.toml").read_text()) == made.meta.recipe
    record = json.loads((place / "record.json").read_text())
    assert record["set"]["sha256"] == hashlib.sha256((place / "set.safetensors").read_bytes()).hexdigest()
    assert record["data"]["heldout"] > 0 and record["data"]["fingerprint"] == made.meta.fingerprint
    for file in place.glob("*.json"):
        assert not re.search(r'"(/|~|[A-Z]:)[^"\s]', file.read_text()), "an absolute path"


@pytest.mark.parametrize("name", CELLS)
def test_the_command_of_a_set_has_its_recipe(name, monkeypatch):
    """As a shell and the command line read it."""
    record = json.loads((ZOO / name / "record.json").read_text())
    args = parser().parse_args(shlex.split(record["command"])[1:])
    shape = (3, 32, 32) if name.startswith("cifar10") else (1, 28, 28)
    data = replace(toy(shape=shape, sizes=(11,) * 10), mirror=True)
    monkeypatch.setattr(Experts, "check", lambda *_: None)  # the recordings are not here
    ask = Ask(args.method, counts_of(args.ipc), args.steps, None, args.preset, args.network, args.init, None, settings_of(args.set))  # fmt: skip
    assert recipe_of(ask, data, lambda line: None) == read_recipe(ZOO / name / "recipe.toml")


@pytest.mark.parametrize("name", CELLS)
def test_the_accuracy_of_a_set_is_that_of_its_networks(name):
    (cell,) = (c for c in zoo.cells() if c.name == name)
    evaluation = ZOO / name / "evaluation.json"
    results = (
        json.loads(evaluation.read_text())
        if evaluation.exists()
        else json.loads((ZOO / name / "record.json").read_text())["results"]
    )
    own = next(r for r in results if (r["network"], r["protocol"]) == (cell.score.network, cell.score.protocol))
    assert cell.score.mean == pytest.approx(np.mean(own["accuracies"]), abs=1e-6)
    assert cell.score.std == pytest.approx(np.std(own["accuracies"]), abs=1e-6) and cell.score.repeats == len(
        own["accuracies"]
    )
    assert cell.score.protocol == cell.protocol and own["method"] == cell.method and own["images"] == cell.images


@pytest.mark.parametrize("name", CELLS)
def test_the_numbers_of_a_set_are_of_the_protocols_as_they_are(name):
    """A protocol that has been put right makes old numbers void."""
    evaluation = ZOO / name / "evaluation.json"
    known = (
        json.loads(evaluation.read_text())
        if evaluation.exists()
        else json.loads((ZOO / name / "record.json").read_text())["results"]
    )
    assert known
    for row in known:
        assert row["protocol_hash"] == PROTOCOLS[row["protocol"]].hash, row["set"]


@pytest.mark.parametrize("name", CELLS)
def test_the_card_in_the_zoo_is_what_the_code_makes(name, monkeypatch, tmp_path):
    text = (ZOO / name / "README.md").read_text()
    assert text == zoo.card(ZOO / name), "python -m potstill.zoo zoo"
    said = "JPEG of quality 75, not the original" if name.startswith("cifar10-jpeg75") else "under the MIT licence"
    assert said in text and ("license: mit" in text) == name.startswith("fashion-mnist")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card.py").write_text(text.split("```python\n")[1].split("```")[0])
    room = runpy.run_path(str(tmp_path / "card.py"))
    assert room["x"].shape == room["set_"].shape and len(room["set_"]) > 0
    assert f"$ potstill evaluate {name} " in text and f"{(ZOO / name / 'set.safetensors').stat().st_size:,}" in text


def test_the_page_of_the_zoo_is_what_the_code_makes():
    text = (ZOO / "README.md").read_text()
    assert text == zoo.index(zoo.cells(ZOO)), "python -m potstill.zoo zoo"
    for name in CELLS:
        assert text.count(f"| [{name}]({name}/README.md) |") == 1
    assert "JPEG of quality 75" in text and "Zalando" in text


def test_the_readme_has_the_numbers_of_the_zoo():
    """Sets and random samples, in both of its tables; the latter may have been drawn beside another set of the size."""
    heads, seen, rows_of = {}, set(), {}
    for name in CELLS:
        file, record = ZOO / name / "evaluation.json", json.loads((ZOO / name / "record.json").read_text())
        rows_of[name] = [*(json.loads(file.read_text()) if file.exists() else []), *record["results"]]
    for line in (ROOT / "README.md").read_text().splitlines():
        boxes = [box.strip() for box in line.strip("|").split("|")]
        if line.startswith("| data | method |"):
            heads = {head: i for i, head in enumerate(boxes)}
        elif not line.startswith("|"):
            heads = {}
        if not heads or not boxes[heads["images"]].isdigit() or "(127 steps here)" in line:
            continue
        data = "fashion-mnist" if boxes[heads["data"]] == "Fashion-MNIST" else "cifar10-jpeg75"
        name = f"{data}/{boxes[heads['method']].strip('`')}/{int(boxes[heads['images']]) // 10}"
        recipe = json.loads((ZOO / name / "record.json").read_text())["recipe"]
        alike = [n for n in CELLS if (n.split("/")[0], n.split("/")[2]) == (data, name.split("/")[2])]
        rows = [*rows_of[name], *(r for n in alike for r in rows_of[n] if r["method"] == "random")]
        network = boxes[heads["student"]].strip("`") if "student" in heads else "convnet"
        protocol = "kip" if network.startswith("mlp") else recipe["protocol"]
        rows = [r for r in rows if (r["network"], r["protocol"]) == (network, protocol)]
        for box, method in (("accuracy", recipe["method"]), ("random real, same protocol", "random")):
            if boxes[heads[box]]:
                shown = {f"{100 * r['accuracy_mean']:.1f}" + (f" ± {100 * r['accuracy_std']:.1f}" if r["repeats"] > 1 else "") for r in rows if r["method"] == method}  # fmt: skip
                assert boxes[heads[box]] in shown, (name, box)
                seen.add((name, network, method))
    assert len([s for s in seen if s[2] != "random"]) >= 27 and len(seen) >= 40


def test_the_zoo_is_small():
    assert sum(p.stat().st_size for p in ZOO.rglob("*") if p.is_file()) < 20 * MIB
    assert not [
        p
        for p in ZOO.rglob("*")
        if p.is_symlink() or p.suffix not in ("", ".json", ".toml", ".png", ".md", ".safetensors")
    ]


def test_names_in_the_documentation_are_there():
    """A cell of a table of costs, cost/fashion-mnist/..., is no set."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    said = [
        n
        for p in pages
        for n in re.findall(r"(?<!cost/)\b(?:(?:fashion-mnist|cifar10-jpeg75)/[a-z]+/[0-9]+)\b", p.read_text())
    ]
    assert len(said) >= 3 and all(locate(n) for n in said)


# --- the wheel


def test_the_wheel_ships_the_sets_of_one_image_per_class(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; pip install hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        there = archive.namelist()
        archive.extractall(tmp_path / "site")
    sets = [
        n.removeprefix("potstill/_zoo/").removesuffix("/set.safetensors") for n in there if n.endswith(".safetensors")
    ]
    assert sorted(sets) == sorted(n for n in CELLS if n.endswith("/1"))
    assert {n.split("/")[4] for n in there if n.startswith("potstill/_zoo/")} == {"1"}
    rows = {
        str(p.relative_to(ROOT / "benchmarks" / "rows"))
        for p in (ROOT / "benchmarks" / "rows").rglob("*")
        if p.is_file()
    }
    assert {
        n.removeprefix("potstill/_benchmarks/rows/") for n in there if n.startswith("potstill/_benchmarks/rows/")
    } == rows
    assert {"potstill/__init__.py", "potstill/py.typed", "potstill/templates/run.html.j2"} <= set(there)
    assert not [n for n in there if n.split("/")[0] not in ("potstill", f"potstill-{potstill.__version__}.dist-info")]
    assert wheel.stat().st_size < 10 * MIB
    for name in sets:
        assert (tmp_path / "site/potstill/_zoo" / name / "set.safetensors").read_bytes() == (
            ZOO / name / "set.safetensors"
        ).read_bytes()
        assert max(load(tmp_path / "site/potstill/_zoo" / name).meta.ipc) == 1
