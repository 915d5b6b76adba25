"""Plots as inline SVG whose colours are the page's: drawn by Matplotlib, without its state and without a display."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = 8
MARKERS = "os^Dv"
INK, SOFT, LINE, HEAT = "#fd0001", "#fd0002", "#fd0003", "#fd0004"  # stand for colours of the page
VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", HEAT: "var(--copper)"}
VARIABLES |= {f"#fe00{i:02x}": f"var(--s{i})" for i in range(COLOURS)}


@dataclass(frozen=True)
class Series:
    """A line of a plot: points (x, y, deviation), colour and marker by number; a negative colour is a quiet one."""

    points: tuple[tuple[float, float, float], ...]
    colour: int
    marker: int


@dataclass(frozen=True)
class Axis:
    """What an axis shows. `ticks` are the places to name, all others are found."""

    words: str
    log: bool = True
    ticks: tuple[float, ...] = ()


def line_plot(name: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Lines with markers and error bars.

    Args:
        name: Of letters and digits, one of its own on a page: what the drawing refers to is named by it.
        series: At least one point in all.
        x: Below.
        y: On the left.

    Returns:
        An `<svg>` element.
    """
    with _settings(name):
        figure, axes = _figure(3.5, 2.7)
        for s in sorted(series, key=lambda s: s.colour >= 0):
            colour = SOFT if s.colour < 0 else f"#fe00{s.colour % COLOURS:02x}"
            across, up, spread = zip(*sorted(s.points), strict=True)
            look: dict[str, Any] = {"color": colour, "marker": MARKERS[s.marker % len(MARKERS)], "markersize": 4.5}
            look |= {"linewidth": 1.4, "linestyle": (0, (3, 2)) if s.colour < 0 else "-", "clip_on": False}
            axes.errorbar(across, up, yerr=spread if any(spread) else None, elinewidth=1, **look)
        _scale(axes.xaxis, x, axes.set_xscale)
        _scale(axes.yaxis, y, axes.set_yscale)
        axes.set_xlabel(x.words, color=SOFT)
        axes.set_title(y.words, loc="left", color=SOFT, fontsize=9, pad=7)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        return _inline(figure, name)


def heat_map(name: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A table of accuracies as shades, the number in each field in percent.

    Args:
        name: As for `line_plot`.
        rows: Names.
        columns: Names.
        values: In [0, 1], by row; `None` stays empty.

    Returns:
        An `<svg>` element.
    """
    there = [v for row in values for v in row if v is not None]
    low, high = min(there), max(there)
    with _settings(name):
        from matplotlib.patches import Rectangle

        rows, columns = ([n if len(n) <= 26 else f"{n[:25]}…" for n in names] for names in (rows, columns))
        longest = [max(map(len, names)) for names in (rows, columns)]  # about 0.08 inches a letter
        figure, axes = _figure(
            0.4 + 0.08 * sum(longest) + 0.56 * len(columns), 0.4 + 0.055 * longest[1] + 0.32 * len(rows)
        )
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value is not None:
                    # up to a shade on which ink can still be read
                    shade = 0.06 + 0.54 * ((value - low) / (high - low) if high > low else 0.5)
                    axes.add_patch(Rectangle((j, i), 0.94, 0.9, facecolor=HEAT, alpha=shade, edgecolor="none"))
                    axes.text(j + 0.47, i + 0.47, f"{100 * value:.1f}", ha="center", va="center", color=INK)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([j + 0.47 for j in range(len(columns))], columns, rotation=35, ha="left", color=SOFT)
        axes.set_yticks([i + 0.45 for i in range(len(rows))], rows, color=INK)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return _inline(figure, name)


def _settings(name: str) -> Any:
    """Text stays text and `$` a dollar; the same drawing gives the same names inside."""
    import matplotlib

    usual: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9}
    return matplotlib.rc_context({**usual, "font.family": "sans-serif", "axes.unicode_minus": True})


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of a size in inches with bare axes; no state is kept of it."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(color=SOFT, labelcolor=SOFT, left=False, length=3)
    axes.patch.set_visible(False)
    return figure, axes


def _scale(axis: Any, what: Axis, scale: Any) -> None:
    """Linear or logarithmic, with a few plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if not what.log:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        return
    scale("log")
    low, high = axis.get_view_interval()
    decades = high / low if low > 0 else 1.0
    subs = (1.0,) if decades > 1e3 else (1.0, 3.0) if decades > 30 else (1.0, 2.0, 5.0)
    axis.set_major_locator(FixedLocator(what.ticks) if what.ticks else LogLocator(subs=subs, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))


def plain(value: float) -> str:
    """A number of an axis: no powers between a thousandth and a million.

    Example:
        >>> [plain(v) for v in (0.02, 1, 200, 5000)]
        ['0.02', '1', '200', '5,000']
    """
    return f"{value:,.0f}" if 1 <= value < 1e6 and value == round(value) else f"{value:g}"


def _inline(figure: Any, name: str) -> str:
    """The drawing as an element of a page: without headers, with the page's colours, with names of its own."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that its own font lacks: the page's has them
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head = re.search(r'viewBox="[^"]*"', text)
    text = f"<svg {head[0] if head else ''}>{text.partition('>')[2]}"
    text = re.sub(r"#f[de]00[0-9a-f]{2}", lambda m: VARIABLES.get(m[0], m[0]), text)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-0 [^)]*\)\"", "", text)
    # a hundredth of a unit is enough for a place; words stay as they are
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)
