"""Networks as pure functions: `net(state, x, stats)` with `state = (params, buffers)`; nothing is updated in place.

A network is a tuple of named layers. A layer is a frozen description; its weights live in flat dicts that are
passed in, so that gradients with respect to them, gradients of gradients and `torch.compile` see nothing but
tensors. Features (all but the last layer) and head (the last, linear one) are apart, because distribution
matching and kernel ridge regression look at features only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .errors import PotstillError, unknown
from .functional import Key, Tree, cast

Stats = Literal["batch", "stored"]
NORMS = ("none", "batch", "instance", "group", "layer")


class State(NamedTuple):
    """A network's numbers: what is trained, and the stored batch statistics."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


@runtime_checkable
class Layer(Protocol):
    """One step of a network: a frozen description that makes and uses flat dicts of tensors."""

    def init(self, key: Key) -> State: ...

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor: ...


def _uniform(key: Key, fan_in: int, *shape: int) -> Tensor:
    """PyTorch's default initialisation of convolutions and linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return key.uniform(*shape, low=-bound, high=bound)


@dataclass(frozen=True)
class Conv:
    """A square convolution; `pad` is (left, right, top, bottom) in pixels."""

    inputs: int
    outputs: int
    kernel: int = 3
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    stride: int = 1

    def init(self, key: Key) -> State:
        fan = self.inputs * self.kernel**2
        weight = _uniform(key.fold("weight"), fan, self.outputs, self.inputs, self.kernel, self.kernel)
        return State({"weight": weight, "bias": _uniform(key.fold("bias"), fan, self.outputs)}, {})

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        left, right, top, bottom = self.pad
        if left == right and top == bottom:
            padding = (top, left)
        else:  # an odd number of rows or columns is missing
            x, padding = F.pad(x, self.pad), (0, 0)
        return F.conv2d(x, state.params["weight"], state.params["bias"], self.stride, padding)


@dataclass(frozen=True)
class Linear:
    """A fully connected layer."""

    inputs: int
    outputs: int

    def init(self, key: Key) -> State:
        weight = _uniform(key.fold("weight"), self.inputs, self.outputs, self.inputs)
        return State({"weight": weight, "bias": _uniform(key.fold("bias"), self.inputs, self.outputs)}, {})

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        return F.linear(x, state.params["weight"], state.params["bias"])


@dataclass(frozen=True)
class Norm:
    """Normalisation with a learned scale and shift per channel, without in-place statistics.

    Args:
        kind: "batch" (over samples and positions), "instance" (over positions of one channel), "group" (over
            positions of four groups of channels, or as many as divide them), "layer" (over channels and positions).
        channels: Size of axis 1.
    """

    kind: str
    channels: int
    eps: float = 1e-5

    def init(self, key: Key) -> State:
        params = {"weight": torch.ones(self.channels), "bias": torch.zeros(self.channels)}
        if self.kind != "batch":
            return State(params, {})
        return State(params, {"mean": torch.zeros(self.channels), "variance": torch.ones(self.channels)})

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        shape = (1, self.channels) + (1,) * (x.ndim - 2)
        weight, bias = state.params["weight"].view(shape), state.params["bias"].view(shape)
        full = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x  # statistics never in half precision
        if self.kind == "batch":
            if stats == "stored":
                mean, variance = state.buffers["mean"].view(shape), state.buffers["variance"].view(shape)
            else:
                axes = [0, *range(2, x.ndim)]
                variance, mean = torch.var_mean(full, axes, correction=0, keepdim=True)
                count = full.numel() / self.channels
                seen["mean"] = mean.flatten()
                seen["variance"] = variance.flatten() * (count / max(count - 1, 1))  # unbiased, as PyTorch stores it
            out = (full - mean) * torch.rsqrt(variance + self.eps)
        else:
            groups = {"instance": self.channels, "layer": 1, "group": math.gcd(4, self.channels)}[self.kind]
            grouped = full.unflatten(1, (groups, self.channels // groups))
            variance, mean = torch.var_mean(grouped, list(range(2, grouped.ndim)), correction=0, keepdim=True)
            out = ((grouped - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return (out * weight + bias).to(x.dtype)


@dataclass(frozen=True)
class Apply:
    """A layer without weights."""

    function: Callable[[Tensor], Tensor]

    def init(self, key: Key) -> State:
        return State({}, {})

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        return self.function(x)


RELU = Apply(F.relu)
FLATTEN = Apply(lambda x: x.flatten(1))


def pool(x: Tensor) -> Tensor:
    """Average over 2x2 pixels: halves both sides."""
    return F.avg_pool2d(x, 2)


@dataclass(frozen=True)
class Network:
    """A named sequence of layers, the last one the linear head.

    Args:
        name: Canonical name, such as `convnet` or `mlp-batch-w64`.
        layers: (name, layer) pairs in order.
        shape: Shape of one input without the batch axis.
        outputs: Number of logits.
        precision: Precision of the arithmetic; weights, statistics and outputs stay as they are given.
        notes: What had to be changed to fit the input, for the user to read.

    Example:
        >>> net = network("convnet-w16", (1, 28, 28), 10)
        >>> state = net.init(Key(0))
        >>> net(state, torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    name: str
    layers: tuple[tuple[str, Layer], ...]
    shape: tuple[int, ...]
    outputs: int
    precision: torch.dtype | None = None
    notes: tuple[str, ...] = ()

    @property
    def mixes_samples(self) -> bool:
        """Whether a sample's features depend on the rest of its batch: with batch norm."""
        return any(isinstance(layer, Norm) and layer.kind == "batch" for _, layer in self.layers)

    def init(self, key: Key) -> State:
        """Fresh weights (PyTorch's default initialisation) and statistics."""
        state = State({}, {})
        for name, layer in self.layers:
            made = layer.init(key.fold(name))
            state.params.update({f"{name}.{k}": v for k, v in made.params.items()})
            state.buffers.update({f"{name}.{k}": v for k, v in made.buffers.items()})
        return state

    def at(self, precision: torch.dtype | None) -> Network:
        """The same network computing in another precision (`torch.bfloat16`, or `None` for that of its input)."""
        return replace(self, precision=precision)

    def _run(self, layers: tuple[tuple[str, Layer], ...], state: State, x: Tensor, stats: Stats) -> tuple[Tensor, Tree]:
        dtype, statistics = x.dtype, {}
        x = x.to(self.precision) if self.precision else x
        for name, layer in layers:
            seen: dict[str, Tensor] = {}
            params = {k[len(name) + 1 :]: v for k, v in state.params.items() if k.startswith(name + ".")}
            buffers = {k[len(name) + 1 :]: v for k, v in state.buffers.items() if k.startswith(name + ".")}
            # the norm computes in float32 and wants its scale and shift so
            half = not isinstance(layer, Norm)
            x = layer(State(cast(params, self.precision) if half else params, buffers), x, stats, seen)
            statistics.update({f"{name}.{k}": v.detach() for k, v in seen.items()})
        return x.to(dtype), statistics

    def forward(
        self, state: State, x: Float[Tensor, n * shape], stats: Stats = "batch"
    ) -> tuple[Float[Tensor, "n outputs"], dict[str, Tensor]]:
        """Logits, and the batch statistics that were met on the way (empty unless the norm is `batch`)."""
        return self._run(self.layers, state, x, stats)

    def __call__(self, state: State, x: Float[Tensor, n * shape], stats: Stats = "batch") -> Float[Tensor, "n outputs"]:
        """Logits (N, outputs) of inputs (N, *shape)."""
        return self.forward(state, x, stats)[0]

    def features(
        self, state: State, x: Float[Tensor, n * shape], stats: Stats = "batch"
    ) -> Float[Tensor, "n features"]:
        """What the head sees: (N, features), flattened."""
        return self._run(self.layers[:-1], state, x, stats)[0]

    def head(self, state: State, features: Float[Tensor, "n features"]) -> Float[Tensor, "n outputs"]:
        """Logits of features."""
        return self._run(self.layers[-1:], state, features, "batch")[0]


def blend(buffers: dict[str, Tensor], seen: dict[str, Tensor], momentum: float = 0.1) -> dict[str, Tensor]:
    """Stored statistics moved towards those of a batch, as PyTorch's batch norm does."""
    return {k: (1 - momentum) * v + momentum * seen[k] for k, v in buffers.items()} if seen else buffers


_NAME = re.compile(
    r"(?P<kind>[a-z0-9]+?)(-(?P<norm>" + "|".join(NORMS) + r"))?(-w(?P<width>\d{1,5}))?(-d(?P<depth>\d{1,2}))?"
)


def network(name: str, shape: tuple[int, ...], outputs: int) -> Network:
    """Build a network from its name, for inputs of the given shape.

    Args:
        name: `kind[-norm][-wWIDTH][-dDEPTH]`: `convnet` (width 128, instance norm, depth 3 up to 32 pixels and one
            more for each doubling, less below 16 pixels), `mlp` (width 128, no norm, depth 3).
        shape: Shape of one input: (channels, height, width), or (features,).
        outputs: Number of logits.

    Raises:
        PotstillError: No such network, norm, or one that does not fit the shape.

    Example:
        >>> network("convnet-batch-w64", (3, 32, 32), 10).name
        'convnet-batch-w64'
    """
    match = _NAME.fullmatch(name)
    kind = name.split("-")[0]
    if kind not in NETWORKS:
        raise unknown("network", kind, NETWORKS, "`potstill list networks` shows all")
    if match is None:
        raise PotstillError(
            f"network '{name}' is not of the form {kind}[-norm][-wWIDTH][-dDEPTH] with a norm of {', '.join(NORMS)}"
        )
    width, depth = (int(match[g]) if match[g] else None for g in ("width", "depth"))
    if width == 0 or depth == 0:
        raise PotstillError(f"network '{name}': width and depth start at 1")
    return NETWORKS[kind](shape, outputs, match["norm"], width, depth)


def narrow(name: str, width: int = 32) -> str:
    """The name of the same network with at most the given width: for quick looks.

    Example:
        >>> narrow("convnet-batch"), narrow("mlp-w16")
        ('convnet-batch-w32', 'mlp-w16')
    """
    match = _NAME.fullmatch(name)
    if match is None or int(match["width"] or width + 1) <= width:
        return name
    parts = (match["kind"], match["norm"], f"w{width}", match["depth"] and f"d{match['depth']}")
    return "-".join(p for p in parts if p)


def _name(kind: str, *parts: tuple[str, object, object]) -> str:
    """Canonical name: what differs from the kind's defaults."""
    return kind + "".join(f"-{prefix}{value}" for prefix, value, default in parts if value != default)


def convnet(shape: tuple[int, ...], outputs: int, norm: str | None, width: int | None, depth: int | None) -> Network:
    """The field's ConvNet: blocks of 3x3 convolution, norm, ReLU and 2x2 average pool, then a linear head.

    The first convolution pads the image to a multiple of 2^depth, so 28 x 28 is computed as 32 x 32.

    Reference: Gidaris and Komodakis 2018; used as here by Zhao, Mopuri and Bilen 2021 (DC).
    """
    if len(shape) != 3:
        raise PotstillError(f"network 'convnet' needs images (channels, height, width), not shape {shape}; try 'mlp'")
    norm, width = norm or "instance", width or 128
    channels, *sides = shape
    most = int(math.log2(min(sides)))  # every normalised map is then at least 2 x 2: on 1 x 1 instance norm gives 0
    if most < 1:
        raise PotstillError(f"network 'convnet' needs at least 2 x 2 pixels, not {sides[0]} x {sides[1]}; try 'mlp'")
    # by default the features, too, are at least 2 x 2: an instance norm just before a pool to 1 x 1 leaves next to nothing
    usual = min(max(3, math.ceil(math.log2(max(sides))) - 2), max(1, most - 1))
    if depth is not None and depth > most:
        raise PotstillError(f"convnet depth {depth} is too deep for {sides[0]} x {sides[1]} pixels; at most {most}")
    depth = usual if depth is None else depth
    missing = [-side % 2**depth for side in sides]
    layers: list[tuple[str, Layer]] = []
    for i in range(depth):
        high, wide = missing if i == 0 else (0, 0)
        pad = (1 + wide // 2, 1 + wide - wide // 2, 1 + high // 2, 1 + high - high // 2)
        layers.append((f"conv{i}", Conv(channels if i == 0 else width, width, pad=pad)))
        if norm != "none":
            layers.append((f"norm{i}", Norm(norm, width)))
        layers += [(f"relu{i}", RELU), (f"pool{i}", Apply(pool))]
    features = width * math.prod((side + more) // 2**depth for side, more in zip(sides, missing, strict=True))
    layers += [("flatten", FLATTEN), ("head", Linear(features, outputs))]
    name = _name("convnet", ("", norm, "instance"), ("w", width, 128), ("d", depth, usual))
    return Network(name, tuple(layers), tuple(shape), outputs)


def mlp(shape: tuple[int, ...], outputs: int, norm: str | None, width: int | None, depth: int | None) -> Network:
    """Fully connected layers with ReLU; `depth` counts the linear layers, the head included."""
    norm, width, depth = norm or "none", width or 128, depth or 3
    if norm == "instance":
        raise PotstillError(
            "network 'mlp' has no positions to take an instance norm over; use batch, group, layer or none"
        )
    groups = {"group": math.gcd(4, width), "layer": 1}.get(norm, 0)
    if groups == width and depth > 1:  # each value would be its own mean
        raise PotstillError(f"network 'mlp-{norm}' normalises to a constant at width {width}; use a wider one")
    layers: list[tuple[str, Layer]] = [("flatten", FLATTEN)]
    size = math.prod(shape)
    for i in range(depth - 1):
        layers.append((f"linear{i}", Linear(size, width)))
        if norm != "none":
            layers.append((f"norm{i}", Norm(norm, width)))
        layers.append((f"relu{i}", RELU))
        size = width
    layers.append(("head", Linear(size, outputs)))
    name = _name("mlp", ("", norm, "none"), ("w", width, 128), ("d", depth, 3))
    return Network(name, tuple(layers), tuple(shape), outputs)


Builder = Callable[[tuple[int, ...], int, str | None, int | None, int | None], Network]
NETWORKS: dict[str, Builder] = {"convnet": convnet, "mlp": mlp}
