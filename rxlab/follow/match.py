"""Packets of the pcap <-> skb events of the kernel: one to one, in order, by time windows and lengths.

A packet's stamp and the skb's own events enclose each other (alignment: where the pcap stamp is taken), so with known clocks
every packet has a small set of candidate events. Among the candidates the heaviest order-preserving assignment is chosen:
never the nearest in time, which slips by whole packets after a stall, and never the first that fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

# Stamp and event clocks agree to tens of ns; a window is widened by this much on both sides.
TOLERANCE_NS = 300
# How long after netif_receive_skb a tap takes its stamp.
TAP_SPAN_NS = 5_000
# A software stamp may precede its event by a CPU stall or a full backlog.
STALL_NS = 100_000_000
# Events looked at per packet: bounds time and memory where the windows are wide.
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

    Decided from the event side, which is robust to lost events: the fraction of events with a stamp of the same length
    inside their window.

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
        The two fractions, and the number of events looked at.
    """

    def fraction(time: np.ndarray, length: np.ndarray, span: np.ndarray) -> float:
        if not len(time) or not len(packet_time):
            return 0.0
        step = max(1, len(time) // sample)
        return float(_has_stamp(packet_time, packet_len, time[::step], length[::step], span[::step]).mean())

    bracket = fraction(driver_time, driver_len, driver_span)
    tap = fraction(receive_time, receive_len, np.full(len(receive_time), TAP_SPAN_NS))
    evidence = {"bracket": bracket, "tap": tap, "events": float(max(len(driver_time), len(receive_time)))}
    if not len(receive_time) or not len(packet_time):
        return "unknown", evidence
    if max(bracket, tap) < 0.5:
        return "nic", evidence
    return ("bracket" if bracket > tap else "tap"), evidence


def _has_stamp(
    packet_time: np.ndarray, packet_len: np.ndarray, time: np.ndarray, length: np.ndarray, span: np.ndarray
) -> np.ndarray:
    """Tell for each event whether a packet of equal length is stamped within [time, time + span]."""
    order = np.lexsort((packet_time, packet_len))
    origin = min(packet_time.min(), time.min())
    width = int(max(packet_time.max(), time.max()) - origin) + int(span.max()) + 2
    key = packet_len[order].astype(np.int64) * width + (packet_time[order] - origin)
    want = length.astype(np.int64) * width + (time - origin)
    at = np.searchsorted(key, want)
    return (at < len(key)) & (key[np.minimum(at, len(key) - 1)] <= want + span)


def match_packets(
    packet_time: np.ndarray,
    packet_len: np.ndarray,
    window_low: np.ndarray,
    window_high: np.ndarray,
    event_len: np.ndarray,
    event_time: np.ndarray,
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
    """
    packets = np.argsort(packet_time, kind="stable")
    events = np.argsort(event_time, kind="stable")
    if len(packets) == 0 or len(events) == 0:
        return Matched(np.full(len(packets), -1, np.int64), np.zeros(len(packets), bool))
    low, high = window_low[events], window_high[events]
    # With both edges made monotone the candidates of a packet are one slice of the events; the exact test follows.
    first = np.searchsorted(np.maximum.accumulate(high), packet_time[packets], side="left")
    last = np.searchsorted(np.minimum.accumulate(low[::-1])[::-1], packet_time[packets], side="right")
    last = np.minimum(last, first + MAX_CANDIDATES)
    chosen, ambiguous = _heaviest_chain(
        packet_time[packets], packet_len[packets].astype(np.int64), low, high, event_len[events].astype(np.int64), event_time[events],
        np.asarray(first, np.int64), np.asarray(last, np.int64),
    )  # fmt: skip
    result = np.full(len(packet_time), -1, np.int64)
    result[packets] = np.where(chosen >= 0, events[np.maximum(chosen, 0)], -1)
    flags = np.zeros(len(packet_time), bool)
    flags[packets] = ambiguous
    return Matched(result, flags)


@njit(cache=True, nogil=True)
def _heaviest_chain(x, x_len, low, high, e_len, e, first, last):
    """Heaviest strictly increasing set of (packet, event) edges, by a Fenwick tree over events: O(edges log events).

    An edge weighs 20 - log(1 + |stamp - expected| / 1 us): a match is worth more than any number of closer stamps.
    """
    n, m = len(x), len(e)
    # Fenwick tree of prefix maxima: best[k] is the edge that ends the heaviest chain among the events it covers.
    best = np.full(m + 1, -1, np.int64)
    n_edges = 0
    for i in range(n):
        for j in range(first[i], last[i]):
            if e_len[j] == x_len[i] and low[j] <= x[i] <= high[j]:
                n_edges += 1
    edge_event = np.empty(n_edges, np.int64)
    edge_packet = np.empty(n_edges, np.int64)
    edge_before = np.empty(n_edges, np.int64)
    edge_weight = np.empty(n_edges, np.float64)
    n_candidates = np.zeros(n, np.int64)
    n_claims = np.zeros(m, np.int64)
    k = 0
    for i in range(n):
        start = k
        for j in range(first[i], last[i]):
            if e_len[j] != x_len[i] or x[i] < low[j] or x[i] > high[j]:
                continue
            # Best chain that ends at an event before j.
            before, weight = -1, 0.0
            at = j
            while at > 0:
                if best[at] >= 0 and edge_weight[best[at]] > weight:
                    before, weight = best[at], edge_weight[best[at]]
                at -= at & -at
            edge_event[k], edge_packet[k], edge_before[k] = j, i, before
            edge_weight[k] = weight + 20.0 - np.log1p(abs(x[i] - e[j]) / 1000.0)
            n_candidates[i] += 1
            n_claims[j] += 1
            k += 1
        # Only after all edges of this packet were weighed, so that no chain uses a packet twice.
        for edge in range(start, k):
            at = edge_event[edge] + 1
            while at <= m:
                if best[at] < 0 or edge_weight[edge] > edge_weight[best[at]]:
                    best[at] = edge
                at += at & -at
    chosen = np.full(n, -1, np.int64)
    end, weight = -1, -1.0
    for edge in range(n_edges):
        if edge_weight[edge] > weight:
            end, weight = edge, edge_weight[edge]
    while end >= 0:
        chosen[edge_packet[end]] = edge_event[end]
        end = edge_before[end]
    taken = np.zeros(m, np.bool_)
    for i in range(n):
        if chosen[i] >= 0:
            taken[chosen[i]] = True
    ambiguous = np.zeros(n, np.bool_)
    for i in range(n):
        if chosen[i] < 0 or n_candidates[i] < 2:
            continue
        for j in range(first[i], last[i]):
            # A free event that also fits: which of the two carried the packet cannot be known from order and length.
            if not taken[j] and e_len[j] == x_len[i] and low[j] <= x[i] <= high[j]:
                ambiguous[i] = True
    return chosen, ambiguous
