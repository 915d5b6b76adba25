"""Recording experts: networks trained on the real data, their numbers kept at every epoch's end and at the start."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import records
from .arrays import first_line
from .augment import Augment
from .compiling import EAGER_FLOPS, PRECISIONS, check_device, choose_compile, choose_precision, keep_memory
from .data import Data, load_data
from .errors import PotstillError, unknown
from .exchange import pack, unpack
from .judge import fitting
from .launch import restarts
from .methods import DSA
from .networks import State
from .networks import network as build_network
from .outputs import opened
from .parallel import ALONE, Group
from .recorder import Progress, Recorder
from .sealed import CHECKPOINT, OtherVersion, newest, read_sealed, write_checkpoint
from .training import Protocol, Trainer
from .trajectories import (
    FORMAT,
    INDEX,
    Layout,
    Trajectories,
    check_expert,
    digest_of,
    file_of,
    open_experts,
    read_index,
)
from .transforms import check_transform, describe

SAVE_EVERY = 30.0  # seconds between checkpoints within an epoch; they change no number
SHARE = 20  # and at least so many times what the last one took: large networks are not only saved
AUGMENTS = {"dsa": DSA, "none": Augment()}


def ours(name: str) -> bool:
    """Whether a recording writes a file of this name."""
    return name == INDEX or re.fullmatch(r"(checkpoint(-\d+)?(-before)?|expert-\d{3,})\.safetensors", name) is not None


def checkpoint_of(rank: int) -> str:
    """Name of a rank's checkpoint."""
    return f"checkpoint-{rank}.safetensors" if rank else CHECKPOINT


def save_checkpoint(file: Path, mark: str, now: Progress) -> None:
    """What a resumed recording goes on with."""
    tensors: dict[str, Tensor] = {}
    plain = now._replace(state=tuple(now.state))._asdict()  # type: ignore[arg-type]
    header = {"format": FORMAT, "mark": mark, "now": pack(plain, tensors)}
    write_checkpoint(file, tensors, header)


def load_checkpoint(
    file: Path, mark: str, layouts: tuple[Layout, Layout], say: Callable[[str], None]
) -> Progress | None:
    """How far the expert in work is, or nothing where none was saved or another recording's is there.

    Raises:
        PotstillError: The file is damaged, and so is the one before it.
    """
    return newest(file, partial(_read, mark, layouts), say)


def _read(mark: str, layouts: tuple[Layout, Layout], file: Path) -> Progress | None:
    tensors, header = read_sealed(file, "checkpoint")
    try:
        if header["format"] != FORMAT:
            raise OtherVersion(f"{file} was written by another version of potstill; --force starts again")
        if header["mark"] != mark:
            return None
        plain = unpack(header["now"], tensors)
        now = Progress(**{**plain, "state": State(*plain["state"])})
        if tuple(map(Layout.of, now.state)) != layouts or not now.rows:
            raise ValueError("its network is another one")
        if not all(type(n) is int and n >= 0 for n in (now.step, now.expert)):
            raise ValueError("its step and expert are no numbers from 0 up")
        return now
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, PotstillError):
            raise
        raise PotstillError(f"{file} is damaged ({type(error).__name__}: {first_line(error)})") from error


def check_same(then: dict[str, Any], now: dict[str, Any], asked: dict[str, Any], say: Callable[[str], None]) -> None:
    """Refuse to resume a recording under other settings; say where the promise of the same bits ends.

    Args:
        then: The index in the folder.
        now: The one that would be written.
        asked: Of what is pinned, how it is computed to the last bit, what the user has asked for.
        say: Receives notes.

    Raises:
        PotstillError: The first setting that differs, with both values.
    """
    flat = [{**m, **m["training"], "training": None, "transform": m["transform"]["name"]} for m in (then, now)]
    pairs = [(k, flat[0].get(k), v) for k, v in flat[1].items() if k not in ("pinned", "software", "experts")]
    pairs += [(k, then["pinned"].get(k), v) for k, v in asked.items()]
    for name, was, value in pairs:
        if was == value:
            continue
        what = f"{name} was {was}, now {value}"
        if name in ("fingerprint", "params", "buffers"):
            what = "the data have changed" if name == "fingerprint" else "the network has changed"
        raise PotstillError(
            f"the recording to resume has other settings: {what}; give the same, or --force to start again"
        )
    for name, was, here in (
        ("torch", then["software"]["torch"], now["software"]["torch"]),
        ("processor", then["software"]["machine"]["processor"], now["software"]["machine"]["processor"]),
    ):
        if was != here:
            say(f"note: this recording began with {name} {was}, here it is {here}: the last bits may differ")


def index_of(recorder: Recorder, holdout: float, augment: str, pinned: dict[str, Any]) -> dict[str, Any]:
    """`experts.json` before the first expert: everything that their numbers depend on."""
    data, protocol, said = recorder.data, recorder.protocol, describe(recorder.data.transform)
    training = {
        "epochs": protocol.epochs,
        "batch": recorder.batch,
        "optimiser": "sgd",
        **{k: getattr(protocol, k) for k in ("lr", "momentum", "weight_decay")},
        "augment": augment,
        "augmentation": protocol.augment.plain() | {"ops": list(protocol.augment.ops)},
    }
    return {
        "format": FORMAT,
        "kind": "experts",
        "network": recorder.net.name,
        "data": data.name,
        "fingerprint": data.fingerprint,
        "classes": data.task.classes,
        "shape": list(data.shape),
        "transform": said,
        "transform_digest": records.digest(said),
        "holdout": holdout,
        "heldout": len(data.heldout),
        "seed": recorder.key.seed,
        "epochs": protocol.epochs,
        "steps_per_epoch": recorder.each,
        "training": training,
        "params": recorder.layouts[0].plain,
        "buffers": recorder.layouts[1].plain,
        "device": recorder.device,
        "pinned": pinned,
        "software": records.software(recorder.device),
        "experts": [],
    }


def record(
    data: Data | str | Path,
    *,
    out: str | Path,
    count: int = 10,
    epochs: int = 5,
    network: str | None = None,
    lr: float = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch: int = 256,
    augment: str = "dsa",
    transform: str | None = None,
    seed: int = 0,
    holdout: float = 0.1,
    data_root: str | Path | None = None,
    device: str = "cpu",
    precision: str = "auto",
    compile: str = "auto",
    resume: bool = False,
    force: bool = False,
    group: Group = ALONE,
    say: Callable[[str], None] = lambda line: None,
    bar: Callable[[int, str, int], Any] | None = None,
) -> Trajectories:
    """Train networks on the real data, one after the other, and keep parameters and buffers at the end of every epoch.

    Args:
        data: What `load_data` takes, a name or a path, or a `Data`.
        out: Folder of the recording.
        count: Experts. A finished recording takes more of them with `resume`.
        epochs: Of each: as many as a recipe starts from at most, plus its span.
        network: As `networks.network` reads it; `convnet`, for vectors `mlp`, if absent.
        lr: Learning rate of SGD, constant.
        momentum: Of SGD.
        weight_decay: Of SGD.
        batch: Samples per step.
        augment: `dsa`, drawn anew for every step, or `none`.
        transform: `standardise`, `zca` or `none`; that of the data, usually `standardise`, if absent.
        seed: Of everything random.
        holdout: Share of the training data kept apart, by which the experts are looked at.
        data_root: Folder of downloaded data.
        device: Where to compute.
        precision: `auto`, `fp32` or `bf16`; what is recorded is float32.
        compile: `auto`, `on` or `off`.
        resume: Continue the recording in `out`, to the same bits as an uninterrupted one.
        force: Start again in a folder that holds a recording.
        group: Processes that record side by side: rank r the experts r, r + size, ...
        say: Receives lines for the user.
        bar: Makes a progress bar of a length, a title and a start.

    Returns:
        The experts, open for reading.

    Raises:
        PotstillError: A mistake in the arguments or the data, before anything is trained.
        Stopped: A loss is no longer finite, or the disk is full; what is good is on disk.

    Example:
        >>> experts = record("digits", out="experts/digits", count=2, epochs=3)  # doctest: +SKIP

    Reference:
        Cazenavette, Wang, Torralba, Efros and Zhu 2022, "Dataset Distillation by Matching Training Trajectories", CVPR.
    """
    for name, value, least in (("count", count, 1), ("epochs", epochs, 1), ("batch", batch, 1)):
        if value < least:
            raise PotstillError(f"--{name} {value} is below {least}")
    for name, rate in (("lr", lr), ("momentum", momentum), ("weight-decay", weight_decay)):
        if not (math.isfinite(rate) and rate >= 0) or (name == "lr" and rate == 0):
            raise PotstillError(
                f"--{name} {rate:g} is no {name.replace('-', ' ')}; a finite number from 0 up is needed"
            )
    if augment not in AUGMENTS:
        raise unknown("augmentation for --augment", augment, AUGMENTS)
    if transform is not None:
        check_transform(transform)
    if not group.leads:
        say, bar = lambda line: None, None
    if restarts():
        resume, force = True, False
    check_device(device)
    keep_memory()
    whole = data if isinstance(data, Data) else load_data(data, data_root)
    whole = whole.with_transform(transform) if transform is not None else whole
    data = whole.hold_out(holdout)
    if network is None:
        network = "convnet" if len(data.shape) == 3 else "mlp"
    net = build_network(network, data.shape, data.task.outputs)
    for note in net.notes:
        say(note)
    fitted = fitting(AUGMENTS[augment], data.mirror, data.shape)
    if left := [op for op in AUGMENTS[augment].ops if op not in fitted.ops]:
        why = "a mirrored input may be of another class" if len(data.shape) == 3 else "the inputs are no images"
        say(f"augmentation without {', '.join(left)}: {why}")
    protocol = Protocol(
        "experts", epochs, batch=batch, lr=lr, momentum=momentum, weight_decay=weight_decay, schedule="constant", augment=fitted
    )  # fmt: skip
    exact = str(group.share(choose_precision(precision, device, net)))
    work = count * Trainer(net, protocol, data.task, False, "cpu").flops(len(data.train))
    on, why = group.share(choose_compile(compile, work / EAGER_FLOPS, device))
    recorder = Recorder(data, net.at(PRECISIONS[exact]), protocol, seed, on, device)
    out = Path(out)
    with opened(out, resume, force, ours) if group.leads else nullcontext():
        group.agree({"data": data.fingerprint, "torch": torch.__version__})  # and the folder is as it should be
        pinned = {"compile": on, "precision": exact, "threads": torch.get_num_threads()}
        index = group.share(index_of(recorder, holdout, augment, pinned))
        now: Progress | None = None
        begun = bool(group.share((out / INDEX).exists()))
        if resume and begun:
            then = read_index(out)
            asked = {
                k: v for k, v, word in (("compile", on, compile), ("precision", exact, precision)) if word != "auto"
            }
            check_same(then, index, asked, say)
            index, pinned = then, then["pinned"]
            torch.set_num_threads(pinned["threads"])
            on, exact, why = pinned["compile"], pinned["precision"], "as it began"
            recorder = Recorder(data, net.at(PRECISIONS[exact]), protocol, seed, on, device)
            for i in range(len(index["experts"])):
                check_expert(out / file_of(i), recorder.layouts, index["experts"][i]["rows"])
            now = load_checkpoint(out / checkpoint_of(group.rank), mark_of(index), recorder.layouts, say)
            now = now if now is not None and now.expert == len(index["experts"]) + group.rank < count else None
        elif resume:
            say(f"nothing to resume in {out}: the recording begins")
        if group.leads and not begun:
            records.write_sealed(out / INDEX, index)
        say(f"compile {'on' if on else 'off'} ({why}), precision {exact}")
        for i, made in enumerate(index["experts"]):
            say(line_of(i, made) + ", recorded before")
        run(recorder, out, index, count, now, say, bar, group)
        return open_experts(out)


def mark_of(index: dict[str, Any]) -> str:
    """By which a checkpoint says whose it is: a hash of the index without the experts."""
    return records.digest({k: v for k, v in index.items() if k != "experts"})


def line_of(expert: int, made: dict[str, Any]) -> str:
    """An expert in a line for the user."""
    scores = " ".join(f"{100 * a:.1f}" for a in made["heldout_accuracy"])
    told = f"held-out accuracy by epoch {scores} %" if scores else "nothing held out"
    return f"expert {expert}: {told}, training loss {made['losses'][0]:.3g} to {made['losses'][-1]:.3g}"


def run(
    recorder: Recorder, out: Path, index: dict[str, Any], count: int, now: Progress | None,
    say: Callable[[str], None], bar: Callable[[int, str, int], Any] | None, group: Group = ALONE,
) -> None:  # fmt: skip
    """Record what is missing, expert by expert, or as many side by side as there are processes.

    Args:
        recorder: Of the experts.
        out: The folder; `experts.json` is in it.
        index: What that holds.
        count: Experts that there shall be.
        now: How far this process's next one is, if it has begun.
        say: Receives a line per expert.
        bar: Makes a progress bar.
        group: The processes. The index takes up the experts of all when each has finished one.

    Raises:
        Stopped: A loss is no longer finite; the state before is on disk.
        KeyboardInterrupt: As the user asked; the state is on disk.
    """
    total, first = recorder.epochs * recorder.each, len(index["experts"])
    begun = now.step if now is not None else 0
    line = bar(count * total, f"experts on {recorder.data.name}", first * total + begun) if bar else None
    tick = (lambda: line.update(group.size)) if line is not None else lambda: None
    try:
        for begin in range(first, count, group.size):
            expert = begin + group.rank
            found = record_one(recorder, out, index, expert, now, tick, group.rank) if expert < count else None
            for made, seconds in filter(None, group.gather(found)):
                say(f"{line_of(len(index['experts']), made)}, {seconds:.0f} s")
                index["experts"].append(made)
            if group.leads:
                records.write_sealed(out / INDEX, index)
    finally:
        if line is not None:
            line.close()
    for file in out.glob("checkpoint*.safetensors") if group.leads else ():
        file.unlink(missing_ok=True)
    group.share(None)  # the others look into the folder when it is done


def record_one(
    recorder: Recorder, out: Path, index: dict[str, Any], expert: int, now: Progress | None, tick: Callable[[], Any], rank: int
) -> tuple[dict[str, Any], float]:  # fmt: skip
    """Train one expert to its end and write its file; what the index says of it, and the seconds it took."""
    file, mark = out / checkpoint_of(rank), mark_of(index)
    now = now if now is not None and now.expert == expert else recorder.begin(expert)
    start, saved, took = time.monotonic(), time.monotonic(), 0.0
    try:
        for after in recorder.go_on(now):
            now = after
            tick()
            wait = max(SAVE_EVERY, SHARE * took)
            if now.step % recorder.each == 0 or time.monotonic() - saved > wait:
                before = time.monotonic()
                save_checkpoint(file, mark, now)
                saved, took = time.monotonic(), time.monotonic() - before
    except BaseException:  # Ctrl-C, a loss that ran away: the state before is kept
        save_checkpoint(file, mark, now)
        raise
    records.write_whole(out / file_of(expert), recorder.encode(now))
    made = {
        "rows": [digest_of(*rows) for rows in now.rows],
        "heldout_accuracy": list(now.accuracies),
        "losses": list(now.losses),
    }
    return made, time.monotonic() - start
