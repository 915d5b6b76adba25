"""Recorded experts: what is trained, what lies in the files, what is refused, and the source that replays them."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from potstill import cli, experts, load_data
from potstill.cli import main
from potstill.errors import PotstillError, Stopped, Unwritable
from potstill.experts import record
from potstill.functional import Key
from potstill.measure import peak_bytes, reset_peak
from potstill.networks import network
from potstill.recipe import Recipe, to_dict
from potstill.replay import Experts
from potstill.testing import toy
from potstill.trajectories import Layout, digest_of, file_of, open_experts, read_rows

SMALL = {"network": "mlp-w8", "count": 2, "epochs": 3, "batch": 8}


def make(out, data=None, **options):
    return record(data or toy(), out=out, **{**SMALL, **options})


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def refused(call, *arguments, error=PotstillError, **options):
    """The one line of an error."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A recording, not to be changed."""
    folder = tmp_path_factory.mktemp("kept") / "experts"
    make(folder)
    return folder


@pytest.fixture
def own(kept, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(kept, tmp_path / "own")


# --- what is trained


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def convnet(norm):
    def block(channels):
        return [nn.Conv2d(channels, 8, 3, padding=1), norm(8), nn.ReLU(), nn.AvgPool2d(2)]

    return nn.Sequential(*block(1), *block(8), nn.Flatten(), nn.Linear(32, 3))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("mlp-w8", mlp),
        ("convnet-w8", lambda: convnet(lambda c: nn.InstanceNorm2d(c, affine=True))),
        ("convnet-batch-w8", lambda: convnet(nn.BatchNorm2d)),
    ],
)
@pytest.mark.parametrize("rule", [{}, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}])
def test_an_expert_is_a_network_trained_by_torch_optim(tmp_path, name, module, rule):
    """PyTorch's own modules, their batch norm and optimiser, from the recorded start in the same order of samples."""
    data = toy().hold_out(0.1)
    made = make(tmp_path / "e", data=toy(), network=name, augment="none", seed=3, **rule)
    x = (data.train.inputs.float() - data.transform.mean[0]) / data.transform.std[0]
    for expert in range(2):
        theirs = module()
        with torch.no_grad():
            for p, start in zip(theirs.parameters(), made.state(expert, 0).params.values(), strict=True):
                p.copy_(start)
        optimiser = torch.optim.SGD(theirs.parameters(), **{"lr": 0.01, **rule})
        for epoch in range(3):
            losses = []
            order = Key(3).fold("expert", expert, "order", epoch).permutation(len(x))
            assert sorted(order.tolist()) == list(range(25))
            for at in order.split(8):  # three of 8 and one of 1: a set of few batches keeps its last one
                loss = nn.functional.cross_entropy(theirs(x[at]), data.train.labels[at])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
            ours = made.state(expert, epoch + 1)
            for p, q in zip(theirs.parameters(), ours.params.values(), strict=True):
                torch.testing.assert_close(p.detach(), q, rtol=1e-3, atol=1e-5)
            running = [b for b in theirs.buffers() if b.ndim]
            for b, q in zip(running, ours.buffers.values(), strict=True):
                torch.testing.assert_close(b, q, rtol=1e-3, atol=1e-5)
            assert made.meta["experts"][expert]["losses"][epoch] == pytest.approx(np.mean(losses), rel=1e-3)
        theirs.eval()
        held = (data.heldout.inputs.float() - data.transform.mean[0]) / data.transform.std[0]
        score = (theirs(held).argmax(1) == data.heldout.labels).float().mean().item()
        assert made.meta["experts"][expert]["heldout_accuracy"][-1] == pytest.approx(score, abs=1e-5)


def test_batch_norm_statistics_are_recorded_as_they_were(tmp_path):
    made = make(tmp_path / "e", network="convnet-batch-w8")
    start, end = made.state(1, 0).buffers, made.state(1, 3).buffers
    assert torch.equal(start["norm0.mean"], torch.zeros(8)) and torch.equal(start["norm0.variance"], torch.ones(8))
    assert all((start[k] != end[k]).any() for k in start) and len(start) == 4


def test_the_start_is_what_the_network_makes_of_a_key(kept):
    start = network("mlp-w8", (1, 8, 8), 3).init(Key(0).fold("expert", 1, "weights"))
    assert all(torch.equal(v, open_experts(kept).state(1, 0).params[k]) for k, v in start.params.items())


def test_augmentation_changes_images_and_leaves_vectors(tmp_path):
    plain, augmented = (make(tmp_path / a, augment=a).state(0, 3) for a in ("none", "dsa"))
    assert not torch.equal(plain.params["head.weight"], augmented.params["head.weight"])
    key, said = Key(0), []
    vectors = load_vectors(key)
    plain, same = (make(tmp_path / f"v{a}", data=vectors, augment=a, say=said.append) for a in ("none", "dsa"))
    assert torch.equal(plain.state(0, 3).params["head.weight"], same.state(0, 3).params["head.weight"])
    assert any("the inputs are no images" in line for line in said)


def load_vectors(key):
    from potstill import Data

    x, y = key.normal(40, 6).numpy(), np.arange(40) % 3
    return Data.from_arrays(x, y, x, y, name="vectors")


def test_experts_learn(tmp_path):
    """On digits the held-out accuracy rises far above a guess."""
    made = record("digits", out=tmp_path / "e", count=1, epochs=3, network="mlp-w32", lr=0.1, batch=32, augment="none")
    scores = made.meta["experts"][0]["heldout_accuracy"]
    assert scores[0] < 0.3 and scores[-1] > 0.8 and len(scores) == 4
    losses = made.meta["experts"][0]["losses"]
    assert losses == sorted(losses, reverse=True)


def test_a_large_set_leaves_out_the_partial_batch_and_nothing_is_prepared_whole(tmp_path):
    data, seen = load_data("digits"), []

    class Spy(type(data)):
        def prepare(self, raw):
            seen.append(len(raw))
            return super().prepare(raw)

    spied = Spy(**vars(data))
    made = record(spied, out=tmp_path / "e", count=1, epochs=1, network="mlp-w8", batch=100, holdout=0, augment="none")
    assert len(data.train) // 100 == made.meta["steps_per_epoch"] and set(seen) == {100}
    assert made.meta["experts"][0]["heldout_accuracy"] == []


# --- the same bits


def test_same_seed_same_bytes_another_seed_others_and_no_global_generator(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    make(tmp_path / "a")
    after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    torch.manual_seed(2)
    make(tmp_path / "b")
    make(tmp_path / "c", seed=1)
    a, b, c = (bytes_of(tmp_path / n) for n in "abc")
    assert a == b and sorted(a) == ["expert-000.safetensors", "expert-001.safetensors", "experts.json"]
    assert all(a[n] != c[n] for n in a) and a["expert-000.safetensors"] != a["expert-001.safetensors"]


def test_a_finished_recording_takes_more_experts(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "a", resume=True)
    make(tmp_path / "a", count=4, resume=True)
    assert make(tmp_path / "b", count=4).count == 4
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


KILLED = """
import sys, time
from potstill import experts
experts.SAVE_EVERY = experts.SHARE = 0
class Bar:
    left = int(sys.argv[2])
    def __call__(self, total, title, start): return self
    def update(self, n=1):
        print("step", flush=True)
        self.left -= 1
        if not self.left: time.sleep(600)
    def close(self): ...
experts.record("digits", out=sys.argv[1], network="convnet-batch-w4", count=2, epochs=2, batch=512, momentum=0.9,
    resume=True, bar=Bar())
print("done", flush=True)
"""


def test_resume_after_kill_9_gives_the_same_bytes(tmp_path):
    """A process killed without warning within an epoch of the first expert, then of the second, goes on to the same end."""
    # three steps in an epoch, twelve in all; the one in which the process is killed is not saved
    for steps, finished, expected in ((2, 0, 2), (8, 1, 8), (99, 2, 4)):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "cut"), str(steps)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert [process.stdout.readline() for _ in range(expected)] == ["step\n"] * expected
            if finished < 2:
                process.send_signal(signal.SIGKILL)
            assert process.stdout.read() == ("done\n" if finished == 2 else "")
        assert len(json.loads((tmp_path / "cut" / "experts.json").read_text())["experts"]) == finished
        assert (tmp_path / "cut" / "checkpoint.safetensors").exists() == (finished < 2)
    record("digits", out=tmp_path / "whole", network="convnet-batch-w4", count=2, epochs=2, batch=512, momentum=0.9)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


class Stop:
    """A progress bar that presses Ctrl-C at a step."""

    def __init__(self, at):
        self.at, self.steps, self.asked = at, 0, None

    def __call__(self, total, title, start):
        self.asked, self.steps = (total, start), start
        return self

    def update(self, n=1):
        self.steps += n
        if self.steps == self.at:
            raise KeyboardInterrupt

    def close(self): ...


@pytest.mark.parametrize("at", [1, 4, 11, 12, 13, 24])
def test_resume_after_ctrl_c_gives_the_same_bytes(tmp_path, kept, at):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", bar=Stop(at))
    again = Stop(-1)
    make(tmp_path / "cut", bar=again, resume=True)
    assert bytes_of(tmp_path / "cut") == bytes_of(kept)
    assert again.asked == (24, at) and again.steps == 24


def test_a_checkpoint_of_another_recording_is_not_used(tmp_path, kept):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "other", seed=5, bar=Stop(7))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "own", bar=Stop(2))
    shutil.copy(tmp_path / "other" / "checkpoint.safetensors", tmp_path / "own")
    make(tmp_path / "own", resume=True)
    assert bytes_of(tmp_path / "own") == bytes_of(kept)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.02}, "lr was 0.01, now 0.02"),
        ({"momentum": 0.5}, "momentum was 0.0, now 0.5"),
        ({"batch": 4}, "steps_per_epoch was 4, now 7"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"epochs": 4}, "epochs was 3, now 4"),
        ({"network": "mlp-w9"}, "network was mlp-w8, now mlp-w9"),
        ({"augment": "none"}, "augment was dsa, now none"),
        ({"transform": "none"}, "transform was standardise, now none"),
        ({"holdout": 0.2}, "holdout was 0.1, now 0.2"),
        ({"precision": "bf16"}, "precision was fp32, now bf16"),
        ({"data": toy(1)}, "the data have changed"),
    ],
)
def test_other_settings_are_not_resumed(own, options, words):
    before = bytes_of(own)
    assert words in refused(make, own, resume=True, **options)
    assert bytes_of(own) == before


def test_a_recording_says_nothing_of_what_augmentations_learned_later(own):
    """So that one from before such a field is still the same recording."""
    augmentation = json.loads((own / "experts.json").read_text())["training"]["augmentation"]
    assert augmentation["ops"] and not {"fill", "jitter"} & set(augmentation)


def test_a_folder_that_holds_a_recording_wants_resume_or_force(own, kept, tmp_path):
    assert "--resume continues it, --force starts it again" in refused(make, own)
    (own / ".expert-001.safetensors.k2_x8abc").write_bytes(b"half")
    make(own, force=True)
    assert bytes_of(own) == bytes_of(kept)
    (own / "thesis.txt").write_text("")
    assert "holds something else (thesis.txt)" in refused(make, own, force=True)


def test_a_loss_that_is_not_finite_stops(tmp_path):
    assert "a lower rate than --lr 1e+30 usually helps" in refused(
        make, tmp_path / "e", lr=1e30, count=1, error=Stopped
    )
    assert not (tmp_path / "e" / "expert-000.safetensors").exists()


def test_a_full_disk_is_one_line_and_what_was_there_is_good(tmp_path, monkeypatch, kept):
    whole = experts.records.write_whole

    def full(path, content, **options):
        if path.name == "expert-001.safetensors":
            raise Unwritable("expert-001.safetensors cannot be written (No space left on device)")
        whole(path, content, **options)

    monkeypatch.setattr(experts.records, "write_whole", full)
    assert "No space left" in refused(make, tmp_path / "e", error=Unwritable)
    assert open_experts(tmp_path / "e").count == 1
    monkeypatch.undo()
    make(tmp_path / "e", resume=True)
    assert bytes_of(tmp_path / "e") == bytes_of(kept)


# --- the files


def test_a_file_is_plain_safetensors_with_a_row_per_epoch(kept):
    made, tensors = open_experts(kept), load_file(kept / "expert-001.safetensors")
    assert set(tensors) == {"params"}
    assert (
        tensors["params"].shape == (4, 64 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3) and tensors["params"].dtype == torch.float32
    )
    for epoch in range(4):
        flat = torch.cat([made.state(1, epoch).params[name].flatten() for name, _, _ in made.meta["params"]])
        assert torch.equal(flat, tensors["params"][epoch])
    assert len({tuple(row[:5].tolist()) for row in tensors["params"]}) == 4


def test_of_a_large_file_one_row_is_read(tmp_path):
    """A sparse file of 4 GiB: reading a row of 4 MiB takes the memory of that row."""
    rows, size = 1024, 2**20
    header = json.dumps({"params": {"dtype": "F32", "shape": [rows, size], "data_offsets": [0, rows * size * 4]}})
    length = -(-len(header) // 8) * 8
    with open(tmp_path / file_of(0), "wb") as out:
        out.write(struct.pack("<Q", length) + header.encode().ljust(length))
        out.seek(8 + length + 700 * size * 4)
        out.write(struct.pack("<3f", 1.0, 2.0, 3.0))
        out.truncate(8 + length + rows * size * 4)
    layouts = Layout((("weight", (size,), "float32"),)), Layout(())
    reset_peak()
    before = peak_bytes()
    params, buffers = read_rows(tmp_path / file_of(0), layouts, rows - 1, 700)
    assert params[:4].tolist() == [1.0, 2.0, 3.0, 0.0] and params.shape == (size,) and not len(buffers)
    assert params.sum() == 6 and peak_bytes() - before < 2**28


def test_a_state_outlives_its_file(own):
    made = open_experts(own)
    state = made.state(0, 2)
    before = {k: v.clone() for k, v in state.params.items()}
    file = own / file_of(0)
    with open(file, "r+b") as opened:  # in place, under the map
        opened.seek(file.stat().st_size // 2)
        opened.write(bytes(file.stat().st_size // 2))
    assert all(torch.equal(before[k], v) for k, v in state.params.items())
    assert len({v.untyped_storage().data_ptr() for v in state.params.values()}) == len(state.params)


def test_whole_numbers_in_buffers_come_back_as_they_were():
    tensors = {"scale": torch.rand(3), "places": torch.arange(7), "on": torch.tensor([True, False])}
    layout = Layout.of(tensors)
    again = Layout.read(json.loads(json.dumps(layout.plain))).tensors(layout.row(tensors))
    assert all(again[k].dtype == v.dtype and torch.equal(again[k], v) for k, v in tensors.items())
    assert "float64" in refused(Layout.of, {"w": torch.rand(2).double()})
    assert "int64" in refused(Layout.of, {"w": torch.tensor([2**24 + 1])})


# --- what is refused


def test_experts_of_something_else_are_refused_with_both_names(kept):
    made, data = open_experts(kept), toy().hold_out(0.1)
    own = network("mlp-w8", (1, 8, 8), 3)
    made.check(own, data)
    made.check(own, toy().hold_out(0))
    text = refused(made.check, network("convnet-w8", (1, 8, 8), 3), data)
    assert (
        "of network 'mlp-w8', not of 'convnet-w8'; `potstill experts toy --network convnet-w8` records others" in text
    )
    other = replace(toy(1), name="another").hold_out(0.1)
    text = refused(made.check, own, other)
    assert f"of data 'toy' (fingerprint {data.fingerprint}), not of 'another' ({other.fingerprint})" in text
    text = refused(made.check, own, data.with_transform("zca"))
    assert "of transform 'standardise' (" in text and "not of 'zca' (" in text
    moved = replace(data, transform=replace(data.transform, mean=(0.5,)))
    assert "of transform 'standardise' (" in refused(made.check, own, moved)
    text = refused(made.check, replace(network("mlp-w9", (1, 8, 8), 3), name="mlp-w8"), data)
    assert "another network 'mlp-w8' (6 tensors of 619 numbers) than this one (6 tensors of 705 numbers)" in text
    assert "--holdout 0.1: they have seen some of the 12 samples" in refused(made.check, own, toy().hold_out(0.4))


def change_index(folder, **changes):
    file = folder / "experts.json"
    plain = {k: v for k, v in json.loads(file.read_text()).items() if k != "checksum"}
    file.write_text(json.dumps({**plain, **changes}))


def test_another_format_version_is_refused_with_both(own):
    change_index(own, format=2)
    assert "format version 2; this potstill reads version 1" in refused(open_experts, own)


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": None}, {"experts": [{}]}, {"epochs": "many"}, {"epochs": 7}, {"params": [["w", [2]]]}, {"params": []},
        {"network": 3}, {"transform": {}}, {"params": [["w", [2], "load"]]},
    ],
)  # fmt: skip
def test_a_damaged_index_is_named(own, changes):
    change_index(own, **changes)
    assert "experts.json is damaged" in refused(open_experts, own)


def test_damaged_and_missing_files_are_named(own, tmp_path):
    made, file = open_experts(own), own / file_of(0)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert "expert-000.safetensors is damaged" in refused(made.state, 0, 3)
    file.write_bytes(content[:-3] + b"\x00\x01\x02")
    assert "expert-000.safetensors is damaged: epoch 3" in refused(made.state, 0, 3)
    made.state(0, 2)
    file.write_bytes(b"nothing at all")
    assert "expert-000.safetensors is damaged" in refused(made.state, 0, 3)
    save_file({"params": torch.zeros(4, 5)}, file)
    assert "its params are ('F32', [4, 5])" in refused(made.state, 0, 0)
    save_file({"weights": torch.zeros(4, 5)}, file)
    assert "expert-000.safetensors is damaged" in refused(made.state, 0, 0)
    shutil.copy(own / file_of(1), file)
    assert "does not have the hash" in refused(made.state, 0, 0)
    file.unlink()
    assert "is missing" in refused(made.state, 0, 0)
    assert "is missing" in refused(make, own, resume=True)
    (own / "experts.json").write_text('{"format": 1')
    assert "is damaged" in refused(open_experts, own)
    assert "records some" in refused(open_experts, tmp_path / "nowhere")
    for expert, epoch, words in ((2, 0, "no expert 2; the last one is 1"), (0, 4, "no epoch 4; the last one is 3")):
        assert words in refused(made.state, expert, epoch)
    assert "no epoch -1" in refused(made.state, 0, -1)


def test_a_recording_that_has_just_begun_has_no_expert(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "e", bar=Stop(3))
    assert "no expert in" in refused(open_experts, tmp_path / "e")


# --- the source


def test_the_source_draws_uniformly_by_key_alone(kept):
    source = Experts(max_start=3, span=1, folder=str(kept))
    net = network("mlp-w8", (1, 8, 8), 3)
    made = open_experts(kept)
    known = {digest(made.state(i, e)): (i, e) for i in range(2) for e in range(4)}
    seen = []
    for step in range(600):
        slot, got = source.fetch(net, source.init(), Key(0).fold(step), step / 600)
        start, goal = known[digest(got.state)], known[digest(got.goal)]
        assert slot == 0 and got.network is net and goal == (start[0], start[1] + 1)
        seen.append(start)
    counts = [seen.count((i, e)) for i in range(2) for e in range(3)]
    assert sum(counts) == 600
    assert sum((c - 100) ** 2 / 100 for c in counts) < 20.5  # chi-squared of 5 degrees of freedom, 0.1 %
    again = replace(source)
    torch.manual_seed(5)
    for step in (0, 17, 599):
        assert known[digest(again.fetch(net, {}, Key(0).fold(step), 0.9)[1].state)] == seen[step]
    assert source.advance({}, 0, got, None, None, None, Key(0)) == {}


def digest(state):
    return digest_of(*(torch.cat([torch.zeros(0), *(v.flatten() for v in part.values())]) for part in state))


def test_without_a_span_the_networks_are_checkpoints_without_a_goal(kept):
    source = Experts(max_start=4, folder=str(kept))  # the last epoch may serve too
    made, net = open_experts(kept), network("mlp-w8", (1, 8, 8), 3)
    fetched = [source.fetch(net, {}, Key(s), 0.0)[1] for s in range(60)]
    assert all(got.goal is None for got in fetched)
    assert {digest(got.state) for got in fetched} == {digest(made.state(i, e)) for i in range(2) for e in range(4)}


def test_calibrated_statistics_are_those_of_the_batch(tmp_path):
    make(tmp_path / "e", network="convnet-batch-w8")
    source, net = Experts(max_start=3, span=1, folder=str(tmp_path / "e")), network("convnet-batch-w8", (1, 8, 8), 3)
    x = Key(0).normal(16, 1, 8, 8)
    got = source.fetch(net, {}, Key(0), 0.0)[1]
    after = source.calibrate(got, x)
    first = nn.functional.conv2d(x, got.state.params["conv0.weight"], got.state.params["conv0.bias"], padding=1)
    torch.testing.assert_close(after.state.buffers["norm0.mean"], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert after.goal is got.goal and after.state.params is got.state.params


def test_stretches_beyond_the_end_and_wrong_numbers_are_refused(kept):
    source = Experts(max_start=3, span=2, folder=str(kept))
    text = refused(source.check, network("mlp-w8", (1, 8, 8), 3), toy().hold_out(0.1))
    assert "have 3 epochs; source.max_start = 3 and source.span = 2 need 4" in text
    assert "need 4" in refused(lambda: Experts(max_start=5, folder=str(kept)).trajectories)
    replace(source, max_start=2).check(network("mlp-w8", (1, 8, 8), 3), toy().hold_out(0.1))
    assert "not of 'mlp-w9'" in refused(
        replace(source, span=1).check, network("mlp-w9", (1, 8, 8), 3), toy().hold_out(0.1)
    )
    assert "source.max_start = 0 is below 1" in refused(Experts, 0)
    assert "source.span = -1 is below 0" in refused(Experts, 1, -1)
    assert "--experts DIR" in refused(Experts(1, 1).fetch, None, {}, Key(0), 0.0)


def test_no_path_goes_into_a_recipe(kept):
    source = Experts(max_start=3, span=1, folder=str(kept))
    assert source.trajectories.count == 2
    plain = to_dict(Recipe("mine", "paper", source=source))["source"]
    assert {k: v for k, v in plain.items() if k != "kind"} == {"max_start": 3, "span": 1}
    assert source == Experts(max_start=3, span=1) and hash(source) == hash(Experts(max_start=3, span=1))


# --- the command line


def test_the_command_records_and_says_each_expert(tmp_path, capsys):
    out = tmp_path / "e"
    fast = ["experts", "digits", "--network", "mlp-w8", "--count", "2", "--epochs", "2", "--out", str(out)]
    assert main(fast) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "augmentation without flip: a mirrored input may be of another class"
    assert [line.split(":")[0] for line in lines[2:4]] == ["expert 0", "expert 1"]
    assert "held-out accuracy by epoch" in lines[2] and lines[4] == f"2 experts of 2 epochs: {out}"
    assert main(fast) == 2
    assert main([*fast, "--resume"]) == 0
    meta = open_experts(out).meta
    assert meta["training"]["lr"] == 0.01 and meta["training"]["momentum"] == 0 and meta["training"]["batch"] == 256
    assert meta["holdout"] == 0.1 and meta["transform"]["name"] == "standardise" and meta["data"] == "digits"
    assert str(tmp_path) not in json.dumps(meta) and os.sep + "home" not in json.dumps(meta)


def test_ctrl_c_is_130_and_goes_on(tmp_path, capsys, monkeypatch):
    fast = ["experts", "digits", "--network", "mlp-w8", "--count", "2", "--epochs", "2", "--out", str(tmp_path / "e")]
    monkeypatch.setattr(cli, "progress_bar", Stop(15))
    assert main(fast) == 130
    assert "--resume goes on from here" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*fast, "--resume"]) == 0
    assert main([*fast[:-1], str(tmp_path / "whole")]) == 0
    assert bytes_of(tmp_path / "e") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "0"], "--count 0 is below 1"),
        (["--epochs", "0"], "--epochs 0 is below 1"),
        (["--batch", "0"], "--batch 0 is below 1"),
        (["--lr", "0"], "--lr 0 is no lr"),
        (["--lr", "nan"], "--lr nan is no lr"),
        (["--momentum", "-1"], "--momentum -1 is no momentum"),
        (["--augment", "dssa"], "did you mean 'dsa'?"),
        (["--transform", "zcaa"], "did you mean 'zca'?"),
        (["--network", "convnte"], "did you mean 'convnet'?"),
        (["--holdout", "0.9"], "--holdout 0.9 is not between 0 and 0.5"),
        (["--precision", "fp8"], "no precision 'fp8'"),
        (["--resume", "--force"], "give one of them"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(tmp_path, capsys, arguments, words):
    assert main(["experts", "digits", "--out", str(tmp_path / "e"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and error.startswith("potstill: ") and "\n" not in error
    assert not (tmp_path / "e").exists()
