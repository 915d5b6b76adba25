"""Steps in parts: the same gradient; a budget that is kept; data that stay on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from potstill import budget, load_data, pictures, split
from potstill.blame import blame
from potstill.budget import FIRST, MOST, TooLittle, choose, size_of
from potstill.cli import main
from potstill.errors import PotstillError
from potstill.estimate import live_peak
from potstill.experts import record
from potstill.functional import Key, tree_map
from potstill.measure import Anonymous, Clock, anonymous_bytes
from potstill.methods import METHODS
from potstill.networks import Network, State, network
from potstill.recipe import change
from potstill.recompute import in_rows
from potstill.still import Settings, Still
from potstill.testing import toy
from potstill.trajectories import Trajectories

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told on Linux only")
MIB = 1 << 20


def double(tree):
    return tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree)


class Double:
    """A transform in float64."""

    def __init__(self, transform):
        self.transform, self.name = transform, transform.name

    def apply(self, x):
        return self.transform.apply(x.double())


@pytest.fixture
def exact(monkeypatch):
    """Toy data and networks in float64."""
    init, state = Network.init, Trajectories.state
    monkeypatch.setattr(Network, "init", lambda self, key: State(*double(tuple(init(self, key)))))
    monkeypatch.setattr(Trajectories, "state", lambda self, *which: State(*double(tuple(state(self, *which)))))
    data = toy()
    return replace(data, transform=Double(data.transform))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two experts in float32, as files have them."""
    out = tmp_path_factory.mktemp("experts") / "e"
    record(toy(), out=out, network="convnet-instance-w4", count=2, epochs=2, batch=8, compile="off")
    return out


def bound(data, method, norm, rows, recorded, **more):
    """A run on 1, 2 and 3 images per class with 13 real samples (of classes of 12, 9 and 7), and its first step."""
    recipe = change(METHODS[method]("small"), {"network": f"convnet-{norm}-w4", "student": "mlp-w8", **more})
    if method == "mtt":
        recipe = replace(recipe, source=replace(recipe.source, folder=str(recorded)))
    else:
        recipe = change(recipe, {"objective.real": 13})
    still = Still(data, Settings(recipe, [1, 2, 3], 0, 0.0, 8, "cpu", False, "fp32", 1, rows))
    made = still.synthetic
    still.synthetic = lambda learned: replace(made(learned), fixed=double(made(learned).fixed), mask=made(learned).mask.double())  # fmt: skip
    now = double(tuple(still.fresh()))
    _, net, real, draws = still.inputs_of(type(still.fresh())(*now), 0)
    real = real and real._replace(mask=real.mask.double())
    return still, type(still.fresh())(*now), net, real, double(draws)


CASES = [
    ("dm", "instance", {}), ("dm", "batch", {}), ("dc", "instance", {}), ("dc", "batch", {}), ("dsa", "instance", {}),
    ("dd", "instance", {"objective.steps": 3}), ("frepo", "instance", {}), ("kip", "instance", {}),
    ("mtt", "instance", {"objective.steps": 3, "objective.batch": 5, "source.max_start": 1, "source.span": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "norm", "more"), CASES)
def test_the_gradient_of_a_step_in_parts_is_that_of_the_whole(recorded, exact, method, norm, more):
    """In float64, whatever the parts are: of unequal length, of classes with fewer samples than asked for, of one sample."""
    still, now, net, real, draws = bound(exact, method, norm, 0, recorded, **more)
    loss, grads, _ = still.value_and_grad(now, still.target(net, real, draws), net, draws)
    assert set(grads) == set(still.settings.recipe.learn)
    for rows in (1, 2, 5, 8):
        still, now, net, real, draws = bound(exact, method, norm, rows, recorded, **more)
        assert real is None or isinstance(real.inputs, split.Drawn)
        value, found, _ = split.value_and_grad(still, now, net, real, draws)
        assert float(value) == pytest.approx(float(loss), rel=1e-12), rows
        for part, grad in grads.items():
            assert float((found[part] - grad).norm()) <= 1e-12 * float(grad.norm()) and grad.norm() > 0, (rows, part)


@pytest.mark.parametrize("method", ["dm", "dsa", "frepo"])
def test_a_run_in_parts_goes_as_the_whole(method):
    """Steps, training of the networks included, in float32."""
    losses = []
    for rows in (0, 3):
        recipe = change(METHODS[method]("small", 3), {"network": "convnet-w4", "objective.real": 7, "source.epochs": 1})
        still = Still(toy(), Settings(recipe, [3, 3, 3], 0, 0.0, 8, "cpu", False, "fp32", 1, rows))
        now = still.fresh()
        for step in range(3):
            now, loss = still.step(now, step)
            losses.append(loss)
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-3) and len(set(losses[:3])) == 3


@pytest.mark.parametrize("method", ["dm", "frepo"])
def test_a_step_in_parts_that_is_not_finite_is_said_in_a_line(method):
    """Nothing is named, for its pieces are not made whole; nothing fails either."""
    data = toy()
    recipe = change(METHODS[method]("small"), {"network": "convnet-w4", "student": "mlp-w8"})
    still = Still(data, Settings(recipe, [1, 1, 1], 0, 0.0, 8, "cpu", False, "fp32", 1, 4))
    now = still.fresh()
    lost = now._replace(learned={k: v * float("nan") for k, v in now.learned.items()})
    assert blame(still, lost, 0) == ""


def test_rows_at_a_time_keep_less_and_are_differentiable_twice():
    net = network("convnet-w8", (3, 16, 16), 4)
    state, x = State(*double(tuple(net.init(Key(0))))), Key(1).normal(24, 3, 16, 16).double()

    def slope(net):
        """A loss of weights' gradients, as gradient matching has it."""

        def loss(x):
            grads = torch.func.grad(lambda p: net(State(p, state.buffers), x, "stored").logsumexp(1).mean())(
                state.params
            )
            return sum(g.square().sum() for g in grads.values())

        return torch.func.grad(loss)

    wanted = slope(net)(x)
    for rows in (1, 5, 23):
        assert torch.allclose(slope(net.by(rows))(x), wanted, rtol=1e-10, atol=1e-14 * float(wanted.abs().max()))
    assert live_peak(slope(net.by(4)), x) < 0.35 * live_peak(slope(net), x)
    assert torch.equal(in_rows(lambda x: x + 1, x, 7), x + 1)


def test_samples_that_mix_are_not_taken_apart():
    batch = network("convnet-batch-w4", (1, 8, 8), 3)
    assert not batch.splits("batch") and batch.splits("stored") and network("convnet-w4", (1, 8, 8), 3).splits("batch")
    state, x = batch.init(Key(0)), Key(1).normal(6, 1, 8, 8)
    logits, seen = batch.forward(state, x, "batch")
    again, also = batch.by(2).forward(state, x, "batch")
    assert torch.equal(logits, again) and set(seen) == set(also) and len(seen) > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MiB", 500 << 20), ("2GiB", 2 << 30), ("1.5G", 1_500_000_000), ("1.5GB", 1_500_000_000), ("64 kib", 65536), ("123456", 123456)],
)  # fmt: skip
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "-2GiB", "2TiBs", "0", "0.0G", "2 Gi B"])
def test_sizes_that_are_none(text):
    with pytest.raises(PotstillError, match="no amount of memory; 500MiB, 2GiB or 1.5G are"):
        size_of(text)


@pytest.mark.parametrize("budget_", [105, 111, 150, 300, 777, 1500, 10_000])
@pytest.mark.parametrize(
    "takes", [lambda r: 100 + 5 * r, lambda r: 100 + 5 * min(r, 20), lambda r: max(140, 90 + 3 * r)], ids=["line", "full", "floor"]
)  # fmt: skip
def test_the_most_samples_that_a_budget_allows(takes, budget_):
    tried = []

    def trial(rows):
        tried.append(rows)
        return takes(rows)

    if takes(1) > budget_:
        with pytest.raises(TooLittle) as caught:
            choose(trial, budget_, 100)
        assert caught.value.least == takes(1)
        return
    rows, estimate = choose(trial, budget_, 90)
    assert estimate == takes(rows) <= budget_  # what is promised was measured, and fits
    assert sum(takes(r) > budget_ for r in tried if r > FIRST) <= 2
    assert rows == MOST or takes(2 * rows) * budget.ROOM > budget_ or rows < FIRST
    assert len(tried) <= 8


DISTILL = ["distill", "digits", "--method", "dm", "--steps", "2", "--preset", "small", "--network", "convnet-w4", "--set", "looks=1"]  # fmt: skip


@LINUX
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "1MiB"], "--memory 1MiB is less than the"),
        (["--memory", "lots"], "no amount of memory"),
        (["--memory", "9GiB", "--compile", "on"], "leave out --compile on"),
        (["--memory", "9GiB", "--method", "random", "--steps", "0"], "method 'random' takes none"),
        (["--memory", "9GiB"], "--memory: 9.0 GiB are not enough: this run takes about 10.0 GiB with one sample at a time"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_in_one_line(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(budget, "_trial", lambda still, *rest: 10 << 30)
    assert main([*DISTILL, "--out", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    if "10.0 GiB" in words:
        assert "--memory 12300MiB would do" in error


RUN = """
import json, sys
from dataclasses import replace
from potstill import distill, still
still.LOOK = replace(still.LOOK, epochs=2)
lines = []
options = dict(steps=3, preset="small", network="convnet-w16", settings={"looks": 1}, evaluate=False, memory="6GiB", say=lines.append)
run = distill("digits", "dsa", ipc=10, out=sys.argv[1], **options)
print(json.dumps([run.record["memory"], lines]))
"""


@LINUX
def test_the_estimate_is_what_is_taken_and_a_run_goes_on(tmp_path):
    """In a process of its own; then the run is resumed with what its checkpoint says."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    known, lines = json.loads(done.stdout.splitlines()[-1])
    assert known["budget_bytes"] == 6 << 30 and known["rows"] == MOST
    assert known["estimated_bytes"] == pytest.approx(known["anonymous_peak_bytes"], rel=0.25)
    assert any(line.startswith("memory: about") and "of 6.0 GiB" in line for line in lines)


@dataclass(frozen=True)
class Rows:
    """Of a run's settings what a budget chooses."""

    rows: int = 0


@LINUX
def test_what_a_trial_takes_is_not_said_to_be_taken_by_the_run(monkeypatch):
    """A trial with more samples than fit takes 400 MiB and is not followed."""

    def trial(rows, limit, affordable):
        if rows > FIRST:
            kept = np.ones(400 * MIB, dtype=np.uint8)
            time.sleep(0.05)
            return int(kept.nbytes) + limit
        return anonymous_bytes() + rows * MIB

    lines = []
    made = budget.Budget(anonymous_bytes() + 300 * MIB, None, lines.append)
    made.bytes = int(1.15 * (made.bytes + 1))
    monkeypatch.setattr(budget, "Still", lambda data, settings, start: settings.rows)
    monkeypatch.setattr(budget, "_trial", trial)
    assert made.choose(None, Rows(), None, Clock()).rows <= FIRST
    known = made.describe()
    assert known["trials_peak_bytes"] - known["anonymous_peak_bytes"] > 300 * MIB
    assert known["estimated_bytes"] == pytest.approx(known["anonymous_peak_bytes"], abs=50 * MIB)
    assert "while that was tried" in lines[-1]


@LINUX
def test_the_most_memory_between_two_looks():
    with Anonymous(every=60.0) as seen:  # never looks in time
        before = anonymous_bytes()
        np.ones(100 * MIB, dtype=np.uint8)
    assert 90 * MIB < seen.peak - before < 200 * MIB


def folder(root, count, size=256, distinct=4):
    """Two classes of `count` pictures each, few of them distinct: the others are hard links."""
    rng, made = np.random.default_rng(0), []
    for part, many in (("train", count), ("test", 2)):
        for name in ("ash", "birch"):
            (root / part / name).mkdir(parents=True)
            for i in range(many):
                file = root / part / name / f"{i:05d}.png"
                if len(made) < distinct:
                    small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(small.repeat(size // 8, 0).repeat(size // 8, 1)).save(file)
                    made.append(file)
                else:
                    file.hardlink_to(made[i % distinct])
    return root


def beside(function):
    """Run a function in a forked process and return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = function() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@LINUX
def test_a_killed_build_goes_on_where_it_was(tmp_path, monkeypatch):
    """What was decoded before kill -9 is not decoded anew, and the cache is that of a build in one go."""
    root, decode = folder(tmp_path / "trees", 30, size=16), pictures.decode
    monkeypatch.setattr(pictures, "CHUNK", 4)
    cache = Path(os.environ["POTSTILL_CACHE"]) / "decoded"

    def killed():
        left = [41]

        def until(content, convert=None):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(content, convert)

        pictures.decode = until
        load_data(root)

    assert beside(killed) == -signal.SIGKILL
    (left,) = cache.iterdir()
    assert left.name.startswith(".") and not list(cache.glob("[!.]*"))
    chunks = sum(map(any, np.load(left / "train-done.npy")))
    assert chunks >= 5
    damaged = np.load(left / "train-inputs.npy", mmap_mode="r+")  # a page that did not reach the disk
    held = (damaged != 0).any((1, 2, 3)).nonzero()[0]
    damaged[held[0]] ^= 255
    damaged.flush()
    calls = []
    monkeypatch.setattr(
        pictures, "decode", lambda content, convert=None: (calls.append(1), decode(content, convert))[1]
    )
    data = load_data(root)
    assert len(calls) <= 1 + 64 - 4 * chunks + 4  # the first picture is always looked at; one chunk was damaged
    (folder_,) = cache.iterdir()
    files = {f.name: f.read_bytes() for f in folder_.iterdir()}
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "other"))
    again = load_data(root)
    (other,) = (tmp_path / "other" / "decoded").iterdir()
    assert files == {f.name: f.read_bytes() for f in other.iterdir()} and set(files) == {*pictures.FILES, "known.json"}
    assert data.fingerprint == again.fingerprint


@LINUX
def test_a_second_process_waits_for_the_first(tmp_path):
    """It decodes nothing."""
    root, decode = folder(tmp_path / "trees", 10, size=16), pictures.decode

    def load(log):
        def noted(content, convert=None):
            with open(log, "a") as file:
                file.write("x")
            return decode(content, convert)

        pictures.decode = noted
        load_data(root)

    children = [os.fork() for _ in range(1)]
    if children == [0]:
        try:
            load(tmp_path / "log")
        finally:
            os._exit(0)
    assert beside(lambda: load(tmp_path / "log")) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    assert len((tmp_path / "log").read_text()) == 25  # 24 pictures, and the first for its shape


@LINUX
def test_data_beyond_memory_stay_on_disk(tmp_path, monkeypatch):
    """128 MiB decoded: neither building nor steps of DM and FRePo take as much, networks and workspaces included.

    What is measured is at least what was taken, more where a look at mapped pages comes late: the least of some rounds counts.
    """
    root, few = folder(tmp_path / "trees", 340), folder(tmp_path / "few", 8)

    def grown():
        load_data(few)  # imports and threads, which no data make larger
        with Anonymous() as seen:
            before = anonymous_bytes()
            data = load_data(root)
            held = data.hold_out(0.1)
        built = seen.peak - before
        size = sum(t.inputs.nbytes for t in (data.train, data.test))
        with Anonymous() as seen:
            before = anonymous_bytes()
            for method in ("dm", "frepo"):
                options = {"network": "convnet-w4", "student": "convnet-w4", "objective.real": 16, "init": "real"}
                recipe = change(METHODS[method]("small"), {**options, "source.size": 1})
                still = Still(held, Settings(recipe, [1, 1], 0, 0.1, 1, "cpu", False, "fp32", 1, 1))
                still.step(still.fresh(), 0)
        (tmp_path / "log").write_text(json.dumps([size, built, seen.peak - before]))

    rounds = []
    for i in range(6):
        monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / f"cache{i}"))  # decoded anew
        assert beside(grown) == 0
        size, *taken = json.loads((tmp_path / "log").read_text())
        assert size > pictures.MAPPED
        rounds.append(taken)
        built, stepped = (min(part) for part in zip(*rounds, strict=True))
        if built < 0.6 * size and stepped < 0.9 * size:
            break
    assert built < 0.6 * size and stepped < 0.9 * size, (built / MIB, stepped / MIB)
