"""UDP: which datagrams were in which socket's queue, and in what order.

The socket of a datagram is what its own data_ready names; of one that has none, the socket that its flow feeds.
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
_RX, _READY = STAGE_INDEX["netif_receive_skb"], STAGE_INDEX["data_ready"]


@dataclass(frozen=True)
class Fed:
    """What earlier parts of a recording told of the queues.

    Attributes
    ----------
    flow, socket, count : integer arrays, dims (pair,)
        Datagrams of each flow that data_ready said to be in each socket.
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
    behind: int = 0
    largest: int = 0
    left: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def nothing(cls) -> Fed:
        """Return what is known before a recording begins."""
        return cls(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64))

    def sockets_of(self, n_flows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and the highest socket that each flow feeds: equal where it is one."""
        low, high = np.full(n_flows, np.iinfo(np.uint64).max, np.uint64), np.zeros(n_flows, np.uint64)
        np.minimum.at(low, self.flow, self.socket)
        np.maximum.at(high, self.flow, self.socket)
        return low, high

    def with_datagrams(self, flow: np.ndarray, socket: np.ndarray) -> Fed:
        """Return the counts with some datagrams more."""
        flow, socket = np.concatenate((self.flow, flow)), np.concatenate((self.socket, socket))
        count = np.concatenate((self.count, np.ones(len(flow) - len(self.count), np.int64)))
        order = np.lexsort((socket, flow))
        flow, socket, count = flow[order], socket[order], count[order]
        heads = (
            np.flatnonzero(np.concatenate(([True], (flow[1:] != flow[:-1]) | (socket[1:] != socket[:-1]))))
            if len(flow)
            else order
        )
        total = np.add.reduceat(count, heads) if len(flow) else count
        return replace(self, flow=flow[heads], socket=socket[heads], count=total)

    def without_foreign(self) -> Fed:
        """Leave out sockets that took so few of a flow's datagrams that they took none."""
        total = np.bincount(self.flow, weights=self.count)
        own = self.count * FOREIGN_SHARE >= total[self.flow]
        return replace(self, flow=self.flow[own], socket=self.socket[own], count=self.count[own])


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
    fed = fed.with_datagrams(segments.flow[new].astype(np.int64), result.fed[new]).without_foreign()
    _forget_foreign(result, path, segments, packets[linked], fed)
    ready_rank = pick(path.rank[:, _READY], skb[packets], -1)
    seen = ready_rank >= 0
    socket = np.where(seen, pick(path.columns["socket"], skb[packets], 0), 0).astype(np.uint64)
    # Earlier flows may have no datagram here, and new ones have fed nothing yet.
    low, high = fed.sockets_of(int(max(flow.max(initial=-1), fed.flow.max(initial=-1))) + 1)
    low, high = low[flow], high[flow]
    place = ~seen & ~segments.is_freed[packets] & (low == high)
    received = pick(path.time[:, _RX], skb[packets], NAT)
    told = (received != NAT) & ~hidden.touch(received, received + QUEUE_NS, pick(path.cpu[:, _RX], skb[packets], -1))
    # Without the events that tell of drops, a datagram that was not made ready may be one.
    sure = seen | (told if "skb:kfree_skb" in events else np.zeros(len(packets), bool))
    socket = np.where(place, high, socket)
    keep = np.flatnonzero(seen | place)
    keep = keep[_queue_order(segments, packets[keep], socket[keep])]
    return packets[keep], ready_rank[keep], socket[keep], sure[keep]


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
