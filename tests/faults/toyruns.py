"""What the tests of faults share: a toy run, and files that are read from end to end."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import potstill
from potstill import experts, loop, still
from potstill.testing import toy

SMALL = {"network": "mlp-w4", "student": "mlp-w4", "objective.real": 4, "looks": 1}


def run(out, **options):
    options = {"ipc": 2, "steps": 6, "preset": "small", "settings": SMALL, "evaluate": False, **options}
    return potstill.distill(options.pop("data", None) or toy(), options.pop("method", "dm"), out=out, **options)


def record(out, **options):
    options = {"count": 2, "epochs": 2, "network": "mlp-w4", "batch": 8, **options}
    return experts.record(toy(), out=out, **options)


def bytes_of(folder, *also):
    """The files that must be the same whatever befell a run."""
    names = ("set.safetensors", "snapshots.safetensors", "recipe.toml", "experts.json")
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name in names or p.name.startswith("expert-")}


def everything(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def copy(folder, to):
    return Path(shutil.copytree(folder, to))


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def damages(content: bytes, count: int):
    """Contents damaged: one bit flipped, in the length, the header, the numbers; or cut short."""
    draw = random.Random(0)
    size = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *(draw.randrange(8, size) for _ in range(count)), *(draw.randrange(size, len(content)) for _ in range(count)), len(content) - 1]  # fmt: skip
    yield from ((f"bit of byte {at}", flipped(content, at, draw.randrange(8))) for at in places)
    yield from ((f"cut at {at}", content[:at]) for at in (0, 7, 8, size, len(content) - 1))


class Bar:
    """A progress bar that does something at a step."""

    def __init__(self, at, act):
        self.at, self.act = at, act

    def __call__(self, total, title, start):
        self.step = start
        return self

    def update(self, n=1):
        self.step += n
        if self.step == self.at:
            self.act()

    def set_postfix_str(self, text, refresh=True): ...

    def close(self): ...


def interrupt():
    raise KeyboardInterrupt


def save_npz(file, data=None):
    data = data or toy()
    np.savez(file, **{f"{n}_{p}": getattr(s, "inputs" if n == "x" else "labels").numpy() for p, s in (("train", data.train), ("test", data.test)) for n in "xy"})  # fmt: skip
    return str(file)


@pytest.fixture
def short(monkeypatch):
    """Looks of a few epochs, a checkpoint after each step."""
    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=2))
    for module, name in ((loop, "SAVE_EVERY"), (experts, "SAVE_EVERY"), (experts, "SHARE")):
        monkeypatch.setattr(module, name, 0)
