"""PyTorch modules as layers: split into body and head, tried for whether they are pure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from .errors import PotstillError
from .functional import Key, cast, tree_map
from .layers import HALF, State, Stats

DEPENDS = "is not pure under torch.func; no shape and no branch may depend on values, nothing may change in place"


@contextmanager
def seeded(key: Key) -> Iterator[None]:
    """PyTorch's global generator seeded by a key, and as it was before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key.generator().initial_seed())
        yield


@dataclass(frozen=True)
class Wrapped:
    """A module as a layer.

    Args:
        module: What is called, with the weights of a state in place of its own.
        fresh: Makes one of the same form, its weights drawn from PyTorch's global generator.
        mixes_samples: Whether a sample's output depends on the rest of its batch.
    """

    module: nn.Module
    fresh: Callable[[], nn.Module]
    mixes_samples: bool = False

    def init(self, key: Key) -> State:
        with seeded(key):
            made = self.fresh()
        trained = {k: v.detach().clone() for k, v in made.named_parameters() if v.requires_grad}
        fixed = {k: v.detach().clone() for k, v in made.named_parameters() if not v.requires_grad}
        return State(trained, fixed | {k: v.detach().clone() for k, v in made.named_buffers()})

    def __call__(self, state: State, x: Tensor, stats: Stats, seen: dict[str, Tensor]) -> Tensor:
        tensors = {**state.params, **state.buffers}
        return functional_call(self.module, cast(tensors, x.dtype) if x.dtype in HALF else tensors, (x,))


class Trial:
    """Calls a module, and names the innermost submodule that does what a pure function may not.

    Args:
        module: Hooks are hung on it, and stay.
        name: Of the network, for errors.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.running: list[tuple[str, nn.Module, Any]] = []
        self.linear: list[str] = []
        self.x: Tensor | None = None
        for path, part in module.named_modules():
            part.register_forward_pre_hook(lambda m, args, path=path: self._enter(path, m))
            part.register_forward_hook(lambda m, args, out: self._leave(m))

    def error(self, path: str, part: nn.Module, what: str) -> PotstillError:
        where = f"{type(part).__name__} '{path}'" if path else type(part).__name__
        return PotstillError(f"network '{self.name}': {where} {what}")

    def _mark(self, part: nn.Module) -> Any:
        """What a pure call leaves as it is: the generator, the network's input, tensors of the submodule's own."""
        if self.x is None:
            return None
        own = {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
        return torch.get_rng_state(), self.x._version, {k: (v, v._version, v.clone()) for k, v in own.items()}

    def _enter(self, path: str, part: nn.Module) -> None:
        self.running.append((path, part, self._mark(part)))
        if isinstance(part, nn.Linear):
            self.linear.append(path)

    def _leave(self, part: nn.Module) -> None:
        path, _, before = self.running.pop()
        if self.x is None:
            return
        generator, version, own = before
        if not torch.equal(generator, torch.get_rng_state()):
            cure = "set its p to 0" if isinstance(part, _DropoutNd) else "leave it out, or make it p = 0"
            raise self.error(path, part, f"draws random numbers in training mode; {cure}")
        for name, (tensor, number, values) in own.items():
            now = getattr(part, name)  # some functions of PyTorch's write without counting it
            if now is not tensor or now._version != number or not torch.equal(now, values):
                cure = "keep nothing between calls"
                if isinstance(part, _NormBase):
                    cure = "give it track_running_stats=False, or take a norm without any, such as nn.GroupNorm"
                raise self.error(path, part, f"changes its '{name}' in place in training mode; {cure}")
        if version != self.x._version:
            raise self.error(path, part, "changes the network's input in place; give it inplace=False")

    def __call__(self, x: Tensor) -> Tensor:
        """The module's output, and an error if it fails, or leaves anything else behind."""
        self.linear, self.x = [], x
        try:
            return self.guarded(lambda: self.module(x))
        finally:
            self.x = None

    def guarded(self, call: Callable[[], Any], why: str = "fails") -> Any:
        """A call of the module whose failure names the submodule that was running."""
        self.running = []
        try:
            return call()
        except PotstillError:
            raise
        except Exception as error:
            path, part, _ = self.running[-1] if self.running else ("", self.module, None)
            text = " ".join(str(error).split()).partition(". ")[0][:150]
            raise self.error(path, part, f"{why}: {text}") from error


def split(
    module: nn.Module | Callable[[], nn.Module], name: str, shape: tuple[int, ...], outputs: int, head: str | None
) -> tuple[Wrapped, Wrapped]:
    """Body and head of a module that has been tried; the arguments are those of `networks.wrap`."""
    fresh = _maker(module, name)
    key = Key(0).fold("wrap")
    x = key.fold("x").normal(3, *shape)
    with seeded(key), torch.no_grad():
        whole = fresh()
        path, logits = _find_head(copy.deepcopy(whole), name, x, outputs, head)
        _check_tied(whole, name, path)
        body = _without(copy.deepcopy(whole), path)
        top = copy.deepcopy(whole.get_submodule(path))
        mixes = _try_body(copy.deepcopy(body), top, name, path, x, logits)
    return Wrapped(body, lambda: _without(fresh(), path), mixes), Wrapped(top, lambda: fresh().get_submodule(path))


def _maker(module: nn.Module | Callable[[], nn.Module], name: str) -> Callable[[], nn.Module]:
    """A function that makes a module in training mode with fresh weights."""
    if not isinstance(module, nn.Module):
        if not callable(module):
            raise PotstillError(
                f"network '{name}': an nn.Module is needed, or a function that makes one, not {type(module).__name__}"
            )

        def made() -> nn.Module:
            new = module()
            if not isinstance(new, nn.Module):
                raise PotstillError(f"network '{name}': an nn.Module is needed, not {type(new).__name__}")
            return new.train()

        return made
    template = copy.deepcopy(module).train()
    for path, part in template.named_modules():
        own = [k for k, _ in part.named_parameters(recurse=False)]
        if own and _resetter(part) is None:
            raise PotstillError(
                f"network '{name}': {type(part).__name__} '{path}' has no reset_parameters() to draw '{own[0]}' anew; "
                "give it one, or give a function that makes the module"
            )

    def fresh() -> nn.Module:
        made = copy.deepcopy(template)
        for part in reversed(list(made.modules())):  # what a whole sets in its parts comes last
            if (reset := _resetter(part)) is not None:
                reset()
        return made

    return fresh


def _resetter(part: nn.Module) -> Callable[[], None] | None:
    return getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)


def _without(module: nn.Module, path: str) -> nn.Module:
    """The module with nothing in its head's place."""
    if not path:
        return nn.Identity()
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Identity())
    return module


def _find_head(module: nn.Module, name: str, x: Tensor, outputs: int, head: str | None) -> tuple[str, Tensor]:
    """The path of the head, and the logits of a first call."""
    if head is not None and not isinstance(dict(module.named_modules()).get(head), nn.Linear):
        raise PotstillError(f"network '{name}': there is no nn.Linear '{head}' in it to be the head")
    trial = Trial(module, name)
    logits = trial(x)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != (len(x), outputs):
        raise PotstillError(
            f"network '{name}' gives {found} for {len(x)} inputs {tuple(x.shape[1:])}; logits {(len(x), outputs)} are needed"
        )
    if not trial.linear:
        raise PotstillError(f"network '{name}' has no nn.Linear to be its head; let it end with one")
    path = trial.linear[-1] if head is None else head
    if trial.linear.count(path) != 1:
        raise PotstillError(f"network '{name}': its head '{path}' is called {trial.linear.count(path)} times, not once")
    if not torch.equal(logits, trial(x)):
        raise PotstillError(f"network '{name}' gives other logits when it is called again; it must be pure")
    return path, logits


def _check_tied(module: nn.Module, name: str, path: str) -> None:
    """A weight of the head that is used elsewhere too would be trained as two."""
    own = {id(p) for p in module.get_submodule(path).parameters()}
    for other, part in module.named_modules():
        if other != path and own & {id(p) for p in part.parameters(recurse=False)}:
            raise PotstillError(
                f"network '{name}': the head '{path}' shares its weight with '{other}'; give it its own"
            )


def _try_body(body: nn.Module, top: nn.Module, name: str, path: str, x: Tensor, logits: Tensor) -> bool:
    """Try the part below the head; whether samples see each other in it.

    Raises:
        PotstillError: It is not pure, or the head is not all that comes after it.
    """
    trial = Trial(body, name)
    features = trial(x)
    fits = isinstance(features, Tensor) and features.ndim == 2 and features.shape[1] == top.in_features
    if not fits or not torch.allclose(top(features), logits, 1e-4, 1e-6):
        raise PotstillError(
            f"network '{name}' does more with its logits than its linear head '{path}'; let it end with the head, called "
            "on features (N, features)"
        )
    one = trial(x[:1])
    for other in (torch.zeros_like(x), -3 * x):
        if (shape := trial(other).shape) != features.shape:
            raise PotstillError(
                f"network '{name}': the shape of its features depends on values: {tuple(features.shape)}, {tuple(shape)}"
            )
    params: dict[str, Tensor] = dict(body.named_parameters())
    buffers = dict(body.named_buffers())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(body, {**params, **buffers}, (x,)).square().mean()

    twice = tree_map(lambda p: torch.stack([p, p]), params)
    with torch.enable_grad():
        trial.guarded(lambda: vmap(grad(loss))(twice, torch.stack([x, -x])), DEPENDS)
        trial.guarded(lambda: grad(lambda x: _norm(grad(loss)(params, x)))(x), "has no gradient of its gradient")
    return not torch.allclose(one, features[:1], 1e-3, 1e-4 * float(features.abs().max()))


def _norm(tree: dict[str, Tensor]) -> Tensor:
    return sum((g.square().sum() for g in tree.values()), torch.zeros(()))
