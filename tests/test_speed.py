"""`potstill speed`: phases, counted operations, and what is refused."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch

from potstill import cli, costs, speed
from potstill.compiling import count_flops, sample_flops
from potstill.data import load_data
from potstill.errors import PotstillError
from potstill.functional import Key
from potstill.recipe import change, find
from potstill.rows import CostRow
from potstill.still import Settings, Still

NET = "convnet-w4"


def still(method: str, **settings):
    recipe = change(find(method, "small"), {"network": NET, **{k.replace("__", "."): v for k, v in settings.items()}})
    return Still(load_data("digits"), Settings(recipe, [1] * 10, 0, 0.0, 10, "cpu", False, "fp32", 1))


def test_operations_are_those_of_the_passes_that_the_method_makes():
    """Distribution matching: one forward pass of the real batch; forward and back to the inputs for S, whose first
    layer's weights need no gradient."""
    made = still("dm", objective__real=8)
    net, found = made.network, costs.operations(made, made.fresh())
    state = net.init(Key(0))
    x = made.data.prepare(made.data.train.inputs[:10])
    one = count_flops(lambda: net.features(state, x, "batch")) / 10
    assert found["draws"] == 0 and found["real"] == 80 * one
    assert found["synthetic"] == 2 * 10 * one
    assert found["update"] == 0  # a fresh network each step: none is trained


def test_operations_are_those_of_float32_and_of_the_way_that_was_settled():
    for method, settings in (
        ("dm", {"objective__real": 8}),
        ("dd", {"objective__steps": 3, "objective__memory": "adjoint"}),
    ):
        made = still(method, **settings)
        half = Still(made.data, replace(made.settings, precision="bf16"), made.start)
        assert half.network.precision == torch.bfloat16
        assert costs.operations(half, half.fresh()) == costs.operations(made, made.fresh())
    plain = still("dd", objective__steps=3, objective__memory="plain")
    assert costs.operations(plain, plain.fresh())["synthetic"] < costs.operations(made, made.fresh())["synthetic"], (
        "an adjoint computes each step again"
    )
    net = made.network
    assert sample_flops(net.at(torch.bfloat16)) == sample_flops(net)


def test_training_of_the_pool_counts_as_update():
    made = still("frepo", objective__real=16)
    found = costs.operations(made, made.fresh())
    assert found["update"] > 0 and found["real"] > 0


def test_the_phases_of_methods_and_their_share(capsys, tmp_path):
    file = tmp_path / "speed.json"
    asked = ["speed", "digits", "--methods", "dm,kip", "--network", NET, "--repeats", "2", "--compile", "off"]
    assert cli.main([*asked, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    dm, kip = found["rows"]
    assert (dm["status"], dm["precision"], kip["precision"]) == ("done", "fp32", "fp64")
    assert set(found["matrix_product"]) == {"fp32", "fp64"}
    for row in (dm, kip):
        assert tuple(row["phases"]) == costs.PHASES
        for phase in row["phases"].values():
            rate = phase["flops"] / phase["seconds"] / found["matrix_product"][row["precision"]]
            assert phase["share"] == pytest.approx(rate, abs=1e-4)
        parts = sum(p["seconds"] for p in row["phases"].values())
        assert row["loss_seconds"] <= parts and len(row["times"]["real"]) == 2
    out = capsys.readouterr().out
    assert "real side" in out and "matrix product, fp64" in out


def test_a_method_that_cannot_have_a_setting_is_a_line_of_the_table(capsys):
    asked = ["--methods", "dm,frepo", "--set", "objective.margin=false", "--network", "widenet-w4", "--repeats", "1"]
    assert cli.main(["speed", "digits", *asked]) == 0
    dm, frepo = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("dm  ", "frepo  "))]
    assert "failed" in dm and "objective.margin" in dm and "failed" not in frepo and "fp32" in frepo


def test_times_are_kept_where_counting_operations_ends_the_process(monkeypatch):
    """By a limit of time or by the system."""
    row = CostRow("dm", "digits", 1, network=NET, preset="small", repeats=1, limit_seconds=5.0)
    kept = '{"status": "done", "step_seconds": 1.0}\n'

    def late(*args, **options):
        raise subprocess.TimeoutExpired("python", 5.0, output=kept.encode())

    monkeypatch.setattr(costs.subprocess, "run", late)
    assert costs.in_own_process(row, "digits", None, False, "auto")["step_seconds"] == 1.0
    monkeypatch.setattr(
        costs.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], -9, kept + '{"sta', "")
    )
    assert costs.in_own_process(row, "digits", None, False, "auto")["status"] == "done"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--methods", "random"], "takes steps"),
        (["--methods", "dmm"], "dmm"),
        (["--preset", "large"], "large"),
        (["--ipc", "0"], "--ipc 0"),
        (["--network", "convnet-w4-d9"], "too deep"),
        (["--json", "/"], "--json"),
        (["--methods", "dm", "--set", "objective.nonsense=1"], "objective.nonsense"),
        (["--methods", "dm", "--set", "objective.real=0"], "below 1"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(options, named, capsys):
    assert cli.main(["speed", "digits", *options]) == 2
    said = capsys.readouterr().err
    assert named in said and len(said.strip().splitlines()) == 1


def test_the_yardstick_is_a_number_of_operations_per_second():
    slow, fast = speed.matrix_product("fp64"), speed.matrix_product("fp32")
    assert slow > 1e8 and fast > 1e8


def test_unknown_data_are_refused():
    with pytest.raises(PotstillError, match="nowhere"):
        speed.speed("nowhere")
