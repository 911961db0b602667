"""UDP: a socket is a FIFO. The k-th datagram queued is the k-th received.

Copies of linear UDP skbs have no event, so datagrams are told by their place in the queue: each call's place lies between bounds
(bounds.py) from what had arrived, from a reader that found its queue empty, and from a reader that a datagram woke from its sleep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from rxlab.follow.asof import AsOf, pick, places
from rxlab.follow.bounds import NOWHERE, Calls, close_in
from rxlab.follow.clockfit import NAT
from rxlab.follow.consumption import MSG_PEEK, TASK_INTERRUPTIBLE, Consumption, Segments, sleeps
from rxlab.follow.feeding import Earlier, queued_datagrams
from rxlab.follow.hidden import Hidden
from rxlab.follow.kernelpath import KernelPath, event_columns, task_ids
from rxlab.follow.refusals import EAGAIN, fold_refusals
from rxlab.follow.together import beside
from rxlab.follow.wake import first_wakes
from rxlab.read.columns import Columns
from rxlab.stages import RECEIVE_ENTRIES, STAGE_INDEX

# Datagrams without data_ready that tell a kernel which leaves it out from one whose event was not delivered.
MIN_BEHIND = 5
# How far apart two CPUs must have received two datagrams for their order in the queue to be known, without data_ready.
RACE_NS = 10_000
# Of sockets with more readers it is not looked at whether all of them sleep.
MAX_READERS = 64
# A socket that nobody read for this long before its first datagram had nothing to read.
QUIET_NS = 10_000_000
_NEVER = np.iinfo(np.int64).max
_RX, _READY = STAGE_INDEX["netif_receive_skb"], STAGE_INDEX["data_ready"]


@dataclass(frozen=True)
class Queue:
    """The datagrams of one socket in the order they were queued; dims (datagram,).

    Attributes
    ----------
    packet : int64 array
        Row of the captured packets.
    ready_rank : int64 array
        Rank of its data_ready, -1 where that was not seen.
    arrival : int64 array, nanoseconds of CLOCK_MONOTONIC
        Before this it cannot have been read.
    length : int64 array
        Payload bytes.
    waking : int64 array
        Rank of the wake-up its data_ready made, -1 where none; with the task woken in ``woken``.
    woken : int64 array
    is_sure : bool array
        It was queued; else it may have been dropped.
    is_first : bool
        This kernel calls data_ready only where the receive queue was empty. (Not the whole socket: readers move it aside.)
    is_cut : bool
        Datagrams that were in it before are not at hand any more.
    call_rank : int64 array
        Rank of the call that an earlier part of the recording showed to have read it, -1 where none.
    """

    packet: np.ndarray
    ready_rank: np.ndarray
    arrival: np.ndarray
    length: np.ndarray
    waking: np.ndarray
    woken: np.ndarray
    is_sure: np.ndarray
    is_first: bool
    is_cut: bool
    call_rank: np.ndarray


@dataclass(frozen=True)
class Begun:
    """When the recording began, and when tasks went to sleep and came back, by task.

    Attributes
    ----------
    earlier : Earlier
    sleeps, leaves, returns : AsOf
        Switches away into sleep that a signal may end: what the task returns later it took later; all away; and those to a task.
    calls, entries : AsOf
        Returns of receive calls; their entries, where those were recorded.
    wakings : AsOf
        Wake-ups of a task.
    slept_time, waking_time : int64 arrays, nanoseconds of CLOCK_MONOTONIC
        Their times.
    """

    earlier: Earlier
    sleeps: AsOf
    leaves: AsOf
    returns: AsOf
    calls: AsOf
    entries: AsOf
    wakings: AsOf
    slept_time: np.ndarray
    waking_time: np.ndarray

    @classmethod
    def of(cls, earlier: Earlier, events: Mapping[str, Columns], receives: Columns) -> Begun:
        """Return what the switches and the receive calls of a recording tell."""
        switch, waking = (event_columns(events, f"sched:sched_{name}") for name in ("switch", "waking"))
        # Uninterruptible is a wait for memory or a lock, which a reader may come to with a datagram in hand.
        told = "prev_state" in switch
        asleep = switch.take(sleeps(switch, TASK_INTERRUPTIBLE) if told else np.zeros(switch.n, bool))
        return cls(
            earlier,
            AsOf(asleep["rank"], task_ids(asleep, "prev_pid")),
            AsOf(switch["rank"], task_ids(switch, "prev_pid")),
            AsOf(switch["rank"], task_ids(switch, "next_pid")),
            AsOf(receives["rank"], receives["tid"]),
            _entries(events),
            AsOf(waking["rank"], task_ids(waking, "pid")),
            asleep["time"],
            waking["time"],
        )


def _entries(events: Mapping[str, Columns]) -> AsOf:
    """Return where tasks entered receive system calls, of any file: the last such entry before a receive call returned is its own."""
    entered = [event_columns(events, name) for name in RECEIVE_ENTRIES]
    rank, tid = (np.concatenate([columns[name] for columns in entered]) for name in ("rank", "tid"))
    return AsOf(rank, tid)


def consume_datagrams(
    result: Consumption,
    events: Mapping[str, Columns],
    path: KernelPath,
    segments: Segments,
    hidden: Hidden,
    lossy: Hidden,
    earlier: Earlier,
) -> None:
    """Join UDP packets to receive calls: first queued, first received, per socket, with equal lengths.

    Where a task is blind its softirqs are not seen, so datagrams may be missing (`hidden`); the calls of a reader that is
    not blind itself are all there, except where events were lost (`lossy`).
    """
    receives = result.receives
    if not segments.is_udp.any():
        return
    reading = beside(_calls_by_socket, events, receives, earlier)
    packets, ready_rank, socket, sure = queued_datagrams(result, events, path, segments, hidden, earlier.fed)
    order = np.argsort(socket, kind="stable")
    packets, ready_rank, socket, sure = packets[order], ready_rank[order], socket[order], sure[order]
    result.socket[packets] = socket
    # Some surely queued, and nobody told: this kernel calls data_ready only where the queue was empty.
    result.is_silent[packets] = sure & (ready_rank < 0)
    is_first = bool(earlier.fed.behind + result.is_silent[~segments.is_counted].sum() >= MIN_BEHIND)
    waking, woken = first_wakes(events, path, np.where(ready_rank >= 0, segments.skb[packets], -1), hidden)
    taking, calls, begun = reading()
    edges = np.flatnonzero(np.concatenate(([True], socket[1:] != socket[:-1], [True]))) if len(socket) else [0]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        mine = slice(low, high)
        rows = packets[mine]
        queue = Queue(
            rows,
            ready_rank[mine],
            segments.arrival[rows],
            segments.length[rows],
            waking[mine],
            woken[mine],
            sure[mine],
            is_first,
            bool(np.isin(socket[low], earlier.fed.left)),
            segments.call_rank[rows],
        )
        _consume_queue(result, queue, taking[calls.rows_of(socket[low : low + 1])], begun, lossy)
    _doubt_crossed(result, path, segments, packets, socket)


def _calls_by_socket(
    events: Mapping[str, Columns], receives: Columns, earlier: Earlier
) -> tuple[np.ndarray, AsOf, Begun]:
    """Return the rows of the calls that take datagrams, these by socket, and what is known of when they began."""
    taking = np.flatnonzero((receives["protocol"] != 6) & ((receives["flags"] & MSG_PEEK) == 0))
    calls = AsOf(receives["rank"][taking], receives["sk"][taking].astype(np.uint64, copy=False))
    return taking, calls, Begun.of(earlier, events, receives)


def _consume_queue(
    result: Consumption, queue: Queue, calls: np.ndarray, begun: Begun, lossy: Hidden, *, may_fold: bool = True
) -> None:
    """Join one socket's queue to its receive calls (rows of the receive events, in order, refusals included)."""
    receives, every, folded = result.receives, calls, None
    if queue.is_cut:
        # Of the calls before those that are all at hand only one is needed: the last that is known.
        known = queue.call_rank[queue.call_rank >= 0]
        calls = calls[receives["rank"][calls] >= (known.min() if len(known) else begun.earlier.rank)]
    if may_fold and not lossy.any:
        folded = fold_refusals(
            receives, calls, queue.arrival, queue.ready_rank, (begun.calls, begun.sleeps, begun.entries)
        )
    if folded is not None:
        calls = folded.calls
    else:
        ret, tid = receives["ret"][calls].astype(np.int64), receives["tid"][calls]
        # Another reader may still have to return what it took when one finds nothing.
        calls = calls[(ret >= 0) | ((ret == EAGAIN) & bool(len(tid) and (tid == tid[0]).all()))]
    if not len(calls) or not len(queue.packet):
        return
    returned = receives["ret"][calls].astype(np.int64)
    place, takes = np.arange(len(queue.packet)), returned >= 0
    # A datagram whose data_ready was not seen may have been dropped: the call after the one before it may have skipped it.
    preceding = np.concatenate(([-2, -1], np.maximum.accumulate(np.where(queue.is_sure, place, -1))))[: len(place) + 1]
    following = _next_sure(queue.is_sure)
    own = _bounded(receives, queue, calls, begun, lossy, following)
    if folded is not None:
        own = replace(own, low=np.maximum(own.low, folded.low), high=np.minimum(own.high, folded.high))
    bounds = close_in(own, following, preceding)
    at, known = bounds.place, takes & (bounds.place >= 0) & (bounds.place < len(place))
    slot = np.where(known, at, 0)
    # A reader's buffer may be smaller than its datagrams: then every such call returns as much as it holds.
    cut = (returned == max(returned.max(), begun.earlier.fed.largest)) & (queue.length[slot] > returned)
    fits = known & ((queue.length[slot] == returned) | cut)
    crossed = _overtaken_in_call(receives, calls[takes], np.where(known, at, -1)[takes], queue, begun, lossy)
    # Of two readers each may have what the other is said to have: there a length says nothing of the count.
    wrong = known & ~fits & ~crossed[slot]
    if folded is not None and (wrong.any() or not bounds.agree):
        _consume_queue(result, queue, every, begun, lossy, may_fold=False)
        return
    if wrong.any():
        # One length that does not fit says that the count is off; it was the same for the calls around.
        shift = np.where(known, at - np.cumsum(takes), np.iinfo(np.int64).min)
        run = np.cumsum(np.concatenate(([True], shift[1:] != shift[:-1])))
        fits &= ~np.isin(run, run[wrong])
    rows = queue.packet[slot[fits]]
    # It may have been in either of two queues, and both have room for it.
    result.anchors_disagree[rows[result.receive[rows] >= 0]] = True
    result.receive[rows] = calls[fits]
    doubt = np.zeros(len(place) + 1, np.int64)
    vague = takes & ~fits & (bounds.high >= 0)
    np.add.at(doubt, np.clip(bounds.low[vague], 0, len(place)), 1)
    np.add.at(doubt, np.clip(bounds.high[vague] + 1, 0, len(place)), -1)
    behind = np.zeros(len(place), bool)
    behind[1:] = pick(receives["time"], result.receive[queue.packet[:-1]], -1) > queue.arrival[1:]
    result.is_behind[queue.packet] = behind & queue.is_first
    in_doubt = (np.cumsum(doubt)[:-1] > 0) & (result.receive[queue.packet] < 0)
    result.anchors_disagree[queue.packet] |= in_doubt | crossed
    result.is_contested[queue.packet] |= crossed


def _bounded(
    receives: Columns, queue: Queue, calls: np.ndarray, begun: Begun, lossy: Hidden, following: np.ndarray
) -> Calls:
    """Return the calls with the bounds that each has of its own."""
    time, takes = receives["time"][calls], receives["ret"][calls] >= 0
    by_arrival = np.argsort(queue.arrival, kind="stable")
    high = pick(np.maximum.accumulate(by_arrival), places(queue.arrival[by_arrival], time) - 1, -1)
    is_next = np.concatenate(([False], ~lossy.touch(time[:-1], time[1:])))
    low = np.full(len(calls), NOWHERE, np.int64)
    readers = np.unique(receives["tid"][calls]).astype(np.int64)
    if len(readers) == 1:
        _bound_woken(low, receives, queue, calls)
    elif len(readers) <= MAX_READERS:
        _bound_all_asleep(low, receives["rank"][calls], queue, readers, begun, lossy)
    _bound_refused(low, receives, queue, calls, begun)
    start, since = int(queue.arrival[by_arrival[0]]), begun.earlier.time
    is_quiet = start - since >= QUIET_NS and time[0] > start and not queue.is_cut
    if is_quiet and not lossy.touch(np.array([since]), time[:1]).any():
        first = following[0] if takes[0] else -1
        low[0], high[0] = max(low[0], min(first, 0)), min(high[0], first)
    known = np.flatnonzero(queue.call_rank >= 0)
    at = np.searchsorted(receives["rank"][calls], queue.call_rank[known])
    low[at], high[at] = known, known
    return Calls(np.zeros(len(calls), np.int64), takes.astype(np.int64), is_next, low, high)


def _bound_woken(low: np.ndarray, receives: Columns, queue: Queue, calls: np.ndarray) -> None:
    """Raise the bounds of calls by what woke their reader: that datagram is the next it returns, all before it had been read."""
    rows = np.flatnonzero(receives["ret"][calls] >= 0)
    woke = np.flatnonzero(queue.waking >= 0)
    mine = AsOf(receives["rank"][calls[rows]], receives["tid"][calls[rows]].astype(np.int64))
    call = mine.first_after(queue.waking[woke], queue.woken[woke])
    np.maximum.at(low, rows[call[call >= 0]], woke[call >= 0])


def _bound_all_asleep(
    low: np.ndarray, rank: np.ndarray, queue: Queue, readers: np.ndarray, begun: Begun, lossy: Hidden
) -> None:
    """Raise the bounds of the calls after a datagram that came while every reader of its socket was asleep.

    What woke one of several readers says nothing of the others, who may hold a datagram or have more to read. But where all of
    them sleep, and each is woken next by a datagram of this socket, each had found the socket empty and nothing came since.
    """
    woke = np.flatnonzero((queue.waking >= 0) & (queue.ready_rank >= 0))
    ready, woken = queue.ready_rank[woke], queue.woken[woke]
    row = begun.wakings.last_before(queue.waking[woke], woken, inclusive=True)
    until = pick(begun.waking_time, row, NAT)
    asleep = np.ones(len(woke), bool)
    for reader in readers.tolist():
        task = np.full(len(woke), reader, np.int64)
        left = begun.sleeps.last_before(ready, task)
        since = begun.sleeps.rank_of(left, -1)
        came = begun.returns.rank_of(begun.returns.last_before(ready, task), -1)
        ended = begun.wakings.rank_of(begun.wakings.first_after(since, task), -1)
        sleeps_here = (left >= 0) & (came < since) & (ended > ready)
        sleeps_here &= np.isin(ended, queue.waking[woke[woken == reader]])
        asleep &= sleeps_here & ~lossy.touch(pick(begun.slept_time, left, NAT), until)
    call = np.searchsorted(rank, ready[asleep])
    inside = call < len(rank)
    np.maximum.at(low, call[inside], woke[asleep][inside])


def _bound_refused(low: np.ndarray, receives: Columns, queue: Queue, calls: np.ndarray, begun: Begun) -> None:
    """Raise the bounds of calls that found nothing (EAGAIN): what was queued before they began had been read.

    Where its entry is not recorded: the task's last call had returned before, and it had woken from its last sleep.
    """
    rows = np.flatnonzero(receives["ret"][calls] < 0)
    if not len(rows):
        return
    rank, tid = receives["rank"][calls[rows]], receives["tid"][calls[rows]].astype(np.int64)
    since = np.full(len(rows), -1, np.int64)
    for index in (begun.calls, begun.sleeps, begun.entries):
        since = np.maximum(since, index.rank_of(index.last_before(rank, tid), -1))
    seen = np.flatnonzero(queue.ready_rank >= 0)
    # Where CPUs raced, up to the first that may still have come later.
    last = pick(seen, places(np.maximum.accumulate(queue.ready_rank[seen]), since) - 1, -1)
    low[rows] = np.where(since >= 0, last, NOWHERE)


def _next_sure(is_sure: np.ndarray) -> np.ndarray:
    """Return for each place, from the one before the first on, the next that is surely filled."""
    n = len(is_sure)
    ahead = np.minimum.accumulate(np.where(is_sure, np.arange(n), n)[::-1])[::-1]
    return np.concatenate((ahead, [n]))


def _overtaken_in_call(
    receives: Columns, calls: np.ndarray, place: np.ndarray, queue: Queue, begun: Begun, lossy: Hidden
) -> np.ndarray:
    """Tell which datagrams several readers of one socket may have taken in another order than they returned.

    A call is seen where it returns, not where it dequeues, and a task may be preempted between the two. So a call may have taken
    any datagram that calls of other tasks are said to have taken since it can have begun, each of those one place further on,
    as long as the next datagram was there when each returned. `place` is that of each call, -1 where it is not known.
    """
    doubt = np.zeros(len(queue.packet) + 1, np.int64)
    tid, rank = receives["tid"][calls].astype(np.int64), receives["rank"][calls]
    placed = np.flatnonzero(place >= 0)
    if not len(placed) or (tid == tid[0]).all():
        return doubt[:-1] > 0
    at, returned = place[placed], np.maximum.accumulate(rank[placed])
    # Where a call returned while the next datagram was still to come nobody had one in hand.
    was_empty = queue.ready_rank[at][1:] > returned[:-1]
    emptied = np.maximum.accumulate(np.concatenate(([-1], np.where(was_empty, np.arange(len(at) - 1), -1))))
    since, is_sure = _begun_since(receives, tid, rank, begun, lossy)
    reach, until = (np.searchsorted(returned, one, side="right") for one in (since, rank))
    # A lost call may have overtaken whatever was returned before its task's next one.
    low = np.where(is_sure, np.maximum(reach, emptied[np.maximum(until, 1) - 1] + 1), reach)
    high, itself = until, (place >= 0).astype(np.int64)
    # What a call whose return nobody saw took was one of those that others returned meanwhile, or of what was left.
    lost = _unseen_returns(receives, np.unique(tid), begun, lossy)
    low = np.append(low, np.searchsorted(returned, lost[0], side="right"))
    high = np.append(high, np.searchsorted(returned, lost[1], side="left"))
    itself = np.append(itself, np.zeros(len(lost[0]), np.int64))
    several = np.flatnonzero(high - low > itself)
    np.add.at(doubt, at[low[several]], 1)
    np.add.at(doubt, at[high[several] - 1] + 1, -1)
    beside = at[_beside_unplaced(since, rank, place < 0)[placed]]
    return (np.cumsum(doubt)[:-1] > 0) | np.isin(np.arange(len(doubt) - 1), beside)


def _unseen_returns(
    receives: Columns, readers: np.ndarray, begun: Begun, lossy: Hidden
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks between which a reader may have dequeued and returned what no call is seen to return.

    Between two of its calls, peeks too, where events may be missing; and after its last, for the recording ends as well: unless
    it fell asleep then and is not seen to come back. From a sleep on, where all up to that was seen.
    """
    rows = np.flatnonzero(np.isin(receives["tid"], readers))
    tid = receives["tid"][rows].astype(np.int64)
    rows, tid = rows[np.argsort(tid, kind="stable")], np.sort(tid, kind="stable")
    rank, time = receives["rank"][rows], receives["time"][rows]
    is_last = np.append(tid[1:] != tid[:-1], True)
    until, end = (np.where(is_last, _NEVER, np.append(one[1:], _NEVER)) for one in (rank, time))
    wanted = is_last | lossy.touch(time, end)
    rank, time, tid, until, end, is_last = (one[wanted] for one in (rank, time, tid, until, end, is_last))
    left = begun.sleeps.last_before(until, tid)
    slept, since = begun.sleeps.rank_of(left, -1), pick(begun.slept_time, left, NAT)
    is_told = (slept > rank) & ~lossy.touch(time, since)
    came = begun.returns.rank_of(begun.returns.first_after(slept, tid), _NEVER)
    stays = is_told & ((came == _NEVER) | ~is_last) & ~lossy.touch(since, end)
    return np.where(is_told, slept, rank)[~stays], until[~stays]


def _beside_unplaced(since: np.ndarray, rank: np.ndarray, is_unplaced: np.ndarray) -> np.ndarray:
    """Tell which calls were under way together with one of which it is not known what it took: either may have what is the other's."""
    ended, begun = np.sort(rank[is_unplaced]), np.sort(since[is_unplaced])
    count = np.searchsorted
    within = count(ended, rank, side="left") > count(ended, since, side="right")
    around = count(begun, rank, side="left") > count(ended, rank, side="right")
    together: np.ndarray = within | around
    return together


def _begun_since(
    receives: Columns, tid: np.ndarray, rank: np.ndarray, begun: Begun, lossy: Hidden
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank after which each call dequeued, and whether it is its task's first since the last that was seen.

    It had entered the call, its last one had returned, and it had come back from its last sleep. Where events may be missing
    between the two calls there may have been others: then only the last return counts.
    """
    calls = begun.calls
    here = calls.last_before(rank, tid, inclusive=True)
    last = calls.last_before(rank, tid)
    before = calls.rank_of(last, -1)
    asleep = begun.sleeps.last_before(rank, tid)
    slept = begun.sleeps.rank_of(asleep, -1)
    came = begun.returns.first_after(slept, tid)
    came_rank = begun.returns.rank_of(came, -1)
    # One that left once more before it is seen to come had come back unseen.
    is_seen = (came >= 0) & (begun.leaves.rank_of(begun.leaves.last_before(came_rank, tid), -1) <= slept)
    # A sleep before the last return says nothing of what came after that.
    back = np.where(slept > before, np.where(is_seen, came_rank, slept), -1)
    entry = begun.entries.rank_of(begun.entries.last_before(rank, tid), -1)
    back = np.maximum(np.where(back < rank, back, -1), entry)
    ended = np.where(last >= 0, pick(receives["time"], last, NAT), begun.earlier.time)
    is_sure = ~lossy.touch(ended, pick(receives["time"], here, NAT))
    return np.maximum(before, np.where(is_sure, back, -1)), is_sure


def _doubt_crossed(
    result: Consumption, path: KernelPath, segments: Segments, packets: np.ndarray, socket: np.ndarray
) -> None:
    """Doubt neighbours in a queue that two CPUs processed at once: data_ready does not tell which was queued first."""
    skb = segments.skb[packets]
    received, ready = pick(path.time[:, _RX], skb, NAT), pick(path.time[:, _READY], skb, NAT)
    cpu = pick(path.cpu[:, _RX], skb, -1)
    ready = np.where(ready == NAT, received + RACE_NS, ready)
    crossed = (socket[1:] == socket[:-1]) & (cpu[1:] != cpu[:-1]) & (received[1:] < ready[:-1])
    crossed &= (received[1:] != NAT) & (received[:-1] != NAT)
    result.anchors_disagree[packets[1:][crossed]] = True
    result.anchors_disagree[packets[:-1][crossed]] = True
