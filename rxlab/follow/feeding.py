"""UDP: which datagrams were in which socket's queue, and in what order.

The socket of a datagram is what its own data_ready names; of one that has none, what its flow's neighbours say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from rxlab.follow.asof import pick
from rxlab.follow.bounds import NOWHERE
from rxlab.follow.clockfit import NAT
from rxlab.follow.consumption import Consumption, Segments
from rxlab.follow.hidden import Hidden
from rxlab.follow.kernelpath import KernelPath
from rxlab.follow.repeats import running_max
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX

# How long after netif_receive_skb a datagram is queued, at most, when nothing interrupts it.
QUEUE_NS = 50_000
# A socket that took less than one in this many of a flow's datagrams took none.
FOREIGN_SHARE = 20
# Of ports with more sockets it is not looked at which of them a datagram may be in.
MAX_GROUP = 64
_RX, _READY = STAGE_INDEX["netif_receive_skb"], STAGE_INDEX["data_ready"]


@dataclass(frozen=True)
class Fed:
    """What earlier parts of a recording told of the queues.

    Attributes
    ----------
    flow, socket, count, port, last : integer arrays, dims (pair,)
        Datagrams of each flow that data_ready said to be in each socket, the local port they went to, and the row of the last.
    behind : int
        Datagrams that were surely queued and had no data_ready.
    largest : int
        Most bytes that a call on a UDP socket returned.
    left : uint64 array, dims (socket,)
        Sockets of which some datagrams are no more at hand; of the others all are, and all calls since the first of them.
    """

    flow: np.ndarray
    socket: np.ndarray
    count: np.ndarray
    port: np.ndarray
    last: np.ndarray
    behind: int = 0
    largest: int = 0
    left: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def nothing(cls) -> Fed:
        """Return what is known before a recording begins."""
        none = np.empty(0, np.int64)
        return cls(none, none.astype(np.uint64), none, none, none)

    def with_datagrams(self, flow: np.ndarray, socket: np.ndarray, port: np.ndarray, row: np.ndarray) -> Fed:
        """Return the counts with some datagrams more."""
        if not len(flow):
            return self
        count = np.concatenate((self.count, np.ones(len(flow), np.int64)))
        flow, socket = np.concatenate((self.flow, flow.astype(np.int64))), np.concatenate((self.socket, socket))
        port, last = np.concatenate((self.port, port.astype(np.int64))), np.concatenate((self.last, row))
        order = np.lexsort((socket, flow))
        flow, socket = flow[order], socket[order]
        heads = np.flatnonzero(np.concatenate(([True], (flow[1:] != flow[:-1]) | (socket[1:] != socket[:-1]))))
        return replace(
            self,
            flow=flow[heads],
            socket=socket[heads],
            count=np.add.reduceat(count[order], heads),
            port=port[order][heads],
            last=np.maximum.reduceat(last[order], heads),
        )

    def without_foreign(self) -> Fed:
        """Leave out sockets of other ports that took so few of a flow's datagrams that they took none.

        A flow may well move between the sockets of its port (SO_REUSEPORT), as when one of them is closed.
        """
        if not len(self.flow):
            return self
        of_flow = np.bincount(self.flow, weights=self.count)[self.flow]
        _, socket = np.unique(self.socket, return_inverse=True)
        of_socket = np.bincount(socket, weights=self.count)[socket]
        _, pair = np.unique(socket * 65536 + self.port, return_inverse=True)
        of_port = np.bincount(pair, weights=self.count)[pair]
        own = (self.count * FOREIGN_SHARE >= of_flow) | (2 * of_port > of_socket)
        return replace(self, **{name: getattr(self, name)[own] for name in ("flow", "socket", "count", "port", "last")})

    def last_socket(self, flow: np.ndarray) -> np.ndarray:
        """Return the socket that each flow's last datagram was in, 0 where none was seen."""
        newest = np.lexsort((self.last, self.flow))
        at = np.searchsorted(self.flow[newest], flow, side="right") - 1
        found = (at >= 0) & (pick(self.flow[newest], at, -1) == flow)
        return np.where(found, pick(self.socket[newest], at, 0), 0).astype(np.uint64)

    def of_ports(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ports and their sockets, each pair once, by port."""
        pairs = np.unique(np.stack([self.port.astype(np.uint64), self.socket]), axis=1)
        return pairs[0].astype(np.int64), pairs[1]


@dataclass(frozen=True)
class Earlier:
    """What is known of the recording before the part that is looked at.

    Attributes
    ----------
    fed : Fed
    time : int, nanoseconds of CLOCK_MONOTONIC
        When the recording began.
    rank : int
        From this rank on all events are at hand.
    """

    fed: Fed
    time: int
    rank: int = -1


def queued_datagrams(
    result: Consumption,
    events: Mapping[str, Columns],
    path: KernelPath,
    segments: Segments,
    hidden: Hidden,
    fed: Fed,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the packets that were, or may have been, queued: row, rank of data_ready (-1: not seen), socket, whether it surely was.

    Sorted by arrival, which is queue order on one socket except where CPUs race. Since Linux 6.10 data_ready is only called
    where the queue was empty (__udp_enqueue_schedule_skb, "becomes_readable"): a datagram without it was dropped, where the
    kernel says so, or waits behind another. One that was captured and of which perf delivered nothing may be either.
    """
    skb = segments.skb
    packets = np.flatnonzero(segments.is_udp & (segments.flow >= 0))
    flow = segments.flow[packets].astype(np.int64)
    linked = pick(path.rank[:, _READY], skb[packets], -1) >= 0
    is_fed = linked & ~segments.is_freed[packets]
    result.fed[packets] = np.where(is_fed, pick(path.columns["socket"], skb[packets], 0), 0)
    new = packets[is_fed & ~segments.is_counted[packets]]
    fed = fed.with_datagrams(
        segments.flow[new], result.fed[new], segments.port[new], segments.row[new]
    ).without_foreign()
    _forget_foreign(result, path, segments, packets[linked], fed)
    ready_rank = pick(path.rank[:, _READY], skb[packets], -1)
    seen = ready_rank >= 0
    socket = np.where(seen, pick(path.columns["socket"], skb[packets], 0), 0).astype(np.uint64)
    received = pick(path.time[:, _RX], skb[packets], NAT)
    told = (received != NAT) & ~hidden.touch(received, received + QUEUE_NS, pick(path.cpu[:, _RX], skb[packets], -1))
    # Without the events that tell of drops, a datagram that was not made ready may be one.
    told &= "skb:kfree_skb" in events
    unseen = np.flatnonzero(~seen & ~segments.is_freed[packets])
    at, where, sure = _places_of_unseen(result, segments, packets, socket, unseen, fed)
    # Where events may be missing a flow of which none was seen may have fed a socket of which none was.
    sure &= told[at] & ((not hidden.any) | (fed.last_socket(flow)[at] > 0))
    rows, sockets = np.concatenate((packets[seen], packets[at])), np.concatenate((socket[seen], where))
    ranks = np.concatenate((ready_rank[seen], np.full(len(at), -1, np.int64)))
    sure = np.concatenate((np.ones(int(seen.sum()), bool), sure))
    keep = _queue_order(segments, rows, sockets)
    return rows[keep], ranks[keep], sockets[keep], sure[keep]


def _places_of_unseen(
    result: Consumption, segments: Segments, packets: np.ndarray, socket: np.ndarray, unseen: np.ndarray, fed: Fed
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sockets that datagrams without a data_ready of their own (`unseen`, among `packets`) may be in.

    One that lies between two of its flow in one socket is in that, and so is one behind the last of its flow, if that socket is the only
    one of its port or was still read afterwards. One that may be in several is in none of them for sure.

    Returns
    -------
    row : int64 array, dims (place,)
        Index into `packets`.
    socket : uint64 array, dims (place,)
    is_sure : bool array, dims (place,)
    """
    flow = segments.flow[packets].astype(np.int64)
    before, after = _neighbours(flow, socket, fed.last_socket(flow))
    port, of_port = fed.of_ports()
    mine = segments.port[packets].astype(np.int64)
    low, high = np.searchsorted(port, mine, side="left"), np.searchsorted(port, mine, side="right")
    before, after, low, high = before[unseen], after[unseen], low[unseen], high[unseen]
    stays = high - low == 1
    if not stays.all():
        calls = pd.Series(result.receives["time"]).groupby(result.receives["sk"].astype(np.uint64)).max()
        last_call = pick(calls.to_numpy(), pd.Index(calls.index).get_indexer(pd.Index(before)), NAT)
        stays |= last_call > segments.arrival[packets[unseen]]
    moved = (before > 0) & (after > 0) & (before != after)
    anywhere = ((before > 0) & (after == 0) & ~stays) | ((before == 0) & (after == 0))
    one = np.flatnonzero(~moved & ~anywhere)
    two = np.flatnonzero(moved)
    count = np.where(anywhere & (high - low <= MAX_GROUP), high - low, 0)
    many = np.repeat(np.arange(len(unseen)), count)
    number = np.arange(len(many)) - np.repeat(np.cumsum(count) - count, count)
    row = np.concatenate((one, two, two, many))
    where = np.concatenate(
        (np.where(after > 0, after, before)[one], before[two], after[two], of_port[low[many] + number])
    )
    alone = np.concatenate((np.ones(len(one), bool), np.zeros(2 * len(two), bool), count[many] == 1))
    return unseen[row], where.astype(np.uint64), alone


def _neighbours(flow: np.ndarray, socket: np.ndarray, earlier: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each datagram the socket of the last before it and of the first after it of its flow that were seen, 0 where none.

    `earlier` is that of the flow's last datagram in the parts before; datagrams are in capture order, `socket` 0 where not seen.
    """
    order = np.argsort(flow, kind="stable")
    sorted_flow, known, place = flow[order], socket[order], np.arange(len(order))
    last = np.maximum.accumulate(np.where(known > 0, place, -1))
    following = np.minimum.accumulate(np.where(known > 0, place, len(order))[::-1])[::-1]
    following = np.where(following < len(order), following, -1)
    before, after = np.zeros(len(order), np.uint64), np.zeros(len(order), np.uint64)
    before[order] = np.where(pick(sorted_flow, last, -1) == sorted_flow, pick(known, last, 0), earlier[order])
    after[order] = np.where(pick(sorted_flow, following, -1) == sorted_flow, pick(known, following, 0), 0)
    return before, after


def _queue_order(segments: Segments, packets: np.ndarray, socket: np.ndarray) -> np.ndarray:
    """Return the order in which datagrams (rows in capture order) were queued: that of the events by which they entered the stack.

    One whose event is not known has its stamp only, which may have been taken long before, on another CPU: it was queued behind those
    of its socket that were captured before it.
    """
    order = np.lexsort((packets, socket))
    rows = packets[order]
    arrival, is_known = segments.arrival[rows], segments.skb[rows] >= 0
    _, code = np.unique(socket[order], return_inverse=True)
    behind = running_max(np.where(is_known, arrival, NOWHERE), code)
    place = np.empty(len(packets), np.int64)
    place[order] = np.where(is_known, arrival, np.maximum(arrival, behind))
    return np.argsort(place, kind="stable")


def _forget_foreign(result: Consumption, path: KernelPath, segments: Segments, linked: np.ndarray, fed: Fed) -> None:
    """Forget data_ready of datagrams that were dropped, or whose flow feeds another socket: the event was another packet's."""
    pairs = pd.MultiIndex.from_arrays([fed.flow, fed.socket])
    own = (
        pairs.get_indexer(pd.MultiIndex.from_arrays([segments.flow[linked].astype(np.int64), result.fed[linked]])) >= 0
    )
    rows = segments.skb[linked[~own | segments.is_freed[linked]]]
    path.unset("data_ready", rows)
    path.columns["socket"][rows] = 0
