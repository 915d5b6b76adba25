"""What is fuzzed: for every parser of files its whole files, their mutations, and what a user does with what loads."""

from __future__ import annotations

import io
import json
import os
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tomli_w
import torch
from PIL import Image

from fuzz import mutate
from potstill import checkpoint, exchange, foreign, loaders, recipe, rows, trajectories
from potstill.asking import recipe_of
from potstill.augment import Augment
from potstill.checkpoint import Ask, Progress
from potstill.data import Data
from potstill.exchange import HEADER, DistilledSet, describe_set
from potstill.experts import record
from potstill.measure import Clock
from potstill.methods import METHODS
from potstill.networks import network
from potstill.records import SEAL
from potstill.replay import Experts
from potstill.testing import still_for, toy

Files = dict[str, bytes]


@dataclass(frozen=True)
class Kind:
    """A parser under test.

    Args:
        samples: Whole inputs, each a folder of files by name; they all load.
        change: A sample changed: its files, with a generator.
        read: Opens what was written into a folder, and uses it as a user would.
    """

    samples: list[Files]
    change: Callable[[Random, Files, list[Files]], Files]
    read: Callable[[Path], None]


def content(folder: Path) -> Files:
    """Every file below a folder, by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bare(files: Files) -> Files:
    """Without their checksums, as files from before there were any: a change is then met by what reads it. Whoever writes a file
    can write its checksum, too."""
    made = {}
    for name, raw in files.items():
        if name.endswith(".json"):
            raw = json.dumps({k: v for k, v in json.loads(raw).items() if k != SEAL}).encode()
        elif name.endswith(".safetensors"):
            end = 8 + int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8:end])
            plain = header.get("__metadata__", {})
            if HEADER in plain:
                plain[HEADER] = json.dumps({k: v for k, v in json.loads(plain[HEADER]).items() if k != SEAL})
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            raw = len(text).to_bytes(8, "little") + text + raw[end:]
        made[name] = raw
    return made


def one(rng: Random, files: Files, change: Callable[[str, bytes], bytes]) -> Files:
    """The files with one of them changed, or once in a while left out."""
    name = rng.choice(list(files))
    if rng.random() < 0.02:
        return {k: v for k, v in files.items() if k != name}
    return {**files, name: change(name, files[name])}


def other(rng: Random, samples: list[Files], name: str) -> bytes:
    """A whole file of the same form from another sample."""
    found = [v for s in samples for k, v in s.items() if Path(k).suffix == Path(name).suffix]
    return rng.choice(found) if found else b""


def tensors(rng: Random, files: Files, samples: list[Files]) -> Files:
    """Safetensors and JSON, changed by structure or by byte."""

    def change(name: str, whole: bytes) -> bytes:
        if name.endswith(".json"):
            return mutate.dumps(mutate.tree(rng, json.loads(whole))) if rng.random() < 0.8 else mutate.raw(rng, whole)
        if rng.random() < 0.8:
            return mutate.safetensors(rng, whole)
        return mutate.raw(rng, whole, other(rng, samples, name))

    return one(rng, files, change)


# --- sets


def sets(home: Path) -> Kind:
    made: list[Files] = []
    data = toy(shape=(3, 6, 5))
    for i, name in enumerate(("standardise", "zca", "none")):
        kept = data.with_transform(name)
        inputs, labels = kept.prepare(kept.train.inputs[:20:5]), torch.tensor([0, 1, 1, 2])
        meta = describe_set(kept, METHODS["dm"]("small"), [1, 2, 1], 0, 5)
        lr = torch.tensor([0.01, 0.02]) if i else None
        if i == 2:
            labels, meta = (
                torch.softmax(torch.eye(3)[labels] * 3, 1),
                replace(meta, labels="soft", teacher={"network": "mlp"}),
            )
        one_ = DistilledSet(inputs, labels, meta, lr, exchange_matrix(kept))
        for own in (False, True) if name == "zca" else (False,):
            place = home / f"{name}{own}"
            place.mkdir()
            one_.save(place / "set.safetensors", self_contained=own)
            made.append(content(place))

    def read(folder: Path) -> None:
        found = exchange.load(folder)
        assert len(found[0]) == 2 and found.images.shape == found.inputs.shape and len(found.classes) == len(found)
        assert found.transform(np.zeros(found.shape, np.float32)).shape == found.shape
        (folder / "again").mkdir()
        found.save(folder / "again" / "set.safetensors", self_contained=True)
        again = exchange.load(folder / "again")
        assert again.meta == found.meta and torch.equal(again.inputs, found.inputs)

    return Kind(made, tensors, read)


def exchange_matrix(data: Data) -> Any:
    from potstill.transforms import matrix_of

    return matrix_of(data.transform)


# --- other projects' .pt


def pt(home: Path) -> Kind:
    data = toy()
    x, y = data.prepare(data.train.inputs[::4]), data.train.labels[::4]
    scores = {"ConvNet": [np.float64(0.7), np.float32(0.5), 0.25, np.int64(3), np.bool_(True)], "MLP": []}
    made: list[Files] = []
    for legacy in (False, True):
        buffers = [io.BytesIO() for _ in range(3)]
        for held, buffer in zip(({"data": [[x, y], [x + 1, y]], "accs_all_exps": scores}, x, y), buffers, strict=True):
            torch.save(held, buffer, _use_new_zipfile_serialization=not legacy)
        first, images, labels = (b.getvalue() for b in buffers)
        made += [{"res.pt": first}, {"images_best.pt": images, "labels_best.pt": labels}]

    def change(rng: Random, files: Files, samples: list[Files]) -> Files:
        def inner(name: str, whole: bytes) -> bytes:
            act = rng.random()
            if act < 0.03:
                buffer = io.BytesIO()
                held = {"data": [[x, y]], "more": mutate.Bomb(os.environ["FUZZ_MARK"], rng.randrange(6))}
                torch.save(held, buffer, _use_new_zipfile_serialization=rng.random() < 0.5)
                return buffer.getvalue()
            if whole.startswith(b"PK") and act < 0.8:
                return mutate.zipped(rng, whole, mutate.pickled, other(rng, samples, name))
            if not whole.startswith(b"PK") and act < 0.5:
                return mutate.pickled(rng, name, whole)
            return mutate.raw(rng, whole, other(rng, samples, name))

        return one(rng, files, inner)

    def read(folder: Path) -> None:
        for found in foreign.read(folder / "res.pt" if (folder / "res.pt").exists() else folder, data, "standardise"):
            assert found.inputs.isfinite().all() and found.shape == data.shape

    return Kind(made, change, read)


# --- npz: data, and other projects' sets


def npz(home: Path) -> Kind:
    data = toy()
    arrays = {
        "x_train": data.train.inputs.numpy(),
        "y_train": data.train.labels.numpy(),
        "x_test": data.test.inputs.numpy(),
        "y_test": np.array(["a", "b", "c"])[data.test.labels],
    }
    arrays["y_train"] = np.array(["a", "b", "c"])[arrays["y_train"]]
    small = {
        "x": arrays["x_train"][::4],
        "y": data.train.labels.numpy()[::4],
        "normalisation": np.array("0.5/0.25"),
        "lr": np.float32(0.1),
    }
    made = []
    for name, held in (("data", arrays), ("set", small)):
        for write in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            write(buffer, **held)
            made.append({f"{name}.npz": buffer.getvalue()})

    def change(rng: Random, files: Files, samples: list[Files]) -> Files:
        def inner(name: str, whole: bytes) -> bytes:
            if rng.random() < 0.8:
                return mutate.zipped(rng, whole, mutate.npy, other(rng, samples, name))
            return mutate.raw(rng, whole, other(rng, samples, name))

        return one(rng, files, inner)

    def read(folder: Path) -> None:
        if (folder / "data.npz").exists():
            loaded = loaders.load(str(folder / "data.npz"), folder)
            assert loaded.prepare(loaded.train.inputs).isfinite().all()
        else:
            for found in foreign.read(folder / "set.npz", data):
                assert found.inputs.isfinite().all()

    return Kind(made, change, read)


# --- TOML


def text(rng: Random, whole: bytes, samples: list[bytes]) -> bytes:
    """TOML changed by its values, by its lines or by its bytes."""
    act = rng.random()
    if act < 0.5:
        plain = mutate.tree(rng, tomllib.loads(whole.decode()), raw=False)
        try:
            return tomli_w.dumps(plain).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError, AttributeError, RecursionError):  # what TOML cannot say, such as nothing
            return repr(plain).encode("utf-8", "surrogatepass")
    lines = whole.split(b"\n")
    if act < 0.8:
        for _ in range(rng.choice([1, 2, 5])):
            at = rng.randrange(len(lines))
            what = rng.randrange(5)
            if what == 0:
                del lines[at]
                lines = lines or [b""]
            elif what == 1:
                lines.insert(at, rng.choice(rng.choice(samples).split(b"\n")))
            elif what == 2:
                deep = rng.choice([5, 500, 5000, 50000])
                lines.insert(
                    at,
                    rng.choice(
                        [
                            b"x = " + b"[" * deep + b"]" * deep,
                            b"a" + b".a" * deep + b" = 1",
                            b"x = " + b"{a = " * deep + b"1" + b"}" * deep,
                            b"[" + b"a." * deep + b"a]",
                            b"x = " + b"9" * deep,
                            b"[[row]]\n" * min(deep, 500),
                            b'x = "' + b"y" * deep + b'"',
                            b"x = " + b"-" * deep,
                        ]
                    ),
                )
            elif what == 3:
                key = lines[at].split(b"=")[0]
                lines[at] = (
                    key
                    + b"= "
                    + rng.choice(
                        [
                            b"nan",
                            b"inf",
                            b"-inf",
                            b"1979-05-27T07:32:00Z",
                            b"0xffffffffffffffffffff",
                            b"1e400",
                            b"''",
                            b'"\\u001b[31m"',
                            b"[1, 'a']",
                            b"{}",
                            b"true",
                            b"9" * 400,
                            b'"os:system"',
                            b'"../../x"',
                            b"'''a\nb\nc'''",
                        ]
                    )
                )
            else:
                lines[at] = mutate.raw(rng, lines[at])
        return b"\n".join(lines)
    return mutate.raw(rng, whole, rng.choice(samples))


def toml_kind(wholes: list[bytes], read: Callable[[Path], None]) -> Kind:
    def change(rng: Random, files: Files, samples: list[Files]) -> Files:
        return {"a.toml": text(rng, files["a.toml"], [s["a.toml"] for s in samples])}

    return Kind([{"a.toml": w} for w in wholes], change, read)


def recipes(home: Path) -> Kind:
    def read(folder: Path) -> None:
        found = recipe.read(folder / "a.toml")
        assert recipe.from_dict(tomllib.loads(recipe.write(found))) == found

    return toml_kind([recipe.write(make(p)).encode() for make in METHODS.values() for p in ("paper", "small")], read)


def benchmark_rows(home: Path) -> Kind:
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "rows"

    def read(folder: Path) -> None:
        (suite,) = rows.suites(str(folder / "a.toml"), [])
        assert suite.rows and all(row.cell for row in suite.rows)

    wholes = [b"\n\n".join(f.read_bytes().split(b"\n\n")[:12]) for f in sorted(folder.glob("*.toml"))]
    return toml_kind([w for w in wholes if b"[[row]]" in w], read)


# --- experts and checkpoints


def experts(home: Path) -> Kind:
    data = toy(shape=(5,))
    made = []
    for i, name in enumerate(("mlp-w4-d1", "mlp-batch-w4-d1")):
        record(data, out=home / str(i), count=1, epochs=2, network=name, compile="off", augment="none", holdout=0.0)
        made.append(bare(content(home / str(i))))

    def read(folder: Path) -> None:
        found = trajectories.open_experts(folder)
        for expert in range(min(found.count, 3)):
            for epoch in range(min(found.epochs, 3) + 1):
                found.state(expert, epoch)
        assert found.mark
        mine = replace(METHODS["mtt"]("small"), source=Experts(max_start=1, span=1), augment=Augment())
        ask = Ask(mine, 1, 2, experts=folder)
        recipe_of(ask, data, lambda line: None)
        found.check(network(found.meta["network"], data.shape, 3), data)

    return Kind(made, tensors, read)


def checkpoints(home: Path) -> Kind:
    data = toy(shape=(4,))
    made, stills = [], {}
    for name in ("dm", "frepo"):
        found = replace(METHODS[name]("small"), network="mlp-w4-d1", student="mlp-w4-d1", augment=Augment())
        still = still_for(found, data, steps=3)
        now = still.fresh()
        for step in range(2):
            now, _ = still.step(now, step)
        losses = torch.tensor([1.0, 0.5, float("nan")], dtype=torch.float64)
        progress = Progress((2, now), losses, [{"step": 0, "accuracy": 0.5}], {0: torch.zeros(6, 4)})
        (home / name).mkdir()
        clock = Clock()
        with clock.phase("loop"):
            checkpoint.save_checkpoint(home / name, still, progress, clock)
        made.append({k: v for k, v in bare(content(home / name)).items() if k == "checkpoint.safetensors"})
        stills[name] = (still, found)

    def read(folder: Path) -> None:
        found = checkpoint.load_checkpoint(folder, lambda line: None)
        if found is None:
            return
        pinned, progress = found
        still, mine = stills["frepo" if "ridge" in str(pinned["recipe"])[:400] else "dm"]
        ask = Ask(mine, still.settings.counts, 3, holdout=0.0)
        checkpoint.check_same(pinned, ask, replace(mine, steps=3), still.settings.counts, data, lambda line: None)
        checkpoint.check_fits(progress, still, folder)
        torch.set_num_threads(pinned["threads"])
        clock = Clock()
        clock.seconds.update(pinned["seconds"])
        if progress.step < pinned["steps"] and progress.step < 5:
            still.with_steps(pinned["steps"]).step(progress.at[1], progress.step)
        out = folder / "again"
        out.mkdir()
        with clock.phase("loop"):
            checkpoint.save_checkpoint(out, still, progress, clock)
        json.dumps(progress.looks, allow_nan=False)

    return Kind(made, tensors, read)


# --- pictures


def folders(home: Path) -> Kind:
    data = toy()
    files: Files = {}
    for split, part in (("train", data.train), ("test", data.test)):
        for i in range(0, 28, 3):
            picture = Image.fromarray((part.inputs[i, 0].clamp(0, 1) * 255).byte().numpy())
            buffer = io.BytesIO()
            picture.save(buffer, ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")[i % 2])
            files[f"{split}/{'abc'[int(part.labels[i])]}/{i:02d}.{('png', 'jpg')[i % 2]}"] = buffer.getvalue()

    def change(rng: Random, whole: Files, samples: list[Files]) -> Files:
        name, act = rng.choice(list(whole)), rng.randrange(8)
        found = dict(whole)
        if act < 4:
            found[name] = mutate.raw(rng, found[name], other(rng, samples, name))
        elif act == 4:
            del found[name]
        elif act == 5:
            found[
                rng.choice(
                    [
                        "train/a/x.txt",
                        "train/x.png",
                        "test/\x1b[31m/a.png",
                        "train/d/a.png",
                        ".hidden",
                        "train/a/b/c.png",
                        "train/a/\u202e.png",
                        "test/a/" + "n" * 200 + ".png",
                    ]
                )
            ] = found[name]
        elif act == 6:
            buffer = io.BytesIO()
            mode = rng.choice(["1", "L", "RGB", "RGBA", "P", "I;16", "CMYK", "LA"])
            Image.new(mode, rng.choice([(8, 8), (1, 1), (9, 8), (3000, 3000), (8, 3000)])).save(buffer, "TIFF")
            found[name] = buffer.getvalue()
        else:  # a header that promises a picture of a terabyte, and one of ten gigabytes
            whole_png = found[next(n for n in found if n.endswith("png"))]
            side = rng.choice([10**6, 10**5, 2**31 - 1, 0])
            import struct
            import zlib

            head = b"IHDR" + struct.pack(">II", side, side) + whole_png[24:29]
            found[name] = whole_png[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole_png[33:]
        return found

    def read(folder: Path) -> None:
        loaded = loaders.load(str(folder), folder.parent)
        assert loaded.prepare(loaded.train.inputs).isfinite().all()

    return Kind([files], change, read)


def parquet(home: Path) -> Kind:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = toy()
    files: Files = {}
    for split, part in (("train", data.train), ("test", data.test)):
        cells = []
        for i in range(0, 28, 3):
            buffer = io.BytesIO()
            Image.fromarray((part.inputs[i, 0].clamp(0, 1) * 255).byte().numpy()).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": f"{i}.png"})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(cells, kind), "label": pa.array(part.labels[:28:3].tolist(), pa.int64())})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        files[f"{split}.parquet"] = buffer.getvalue()

    def change(rng: Random, whole: Files, samples: list[Files]) -> Files:
        name, found = rng.choice(list(whole)), dict(whole)
        if rng.random() < 0.6:
            found[name] = mutate.raw(rng, found[name], other(rng, samples, name))
            return found
        cells = pq.read_table(io.BytesIO(found[name])).to_pylist()
        row, act = rng.choice(cells), rng.randrange(5)
        if act == 0:
            row["image"]["bytes"] = mutate.raw(rng, row["image"]["bytes"])
        elif act == 1:
            row["image"] = {
                "bytes": None,
                "path": rng.choice(["../../etc/passwd", "/etc/passwd", "a\0b", "x" * 5000, "", "\x1b[31m"]),
            }
        elif act == 2:
            row["label"] = rng.choice([-1, 3, 2**40, None, 10**6])
        elif act == 3:
            for r in cells:
                r["label"] = rng.choice(["a", "b", "\x1b[31m", "<b>"])
        else:
            cells = [
                {rng.choice(["image", "x", "\x1b"]): r["image"], rng.choice(["label", "y", "z"]): r["label"]}
                for r in cells[: rng.randrange(4)]
            ]
        buffer = io.BytesIO()
        try:
            pq.write_table(pa.Table.from_pylist(cells), buffer)
        except pa.ArrowInvalid:
            return {**found, name: mutate.raw(rng, found[name])}
        found[name] = buffer.getvalue()
        return found

    def read(folder: Path) -> None:
        loaded = loaders.load(f"hf:{folder}", folder.parent)
        assert loaded.prepare(loaded.train.inputs).isfinite().all()

    return Kind([files], change, read)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "set": sets,
    "pt": pt,
    "npz": npz,
    "recipe": recipes,
    "rows": benchmark_rows,
    "experts": experts,
    "checkpoint": checkpoints,
    "parquet": parquet,
    "folder": folders,
}


def write(folder: Path, files: Files) -> None:
    """Files into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, whole in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(whole)
