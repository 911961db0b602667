"""Packets of the pcap <-> skb events of the kernel: one to one, in order, by time windows and lengths.

A packet's stamp and the skb's own events enclose each other (alignment: where the pcap stamp is taken), so with known clocks
every packet has a small set of candidate events. Among the candidates the heaviest order-preserving assignment is chosen:
never the nearest in time, which slips by whole packets after a stall, and never the first that fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rxlab.follow.asof import AsOf, pick, places
from rxlab.read.compiler import njit

# Stamp and event clocks agree to tens of ns; a window is widened by this much on both sides.
TOLERANCE_NS = 300
# How long after netif_receive_skb a tap takes its stamp.
TAP_SPAN_NS = 5_000
# A software stamp may precede its event by a CPU stall or a full backlog.
STALL_NS = 100_000_000
# Odds against all events meeting a packet by chance (natural logarithm) from which on that they do means something.
MIN_ODDS = 5.0
# Below this fraction by chance, or of so few events, there is nothing to doubt.
MAX_CHANCE, MIN_EVENTS = 0.5, 50
# Packets looked at on either side of an event: bounds time and memory where the windows are wide.
MAX_CANDIDATES = 256


@dataclass(frozen=True)
class Matched:
    """Result of :func:`match_packets`.

    Attributes
    ----------
    event : int64 array, dims (packet,)
        Index of the matched event, -1 where none.
    ambiguous : bool array, dims (packet,)
        Another assignment would have satisfied the same windows and lengths.
    """

    event: np.ndarray
    ambiguous: np.ndarray


def classify_stamp(
    packet_time: np.ndarray,
    packet_len: np.ndarray,
    driver_time: np.ndarray,
    driver_span: np.ndarray,
    driver_len: np.ndarray,
    receive_time: np.ndarray,
    receive_len: np.ndarray,
    *,
    sample: int = 20_000,
) -> tuple[str, dict[str, float]]:
    """Tell from the data where the pcap stamp was taken.

    Decided by the fraction of events with a stamp of the same length inside their window, which lost events leave as it is, or the
    fraction of packets in the window of such an event, which a capture of some of the packets (a filter, one flow in N) leaves
    as it is; the larger, less what chance makes of it. Only events inside the capture's time count: a capture that was cut says nothing about the rest.

    Parameters
    ----------
    packet_time, driver_time, receive_time : int64 arrays, nanoseconds of CLOCK_MONOTONIC
    driver_span : int64 array, dims (driver event,), nanoseconds
        How long the driver's call lasted: to netif_rx, or to netif_receive_skb for NAPI (which stamps where GRO hands over).
    packet_len, driver_len, receive_len : integer arrays, bytes above the MAC header

    Returns
    -------
    position : {"bracket", "tap", "nic", "unknown"}
    evidence : dict
        The two fractions, the number of events looked at, and the larger fraction by ``chance``: that of stamps displaced by half
        the capture.
    """
    n_events = float(max(len(driver_time), len(receive_time)))
    if not len(receive_time) or not len(packet_time):
        return "unknown", {"bracket": 0.0, "tap": 0.0, "events": n_events, "chance": 0.0}

    def fraction(
        packet_time: np.ndarray, packet_len: np.ndarray, time: np.ndarray, length: np.ndarray, span: np.ndarray
    ) -> float:
        origin, every = packet_time.min() - STALL_NS, max(1, len(packet_time) // sample)
        during = (time >= origin) & (time <= packet_time.max())
        time, length, span = time[during], length[during], span[during]
        if not len(time):
            return 0.0
        step = max(1, len(time) // sample)
        # An event has a packet of its length within [time, time + span]; a packet, the last event of its length before it.
        by_length = AsOf(packet_time - origin, packet_len)
        stamped = by_length.first_after(time[::step] - origin, length[::step], inclusive=True)
        events = pick(packet_time, stamped, np.iinfo(np.int64).max) <= time[::step] + span[::step]
        stamps = packet_time[::every]
        last = AsOf(time - origin, length).last_before(stamps - origin, packet_len[::every], inclusive=True)
        packets = (last >= 0) & (stamps <= pick(time + span, last, 0))
        return float(max(events.mean(), packets.mean()))

    by_driver = (driver_time, driver_len, driver_span)
    by_stack = (receive_time, receive_len, np.full(len(receive_time), TAP_SPAN_NS))
    packets = (packet_time, packet_len)
    found = {"bracket": fraction(*packets, *by_driver), "tap": fraction(*packets, *by_stack)}
    # One packet displaced is where it was.
    moved = _displaced(packet_time, packet_len, sample) if len(packet_time) > 1 else None
    chance = (
        {"bracket": fraction(*moved, *by_driver), "tap": fraction(*moved, *by_stack)}
        if moved is not None
        else dict.fromkeys(found, 0.0)
    )
    position = max(("tap", "bracket"), key=lambda place: (found[place] >= 0.5, found[place] - chance[place]))
    evidence = {**found, "events": n_events, "chance": chance[position]}
    return (position if found[position] >= 0.5 else "nic"), evidence


def _displaced(packet_time: np.ndarray, packet_len: np.ndarray, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Return stamps and lengths of `sample` packets from the middle of a capture, moved by half the time they take, the end to the start."""
    middle = slice(max(0, (len(packet_time) - sample) // 2), (len(packet_time) + sample) // 2)
    time, length = packet_time[middle], packet_len[middle]
    earliest, lasting = time.min(), time.max() - time.min() + 1
    return earliest + (time - earliest + lasting // 2) % lasting, length


def is_place_sure(position: str, evidence: Mapping[str, float]) -> bool:
    """Tell whether packets and events that met where :func:`classify_stamp` says did not do so by chance.

    Of packets so many and so alike that any instant has one nearby, every place looks right.
    """
    if position not in evidence or evidence["chance"] < MAX_CHANCE or evidence["events"] < MIN_EVENTS:
        return True
    found = evidence[position]
    is_rare = -evidence["events"] * math.log(max(evidence["chance"], 1e-9)) >= MIN_ODDS
    return is_rare and 1 - found <= (1 - evidence["chance"]) / 4


def match_packets(
    packet_time: np.ndarray,
    packet_len: np.ndarray,
    window_low: np.ndarray,
    window_high: np.ndarray,
    event_len: np.ndarray,
    event_time: np.ndarray,
    may_overtake: np.ndarray | None = None,
    doubtful: np.ndarray | None = None,
) -> Matched:
    """Assign packets to events, order-preserving, inside each event's stamp window and with equal lengths.

    Parameters
    ----------
    packet_time : int64 array, dims (packet,), nanoseconds of CLOCK_MONOTONIC
        Stamps of received packets, any order.
    packet_len, event_len : integer arrays, bytes above the MAC header
    window_low, window_high : int64 arrays, dims (event,), nanoseconds of CLOCK_MONOTONIC
        Where the stamp of the event's packet must lie.
    event_time : int64 array, dims (event,), nanoseconds of CLOCK_MONOTONIC
        Where it is expected, and the order of the events.
    may_overtake : bool array, dims (event,), optional
        Events whose packet may have been stamped out of this order: what the ordered assignment leaves over is matched again.
    doubtful : bool array, dims (event,), optional
        Events that may be another's packet than the order says, for that one's may be missing: ambiguous where they could.
    """
    packets = np.argsort(packet_time, kind="stable")
    events = np.argsort(event_time, kind="stable")
    if len(packets) == 0 or len(events) == 0:
        return Matched(np.full(len(packets), -1, np.int64), np.zeros(len(packets), bool))
    stamp, low, high = packet_time[packets], window_low[events], window_high[events]
    # The packets each event could be: a slice of the stamps. A few wide windows (events at a stall, or without a successor)
    # then cost little, and no other event its place.
    middle = places(stamp, event_time[events])
    earliest, latest = places(stamp, low), places(stamp, high, inclusive=True)
    first = np.maximum(earliest, middle - MAX_CANDIDATES)
    last = np.minimum(latest, middle + MAX_CANDIDATES)
    x_len, e_len = packet_len[packets].astype(np.int64), event_len[events].astype(np.int64)
    chosen, ambiguous = _heaviest_chain(stamp, x_len, e_len, event_time[events], first, last)
    if may_overtake is not None:
        left = _Left(stamp, x_len, e_len, event_time[events], first, last)
        ambiguous = left.match(chosen, ambiguous, may_overtake[events])
    if doubtful is not None and doubtful.any():
        clipped = (first > earliest) | (last < latest)
        forced = _is_forced(x_len, e_len, first, last, clipped, chosen)
        ambiguous = ambiguous | (~forced & pick(doubtful[events], chosen, False))
    result = np.full(len(packet_time), -1, np.int64)
    result[packets] = np.where(chosen >= 0, events[np.maximum(chosen, 0)], -1)
    flags = np.zeros(len(packet_time), bool)
    flags[packets] = ambiguous
    return Matched(result, flags)


def match_by_flow(
    packet_time: np.ndarray,
    packet_len: np.ndarray,
    window_low: np.ndarray,
    window_high: np.ndarray,
    event_len: np.ndarray,
    event_time: np.ndarray,
    may_overtake: np.ndarray | None,
    flow: np.ndarray,
    flow_hash: np.ndarray,
    doubtful: np.ndarray | None = None,
) -> Matched:
    """Assign as :func:`match_packets`, then again by what that taught: which hash each flow has.

    Queues are polled on several CPUs at once, so stamps and events of equal lengths come in different orders, and order alone
    then swaps packets of different flows.

    Parameters
    ----------
    packet_time, packet_len, window_low, window_high, event_len, event_time, may_overtake, doubtful
        As :func:`match_packets`.
    flow : int array, dims (packet,)
        Directed flow, -1 where none.
    flow_hash : int64 array, dims (event,)
        skb->hash as the driver had it; 0 or less where it had none.
    """
    windows = (window_low, window_high)
    found = match_packets(packet_time, packet_len, *windows, event_len, event_time, may_overtake, doubtful)
    group = _flow_groups(found.event, flow, flow_hash)
    if group is None:
        return found
    if doubtful is not None and doubtful.all():
        # Events whose hash was lost fit any flow, so here the hashes only speak against.
        of_packet, of_event = group[0], pick(group[1], found.event, 0)
        return Matched(found.event, found.ambiguous | ((of_packet != of_event) & (of_packet > 0) & (of_event > 0)))
    span = int(max(packet_len.max(initial=0), event_len.max(initial=0))) + 1
    again = match_packets(
        packet_time,
        packet_len + span * group[0],
        *windows,
        event_len + span * group[1],
        event_time,
        may_overtake,
        doubtful,
    )
    event, ambiguous = again.event.copy(), again.ambiguous.copy()
    # A hash may change (a socket that retransmits takes a new one): what the flows leave over goes by order alone.
    free = np.ones(len(event_time), bool)
    free[event[event >= 0]] = False
    packets, events = np.flatnonzero(event < 0), np.flatnonzero(free)
    rest = match_packets(
        packet_time[packets],
        packet_len[packets],
        window_low[events],
        window_high[events],
        event_len[events],
        event_time[events],
        None if may_overtake is None else may_overtake[events],
        None if doubtful is None else doubtful[events],
    )
    event[packets] = np.where(rest.event >= 0, events[np.maximum(rest.event, 0)], -1) if len(events) else -1
    ambiguous[packets] = rest.ambiguous
    return Matched(event, ambiguous)


def _flow_groups(event: np.ndarray, flow: np.ndarray, flow_hash: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Number packets and events by the hash of their flow, 0 for unknown; None where no match contradicts the hashes.

    A flow has the hash that three of four of its matched events have, and two at least.
    """
    rows = np.flatnonzero((event >= 0) & (flow >= 0))
    rows = rows[flow_hash[event[rows]] > 0]
    if not len(rows):
        return None
    codes, hashes = pd.factorize(flow_hash[event[rows]])
    keys, count = np.unique(flow[rows].astype(np.int64) * len(hashes) + codes, return_counts=True)
    pairs = np.stack([keys // len(hashes), hashes[keys % len(hashes)]])
    total = np.bincount(flow[rows], minlength=int(flow.max()) + 1)
    if len(np.unique(pairs[0])) == pairs.shape[1] and (event >= 0).all():
        return None
    sure = (count >= 2) & (4 * count >= 3 * total[pairs[0]])
    of_flow = np.zeros(len(total), np.int64)
    known = np.unique(pairs[1][sure])
    of_flow[pairs[0][sure]] = 1 + np.searchsorted(known, pairs[1][sure])
    at = np.minimum(np.searchsorted(known, flow_hash), max(len(known) - 1, 0))
    of_event = np.where(known[at] == flow_hash, 1 + at, 0) if len(known) else np.zeros(len(flow_hash), np.int64)
    return np.where(flow >= 0, of_flow[np.maximum(flow, 0)], 0), of_event


@dataclass(frozen=True)
class _Left:
    """Packets and events as the ordered assignment sees them: by stamp, and by expected time with a slice of the stamps each."""

    stamp: np.ndarray
    x_len: np.ndarray
    e_len: np.ndarray
    event_time: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def match(self, chosen: np.ndarray, ambiguous: np.ndarray, may_overtake: np.ndarray) -> np.ndarray:
        """Assign what is left over, in rounds each of which keeps the order; fill `chosen`, return who is ambiguous then."""
        taken = np.zeros(len(self.e_len), bool)
        taken[chosen[chosen >= 0]] = True
        while True:
            events, packets = np.flatnonzero(may_overtake & ~taken), np.flatnonzero(chosen < 0)
            low, high = (np.searchsorted(packets, edge[events]) for edge in (self.first, self.last))
            more, _ = _heaviest_chain(
                self.stamp[packets], self.x_len[packets], self.e_len[events], self.event_time[events], low, high
            )
            found = more >= 0
            if not found.any():
                return ambiguous
            chosen[packets[found]] = events[more[found]]
            taken[events[more[found]]] = True
            ambiguous = (chosen >= 0) & _fits_free_event(self.x_len, self.e_len, self.first, self.last, taken)


@njit(cache=True, nogil=True)
def _fits_free_event(x_len, e_len, first, last, taken):
    """Tell which packets could also be one of the events that nobody has."""
    fits = np.zeros(len(x_len), np.bool_)
    for j in range(len(e_len)):
        if not taken[j]:
            for i in range(first[j], last[j]):
                if e_len[j] == x_len[i]:
                    fits[i] = True
    return fits


@njit(cache=True, nogil=True)
def _edges_by_packet(x_len, e_len, first, last):
    """Return the (packet, event) pairs of equal length, packets in order and events in order within a packet (CSR)."""
    n, m = len(x_len), len(e_len)
    start = np.zeros(n + 1, np.int64)
    for j in range(m):
        for i in range(first[j], last[j]):
            if e_len[j] == x_len[i]:
                start[i + 1] += 1
    for i in range(n):
        start[i + 1] += start[i]
    fill = start[:-1].copy()
    event = np.empty(start[n], np.int64)
    for j in range(m):
        for i in range(first[j], last[j]):
            if e_len[j] == x_len[i]:
                event[fill[i]] = j
                fill[i] += 1
    return start, event


@njit(cache=True, nogil=True)
def _is_forced(x_len, e_len, first, last, clipped, chosen):
    """Tell which packets have the event they would have in every order-preserving assignment that uses all events.

    All packets were captured, so every event has one; where the earliest and the latest assignment agree there is no other.
    An event of which not all packets were looked at (`clipped`) may have any: it takes none from the others.
    """
    n, m = len(x_len), len(e_len)
    early, late = np.full(m, -1, np.int64), np.full(m, -1, np.int64)
    free = 0
    for j in range(m):
        if clipped[j]:
            continue
        for i in range(max(first[j], free), last[j]):
            if x_len[i] == e_len[j]:
                early[j] = i
                free = i + 1
                break
    free = n
    for j in range(m - 1, -1, -1):
        if clipped[j]:
            continue
        for i in range(min(last[j], free) - 1, first[j] - 1, -1):
            if x_len[i] == e_len[j]:
                late[j] = i
                free = i
                break
    forced = np.zeros(n, np.bool_)
    for i in range(n):
        j = chosen[i]
        forced[i] = j < 0 or (early[j] == i and late[j] == i)
    return forced


@njit(cache=True, nogil=True)
def _heaviest_chain(x, x_len, e_len, e, first, last):
    """Heaviest strictly increasing set of (packet, event) edges, by a Fenwick tree over events: O(edges log events).

    An edge weighs 20 - log(1 + |stamp - expected| / 1 us): a match is worth more than any number of closer stamps.
    """
    n, m = len(x), len(e)
    start, event = _edges_by_packet(x_len, e_len, first, last)
    before = np.full(len(event), -1, np.int64)
    weight = np.zeros(len(event), np.float64)
    # Fenwick tree of prefix maxima: best[k] is the edge that ends the heaviest chain among the events it covers.
    best = np.full(m + 1, -1, np.int64)
    for i in range(n):
        for k in range(start[i], start[i + 1]):
            at = event[k]
            while at > 0:
                if best[at] >= 0 and weight[best[at]] > weight[k]:
                    before[k], weight[k] = best[at], weight[best[at]]
                at -= at & -at
            weight[k] += 20.0 - np.log1p(abs(x[i] - e[event[k]]) / 1000.0)
        # Only after all edges of this packet were weighed, so that no chain uses a packet twice.
        for k in range(start[i], start[i + 1]):
            at = event[k] + 1
            while at <= m:
                if best[at] < 0 or weight[k] > weight[best[at]]:
                    best[at] = k
                at += at & -at
    packet = np.repeat(np.arange(n), np.diff(start))
    chosen = np.full(n, -1, np.int64)
    end = np.argmax(weight) if len(weight) else -1
    while end >= 0:
        chosen[packet[end]] = event[end]
        end = before[end]
    taken = np.zeros(m, np.bool_)
    for i in range(n):
        if chosen[i] >= 0:
            taken[chosen[i]] = True
    ambiguous = np.zeros(n, np.bool_)
    for i in range(n):
        for k in range(start[i], start[i + 1]):
            # A free event that also fits: which of the two carried the packet cannot be known from order and length.
            if chosen[i] >= 0 and not taken[event[k]]:
                ambiguous[i] = True
    return chosen, ambiguous
