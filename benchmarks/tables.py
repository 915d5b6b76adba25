"""Writes the tables of docs/performance.md from the records in benchmarks/results: no number there is typed by hand.

python benchmarks/tables.py [--page docs/performance.md] [--results benchmarks/results] [--check]

A block begins with `<!-- table: NAME -->` and ends with `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

from scipy.stats import ttest_rel

from potstill.errors import PotstillError
from potstill.records import read_json, write_whole
from potstill.speed import lines

HERE = Path(__file__).parent
MIB = 2**20
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WORDS = {"step": "", "steps": "", "training": ": one pass of the network over S", "epoch": ": an epoch", "test": ": the test pass", "memory": ": memory"}  # fmt: skip


def rows_of(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]]


def time_of(seconds: float) -> str:
    """For people: three figures."""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def beside_table(record: Mapping[str, Any]) -> list[str]:
    """Ours against the other side: medians, their ratio, and the least and largest ratio of two neighbouring rounds."""
    body = []
    for row in record["rows"].values():
        if not row["other"]:
            continue
        ours, other = row["sides"]["ours"], row["sides"][row["other"]]
        for what in ours["median"]:
            pairs = [b / a for a, b in zip(ours["seconds"][what], other["seconds"][what], strict=True)]
            ratio = other["median"][what] / ours["median"][what]
            spread = f"{ratio:.2f}× ({min(pairs):.2f}-{max(pairs):.2f})"
            times = [time_of(side["median"][what]) for side in (other, ours)]
            body.append([row["title"] + WORDS.get(what, f": {what}"), row["other"], *times, spread, *_bars(row, what, ratio)])  # fmt: skip
        if "memory" in row["bars"]:
            grown = [side["peak_bytes"] - side["baseline_bytes"] for side in (other, ours)]
            sizes, ratio = [f"{g / MIB:,.0f} MiB" for g in grown], grown[0] / max(grown[1], 1)
            body.append(
                [row["title"] + ": memory", row["other"], *sizes, f"{ratio:.2f}×", *_bars(row, "memory", ratio)]
            )
    return rows_of(("work", "against", "theirs", "ours", "ratio (of neighbouring rounds)", "bar", "aim"), body)


def _bars(row: Mapping[str, Any], what: str, ratio: float) -> list[str]:
    """Bar and aim, and whether the bar was missed."""
    bars = row["bars"].get(what)
    return [f"{bars[0]:g}×" + ", missed" * (round(ratio, 2) < bars[0]), f"{bars[1]:g}×"] if bars else ["–", "–"]


def beside_machine(record: Mapping[str, Any]) -> list[str]:
    """What was measured on what, a line for each machine and version."""
    lines: dict[str, list[str]] = {}
    for name, row in record["rows"].items():
        at, load = row["machine"], row["load"]
        where = f"{at['machine']['processor']}, {at['machine']['threads']} threads, PyTorch {at['torch']}, Potstill {at['potstill']}"  # fmt: skip
        lines.setdefault(where, []).append(f"{name} (load {load[0]:g} to {load[1]:g})")
    used = sorted({row["official"] for row in record["rows"].values() if row.get("official")})
    return [f"- {where}: {', '.join(names)}." for where, names in lines.items()] + [f"- Official code: {u}." for u in used]  # fmt: skip


def beside_how(record: Mapping[str, Any]) -> list[str]:
    """Network, precision and memory of each side of each row."""
    body = []
    for name, row in record["rows"].items():
        for side, at in row.get("sides", {}).items():
            form = ("compiled" if at.get("compile") else "eager") + (f", {at['unroll']}" if at.get("unroll") else "")
            together = f", {at['together']} together" if at.get("together") else ""
            grown = (at["peak_bytes"] - at["baseline_bytes"]) / MIB
            counts = len(next(iter(at["seconds"].values())))
            body.append([name, side, at["network"], at.get("precision", "as named"), form + together, f"{grown:,.0f}", str(counts), f"{at['warm_seconds']:.0f}"])  # fmt: skip
    return rows_of(("row", "side", "network", "precision", "form", "MiB grown", "rounds", "seconds to warm up"), body)


def features_table(record: Mapping[str, Any]) -> list[str]:
    """Operations per second of a pass, and their share of the machine's matrix product at that precision."""
    row = record["rows"]["feature-pass"]
    at = row["sides"]["ours"]
    body = []
    for precision in ("fp32", "bf16"):
        product = at["product_flops"] / at["median"][f"{precision} product"]
        body.append([f"matrix product, {precision}", f"{product / 1e9:.0f}", "1", "–", "–"])
        for form in ("eager", "compiled"):
            what = f"{precision} {form}"
            rate = at["flops"] / at["median"][what]
            pairs = [at["flops"] / a / (at["product_flops"] / b) for a, b in zip(at["seconds"][what], at["seconds"][f"{precision} product"], strict=True)]  # fmt: skip
            share = f"{rate / product:.2f} ({min(pairs):.2f}-{max(pairs):.2f})"
            bars = [f"{b:g}" for b in row["bars"]["share"]] if what == "bf16 compiled" else ["–", "–"]
            body.append([f"{at['images']} images, {form}, {precision}", f"{rate / 1e9:.0f}", share, *bars])
    return rows_of(("work", "GFLOP/s", "share of the product (of neighbouring rounds)", "bar", "aim"), body)


def once_table(record: Mapping[str, Any]) -> list[str]:
    """A run that is made once."""
    row = record["rows"]["whole-run"]
    at, bar = row["sides"]["ours"], row["bars"]["accuracy"][0]
    line = [row["title"], time_of(at["median"]["run"]), f"{100 * at['accuracy']:.1f} %", f"{100 * bar:.0f} %"]
    return rows_of(("run", "time", "accuracy", "bar"), [line])


def time_to_table(record: Mapping[str, Any]) -> list[str]:
    """The first kept set of each run that reaches the goal, with what the run takes before its clock starts."""
    body = []
    for run in sorted(record["runs"].values(), key=_reached):
        asked, reached, warm = run["asked"], run["reached"], run["warm_seconds"]
        method = asked["method"]
        threads, settings = str(asked["threads"]), " ".join(f"`{s}`" for s in asked["set"]) or "–"
        if reached is None:
            last = run["kept"][-1]
            body.append([f"`{method}`", "–", f"not in {last['seconds']:g}", f"{warm:.0f}", "–", str(last["steps"]), _mean(last["heldout"]), "–", threads, settings])  # fmt: skip
            continue
        student = f"`{reached['network']}`, `{reached['protocol']}`"
        minutes = f"{(warm + reached['seconds']) / 60:.1f}"
        body.append([f"`{method}`", student, f"{reached['seconds']:g}", f"{warm:.0f}", minutes, str(reached["steps"]), _mean(reached["heldout"]), _mean(reached["test"]), threads, settings])  # fmt: skip
    head = ("method", "student, protocol", "seconds", "to start", "minutes in all", "steps", "held out, %", "test, %", "threads", "beside the preset")
    return rows_of(head, body)


def real_batch_table(record: Mapping[str, Any]) -> list[str]:
    """Seconds to the goal by the size of the real batch, method by method: of each class for DM, in all for FRePo."""
    body = []
    for run in sorted(record["runs"].values(), key=lambda run: (run["asked"]["method"], _real(run))):
        last = run["reached"] or run["kept"][-1]
        took = f"{last['seconds']:g}" if run["reached"] else f"not in {last['seconds']:g}"
        each = f"{1000 * last['seconds'] / last['steps']:.0f}"
        body.append([f"`{run['asked']['method']}`", str(_real(run)), took, str(last["steps"]), each, _mean(last["heldout"])])  # fmt: skip
    return rows_of(("method", "`objective.real`", "seconds", "steps", "ms a step", "held out, %"), body)


def _real(run: Mapping[str, Any]) -> int:
    """Of the last setting that says it; a run without one has no place in the table."""
    return int({k: v for k, _, v in (s.partition("=") for s in run["asked"]["set"])}["objective.real"])


def _reached(run: Mapping[str, Any]) -> float:
    return float(run["reached"]["seconds"]) if run["reached"] else math.inf


def _mean(accuracies: Sequence[float]) -> str:
    """Percent, with the networks' deviation where there are several."""
    spread = f" ± {100 * pstdev(accuracies):.1f}" if len(set(accuracies)) > 1 else ""
    return f"{100 * mean(accuracies):.1f}{spread}"


def growth_table(record: Mapping[str, Any]) -> list[str]:
    """Seconds and memory along each axis, and the exponent between its ends."""
    body = []
    for method, axis in dict.fromkeys((c["method"], c["axis"]) for c in record["cells"].values()):
        cells = sorted((c for c in record["cells"].values() if (c["method"], c["axis"]) == (method, axis)), key=lambda c: c["at"])  # fmt: skip
        done = [c for c in cells if c["status"] == "done"]
        late = [f"{c['at']:,}: {c['status']}" for c in cells if c["status"] != "done"]
        shown = [f"{c['at']:,}: {time_of(c['step_seconds'])}, {grown(c) / MIB:,.0f} MiB" for c in done] + late
        body.append([method, AXES[axis], "; ".join(shown), *(f"{e:.2f}" if e is not None else "–" for e in exponents(done, axis))])  # fmt: skip
    return rows_of(("method", "grows", "a step: seconds, memory", "exponent of seconds", "of memory"), body)


AXES = {"ipc": "images per class", "classes": "classes", "side": "side in pixels", "samples": "training samples"}


def grown(cell: Mapping[str, Any]) -> int:
    """Peak above what was there before the first step, in bytes."""
    return int(cell["peak_bytes"] - cell["baseline_bytes"])


def exponents(cells: Sequence[Mapping[str, Any]], axis: str) -> tuple[float | None, float | None]:
    """Of seconds and memory between the last two cells of an axis, where growth is steepest: 1 is linear (for the side, in
    pixels, which are its square)."""
    if len(cells) < 2:
        return None, None
    a, b = cells[-2:]
    x = math.log(b["at"] / a["at"]) * (2 if axis == "side" else 1)
    told = min(grown(a), grown(b)) > MIB  # less than what an allocator keeps ready says nothing
    memory = math.log(grown(b) / grown(a)) / x if told else None
    return math.log(b["step_seconds"] / a["step_seconds"]) / x, memory


def growth_plot(record: Mapping[str, Any]) -> list[str]:
    """Where the curves are, once there are any."""
    return ["![Seconds and memory of a step along each axis, both logarithmic](growth.svg)"] if record["cells"] else []


def growth_machine(record: Mapping[str, Any]) -> list[str]:
    """What the cells have in common."""
    at, base = record["machine"], record["base"]
    where = f"{at['machine']['processor']}, {at['machine']['threads']} threads, PyTorch {at['torch']}"
    form = "compiled" if record["compile"] else "eager"
    line = (
        f"{where}; `{base['network']}`, {form}, float32. Where another axis grows: {base['ipc']} image per class, "
        f"{base['classes']} classes, {base['side']} × {base['side']} pixels in three channels, {base['samples']:,} training samples, "
        f"{base['real']} real samples a class and step (FRePo, KIP and DD: {base['uniform']} in all)."
    )
    return [line]


def speed_table(record: Mapping[str, Any]) -> list[str]:
    """Where a step's time goes, as `potstill speed` prints it."""
    head, *body = lines(record)
    machine = record["machine"]["machine"]
    said = f"{machine['processor']}, {machine['threads']} threads; matrix product " + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in record["matrix_product"].items())  # fmt: skip
    return [said + ".", "", *rows_of(head, [[f"`{name}`", *rest] for name, *rest in body])]


def start_table(record: Mapping[str, Any]) -> list[str]:
    """Seconds to the first step, by part: the median, the least and the most."""
    body = []
    for at, run in record["runs"].items():
        parts = [f"{median(t):.2f} ({min(t):.2f}-{max(t):.2f})" for t in run["seconds"].values()]
        body.append([f"`{at}`", *parts, str(run["software"]["machine"]["threads"]), str(len(next(iter(run["seconds"].values()))))])  # fmt: skip
    return rows_of(("data, method", "interpreter, imports", "data, network, plan", "in all, s", "threads", "n"), body)


def precision_table(record: Mapping[str, Any]) -> list[str]:
    """Cosines of gradients in bfloat16 to those in float32, and of those of neighbouring draws."""
    body = []
    for cell in record["cells"].values():
        for part, found in cell["parts"].items():
            cosines, norms = found["cosine"], found["norm_ratio"]
            body.append([cell["method"], cell["data"], str(cell["ipc"]), cell["network"], part, f"{median(cosines):.5f}", f"{min(cosines):.5f}", f"{median(norms):.3f}", f"{median(found['between_draws']):.3f}"])  # fmt: skip
    head = ("method", "data", "ipc", "network", "gradient of", "cosine, median", "least", "ratio of norms", "cosine between draws, fp32")  # fmt: skip
    return rows_of(head, body)


def precision_runs_table(record: Mapping[str, Any]) -> list[str]:
    """Accuracies of the same runs in both precisions, and a paired t-test that they differ."""
    body = []
    for cell in record["cells"].values():
        exact, rough = (cell["accuracies"][form] for form in ("fp32", "bf16"))
        gain = [100 * (b - a) for a, b in zip(exact, rough, strict=True)]
        shown = [f"{100 * mean(a):.1f} ± {100 * pstdev(a):.1f}" for a in (exact, rough)]
        body.append([cell["method"], cell["data"], cell["network"], str(cell["steps"]), *shown, f"{mean(gain):+.1f} ± {pstdev(gain):.1f}", f"{ttest_rel(rough, exact).pvalue:.2f}" if any(gain) else "–", str(len(exact))])  # fmt: skip
    head = ("method", "data", "network", "steps", "fp32, %", "bf16, %", "bf16 less fp32, seed by seed", "p", "n")
    return rows_of(head, body)


def processes_table(record: Mapping[str, Any]) -> list[str]:
    """Medians of whole commands, and how many times quicker two processes are: of medians, least and most of a round."""
    body = []
    for work in record["works"].values():
        took = work["seconds"]
        gains = []
        for form in ("one", "one, two threads"):
            rounds = [a / b for a, b in zip(took[form], took["two"], strict=True)]
            gains.append(f"{median(took[form]) / median(took['two']):.2f}× ({min(rounds):.2f}-{max(rounds):.2f})")
        command = "`potstill " + work["command"].removesuffix(" --out {out}/experts") + "`"
        body.append([command, *(f"{median(t):.1f} s" for t in took.values()), *gains])
    head = ("work", "one", "one, two threads", "two", "gain of two over one (of rounds)", "over one with two threads")
    return rows_of(head, body)


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[str]]]] = {
    "beside": ("beside.json", beside_table),
    "beside-machine": ("beside.json", beside_machine),
    "beside-how": ("beside.json", beside_how),
    "features": ("beside.json", features_table),
    "once": ("beside.json", once_table),
    "time-to": ("time_to.json", time_to_table),
    "real-batch": ("real_batch.json", real_batch_table),
    "speed": ("speed.json", speed_table),
    "start": ("start.json", start_table),
    "growth": ("growth.json", growth_table),
    "growth-machine": ("growth.json", growth_machine),
    "growth-plot": ("growth.json", growth_plot),
    "precision": ("precision.json", precision_table),
    "precision-runs": ("precision_runs.json", precision_runs_table),
    "processes": ("processes.json", processes_table),
}


def fill(text: str, results: Path) -> str:
    """The page with every block written anew.

    Raises:
        SystemExit: A block of a name that is not known, or a record of toys.
    """

    def block(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise SystemExit(f"no table '{name}'; there are: {', '.join(TABLES)}")
        file, table = TABLES[name]
        try:
            record = read_json(results / file)
            lines = table(record)
        except (PotstillError, KeyError):
            return f"{found[1]}*Not measured yet.*\n{found[3]}"
        if record.get("scale", "full") != "full":
            raise SystemExit(f"{file} has toys")
        return found[1] + "\n".join(lines) + "\n" + found[3]

    return BLOCK.sub(block, text)


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "performance.md")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is not what the records say")  # fmt: skip
    args = parser.parse_args()
    old = args.page.read_text()
    new = fill(old, args.results)
    if args.check:
        sys.exit(int(old != new))
    write_whole(args.page, new.encode())


if __name__ == "__main__":
    main()
