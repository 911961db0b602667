"""TCP bytes that came more than once: the first arrival that was not dropped owns them, a later one is a duplicate."""

from __future__ import annotations

import numpy as np

from rxlab.read.compiler import njit

# Pieces of a stream held beyond its contiguous part while a hole is open; a sender's window has fewer holes than this.
MAX_PIECES = 256


def covered_segments(
    flow: np.ndarray, position: np.ndarray, length: np.ndarray, arrival: np.ndarray, is_dropped: np.ndarray
) -> np.ndarray:
    """Tell which segments bring nothing new.

    Parameters
    ----------
    flow, position, length, arrival : int64 arrays, dims (segment,)
        Directed flow, stream position of the first byte, bytes, and when it came; length 0: not looked at.
    is_dropped : bool array
        The kernel freed the segment before it was read: it owns nothing.
    """
    order = np.lexsort((arrival, flow))
    order = order[length[order] > 0]
    covered = np.zeros(len(flow), bool)
    if len(order):
        covered[order] = _covered(flow[order], position[order], (position + length)[order], is_dropped[order])
    return covered


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
