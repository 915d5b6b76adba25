"""Layers as pure functions: frozen descriptions that make and use flat dicts of tensors.

A layer's weights are passed in, nothing is updated in place, and what a layer met on the way (batch statistics) goes
into the dict `seen`. A layer made of layers puts their names before the names of their tensors, with a dot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import Key

Stats = Literal["batch", "stored"]
NORMS = ("none", "batch", "instance", "group", "layer")
Start = Literal["uniform", "lecun"]
CUT = 2.0  # deviations at which Flax cuts a normal distribution,
LEFT = 0.87962566103423978  # and what is left of its deviation
HALF = (torch.bfloat16, torch.float16)


class State(NamedTuple):
    """A network's numbers: what is trained, and the stored batch statistics."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


@runtime_checkable
class Layer(Protocol):
    """One step of a network: a frozen description that makes and uses flat dicts of tensors."""

    @property
    def mixes_samples(self) -> bool: ...

    def init(self, key: Key) -> State: ...

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor: ...


def _uniform(key: Key, fan_in: int, *shape: int) -> Tensor:
    """PyTorch's default initialisation of convolutions and linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return key.uniform(*shape, low=-bound, high=bound)


def _lecun(key: Key, fan_in: int, *shape: int) -> Tensor:
    """Flax's default: a normal distribution cut at two deviations, scaled to variance 1/fan_in; by its inverse function, so
    that it is drawn of any shape in one way.
    """
    most = math.erf(CUT / math.sqrt(2))
    normal = math.sqrt(2) * torch.erfinv(key.uniform(*shape, low=-most, high=most))
    return normal.clamp(-CUT, CUT) / (LEFT * math.sqrt(fan_in))


def _drawn(key: Key, fan_in: int, shape: tuple[int, ...], bias: bool, start: Start) -> State:
    key_w, key_b = key.fold("weight"), key.fold("bias")
    if start == "lecun":
        weight, shift = _lecun(key_w, fan_in, *shape), torch.zeros(shape[0])
    else:
        weight, shift = _uniform(key_w, fan_in, *shape), _uniform(key_b, fan_in, shape[0])
    return State({"weight": weight, "bias": shift} if bias else {"weight": weight}, {})


def _alike(state: State, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, in half precision where the input is."""
    weight, bias = state.params["weight"], state.params.get("bias")
    if x.dtype in HALF:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return weight, bias


def _last(x: Tensor) -> Tensor:
    """A map with its channels innermost in memory where it is in half precision: what such kernels are written for.

    Measured on a CPU: norm, ReLU and pool take a third of the time, forward and backward; a first convolution's gradient
    with respect to its weights a tenth (LOG 34).
    """
    return x.contiguous(memory_format=torch.channels_last) if x.dtype in HALF else x


@dataclass(frozen=True)
class Conv:
    """A square convolution; `pad` is (left, right, top, bottom) in pixels, `start` the distribution of fresh weights."""

    inputs: int
    outputs: int
    kernel: int = 3
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    stride: int = 1
    bias: bool = True
    start: Start = "uniform"
    mixes_samples: ClassVar[bool] = False

    def init(self, key: Key) -> State:
        shape = (self.outputs, self.inputs, self.kernel, self.kernel)
        return _drawn(key, self.inputs * self.kernel**2, shape, self.bias, self.start)

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        left, right, top, bottom = self.pad
        weight, bias = _alike(state, x)
        half = x.dtype in HALF
        if (
            half and self.inputs == 1
        ):  # strides of one channel are those of both orders, and the slow one would be taken
            x, weight, padding = F.pad(x, (*self.pad, 0, 1)), F.pad(weight, (0, 0, 0, 0, 0, 1)), (0, 0)
        elif left == right and top == bottom and not (half and max(self.pad) > self.kernel // 2):
            padding = (top, left)
        else:  # an odd number of rows or columns is missing, or half precision's kernels would be slow
            x, padding = F.pad(x, self.pad), (0, 0)
        return _last(F.conv2d(_last(x), weight, bias, self.stride, padding))


@dataclass(frozen=True)
class Linear:
    """A fully connected layer."""

    inputs: int
    outputs: int
    start: Start = "uniform"
    mixes_samples: ClassVar[bool] = False

    def init(self, key: Key) -> State:
        return _drawn(key, self.inputs, (self.outputs, self.inputs), True, self.start)

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        return F.linear(x, *_alike(state, x))


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

    @property
    def mixes_samples(self) -> bool:
        return self.kind == "batch"

    def init(self, key: Key) -> State:
        params = {"weight": torch.ones(self.channels), "bias": torch.zeros(self.channels)}
        if self.kind != "batch":
            return State(params, {})
        return State(params, {"mean": torch.zeros(self.channels), "variance": torch.ones(self.channels)})

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        shape = (1, self.channels) + (1,) * (x.ndim - 2)
        weight, bias = state.params["weight"].view(shape), state.params["bias"].view(shape)
        full = x.float() if x.dtype in HALF else x  # statistics never in half precision
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
    mixes_samples: ClassVar[bool] = False

    def init(self, key: Key) -> State:
        return State({}, {})

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        return self.function(x)


RELU = Apply(F.relu)
FLATTEN = Apply(lambda x: x.flatten(1))


def pool(x: Tensor) -> Tensor:
    """Average over 2x2 pixels: halves both sides, an odd last row or column left out.

    Sums of slices: compiled, their backward pass takes half the time of `avg_pool2d`'s.
    """
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = x[:, :, 0:height:2] + x[:, :, 1:height:2]
    return (rows[:, :, :, 0:width:2] + rows[:, :, :, 1:width:2]) * 0.25


def spread(x: Tensor) -> Tensor:
    """Mean over all pixels: one number for each channel."""
    return x.mean((2, 3))


def _apart(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by its name, all in one pass."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".")
        parts.setdefault(layer, {})[rest] = tensor
    return parts


@dataclass(frozen=True)
class Chain:
    """Named layers one after another; an empty chain is the identity."""

    layers: tuple[tuple[str, Layer], ...] = ()

    @property
    def mixes_samples(self) -> bool:
        return any(layer.mixes_samples for _, layer in self.layers)

    def init(self, key: Key) -> State:
        state = State({}, {})
        for name, layer in self.layers:
            for mine, made in zip(state, layer.init(key.fold(name)), strict=True):
                mine.update({f"{name}.{k}": v for k, v in made.items()})
        return state

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        params, buffers = _apart(state.params), _apart(state.buffers)
        for name, layer in self.layers:
            met: dict[str, Tensor] = {}
            x = layer(State(params.get(name, {}), buffers.get(name, {})), x, stats, met)
            seen.update({f"{name}.{k}": v for k, v in met.items()})
        return x


@dataclass(frozen=True)
class Residual:
    """The sum of two chains over the same input.

    Reference: He and others 2016, Deep Residual Learning for Image Recognition (CVPR), eq. 1 and 2.
    """

    body: Chain
    shortcut: Chain = Chain()

    @property
    def mixes_samples(self) -> bool:
        return self.body.mixes_samples or self.shortcut.mixes_samples

    @property
    def _sides(self) -> tuple[Chain, Chain]:
        return Chain((("body", self.body),)), Chain((("shortcut", self.shortcut),))

    def init(self, key: Key) -> State:
        body, shortcut = (side.init(key) for side in self._sides)
        return State(body.params | shortcut.params, body.buffers | shortcut.buffers)

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        body, shortcut = self._sides
        return body(state, x, stats, seen) + shortcut(state, x, stats, seen)
