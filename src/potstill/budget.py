"""A memory budget: how few samples a pass must take so that a run fits, found by trial before its first step.

Memory means what is resident and anonymous (RssAnon): what a process cannot give back. Pages of mapped files, the data
among them where they are mapped, are the system's to drop, and do not count.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import split
from .compiling import EAGER_FLOPS, return_memory
from .data import Data
from .errors import PotstillError
from .estimate import words
from .exchange import DistilledSet
from .functional import Key, Tree, leaves
from .judge import BASELINES, Judge, protocol_of
from .measure import Anonymous, Clock, anonymous_bytes
from .objectives import Unroll
from .recipe import Recipe
from .sources import Pool
from .still import Now, Settings, Still
from .students import Ridge, Walker, fit_of, is_kernel, labels_for
from .synthetic import Synthetic, pick
from .training import PROTOCOLS, Trainer
from .unroll import state_bytes

SIZES = tuple(2**i for i in range(9))
MOST = SIZES[-1]  # samples in a pass: more is not quicker on a CPU
FIRST = 4  # samples in the first trial
BLOCKS = 2  # of groups in a trial: the others take no more
STEPS = 3  # of an unroll in a trial: the others add a state each
SCORED = 500  # samples that are scored in a trial
STRIDE = 4  # times as many samples in the next trial at most, where only a line through the last two says that it fits
MARGIN = 1.15  # whole runs took up to so many times what a trial did (measured: 1.14)
ROOM = 1.05  # what is expected of a trial must leave so much of the budget
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def size_of(text: str) -> int:
    """Bytes from a number and a unit.

    Args:
        text: Such as `500MiB`, `2GiB`, `1.5G` (of 1,000,000,000 bytes) or a number of bytes.

    Raises:
        PotstillError: Something else.

    Example:
        >>> size_of("1.5G"), size_of("2 MiB")
        (1500000000, 2097152)
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([KMG]I?|)B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise PotstillError(f"--memory '{text}' is no amount of memory; 500MiB, 2GiB or 1.5G are")
    return int(float(match[1]) * UNITS[match[2]])


class TooLittle(Exception):
    """Not even one sample at a time fits; `least` is the memory that this takes."""

    def __init__(self, least: int) -> None:
        super().__init__(words(least))
        self.least = least


def choose(trial: Callable[[int], int], budget: int, base: int) -> tuple[int, int]:
    """The most samples in a pass, a power of two, that a budget allows, and what a trial with them took.

    Trials begin small. Beyond what is there anyway, memory grows at most in proportion to the samples: where that much fits, a
    trial is made at once. Else one of up to `STRIDE` times as many is made where growth as between the last two fits; if it takes
    more than the budget after all, it is not taken.

    Args:
        trial: Samples in a pass to the bytes that are taken at most.
        budget: In bytes.
        base: Bytes that are taken before.

    Raises:
        TooLittle: One sample in a pass takes more.

    Example:
        >>> choose(lambda rows: 100 + 10 * rows, 500, 50)
        (32, 420)
    """
    took = {FIRST: trial(FIRST)}
    if took[FIRST] > budget:
        took[1] = trial(1)
        if took[1] > budget:
            raise TooLittle(took[1])
        took[2] = trial(2)
        best = max(r for r in (1, 2) if took[r] <= budget)
        return best, took[best]
    best, top = FIRST, MOST
    while True:
        most = max(took[best] - base, 0) / best
        below = [r for r in took if r < best]
        slope = max(took[best] - took[max(below)], 0) / (best - max(below)) if below else math.inf
        wanted = [
            r
            for r in SIZES
            if best < r <= top
            and (
                ROOM * (base + most * r) <= budget
                or (r <= STRIDE * best and ROOM * (took[best] + slope * (r - best)) <= budget)
            )
        ]
        if not wanted and not below:
            took[1] = trial(1)
        elif not wanted:
            return best, took[best]
        else:
            took[max(wanted)] = trial(max(wanted))
            if took[max(wanted)] <= budget:
                best = max(wanted)
            else:
                top = max(wanted) // 2


class Budget:
    """What a run may take, what it is expected to and what it does.

    Args:
        bytes: What it may take.
        affordable: Seconds within which baselines are measured at the end; nothing is judged there if absent.
        say: Receives lines for the user.
    """

    def __init__(self, bytes: int, affordable: float | None, say: Callable[[str], None]) -> None:
        self.bytes, self.affordable, self.say = bytes, affordable, say
        self.seen, self.rows, self.estimate = Anonymous(0.01), 0, 0
        self.before = self.tried = 0  # the most that was taken before the trials, and by them

    @classmethod
    def of(cls, text: str, compile: str, device: str, affordable: float | None, say: Callable[[str], None]) -> Budget:
        """From `--memory`.

        Raises:
            PotstillError: No size, too little for anything, or another choice that it excludes.
        """
        budget = cls(size_of(text), affordable, say)
        if compile == "on":
            raise PotstillError("--memory splits steps that are not compiled; leave out --compile on")
        if device != "cpu" or not sys.platform.startswith("linux"):
            raise PotstillError(f"--memory is for --device cpu on Linux, not {device} on {sys.platform}")
        return_memory()
        if (here := anonymous_bytes()) > budget.bytes:
            raise PotstillError(f"--memory {text} is less than the {words(here)} that the program itself takes")
        return budget

    def allows(self, recipe: Recipe) -> None:
        """Refuse a method that takes no steps."""
        if recipe.objective is None:
            raise PotstillError(f"--memory splits steps; method '{recipe.method}' takes none")

    def choose(self, data: Data, settings: Settings, start: Synthetic, clock: Clock) -> Settings:
        """Settings with as many samples in a pass as fit.

        Args:
            data: The run's, with its held-out part taken away.
            settings: The run's.
            start: S before the first step.
            clock: Takes the time of it.

        Raises:
            PotstillError: It does not fit; with what would.
        """
        self.before, base = self.seen.look(), anonymous_bytes()

        def trial(rows: int) -> int:
            return max(
                self.before, _trial(Still(data, replace(settings, rows=rows), start), self.bytes, self.affordable)
            )

        with clock.phase("memory"):
            try:
                self.rows, self.estimate = choose(trial, int(self.bytes / MARGIN), base)
            except TooLittle as error:
                raise self._refused(error.least, base, settings, "one sample at a time") from error
        self._begin()
        return replace(settings, rows=self.rows)

    def check(self, data: Data, settings: Settings, start: Synthetic, clock: Clock) -> None:
        """Whether a run that goes on with the samples in a pass that it began with fits.

        Raises:
            PotstillError: It does not, or it began without a budget.
        """
        if not settings.rows:
            raise PotstillError("the run to resume began without --memory; leave it out, or --force to start again")
        self.before, base = self.seen.look(), anonymous_bytes()
        with clock.phase("memory"):
            took = max(self.before, _trial(Still(data, settings, start), self.bytes, self.affordable))
        if MARGIN * took > self.bytes:
            raise self._refused(took, base, settings, f"{settings.rows} samples in one pass, as it began")
        self.rows, self.estimate = settings.rows, took
        self._begin()

    def _begin(self) -> None:
        """Say what is expected; from here on the run is looked at, not its trials."""
        self.tried, self.seen = self.seen.look(), Anonymous(0.01)
        several = f"{self.rows} samples" if self.rows > 1 else "one sample"
        self.say(f"memory: about {words(self.estimate)} of {words(self.bytes)}, with at most {several} in one pass")

    def _refused(self, least: int, base: int, settings: Settings, how: str) -> PotstillError:
        enough = 50 * math.ceil((MARGIN + 0.05) * least / (50 << 20))
        return PotstillError(
            f"--memory: {words(self.bytes)} are not enough: this run takes about {words(least)} with {how}, "
            f"{words(base)} of it before the first step; --memory {enough}MiB would do, or try a narrower network than "
            f"{settings.recipe.network}, fewer images or fewer real samples"
        )

    def baselines(self, data: Data) -> list[str]:
        """What the set is compared with at the end."""
        fits = k_means_fits(data, self.bytes)
        if not fits:
            self.say("k-means real: not measured, a class does not fit --memory")
        return [b for b in BASELINES if fits or b != "k-means"]

    def describe(self) -> dict[str, int]:
        """For a record; the user is told, too."""
        peak = max(self.before, self.seen.look())
        trials = f", and {words(self.tried)} while that was tried" if self.tried > peak else ""
        self.say(f"memory: at most {words(peak)} were taken; about {words(self.estimate)} had been expected{trials}")
        return {
            "budget_bytes": self.bytes,
            "estimated_bytes": self.estimate,
            "anonymous_peak_bytes": peak,
            "trials_peak_bytes": self.tried,
            "rows": self.rows,
        }


def _trial(still: Still, budget: int, affordable: float | None) -> int:
    """The most anonymous bytes that parts of a run take, and what comes on top later."""
    with Anonymous() as seen:
        more, after = _step(still)
    held = _held(after, still)
    saved = anonymous_bytes() + 2 * (held + _bytes(tuple(after)))  # a checkpoint: its tensors once more, and its bytes
    taken = max(seen.peak + more, saved)
    del after
    set_ = still.set(still.fresh().learned, 0)
    with Anonymous() as seen:
        if len(still.data.heldout):
            _learn(still.look_student(set_), set_, still.data, still.data.heldout.inputs, still.task.fit)
        if affordable is not None:
            _judge(still, set_, affordable, budget)
    return max(taken, seen.peak) + held


def _step(still: Still) -> tuple[int, Now]:
    """Parts of a step; bytes that the rest of it would take on top, and the state after it."""
    now, objective, more = still.fresh(), still.objective, 0
    slot, net, real, draws = still.inputs_of(now, 0)
    if isinstance(objective, Unroll):
        reach = objective.window or objective.steps
        more = max(reach - STEPS, 0) * state_bytes(objective.begin(net))
        still.objective = replace(objective, steps=min(reach, STEPS), window=0, random_end=False)
        draws = {k: v for k, v in draws.items() if k != "end"}
    _, grads, own = split.value_and_grad(still, now, net, real, draws, BLOCKS)
    if isinstance(still.source, Pool) and still.source.epochs:
        still.source = replace(still.source, epochs=1, limit=1)
    return more, still.update(now, 0, slot, net, grads, own)


def _held(after: Now, still: Still) -> int:
    """Bytes of the networks that a pool comes to hold beside those that it holds already."""
    if not isinstance(still.source, Pool) or still.settings.recipe.source.lifetime < 2:  # type: ignore[union-attr]
        return 0
    slots = [_bytes(slot) for slot in after.pool["states"]]
    return still.source.size * max(slots) - sum(slots)


def _bytes(tree: Tree) -> int:
    return sum(t.nbytes for t in leaves(tree) if isinstance(t, Tensor))


def _learn(learner: Trainer | Walker | Ridge, set_: DistilledSet, data: Data, raw: Tensor, fit: str) -> None:
    """A pass of a student over S, and a few predictions."""
    if isinstance(learner, Trainer):
        learner.protocol = replace(learner.protocol, epochs=1, steps=0, lengths=())
    labels = labels_for(fit, set_.labels, set_.meta.labels)
    (state,) = learner.fit([(set_.inputs, labels)], [Key(0)], lambda n: None)
    raw = raw[:SCORED]
    learner.score(state, raw, torch.zeros(len(raw), dtype=torch.int64), data.prepare)


def _judge(still: Still, set_: DistilledSet, affordable: float, budget: int) -> None:
    """The same for what is judged at the end: the student, one on all training data, k-means."""
    recipe, data, rows = still.settings.recipe, still.data, still.settings.rows
    judge = Judge(data, protocol_of(recipe.protocol), precision=still.settings.precision, rows=rows)
    protocol = judge.resolved(set_, set_.meta.labels)
    learner = judge.student(recipe.student, protocol, set_, set_.meta.labels, False)
    _learn(learner, set_, data, data.test.inputs, fit_of(recipe.student, protocol, set_))
    if k_means_fits(data, budget):
        group = int(data.counts.argmax())
        pick(data, [int(g == group) for g in range(data.task.classes)], "k-means", Key(0))
    if is_kernel(recipe.student):
        return
    whole = judge.student(recipe.student, PROTOCOLS["whole"], None, "hard", False)
    if isinstance(whole, Trainer) and whole.flops(len(data.train)) / EAGER_FLOPS <= affordable:
        whole.protocol = replace(whole.protocol, epochs=1, steps=0)
        few = data.train[: whole.protocol.batch]
        (state,) = whole.fit([(few.inputs, few.labels)], [Key(0)], lambda n: None, data.prepare)
        whole.score(state, data.test.inputs[:SCORED], data.test.labels[:SCORED], data.prepare)


def k_means_fits(data: Data, budget: int) -> bool:
    """Whether the baseline k-means, which holds a class in float and copies of it, fits a budget."""
    return 4 * 4 * int(data.counts.max()) * math.prod(data.shape) <= budget - anonymous_bytes()
