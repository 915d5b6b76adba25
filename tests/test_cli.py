"""The command line as a user meets it: every mistake one line on standard error and exit code 2, nothing lost."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib

import numpy as np
import pytest

import potstill
from potstill import still
from potstill.cli import counts_of, main, settings_of
from potstill.testing import toy
from potstill.training import PROTOCOLS

FAST = ["--set", "objective.real=8", "--set", "looks=1", "--network", "convnet-w8", "--steps", "6"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=5))
    for name in ("dc", "dsa", "whole"):
        monkeypatch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], epochs=5, steps=0))


@pytest.fixture
def npz(tmp_path):
    data = toy()
    arrays = {
        "x_train": data.train.inputs,
        "y_train": data.train.labels,
        "x_test": data.test.inputs,
        "y_test": data.test.labels,
    }
    np.savez(tmp_path / "toy.npz", **{k: v.numpy() for k, v in arrays.items()})
    return str(tmp_path / "toy.npz")


def refused(capsys, *arguments, code=2):
    """The one line of a refused command."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("potstill: ") and "\n" not in error and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["distill", "digits", "--method", "dsn"],
            "no method 'dsn'; did you mean 'dsa'? `potstill list methods` shows all",
        ),
        (["distill", "digit"], "did you mean 'digits'?"),
        (["distill", "no/such/file.npz"], "no file no/such/file.npz"),
        (["distill", "digits", "--network", "convnte"], "did you mean 'convnet'?"),
        (["distill", "digits", "--network", "convnet-d9"], "convnet depth 9 is too deep for 8 x 8 pixels; at most 3"),
        (["distill", "digits", "--set", "protocol=dca"], "no protocol 'dca'; did you mean"),
        (["distill", "digits", "--set", "objective.reel=3"], "did you mean 'objective.real'?"),
        (["distill", "digits", "--set", "steps"], "--set 'steps' is not of the form path=value"),
        (["distill", "digits", "--init", "nois"], "did you mean 'noise'?"),
        (["distill", "digits", "--preset", "papr"], "did you mean 'paper'?"),
        (["distill", "digits", "--ipc", "0"], "--ipc 0 is not a number of images; at least 1 per class"),
        (["distill", "digits", "--ipc", "-3"], "--ipc -3 is not"),
        (["distill", "digits", "--ipc", "many"], "--ipc 'many' is not a whole number"),
        (["distill", "digits", "--ipc", "5000"], "--ipc 5000 is more than the"),
        (["distill", "digits", "--ipc", "1,2"], "--ipc has 2 numbers for 10 classes"),
        (["distill", "digits", "--steps", "3", "--minutes", "1"], "--steps and --minutes exclude each other"),
        (["distill", "digits", "--steps", "-1"], "--steps -1 is below 0"),
        (["distill", "digits", "--minutes", "0"], "--minutes 0 is not a time"),
        (["distill", "digits", "--holdout", "0.9"], "--holdout 0.9 is not between 0 and 0.5"),
        (["distill", "digits", "--device", "cuda:7"], "--device 'cuda:7' is not usable here"),
        (["distill", "digits", "--precision", "fp8"], "no precision 'fp8'"),
        (["distill", "digits", "--compile", "yes"], "--compile 'yes'"),
        (["distill", "digits", "--repeats", "0"], "--repeats 0 is below 1"),
        (["distill", "digits", "--recipe", "no.toml"], "--recipe no.toml cannot be read"),
        (["distill", "digits", "--method", "nowhere:recipe"], "cannot be imported"),
        (["distill", "digits", "--stpes", "3"], "--stpes"),
        (["distill"], "required: data"),
        (["distil", "digits"], "distil"),
        (["evaluate", "no/such/set"], "no set at no/such/set"),
        (["list", "method"], "did you mean 'methods'?"),
        (["distill", "digits", "--method", ":x"], "cannot be imported"),
        (["distill", "digits", "--method", ".x:y"], "cannot be imported"),
        (["distill", "digits", "--method", "dm", "--network", ".x:y"], "cannot be imported"),
        (["distill", "digits", "--method", "os.path:join"], "is no function of preset and images per class"),
        (["distill", "digits", "--set", "objective.kind=[1]"], "no kind of objective '[1]'"),
        (["distill", "digits", "--network", ""], "network ''"),
        (["distill", "digits", "--steps", "99999999999999"], "above 1,000,000,000"),
        (["distill", "digits", "--out", "x" * 300], "cannot be used"),
        (["distill", "digits", "--device", "meta"], "--device 'meta' is not usable here"),
        (["distill", "digits", "--resume", "--force"], "give one of them"),
        (["show", "dmm"], "did you mean 'dm'?"),
        (["cite", "random"], "comes from no single paper"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir()), "a refused command has left something behind"


def test_bad_npz_files(capsys, tmp_path, npz):
    good = dict(np.load(npz))

    def saved(**changes):
        np.savez(tmp_path / "bad.npz", **{k: v for k, v in {**good, **changes}.items() if v is not None})
        return str(tmp_path / "bad.npz")

    spoilt = good["x_train"].copy()
    spoilt[3, 0, 2, 2] = np.nan
    assert "not finite (NaN or infinity), first in sample 3" in refused(capsys, "distill", saved(x_train=spoilt))
    assert "lacks y_test" in refused(capsys, "distill", saved(y_test=None))
    assert "one class only" in refused(capsys, "distill", saved(y_train=np.zeros(28, int), y_test=np.zeros(28, int)))
    assert "28 samples" in refused(capsys, "distill", saved(y_train=good["y_train"][:-1]))
    whole = (tmp_path / "toy.npz").read_bytes()
    (tmp_path / "bad.npz").write_bytes(whole[: len(whole) // 2])
    assert "bad.npz is not a whole .npz" in refused(capsys, "distill", str(tmp_path / "bad.npz"))


def test_bad_sets(capsys, tmp_path, npz):
    from safetensors.torch import save_file

    save_file({"weights": toy().train.inputs}, tmp_path / "foreign.safetensors")
    assert "no set of potstill's" in refused(capsys, "evaluate", str(tmp_path / "foreign.safetensors"))
    assert main(["distill", npz, *FAST, "--no-evaluate", "--out", str(tmp_path / "run")]) == 0
    file = tmp_path / "run" / "set.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    capsys.readouterr()
    assert "is damaged" in refused(capsys, "evaluate", str(file))


def test_a_recipe_that_lacks_a_field(capsys, tmp_path):
    (tmp_path / "r.toml").write_text('method = "dm"')
    assert "recipe field 'preset' is missing" in refused(
        capsys, "distill", "digits", "--recipe", str(tmp_path / "r.toml")
    )


def test_a_coreset_does_not_resume_another_run(capsys, tmp_path, npz):
    """Nor is the set of another coreset replaced."""
    run, file = ["--no-evaluate", "--out", str(tmp_path / "run")], tmp_path / "run" / "set.safetensors"
    assert main(["distill", npz, *FAST, *run]) == 0
    before = file.read_bytes()
    assert "a run of other settings" in refused(capsys, "distill", npz, "--method", "random", "--resume", *run)
    assert file.read_bytes() == before
    assert main(["distill", npz, "--method", "random", "--force", *run]) == 0
    before = file.read_bytes()
    assert "a run of other settings" in refused(
        capsys, "distill", npz, "--method", "random", "--seed", "1", "--resume", *run
    )
    assert file.read_bytes() == before
    assert main(["distill", npz, "--method", "random", "--resume", *run]) == 0 and file.read_bytes() == before


def test_a_changed_length_is_refused_on_resume(capsys, tmp_path, npz):
    run = ["--no-evaluate", "--out", str(tmp_path / "run")]
    assert main(["distill", npz, *FAST, *run]) == 0
    assert "steps was 6, now 9" in refused(
        capsys, "distill", npz, *FAST[:-2], "--preset", "paper", "--set", "steps=9", "--resume", *run
    )


def test_results_are_not_lost_to_a_bad_json_path(capsys, tmp_path, npz):
    out = str(tmp_path / "run")
    assert main(["distill", npz, *FAST, "--no-evaluate", "--out", out]) == 0
    capsys.readouterr()
    assert "--json" in refused(capsys, "evaluate", out, "--data", npz, "--json", str(tmp_path / "none" / "r.json"))


def test_a_full_disk_at_the_report_is_one_line(tmp_path, npz):
    """A limit on file sizes that the set fits under and the page does not."""
    command = f"ulimit -f 22; exec {sys.executable} -m potstill distill {npz} {' '.join(FAST)} --no-evaluate --out {tmp_path / 'run'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(potstill.load(tmp_path / "run")) == 3


@pytest.mark.parametrize(("command", "resumes"), [("distill", True), ("evaluate", False)])
def test_ctrl_c_promises_only_what_there_is(capsys, monkeypatch, command, resumes):
    def pressed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("potstill.distilling.distill", pressed)
    monkeypatch.setattr("potstill.evaluation.evaluate", pressed)
    assert main([command, "digits"]) == 130
    error = capsys.readouterr().err.strip()
    assert error.startswith("potstill: interrupted") and "\n" not in error and ("--resume" in error) == resumes


def test_a_folder_with_something_else(capsys, tmp_path, npz):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    out = ["--out", str(tmp_path / "run")]
    assert "holds something else (notes.txt)" in refused(capsys, "distill", npz, *FAST, *out)
    assert "is a file" in refused(capsys, "distill", npz, *FAST, "--out", npz)


def test_a_whole_session(capsys, tmp_path, npz):
    """Distil, read what lies there, resume with other settings (refused), evaluate on two networks, use the set."""
    out = str(tmp_path / "run")
    assert main(["distill", npz, "--ipc", "2", *FAST, "--repeats", "2", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "random real" in printed and "report.html" in printed and "preset paper" in printed
    assert "seed was 0, now 1" in refused(
        capsys, "distill", npz, "--ipc", "2", *FAST, "--seed", "1", "--resume", "--out", out
    )
    results = tmp_path / "results.json"
    assert main(["evaluate", out, "--data", npz, "--networks", "convnet-w8,mlp-w16", "--protocol", "dc", "--repeats", "2",
                 "--baselines", "random", "--json", str(results)]) == 0  # fmt: skip
    rows = json.loads(results.read_text())
    assert [(r["method"], r["network"], r["protocol"]) for r in rows] == [
        ("dm", "convnet-w8", "dc"), ("random", "convnet-w8", "dc"), ("dm", "mlp-w16", "dc"), ("random", "mlp-w16", "dc"),
    ]  # fmt: skip
    for row in rows:
        assert set(row) >= {"set", "dataset", "ipc", "repeats", "metric", "accuracies", "accuracy_mean", "accuracy_std",
                            "seconds", "peak_bytes"}  # fmt: skip
    set_ = potstill.load(out)
    assert len(set_) == 6 and set_[0][0].shape == (1, 8, 8)


def test_the_recorded_command_makes_the_same_set(capsys, tmp_path, npz):
    import shlex

    out, table = tmp_path / "run", ["--set", 'optimiser.inputs={kind="adam", lr=0.01}']
    assert (
        main(
            ["distill", npz, "--minutes", "0.02", *FAST[:-2], *table, "--seed", "3", "--no-evaluate", "--out", str(out)]
        )
        == 0
    )
    command = shlex.split(json.loads((out / "record.json").read_text())["command"])
    assert command[:3] == ["potstill", "distill", "toy"]
    again = tmp_path / "again"
    assert main(["distill", npz, *command[3:], "--no-evaluate", "--out", str(again)]) == 0
    assert (again / "set.safetensors").read_bytes() == (out / "set.safetensors").read_bytes()


@pytest.mark.parametrize("value", [{"kind": "adam", "lr": 1e-05, "of it": [1, "1", True]}, "a😀'b", math.inf, ["x", {"y": {"z": -0.5}}]])  # fmt: skip
def test_a_recorded_setting_is_read_as_it_was_given(value):
    import shlex

    from potstill.outcome import _inline

    (pair,) = shlex.split(shlex.join([f"a.b={_inline(value)}"]))
    assert settings_of([pair]) == {"a.b": value}


def test_show_is_a_recipe_that_distill_reads(capsys, tmp_path, npz):
    assert main(["show", "dm", "--preset", "small"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["objective"]["kind"] == "distribution"
    (tmp_path / "my.toml").write_text(text.replace("real = 256", "real = 4"))
    out = tmp_path / "run"
    assert (
        main(["distill", npz, "--recipe", str(tmp_path / "my.toml"), *FAST[4:], "--no-evaluate", "--out", str(out)])
        == 0
    )
    assert potstill.load(out).meta.recipe["objective"]["real"] == 4


def test_lists(capsys):
    for what, word in (("methods", "dm"), ("datasets", "fashion-mnist"), ("networks", "convnet"), ("protocols", "dsa")):
        assert main(["list", what]) == 0
        assert word in capsys.readouterr().out
    assert main(["cite", "dm"]) == 0 and "2110.04181" in capsys.readouterr().out


def test_the_list_of_protocols_says_what_each_does(capsys):
    assert main(["list", "protocols"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["dc"].split(None, 1)[1].startswith("5 epochs, SGD 0.01, batch 256, augmentation")
    assert (
        "Adam 0.0003" in lines["frepo"] and "1000 to 40000 steps" in lines["frepo"] and "squared loss" in lines["frepo"]
    )
    assert "5000 steps, SGD 0.02" in lines["kip"] and "epochs" not in lines["kip"]
    assert "at the set's own rate" in lines["mtt"] and "SGD" not in lines["unrolled"]


def test_values_on_the_command_line():
    assert counts_of("3") == 3 and counts_of("1,2,3") == [1, 2, 3]
    assert settings_of(["a.b=1", "c=2.5", "d=text", 'e=["x"]', "f=true"]) == {
        "a.b": 1,
        "c": 2.5,
        "d": "text",
        "e": ["x"],
        "f": True,
    }


def test_ctrl_c_exits_with_130_and_resumes(tmp_path, npz):
    """A real interrupt of a real process."""
    command = [sys.executable, "-m", "potstill", "distill", npz, "--network", "convnet-w8", "--steps", "3000", "--set", "looks=0",
               "--set", "objective.real=8", "--no-evaluate", "--out", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoint.safetensors").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in error and "Traceback" not in error
    assert 0 < potstill.load(tmp_path / "run").meta.steps < 3000


COMPILED = """
import sys, potstill
class Bar:
    def __call__(self, total, title, start):
        self.step = start
        return self
    def update(self, n=1):
        self.step += 1
        if self.step == int(sys.argv[3]): raise KeyboardInterrupt
    def set_postfix_str(self, text, refresh=True): ...
    def close(self): ...
try:
    potstill.distill(sys.argv[1], out=sys.argv[2], steps=6, network="convnet-w8", compile="on", precision="bf16", bar=Bar(),
        settings={"objective.real": 8, "looks": 0}, evaluate=False, resume=True)
except KeyboardInterrupt:
    print("cut")
"""


@pytest.mark.compiled
def test_a_compiled_run_repeats_and_resumes_to_the_same_bytes(tmp_path, npz):
    """Compiled, in bf16, each in a process of its own: the promise of the same bits is the same."""
    cache = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def go(out, stop):
        command = [sys.executable, "-c", COMPILED, npz, str(tmp_path / out), str(stop)]
        done = subprocess.run(command, env=cache, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), (tmp_path / out / "set.safetensors").read_bytes()

    _, whole = go("a", 99)
    said, part = go("b", 3)
    assert said == "cut" and part != whole
    assert go("b", 99)[1] == whole
