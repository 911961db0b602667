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
    is_udp: np.ndarray,
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
    is_tcp, is_udp : bool arrays, dims (packet,)
    """
    receives = event_columns(events, "sock:sock_recv_length")
    if "family" in receives:
        receives = receives.take(np.isin(receives["family"], (2, 10)))
    copies = event_columns(events, "skb:skb_copy_datagram_iovec")
    calls = AsOf(receives["rank"], receives["tid"])
    call = calls.first_after(copies["rank"], copies["tid"])
    copies = copies.with_columns(call=call, doubtful=_doubtful_calls(events, copies, receives, call))
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
        _consume_datagrams(result, events, path, skb, flow, payload_len, is_udp)
    return result


def _doubtful_calls(events: Mapping[str, Columns], copies: Columns, receives: Columns, call: np.ndarray) -> np.ndarray:
    """Tell which copies cannot be told to belong to the receive call that follows them.

    A call returns what it copied. Where the sums differ an event is missing: either a copy, or the end of the call the copy
    really belonged to, which would hand its packets to a later one. A task that slept between the two was not in that call.
    """
    if not copies.n or not receives.n:
        return call < 0
    sums = np.bincount(call[call >= 0], weights=copies["len"][call >= 0], minlength=receives.n).astype(np.int64)
    differs = sums != np.maximum(receives["ret"], 0)
    switch = event_columns(events, "sched:sched_switch")
    asleep = switch.take(_sleeps(switch))
    slept = AsOf(asleep["rank"], _pids(asleep, "prev_pid"))
    returned = pick(receives["rank"], call, -1)
    sleep_rank = slept.rank_of(slept.last_before(returned, copies["tid"].astype(np.int64)), -1)
    return (call < 0) | pick(differs, call, 0) | (sleep_rank > copies["rank"])


def _sleeps(switch: Columns) -> np.ndarray:
    """Tell which task switches are sleeps: any state but running (0, with TASK_REPORT_MAX, 0x100, for a preemption)."""
    if "prev_state" not in switch:
        return np.ones(switch.n, bool)
    return (switch["prev_state"].astype(np.int64) & 0xFF) != 0


def _copy_positions(
    result: Consumption,
    path: KernelPath,
    skb: np.ndarray,
    flow: np.ndarray,
    position: np.ndarray,
    payload_len: np.ndarray,
    is_tcp: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return flow and stream position of each copy, and whether its skb was copied whole.

    Flow is -1 where the skb has no packet. "Whole" means that the copies of one skb add up to its packet's payload, which
    no lost copy event could leave so.
    """
    copies = result.copies
    rx = STAGE_INDEX["netif_receive_skb"]
    lives = AsOf(path.rank[:, rx], path.columns["skbaddr"])
    life = lives.last_before(copies["rank"], copies["skbaddr"].astype(np.uint64))
    # A copy after the end of the life belongs to a packet of another device or to one that was not recorded.
    life = np.where(pick(path.columns["end_rank"], life, 0) > copies["rank"], life, -1)
    packet_of = np.full(len(path.rank) + 1, -1, np.int64)
    packet_of[skb[skb >= 0]] = np.flatnonzero(skb >= 0)
    packet = packet_of[life]
    # AF_UNIX and netlink receive by the same event; an skb address of theirs may be one a packet had before. The call that
    # followed tells: it must be on the packet's socket.
    socket, called = path.columns["socket"][life], pick(result.receives["sk"], copies["call"], 0).astype(np.uint64)
    usable = (packet >= 0) & is_tcp[packet] & ((called == socket) | ((socket == 0) & (copies["call"] >= 0)))
    length = copies["len"].astype(np.int64)
    # Bytes copied from the same life before: a running sum per life, in rank order.
    order = np.lexsort((copies["rank"], life))
    total = np.concatenate(([0], np.cumsum(length[order])[:-1]))
    starts = np.flatnonzero(np.concatenate(([True], life[order][1:] != life[order][:-1])))
    sizes = np.diff(np.concatenate((starts, [copies.n])))
    before = np.empty(copies.n, np.int64)
    before[order] = total - np.repeat(total[starts], sizes)
    whole = np.empty(copies.n, bool)
    sums = np.add.reduceat(length[order], starts)
    whole[order] = np.repeat(sums, sizes) == np.where(usable, payload_len[packet], -1)[order]
    # Beyond the skb's own bytes a copy is of bytes merged into it, unless its call does not add up either: then the address
    # was reused where no birth is recorded (AF_UNIX, netlink).
    usable &= ~(copies["doubtful"] & (before >= np.where(packet >= 0, payload_len[packet], 0)))
    return np.where(usable, flow[packet], -1), np.where(usable, position[packet] + before, 0), whole


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
    if not copies.n or not len(skb):
        return
    copy_flow, copy_start, whole = _copy_positions(result, path, skb, flow, position, payload_len, is_tcp)
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
        _consume_stream(
            result, number, packets, rows, copy_start[rows], length[rows], whole[rows], position, payload_len, rx_rank
        )


def _consume_stream(
    result: Consumption,
    number: int,
    packets: np.ndarray,
    rows: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    whole: np.ndarray,
    position: np.ndarray,
    payload_len: np.ndarray,
    rx_rank: np.ndarray,
) -> None:
    """Join one flow: its packets to its copies, both in stream order."""
    # A copy that goes back in the stream and whose call does not add up was never of this stream: its skb address is one
    # that the stream used before.
    back = start < np.maximum.accumulate(start + length) - length
    foreign = back & result.copies["doubtful"][rows]
    result.bytes_copied[number] = int(length[~foreign].sum())
    rows, start, length, whole = rows[~foreign], start[~foreign], length[~foreign], whole[~foreign]
    # Copies of one stream continue each other exactly. Where events were lost they do not, and a copy is then believed
    # only if its own skb was copied whole: its position needs no neighbour.
    continues = np.concatenate(([True], start[1:] == start[:-1] + length[:-1]))
    continued = np.concatenate((continues[1:], [True]))
    overlaps = np.concatenate(([False], start[1:] < start[:-1] + length[:-1]))
    overlaps[:-1] |= overlaps[1:].copy()
    disagree = overlaps | ~(whole | (continues & continued))
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
    doubtful = result.copies["doubtful"][rows][order]
    result.anchors_disagree[packets] = found & (disagree[order][at] | disagree[order][to] | doubtful[to])


def _consume_datagrams(
    result: Consumption,
    events: Mapping[str, Columns],
    path: KernelPath,
    skb: np.ndarray,
    flow: np.ndarray,
    payload_len: np.ndarray,
    is_udp: np.ndarray,
) -> None:
    """Join UDP packets to receive calls: first queued, first received, per socket, with equal lengths."""
    ready = STAGE_INDEX["data_ready"]
    packets = np.flatnonzero(is_udp & (flow >= 0))
    ready_rank = pick(path.rank[:, ready], skb[packets], -1)
    socket = np.where(ready_rank >= 0, pick(path.columns["socket"], skb[packets], 0), 0)
    packets, ready_rank, socket = _place_unseen(packets, ready_rank, socket, flow, path, skb)
    receives = result.receives
    calls = np.flatnonzero((receives["protocol"] != 6) & (receives["ret"] >= 0) & ((receives["flags"] & MSG_PEEK) == 0))
    queue = np.lexsort((np.arange(len(packets)), socket))
    packets, ready_rank, socket = packets[queue], ready_rank[queue], socket[queue]
    call_socket = receives["sk"][calls].astype(np.uint64)
    calls = calls[np.lexsort((receives["rank"][calls], call_socket))]
    call_socket = receives["sk"][calls].astype(np.uint64)
    woken_call = _calls_woken(events, path, skb[packets], ready_rank, receives, calls)
    for number in np.unique(socket):
        mine = np.flatnonzero(socket == number)
        low, high = np.searchsorted(call_socket, [number, number + np.uint64(1)])
        woken = np.where((woken_call[mine] >= low) & (woken_call[mine] < high), woken_call[mine] - low, -1)
        _consume_queue(result, packets[mine], ready_rank[mine], payload_len[packets[mine]], calls[low:high], woken)


def _place_unseen(
    packets: np.ndarray, ready_rank: np.ndarray, socket: np.ndarray, flow: np.ndarray, path: KernelPath, skb: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give packets whose events perf did not deliver their place in the queue of their flow's socket.

    A packet that was captured, whose flow feeds one socket only, and that has no event at all was queued there like its
    neighbours; leaving it out would shift every later datagram by one. One that entered the stack but was never queued was
    dropped, and has no place.
    """
    seen = ready_rank >= 0
    numbers, inverse = np.unique(flow[packets], return_inverse=True)
    low = np.full(len(numbers), np.iinfo(np.uint64).max, np.uint64)
    high = np.zeros(len(numbers), np.uint64)
    np.minimum.at(low, inverse[seen], socket[seen])
    np.maximum.at(high, inverse[seen], socket[seen])
    place = ~seen & (skb[packets] < 0) & (low == high)[inverse]
    socket = np.where(place, high[inverse], socket)
    keep = seen | place
    packets, ready_rank, socket = packets[keep], ready_rank[keep], socket[keep]
    # In capture order, which is queue order on one socket except where CPUs race; seen ranks then put it right.
    order = np.argsort(packets, kind="stable")
    packets, ready_rank, socket = packets[order], ready_rank[order], socket[order]
    slots = np.flatnonzero(ready_rank >= 0)
    ranked = slots[np.argsort(ready_rank[slots], kind="stable")]
    packets[slots], socket[slots], ready_rank[slots] = packets[ranked], socket[ranked], ready_rank[ranked]
    return packets, ready_rank, socket


def _calls_woken(
    events: Mapping[str, Columns],
    path: KernelPath,
    skb: np.ndarray,
    ready_rank: np.ndarray,
    receives: Columns,
    calls: np.ndarray,
) -> np.ndarray:
    """Return for each queued packet the position in `calls` of the call it woke, -1 where it woke none.

    A reader asleep on a socket has emptied it, so the packet that wakes it is the next one returned: a fixed point of the
    queue that needs no counting. Only sockets with a single reader have it.
    """
    waking = event_columns(events, "sched:sched_waking")
    ready = STAGE_INDEX["data_ready"]
    cpu = np.where(ready_rank >= 0, pick(path.cpu[:, ready], skb, -1), -1)
    limit = pick(path.columns["wake_limit"], skb, 0)
    by_cpu = AsOf(waking["rank"], waking["cpu"])
    row = by_cpu.first_after(ready_rank, cpu)
    row = np.where(by_cpu.rank_of(row, _NEVER) < limit, row, -1)
    woken_tid = pick(_pids(waking, "pid"), row, -1)
    sockets, tids = receives["sk"][calls].astype(np.uint64), receives["tid"][calls].astype(np.int64)
    pairs = np.unique(np.stack([sockets, tids.astype(np.uint64)], axis=1), axis=0)
    single = np.unique(pairs[:, 0], return_counts=True)
    lonely = single[0][single[1] == 1]
    socket = pick(path.columns["socket"], skb, 0)
    following = AsOf(receives["rank"][calls], sockets, tids)
    call = following.first_after(by_cpu.rank_of(row, -1), socket, woken_tid)
    return np.where(np.isin(socket, lonely), call, -1)


def _consume_queue(
    result: Consumption,
    packets: np.ndarray,
    ready_rank: np.ndarray,
    payload_len: np.ndarray,
    calls: np.ndarray,
    woken: np.ndarray,
) -> None:
    """Join one socket's queue to its receive calls: counting from the fixed points, believed where both neighbours agree."""
    if not len(calls):
        return
    rank, returned = result.receives["rank"][calls], result.receives["ret"][calls].astype(np.int64)
    place = np.arange(len(packets))
    fixed = np.flatnonzero(woken >= 0)
    if len(fixed):
        shift = woken[fixed] - fixed
        before = np.searchsorted(fixed, place, side="right") - 1
        after = np.searchsorted(fixed, place, side="left")
        left = shift[np.maximum(before, 0)]
        right = shift[np.minimum(after, len(fixed) - 1)]
        left = np.where(before >= 0, left, right)
        right = np.where(after < len(fixed), right, left)
    else:
        # Calls that returned before the first datagram seen took datagrams from before the recording.
        first = ready_rank[ready_rank >= 0]
        left = right = np.full(len(packets), int(np.searchsorted(rank, first[0])) if len(first) else 0)
    call = place + left
    inside = (call >= 0) & (call < len(calls))
    at = np.clip(call, 0, len(calls) - 1)
    # ret is the datagram's length, or less when the caller's buffer was too small (MSG_TRUNC).
    fits = inside & (left == right) & (returned[at] == payload_len) & (rank[at] > ready_rank)
    result.receive[packets] = np.where(fits, calls[at], -1)
    result.anchors_disagree[packets] = inside & ~fits


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
