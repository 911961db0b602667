"""What became of each packet: the stages it must show, and the one status that says whether to believe it.

Every row gets a status (stages.STATUSES); causes that hide data (blind, lost) come before those that explain it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from rxlab.follow import gates
from rxlab.follow.asof import AsOf, pick
from rxlab.follow.clockfit import NAT, ClockMap
from rxlab.follow.consumption import Consumption
from rxlab.follow.hidden import BLIND_AFTER_NS, BLIND_BEFORE_NS, Hidden
from rxlab.follow.kernelpath import KernelPath, event_columns
from rxlab.follow.match import Matched
from rxlab.follow.older import readers_seen
from rxlab.follow.repeats import last_pieces, merged_pieces
from rxlab.follow.stagetable import StageTable
from rxlab.follow.together import beside
from rxlab.read.columns import Columns
from rxlab.stages import ATTRIBUTIONS, STAGE_INDEX, STAGE_NAMES, STATUSES, stages_without

TCP, UDP = 6, 17
_RX = STAGE_INDEX["netif_receive_skb"]
_NEVER = np.iinfo(np.int64).max
# How far around a packet without a reader a loss may hide it.
UNREAD_NS = 10_000_000
# Statuses that say "do not trust this row's times", as opposed to "this packet has no reader".
FLAGGED = ("ambiguous", "negative", "blind", "lost", "incomplete", "unmatched")
# Statuses that name the call that read the packet without doubt, whatever other stages are missing.
TRUSTED = ("complete", "lost", "blind")
# Not counted among the data packets a recording should have followed: no reader could have had them, or perf was not on.
NOT_COUNTED = ("duplicate", "dropped", "outside_window", "forwarded")


def has_status(status: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Tell which codes are of the given statuses."""
    return np.array([name in names for name in STATUSES])[status]


@dataclass
class FlowsSoFar:
    """What the packets before those at hand told of each flow; int64 arrays, dims (flow,), -1 (the smallest int64) for nothing.

    Attributes
    ----------
    reached : int64 array
        Furthest end of the stream that any of them had.
    read_to : int64 array
        Furthest packet that was read: stream position (TCP), row (other).
    read : Columns
        ``flow, begin, end`` of the pieces of the streams that were read (:func:`rxlab.follow.repeats.merged_pieces`).
    """

    reached: np.ndarray
    read_to: np.ndarray
    read: Columns

    @classmethod
    def nothing(cls, n_flows: int) -> FlowsSoFar:
        """Return what is known before a recording begins."""
        nothing = np.empty(0, np.int64)
        return cls(np.full(n_flows, NAT), np.full(n_flows, NAT), merged_pieces(None, nothing, nothing, nothing))

    def raise_to(self, columns: Columns, leaving: np.ndarray, is_read: np.ndarray) -> None:
        """Add packets: of those `leaving` where they ended, of those `is_read` where they lie (masks, dims (packet,))."""
        of_flow = columns["flow"] >= 0
        rows = np.flatnonzero(leaving & columns["is_data"] & of_flow)
        end = columns["position"][rows] + columns["payload_len"][rows]
        np.maximum.at(self.reached, columns["flow"][rows], end)
        rows = np.flatnonzero(is_read & of_flow)
        np.maximum.at(self.read_to, columns["flow"][rows], _place_in_flow(columns)[rows])
        self.read = last_pieces(pieces_with(self.read, columns, rows[columns["proto"][rows] == TCP]))


def pieces_with(pieces: Columns, columns: Columns, rows: np.ndarray) -> Columns:
    """Return pieces of streams together with those that some packets bring."""
    begin = columns["position"][rows]
    return merged_pieces(pieces, columns["flow"][rows].astype(np.int64), begin, begin + columns["payload_len"][rows])


def _place_in_flow(columns: Columns) -> np.ndarray:
    """Return what orders the packets of a flow as they are read."""
    return np.where(columns["proto"] == TCP, columns["position"], columns["row"])


@dataclass(frozen=True)
class Evidence:
    """What a packet's status is judged by, beside its own stages.

    Attributes
    ----------
    events : mapping of str to Columns
    recorded : set of str
        The events of which the recording has any.
    span : tuple of int, nanoseconds of CLOCK_MONOTONIC
        The first and the last event of the recording.
    path : KernelPath
    matched : Matched
        Packets <-> rows of `path`.
    taken : Consumption
    clock : ClockMap
    stamp : int64 array, dims (packet,), nanoseconds of CLOCK_MONOTONIC
        The pcap stamps, converted.
    lossy : Hidden
        Where they were lost.
    blind : int64 array, dims (window, 4)
        Where perf delivered nothing without a loss (:func:`rxlab.follow.hidden.blind_windows`).
    is_repeat : bool array, dims (packet,)
        TCP bytes that had come before (:func:`rxlab.follow.repeats.covered_segments`).
    freed : pair
        :func:`drop_reasons`.
    so_far : FlowsSoFar
    largest_call : int
        Most bytes that a call on a UDP socket returned before.
    """

    events: Mapping[str, Columns]
    recorded: Set[str]
    span: tuple[int, int]
    path: KernelPath
    matched: Matched
    taken: Consumption
    clock: ClockMap
    stamp: np.ndarray
    lossy: Hidden
    blind: np.ndarray
    is_repeat: np.ndarray
    freed: tuple[np.ndarray, list[str]]
    so_far: FlowsSoFar
    largest_call: int = 0


def required_stages(columns: Columns, evidence: Evidence, merged: np.ndarray, late: np.ndarray) -> np.ndarray:
    """Tell which stages each row must show, by path kind, protocol and attribution class.

    Parameters
    ----------
    columns : Columns
    evidence : Evidence
    merged, late : bool arrays
        :func:`merged_and_late`.

    Returns
    -------
    bool array, dims (packet, stage)
    """
    n = columns.n
    is_data, is_tcp = columns["is_data"], columns["proto"] == TCP
    waits = np.array([name in ("own_wake", "coalesced", "other_wake", "preempted") for name in ATTRIBUTIONS])
    attribution = columns["attribution"]
    required = np.zeros((n, len(STAGE_NAMES)), bool, order="F")
    recorded, is_behind = (
        set(STAGE_NAMES) - set(stages_without(set(evidence.recorded))) - {"nic"},
        evidence.taken.is_behind,
    )
    needs = {
        "driver_rx": is_data,
        "netif_receive_skb": np.ones(n, bool),
        "tcp_rcv": is_data & is_tcp & ~merged,
        # An out-of-order segment is queued without waking anybody, and so is a datagram behind another since Linux 6.10.
        "data_ready": is_data & ~(is_tcp & (merged | late)) & ~is_behind,
        "waking": is_data & (attribution == ATTRIBUTIONS.index("own_wake")),
        "wakeup": is_data & (attribution == ATTRIBUTIONS.index("own_wake")),
        # A reader without attribution: what woke it is not known, so its switch-in is missing.
        "switch_in": is_data & ((attribution == 0) & (columns["tid"] >= 0) | waits[attribution]),
        "copy": is_data & is_tcp,
        "recvmsg": is_data,
    }  # fmt: skip
    for stage, rows in needs.items():
        # Without a receive call nobody can say that a packet's path is complete.
        if stage in recorded or stage == "recvmsg":
            required[:, STAGE_INDEX[stage]] = rows
    return required


def merged_and_late(columns: Columns, evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Tell which TCP packets lost their skb to an earlier one, and which arrived out of order.

    The socket backlog merges a segment into the tail it finds there: only the first skb reaches tcp_rcv_established, and its
    tcp_probe reports more bytes than its own packet had (alignment.md 2.1, "no tcp_probe").
    """
    flow, payload, position = columns["flow"], columns["payload_len"].astype(np.int64), columns["position"]
    probe_len = pick(evidence.path.columns["probe_len"], evidence.matched.event, -1)
    # Pure ACKs count as well: data may be merged into the skb of one that waits in the backlog before it.
    order = np.flatnonzero((columns["proto"] == TCP) & (flow >= 0))
    order = order[np.lexsort((order, flow[order]))]
    merged, late = np.zeros(columns.n, bool), np.zeros(columns.n, bool)
    if not len(order):
        return merged, late
    has_probe = probe_len[order] >= 0
    # data_len is a 16-bit field: compare modulo 65,536.
    grew = has_probe & (probe_len[order] != np.maximum(payload[order], 0) % 65536)
    head = np.maximum.accumulate(np.where(has_probe, np.arange(len(order)), -1))
    same = (head >= 0) & (flow[order[np.maximum(head, 0)]] == flow[order])
    merged[order] = ~has_probe & same & grew[np.maximum(head, 0)]
    order = order[columns["is_data"][order]]
    end = position[order] + payload[order]
    edges = np.flatnonzero(np.diff(flow[order], prepend=-2, append=-2))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        before = evidence.so_far.reached[flow[order[low]]]
        reached = np.maximum.accumulate(np.concatenate(([before], end[low:high])))[:-1]
        begin = position[order[low:high]]
        # Beyond a hole that a later packet fills: it waits there, even where it follows on what waits already.
        fills = np.where(evidence.is_repeat[order[low:high]], _NEVER, begin)
        filled = np.append(np.minimum.accumulate(fills[::-1])[::-1][1:], _NEVER)
        late[order[low:high]] = ((begin != reached) & (reached != NAT)) | (filled < begin)
    return merged, late


def give_statuses(
    rows: StageTable, columns: Columns, required: np.ndarray, evidence: Evidence
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Give every row the one status that says what became of it; causes that hide data come before those that explain it."""
    code = {name: index for index, name in enumerate(STATUSES)}
    status = np.full(columns.n, code["complete"], np.int8)
    negative = beside(gates.order_violations, rows.time, columns["path_kind"])
    has_reader = rows.rank[:, STAGE_INDEX["recvmsg"]] >= 0
    missing = (required & (rows.time == NAT)).any(axis=1)
    is_data, duplicate = columns["is_data"], evidence.is_repeat
    # Old data is freed with a reason too, but nothing was lost by it.
    reason, table = evidence.freed
    reason = np.where((rows.rank[:, STAGE_INDEX["copy"]] >= 0) | duplicate, 0, reason).astype(np.int16)
    # A later byte of the same stream, or a later datagram of the same socket, was read: so was this one, and its events
    # were not delivered although perf reported no loss.
    overtaken = is_data & ~has_reader & (reason == 0) & _overtaken(columns, has_reader, evidence.so_far.read_to)
    status[missing] = code["incomplete"]
    # Where no receive call can be seen, none is known to be missing.
    sees_reader = np.isin(columns["proto"], readers_seen(evidence.events))
    status[is_data & ~has_reader & sees_reader] = code["no_reader"]
    status[is_data & ~has_reader & (reason > 0)] = code["dropped"]
    status[is_data & ~has_reader & pick(evidence.path.columns["is_out"], evidence.matched.event, False)] = code[
        "forwarded"
    ]
    status[is_data & duplicate] = code["duplicate"]
    stamp = evidence.stamp
    end = rows.time[:, STAGE_INDEX["recvmsg"]]
    blind = gates.inside_windows(stamp, evidence.blind, BLIND_BEFORE_NS, BLIND_AFTER_NS, end)
    lost = _inside_loss(rows, stamp, evidence.lossy)
    status[overtaken & ~duplicate] = code["blind"]
    unfinished = (missing | overtaken) & ~has_status(status, ("dropped", "duplicate"))
    status[unfinished & blind] = code["blind"]
    status[unfinished & lost] = code["lost"]
    first, last = evidence.span
    unmatched = evidence.matched.event < 0
    status[unmatched] = code["unmatched"]
    status[unmatched & blind] = code["blind"]
    status[unmatched & lost] = code["lost"]
    status[unmatched & ((stamp < first) | (stamp > last))] = code["outside_window"]
    status[~is_data & ~unmatched] = code["no_payload"]
    status[~is_data & ~unmatched & columns["is_fragment"]] = code["fragment"]
    status[~is_data & ~unmatched & (columns["handshake"] > 0)] = code["handshake"]
    ambiguous = (
        evidence.matched.ambiguous | evidence.taken.anchors_disagree | evidence.clock.inside_step(columns["pcap_time"])
    )
    status[ambiguous & is_data & (~unmatched | has_reader)] = code["ambiguous"]
    status[negative()] = code["negative"]
    return status, reason, table


def _inside_loss(rows: StageTable, stamp: np.ndarray, lossy: Hidden) -> np.ndarray:
    """Tell whose life, from the wire to the reader, events were lost in; without a reader it may still go on."""
    end = rows.time[:, STAGE_INDEX["recvmsg"]]
    return lossy.touch(stamp - UNREAD_NS, np.where(end == NAT, stamp + UNREAD_NS, end))


def _overtaken(columns: Columns, has_reader: np.ndarray, read_before: np.ndarray) -> np.ndarray:
    """Tell which packets of a flow come before one that was read (in stream order for TCP, in capture order else)."""
    overtaken = np.zeros(columns.n, bool)
    key = _place_in_flow(columns)
    order = np.lexsort((key, columns["flow"]))
    flow, read = columns["flow"][order], np.where(has_reader[order], np.arange(columns.n), -1)
    # The last packet of the flow that was read, seen from each packet: a maximum from the right within the flow.
    edges = np.flatnonzero(np.diff(flow, prepend=-2, append=-2))
    last = np.maximum.reduceat(read, edges[:-1]) if columns.n else read
    overtaken[order] = np.repeat(last, np.diff(edges)) > np.arange(columns.n)
    return overtaken | ((columns["flow"] >= 0) & (pick(read_before, columns["flow"], NAT) > key))


def drop_reasons(
    events: Mapping[str, Columns], path: KernelPath, skb: np.ndarray, is_udp: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Return the kernel's reason for packets freed by kfree_skb inside their life before any copy (0: none), and the words."""
    freed = event_columns(events, "skb:kfree_skb")
    if not freed.n or "reason" not in freed:
        return np.zeros(len(skb), np.int16), ["none"]
    address, start = path.columns["skbaddr"], path.rank[:, _RX]
    index = AsOf(freed["rank"], freed["skbaddr"].astype(np.uint64))
    row = index.first_after(start, address)
    end = np.minimum(path.columns["end_rank"], _first_copy(events, start, address))
    # A datagram is dropped where it would have been queued. Later its address may be another's whose birth is not recorded.
    receive = event_columns(events, "net:netif_receive_skb")
    following = AsOf(receive["rank"], receive["cpu"])
    cpu = path.cpu[:, _RX].astype(np.int64)
    queued_by = following.rank_of(following.first_after(start, cpu), _NEVER)
    dropped_there = (index.rank_of(row, _NEVER) < queued_by) & (pick(freed["cpu"], row, -1) == cpu)
    of_udp = np.zeros(len(start), bool)
    of_udp[skb[is_udp & (skb >= 0)]] = True
    row = np.where(~of_udp | dropped_there, row, -1)
    row = pick(np.where(index.rank_of(row, _NEVER) < end, row, -1), skb, -1)
    reason = pick(freed["reason"].astype(np.int64), row, 0)
    # Kernels number their reasons differently: what travels on is the name, as a code into this run's own table.
    symbols = freed.attrs.get("symbols", {}).get("reason", {})
    values, codes = np.unique(np.append(reason, 0), return_inverse=True)
    table = ["none" if value == 0 else str(symbols.get(int(value), value)) for value in values]
    return codes[:-1].astype(np.int16), table


def _first_copy(events: Mapping[str, Columns], start: np.ndarray, address: np.ndarray) -> np.ndarray:
    """Return the rank of the first copy from each skb."""
    copies = event_columns(events, "skb:skb_copy_datagram_iovec")
    if "skbaddr" not in copies:
        return np.full(len(start), _NEVER)
    index = AsOf(copies["rank"], copies["skbaddr"].astype(np.uint64))
    return index.rank_of(index.first_after(start, address), _NEVER)
