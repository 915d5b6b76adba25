"""Data larger than memory, and a thousand classes: distilled by DM and FRePo under a stated budget, which is enforced.

`folder`: a generated folder of pictures is decoded into the cache and distilled. Few pictures are distinct; the others are hard
links to them under other names, so the folder is small on disk and the cache is not. `classes`: one step of each method on random
pictures of 64 x 64 pixels in 1,000 classes, which lie in a mapped file.

The measure is resident anonymous memory (RssAnon), read from /proc/PID/status every few milliseconds by this process; a process
that takes more than the limit, trials included, is ended, and the script fails.

python benchmarks/larger_than_memory.py folder|classes [--gib 6] [--memory 2GiB] [--limit 2GiB] [--methods dm,frepo]
    [--steps 2] [--work DIR]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from potstill import distilling
from potstill.budget import size_of
from potstill.data import Classification, Data, Split
from potstill.loaders import load
from potstill.transforms import Standardise

SIZE, DISTINCT, TEST = 512, 16, 8  # pixels a side, different pictures, test pictures of a class
CLASSES, EACH = 1000, 40


def anonymous(pid: int) -> int:
    """Resident anonymous bytes of a process; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def under(budget: int, title: str, work: Callable[..., None], *args: Any) -> None:
    """Do something in a process of its own and print the most that it takes; end all if that is more than the budget."""
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    begin, peak = time.perf_counter(), 0
    child.start()
    while child.is_alive():
        peak = max(peak, anonymous(child.pid or 0))
        if peak > budget:
            child.kill()
            raise SystemExit(
                f"{title}: {peak / 2**20:.0f} MiB of anonymous memory are more than {budget / 2**20:.0f} MiB"
            )
        time.sleep(0.01)
    if child.exitcode:
        raise SystemExit(f"{title}: failed with exit code {child.exitcode}")
    seconds = time.perf_counter() - begin
    print(f"{title}: at most {peak / 2**20:.0f} MiB of anonymous memory, {seconds:.0f} s", flush=True)


def pictures(root: Path, size: int) -> None:
    """Four classes whose pictures are `size` bytes when decoded, unless they are there."""
    if root.exists():
        return
    many = -(-size // (SIZE * SIZE * 3) // 4)
    made: list[Path] = []
    rng = np.random.default_rng(0)
    for part, count in (("train", many), ("test", TEST)):
        for name in ("ash", "birch", "cedar", "elm"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                file = root / part / name / f"{i:06d}.bmp"
                if len(made) < DISTINCT:
                    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file)
                    made.append(file)
                else:
                    file.hardlink_to(made[(i + len(name)) % DISTINCT])


def build(root: Path) -> None:
    """The cache."""
    torch.set_num_threads(1)
    data = load(str(root))
    size = sum(split.inputs.nbytes for split in (data.train, data.test))
    print(
        f"{len(data.train)} training pictures, {size / 2**30:.2f} GiB decoded, fingerprint {data.fingerprint}",
        flush=True,
    )


def distilled(
    source: str | Data, method: str, memory: str, steps: int, out: Path, network: str, settings: dict[str, Any]
) -> None:
    """A run without looks and evaluation."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"looks": 0, **settings}
    distilling.distill(
        source, method, steps=steps, preset="small", network=network, settings=options, memory=memory, out=out, evaluate=False, force=True,
        holdout=0.1 if isinstance(source, str) else 0.0, say=lambda line: print(f"  {line}", flush=True),
    )  # fmt: skip


def thousand(file: Path) -> Data:
    """Random pictures of 64 x 64 pixels in 1,000 classes, in a mapped file."""
    shape = (CLASSES * EACH, 3, 64, 64)
    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    rng = np.random.default_rng(0)
    for start in range(0, len(out), 1000):
        out[start : start + 1000] = rng.integers(0, 256, (1000, *shape[1:]), dtype=np.uint8)
    out.flush()
    del out
    inputs = torch.from_numpy(np.load(file, mmap_mode="c"))
    train = Split(inputs, torch.arange(len(inputs)) % CLASSES)
    names, plain = tuple(map(str, range(CLASSES))), Standardise((0.5,) * 3, (0.29,) * 3)
    return Data(
        "thousand", train, train[:CLASSES], names, 255.0, plain, Classification(CLASSES), "0", train[:0], ordered=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("folder", "classes"))
    parser.add_argument("--gib", type=float, default=6.1, help="decoded, of `folder` (default: 6.1)")
    parser.add_argument("--memory", default="2GiB", help="budget (default: 2GiB)")
    parser.add_argument("--limit", help="what no process may take, its trials included (default: that of --memory)")
    parser.add_argument("--methods", default="dm,frepo", metavar="A,B", help="(default: dm,frepo)")
    parser.add_argument("--steps", type=int, default=1, help="of each method (default: 1)")
    parser.add_argument("--work", type=Path, help="keep pictures and cache there, and use what is there")
    parser.add_argument("--network", default="convnet-w8", help="(default: convnet-w8)")
    parser.add_argument(
        "--real",
        type=int,
        default=16,
        help="real samples, of a class for DM, twice as many in all for FRePo (default: 16)",
    )
    args = parser.parse_args()
    if not set(args.methods.split(",")) <= {"dm", "frepo"}:
        parser.error(f"--methods {args.methods}: dm, frepo or both, with a comma")
    torch.set_num_threads(1)
    budget = size_of(args.limit or args.memory)
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["POTSTILL_CACHE"] = str(folder / "cache")
        source: str | Data
        if args.what == "folder":
            pictures(folder / "pictures", int(args.gib * 2**30))
            under(budget, "decoding", build, folder / "pictures")
            source = str(folder / "pictures")
        else:
            source = thousand(folder / "thousand.npy")
        settings = {
            "dm": {"objective.real": args.real},
            "frepo": {"objective.real": 2 * args.real, "source.size": 2},
        }
        for method in args.methods.split(","):
            own = settings[method]
            under(
                budget, method, distilled, source, method, args.memory, args.steps, folder / method, args.network, own
            )
    sys.exit(0)


if __name__ == "__main__":
    main()
