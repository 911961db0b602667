"""The life of one packet, hop by hop: when, on which CPU, in whose context, in which kernel function, and what recording it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import schema
from rxlab.follow.kernelpath import event_columns, task_ids
from rxlab.read.columns import Columns
from rxlab.show.packetplots import packet_steps
from rxlab.show.style import microseconds
from rxlab.show.text import packets_of, row_of_frame
from rxlab.show.tracecost import event_cost, events_between
from rxlab.stages import STAGE_INDEX, STAGES, STATUS_MEANINGS, SUBSTITUTES

# common_flags of a sample (include/linux/trace_events.h): the task it was taken in was interrupted, not at work.
_HARDIRQ, _SOFTIRQ = 0x08, 0x10
# How long after its last stage a dropped packet's skb is looked for.
FREED_WITHIN_NS = 10_000_000
_WOKEN = ("sched:sched_waking", "sched:sched_wakeup")


@dataclass(frozen=True)
class Hop:
    """One line of a packet's life.

    Attributes
    ----------
    stage, cpu
        The stage the hop ends at, and its CPU.
    since_ns, latency_ns : float
        From the first kernel stage seen, and from the stage before.
    task : str
        Who ran there; empty without the recording.
    events : int
        Events recorded in the hop on its CPUs, -1 without the recording.
    """

    stage: str
    cpu: int
    since_ns: float
    latency_ns: float
    task: str = ""
    events: int = -1


def packet_hops(tree: xr.DataTree, row: int, events: Mapping[str, Columns] | None = None) -> list[Hop]:
    """Return the hops of one packet in the order of its path.

    Parameters
    ----------
    tree : xarray.DataTree
    row : int
        Of /packets.
    events : mapping of str to Columns, optional
        The recording's, on CLOCK_MONOTONIC (``run.events``): tells tasks and what was recorded in each hop.
    """
    steps = packet_steps(tree, row)
    hops = [Hop(s["stage"], s["cpu"], s["start_ns"] + s["latency_ns"], s["latency_ns"]) for s in steps]
    if not events:
        return hops
    packet = tree["packets"].to_dataset().isel(packet=row)
    offset = int(tree["clocks"].to_dataset()["axis_offset"])
    time = packet["time"].values.view(np.int64) - offset
    told, names = [], TaskNames(events)
    before = hops[0]
    for hop in hops:
        start, end = (int(time[STAGE_INDEX[one.stage]]) for one in (before, hop))
        count = events_between(events, start, end, {before.cpu, hop.cpu})
        task = _task_at(events, names, hop, end, int(packet["tid"]))
        told.append(Hop(hop.stage, hop.cpu, hop.since_ns, hop.latency_ns, task, count))
        before = hop
    return told


class TaskNames:
    """Names of the recording's tasks, by the switches that ran them."""

    def __init__(self, events: Mapping[str, Columns]) -> None:
        self._switch = event_columns(events, "sched:sched_switch")
        self._next = task_ids(self._switch, "next_pid")

    def label(self, tid: int, cpu: int) -> str:
        """Return a task as ``comm/tid``; the idle task by its CPU, as the kernel calls it."""
        if tid == 0:
            return f"swapper/{cpu}"
        rows = np.flatnonzero(self._next == tid)
        if not len(rows):
            return f"tid {tid}"
        return f"{bytes(self._switch['next_comm'][rows[-1]]).split(bytes(1))[0].decode('utf-8', 'replace')}/{tid}"


def _task_at(events: Mapping[str, Columns], names: TaskNames, hop: Hop, time: int, reader: int) -> str:
    """Return who ran at a stage: the task, whether an interrupt ran in its place, and whom a wake-up was for."""
    stage = STAGES[STAGE_INDEX[hop.stage]]
    for name in (*stage.events, *(other for event in stage.events for other in SUBSTITUTES.get(event, ()))):
        columns = event_columns(events, name)
        rows = np.flatnonzero((columns["time"] == time) & (columns["cpu"] == hop.cpu))
        if not len(rows):
            continue
        row = int(rows[0])
        if name == "sched:sched_switch":
            return names.label(int(task_ids(columns, "next_pid")[row]), hop.cpu)
        told = names.label(int(columns["tid"][row]), hop.cpu)
        flags = int(columns["common_flags"][row]) if "common_flags" in columns else 0
        told += " (hard irq)" if flags & _HARDIRQ else " (softirq)" if flags & _SOFTIRQ else ""
        if name in _WOKEN and reader >= 0:
            told += f" wakes {names.label(reader, hop.cpu)}"
        return told
    return ""


def run_packet_life(run: Any, frame: int) -> str:
    """Return the life of a packet of a :class:`rxlab.Run`, with what its recording tells where that is at hand."""
    tree = run.tree
    if not run.is_traced:
        return packet_life(tree, frame)
    packet = packets_of(tree).isel(packet=row_of_frame(tree, frame))
    times = packet["time"].values[~np.isnat(packet["time"].values)].view(np.int64)
    if not len(times):
        return packet_life(tree, frame)
    offset = int(tree["clocks"].to_dataset()["axis_offset"])
    return packet_life(
        tree, frame, run.events_around(int(times.min()) - offset, int(times.max()) - offset + FREED_WITHIN_NS)
    )


def packet_life(tree: xr.DataTree, frame: int, events: Mapping[str, Columns] | None = None) -> str:
    """Return the life of one packet hop by hop: time, cost of recording, CPU, task, kernel function and file, and how it ended."""
    row = row_of_frame(tree, frame)
    everything = packets_of(tree)
    packets = everything.isel(packet=row)
    lines = [*_head(tree, everything, packets, frame), ""]
    if int(packets["t0_stage"]) < 0 or np.isnat(packets["time"].values).all():
        return "\n".join(
            [*lines, *_end(tree, packets, "", events), "No stage of this packet was seen: the status says why."]
        )
    hops = packet_hops(tree, row, events)
    cost = event_cost(events) if events else float("nan")
    width = max(4, *(len(hop.task) for hop in hops))
    lines.append(
        f"{'since first':>12} {'this hop':>10} {'recording':>10}  cpu  {'stage':<18} {'task':<{width}} kernel function (file)"
    )
    for number, hop in enumerate(hops):
        stage = STAGES[STAGE_INDEX[hop.stage]]
        lines.append(
            f"{microseconds(hop.since_ns):>12} {microseconds(hop.latency_ns):>10} {_cost(hop, cost) if number else '':>10}  "
            f"{hop.cpu:>3}  {hop.stage:<18} {hop.task:<{width}} {stage.function} ({stage.source})"
        )
    lines += _end(tree, packets, hops[-1].stage, events)
    return "\n".join([*lines, "", _cost_words(hops, cost)])


def _head(tree: xr.DataTree, everything: xr.Dataset, packets: xr.Dataset, frame: int) -> list[str]:
    """Return what the packet is, what became of it, who read it."""
    flow, tid = int(packets["flow"]), int(packets["tid"])
    label = str(tree["flows"].to_dataset()["label"].values[flow]) if flow >= 0 else "no flow"
    trusted = (
        ""
        if "trusted" not in packets or not packets["is_data"]
        else ", trusted"
        if packets["trusted"]
        else ", not trusted"
    )
    reader = f", tid {tid} ({_word(everything, packets, 'comm')})" if tid >= 0 else ", no reader seen"
    slept = _slept(packets)
    return [
        f"frame {frame}  {label}  {int(packets['wire_len'])} bytes on the wire, {int(packets['payload_len'])} payload",
        f"status {_word(everything, packets, 'status')}{trusted}, path {_word(everything, packets, 'path_kind')}, "
        f"reader {_word(everything, packets, 'attribution')}{reader}",
        *_meaning(everything, packets),
        *_handshake(everything, packets),
        *([slept] if slept else []),
        *_forwarded(packets),
        *_steering(everything, packets),
        *_sender(everything, packets),
    ]


def _meaning(everything: xr.Dataset, packets: xr.Dataset) -> list[str]:
    """Return what the status means, unless nothing is wrong or other lines tell more."""
    status = _word(everything, packets, "status")
    is_told = status in ("complete", "handshake", "dropped") or status not in STATUS_MEANINGS
    return [] if is_told else [f"{status}: {STATUS_MEANINGS[status]}"]


def _forwarded(packets: xr.Dataset) -> list[str]:
    """Return by how many devices the host handed the packet on to itself."""
    times = int(packets["forwards"]) if "forwards" in packets else 0
    by = "another device" if times == 1 else f"{times} other devices"
    return [f"forwarded: it came in again by {by} of this host before its socket"] if times else []


def _sender(everything: xr.Dataset, packets: xr.Dataset) -> list[str]:
    """Return when the packet left its sender, as the interval that two hosts' clocks leave open."""
    if "crossing" not in packets:
        return []
    how = _word(everything, packets, "crossing")
    least, most = float(packets["oneway_min"]), float(packets["oneway_max"])
    if not np.isfinite(least):
        return [f"the sender's capture does not say when it left: {how}"]
    words = {
        "segment": ", as part of a larger frame",
        "merged": ", in several frames",
        "ambiguous": "; its bytes were sent several times",
    }.get(how, "")
    frame = f" (its frame {int(packets['sender_frame'])})" if int(packets["sender_frame"]) else ""
    when = (
        f"between {microseconds(least)} and {microseconds(most)}"
        if np.isfinite(most)
        else f"at least {microseconds(least)}"
    )
    return [f"left the sender{frame} {when} before its stamp in this capture{words}"]


def _handshake(everything: xr.Dataset, packets: xr.Dataset) -> list[str]:
    """Return a packet's part in the set-up of its connection, and when that was established and accepted."""
    if "handshake" not in packets or not int(packets["handshake"]):
        return []
    told = f"handshake: {_word(everything, packets, 'handshake')}"
    if int(packets["socket"]):
        told += f", listener {int(packets['socket']):#x}"
    for name in ("established", "accept"):
        stage = int(packets["t0_stage"])
        if stage >= 0 and not np.isnat(packets[f"{name}_time"].values):
            after = int((packets[f"{name}_time"].values - packets["time"].values[stage]).astype(np.int64))
            told += f", {'accepted' if name == 'accept' else name} {microseconds(after)} after the first stage below"
    return [told]


def _slept(packets: xr.Dataset) -> str:
    """Return since when the reader slept before this packet ran it, against the packet's first kernel stage."""
    if "sleep_time" not in packets or np.isnat(packets["sleep_time"].values) or int(packets["t0_stage"]) < 0:
        return ""
    first = packets["time"].values[int(packets["t0_stage"])]
    before = int((first - packets["sleep_time"].values).astype(np.int64))
    when = f"{microseconds(before)} before" if before >= 0 else f"{microseconds(-before)} after"
    return f"its reader had gone to sleep on cpu {int(packets['sleep_cpu'])}, {when} the first stage below"


def _steering(everything: xr.Dataset, packets: xr.Dataset) -> list[str]:
    """Return where the packet was steered, where RPS alone would have sent it, and whether its reader was there."""
    if "rfs_delivered" not in packets:
        return []
    told = []
    if int(packets["rps_predicted"]) >= 0:
        told.append(f"RPS by its hash: cpu {int(packets['rps_predicted'])}")
    if int(packets["last_read_cpu"]) >= 0:
        told.append(
            f"socket last read on cpu {int(packets['last_read_cpu'])}: {_word(everything, packets, 'rfs_delivered')}"
        )
    stack = int(packets["cpu"].values[STAGE_INDEX["netif_receive_skb"]])
    return ["steering: " + ", ".join([f"stack on cpu {stack}", *told])] if told and stack >= 0 else []


def _word(everything: xr.Dataset, packets: xr.Dataset, name: str) -> str:
    return schema.meanings(everything[name]).get(int(packets[name]), "?")


def _end(tree: xr.DataTree, packets: xr.Dataset, last: str, events: Mapping[str, Columns] | None) -> list[str]:
    """Return how a packet that nobody read ended: its last stage, the kernel's reason, and when and where it freed the skb."""
    everything = packets_of(tree)
    if _word(everything, packets, "status") != "dropped":
        return []
    reason = _word(everything, packets, "drop_reason") if "drop_reason" in packets else "?"
    after = f"after {last}" if last else "before any stage that was seen"
    return [
        f"{'DROPPED':>12} {after}: the kernel freed it and said {reason} (kfree_skb, net/core/skbuff.c)"
        f"{_freed_at(tree, packets, last, events or {})}"
    ]


def _freed_at(tree: xr.DataTree, packets: xr.Dataset, last: str, events: Mapping[str, Columns]) -> str:
    """Return when, where and by whom a dropped packet's skb was freed, empty where the recording is not at hand."""
    freed = event_columns(events, "skb:kfree_skb")
    if not last or "skbaddr" not in freed:
        return ""
    offset = int(tree["clocks"].to_dataset()["axis_offset"])
    since = int(packets["time"].values[STAGE_INDEX[last]].view(np.int64)) - offset
    is_near = (freed["time"] >= since) & (freed["time"] <= since + FREED_WITHIN_NS)
    rows = np.flatnonzero(is_near & (freed["skbaddr"].astype(np.uint64) == np.uint64(packets["skb"])))
    if not len(rows):
        return ""
    row = rows[np.argmin(freed["time"][rows])]
    cpu = int(freed["cpu"][row])
    who = TaskNames(events).label(int(freed["tid"][row]), cpu)
    return f", {microseconds(float(freed['time'][row] - since))} later on cpu {cpu} in {who}"


def _cost(hop: Hop, cost: float) -> str:
    """Return what recording cost a hop, at most all of it; empty without the recording."""
    if hop.events < 0:
        return ""
    return microseconds(min(hop.events * cost, hop.latency_ns)) if np.isfinite(cost) else f"{hop.events} events"


def _cost_words(hops: list[Hop], cost: float) -> str:
    counted = sum(hop.events for hop in hops[1:])
    if hops[0].events < 0 or not np.isfinite(cost):
        return f"{len(hops)} stages, each an event that costs about 0.5 to 0.7 us to record, which these times include."
    total = sum(min(hop.events * cost, hop.latency_ns) for hop in hops[1:])
    share = 100 * total / max(hops[-1].since_ns, 1.0)
    return (
        f"recording: {counted} events on these CPUs meanwhile, {microseconds(cost)} each (the closest two of one CPU are that far "
        f"apart): about {microseconds(total)}, {share:.0f} % of the time above."
    )
