"""Several processes for one run: equal steps, the same set on all ranks, and a run that survives the death of one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import potstill
from potstill import cli
from potstill.errors import PotstillError
from potstill.functional import Key
from potstill.launch import launched, restarts, speaks
from potstill.methods import METHODS
from potstill.networks import network
from potstill.objectives import Objective
from potstill.parallel import ALONE, Group, Sharing, _bytes, _tree, choose, joined
from potstill.testing import toy

WORKER = Path(__file__).parent / "shared_worker.py"
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One start of two processes for everything that is compared: their folder, findings by rank, and what was printed."""
    folder = tmp_path_factory.mktemp("shared")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "--max-restarts", "3", str(WORKER), str(folder)]
    own = {"PYTHONPATH": str(Path(potstill.__file__).parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=os.environ | own)
    assert (folder / "rank1.json").is_file(), done.stdout + done.stderr
    found = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)]
    return folder, found, done


@pytest.mark.parametrize("method", ["dm", "dm-all", "dm-each", "dc", "dsa", "dd", "frepo", "kip"])
def test_a_split_batch_makes_the_step_of_one_process(shared, method):
    """Three steps in float64, with numbers that two cannot halve, and a class of which one rank has no sample."""
    for found in shared[1]:
        case = found["batch"][method]
        assert case["moved"] > 1e-3, "S stood still: nothing was compared"
        assert case["learned"] < 1e-12 and case["loss"] < 1e-12 and case["same"]


@pytest.mark.parametrize("method", ["dm", "frepo", "dd"])
def test_networks_of_their_own_give_the_mean_gradient(shared, method):
    for found in shared[1]:
        case = found["networks"][method]
        assert case["gradient"] < 1e-14, "not the mean of the two networks' gradients"
        assert case["first"], "rank 0 has another network than a run alone"
        assert case["another"] and case["own"], "rank 1 has no network of its own"
        assert case["same"], "S differs between the ranks"


def test_each_rank_keeps_a_pool_of_its_own(shared):
    assert not shared[1][0]["networks"]["frepo"]["pools"]


def test_a_resumed_run_ends_as_another_whatever_the_ranks_have_of_their_own(shared):
    folder, found, _ = shared
    for one in found:
        runs = one["runs"]
        assert runs["stopped"].startswith("step 6: the loss is nan") and runs["resumed"] and runs["set"]
    assert (folder / "cut" / "set.safetensors").read_bytes() == (folder / "whole" / "set.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("killed", "whole"), [("killed", "whole"), ("killed-batch", "batch")], ids=["networks", "batch"]
)
def test_a_worker_killed_without_warning_comes_back_and_the_set_is_the_same(shared, killed, whole):
    folder, _, done = shared
    assert done.stderr.count("exitcode: -9") == 3 and done.stdout.count("resumed at step 5 of 9") == 2
    assert (folder / killed / "set.safetensors").read_bytes() == (folder / whole / "set.safetensors").read_bytes()
    kept, undisturbed = (json.loads((folder / name / "record.json").read_text()) for name in (killed, whole))
    assert kept["curve"] == undisturbed["curve"] and kept["looks"] == undisturbed["looks"]


def test_a_recording_whose_worker_is_killed_ends_with_the_same_experts(shared):
    """Each rank goes on from its own checkpoint."""
    folder, _, done = shared
    assert "rank 1 goes on with expert 1 at step 4" in done.stdout
    kept, whole = ({p.name: p.read_bytes() for p in (folder / name).iterdir()} for name in ("killed-experts", "one"))
    assert kept == whole


def test_a_time_budget_is_one_number_of_steps(shared):
    steps = [found["runs"]["minutes"] for found in shared[1]]
    assert steps[0] == steps[1] >= 1


def test_the_record_says_how_the_run_was_shared(shared):
    folder, found, _ = shared
    assert found[0]["runs"]["batch"] == "batch" and found[0]["runs"]["mtt"] == ["networks", True]
    assert found[0]["runs"]["command"].startswith(
        "torchrun --nproc-per-node 2 -m potstill distill toy --parallel networks"
    )
    record = json.loads((folder / "whole" / "record.json").read_text())
    assert record["choices"]["parallel"] == "networks" and record["choices"]["ranks"] == 2
    assert "parallel was networks, now batch" in found[0]["runs"]["other"]


def test_a_set_by_two_processes_is_resumed_by_two(shared):
    with pytest.raises(PotstillError, match="parallel was networks, now alone"):
        potstill.distill(toy(), "frepo", ipc=2, steps=9, preset="small", out=shared[0] / "whole", resume=True,
                         settings={"network": "convnet-w8", "student": "convnet-w8", "objective.real": 8, "looks": 1,
                                   "source.size": 2, "source.lifetime": 3})  # fmt: skip


def test_experts_of_two_processes_are_those_of_one(shared):
    """Every file, bit for bit, the index included; also where a recording was continued."""
    kept = {name: {p.name: p.read_bytes() for p in (shared[0] / name).iterdir()} for name in ("one", "two", "resumed")}
    assert sorted(kept["one"]) == [
        "expert-000.safetensors",
        "expert-001.safetensors",
        "expert-002.safetensors",
        "experts.json",
    ]
    assert kept["two"] == kept["one"] == kept["resumed"]


def test_divided_networks_score_as_those_of_one_process(shared):
    """One after the other to the last bit; side by side two may round otherwise than three."""
    for found in shared[1]:
        two, one = found["evaluations"]["one by one"]
        assert found["evaluations"]["methods"] == ["frepo", "random", "random-soft", "whole"]
        assert two == one and [len(scores) for scores in two] == [3, 3, 3, 1]
        two, one = found["evaluations"]["side by side"]
        assert torch.allclose(torch.tensor(two[:3]), torch.tensor(one[:3]), atol=0.1)


def test_only_one_process_prints_and_each_has_one_thread(shared):
    _, found, done = shared
    assert done.stdout.count("the set:") == done.stdout.count("parallel batch, 2 processes (asked for)") == 1
    assert [one["threads"] for one in found] == [1, 1]


def test_an_error_on_one_rank_ends_all_with_one_line(shared):
    done = shared[2]
    said = [line.partition("potstill: ")[2] for line in done.stderr.splitlines() if "potstill: " in line]
    assert done.returncode != 0 and said == ["a planted mistake on rank 1"]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_rows_are_the_batch_once_each(count, size):
    index, mask = Key(0).integers(100, 4, count), torch.ones(4, count)
    mask[3, count // 2 :] = 0
    parts = [Sharing(Group(r, size), "batch", "target").rows(index, mask) for r in range(size)]
    assert len({tuple(p[0].shape) for p in parts}) == 1, "every rank has the same shapes"
    for g in range(4):
        seen = torch.cat([i[g][m[g] > 0] for i, m in parts])
        assert seen.sort().values.tolist() == index[g][mask[g] > 0].sort().values.tolist()
    if count >= size:
        rows = [Sharing(Group(r, size), "batch", "loss").rows(index[0], mask[0])[0] for r in range(size)]
        assert torch.cat(rows).sort().values.tolist() == index[0].sort().values.tolist()


def test_draws_for_real_samples_go_with_their_rows():
    index = torch.arange(15).reshape(3, 5)
    draws = {"real": {"angle": index.float(), "op": torch.zeros(3, 1)}, "augment": torch.zeros(3, 1)}
    for rank in range(2):
        sharing = Sharing(Group(rank, 2), "batch", "target")
        rows, _ = sharing.rows(index, torch.ones(3, 5))
        cut = sharing.draws(draws, index.shape)
        assert torch.equal(cut["real"]["angle"], rows.float())
        assert cut["real"]["op"].shape == (3, 1) and cut["augment"].shape == (3, 1)


def test_alone_everything_is_handed_back():
    tree = {"x": torch.ones(2), "y": (torch.zeros(1),)}
    for made in (
        ALONE.mean(tree, 0.3),
        ALONE.same(tree),
        ALONE.share(tree),
        ALONE.collect(tree)[0],
        ALONE.gather(tree)[0],
    ):
        assert made is tree
    assert ALONE.mine([1, 2]) == ALONE.dealt([1, 2]) == [1, 2] and ALONE.first(0.1) == 0.1 and ALONE.leads
    with joined() as group:
        assert group is ALONE


def test_what_ranks_tell_each_other_comes_as_it_was():
    tree = {
        "a": [torch.arange(3), 0.1, None, "x"],
        "b": (True, float("inf"), torch.tensor(1.5, dtype=torch.float64)),
        "c": {},
    }
    again = _tree(_bytes(tree))
    assert torch.equal(again["a"][0], tree["a"][0]) and again["a"][1:] == [0.1, None, "x"]
    assert again["b"][:2] == (True, float("inf")) and torch.equal(again["b"][2], tree["b"][2]) and again["c"] == {}


def choice(method, asked=None, net="convnet-w8", group=None, **fields):
    group = group or Group(0, 2)
    recipe = METHODS[method]("small", 1)
    objective = recipe.objective
    if objective is not None and fields:
        objective = type(objective)(**{**vars(objective), **fields})
    return choose(asked, group, objective, network(net, (1, 8, 8), 3), 28)


@pytest.mark.parametrize("method", ["dm", "dc", "dsa", "dd", "frepo", "kip"])
def test_the_batch_is_split_unless_asked_otherwise(method):
    assert choice(method)[0] == choice(method, "batch")[0] == "batch"


def test_where_the_batch_cannot_be_split_networks_differ():
    mode, why = choice("mtt")
    assert mode == "networks" and "no real batch" in why
    mode, why = choice("dm", net="convnet-batch-w8")
    assert mode == "networks" and "convnet-batch-w8 mixes the samples of a batch" in why
    assert choice("dc", net="convnet-batch-w8")[0] == "batch", (
        "its statistics are stored ones, from samples that all ranks see"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "mtt", "asked": "batch"}, "no real batch that could be split; --parallel networks works"),
        ({"method": "dm", "asked": "batch", "net": "convnet-batch-w8"}, "batch norm.*--parallel networks works"),
        ({"method": "kip", "asked": "networks"}, "needs no network.*--parallel batch works"),
        ({"method": "dm", "asked": "batch", "real": 1}, "1 real samples are fewer than the 2 processes"),
        ({"method": "random"}, "takes no steps"),
        ({"method": "dm", "asked": "bach"}, "no way for --parallel 'bach'; did you mean 'batch'"),
        ({"method": "dm", "asked": "batch", "group": ALONE}, "torchrun --nproc-per-node 2 -m potstill distill"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_can(options, words):
    with pytest.raises(PotstillError, match=words) as caught:
        choice(**options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_method_from_outside_splits_nothing_unless_it_says_how():
    objective = METHODS["dm"]("small", 1).objective
    assert Objective.averaged(objective, network("convnet-w8", (1, 8, 8), 3)) is None


def test_parallel_without_torchrun_is_one_line(tmp_path, capsys):
    assert cli.main(["distill", "digits", "--parallel", "batch", "--out", str(tmp_path / "a")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("potstill: --parallel batch") and len(err.splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_under_torchrun_other_commands_are_refused_and_mistakes_are_said_once(monkeypatch, capsys):
    assert speaks() and not launched() and not restarts()
    for name, value in {**TORCHRUN, "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched() and speaks() and restarts() == 1
    assert cli.main(["benchmark", "quick"]) == 2
    assert "torchrun serves distill, evaluate, experts" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert not speaks() and cli.main(["list", "methods"]) == 2
    assert cli.main(["distill"]) == 2
    assert capsys.readouterr().err == ""


def test_one_process_of_torchrun_is_a_run_alone(monkeypatch, tmp_path):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    settings = {"network": "convnet-w8", "student": "convnet-w8", "objective.real": 4, "looks": 0}
    options = {"ipc": 1, "steps": 2, "preset": "small", "settings": settings, "evaluate": False}
    with joined() as group:
        assert group == ALONE
        made = potstill.distill(toy(), "dm", out=tmp_path / "a", parallel="batch", group=group, **options)
    assert torch.equal(made.set.inputs, potstill.distill(toy(), "dm", out=tmp_path / "b", **options).set.inputs)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = potstill.distill(toy(), "dm", out=tmp_path / "a", force=True, **options)
    assert again.record["curve"] == made.record["curve"], "a restart goes on, whatever the command said at first"
