"""One cell of a benchmark: its sets are made and judged in every way that its row asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import places
from .augment import Augment
from .bench import Bench
from .cards import record_of
from .compiling import EAGER_FLOPS, sample_flops
from .data import Data
from .distilling import distill
from .errors import PotstillError, Unwritable
from .evaluation import check_fit
from .exchange import DistilledSet, load
from .experts import record as record_experts
from .foreign import files as foreign_files
from .foreign import is_foreign, located
from .foreign import read as read_foreign
from .judge import HOLDOUT, Judge, Result, meeting, protocol_of
from .networks import network as build_network
from .objectives import ByGroup
from .recipe import find
from .records import digest, read_json, write_sealed
from .rows import WHOLE, CostRow, Recording, Row, Suite
from .students import fit_of, is_kernel
from .teacher import School, seconds_of_labels
from .training import Trainer
from .transforms import describe

Record = dict[str, Any]
ADDED = ("seeds", "networks", "baselines", "variants")  # more of them add numbers to a cell and change none that it has
CALL = 4e-3  # seconds that a training step of the smallest network takes, for estimates


def minutes(row: Row | CostRow, data: Data, there: int = 0) -> float:
    """An estimate of a cell's minutes, from the row's own budget and counted operations of training networks.

    Teachers come on top (`lessons`), once for all cells that share them.

    Args:
        row: The row.
        data: Its data.
        there: Sets that need not be made.

    Raises:
        PotstillError: A network that does not fit the data.
    """
    if isinstance(row, CostRow):
        return min(row.limit_seconds, 30.0) / 60
    images, seconds, sets = data.task.classes * row.ipc, 0.0, len(row.seeds) - there
    for name in row.networks:
        if is_kernel(name) or row.method == WHOLE:
            continue
        net, protocol = build_network(name, data.shape, data.task.outputs), protocol_of(row.protocol)
        trainer = Trainer(net, replace(protocol.fitted("hard"), lr=protocol.lr or 1.0), data.task, False, "cpu")
        more = len(row.baselines) + ("hard" in row.variants) + 2 * ("plain" in row.variants)
        one = max(trainer.flops(images) / EAGER_FLOPS, CALL * trainer.steps(images) / trainer.together(images))
        seconds += one * row.repeats * (len(row.seeds) + more)
        if "random-soft" in row.baselines:
            seen = data.hold_out(HOLDOUT)
            seconds += seconds_of_labels(seen, name, images)
    if row.steps and row.method != WHOLE:
        recipe = find(row.method, row.preset, row.ipc)
        objective, work = recipe.objective, 0.0
        if objective is not None and objective.needs.network:
            net = build_network(row.network or recipe.network, data.shape, data.task.outputs)
            real = getattr(objective.needs.real, "count", 0)
            groups = data.task.classes if isinstance(objective.needs.real, ByGroup) else 1
            work = 3 * sample_flops(net) * (real * groups + images)
        seconds += max(work / EAGER_FLOPS, 10 * CALL) * row.steps * sets
    return row.minutes * sets + seconds / 60


def lessons(row: Row | CostRow, data: Data, bench: Bench, there: int = 0) -> dict[tuple[str, str], float]:
    """The teachers whose labels a cell needs, by data and network: minutes to train each, none where it is kept.

    Args:
        row: The row.
        data: Its data.
        bench: Where its teachers are trained.
        there: Sets that need not be made.
    """
    if isinstance(row, CostRow):
        return {}
    names = [n for n in row.networks if not is_kernel(n)] if "random-soft" in row.baselines else []
    if row.method == "random-soft" and there < len(row.seeds):
        names.append(str(dict(row.settings).get("student", find(row.method, row.preset, row.ipc).student)))
    if not names:
        return {}
    lies = in_zoo(bench, row, data)
    how = str(record_of(lies).get("choices", {}).get("transform", "")) if lies is not None else ""
    school = School(data.hold_out(HOLDOUT), 0, bench.device, bench.compile, bench.precision)
    # a whitened set has a teacher of its own; whether it is kept is not known before the data are whitened
    cost = school.work if how == "zca" else school.seconds
    return {(f"{row.data} {how}", name): cost(name) / 60 for name in names}


def asked(row: Row) -> dict[str, list[Any]]:
    """What a row wants measured, of that to which more may be added."""
    return {k: list(getattr(row, k)) for k in ADDED}


def covered(record: Record, row: Row) -> bool:
    """Whether a record has met in full a request that asks for all that the row does."""
    return any(all(set(wanted) <= set(met[k]) for k, wanted in asked(row).items()) for met in record.get("met", ()))


def accuracy(bench: Bench, suite: Suite, row: Row, record: Record, file: Path) -> Record:
    """Make the sets, judge each in every way that the row asks for; after each number the record is on disk."""
    data, results = bench.data(row.data), record["results"]

    judge = bench.judge(data, row.protocol, row.repeats)

    def keep(seed: int, role: str, variant: str, network: str, measure: Callable[[], Result | None]) -> None:
        if any((r["seed"], r["role"], r["variant"], r["network"]) == (seed, role, variant, network) for r in results):
            return
        result = measure()
        if result is None:  # such as the whole set for a kernel; the judge has said why
            return
        results.append(asdict(result) | {"seed": seed, "role": role, "variant": variant})
        write_sealed(file, record)
        judge.written()

    if row.method == WHOLE:
        for name in row.networks:
            keep(0, "set", "own", build_network(name, data.shape, data.task.outputs).name, partial(judge.whole, name))
        return {**record, "status": "done"}
    for seed in row.seeds:
        alone = (
            replace(row, seeds=(seed,))
            if seed == row.seeds[0]
            else replace(row, seeds=(seed,), baselines=(), variants=())
        )
        if covered(record, alone):
            continue  # its set need not be there any more
        set_, source = meeting(made(bench, suite, row, record, seed, data), data)
        judge = replace(judge, data=source)  # the trainings that `written` ends are those of both
        write_sealed(file, record)
        for name in row.networks:
            kind = set_.meta.labels
            trainer = judge.student(name, judge.resolved(set_, kind), set_, kind, False)
            for role, variant, judged in _ways(bench, row, set_, judge, name, seed == row.seeds[0]):
                keep(seed, role, variant, trainer.name, judged)
    return {**record, "status": "done"}


def _ways(
    bench: Bench, row: Row, set_: DistilledSet, judge: Judge, name: str, first: bool
) -> Iterator[tuple[str, str, Callable[[], Result | None]]]:
    """(role, variant, measurement) for each number that a row wants of a set on a network."""
    yield "set", "own", lambda: judge.set(set_, row.method, name)
    if not first:
        return
    if "random" in row.baselines:
        yield "random", "own", _shared(bench, judge, "random", set_, name)
    if "k-means" in row.baselines:
        yield "k-means", "own", _shared(bench, judge, "k-means", set_, name)
    if is_kernel(name):
        return
    if "random-soft" in row.baselines:
        yield "random-soft", "own", _shared(bench, judge, "random-soft", set_, name)
    if "hard" in row.variants:
        if set_.meta.labels != "hard":
            meta = replace(set_.meta, labels="hard")
            hard = DistilledSet(set_.inputs, set_.labels.argmax(1), meta, set_.lr, set_.matrix)
            yield "set", "hard", lambda: judge.set(hard, row.method, name)
        yield "whole", "own", lambda: judge.whole(name)
    if "plain" in row.variants and judge.resolved(set_, set_.meta.labels).augment.ops:
        bare = replace(judge, protocol=replace(judge.protocol, augment=Augment(), own=False))
        yield "set", "plain", lambda: bare.set(set_, row.method, name)
        yield "random", "plain", _shared(bench, bare, "random", set_, name)
        if "random-soft" in row.baselines:
            yield "random-soft", "plain", _shared(bench, bare, "random-soft", set_, name)


def _shared(bench: Bench, judge: Judge, role: str, set_: DistilledSet, name: str) -> Callable[[], Result | None]:
    """The measurement of a baseline, made once in a results folder for all cells in which it would be the same: the same
    samples under the same protocol, once augmentation and learning rate are settled, by the same network.
    """
    protocol = judge.resolved(set_, "soft" if role == "random-soft" else "hard")

    def run() -> Result | None:
        if role == "random-soft":
            return judge.random_soft(set_, name)
        return judge.random(set_, name) if role == "random" else judge.k_means(set_, name)

    if is_kernel(name) or ":" in name or protocol.name == "unrolled":
        return run  # where the set itself has a say, or code from outside may change under its name
    data, how = judge.data, [judge.repeats, judge.seed, judge.device, judge.compile, judge.precision]
    what = [role, data.fingerprint, describe(data.transform), set_.meta.ipc, name]
    mark = digest([*what, *how, protocol.plain(), fit_of(name, protocol, set_)])

    def kept() -> Result | None:
        file = bench.out / "baselines" / f"{mark}.json"
        with suppress(OSError, PotstillError, TypeError):  # not there, or of another form: measured again
            return replace(Result(**read_json(file)), dataset=data.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        result = run()
        if result is not None:
            write_sealed(file, asdict(result))
        return result

    return kept


def in_zoo(bench: Bench, row: Row, data: Data) -> Path | None:
    """Where the zoo's set of a row lies, if there is one and the row is not an ablation with a name of its own.

    A set without its own record beside it is not taken: what it cost is not known.
    """
    taken = bench.zoo and not row.name and not row.set
    found = places.names().get(f"{data.slug}/{row.method}/{row.ipc}") if taken else None
    return found if found is not None and record_of(found) else None


def made(bench: Bench, suite: Suite, row: Row, record: Record, seed: int, data: Data) -> DistilledSet:
    """The row's set of a seed: as the record has it, from its run's last checkpoint, or from the start."""
    if row.set:
        return _brought(row, record, seed, data)
    lies = in_zoo(bench, row, data)
    if lies is not None and seed == row.seeds[0]:
        set_ = load(lies)
        _enter(
            record, seed, f"{places.IN_ZOO}{data.slug}/{row.method}/{row.ipc}", read_json(lies / "record.json"), set_
        )
        return set_
    recording = suite.experts[row.experts] if row.experts else None
    place = f"runs/{suite.table}/{row.cell}/seed{seed}-{making(row, recording, data)}"
    folder = bench.out / place
    if any((e["seed"], e["path"], e["sha256"]) == (seed, place, places.sha256(folder)) for e in record["sets"]):
        return load(folder)
    coreset = find(row.method, row.preset, row.ipc).objective is None
    options: dict[str, Any] = {"ipc": row.ipc, "preset": row.preset, "settings": dict(row.settings), "seed": seed,
                               "out": folder, "device": bench.device, "precision": bench.precision, "compile": bench.compile,
                               "evaluate": False, "say": bench.say, "bar": bench.bar}  # fmt: skip
    if not coreset:
        options["steps" if row.steps else "minutes"] = row.steps or row.minutes
    if row.network:
        options["settings"] = {"network": row.network, **options["settings"]}
    if recording is not None:
        options["experts"] = _experts(bench, row.experts, recording)
    begun = folder.is_dir() and any(folder.iterdir())
    try:
        run = distill(data, row.method, resume=begun, **options)
    except Unwritable:
        raise  # what is there is good, and is gone on from when there is room
    except PotstillError:
        if not begun:
            raise
        run = distill(data, row.method, force=True, **options)  # damaged, or of another version, device or precision
    _enter(record, seed, place, run.record, run.set)
    return run.set


def _brought(row: Row, record: Record, seed: int, data: Data) -> DistilledSet:
    """The set of a row that names a file.

    Raises:
        PotstillError: It is not for these data, is no single set, or has another number of images per class.
    """
    try:
        set_ = _read(row, data)
    except PotstillError as error:
        place, _ = located(row.set)
        line = str(error).replace(str(place), place.name)  # a record has no path of this machine,
        raise PotstillError(line.replace("--normalisation", "normalisation")) from error  # and a row no options
    about = {
        "seed": seed,
        "path": f"{places.IN_FILE}{Path(row.set).name}",
        "sha256": sha256_of(row.set),
        "steps": set_.meta.steps,
        "seconds": None,
    }
    _replace(record, {**about, "images": len(set_), **set_.sizes})
    return set_


def _read(row: Row, data: Data) -> DistilledSet:
    """The set that a row names, if it fits the row."""
    stranger = is_foreign(row.set)
    several = read_foreign(row.set, data, row.normalisation or None) if stranger else [load(row.set)]
    if len(several) > 1:
        raise PotstillError(f"{row.set} holds {len(several)} sets: {row.set}#0 is the first of them")
    (set_,) = several
    check_fit(set_, data)
    classes = data.task.classes
    if len(set_) != row.ipc * classes:
        raise PotstillError(f"{row.set} has {len(set_)} images, not {row.ipc} of each of {classes} classes")
    if stranger and set_.meta.labels != "hard":  # no sample belongs to a class: the largest label may leave one out
        meta = replace(set_.meta, ipc=[row.ipc] * classes)
        set_ = DistilledSet(set_.inputs, set_.labels, meta, set_.lr, set_.matrix)
    if any(count != row.ipc for count in set_.meta.ipc):
        raise PotstillError(f"{row.set} has {set_.meta.ipc} images of the {classes} classes, not {row.ipc} of each")
    return set_


def sha256_of(name: str) -> str:
    """That of the files that are read for a set's path, one after the other; nothing where one cannot be read."""
    place = Path(name)
    own = foreign_files(name) if is_foreign(name) else [place / places.SET if place.is_dir() else place]
    total = hashlib.sha256()
    try:
        for file in own:
            with file.open("rb") as handle:
                hashlib.file_digest(handle, lambda: total)
    except OSError:
        return ""  # the cell says why when it comes to reading it
    return total.hexdigest()


def making(row: Row, recording: Recording | None, data: Data) -> str:
    """Digest of all that a row's sets depend on: another one, another folder. How sets are judged is no part of it."""
    names = ("method", "ipc", "minutes", "steps", "preset", "network", "settings")
    return digest([{n: asdict(row)[n] for n in names}, asdict(recording) if recording else None, data.fingerprint])


def _enter(record: Record, seed: int, place: str, run: Record, set_: DistilledSet) -> None:
    """Put a set into a cell's record; numbers that were measured on an earlier set of this seed go."""
    entry = {
        "seed": seed,
        "path": place,
        "sha256": run["set"]["sha256"],
        "network": run["recipe"]["network"],
        "student": run["recipe"]["student"],
        "protocol": run["recipe"]["protocol"],
        "transform": run["choices"].get("transform", ""),
        "space": run["recipe"].get("space", ""),
        "steps": run["steps"],
        "seconds": round(sum(v for k, v in run["cost"]["phases"].items() if k != "evaluation"), 3),
        "peak_bytes": run["cost"]["peak_bytes"],
        "images": len(set_),
        **set_.sizes,  # an older record does not say them
    }
    _replace(record, entry)


def _replace(record: Record, entry: Record) -> None:
    """The entry of a seed's set, in place of an earlier one; if it is another set, its numbers go."""
    same = any(all(e[k] == entry[k] for k in ("seed", "path", "sha256")) for e in record["sets"])
    seeds = [e["seed"] for e in record["sets"]]
    at = seeds.index(entry["seed"]) if entry["seed"] in seeds else len(seeds)
    record["sets"][at : at + 1] = [entry]
    if not same:
        record["results"][:] = [r for r in record["results"] if r["seed"] != entry["seed"]]


def _experts(bench: Bench, name: str, recording: Recording) -> Path:
    """The folder of a recording, made if it is not there; other processes wait for it."""
    folder = bench.out / "experts" / f"{name}-{digest(asdict(recording))}"
    options = {k: v for k, v in asdict(recording).items() if k != "data"}
    with bench.locked(folder, wait=True):
        begun = folder.is_dir() and any(folder.iterdir())
        data = bench.data(recording.data)
        record_experts(data, out=folder, resume=begun, device=bench.device, precision=bench.precision,
                       compile=bench.compile, say=bench.say, bar=bench.bar, **options)  # fmt: skip
    return folder
