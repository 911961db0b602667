"""TCP bytes that came more than once: the first arrival that was not dropped owns them, a later one is a duplicate."""

from __future__ import annotations

import numpy as np

from rxlab.read.columns import Columns
from rxlab.read.compiler import njit

# Pieces of a stream held beyond its contiguous part while a hole is open; a sender's window has fewer holes than this.
MAX_PIECES = 256


def covered_segments(
    flow: np.ndarray,
    position: np.ndarray,
    length: np.ndarray,
    arrival: np.ndarray,
    is_dropped: np.ndarray,
    before: Columns | None = None,
) -> np.ndarray:
    """Tell which segments bring nothing new.

    Parameters
    ----------
    flow, position, length, arrival : int64 arrays, dims (segment,)
        Directed flow, stream position of the first byte, bytes, and when it came; length 0: not looked at.
    is_dropped : bool array
        The kernel freed the segment before it was read: it owns nothing.
    before : Columns, optional
        ``flow, begin, end`` of the pieces of the streams that had come before (:func:`merged_pieces`).
    """
    if before is not None and before.n:
        blank, late = np.zeros(before.n, bool), len(flow)
        flow, position = np.concatenate((before["flow"], flow)), np.concatenate((before["begin"], position))
        length = np.concatenate((before["end"] - before["begin"], length))
        first = np.full(before.n, np.iinfo(np.int64).min)
        arrival, is_dropped = np.concatenate((first, arrival)), np.concatenate((blank, is_dropped))
        return covered_segments(flow, position, length, arrival, is_dropped)[-late:] if late else blank[:0]
    order = np.lexsort((arrival, flow))
    order = order[length[order] > 0]
    covered = np.zeros(len(flow), bool)
    if len(order):
        covered[order] = _covered(flow[order], position[order], (position + length)[order], is_dropped[order])
    return covered


def merged_pieces(before: Columns | None, flow: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Columns:
    """Return the pieces of the streams that `before` (None: none) and segments cover together."""
    if before is not None:
        flow, begin = np.concatenate((before["flow"], flow)), np.concatenate((before["begin"], begin))
        end = np.concatenate((before["end"], end))
    order = np.lexsort((begin, flow))
    flow, begin, end = flow[order], begin[order], end[order]
    if not len(flow):
        return Columns({"flow": flow, "begin": begin, "end": end})
    reached = running_max(end, flow)
    is_head = np.ones(len(flow), bool)
    is_head[1:] = (flow[1:] != flow[:-1]) | (begin[1:] > reached[:-1])
    first = np.flatnonzero(is_head)
    last = np.append(first[1:], len(flow)) - 1
    return Columns({"flow": flow[first], "begin": begin[first], "end": reached[last]})


def last_pieces(pieces: Columns) -> Columns:
    """Return the last `MAX_PIECES` pieces of each stream."""
    following = np.searchsorted(pieces["flow"], pieces["flow"], side="right")
    return pieces.take(following - np.arange(pieces.n) <= MAX_PIECES)


@njit(cache=True, nogil=True)
def _covered(flow, begin, end, is_dropped):
    """Walk the segments of each flow in order of arrival, keeping the pieces of the stream that have come."""
    covered = np.zeros(len(flow), np.bool_)
    low, high = np.empty(MAX_PIECES, np.int64), np.empty(MAX_PIECES, np.int64)
    n = 0
    for i in range(len(flow)):
        if i == 0 or flow[i] != flow[i - 1]:
            n = 0
        for k in range(n):
            if low[k] <= begin[i] and end[i] <= high[k]:
                covered[i] = True
                break
        if covered[i] or is_dropped[i]:
            continue
        first, last = begin[i], end[i]
        kept = 0
        for k in range(n):
            if low[k] <= last and high[k] >= first:
                first, last = min(first, low[k]), max(last, high[k])
            else:
                low[kept], high[kept] = low[k], high[k]
                kept += 1
        if kept == MAX_PIECES:
            kept -= 1
        low[kept], high[kept] = first, last
        n = kept + 1
    return covered


@njit(cache=True, nogil=True)
def running_max(values, group):
    """Return the running maximum within each group of consecutive rows."""
    result = values.copy()
    for i in range(1, len(values)):
        if group[i] == group[i - 1] and result[i - 1] > result[i]:
            result[i] = result[i - 1]
    return result
