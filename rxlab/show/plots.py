"""Dataset -> Figure, one question each.

Every function returns a :class:`matplotlib.figure.Figure` and touches no global state, so the same figure goes into a
notebook, a report and a paper; millions of packets are aggregated before they are drawn. Figures of packets are in
packetplots.py, of whole sweeps in sweepplots.py, and are found here too; the look is style.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from rxlab.dataset import explain, stats
from rxlab.dataset.aggregate import tail_curve
from rxlab.dataset.stats import Comparison
from rxlab.show.packetplots import packet_steps as packet_steps
from rxlab.show.packetplots import plot_packet as plot_packet
from rxlab.show.packetplots import plot_steering as plot_steering
from rxlab.show.packetplots import plot_timeline as plot_timeline
from rxlab.show.packetplots import typical_packet as typical_packet
from rxlab.show.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINE_INCHES,
    ORANGE,
    PURPLE,
    SERIES,
    SKY,
    VERMILION,
    YELLOW,
    keep_ticks_apart,
    log_ticks,
    new_axes,
    quantile_words,
    ratio_ticks,
    row_height,
    styled,
    told_apart,
    wrapped,
)
from rxlab.show.style import microseconds as microseconds
from rxlab.show.sweepplots import plot_effects as plot_effects
from rxlab.show.sweepplots import plot_heatmap as plot_heatmap
from rxlab.show.sweepplots import plot_ranks as plot_ranks

PHASES: dict[str, tuple[tuple[str, ...], str]] = {
    "interrupt and softirq": (("hardirq", "softirq_raise", "softirq", "driver_rx"), SKY),
    "RPS to another CPU": (("rps_ipi",), VERMILION),
    "protocol stack": (("netif_receive_skb", "tcp_rcv", "data_ready"), BLUE),
    "wake-up and run queue": (("waking", "wakeup", "switch_in"), ORANGE),
    "copy and return": (("copy", "recvmsg"), GREEN),
}
PHASE_OF = {hop: phase for phase, (hops, _) in PHASES.items() for hop in hops}


@styled
def plot_stage_bars(
    configurations: Mapping[str, Sequence[xr.DataTree]], *, quantile: float = 0.5, title: str | None = None
) -> Figure:
    """Draw where the time of the median packet goes, per configuration; segments add up to the quantile of total latency."""
    tables = {
        label: np.mean([explain.contributions(tree, quantile).values for tree in trees], axis=0)
        for label, trees in configurations.items()
    }
    hops = [str(hop) for hop in explain.contributions(next(iter(configurations.values()))[0], quantile)["hop"].values]
    names = wrapped(tables)
    figure, axes = new_axes(8.2, row_height(names, 0.62) * len(tables) + 1.5)
    widest = max(float(table.sum()) for table in tables.values())
    for line, table in enumerate(tables.values()):
        left = 0.0
        for phase, (members, colour) in PHASES.items():
            for hop in members:
                size = float(table[hops.index(hop)])
                axes.barh(
                    line,
                    size / 1e3,
                    left=left / 1e3,
                    color=colour,
                    edgecolor="white",
                    linewidth=0.8,
                    height=0.66,
                    label=phase if line == 0 and hop == members[0] else None,
                )
                # A name needs about 0.9 % of the width per letter; a number alone 4 %.
                text = (
                    f"{hop}\n{size / 1e3:.2f}"
                    if size > 0.009 * len(hop) * widest
                    else f"{size / 1e3:.2f}"
                    if size > 0.04 * widest
                    else ""
                )
                ink = "white" if colour in (BLUE, GREEN, VERMILION) else INK
                axes.text((left + size / 2) / 1e3, line, text, ha="center", va="center", fontsize=6.8, color=ink)
                left += size
        axes.annotate(
            microseconds(left),
            (left / 1e3, line),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
        )
    axes.set_yticks(range(len(tables)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, widest / 1e3 * 1.12)
    axes.set_xlabel("latency from the first kernel stage (µs)")
    axes.grid(axis="y", visible=False)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        columnspacing=1.2,
        handlelength=1.2,
    )
    axes.set_title(f"Where the time of the {quantile_words(quantile)} packet goes" if title is None else title)
    return figure


@styled
def plot_difference(explanation: xr.Dataset, *, a: str = "A", b: str = "B") -> Figure:
    """Draw which hops carry the difference between two configurations (:func:`rxlab.dataset.explain.explain`)."""
    hops = [
        str(hop) for hop in explanation["hop"].values if explanation["a"].sel(hop=hop) or explanation["b"].sel(hop=hop)
    ]
    part = explanation.sel(hop=hops)
    size = part["difference"].values / 1e3
    figure, axes = new_axes(8.2, 0.27 * len(hops) + 1.2)
    axes.barh(range(len(hops)), size, color=[VERMILION if value > 0 else BLUE for value in size], height=0.62)
    low, high = part["low"].values / 1e3, part["high"].values / 1e3
    known = ~np.isnan(low)
    if known.any():
        axes.hlines(np.flatnonzero(known), low[known], high[known], color=INK, linewidth=1.1)
    for line, value in enumerate(size):
        outer = np.nanmax([value, high[line]]) if value >= 0 else np.nanmin([value, low[line]])
        axes.annotate(
            f"{value:+.2f}",
            (outer, line),
            xytext=(5 if value >= 0 else -5, 0),
            textcoords="offset points",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=8.5,
        )
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.margins(x=0.14)
    axes.set_yticks(range(len(hops)), hops)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    (label,) = wrapped([f"{b} minus {a} (µs); negative: {b} is faster"], width=100)
    axes.set_xlabel(label)
    words = quantile_words(float(explanation.attrs.get("quantile", 0.5)))
    axes.set_title(f"Hops behind the difference of the {words}: {float(explanation['total']) / 1e3:+.2f} µs in all")
    return figure


@styled
def plot_ecdf(
    series: Mapping[str, Sequence[np.ndarray]], *, title: str = "Latency of all packets", xlabel: str = "latency (µs)"
) -> Figure:
    """Draw the distribution down into its tail, one line per run, one colour per configuration.

    Parameters
    ----------
    series : mapping of str to sequence of float64 arrays, ns
        Configuration -> its runs.
    """
    names = wrapped(series)
    # The legend lies in the plot: beyond some lines the plot grows with it.
    lines = sum(name.count("\n") + 1 for name in names)
    figure, axes = new_axes(8.2, 3.9 + LINE_INCHES * max(lines - 8, 0))
    for index, (label, runs) in enumerate(zip(names, series.values(), strict=True)):
        for number, values in enumerate(run[~np.isnan(run)] for run in runs):
            if len(values):
                latency, above = tail_curve(values)
                axes.plot(latency / 1e3, above, color=SERIES[index % len(SERIES)], alpha=0.9 if len(runs) == 1 else 0.65, linewidth=1.7 if len(runs) == 1 else 1.1,
                          label=None if number else f"{label}" + (f" ({len(runs)} runs)" if len(runs) > 1 else ""))  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-6), top=1.25)
    levels = [1.0, 0.5, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6]
    axes.set_yticks([level for level in levels if level >= axes.get_ylim()[0]])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda level, _: "all" if level == 1 else f"p{100 * (1 - level):.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    log_ticks(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("quantile (packets above)")
    axes.legend(loc="upper right")
    axes.set_title(title)
    keep_ticks_apart(figure, axes)
    return figure


@styled
def plot_comparison(
    comparisons: Sequence[Comparison], *, a: str = "A", b: str = "B", title: str = "Is it faster?"
) -> Figure:
    """Draw the ratios B / A with their intervals: does the interval leave out 1?"""
    figure, axes = new_axes(8.2, 0.42 * len(comparisons) + 1.25)
    colours = {stats.BETTER: GREEN, stats.WORSE: VERMILION, stats.CANNOT_TELL: GREY}
    limits = [value for c in comparisons for value in (c.ratio_low, c.ratio_high, c.ratio) if np.isfinite(value)]
    # Intervals may leave the axis, which an arrow shows; points may not.
    reach = max(1.02, *(max(value, 1 / max(value, 1e-3)) for value in limits))
    edge = max(min(reach, 20.0), *(max(c.ratio, 1 / max(c.ratio, 1e-9)) for c in comparisons)) ** 1.12
    for line, c in enumerate(comparisons):
        colour = colours[c.verdict]
        if np.isfinite(c.ratio_low):
            axes.hlines(line, max(c.ratio_low, 1 / edge), min(c.ratio_high, edge), color=colour, linewidth=3.2)
        for at, mark, is_out in ((1 / edge, "<", c.ratio_low < 1 / edge), (edge, ">", c.ratio_high > edge)):
            if is_out:
                axes.plot(at, line, mark, color=colour, clip_on=False, markersize=9)
        axes.plot(c.ratio, line, "o", color=colour, markersize=8, markeredgecolor="white")
        axes.annotate(
            f"{' → '.join(told_apart([c.a, c.b]))}, {c.verdict}",
            (1.01, line),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.8,
        )
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
    ratio_ticks(axes, edge)
    axes.set_yticks(range(len(comparisons)), [quantile_words(c.quantile) for c in comparisons])
    axes.grid(axis="y", visible=False)
    (label,) = wrapped([f"latency of {b} against {a} (left: {b} is faster)"], width=84)
    axes.set_xlabel(label)
    axes.set_title(title)
    keep_ticks_apart(figure, axes)
    return figure


@styled
def plot_coverage(coverage: xr.Dataset, *, title: str = "Coverage: of how many packets each stage was seen") -> Figure:
    """Draw of how many packets each stage was seen, and why not of the others."""
    rows = [str(s) for s in coverage["stage"].values if int(coverage["expected"].sel(stage=s))]
    part = coverage.sel(stage=rows)
    expected = part["expected"].values
    causes = [str(c) for c in coverage["cause"].values if int(part["missing"].sel(cause=c).sum())]
    figure, axes = new_axes(8.2, 0.26 * len(rows) + 1.3)
    lines = np.arange(len(rows))
    left = part["matched"].values / np.maximum(expected, 1)
    axes.barh(lines, left, color=GREEN, height=0.66, label="seen")
    for index, cause in enumerate(causes):
        share = part["missing"].sel(cause=cause).values / np.maximum(expected, 1)
        axes.barh(
            lines,
            share,
            left=left,
            color=(VERMILION, ORANGE, PURPLE, GREY, YELLOW, SKY)[index % 6],
            height=0.66,
            label=cause,
        )
        left = left + share
    for line, stage in enumerate(rows):
        matched, needed = int(part["matched"].sel(stage=stage)), int(part["expected"].sel(stage=stage))
        axes.annotate(f"{matched:,} of {needed:,}", (1, line), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
    axes.set_yticks(lines, rows)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("packets that require the stage")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    axes.set_title(title)
    return figure


@styled
def plot_clock(tree: xr.DataTree, *, windows: int = 200) -> Figure:
    """Draw capture stamp minus the event it is taken at over time: do the two clocks stay on one axis?"""
    packets, clocks = tree["packets"].to_dataset(), tree["clocks"].to_dataset()
    position = str(clocks["stamp_position"].values)
    stage = {"bracket": "driver_rx", "tap": "netif_receive_skb"}.get(position, "netif_receive_skb")
    stamp, event = packets["pcap_time"].values, packets["time"].sel(stage=stage).values
    known = ~np.isnat(stamp) & ~np.isnat(event)
    figure, axes = new_axes(8.2, 3.0)
    axes.set_title(f"Capture stamp minus {stage} (stamp position: {position})")
    axes.set_xlabel("time since the first packet (s)")
    if not known.any():
        axes.text(0.5, 0.5, "no matched packet", transform=axes.transAxes, ha="center")
        return figure
    residual = (stamp[known].view(np.int64) - event[known].view(np.int64)).astype(np.float64)
    since = (stamp[known].view(np.int64) - stamp[known].view(np.int64).min()) / 1e9
    order = np.argsort(since, kind="stable")
    parts = np.array_split(order, min(windows, max(len(order) // 5, 1)))
    time = np.array([since[rows].mean() for rows in parts])
    low, middle, high = (
        np.array([np.quantile(residual[rows], level) for rows in parts]) for level in (0.01, 0.5, 0.99)
    )
    axes.fill_between(time, low, high, color=SKY, alpha=0.45, linewidth=0, label="1 % to 99 % of packets")
    axes.plot(time, middle, color=BLUE, label="median")
    # A few stamps taken late would flatten the rest: where peaks are cut, the axis says how high they go.
    top = float(np.quantile(high, 0.95)) * 1.35 + 50
    top, peaks = (
        (top, f"; peaks to {microseconds(high.max())}") if high.max() > 4 * top else (max(top, high.max() * 1.05), "")
    )
    axes.set_ylim(min(0.0, float(np.quantile(low, 0.02))) * 1.1, top)
    axes.set_ylabel("ns" + peaks)
    bound = float(clocks["bound"])
    axes.axhspan(-bound, bound, color=GREY, alpha=0.5, linewidth=0, label=f"error bound of the clocks, ±{bound:.0f} ns")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


@styled
def plot_arms(
    arms: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
    *,
    xlabel: str = "latency seen by the workload (µs)",
    title: str = "What the recording cost: untraced (full) against traced (open)",
) -> Figure:
    """Draw traced against untraced: what did the recording itself cost?

    Parameters
    ----------
    arms : mapping
        Configuration -> arm -> the workload's own latencies of its runs, ns.
    """
    lines = [(label, arm, runs) for label, by_arm in arms.items() for arm, runs in by_arm.items() if runs]
    figure, axes = new_axes(8.2, 0.36 * len(lines) + 1.3)
    marks = {0.5: "o", 0.9: "s", 0.99: "D"}
    for line, (_, arm, runs) in enumerate(lines):
        for index, (level, mark) in enumerate(marks.items()):
            estimate = stats.estimate_quantile(runs, level)
            axes.plot(estimate.value / 1e3, line, mark, color=SERIES[index], markersize=6.5, alpha=1 if arm == "untraced" else 0.75, label=quantile_words(level) if line == 0 else None,
                      markerfacecolor=SERIES[index] if arm == "untraced" else "white")  # fmt: skip
            if np.isfinite(estimate.low):
                axes.hlines(line, estimate.low / 1e3, estimate.high / 1e3, color=SERIES[index], linewidth=1.6, zorder=1)
    axes.set_yticks(range(len(lines)), [f"{label}, {arm}" for label, arm, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xscale("log")
    log_ticks(axes)
    axes.set_xlabel(xlabel)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axes.set_title(title)
    return figure
