"""Pictures and one HTML page of a run, from its record and its arrays; nothing here trains."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from potstill.errors import PotstillError
from potstill.records import write_whole

_WIDTH = 1600  # a grid is at most about this wide, in pixels

Array = np.ndarray
Record = dict[str, Any]
Evolution = list[tuple[int, np.ndarray]]


def grid(
    images: Array, rows: int | None = None, scale: int | None = None, pad: int = 2, labels: Sequence[str] | None = None
) -> Image.Image:
    """One picture of many images, for people: values are clamped to [0, 1] here and nowhere else.

    One channel is drawn grey, three as RGB, any other number as the grey of their mean. Vectors become near-square
    grey heat maps between the lowest and the highest value of them all, the places left over black. A NaN is black,
    an image of NaNs only is an empty place.

    Args:
        images: Floats (N, C, H, W) in units of the full range, or vectors (N, F) in any unit; with `rows`, by class.
        rows: The number of classes, for one row each; without it the images wrap. Where a row does not fit into
            1600 pixels at scale 1, the first of each class are shown, and a line in the picture says how many.
        scale: Pixels per pixel; by default so that tiles have 56 (over a name 84), fewer where this gets too wide.
        pad: Pixels between tiles.
        labels: One name per row, or without `rows` one per image.

    Returns:
        A picture of mode L or RGB.

    Raises:
        PotstillError: For arrays of another shape or of integers, and counts that do not match.
    """
    count, limits = len(images), extent([images])
    if count == 0 or (rows is not None and (rows < 1 or count % rows)):
        raise PotstillError(f"rows={rows} does not divide {count} images; every class needs as many, at least 1")
    if labels is not None and len(labels) != (rows or count):
        raise PotstillError(f"labels has {len(labels)} names; {rows or count} are needed")
    labels = [" ".join(label.split()) for label in labels or []]
    height, width, *colours = pixels(images[:1], limits).shape[1:]
    font, line = ImageFont.load_default(12), 16
    margin = min(160, int(max(map(font.getlength, labels))) + 10) if rows and labels else 0
    below, square = line if labels and not rows else 0, math.ceil(math.sqrt(count))
    columns = count // rows if rows else next((c for c in range(square, 2 * square) if count % c == 0), square)
    if scale is None:
        fits = (_WIDTH - margin - pad) // (columns if rows else 1) - pad
        scale = max(1, min(math.ceil((84 if below else 56) / min(height, width)), fits // width))
    wide, high = width * scale, height * scale
    shown = max(1, min(columns, (_WIDTH - margin - pad) // (wide + pad)))
    across, down = margin + pad + shown * (wide + pad), pad + (rows or -(-count // shown)) * (high + below + pad)
    picture = Image.new("RGB" if colours else "L", (across, down + (line if rows and shown < columns else 0)), "white")
    draw = ImageDraw.Draw(picture)
    for k in range(count):
        row, column = divmod(k, columns if rows else shown)
        x, y = margin + pad + column * (wide + pad), pad + row * (high + below + pad)
        if column < shown and not np.isnan(images[k]).all():
            tile = Image.fromarray(pixels(images[k : k + 1], limits)[0])
            picture.paste(tile.resize((wide, high), Image.Resampling.NEAREST), (x, y))
        if below and labels:
            draw.text((x, y + high + 1), _fit(labels[k], font, wide), fill="black", font=font)
        elif labels and column == 0:
            draw.text((pad, y + high // 2), _fit(labels[row], font, margin - 6), fill="black", font=font, anchor="lm")
    if rows and shown < columns:
        draw.text((pad, down), f"the first {shown} of {columns} per class", fill="black", font=font)
    return picture


def png_bytes(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file, the same for the same picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_run_report(
    folder: Path, record: Record, images: Array, groups: Array, evolution: Evolution, random_images: Array | None = None
) -> None:
    """Write `grid.png` and `report.html` into `folder`, each whole or not at all.

    Args:
        folder: Made if it is not there.
        record: The run's record, as read from `record.json`.
        images: The distilled images (M, C, H, W) in units of the full range, or vectors (M, F).
        groups: The class of each (M,).
        evolution: Pairs of a step and the first image of each class at it (K, ...).
        random_images: One real image per class (K, ...), for comparison.
    """
    page = run_page(record, images, groups, evolution, random_images)
    names, members = _classes(record, groups)
    folder.mkdir(parents=True, exist_ok=True)
    if members:
        most = max(map(len, members))
        table = np.full((len(members), most, *images.shape[1:]), np.nan, images.dtype)
        for row, member in zip(table, members, strict=True):
            row[: len(member)] = images[member]
        picture = grid(table.reshape(-1, *images.shape[1:]), rows=len(members) if most > 1 else None, labels=names)
        write_whole(folder / "grid.png", png_bytes(picture))
    write_whole(folder / "report.html", page.encode())


def run_page(
    record: Record, images: Array, groups: Array, evolution: Evolution, random_images: Array | None = None
) -> str:
    """The page of one run: a single HTML file that loads nothing. Arguments as for `write_run_report`.

    Returns:
        HTML, the same for the same arguments. Shown are at most 100 classes, 200 images, 10 classes at 12 steps.
    """
    names, members = _classes(record, groups)
    first = min(10, max(1, 200 // max(1, len(members))))
    limits = extent([images, *(e for _, e in evolution), *([] if random_images is None else [random_images])])
    picked = sorted({round(i) for i in np.linspace(0, len(evolution) - 1, 12)}) if evolution else []
    looks = [(look["step"], look["accuracy"]) for look in record.get("looks") or []]
    charts = _chart("Loss", record.get("curve") or []), _chart("Held-out accuracy", looks, percent=True)
    shape = (record.get("data") or {}).get("shape") or images.shape[1:]
    context = {
        "record": record,
        "noun": "images" if len(shape) == 3 else "samples",
        "count": (record.get("set") or {}).get("images", len(images)),
        "names": names,
        "classes": [(names[i], len(m), _tiles(images[m[:first]], limits)) for i, m in enumerate(members[:100])],
        "most": max(map(len, members), default=0),
        "first": first,
        "evolution": [(evolution[i][0], _tiles(evolution[i][1][:10], limits)) for i in picked],
        "random": [] if random_images is None else _tiles(random_images[:100], limits),
        "networks": list(_networks(record)),
        "charts": [chart for chart in charts if chart],
        "recipe": [f"{path} = {json.dumps(value, ensure_ascii=False)}" for path, value in _flat(record.get("recipe"))],
    }
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    room = jinja2.Environment(autoescape=True, loader=loader, trim_blocks=True, undefined=jinja2.ChainableUndefined)
    room.filters["quoted"] = json.dumps
    return room.get_template("run.html.j2").render(context)


def pixels(images: Array, limits: tuple[float, float]) -> Array:
    """Images or vectors as uint8 (N, H, W), or (N, H, W, 3) for three channels."""
    if images.ndim not in (2, 4) or 0 in images.shape[1:] or not np.issubdtype(images.dtype, np.floating):
        raise PotstillError(f"images is {images.dtype} {images.shape}; floats (N, C, H, W) or (N, F) can be drawn")
    x = images.astype(np.float64)
    if x.ndim == 2:
        width = math.ceil(math.sqrt(x.shape[1]))
        x = (x - limits[0]) / ((limits[1] - limits[0]) or 1.0)
        x = np.pad(x, ((0, 0), (0, -x.shape[1] % width))).reshape(len(x), 1, -1, width)
    x = np.nan_to_num(x, nan=0.0, posinf=1.0, neginf=0.0)
    if x.shape[1] not in (1, 3):
        x = x.mean(axis=1, keepdims=True)
    x = (x.clip(0, 1) * 255).round().astype(np.uint8)
    return x[:, 0] if x.shape[1] == 1 else np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def extent(arrays: Iterable[Array]) -> tuple[float, float]:
    """The lowest and the highest finite value."""
    rows = (row for a in map(np.asarray, arrays) for row in (a if a.ndim > 1 else [a]))  # one by one: no copy of all
    finite = (row[np.isfinite(row)] for row in rows)
    ends = [f(row) for row in finite if row.size for f in (np.min, np.max)] or [0.0, 1.0]
    return float(min(ends)), float(max(ends))


def _tiles(images: Array, limits: tuple[float, float]) -> list[Record]:
    """Each image as a small PNG in a data: URI, with its size."""
    tiles = []
    for picture in map(Image.fromarray, pixels(images, limits)):
        picture.thumbnail((128, 128), Image.Resampling.BOX)
        uri = f"data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}"
        tiles.append({"uri": uri, "width": picture.width, "height": picture.height})
    return tiles


def _classes(record: Record, groups: Array) -> tuple[list[str], list[Array]]:
    """The name and the indices of each class that is there, in order."""
    names, found = (record.get("data") or {}).get("class_names") or [], [int(g) for g in np.unique(groups)]
    chosen = [str(names[g]) if 0 <= g < len(names) else f"class {g}" for g in found]
    return chosen, [np.flatnonzero(groups == g) for g in found]


def _networks(record: Record) -> Iterator[Record]:
    """For each network: its bars (this set first, the whole set last) and what they say, in words."""
    results = [r for r in record.get("results") or [] if r.get("accuracies")]
    train = (record.get("data") or {}).get("train")
    for network in dict.fromkeys(r.get("network") for r in results):
        rows = [r for r in results if r.get("network") == network]
        named = [r for r in rows if r.get("set") == "this set"]
        ours = named or [r for r in rows if r["method"] == record.get("method")]
        whole = [r for r in rows if r["method"] == "whole" and r not in ours]
        rest, words = [r for r in rows if r not in ours + whole], []
        if ours and all(r.get("metric", "accuracy") == "accuracy" for r in rows):
            words = [_verdict(ours[0], r) for r in rest if r["method"] == "random"][:1]
            size, top = _count(record, ours[0]), _spread(whole[0])[0] if whole else 0
            if size and train and top > 0:
                kept, share = 100 * _spread(ours[0])[0] / top, 100 * size / train
                words.append(f"It keeps {kept:.0f} % of the whole set's score with {share:.3g} % of its size.")
        bars = [(r, r in ours, _count(record, r), *_spread(r)) for r in ours + rest + whole]
        yield {"network": network, "bars": bars, "words": words}


def _verdict(ours: Record, random: Record) -> str:
    """Better, worse or undecided against random real images, with n and p; only under one protocol."""
    a, b = ours["accuracies"], random["accuracies"]
    if any(ours.get(k) != random.get(k) for k in ("protocol", "protocol_hash")):
        return "The random real baseline ran under another protocol: no comparison."
    if min(len(a), len(b)) < 2 or not np.std(a) + np.std(b) > 0:
        return f"No test against the random real baseline: n = {len(a)} and {len(b)} networks show no spread."
    from scipy import stats  # type: ignore[import-untyped,unused-ignore]

    sides = np.mean(a), np.std(a, ddof=1), len(a), np.mean(b), np.std(b, ddof=1), len(b)
    p = float(stats.ttest_ind_from_stats(*sides, equal_var=False).pvalue)
    word = "Not clearly different from" if not p < 0.05 else "Better than" if np.mean(a) > np.mean(b) else "Worse than"
    value = f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
    tail = f"Welch's t-test, {value}, n = {len(a)} and {len(b)} networks, for this one set"
    return f"{word} the random real baseline: {100 * (np.mean(a) - np.mean(b)):+.1f} points ({tail})."


def _spread(row: Record) -> tuple[float, float]:
    """Mean and standard deviation, as the record has them."""
    a = row["accuracies"]
    return float(row.get("accuracy_mean", np.mean(a))), float(row.get("accuracy_std", np.std(a)))


def _count(record: Record, row: Record) -> int | None:
    """How many training samples a result stands on."""
    data, ipc = record.get("data") or {}, row.get("ipc")
    if row.get("images"):
        return row["images"]
    if row.get("method") == "whole":
        return data.get("train")
    return sum(ipc) if isinstance(ipc, list) else ipc * data["classes"] if ipc and "classes" in data else None


def _chart(name: str, points: Iterable[Sequence[Any]], percent: bool = False) -> Record | None:
    """A curve in a box of 400 x 240: path, dots and ticks; the mean of neighbours where points are many."""
    kept = np.array([(s, v) for s, v in points if v is not None and math.isfinite(v)], dtype=float)
    if not len(kept):
        return None
    kept[:, 1] *= 100 if percent else 1
    each = math.ceil(len(kept) / 300)
    steps, values = np.array([kept[i : i + each].mean(axis=0) for i in range(0, len(kept), each)]).T
    log = not percent and values.min() > 0 and values.max() > 100 * values.min()
    values = np.log10(values) if log else values
    room = max(0.08 * np.ptp(values), 2.0 if percent else 1e-3 * abs(values).max() + 1e-12)
    low, high, end = values.min() - room, values.max() + room, max(1.0, kept[-1, 0])
    low, high = (max(low, 0.0), min(high, 100.0)) if percent else (low, high)
    left, top = np.interp(steps, (0, end), (52, 384)).round(1), np.interp(values, (low, high), (200, 14)).round(1)
    across = [t for t in _ticks(0, end) if t == int(t)]
    up = [float(m) for m in range(math.ceil(low), math.floor(high) + 1)] if log else _ticks(low, high)
    (start, before), (stop, after), sign = kept[0], kept[-1], " %" if percent else ""
    return {
        "name": name + (", %" if percent else ", log scale" if log else ""),
        "points": list(zip(left.tolist(), top.tolist(), strict=True)),
        "x": [(f"{t:,.0f}", x) for t, x in zip(across, np.interp(across, (0, end), (52, 384)).round(1), strict=True)],
        "y": [(f"{10**t if log else t:g}", y) for t, y in zip(up, np.interp(up, (low, high), (200, 14)), strict=True)],
        "words": f"{name} from {before:.4g}{sign} at step {start:.0f} to {after:.4g}{sign} at step {stop:.0f}",
        "each": each,
    }


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in [low, high]."""
    rough = max((high - low) / 5, 1e-12)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts under dotted paths, as `--set` takes them."""
    for key, value in (tree or {}).items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _fit(text: str, font: Any, width: float) -> str:
    """The beginning of a text that fits into a width, in pixels."""
    cuts = (text[:k] + "…" * (k < len(text)) for k in range(len(text), 0, -1))
    return next((cut for cut in cuts if font.getlength(cut) <= width), "")
