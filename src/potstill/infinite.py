"""Kernels of infinitely wide ReLU networks, by recursion over layers.

All functions are pure and differentiable. Names are `ntk|nngp-BODY[-dDEPTH]`: what is compared, by which network.
Positions stand first and samples last inside this file, so that each sum over neighbours adds large blocks.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from .errors import PotstillError, unknown
from .recompute import recomputed

KINDS = ("ntk", "nngp")
BODIES = ("dense", "conv", "conv-pool", "conv-gap")
POOLED = ("conv-pool", "conv-gap")
LARGEST_POOLED = 8  # pixels a side: all pairs of positions are 4,096 numbers for each pair of samples
CHUNK = 2**22  # bytes of one map: a few of them stay in a processor's cache
SNAP = 64  # units in the last place within which a cosine counts as 1: rounding of a sum of some thousand products

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kernel:
    r"""Covariance of the outputs of an infinitely wide network at initialisation (NNGP), or its tangent kernel (NTK).

    With $A$ the mean over a patch (all inputs of a dense layer, 3 x 3 positions and all channels of a convolution),
    $S_0$ the products of inputs, $T_0 = 0$ and layers $l = 1 \dots$ depth,

    $$ K_l = \sigma_w^2 A S_{l-1} + \sigma_b^2, \quad \Theta_l = K_l + \sigma_w^2 A T_{l-1}, \quad
       S_l = \sqrt{q q'}\, \kappa_1(c), \quad T_l = \Theta_l\, \kappa_0(c), \quad c = K_l / \sqrt{q q'} $$
    $$ \kappa_0(\cos\theta) = \frac{\pi - \theta}{2\pi}, \qquad
       \kappa_1(\cos\theta) = \frac{\sin\theta + (\pi - \theta)\cos\theta}{2\pi} $$

    where $q = K_l(x, x)$, $q' = K_l(x', x')$. A linear read-out closes the network: $K = \sigma_w^2 \bar S + \sigma_b^2$
    and $\Theta = K + \sigma_w^2 \bar T$ with means over what it sees.

    Args:
        kind: `ntk` or `nngp`.
        body: `dense`; `conv` (3 x 3, zero padding, stride 1, read out at every position: positions are never mixed by
            the read-out, so only equal ones are compared); `conv-pool` (after each layer 2 x 2 average pooling while both
            sides have at least two pixels) and `conv-gap` (global average pooling at the end). The last two compare all
            pairs of positions and take images up to 8 x 8.
        depth: Hidden layers.
        weight_std: sigma_w: the weights' standard deviation times the root of the fan-in.
        bias_std: sigma_b: the biases' standard deviation.

    Raises:
        PotstillError: A kind or body that does not exist; a depth below 1; deviations that are none.

    Example:
        >>> k = Kernel("ntk", depth=2)
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> k(x[:2], x).shape, k.name
        (torch.Size([2, 3]), 'ntk-dense-d2')

    Reference: Cho and Saul 2009, Kernel Methods for Deep Learning; Jacot, Gabriel and Hongler 2018, Neural Tangent
    Kernel, theorem 1; Arora and others 2019, On Exact Computation with an Infinitely Wide Neural Net (convolution).
    Deviations and the bias at the read-out as in the code of KIP (Nguyen, Chen and Lee 2021).
    """

    kind: str = "ntk"
    body: str = "dense"
    depth: int = 1
    weight_std: float = math.sqrt(2)
    bias_std: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of kernel", str(self.kind), KINDS)
        if self.body not in BODIES:
            raise unknown("body of a kernel", str(self.body), BODIES)
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            raise PotstillError(f"kernel depth {self.depth!r} is no number of hidden layers, 1 or more")
        for name, value, good in (
            ("weight_std", self.weight_std, self.weight_std > 0),
            ("bias_std", self.bias_std, self.bias_std >= 0),
        ):
            if not (good and math.isfinite(value)):
                above = "above 0" if name == "weight_std" else "0 or above"
                raise PotstillError(
                    f"kernel {name} = {value} is no standard deviation; a finite number {above} is needed"
                )

    @property
    def name(self) -> str:
        """What `kernel` finds it by, as long as both deviations are the usual ones."""
        return f"{self.kind}-{self.body}-d{self.depth}"

    def __call__(
        self, x1: Shaped[Tensor, "n ..."], x2: Shaped[Tensor, "m ..."] | None = None, chunk: int = CHUNK
    ) -> Float[Tensor, "n m"]:
        """Gram matrix (N, M) of inputs (N, *shape) and (M, *shape), in their precision.

        Without `x2`, or with `x1` again, it is that of `x1` with itself: symmetric, its diagonal that of `diagonal`,
        its derivative that of moving both.

        A derivative exists almost everywhere: where two inputs coincide that of the angle between them is taken as 0.

        Args:
            x1: Standardised inputs.
            x2: Others of the same shape.
            chunk: Bytes of one map of covariances; convolutions are computed, and differentiated, in blocks of pairs of
                samples that take about ten of them. Inside `torch.compile` the blocks stay, but their graph is kept.

        Raises:
            PotstillError: Inputs that are no images for a convolution, too large ones for pooling, two shapes or types.
        """
        same = x2 is None or x2 is x1
        other = x1 if x2 is None else x2
        self._check(x1, other)
        a, (left, own) = self._positions(x1), self._self(x1, chunk)
        b, (right, _) = (a, (left, own)) if same else (self._positions(other), self._self(other, chunk))
        n, m = len(x1), len(other)
        per_pair = self._numbers(x1) * x1.element_size()
        pairs = n * m if self.body == "dense" else max(1, chunk // max(per_pair, 1))
        wide = max(1, min(m, pairs))
        high = max(1, min(n, pairs // wide))
        if high >= n and wide >= m:
            gram = self._pairs(a, b, *left, *right)
        else:
            rows = [
                [
                    recomputed(
                        self._pairs,
                        _samples(a, i, high, -2),
                        _samples(b, j, wide, -2),
                        *(_samples(sd, i, high) for sd in left),
                        *(_samples(sd, j, wide) for sd in right),
                    )
                    for j in range(0, m, wide)
                ]
                for i in range(0, n, high)
            ]
            gram = torch.cat([torch.cat(row, 1) for row in rows]) if rows and rows[0] else x1.new_zeros(n, m)
        if same:
            gram = (gram + gram.mT) / 2  # blocks and matrix products round differently on the two sides
            gram = torch.where(torch.eye(n, dtype=torch.bool, device=gram.device), own[:, None], gram)
        return gram

    def diagonal(self, x: Shaped[Tensor, "n ..."], chunk: int = CHUNK) -> Float[Tensor, " n"]:
        """Kernel (N,) of each input with itself, without the matrix."""
        self._check(x, x)
        return self._self(x, chunk)[1]

    def _check(self, x1: Tensor, x2: Tensor) -> None:
        """Inputs that this kernel can take."""
        if x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype or not x1.is_floating_point():
            raise PotstillError(
                f"kernel '{self.name}' compares inputs of one shape and floating-point type, not {tuple(x1.shape[1:])} "
                f"{x1.dtype} with {tuple(x2.shape[1:])} {x2.dtype}"
            )
        if self.body != "dense" and x1.ndim != 4:
            shape = tuple(x1.shape[1:])
            raise PotstillError(
                f"kernel '{self.name}' needs images (channels, height, width), not shape {shape}; try '{self.kind}-dense'"
            )
        if self.body in POOLED and max(x1.shape[2:]) > LARGEST_POOLED:
            high, wide = x1.shape[2:]
            raise PotstillError(
                f"kernel '{self.name}' compares all pairs of positions, {(high * wide) ** 2:,} numbers for each pair of "
                f"{high} x {wide} images; it takes up to {LARGEST_POOLED} x {LARGEST_POOLED}. Without pooling it is "
                f"{high * wide:,}: '{self.kind}-conv-d{self.depth}'"
            )

    def _numbers(self, x: Tensor) -> int:
        """Covariances for one pair of inputs."""
        places = 1 if self.body == "dense" else math.prod(x.shape[2:])
        return places**2 if self.body in POOLED else places

    def _positions(self, x: Tensor) -> Tensor:
        """Inputs (N, D) or (H, W, N, C): the last axis is what products are means over."""
        return x.flatten(1) if self.body == "dense" else x.permute(2, 3, 0, 1)

    def _pairs(self, a: Tensor, b: Tensor, *deviations: Tensor) -> Tensor:
        """Kernel (n, m) of inputs by position, given the deviations of each layer for both."""
        left, right = deviations[: self.depth], deviations[self.depth :]
        if self.body in POOLED:
            products = torch.einsum("hwnc,uvmc->hwuvnm", a, b)
            spread = (slice(None), slice(None), None, None)
            roots = [(p[spread][..., None], q[None, None][..., None, :]) for p, q in zip(left, right, strict=True)]
        else:
            # one channel: an outer product, which a batched matrix product is slow at
            products = a * b.mT if self.body == "conv" and a.shape[-1] == 1 else a @ b.mT
            roots = [(p[..., None], q[..., None, :]) for p, q in zip(left, right, strict=True)]
        return self._layers(products / max(a.shape[-1], 1), lambda layer, k: roots[layer])

    def _self(self, x: Tensor, chunk: int) -> tuple[list[Tensor], Tensor]:
        """Standard deviations at each position and layer, (N,) or (H, W, N), and the kernel (N,) of each input with itself."""
        block = max(1, chunk // max(self._numbers(x) * x.element_size(), 1)) if self.body in POOLED else max(1, len(x))
        parts = [self._self_block(part) for part in x.split(block)]
        deviations = [torch.cat([seen[layer] for seen, _ in parts], -1) for layer in range(self.depth)]
        return deviations, torch.cat([diagonal for _, diagonal in parts])

    def _self_block(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The same for a few inputs."""
        a = self._positions(x)
        seen: list[Tensor] = []

        def alone(layer: int, k: Tensor) -> None:
            seen.append(_root(k))

        def every(layer: int, k: Tensor) -> Pair:
            """All pairs of positions of one input: (H, W, H, W, N)."""
            high, wide = k.shape[:2]
            variance = k.flatten(2, 3).flatten(0, 1).diagonal().mT.unflatten(0, (high, wide))  # (H, W, N)
            seen.append(_root(variance))
            return seen[-1][:, :, None, None], seen[-1][None, None]

        if self.body in POOLED:
            return seen, self._layers(torch.einsum("hwnc,uvnc->hwuvn", a, a) / a.shape[-1], every)
        return seen, self._layers(torch.linalg.vecdot(a, a) / max(a.shape[-1], 1), alone)

    def _layers(self, s: Tensor, deviations: Callable[[int, Tensor], Pair | None]) -> Tensor:
        """The recursion. `deviations(layer, K)` gives the two standard deviations, or None if both samples are one."""
        weight, bias = self.weight_std**2, self.bias_std**2
        t: Tensor | None = None
        for layer in range(self.depth):
            k = weight * self._patch(s) + bias
            theta = k if t is None else k + weight * self._patch(t)
            s, slope = _relu(k, deviations(layer, k))
            t = theta * slope if self.kind == "ntk" else None
            s, t = self._pool(s), None if t is None else self._pool(t)
        k = weight * self._read(s) + bias
        return k if t is None else k + weight * self._read(t)

    def _patch(self, k: Tensor) -> Tensor:
        """Mean over 3 x 3 neighbours, 0 beyond the edge; of both positions by the same shift where there are two."""
        if self.body == "dense":
            return k
        rows, columns = ((0, 2), (1, 3)) if self.body in POOLED else ((0,), (1,))
        return _three(_three(k, rows), columns) / 9

    def _pool(self, k: Tensor) -> Tensor:
        """Mean over 2 x 2 positions, of both; odd edges are left out."""
        if self.body != "conv-pool" or min(k.shape[:2]) < 2:
            return k
        for axis in range(4):
            half = k.shape[axis] // 2
            k = k.narrow(axis, 0, 2 * half).unflatten(axis, (half, 2)).mean(axis + 1)
        return k

    def _read(self, k: Tensor) -> Tensor:
        """Mean over the positions that the read-out compares."""
        if self.body == "dense":
            return k
        if self.body == "conv-pool":  # flattened: equal positions
            return k.flatten(2, 3).flatten(0, 1).diagonal().mean(-1)
        return k.mean((0, 1, 2, 3) if self.body == "conv-gap" else (0, 1))


def _relu(k: Tensor, deviations: Pair | None) -> Pair:
    """Means of relu(u) relu(v) and of step(u) step(v) for Gaussian u, v of covariance k and given standard deviations."""
    if deviations is None:
        return k / 2, torch.full_like(k, 0.5)
    left, right = deviations
    edge = 1 - SNAP * torch.finfo(k.dtype).eps
    cosine = k * _inverse(left) * _inverse(right)
    # At the edge the angle has an infinite derivative, the cosine 0, and what is meant is 0: clamp gives that
    angle = torch.where(cosine > edge, 0.0, cosine.clamp(-edge, edge).arccos())  # exact for samples that coincide
    slope = (math.pi - angle) / (2 * math.pi)
    return left * right * angle.sin() / (2 * math.pi) + k * slope, slope


def _root(variance: Tensor) -> Tensor:
    """Square root, with derivative 0 instead of infinity at 0: an input of zeros in a network without biases."""
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)


def _inverse(deviation: Tensor) -> Tensor:
    """1 / x, and 0 where there is none."""
    positive = deviation > 0
    return torch.where(positive, 1 / torch.where(positive, deviation, 1.0), 0.0)


def _three(k: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum over the shifts -1, 0, 1 of all the given axes together, with zeros beyond the edge."""
    pad = [0] * (2 * k.ndim)
    for axis in axes:
        pad[2 * (k.ndim - 1 - axis)] = pad[2 * (k.ndim - 1 - axis) + 1] = 1
    padded = F.pad(k, pad)
    total: Tensor | None = None
    for shift in range(3):
        part = padded
        for axis in axes:
            part = part.narrow(axis, shift, k.shape[axis])
        total = part if total is None else total + part
    return k if total is None else total


def _samples(x: Tensor, start: int, count: int, axis: int = -1) -> Tensor:
    """Up to `count` entries of an axis."""
    return x.narrow(axis, start, min(count, x.shape[axis] - start))


_NAME = re.compile(r"(?P<kind>[a-z]+)-(?P<body>[a-z-]*[a-z])(-d(?P<depth>\d{1,3}))?")


def kernel(name: str) -> Kernel:
    """The kernel of a name such as `ntk-dense`, `nngp-conv-d3`, `ntk-conv-pool-d2`; depth 1 if it names none.

    Raises:
        PotstillError: No kernel of that name.

    Example:
        >>> kernel("nngp-conv-d3").name, kernel("ntk-dense") == Kernel()
        ('nngp-conv-d3', True)
    """
    known = ["-".join(parts) for parts in itertools.product(KINDS, BODIES)]
    match = _NAME.fullmatch(name)
    if match is None or match["kind"] not in KINDS or match["body"] not in BODIES:
        stem = re.sub(r"-d\d+$", "", name)
        raise unknown("kernel", stem, known, "-dN sets N hidden layers")
    return Kernel(match["kind"], match["body"], int(match["depth"] or 1))
