"""The synthetic set S: a tree of learned tensors, what of it is fixed, and how it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from . import coresets
from .data import Data
from .errors import PotstillError, unknown
from .functional import Key


@dataclass(frozen=True)
class Synthetic:
    """S = learned + fixed, with an index of which samples belong to which group.

    Args:
        learned: What the loop changes: `inputs` (M, *shape), standardised, unclamped; where asked `labels` and `lr`.
        fixed: What it does not: `labels` (M,) or (M, C) and `lr`, the logarithm of learning rates (1,) or (steps,), unless
            they are learned.
        index: (G, m) sample numbers of each group, padded by repetition where groups have different counts.
        mask: (G, m), 1 for a sample and 0 for padding.
        labels: Their convention: `hard` (classes), `soft` (probabilities), `logits` (of which `take` gives probabilities) or
            `centred` (targets of a squared loss, around 0).
    """

    learned: dict[str, Tensor]
    fixed: dict[str, Tensor]
    index: Int64[Tensor, "g m"]
    mask: Float[Tensor, "g m"]
    labels: str = "hard"

    def at(self, learned: dict[str, Tensor]) -> Synthetic:
        """The same set with other learned numbers: what a gradient is taken through."""
        return replace(self, learned=learned)

    def take(self, index: Int64[Tensor, "*index"]) -> tuple[Float[Tensor, ...], Tensor]:
        """Inputs (..., *shape) and labels (..., [C]) of the samples with the given numbers (...)."""
        labels = self._part("labels")[index]
        return self._part("inputs")[index], labels.softmax(-1) if self.labels == "logits" else labels

    @property
    def rates(self) -> Float[Tensor, steps]:
        """Learning rates, positive: (1,) for all steps or (steps,)."""
        return self._part("lr").exp()

    def _part(self, name: str) -> Tensor:
        return self.learned[name] if name in self.learned else self.fixed[name]

    def by_group(self) -> tuple[Float[Tensor, "g m *shape"], Float[Tensor, "g m"]]:
        """Inputs (G, m, *shape) and the mask (G, m) of every group."""
        return self.take(self.index)[0], self.mask

    def __len__(self) -> int:
        return len(self._part("inputs"))


def counts_per_group(ipc: int | list[int] | tuple[int, ...], available: Tensor) -> list[int]:
    """Images per class as a list, one number for each group.

    Args:
        ipc: One number for all groups, or one for each.
        available: Training samples per group (G,).

    Raises:
        PotstillError: A number below one or above its group's size, or the wrong number of numbers.
    """
    counts = [ipc] * len(available) if isinstance(ipc, int) else list(ipc)
    if len(counts) != len(available):
        raise PotstillError(f"--ipc has {len(counts)} numbers for {len(available)} classes; give one, or one per class")
    for group, (count, most) in enumerate(zip(counts, available.tolist(), strict=True)):
        if count < 1:
            raise PotstillError(f"--ipc {count} is not a number of images; at least 1 per class")
        if count > most:
            raise PotstillError(f"--ipc {count} is more than the {most} training samples of class {group}")
    return counts


def share(budget: int, available: Tensor) -> list[int]:
    """A total number of images divided among the classes, one number for each.

    Every class gets the same, or all that it has where that is less. What the division leaves over goes one each to
    the larger classes, the first of those of equal size.

    Args:
        budget: Images in total.
        available: Training samples per group (G,).

    Raises:
        PotstillError: Fewer images than classes, or more than training samples.

    Example:
        >>> share(11, torch.tensor([9, 2, 9]))
        [5, 2, 4]
    """
    sizes = available.tolist()
    if budget < len(sizes):
        raise PotstillError(
            f"--budget {budget} is below the {len(sizes)} classes; at least 1 image per class is needed"
        )
    if budget > sum(sizes):
        raise PotstillError(f"--budget {budget} is more than the {sum(sizes)} training samples")
    level = max(n for n in range(budget + 1) if sum(min(n, size) for size in sizes) <= budget)
    counts = [min(level, size) for size in sizes]
    larger = sorted((g for g, size in enumerate(sizes) if size > level), key=lambda g: -sizes[g])
    for g in larger[: budget - sum(counts)]:
        counts[g] += 1
    return counts


def group_index(groups: Int64[Tensor, m], count: int) -> tuple[Int64[Tensor, "g n"], Float[Tensor, "g n"]]:
    """Index matrix (G, m) and mask (G, m) of samples with group numbers (M,)."""
    members = [(groups == g).nonzero().flatten() for g in range(count)]
    most = max(len(m) for m in members)
    index = torch.stack([m[torch.arange(most) % len(m)] for m in members])
    mask = torch.stack([(torch.arange(most) < len(m)).float() for m in members])
    return index, mask


def pick_random(data: Data, counts: list[int], key: Key) -> Tensor:
    """Numbers of training samples drawn at random without repetition, `counts[g]` of group g, in group order."""
    picked = []
    for g, count in enumerate(counts):
        members = (data.train.groups == g).nonzero().flatten()
        picked.append(members[key.fold(g).permutation(len(members))[:count]])
    return torch.cat(picked)


Embed = Callable[[Tensor], Tensor]  # raw inputs (N, *shape) to the rows (N, F) among which a coreset is chosen
Start = Callable[[Data, list[int], Key, Embed], Tensor]


def _k_means(rows: Tensor, count: int, key: Key) -> Tensor:
    return coresets.k_means(rows, count, int(key.integers(2**31)))


SELECTORS: dict[str, Callable[[Tensor, int, Key], Tensor]] = {
    "herding": lambda rows, count, key: coresets.herding(rows, count),
    "k-center": lambda rows, count, key: coresets.k_center(rows, count),
    "k-means": lambda rows, count, key: coresets.nearest(rows, _k_means(rows, count, key)),
}


def pixels(data: Data) -> Embed:
    """The inputs as networks see them, flattened."""
    return lambda raw: data.prepare(raw).flatten(1)


def pick(data: Data, counts: list[int], selector: str, key: Key, embed: Embed | None = None) -> Int64[Tensor, m]:
    """Numbers of training samples that a coreset method chooses, class by class, `counts[g]` of group g, in group order.

    Args:
        data: Whose training part is chosen from.
        counts: Samples of each group; 0 leaves a group out.
        selector: `herding`, `k-center` or `k-means` (the real sample nearest to each centre).
        key: Of this choice; only `k-means` draws.
        embed: In which space samples are compared; standardised pixels if absent.

    Raises:
        PotstillError: No such selector, or a group with fewer samples than asked for.
    """
    if selector not in SELECTORS:
        raise unknown("selector", selector, SELECTORS)
    rows, picked = embed or pixels(data), []
    for g, count in enumerate(counts):
        if not count:
            continue
        members = (data.train.groups == g).nonzero().flatten()
        picked.append(members[SELECTORS[selector](rows(data.train.inputs[members]), count, key.fold(g))])
    return torch.cat(picked)


def _real(data: Data, counts: list[int], key: Key, embed: Embed) -> Tensor:
    """Random real samples."""
    return data.prepare(data.train.inputs[pick_random(data, counts, key)])


def _noise(data: Data, counts: list[int], key: Key, embed: Embed) -> Tensor:
    """Standard normal noise in the standardised space."""
    return key.normal(sum(counts), *data.shape)


def _selected(selector: str) -> Start:
    """Real samples that a coreset method chooses."""
    return lambda data, counts, key, embed: data.prepare(data.train.inputs[pick(data, counts, selector, key, embed)])


def _centres(data: Data, counts: list[int], key: Key, embed: Embed) -> Tensor:
    """The centres of k-means on standardised pixels: means of samples, themselves none."""
    inputs = [data.train.inputs[data.train.groups == g] for g in range(len(counts))]
    rows = [
        _k_means(pixels(data)(x), count, key.fold(g)) for g, (x, count) in enumerate(zip(inputs, counts, strict=True))
    ]
    return torch.cat(rows).unflatten(1, data.shape)


INITIALISERS: dict[str, Start] = {
    "real": _real,
    "noise": _noise,
    **{name: _selected(name) for name in SELECTORS},
    "k-means-centre": _centres,
}


SHARP = 5.0  # the logit of a sample's own class at the start: a probability of 0.94 among ten


def first_labels(classes: Int64[Tensor, m], count: int, kind: str) -> Tensor:
    """Labels of samples with the given classes (M,), in a convention: (M,) or (M, C).

    Centred labels are one-hot rows less 1/C.
    """
    hot = torch.nn.functional.one_hot(classes, count).float()
    return {"logits": SHARP * hot, "centred": hot - 1 / count}.get(kind, classes)


def initialise(
    data: Data,
    counts: list[int],
    init: str,
    key: Key,
    embed: Embed | None = None,
    kind: str = "hard",
    rates: Tensor | None = None,
    scale: float = 1.0,
) -> Synthetic:
    """The set before its first step.

    Args:
        data: The training data, with what is held out taken away.
        counts: Samples of each group.
        init: `real` (random training samples), `noise` (standard normal), `herding`, `k-center`, `k-means` (chosen
            training samples) or `k-means-centre` (centres, which are no training samples).
        key: Of this draw.
        embed: In which space training samples are chosen; standardised pixels if absent.
        kind: Convention of the labels; a teacher's soft labels come later, and are hard here.
        rates: Learning rates that the set carries.
        scale: Of centred labels.
    """
    if init not in INITIALISERS:
        raise unknown("initialiser", init, INITIALISERS)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    index, mask = group_index(labels, len(counts))
    inputs = INITIALISERS[init](data, counts, key, embed or pixels(data))
    first = first_labels(labels, len(counts), kind)
    first = first * scale if kind == "centred" else first
    fixed = {"labels": first, **({} if rates is None else {"lr": rates.log()})}
    return Synthetic({"inputs": inputs}, fixed, index, mask, "hard" if kind == "soft" else kind)
