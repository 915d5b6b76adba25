"""Networks as pure functions: `net(state, x, stats)` with `state = (params, buffers)`; nothing is updated in place.

A network is a tuple of named layers. A layer is a frozen description; its weights live in flat dicts that are
passed in, so that gradients with respect to them, gradients of gradients and `torch.compile` see nothing but
tensors. Features (all but the last layer) and head (the last, linear one) are apart, because distribution
matching and kernel ridge regression look at features only.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .architectures import NETWORKS, WIDTHS
from .errors import PotstillError, unknown
from .functional import Key, leaves
from .layers import NORMS, Apply, Chain, Conv, Layer, Linear, Norm, State, Stats
from .modules import Wrapped, seeded, split
from .recompute import in_rows

__all__ = [
    "NETWORKS", "NORMS", "Apply", "Conv", "Layer", "Linear", "Network", "Norm", "State", "Stats", "narrow", "network", "wrap",
]  # fmt: skip


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
        share: Share of a batch in the statistics that are stored after it.
        rows: Samples in one pass where a batch has more and its samples do not mix, to save memory: the same numbers, each
            pass computed once more for its gradient. 0 for all at once.

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
    share: float = 0.1
    rows: int = 0

    @property
    def mixes_samples(self) -> bool:
        """Whether a sample's features depend on the rest of its batch: with batch norm."""
        return Chain(self.layers).mixes_samples

    def init(self, key: Key) -> State:
        """Fresh weights (PyTorch's default initialisation; of `widenet` Flax's) and statistics."""
        return Chain(self.layers).init(key)

    def at(self, precision: torch.dtype | None) -> Network:
        """The same network computing in another precision (`torch.bfloat16`, or `None` for that of its input)."""
        return replace(self, precision=precision)

    def by(self, rows: int) -> Network:
        """The same network with at most so many samples in one pass; 0 for any number."""
        return replace(self, rows=rows)

    def splits(self, stats: Stats) -> bool:
        """Whether the samples of a batch do not mix. Stored statistics keep them apart; not in modules from outside."""
        return not self.mixes_samples or (stats == "stored" and not isinstance(self.layers[0][1], Wrapped))

    def _run(
        self, layers: tuple[tuple[str, Layer], ...], state: State, x: Tensor, stats: Stats
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def run(x: Tensor, state: State) -> Tensor:
            return Chain(layers)(state, x.to(self.precision) if self.precision else x, stats, seen).to(x.dtype)

        return in_rows(run, x, self.rows if self.splits(stats) else 0, state), seen

    def forward(
        self, state: State, x: Float[Tensor, n * shape], stats: Stats = "batch"
    ) -> tuple[Float[Tensor, "n outputs"], dict[str, Tensor]]:
        """Logits, and the batch statistics that were met on the way (empty unless the norm is `batch`)."""
        return self._run(self.layers, state, x, stats)

    def stored(self, buffers: dict[str, Tensor], seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored statistics moved towards those of a batch, as a batch norm does when it is trained."""
        return {k: (1 - self.share) * v + self.share * seen[k] for k, v in buffers.items()} if seen else buffers

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


_NAME = re.compile(
    r"(?P<kind>[a-z0-9]+?)(-(?P<norm>" + "|".join(NORMS) + r"))?(-w(?P<width>\d{1,5}))?(-d(?P<depth>\d{1,2}))?"
)


def network(name: str, shape: tuple[int, ...], outputs: int) -> Network:
    """Build a network from its name, for inputs of the given shape.

    Args:
        name: `kind[-norm][-wWIDTH][-dDEPTH]`, such as `convnet` (width 128, instance norm, depth 3 up to 32 pixels and one
            more for each doubling, less below 16 pixels), `mlp` (width 128, no norm, depth 3), `lenet`,
            `alexnet` (no norm), `vgg11`, `resnet18` (instance norm); or `package.module:function` with a function
            (shape, outputs) that returns a `Network` or an `nn.Module`.
        shape: Shape of one input: (channels, height, width), or (features,).
        outputs: Number of logits.

    Returns:
        The network, `notes` saying what had to be changed to fit the shape.

    Raises:
        PotstillError: No such network, norm, or one that does not fit the shape; a module that is not pure.

    Example:
        >>> network("convnet-batch-w64", (3, 32, 32), 10).name
        'convnet-batch-w64'
        >>> network("vgg11-w16", (1, 8, 8), 10).notes
        ('vgg11-w16: 2 of 5 pools left out so that every normalised map of 8 x 8 images is at least 2 x 2',)
    """
    if ":" in name:
        return _from_outside(name, tuple(shape), outputs)
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
    made = NETWORKS[kind](shape, outputs, match["norm"], width, depth)
    return Network(made.name, made.layers, tuple(shape), outputs, notes=made.notes, share=made.share)


def _from_outside(name: str, shape: tuple[int, ...], outputs: int) -> Network:
    """The network that a function `package.module:function` makes."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise PotstillError(
            f"network '{name}' cannot be imported ({error}); package.module:function is needed"
        ) from error
    try:
        inspect.signature(function).bind(shape, outputs)
    except (TypeError, ValueError) as error:
        raise PotstillError(f"network '{name}' is no function (shape, outputs) -> Network or nn.Module") from error
    with seeded(Key(0).fold("network", name)):
        made = function(shape, outputs)
    if isinstance(made, nn.Module):
        return wrap(lambda: function(shape, outputs), name, shape, outputs)
    if not isinstance(made, Network):
        raise PotstillError(f"network '{name}' returns neither Network nor nn.Module but {type(made).__name__}")
    if (made.shape, made.outputs) != (shape, outputs):
        raise PotstillError(
            f"network '{name}' is made for inputs {made.shape} and {made.outputs} outputs, not for {shape} and {outputs}"
        )
    return replace(made, name=name)


def wrap(
    module: nn.Module | Callable[[], nn.Module],
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    head: str | None = None,
) -> Network:
    """A PyTorch module as a network: any one that is pure under `torch.func.functional_call` and ends in a linear layer.

    What the head sees are the features. The module is used in training mode, whatever `stats` is.

    Args:
        module: A function (or class) without arguments that makes one, called anew for each set of fresh weights; or a
            module, whose parts then need `reset_parameters()` as those of `torch.nn` have it. It is copied, not changed.
            Parameters that require no gradient are not trained.
        name: What records call it.
        shape: Shape of one input without the batch axis.
        outputs: Number of logits.
        head: Path of the `nn.Linear` that is the head; the one that is called last if absent.

    Returns:
        A network like any other, its layers `body` and `head`.

    Raises:
        PotstillError: The module is not pure (batch norm with running statistics, dropout, an output whose shape depends
            on values), does not take the shape, or does more with the head's output; the submodule is named.

    Example:
        >>> net = wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 3)), "mine", (1, 8, 8), 3)
        >>> net.features(net.init(Key(0)), torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 16])
    """
    body, top = split(module, name, tuple(shape), outputs, head)
    notes = []
    if body.mixes_samples:
        notes.append(f"{name}: a sample's logits depend on the rest of its batch, on test data too")
    net = Network(name, (("body", body), ("head", top)), tuple(shape), outputs, notes=tuple(notes))
    first, again, other = (leaves(tuple(net.init(Key(seed)))) for seed in (0, 0, 1))
    if not all(map(torch.equal, first, again)):
        raise PotstillError(
            f"network '{name}' draws fresh weights from elsewhere than PyTorch's generator: one seed gives different ones"
        )
    if all(map(torch.equal, first, other)):
        same = f"{name}: fresh weights are always the same, whatever the seed"
        return replace(net, notes=(*net.notes, same))
    return net


def narrow(name: str, width: int | None = None) -> str:
    """The name of the same network with at most the given width: for quick looks.

    Args:
        name: Of a network; one from outside stays as it is.
        width: A quarter of the published one if absent, or 8 if that is more.

    Example:
        >>> narrow("convnet-batch"), narrow("mlp-w16"), narrow("vgg11")
        ('convnet-batch-w32', 'mlp-w16', 'vgg11-w16')
    """
    match = _NAME.fullmatch(name)
    if match is None or match["kind"] not in WIDTHS:
        return name
    published = WIDTHS[match["kind"]]
    width = max(published // 4, 8) if width is None else width
    if int(match["width"] or published) <= width:
        return name
    parts = (match["kind"], match["norm"], f"w{width}", match["depth"] and f"d{match['depth']}")
    return "-".join(p for p in parts if p)
