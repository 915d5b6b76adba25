"""The architectures by name: what layers a network has for inputs of a given shape.

Beside `convnet` and `mlp` the field's small-image variants of older networks, as in the code of Zhao, Mopuri and Bilen
(repository `VICO-UoE/DatasetCondensation`): heads sized to the input, and fewer pools or strides where it is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .errors import PotstillError
from .layers import FLATTEN, RELU, Apply, Chain, Conv, Layer, Linear, Norm, Residual, Start, pool, spread

WIDTHS = {
    "convnet": 128,
    "widenet": 128,
    "mlp": 128,
    "lenet": 6,
    "alexnet": 128,
    "vgg11": 64,
    "resnet18": 64,
}  # as published


class Architecture(NamedTuple):
    """A canonical name, named layers, the last one the linear head, what had to be changed to fit the input, and the share of
    a batch in stored statistics.
    """

    name: str
    layers: tuple[tuple[str, Layer], ...]
    notes: tuple[str, ...] = ()
    share: float = 0.1


Builder = Callable[[tuple[int, ...], int, str | None, int | None, int | None], Architecture]


def canonical(kind: str, *parts: tuple[str, object, object]) -> str:
    """Canonical name: what differs from the kind's defaults."""
    return kind + "".join(f"-{prefix}{value}" for prefix, value, default in parts if value != default)


def max_pool(x: Tensor) -> Tensor:
    """Largest of 2x2 pixels: halves both sides, downwards."""
    return F.max_pool2d(x, 2)


def convnet(
    shape: tuple[int, ...], outputs: int, norm: str | None, width: int | None, depth: int | None
) -> Architecture:
    """The field's ConvNet: blocks of 3x3 convolution, norm, ReLU and 2x2 average pool, then a linear head.

    The first convolution pads the image to a multiple of 2^depth, so 28 x 28 is computed as 32 x 32.

    Reference: Gidaris and Komodakis 2018; used as here by Zhao, Mopuri and Bilen 2021 (DC).
    """
    return _blocks("convnet", "instance", 1, shape, outputs, norm, width, depth)


def widenet(
    shape: tuple[int, ...], outputs: int, norm: str | None, width: int | None, depth: int | None
) -> Architecture:
    """The ConvNet with twice the width in each further block, 128, 256 and 512 at depth 3; no norm.

    A norm that is asked for stands before each convolution but the first; nine tenths of a batch are stored of its statistics.
    Fresh weights are Flax's.

    Reference: as used by Zhou, Nezhadarya and Ba 2022 (FRePo).
    """
    made = _blocks("widenet", "none", 2, shape, outputs, norm, width, depth, start="lecun", norm_first=True)
    return made._replace(share=0.9)


def _blocks(
    kind: str,
    plain: str,
    growth: int,
    shape: tuple[int, ...],
    outputs: int,
    norm: str | None,
    width: int | None,
    depth: int | None,
    start: Start = "uniform",
    norm_first: bool = False,
) -> Architecture:
    if len(shape) != 3:
        raise PotstillError(f"network '{kind}' needs images (channels, height, width), not shape {shape}; try 'mlp'")
    norm, width = norm or plain, width or WIDTHS[kind]
    channels, *sides = shape
    most = int(math.log2(min(sides)))  # every normalised map is then at least 2 x 2: on 1 x 1 instance norm gives 0
    if most < 1:
        raise PotstillError(f"network '{kind}' needs at least 2 x 2 pixels, not {sides[0]} x {sides[1]}; try 'mlp'")
    # by default the features, too, are at least 2 x 2: an instance norm just before a pool to 1 x 1 leaves next to nothing
    usual = min(max(3, math.ceil(math.log2(max(sides))) - 2), max(1, most - 1))
    if depth is not None and depth > most:
        raise PotstillError(f"{kind} depth {depth} is too deep for {sides[0]} x {sides[1]} pixels; at most {most}")
    depth = usual if depth is None else depth
    notes: tuple[str, ...] = ()
    if norm_first and depth == 1 and norm != "none":
        notes = (f"{kind}: no {norm} norm at depth 1, as it stands before each convolution but the first",)
        norm = "none"
    missing = [-side % 2**depth for side in sides]
    layers: list[tuple[str, Layer]] = []
    for i in range(depth):
        high, wide = missing if i == 0 else (0, 0)
        pad = (1 + wide // 2, 1 + wide - wide // 2, 1 + high // 2, 1 + high - high // 2)
        before, channels = channels, width * growth**i
        if norm_first and i > 0 and norm != "none":
            layers.append((f"norm{i}", Norm(norm, before)))
        layers.append((f"conv{i}", Conv(before, channels, pad=pad, start=start)))
        if not norm_first and norm != "none":
            layers.append((f"norm{i}", Norm(norm, channels)))
        layers += [(f"relu{i}", RELU), (f"pool{i}", Apply(pool))]
    features = channels * math.prod((side + more) // 2**depth for side, more in zip(sides, missing, strict=True))
    layers += [("flatten", FLATTEN), ("head", Linear(features, outputs, start))]
    name = canonical(kind, ("", norm, plain), ("w", width, WIDTHS[kind]), ("d", depth, usual))
    return Architecture(name, tuple(layers), notes)


def mlp(shape: tuple[int, ...], outputs: int, norm: str | None, width: int | None, depth: int | None) -> Architecture:
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
    name = canonical("mlp", ("", norm, "none"), ("w", width, 128), ("d", depth, 3))
    return Architecture(name, tuple(layers))


class Tower:
    """Layers put one on another, with the size of the map that comes out on top.

    Pools and strides that would leave too small a map are left out: a map that is normalised later keeps at least
    2 x 2 pixels, because on 1 x 1 instance norm is constant zero; any other keeps one.

    Args:
        kind: Name of the architecture.
        shape: Shape of one input.
        norm: What follows each convolution, or "none".
        usual: The norm that the plain name stands for.
        width: Channels of the first convolution, the published number if absent; all later ones are scaled with it.
        depth: Refused: these architectures have one depth.
    """

    def __init__(
        self, kind: str, shape: tuple[int, ...], norm: str | None, usual: str, width: int | None, depth: int | None
    ) -> None:
        if depth is not None:
            raise PotstillError(f"network '{kind}' has one depth; leave out -d{depth}")
        if len(shape) != 3:
            raise PotstillError(
                f"network '{kind}' needs images (channels, height, width), not shape {shape}; try 'mlp'"
            )
        if min(shape[1:]) < 2:
            raise PotstillError(f"network '{kind}' needs at least 2 x 2 pixels, not {_times(shape[1:])}; try 'mlp'")
        self.kind, self.norm, self.image = kind, norm or usual, shape[1:]
        self.channels, *self.sides = shape
        self.width = width or WIDTHS[kind]
        self.name = canonical(kind, ("", self.norm, usual), ("w", self.width, WIDTHS[kind]))
        self.layers: list[tuple[str, Layer]] = []
        self.notes: list[str] = []
        self.asked = self.left = 0

    def scaled(self, published: int) -> int:
        """A published number of channels or units at this width."""
        return max(1, round(published * self.width / WIDTHS[self.kind]))

    def conv(self, i: int, channels: int, kernel: int = 3, pad: Sequence[int] = (0, 0), bias: bool = True) -> None:
        """Convolution that keeps the size, or adds so many rows and columns to it, norm and ReLU."""
        half, (high, wide) = kernel // 2, pad
        sides = (half + wide // 2, half + wide - wide // 2, half + high // 2, half + high - high // 2)
        self.layers.append((f"conv{i}", Conv(self.channels, channels, kernel, sides, bias=bias)))
        self.channels, self.sides = channels, [side + more for side, more in zip(self.sides, pad, strict=True)]
        if self.norm != "none":
            self.layers.append((f"norm{i}", Norm(self.norm, channels)))
        self.layers.append((f"relu{i}", RELU))

    def halve(self, last: bool = False, up: bool = False) -> bool:
        """Whether the map is halved now, or has to stay as it is.

        Args:
            last: No norm comes after.
            up: An odd side is rounded up, as a stride does, and not down, as a pool does.
        """
        self.asked += 1
        halves = [(side + up) // 2 for side in self.sides]
        fits = min(halves) >= (1 if last or self.norm == "none" else 2)
        self.left += not fits
        self.sides = halves if fits else self.sides
        return fits

    def pool(self, i: int, last: bool = False) -> None:
        """Max pool, if the map is large enough."""
        if self.halve(last):
            self.layers.append((f"pool{i}", Apply(max_pool)))

    def block(self, i: int, channels: int, stride: int) -> None:
        """Residual block of two convolutions, after one of the two in its stride."""
        bias, inputs = self.norm == "none", self.channels

        def normalised(j: str) -> tuple[tuple[str, Layer], ...]:
            return () if self.norm == "none" else ((f"norm{j}", Norm(self.norm, channels)),)

        body = Chain(
            (
                ("conv0", Conv(inputs, channels, stride=stride, bias=bias)),
                *normalised("0"),
                ("relu0", RELU),
                ("conv1", Conv(channels, channels, bias=bias)),
                *normalised("1"),
            )
        )
        projection = Conv(inputs, channels, kernel=1, pad=(0, 0, 0, 0), stride=stride, bias=bias)
        same = stride == 1 and inputs == channels
        shortcut = Chain() if same else Chain((("conv", projection), *normalised("")))
        self.layers += [(f"block{i}", Residual(body, shortcut)), (f"relu{i + 1}", RELU)]
        self.channels = channels

    def done(self, outputs: int, what: str, *hidden: int) -> Architecture:
        """Fully connected layers on top: hidden ones with ReLU, and the head."""
        if self.left:
            most = "any map" if self.norm == "none" else "every normalised map"
            least = "1 x 1" if self.norm == "none" else "2 x 2"
            self.notes.append(
                f"{self.name}: {self.left} of {self.asked} {what} left out so that {most} of {_times(self.image)} "
                f"images is at least {least}"
            )
        size = self.channels * math.prod(self.sides)
        self.layers.append(("flatten", FLATTEN))
        for i, units in enumerate(hidden):
            self.layers += [(f"linear{i}", Linear(size, units)), (f"linear_relu{i}", RELU)]
            size = units
        self.layers.append(("head", Linear(size, outputs)))
        return Architecture(self.name, tuple(self.layers), tuple(self.notes))


def _times(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _frame(sides: Sequence[int]) -> list[int]:
    """Rows and columns missing to a multiple of 8 (of less where an image is smaller): 28 x 28 is computed as 32 x 32."""
    unit = min(8, 2 ** int(math.log2(min(sides))))
    return [-side % unit for side in sides]


def lenet(shape: tuple[int, ...], outputs: int, norm: str | None, width: int | None, depth: int | None) -> Architecture:
    """LeNet-5 with ReLU and max pools: two 5x5 convolutions, two hidden linear layers; width 6, no norm.

    The convolutions take no padding where the map is large enough: the first one from 32 pixels on (28 x 28 is computed
    as 32 x 32), the second one from 10 on.

    Reference: LeCun, Bottou, Bengio and Haffner 1998, Gradient-based learning applied to document recognition, figure 2.
    """
    tower = Tower("lenet", shape, norm, "none", width, depth)
    tower.conv(0, tower.scaled(6), 5, [-4 if side >= 32 else 0 for side in tower.sides])
    tower.pool(0)
    small = [side < 10 for side in tower.sides]
    if any(small):
        tower.notes.append(f"{tower.name}: the second convolution pads its map, which is {_times(tower.sides)} only")
    tower.conv(1, tower.scaled(16), 5, [0 if less else -4 for less in small])
    tower.pool(1, last=True)
    return tower.done(outputs, "pools", tower.scaled(120), tower.scaled(84))


def alexnet(
    shape: tuple[int, ...], outputs: int, norm: str | None, width: int | None, depth: int | None
) -> Architecture:
    """AlexNet for small images: five convolutions, three max pools, a linear head; width 128, no norm.

    The first convolution pads the image to a multiple of 8, so 28 x 28 is computed as 32 x 32.

    Reference: Krizhevsky, Sutskever and Hinton 2012 (NIPS); for 32 x 32 pixels as used by Zhao, Mopuri and Bilen 2021.
    """
    tower = Tower("alexnet", shape, norm, "none", width, depth)
    tower.conv(0, tower.scaled(128), 5, _frame(tower.sides))
    tower.pool(0)
    tower.conv(1, tower.scaled(192), 5)
    tower.pool(1)
    for i, channels in enumerate((256, 192, 192), start=2):
        tower.conv(i, tower.scaled(channels))
    tower.pool(4, last=True)
    return tower.done(outputs, "pools")


def vgg11(shape: tuple[int, ...], outputs: int, norm: str | None, width: int | None, depth: int | None) -> Architecture:
    """VGG-11 for small images: eight 3x3 convolutions, five max pools, a linear head; width 64, instance norm.

    The first convolution pads the image to a multiple of 8, so 28 x 28 is computed as 32 x 32.

    Reference: Simonyan and Zisserman 2015 (ICLR), table 1, column A; with norms and one linear layer as used by Zhao,
    Mopuri and Bilen 2021.
    """
    tower = Tower("vgg11", shape, norm, "instance", width, depth)
    pooled = (0, 1, 3, 5, 7)
    for i, channels in enumerate((64, 128, 256, 256, 512, 512, 512, 512)):
        tower.conv(i, tower.scaled(channels), pad=_frame(tower.sides) if i == 0 else (0, 0))
        if i in pooled:
            tower.pool(i, last=i == pooled[-1])
    return tower.done(outputs, "pools")


def resnet18(
    shape: tuple[int, ...], outputs: int, norm: str | None, width: int | None, depth: int | None
) -> Architecture:
    """ResNet-18 for small images: 3x3 stem, eight residual blocks, three strides, global average; width 64, instance norm.

    Its convolutions have biases only where there is no norm.

    Reference: He and others 2016 (CVPR), with the stem of their section 4.2; as used by Zhao, Mopuri and Bilen 2021.
    """
    tower = Tower("resnet18", shape, norm, "instance", width, depth)
    tower.conv(0, tower.scaled(64), bias=tower.norm == "none")
    for i, channels in enumerate((64, 64, 128, 128, 256, 256, 512, 512)):
        stride = 2 if i in (2, 4, 6) and tower.halve(up=True) else 1
        tower.block(i, tower.scaled(channels), stride)
    tower.layers.append(("spread", Apply(spread)))
    tower.sides = [1, 1]
    return tower.done(outputs, "strides")


NETWORKS: dict[str, Builder] = {
    "convnet": convnet,
    "widenet": widenet,
    "mlp": mlp,
    "lenet": lenet,
    "alexnet": alexnet,
    "vgg11": vgg11,
    "resnet18": resnet18,
}
