"""Columns of a recording -> one row per received packet: every stage, the task that read it, and what became of it.

The order is fixed: direction and flows, clock and stamp position, packets <-> skbs, the kernel's half (kernelpath.py), the
reader's half (consumption.py, streams.py, queues.py, wake.py), gates (gates.py), a status for every row. Nothing is dropped:
a packet that cannot be followed is a row that says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rxlab.errors import MissingEventError
from rxlab.follow.asof import AsOf, pick
from rxlab.follow.clockfit import NAT, ClockMap
from rxlab.follow.consumption import Consumption, Segments, receive_events
from rxlab.follow.feeding import Earlier, Fed
from rxlab.follow.handshake import follow_handshakes, with_handshakes
from rxlab.follow.hidden import Hidden, hidden_windows
from rxlab.follow.kernelpath import KernelPath, event_columns, follow_kernel
from rxlab.follow.match import Matched
from rxlab.follow.older import as_on_newer_kernels
from rxlab.follow.pairing import pair_packets, tolerance_of
from rxlab.follow.parts import Followed, Part
from rxlab.follow.queues import consume_datagrams
from rxlab.follow.readerfacts import reader_facts
from rxlab.follow.received import Machine, received_packets
from rxlab.follow.repeats import covered_segments, running_max
from rxlab.follow.stagetable import StageTable
from rxlab.follow.status import (
    TCP,
    TRUSTED,
    UDP,
    Evidence,
    FlowsSoFar,
    drop_reasons,
    give_statuses,
    has_status,
    merged_and_late,
    required_stages,
)
from rxlab.follow.streambounds import confirm_streams
from rxlab.follow.streams import consume_streams
from rxlab.follow.together import beside, side_threads
from rxlab.follow.verdict import REFUSED, Tally, clock_told, give_verdict
from rxlab.follow.wake import Consumed, Since, Wake, attribute, first_wakes
from rxlab.read.columns import Columns
from rxlab.stages import ORDER, PATH_KINDS, STAGE_INDEX

_RX = STAGE_INDEX["netif_receive_skb"]


@dataclass
class Joined:
    """One row per received packet.

    Attributes
    ----------
    time : int64 array, dims (packet, stage), nanoseconds of CLOCK_MONOTONIC
        NaT (smallest int64) where a stage was not seen.
    cpu : int16 array, dims (packet, stage)
        -1 where a stage was not seen.
    packets : Columns, dims (packet,)
        The per-packet variables of docs/schema.md, codes as in stages.py.
    flows : Columns, dims (flow,)
        One per direction of a TCP connection or of another 5-tuple; ``attrs["labels"]`` has their text.
    coverage : Columns, dims (stage,)
        ``expected``, ``matched``, ``doubtful`` (stagetrust.py) and one count per status for the missing.
    clock : ClockMap
    gates : dict
        Name -> ``{"ok", "violations", ...}``.
    verdict : {"trusted", "degraded", "refused"}
    reasons : list of str
        Why the verdict is not "trusted".
    """

    time: np.ndarray
    cpu: np.ndarray
    packets: Columns
    flows: Columns
    coverage: Columns
    clock: ClockMap
    gates: dict[str, Any] = field(default_factory=dict)
    verdict: str = "trusted"
    reasons: list[str] = field(default_factory=list)


def join(
    events: Mapping[str, Columns],
    packets: Columns,
    clock: ClockMap,
    machine: Machine,
    *,
    lost: int = 0,
    lost_records: Columns | None = None,
    damage: tuple[str, ...] = (),
    threads: int = 2,
) -> Joined:
    """Join kernel events and captured packets.

    Parameters
    ----------
    events : mapping of str to Columns
        Tracepoints on CLOCK_MONOTONIC (``perf record -k CLOCK_MONOTONIC``), as :func:`rxlab.read_perfdata` gives them.
    packets : Columns
        As :func:`rxlab.read_pcap` gives them, with software stamps (CLOCK_REALTIME), or with the NIC's where `clock` has
        cross-stamps: then only those received, for the rest of such a file is on another clock.
    clock : ClockMap
    machine : Machine
    lost : int
        Events perf reported as lost.
    lost_records : Columns, optional
        ``PerfData.lost``: where they were lost. Without, anything may be missing anywhere.
    damage : tuple of str
        What is known to be missing from the files themselves; a damaged run is never trusted.
    threads : int, optional
        At most so many threads, and no more than the CPUs this process may run on; the result is the same.

    Raises
    ------
    MissingEventError
        ``net:netif_receive_skb`` was not recorded: no packet can be followed at all.
    """
    recorded = {name for name in events if events[name].n}
    refuse_without_packets(recorded)
    events = as_on_newer_kernels(events)
    received, flows = received_packets(packets, machine)
    hidden, lossy, unseen, blind = hidden_windows(events, lost, lost_records)
    times = [columns["time"] for columns in events.values() if columns.n]
    span = (min(int(time.min()) for time in times), max(int(time.max()) for time in times))
    part = Part(
        events, {name for name in events if events[name].n}, span, received, hidden, lossy, unseen, blind,
        FlowsSoFar.nothing(flows.n), Earlier(Fed.nothing(), span[0]),
    )  # fmt: skip
    every = np.ones(received.n, bool)
    with side_threads(threads, sum(columns.n for columns in events.values())):
        followed = follow_part(part, clock, machine)
        tally = Tally.of(followed, flows, every, every, followed.evidence.taken.copied_from >= 0, blind)
    columns, rows = followed.columns, followed.rows
    clock = clock_told(clock, followed.pairs.place, tally)
    gates, verdict, reasons = give_verdict(tally, clock, lost, damage)
    columns = columns.with_columns(trusted=columns["trusted"] & (verdict != REFUSED))
    return Joined(rows.time, rows.cpu, columns, flows, tally.coverage, clock, gates, verdict, reasons)


def refuse_without_packets(recorded: Set[str]) -> None:
    """Refuse a recording by which no packet can be followed at all."""
    if "net:netif_receive_skb" not in recorded:
        raise MissingEventError(
            "event net:netif_receive_skb has no samples, so no packet can be followed",
            found=", ".join(sorted(recorded)) or "no events",
            do="Record again with --events min, std or full.",
        )


def follow_part(part: Part, clock: ClockMap, machine: Machine) -> Followed:
    """Follow the packets of a part of a recording and give each a status."""
    events, received, lossy, known = part.events, part.received, part.lossy, part.known
    read = beside(receive_events, events, lossy)
    path = follow_kernel(events, machine.iface, machine.irqs, lossy, part.hidden, part.unseen, part.known_cpus)
    if known is not None:
        path = known.path.continued(path, events)
    stamp = clock.to_monotonic(received["time"])
    before = None if known is None else Matched(known.event, known.is_ambiguous)
    pairs = pair_packets(path, received, stamp, clock, lossy, before, part.place)
    skb = pairs.matched.event
    # Where events are missing, a pair that is not certain must not lend its skb's evidence to the packet.
    certain = np.where(pairs.is_uncertain, -1, skb)
    arrival = _arrivals(path, certain, received["directed_flow"], stamp - tolerance_of(clock))
    payload = np.maximum(received["payload_len"].astype(np.int64), 0)
    # Of a datagram in fragments only the one that completed it reaches a socket.
    is_tcp, is_udp = received["proto"] == TCP, (received["proto"] == UDP) & ((payload > 0) | ~received["is_fragment"])
    reason, reasons = drop_reasons(events, path, skb, is_udp)
    # Of two that one skb may be, either may be the one that was dropped.
    is_freed, call_rank, is_counted = (
        (reason > 0) & (certain >= 0),
        np.full(len(skb), -1, np.int64),
        np.zeros(len(skb), bool),
    )
    if known is not None:
        # Where a datagram was dropped its own slab has seen it.
        reason = np.where(known.is_counted & is_udp, 0, reason)
        is_freed, call_rank, is_counted = (reason > 0) | known.is_freed, known.call_rank, known.is_counted
    position, flow = received["position"], received["directed_flow"]
    repeat = covered_segments(
        flow.astype(np.int64), position, np.where(is_tcp, payload, 0), arrival, is_freed, part.pieces
    )
    segments = Segments(
        certain, flow, position, payload, is_tcp, is_udp, arrival, repeat, is_freed, call_rank, is_counted,
        received["dport"], received["row"],
    )  # fmt: skip
    taken = consume(events, read(), path, segments, part.hidden, lossy, part.earlier, part.so_far.reached)
    if known is not None:
        taken.keep_doubts(known.is_doubted, known.is_contested)
    rows = path.take(skb)
    if clock.method == "cross_stamps":
        rows.time[:, STAGE_INDEX["nic"]] = np.where(skb >= 0, stamp, NAT)
    tid, wake = _join_reader(rows, events, path, skb, taken, is_udp, lossy)
    setups = follow_handshakes(rows, received, tid, events, part.hidden)
    columns = _columns(received, path, skb, setups["tid"], wake, rows, events)
    columns = columns.with_columns(
        position=position,
        row=received["row"],
        is_fragment=received["is_fragment"],
        head_frame=received["head_frame"],
        is_data=(payload > 0) & (is_tcp | is_udp),
        arrival=arrival,
    )
    columns = reader_facts(rows, with_handshakes(columns, setups), taken, events, part.hidden)
    if known is not None:
        last_read = np.where(known.is_counted, known.last_read_cpu, columns["last_read_cpu"])
        columns = columns.with_columns(last_read_cpu=last_read)
    evidence = Evidence(
        events, part.recorded, part.span, path, pairs.matched, taken, clock, stamp, lossy, part.blind, repeat,
        (reason, reasons), part.so_far, part.earlier.fed.largest,
    )  # fmt: skip
    merged, late = merged_and_late(columns, evidence)
    if known is not None:
        merged = np.where(known.is_counted, known.is_merged, merged)
        late = np.where(known.is_counted, known.is_late, late)
    required = required_stages(columns, evidence, merged, late)
    columns = _judge(rows, columns, required, evidence)
    return Followed(rows, columns, required, evidence, pairs, merged, late)


def _arrivals(path: KernelPath, skb: np.ndarray, flow: np.ndarray, earliest: np.ndarray) -> np.ndarray:
    """Return since when each packet (in capture order) may have been read, dims (packet,), nanoseconds of CLOCK_MONOTONIC.

    That is when its skb entered the stack. Where that is not known: not before its stamp, which may have been taken long before that
    on another CPU, and not before the packets of its flow that came in before it (get_rps_cpu moves a flow to another CPU only once its
    queue on the last one was processed).
    """
    entered = pick(path.time[:, _RX], skb, NAT)
    order = np.argsort(flow, kind="stable")
    behind = np.empty(len(skb), np.int64)
    behind[order] = running_max(entered[order], flow[order])
    return np.where((skb >= 0) | (flow < 0), np.where(skb >= 0, entered, earliest), np.maximum(earliest, behind))


def consume(
    events: Mapping[str, Columns],
    read: tuple[Columns, Columns],
    path: KernelPath,
    segments: Segments,
    hidden: Hidden,
    lossy: Hidden,
    earlier: Earlier,
    reached: np.ndarray,
) -> Consumption:
    """Find for each packet the copy and the receive call (`read`: those events) that took its bytes."""
    copies, receives = read
    result = Consumption.blank(len(segments.skb), copies, receives)
    if receives.n:
        links = consume_streams(result, path, segments)
        if links is not None and (lossy.any or result.anchors_disagree.any()):
            wakes = first_wakes(events, path, segments.skb, lossy)
            confirm_streams(result, path, segments, links, wakes, lossy, earlier.rank, reached)
        consume_datagrams(result, events, path, segments, hidden, lossy, earlier)
    return result


def _join_reader(
    rows: StageTable,
    events: Mapping[str, Columns],
    path: KernelPath,
    skb: np.ndarray,
    taken: Consumption,
    is_udp: np.ndarray,
    lossy: Hidden,
) -> tuple[np.ndarray, Wake]:
    """Fill the stages from the wake-up to the return of the receive call."""
    copies, receives = taken.copies, taken.receives
    rows.set_stage("copy", copies, taken.first_copy)
    rows.set_stage("recvmsg", receives, taken.receive)
    tid = pick(receives["tid"], taken.receive, -1).astype(np.int64)
    copy_rank, recv_rank = rows.rank[:, STAGE_INDEX["copy"]], rows.rank[:, STAGE_INDEX["recvmsg"]]
    consumed = np.where(copy_rank >= 0, copy_rank, recv_rank)
    consumed_at = np.where(copy_rank >= 0, rows.time[:, STAGE_INDEX["copy"]], rows.time[:, STAGE_INDEX["recvmsg"]])
    for stage in ("tcp_rcv", "data_ready"):
        # After its own bytes were copied the skb is another packet's, whose beginning nobody saw.
        at = STAGE_INDEX[stage]
        rows.unset(stage, (copy_rank >= 0) & (rows.rank[:, at] > copy_rank))
    ready = STAGE_INDEX["data_ready"]
    last = np.where(
        rows.rank[:, ready] >= 0,
        ready,
        np.where(rows.rank[:, STAGE_INDEX["tcp_rcv"]] >= 0, STAGE_INDEX["tcp_rcv"], _RX),
    )
    every = np.arange(len(tid))
    limit = np.where((rows.rank[:, ready] >= 0) & (skb >= 0), pick(path.columns["wake_limit"], skb, 0), 0)
    since = Since(rows.time[every, last], rows.rank[every, last], rows.cpu[every, last].astype(np.int64), limit)
    # The call that returned a segment's last byte need not be the one that took its first.
    reader = np.where((copy_rank >= 0) | is_udp, tid, -1)
    wake = attribute(events, since, Consumed(reader, consumed, consumed_at, copy_rank >= 0), lossy)
    for stage, row in (("waking", wake.waking), ("wakeup", wake.wakeup), ("switch_in", wake.switch_in)):
        name = "switch" if stage == "switch_in" else stage
        rows.set_stage(stage, event_columns(events, f"sched:sched_{name}"), row)
    return tid, wake


def _columns(
    received: Columns,
    path: KernelPath,
    skb: np.ndarray,
    tid: np.ndarray,
    wake: Wake,
    rows: StageTable,
    events: Mapping[str, Columns],
) -> Columns:
    """Collect the per-packet variables."""
    facts = path.columns
    comm, comms = comm_of(events, tid)
    copy_cpu, recv_cpu = rows.cpu[:, STAGE_INDEX["copy"]], rows.cpu[:, STAGE_INDEX["recvmsg"]]
    reader_cpu = np.where(copy_cpu >= 0, copy_cpu, recv_cpu)
    gso = pick(facts["gso_size"], skb, 0)
    payload = np.maximum(received["payload_len"].astype(np.int64), 0)
    columns = Columns(
        {
            "flow": received["directed_flow"],
            "direction": np.zeros(received.n, np.int8),
            "wire_len": received["wire_len"].astype(np.int32),
            "payload_len": received["payload_len"].astype(np.int32),
            "seq": received["seq"],
            "skb": pick(facts["skbaddr"], skb, 0),
            "socket": pick(facts["socket"].astype(np.uint64), skb, 0),
            "tid": tid.astype(np.int32),
            "comm": comm,
            "rx_queue": pick(facts["rx_queue"], skb, -1).astype(np.int16),
            "forwards": pick(facts["devices"], skb, 0).astype(np.int8),
            "rps_cpu": pick(facts["rps_cpu"].astype(np.int16), skb, -1),
            "reader_cpu": reader_cpu.astype(np.int16),
            "waker_cpu": rows.cpu[:, STAGE_INDEX["waking"]],
            "gro_segments": np.where((gso > 0) & (payload > 0), -(-payload // np.maximum(gso, 1)), 1).astype(np.int16),
            "skb_hash": pick(facts["hash"], skb, -1),
            "l4_hash": pick(facts["l4_hash"], skb, -1).astype(np.int8),
            "pcap_time": received["time"],
            "pcap_frame": received["frame"],
            "path_kind": pick(facts["path_kind"].astype(np.int8), skb, 0),
            "attribution": wake.attribution,
            "proto": received["proto"],
        }
    )
    columns.attrs["categories"] = {"comm": comms}
    return columns


def comm_of(events: Mapping[str, Columns], tid: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return a code into a list of task names for each tid, -1 where unknown; the name last seen wins (names change)."""
    switch = event_columns(events, "sched:sched_switch")
    wanted = np.unique(tid[tid >= 0])
    names = {}
    if switch.n:
        last = AsOf(switch["rank"], switch["next_pid"].astype(np.int64))
        row = last.last_before(np.full(len(wanted), np.iinfo(np.int64).max // 2), wanted)
        for task, at in zip(wanted.tolist(), row.tolist(), strict=True):
            if at >= 0:
                names[task] = bytes(switch["next_comm"][at]).split(b"\0")[0].decode("utf-8", "replace")
    labels = sorted(set(names.values()))
    table = np.array([labels.index(names[task]) if task in names else -1 for task in wanted.tolist()], np.int32)
    code = np.full(len(tid), -1, np.int32)
    if len(wanted):
        code[tid >= 0] = table[np.searchsorted(wanted, tid[tid >= 0])]
    return code, labels


def _judge(rows: StageTable, columns: Columns, required: np.ndarray, evidence: Evidence) -> Columns:
    """Give every row a status; return the columns with it."""
    status, drop_reason, reasons_table = give_statuses(rows, columns, required, evidence)
    t0 = np.full(columns.n, -1, np.int8)
    for kind in np.unique(columns["path_kind"]).tolist():
        mine = np.flatnonzero(columns["path_kind"] == kind)
        # The NIC's stamp is no stage of the kernel: nic_latency is measured from it, total_latency is not.
        for stage in ORDER_INDEX[kind][:0:-1]:
            t0[mine[rows.time[mine, stage] != NAT]] = stage
    trusted = columns["is_data"] & rows.seen("recvmsg") & has_status(status, TRUSTED)
    columns = columns.with_columns(status=status, drop_reason=drop_reason, t0_stage=t0, trusted=trusted)
    columns.attrs["categories"]["drop_reason"] = reasons_table
    return columns


ORDER_INDEX = np.array([[STAGE_INDEX[name] for name in ORDER[kind]] for kind in PATH_KINDS])
