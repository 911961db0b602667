"""How figures look: colours, fonts, axes, and how durations and quantiles are spelled.

Colours are Okabe and Ito's (told apart by colour-blind readers and in grey print). Nothing here touches global state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#8A8F98",
)  # fmt: skip
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
INK, FAINT = "#1F2933", "#D5DAE1"
MINUS = "\N{MINUS SIGN}"
# Characters of a name beside a row, inches a line of it takes, and inches between two names or two labels of an axis.
NAME_WIDTH, LINE_INCHES, APART_INCHES = 40, 0.16, 0.1

# What a hop is about, by the stage it ends at: (phase, colour), in the order of the path.
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "legend.frameon": False, "figure.facecolor": "white", "savefig.facecolor": "white", "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True, "figure.constrained_layout.w_pad": 0.09, "figure.constrained_layout.h_pad": 0.06,
}  # fmt: skip


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in this style, and leave the global one alone."""

    @wraps(draw)
    def in_style(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return in_style


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of one plot, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def log_ticks(axes: Axes) -> None:
    """Label a logarithmic x axis with plain numbers, as densely as its span allows."""
    low, high = axes.get_xlim()
    locator = (
        LogLocator(subs=(1.0, 2.0, 5.0), numticks=15) if high / low > 8 else MaxNLocator(7, steps=[1, 2, 2.5, 5, 10])
    )
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def ratio_ticks(axes: Axes, edge: float) -> None:
    """Make the x axis one of ratios from 1 / `edge` to `edge`, logarithmic, labelled as changes in percent."""
    axes.set_xscale("log")
    axes.set_xlim(1 / edge, edge)
    axes.xaxis.set_minor_locator(NullLocator())
    grids = (
        (0.98, 0.99, 1, 1.01, 1.02),
        (0.9, 0.95, 1, 1.05, 1.1),
        (0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5),
        (0.25, 0.5, 0.75, 1, 1.5, 2, 4),
    )
    wide = (0.1, 0.2, 0.5, 1, 2, 5, 10) if edge < 30 else (1e-6, 1e-4, 1e-3, 0.01, 0.1, 1, 10, 100, 1e3, 1e4, 1e6)
    ticks = [t for t in next((g for g in grids if g[-1] >= edge**0.7), wide) if 1 / edge <= t <= edge]
    names = [f"{100 * (t - 1):+.0f} %" if edge < 30 else f"×{t:g}" if t > 1 else f"÷{1 / t:g}" for t in ticks]
    names = ["same" if t == 1 else name.replace("-", MINUS) for t, name in zip(ticks, names, strict=True)]
    axes.set_xticks(ticks, names)


def wrapped(names: Iterable[str], width: int = NAME_WIDTH) -> list[str]:
    """Return names in lines of at most `width` characters, so that long ones leave room for what they name."""
    return ["\n".join(textwrap.wrap(name, width, break_on_hyphens=False)) for name in names]


def row_height(names: Iterable[str], one: float) -> float:
    """Return the inches a row needs for the longest of the names beside the rows; `one` where each is one line."""
    return max([one, *(APART_INCHES + LINE_INCHES * (name.count("\n") + 1) for name in names)])


def keep_ticks_apart(figure: Figure, axes: Axes) -> None:
    """Leave out labels of the x axis that would touch: what is drawn around the plot may have left it little room.

    Every second one goes, as often as it takes; no change (a ratio of 1) stays.
    """
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    ticks = [
        (at, label.get_text(), label.get_window_extent())
        for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if low <= at <= high and label.get_text()
    ]
    same = next((place for place, (at, _, _) in enumerate(ticks) if at == 1), 0)
    apart = APART_INCHES * figure.dpi
    while len(ticks) > 1 and any(
        left.x1 + apart > right.x0 for (_, _, left), (_, _, right) in zip(ticks, ticks[1:], strict=False)
    ):
        ticks, same = ticks[same % 2 :: 2], same // 2
    axes.set_xticks([at for at, _, _ in ticks], [text for _, text, _ in ticks])
    axes.set_xlim(low, high)


def microseconds(ns: float, more: int = 0) -> str:
    """Return a duration as text with three significant digits, or `more`: ``850 ns``, ``12.3 µs``, ``4.56 ms``."""
    if not np.isfinite(ns):
        return "-"
    for limit, scale, unit in ((1e3, 1, "ns"), (1e6, 1e3, "µs"), (1e9, 1e6, "ms"), (np.inf, 1e9, "s")):
        if abs(ns) < limit * 0.9995:
            value = ns / scale
            digits = more + (0 if unit == "ns" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2)
            return f"{value:.{0 if unit == 'ns' else digits}f} {unit}"
    raise AssertionError("unreachable: the last limit is infinite")


def told_apart(values: Sequence[float]) -> list[str]:
    """Return durations that are compared, as text: with up to three digits more where unequal ones would read equal."""
    unequal = len({ns for ns in values if np.isfinite(ns)})
    for more in range(4):
        texts = [microseconds(ns, more) for ns in values]
        if len({text for text, ns in zip(texts, values, strict=True) if np.isfinite(ns)}) == unequal:
            break
    return texts


def quantile_words(quantile: float) -> str:
    """Return how a quantile is called: ``median``, ``p99``."""
    return "median" if quantile == 0.5 else f"p{100 * quantile:g}"
