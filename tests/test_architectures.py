"""The field's networks against the published ones, written out in modules of `torch.nn`, and whatever the image."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from potstill.errors import PotstillError
from potstill.functional import Key, cast
from potstill.layers import Apply, Chain, Conv, Residual
from potstill.networks import NORMS, Layer, Norm, State, narrow, network

KINDS = ("lenet", "alexnet", "vgg11", "resnet18")
ALL = [(kind, norm) for kind in KINDS for norm in NORMS]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def double(state):
    return State(*cast(tuple(state), torch.float64))


def noise(*shape, seed=0):
    return Key(seed).fold("x").normal(*shape).double()


def made(name, shape, outputs=10, seed=0):
    """A network and weights in float64, scale and shift of its norms no longer 1 and 0."""
    net = network(name, shape, outputs)
    state = double(net.init(Key(seed).fold("init")))
    for k, v in state.params.items():
        if k.split(".")[-2].startswith("norm"):
            state.params[k] = v + 0.3 * Key(seed).fold(k).normal(*v.shape).double()
    return net, state


# --- against the published networks


def norm_module(norm, channels):
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    groups = {"instance": channels, "group": math.gcd(4, channels), "layer": 1}[norm]
    return nn.GroupNorm(groups, channels)


# (kernel, padding, channels out) of a convolution, "M" for a max pool, for images of 32 x 32
PLAIN = {
    "lenet": [(5, 0, 6), "M", (5, 0, 16), "M"],
    "alexnet": [(5, 2, 128), "M", (5, 2, 192), "M", (3, 1, 256), (3, 1, 192), (3, 1, 192), "M"],
    "vgg11": [(3, 1, c) if c != "M" else c for c in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")],
}
DENSE = {"lenet": [16 * 5 * 5, 120, 84, 10], "alexnet": [192 * 4 * 4, 10], "vgg11": [512, 10]}


def plain(kind, norm, channels, more=0):
    """A published network without shortcuts; `more` is added to the first padding, as for 28 x 28."""
    parts, named = [], {}

    def add(module, name=None):
        parts.append(module)
        if name:
            named[name] = module

    inputs, i = channels, 0
    for step in PLAIN[kind]:
        if step == "M":
            add(nn.MaxPool2d(2, 2))
            continue
        kernel, padding, outputs = step
        add(nn.Conv2d(inputs, outputs, kernel, padding=padding + (more if i == 0 else 0)), f"conv{i}")
        if norm != "none":
            add(norm_module(norm, outputs), f"norm{i}")
        add(nn.ReLU())
        inputs, i = outputs, i + 1
    add(nn.Flatten())
    sizes = DENSE[kind]
    for j, (a, b) in enumerate(itertools.pairwise(sizes)):
        add(nn.Linear(a, b), "head" if b == 10 else f"linear{j}")
        if b != 10:
            add(nn.ReLU())
    return nn.Sequential(*parts), named


class Residuals(nn.Module):
    """ResNet-18 for small images, of torchvision's blocks."""

    def __init__(self, norm, channels, width=64):
        super().__init__()
        make = nn.Identity if norm == "none" else lambda c: norm_module(norm, c)
        biased = norm == "none"
        self.stem, self.norm = nn.Conv2d(channels, width, 3, padding=1, bias=biased), make(width)
        self.named = {"conv0": self.stem, "norm0": self.norm}
        blocks, inputs = [], width
        for i in range(8):
            outputs, stride = width * 2 ** (i // 2), 2 if i in (2, 4, 6) else 1
            down = None
            if inputs != outputs:
                down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=biased), make(outputs))
            block = BasicBlock(inputs, outputs, stride, down, norm_layer=make)
            if biased:  # without a norm the convolutions have biases
                block.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
                block.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
            blocks.append(block)
            pairs = {"body.conv0": block.conv1, "body.norm0": block.bn1, "body.conv1": block.conv2,
                     "body.norm1": block.bn2}  # fmt: skip
            if down is not None:
                pairs |= {"shortcut.conv": down[0], "shortcut.norm": down[1]}
            self.named |= {f"block{i}.{k}": v for k, v in pairs.items()}
            inputs = outputs
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, 10)
        self.named["head"] = self.head

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def published(kind, norm, state, channels=3, more=0):
    """The published network with the given weights, every one of which is used."""
    if kind == "resnet18":
        module = Residuals(norm, channels)
        named = module.named
    else:
        module, named = plain(kind, norm, channels, more)
    used = set()
    with torch.no_grad():
        module.double()
        for name, part in named.items():
            for which, p in part.named_parameters():
                p.copy_(state.params[f"{name}.{which}"])
                used.add(f"{name}.{which}")
    assert used == set(state.params)
    return module, named


@pytest.mark.parametrize(("kind", "norm"), ALL)
def test_equals_the_published_network_at_32_pixels(kind, norm):
    net, state = made(f"{kind}-{norm}", (3, 32, 32))
    theirs, _ = published(kind, norm, state)
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(state, x), theirs.train()(x), **CLOSE)
    assert net.notes == ()


@pytest.mark.parametrize(("kind", "more"), [("lenet", 2), ("alexnet", 2), ("vgg11", 2), ("resnet18", 0)])
def test_equals_the_published_network_at_28_pixels(kind, more):
    """28 x 28 is computed as 32 x 32, except by the network of strides."""
    net, state = made(kind, (1, 28, 28))
    theirs, _ = published(kind, {"lenet": "none", "alexnet": "none"}.get(kind, "instance"), state, 1, more)
    x = noise(2, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(net(state, x), theirs(x), **CLOSE)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lenet", 62_006),
        ("alexnet", 1_872_202),
        ("vgg11-batch", 9_231_114),
        ("vgg11", 9_231_114),
        ("resnet18-batch", 11_173_962),
        ("resnet18", 11_173_962),
    ],
)
def test_as_many_weights_as_published(name, count):
    params = network(name, (3, 32, 32), 10).init(Key(0)).params
    assert sum(p.numel() for p in params.values()) == count


def test_batch_statistics_of_residual_blocks_equal_torchs_running_ones():
    net, state = made("resnet18-batch", (3, 32, 32))
    theirs, named = published("resnet18", "batch", state)
    with torch.no_grad():
        for seed in range(2):
            x = 2 * noise(3, 3, 32, 32, seed=seed) + 1
            logits, seen = net.forward(state, x, "batch")
            torch.testing.assert_close(logits, theirs.train()(x), **CLOSE)
            assert seen.keys() == state.buffers.keys() and len(seen) == 2 * (1 + 16 + 3)
            state = State(state.params, net.stored(state.buffers, seen))
        for k, part in named.items():
            if isinstance(part, nn.BatchNorm2d):
                torch.testing.assert_close(state.buffers[k + ".mean"], part.running_mean, **CLOSE)
                torch.testing.assert_close(state.buffers[k + ".variance"], part.running_var, **CLOSE)
        x = noise(2, 3, 32, 32, seed=9)
        torch.testing.assert_close(net(state, x, "stored"), theirs.eval()(x), **CLOSE)
        assert net.forward(state, x, "stored")[1] == {}


# --- any image


@pytest.fixture
def maps(monkeypatch):
    """The sides of every map that is normalised."""
    met, call = [], Norm.__call__

    def watched(self, state, x, stats, seen):
        met.append(tuple(x.shape[2:]))
        return call(self, state, x, stats, seen)

    monkeypatch.setattr(Norm, "__call__", watched)
    return met


CONVOLUTIONS = {"lenet": 2, "alexnet": 5, "vgg11": 8, "resnet18": 20}
SIDES = [(8, 8), (128, 128), (12, 20), (2, 2), (3, 2), (4, 4), (5, 7), (9, 9), (10, 31), (17, 8), (24, 24), (8, 128), (32, 32),
         (64, 64), (100, 33)]  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_image_and_every_normalised_map_at_least_2x2(kind, norm, maps):
    for i, sides in enumerate(SIDES if norm in ("none", "instance") else SIDES[:3]):
        channels = (1, 3, 5)[i % 3]
        net, state = made(f"{kind}-{norm}-w4", (channels, *sides))
        x = noise(3, channels, *sides)
        maps.clear()
        with torch.no_grad():
            logits = net(state, x)
            assert logits.shape == (3, 10) and logits.isfinite().all()
            assert len(maps) == (0 if norm == "none" else CONVOLUTIONS[kind])
            assert all(min(sides) >= 2 for sides in maps), (sides, maps)
            assert not torch.equal(logits[0], logits[1])  # instance norm on 1 x 1 would give every image the same
            features = net.features(state, x)
        assert features.ndim == 2 and torch.equal(net.head(state, features), logits)
        assert (net.shape, net.outputs, net.mixes_samples) == ((channels, *sides), 10, norm == "batch")


def test_without_a_norm_a_map_may_be_one_pixel():
    net, state = made("vgg11-none-w4", (1, 8, 8))
    assert net.features(state, noise(2, 1, 8, 8)).shape == (2, 32)
    assert net.notes == ("vgg11-none-w4: 2 of 5 pools left out so that any map of 8 x 8 images is at least 1 x 1",)
    assert [name for name, _ in net.layers if name.startswith("pool")] == ["pool0", "pool1", "pool3"]


@pytest.mark.parametrize(
    ("name", "sides", "note"),
    [
        (
            "vgg11",
            (8, 8),
            "vgg11: 2 of 5 pools left out so that every normalised map of 8 x 8 images is at least 2 x 2",
        ),
        (
            "vgg11-batch",
            (12, 20),
            "vgg11-batch: 1 of 5 pools left out so that every normalised map of 12 x 20 images is",
        ),
        (
            "resnet18",
            (8, 8),
            "resnet18: 1 of 3 strides left out so that every normalised map of 8 x 8 images is at least",
        ),
        ("resnet18-none", (4, 4), None),
        ("lenet", (8, 8), "lenet: the second convolution pads its map, which is 4 x 4 only"),
        ("alexnet", (8, 8), None),
        ("vgg11", (28, 28), None),
        ("vgg11", (64, 48), None),
        ("resnet18", (12, 20), None),
        ("lenet", (20, 20), None),
    ],
)
def test_notes_say_what_was_left_out(name, sides, note):
    notes = network(name + "-w4", (1, *sides), 3).notes
    if note is None:
        assert notes == ()
    else:
        kind, _, rest = note.partition(":")
        assert len(notes) == 1 and notes[0].startswith(f"{kind}-w4:{rest}")


def test_the_late_pools_go_first():
    """The last one of all stays: no norm comes after it."""
    pools = [name for name, _ in network("vgg11-w4", (1, 8, 8), 3).layers if name.startswith("pool")]
    assert pools == ["pool0", "pool1", "pool7"]
    blocks = [
        layer.body.layers[0][1].stride for name, layer in network("resnet18-w4", (1, 8, 8), 3).layers if "block" in name
    ]
    assert blocks == [1, 1, 2, 1, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "features"), [("lenet", 84), ("alexnet", 192 * 8 * 8), ("vgg11", 512 * 4), ("resnet18", 512)]
)
def test_heads_are_sized_to_the_image(kind, features):
    assert dict(network(kind, (3, 64, 64), 7).layers)["head"].inputs == features


# --- purity


@pytest.mark.parametrize(("kind", "norm"), ALL)
def test_pure_and_twice_differentiable(kind, norm):
    net, state = made(f"{kind}-{norm}-w4", (2, 8, 8), 3)
    x, y = noise(4, 2, 8, 8), torch.tensor([0, 1, 2, 1])
    before, given = {k: v.clone() for part in state for k, v in part.items()}, x.clone()

    def distance(x):
        grads = torch.func.grad(lambda p: F.cross_entropy(net(State(p, state.buffers), x), y))(state.params)
        assert grads.keys() == state.params.keys()
        return sum((g**2).sum() for g in grads.values())

    direction, h = noise(4, 2, 8, 8, seed=1), 1e-6
    grad = torch.func.grad(distance)(x)
    numeric = (distance(x + h * direction) - distance(x - h * direction)) / (2 * h)
    assert float(grad.norm()) > 0
    torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-4, atol=1e-8)
    assert torch.equal(x, given) and all(torch.equal(v, before[k]) for part in state for k, v in part.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_vmap_over_stacked_weights(kind, norm):
    net = network(f"{kind}-{norm}-w4", (1, 8, 8), 3)
    states = [double(net.init(Key(i))) for i in range(2)]
    stacked = State(*({k: torch.stack([s[i][k] for s in states]) for k in states[0][i]} for i in range(2)))
    x = noise(5, 1, 8, 8)

    def loss(p, b):
        logits, seen = net.forward(State(p, b), x)
        return logits.square().mean(), seen

    grads, seen = torch.func.vmap(torch.func.grad(loss, has_aux=True))(*stacked)
    one, met = torch.func.grad(loss, has_aux=True)(*states[1])
    for k, g in one.items():
        torch.testing.assert_close(grads[k][1], g, rtol=1e-8, atol=1e-10)
    assert seen.keys() == states[0].buffers.keys()
    for k, v in met.items():
        torch.testing.assert_close(seen[k][1], v, **CLOSE)


@pytest.mark.parametrize("name", ["resnet18-w8", "resnet18-batch-w8", "lenet-layer", "vgg11-w8"])
def test_bfloat16_is_near_float32(name):
    net = network(name, (1, 28, 28), 10)
    state, x = net.init(Key(0)), noise(8, 1, 28, 28).float()
    full, (low, seen) = net(state, x), net.at(torch.bfloat16).forward(state, x)
    assert low.dtype == torch.float32 and all(v.dtype == torch.float32 for v in seen.values())
    assert not torch.equal(full, low) and float((full - low).norm() / full.norm()) < 0.1
    grads = torch.func.grad(lambda p: net.at(torch.bfloat16)(State(p, state.buffers), x).square().mean())(state.params)
    assert {g.dtype for g in grads.values()} == {torch.float32}


def test_every_weight_is_drawn_for_itself():
    """Two blocks of the same form have other numbers; the global generator is left alone."""
    rng = torch.get_rng_state()
    params = network("resnet18-w8", (1, 8, 8), 3).init(Key(0)).params
    assert torch.equal(rng, torch.get_rng_state())
    drawn = [v for k, v in params.items() if "norm" not in k]
    assert all(a.shape != b.shape or not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


# --- layers of layers


def test_residual_is_the_sum_of_its_sides():
    body = Chain((("conv", Conv(2, 2)), ("norm", Norm("batch", 2))))
    layer, x = Residual(body), noise(3, 2, 4, 4)
    state, seen, alone = double(layer.init(Key(0))), {}, {}
    assert isinstance(layer, Layer) and isinstance(body, Layer) and layer.mixes_samples
    assert set(state.params) == {"body.conv.weight", "body.conv.bias", "body.norm.weight", "body.norm.bias"}
    inner = State(*({k.removeprefix("body."): v for k, v in part.items()} for part in state))
    out = layer(state, x, "batch", seen)
    torch.testing.assert_close(out, x + body(inner, x, "batch", alone), **CLOSE)
    assert seen.keys() == {"body.norm.mean", "body.norm.variance"}
    assert all(torch.equal(seen["body." + k], v) for k, v in alone.items())
    two = Residual(Chain((("twice", Apply(lambda x: 2 * x)),)), body)
    assert two.mixes_samples and not Residual(Chain()).mixes_samples
    assert torch.equal(Residual(Chain())(State({}, {}), x, "batch", {}), 2 * x)


def test_names_of_layers_may_begin_alike():
    """`conv1` and `conv10` are kept apart."""
    chain = Chain(tuple((f"conv{i}", Conv(1, 1)) for i in (1, 10)))
    state, x = chain.init(Key(0)), noise(2, 1, 4, 4).float()
    by_hand = x
    for i in (1, 10):
        by_hand = F.conv2d(by_hand, state.params[f"conv{i}.weight"], state.params[f"conv{i}.bias"], padding=1)
    torch.testing.assert_close(chain(state, x, "batch", {}), by_hand)


# --- names


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("lenet-none", "lenet"),
        ("lenet-w6", "lenet"),
        ("lenet-instance-w12", "lenet-instance-w12"),
        ("alexnet-none-w128", "alexnet"),
        ("alexnet-instance", "alexnet-instance"),
        ("vgg11-instance-w64", "vgg11"),
        ("vgg11-batch-w16", "vgg11-batch-w16"),
        ("resnet18-instance", "resnet18"),
        ("resnet18-w16", "resnet18-w16"),
        ("resnet18-none", "resnet18-none"),
    ],
)
def test_canonical_names_round_trip(name, canonical):
    net = network(name, (1, 8, 8), 3)
    again = network(net.name, (1, 8, 8), 3)
    assert net.name == again.name == canonical
    assert repr(again) == repr(net)  # the same description, layer by layer


def test_width_scales_every_stage():
    narrow_, wide = (network(f"vgg11-w{w}", (1, 32, 32), 3).init(Key(0)).params for w in (8, 64))
    assert [v.shape[0] for k, v in narrow_.items() if "conv" in k and "weight" in k] == [8, 16, 32, 32, 64, 64, 64, 64]
    assert [v.shape[0] for k, v in wide.items() if "conv" in k and "weight" in k] == [
        64,
        128,
        256,
        256,
        512,
        512,
        512,
        512,
    ]
    one = network("lenet-w1", (1, 8, 8), 3).init(Key(0)).params
    assert [len(one[k + ".bias"]) for k in ("conv0", "conv1", "linear0", "linear1", "head")] == [1, 3, 20, 14, 3]


@pytest.mark.parametrize(
    ("name", "narrowed"),
    [
        ("vgg11", "vgg11-w16"),
        ("resnet18-batch", "resnet18-batch-w16"),
        ("alexnet", "alexnet-w32"),
        ("lenet", "lenet"),  # it is small already
        ("lenet-w64", "lenet-w8"),
        ("resnet18-w4", "resnet18-w4"),
        ("package.module:function", "package.module:function"),
        ("zebra", "zebra"),
    ],
)
def test_narrow(name, narrowed):
    assert narrow(name) == narrowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tail", "shape", "words"),
    [
        ("-d4", (1, 8, 8), ["has one depth", "leave out -d4"]),
        ("", (64,), ["(64,)", "try 'mlp'"]),
        ("", (3, 1, 9), ["1 x 9", "at least 2 x 2", "try 'mlp'"]),
        ("-bach", (1, 8, 8), ["-bach", *NORMS]),
        ("-w0", (1, 8, 8), ["start at 1"]),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(kind, tail, shape, words):
    with pytest.raises(PotstillError) as caught:
        network(kind + tail, shape, 10)
    assert all(word in str(caught.value) for word in [kind, *words]) and "\n" not in str(caught.value)
