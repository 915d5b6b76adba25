"""Who learns from a set to judge it: a network trained by a protocol, one that walks the set's own steps, or a kernel.

All have `fit` (one fitted thing for each set) and `score` (of such a thing on raw inputs), so that a judge need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .compiling import Graphs, sample_flops
from .data import Classification
from .errors import PotstillError
from .exchange import DistilledSet
from .functional import Key, to
from .infinite import kernel
from .kernels import check_gram, predict
from .networks import Network, State
from .objectives import KernelRidge, Net, Sizes, Unroll
from .recipe import Recipe, from_dict
from .sources import Pool
from .synthetic import Synthetic, group_index
from .training import Prepare, Protocol, Scorer

if TYPE_CHECKING:
    from .unfinished import Unfinished

KERNEL = "kernel"  # the kernel that a set was made by
USUAL = "ntk-dense-d1"
RIDGE = 1e-6
CHUNK = 500  # test inputs at once


def is_kernel(name: str) -> bool:
    """Whether a student's name is that of an infinitely wide network."""
    return name == KERNEL or name.split("-")[0] in ("ntk", "nngp")


def own_kernel(set_: DistilledSet | None) -> tuple[str, float]:
    """Name of the kernel and ridge that a set was made with, the usual ones where it was made otherwise."""
    recipe = recipe_of_set(set_)
    objective = recipe.objective if recipe is not None else None
    if isinstance(objective, KernelRidge) and is_kernel(objective.kernel):
        return objective.kernel, objective.ridge
    return USUAL, RIDGE


def recipe_of_set(set_: DistilledSet | None) -> Recipe | None:
    """What a set says of how it was made, where that is a recipe of the library's own parts."""
    try:
        return from_dict(set_.meta.recipe) if set_ is not None else None
    except PotstillError:
        return None


def check_asked(recipe: Recipe, protocol: Protocol) -> None:
    """Refuse a student or protocol that a set by this recipe could not be judged with, before it is made.

    Raises:
        PotstillError: A kernel that does not exist, or rates or steps that the set will not have.
    """
    if is_kernel(recipe.student) and recipe.student != KERNEL:
        kernel(recipe.student)
    rates = recipe.objective.start_rates() if recipe.objective is not None else None
    if rates is None and (not protocol.lr or protocol.name == "unrolled") and not is_kernel(recipe.student):
        raise PotstillError(
            f"protocol '{protocol.name}' needs a set with learning rates of its own; method '{recipe.method}' makes none"
        )


def fit_of(student: str, protocol: Protocol, asks: DistilledSet | None) -> str:
    """The loss that a student's labels are made for: a kernel's is squared, a walk's is that of the set's convention."""
    if is_kernel(student) or (protocol.name == "unrolled" and asks is not None and asks.meta.labels == "centred"):
        return "squared"
    return protocol.fit


def labels_for(fit: str, labels: Tensor, kind: str) -> Tensor:
    """Labels of one convention as a loss wants them.

    Args:
        fit: `cross-entropy` or `squared`.
        labels: (M,) or (M, C).
        kind: `hard`, `soft` or `centred`.

    Returns:
        For cross-entropy classes or probabilities: those of centred labels are what lies above 0 when 1/C is added, as
        shares. For a squared loss classes or centred labels.
    """
    if kind == "hard" or (kind == "centred") == (fit == "squared"):
        return labels
    classes = labels.shape[1]
    if fit == "squared":
        return labels - 1 / classes
    above = (labels + 1 / classes).clamp(min=0)
    return above / above.sum(1, keepdim=True).clamp(min=1e-12)


def starts_alike(recipe: Recipe, steps: int) -> bool:
    """Whether a run of so many steps trains from the same weights in each: a set for one initialisation."""
    source = recipe.source
    return isinstance(source, Pool) and source.size == 1 and source.lifetime >= max(steps, 2) and not source.epochs


class Walker:
    """Networks trained by a set's own steps, rates and order of samples: the protocol `unrolled`.

    Args:
        net: The network.
        task: Score, and the loss of `fit_of`.
        set_: Whose steps are walked; other inputs may be walked over in its place, with its rates.
        labels: Convention of the labels that `fit` is given.
        compile: Whether a step is compiled.
        device: Where.

    Raises:
        PotstillError: The set was made by an objective that does not train on it.
    """

    def __init__(
        self, net: Network, task: Classification, set_: DistilledSet | None, labels: str, compile: bool, device: str
    ) -> None:
        recipe = recipe_of_set(set_)
        if set_ is None or recipe is None or not isinstance(recipe.objective, Unroll) or set_.lr is None:
            raise PotstillError(
                "protocol 'unrolled' walks the steps that a set was made for; this one was made without"
            )
        self.net, self.task, self.device, self.labels = net, task, device, labels
        self.lr = set_.lr.reshape(-1)
        if len(self.lr) not in (1, recipe.objective.steps):
            raise PotstillError(
                f"the set has {len(self.lr)} learning rates for a walk of {recipe.objective.steps} steps"
            )
        alike = starts_alike(recipe, set_.meta.steps)
        self.start = Key(set_.meta.seed).fold("source", 0, "weights") if alike else None
        groups = torch.repeat_interleave(torch.arange(len(set_.meta.ipc)), torch.tensor(set_.meta.ipc))
        self.index, self.mask = group_index(groups, len(set_.meta.ipc))  # learned labels may say otherwise
        parts = {"augment": recipe.augment, "task": task, "graph": Graphs(compile)}
        self.objective = type(recipe.objective)(**{**vars(recipe.objective), **parts, "window": 0, "random_end": False})
        self._score = Scorer(net, task, compile, device)

    def flops(self, samples: int) -> float:
        """Floating-point operations of one walk."""
        return 3 * sample_flops(self.net) * samples * self.objective.steps

    @property
    def name(self) -> str:
        """Of the network."""
        return self.net.name

    def steps(self, samples: int) -> int:
        """Steps of one walk."""
        return self.objective.steps

    def fit(
        self,
        sets: Sequence[tuple[Tensor, Tensor]],
        keys: Sequence[Key],
        tick: Callable[[int], object],
        prepare: Prepare | None = None,
        kept: Unfinished | None = None,
    ) -> list[State]:
        """As `Trainer.fit`, but begun anew: a walk is short."""
        states = []
        for (x, y), key in zip(sets, keys, strict=True):
            x = prepare(x) if prepare else x
            learned = to({"inputs": x, "lr": self.lr.log()}, self.device)
            fixed = to({"labels": y}, self.device)
            s = Synthetic(learned, fixed, self.index.to(self.device), self.mask.to(self.device), self.labels)
            draws = to(self.objective.draws(key, Sizes(len(self.index), len(x), 0)), self.device)
            start = to(self.net.init(self.start or key.fold("weights")), self.device)
            states.append(self.objective.fit(s, Net(self.net, State(*start)), draws))
            tick(self.objective.steps)
        return states

    def score(self, state: State, inputs: Tensor, labels: Tensor, prepare: Prepare) -> float:
        """As `Trainer.score`."""
        return self._score(state, inputs, labels, prepare)


class Ridge:
    """Kernel ridge regression with the kernel of an infinitely wide network, in float64; nothing is random.

    Args:
        name: Of the kernel.
        ridge: Its factor, times the mean of the Gram matrix's diagonal.
        task: Score.
    """

    def __init__(self, name: str, ridge: float, task: Classification) -> None:
        self.name, self.ridge, self.task, self.kernel = name, ridge, task, kernel(name)

    def flops(self, samples: int) -> float:
        """Nothing is trained."""
        return 0.0

    def steps(self, samples: int) -> int:
        """One solve."""
        return 1

    def fit(
        self,
        sets: Sequence[tuple[Tensor, Tensor]],
        keys: Sequence[Key],
        tick: Callable[[int], object],
        prepare: Prepare | None = None,
        kept: Unfinished | None = None,
    ) -> list[Any]:
        """The sets themselves, with their Gram matrices; nothing is kept of one solve."""
        fitted = []
        for x, y in sets:
            x = (prepare(x) if prepare else x).double()
            gram = self.kernel(x, x)
            check_gram(gram, self.ridge)
            fitted.append((x, gram, self.task.centred(y).double()))
            tick(1)
        return fitted

    def score(self, state: Any, inputs: Tensor, labels: Tensor, prepare: Prepare) -> float:
        """The task's score on raw inputs (N, *shape)."""
        x, gram, y = state
        parts = [predict(self.kernel(prepare(raw).double(), x), gram, y, self.ridge) for raw in inputs.split(CHUNK)]
        return self.task.score(torch.cat(parts), labels)
