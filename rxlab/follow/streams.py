"""TCP: a byte stream. Which copies took each packet's bytes, by stream position.

``skb_copy_datagram_iovec`` names an skb, and its position in the stream is that skb's sequence number plus what was already
copied from it. Bytes merged into another skb (GRO, socket backlog, tcp_try_coalesce) are found by position, not by address.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.consumption import Consumption, Segments
from rxlab.follow.kernelpath import KernelPath
from rxlab.follow.streambounds import StreamLinks
from rxlab.stages import STAGE_INDEX


def consume_streams(result: Consumption, path: KernelPath, segments: Segments) -> StreamLinks | None:
    """Join TCP packets to copies by stream position; returns what the copies say by skb address."""
    copies, flow = result.copies, segments.flow
    if not copies.n or not len(flow):
        return None
    packet, copy_start, whole, since = _copy_positions(result, path, segments)
    copy_flow = pick(flow, packet, -1)
    result.copied_from = packet.copy()
    order = np.lexsort((copies["rank"], copy_flow))
    order = order[copy_flow[order] >= 0]
    data = np.flatnonzero(segments.is_tcp & (segments.length > 0) & (flow >= 0))
    by_flow = data[np.argsort(flow[data], kind="stable")]
    rx_rank = pick(path.rank[:, STAGE_INDEX["netif_receive_skb"]], segments.skb, -1)
    edges = np.flatnonzero(np.diff(copy_flow[order], prepend=-2, append=-2))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        rows = order[low:high]
        number = int(copy_flow[rows[0]])
        first, stop = np.searchsorted(flow[by_flow], [number, number + 1])
        mine = StreamCopies(rows, copy_start[rows], copies["len"][rows].astype(np.int64), whole[rows])
        own = _own_copies(mine, copies["doubtful"][rows])
        if not own.all():
            result.copied_from[rows[~own]] = -1
            mine = StreamCopies(*(column[own] for column in (rows, mine.start, mine.length, mine.whole)))
        _consume_stream(result, by_flow[first:stop], mine, segments, rx_rank)
    return StreamLinks(copy_start, copy_flow, since)


@dataclass(frozen=True)
class StreamCopies:
    """The copies of one flow in rank order: rows of the copy events, stream positions, bytes, and whether their skb was
    copied whole."""

    rows: np.ndarray
    start: np.ndarray
    length: np.ndarray
    whole: np.ndarray


def _own_copies(copies: StreamCopies, doubtful: np.ndarray) -> np.ndarray:
    """Tell which copies are of this stream: not those that go back in it and whose call does not add up.

    Their skb address is one that the stream used before.
    """
    end = copies.start + copies.length
    own: np.ndarray = ~(doubtful & (copies.start < np.maximum.accumulate(end) - copies.length))
    return own


def _consume_stream(
    result: Consumption, packets: np.ndarray, copies: StreamCopies, segments: Segments, rx_rank: np.ndarray
) -> None:
    """Join one flow: its packets to its copies, both in stream order."""
    rows, start, length = copies.rows, copies.start, copies.length
    # Copies of one stream continue each other exactly. Where events were lost they do not, and a copy is then believed
    # only if its own skb was copied whole: its position needs no neighbour.
    continues = np.concatenate(([True], start[1:] == start[:-1] + length[:-1]))
    continued = np.concatenate((continues[1:], [True]))
    order = np.lexsort((rows, start))
    begin, end = start[order], start[order] + length[order]
    # No byte is copied twice: the address of one of the two was another skb's by then, whose birth nobody saw.
    twice = np.zeros(len(order), bool)
    twice[1:] = begin[1:] < np.maximum.accumulate(end)[:-1]
    twice[:-1] |= end[:-1] > begin[1:]
    disagree = ~(copies.whole | (continues & continued))
    disagree[order] |= twice
    copy_rank = result.copies["rank"][rows][order]
    first_byte, last_byte = segments.position[packets], segments.position[packets] + segments.length[packets] - 1
    at = np.searchsorted(begin, first_byte, side="right") - 1
    to = np.searchsorted(begin, last_byte, side="right") - 1
    found = (at >= 0) & (to >= 0)
    at, to = np.maximum(at, 0), np.maximum(to, 0)
    found &= (end[at] > first_byte) & (end[to] > last_byte)
    # Bytes that had come before, or were copied before this packet arrived, were another packet's.
    found &= (copy_rank[at] > rx_rank[packets]) & ~segments.is_repeat[packets]
    # Every byte between must have been copied too: a hole means the join must not claim the packet.
    hole = np.cumsum(np.concatenate(([0], (begin[1:] != end[:-1]).astype(np.int64))))
    found &= hole[at] == hole[to]
    result.first_copy[packets] = np.where(found, rows[order][at], -1)
    result.last_copy[packets] = np.where(found, rows[order][to], -1)
    result.receive[packets] = np.where(found, result.copies["call"][rows[order][to]], -1)
    doubtful = result.copies["doubtful"][rows][order]
    result.anchors_disagree[packets] = found & (disagree[order][at] | disagree[order][to] | doubtful[to])


def _copy_positions(
    result: Consumption, path: KernelPath, segments: Segments
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return packet and stream position of each copy, whether its skb was copied whole, and when that skb arrived.

    Packet is -1 where the skb has none. "Whole" means that the copies of one skb add up to its packet's payload, which
    no lost copy event could leave so.
    """
    copies, skb = result.copies, segments.skb
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
    usable = (packet >= 0) & segments.is_tcp[packet] & ((called == socket) | ((socket == 0) & (copies["call"] >= 0)))
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
    whole[order] = np.repeat(sums, sizes) == np.where(usable, segments.length[packet], -1)[order]
    # Beyond the skb's own bytes a copy is of bytes merged into it, unless its call does not add up either: then the address
    # was reused where no birth is recorded (AF_UNIX, netlink).
    usable &= ~(copies["doubtful"] & (before >= np.where(packet >= 0, segments.length[packet], 0)))
    since = pick(path.time[:, rx], life, np.iinfo(np.int64).max)
    return (
        np.where(usable, packet, -1),
        np.where(usable, segments.position[packet] + before, 0),
        whole,
        since,
    )
