"""Calls that found nothing, folded into the call before them: a reader that polls asks ten times for each datagram.

Such a call ends where the one before it ended. So in the bounds of a queue's calls (bounds.py) it is as good as part of that one:
the place lies not below what either has as its lower bound and not above either's upper one. Where the bounds of all calls agree
that gives the places of all calls; where they do not, which of them is false is told by looking at each call alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import AsOf, outward
from rxlab.follow.bounds import NOWHERE
from rxlab.read.columns import Columns
from rxlab.read.compiler import njit

EAGAIN = -11  # include/uapi/asm-generic/errno-base.h
_MOST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Folded:
    """The calls of a queue's only reader that returned something, and before them the first of all calls; dims (call,).

    Attributes
    ----------
    calls : int64 array
        Rows of the receive events.
    low, high : int64 arrays
        Bounds that the calls after each, up to the next, have; `NOWHERE` and the largest int64 where none.
    """

    calls: np.ndarray
    low: np.ndarray
    high: np.ndarray


def fold_refusals(
    receives: Columns,
    calls: np.ndarray,
    arrival: np.ndarray,
    ready_rank: np.ndarray,
    begun_after: tuple[AsOf, ...],
) -> Folded | None:
    """Fold the refused calls of a queue; None where there are none, or several readers.

    Parameters
    ----------
    receives : Columns
    calls : integer array, dims (call,)
        Rows of `receives` in order of rank.
    arrival, ready_rank : int64 arrays, dims (place,)
        Before when each datagram of the queue cannot have been read, and the rank of its data_ready, -1 where that was not seen.
    begun_after : three of AsOf
        Events of a task after which a call of it took something: returns of its calls, when it went to sleep, entries of its calls.
    """
    if not len(calls):
        return None
    tid, by_arrival = receives["tid"], np.argsort(arrival, kind="stable")
    seen = np.flatnonzero(ready_rank >= 0)
    rows, low, high = (np.empty(len(calls), np.int64) for _ in range(3))
    n, n_refused = _fold(
        calls,
        receives["rank"],
        receives["time"],
        receives["ret"],
        tid,
        (arrival[by_arrival], np.maximum.accumulate(by_arrival)),
        (np.maximum.accumulate(ready_rank[seen]), seen),
        tuple(index.ranks_of(tid[calls[:1]]) for index in begun_after),
        (rows, low, high),
    )
    return Folded(rows[:n].copy(), low[:n].copy(), high[:n].copy()) if n_refused else None


@njit(cache=True, nogil=True)
def _fold(calls, rank, time, ret, tid, arrivals, readies, begun_after, folded):
    """Fill in the calls that are left and the bounds of those folded; return how many of each, (0, 0) for several readers."""
    rows, low, high = folded
    arrival, arrived = arrivals
    ready, seen = readies
    returns, sleeps, entries = begun_after
    n = n_refused = 0
    at = back = asleep = inside = count = 0
    for row in calls:
        if tid[row] != tid[calls[0]]:
            return 0, 0
        if ret[row] >= 0 or (n == 0 and ret[row] == EAGAIN):
            rows[n], low[n], high[n] = row, NOWHERE, _MOST
            n += 1
            continue
        if ret[row] != EAGAIN:
            continue
        n_refused += 1
        at = outward(arrival, 0, len(arrival), time[row], at)
        high[n - 1] = min(high[n - 1], arrived[at - 1] if at else -1)
        back = outward(returns, 0, len(returns), rank[row], back)
        asleep = outward(sleeps, 0, len(sleeps), rank[row], asleep)
        inside = outward(entries, 0, len(entries), rank[row], inside)
        since = max(returns[back - 1] if back else -1, sleeps[asleep - 1] if asleep else -1)
        since = max(since, entries[inside - 1] if inside else -1)
        if since >= 0:
            count = outward(ready, 0, len(ready), since, count)
            low[n - 1] = max(low[n - 1], seen[count - 1] if count else -1)
    return n, n_refused
