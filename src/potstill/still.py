"""One step of the loop, whatever the method: a recipe bound to data, with all that is static made once."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import split
from .compiling import PRECISIONS, Graphs, compiled
from .data import Classification, Data
from .errors import PotstillError
from .exchange import DistilledSet, describe_set
from .functional import Key, Tree, to, tree_map
from .networks import narrow, network
from .objectives import ByGroup, Net, Real, Sizes, Uniform
from .parallel import ALONE, Group, Sharing
from .recipe import Recipe, to_dict
from .records import processor
from .replay import Experts
from .students import KERNEL, Ridge, Walker, is_kernel, labels_for, own_kernel, starts_alike
from .synthetic import Synthetic, initialise
from .teacher import School
from .training import LOOK, Trainer
from .transforms import matrix_of

SHOWN = 100  # samples in a snapshot
CHUNK = 256  # real samples in one pass: what a processor's caches like (measured against 2,560: 1.0 s to 1.1-1.9 s)


class Now(NamedTuple):
    """Everything that a step changes."""

    learned: dict[str, Tensor]
    slow: Tree
    own: Tree
    pool: Tree


@dataclass(frozen=True)
class Settings:
    """What a run is, apart from its data: pinned in its checkpoint.

    The first group decides what is computed. The second decides only how, but to the last bit: a resumed run takes it
    from the checkpoint.
    """

    recipe: Recipe
    counts: list[int]
    seed: int
    holdout: float
    steps: int
    device: str

    compile: bool
    precision: str
    threads: int
    rows: int = 0  # samples in one pass, to save memory; 0 for any number

    parallel: str = "alone"
    ranks: int = 1

    def plain(self, data: Data) -> dict[str, Any]:
        """For a checkpoint's header."""
        return {
            **{k: v for k, v in vars(self).items() if k != "recipe"},
            "recipe": to_dict(self.recipe),
            "fingerprint": data.fingerprint,
            "experts": source.trajectories.mark if isinstance(source := self.recipe.source, Experts) else None,
            "transform": data.transform.name,
            "torch": torch.__version__,
            "processor": processor(),
        }


def start_of(school: School, recipe: Recipe, counts: list[int]) -> Synthetic:
    """S before the first step: samples of the school's data, compared in the recipe's space where it chooses them."""
    embed = school.embedding(recipe.space, recipe.network)
    objective, key = recipe.objective, Key(school.seed).fold("init")
    if objective is None:
        return initialise(school.data, counts, recipe.init, key, embed, recipe.labels)
    rates, scale = objective.start_rates(), objective.label_scale(school.data.task.classes)
    return initialise(school.data, counts, recipe.init, key, embed, recipe.labels, rates, scale)


class Still:
    """One run: a recipe bound to data, with everything that is static made once.

    Args:
        data: With its held-out part taken away.
        settings: The run's.
        start: S before the first step; made as the recipe says if absent.
        group: The processes that share the run, as `settings.parallel` says.

    The step is a pure function of the state and the step's number; randomness comes from keys below the seed.
    """

    def __init__(self, data: Data, settings: Settings, start: Synthetic | None = None, group: Group = ALONE) -> None:
        recipe, self.data, self.settings = settings.recipe, data, settings
        if recipe.objective is None or recipe.source is None:
            raise PotstillError(f"method '{recipe.method}' takes no steps")
        self.key = Key(settings.seed)
        self.network = network(recipe.network, data.shape, data.task.outputs).at(PRECISIONS[settings.precision])
        self.network = self.network.by(settings.rows)
        self.task = task_of(data, recipe.labels)
        graph = Graphs(settings.compile)
        self.objective = replace(
            recipe.objective, augment=recipe.augment, task=self.task, graph=graph, rows=settings.rows
        )
        self.source = recipe.source
        self.start = start or start_of(School(data, settings.seed, settings.device), recipe, settings.counts)
        self.sharing = Sharing(group, settings.parallel, self.objective.averaged(self.network))
        self.members = [(data.train.groups == g).nonzero().flatten() for g in range(len(settings.counts))]
        self.memory = self._memory()
        self.objective = self.objective.settle(self.memory, settings.compile or bool(settings.rows))
        self._target = compiled(self.objective.target, settings.compile)
        self._gradient = compiled(self.gradient, settings.compile and not self.objective.in_pieces)
        self._train = compiled(self.source.train_step(self.network, recipe.augment, self.task), settings.compile)

    def _memory(self) -> dict[str, int]:
        """Estimated peak bytes of each way to compute a step's gradient, where there are several."""
        if self.objective.way is None or self.settings.rows:
            return {}
        now = self.fresh()
        _, net, real, draws = self.inputs_of(now, 0)
        with torch.no_grad():
            target = self.objective.target(real, net, draws)  # type: ignore[arg-type]
        return self.objective.estimates(self.synthetic(now.learned), target, net, draws)

    @property
    def device(self) -> str:
        return self.settings.device

    @property
    def precision(self) -> str:
        """In which it computes: that of the networks, or where there are none that of a kernel in closed form."""
        return self.settings.precision if self.objective.needs.network else "fp64"

    @property
    def shown(self) -> Tensor:
        """Numbers of the samples that snapshots keep: the first of each class, about a hundred in all; of many classes the
        first hundred."""
        return self.start.index[:SHOWN, : max(1, SHOWN // len(self.members))].flatten().unique()

    def with_steps(self, steps: int, looks: int | None = None) -> Still:
        """The same run, what is compiled included, with another number of steps and, where given, of looks."""
        other, recipe = copy.copy(self), self.settings.recipe
        recipe = replace(recipe, steps=steps, looks=recipe.looks if looks is None else looks)
        other.settings = replace(self.settings, steps=steps, recipe=recipe)
        return other

    def fresh(self) -> Now:
        """The state before the first step."""
        everything = {**self.start.fixed, **self.start.learned}
        learned = to({k: everything[k] for k in self.settings.recipe.learn}, self.device)
        slow = {k: self.settings.recipe.optimiser[k].init({k: v}) for k, v in learned.items()}
        own = to(self.objective.init(self.task, self.start), self.device)
        return Now(learned, slow, own, self.source.init())

    def synthetic(self, learned: dict[str, Tensor]) -> Synthetic:
        """S with the given learned numbers, on the device."""
        s = self.start
        fixed = {k: v for k, v in {**s.fixed, **s.learned}.items() if k not in learned}
        index, mask = s.index.to(self.device), s.mask.to(self.device)
        return Synthetic(learned, to(fixed, self.device), index, mask, s.labels)

    def drawn(self, needs: ByGroup | Uniform, key: Key) -> tuple[Tensor, Tensor]:
        """Numbers and mask of a real batch, drawn without repetition within it."""
        if isinstance(needs, ByGroup):
            width = min(needs.count, max(len(m) for m in self.members))
            places = torch.arange(width)
            index = torch.stack(
                [m[key.fold(g).permutation(len(m))[places % len(m)]] for g, m in enumerate(self.members)]
            )
            mask = torch.stack([(places < len(m)).float() for m in self.members])
        else:
            index = key.permutation(len(self.data.train))[: needs.count]
            mask = torch.ones(len(index))
        return index, mask

    def real(self, needs: ByGroup | Uniform | None, key: Key) -> Real | None:
        """A real batch."""
        return None if needs is None else self.batch(*self.drawn(needs, key))

    def batch(self, index: Tensor, mask: Tensor, later: bool = False) -> Real:
        """The training samples with the given numbers, as networks see them; read `later` where that is asked for."""
        train = self.data.train
        drawn: Any = split.Drawn(self.data, index, self.device)
        return Real(drawn if later else drawn.read(), train.labels[index].to(self.device), mask.to(self.device))

    def inputs_of(self, now: Now, step: int) -> tuple[int, Net, Real | None, Tree]:
        """Everything that a step needs beside the state, made eagerly: a network, a real batch, draws."""
        key = self.sharing.key(self.key)
        slot, net = self.source.fetch(
            self.network, now.pool, key.fold("source", step), step / max(self.settings.steps, 1)
        )
        net = Net(net.network, *to(tuple(net)[1:], self.device))
        needs = self.objective.needs
        if needs.calibrate and net.network.mixes_samples:
            batch = self.real(ByGroup(needs.calibrate), key.fold("calibrate", step))
            net = self.source.calibrate(net, batch.inputs.flatten(0, 1)) if batch else net
        drawn = None if needs.real is None else self.drawn(needs.real, key.fold("real", step))
        sizes = Sizes(len(self.members), len(self.start), 0 if drawn is None else drawn[1].numel())
        draws = self.objective.draws(key.fold("draws", step), sizes)
        if drawn is None:
            return slot, net, None, to(draws, self.device)
        real = self.batch(*self.sharing.rows(*drawn), later=bool(self.settings.rows))
        return slot, net, real, to(self.sharing.draws(draws, drawn[1].shape), self.device)

    def target(self, net: Net, real: Real | None, draws: Tree) -> Tree:
        """The real side, a few groups at a time where the objective allows it."""
        with torch.no_grad():
            by_group = real is not None and isinstance(self.objective.needs.real, ByGroup)
            if real is None or not by_group or not self.objective.separable(net.network):
                return self._target(real, net, draws)
            groups, width = real.mask.shape
            each = max(c for c in range(1, groups + 1) if groups % c == 0 and (c == 1 or c * width <= CHUNK))
            parts = [_rows((tuple(real), draws), i, i + each) for i in range(0, groups, each)]
            targets = [self._target(Real(*batch), net, drawn) for batch, drawn in parts]
            return tree_map(lambda *rows: torch.cat(rows), *targets)

    def gradient(
        self, learned: dict[str, Tensor], index: Tensor, mask: Tensor, target: Tree, net: Net, draws: Tree, own: Tree
    ) -> tuple[Tensor, dict[str, Tensor], Tree]:
        """Loss and gradient of the groups with the given rows of S: one graph."""
        s = replace(self.synthetic(learned), index=index, mask=mask)
        return self.objective.value_and_grad(s, target, net, draws, own)

    def value_and_grad(self, now: Now, target: Tree, net: Net, draws: Tree) -> tuple[Tensor, dict[str, Tensor], Tree]:
        """Loss, gradient and own next state, group by group where the objective is better so."""
        s = self.synthetic(now.learned)
        if not self.objective.in_parts:
            return self._gradient(now.learned, s.index, s.mask, target, net, draws, now.own)
        loss, grads = torch.zeros(()), tree_map(torch.zeros_like, now.learned)
        for g in range(len(s.index)):
            index, mask, part, drawn = _rows((s.index, s.mask, target, draws), g, g + 1)
            value, more, _ = self._gradient(now.learned, index, mask, part, net, drawn, now.own)
            loss, grads = loss + value, tree_map(torch.add, grads, more)
        return loss, grads, now.own

    def step(self, now: Now, step: int) -> tuple[Now, float]:
        """One step of the loop: the next state and the loss. Nothing is changed in place."""
        slot, net, real, draws = self.inputs_of(now, step)
        if self.settings.rows:
            loss, grads, own = split.value_and_grad(self, now, net, real, draws)
        else:
            target = self.sharing.target(self.target(net, real, draws), real)
            loss, grads, own = self.value_and_grad(now, target, net, draws)
        loss, grads = self.sharing.gradient(loss, grads, real)
        return self.update(now, step, slot, net, grads, own), float(loss)

    def update(self, now: Now, step: int, slot: int, net: Net, grads: dict[str, Tensor], own: Tree) -> Now:
        """The state after a step: what is learned moves along its gradient, then the source trains or retires the network.

        Args:
            now: Before the step.
            step: Its number.
            slot: Of the network that was used.
            net: That network.
            grads: Of what is learned, by name.
            own: The objective's own state after the step.
        """
        learned, slow = {}, {}
        for part, value in now.learned.items():
            optimiser = self.settings.recipe.optimiser[part]
            rate = optimiser.lr * cosine(step / max(self.settings.steps, 1), self.settings.recipe.final)
            after, slow[part] = optimiser.update({part: value}, {part: grads[part]}, now.slow[part], rate)
            learned.update(after)
        s, key = self.synthetic(learned), self.sharing.key(self.key).fold("advance", step)
        pool = self.source.advance(now.pool, slot, net, s, self._train, self.settings.recipe.augment, key)
        return Now(learned, slow, own, pool)

    def set(self, learned: dict[str, Tensor], step: int) -> DistilledSet:
        """S as it is saved."""
        s = self.synthetic(to(learned, self.device))
        inputs, labels = to(s.take(torch.arange(len(self.start), device=self.device)), "cpu")
        if (needs := self.objective.needs.finish) is not None:
            real = self.real(needs, self.key.fold("finish"))
            with torch.no_grad():
                labels = to(self.objective.finish(inputs.to(self.device), labels.to(self.device), real), "cpu")  # type: ignore[arg-type]
        meta = describe_set(self.data, self.settings.recipe, self.settings.counts, self.settings.seed, step)
        rates = to(s.rates, "cpu").detach() if "lr" in {**s.fixed, **s.learned} else None
        return DistilledSet(inputs.detach(), labels.detach(), meta, rates, matrix_of(self.data.transform))

    def look(self, now: Now) -> dict[str, Any] | None:
        """Accuracy on held-out data of one narrow network trained shortly on S; nothing where nothing is held out."""
        held = self.data.heldout
        if not len(held):
            return None
        set_ = self.set(now.learned, self.settings.steps)
        learner = self.look_student(set_)
        labels = labels_for("squared", set_.labels, set_.meta.labels) if isinstance(learner, Ridge) else set_.labels
        (state,) = learner.fit([(set_.inputs, labels)], [self.key.fold("look")], lambda n: None)
        accuracy = learner.score(state, held.inputs, held.labels, self.data.prepare)
        return {"accuracy": round(accuracy, 6), "network": learner.name}

    def look_student(self, set_: DistilledSet) -> Trainer | Walker | Ridge:
        """Who learns at a look: the kernel or the walk that the set asks for, else a narrow network, trained shortly."""
        recipe = self.settings.recipe
        walks = recipe.protocol == "unrolled" and starts_alike(recipe, self.settings.steps)
        name = recipe.student if walks or is_kernel(recipe.student) else narrow(recipe.student)
        if is_kernel(name):
            usual, ridge = own_kernel(set_)
            return Ridge(usual if name == KERNEL else name, ridge, self.task)
        net = network(name, self.data.shape, self.data.task.outputs).by(self.settings.rows)
        if recipe.protocol == "unrolled":
            return Walker(net, self.task, set_, set_.meta.labels, False, "cpu")
        return Trainer(net, replace(LOOK, fit=self.task.fit), self.task, False, "cpu")


def task_of(data: Data, labels: str) -> Classification:
    """The data's task with the loss that labels of this convention ask for."""
    return replace(data.task, fit="squared" if labels == "centred" else "cross-entropy")


def cosine(progress: float, final: float) -> float:
    """A factor that falls from 1 at progress 0 to `final` at 1, along half a wave."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _rows(tree: Tree, start: int, stop: int) -> Tree:
    """The same rows of every leaf."""
    return tree_map(lambda t: t[start:stop], tree)
