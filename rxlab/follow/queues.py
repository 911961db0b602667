"""UDP: a socket is a FIFO. The k-th datagram queued is the k-th received.

Copies of linear UDP skbs have no event, so datagrams are counted; a reader that a datagram woke from its sleep is a fixed point
of the queue that needs no counting.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.consumption import MSG_PEEK, Consumption, Segments
from rxlab.follow.kernelpath import KernelPath, event_columns, task_ids
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX

_NEVER = np.iinfo(np.int64).max


def consume_datagrams(result: Consumption, events: Mapping[str, Columns], path: KernelPath, segments: Segments) -> None:
    """Join UDP packets to receive calls: first queued, first received, per socket, with equal lengths."""
    ready, skb, flow, payload_len = STAGE_INDEX["data_ready"], segments.skb, segments.flow, segments.length
    packets = np.flatnonzero(segments.is_udp & (flow >= 0))
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
    woken_tid = pick(task_ids(waking, "pid"), row, -1)
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
    result.anchors_disagree[packets] = (inside & ~fits) | _overtaken_in_call(result, calls[at], fits, ready_rank)


def _overtaken_in_call(result: Consumption, call: np.ndarray, fits: np.ndarray, ready_rank: np.ndarray) -> np.ndarray:
    """Tell which datagrams two readers of one socket may have taken in the other order.

    A call is seen where it returns, not where it dequeues: when two tasks return one after the other and the second
    datagram was there before the first call returned, either may have taken either.
    """
    tid, rank = result.receives["tid"][call], result.receives["rank"][call]
    swapped = fits[:-1] & fits[1:] & (tid[:-1] != tid[1:]) & (ready_rank[1:] < rank[:-1])
    doubt = np.zeros(len(call), bool)
    doubt[:-1] |= swapped
    doubt[1:] |= swapped
    return doubt
