"""Recording experts: networks trained on the real data, their numbers kept at every epoch's end and at the start."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import records
from .augment import Augment
from .compiling import EAGER_FLOPS, PRECISIONS, check_device, choose_compile, choose_precision, keep_memory
from .data import Data, load_data
from .errors import PotstillError, unknown
from .exchange import pack, unpack
from .judge import fitting
from .methods import DSA
from .networks import State
from .networks import network as build_network
from .outputs import opened
from .recorder import Progress, Recorder
from .sealed import BEFORE, CHECKPOINT, newest, read_sealed, write_checkpoint
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
    return name in (INDEX, CHECKPOINT, BEFORE) or re.fullmatch(r"expert-\d{3,}\.safetensors", name) is not None


def save_checkpoint(out: Path, mark: str, now: Progress) -> None:
    """What a resumed recording goes on with."""
    tensors: dict[str, Tensor] = {}
    plain = now._replace(state=tuple(now.state))._asdict()  # type: ignore[arg-type]
    header = {"format": FORMAT, "mark": mark, "now": pack(plain, tensors)}
    write_checkpoint(out, tensors, header)


def load_checkpoint(
    out: Path, mark: str, layouts: tuple[Layout, Layout], say: Callable[[str], None]
) -> Progress | None:
    """How far the expert in work is, or nothing where none was saved or another recording's is there.

    Raises:
        PotstillError: The file is damaged, and so is the one before it.
    """
    return newest(out, partial(_read, mark, layouts), say)


def _read(mark: str, layouts: tuple[Layout, Layout], file: Path) -> Progress | None:
    tensors, header = read_sealed(file, "checkpoint")
    try:
        if header["mark"] != mark:
            return None
        plain = unpack(header["now"], tensors)
        now = Progress(**{**plain, "state": State(*plain["state"])})
        if tuple(map(Layout.of, now.state)) != layouts or not now.rows:
            raise ValueError("its network is another one")
        return now
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PotstillError(f"{file} is damaged ({type(error).__name__}: {error})") from error


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
        "augmentation": asdict(protocol.augment) | {"ops": list(protocol.augment.ops)},
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
    exact = choose_precision(precision, device, net)
    work = count * Trainer(net, protocol, data.task, False, "cpu").flops(len(data.train))
    on, why = choose_compile(compile, work / EAGER_FLOPS, device)
    recorder = Recorder(data, net.at(PRECISIONS[exact]), protocol, seed, on, device)
    out = Path(out)
    with opened(out, resume, force, ours):
        pinned = {"compile": on, "precision": exact, "threads": torch.get_num_threads()}
        index = index_of(recorder, holdout, augment, pinned)
        now: Progress | None = None
        if resume and (out / INDEX).exists():
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
            now = load_checkpoint(out, mark_of(index), recorder.layouts, say)
            now = now if now is not None and now.expert == len(index["experts"]) < count else None
        elif resume:
            say(f"nothing to resume in {out}: the recording begins")
        if not (out / INDEX).exists():
            records.write_sealed(out / INDEX, index)
        say(f"compile {'on' if on else 'off'} ({why}), precision {exact}")
        for i, made in enumerate(index["experts"]):
            say(line_of(i, made) + ", recorded before")
        run(recorder, out, index, count, now, say, bar)
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
    say: Callable[[str], None], bar: Callable[[int, str, int], Any] | None,
) -> None:  # fmt: skip
    """Record what is missing, expert by expert.

    Args:
        recorder: Of the experts.
        out: The folder; `experts.json` is in it.
        index: What that holds.
        count: Experts that there shall be.
        now: How far the next one is, if it has begun.
        say: Receives a line per expert.
        bar: Makes a progress bar.

    Raises:
        Stopped: A loss is no longer finite; the state before is on disk.
        KeyboardInterrupt: As the user asked; the state is on disk.
    """
    mark, total = mark_of(index), recorder.epochs * recorder.each
    first = len(index["experts"])
    begun = now.step if now is not None else 0
    line = bar(count * total, f"experts on {recorder.data.name}", first * total + begun) if bar else None
    try:
        for expert in range(first, count):
            now = now if now is not None and now.expert == expert else recorder.begin(expert)
            start, saved, took = time.monotonic(), time.monotonic(), 0.0
            try:
                for after in recorder.go_on(now):
                    now = after
                    if line is not None:
                        line.update()
                    wait = max(SAVE_EVERY, SHARE * took)
                    if now.step % recorder.each == 0 or time.monotonic() - saved > wait:
                        before = time.monotonic()
                        save_checkpoint(out, mark, now)
                        saved, took = time.monotonic(), time.monotonic() - before
            except BaseException:  # Ctrl-C, a loss that ran away: the state before is kept
                save_checkpoint(out, mark, now)
                raise
            records.write_whole(out / file_of(expert), recorder.encode(now))
            made = {
                "rows": [digest_of(*rows) for rows in now.rows],
                "heldout_accuracy": list(now.accuracies),
                "losses": list(now.losses),
            }
            index["experts"].append(made)
            records.write_sealed(out / INDEX, index)
            say(f"{line_of(expert, made)}, {time.monotonic() - start:.0f} s")
    finally:
        if line is not None:
            line.close()
    for name in (CHECKPOINT, BEFORE):
        (out / name).unlink(missing_ok=True)
