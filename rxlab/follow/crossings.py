"""Captures of two hosts -> which packet of one is which of the other, without any clock.

What identifies a packet on both hosts is what no wire changes. For the bytes of a TCP stream that is their place in it: a frame that
leaves a host with TSO arrives as several, and GRO merges several into one. For everything else it is the whole header, and for a
datagram its payload. A packet sent again has the same place: the timestamp option and the IP ID tell copies apart, or the packet is
said to be ambiguous and keeps every copy it may be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.errors import ClockError
from rxlab.follow.samepackets import Side, alike_datagrams, hash_rows, keyed, same_packets, same_starts
from rxlab.follow.status import TCP
from rxlab.read.columns import Columns
from rxlab.read.compiler import njit

# What became of a packet that arrived, against the capture where it left.
CROSSINGS = ("absent", "matched", "segment", "merged", "ambiguous", "step", "inconsistent", "by_gaps")
ABSENT, MATCHED, SEGMENT, MERGED, AMBIGUOUS, STEP, INCONSISTENT, BY_GAPS = range(len(CROSSINGS))
# IP IDs tell copies apart where both hosts saw the same ones: no translator in between wrote its own.
SAME_IDS = 0.9
# Segments are no shorter than this where paths are sane (RFC 9293's default), so a frame has no more of them.
LEAST_MSS = 536
# Fewer packets than this in common are chance, or too few to say which host sent which.
MIN_COMMON = 3


@dataclass(frozen=True)
class Crossing:
    """Packets that crossed the network in one direction.

    Attributes
    ----------
    arrived : int64 array, dims (packet,)
        Rows of the capture where they arrived, ascending.
    first, last : int64 arrays, dims (packet,)
        Rows of the capture where they left, -1 unknown: the earliest frame that may have brought the packet's first byte, and the
        latest that may have brought its last. Of bytes of which only a second sending was captured the first is not known.
    status : int8 array, dims (packet,)
        Index into `CROSSINGS`.
    n_unseen : int
        Packets that left and of which nothing arrived: lost, or not captured.
    """

    arrived: np.ndarray
    first: np.ndarray
    last: np.ndarray
    status: np.ndarray
    n_unseen: int


def match_captures(sender: Columns, receiver: Columns, received: np.ndarray | None = None) -> tuple[Crossing, Crossing]:
    """Match the packets of two hosts' captures, each direction from where it left to where it arrived.

    Parameters
    ----------
    sender, receiver : Columns
        As :func:`rxlab.read_pcap` gives them, with ``digest`` (:func:`rxlab.read.payload.payload_digests`, of the same number of
        bytes on both sides), each in the order of its own capture.
    received : bool array, dims (packet,), optional
        Which of the receiver's packets came in. Without it the packets tell: in whatever direction they took longer by the
        difference of the clocks, against packets of the other direction around them, the sender sent them.

    Returns
    -------
    forward : Crossing
        From sender to receiver.
    reverse : Crossing
        From receiver to sender.

    Raises
    ------
    ClockError
        The captures have next to no packet in common.
    """
    there, here = keyed(sender), keyed(receiver)
    mine, other = same_packets(there, here)
    alike = alike_datagrams(there, here, mine, other)
    begun = same_starts(there, here, mine, other)
    pairs = [np.concatenate(one) for one in zip((mine, other), alike, begun, strict=True)]
    if len(pairs[0]) < MIN_COMMON:
        raise ClockError(
            "the two captures have no packets in common",
            found=f"{len(pairs[0])} of {sender.n:,} and {receiver.n:,} packets",
            expected="one conversation, captured on both hosts",
            do="Give two files of one run, with no proxy in between.",
        )
    flow_there = _flows_in_common(there, here, *pairs)
    is_pair = flow_there[here.flow[pairs[1]]] == there.flow[pairs[0]]
    anchors = pairs[0][is_pair], pairs[1][is_pair]
    forward = _forward_flows(there, here, *anchors, received)
    places = _places(there, here, *anchors)
    same_ids = _has_same_ids(there, here, *anchors)
    is_whole = is_pair[: len(is_pair) - len(begun[0])]
    mine, other = (one[: len(is_whole)][is_whole] for one in pairs)
    mine, other = _without_wrong_ids(there, here, mine, other, same_ids)
    partner = np.full(len(here.rows), -1, np.int64)
    partner[other] = mine
    partner_there = np.full(len(there.rows), -1, np.int64)
    partner_there[mine] = other
    # The receiver's flow numbers hold on both sides from here on.
    flow_here = np.full(there.n_flows + 1, -1, np.int64)
    known = np.flatnonzero(flow_there >= 0)
    flow_here[flow_there[known]] = known
    renamed = Side(there.rows, flow_here[there.flow], there.packets)
    return (
        _cross(renamed, here, partner, alike[1], places, forward, same_ids),
        _cross(here, renamed, partner_there, alike[0], places[::-1], ~forward, same_ids),
    )


def _flows_in_common(there: Side, here: Side, mine: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each directed flow of `here` the one of `there` that most of its packets have, -1 where none; one to one.

    Both directions of a connection go together, so one that has no packet of its own in common follows the other.
    """
    result = np.full(here.n_flows + 1, -1, np.int64)
    # Which way round a connection was first seen differs: the parity of a pair says whether.
    turned = (there.flow[mine] ^ here.flow[other]) & 1
    pair = ((here.flow[other] >> 1) << 33) | ((there.flow[mine] >> 1) << 1) | turned
    pairs, counts = np.unique(pair, return_counts=True)
    taken = set()
    for at in np.argsort(-counts, kind="stable"):
        to, source, turn = int(pairs[at]) >> 33, int(pairs[at]) >> 1 & 0xFFFFFFFF, int(pairs[at]) & 1
        if result[2 * to] >= 0 or source in taken:
            continue
        taken.add(source)
        result[2 * to], result[2 * to + 1] = 2 * source + turn, 2 * source + 1 - turn
    return result


def _forward_flows(
    there: Side,
    here: Side,
    mine: np.ndarray,
    other: np.ndarray,
    received: np.ndarray | None,
) -> np.ndarray:
    """Tell for each directed flow of `here` whether its packets go from `there` to `here`."""
    n = here.n_flows
    if received is not None:
        came = np.where(received[here.rows], 1.0, -1.0)
        return np.asarray(np.bincount(here.flow, came, n) > 0)
    order = np.lexsort((here.of("time")[other], here.flow[other] >> 1))
    flow = here.flow[other][order]
    # Packets of one connection that went opposite ways, one after the other: the clocks' difference is in both.
    took = (here.of("time")[other] - there.of("time")[mine])[order]
    turns = np.flatnonzero((flow[1:] >> 1 == flow[:-1] >> 1) & (flow[1:] != flow[:-1]))
    longer = np.sign(took[turns + 1] - took[turns]).astype(np.float64)
    votes = np.bincount(flow[turns + 1], longer, n) + np.bincount(flow[turns], -longer, n)
    # Where a connection says nothing, its hosts' other connections do; else the sender sends.
    address = hash_rows(here.of("src_hi"), here.of("src_lo"))
    source = np.zeros(n, np.uint64)
    source[here.flow] = address
    hosts, host = np.unique(source, return_inverse=True)
    of_host = np.bincount(host, votes, len(hosts))[host]
    votes = np.where(votes != 0, votes, of_host)
    silent = votes.reshape(-1, 2) == 0
    votes = np.where(silent, -votes.reshape(-1, 2)[:, ::-1], votes.reshape(-1, 2)).ravel()
    carried = np.bincount(here.flow, here.of("payload_len") + 1.0, n).reshape(-1, 2)
    most = np.where(carried >= carried[:, ::-1], 1.0, -1.0).ravel()
    return np.asarray(np.where(votes != 0, votes, most) > 0)


@njit(cache=True, nogil=True)
def _unwrapped(flow, seq, n_flows):
    """Stream positions of 32-bit sequence numbers, per flow in the order given (RFC 9293: modulo 2**32)."""
    last = np.full(n_flows, -1, np.int64)
    result = np.empty(len(flow), np.int64)
    for row in range(len(flow)):
        before = last[flow[row]]
        at = np.int64(seq[row])
        if before >= 0:
            at = before + (at - before + 2**31) % 2**32 - 2**31
        # Never below zero: a number before the first would look like none.
        last[flow[row]] = max(at, 0)
        result[row] = at
    return result


def _places(there: Side, here: Side, mine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the stream position of each packet's first byte, on both sides by the same count."""
    left = _unwrapped(there.flow, there.of("seq"), there.n_flows)
    right = _unwrapped(here.flow, here.of("seq"), here.n_flows)
    # One capture may have begun a round of the 32 bits earlier: packets in common tell by how many.
    ahead = np.zeros(here.n_flows, np.int64)
    ahead[here.flow[other][::-1]] = np.rint((left[mine] - right[other])[::-1] / 2**32).astype(np.int64) << 32
    return left, right + ahead[here.flow]


def _has_same_ids(there: Side, here: Side, mine: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether the IP IDs of packets in common are the same on both sides."""
    a, b = there.of("ip_id")[mine], here.of("ip_id")[other]
    both = (a != 0) & (b != 0) & (here.of("ip_version")[other] == 4)
    return bool(both.any() and (a == b)[both].mean() >= SAME_IDS)


def _without_wrong_ids(
    there: Side, here: Side, mine: np.ndarray, other: np.ndarray, same_ids: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out pairs of different IP IDs: one of two alike was missed here, the other there."""
    a, b = there.of("ip_id")[mine], here.of("ip_id")[other]
    wrong = same_ids & (a != b) & (a != 0) & (b != 0) & (here.of("ip_version")[other] == 4)
    return mine[~wrong], other[~wrong]


def _cross(
    left: Side,
    came: Side,
    partner: np.ndarray,
    alike: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    forward: np.ndarray,
    same_ids: bool,
) -> Crossing:
    """Follow one direction: `left` is where its packets left, `came` where they arrived; flows are numbered alike."""
    goes = np.append(forward, False)
    rows = np.flatnonzero(goes[came.flow])
    how = np.full(len(partner), MATCHED, np.int8)
    how[alike] = BY_GAPS
    first, status = partner[rows].copy(), np.where(partner[rows] >= 0, how[rows], ABSENT).astype(np.int8)
    last = first.copy()
    streams = [
        np.flatnonzero((side.of("proto") == TCP) & (side.of("payload_len") > 0) & goes[side.flow])
        for side in (left, came)
    ]
    sent, got = (
        part[np.argsort(side.flow[part], kind="stable")] for side, part in zip((left, came), streams, strict=True)
    )
    ids = [side.of("ip_id").astype(np.int64) * (same_ids & (side.of("ip_version") == 4)) for side in (left, came)]
    facts = []
    for side, place, number, part in zip((left, came), places, ids, (sent, got), strict=True):
        length = side.of("payload_len").astype(np.int64)
        stamp = side.of("tsval").astype(np.int64)
        facts.append(np.stack([side.flow[part], place[part], length[part], stamp[part], number[part]]))
    earliest, latest, kind, is_used = _carriers(facts[0], facts[1])
    at = np.searchsorted(rows, got)
    first[at] = np.where(earliest >= 0, sent[earliest], -1)
    last[at] = np.where(latest >= 0, sent[latest], -1)
    status[at] = kind
    seen = np.zeros(len(left.rows), bool)
    seen[first[first >= 0]] = True
    seen[sent] = is_used
    n_unseen = int((~seen & goes[left.flow]).sum())
    outside = [np.where(found >= 0, left.rows[found], -1) for found in (first, last)]
    return Crossing(came.rows[rows], outside[0], outside[1], status, n_unseen)


@njit(cache=True, nogil=True)
def _carriers(sent, got):
    """The frames that may have carried each arrived packet's first byte (earliest) and last byte (latest).

    Both tables have rows flow, place, length, tsval, IP ID (0 unknown), ordered by flow and then as captured. Frames with bytes never
    sent before lie one behind the other in the stream; the others, sent again, are sought by their place.
    """
    n, m = sent.shape[1], got.shape[1]
    earliest, latest = np.full(m, -1, np.int64), np.full(m, -1, np.int64)
    kind, is_used = np.zeros(m, np.int8), np.zeros(n, np.bool_)
    new, again = np.empty(n, np.int64), np.empty(n, np.int64)
    low = 0
    begin = 0
    while begin < m:
        flow = got[0, begin]
        end = begin
        while end < m and got[0, end] == flow:
            end += 1
        while low < n and sent[0, low] < flow:
            low += 1
        high, n_new, n_again, longest = low, 0, 0, 0
        reached = np.int64(-(2**62))
        while high < n and sent[0, high] == flow:
            if sent[1, high] < reached:
                again[n_again] = high
                n_again += 1
                longest = max(longest, sent[2, high])
            if sent[1, high] + sent[2, high] > reached:
                new[n_new] = high
                n_new += 1
                reached = sent[1, high] + sent[2, high]
            high += 1
        ends = sent[1, new[:n_new]] + sent[2, new[:n_new]]
        order = again[:n_again][np.argsort(sent[1, again[:n_again]], kind="mergesort")]
        starts = sent[1, order]
        for row in range(begin, end):
            place, stop = got[1, row], got[1, row] + got[2, row]
            count, n_sent_again_only = 0, 0
            for side in range(2):
                byte = place if side == 0 else stop - 1
                found, n_found = np.int64(-1), 0
                at = np.searchsorted(ends, byte, side="right")
                if side == 0:
                    from_frame = at
                near = np.searchsorted(starts, byte - longest)
                one = new[at] if at < n_new and sent[1, new[at]] <= byte else np.int64(-1)
                # A frame with old and new bytes is in both lists.
                counted = np.int64(-1)
                is_known = one >= 0
                while True:
                    if one >= 0 and one != counted and _may_carry(sent[:, one], got[:, row], byte):
                        n_found += 1
                        counted = one
                        is_used[one] = True
                        if found < 0 or (one < found) == (side == 0):
                            found = one
                    if near >= n_again or starts[near] > byte:
                        break
                    one = order[near]
                    near += 1
                count = max(count, n_found)
                if side == 0:
                    # Bytes that were only seen sent again may have come with what the capture missed.
                    n_sent_again_only = 0 if is_known else n_found
                    earliest[row] = found if is_known else -1
                else:
                    latest[row] = found
            a, b = earliest[row], latest[row]
            if b < 0 or (a < 0 and n_sent_again_only == 0):
                earliest[row], latest[row] = -1, -1
            elif n_sent_again_only > 0 or count > 1:
                kind[row] = AMBIGUOUS
            elif a != b:
                kind[row] = MERGED
                is_used[new[from_frame:at]] = True
            else:
                kind[row] = MATCHED if sent[2, a] == got[2, row] else SEGMENT
        begin = end
        low = high
    return earliest, latest, kind, is_used


@njit(cache=True, nogil=True)
def _may_carry(frame, packet, byte):
    """Whether a frame may have brought a byte of a packet: it holds the byte, and its timestamp and IP ID do not contradict."""
    if not frame[1] <= byte < frame[1] + frame[2]:
        return False
    if frame[3] != 0 and packet[3] != 0 and frame[3] != packet[3]:
        return False
    if frame[1] <= packet[1] < frame[1] + frame[2] and frame[4] != 0 and packet[4] != 0:
        # The segments of one frame are numbered on; a merged packet keeps its first one's number.
        apart = (packet[4] - frame[4]) % 65536
        if frame[1] == packet[1]:
            return apart == 0
        return apart <= frame[2] // LEAST_MSS + 1
    return True
