"""A function log for people: the phases of a request as text and as a picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from rxlab.follow.functionphases import PHASE_NAMES
from rxlab.read.columns import Columns
from rxlab.show.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    microseconds,
    new_axes,
    styled,
)
from rxlab.stages import PHASES

COLOURS = dict(zip(PHASE_NAMES, (SKY, YELLOW, ORANGE, VERMILION, PURPLE, BLUE, FAINT, GREEN, GREY), strict=True))
# A gap longer than this share of what happens is drawn as a break: the wait for a reply would else be all there is to see.
_BREAK = 0.04


def words(columns: Columns, name: str) -> list[str]:
    """Return a coded column as text; what is not known is empty."""
    categories = columns.attrs["categories"][name]
    return [categories[code] if code >= 0 else "" for code in columns[name].tolist()]


def contexts(spans: Columns) -> list[str]:
    """Return who each span belongs to: ``curl (321)``, or the interrupts of a CPU."""
    return [
        f"{comm} ({pid})" if pid >= 0 else f"interrupts, CPU {cpu}"
        for comm, pid, cpu in zip(words(spans, "comm"), spans["pid"].tolist(), spans["cpu"].tolist(), strict=True)
    ]


def phases_text(spans: Columns) -> str:
    """Return the phases in order, one a line: when, how long, how long nothing was called before, who, and which function first."""
    origin = int(spans["start"].min())
    head = (
        f"{'since first':>12} {'lasted':>10} {'gap before':>11} {'calls':>6}  {'phase':<8} {'who':<24} first function"
    )
    lines = [head]
    rows = zip(words(spans, "phase"), contexts(spans), words(spans, "function"), strict=True)
    for row, (phase, who, function) in enumerate(rows):
        start, end, gap = (int(spans[name][row]) for name in ("start", "end", "gap"))
        waited = microseconds(gap) if gap >= 0 else "-"
        lines.append(
            f"{microseconds(start - origin):>12} {microseconds(end - start):>10} {waited:>11} {int(spans['calls'][row]):>6}"
            f"  {phase:<8} {who:<24} {function}"
        )
    lines += [
        "",
        "lasted: from the entry of the first to the entry of the last function; gap: no call in the same context.",
    ]
    lines += [f"{phase.name:<8} {phase.what}" for phase in PHASES if phase.name in set(words(spans, "phase"))]
    return "\n".join(lines)


@styled
def plot_phases(spans: Columns) -> Figure:
    """Draw the phases over time, a lane for each context; long gaps are broken and say how long they were."""
    who, phase = contexts(spans), words(spans, "phase")
    lanes = list(dict.fromkeys(who))
    place, breaks = _broken_axis(spans)
    figure, axes = new_axes(8.4, 1.5 + 0.42 * len(lanes))
    width = place(np.array([spans["end"].max()]))[0]
    for lane, name in enumerate(lanes):
        rows = [row for row, one in enumerate(who) if one == name]
        left = place(spans["start"][rows])
        length = np.maximum(place(spans["end"][rows]) - left, 0.004 * width)
        colours = [COLOURS[phase[row]] for row in rows]
        axes.barh(lane, length, left=left, height=0.62, color=colours, edgecolor="white", linewidth=0.4)
    labelled = -np.inf
    for at, gap in breaks:
        axes.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        if at - labelled < 0.07 * width:
            continue  # the text would cover the one before
        labelled = at
        axes.annotate(
            microseconds(gap), (at, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlim(-0.01 * width, 1.02 * width)
    scale, unit = (1e3, "ms") if width > 5e3 else (1, "µs")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))
    axes.set_xlabel(f"{unit} inside the kernel's network functions (dashed: a gap, cut out)")
    axes.grid(visible=False, axis="y")
    seen = [name for name in PHASE_NAMES if name in phase]
    handles = [axes.barh(0, 0, color=COLOURS[name], label=name) for name in seen]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(seen))
    return figure


def _broken_axis(spans: Columns) -> tuple[Callable[[np.ndarray], np.ndarray], list[tuple[float, int]]]:
    """Return a function from times (ns) to places (µs) with the long gaps cut out, and those gaps: (place, ns)."""
    order = np.argsort(spans["start"], kind="stable")
    start, reached = spans["start"][order], np.maximum.accumulate(spans["end"][order])
    gaps = np.maximum(start[1:] - reached[:-1], 0)
    busy = int((reached[-1] - start[0]) - gaps.sum())
    long = np.flatnonzero(gaps > max(_BREAK * busy, 1))
    begins, cut = reached[:-1][long], gaps[long]
    removed = np.concatenate([[0], np.cumsum(cut)])

    def place(times: np.ndarray) -> np.ndarray:
        return (times - start[0] - removed[np.searchsorted(begins, times, side="left")]) / 1e3

    return place, list(zip(place(begins).tolist(), cut.tolist(), strict=True))
