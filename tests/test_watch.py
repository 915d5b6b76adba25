"""A run that is watched: each loss and look once, by step; the loop's numbers stay the same."""

import sys
from dataclasses import replace

import pytest

from potstill import still
from potstill.cli import main
from potstill.distilling import distill
from potstill.errors import PotstillError
from potstill.testing import toy
from potstill.watch import tensorboard

FAST = {"network": "convnet-w8", "steps": 6, "settings": {"objective.real": 4, "looks": 2}, "evaluate": False}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=5))


def test_losses_and_looks_are_seen_once_and_change_nothing(tmp_path):
    seen = []
    run = distill(toy(), "dm", out=tmp_path / "a", watch=lambda step, values: seen.append((step, dict(values))), **FAST)
    record = run.record
    assert [(s, v["loss"]) for s, v in seen if "loss" in v] == [(s, loss) for s, loss in record["curve"]]
    looks = [(s, v["heldout_accuracy"]) for s, v in seen if "loss" not in v]
    assert looks == [(look["step"], look["accuracy"]) for look in record["looks"]] and [s for s, _ in looks] == [
        0,
        3,
        6,
    ]
    distill(toy(), "dm", out=tmp_path / "b", **FAST)
    assert (tmp_path / "a" / "set.safetensors").read_bytes() == (tmp_path / "b" / "set.safetensors").read_bytes()


def test_no_folder_no_log():
    with tensorboard(None) as watch:
        watch(1, {"loss": 2.0})


def test_without_tensorboard_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(PotstillError, match=r"pip install 'potstill\[tensorboard\]'"), tensorboard(tmp_path / "log"):
        pass
    assert main(["distill", "digits", "--tensorboard", str(tmp_path / "log"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("potstill: --tensorboard needs it") and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_what_tensorboard_reads(tmp_path, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = [
        "--network",
        "convnet-w8",
        "--steps",
        "4",
        "--set",
        "looks=1",
        "--set",
        "objective.real=4",
        "--no-evaluate",
    ]
    log = str(tmp_path / "log")
    assert main(["distill", "digits", *options, "--out", str(tmp_path / "run"), "--tensorboard", log]) == 0
    events = accumulator.EventAccumulator(log)
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "heldout_accuracy"}
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    (tmp_path / "file").write_text("")
    assert (
        main(["distill", "digits", *options, "--out", str(tmp_path / "r2"), "--tensorboard", str(tmp_path / "file")])
        == 2
    )
    assert "cannot be written" in capsys.readouterr().err
