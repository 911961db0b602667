"""Dataset -> Figure, one question each.

Every function returns a :class:`matplotlib.figure.Figure` and touches no global state, so the same figure goes into a
notebook, a report and a paper. Colours are Okabe and Ito's (told apart by colour-blind readers and in grey print); millions of
packets are aggregated before they are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from rxlab.dataset import explain, stats
from rxlab.dataset.aggregate import tail_curve
from rxlab.dataset.stats import Comparison
from rxlab.errors import RxlabError
from rxlab.stages import ORDER, PATH_KINDS, STAGE_INDEX

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#8A8F98",
)  # fmt: skip
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
INK, FAINT = "#1F2933", "#D5DAE1"

# What a hop is about, by the stage it ends at: (phase, colour), in the order of the path.
PHASES: dict[str, tuple[tuple[str, ...], str]] = {
    "interrupt and softirq": (("hardirq", "softirq_raise", "softirq", "driver_rx"), SKY),
    "RPS to another CPU": (("rps_ipi",), VERMILION),
    "protocol stack": (("netif_receive_skb", "tcp_rcv", "data_ready"), BLUE),
    "wake-up and run queue": (("waking", "wakeup", "switch_in"), ORANGE),
    "copy and return": (("copy", "recvmsg"), GREEN),
}
PHASE_OF = {hop: phase for phase, (hops, _) in PHASES.items() for hop in hops}

STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "legend.frameon": False, "figure.facecolor": "white", "savefig.facecolor": "white", "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True, "figure.constrained_layout.w_pad": 0.09, "figure.constrained_layout.h_pad": 0.06,
}  # fmt: skip


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _log_ticks(axes: Axes) -> None:
    """Label a logarithmic x axis with plain numbers, as densely as its span allows."""
    low, high = axes.get_xlim()
    steps = (
        (1.0, 2.0, 5.0)
        if high / low > 8
        else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
        if high / low > 2
        else tuple(np.arange(10, 100) / 10)
    )
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=15))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


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


def typical_packet(tree: xr.DataTree, quantile: float = 0.5) -> int:
    """Return the row of the usable packet whose total latency is the given quantile of the run's."""
    rows = np.flatnonzero(stats.usable(tree["packets"].to_dataset()))
    totals = tree["hops"].to_dataset()["latency"].sel(hop="total_latency").values[rows]
    rows, totals = rows[~np.isnan(totals)], totals[~np.isnan(totals)]
    if not len(rows):
        raise RxlabError("no complete packet to show", expected="a traced run with complete data packets")
    order = np.argsort(totals, kind="stable")
    return int(rows[order[min(int(quantile * len(rows)), len(rows) - 1)]])


def packet_steps(tree: xr.DataTree, packet: int) -> list[dict[str, Any]]:
    """Return the steps of one packet in the order of its path.

    Returns
    -------
    list of dict
        ``stage``, ``start_ns`` and ``latency_ns`` (float, from the first kernel stage seen), ``cpu`` (int) of each seen stage; the first has latency 0.
    """
    packets = tree["packets"].to_dataset().isel(packet=packet)
    time = packets["time"].values.view(np.int64)
    kind = PATH_KINDS[int(packets["path_kind"])]
    first = int(packets["t0_stage"])
    seen = [name for name in ORDER[kind] if not np.isnat(packets["time"].values[STAGE_INDEX[name]])]
    if first < 0 or not seen:
        raise RxlabError("no stage of this packet was seen", where=f"packet {packet}")
    origin = int(time[first])
    steps = []
    before = int(time[STAGE_INDEX[seen[0]]])
    for name in seen:
        at = int(time[STAGE_INDEX[name]])
        steps.append(
            {
                "stage": name,
                "start_ns": float(before - origin),
                "latency_ns": float(at - before),
                "cpu": int(packets["cpu"].values[STAGE_INDEX[name]]),
            }
        )
        before = at
    return steps


@_styled
def plot_packet(tree: xr.DataTree, packet: int | None = None) -> Figure:
    """Draw the waterfall of one packet: what did it wait for, and on which CPU? By default the packet of median latency."""
    row = typical_packet(tree) if packet is None else packet
    steps = packet_steps(tree, row)
    cpus = sorted({step["cpu"] for step in steps})
    colour = {cpu: SERIES[index % len(SERIES)] for index, cpu in enumerate(cpus)}
    figure, axes = _axes(8.2, 0.3 * len(steps) + 1.2)
    end = steps[-1]["start_ns"] + steps[-1]["latency_ns"]
    for line, step in enumerate(steps):
        axes.barh(line, step["latency_ns"] / 1e3, left=step["start_ns"] / 1e3, color=colour[step["cpu"]], height=0.62)
        right = (step["start_ns"] + step["latency_ns"]) / 1e3
        axes.plot([right, right], [line - 0.31, line + 0.31], color=INK, linewidth=1.4)
        if line:
            text = "+" + microseconds(step["latency_ns"])
            axes.annotate(text, (right, line), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(range(len(steps)), [step["stage"] for step in steps])
    axes.invert_yaxis()
    axes.set_xlim(-0.01 * end / 1e3, end / 1e3 * 1.13)
    axes.set_xlabel("time since the first kernel stage (µs)")
    axes.grid(axis="y", visible=False)
    for cpu in cpus:
        axes.bar(0, 0, color=colour[cpu], label=f"CPU {cpu}")
    axes.legend(loc="upper right", title="stage reached on")
    axes.set_title(f"Packet {row}: {microseconds(end)} from {steps[0]['stage']} to {steps[-1]['stage']}")
    return figure


@_styled
def plot_stage_bars(
    configurations: Mapping[str, Sequence[xr.DataTree]], *, quantile: float = 0.5, title: str | None = None
) -> Figure:
    """Draw where the time of the median packet goes, per configuration; segments add up to the quantile of total latency."""
    tables = {
        label: np.mean([explain.contributions(tree, quantile).values for tree in trees], axis=0)
        for label, trees in configurations.items()
    }
    hops = [str(hop) for hop in explain.contributions(next(iter(configurations.values()))[0], quantile)["hop"].values]
    figure, axes = _axes(8.2, 0.62 * len(tables) + 1.5)
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
    axes.set_yticks(range(len(tables)), list(tables))
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
    axes.set_title(f"Where the time of the {_quantile_words(quantile)} packet goes" if title is None else title)
    return figure


def _quantile_words(quantile: float) -> str:
    return "median" if quantile == 0.5 else f"p{100 * quantile:g}"


@_styled
def plot_difference(explanation: xr.Dataset, *, a: str = "A", b: str = "B") -> Figure:
    """Draw which hops carry the difference between two configurations (:func:`rxlab.dataset.explain.explain`)."""
    hops = [
        str(hop) for hop in explanation["hop"].values if explanation["a"].sel(hop=hop) or explanation["b"].sel(hop=hop)
    ]
    part = explanation.sel(hop=hops)
    size = part["difference"].values / 1e3
    figure, axes = _axes(8.2, 0.27 * len(hops) + 1.2)
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
    axes.set_xlabel(f"{b} minus {a} (µs); negative: {b} is faster")
    words = _quantile_words(float(explanation.attrs.get("quantile", 0.5)))
    axes.set_title(f"Hops behind the difference of the {words}: {float(explanation['total']) / 1e3:+.2f} µs in all")
    return figure


@_styled
def plot_ecdf(
    series: Mapping[str, Sequence[np.ndarray]], *, title: str = "Latency of all packets", xlabel: str = "latency (µs)"
) -> Figure:
    """Draw the distribution down into its tail, one line per run, one colour per configuration.

    Parameters
    ----------
    series : mapping of str to sequence of float64 arrays, ns
        Configuration -> its runs.
    """
    figure, axes = _axes(8.2, 3.9)
    for index, (label, runs) in enumerate(series.items()):
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
    _log_ticks(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("quantile (packets above)")
    axes.legend(loc="upper right")
    axes.set_title(title)
    return figure


@_styled
def plot_comparison(
    comparisons: Sequence[Comparison], *, a: str = "A", b: str = "B", title: str = "Is it faster?"
) -> Figure:
    """Draw the ratios B / A with their intervals: does the interval leave out 1?"""
    figure, axes = _axes(8.2, 0.42 * len(comparisons) + 1.25)
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
            f"{microseconds(c.a)} → {microseconds(c.b)}, {c.verdict}",
            (1.01, line),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.8,
        )
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(1 / edge, edge)
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
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
    axes.set_xticks(ticks, ["same" if t == 1 else name for t, name in zip(ticks, names, strict=True)])
    axes.set_yticks(range(len(comparisons)), [_quantile_words(c.quantile) for c in comparisons])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"latency of {b} against {a} (left: {b} is faster)")
    axes.set_title(title)
    return figure


@_styled
def plot_steering(tree: xr.DataTree) -> Figure:
    """Draw which CPU handed packets to which: from the CPU they entered on, to the stack's, to the reader's."""
    packets = tree["packets"].to_dataset()
    rows = stats.usable(packets)
    cpu = packets["cpu"].values
    entered = cpu[np.arange(len(cpu)), np.maximum(packets["t0_stage"].values, 0)]
    stack, reader = cpu[:, STAGE_INDEX["netif_receive_skb"]], packets["reader_cpu"].values
    n_cpus = int(max(entered.max(initial=0), cpu.max(initial=0), reader.max(initial=0))) + 1
    figure = Figure(figsize=(8.2, 2.9 if n_cpus <= 4 else 3.6 if n_cpus <= 8 else 4.6), layout="constrained")
    panels = (
        ("entered on CPU", entered, "protocol stack on CPU", stack),
        ("protocol stack on CPU", stack, "reader on CPU", reader),
    )
    for index, (left_label, left, right_label, right) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, index)
        known = rows & (left >= 0) & (right >= 0)
        table = np.zeros((n_cpus, n_cpus))
        np.add.at(table, (left[known], right[known]), 1)
        share = table / max(table.sum(), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(share):
            if value and n_cpus <= 16:
                axes.text(
                    column,
                    row,
                    f"{100 * value:.3g} %",
                    ha="center",
                    va="center",
                    color="white" if value > 0.55 else INK,
                    fontsize=9,
                )
        ticks = range(0, n_cpus, max(1, n_cpus // 16))
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.grid(visible=False)
        for edge in np.arange(n_cpus - 1) + 0.5:
            axes.axhline(edge, color="white", linewidth=2)
            axes.axvline(edge, color="white", linewidth=2)
        axes.set_xlabel(right_label)
        axes.set_ylabel(left_label)
        stays = float(np.trace(share)) if known.any() else 0.0
        axes.set_title(f"{100 * stays:.3g} % stay on their CPU")
    return figure


@_styled
def plot_coverage(coverage: xr.Dataset, *, title: str = "Coverage: of how many packets each stage was seen") -> Figure:
    """Draw of how many packets each stage was seen, and why not of the others."""
    rows = [str(s) for s in coverage["stage"].values if int(coverage["expected"].sel(stage=s))]
    part = coverage.sel(stage=rows)
    expected = part["expected"].values
    causes = [str(c) for c in coverage["cause"].values if int(part["missing"].sel(cause=c).sum())]
    figure, axes = _axes(8.2, 0.26 * len(rows) + 1.3)
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


@_styled
def plot_clock(tree: xr.DataTree, *, windows: int = 200) -> Figure:
    """Draw capture stamp minus the event it is taken at over time: do the two clocks stay on one axis?"""
    packets, clocks = tree["packets"].to_dataset(), tree["clocks"].to_dataset()
    position = str(clocks["stamp_position"].values)
    stage = {"bracket": "driver_rx", "tap": "netif_receive_skb"}.get(position, "netif_receive_skb")
    stamp, event = packets["pcap_time"].values, packets["time"].values[:, STAGE_INDEX[stage]]
    known = ~np.isnat(stamp) & ~np.isnat(event)
    figure, axes = _axes(8.2, 3.0)
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


@_styled
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
    figure, axes = _axes(8.2, 0.36 * len(lines) + 1.3)
    marks = {0.5: "o", 0.9: "s", 0.99: "D"}
    for line, (_, arm, runs) in enumerate(lines):
        for index, (level, mark) in enumerate(marks.items()):
            estimate = stats.estimate_quantile(runs, level)
            axes.plot(estimate.value / 1e3, line, mark, color=SERIES[index], markersize=6.5, alpha=1 if arm == "untraced" else 0.75, label=_quantile_words(level) if line == 0 else None,
                      markerfacecolor=SERIES[index] if arm == "untraced" else "white")  # fmt: skip
            if np.isfinite(estimate.low):
                axes.hlines(line, estimate.low / 1e3, estimate.high / 1e3, color=SERIES[index], linewidth=1.6, zorder=1)
    axes.set_yticks(range(len(lines)), [f"{label}, {arm}" for label, arm, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xscale("log")
    _log_ticks(axes)
    axes.set_xlabel(xlabel)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axes.set_title(title)
    return figure
