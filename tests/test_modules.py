"""PyTorch modules as networks: equal to themselves, drawn by key, refused where they are not pure."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import potstill
from potstill import still
from potstill.errors import PotstillError
from potstill.evaluation import evaluate
from potstill.functional import Key, cast
from potstill.modules import split
from potstill.networks import Network, State, network, wrap
from potstill.testing import check_method, toy
from potstill.training import PROTOCOLS


class Mine(nn.Module):
    """A small network with a constant of its own; `tail` and `middle` are for mistakes."""

    def __init__(self, middle=None, tail=None, outputs=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True))
        self.middle = middle or nn.Identity()
        self.tail = tail or nn.Identity()
        self.fc = nn.Linear(4 * 16, outputs)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        x = self.middle(self.stem(x))
        return self.tail(self.fc(F.avg_pool2d(self.scale * x, 2).flatten(1)))


def filled(module, state):
    """The module itself, with the weights of a state."""
    tensors = {**state.params, **state.buffers}
    module.load_state_dict({k.removeprefix("body.").replace("head.", "fc."): v for k, v in tensors.items()})
    return module


def noise(*shape, seed=0):
    return Key(seed).fold("x").normal(*shape)


@pytest.mark.parametrize("given", [Mine, Mine(), lambda: Mine().eval()])
def test_equals_the_modules_own_forward(given):
    net, x = wrap(given, "mine", (1, 8, 8), 3), noise(5, 1, 8, 8)
    assert isinstance(net, Network) and (net.name, net.shape, net.outputs, net.notes) == ("mine", (1, 8, 8), 3, ())
    state = net.init(Key(0).fold("init"))
    module = filled(Mine(), state)
    logits, seen = net.forward(state, x)
    torch.testing.assert_close(logits, module(x))
    torch.testing.assert_close(net(state, x, "stored"), module(x))
    assert seen == {} and not net.mixes_samples and set(state.buffers) == {"body.scale"}
    features = net.features(state, x)
    torch.testing.assert_close(features, F.avg_pool2d(2 * module.stem(x), 2).flatten(1))
    assert torch.equal(net.head(state, features), logits)
    torch.testing.assert_close(net.at(torch.bfloat16)(state, x), logits, rtol=0.1, atol=0.1)
    assert net.at(torch.bfloat16)(state, x).dtype == torch.float32


def test_gradients_of_gradients_and_stacked_weights():
    net, x = wrap(Mine, "mine", (1, 8, 8), 3), noise(4, 1, 8, 8).double()
    states = [State(*cast(tuple(net.init(Key(i))), torch.float64)) for i in range(2)]
    state = states[0]

    def distance(x):
        grads = torch.func.grad(lambda p: net(State(p, state.buffers), x).square().mean())(state.params)
        return sum((g**2).sum() for g in grads.values())

    way, h = noise(4, 1, 8, 8, seed=1).double(), 1e-6
    numeric = (distance(x + h * way) - distance(x - h * way)) / (2 * h)
    torch.testing.assert_close((torch.func.grad(distance)(x) * way).sum(), numeric, rtol=1e-5, atol=1e-9)
    stacked = State(*({k: torch.stack([s[i][k] for s in states]) for k in states[0][i]} for i in range(2)))
    together = torch.func.vmap(lambda p, b: net(State(p, b), x))(*stacked)
    torch.testing.assert_close(together[1], net(states[1], x))


@pytest.mark.parametrize("given", [Mine, Mine()])
def test_weights_follow_the_key_alone(given):
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    net = wrap(given, "mine", (1, 8, 8), 3)
    a, b, c = (net.init(Key(s).fold("x")).params for s in (0, 0, 1))
    assert torch.equal(rng, torch.get_rng_state())
    torch.manual_seed(6)
    again = wrap(given, "mine", (1, 8, 8), 3).init(Key(0).fold("x")).params
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], again[k]) for k in a)
    drawn = [k for k in a if ".1." not in k]
    assert len(drawn) == 4 and not any(torch.equal(a[k], c[k]) for k in drawn)
    assert all(v.requires_grad is False for v in a.values())


def test_the_given_module_stays_as_it_is():
    given = Mine().eval()
    before = {k: v.clone() for k, v in given.state_dict().items()}
    wrap(given, "mine", (1, 8, 8), 3).init(Key(0))
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items()) and not given.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in given.modules())
    assert isinstance(given.fc, nn.Linear)


def test_the_head_may_be_named_and_may_be_all():
    class Two(Mine):
        def forward(self, x):
            return self.fc(self.middle(x.flatten(1).relu()))

    net = wrap(lambda: Two(middle=nn.Linear(64, 64)), "two", (1, 8, 8), 3, head="fc")
    assert net.features(net.init(Key(0)), noise(2, 1, 8, 8)).shape == (2, 64)
    with pytest.raises(PotstillError, match="no nn.Linear 'stem'"):
        wrap(Mine, "mine", (1, 8, 8), 3, head="stem")
    with pytest.raises(PotstillError, match="does more with its logits than its linear head 'middle'"):
        wrap(lambda: Two(middle=nn.Linear(64, 64)), "two", (1, 8, 8), 3, head="middle")
    linear = wrap(nn.Linear(7, 2, bias=False), "linear", (7,), 2)
    state, x = linear.init(Key(0)), noise(3, 7)
    assert set(state.params) == {"head.weight"}
    assert torch.equal(linear.features(state, x), x) and torch.equal(
        linear(state, x), x @ state.params["head.weight"].T
    )


def test_samples_that_see_each_other_are_noticed():
    net = wrap(lambda: Mine(middle=nn.BatchNorm2d(4, track_running_stats=False)), "mine", (1, 8, 8), 3)
    assert net.mixes_samples and "rest of its batch" in net.notes[0]


def test_weights_that_are_always_the_same_are_noticed():
    def same():
        module = Mine()
        for p in module.parameters():
            nn.init.constant_(p, 0.1)
        return module

    assert wrap(same, "same", (1, 8, 8), 3).notes == ("same: fresh weights are always the same, whatever the seed",)


def test_a_whole_may_draw_its_parts_itself():
    class Whole(nn.Sequential):
        def reset_parameters(self):
            nn.init.zeros_(self[1].bias)

    net = wrap(Whole(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 3)), "whole", (1, 8, 8), 3)
    params = net.init(Key(0)).params
    assert not params["body.1.bias"].any() and params["body.1.weight"].all() and params["head.bias"].all()


def test_frozen_weights_are_not_trained():
    def frozen():
        module = Mine()
        module.stem.requires_grad_(False)
        return module

    state = wrap(frozen, "frozen", (1, 8, 8), 3).init(Key(0))
    assert set(state.params) == {"head.weight", "head.bias"} and len(state.buffers) == 5


# --- refused


class Count(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x


class Own(nn.Module):
    """Batch norm by hand."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, training=True)


class Wanders(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Picks(nn.Module):
    def forward(self, x):
        return F.pad(x[x > 0], (0, x.numel() - int((x > 0).sum()))).view(x.shape)


class Branches(nn.Module):
    def forward(self, x):
        return 2 * x if x.sum() > 0 else x


class Shifted(nn.Module):
    def forward(self, x):
        return x.add_(1)


class Fails(nn.Module):
    def forward(self, x):
        return x @ torch.zeros(3, 3)


class Free(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.w * x


def twice_called():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 64))
    return nn.Sequential(*module, module[1])


def tied():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    module[3].weight = module[1].weight
    return module


@pytest.mark.parametrize(
    ("given", "outputs", "words"),
    [
        (lambda: Mine(nn.BatchNorm2d(4)), 3, ["BatchNorm2d 'middle'", "'running_mean'", "track_running_stats=False"]),
        (lambda: Mine(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))), 3, ["BatchNorm2d 'middle.1'"]),
        (lambda: Mine(nn.BatchNorm2d(4)).eval(), 3, ["BatchNorm2d 'middle'"]),  # the mode it comes in changes nothing
        (lambda: Mine(nn.InstanceNorm2d(4, track_running_stats=True)), 3, ["InstanceNorm2d 'middle'", "running_mean"]),
        (lambda: Mine(nn.Dropout(0.5)), 3, ["Dropout 'middle'", "random", "set its p to 0"]),
        (lambda: Mine(tail=nn.Dropout(0.5)), 3, ["Dropout 'tail'", "random"]),
        (lambda: Mine(nn.RReLU()), 3, ["RReLU 'middle'", "random"]),
        (lambda: Mine(Count()), 3, ["Count 'middle'", "'calls'"]),
        (lambda: Mine(Own()), 3, ["Own 'middle'", "'mean'"]),
        (lambda: Mine(Wanders()), 3, ["other logits when it is called again"]),
        (lambda: Mine(Picks()), 3, ["Picks 'middle'", "depend on values"]),
        (lambda: Mine(Branches()), 3, ["Branches 'middle'", "depend on values"]),
        (lambda: nn.Sequential(Shifted(), Mine()), 3, ["Shifted '0'", "input in place"]),
        (lambda: Mine(Fails()), 3, ["Fails 'middle'", "fails"]),
        (lambda: Mine(tail=nn.LogSoftmax(1)), 3, ["does more with its logits", "'fc'"]),
        (lambda: Mine(outputs=4), 3, ["(3, 4)", "(3, 3)"]),
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), 3, ["no nn.Linear"]),
        (twice_called, 64, ["called 2 times"]),
        (tied, 64, ["shares its weight with '1'"]),
        (lambda: nn.LSTM(8, 3), 3, ["LSTM"]),
        (lambda: "text", 3, ["nn.Module", "str"]),
        (lambda: None, 3, ["nn.Module", "NoneType"]),
        (Mine(Free()), 3, ["Free 'middle'", "reset_parameters()", "'w'"]),
    ],
)
def test_what_is_not_pure_is_refused_by_name(given, outputs, words):
    rng = torch.get_rng_state()
    with pytest.raises(PotstillError) as caught:
        wrap(given, "mine", (1, 8, 8), outputs)
    text = str(caught.value)
    assert all(word in text for word in ["'mine'", *words]), text
    assert "\n" not in text and len(text) < 400
    assert torch.equal(rng, torch.get_rng_state())


def test_neither_module_nor_function():
    with pytest.raises(PotstillError, match="a function that makes one, not str"):
        split("text", "mine", (1, 8, 8), 3, None)


def test_weights_from_elsewhere_are_refused():
    state = iter(range(10_000))

    def other():
        module = Mine()
        nn.init.constant_(module.fc.weight, float(next(state)))
        return module

    with pytest.raises(PotstillError, match="elsewhere"):
        wrap(other, "other", (1, 8, 8), 3)


# --- networks from outside


@pytest.fixture
def short(monkeypatch):
    """Protocols of a few steps."""
    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=2))
    for name, protocol in list(PROTOCOLS.items()):
        monkeypatch.setitem(PROTOCOLS, name, replace(protocol, epochs=3, steps=0))


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_networks.py").write_text(
        "import math\n"
        "from torch import nn\n"
        "from dataclasses import replace\n"
        "from potstill.networks import network\n"
        "def module(shape, outputs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 16), nn.Tanh(), nn.Linear(16, outputs))\n"
        "def ours(shape, outputs):\n    return network('lenet-batch', shape, outputs)\n"
        "def dropout(shape, outputs):\n    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, outputs))\n"
        "def wrong(shape, outputs):\n    return network('lenet', shape, outputs + 1)\n"
        "def text(shape, outputs):\n    return 'convnet'\n"
        "def short(shape):\n    return None\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "outside_networks"


def test_a_network_from_outside(outside):
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    net = network(f"{outside}:module", (1, 8, 8), 3)
    assert net.name == f"{outside}:module" and net(net.init(Key(0)), noise(2, 1, 8, 8)).shape == (2, 3)
    ours = network(f"{outside}:ours", (1, 8, 8), 3)
    assert ours.name == f"{outside}:ours" and ours.mixes_samples and ours.notes
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (":absent", ["cannot be imported", "absent", "package.module:function"]),
        ("x:module", ["cannot be imported", "outside_networksx"]),
        (":", ["cannot be imported"]),
        (":number", ["no function (shape, outputs)"]),
        (":short", ["no function (shape, outputs)"]),
        (":text", ["neither Network nor nn.Module but str"]),
        (":wrong", ["(1, 8, 8)", "4 outputs", "3"]),
        (":dropout", ["Dropout '1'"]),
    ],
)
def test_what_is_wrong_with_one_is_said(outside, tail, words):
    with pytest.raises(PotstillError) as caught:
        network(outside + tail, (1, 8, 8), 3)
    assert all(word in str(caught.value) for word in [outside + tail, *words]), caught.value


@pytest.mark.parametrize("name", ["", ":", ":module"])
def test_names_with_nothing_before_the_colon(name):
    with pytest.raises(PotstillError, match="no network|cannot be imported"):
        network(name, (1, 8, 8), 3)


def test_distil_and_evaluate_with_one(outside, short, tmp_path, monkeypatch):
    name, data = f"{outside}:module", toy()
    settings = {"objective.real": 8, "looks": 1}
    run = potstill.distill(
        data, "dm", steps=2, network=name, settings=settings, out=tmp_path / "run", repeats=1, compile="off"
    )
    assert run.set.meta.student == run.record["recipe"]["network"] == name
    assert [r["network"] for r in run.record["results"]] == [name] * len(run.record["results"])
    assert [r["method"] for r in run.record["results"]] == ["dm", "random", "k-means", "random-soft", "whole"]

    options = {"protocol": "dc", "repeats": 1, "compile": "off"}
    (result,) = evaluate(tmp_path / "run", data, networks=[name], **options)
    assert result.network == name and 0 <= result.accuracy_mean <= 1
    (other,) = evaluate(tmp_path / "run", data, networks=["lenet-w3"], **options)
    assert other.network == "lenet-w3"
    with pytest.raises(PotstillError, match=f"not run because a file says so.*--networks {name}"):
        evaluate(tmp_path / "run", data, **options)
    # the reference on the whole set is kept for networks whose name says what they are
    again = potstill.load(tmp_path / "run")
    kept = tmp_path / "cache"
    monkeypatch.setenv("POTSTILL_CACHE", str(kept))
    evaluate(again, data, networks=[name], baselines=["whole"], **options)
    assert not kept.exists()
    evaluate(again, data, networks=["mlp-w4"], baselines=["whole"], **options)
    assert len(list(kept.rglob("*.json"))) == 1


def test_the_contract_holds_with_one(outside):
    from potstill.methods import METHODS

    check_method(METHODS["dm"]("paper"), network=f"{outside}:module")


@pytest.mark.parametrize("network", ["resnet18-w2", "vgg11-batch-w2"])
def test_the_contract_holds_with_deep_networks(network):
    from potstill.methods import METHODS

    check_method(METHODS["dm"]("paper"), network=network)


def test_notes_are_said_once(short, tmp_path):
    said = []
    run = potstill.distill(toy(), "dm", steps=1, network="vgg11-w2", settings={"objective.real": 4, "looks": 0},
                           out=tmp_path / "run", evaluate=False, compile="off", say=said.append)  # fmt: skip
    assert sum("2 of 5 pools" in line for line in said) == 1
    said.clear()
    evaluate(run.set, toy(), protocol="dc", repeats=1, compile="off", say=said.append)
    assert sum("2 of 5 pools" in line for line in said) == 1
