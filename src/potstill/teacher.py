"""A network that knows the whole training set: it labels samples softly, and gives the space to choose them in.

It is trained by the protocol `whole` on the training data without what is held out, and kept in a cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor

from .compiling import EAGER_FLOPS, PRECISIONS, choose_compile, choose_precision
from .data import Data
from .errors import Stopped
from .functional import Key, finite, to
from .networks import Network, State, narrow, network
from .records import cache, digest, write_whole
from .synthetic import Embed, pixels
from .training import PROTOCOLS, Protocol, Trainer
from .unfinished import Unfinished

Say = Callable[[str], None]
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
UNCHOSEN = 4.0  # the temperature where nothing is held out to choose it on
BATCH = 500
# For the choice of a temperature: a constant low rate would not come far on soft labels, and favour the sharpest.
QUICK = Protocol("quick", epochs=100, lr=0.05, schedule="cycle")


@dataclass(frozen=True)
class SoftLabels:
    """Probabilities that a teacher gives to samples, and how it came to them.

    Args:
        labels: (M, C), each row summing to 1.
        temperature: By which the logits are divided.
        heldout: Held-out accuracy of a quick student at each temperature; empty where nothing is held out.
        teacher: Name of the network.
    """

    labels: Tensor
    temperature: float
    heldout: list[tuple[float, float]]
    teacher: str

    @property
    def words(self) -> str:
        """For the user."""
        if not self.heldout:
            return (
                f"soft labels by {self.teacher}, temperature {self.temperature:g} (nothing is held out to choose it on)"
            )
        tried = ", ".join(f"{t:g}: {100 * a:.1f} %" for t, a in self.heldout)
        return f"soft labels by {self.teacher}, temperature {self.temperature:g} (held-out accuracy {tried})"

    def describe(self) -> dict[str, Any]:
        """What a set and a record keep of it."""
        chosen = [list(pair) for pair in self.heldout]
        known = {"network": self.teacher, "protocol": "whole", "protocol_hash": PROTOCOLS["whole"].hash}
        return {**known, "temperature": self.temperature, "heldout_accuracy": chosen}


@dataclass(frozen=True)
class Teacher:
    """A trained network, in evaluation: stored statistics, full precision, no gradient."""

    net: Network
    state: State
    device: str = "cpu"

    def logits(self, inputs: Tensor) -> Tensor:
        """(N, C) of prepared inputs (N, *shape)."""
        return self._run(self.net, inputs)

    def features(self, inputs: Tensor) -> Tensor:
        """What the head sees, (N, F), of prepared inputs (N, *shape)."""
        return self._run(self.net.features, inputs)

    def _run(self, forward: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([forward(self.state, x.to(self.device), "stored").cpu() for x in inputs.split(BATCH)])

    def label(self, data: Data, inputs: Tensor, student: str, key: Key) -> SoftLabels:
        """Probabilities softmax(logits / temperature) of prepared inputs (M, *shape).

        The temperature is the one at which a narrow student, trained shortly on the inputs with these labels, names
        most of `data.heldout`; the lowest of several that do. All students have the same weights and order.

        Args:
            data: With a part held out; the test data are not looked at.
            inputs: The samples.
            student: The network that they are for.
            key: Of the students.
        """
        logits, held = self.logits(inputs), data.heldout
        if not len(held):
            return SoftLabels(soften(logits, UNCHOSEN), UNCHOSEN, [], self.net.name)
        net = network(narrow(student), data.shape, data.task.outputs).by(self.net.rows)
        quick = Trainer(net, QUICK, data.task, False, self.device)
        sets = [(inputs, soften(logits, t)) for t in TEMPERATURES]
        states = quick.fit(sets, [key] * len(sets), lambda n: None)
        scores = [round(quick.score(state, held.inputs, held.labels, data.prepare), 6) for state in states]
        best = scores.index(max(scores))
        heldout = list(zip(TEMPERATURES, scores, strict=True))
        return SoftLabels(sets[best][1], TEMPERATURES[best], heldout, self.net.name)


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities (N, C): softmax of logits over a temperature."""
    return torch.softmax(logits / temperature, 1)


def seconds_of_labels(data: Data, student: str, samples: int) -> float:
    """What the choice of a temperature takes, from counted operations."""
    if not len(data.heldout):
        return 0.0
    net = network(narrow(student), data.shape, data.task.outputs)
    return len(TEMPERATURES) * Trainer(net, QUICK, data.task, False, "cpu").flops(samples) / EAGER_FLOPS


@dataclass(frozen=True)
class School:
    """Where teachers of one data set are trained by the protocol `whole` on `data.train`, or found in the cache.

    Args:
        data: What is held out of it plays no part in training.
        seed: Of weights and order.
        device: Where to train.
        compile: `auto`, `on` or `off`.
        precision: `auto`, `fp32` or `bf16`, of the training.
        say: Receives lines for the user.
        bar: Makes a progress bar of a length, a title and a start.
        rows: Samples in one pass of a network, to save memory; 0 for any number.
    """

    data: Data
    seed: int
    device: str = "cpu"
    compile: str = "auto"
    precision: str = "auto"
    say: Say = lambda line: None
    bar: Callable[[int, str, int], Any] | None = None
    rows: int = 0

    def network(self, name: str) -> Network:
        return network(name, self.data.shape, self.data.task.outputs).by(self.rows)

    def work(self, name: str) -> float:
        """Seconds that the training of a teacher takes, from counted operations."""
        trainer = Trainer(self.network(name), PROTOCOLS["whole"], self.data.task, False, "cpu")
        return trainer.flops(len(self.data.train)) / EAGER_FLOPS

    def _choices(self, name: str) -> tuple[bool, str]:
        on, _ = choose_compile(self.compile, self.work(name), self.device)
        return on, choose_precision(self.precision, self.device, self.network(name))

    def file(self, name: str) -> Path:
        """Where the teacher of this name is kept: another file for everything that can change a bit of it."""
        own = [self.network(name).name, self.data.task.outputs, PROTOCOLS["whole"].hash, self.seed, self.device]
        return cache("teachers") / f"{digest([_mark(self.data), *own, *self._choices(name)])}.safetensors"

    def seconds(self, name: str) -> float:
        """What a teacher would cost, from counted operations; nothing where the cache has it."""
        return 0.0 if self._kept(name) else self.work(name)

    def _kept(self, name: str) -> State | None:
        """The trained network of this name in the cache; code from outside may change under its name, and is not kept."""
        return None if ":" in name else _read(self.file(name), self.network(name))

    def teacher(self, name: str) -> Teacher:
        """The trained network of this name."""
        net, protocol, state = self.network(name), PROTOCOLS["whole"], self._kept(name)
        if state is None:
            on, precision = self._choices(name)
            minutes = max(self.work(name) / 60, 0.1)
            self.say(f"teacher: {net.name} on the training data by protocol whole, about {minutes:.1f} min here")
            trainer = Trainer(net.at(PRECISIONS[precision]), protocol, self.data.task, on, self.device)
            epochs, each = protocol.plan(len(self.data.train))
            line = self.bar(epochs * each, f"teacher {net.name}", 0) if self.bar else None
            pair = (self.data.train.inputs, self.data.train.labels)
            key = Key(self.seed).fold("teacher")
            tick = line.update if line is not None else lambda n: None
            file = None if ":" in name else self.file(name)  # every call of it looks at all of the data
            kept = None if file is None else Unfinished(file.with_suffix(".part"), f"{file.stem} {self.rows}")
            (trained,) = trainer.fit([pair], [key], tick, self.data.prepare, kept)
            if line is not None:
                line.close()
            state = State(*to(tuple(trained), "cpu"))
            if not finite(tuple(state)):
                if kept is not None:
                    kept.end()
                raise Stopped(
                    f"teacher: {net.name} ended with weights that are not finite; it labels nothing and is not kept"
                )
            if file is not None and kept is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, encode(_flat(state)))
                kept.end()
        return Teacher(net, State(*to(tuple(state), self.device)), self.device)

    def embedding(self, space: str, name: str) -> Embed:
        """The space in which training samples are compared.

        `pixels`: standardised inputs. `features`: what the head of the network sees, after training by the protocol
        `whole` on the training data. `random-features`: the same of a network with fresh weights.
        """
        if space == "pixels":
            return pixels(self.data)
        if space == "features":
            made = self.teacher(name)
        else:
            net = self.network(name)
            state = State(*to(tuple(net.init(Key(self.seed).fold("space"))), self.device))
            made = Teacher(net, state, self.device)
        return lambda raw: made.features(self.data.prepare(raw))


def _mark(data: Data) -> str:
    """A hash of what a teacher learns from: training inputs, labels, and their transform by what it does."""
    total = hashlib.blake2b(digest_size=8)
    for tensor in (data.train.inputs, data.train.labels, data.prepare(data.train.inputs[:8])):
        total.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _flat(state: State) -> dict[str, Tensor]:
    parts = zip(("params", "buffers"), state, strict=True)
    return {f"{part}/{k}": v.contiguous().clone() for part, tensors in parts for k, v in tensors.items()}


def _read(file: Path, net: Network) -> State | None:
    """The state in a file; nothing where there is none, or another network's."""
    try:
        found = decode(file.read_bytes())
    except (OSError, SafetensorError):
        return None
    like = _flat(net.init(Key(0)))
    if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in like.items()}:
        return None
    parts = [{k.split("/", 1)[1]: found[k] for k in like if k.startswith(part)} for part in ("params/", "buffers/")]
    return State(*parts)
