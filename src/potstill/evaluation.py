"""Protocols: train fresh networks on a set, read the score on the test data once. Any set, however it was made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .compiling import (
    check_device,
    keep_memory,
)
from .data import Data, load_data
from .errors import PotstillError, unknown
from .exchange import DistilledSet, load
from .foreign import is_foreign
from .foreign import read as read_foreign
from .infinite import kernel
from .judge import BASELINES, Judge, Result, Say, meeting, protocol_of
from .loaders import load_named
from .networks import network
from .parallel import ALONE, Group
from .records import digest
from .students import KERNEL, is_kernel
from .synthetic import counts_per_group


def asked_by(set_: DistilledSet, name: str) -> str:
    """The student that a set asks for; a file may name code from outside, but not run it."""
    if ":" in set_.meta.student:
        raise PotstillError(
            f"{name} asks for the network '{set_.meta.student}', which is code from outside and is not run because a "
            f"file says so; if you trust it: --networks {set_.meta.student}"
        )
    return set_.meta.student


def check_fit(set_: DistilledSet, data: Data) -> None:
    """Refuse a set that is not for this data."""
    if set_.shape != data.shape or len(set_.meta.class_names) != data.task.classes:
        raise PotstillError(
            f"the set is for {len(set_.meta.class_names)} classes of {set_.shape} ({set_.meta.data}), "
            f"not for {data.task.classes} classes of {data.shape} ({data.name})"
        )


def evaluate(
    sets: DistilledSet | str | Path | Sequence[DistilledSet | str | Path],
    data: Data | str | None = None,
    *,
    networks: Sequence[str] = (),
    protocol: str | None = None,
    normalisation: str | None = None,
    baselines: Sequence[str] = (),
    repeats: int = 5,
    seed: int = 0,
    data_root: str | Path | None = None,
    device: str = "cpu",
    compile: str = "auto",
    precision: str = "auto",
    affordable: float | None = None,
    group: Group = ALONE,
    say: Say = lambda line: None,
    bar: Callable[[int, str, int], Any] | None = None,
    rows: int = 0,
) -> list[Result]:
    """Train fresh networks on sets and read their accuracy on the test data.

    Args:
        sets: One or several, loaded or by path; other projects' files too (`potstill.foreign.read`).
        data: The data that they stand for; the one that a set names if absent.
        networks: Names, or `package.module:function`; the student that a set asks for if absent.
        protocol: Name; the one that a set asks for if absent.
        normalisation: What was done to the inputs of other projects' sets: `standardise`, `unit` or `MEAN/STD`.
        baselines: Of `random`, `k-means`, `random-soft` and `whole`, judged beside each set.
        repeats: Fresh networks for each number.
        seed: Of weights, order and augmentation; the same for every set, so that numbers are paired.
        data_root: As for `load_data`.
        device: Where to train.
        compile: `auto`, `on` or `off`.
        precision: `auto`, `fp32` or `bf16`.
        affordable: Leave out `random-soft` and `whole` where one would take longer than so many seconds.
        group: Processes among which the networks of each number are divided; all of them return all results.
        say: Receives lines for the user.
        bar: Makes a progress bar of a length, a title and a start.
        rows: Samples in one pass of a network, one network after the other, to save memory; 0 for any number.

    Returns:
        A result for each set, network and baseline, in this order.

    Raises:
        PotstillError: Names that do not exist, a set that does not fit the data, repeats below 1.

    Example:
        >>> evaluate("runs/digits-dm-ipc1", networks=["convnet", "mlp"])  # doctest: +SKIP
    """
    if repeats < 1:
        raise PotstillError(f"--repeats {repeats} is below 1")
    for b in baselines:
        if b not in BASELINES:
            raise unknown("baseline", b, BASELINES)
    if not group.leads:
        say, bar = lambda line: None, None
    check_device(device)
    if not rows:
        keep_memory()
    several = [sets] if isinstance(sets, DistilledSet | str | Path) else list(sets)
    strange = [s for s in several if not isinstance(s, DistilledSet) and is_foreign(s)]
    if strange and data is None:
        raise PotstillError(
            f"--data is needed with {strange[0]}: another project's file does not say what it stands for"
        )
    if normalisation is not None and not strange:
        raise PotstillError("--normalisation is for other projects' files; a set of potstill's says its own")
    known: dict[str, Data] = {}

    def data_for(name: str) -> Data:
        if isinstance(data, Data):
            return data
        where = str(data or name)
        if where not in known:
            known[where] = load_data(where, data_root) if data else load_named(where, data_root)
        return known[where]

    loaded: list[tuple[DistilledSet, str]] = []
    for s in several:
        if isinstance(s, DistilledSet):
            loaded.append((s, "this set"))
        elif s in strange:
            found = read_foreign(s, data_for(""), normalisation)
            asks = f"network {found[0].meta.student}, protocol {found[0].meta.protocol}"
            say(f"note: {s} asks for nothing; unless you do, {asks}")
            loaded += [(f, f"{s}#{i}" if len(found) > 1 else str(s)) for i, f in enumerate(found)]
        else:
            loaded.append((load(s), str(s)))
    work = []
    for set_, name in loaded:  # all mistakes before any training
        source = data_for(set_.meta.data)
        check_fit(set_, source)
        if set(baselines) - {"whole"}:
            counts_per_group([max(n, 1) for n in set_.meta.ipc], source.counts)  # a foreign set may lack a class
        set_, source = meeting(set_, source)
        if source.fingerprint != set_.meta.fingerprint:
            say(f"note: {name} was made from other data than {source.name} as it is here")
        names = list(networks) or [asked_by(set_, name)]
        for n in filter(is_kernel, names):
            _ = KERNEL if n == KERNEL else kernel(n)
        for n in dict.fromkeys(n for n in names if not is_kernel(n)):
            for note in network(n, source.shape, source.task.outputs).notes:
                say(note)
        asked = protocol_of(protocol or set_.meta.protocol)
        judge = Judge(source, asked, repeats, seed, device, compile, precision, say, bar, group, rows)
        for n in names:
            judge.student(n, judge.resolved(set_, set_.meta.labels), set_, set_.meta.labels, False)
        work.append((set_, name, names, judge))
    sets_seen = [digest([float(s.inputs.double().sum()), float(s.labels.double().sum())]) for s, *_ in work]
    group.agree({"data": [judge.data.fingerprint for *_, judge in work], "sets": sets_seen})
    results = []
    for set_, name, names, judge in work:
        for n in names:
            results.append(judge.set(set_, name, n))
            if "random" in baselines:
                results.append(judge.random(set_, n))
            if "k-means" in baselines:
                results.append(judge.k_means(set_, n))
            if "random-soft" in baselines and (soft := judge.random_soft(set_, n, affordable)):
                results.append(soft)
            if "whole" in baselines and (whole := judge.whole(n, affordable)):
                results.append(whole)
    return results
