"""One set under one protocol: students are fitted to it, the test data are read once; and its baselines, the same way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .augment import Augment
from .compiling import (
    EAGER_FLOPS,
    PRECISIONS,
    choose_compile,
    choose_precision,
)
from .data import Data
from .errors import PotstillError, unknown
from .exchange import DistilledSet
from .functional import Key, finite
from .measure import peak_bytes, reset_peak
from .networks import network
from .parallel import ALONE, Group
from .records import cache, digest, write_json
from .students import KERNEL, Ridge, Walker, fit_of, is_kernel, labels_for, own_kernel, recipe_of_set
from .synthetic import pick, pick_random
from .teacher import School, seconds_of_labels, soften
from .training import PROTOCOLS, Protocol, Trainer
from .transforms import describe, matrix_of
from .unfinished import Unfinished, mark_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """One set, one network, one protocol: the scores of several fresh networks.

    `spread` says what varies between the scores: `networks` (one set) or `sets and networks` (a set drawn anew for
    each network). Bytes are those of inputs and labels as a set stores them; for the whole set, as the data hold them.
    `temperature` is that of soft labels by a teacher which a baseline made for itself.
    """

    set: str
    method: str
    dataset: str
    ipc: int | list[int] | None
    network: str
    protocol: str
    protocol_hash: str
    repeats: int
    spread: str
    metric: str
    accuracies: list[float]
    accuracy_mean: float
    accuracy_std: float
    images: int
    seed: int
    compile: str
    precision: str
    seconds: float
    peak_bytes: int
    input_bytes: int
    label_bytes: int
    labels: str = "hard"
    temperature: float | None = None


def fitting(augment: Augment, data_mirror: bool, shape: tuple[int, ...]) -> Augment:
    """An augmentation without what the data do not bear: mirroring digits, moving vectors."""
    if len(shape) != 3:
        return Augment()
    return augment if data_mirror else replace(augment, ops=tuple(op for op in augment.ops if op != "flip"))


def meeting(set_: DistilledSet, data: Data) -> tuple[DistilledSet, Data]:
    """A set, and the data prepared as it was, so that baselines see what it sees. To a whitened set whose matrix is not there
    its training data give it again.

    Raises:
        PotstillError: These are not the data whose whitening the set lacks.
    """
    said = set_.meta.transform
    data = data if data.transform.name == said["name"] else data.with_transform(said["name"])
    if set_.blind:
        here, matrix = describe(data.transform), matrix_of(data.transform)
        same = all(here[k] == said[k] for k in ("trailing", "reg")) and all(
            len(here[k]) == len(said[k]) and np.allclose(here[k], said[k], rtol=1e-6) for k in ("mean", "std")
        )  # sums round otherwise on another machine
        if matrix is None or not same or data.fingerprint != set_.meta.fingerprint:
            raise PotstillError(
                f"the set is whitened and its matrix is not beside it; {data.name} as it is here is not the data that it was "
                f"made from, which would give it again (fingerprint {data.fingerprint}, not {set_.meta.fingerprint[:40]})"
            )
        set_ = set_.whitened(matrix)
    return set_, data


def protocol_of(name: str) -> Protocol:
    """A protocol by name."""
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS, "`potstill list protocols` shows all")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Judge:
    """Evaluates sets of one data set under one protocol: the part that a set's own number and its baselines share."""

    data: Data
    protocol: Protocol
    repeats: int = 5
    seed: int = 0
    device: str = "cpu"
    compile: str = "auto"
    precision: str = "auto"
    say: Say = lambda line: None
    bar: Callable[[int, str, int], Any] | None = None
    group: Group = ALONE
    rows: int = 0  # samples in one pass of a network, to save memory; 0 for any number
    unfinished: Path | None = None  # a folder in which trainings are kept while they last, to go on with after a kill
    over: list[Unfinished] = field(default_factory=list)  # those that are done, until their numbers are on disk

    def judge(
        self,
        name: str,
        method: str,
        ipc: int | list[int] | None,
        sets: Sequence[tuple[Tensor, Tensor]],
        prepare: Callable[[Tensor], Tensor],
        net_name: str,
        asks: DistilledSet | None = None,
        varied: bool = False,
        labels: str = "hard",
        raw: bool = False,
    ) -> Result:
        """Scores on the test data of students fitted to the given sets, one each.

        Args:
            name: Of the set, in the result.
            method: Of the set, in the result.
            ipc: Of the set, in the result.
            sets: Inputs (M, *shape) prepared and labels, for each student.
            prepare: Raw inputs to what the students see.
            net_name: The student.
            asks: The set whose learned rates, steps or kernel are used where the protocol or the student calls for them.
            varied: Whether each student has a set of its own.
            labels: Convention of the labels.
            raw: Whether the inputs of the sets are raw, too, and prepared a batch at a time.
        """
        protocol = self.resolved(asks, labels)
        if is_kernel(net_name) and not varied:
            sets = sets[:1]  # nothing is random
        sets = [(x, labels_for(fit_of(net_name, protocol, asks), y, labels)) for x, y in sets]
        samples, work = len(sets[0][0]), self.student(net_name, protocol, asks, labels, False)
        on, _ = self.group.share(
            choose_compile(self.compile, work.flops(samples) * len(sets) / EAGER_FLOPS, self.device)
        )
        trainer = self.student(net_name, protocol, asks, labels, on)
        reset_peak(self.device)
        start = time.perf_counter()
        keys = [Key(self.seed).fold("evaluate", r) for r in range(len(sets))]
        mine, keys = self.group.mine(sets), self.group.mine(keys)
        bar = self.bar(len(mine) * trainer.steps(samples), f"{name} on {trainer.name}", 0) if self.bar else None
        tick = bar.update if bar is not None else lambda n: None
        kept = None
        if (
            self.unfinished is not None
            and self.group.size == 1
            and ":" not in net_name
            and isinstance(trainer, Trainer)
        ):
            how = (trainer.name, trainer.together(samples), protocol.plain(), fit_of(net_name, protocol, asks), on, self.precision_of(net_name), self.device)  # fmt: skip
            mark = mark_of(sets, how, keys, describe(self.data.transform) if raw else None)
            kept = Unfinished(self.unfinished / f"{mark}.safetensors", mark)
        states = trainer.fit(mine, keys, tick, prepare if raw else None, kept) if mine else []
        if lost := sum(self.group.gather(sum(not finite(tuple(s)) for s in states))):
            self.say(
                f"note: {lost} of {len(sets)} networks ({trainer.name} on {name}) ended with weights that are not finite; "
                "their accuracy is that of naming the first class always"
            )
        scores = [trainer.score(s, self.data.test.inputs, self.data.test.labels, prepare) for s in states]
        scores = self.group.dealt(scores)
        if bar is not None:
            bar.close()
        if kept is not None:
            self.over.append(kept)
        spread = torch.tensor(scores, dtype=torch.float64)
        return Result(
            set=name,
            method=method,
            dataset=self.data.name,
            ipc=ipc,
            network=trainer.name,
            protocol=self.protocol.name,
            protocol_hash=self.protocol.hash,
            repeats=len(scores),
            spread="sets and networks" if varied else "networks",
            metric=self.data.task.metric,
            accuracies=[round(s, 6) for s in scores],
            accuracy_mean=round(float(spread.mean()), 6),
            accuracy_std=round(float(spread.std(correction=0)), 6),
            images=samples,
            seed=self.seed,
            compile="on" if on else "off",
            precision=self.precision_of(net_name),
            seconds=round(time.perf_counter() - start + (kept.earlier if kept is not None else 0.0), 3),
            peak_bytes=max(self.group.gather(peak_bytes(self.device))),
            input_bytes=sets[0][0].nbytes,
            label_bytes=sets[0][1].nbytes,
            labels=labels,
        )

    def set(self, set_: DistilledSet, name: str, net_name: str) -> Result:
        """The set's own number."""
        sets, kind = [(set_.inputs, set_.labels)] * self.repeats, set_.meta.labels
        return self.judge(name, set_.meta.method, _ipc(set_), sets, set_.transform, net_name, asks=set_, labels=kind)

    def resolved(self, asks: DistilledSet | None, labels: str) -> Protocol:
        """The protocol for this data and these labels (`hard`, `soft` or `centred`): without augmentation that the data do
        not bear, with the loss of the labels and the rate that a set has learned."""
        recipe = recipe_of_set(asks) if self.protocol.own else None
        augment = self.protocol.augment if recipe is None else recipe.augment
        protocol = self.protocol.fitted(labels)
        protocol = replace(protocol, augment=fitting(augment, self.data.mirror, self.data.shape))
        if protocol.lr or asks is None or asks.lr is None:
            return protocol
        return replace(protocol, lr=float(asks.lr.mean()))

    def precision_of(self, net_name: str) -> str:
        """The precision in which a student computes."""
        if is_kernel(net_name):
            return "fp64"
        net = network(net_name, self.data.shape, self.data.task.outputs)
        return choose_precision(self.precision, self.device, net)

    def student(
        self, net_name: str, protocol: Protocol, asks: DistilledSet | None, labels: str, compile: bool
    ) -> Trainer | Walker | Ridge:
        """Who learns."""
        task = replace(self.data.task, fit=fit_of(net_name, protocol, asks))
        if is_kernel(net_name):
            usual, ridge = own_kernel(asks)
            return Ridge(usual if net_name == KERNEL else net_name, ridge, task)
        precision = PRECISIONS[self.precision_of(net_name)]
        net = network(net_name, self.data.shape, self.data.task.outputs).at(precision).by(self.rows)
        if protocol.name == "unrolled":
            return Walker(net, task, asks, labels, compile, self.device)
        return Trainer(net, protocol, task, compile, self.device)

    def random(self, set_: DistilledSet, net_name: str) -> Result:
        """As many real samples of each class, drawn anew for each network."""
        counts = set_.meta.ipc
        picks = [pick_random(self.data, counts, Key(self.seed).fold("random", r)) for r in range(self.repeats)]
        train = self.data.train
        sets = [(self.data.prepare(train.inputs[p]), train.labels[p]) for p in picks]
        return self.judge("random real", "random", _ipc(set_), sets, self.data.prepare, net_name, set_, varied=True)

    def k_means(self, set_: DistilledSet, net_name: str) -> Result:
        """As many real samples of each class, those nearest to the centres of k-means on pixels; one set."""
        index = pick(self.data, set_.meta.ipc, "k-means", Key(self.seed).fold("k-means"))
        pair = (self.data.prepare(self.data.train.inputs[index]), self.data.train.labels[index])
        sets = [pair] * self.repeats
        return self.judge("k-means real", "k-means", _ipc(set_), sets, self.data.prepare, net_name, set_)

    def random_soft(self, set_: DistilledSet, net_name: str, affordable: float | None = None) -> Result | None:
        """As many real samples of each class, drawn anew for each network, with soft labels by a teacher.

        Everything is made from nine tenths of the training data; on the tenth held out, for the first draw, the
        temperature is chosen.

        Args:
            set_: Whose counts are taken.
            net_name: The network, as student and as teacher.
            affordable: Not run, and `None` returned, where it would take longer than so many seconds.
        """
        made = self._first(lambda judge: judge._soft(set_, net_name, affordable))
        if made is None:
            return None
        name, kind, sets = "random real, soft labels", _ipc(set_), made["sets"]
        result = self.judge(
            name, "random-soft", kind, sets, self.data.prepare, net_name, set_, varied=True, labels="soft"
        )
        return replace(result, temperature=made["temperature"])

    def _first(self, make: Callable[[Judge], Any]) -> Any:
        """What the first rank alone makes, for all."""
        return self.group.share(make(replace(self, group=ALONE)) if self.group.leads else None)

    def _soft(self, set_: DistilledSet, net_name: str, affordable: float | None) -> dict[str, Any] | None:
        """The sets of `random_soft` and their temperature."""
        data, counts = self.data.hold_out(HOLDOUT), set_.meta.ipc
        if is_kernel(net_name):
            self.say("random with soft labels: not measured, its teacher is the student, and a kernel is no teacher")
            return None
        if any(count > most for count, most in zip(counts, data.counts.tolist(), strict=True)):
            self.say("random with soft labels: not measured, a class has too few samples beside those held out")
            return None
        school = School(data, self.seed, self.device, self.compile, self.precision, self.say, self.bar, self.rows)
        work = self.student(net_name, self.resolved(set_, "soft"), set_, "soft", False).flops(len(set_)) * self.repeats
        seconds = school.seconds(net_name) + seconds_of_labels(data, net_name, len(set_)) + work / EAGER_FLOPS
        if affordable is not None and seconds > affordable:
            self.say(
                f"random with soft labels: not measured, about {seconds / 60:.0f} min here; "
                "--baselines random-soft measures it"
            )
            return None
        teacher = school.teacher(net_name)
        picks = [pick_random(data, counts, Key(self.seed).fold("random", r)) for r in range(self.repeats)]
        inputs = [data.prepare(data.train.inputs[p]) for p in picks]
        first = teacher.label(data, inputs[0], net_name, Key(self.seed).fold("temperature"))
        self.say(first.words)
        sets = [(x, soften(teacher.logits(x), first.temperature)) for x in inputs]
        return {"sets": sets, "temperature": first.temperature}

    def whole(self, net_name: str, affordable: float | None = None) -> Result | None:
        """One network on the whole training set under the protocol `whole`; kept in a cache.

        Args:
            net_name: The network.
            affordable: Not run, and `None` returned, where it would take longer than so many seconds.
        """
        if self.group.size > 1:  # one network: nothing to divide
            found = self._first(lambda judge: (made := judge.whole(net_name, affordable)) and asdict(made))
            return Result(**found) if found else None
        if is_kernel(net_name):
            self.say("whole set: not measured, its Gram matrix is too large for a solve")
            return None
        whole = replace(self, protocol=PROTOCOLS["whole"])
        net = network(net_name, self.data.shape, self.data.task.outputs)
        train = self.data.train
        mark = [self.data.fingerprint, len(train), net.name, whole.protocol.hash, self.seed, self.precision]
        mark += [self.data.transform.name] if self.data.transform.name != "standardise" else []
        file = cache("whole") / f"{digest(mark)}.json"
        named = ":" not in net_name  # code from outside may change under its name
        try:
            if named:
                return Result(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            pass  # not there, or of an older form: measured again
        seconds = Trainer(net, whole.protocol, self.data.task, False, "cpu").flops(len(train)) / EAGER_FLOPS
        if affordable is not None and seconds > affordable:
            self.say(
                f"whole set: not measured, about {seconds / 60:.0f} min here; --baselines random,whole measures it"
            )
            return None
        pair = (train.inputs, train.labels)
        result = whole.judge("whole training set", "whole", None, [pair], self.data.prepare, net_name, raw=True)
        if named:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(result))
        return result

    def written(self) -> None:
        """The numbers so far are on disk: what was kept of their trainings goes."""
        while self.over:
            self.over.pop().end()


def _ipc(set_: DistilledSet) -> int | list[int]:
    counts = set_.meta.ipc
    return counts[0] if len(set(counts)) == 1 else counts


BASELINES = ("random", "k-means", "random-soft", "whole")
HOLDOUT = 0.1  # of the training data, for a teacher's temperature
