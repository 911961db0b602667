"""TCP where events are missing: which call took each packet's bytes, by bounds, whatever the copies seem to say.

A copy names an skb by its address, and where the births of later skbs may be missing an address says only "this packet or a later
one". That is a bound all the same. With what had arrived, what calls returned and readers woken from an empty socket
the stream position of many calls is exact (bounds.py); the others are in doubt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.bounds import NOWHERE, Calls, close_in
from rxlab.follow.consumption import MSG_PEEK, Consumption, Segments
from rxlab.follow.hidden import Hidden
from rxlab.follow.kernelpath import KernelPath
from rxlab.follow.repeats import running_max

MSG_WAITALL = 0x100  # include/linux/socket.h


@dataclass(frozen=True)
class StreamLinks:
    """What the copies say by skb address; dims (copy,): stream position and flow (-1: none), and when their skb arrived."""

    start: np.ndarray
    flow: np.ndarray
    since: np.ndarray


def confirm_streams(
    result: Consumption,
    path: KernelPath,
    segments: Segments,
    links: StreamLinks,
    wakes: tuple[np.ndarray, np.ndarray],
    lossy: Hidden,
    dense: int,
    reached: np.ndarray,
) -> None:
    """Confirm, correct or doubt the claims of TCP packets in whose life events were lost, or that are in doubt anyway.

    Parameters
    ----------
    wakes : pair of int64 arrays, dims (packet,)
        Rank of the wake-up each packet's data_ready made and the task woken, -1 where none.
    dense : int
        From this rank on all calls are at hand.
    reached : int64 array, dims (flow,)
        How far each stream had come with the packets that are not at hand any more.
    """
    data = np.flatnonzero(segments.is_tcp & (segments.length > 0) & (segments.flow >= 0))
    returned = pick(result.receives["time"], result.receive[data], np.iinfo(np.int64).max // 4)
    first, last = result.first_copy[data], result.last_copy[data]
    start = segments.arrival[data]
    for copy in (first, last):
        start = np.minimum(start, np.where(copy >= 0, pick(links.since, copy, 0), start))
    in_doubt = result.anchors_disagree[data]
    touched = lossy.touch(start, returned) | in_doubt
    if not touched.any():
        return
    calls = _calls_of_flows(result, path, segments, data)
    place = _close(result, segments, data, links, wakes, calls, lossy, dense, reached)
    rows, call = _owners(result, segments, data, calls, place)
    owner = np.full(len(segments.flow), -1, np.int64)
    owner[rows] = call
    mine = data[touched]
    claimed = result.receive[mine]
    # Bytes that came twice may have been read from either; which one is known only where nothing is missing.
    sure = (owner[mine] >= 0) & ~segments.is_repeat[mine]
    sure &= ~(_repeated(segments, data)[touched] & lossy.touch(start, returned)[touched])
    result.receive[mine] = np.where(sure, owner[mine], -1)
    result.anchors_disagree[mine] = ~sure & (claimed >= 0)
    _place_copies(result, segments, mine, sure, calls, place)


@dataclass(frozen=True)
class _FlowCalls:
    """Receive calls of the flows, by (flow, rank): row of the receive events and flow."""

    row: np.ndarray
    flow: np.ndarray


def _calls_of_flows(result: Consumption, path: KernelPath, segments: Segments, data: np.ndarray) -> _FlowCalls:
    """Return the calls that took bytes of each flow's socket while it was that flow's, sockets with a single reader only."""
    receives = result.receives
    flow = segments.flow[data]
    socket = pick(path.columns["socket"], segments.skb[data], 0).astype(np.uint64)
    known = socket > 0
    numbers, inverse = np.unique(flow[known], return_inverse=True)
    low = np.full(len(numbers), np.iinfo(np.uint64).max, np.uint64)
    high = np.zeros(len(numbers), np.uint64)
    np.minimum.at(low, inverse, socket[known])
    np.maximum.at(high, inverse, socket[known])
    first = np.full(len(numbers), np.iinfo(np.int64).max)
    np.minimum.at(first, inverse, segments.arrival[data][known])
    numbers, high, first = numbers[low == high], high[low == high], first[low == high]
    rows = np.flatnonzero(
        (receives["protocol"] == 6) & (receives["ret"] > 0) & ((receives["flags"].astype(np.int64) & MSG_PEEK) == 0)
    )
    if not len(rows) or not len(numbers):
        return _FlowCalls(np.empty(0, np.int64), np.empty(0, np.int64))
    # A socket's address is used again by later connections: each call belongs to the last that had begun.
    origin = min(int(first.min()), int(receives["time"][rows].min()))
    begun = AsOf(first - origin, high)
    at = begun.last_before(receives["time"][rows] - origin, receives["sk"][rows].astype(np.uint64))
    of_flow = np.where(at >= 0, numbers[np.maximum(at, 0)], -1)
    rows, of_flow = rows[of_flow >= 0], of_flow[of_flow >= 0]
    order = np.lexsort((receives["rank"][rows], of_flow))
    rows, of_flow = rows[order], of_flow[order]
    pairs = np.unique(np.stack([of_flow, receives["tid"][rows].astype(np.int64)], axis=1), axis=0)
    several = np.unique(pairs[:, 0], return_counts=True)
    lonely = np.isin(of_flow, several[0][several[1] == 1])
    return _FlowCalls(rows[lonely], of_flow[lonely].astype(np.int64))


def _close(
    result: Consumption,
    segments: Segments,
    data: np.ndarray,
    links: StreamLinks,
    wakes: tuple[np.ndarray, np.ndarray],
    calls: _FlowCalls,
    lossy: Hidden,
    dense: int,
    reached: np.ndarray,
) -> np.ndarray:
    """Return the stream position each call ended at, `NOWHERE` where it cannot be known."""
    receives, row = result.receives, calls.row
    if not len(row):
        return np.empty(0, np.int64)
    time, step = receives["time"][row], receives["ret"][row].astype(np.int64)
    low = np.full(len(row), NOWHERE, np.int64)
    slot = np.full(receives.n + 1, -1, np.int64)
    slot[row] = np.arange(len(row))
    copies = result.copies
    at = slot[copies["call"]]
    useful = (at >= 0) & (links.flow >= 0) & (np.where(at >= 0, calls.flow[at], -2) == links.flow)
    np.maximum.at(low, at[useful], (links.start + copies["len"].astype(np.int64))[useful])
    waking, woken = wakes
    woke = data[waking[data] >= 0]
    index = AsOf(receives["rank"][row], calls.flow, receives["tid"][row].astype(np.int64))
    call = index.first_after(waking[woke], segments.flow[woke].astype(np.int64), woken[woke])
    woke, call = woke[call >= 0], call[call >= 0]
    # A reader asleep had read everything before; one that waits for all of its buffer may have part of it already.
    waits = (receives["flags"][row[call]].astype(np.int64) & MSG_WAITALL) > 0
    np.maximum.at(low, call, segments.position[woke] + np.where(waits, 1, step[call]))
    high = np.maximum(_arrived(segments, data, calls, time), reached[calls.flow])
    is_next = np.concatenate(([False], ~lossy.touch(time[:-1], time[1:])))
    is_next[1:] &= receives["rank"][row[:-1]] >= dense
    return close_in(Calls(calls.flow, step, is_next, low, high)).place


def _arrived(segments: Segments, data: np.ndarray, calls: _FlowCalls, time: np.ndarray) -> np.ndarray:
    """Return for each call the end of the stream that had arrived when it returned."""
    order = data[np.lexsort((segments.arrival[data], segments.flow[data]))]
    flow, arrival = segments.flow[order].astype(np.int64), segments.arrival[order]
    end = running_max(segments.position[order] + segments.length[order], flow)
    origin = int(arrival.min())
    at = AsOf(arrival - origin, flow).last_before(np.maximum(time - origin, 0), calls.flow)
    return np.where(at >= 0, end[np.maximum(at, 0)], NOWHERE)


def _owners(
    result: Consumption, segments: Segments, data: np.ndarray, calls: _FlowCalls, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the packets whose last byte lies in a call of known position, and those calls."""
    known = np.flatnonzero(place > NOWHERE)
    if not len(known):
        return known, known
    step = result.receives["ret"][calls.row[known]].astype(np.int64)
    end, flow = place[known], calls.flow[known]
    origin = int(min(segments.position[data].min(), (end - step).min()))
    last_byte = segments.position[data] + segments.length[data] - 1 - origin
    at = AsOf(end - origin, flow).first_after(last_byte, segments.flow[data].astype(np.int64))
    inside = (at >= 0) & ((end - step - origin)[np.maximum(at, 0)] <= last_byte)
    return data[inside], calls.row[known[at[inside]]]


def _repeated(segments: Segments, data: np.ndarray) -> np.ndarray:
    """Tell which packets share bytes with another packet of their flow."""
    order = np.lexsort((segments.position[data], segments.flow[data]))
    rows = data[order]
    flow, position = segments.flow[rows], segments.position[rows]
    end = running_max(position + segments.length[rows], flow.astype(np.int64))
    overlaps = (flow[1:] == flow[:-1]) & (position[1:] < end[:-1])
    repeated = np.zeros(len(rows), bool)
    repeated[1:] |= overlaps
    repeated[:-1] |= overlaps
    back = np.empty(len(rows), bool)
    back[order] = repeated
    return back


def _place_copies(
    result: Consumption,
    segments: Segments,
    packets: np.ndarray,
    sure: np.ndarray,
    calls: _FlowCalls,
    place: np.ndarray,
) -> None:
    """Give packets the copies of calls whose position is known and whose copies add up; nothing else says where a copy was."""
    result.first_copy[packets] = result.last_copy[packets] = -1
    copies, receives = result.copies, result.receives
    if not len(place):
        return
    slot = np.full(receives.n + 1, -1, np.int64)
    slot[calls.row] = np.arange(len(calls.row))
    at = slot[copies["call"]]
    # One doubtful copy shifts all others of its call.
    is_whole = np.ones(len(place), bool)
    is_whole[at[(at >= 0) & copies["doubtful"]]] = False
    rows = np.flatnonzero((at >= 0) & is_whole[at] & (np.where(at >= 0, place[at], NOWHERE) > NOWHERE))
    if not len(rows):
        return
    rows = rows[np.lexsort((copies["rank"][rows], copies["call"][rows]))]
    at, length = at[rows], copies["len"][rows].astype(np.int64)
    total = np.cumsum(length)
    heads = np.concatenate(([True], at[1:] != at[:-1]))
    before = total - length - np.maximum.accumulate(np.where(heads, total - length, 0))
    begin = place[at] - receives["ret"][calls.row[at]].astype(np.int64) + before
    origin = int(min(begin.min(), segments.position[packets].min()))
    index = AsOf(begin - origin, calls.flow[at])
    flow = segments.flow[packets].astype(np.int64)
    for target, byte in (
        (result.first_copy, segments.position[packets]),
        (result.last_copy, segments.position[packets] + segments.length[packets] - 1),
    ):
        found = index.last_before(byte - origin, flow, inclusive=True)
        found = np.where(sure & (pick(begin + length, found, NOWHERE) > byte), found, -1)
        target[packets] = pick(rows, found, -1)
