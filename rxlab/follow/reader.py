"""The reader's half of the join: which receive call returned a packet's bytes, and why its task ran when it did.

TCP is a byte stream: ``skb_copy_datagram_iovec`` names an skb, and its position in the stream is that skb's sequence number
plus what was already copied from it. Bytes merged into another skb (GRO, socket backlog, tcp_try_coalesce) are found by
position, not by address. UDP copies of linear skbs have no event: a socket is a FIFO, so the k-th datagram queued is the k-th
received.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.kernelpath import KernelPath, event_columns
from rxlab.read.columns import Columns
from rxlab.stages import ATTRIBUTIONS, STAGE_INDEX

MSG_PEEK = 0x2  # include/linux/socket.h
_NEVER = np.iinfo(np.int64).max


@dataclass
class Consumption:
    """Which copy and which receive call took each packet's bytes.

    Attributes
    ----------
    first_copy, last_copy : int64 arrays, dims (packet,)
        Rows of :attr:`copies`; -1 where none.
    receive : int64 array, dims (packet,)
        Row of :attr:`receives`: the call that returned the last byte; -1 where none.
    anchors_disagree : bool array, dims (packet,)
        The stream position of the copy differs from its neighbours': the row must not be trusted.
    copies, receives : Columns
        The events themselves (peeks excluded from `copies`).
    bytes_copied : dict
        Flow number -> bytes copied from its skbs, for the byte-sum gate.
    """

    first_copy: np.ndarray
    last_copy: np.ndarray
    receive: np.ndarray
    anchors_disagree: np.ndarray
    copies: Columns
    receives: Columns
    bytes_copied: dict[int, int]


def unwrap_sequence(seq: np.ndarray) -> np.ndarray:
    """Return 32-bit sequence numbers as int64 stream positions, in the order given (RFC 9293: modulo 2**32)."""
    if not len(seq):
        return seq.astype(np.int64)
    step: np.ndarray = np.diff(seq.astype(np.int64))
    step = np.mod(step + 2**31, 2**32) - 2**31
    return int(seq[0]) + np.concatenate(([0], np.cumsum(step)))


def consume(
    events: Mapping[str, Columns],
    path: KernelPath,
    skb: np.ndarray,
    flow: np.ndarray,
    position: np.ndarray,
    payload_len: np.ndarray,
    is_tcp: np.ndarray,
) -> Consumption:
    """Find for each packet the copy and the receive call that took its bytes.

    Parameters
    ----------
    skb : int64 array, dims (packet,)
        Row of `path` for each packet, -1 where unmatched.
    flow : int32 array, dims (packet,)
        Directed flow number.
    position : int64 array, dims (packet,)
        Unwrapped sequence number of the first payload byte (TCP).
    payload_len : integer array, dims (packet,)
    is_tcp : bool array, dims (packet,)
    """
    receives = event_columns(events, "sock:sock_recv_length")
    if "family" in receives:
        receives = receives.take(np.isin(receives["family"], (2, 10)))
    copies = event_columns(events, "skb:skb_copy_datagram_iovec")
    calls = AsOf(receives["rank"], receives["tid"])
    call = calls.first_after(copies["rank"], copies["tid"])
    copies = copies.with_columns(call=call)
    is_peek = (
        (pick(receives["flags"].astype(np.int64), call, 0) & MSG_PEEK) > 0 if receives.n else np.zeros(copies.n, bool)
    )
    copies = copies.take(~is_peek)
    n = len(skb)
    result = Consumption(
        np.full(n, -1, np.int64),
        np.full(n, -1, np.int64),
        np.full(n, -1, np.int64),
        np.zeros(n, bool),
        copies,
        receives,
        {},
    )
    if receives.n:
        _consume_streams(result, path, skb, flow, position, payload_len, is_tcp)
        _consume_datagrams(result, path, skb, payload_len, ~is_tcp)
    return result


def _copy_positions(
    result: Consumption, path: KernelPath, skb: np.ndarray, flow: np.ndarray, position: np.ndarray, is_tcp: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return flow and stream position of each copy (flow -1 where its skb has no packet)."""
    copies = result.copies
    rx = STAGE_INDEX["netif_receive_skb"]
    lives = AsOf(path.rank[:, rx], path.columns["skbaddr"])
    life = lives.last_before(copies["rank"], copies["skbaddr"].astype(np.uint64))
    # A copy after the end of the life belongs to a packet of another device or to one that was not recorded.
    life = np.where(pick(path.columns["end_rank"], life, 0) > copies["rank"], life, -1)
    packet_of = np.full(len(path.rank) + 1, -1, np.int64)
    packet_of[skb[skb >= 0]] = np.flatnonzero(skb >= 0)
    packet = packet_of[life]
    usable = (packet >= 0) & is_tcp[packet] if len(is_tcp) else np.zeros(copies.n, bool)
    length = copies["len"].astype(np.int64)
    # Bytes copied from the same life before: a running sum per life, in rank order.
    order = np.lexsort((copies["rank"], life))
    total = np.concatenate(([0], np.cumsum(length[order])[:-1])) if copies.n else length
    starts = np.flatnonzero(np.concatenate(([True], life[order][1:] != life[order][:-1]))) if copies.n else order
    base = np.repeat(total[starts], np.diff(np.concatenate((starts, [copies.n])))) if copies.n else total
    before = np.empty(copies.n, np.int64)
    before[order] = total - base
    return np.where(usable, flow[packet], -1), np.where(usable, position[packet] + before, 0)


def _consume_streams(
    result: Consumption,
    path: KernelPath,
    skb: np.ndarray,
    flow: np.ndarray,
    position: np.ndarray,
    payload_len: np.ndarray,
    is_tcp: np.ndarray,
) -> None:
    """Join TCP packets to copies by stream position."""
    copies = result.copies
    if not copies.n:
        return
    copy_flow, copy_start = _copy_positions(result, path, skb, flow, position, is_tcp)
    length = copies["len"].astype(np.int64)
    order = np.lexsort((copies["rank"], copy_flow))
    order = order[copy_flow[order] >= 0]
    data = np.flatnonzero(is_tcp & (payload_len > 0) & (flow >= 0))
    rx_rank = np.where(skb >= 0, pick(path.rank[:, STAGE_INDEX["netif_receive_skb"]], skb, -1), -1)
    edges = np.flatnonzero(np.diff(copy_flow[order], prepend=-2, append=-2))
    by_flow = data[np.argsort(flow[data], kind="stable")]
    flow_edges = np.searchsorted(flow[by_flow], copy_flow[order[edges[:-1]]], side="left") if len(order) else edges
    for k in range(len(edges) - 1):
        rows = order[edges[k] : edges[k + 1]]
        number = int(copy_flow[rows[0]])
        stop = np.searchsorted(flow[by_flow], number, side="right")
        packets = by_flow[flow_edges[k] : stop]
        result.bytes_copied[number] = int(length[rows].sum())
        _consume_stream(result, packets, rows, copy_start[rows], length[rows], position, payload_len, rx_rank)


def _consume_stream(
    result: Consumption,
    packets: np.ndarray,
    rows: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    position: np.ndarray,
    payload_len: np.ndarray,
    rx_rank: np.ndarray,
) -> None:
    """Join one flow: its packets to its copies, both in stream order."""
    # Copies of one stream continue each other exactly. A copy whose position does not continue the one before, nor is
    # continued by the one after, was anchored wrongly (a lost event, a collapsed skb).
    continues = np.concatenate(([True], start[1:] == start[:-1] + length[:-1]))
    continued = np.concatenate((continues[1:], [True]))
    disagree = ~(continues | continued) if len(rows) > 1 else ~continues
    # A break inside the stream makes both neighbours suspect unless the stream really skips (packets not captured).
    order = np.lexsort((rows, start))
    begin, end = start[order], start[order] + length[order]
    copy_rank = result.copies["rank"][rows][order]
    first_byte, last_byte = position[packets], position[packets] + payload_len[packets] - 1
    at = np.searchsorted(begin, first_byte, side="right") - 1
    to = np.searchsorted(begin, last_byte, side="right") - 1
    found = (at >= 0) & (to >= 0)
    at, to = np.maximum(at, 0), np.maximum(to, 0)
    found &= (end[at] > first_byte) & (end[to] > last_byte)
    # Bytes copied before this packet arrived were another packet's: this one is a duplicate and owns nothing.
    found &= copy_rank[at] > rx_rank[packets]
    # Every byte between must have been copied too: a hole means the join must not claim the packet.
    hole = np.cumsum(np.concatenate(([0], (begin[1:] != end[:-1]).astype(np.int64))))
    found &= hole[at] == hole[to]
    result.first_copy[packets] = np.where(found, rows[order][at], -1)
    result.last_copy[packets] = np.where(found, rows[order][to], -1)
    result.receive[packets] = np.where(found, result.copies["call"][rows[order][to]], -1)
    result.anchors_disagree[packets] = found & (disagree[order][at] | disagree[order][to])


def _consume_datagrams(
    result: Consumption, path: KernelPath, skb: np.ndarray, payload_len: np.ndarray, is_udp: np.ndarray
) -> None:
    """Join UDP packets to receive calls: first queued, first received, per socket, with equal lengths."""
    ready = STAGE_INDEX["data_ready"]
    packets = np.flatnonzero(is_udp & (skb >= 0))
    packets = packets[path.rank[skb[packets], ready] >= 0]
    receives = result.receives
    calls = np.flatnonzero((receives["protocol"] != 6) & (receives["ret"] >= 0) & ((receives["flags"] & MSG_PEEK) == 0))
    sockets = path.columns["socket"][skb[packets]]
    queue = packets[np.lexsort((path.rank[skb[packets], ready], sockets))]
    queue_socket = path.columns["socket"][skb[queue]]
    call_socket = receives["sk"][calls].astype(np.uint64)
    calls = calls[np.lexsort((receives["rank"][calls], call_socket))]
    call_socket = receives["sk"][calls].astype(np.uint64)
    for socket in np.unique(queue_socket):
        mine = queue[queue_socket == socket]
        taken = calls[call_socket == socket]
        _consume_queue(result, mine, path.rank[skb[mine], ready], payload_len[mine], taken)


def _consume_queue(
    result: Consumption, packets: np.ndarray, ready_rank: np.ndarray, payload_len: np.ndarray, calls: np.ndarray
) -> None:
    """Join one socket's queue to its receive calls.

    Calls that returned before the first datagram seen took datagrams that came before the recording began.
    """
    rank = result.receives["rank"][calls]
    returned = result.receives["ret"][calls].astype(np.int64)
    skipped = int(np.searchsorted(rank, ready_rank[0])) if len(ready_rank) else 0
    rank, returned, calls = rank[skipped:], returned[skipped:], calls[skipped:]
    n = min(len(packets), len(calls))
    # ret is the datagram's length, or less when the caller's buffer was too small (MSG_TRUNC).
    fits = (returned[:n] == payload_len[:n]) & (rank[:n] > ready_rank[:n])
    result.receive[packets[:n]] = np.where(fits, calls[:n], -1)
    # Beyond the first misfit the queue position is not known any more.
    misfit = np.flatnonzero(~fits)
    if len(misfit):
        result.anchors_disagree[packets[misfit[0] : n]] = True


@dataclass
class Wake:
    """Why the reader ran: rows of the scheduler events of each packet, -1 where none, and the attribution class."""

    waking: np.ndarray
    wakeup: np.ndarray
    switch_in: np.ndarray
    attribution: np.ndarray


def attribute(
    events: Mapping[str, Columns],
    tid: np.ndarray,
    ready_rank: np.ndarray,
    ready_cpu: np.ndarray,
    wake_limit: np.ndarray,
    consumed_rank: np.ndarray,
) -> Wake:
    """Tell for each consumed packet why its reader ran (alignment.md 2.2).

    Parameters
    ----------
    tid : int64 array, dims (packet,)
        The task that consumed it, -1 where none.
    ready_rank, ready_cpu : int64 arrays, dims (packet,)
        The event that made it readable: data_ready, else the last kernel stage seen; -1 where none.
    wake_limit : int64 array, dims (packet,)
        Rank up to which a wake-up on `ready_cpu` was caused by this packet's data_ready.
    consumed_rank : int64 array, dims (packet,)
        First copy, or the receive call where there is no copy event.
    """
    waking, wakeup, switch = (event_columns(events, f"sched:sched_{name}") for name in ("waking", "wakeup", "switch"))
    switches_in = AsOf(switch["rank"], _pids(switch, "next_pid"))
    switches_out = AsOf(switch["rank"], _pids(switch, "prev_pid"))
    by_task = AsOf(waking["rank"], _pids(waking, "pid"))
    by_cpu = AsOf(waking["rank"], waking["cpu"], _pids(waking, "pid"))
    runnable = AsOf(wakeup["rank"], _pids(wakeup, "pid"))
    known = (tid >= 0) & (consumed_rank >= 0)
    arrived = switches_in.last_before(np.where(known, consumed_rank, -1), tid)
    arrived_rank = switches_in.rank_of(arrived, -1)
    slept = switches_out.rank_of(switches_out.last_before(arrived_rank, tid), -1)
    own = by_cpu.first_after(np.where(known, ready_rank, -1), ready_cpu, tid)
    own_rank = by_cpu.rank_of(own, _NEVER)
    # A wake-up that comes after the copy is spurious: the reader won the race.
    is_own = (own >= 0) & (own_rank < wake_limit) & (own_rank < arrived_rank)
    # A wake-up before the task's last switch-out belongs to an earlier sleep, except that a task may be woken on its way to
    # sleep: then its waking precedes the switch-out of a preemption, which does not end the wait.
    woken = by_task.last_before(arrived_rank, tid)
    woken_rank = by_task.rank_of(woken, -1)
    running = known & (arrived_rank < ready_rank)
    label = np.zeros(len(tid), np.int8)
    names = {name: ATTRIBUTIONS.index(name) for name in ATTRIBUTIONS}
    waiting = known & ~running & (arrived >= 0)
    label[known] = names["running"]
    label[waiting] = names["other_wake"]
    label[waiting & (woken_rank < ready_rank)] = names["coalesced"]
    label[waiting & (woken_rank < slept)] = names["preempted"]
    label[waiting & is_own] = names["own_wake"]
    woke = waiting & is_own
    own = np.where(woke, own, -1)
    got_runnable = runnable.first_after(by_cpu.rank_of(own, -1), tid)
    got_runnable = np.where(runnable.rank_of(got_runnable, _NEVER) < arrived_rank, got_runnable, -1)
    return Wake(own, got_runnable, np.where(waiting, arrived, -1), label)


def _pids(columns: Columns, field: str) -> np.ndarray:
    """Return a task id field of a scheduler event; it is the event's own field, not the task that ran."""
    name = f"field_{field}" if f"field_{field}" in columns else field
    return columns[name].astype(np.int64) if name in columns else np.empty(0, np.int64)
