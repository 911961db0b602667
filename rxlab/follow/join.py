"""Columns of a recording -> one row per received packet: every stage, the task that read it, and what became of it.

The order is fixed: direction and flows, clock and stamp position, packets <-> skbs, the kernel's half (kernelpath.py), the
reader's half (consumption.py, streams.py, queues.py, wake.py), gates (gates.py), a status for every row. Nothing is dropped: a packet that cannot be followed is a
row that says why.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rxlab.errors import MissingEventError
from rxlab.follow.asof import AsOf, pick
from rxlab.follow.clockfit import NAT, RESIDUAL_QUANTILES, ClockMap
from rxlab.follow.consumption import Consumption, Segments, receive_events, unwrap_sequence
from rxlab.follow.handshake import follow_handshakes, with_handshakes
from rxlab.follow.hidden import Hidden, hidden_windows
from rxlab.follow.kernelpath import KernelPath, event_columns, follow_kernel
from rxlab.follow.match import STALL_NS, TOLERANCE_NS, Matched, classify_stamp, match_by_flow
from rxlab.follow.older import as_on_newer_kernels
from rxlab.follow.queues import consume_datagrams
from rxlab.follow.readerfacts import reader_facts
from rxlab.follow.repeats import covered_segments
from rxlab.follow.stagetable import StageTable
from rxlab.follow.stagetrust import doubtful_stages
from rxlab.follow.status import (
    TCP,
    TRUSTED,
    UDP,
    Evidence,
    drop_reasons,
    give_statuses,
    recorded_stages,
    required_stages,
)
from rxlab.follow.streambounds import confirm_streams
from rxlab.follow.streams import consume_streams
from rxlab.follow.verdict import give_verdict
from rxlab.follow.wake import Since, Wake, attribute, first_wakes
from rxlab.read.columns import Columns
from rxlab.stages import ORDER, PATH_KINDS, STAGE_INDEX, STATUSES

_RX = STAGE_INDEX["netif_receive_skb"]
# How long after netif_receive_skb a tap stamps at most where lost events leave it open.
LOSSY_TAP_NS = 20_000


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
        One per direction of a 5-tuple; ``attrs["labels"]`` has their text.
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


@dataclass(frozen=True)
class Machine:
    """What the join needs to know of the recording host, from run.json and host.json."""

    iface: str
    macs: frozenset[int] = frozenset()
    addresses: frozenset[tuple[int, int]] = frozenset()
    irqs: Mapping[int, int] = field(default_factory=dict)


def join(
    events: Mapping[str, Columns],
    packets: Columns,
    clock: ClockMap,
    machine: Machine,
    *,
    lost: int = 0,
    lost_records: Columns | None = None,
    damage: tuple[str, ...] = (),
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

    Raises
    ------
    MissingEventError
        ``net:netif_receive_skb`` was not recorded: no packet can be followed at all.
    """
    if "net:netif_receive_skb" not in events or not events["net:netif_receive_skb"].n:
        raise MissingEventError(
            "event net:netif_receive_skb has no samples, so no packet can be followed",
            found=", ".join(sorted(name for name in events if events[name].n)) or "no events",
            do="Record again with --events min, std or full.",
        )
    events = as_on_newer_kernels(events)
    received, flows = _received(packets, machine)
    hidden, lossy, blind = hidden_windows(events, lost, lost_records)
    path = follow_kernel(events, machine.iface, machine.irqs, lossy)
    stamp = clock.to_monotonic(received["time"])
    clock, matched = _match(path, received, stamp, clock, lossy)
    skb = matched.event
    # Where events are missing, a pair that is not certain must not lend its skb's evidence to the packet.
    certain = np.where(matched.ambiguous & lossy.any, -1, skb)
    arrival = np.where(certain >= 0, pick(path.time[:, _RX], certain, NAT), stamp - _tolerance(clock))
    position = _positions(received)
    is_tcp, is_udp = received["proto"] == TCP, received["proto"] == UDP
    payload = np.maximum(received["payload_len"].astype(np.int64), 0)
    reason, reasons = drop_reasons(events, path, skb, is_udp)
    flow = received["directed_flow"].astype(np.int64)
    repeat = covered_segments(flow, position, np.where(is_tcp, payload, 0), arrival, reason > 0)
    segments = Segments(
        certain, received["directed_flow"], position, payload, is_tcp, is_udp, arrival, repeat, reason > 0
    )
    taken = consume(events, path, segments, hidden, lossy)
    rows = path.take(skb)
    if clock.method == "cross_stamps":
        rows.time[:, STAGE_INDEX["nic"]] = np.where(skb >= 0, stamp, NAT)
    tid, wake = _join_reader(rows, events, path, skb, taken, lossy)
    setups = follow_handshakes(rows, received, tid, events, hidden)
    columns = _columns(received, path, skb, setups["tid"], wake, rows, events)
    columns = columns.with_columns(position=position, is_data=(payload > 0) & (is_tcp | is_udp))
    columns = reader_facts(rows, with_handshakes(columns, setups), taken, events, hidden)
    return _judge(
        rows,
        columns,
        flows,
        Evidence(events, path, matched, taken, clock, stamp, lost, lossy, blind, repeat, (reason, reasons), damage),
    )


def _received(packets: Columns, machine: Machine) -> tuple[Columns, Columns]:
    """Return the packets that came in, with a directed flow number, and the table of directed flows."""
    rows = np.flatnonzero(is_received(packets, machine))
    received = packets.take(rows)
    key = np.where(received["flow"] >= 0, received["flow"].astype(np.int64) * 2 + received["flow_dir"], -1)
    numbers, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    has_none = bool(len(numbers)) and numbers[0] < 0
    received = received.with_columns(directed_flow=(inverse - has_none).astype(np.int32))
    heads = received.take(first[1:] if has_none else first)
    names = ("ip_version", "src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport", "proto")
    flows = Columns({name: heads[name] for name in names})
    flows.attrs["labels"] = [flow_label(flows, row) for row in range(flows.n)]
    return received, flows


def flow_label(flows: Columns, row: int) -> str:
    """Return a directed flow as text: ``10.0.0.1:5000>10.0.0.2:80 tcp``."""

    def end(side: str, port: str) -> str:
        high, low = int(flows[f"{side}_hi"][row]), int(flows[f"{side}_lo"][row])
        if int(flows["ip_version"][row]) == 6:
            return f"[{ipaddress.IPv6Address(high << 64 | low)}]:{int(flows[port][row])}"
        return f"{ipaddress.IPv4Address(low & 0xFFFFFFFF)}:{int(flows[port][row])}"

    protocol = {TCP: "tcp", UDP: "udp"}.get(int(flows["proto"][row]), str(int(flows["proto"][row])))
    return f"{end('src', 'sport')}>{end('dst', 'dport')} {protocol}"


def is_received(packets: Columns, machine: Machine) -> np.ndarray:
    """Tell for each packet whether it came in: by MAC address, else by IP address; all when neither is known.

    A tap sees what the host sends as well; only received packets have a path to follow.
    """
    sent = np.zeros(packets.n, bool)
    if machine.macs:
        macs = np.array(sorted(machine.macs), np.uint64)
        sent = np.isin(packets["src_mac"], macs) & (packets["src_mac"] > 0) & ~np.isin(packets["dst_mac"], macs)
    elif machine.addresses:
        hi = np.array([pair[0] for pair in machine.addresses], np.uint64)
        lo = np.array([pair[1] for pair in machine.addresses], np.uint64)
        local_src = ((packets["src_hi"][:, None] == hi) & (packets["src_lo"][:, None] == lo)).any(axis=1)
        local_dst = ((packets["dst_hi"][:, None] == hi) & (packets["dst_lo"][:, None] == lo)).any(axis=1)
        sent = local_src & ~local_dst
    return ~sent


def _positions(received: Columns) -> np.ndarray:
    """Return the stream position of each packet's first byte: sequence numbers unwrapped per directed flow."""
    position = np.zeros(received.n, np.int64)
    flow = received["directed_flow"]
    is_tcp = received["proto"] == TCP
    order = np.flatnonzero(is_tcp & (flow >= 0))
    order = order[np.argsort(flow[order], kind="stable")]
    edges = np.flatnonzero(np.diff(flow[order], prepend=-2, append=-2))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        rows = order[low:high]
        # A SYN takes one sequence number before the first byte; resets and probes of an idle connection are old or zero-length, and harmless.
        position[rows] = unwrap_sequence(received["seq"][rows])
    return position


def _tolerance(clock: ClockMap) -> int:
    """Return by how much a stamp and an event's time may disagree, ns."""
    return max(TOLERANCE_NS, int(clock.bound_ns))


def _match(
    path: KernelPath, received: Columns, stamp: np.ndarray, clock: ClockMap, lossy: Hidden
) -> tuple[ClockMap, Matched]:
    """Classify the stamp position and match packets to skbs in the windows that follow from it."""
    columns = path.columns
    rx_time, drv_time = path.time[:, _RX], path.time[:, STAGE_INDEX["driver_rx"]]
    has_driver = drv_time != NAT
    # netif_receive_skb sees the skb above its MAC header, and without the VLAN tag that the NIC took off and libpcap puts
    # back; a tag that the NIC left (the outer one of two, often) is still in it. The driver's event says which it is.
    tag = np.where((received["vlan"] >= 0) & ~has_driver.any(), 4, 0)
    length = received["wire_len"].astype(np.int64) - 14 - tag
    skb_len = columns["len"] + 4 * (columns["vlan_tagged"] > 0)
    position, evidence = classify_stamp(
        stamp,
        length,
        drv_time[has_driver],
        (columns["stamp_high"] - drv_time)[has_driver],
        skb_len[has_driver],
        rx_time,
        skb_len,
    )
    tolerance = _tolerance(clock)
    if clock.method == "cross_stamps":
        # The readings say whose stamp it is: however soon the kernel follows, it is the NIC's.
        position = "nic"
    if position == "bracket":
        low = np.where(has_driver, columns["stamp_low"] - tolerance, rx_time - STALL_NS)
        high = np.where(has_driver, columns["stamp_high"] + tolerance, rx_time + tolerance)
        # GRO hands up, and stamps, at the end of a poll; a packet that was not moved enters the stack right after.
        is_napi = columns["path_kind"] == PATH_KINDS.index("napi")
        expected = np.where(has_driver & ~is_napi, columns["stamp_low"], rx_time)
    elif position == "tap":
        low, high = rx_time - tolerance, _tap_limit(path, lossy) + tolerance
        expected = rx_time
    else:
        first = path.first_event()
        low, high, expected = first - STALL_NS, first + tolerance, first
    # Two queues' polls overlap: what one driver got first it may hand up last. Each such window ends where its skb goes on.
    overtaking = has_driver if position == "bracket" else None
    matched = match_by_flow(
        stamp, length, low, high, skb_len, expected, overtaking, received["directed_flow"], columns["hash"],
        may_miss=lossy.any,
    )  # fmt: skip
    found = matched.event >= 0
    residual = stamp[found] - expected[matched.event[found]]
    quantiles = {q: float(np.quantile(residual, q)) for q in RESIDUAL_QUANTILES} if found.any() else {}
    return replace(clock, stamp_position=position, stamp_evidence=evidence, residual=quantiles), matched


def _tap_limit(path: KernelPath, lossy: Hidden) -> np.ndarray:
    """Return until when a tap stamp of each skb can come: before the CPU's next skb, and before its own next stage."""
    rx_time, cpu, rank = path.time[:, _RX], path.cpu[:, _RX], path.rank[:, _RX]
    index = AsOf(rank, cpu)
    following = index.first_after(rank, cpu)
    limit = np.where(following >= 0, rx_time[np.maximum(following, 0)], rx_time + STALL_NS)
    for stage in ("tcp_rcv", "data_ready"):
        time = path.time[:, STAGE_INDEX[stage]]
        limit = np.where(time != NAT, np.minimum(limit, time), limit)
    # Where the next events may be missing they limit nothing.
    limit = np.where(lossy.touch(rx_time, limit, cpu), np.minimum(limit, rx_time + LOSSY_TAP_NS), limit)
    return np.minimum(limit, rx_time + STALL_NS)


def consume(
    events: Mapping[str, Columns], path: KernelPath, segments: Segments, hidden: Hidden, lossy: Hidden
) -> Consumption:
    """Find for each packet the copy and the receive call that took its bytes."""
    copies, receives = receive_events(events, lossy)
    result = Consumption.blank(len(segments.skb), copies, receives)
    if receives.n:
        links = consume_streams(result, path, segments)
        if links is not None and (lossy.any or result.anchors_disagree.any()):
            wakes = first_wakes(events, path, segments.skb, lossy)
            confirm_streams(result, path, segments, links, wakes, lossy)
        consume_datagrams(result, events, path, segments, hidden, lossy)
    return result


def _join_reader(
    rows: StageTable,
    events: Mapping[str, Columns],
    path: KernelPath,
    skb: np.ndarray,
    taken: Consumption,
    lossy: Hidden,
) -> tuple[np.ndarray, Wake]:
    """Fill the stages from the wake-up to the return of the receive call."""
    copies, receives = taken.copies, taken.receives
    rows.set_stage("copy", copies, taken.first_copy)
    rows.set_stage("recvmsg", receives, taken.receive)
    tid = pick(receives["tid"].astype(np.int64), taken.receive, -1)
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
    wake = attribute(events, tid, since, consumed, consumed_at, lossy)
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
    comm, comms = _comm_of(events, tid)
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


def _comm_of(events: Mapping[str, Columns], tid: np.ndarray) -> tuple[np.ndarray, list[str]]:
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


def _judge(rows: StageTable, columns: Columns, flows: Columns, evidence: Evidence) -> Joined:
    """Give every row a status, count coverage, compute the gates and the verdict."""
    recorded = recorded_stages(evidence.events)
    required = required_stages(
        columns, rows.rank, evidence.path, evidence.matched.event, recorded, evidence.taken.is_behind
    )
    status, drop_reason, reasons_table = give_statuses(rows, columns, required, evidence)
    time_order = ORDER_INDEX[columns["path_kind"]]
    seen = np.take_along_axis(rows.time, time_order, axis=1) != NAT
    seen[:, 0] = (
        False  # the NIC's stamp is no stage of the kernel: nic_latency is measured from it, total_latency is not
    )
    t0 = np.where(seen.any(axis=1), time_order[np.arange(columns.n), seen.argmax(axis=1)], -1).astype(np.int8)
    trusted = columns["is_data"] & rows.seen("recvmsg") & np.isin(np.asarray(STATUSES)[status], TRUSTED)
    columns = columns.with_columns(status=status, drop_reason=drop_reason, t0_stage=t0, trusted=trusted)
    columns.attrs["categories"]["drop_reason"] = reasons_table
    joined = Joined(rows.time, rows.cpu, columns, flows, _coverage(required, rows.time, columns), evidence.clock)
    give_verdict(joined, evidence)
    return joined


ORDER_INDEX = np.array([[STAGE_INDEX[name] for name in ORDER[kind]] for kind in PATH_KINDS])


def _coverage(required: np.ndarray, time: np.ndarray, columns: Columns) -> Columns:
    """Count per stage: expected, seen, and why the rest is missing."""
    seen = time != NAT
    counts = {
        "expected": required.sum(axis=0),
        "matched": (required & seen).sum(axis=0),
        "seen": seen.sum(axis=0),
        "doubtful": doubtful_stages(required, time, columns),
    }
    for code, name in enumerate(STATUSES):
        counts[name] = (required & ~seen & (columns["status"] == code)[:, None]).sum(axis=0)
    return Columns({name: count.astype(np.int64) for name, count in counts.items()})
