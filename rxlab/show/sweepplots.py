"""Figures of a sweep: a heat map over two settings, the configurations in rank order, what each setting does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from rxlab.dataset import stats
from rxlab.dataset.effects import Effect, Rank
from rxlab.errors import UsageError
from rxlab.show.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MINUS,
    VERMILION,
    keep_ticks_apart,
    log_ticks,
    microseconds,
    new_axes,
    ratio_ticks,
    row_height,
    styled,
    told_apart,
    wrapped,
)

LEAST_SPAN = np.log10(1.1)  # of a heat map's colours


@styled
def plot_heatmap(
    values: xr.DataArray, *, title: str = "Latency over two settings", xlabel: str = "latency (µs)"
) -> Figure:
    """Draw a latency over two settings: in each cell the geometric mean of its runs, its 95 % interval, and how many runs.

    Parameters
    ----------
    values : DataArray, dims (setting, setting, repetition), ns
        One quantile of each run. The first setting is the rows.
    """
    settings = [str(name) for name in values.dims if name != "repetition"]
    if len(settings) != 2 or "repetition" not in values.dims:
        raise UsageError(
            "a heat map is over two settings", found=f"dims {', '.join(map(str, values.dims))}",
            expected="two settings and repetition", do="Select the others: values.sel(setting=value).",
        )  # fmt: skip
    table = values.transpose(*settings, "repetition").values
    cells = [[stats.over_repetitions(runs[np.isfinite(runs)]) for runs in row] for row in table]
    means = np.array([[cell.value for cell in row] for row in cells]) / 1e3
    figure, axes = new_axes(8.2, 0.62 * means.shape[0] + 1.4)
    # Latencies span decades: equal steps of colour are equal ratios. Cividis reads the same for all eyes, and in grey.
    low, high = float(np.nanmin(np.log10(means))), float(np.nanmax(np.log10(means)))
    if high - low < LEAST_SPAN:  # noise must not look like an effect
        low, high = (low + high - LEAST_SPAN) / 2, (low + high + LEAST_SPAN) / 2
    image = axes.imshow(np.log10(means), cmap="cividis_r", aspect="auto", vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(means):
        cell = cells[row][column]
        if not np.isfinite(value):
            axes.text(column, row, "no run", ha="center", va="center", fontsize=8, color=GREY)
            continue
        interval = (
            f"\n{_span(cell.low, cell.high)}"
            if np.isfinite(cell.low)
            else f"\n{cell.n} run{'s' if cell.n > 1 else ''}, no interval"
        )
        is_dark = np.log10(value) - low > 0.5 * (high - low)
        axes.text(
            column,
            row,
            microseconds(1e3 * value) + interval,
            ha="center",
            va="center",
            fontsize=8,
            color="white" if is_dark else INK,
        )
    names = [
        [str(label) for label in values[name].values]
        if name in values.coords
        else [str(k) for k in range(values.sizes[name])]
        for name in settings
    ]
    axes.set_xticks(range(means.shape[1]), names[1])
    axes.set_yticks(range(means.shape[0]), names[0])
    axes.set_xlabel(settings[1])
    axes.set_ylabel(settings[0])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    ticks = np.linspace(low, high, 4).tolist()
    bar.set_ticks(ticks, labels=[f"{10**tick:.3g}" for tick in ticks])
    bar.set_label(xlabel)
    bar.outline.set_visible(False)
    axes.set_title(title)
    return figure


def _span(low: float, high: float) -> str:
    left, right = microseconds(low).split(), microseconds(high).split()
    return f"{left[0]} – {' '.join(right)}" if left[1] == right[1] else f"{' '.join(left)} – {' '.join(right)}"


@styled
def plot_ranks(
    ranks: Sequence[Rank], *, title: str = "Which configuration is fastest?", xlabel: str = "latency (µs)"
) -> Figure:
    """Draw configurations in rank order with their intervals; green: cannot be told from the fastest."""
    names = wrapped(one.label for one in ranks)
    figure, axes = new_axes(8.2, row_height(names, 0.34) * len(ranks) + 1.2)
    medians = told_apart([one.estimate.value for one in ranks])
    for line, one in enumerate(ranks):
        colour = GREEN if one.first == 1 else GREY
        if np.isfinite(one.estimate.low):
            axes.hlines(line, one.estimate.low / 1e3, one.estimate.high / 1e3, color=colour, linewidth=3)
        axes.plot(one.estimate.value / 1e3, line, "o", color=colour, markersize=7, markeredgecolor="white")
        place = f"rank {one.first}" if one.first == one.last else f"rank {one.first} to {one.last}"
        axes.annotate(
            f"{medians[line]}, {place}",
            (1.01, line),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(ranks)), names)
    axes.set_ylim(len(ranks) - 0.4, -0.6)
    axes.set_xscale("log")
    log_ticks(axes)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    axes.set_title(title)
    keep_ticks_apart(figure, axes)
    return figure


@styled
def plot_effects(effects: Sequence[Effect], *, title: str = "What does each setting do?") -> Figure:
    """Draw main effects and interactions as ratios with their intervals; grey: not significant after the correction."""
    names = wrapped(effect.words for effect in effects)
    figure, axes = new_axes(8.2, row_height(names, 0.3) * len(effects) + 1.3)
    for line, effect in enumerate(effects):
        colour = GREY if not effect.is_known else BLUE if effect.ratio < 1 else VERMILION
        if np.isfinite(effect.low):
            axes.hlines(line, effect.low, effect.high, color=colour, linewidth=2.6)
        axes.plot(
            effect.ratio,
            line,
            "D" if effect.is_interaction else "o",
            color=colour,
            markersize=7,
            markeredgecolor="white",
        )
        axes.annotate(
            f"{100 * (effect.ratio - 1):+.1f} %".replace("-", MINUS),
            (1.01, line),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
        )
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(effects)), names)
    axes.set_ylim(len(effects) - 0.4, -0.6)
    limits = [value for e in effects for value in (e.ratio, e.low, e.high) if np.isfinite(value) and value > 0]
    ratio_ticks(axes, max([1.02, *(max(value, 1 / value) for value in limits)]) ** 1.08)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(
        "latency with the setting (left: faster). Circles: on average over the other settings.\nDiamonds: interactions, what the two together do beyond that."
    )
    axes.set_title(title)
    keep_ticks_apart(figure, axes)
    return figure
