"""How figures look: colours, fonts, axes, and how durations and quantiles are spelled.

Colours are Okabe and Ito's (told apart by colour-blind readers and in grey print). Nothing here touches global state.
"""

from __future__ import annotations

from collections.abc import Callable
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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
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


def microseconds(ns: float) -> str:
    """Return a duration as text with three significant digits: ``850 ns``, ``12.3 µs``, ``4.56 ms``."""
    if not np.isfinite(ns):
        return "-"
    for limit, scale, unit in ((1e3, 1, "ns"), (1e6, 1e3, "µs"), (1e9, 1e6, "ms"), (np.inf, 1e9, "s")):
        if abs(ns) < limit * 0.9995:
            value = ns / scale
            digits = 0 if unit == "ns" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("unreachable: the last limit is infinite")


def quantile_words(quantile: float) -> str:
    """Return how a quantile is called: ``median``, ``p99``."""
    return "median" if quantile == 0.5 else f"p{100 * quantile:g}"
