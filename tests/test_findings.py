"""Findings: verdicts from numbers whose answer is known."""

from dataclasses import replace

import pytest

from potstill.errors import PotstillError
from potstill.findings import Finding, judge, read


def cell(values, network="convnet", chance=()):
    rows = [{"role": "set", "variant": "own", "network": network, "accuracies": values, "labels": "hard"}]
    rows += [{**rows[0], "role": "random", "accuracies": list(chance)}] if chance else []
    return {"status": "done", "results": rows}


def cost(status="done", **values):
    return {"status": status, **values}


CELLS = {
    "d/a/1": cell([0.80, 0.81, 0.82], chance=[0.5, 0.51, 0.52]),
    "d/a/10": cell([0.90, 0.91, 0.92], chance=[0.8, 0.8, 0.81]),
    "d/b/1": cell([0.70, 0.71, 0.72], chance=[0.2, 0.45, 0.7]),
    "d/c/1": cell([0.60, 0.81, 0.95]),
    "transfer/d/a/1": cell([0.3, 0.31, 0.32], "mlp"),
    "d/failed/1": {"status": "failed", "results": []},
    "cost/d/a/1/plain": cost(step_seconds=1.0, loss_seconds=0.5, peak_bytes=2**30),
    "cost/d/b/1/plain": cost(step_seconds=1.05, loss_seconds=0.9, peak_bytes=2**20),
    "cost/d/c/1/plain": cost("out of memory", step_seconds=None),
    "cost/d/e/1/plain": cost("out of time", step_seconds=None),
}


def taught(values, hard, soft):
    """A cell whose labels are learned, with both kinds of random samples."""
    rows = [{"role": "set", "variant": "own", "network": "convnet", "accuracies": values, "labels": "soft"}]
    rows += [{**rows[0], "role": "random", "labels": "hard", "accuracies": hard}]
    rows += [{**rows[0], "role": "random-soft", "accuracies": soft}] if soft else []
    return {"status": "done", "results": rows}


def test_a_gain_is_over_the_baseline_that_the_table_takes_and_one_for_both_sides():
    cells = {
        "d/a/1": taught([0.8, 0.81], [0.3, 0.31], [0.7, 0.71]),
        "d/a/10": taught([0.8, 0.82], [0.7, 0.71], [0.6, 0.61]),
        "d/b/10": taught([0.8, 0.82], [0.7, 0.71], []),
    }
    asked = Finding("n", "c", "s", "accuracy", ("d/a/1@gain",), ("d/a/10@gain",), "command")
    found = judge(asked, cells)
    assert found["verdict"] == "refuted" and "d/a/1@gain: 10.0 points over random, soft labels" in found["numbers"]
    mixed = judge(replace(asked, than=("d/b/10@gain",)), cells)
    assert mixed["verdict"] == "confirmed" and "d/a/1@gain: 50.0 points, d/b/10@gain: 10.5 points" in mixed["numbers"]

    # what was not measured has no say in it, and both parts of a difference have
    gone = judge(replace(asked, than=("d/a/10@gain", "d/c/10@gain")), {**cells, "d/c/10": {"status": "failed", "results": []}})  # fmt: skip
    assert "10.0 points over random, soft labels" in gone["numbers"]
    less = judge(replace(asked, more=("d/a/1@gain less d/b/10@gain",), than=("d/a/1@gain less d/a/1@gain",)), cells)
    assert less["verdict"] != "not measured" and "d/a/1@gain less d/b/10@gain: 39.5 points" in less["numbers"]


def test_one_number_a_side_is_no_test():
    cells = {"d/a/1": cell([0.8]), "d/b/1": cell([0.3])}
    found = judge(Finding("n", "c", "s", "accuracy", ("d/a/1",), ("d/b/1",), "command"), cells)
    assert found["verdict"] == "not resolvable" and "too few for a test" in found["numbers"]


@pytest.mark.parametrize(
    ("kind", "more", "than", "factor", "verdict"),
    [
        ("accuracy", ["d/a/1"], "d/b/1", 1, "confirmed"),
        ("accuracy", ["d/b/1"], "d/a/1", 1, "refuted"),
        ("accuracy", ["d/c/1"], "d/b/1", 1, "not resolvable"),
        ("accuracy", ["d/a/1", "d/c/1"], "d/b/1", 1, "not resolvable"),
        ("accuracy", ["d/a/1", "transfer/d/a/1@mlp"], "d/b/1", 1, "refuted"),
        ("accuracy", ["d/failed/1"], "d/b/1", 1, "not measured"),
        ("accuracy", ["d/a/1@gain"], "d/a/10@gain", 1, "confirmed"),
        ("accuracy", ["d/b/1@gain"], "d/a/10@gain", 1, "not resolvable"),  # random samples have a spread of their own
        ("accuracy", ["transfer/d/a/1@resnet18"], "d/b/1", 1, "not measured"),
        ("seconds", ["cost/d/b/1/plain@step_seconds"], "cost/d/a/1/plain@step_seconds", 1, "not resolvable"),
        ("seconds", ["cost/d/b/1/plain@loss_seconds"], "cost/d/a/1/plain@loss_seconds", 1, "confirmed"),
        ("seconds", ["cost/d/b/1/plain@loss_seconds"], "cost/d/a/1/plain@loss_seconds", 3, "refuted"),
        ("bytes", ["cost/d/a/1/plain@peak_bytes"], "cost/d/b/1/plain@peak_bytes", 100, "confirmed"),
        ("bytes", ["cost/d/c/1/plain@peak_bytes"], "cost/d/a/1/plain@peak_bytes", 1, "confirmed"),
        ("bytes", ["cost/d/c/1/plain@peak_bytes"], "cost/d/c/1/plain@peak_bytes", 1, "not resolvable"),
        ("bytes", ["cost/d/e/1/plain@peak_bytes"], "cost/d/a/1/plain@peak_bytes", 1, "not measured"),
        ("seconds", ["cost/d/e/1/plain@step_seconds"], "cost/d/a/1/plain@step_seconds", 1, "confirmed"),
        ("seconds", ["cost/d/c/1/plain@step_seconds"], "cost/d/a/1/plain@step_seconds", 1, "not measured"),
        ("bytes", ["cost/d/none/1/plain@peak_bytes"], "cost/d/a/1/plain@peak_bytes", 1, "not measured"),
    ],
)
def test_verdicts(kind, more, than, factor, verdict):
    found = judge(Finding("n", "c", "s", kind, tuple(more), (than,), "command", factor=factor), CELLS)
    assert found["verdict"] == verdict, found["numbers"]
    other = {"seconds": "/c/", "bytes": "/e/"}.get(kind, "failed")  # the limit that says nothing of these
    missing = any(word in "".join([*more, than]) for word in ("none", "failed", "resnet18", other))
    assert ("not measured" in found["numbers"]) == (verdict == "not measured") == missing


def test_networks_of_any_width_are_compared_at_the_greatest_that_all_have():
    """A name without a width is the full one; one that was measured at no width is missing, and the others are told at theirs."""

    def at(**widths):
        return {"status": "done", "results": [row for n, v in widths.items() for row in cell(v, n.replace("_", "-"))["results"]]}  # fmt: skip

    cells = {
        "t/a": at(vgg11_w8=[0.1, 0.11], vgg11_w16=[0.5, 0.51], vgg11=[0.9, 0.91], vgg11_batch_w32=[0.7, 0.71]),
        "t/b": at(vgg11_w8=[0.2, 0.21], vgg11_w16=[0.3, 0.31], vgg11_w9_d2=[0.6, 0.6]),
        "t/c": at(vgg11=[0.2, 0.21], resnet18_w8=[0.4, 0.4]),
        "t/d": at(vgg11_w4=[0.2, 0.21]),
    }

    def verdict(*more, than):
        found = judge(Finding("n", "c", "s", "accuracy", more, (than,), "command"), cells)
        return found["verdict"], found["numbers"]

    said, numbers = verdict("t/a@vgg11-w*", than="t/b@vgg11-w*")
    assert said == "confirmed" and numbers.startswith("t/a@vgg11-w16: 50.5 %, t/b@vgg11-w16: 30.5 %")
    said, numbers = verdict("t/a@vgg11-w*", than="t/c@vgg11-w*")
    assert said == "confirmed" and numbers.startswith("t/a@vgg11: 90.5 %, t/c@vgg11: 20.5 %")
    assert verdict("t/a@vgg11-w*", than="t/d@vgg11-w*")[1] == "not measured at one width: t/a@vgg11-w*, t/d@vgg11-w*"
    unfinished = {**cells, "t/b": {**cells["t/b"], "status": "running"}}
    assert judge(Finding("n", "c", "s", "accuracy", ("t/b@vgg11-w*",), ("t/a@vgg11-w*",), "x"), unfinished)["verdict"] == "not measured"  # fmt: skip
    assert verdict("t/a@vgg11-w*", than="t/none@vgg11-w*")[1] == "not measured: t/none@vgg11-w*"
    said, numbers = verdict("t/a@vgg11-w*", "t/none@vgg11-w*", than="t/b@vgg11-w*")
    assert said == "not measured" and "w16: 50.5" in numbers and numbers.endswith("not measured: t/none@vgg11-w*")
    numbers = verdict("t/a@vgg11-w*", "t/c@vgg11-w*", "t/d@vgg11-w*", than="t/a@vgg11-w*")[1]
    assert "t/c@vgg11: 20.5" in numbers, "each comparison has a width of its own"


def test_a_file_of_findings_and_what_may_be_wrong_in_it(tmp_path):
    good = '[[finding]]\nname = "n"\nclaim = "c"\nsource = "s"\nkind = "bytes"\nmore = "a"\nthan = "b"\ncommand = "x"\n'
    file = tmp_path / "f.toml"
    file.write_text(good)
    (found,) = read(file)
    assert (found.more, found.than) == (("a",), ("b",)) and found.factor == 1
    for text, words in (
        (good.replace("bytes", "byte"), "no kind 'byte'; did you mean 'bytes'"),
        (good + "colour = 1\n", "no field 'colour'"),
        (good.replace('than = "b"\n', ""), "than is missing"),
        ("[[finding", "cannot be read"),
        (good.replace('"a"', '"a less b"'), "compared with another difference only"),
        (good + 'each = { m = "dd" }\n', "lists by name are needed"),
        (
            good.replace('"a"', '"{method}"') + 'each = { m = ["dd"] }\n',
            "'method' in braces is nothing that it is for each of",
        ),
        (good.replace('"a"', "3"), "names of cells"),
        (good.replace('"a"', "[]"), "names of cells"),
        (good.replace('"a"', '"a less b"').replace('"b"', '"c less d"'), "of accuracies, is compared"),
        (good.replace('"a"', '"{m.x}"') + 'each = { m = ["dd"] }\n', "in braces is nothing"),
    ):
        file.write_text(text)
        with pytest.raises(PotstillError, match=words):
            read(file)


def test_a_row_for_each_choice_is_as_many_findings(tmp_path):
    file = tmp_path / "f.toml"
    file.write_text(
        '[[finding]]\nname = "{m}-{n}"\nclaim = "{M} on {n}"\nsource = "s"\nkind = "accuracy"\neach = { m = ["dd", "frepo"], n = ["1", "10"] }\n'
        'more = ["d/{m}/{n}"]\nthan = "d/random/{n}"\ncommand = "x"\n[[finding]]\nname = "one"\nclaim = "{as it is}"\nsource = "s"\n'
        'kind = "bytes"\nmore = "a"\nthan = ["b", "c"]\ncommand = "x"\n'
    )
    found = read(file)
    assert [f.name for f in found] == ["dd-1", "dd-10", "frepo-1", "frepo-10", "one"] and found[2].claim == "FRePo on 1"
    assert found[1].claim == "DD on 10" and (found[1].more, found[1].than) == (("d/dd/10",), ("d/random/10",))
    assert found[4].claim == "{as it is}" and found[4].than == ("b", "c")


def test_differences_are_compared_part_by_part_at_a_width_each_has():
    """What DD loses from one network to another against what DM does: narrow networks with narrow, wide with wide."""

    def at(**widths):
        return {"status": "done", "results": [row for n, v in widths.items() for row in cell(v, n.replace("_", "-"))["results"]]}  # fmt: skip

    cells = {
        "t/dd": at(convnet_w16=[0.8, 0.82], convnet=[0.9, 0.9], vgg11_w8=[0.5, 0.52]),
        "t/dm": at(convnet_w16=[0.7, 0.72], vgg11_w8=[0.65, 0.66], vgg11=[0.1, 0.1]),
    }
    pair = ("t/dd@convnet-w* less t/dd@vgg11-w*",), ("t/dm@convnet-w* less t/dm@vgg11-w*",)
    found = judge(Finding("n", "c", "s", "accuracy", *pair, "command", note="why"), cells)
    assert found["verdict"] == "confirmed" and found["note"] == "why"
    assert found["numbers"].startswith(
        "t/dd@convnet-w16 less t/dd@vgg11-w8: 30.0 points, t/dm@convnet-w16 less t/dm@vgg11-w8: 5.5 points"
    )
    assert judge(Finding("n", "c", "s", "accuracy", *reversed(pair), "command"), cells)["verdict"] == "refuted"
    missing = judge(Finding("n", "c", "s", "accuracy", pair[0], ("t/dm@convnet-w* less t/dm@resnet18-w*",), "x"), cells)
    assert missing["verdict"] == "not measured" and "resnet18-w*" in missing["numbers"]


def test_the_command_has_the_options_that_the_cells_were_measured_with():
    def by(options):
        return {
            **cell([0.5, 0.6]),
            "command": f"potstill benchmark rows/review.toml --only 'd/*/1' {options} --out 'a b'",
        }

    cells = {"d/a/1": by("--networks convnet-w32 --precision bf16 --no-zoo"), "d/b/1": by("--precision bf16 --networks convnet-w16 --no-zoo")}  # fmt: skip
    found = judge(Finding("n", "c", "s", "accuracy", ("d/a/1",), ("d/b/1",), "potstill benchmark review"), cells)
    assert found["command"] == "potstill benchmark review --precision bf16 --no-zoo"
    for words, shown in (("--data 'c=$POTSTILL_DATA/x'", "it --data c=$POTSTILL_DATA/x"), ("--data 'c=a b'", "it --data 'c=a b'"), ("--data 'open", "it")):  # fmt: skip
        one = {"d/a/1": {**cell([0.5, 0.6]), "command": f"potstill benchmark review --only d/a/1 {words}"}}
        assert judge(Finding("n", "c", "s", "accuracy", ("d/a/1",), ("d/y/1",), "it"), one)["command"] == shown
    assert judge(Finding("n", "c", "s", "accuracy", ("d/x/1",), ("d/y/1",), "it"), cells)["command"] == "it"
    own = Finding("n", "c", "s", "accuracy", ("d/a/1",), ("d/b/1",), "it --precision fp32")
    assert judge(own, cells)["command"] == "it --precision fp32 --no-zoo", "what the command says itself stays"
