"""Figures of packets: the waterfall of one, what its CPUs did meanwhile, and which CPU handed packets to which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from rxlab.dataset import stats
from rxlab.errors import RxlabError
from rxlab.show.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SERIES,
    SKY,
    VERMILION,
    microseconds,
    new_axes,
    styled,
)
from rxlab.stages import ORDER, PATH_KINDS, STAGE_INDEX


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


@styled
def plot_packet(tree: xr.DataTree, packet: int | None = None) -> Figure:
    """Draw the waterfall of one packet: what did it wait for, and on which CPU? By default the packet of median latency."""
    row = typical_packet(tree) if packet is None else packet
    steps = packet_steps(tree, row)
    cpus = sorted({step["cpu"] for step in steps})
    colour = {cpu: SERIES[index % len(SERIES)] for index, cpu in enumerate(cpus)}
    figure, axes = new_axes(8.2, 0.3 * len(steps) + 1.2)
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


@styled
def plot_steering(tree: xr.DataTree) -> Figure:
    """Draw which CPU handed packets to which: from the CPU they entered on, to the stack's, to the reader's."""
    packets = tree["packets"].to_dataset()
    rows = stats.usable(packets)
    entered, first = np.full(len(rows), -1, np.int16), packets["t0_stage"].values
    for stage in np.unique(first[first >= 0]):  # one column at a time: a run may be larger than memory
        entered = np.where(first == stage, packets["cpu"].isel(stage=int(stage)).values, entered)
    stack, reader = packets["cpu"].sel(stage="netif_receive_skb").values, packets["reader_cpu"].values
    n_cpus = int(max(column.max(initial=0) for column in (entered, stack, reader))) + 1
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


# Trace flags of an event (include/linux/trace_events.h): raised inside a hard interrupt, inside a softirq.
IN_HARDIRQ, IN_SOFTIRQ = 0x08, 0x10


def cpu_activity(events: Mapping[str, Any], start_ns: int, stop_ns: int) -> dict[int, dict[str, list[Any]]]:
    """Return what each CPU did in a window of the recording.

    Parameters
    ----------
    events : mapping of str to Columns
        A recording's events (``run.perf.events``); ``sched:sched_switch`` is needed for tasks, others are optional.
    start_ns, stop_ns : int, CLOCK_MONOTONIC

    Returns
    -------
    dict
        CPU -> ``tasks``: (start, stop, comm, tid), tid 0 idle; ``softirqs``: (start, stop) of NET_RX, the stop being the last event
        seen inside it (its end has no event of its own); ``wakeups``: (time, woken tid, CPU it will run on).
    """
    found: dict[int, dict[str, list[Any]]] = {}

    def of(cpu: int) -> dict[str, list[Any]]:
        return found.setdefault(int(cpu), {"tasks": [], "softirqs": [], "wakeups": []})

    if (switches := events.get("sched:sched_switch")) is not None and switches.n:
        for cpu in np.unique(switches["cpu"]):
            rows = np.flatnonzero(switches["cpu"] == cpu)
            at = switches["time"][rows]
            first = max(int(np.searchsorted(at, start_ns, side="right")) - 1, 0)
            last = int(np.searchsorted(at, stop_ns))
            ends = np.append(at, stop_ns)
            for k in range(first, last):
                comm = switches["next_comm"][rows[k]].decode(errors="replace")
                begin, end = max(int(at[k]), start_ns), min(int(ends[k + 1]), stop_ns)
                of(cpu)["tasks"].append((begin, end, comm, int(switches["next_pid"][rows[k]])))
    if (entries := events.get("irq:softirq_entry")) is not None:
        inside = [_in_softirq(columns, start_ns, stop_ns) for columns in events.values() if columns.n]
        time, cpus = (np.concatenate(parts) for parts in zip(*inside, strict=True))
        chosen = (entries["vec"] == 3) & (entries["time"] >= start_ns) & (entries["time"] <= stop_ns)
        for at, cpu in zip(entries["time"][chosen].tolist(), entries["cpu"][chosen].tolist(), strict=True):
            same = entries["time"][(entries["cpu"] == cpu) & (entries["time"] > at)]
            until = min(int(same.min(initial=stop_ns)), stop_ns)
            seen = time[(cpus == cpu) & (time >= at) & (time < until)]
            of(cpu)["softirqs"].append((at, int(seen.max(initial=at))))
    if (waking := events.get("sched:sched_waking")) is not None:
        chosen = (waking["time"] >= start_ns) & (waking["time"] <= stop_ns)
        for row in np.flatnonzero(chosen):
            event = (int(waking["time"][row]), int(waking["field_pid"][row]), int(waking["target_cpu"][row]))
            of(waking["cpu"][row])["wakeups"].append(event)
    return found


def _in_softirq(columns: Any, start_ns: int, stop_ns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return time and CPU of the events raised inside a softirq, and not in an interrupt of it, in the window."""
    if "common_flags" not in columns:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    flags = columns["common_flags"]
    chosen = (columns["time"] >= start_ns) & (columns["time"] <= stop_ns)
    chosen &= ((flags & IN_SOFTIRQ) != 0) & ((flags & IN_HARDIRQ) == 0)
    return columns["time"][chosen].astype(np.int64), columns["cpu"][chosen].astype(np.int64)


@styled
def plot_timeline(tree: xr.DataTree, events: Mapping[str, Any], packet: int | None = None) -> Figure:
    """Draw what the CPUs did around a packet: tasks, network softirqs, wakeups, and the packet's own stages.

    Parameters
    ----------
    tree : xarray.DataTree
        The run.
    events : mapping
        Its recording's events, ``run.perf.events``.
    packet : int, optional
        Row of /packets; by default the packet of median latency.
    """
    row = typical_packet(tree) if packet is None else packet
    steps = packet_steps(tree, row)
    packets = tree["packets"].to_dataset().isel(packet=row)
    offset = int(tree["clocks"]["axis_offset"])
    origin = int(packets["time"].values.view(np.int64)[STAGE_INDEX[steps[0]["stage"]]]) - offset
    length = steps[-1]["start_ns"] + steps[-1]["latency_ns"]
    start, stop = int(origin - 0.12 * length - 500), int(origin + 1.12 * length + 500)
    activity = cpu_activity(events, start, stop)
    cpus = sorted({*activity, *(step["cpu"] for step in steps)})
    reader = int(packets["tid"])
    lane = {cpu: index for index, cpu in enumerate(cpus)}
    figure, axes = new_axes(8.2, 1.25 * len(cpus) + 1.5)

    def us(t: float) -> float:
        return (t - origin) / 1e3

    for cpu, did in activity.items():
        for begin, end, comm, tid in did["tasks"]:
            colour = GREEN if tid == reader else "white" if tid == 0 else FAINT
            axes.broken_barh(
                [(us(begin), us(end) - us(begin))],
                (lane[cpu] + 0.1, 0.22),
                facecolor=colour,
                edgecolor=GREY,
                linewidth=0.5,
            )
            if end - begin > 0.012 * len(comm) * (stop - start):
                ink = "white" if tid == reader else INK
                text = "idle" if tid == 0 else comm
                axes.text(
                    us((begin + end) / 2), lane[cpu] + 0.21, text, ha="center", va="center", fontsize=7, color=ink
                )
        for begin, end in did["softirqs"]:
            axes.broken_barh(
                [(us(begin), max(us(end) - us(begin), 0.004 * us(origin + length)))],
                (lane[cpu] - 0.16, 0.2),
                facecolor=SKY,
                edgecolor=BLUE,
                linewidth=0.6,
            )
        for at, tid, target in did["wakeups"]:
            if tid == reader and target in lane:
                axes.annotate(
                    "",
                    (us(at), lane[target] + 0.1),
                    (us(at), lane[cpu] + 0.04),
                    arrowprops={"arrowstyle": "-|>", "color": ORANGE, "linewidth": 1.4},
                )
    _mark_stages(axes, steps, lane)
    axes.set_yticks([index + 0.02 for index in range(len(cpus))], [f"CPU {cpu}" for cpu in cpus])
    axes.set_ylim(len(cpus) - 0.45, -0.75)
    axes.set_xlim(us(start), us(stop))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"time since {steps[0]['stage']} (µs)")
    for colour, text in (
        (SKY, "NET_RX softirq, as far as seen"),
        (GREEN, "the reader runs"),
        (FAINT, "another task runs"),
    ):
        axes.bar(0, 0, color=colour, label=text)
    axes.plot([], [], color=ORANGE, marker=">", label="wakes the reader")
    axes.plot([], [], color=VERMILION, label="the packet's way")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        columnspacing=1.2,
        handlelength=1.2,
    )
    axes.set_title(f"Packet {row}: what the CPUs did in its {microseconds(length)}")
    return figure


def _mark_stages(axes: Any, steps: list[dict[str, Any]], lane: Mapping[int, int]) -> None:
    """Draw the packet's way from CPU to CPU, and the names of its stages; of stages too close to tell, the first and last."""
    at = [(step["start_ns"] + step["latency_ns"]) / 1e3 for step in steps]
    height = [lane[step["cpu"]] - 0.26 for step in steps]
    axes.plot(at, height, color=VERMILION, linewidth=1.1, marker="o", markersize=3, zorder=4)
    close = 0.03 * at[-1]
    groups: list[list[int]] = []
    for index in range(len(steps)):
        if groups and height[index] == height[index - 1] and at[index] - at[groups[-1][-1]] < close / 3:
            groups[-1].append(index)
        else:
            groups.append([index])
    for number, group in enumerate(groups):
        names = [steps[index]["stage"] for index in group]
        text = (
            names[0] if len(names) == 1 else " … ".join((names[0], names[-1])) if len(names) > 2 else ", ".join(names)
        )
        x = at[group[0]]
        above = 0.07 + 0.11 * (number % 3)  # neighbours are close: three rows of names
        side = "left" if x < close else "right" if x > at[-1] - close and len(names) > 1 else "center"
        axes.annotate(text, (x, height[group[0]]), (x, height[group[0]] - above), fontsize=6.6, ha=side, va="bottom", color=INK,
                      arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.4})  # fmt: skip
