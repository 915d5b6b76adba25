"""Networks against the same ones built of `torch.nn` modules, and what being pure must allow."""

import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.errors import PotstillError
from potstill.functional import Key, cast
from potstill.networks import NETWORKS, NORMS, Conv, Norm, State, narrow, network

VALID = [(kind, norm) for kind in ("convnet", "widenet") for norm in NORMS] + [
    ("mlp", norm) for norm in NORMS if norm != "instance"
]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def double(state):
    return State(*cast(tuple(state), torch.float64))


def made(name, shape=(1, 28, 28), outputs=10, seed=0):
    """A network and weights in float64, scale and shift of its norms no longer 1 and 0."""
    net = network(name, shape, outputs)
    state = double(net.init(Key(seed).fold("init")))
    for k, v in state.params.items():
        if k.startswith("norm"):
            state.params[k] = v + 0.3 * Key(seed).fold(k).normal(*v.shape).double()
    return net, state


def noise(*shape, seed=0):
    return Key(seed).fold("x").normal(*shape).double()


def module_norm(norm, channels, two):
    if norm == "batch":
        return (nn.BatchNorm2d if two else nn.BatchNorm1d)(channels)
    groups = {"instance": channels, "group": math.gcd(4, channels), "layer": 1}[norm]
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.GroupNorm(groups, channels)


def modules(name, state, norm, shape, width, depth):
    """The reference: modules of `torch.nn` with the same weights."""
    parts, names = [], []

    def add(module, name=None):
        parts.append(module.double())
        names.append(name)

    if name in ("convnet", "widenet"):
        size = [math.ceil(s / 2**depth) * 2**depth for s in shape[1:]]
        high, wide = (big - s for big, s in zip(size, shape[1:], strict=True))
        add(nn.ZeroPad2d((wide // 2, wide - wide // 2, high // 2, high - high // 2)))
        before = shape[0]
        for i in range(depth):
            wide = width * 2**i if name == "widenet" else width
            if norm != "none" and name == "widenet" and i > 0:
                add(module_norm(norm, before, True), f"norm{i}")
            add(nn.Conv2d(before, wide, 3, padding=1), f"conv{i}")
            if norm != "none" and name == "convnet":
                add(module_norm(norm, wide, True), f"norm{i}")
            add(nn.ReLU())
            add(nn.AvgPool2d(2))
            before = wide
        add(nn.Flatten())
        add(nn.Linear(before * math.prod(size) // 4**depth, 10), "head")
    else:
        add(nn.Flatten())
        for i in range(depth - 1):
            add(nn.Linear(math.prod(shape) if i == 0 else width, width), f"linear{i}")
            if norm != "none":
                add(module_norm(norm, width, False), f"norm{i}")
            add(nn.ReLU())
        add(nn.Linear(width, 10), "head")
    with torch.no_grad():
        for module, part in zip(parts, names, strict=True):
            if part:
                module.weight.copy_(state.params[part + ".weight"])
                module.bias.copy_(state.params[part + ".bias"])
    return nn.Sequential(*parts), dict(zip(names, parts, strict=True))


@pytest.mark.parametrize(("kind", "norm"), VALID)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 13)])
def test_equals_modules_of_torch(kind, norm, shape):
    net, state = made(f"{kind}-{norm}-w8-d3", shape)
    theirs, _ = modules(kind, state, norm, shape, 8, 3)
    x = noise(6, *shape)
    torch.testing.assert_close(net(state, x), theirs.train()(x), **CLOSE)


@pytest.mark.parametrize(("kind", "share"), [("convnet", 0.1), ("mlp", 0.1), ("widenet", 0.9)])
def test_batch_statistics_equal_torchs_running_ones(kind, share):
    """Three batches stored as `nn.BatchNorm` does it, then a forward pass with what is stored."""
    net, state = made(f"{kind}-batch-w8")
    theirs, named = modules(kind, state, "batch", (1, 28, 28), 8, 3)
    for k, module in named.items():
        if k and k.startswith("norm"):
            module.momentum = share
    for seed in range(3):
        x = 2 * noise(5, 1, 28, 28, seed=seed) + 1
        logits, seen = net.forward(state, x, "batch")
        torch.testing.assert_close(logits, theirs.train()(x), **CLOSE)
        state = State(state.params, net.stored(state.buffers, seen))
    norms = [k for k in named if k and k.startswith("norm")]
    assert len(norms) == len(state.buffers) // 2 > 1
    for k in norms:
        torch.testing.assert_close(state.buffers[k + ".mean"], named[k].running_mean, **CLOSE)
        torch.testing.assert_close(state.buffers[k + ".variance"], named[k].running_var, **CLOSE)
    x = noise(4, 1, 28, 28, seed=9)
    torch.testing.assert_close(net(state, x, "stored"), theirs.eval()(x), **CLOSE)
    torch.testing.assert_close(net(state, x[:1], "stored"), net(state, x, "stored")[:1], **CLOSE)
    assert net.forward(state, x, "stored")[1] == {}


@pytest.mark.parametrize("norm", [n for n in NORMS if n != "batch"])
def test_without_batch_norm_samples_do_not_see_each_other(norm):
    net, state = made(f"convnet-{norm}-w8", (2, 8, 8))
    x = noise(5, 2, 8, 8)
    torch.testing.assert_close(net(state, x)[1:3], net(state, x[1:3]), **CLOSE)
    torch.testing.assert_close(net(state, x), net(state, x, "stored"), **CLOSE)
    assert net.forward(state, x)[1] == {} and state.buffers == {}
    assert not net.mixes_samples


def test_with_batch_norm_they_do():
    net, state = made("convnet-batch-w8", (2, 8, 8))
    x = noise(5, 2, 8, 8)
    assert net.mixes_samples and not torch.allclose(net(state, x)[1:3], net(state, x[1:3]))


@pytest.mark.parametrize(("channels", "groups"), [(8, 4), (6, 2), (5, 1), (2, 2)])
def test_group_norm_takes_four_groups_or_as_many_as_divide(channels, groups):
    norm = Norm("group", channels)
    x = noise(3, channels, 5, 4)
    mine = norm(double(norm.init(Key(0))), x, "batch", {})
    torch.testing.assert_close(mine, F.group_norm(x, groups), **CLOSE)


def test_28_pixels_are_computed_as_32():
    net, state = made("convnet-w8")
    conv = dict(net.layers)["conv0"]
    assert isinstance(conv, Conv) and conv.pad == (3, 3, 3, 3)
    x = noise(2, 1, 28, 28)
    mine = conv(State({k: state.params["conv0." + k] for k in ("weight", "bias")}, {}), x, "batch", {})
    torch.testing.assert_close(
        mine, F.conv2d(x, state.params["conv0.weight"], state.params["conv0.bias"], padding=3), **CLOSE
    )
    assert mine.shape[-2:] == (32, 32) and net.features(state, x).shape == (2, 8 * 4 * 4)


def maps(net, state, x):
    """Every (name, input) that a layer meets."""
    met = []
    for name, layer in net.layers:
        met.append((name, layer, x))
        params = {k.removeprefix(name + "."): v for k, v in state.params.items() if k.startswith(name + ".")}
        buffers = {k.removeprefix(name + "."): v for k, v in state.buffers.items() if k.startswith(name + ".")}
        x = layer(State(params, buffers), x, "batch", {})
    return met


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    ("sides", "depth"),
    [
        ((2, 2), 1),
        ((3, 3), 1),
        ((4, 4), 1),
        ((5, 7), 1),
        ((8, 8), 2),
        ((9, 13), 2),
        ((12, 20), 2),
        ((16, 16), 3),
        ((28, 28), 3),
        ((32, 32), 3),
        ((33, 40), 4),
        ((64, 64), 4),
        ((128, 128), 5),
        ((8, 64), 2),
        ((128, 4), 1),
    ],
)
def test_default_depth_and_every_normalised_map_at_least_2x2(sides, depth, channels):
    net, state = made("convnet-w2", (channels, *sides))
    assert sum(name.startswith("conv") for name, _ in net.layers) == depth
    met = maps(net, state, noise(2, channels, *sides))
    normalised = [x.shape[-2:] for _, layer, x in met if isinstance(layer, Norm)]
    assert len(normalised) == depth and min(min(s) for s in normalised) >= 2
    x = noise(3, channels, *sides)
    out = net(state, x)
    assert out.shape == (3, 10) and out.isfinite().all()
    assert not torch.allclose(out[0], out[1])  # instance norm on 1 x 1 would give every image the same
    assert net.name == "convnet-w2" and net.shape == (channels, *sides)


@pytest.mark.parametrize(("sides", "most"), [((5, 7), 2), ((28, 28), 4), ((32, 32), 5)])
def test_the_deepest_one_still_works(sides, most):
    net, state = made(f"convnet-w2-d{most}", (1, *sides))
    x = noise(3, 1, *sides)
    assert min(min(v.shape[-2:]) for _, layer, v in maps(net, state, x) if isinstance(layer, Norm)) >= 2
    assert net(state, x).shape == (3, 10)
    with pytest.raises(PotstillError, match=rf"depth {most + 1} .*at most {most}\b"):
        network(f"convnet-w2-d{most + 1}", (1, *sides), 10)


@pytest.mark.parametrize("name", ["convnet-w8", "convnet-batch-w8", "mlp-layer-w8", "mlp-w8-d1"])
@pytest.mark.parametrize("stats", ["batch", "stored"])
def test_features_then_head_is_the_call(name, stats):
    net, state = made(name, (3, 8, 8))
    x = noise(4, 3, 8, 8)
    features = net.features(state, x, stats)
    assert features.ndim == 2
    assert torch.equal(net.head(state, features), net(state, x, stats))
    torch.testing.assert_close(
        net(state, x, stats), F.linear(features, state.params["head.weight"], state.params["head.bias"]), **CLOSE
    )


@pytest.mark.parametrize("shape", [(7,), (1, 4, 4), (3, 5, 7), (6, 2)])
def test_mlp_takes_any_shape(shape):
    net, state = made("mlp-w8", shape)
    assert net(state, noise(4, *shape)).shape == (4, 10)
    assert state.params["linear0.weight"].shape == (8, math.prod(shape))


# --- purity


@pytest.mark.parametrize(("kind", "norm"), VALID)
def test_pure_and_twice_differentiable(kind, norm):
    """Nothing is changed in place; the gradient of a gradient agrees with central differences in float64."""
    net, state = made(f"{kind}-{norm}-w8", (2, 8, 8), 3)
    x, y = noise(4, 2, 8, 8), torch.tensor([0, 1, 2, 1])
    before = {k: v.clone() for part in state for k, v in part.items()}
    given = x.clone()

    def distance(x):
        """A function of the gradient, as gradient matching has it."""
        grads = torch.func.grad(lambda p: F.cross_entropy(net(State(p, state.buffers), x), y))(state.params)
        return sum((g**2).sum() for g in grads.values())

    direction = noise(4, 2, 8, 8, seed=1)
    grad, h = torch.func.grad(distance)(x), 1e-6
    numeric = (distance(x + h * direction) - distance(x - h * direction)) / (2 * h)
    assert float(grad.norm()) > 0
    torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-5, atol=1e-8)
    assert torch.equal(x, given)
    assert all(torch.equal(v, before[k]) for part in state for k, v in part.items())


@pytest.mark.parametrize("norm", NORMS)
def test_vmap_over_stacked_weights(norm):
    net = network(f"convnet-{norm}-w4", (1, 8, 8), 3)
    states = [double(net.init(Key(i))) for i in range(3)]
    stacked = State(*({k: torch.stack([s[i][k] for s in states]) for k in states[0][i]} for i in range(2)))
    x = noise(5, 1, 8, 8)
    together = torch.func.vmap(lambda p, b: net(State(p, b), x))(*stacked)
    for i, state in enumerate(states):
        torch.testing.assert_close(together[i], net(state, x), **CLOSE)
    grads = torch.func.vmap(torch.func.grad(lambda p, b: net(State(p, b), x).square().mean()))(*stacked)
    one = torch.func.grad(lambda p: net(State(p, states[1].buffers), x).square().mean())(states[1].params)
    torch.testing.assert_close(grads["conv0.weight"][1], one["conv0.weight"], **CLOSE)


def test_statistics_are_differentiated():
    """An unrolled training stores them, so what is judged after it depends on its inputs through them, too."""
    net, state = made("convnet-batch-w4", (1, 8, 8))
    x = noise(3, 1, 8, 8)
    assert net.forward(state, x)[1].keys() == state.buffers.keys()

    def mean(x):
        return net.forward(state, x)[1]["norm0.mean"].sum()

    way = noise(3, 1, 8, 8).flip(0)
    found = float((torch.func.grad(mean)(x) * way).sum())
    assert found == pytest.approx(float(mean(x + 1e-6 * way) - mean(x - 1e-6 * way)) / 2e-6, rel=1e-6)
    assert abs(found) > 1e-6


# --- fresh weights


def test_a_norm_before_each_convolution_but_the_first_is_none_at_depth_one():
    made = network("widenet-batch-w8", (1, 4, 4), 3)
    assert made.name == "widenet-w8" and not made.mixes_samples
    assert made.notes == ("widenet: no batch norm at depth 1, as it stands before each convolution but the first",)


def test_fresh_weights_of_frepos_network_are_flaxs():
    """A normal distribution cut at two deviations (scipy's), of variance 1/fan-in, and zero shifts."""
    params = network("widenet", (3, 32, 32), 10).init(Key(0)).params
    for name in ("conv0", "conv1", "conv2", "head"):
        weight = params[f"{name}.weight"]
        scale = 1 / math.sqrt(weight[0].numel()) / stats.truncnorm(-2, 2).std()
        assert stats.kstest(weight.flatten().numpy(), stats.truncnorm(-2, 2, scale=scale).cdf).pvalue > 0.01
        assert not params[f"{name}.bias"].any()


@pytest.mark.parametrize(("kind", "norm"), [(kind, norm) for kind, norm in VALID if kind != "widenet"])
def test_fresh_weights_are_pytorchs_own(kind, norm):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases; norms start as the identity."""
    net = network(f"{kind}-{norm}-w64", (3, 32, 32), 10)
    state = net.init(Key(1))
    for k, v in state.params.items():
        part, which = k.split(".")
        if part.startswith("norm"):
            assert torch.equal(v, torch.ones(64) if which == "weight" else torch.zeros(64))
            continue
        fan = state.params[part + ".weight"][0].numel()
        assert float(v.abs().max()) <= 1 / math.sqrt(fan)
        if v.numel() > 1000:
            assert float(v.abs().max()) > 0.98 / math.sqrt(fan)
            assert float(v.mean().abs()) * math.sqrt(3 * fan) < 5 / math.sqrt(v.numel())
            assert float(v.std()) == pytest.approx(1 / math.sqrt(3 * fan), rel=0.05)
    assert all(torch.equal(v, torch.full((64,), float(k.endswith("variance")))) for k, v in state.buffers.items())
    assert bool(state.buffers) == (norm == "batch")


def test_weights_follow_the_key_alone():
    net = network("convnet-w4-d3", (1, 8, 8), 3)
    a, b, c = (net.init(Key(s).fold("x")).params for s in (0, 0, 1))
    rng = torch.get_rng_state()
    net.init(Key(5))
    assert torch.equal(rng, torch.get_rng_state())
    drawn = [k for k in a if not k.startswith("norm")]
    assert all(torch.equal(a[k], b[k]) for k in a) and not any(torch.equal(a[k], c[k]) for k in drawn)
    assert not torch.equal(a["conv1.weight"], a["conv2.weight"])  # same shape, other numbers


# --- names


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("convnet", "convnet"),
        ("convnet-instance", "convnet"),
        ("convnet-w128", "convnet"),
        ("convnet-d3", "convnet"),
        ("convnet-instance-w128-d3", "convnet"),
        ("convnet-batch-w64-d2", "convnet-batch-w64-d2"),
        ("convnet-none-d4", "convnet-none-d4"),
        ("mlp", "mlp"),
        ("mlp-none-w128-d3", "mlp"),
        ("mlp-layer-w7", "mlp-layer-w7"),
        ("mlp-d1", "mlp-d1"),
    ],
)
def test_canonical_names_round_trip(name, canonical):
    net = network(name, (1, 28, 28), 10)
    assert net.name == canonical
    again = network(net.name, (1, 28, 28), 10)
    assert again.name == canonical and [n for n, _ in again.layers] == [n for n, _ in net.layers]
    a, b = net.init(Key(0)).params, again.init(Key(0)).params
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("name", "narrowed"),
    [
        ("convnet", "convnet-w32"),
        ("convnet-batch", "convnet-batch-w32"),
        ("convnet-w16", "convnet-w16"),
        ("convnet-w32", "convnet-w32"),
        ("convnet-none-w256-d2", "convnet-none-w32-d2"),
        ("mlp-d4", "mlp-w32-d4"),
    ],
)
def test_narrow(name, narrowed):
    assert narrow(name) == narrowed
    assert network(narrowed, (1, 16, 16), 2).name == narrowed
    assert narrow("convnet", 8) == "convnet-w8"


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("convnot", (1, 8, 8), ["convnot", "did you mean 'convnet'", "potstill list networks"]),
        ("zebra", (1, 8, 8), ["zebra", *NETWORKS]),
        ("", (1, 8, 8), ["network ''"]),
        ("convnet-bach", (1, 8, 8), ["convnet-bach", *NORMS]),
        ("convnet-d3-w8", (1, 8, 8), ["convnet-d3-w8", "[-wWIDTH][-dDEPTH]"]),
        ("convnet-w", (1, 8, 8), ["convnet-w"]),
        ("convnet-w0", (1, 8, 8), ["convnet-w0", "start at 1"]),
        ("convnet-d0", (1, 8, 8), ["convnet-d0", "start at 1"]),
        ("convnet-d4", (1, 8, 8), ["depth 4", "8 x 8", "at most 3"]),
        ("convnet", (64,), ["(64,)", "try 'mlp'"]),
        ("convnet", (3, 1, 9), ["1 x 9", "try 'mlp'"]),
        ("mlp-instance", (64,), ["mlp", "instance", "batch, group, layer or none"]),
        ("mlp-instance", (1, 8, 8), ["mlp", "instance"]),
        ("mlp-group-w4", (1, 8, 8), ["mlp-group", "constant", "width 4"]),
        ("mlp-layer-w1", (1, 8, 8), ["mlp-layer", "constant", "width 1"]),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(name, shape, words):
    with pytest.raises(PotstillError) as caught:
        network(name, shape, 10)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


# --- half precision


@pytest.mark.parametrize(("kind", "norm"), VALID)
def test_bfloat16_is_near_float32(kind, norm):
    net = network(f"{kind}-{norm}-w32", (1, 28, 28), 10)
    state, x = net.init(Key(0)), noise(8, 1, 28, 28).float()
    half = net.at(torch.bfloat16)
    full, low = net(state, x), half(state, x)
    assert low.dtype == half.features(state, x).dtype == torch.float32
    assert not torch.equal(full, low)  # it was computed in another precision
    assert float((full - low).norm() / full.norm()) < 0.03
    grads = torch.func.grad(lambda p: half(State(p, state.buffers), x).square().mean())(state.params)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert all(v.dtype == torch.float32 for v in half.forward(state, x)[1].values())
    assert torch.equal(half.at(None)(state, x), full)


class Convolutions(TorchDispatchMode):
    """What convolutions are given: input, weight and padding."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.convolution:
            self.met.append((args[0], args[1], args[4]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kernel", "pad", "stride", "bias"),
    [
        (3, (1, 1, 1, 1), 1, True),
        (3, (3, 3, 3, 3), 1, True),
        (3, (1, 2, 0, 1), 1, True),
        (3, (0, 0, 1, 1), 2, False),
        (2, (1, 1, 0, 0), 1, True),
        (1, (0, 0, 0, 0), 2, False),
    ],
)
@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_a_convolution_in_bfloat16_is_torchs_with_its_first_and_second_derivatives(inputs, kernel, pad, stride, bias):
    """Whatever order in memory, zeros beside it and padding of its own make it quick."""
    layer = Conv(inputs, 8, kernel, pad, stride, bias)
    rounded = {k: v.to(torch.bfloat16).double() for k, v in layer.init(Key(0)).params.items()}
    assert ("bias" in rounded) == bias
    x = noise(4, inputs, 9, 7).to(torch.bfloat16).double()

    def theirs(x, params):
        return F.conv2d(F.pad(x, pad), params["weight"], params.get("bias"), stride)

    def ours(x, params):
        out = layer(State({k: v.float() for k, v in params.items()}, {}), x.to(torch.bfloat16), "stored", {})
        assert out.dtype == torch.bfloat16
        return out.double()

    def slopes(f):
        def loss(x, params):
            return f(x, params).square().mean()

        by_x, by_params = torch.func.grad(loss, (0, 1))(x, rounded)
        turned = torch.func.grad(lambda p: torch.func.grad(loss)(x, p).square().sum())(rounded)["weight"]
        return [f(x, rounded), by_x, *by_params.values(), turned]

    for mine, right in zip(slopes(ours), slopes(theirs), strict=True):
        assert mine.shape == right.shape and float((mine - right).norm() / right.norm()) < 0.01
    with Convolutions() as seen:
        out = layer(State({k: v.float() for k, v in rounded.items()}, {}), x.to(torch.bfloat16), "stored", {})
    ((given, weight, padding),) = seen.met
    assert given.stride(1) == 1 and given.shape[1] == weight.shape[1] == max(2, inputs), "channels are innermost"
    assert max(padding) <= kernel // 2, "a wider padding is slow"
    assert out.stride(1) == 1
