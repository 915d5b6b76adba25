"""A run's folder: what may lie in it, the checkpoint that a resumed run begins with, and when it may."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as encode
from torch import Tensor

from . import records
from .arrays import first_line
from .compiling import PRECISIONS
from .data import Data
from .errors import PotstillError
from .exchange import pack, unpack
from .functional import form_of
from .measure import Clock
from .recipe import Recipe, from_dict, to_dict
from .replay import Experts
from .sealed import BEFORE, CHECKPOINT, OtherVersion, newest, read_sealed, write_checkpoint
from .still import Now, Still

FORMAT = 1
MOST_STEPS = 10**8  # whose losses take 0.8 GB
OURS = (
    "set.safetensors",
    CHECKPOINT,
    BEFORE,
    "snapshots.safetensors",
    "record.json",
    "recipe.toml",
    "grid.png",
    "report.html",
)


@dataclass
class Progress:
    """How far a run is. Step and state are one tuple, so that an interrupt never finds one without the other."""

    at: tuple[int, Now]
    losses: Tensor
    looks: list[dict[str, Any]] = field(default_factory=list)
    snapshots: dict[int, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.at[0]


@dataclass(frozen=True)
class Ask:
    """What the user asked for, as the command line has it; see `distill`."""

    method: str | Recipe = "dm"
    ipc: int | Sequence[int] = 1
    steps: int | None = None
    minutes: float | None = None
    preset: str | None = None
    network: str | None = None
    init: str | None = None
    experts: str | Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    holdout: float = 0.1
    device: str = "cpu"
    precision: str = "auto"
    compile: str = "auto"
    parallel: str = "alone"
    ranks: int = 1
    memory: int | None = None


def ours(name: str) -> bool:
    """Whether a run writes a file of this name: a whitening matrix has its hash in it."""
    return name in OURS or re.fullmatch(r"zca-[0-9a-f]{16}\.safetensors", name) is not None


def save_checkpoint(out: Path, still: Still, progress: Progress, clock: Clock, others: Sequence[Any] = ()) -> None:
    """A usable set, then the state that a resumed run begins with, with what other ranks have of their own; each file whole
    or not at all."""
    step, now = progress.at
    still.set(now.learned, step).save(out / "set.safetensors")
    records.write_whole(out / "snapshots.safetensors", encode({f"{s:08d}": x for s, x in progress.snapshots.items()}))
    tensors: dict[str, Tensor] = {}
    header = {
        "format": FORMAT,
        "settings": still.settings.plain(still.data),
        "step": step,
        "now": pack(tuple(now), tensors),
        **({"ranks": pack(list(others), tensors)} if others else {}),
        "losses": pack(progress.losses[:step], tensors),
        "snapshots": pack({str(s): x for s, x in progress.snapshots.items()}, tensors),
        "looks": progress.looks,
        "seconds": clock.seconds,
    }
    write_checkpoint(out / CHECKPOINT, tensors, header)


def load_checkpoint(out: Path, say: Callable[[str], None], rank: int = 0) -> tuple[dict[str, Any], Progress] | None:
    """Pinned settings and a rank's progress, or nothing where no checkpoint was written yet.

    Raises:
        PotstillError: The file is damaged, and so is the one before it.
    """
    return newest(out / CHECKPOINT, partial(_read, rank=rank), say)


def _read(file: Path, rank: int) -> tuple[dict[str, Any], Progress]:
    tensors, header = read_sealed(file, "checkpoint")
    try:
        if header["format"] != FORMAT:
            raise OtherVersion(f"{file} was written by another version of potstill; --force starts again")
        settings, step = header["settings"], header["step"]
        missing = {
            "recipe",
            "counts",
            "seed",
            "holdout",
            "steps",
            "device",
            "compile",
            "precision",
            "threads",
            "fingerprint",
            "torch",
            "processor",
        } - set(settings)
        if missing or step > settings["steps"]:
            raise KeyError(f"settings lack {', '.join(sorted(missing)) or 'steps'}")
        made = unpack(header["losses"], tensors)
        if made.shape != (step,) or not 0 <= step <= settings["steps"] <= MOST_STEPS:
            raise ValueError("its losses are not one for each step")
        losses = torch.full((settings["steps"],), math.nan, dtype=torch.float64)
        losses[:step] = made
        snapshots = {int(s): x for s, x in unpack(header["snapshots"], tensors).items()}
        now, others = Now(*unpack(header["now"], tensors)), unpack(header.get("ranks", {"list": []}), tensors)
        if rank and rank <= len(others):
            now = now._replace(own=others[rank - 1][0], pool=others[rank - 1][1])
        progress = Progress((step, now), losses, header["looks"], snapshots)
        _check_plain(settings, header["seconds"], progress)
        return {**settings, "seconds": header["seconds"]}, progress
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, PotstillError):
            raise
        raise PotstillError(f"{file} is damaged ({type(error).__name__}: {first_line(error)})") from error


def _check_plain(settings: dict[str, Any], seconds: Any, progress: Progress) -> None:
    """Refuse plain values of a checkpoint that are not what a run wrote.

    Raises:
        ValueError: Which.
    """
    whole = (settings["steps"], settings["threads"], progress.step)
    if not all(type(v) is int and v >= 0 for v in whole) or not 1 <= settings["threads"] <= 10**5:
        raise ValueError("its steps or threads are no numbers from 0 up")
    if type(settings.get("rows", 0)) is not int or not 0 <= settings.get("rows", 0) <= 10**6:
        raise ValueError("its rows are no number from 0 up")
    if settings["precision"] not in PRECISIONS or type(settings["compile"]) is not bool:
        raise ValueError("its precision or compile choice is none")
    if not all(isinstance(settings.get(k, ""), str) for k in ("torch", "processor", "device")):
        raise ValueError("its machine is no text")
    if not all(type(s) in (int, float) and 0 <= s < math.inf for s in seconds.values()):
        raise ValueError("its seconds are no times")
    if not all(type(k["step"]) is int and type(k["accuracy"]) in (int, float) and math.isfinite(k["accuracy"]) for k in progress.looks):  # fmt: skip
        raise ValueError("its looks are none")
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in progress.snapshots.values()):
        raise ValueError("its snapshots are none")


def check_fits(progress: Progress, still: Still, out: Path) -> None:
    """Refuse a state that is another run's, or none.

    Args:
        progress: As it was loaded.
        still: The run that is to go on from there.
        out: Its folder.

    Raises:
        PotstillError: What is learned, an optimiser's or the objective's state, or the networks have other shapes.
    """
    now, fresh = progress.at[1], still.fresh()
    wrong = [k for k in ("learned", "slow", "own") if form_of(getattr(now, k)) != form_of(getattr(fresh, k))]
    wrong += [] if wrong or still.source.fits(still.network, now.pool) else ["pool"]
    shown = still.shown.numel()
    wrong += [] if all(x.shape == (shown, *still.data.shape) for x in progress.snapshots.values()) else ["snapshots"]
    if wrong:
        raise PotstillError(f"{out / 'checkpoint.safetensors'} is damaged or another run's: part '{wrong[0]}' of it does not fit; --force starts again")  # fmt: skip


def check_same(
    pinned: dict[str, Any], ask: Ask, recipe: Recipe, counts: list[int], data: Data, say: Callable[[str], None]
) -> None:
    """Refuse to resume a run under other settings; say where the promise of the same bits ends.

    Raises:
        PotstillError: The first setting that differs, with both values.
    """
    now = {"recipe": to_dict(recipe), "counts": counts, "seed": ask.seed, "holdout": ask.holdout, "device": ask.device}
    source = recipe.source
    now["experts"] = source.trajectories.mark if isinstance(source, Experts) else None
    now |= {"fingerprint": data.fingerprint, "transform": data.transform.name}
    now |= {"parallel": ask.parallel, "ranks": ask.ranks}
    if ask.steps is not None or "steps" in ask.settings:
        now["steps"] = recipe.steps
    if ask.compile != "auto" and (recipe.objective is None or recipe.objective.needs.network):
        now["compile"] = ask.compile == "on"
    if ask.precision != "auto":
        now["precision"] = ask.precision
    settled = {"steps": recipe.steps}
    if ask.minutes is not None and pinned["recipe"].get("looks", recipe.looks) < recipe.looks:
        settled["looks"] = recipe.looks  # the time allowed fewer
    then = {
        "transform": "standardise",
        "experts": None,
        "parallel": "alone",
        "ranks": 1,
        **pinned,
        # what a recipe could not say when the run began, it says by its default
        "recipe": to_dict(from_dict(pinned["recipe"], recipe)) | settled,
    }
    for name, value in now.items():
        if then[name] != value:
            was = then[name]
            if isinstance(value, dict):
                name, was, value = next((k, was.get(k), v) for k, v in value.items() if was.get(k) != v)
            what = "the data have changed" if name == "fingerprint" else f"{name} was {was}, now {value}"
            raise PotstillError(
                f"the run to resume has other settings: {what}; give the same, or --force to start again"
            )
    for name, here in (("torch", torch.__version__), ("processor", records.processor())):
        if pinned[name] != here:
            say(f"note: this run began with {name} {pinned[name]}, here it is {here}: the last bits may differ")
