"""A run's folder: what may lie in it, the checkpoint that a resumed run begins with, and when it may."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as encode
from torch import Tensor

from . import records
from .data import Data
from .errors import PotstillError
from .exchange import HEADER, pack, read_tensors, unpack
from .measure import Clock
from .recipe import Recipe, from_dict, to_dict
from .replay import Experts
from .still import Now, Still

FORMAT = 1
OURS = (
    "set.safetensors",
    "checkpoint.safetensors",
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
    memory: int | None = None


def ours(name: str) -> bool:
    """Whether a run writes a file of this name: a whitening matrix has its hash in it."""
    return name in OURS or re.fullmatch(r"zca-[0-9a-f]{16}\.safetensors", name) is not None


def open_folder(out: Path, resume: bool, force: bool, ours: Callable[[str], bool] = ours) -> None:
    """Make the run's folder, or see that an existing one may be used.

    Args:
        out: The folder.
        resume: Whether what is there is to be continued.
        force: Whether it is to be deleted.
        ours: Whether a file of a given name is one that the run writes.

    Raises:
        PotstillError: It holds something else, or a run that was not to be continued.
    """
    try:
        if out.exists() and not out.is_dir():
            raise PotstillError(f"--out {out} is a file; a folder is needed")
        inside = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    except OSError as error:
        raise PotstillError(f"--out {out} cannot be used ({error.strerror})") from error
    # a killed process leaves files half-written under the name that `write_whole` gives them meanwhile
    foreign = [
        n
        for n in inside
        if (out / n).is_dir() or not (ours(n) or (n.startswith(".") and ours(n[1:].rpartition(".")[0])))
    ]
    if foreign:
        raise PotstillError(
            f"--out {out} holds something else ({foreign[0]}); name a folder that is empty or not there"
        )
    if resume and force:
        raise PotstillError("--resume continues a run and --force starts it again; give one of them")
    if inside and not resume and not force:
        raise PotstillError(f"--out {out} holds a run already; --resume continues it, --force starts it again")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PotstillError(f"--out {out} cannot be made ({error.strerror})") from error
    for name in inside:
        if force or not ours(name):  # what a killed process left half-written
            (out / name).unlink()


def save_checkpoint(out: Path, still: Still, progress: Progress, clock: Clock) -> None:
    """A usable set, then the state that a resumed run begins with; each file whole or not at all."""
    step, now = progress.at
    still.set(now.learned, step).save(out / "set.safetensors")
    records.write_whole(out / "snapshots.safetensors", encode({f"{s:08d}": x for s, x in progress.snapshots.items()}))
    tensors: dict[str, Tensor] = {}
    header = {
        "format": FORMAT,
        "settings": still.settings.plain(still.data),
        "step": step,
        "now": pack(tuple(now), tensors),
        "losses": pack(progress.losses[:step], tensors),
        "snapshots": pack({str(s): x for s, x in progress.snapshots.items()}, tensors),
        "looks": progress.looks,
        "seconds": clock.seconds,
    }
    records.write_whole(out / "checkpoint.safetensors", encode(tensors, metadata={HEADER: json.dumps(header)}))


def load_checkpoint(out: Path) -> tuple[dict[str, Any], Progress] | None:
    """Pinned settings and progress, or nothing where no checkpoint was written yet.

    Raises:
        PotstillError: The file is damaged.
    """
    file = out / "checkpoint.safetensors"
    if not file.exists():
        return None
    tensors, header = read_tensors(file, "checkpoint")
    try:
        if header["format"] != FORMAT:
            raise PotstillError(f"{file} was written by another version of potstill; --force starts again")
        settings, step = header["settings"], header["step"]
        missing = {"recipe", "counts", "seed", "holdout", "steps", "device", "compile", "precision", "threads"} - set(
            settings
        )
        if missing or step > settings["steps"]:
            raise KeyError(f"settings lack {', '.join(sorted(missing)) or 'steps'}")
        losses = torch.full((max(settings["steps"], step),), math.nan, dtype=torch.float64)
        losses[:step] = unpack(header["losses"], tensors)
        snapshots = {int(s): x for s, x in unpack(header["snapshots"], tensors).items()}
        progress = Progress((step, Now(*unpack(header["now"], tensors))), losses, header["looks"], snapshots)
        return {**settings, "seconds": header["seconds"]}, progress
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, PotstillError):
            raise
        raise PotstillError(f"{file} is damaged ({type(error).__name__}: {error}); --force starts again") from error


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
    if ask.steps is not None or "steps" in ask.settings:
        now["steps"] = recipe.steps
    if ask.compile != "auto" and (recipe.objective is None or recipe.objective.needs.network):
        now["compile"] = ask.compile == "on"
    if ask.precision != "auto":
        now["precision"] = ask.precision
    then = {
        "transform": "standardise",
        "experts": None,
        **pinned,
        # what a recipe could not say when the run began, it says by its default
        "recipe": {**to_dict(from_dict(pinned["recipe"], recipe)), "steps": to_dict(recipe)["steps"]},
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
